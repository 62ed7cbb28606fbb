/*
 * truncate_hook.cpp
 *		TRUNCATE that comes to a partition, by its own name or by CASCADE, is refused
 *		when a table above it is replicated and not truncated with it: statement
 *		triggers do not reach it, the change would be lost.
 */
#include "capture_internal.hpp"
#include "mmrepl/base.hpp"
#include "mmrepl/origin.hpp"
#include "mmrepl/shmem.hpp"

namespace mmrepl::capture
{

static ProcessUtility_hook_type previous_process_utility;

/* The relations that the command has truncated; it holds their locks. */
static List *
Truncated(const TruncateStmt *statement)
{
	List *reached = NIL;
	List *referencing;
	ListCell *cell;

	foreach(cell, statement->relations)
	{
		const RangeVar *name = lfirst_node(RangeVar, cell);
		Oid table = RangeVarGetRelid(name, NoLock, true);

		if (OidIsValid(table))
			reached =
				list_concat_unique_oid(reached, name->inh ? find_all_inheritors(table, NoLock, NULL)
														  : list_make1_oid(table));
	}
	while (statement->behavior == DROP_CASCADE &&
		   (referencing = heap_truncate_find_FKs(reached)) != NIL)
		reached = list_concat(reached, referencing);
	return reached;
}

/* Whether the trigger fires in this session. */
static bool
Fires(const Trigger &trigger)
{
	char other = SessionReplicationRole == SESSION_REPLICATION_ROLE_REPLICA
					 ? TRIGGER_FIRES_ON_ORIGIN
					 : TRIGGER_FIRES_ON_REPLICA;

	return trigger.tgenabled != TRIGGER_DISABLED && trigger.tgenabled != other;
}

/*
 * Whether a trigger made by hand captures TRUNCATE of the table.  The table is not
 * locked: who locks it and its partition locks it first.
 */
static bool
HasHandTrigger(Oid table)
{
	Relation rel = RelationIdGetRelation(table);

	if (!RelationIsValid(rel))
		return false;
	const TriggerDesc *triggers = CopyTriggerDesc(rel->trigdesc);

	RelationClose(rel);
	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		const Trigger &trigger = triggers->triggers[i];

		if (TRIGGER_FOR_TRUNCATE(trigger.tgtype) && trigger.tgnargs == 5 && Fires(trigger) &&
			IsReplicate(trigger.tgfoid) && !SkipsSession(trigger.tgargs[3]))
			return true;
	}
	return false;
}

/* The nearest table above the partition that is replicated, and not among the truncated; or InvalidOid. */
static Oid
MissedAncestor(Oid partition, const List *truncated)
{
	ListCell *cell;

	if (!get_rel_relispartition(partition))
		return InvalidOid;
	foreach(cell, get_partition_ancestors(partition))
	{
		Oid ancestor = lfirst_oid(cell);

		if (!list_member_oid(truncated, ancestor) &&
			(catalog::PairsOf(ancestor) != NIL || HasHandTrigger(ancestor)))
			return ancestor;
	}
	return InvalidOid;
}

/* Raise, after the command, when it has truncated what no trigger has seen. */
static void
CheckTruncate(const TruncateStmt *statement)
{
	List *truncated = Truncated(statement);
	ListCell *cell;

	foreach(cell, truncated)
	{
		Oid ancestor = MissedAncestor(lfirst_oid(cell), truncated);

		if (!OidIsValid(ancestor))
			continue;
		ereport(
			ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg(
				 "cannot truncate partition \"%s\" of replicated table \"%s\" without that table",
				 get_rel_name(lfirst_oid(cell)), get_rel_name(ancestor)),
			 errdetail("The peers would keep its rows."),
			 errhint("Use DELETE, or name the replicated table in TRUNCATE.")));
	}
}

/* The check comes behind the command: with its locks nobody changes what it reaches. */
static void
OnProcessUtility(PlannedStmt *statement, const char *text, bool read_only,
				 ProcessUtilityContext context, ParamListInfo params, QueryEnvironment *environment,
				 DestReceiver *dest, QueryCompletion *completion)
{
	RunUtility(previous_process_utility,
			   {statement, text, read_only, context, params, environment, dest, completion});
	if (IsA(statement->utilityStmt, TruncateStmt) && shmem::Ready() && guc::capture &&
		!origin::Applying() && catalog::ExtensionExists())
		CheckTruncate((const TruncateStmt *) statement->utilityStmt);
}

void
InitTruncateHook()
{
	previous_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = OnProcessUtility;
}

} // namespace mmrepl::capture
