/*
 * apply_turn.cpp
 *		Batches of a stream that are executed side by side, and commit in order.
 *
 * A batch that others may follow takes its *turn*, a lock that its transaction
 * keeps to its end.  A batch that is executed *ahead* begins when the one before
 * it has begun, writes its rows, waits for the other's turn, locks the watermark
 * row and goes on only if the watermark is just what it has to follow.  That
 * last look alone is what makes it safe; the locks see to it that it succeeds.
 *
 * What is executed ahead is right if the batches before it would have left the
 * same rows to it.  Two batches that touch one key, or one value of a unique
 * index, wait for each other at the row: the later one, if it came second, sees
 * what the other has left; if it came first it is waited for by the one that it
 * waits for in the end, and the deadlock detector ends it.  What has no row at
 * which anybody could wait (a row that is not there, a conflict, a trigger that
 * reads) is not decided ahead: WaitForPredecessor() comes first.
 */
#include "apply_internal.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::apply
{

constexpr int kLookEvery = 10;		 /* ms between looks for a deadlock, while ahead */
constexpr int kOftenLooks = 100;	 /* so many; then every tenth only */
constexpr int kBeginTimeout = 10000; /* ms to wait for a batch that was sent before */
constexpr int kRemembered = 1024;	 /* turns that are known to have been taken */

/*
 * Who has taken his turn.  A place is overwritten by another turn of the same
 * remainder: who looks for the former one then waits until his time is up.
 */
struct Turns
{
	ConditionVariable begun; /* broadcast when a turn was taken */
	pg_atomic_uint64 taken[kRemembered];
};

static Turns *turns;

Size
SharedSize()
{
	return sizeof(Turns);
}

void
InitShared(bool found, void *where)
{
	turns = (Turns *) where;
	if (found)
		return;
	ConditionVariableInit(&turns->begun);
	for (auto &turn : turns->taken)
		pg_atomic_init_u64(&turn, 0);
}

/* ---- the lock ---- */

/* The name of the turn that ends at the ticket; two that collide only wait for each other. */
static uint64
TurnOf(const Header &header, uint64 ticket)
{
	uint64 hash = hash_bytes_extended(header.node.data, UUID_LEN, ticket);

	return hash_combine64(hash, (uint64) (uint32) header.stream + 1);
}

/* InsertOnce() has the same class, with a zero at the end. */
static LOCKTAG
TagOf(uint64 turn)
{
	LOCKTAG tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, catalog::GetRelations().progress, (uint32) turn,
					   (uint16) (turn >> 32) | 1);
	return tag;
}

static bool
IsHeld(const LOCKTAG *tag)
{
	if (LockAcquire(tag, ShareLock, false, true) == LOCKACQUIRE_NOT_AVAIL)
		return true;
	LockRelease(tag, ShareLock, false);
	return false;
}

/* Who follows this batch waits for our end from now on. */
void
TakeTurn(const Session *session)
{
	uint64 turn = TurnOf(session->header, session->header.last);
	LOCKTAG tag = TagOf(turn);

	(void) LockAcquire(&tag, ExclusiveLock, false, false);
	pg_atomic_write_u64(&turns->taken[turn % kRemembered], turn);
	ConditionVariableBroadcast(&turns->begun);
	MMREPL_FAULT_POINT("apply-turn-taken");
}

/* ---- looking for deadlocks ---- */

/*
 * The server looks for a deadlock once in a wait, after deadlock_timeout, and so
 * the victim is who closed the circle, or a second goes by.  Who is ahead looks
 * again and again, and soon: it is he who gives way.  (Alarms do nothing but
 * that while he waits for a lock, and nothing at all while he does not.)
 */
static TimeoutId alarm_id = MAX_TIMEOUTS;
static volatile sig_atomic_t looks;

/* Signal handler.  Each look locks the lock table: not for hours, a hundred times a second. */
static void
OnAlarm()
{
	looks = looks + 1;
	if (looks <= kOftenLooks || looks % 10 == 0)
		CheckDeadLockAlert();
}

