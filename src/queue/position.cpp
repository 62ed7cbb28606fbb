/*
 * position.cpp
 *		How far a stream is: what is confirmed, who waits for it, and the lock that
 *		only one deliverer holds.
 */
#include "queue_internal.hpp"

namespace mmrepl::queue
{

/* ---- positions ---- */

void
Confirm(shmem::Stream &stream, uint64 ticket)
{
	if (pg_atomic_read_u64(&stream.confirmed) >= ticket)
		return;
	AtomicMax(&stream.confirmed, ticket);
	ConditionVariableBroadcast(&stream.applied_cv);
	ConditionVariableBroadcast(&stream.confirmed_cv);
}

/* What rests on the second word has seen the first. */
void
NoteApplied(shmem::Stream &stream, uint64 ticket)
{
	AtomicMax(&stream.last_applied, ticket);
	pg_write_barrier();
	AtomicMax(&stream.applied, ticket);
	ConditionVariableBroadcast(&stream.applied_cv);
	ConditionVariableBroadcast(&stream.confirmed_cv);
}

/* Subtract, but not below zero: a count may have begun after the work was queued. */
static void
SubtractClamped(pg_atomic_uint64 *where, uint64 value)
{
	uint64 seen = pg_atomic_read_u64(where);

	while (!pg_atomic_compare_exchange_u64(where, &seen, seen > value ? seen - value : 0))
		;
}

void
Discount(shmem::Stream &stream, uint64 transactions, uint64 changes, uint64 bytes)
{
	SubtractClamped(&stream.queued_transactions, transactions);
	SubtractClamped(&stream.queued_changes, changes);
	SubtractClamped(&stream.queued_bytes, bytes);
}

void
Acknowledged(shmem::Stream &stream, uint64 watermark)
{
	AtomicMax(&stream.acked, watermark);
}

shmem::LateWord
ReadLate(const shmem::Database &database)
{
	pg_memory_barrier();
	return {pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&database.late))};
}

void
ConfirmLate(shmem::Stream &stream, uint32 ended)
{
	if (pg_atomic_read_u32(&stream.late_confirmed) == ended)
		return;
	pg_atomic_write_u32(&stream.late_confirmed, ended);
	ConditionVariableBroadcast(&stream.confirmed_cv);
}

Goal
CurrentGoal(const shmem::Stream &stream, int32 id)
{
	shmem::State &state = shmem::Get();
	shmem::Database &database = shmem::DatabaseOf(MyDatabaseId);

	SpinLockAcquire(&state.clock_mutex);
	bool ours = stream.in_use && stream.database == MyDatabaseId && stream.id == id;
	Goal goal = {ours ? stream.epoch : 0, stream.last_ticket, 0, kNoConnection};
	SpinLockRelease(&state.clock_mutex);
	goal.late = ReadLate(database).Expected();
	return goal;
}

bool
IsCurrent(const shmem::Stream &stream, const Goal &goal)
{
	return goal.epoch != 0 && stream.in_use && stream.epoch == goal.epoch;
}

static uint64
ConfirmedUpTo(const shmem::Stream &stream)
{
	pg_read_barrier();
	return pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&stream.confirmed));
}

static uint64
LastApplied(const shmem::Stream &stream)
{
	return pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&stream.last_applied));
}

static uint64
LastQueued(const shmem::Stream &stream)
{
	return pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&stream.last_queued));
}

static uint64
AppliedUpTo(const shmem::Stream &stream)
{
	uint64 applied = pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&stream.applied));

	pg_read_barrier(); /* LastApplied() comes behind it */
	return Max(ConfirmedUpTo(stream), applied);
}

/*
 * Whether something is not there that has to be.  For good: all that the worker has to
 * deliver, and all that was applied, is confirmed.  For a connection it is enough that
 * it is applied, while the connection lived.
 */
static bool
HasUnconfirmed(const shmem::Stream &stream, uint64 opened_at)
{
	uint64 queued = LastQueued(stream);

	if (opened_at == kNoConnection)
		return ConfirmedUpTo(stream) < Max(queued, LastApplied(stream));
	return AppliedUpTo(stream) < queued ||
		   ConfirmedUpTo(stream) < Min(LastApplied(stream), opened_at);
}

