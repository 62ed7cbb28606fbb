/*
 * attach_hook.cpp
 *		ATTACH PARTITION of a table with a pair, below a table with a pair: the
 *		triggers of both would stand side by side, so it is refused with the reason.
 *
 * Event triggers at the end of a command come too late: PostgreSQL raises before.
 */
#include "registration_internal.hpp"

#include "mmrepl/base.hpp"
#include "mmrepl/shmem.hpp"

namespace mmrepl::registration
{

namespace
{

ProcessUtility_hook_type previous_process_utility;

/* The pair of the table, or of one below it; NULL: there is none. */
const PairRow *
PairBelow(Oid table)
{
	ListCell *cell;

	foreach(cell, find_all_inheritors(table, NoLock, NULL))
	{
		List *pairs = PairRowsOfTable(lfirst_oid(cell));

		if (pairs != NIL)
			return (const PairRow *) linitial(pairs);
	}
	return NULL;
}

/* Raise when both have pairs.  Nothing is locked: who comes in between meets PostgreSQL's own error. */
void
CheckAttach(const RangeVar *parent_name, const RangeVar *name)
{
	Oid parent = RangeVarGetRelid(parent_name, NoLock, true);
	Oid table = RangeVarGetRelid(name, NoLock, true);
	const PairRow *pair =
		OidIsValid(parent) && OidIsValid(table) && IsInPairs(parent) ? PairBelow(table) : NULL;

	if (pair == NULL)
		return;

	const char *with_pair = get_rel_name(pair->table);

	ereport(
		ERROR,
		(errcode(ERRCODE_MMREPL_PAIR_EXISTS),
		 errmsg("cannot attach \"%s\" to replicated table \"%s\"", name->relname,
				parent_name->relname),
		 errdetail("Table \"%s\" has a pair of its own, with server \"%s\".", with_pair,
				   pair->server),
		 errhint("In one transaction SELECT mmrepl.drop_pair(%s, %s); attach it, and create the "
				 "pair again if it goes elsewhere than the partitioned table.",
				 quote_literal_cstr(
					 QualifiedName(get_namespace_name(get_rel_namespace(pair->table)), with_pair)),
				 quote_literal_cstr(pair->server))));
}

/* Look at ATTACH PARTITION before it runs. */
void
OnAlterTable(const AlterTableStmt *statement)
{
	ListCell *cell;

	foreach(cell, statement->cmds)
	{
		const AlterTableCmd *command = lfirst_node(AlterTableCmd, cell);

		if (command->subtype == AT_AttachPartition && statement->objtype == OBJECT_TABLE &&
			catalog::ExtensionExists())
			CheckAttach(statement->relation, castNode(PartitionCmd, command->def)->name);
	}
}

void
OnProcessUtility(PlannedStmt *statement, const char *text, bool read_only,
				 ProcessUtilityContext context, ParamListInfo params, QueryEnvironment *environment,
				 DestReceiver *dest, QueryCompletion *completion)
{
	if (IsA(statement->utilityStmt, AlterTableStmt) && shmem::Ready() && !IsBinaryUpgrade)
		OnAlterTable((const AlterTableStmt *) statement->utilityStmt);
	RunUtility(previous_process_utility,
			   {statement, text, read_only, context, params, environment, dest, completion});
}

} // namespace

/* The hook that was there before is called from ours. */
void
Init()
{
	previous_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = OnProcessUtility;
}

} // namespace mmrepl::registration
