/*
 * stream_peer.cpp
 *		The stream worker's connection, its ordering lock, and its failures.
 */
#include "stream_session.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::worker
{

/* ---- giving up ---- */

void
ReleaseLock(Session *session)
{
	if (!session->holds_lock)
		return;
	session->holds_lock = false;
	InTransaction([&] { queue::ReleaseOrderingLock(session->lock); });
	MMREPL_CRASH_POINT("worker-lock-released");
}

/* Forget connection, batches on their way and the lock; the queue still has everything. */
void
DropPeer(Session *session)
{
	for (int i = 0; i < session->outstanding; i++)
		EndShipment(&session->shipments[i]);
	session->outstanding = session->lost = 0;
	if (session->events != NULL)
		FreeWaitEventSet(session->events);
	session->events = NULL;
	CloseLanes(session);
	session->lanes.list[0].want_write = false;
	if (session->conn != NULL)
		connection::Close(session->conn);
	session->conn = NULL;
	ReleaseLock(session);
}

/* ---- configuration ---- */

/* The stream is no more: free its slot and end. */
pg_attribute_noreturn() static void Retire(Session *session)
{
	ereport(LOG, (errmsg("mmrepl: stream %d is dropped, its worker ends", session->stream)));
	shmem::UnregisterStream(session->slot, session->epoch);
	proc_exit(0);
}

/*
 * adopt_node() gives the database another identity: greet the peer again as that.
 * What it has confirmed to the former one says nothing.  (Looked at before the
 * stream's row is read; whoever sees the new identity sees the row reset.)
 */
static void
FollowNode(Session *session)
{
	pg_uuid_t node = catalog::NodeId();

	if (memcmp(&node, &session->feed.node, sizeof(node)) == 0)
		return;
	if (session->conn != NULL)
		DropPeer(session);
	session->feed.node = node;
	(void) catalog::ForgetAcked(session->stream);
	pg_atomic_write_u64(&session->shared->acked, 0);
	session->position_loaded = false;
}

/*
 * The row is linked to another server: what the extension's servers are called
 * elsewhere, after adopt_node() in an upgraded cluster or in a restored dump.  The
 * slot is for the one that is gone; a scout takes another for the stream.
 */
pg_attribute_noreturn() static void MoveOut(Session *session)
{
	ereport(LOG, (errmsg("mmrepl: stream %d is linked to another server, its worker begins anew",
						 session->stream)));
	shmem::UnregisterStream(session->slot, session->epoch);
	shmem::RequestScoutOf(MyDatabaseId);
	proc_exit(0);
}

static void
ReadStream(Session *session)
{
	catalog::StreamRow row = {};

	if (!catalog::ExtensionExists())
		Retire(session);
	FollowNode(session);
	if (!catalog::ReadStreamRow(session->stream, &row))
		Retire(session);
	if (row.server != session->server || row.owner != session->owner)
		MoveOut(session);
	queue::EnsureReady();
	if (!session->position_loaded)
		queue::Acknowledged(*session->shared, row.acked);
	session->position_loaded = true;
}

static void
ResolveTarget(Session *session)
{
	MemoryContextReset(session->config_context);
	session->target = NULL;
	session->target = InContext(session->config_context, [&] {
		return connection::Resolve(session->server, session->owner);
	});
}

/*
 * Shared memory says what the stream's row says, whoever has changed it: what is
 * seen under the row's lock is not being changed.  Who is changing it has told
 * shared memory already, and calls for attention when its transaction has ended.
 */
static void
FollowRow(Session *session)
{
	catalog::StreamRow row = {};

	if (!catalog::LockStreamRow(session->stream, false) ||
		!catalog::ReadStreamRow(session->stream, &row))
		return;
	if (row.paused != session->shared->paused)
		stats::SetPaused(*session->shared, row.paused);
	if (row.DiscardedUpTo() == pg_atomic_read_u64(&session->shared->discarded))
		return;
	queue::SetDiscarded(*session->shared, row.DiscardedUpTo());
	MMREPL_FAULT_POINT("give-up-row-followed");
}

/*
 * A copy of a database must not deliver the original's queue: the peer would
 * take it for the original.
 */
static void
RequireOwnNode()
{
	if (!catalog::NodeIsOurs())
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_WRONG_NODE),
				 errmsg("this database is a copy of another replication node"),
				 errhint("Run SELECT mmrepl.adopt_node() to make it a node of its own, or SELECT "
						 "mmrepl.adopt_node(moved => true) if the other is no more, as after "
						 "pg_upgrade: what is queued is delivered then.")));
}

