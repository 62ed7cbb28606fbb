/*
 * stream_worker.cpp
 *		The process that delivers one stream: its loop, its waits, its upkeep.
 *
 * The loop survives every error: what is not the process's own end is caught,
 * shown in the view, logged once, and tried again.
 */
#include "stream_session.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::worker
{

#ifdef MMREPL_FAULT_POINTS
constexpr int64 kUpkeepEvery = USECS_PER_SEC / 20; /* often enough for a test */
#else
constexpr int64 kUpkeepEvery = USECS_PER_SEC;
#endif
constexpr int64 kLookEvery = INT64CONST(50) * 1000;
constexpr int64 kRestEvery = INT64CONST(5) * USECS_PER_SEC;

/* Who gives the ordering lock up wakes us just before the lock is free. */
constexpr int64 kLockRetry = INT64CONST(100) * 1000;

static int my_slot = -1;

/* ---- process ---- */

/* before_shmem_exit: nobody wakes us any more; the launcher may start another. */
static void
LeaveSlot(int, Datum)
{
	shmem::LeaveStream(shmem::Get().streams[my_slot]);
}

/* Take the slot from `other`, a process that is gone; false when it is another's by now. */
static bool
TakeSlot(shmem::Stream &stream, int other)
{
	SpinLockAcquire(&stream.mutex);
	bool mine = stream.worker_pid == other;

	if (mine)
	{
		pg_atomic_write_u64(&stream.looks_at, 0);
		pg_atomic_write_u32(&stream.wants_announcements, 0);
		stream.worker_latch = MyLatch;
		stream.worker_pid = MyProcPid;
	}
	SpinLockRelease(&stream.mutex);
	return mine;
}

/* Become the stream's worker; ends the process when there is one already. */
static void
EnterSlot(int slot)
{
	shmem::Stream &stream = shmem::Get().streams[slot];
	int other;

	my_slot = slot;
	MMREPL_FAULT_POINT("worker-entering");
	before_shmem_exit(LeaveSlot, (Datum) 0);
	do
	{
		other = stream.worker_pid;
		if (other != 0 && BackendPidGetProc(other) != NULL)
			proc_exit(0);
	} while (!TakeSlot(stream, other));
	MMREPL_FAULT_POINT("worker-started");
}

/*
 * Whose worker this is.  False: nobody's; since it was started the slot has been freed,
 * or is another database's by now.
 */
static bool
Identify(Session *session)
{
	const shmem::Stream &stream = *session->shared;

	LWLockAcquire(shmem::Get().registry, LW_SHARED);
	bool mine = stream.in_use && stream.database == MyDatabaseId && stream.worker_pid == MyProcPid;

	session->epoch = stream.epoch;
	session->stream = stream.id;
	session->server = stream.server;
	session->owner = stream.owner;
	LWLockRelease(shmem::Get().registry);
	return mine;
}

static void
InitSession(Session *session, int slot)
{
	*session = {};
	session->slot = slot;
	session->shared = &shmem::Get().streams[slot];
	if (!Identify(session))
		proc_exit(0);
	session->group_limit = guc::batch_transactions;
	InitLanes(session);
	session->config_context =
		AllocSetContextCreate(TopMemoryContext, "mmrepl configuration", ALLOCSET_SMALL_SIZES);
	session->shipments_context =
		AllocSetContextCreate(TopMemoryContext, "mmrepl shipments", ALLOCSET_DEFAULT_SIZES);
}

/* ---- a stream that needs a resync ---- */

/* Nothing is delivered; the tables may be emptied of what was queued. */
static void
RestFromDelivery(Session *session)
{
	if (session->resting && session->conn == NULL)
		return;
	DropPeer(session);
	MMREPL_FAULT_POINT("give-up-peer-dropped");
	session->failures = 0;
	session->retry_at = 0;
	session->rest_is_due = true;
	session->upkeep_at = 0;
	ereport(LOG, /* before it is shown: who sees it may look here */
			(errmsg("mmrepl: stream %d needs a resync, nothing is delivered", session->stream)));
	stats::SetSetback(*session->shared, ERRCODE_MMREPL_NEEDS_RESYNC,
					  "the stream needs a resync: more than \"mmrepl.max_queue_size\" would have "
					  "waited\nHINT:  See resync_reason.",
					  {GetCurrentTimestamp(), shmem::WorkerState::NeedsResync, 0, 0, 0});
	MMREPL_FAULT_POINT("give-up-resting");
	session->resting = true; /* not before: an error has to be followed by all of this */
}

/* ---- upkeep ---- */

/* Write the position down and rotate; the loss of either is harmless. */
static void
Upkeep(Session *session)
{
	TimestampTz now = GetCurrentTimestamp();
	uint64 confirmed = pg_atomic_read_u64(&session->shared->confirmed);

	if (!session->position_loaded || now < session->upkeep_at ||
		(confirmed == session->persisted && !session->rest_is_due))
		return;
	InTransaction([&] {
		(void) set_config_option("synchronous_commit", "off", PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_LOCAL, true, 0, false);
		(void) catalog::SavePosition(session->stream, confirmed,
									 pg_atomic_read_u64(&session->shared->acked));
		MMREPL_FAULT_POINT("position-saving");
	});
	MMREPL_FAULT_POINT("position-saved");
	bool left = false;

	InTransaction([&] { left = queue::Rotate(); });
	if (session->rest_is_due)
		MMREPL_FAULT_POINT("give-up-rotated");
	session->rest_is_due = left && GivenUp(session);
	SetLatch(MyLatch); /* a wait for a table's lock may have swallowed a wake-up */
	session->persisted = confirmed;
	session->upkeep_at = now + (session->rest_is_due ? kRestEvery : kUpkeepEvery);
	pgstat_report_stat(false);
}

/* ---- waiting ---- */

static bool
TakeRetryNow(Session *session)
{
	SpinLockAcquire(&session->shared->mutex);
	bool asked = session->shared->retry_now;

	session->shared->retry_now = false;
	SpinLockRelease(&session->shared->mutex);
	return asked;
}

/* Whether the next try is not due yet. */
static bool
BackingOff(const Session *session)
{
	return session->conn == NULL && session->retry_at > GetCurrentTimestamp();
}

/*
 * What committing sessions may spare us (and themselves) while we sleep, as
 * shmem::Stream::looks_at.  As long as sync transactions keep coming the ring is
 * looked at now and then, for nothing in it has to be delivered.
 */
static uint64
LooksAt(const Session *session, TimestampTz now)
{
	const Feed &feed = session->feed;
	TimestampTz look = feed.passed_at + kLookEvery;

	if (session->conn == NULL ? BackingOff(session) : !MayStart(session) && !IsHeld(session))
		return shmem::kHeedless;
	/* Later than that it is only when the clock was set back. */
	if (look <= now || look > now + kLookEvery || session->conn == NULL ||
		session->outstanding > 0 || feed.from_tables || LateWork(&feed) ||
		queue::PeekRing(*session->shared, session->slot) != NULL)
		return 0;
	return (uint64) look;
}

/* Milliseconds until something is due; -1: only events matter. */
static long
Timeout(const Session *session)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz due = 0;

	if (IsHeld(session)) /* everything else waits */
		return HoldTimeout(session);
	if (GivenUp(session))
		due = session->attended ? 0 : session->retry_at;
	else if (session->conn == NULL && !session->shared->paused)
		due = session->retry_at;
	else if (session->conn != NULL && !session->holds_lock && !session->shared->paused)
		due = now + kLockRetry;
	if (pg_atomic_read_u64(&session->shared->confirmed) != session->persisted ||
		session->rest_is_due)
		due = due == 0 ? session->upkeep_at : Min(due, session->upkeep_at);
	if ((session->conn != NULL || session->shared->paused || GivenUp(session)) &&
		session->target != NULL && session->recovery_at != DT_NOEND)
		due = due == 0 ? session->recovery_at : Min(due, session->recovery_at);
	if (uint64 looks_at = LooksAt(session, now); looks_at != 0 && looks_at != shmem::kHeedless)
		due = due == 0 ? (TimestampTz) looks_at : Min(due, (TimestampTz) looks_at);
	if (TimestampTz seal = SealDueAt(&session->feed);
		seal != 0 && session->conn != NULL && session->holds_lock && MayStart(session))
		due = due == 0 ? seal : Min(due, seal);
	if (TimestampTz rest = LanesRestAt(session); rest != 0)
		due = due == 0 ? rest : Min(due, rest);
	if (TimestampTz silence = SilenceEnds(session); silence != 0)
		due = due == 0 ? silence : Min(due, silence);
	if (due == 0)
		return -1;
	return Max(TimestampDifferenceMilliseconds(now, due), 1L);
}