static void
WatchForDeadlocks()
{
	looks = 0;
	if (alarm_id == MAX_TIMEOUTS)
		alarm_id = RegisterTimeout(USER_TIMEOUT, OnAlarm);
	enable_timeout_every(alarm_id, TimestampTzPlusMilliseconds(GetCurrentTimestamp(), kLookEvery),
						 kLookEvery);
}

/* Raises nothing: error handlers call it. */
void
StopAhead(Session *session)
{
	if (!session->ahead)
		return;
	session->ahead = false;
	disable_timeout(alarm_id, false);
}

/* These waits are no news to the log. */
static void
SetLogLockWaits(const char *value)
{
	(void) set_config_option("log_lock_waits", value, PGC_SUSET, PGC_S_SESSION, GUC_ACTION_SAVE,
							 true, 0, false);
}

/* ---- the fence ---- */

/* Nothing that was executed ahead is right any more; the sender sends it again. */
pg_attribute_noreturn() static void Lost(const Session *session, uint64 watermark)
{
	const Header &header = session->header;

	ereport(ERROR,
			(errcode(ERRCODE_MMREPL_OUT_OF_ORDER),
			 errmsg(
				 "replication batch was executed ahead, and the one before it has not committed"),
			 errdetail("It follows ticket %llu; the last ticket of stream %d that was applied here "
					   "is %llu.",
					   (unsigned long long) header.previous, header.stream,
					   (unsigned long long) watermark)));
}

/* Nobody is before us any more: go on as any batch does, and see what is there now. */
static void
PassFence(Session *session)
{
	InContext(session->context, [&] {
		LockProgress(&session->progress, session->header.node, session->header.stream);
	});
	MMREPL_FAULT_POINT("apply-ahead-locked");
	if (session->progress.watermark != session->header.previous)
		Lost(session, session->progress.watermark);
	StopAhead(session);
	if (session->quiet_waits)
		SetLogLockWaits("on");
	CommandCounterIncrement();
	PopActiveSnapshot();
	PushCopiedSnapshot(GetLatestSnapshot());
}

bool
WaitForPredecessor(Session *session)
{
	LOCKTAG tag;

	if (!session->ahead)
		return false;
	tag = TagOf(TurnOf(session->header, session->header.previous));
	(void) LockAcquire(&tag, ShareLock, false, false);
	LockRelease(&tag, ShareLock, false);
	MMREPL_FAULT_POINT("apply-predecessor-ended");
	PassFence(session);
	return true;
}

/* ---- the begin ---- */

/* What is known of the batch before. */
enum class Before
{
	Unknown,
	AtWork,
	Here
};

/* Raises when it has failed, or when there is more than it here. */
static Before
LookBefore(const Session *session)
{
	const Header &header = session->header;
	uint64 turn = TurnOf(header, header.previous);
	LOCKTAG tag = TagOf(turn);

	if (IsHeld(&tag))
		return Before::AtWork;
	bool begun = pg_atomic_read_u64(&turns->taken[turn % kRemembered]) == turn;

	if (begun && IsHeld(&tag)) /* it has begun just now */
		return Before::AtWork;
	uint64 watermark = Watermark(header.node, header.stream);

	if (watermark == header.previous)
		return Before::Here;
	if (begun || watermark > header.previous)
		Lost(session, watermark);
	return Before::Unknown;
}

/* Both were sent at the same time: the other one may still be on its way. */
static Before
AwaitBegin(const Session *session)
{
	TimestampTz end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), kBeginTimeout);
	Before before;

	ConditionVariablePrepareToSleep(&turns->begun);
	while ((before = LookBefore(session)) == Before::Unknown)
	{
		long left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), end);

		if (left <= 0)
			Lost(session, 0);
		(void) ConditionVariableTimedSleep(&turns->begun, left, PG_WAIT_EXTENSION);
	}
	ConditionVariableCancelSleep();
	return before;
}

/* No lock on any row or table of users is held yet: nobody can wait for us meanwhile. */
void
BeginAhead(Session *session)
{
	session->quiet_waits = log_lock_waits;
	if (session->quiet_waits)
		SetLogLockWaits("off");
	WatchForDeadlocks();
	session->ahead = true;
	Before before = AwaitBegin(session);

	MMREPL_FAULT_POINT("apply-ahead-begun");
	if (before == Before::Here)
		PassFence(session);
}

} // namespace mmrepl::apply
