/*
 * sync_flush.cpp
 *		Executing a transaction's segments at the peer while it runs.
 */
#include "sync_internal.hpp"

#include "mmrepl/catalog.hpp"
#include "mmrepl/delivery.hpp"
#include "mmrepl/fault.hpp"
#include "mmrepl/guc.hpp"

namespace mmrepl::sync
{

namespace
{

using change::Segment;
using connection::Failure;

/* The first segment that the peer does not have, NULL when it has them all. */
Segment *
FirstUnsent(Segment *segment)
{
	while (segment != NULL && segment->sent)
		segment = segment->next;
	return segment;
}

/*
 * Learn who the peer is, once for a connection.  One that has lost what it had
 * confirmed is not written to, as if it could not be reached.
 */
Outcome
Introduce(const Request &request, connection::Notes *notes)
{
	Work *work = request.work;
	delivery::Peer peer;

	if (notes->peer_known)
		return Outcome::Done;
	if (!delivery::TryHello(work->conn, catalog::NodeId(), work->stream, request.deadline, &peer,
							request.failure))
		return Judge(work, request.failure);
	return delivery::HasLostChanges(peer, work->acked, work->server_name, request.failure)
			   ? Outcome::Lost
			   : Outcome::Done;
}

/*
 * Give the peer's session our lock_timeout where it has another one.  It is set
 * for the session, not in each transaction: that saves a command every time.
 */
Outcome
SetLockTimeout(const Request &request, connection::Notes *notes)
{
	int timeout = LockTimeout(notes->peer_node);
	char sql[64];
	PGresult *res;

	if (notes->lock_timeout == timeout)
		return Outcome::Done;
	snprintf(sql, sizeof(sql), "SET lock_timeout = %d", timeout);
	res = connection::TryExec(request.work->conn, sql, 0, NULL, request.deadline, request.failure);
	if (res == NULL)
		return Judge(request.work, request.failure);
	PQclear(res);
	notes->lock_timeout = timeout;
	return Outcome::Done;
}

/*
 * The session's cached connection with no transaction open on it; NULL with the
 * failure filled when the peer cannot be reached.
 */
PGconn *
IdleConnection(const Request &request, bool *fresh)
{
	const Work *work = request.work;
	PGconn *conn =
		connection::TryCached(work->server, work->owner, request.deadline, fresh, request.failure);

	if (conn == NULL || PQtransactionStatus(conn) == PQTRANS_IDLE)
		return conn;

	/* Somebody left a transaction open; it is not this one's. */
	connection::DropCached(work->server, work->owner);
	return connection::TryCached(work->server, work->owner, request.deadline, fresh,
								 request.failure);
}

/* Send everything from first on; *fresh tells whether a connection was made for it. */
Outcome
Converse(const Request &request, Segment *first, bool *fresh)
{
	Segment *next = first;
	Outcome outcome = Outcome::Done;

	if (request.work->posted != NULL)
		outcome = FinishPost(request, &next, fresh);
	else if (!request.work->begun)
		outcome = Reach(request, fresh);
	next = FirstUnsent(next);
	while (outcome == Outcome::Done && next != NULL)
	{
		outcome = SendPart(request, &next);
		next = FirstUnsent(next);
	}
	return outcome;
}

/* Who asks again, before what the peer has refused is repaired, hears it again. */
void
KeepRefusal(Work *work, const Failure *failure)
{
	work->refusal = InContext(TopTransactionContext, [&] {
		Failure *kept = (Failure *) palloc(sizeof(Failure));

		*kept = *failure;
		char **fields[] = {&kept->message, &kept->detail, &kept->hint,	 &kept->context,
						   &kept->schema,  &kept->table,  &kept->column, &kept->constraint};

		for (char **field : fields)
			*field = *field == NULL ? NULL : pstrdup(*field);
		return kept;
	});
}

/*
 * The same, with the work left in order whatever happens: an error of ours
 * (a cancel, above all) or a lost session abandons the remote transaction.
 */
Outcome
ConverseSafely(const Request &request, Segment *first, bool *fresh)
{
	Work *work = request.work;
	uint32 kept = Kept(work);
	Outcome outcome = Outcome::Done;

	*fresh = false;
	Guarded([&] { outcome = Converse(request, first, fresh); }, [&] { Abandon(work, kept); });
	if (outcome == Outcome::Lost)
		Abandon(work, kept);
	else if (outcome == Outcome::Stale || (outcome == Outcome::Refused && !work->begun))
		Reset(work);
	else if (outcome == Outcome::Refused)
	{
		/* The savepoint of a subtransaction repairs it: of this one, or of one around it; else nothing does. */
		bool repairable = request.nest_level > 1 && work->remote_level >= request.nest_level &&
						  work->release_level == 0;

		if (!repairable && kept == 0)
			(void) Abort(work);
		else if (!repairable || request.nest_level < GetCurrentTransactionNestLevel())
			KeepRefusal(work, request.failure);
		work->broken |= !repairable && kept > 0;
	}
	return outcome;
}

} // namespace

/*
 * How long a lock may be waited for at the peer.  A deadlock across nodes is
 * invisible to both; of the two nodes the one with the higher id waits twice as
 * long, so that only one of the two transactions has to go.
 */
int
LockTimeout(const pg_uuid_t &peer)
{
	pg_uuid_t node = catalog::NodeId();
	int64 base = guc::sync_lock_timeout > 0 ? guc::sync_lock_timeout : 2 * (int64) DeadlockTimeout;

	if (memcmp(node.data, peer.data, UUID_LEN) > 0)
		base *= 2;
	return (int) Min(base, INT_MAX);
}

/* A command that failed: was the session lost with it, or did it stay silent? */
Outcome
Judge(const Work *work, const Failure *failure)
{
	if (failure->sqlstate == ERRCODE_MMREPL_SYNC_TIMEOUT || connection::WasLost(work->conn, NULL))
		return Outcome::Lost;
	return Outcome::Refused;
}

/* Raise unless the remote transaction, if one was begun, is there and can be used. */
void
RequireUsable(Work *work)
{
	if (work->begun && !Usable(work))
		work->broken = true;
	if (work->refusal != NULL)
		RaiseRefusal(work, work->refusal, "apply");
	if (work->broken)
		ereport(ERROR, (errcode(ERRCODE_CONNECTION_FAILURE),
						errmsg("the transaction at server \"%s\" was lost", work->server_name),
						errdetail("What this transaction had done there is undone."),
						errhint("Roll back and retry the transaction.")));
}

/* A work without a connection yet; lives as long as the transaction. */
Work *
Start(int32 stream, Oid server, Oid owner, const char *server_name)
{
	Work *work = (Work *) MemoryContextAllocZero(TopTransactionContext, sizeof(Work));

	work->stream = stream;
	work->server = server;
	work->owner = owner;
	work->server_name = MemoryContextStrdup(TopTransactionContext, server_name);
	work->remote_level = 1;
	return work;
}

/* Whether the COMMIT at the peer need not wait until it is flushed there. */
static bool
MayRelax(const connection::Notes *notes)
{
	return guc::sync_commit == guc::SyncCommit::Applied && guc::two_phase != guc::TwoPhase::On &&
		   notes->protocol >= batch::kRelaxedProtocol;
}

/* Get a connection that is ready for BEGIN; see the private header. */
Outcome
Reach(const Request &request, bool *fresh)
{
	Work *work = request.work;
	connection::Notes *notes;
	Outcome outcome;

	work->conn = IdleConnection(request, fresh);
	if (work->conn == NULL)
		return Outcome::Lost;
	notes = connection::NotesOf(work->conn);
	if (work->only_serial != 0 && work->only_serial != notes->serial)
		return Outcome::Stale;
	work->serial = notes->serial;
	outcome = Introduce(request, notes);
	if (outcome == Outcome::Done)
		outcome = SetLockTimeout(request, notes);
	if (outcome == Outcome::Done && guc::two_phase == guc::TwoPhase::On)
	{
		bool allowed;

		outcome = RequireTwoPhase(request, &allowed);
	}
	work->relaxed = MayRelax(notes);
	MMREPL_FAULT_POINT("sync-reached");
	return outcome;
}

bool
TakesMore(const Work *work, int nest_level)
{
	const Posted *posted = work->posted;

	return posted == NULL || (posted->request.nest_level == nest_level && MayPost(posted));
}

/*
 * Errors of the peer and of the way to it are kept for the flush; what is raised
 * is ours (a cancel), and nothing is posted then.
 */
void
Post(Work *work, Segment *first, uint64 xid, int nest_level)
{
	Posted *posted = work->posted;
	Segment *from = FirstUnsent(posted == NULL ? first : posted->last->next);

	if (from == NULL || work->broken || work->refusal != NULL || (work->begun && !Usable(work)) ||
		!TakesMore(work, nest_level))
		return;
	Guarded(
		[&] {
			if (posted == NULL)
				posted = StartPost({work, xid, nest_level,
									connection::DeadlineIn(guc::sync_timeout), NULL},
								   from);
			if (work->posted == NULL && !work->begun)
				posted->outcome = Reach(posted->request, &posted->fresh);
			if (posted->outcome == Outcome::Done)
				PostPart(posted, from);
			work->posted = posted;
		},
		[&] { Abandon(work, Kept(work)); });
}

void
Expect(Work *work)
{
	if (work->posted == NULL)
		return;
	work->posted->expected = true;
	work->posted->request.deadline = connection::DeadlineIn(guc::sync_timeout);
}

Segment *
LastPosted(const Work *work)
{
	return work->posted == NULL ? NULL : work->posted->last;
}

bool
Answered(Work *work)
{
	bool arrived = true;

	if (work->posted != NULL)
		Guarded([&] { arrived = Arrived(work->posted); }, [&] { Abandon(work, Kept(work)); });
	return arrived;
}

/* The answer will not be awaited: whatever was posted is undone. */
void
Unpost(Work *work)
{
	if (work->posted != NULL)
		Abandon(work, Kept(work));
}

/*
 * Execute the unsent segments at the peer; the door says what comes of it.  A
 * cached connection that turns out dead at its first use is replaced once:
 * nothing of this transaction stands at the peer then.
 */
bool
Flush(Work *work, Segment *first, int64 changes, uint64 xid, int nest_level, Failure *failure)
{
	Request request = {work, xid, nest_level, connection::DeadlineIn(guc::sync_timeout), failure};
	Segment *unsent = FirstUnsent(first);
	bool begun = work->begun;
	bool fresh;
	Outcome outcome;

	if (unsent == NULL)
		return true;
	if (work->posted == NULL)
		RequireUsable(work);
	else
		request.nest_level = work->posted->request.nest_level;
	outcome = ConverseSafely(request, unsent, &fresh);
	if (outcome == Outcome::Lost && !begun && !fresh &&
		failure->sqlstate != ERRCODE_MMREPL_SYNC_TIMEOUT)
		outcome = ConverseSafely(request, unsent, &fresh);

	if (outcome == Outcome::Refused)
		RaiseRefusal(work, failure, psprintf("apply of " INT64_FORMAT " changes", changes));
	work->stale = outcome == Outcome::Stale;
	if (outcome != Outcome::Done)
		return false;
	for (Segment *segment = unsent; segment != NULL; segment = segment->next)
		segment->sent = true;
	return true;
}

/*
 * Notice what the peer has said by itself since its last answer, above all that
 * it ends the session: better an error now than a doubt later.
 */
static void
RequireThere(Work *work)
{
	constexpr int kRounds = 16; /* of reading what nobody asked for */
	Failure failure;

	for (int round = 0; connection::Readable(work->conn); round++)
	{
		if (round < kRounds && PQconsumeInput(work->conn) == 1 && !PQisBusy(work->conn))
			continue;
		connection::Describe(work->conn, NULL, &failure);
		Abandon(work, work->parts);
		RaiseRefusal(work, &failure, "COMMIT");
	}
}

/*
 * What the peer has to do before its COMMIT, NULL if nothing: check what waits for that,
 * and flush it after all if the user has asked for it since the transaction began there.
 */
static const char *
CommandBeforeCommit(Work *work)
{
	constexpr const char *kCheck = "SET CONSTRAINTS ALL IMMEDIATE";
	constexpr const char *kFlush = "SET LOCAL synchronous_commit = on";
	bool flush = work->relaxed && guc::sync_commit == guc::SyncCommit::Flushed;

	if (flush)
		work->relaxed = false;
	if (flush && work->may_defer)
		return psprintf("%s; %s", kCheck, kFlush);
	return flush ? kFlush : work->may_defer ? kCheck : NULL;
}

/*
 * Let the peer check its deferred constraints now, if apply() has said that there
 * may be some; raises as Flush does.
 */
void
BeforeCommit(Work *work)
{
	const char *command;
	TimestampTz deadline = connection::DeadlineIn(guc::sync_timeout);
	Failure failure;
	PGresult *res = NULL;

	RequireUsable(work);
	if (!work->begun)
		return;
	RequireThere(work);
	command = CommandBeforeCommit(work);
	if (command == NULL)
		return;
	MMREPL_FAULT_POINT("sync-before-check");
	Guarded([&] { res = connection::TryExec(work->conn, command, 0, NULL, deadline, &failure); },
			[&] { Abandon(work, work->parts); });
	PQclear(res);
	if (res != NULL)
	{
		MMREPL_FAULT_POINT("sync-checked");
		return;
	}
	if (Judge(work, &failure) == Outcome::Lost)
		Abandon(work, work->parts);
	else
		work->broken = true;
	RaiseRefusal(work, &failure, command);
}

} // namespace mmrepl::sync