bool
AllFlushed(const shmem::Stream &stream)
{
	uint64 applied = LastApplied(stream);

	return ConfirmedUpTo(stream) >= applied;
}

/*
 * Either the worker has passed the ticket, or it need not: no ticket up to it is
 * in flight, and the newest one that had to be delivered is confirmed.  (The
 * worker may be away while inline transactions come and go.)
 */
static bool
TicketReached(const shmem::Stream &stream, uint64 ticket, uint64 opened_at)
{
	int slot = (int) (&stream - shmem::Get().streams);

	if (pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&stream.confirmed)) >= ticket)
		return true;
	if (ResolvedBelow(stream, slot) <= ticket)
		return false;
	return !HasUnconfirmed(stream, opened_at);
}

uint64
Confirmed(const shmem::Stream &stream)
{
	uint64 last = LastTicket(stream);
	bool all = TicketReached(stream, last, kNoConnection);
	uint64 passed = pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&stream.confirmed));

	return all ? Max(last, passed) : passed;
}

static bool
LateReached(const shmem::Stream &stream, const Goal &goal)
{
	uint32 late = pg_atomic_read_u32(const_cast<pg_atomic_uint32 *>(&stream.late_confirmed));

	return (int32) (late - goal.late) >= 0;
}

/* The slot's next use clears the epoch before it has a position. */
bool
Reached(const shmem::Stream &stream, const Goal &goal)
{
	bool reached = LateReached(stream, goal) && TicketReached(stream, goal.ticket, goal.opened_at);

	pg_read_barrier();
	return reached && IsCurrent(stream, goal);
}

bool
NeedsWorker(const shmem::Stream &stream, const Goal &goal)
{
	if (!LateReached(stream, goal))
		return true;
	return ConfirmedUpTo(stream) < goal.ticket && HasUnconfirmed(stream, goal.opened_at);
}

static bool
HasWaiters(const ConditionVariable &variable)
{
	return !proclist_is_empty(const_cast<proclist_head *>(&variable.wakeup));
}

/* Whether a COMMIT waits for more than has been reached. */
static bool
IsWanted(const pg_atomic_uint64 &ticket, uint64 reached)
{
	return pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&ticket)) > reached;
}

bool
SomebodyWaits(const shmem::Stream &stream)
{
	return HasWaiters(stream.confirmed_cv) || IsWanted(stream.flush_wanted, ConfirmedUpTo(stream));
}

bool
SomebodyWatches(const shmem::Stream &stream)
{
	return SomebodyWaits(stream) || IsWanted(stream.apply_wanted, AppliedUpTo(stream));
}

/*
 * Sleep until something has happened that the goal needs.  Those who wait for nothing
 * but the end of transactions here do not stand with those for whom the worker hurries.
 * (The first sleep on another variable than the one before returns at once: the worker,
 * which may have left the peer's flush for later, is woken again when we stand there.)
 */
static void
AwaitStep(shmem::Stream &stream, const Goal &goal, long timeout)
{
	bool for_worker = NeedsWorker(stream, goal);

	if (for_worker)
		shmem::WakeWorker(stream);
	ConditionVariableTimedSleep(for_worker ? &stream.confirmed_cv : &stream.settled_cv, timeout,
								PG_WAIT_EXTENSION);
	pg_memory_barrier(); /* who settles a ticket sees us there, or we see it settled */
}

bool
WaitConfirmed(shmem::Stream &stream, const Goal &goal, TimestampTz deadline)
{
	bool reached;

	while (!(reached = Reached(stream, goal)))
	{
		long left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), deadline);

		if (left <= 0 || pg_atomic_read_u64(&stream.discarded) == shmem::kNeedsResync ||
			!IsCurrent(stream, goal))
			break;
		AwaitStep(stream, goal, Min(left, 60000L));
	}
	ConditionVariableCancelSleep();
	return reached;
}

/* ---- the wait of a COMMIT ---- */

