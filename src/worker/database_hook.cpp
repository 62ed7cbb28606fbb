/*
 * database_hook.cpp
 *		Commands that need a database without sessions: its stream workers leave.
 *
 * DROP DATABASE and kin wait a few seconds for other sessions to end, but tell
 * only autovacuum to do so.  The workers are ended here before the command runs;
 * if the database is still there afterwards, a scout brings them back.
 */
#include "mmrepl/transaction.hpp"
#include "worker_internal.hpp"

namespace mmrepl::worker
{

static ProcessUtility_hook_type previous_process_utility;

/* The database that the statement needs for itself, or InvalidOid. */
static Oid
DatabaseNeeded(Node *statement)
{
	const char *name = NULL;
	ListCell *cell;

	switch (nodeTag(statement))
	{
		case T_DropdbStmt:
			name = ((DropdbStmt *) statement)->dbname;
			break;
		case T_AlterDatabaseStmt: /* SET TABLESPACE */
			name = ((AlterDatabaseStmt *) statement)->dbname;
			break;
		case T_RenameStmt:
			if (((RenameStmt *) statement)->renameType == OBJECT_DATABASE)
				name = ((RenameStmt *) statement)->subname;
			break;
		case T_CreatedbStmt:
			foreach(cell, ((CreatedbStmt *) statement)->options)
			{
				DefElem *option = (DefElem *) lfirst(cell);

				if (strcmp(option->defname, "template") == 0 && option->arg != NULL)
					name = defGetString(option);
			}
			break;
		default:
			break;
	}
	return name != NULL ? get_database_oid(name, true) : InvalidOid;
}

/* End the database's stream workers; returns whether there were streams. */
static bool
SendWorkersAway(Oid database)
{
	bool any = false;

	for (int slot = 0; slot < guc::max_servers; slot++)
	{
		shmem::Stream &stream = shmem::Get().streams[slot];

		if (!stream.in_use || stream.database != database)
			continue;
		any = true;
		shmem::UnregisterStream(slot, stream.epoch);
	}
	return any;
}

/* DROP EXTENSION, maybe ours: the workers have to see for themselves. */
static bool
DropsExtension(const Node *statement)
{
	return IsA(statement, DropStmt) &&
		   ((const DropStmt *) statement)->removeType == OBJECT_EXTENSION;
}

static void
RunUtility(PlannedStmt *statement, const char *text, bool read_only, ProcessUtilityContext context,
		   ParamListInfo params, QueryEnvironment *environment, DestReceiver *dest,
		   QueryCompletion *completion)
{
	if (previous_process_utility)
		previous_process_utility(statement, text, read_only, context, params, environment, dest,
								 completion);
	else
		standard_ProcessUtility(statement, text, read_only, context, params, environment, dest,
								completion);
}

static void
OnProcessUtility(PlannedStmt *statement, const char *text, bool read_only,
				 ProcessUtilityContext context, ParamListInfo params, QueryEnvironment *environment,
				 DestReceiver *dest, QueryCompletion *completion)
{
	auto run = [&] {
		RunUtility(statement, text, read_only, context, params, environment, dest, completion);
	};
	Oid database = InvalidOid;

	if (shmem::Ready() && IsTransactionState())
		database = DatabaseNeeded(statement->utilityStmt);
	if (!OidIsValid(database) || !SendWorkersAway(database))
	{
		run();
		if (shmem::Ready() && DropsExtension(statement->utilityStmt))
			transaction::WakeWorkersAtCommit();
		return;
	}
	Ensured(run, [&] { shmem::RequestScoutOf(database); });
}

void
InitDatabaseHook()
{
	previous_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = OnProcessUtility;
}

} // namespace mmrepl::worker
