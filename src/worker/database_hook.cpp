/*
 * database_hook.cpp
 *		Commands that need a database without sessions: its stream workers leave.
 *
 * DROP DATABASE and kin wait a few seconds for other sessions to end, but tell
 * only autovacuum to do so.  The workers are ended here before the command runs;
 * if the database is still there afterwards, a scout brings them back.
 */
#include "mmrepl/base.hpp"
#include "mmrepl/transaction.hpp"
#include "worker_internal.hpp"

namespace mmrepl::worker
{

static ProcessUtility_hook_type previous_process_utility;

static bool
HasOption(List *options, const char *name)
{
	ListCell *cell;

	foreach(cell, options)
		if (strcmp(((DefElem *) lfirst(cell))->defname, name) == 0)
			return true;
	return false;
}

/* The template that CREATE DATABASE names, or NULL. */
static const char *
TemplateOf(const CreatedbStmt *statement)
{
	ListCell *cell;

	foreach(cell, statement->options)
	{
		DefElem *option = (DefElem *) lfirst(cell);

		if (strcmp(option->defname, "template") == 0 && option->arg != NULL)
			return defGetString(option);
	}
	return NULL;
}

/* Anybody who may create databases may copy one that is marked as a template. */
static bool
IsTemplate(Oid database)
{
	HeapTuple tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(database));
	bool result = HeapTupleIsValid(tuple) && ((Form_pg_database) GETSTRUCT(tuple))->datistemplate;

	if (HeapTupleIsValid(tuple))
		ReleaseSysCache(tuple);
	return result;
}

/*
 * The database that the statement needs for itself, or InvalidOid; also when the
 * user may not do that to it: then nothing happens to its workers.
 */
static Oid
DatabaseNeeded(Node *statement)
{
	const char *name = NULL;
	bool copies = IsA(statement, CreatedbStmt);

	if (copies)
		name = TemplateOf((CreatedbStmt *) statement);
	else if (IsA(statement, DropdbStmt))
		name = ((DropdbStmt *) statement)->dbname;
	else if (IsA(statement, AlterDatabaseStmt))
		name = HasOption(((AlterDatabaseStmt *) statement)->options, "tablespace")
				   ? ((AlterDatabaseStmt *) statement)->dbname
				   : NULL;
	else if (IsA(statement, RenameStmt) &&
			 ((RenameStmt *) statement)->renameType == OBJECT_DATABASE)
		name = ((RenameStmt *) statement)->subname;
	if (name == NULL)
		return InvalidOid;
	Oid database = get_database_oid(name, true);

	if (!OidIsValid(database) ||
		!(OwnsDatabase(database, GetUserId()) || (copies && IsTemplate(database))))
		return InvalidOid;
	return database;
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

/*
 * DROP EXTENSION of ours: nobody would ever end what is prepared at peers, where
 * it keeps its locks.  CASCADE says that somebody will.
 */
static void
MindPrepared(const Node *node)
{
	const DropStmt *statement = (const DropStmt *) node;
	bool ours = false;
	ListCell *cell;

	foreach(cell, statement->objects)
		ours |= strcmp(strVal(lfirst(cell)), "mmrepl_bgw") == 0;
	char *gids = ours && catalog::ExtensionExists() ? PreparedAtPeers() : NULL;

	if (gids == NULL)
		return;
	if (statement->behavior == DROP_CASCADE)
	{
		WarnOfPrepared(gids);
		return;
	}
	ereport(ERROR, (errcode(ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST),
					errmsg("cannot drop extension mmrepl_bgw while transactions of this database "
						   "are prepared at its peers"),
					errdetail("%s", gids),
					errhint("They are ended by the worker as soon as the peer is reached: see "
							"mmrepl.in_doubt.")));
}

/* DROP EXTENSION, maybe ours: the workers have to see for themselves. */
static bool
DropsExtension(const Node *statement)
{
	return IsA(statement, DropStmt) &&
		   ((const DropStmt *) statement)->removeType == OBJECT_EXTENSION;
}

static void
OnProcessUtility(PlannedStmt *statement, const char *text, bool read_only,
				 ProcessUtilityContext context, ParamListInfo params, QueryEnvironment *environment,
				 DestReceiver *dest, QueryCompletion *completion)
{
	auto run = [&] {
		RunUtility(previous_process_utility,
				   {statement, text, read_only, context, params, environment, dest, completion});
	};
	Oid database = InvalidOid;

	if (shmem::Ready() && IsTransactionState())
		database = DatabaseNeeded(statement->utilityStmt);
	if (shmem::Ready() && IsTransactionState() && DropsExtension(statement->utilityStmt))
		MindPrepared(statement->utilityStmt);
	if (!OidIsValid(database) || !SendWorkersAway(database))
	{
		run();
		if (shmem::Ready() && DropsExtension(statement->utilityStmt))
			transaction::WakeWorkersAtCommit();
		return;
	}
	EnsuredAtExit(run, [&] { shmem::RequestScoutOf(database); });
}

void
InitDatabaseHook()
{
	previous_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = OnProcessUtility;
}

} // namespace mmrepl::worker
