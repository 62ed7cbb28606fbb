/*
 * sync_two_phase.cpp
 *		PREPARE TRANSACTION at the peers before the local commit, and what recovery
 *		needs to find and end such transactions later.
 *
 * The gid names our node, the stream, and the local transaction's 64-bit id: it
 * is never used twice, and whoever finds it can tell whose it is.  The local
 * record of the commit is the transaction's head row in the queue.
 */
#include "sync_internal.hpp"

#include "mmrepl/catalog.hpp"
#include "mmrepl/fault.hpp"
#include "mmrepl/guc.hpp"

namespace mmrepl::sync
{

namespace
{

using connection::Failure;

constexpr char kPrefix[] = "mmrepl_";

/* mmrepl_<node>_<stream>_ : what all gids of a stream begin with. */
char *
PrefixOf(const pg_uuid_t &node, int32 stream)
{
	char *name = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&node)));

	return psprintf("%s%s_%d_", kPrefix, name, stream);
}

/* Ask the peer, once for a connection, whether it has room for prepared transactions. */
Outcome
AskWhetherAllowed(const Request &request, connection::Notes *notes)
{
	PGresult *res;

	if (notes->prepared_transactions != connection::Notes::kNotAsked)
		return Outcome::Done;
	res = connection::TryExec(request.work->conn, "SHOW max_prepared_transactions", 0, NULL,
							  request.deadline, request.failure);
	if (res == NULL)
		return Judge(request.work, request.failure);
	notes->prepared_transactions = PQntuples(res) == 1 && atoi(PQgetvalue(res, 0, 0)) > 0
									   ? connection::Notes::kAllowed
									   : connection::Notes::kForbidden;
	PQclear(res);
	return Outcome::Done;
}

/* The answer to PREPARE TRANSACTION, of which *res is a result; NULL ends it. */
void
TakeAnswer(Work *work, PGresult *res, Outcome *outcome, Failure *failure)
{
	bool prepared = PQresultStatus(res) == PGRES_COMMAND_OK &&
					strcmp(PQcmdStatus(res), "PREPARE TRANSACTION") == 0;

	if (prepared)
		work->phase = Phase::Prepared;
	else if (*outcome == Outcome::Done)
	{
		connection::Describe(work->conn, res, failure);
		*outcome = connection::WasLost(work->conn, res) ? Outcome::Lost : Outcome::Refused;
	}
	PQclear(res);
}

/* The peer is silent, or its session gone: what became of PREPARE TRANSACTION is not known. */
Outcome
NoAnswer(Work *work, bool in_time, Failure *failure)
{
	if (in_time)
		connection::Describe(work->conn, NULL, failure);
	else
	{
		*failure = {};
		failure->sqlstate = ERRCODE_MMREPL_SYNC_TIMEOUT;
		failure->message = psprintf("server \"%s\" did not answer in time", work->server_name);
		failure->hint = pstrdup("mmrepl.sync_timeout bounds the wait.");
	}
	return Outcome::Lost;
}

/* Wait for the end of one PREPARE TRANSACTION. */
Outcome
Collect(Work *work, TimestampTz deadline, Failure *failure)
{
	Outcome outcome = Outcome::Done;

	for (;;)
	{
		PGresult *res = NULL;
		bool in_time = connection::NextResult(work->conn, deadline, &res);

		if (in_time && res != NULL)
			TakeAnswer(work, res, &outcome, failure);
		else if (in_time && outcome == Outcome::Refused)
			return outcome;
		else if (in_time && outcome == Outcome::Done && work->phase == Phase::Prepared)
			return outcome;
		else
			return outcome == Outcome::Lost ? outcome : NoAnswer(work, in_time, failure);
		if (outcome == Outcome::Lost)
			return outcome;
	}
}

/* Send PREPARE TRANSACTION; false when libpq cannot. */
bool
SendPrepare(Work *work)
{
	char sql[kGidLength + 32];

	snprintf(sql, sizeof(sql), "PREPARE TRANSACTION '%s'", work->gid);
	work->phase = Phase::Preparing;
	return PQsendQuery(work->conn, sql) == 1 && PQflush(work->conn) >= 0;
}

/* Nobody waits for the answer any more: Abort() says that something may be left. */
void
GiveUp(Work *work)
{
	Phase phase = work->phase;

	if (phase != Phase::Preparing)
		return;
	Abandon(work, work->parts);
	work->phase = phase;
}

/* The peer refused, which rolled its transaction back. */
void
Forget(Work *work)
{
	uint32 kept = work->parts;

	Reset(work);
	work->parts = kept;
	work->broken = work->begun = true;
}

/* Collect every answer; the first failure's work, or NULL. */
Work *
CollectAll(Work *const *works, int count, TimestampTz deadline, Failure *failure)
{
	Work *failed = NULL;

	for (int i = 0; i < count; i++)
	{
		Failure own = {};
		Outcome outcome = Collect(works[i], deadline, &own);

		if (outcome == Outcome::Done)
			continue;
		if (outcome == Outcome::Refused)
			Forget(works[i]);
		else
			GiveUp(works[i]);
		if (failed == NULL)
			*failure = own;
		if (failed == NULL)
			failed = works[i];
	}
	return failed;
}

/* The number that ends the gid, 0 when there is none. */
uint64
XidOf(const char *gid, const char *prefix)
{
	char *end;
	uint64 xid = strtou64(gid + strlen(prefix), &end, 10);

	return *end == '\0' ? xid : 0;
}