static void
Wait(Session *session)
{
	WaitEvent event;
	long timeout = Timeout(session);

	pg_atomic_write_u64(&session->shared->looks_at, LooksAt(session, GetCurrentTimestamp()));
	AskForAnnouncements(session);
	if (session->events == NULL)
	{
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | (timeout >= 0 ? WL_TIMEOUT : 0),
						 timeout, PG_WAIT_EXTENSION);
	}
	else
	{
		for (int i = 0; i < guc::kMaxLanes; i++)
			if (LaneConn(session, i) != NULL)
				ModifyWaitEvent(session->events, session->lanes.list[i].event,
								WL_SOCKET_READABLE |
									(session->lanes.list[i].want_write ? WL_SOCKET_WRITEABLE : 0),
								NULL);
		if (WaitEventSetWait(session->events, timeout, &event, 1, PG_WAIT_EXTENSION) == 1 &&
			(event.events & (WL_SOCKET_READABLE | WL_SOCKET_WRITEABLE)))
			session->progress = true;
	}
	(void) pg_atomic_exchange_u64(&session->shared->looks_at, 0); /* before the ring is looked at */
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
}

/* ---- the loop ---- */

static void
StandAside(Session *session)
{
	shmem::Stream &stream = *session->shared;

	if (session->outstanding > 0 || Seal(session))
		return;
	ReleaseLock(session);
	SpinLockAcquire(&stream.mutex);
	if (stream.paused) /* still */
		stream.state = shmem::WorkerState::Paused;
	SpinLockRelease(&stream.mutex);
}