void
Want(const Arrival &arrival)
{
	AtomicMax(arrival.flushed ? &arrival.stream->flush_wanted : &arrival.stream->apply_wanted,
			  arrival.ticket);
}

bool
IsSameStream(const Arrival &arrival)
{
	return arrival.stream->in_use && arrival.stream->epoch == arrival.epoch;
}

bool
IsDiscarded(const Arrival &arrival)
{
	return pg_atomic_read_u64(&arrival.stream->discarded) >= arrival.ticket;
}

/*
 * The slot's next use clears the epoch before it has a position, and what is discarded
 * is so before it is passed.
 */
bool
HasArrived(const Arrival &arrival)
{
	const shmem::Stream &stream = *arrival.stream;
	uint64 reached = arrival.flushed ? ConfirmedUpTo(stream) : AppliedUpTo(stream);

	pg_read_barrier();
	return reached >= arrival.ticket && IsSameStream(arrival) && !IsDiscarded(arrival);
}

/*
 * Stand in the variable's list again, after a broadcast or for the first time.
 * ConditionVariablePrepareToSleep() alone would, on 15, hand each broadcast on to
 * another of those who stand there, and he to the next, for as long as all wait.
 */
static void
StandAt(ConditionVariable *variable, bool first)
{
	if (first)
		ConditionVariablePrepareToSleep(variable);
	SpinLockAcquire(&variable->mutex);
	if (!proclist_contains(&variable->wakeup, MyProcIndex(), cvWaitLink))
		proclist_push_tail(&variable->wakeup, MyProcIndex(), cvWaitLink);
	SpinLockRelease(&variable->mutex);
}

/* Milliseconds since then, by a clock that nobody sets. */
static long
Elapsed(const instr_time &since)
{
	instr_time now;

	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, since);
	return (long) INSTR_TIME_GET_MILLISEC(now);
}

/*
 * The server's own sleep on a condition variable does not end at a cancel while
 * interrupts are held off.  This one looks.  Whose latch was set for something else
 * finds it set afterwards.
 */
bool
AwaitArrival(const Arrival &arrival, long timeout)
{
	ConditionVariable *variable =
		arrival.flushed ? &arrival.stream->confirmed_cv : &arrival.stream->applied_cv;
	instr_time began;
	bool arrived;

	INSTR_TIME_SET_CURRENT(began);
	StandAt(variable, true);
	while (!(arrived = HasArrived(arrival)) && IsSameStream(arrival) && !IsDiscarded(arrival) &&
		   !QueryCancelPending && !ProcDiePending)
	{
		long left = timeout - Elapsed(began);

		if (left <= 0)
			break;
		int events = WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_POSTMASTER_DEATH, left,
							   PG_WAIT_EXTENSION);

		if (events & WL_POSTMASTER_DEATH)
			ProcDiePending = true; /* as everybody who waits where nothing may be raised */
		ResetLatch(MyLatch);
		StandAt(variable, false);
	}
	ConditionVariableCancelSleep();
	SetLatch(MyLatch);
	return arrived;
}

/* ---- ordering lock ---- */

/*
 * Sub-object 1 of the stream; sub-object 0 is the lock of the stream's row
 * (catalog).  The lock method of advisory locks: a session's locks of the default
 * method would go with any aborted transaction, and stay behind when the process
 * is terminated between two transactions.
 */
static LOCKTAG
OrderingTag(int32 stream)
{
	constexpr uint16 ordering = 1;
	LOCKTAG tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, catalog::GetRelations().stream, (uint32) stream,
					   ordering);
	tag.locktag_lockmethodid = USER_LOCKMETHOD;
	return tag;
}

bool
TakeOrderingLock(int32 stream, bool for_session, bool wait, LOCKTAG *tag)
{
	LOCKTAG ordering = OrderingTag(stream);

	if (tag != NULL)
		*tag = ordering;
	return LockAcquire(&ordering, ExclusiveLock, for_session, !wait) != LOCKACQUIRE_NOT_AVAIL;
}

void
ReleaseOrderingLock(const LOCKTAG &tag)
{
	LockRelease(&tag, ExclusiveLock, true);
}

} // namespace mmrepl::queue