/* Follow changes of the configuration; a changed server means a new connection. */
void
Attend(Session *session)
{
	SpinLockAcquire(&session->shared->mutex);
	uint32 attention = session->shared->attention;
	SpinLockRelease(&session->shared->mutex);
	if (session->attended && attention == session->attention_seen)
		return;
	uint32 before = session->target != NULL ? session->target->hash : 0;

	InTransaction([&] {
		ReadStream(session);
		FollowRow(session);
		queue::CountOldBacklog(*session->shared);
		RequireOwnNode();
		ResolveTarget(session);
	});
	if (session->conn != NULL && session->target->hash != before)
		DropPeer(session);
	MMREPL_FAULT_POINT("worker-attended");
	session->attention_seen = attention;
	session->attended = true;
}

/* ---- connecting ---- */

static bool
OpenPeer(Session *session)
{
	connection::Failure failure = {};

	session->conn =
		connection::Open(session->target, connection::DeadlineIn(guc::connect_timeout), &failure);
	if (session->conn == NULL)
	{
		Fail(session, &failure, false);
		return false;
	}
	session->feed.opened_at = connection::NotesOf(session->conn)->opened_at;
	MMREPL_FAULT_POINT("worker-connected");
	MakeEvents(session);
	RecoverSoon(session);
	return true;
}

static bool
TakeLock(Session *session)
{
	if (session->shared->handover_requests > 0)
		return false;
	InTransaction([&] {
		session->holds_lock = queue::TakeOrderingLock(session->stream, true, false, &session->lock);
	});
	MMREPL_FAULT_POINT("worker-locked");
	return session->holds_lock;
}

/* Learn where the peer stands, now that nobody else delivers, and begin there. */
static void
Greet(Session *session)
{
	delivery::Peer peer =
		delivery::Hello(session->conn, session->target->server_name, session->feed.node,
						session->stream, connection::DeadlineIn(guc::connect_timeout));

	SpinLockAcquire(&session->shared->mutex);
	session->shared->peer_node = peer.node;
	session->shared->peer_known = true;
	SpinLockRelease(&session->shared->mutex);
	session->lanes.known_there = peer.protocol >= batch::kLanesProtocol;
	MMREPL_FAULT_POINT("worker-greeted");
	ResetFeed(&session->feed, peer);
	if (!PQenterPipelineMode(session->conn))
		ereport(ERROR, (errcode(ERRCODE_CONNECTION_FAILURE),
						errmsg("could not enter pipeline mode: %s",
							   pchomp(PQerrorMessage(session->conn)))));
	stats::SetState(*session->shared, shmem::WorkerState::CatchingUp);
}

/*
 * Connection and ordering lock, both; false when one is not to be had now (the
 * lock's holder wakes us at the end of its transaction).  The waits for the peer
 * may swallow a wake-up: after them everything is looked at again.
 */
bool
EnsureConnected(Session *session)
{
	if (session->conn == NULL)
	{
		bool opened = OpenPeer(session);

		SetLatch(MyLatch);
		if (!opened)
			return false;
	}
	if (session->holds_lock)
		return true;
	if (PQpipelineStatus(session->conn) != PQ_PIPELINE_OFF && !PQexitPipelineMode(session->conn))
	{
		DropPeer(session);
		return false;
	}
	if (!TakeLock(session))
		return false;
	Greet(session);
	SetLatch(MyLatch);
	return true;
}

/* ---- failures ---- */

/* min << failures, up to max, of which a random half: no stampede when a peer returns. */
static TimestampTz
NextRetry(const Session *session, TimestampTz now)
{
	double delay = guc::retry_min_delay;

	for (int i = 1; i < session->failures && delay < guc::retry_max_delay; i++)
		delay *= 2;
	delay = Min(delay, (double) guc::retry_max_delay);
	delay *= 0.5 + 0.5 * pg_prng_double(&pg_global_prng_state);
	return now + (int64) (delay * 1000);
}

/* Whether the log may have one more line: a burst of ten, then one a minute. */
static bool
MayLog(LogBook *book)
{
	constexpr double burst = 10;
	constexpr int64 every = 60 * USECS_PER_SEC;
	TimestampTz now = GetCurrentTimestamp();
	double earned = (double) Max(now - book->earned_at, 0) / every;

	book->spent = Max(book->spent - earned, 0);
	book->earned_at = now;
	if (book->spent + 1 > burst)
		return false;
	book->spent += 1;
	return true;
}

/*
 * Whether a failure is new: since the last success none like it was logged, or
 * that was ten minutes ago.  Its text does not matter; ports and process ids in
 * it change each time.
 */
