/*
 * recovery.cpp
 *		Prepared transactions of ours at a peer: what became of them here decides.
 *
 * First the peer is asked what is prepared there, then the local state of each is
 * looked at, in this order: still running (leave it), its record, that is its
 * head row, is there (COMMIT PREPARED), else it was aborted or lost in a crash
 * (ROLLBACK PREPARED).  The state only moves from running to its end, and a
 * transaction is prepared while it runs, so nothing can be decided too early.
 * What is prepared after the look, by a session that was given up, the next one
 * finds.  What skip() has dropped the peer shall not have: it is rolled back; while
 * skip() is under way, which may yet be rolled back itself, it is left.
 * Nothing is guessed about a number that this node has not used yet, or of which
 * there is no record although it committed, or may have: the log of old ones is
 * gone.  Then this node was restored from an older state, perhaps.
 */
#include "stream_session.hpp"

#include "mmrepl/fault.hpp"
#include "mmrepl/sync.hpp"

namespace mmrepl::worker
{

constexpr int64 kFirstDelay = USECS_PER_SEC;

/* ---- the decision ---- */

/* What the commit log says of a transaction id that was used. */
enum class Log : char
{
	Running,
	Committed,
	Aborted,
	Forgotten,
	Unused /* it was not given out yet, as far as this node knows */
};

static Log
AskLog(uint64 xid)
{
	LOCAL_FCINFO(fcinfo, 1);

	InitFunctionCallInfoData(*fcinfo, NULL, 1, InvalidOid, NULL, NULL);
	fcinfo->args[0].value = FullTransactionIdGetDatum(FullTransactionIdFromU64(xid));
	fcinfo->args[0].isnull = false;
	Datum status = pg_xact_status(fcinfo);

	if (fcinfo->isnull)
		return Log::Forgotten;
	const char *word = TextDatumGetCString(status);

	return strcmp(word, "in progress") == 0 ? Log::Running
		   : strcmp(word, "committed") == 0 ? Log::Committed
											: Log::Aborted;
}

/* Whether the transaction id was used on this node, as far as it knows. */
static bool
WasUsed(uint64 xid)
{
	return xid >= FirstNormalTransactionId &&
		   xid < U64FromFullTransactionId(ReadNextFullTransactionId());
}

/*
 * `discarded`: the stream's queue was given up once.  What is missing in it was
 * not delivered, and resync() copies it: then the peer's part is not wanted.
 */
static shmem::LocalState
Decide(Log log, uint64 ticket, bool skipped, bool discarded)
{
	if (log == Log::Running || (ticket != 0 && queue::IsInFlight(ticket)))
		return shmem::LocalState::Running;
	if (log == Log::Unused)
		return shmem::LocalState::Unknown;
	if (ticket != 0)
		return shmem::LocalState::Committed;
	if (skipped)
		return shmem::LocalState::Skipped;
	return log == Log::Aborted || discarded ? shmem::LocalState::Aborted
											: shmem::LocalState::Unknown;
}

/*
 * The local state of every transaction found at the peer; the log first, then
 * what was skipped, then the records, which skip() removes.
 */
static shmem::LocalState *
DecideAll(const sync::Found &found, int32 stream, bool discarded)
{
	shmem::LocalState *states =
		(shmem::LocalState *) palloc0(sizeof(shmem::LocalState) * found.count);
	uint64 *xids = (uint64 *) palloc(sizeof(uint64) * found.count);
	queue::FoundHead *heads = (queue::FoundHead *) palloc(sizeof(queue::FoundHead) * found.count);
	Log *logs = (Log *) palloc(sizeof(Log) * found.count);
	bool *skipped = (bool *) palloc(sizeof(bool) * found.count);

	for (int i = 0; i < found.count; i++)
	{
		xids[i] = found.list[i].xid;
		logs[i] = WasUsed(xids[i]) ? AskLog(xids[i]) : Log::Unused;
		skipped[i] = catalog::WasSkipped(stream, xids[i]);
	}
	queue::FindHeads(stream, xids, found.count, heads);
	for (int i = 0; i < found.count; i++)
		states[i] = heads[i].going ? shmem::LocalState::Running
								   : Decide(logs[i], heads[i].ticket, skipped[i], discarded);
	return states;
}

/* ---- what cannot be ended ---- */

/* Tell the log what only somebody can end. */
static void
Warn(const RecoveryPlace &place, const sync::PreparedThere &prepared,
	 const connection::Failure *failure)
{
	if (failure == NULL)
		ereport(WARNING,
				(errmsg("mmrepl: prepared transaction \"%s\" at server \"%s\" cannot be ended",
						prepared.gid, place.server),
				 errdetail("Nothing here tells what is to become of it: this database was restored "
						   "from an older state, or its queued changes were dropped."),
				 errhint("Compare the tables; then, at the peer, COMMIT PREPARED or ROLLBACK "
						 "PREPARED '%s'.",
						 prepared.gid)));
	else
		ereport(WARNING,
				(errcode(failure->sqlstate),
				 errmsg("mmrepl: prepared transaction \"%s\" at server \"%s\" cannot be ended: %s",
						prepared.gid, place.server, failure->message),
				 errdetail("It was prepared by role \"%s\".", prepared.owner)));
}

/* Show the first ones in the view. */
static void
Publish(shmem::Stream &stream, const Leftovers &left)
{
	SpinLockAcquire(&stream.mutex);
	stream.n_leftovers = left.count;
	for (int i = 0; i < left.count; i++)
		stream.leftovers[i] = left.list[i];
	SpinLockRelease(&stream.mutex);
}

static void
Keep(Leftovers *left, const sync::PreparedThere &prepared, shmem::LocalState state)
{
	left->running |= state == shmem::LocalState::Running;
	if (left->count < shmem::kMaxLeftovers)
		left->list[left->count++] = {prepared.xid, prepared.prepared, state};
}

/* ---- one look ---- */

/* End one, or keep it; false with *failure filled when the connection is lost. */
static bool
EndOne(const RecoveryPlace &place, const sync::PreparedThere &prepared, shmem::LocalState state,
	   Leftovers *left, connection::Failure *failure)
{
	bool commit = state == shmem::LocalState::Committed;
	bool ended = false;
	bool warn = place.warned != NULL && *place.warned != prepared.xid;

	if (commit || state == shmem::LocalState::Aborted || state == shmem::LocalState::Skipped)
	{
		ended = sync::EndPrepared(place.conn, prepared.gid, commit,
								  connection::DeadlineIn(guc::connect_timeout), failure);
		if (!ended && (failure->sqlstate == ERRCODE_MMREPL_SYNC_TIMEOUT ||
					   connection::WasLost(place.conn, NULL)))
			return false;
		warn = warn && !ended && failure->sqlstate != ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
	}
	else
	{
		failure = NULL;
		warn = warn && state == shmem::LocalState::Unknown;
	}
	if (ended)
	{
		MMREPL_FAULT_POINT("recovery-ended-one");
		ereport(LOG,
				(errmsg("mmrepl: prepared transaction \"%s\" at server \"%s\" was %s", prepared.gid,
						place.server, commit ? "committed" : "rolled back"),
				 state == shmem::LocalState::Skipped ? errdetail("mmrepl.skip() had dropped it.")
													 : 0));
		return true;
	}
	Keep(left, prepared, state);
	if (warn)
	{
		*place.warned = prepared.xid;
		Warn(place, prepared, failure);
	}
	return true;
}

bool
RecoverPrepared(const RecoveryPlace &place, Leftovers *left, connection::Failure *failure)
{
	bool discarded = pg_atomic_read_u64(&place.shared->discarded) != 0;
	shmem::LocalState *states = NULL;
	sync::Found found;

	*left = {};
	if (!sync::ListPrepared(place.conn, place.node, place.stream,
							connection::DeadlineIn(guc::connect_timeout), &found, failure))
		return false;
	left->allowed = found.allowed;
	if (found.count > 0)
		MMREPL_FAULT_POINT("recovery-listed");
	if (found.count > 0)
		InTransaction([&] { states = DecideAll(found, place.stream, discarded); });
	for (int i = 0; i < found.count; i++)
		if (!EndOne(place, found.list[i], states[i], left, failure))
			return false;
	Publish(*place.shared, *left);
	return true;
}

/* ---- the worker's looks ---- */

/* The next look: soon after something happened, then less and less often. */
static void
PlanRecovery(Session *session, const Leftovers &left)
{
	int64 longest = (int64) guc::recovery_interval * 1000;

	session->recovery_delay =
		left.running ? kFirstDelay : Min(Max(session->recovery_delay * 2, kFirstDelay), longest);
	session->recovery_at =
		left.allowed || left.count > 0 ? GetCurrentTimestamp() + session->recovery_delay : DT_NOEND;
}

/* The connection is new: look at once. */
void
RecoverSoon(Session *session)
{
	session->recovery_delay = 0;
	session->recovery_at = 0;
}

static bool
RecoveryDue(Session *session)
{
	uint32 requests = pg_atomic_read_u32(&session->shared->recovery_requests);

	if (requests != session->recovery_seen)
		RecoverSoon(session);
	session->recovery_seen = requests;
	return session->recovery_at <= GetCurrentTimestamp();
}

/* Look over a connection that is idle and not in pipeline mode. */
static bool
LookOver(Session *session, PGconn *conn, connection::Failure *failure)
{
	RecoveryPlace place = {conn,
						   session->target->server_name,
						   session->feed.node,
						   session->stream,
						   session->shared,
						   &session->warned_xid};
	Leftovers left;

	if (!RecoverPrepared(place, &left, failure))
		return false;
	PlanRecovery(session, left);
	return true;
}

/* Whether the peer answered, and would not let us look. */
static bool
IsRefusal(PGconn *conn, const connection::Failure &failure)
{
	return failure.sqlstate != ERRCODE_MMREPL_SYNC_TIMEOUT && !connection::WasLost(conn, NULL);
}

/* A look that failed keeps nobody from delivering; the log is told once. */
static bool
LookLater(Session *session, const connection::Failure &failure)
{
	/* That a resync is needed is what the view has to say until there was one. */
	if (!GivenUp(session))
		stats::SetError(*session->shared, failure.sqlstate, failure.message);
	if (session->warned_xid != PG_UINT64_MAX)
		ereport(WARNING,
				(errcode(failure.sqlstate),
				 errmsg("mmrepl: prepared transactions at server \"%s\" cannot be looked for: %s",
						session->target->server_name, failure.message)));
	session->warned_xid = PG_UINT64_MAX;
	PlanRecovery(session, {{}, 0, true, false});
	return true;
}

/*
 * Look over a connection of its own: batches are on their way over the worker's,
 * and they may be waiting for what is prepared.  A failure is tried again.
 */
static void
LookBeside(Session *session)
{
	connection::Failure failure = {};
	bool done = false;
	PGconn *conn =
		connection::Open(session->target, connection::DeadlineIn(guc::connect_timeout), &failure);

	if (conn != NULL)
		Ensured([&] { done = LookOver(session, conn, &failure); },
				[&] { connection::Close(conn); });
	if (!done)
		(void) LookLater(session, failure);
}

void
Resolve(Session *session)
{
	connection::Failure failure = {};

	if (session->target == NULL || !RecoveryDue(session))
		return;
	if (session->conn == NULL || session->outstanding > 0)
	{
		LookBeside(session);
		SetLatch(MyLatch);
		return;
	}
	bool pipeline = PQpipelineStatus(session->conn) != PQ_PIPELINE_OFF;
	bool done = (!pipeline || PQexitPipelineMode(session->conn)) &&
				LookOver(session, session->conn, &failure);

	if (!done && failure.message != NULL && IsRefusal(session->conn, failure))
		done = LookLater(session, failure);
	if (!done || (pipeline && !PQenterPipelineMode(session->conn)))
	{
		if (failure.message == NULL)
			connection::Describe(session->conn, NULL, &failure);
		Fail(session, &failure, false);
	}
	SetLatch(MyLatch); /* the wait for the peer may have swallowed a wake-up */
}

} // namespace mmrepl::worker
