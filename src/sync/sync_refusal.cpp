/*
 * sync_refusal.cpp
 *		What a user is told of a change that the peer refuses.
 *
 * The peer tells the role of the user mapping, which sees everything.  Who writes
 * here may have no right to read the table: as with violated constraints of tables
 * of his own server he is told what is wrong, but not what stands in the rows.
 */
#include "sync_internal.hpp"

#include "mmrepl/catalog.hpp"
#include "mmrepl/stats.hpp"

namespace mmrepl::sync
{

using connection::Failure;

namespace
{

/* Whether the user may read all rows of the table. */
bool
MayRead(Oid table)
{
	return pg_class_aclcheck(table, GetUserId(), ACL_SELECT) == ACLCHECK_OK &&
		   check_enable_rls(table, InvalidOid, true) != RLS_ENABLED;
}

/* Whether the failure names the table that the pair's changes go to. */
bool
IsAbout(const Failure *failure, const catalog::Pair *pair)
{
	return failure->schema != NULL && failure->table != NULL &&
		   strcmp(failure->schema, pair->remote_schema) == 0 &&
		   strcmp(failure->table, pair->remote_table) == 0;
}

/*
 * Whether the user may see the rows that the failure may show: he reads the table
 * that it names, or else (it may be a partition there) all tables of the stream's.
 */
bool
MaySeeRows(const Work *work, const Failure *failure)
{
	bool any = false;
	bool all = true;
	ListCell *cell;

	if (stats::MaySeeData(work->owner))
		return true;
	foreach(cell, catalog::PairsOfServer(work->server))
	{
		const catalog::Pair *pair = (const catalog::Pair *) lfirst(cell);

		if (pair->owner != work->owner)
			continue;
		if (IsAbout(failure, pair))
			return MayRead(pair->local_table);
		any = true;
		all = all && MayRead(pair->local_table);
	}
	return any && all;
}

} // namespace

/* A lock wait that was too long is a deadlock to the user. */
void
RaiseRefusal(const Work *work, const Failure *failure, const char *command)
{
	Failure shown = *failure;

	if (!MaySeeRows(work, failure))
		shown.detail = shown.context = NULL;
	if (failure->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_DEADLOCK_DETECTED),
				 errmsg("deadlock or lock wait across nodes"),
				 errdetail("Server \"%s\" says: %s", work->server_name, failure->message),
				 errhint("Retry the transaction."),
				 shown.context ? (errcontext("%s", shown.context)) : 0,
				 errcontext("remote command on server \"%s\": %s", work->server_name, command)));
	connection::ReportFailure(&shown, work->server_name, command);
}

} // namespace mmrepl::sync