static bool
IsNews(const LogBook *book, int sqlstate, uint64 ticket)
{
	constexpr int64 every = INT64CONST(600) * USECS_PER_SEC;
	TimestampTz now = GetCurrentTimestamp();

	for (const auto &line : book->lines)
		if (line.at != 0 && line.sqlstate == sqlstate && line.ticket == ticket &&
			now - line.at < every)
			return false;
	return true;
}

static void
LogFailure(Session *session, int sqlstate, uint64 blocked_ticket, const char *text)
{
	LogBook *book = &session->log;

	if (!IsNews(book, sqlstate, blocked_ticket) || !MayLog(book))
	{
		book->unlogged++;
		return;
	}
	book->lines[book->next] = {sqlstate, blocked_ticket, GetCurrentTimestamp()};
	book->next = (book->next + 1) % (int) lengthof(book->lines);
	ereport(LOG, (errmsg("mmrepl: delivery to server \"%s\" failed: %s",
						 session->target != NULL ? session->target->server_name : "?", text),
				  errdetail_internal("Failure %d in a row; %d were not logged.", session->failures,
									 book->unlogged)));
	book->unlogged = 0;
}

/* The failures are over: say so if the log knows of them, and what comes next is news again. */
static void
LogRecovery(Session *session)
{
	LogBook *book = &session->log;
	bool known = false;

	for (auto &line : book->lines)
	{
		known |= line.at != 0;
		line = {};
	}
	if (known && MayLog(book))
		ereport(LOG, (errmsg("mmrepl: delivery to server \"%s\" goes on after %d failures",
							 session->target->server_name, session->failures)));
}

static char *
FailureText(const connection::Failure *failure)
{
	StringInfoData text;

	initStringInfo(&text);
	appendStringInfoString(&text, failure->message != NULL ? failure->message : "unknown error");
	if (failure->detail != NULL)
		appendStringInfo(&text, "\nDETAIL:  %s", failure->detail);
	if (failure->hint != NULL)
		appendStringInfo(&text, "\nHINT:  %s", failure->hint);
	if (failure->context != NULL)
		appendStringInfo(&text, "\nCONTEXT:  %s", failure->context);
	return text.data;
}

static void
PublishFailure(Session *session, const connection::Failure *failure, const stats::Setback &setback)
{
	char *text = FailureText(failure);

	LogFailure(session, failure->sqlstate, setback.blocked_ticket, text);
	stats::SetSetback(*session->shared, failure->sqlstate, text, setback);
	pfree(text);
}

/*
 * Decide what a failure means.  `refused`: it is the peer's answer to the oldest
 * batch.  A permanent refusal of several transactions is narrowed down at once, and
 * so is one behind something unsealed, which is sealed first; of a single one, it
 * blocks the stream, which then tries again at the longest delay.
 */
void
Fail(Session *session, const connection::Failure *failure, bool refused)
{
	bool permanent =
		refused && session->outstanding > 0 && !connection::IsTransient(failure->sqlstate);
	int64 transactions = session->outstanding > 0 ? session->shipments[0].transactions : 0;
	uint64 ticket = session->outstanding > 0 ? session->shipments[0].first_ticket : 0;

	bool narrows = transactions > 1 || (transactions == 1 && session->feed.unsealed.since != 0);

	DropPeer(session);
	NoteLaneFailure(session);
	if (refused && (transactions > 1 || (permanent && narrows)))
		session->group_limit = Max(transactions / 2, 1);
	if (permanent && narrows)
	{
		session->retry_at = 0;
		SetLatch(MyLatch); /* at once */
		return;
	}
	TimestampTz now = GetCurrentTimestamp();

	session->failures++;
	session->retry_at = NextRetry(session, now);
	if (permanent)
		session->retry_at = connection::DeadlineIn(guc::retry_max_delay);
	PublishFailure(session, failure,
				   {now, permanent ? shmem::WorkerState::Blocked : shmem::WorkerState::Retrying,
					session->failures, session->retry_at, permanent ? ticket : 0});
}

void
NoteSuccess(Session *session)
{
	shmem::Stream &stream = *session->shared;

	session->group_limit = Min(session->group_limit * 2, (int64) guc::batch_transactions);
	if (session->failures > 0)
		LogRecovery(session);
	session->failures = 0;
	session->silences = 0;
	session->retry_at = 0;
	SpinLockAcquire(&stream.mutex);
	stream.state =
		session->feed.from_tables ? shmem::WorkerState::CatchingUp : shmem::WorkerState::Streaming;
	stream.consecutive_failures = 0;
	stream.next_retry_at = 0;
	stream.blocked_ticket = 0;
	SpinLockRelease(&stream.mutex);
}

} // namespace mmrepl::worker