/* Read a row of ListPrepared's query. */
void
ReadPrepared(const PGresult *res, int row, const char *prefix, PreparedThere *prepared)
{
	const char *gid = PQgetvalue(res, row, 1);

	prepared->gid = pstrdup(gid);
	prepared->xid = XidOf(gid, prefix);
	prepared->owner = pstrdup(PQgetvalue(res, row, 2));
	prepared->prepared = (TimestampTz) strtoll(PQgetvalue(res, row, 3), NULL, 10) -
						 (int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY;
}

} // namespace

void
FormatGid(char *gid, const pg_uuid_t &node, int32 stream, uint64 xid)
{
	snprintf(gid, kGidLength, "%s" UINT64_FORMAT, PrefixOf(node, stream), xid);
}

bool
IsOurGid(const char *gid)
{
	return strncmp(gid, kPrefix, sizeof(kPrefix) - 1) == 0;
}

/* Where the setting asks for it: whether the peer allows prepared transactions. */
Outcome
RequireTwoPhase(const Request &request, bool *allowed)
{
	const Work *work = request.work;
	connection::Notes *notes = connection::NotesOf(work->conn);
	Outcome outcome = AskWhetherAllowed(request, notes);

	*allowed =
		outcome == Outcome::Done && notes->prepared_transactions == connection::Notes::kAllowed;
	if (outcome == Outcome::Done && !*allowed && guc::two_phase == guc::TwoPhase::On)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("server \"%s\" does not allow prepared transactions", work->server_name),
				 errdetail("\"max_prepared_transactions\" is 0 there, and \"mmrepl.two_phase\" is "
						   "'on' here."),
				 errhint("Set \"max_prepared_transactions\" there to at least the number of "
						 "sessions that write to it, and restart it; or SET mmrepl.two_phase = "
						 "'auto'.")));
	return outcome;
}

bool
EndsInTwoPhases(Work *work)
{
	Failure failure = {};
	Request request = {work, 0, 1, connection::DeadlineIn(guc::sync_timeout), &failure};
	Outcome outcome = Outcome::Done;
	bool allowed = false;

	if (guc::two_phase == guc::TwoPhase::Off)
		return false;
	RequireUsable(work);
	Guarded([&] { outcome = RequireTwoPhase(request, &allowed); },
			[&] { Abandon(work, work->parts); });
	if (outcome == Outcome::Done)
		return allowed;
	if (outcome == Outcome::Lost)
		Abandon(work, work->parts);
	RaiseRefusal(work, &failure, "SHOW max_prepared_transactions");
}

void
Prepare(Work *const *works, int count, uint64 xid)
{
	TimestampTz deadline = connection::DeadlineIn(guc::sync_timeout);
	Failure failure = {};
	Work *failed = NULL;

	for (int i = 0; i < count; i++)
	{
		RequireUsable(works[i]);
		works[i]->relaxed = false; /* neither this command nor COMMIT PREPARED is */
		FormatGid(works[i]->gid, catalog::NodeId(), works[i]->stream, xid);
	}
	Guarded(
		[&] {
			for (int i = 0; i < count; i++)
				(void) SendPrepare(works[i]);
			MMREPL_FAULT_POINT("two-phase-prepare-sent");
			failed = CollectAll(works, count, deadline, &failure);
		},
		[&] {
			for (int i = 0; i < count; i++)
				GiveUp(works[i]);
		});
	if (failed != NULL)
		RaiseRefusal(failed, &failure, "PREPARE TRANSACTION");
	MMREPL_FAULT_POINT("two-phase-prepared");
}

/* ---- recovery ---- */

bool
ListPrepared(PGconn *conn, const pg_uuid_t &node, int32 stream, TimestampTz deadline, Found *found,
			 Failure *failure)
{
	constexpr const char *kQuery =
		"SELECT s.setting, p.gid, p.owner, (extract(epoch FROM p.prepared) * 1000000)::bigint"
		" FROM pg_settings s LEFT JOIN pg_prepared_xacts p"
		" ON p.database = current_database() AND starts_with(p.gid, $1)"
		" WHERE s.name = 'max_prepared_transactions'";
	const char *prefix = PrefixOf(node, stream);
	const char *values[1] = {prefix};
	PGresult *res = connection::TryExec(conn, kQuery, 1, values, deadline, failure);

	*found = {};
	if (res == NULL)
		return false;
	Ensured(
		[&] {
			int rows = PQntuples(res);

			found->allowed = rows > 0 && atoi(PQgetvalue(res, 0, 0)) > 0;
			found->list = (PreparedThere *) palloc0(sizeof(PreparedThere) * Max(rows, 1));
			for (int row = 0; row < rows; row++)
				if (!PQgetisnull(res, row, 1))
					ReadPrepared(res, row, prefix, &found->list[found->count++]);
		},
		[&] { PQclear(res); });
	return true;
}

bool
EndPrepared(PGconn *conn, const char *gid, bool commit, TimestampTz deadline, Failure *failure)
{
	const char *sql =
		psprintf("%s PREPARED %s", commit ? "COMMIT" : "ROLLBACK", quote_literal_cstr(gid));
	PGresult *res = connection::TryExec(conn, sql, 0, NULL, deadline, failure);

	PQclear(res);
	return res != NULL || failure->sqlstate == ERRCODE_UNDEFINED_OBJECT;
}

} // namespace mmrepl::sync