/* Nothing waits: say so even when nothing had to be sent. */
static void
NoteIdle(Session *session)
{
	if (session->outstanding == 0 && !session->feed.from_tables)
	{
		SpinLockAcquire(&session->shared->mutex);
		bool settled = session->shared->state == shmem::WorkerState::Streaming &&
					   session->shared->consecutive_failures == 0;
		SpinLockRelease(&session->shared->mutex);
		if (!settled)
			NoteSuccess(session);
	}
}

/* What is held comes before all else; false: it goes on being held, or the connection is lost. */
static bool
AttendEarly(Session *session)
{
	if (GivenUp(session))
		DropPeer(session);
	else if (!Receive(session) || !EndEarly(session))
		return false;
	return !IsHeld(session);
}

/* One round: everything that can be done without waiting. */
static void
Round(Session *session)
{
	if (!session->shared->in_use || session->shared->epoch != session->epoch)
		proc_exit(0);
	if (TakeRetryNow(session))
		session->retry_at = 0;
	if (IsHeld(session) && !AttendEarly(session))
		return;
	if (session->attended || !BackingOff(session))
		Attend(session);
	if (GivenUp(session))
	{
		RestFromDelivery(session);
		Resolve(session);
		return;
	}
	if (session->resting)
		MMREPL_FAULT_POINT("resync-rest-ends");
	session->resting = false;
	if (session->conn != NULL && !Receive(session))
		return;
	WatchSilence(session);
	RestLanes(session);
	if (session->shared->paused || session->shared->handover_requests > 0)
	{
		Resolve(session);
		StandAside(session);
		return;
	}
	if (BackingOff(session))
		return;
	bool ready = EnsureConnected(session);

	if (session->conn != NULL)
		Resolve(session);
	if (!ready || session->conn == NULL)
		return;
	Send(session);
	if (session->conn != NULL)
		NoteIdle(session);
}

static void
Serve(Session *session, MemoryContext round)
{
	for (;;)
	{
		Round(session);
		if (!IsHeld(session)) /* its locks at the peer wait for nothing else */
			Upkeep(session);
		queue::ForgetWarning(*session->shared);
		Wait(session);
		MemoryContextReset(round);
	}
}

/* An error of our own side: show it, forget the peer, try again later. */
static void
Recover(Session *session, ErrorData *error)
{
	connection::Failure failure = {};

	AbortCurrentTransaction();
	failure.sqlstate = error->sqlerrcode;
	failure.message = error->message;
	failure.detail = error->detail;
	failure.hint = error->hint;
	failure.context = error->context;
	Fail(session, &failure, false);
	session->attended = false;
	SetLatch(MyLatch); /* what raised may have swallowed a wake-up */
}

void
RunStream(int slot)
{
	static Session session;
	MemoryContext context =
		AllocSetContextCreate(TopMemoryContext, "mmrepl stream worker", ALLOCSET_DEFAULT_SIZES);

	EnterSlot(slot);
	InitSession(&session, slot);
	pgstat_report_appname(MyBgworkerEntry->bgw_name);
	MemoryContextSwitchTo(context);
	for (;;)
	{
		ErrorData *error = Caught([&] {
			if (session.feed.context == NULL)
				InContext(TopMemoryContext,
						  [&] { StartFeed(&session.feed, session.stream, slot, false); });
			Serve(&session, context);
		});

		MemoryContextSwitchTo(context);
		Recover(&session, error);
		MemoryContextSwitchTo(context); /* the abort left another one */
		MemoryContextReset(context);
		Wait(&session);
	}
}

} // namespace mmrepl::worker
