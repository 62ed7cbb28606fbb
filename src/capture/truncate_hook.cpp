/*
 * truncate_hook.cpp
 *		TRUNCATE of a partition by its own name is refused when a table above it
 *		is replicated: statement triggers do not reach it, the change would be lost.
 */
#include "capture_internal.hpp"
#include "mmrepl/base.hpp"
#include "mmrepl/origin.hpp"
#include "mmrepl/shmem.hpp"

namespace mmrepl::capture
{

static ProcessUtility_hook_type previous_process_utility;

/* The nearest replicated table above the partition, or InvalidOid. */
static Oid
ReplicatedAncestor(Oid partition)
{
	ListCell *cell;

	if (!get_rel_relispartition(partition) || catalog::PairsOf(partition) != NIL)
		return InvalidOid;
	foreach(cell, get_partition_ancestors(partition))
		if (catalog::PairsOf(lfirst_oid(cell)) != NIL)
			return lfirst_oid(cell);
	return InvalidOid;
}

static void
CheckTruncate(const TruncateStmt *statement)
{
	List *named = NIL;
	ListCell *cell;

	foreach(cell, statement->relations)
		named = lappend_oid(named, RangeVarGetRelid((RangeVar *) lfirst(cell), NoLock, true));
	foreach(cell, named)
	{
		Oid ancestor =
			OidIsValid(lfirst_oid(cell)) ? ReplicatedAncestor(lfirst_oid(cell)) : InvalidOid;

		if (!OidIsValid(ancestor) || list_member_oid(named, ancestor))
			continue;
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot truncate partition \"%s\" of replicated table \"%s\" directly",
						get_rel_name(lfirst_oid(cell)), get_rel_name(ancestor)),
				 errdetail("The peers would keep its rows."),
				 errhint("Use DELETE, or TRUNCATE the replicated table.")));
	}
}

static void
OnProcessUtility(PlannedStmt *statement, const char *text, bool read_only,
				 ProcessUtilityContext context, ParamListInfo params, QueryEnvironment *environment,
				 DestReceiver *dest, QueryCompletion *completion)
{
	if (IsA(statement->utilityStmt, TruncateStmt) && shmem::Ready() && guc::capture &&
		!origin::Applying() && catalog::ExtensionExists())
		CheckTruncate((const TruncateStmt *) statement->utilityStmt);
	RunUtility(previous_process_utility,
			   {statement, text, read_only, context, params, environment, dest, completion});
}

void
InitTruncateHook()
{
	previous_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = OnProcessUtility;
}

} // namespace mmrepl::capture
