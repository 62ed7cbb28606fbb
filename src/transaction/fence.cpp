/*
 * fence.cpp
 *		The fence before each inline flush: all that was committed here on the
 *		stream is at the peer first.
 *
 * Who waits there holds locks here.  When a peer's delivery waits for one of them
 * while ours does not get on, each may be waiting for the other: what is queued
 * here waits, at the peer, for a session that waits at the fence there.  No
 * node's deadlock detector sees that, so such a wait has the bound of lock waits
 * across nodes, and the node with the higher id waits twice as long as ever.
 *
 * What was applied and may not be flushed at the peer is lost there if the peer
 * crashes, until the worker brings it again.  A connection that was open when it was
 * applied ends in that crash: whoever executes over it finds what was applied, or
 * executes nothing.  So the fence may be passed for that connection alone.
 */
#include "transaction_internal.hpp"

#include "mmrepl/catalog.hpp"

namespace mmrepl::transaction
{

/* The stream's shared slot: the fence stands there. */
static shmem::Stream &
SharedStream(Work *work)
{
	int slot = queue::SlotOf(work->route.stream);

	if (slot < 0)
	{
		catalog::StreamRow row = {};

		MmreplEnsure(catalog::ReadStreamRow(work->route.stream, &row), "stream %d does not exist",
					 work->route.stream);
		slot = queue::RequireSlot(row);
	}
	return shmem::Get().streams[slot];
}

static bool
FailForResync(const Work *work, connection::Failure *failure)
{
	*failure = {};
	failure->sqlstate = ERRCODE_MMREPL_NEEDS_RESYNC;
	failure->message = pstrdup("the server needs a resync");
	failure->detail = pstrdup("Too much was waiting for it.");
	failure->hint =
		psprintf("SELECT mmrepl.resync(%s);", quote_literal_cstr(work->route.server_name));
	return false;
}

/* ---- deadlocks ---- */

/* Whether a session that a peer has opened here waits for this one, directly or not. */
static bool
PeersWaitForUs()
{
	WaitChain chain = {};

	for (int i = 0; i < shmem::Get().n_slots; i++)
	{
		uint32 pid = pg_atomic_read_u32(&shmem::SlotOf(i).peer_session);

		if (pid != 0 && GetPGProcByNumber(i)->waitStatus == PROC_WAIT_STATUS_WAITING)
			chain.Add((int) pid);
	}
	for (int i = 0; i < chain.count; i++)
	{
		if (chain.pids[i] == MyProcPid)
			return true;
		chain.AddBlockersOf(i);
	}
	return false;
}

/* Milliseconds without progress after which a peer's wait for us is a deadlock to the user. */
static int
DeadlockBound(shmem::Stream &stream)
{
	SpinLockAcquire(&stream.mutex);
	pg_uuid_t peer = stream.peer_known ? stream.peer_node : pg_uuid_t{};
	SpinLockRelease(&stream.mutex);
	return sync::LockTimeout(peer);
}

static bool
FailForDeadlock(int bound, connection::Failure *failure)
{
	*failure = {};
	failure->sqlstate = ERRCODE_T_R_DEADLOCK_DETECTED;
	failure->message = pstrdup("deadlock or lock wait across nodes");
	failure->detail = psprintf("What is queued for the server has not got on for %d ms, and what a "
							   "peer delivers waits for a lock of this transaction.",
							   bound);
	failure->hint = pstrdup("Retry the transaction.");
	return false;
}

static bool
FailForTime(shmem::Stream &stream, connection::Failure *failure)
{
	SpinLockAcquire(&stream.mutex);
	shmem::WorkerState state = stats::ShownState(stream);
	SpinLockRelease(&stream.mutex);

	*failure = {};
	failure->sqlstate = ERRCODE_MMREPL_SYNC_TIMEOUT;
	failure->message = pstrdup("earlier changes for the server are still queued");
	failure->detail = psprintf("The stream is \"%s\".", stats::StateName(state));
	failure->hint = pstrdup("See mmrepl.pg_stat_mmrepl for the reason, or let the pair queue with "
							"on_unreachable => 'queue'.");
	return false;
}

/* ---- the fence ---- */

/* Wait for the goal while it is current; *locked: in vain, because a peer waits for us. */
static bool
AwaitGoal(shmem::Stream &stream, const queue::Goal &goal, int bound, bool *locked)
{
	constexpr int kLooks = 4; /* within the bound */
	TimestampTz deadline = connection::DeadlineIn(guc::sync_timeout);
	TimestampTz moved = GetCurrentTimestamp();
	uint64 confirmed = pg_atomic_read_u64(&stream.confirmed);

	for (;;)
	{
		TimestampTz look = connection::DeadlineIn(Max(bound / kLooks, 10));

		if (queue::WaitConfirmed(stream, goal, Min(look, deadline)))
			return true;
		if (GetCurrentTimestamp() >= deadline ||
			pg_atomic_read_u64(&stream.discarded) == shmem::kNeedsResync ||
			!queue::IsCurrent(stream, goal))
			return false;
		if (confirmed != pg_atomic_read_u64(&stream.confirmed))
			moved = GetCurrentTimestamp();
		confirmed = pg_atomic_read_u64(&stream.confirmed);
		*locked =
			TimestampDifferenceExceeds(moved, GetCurrentTimestamp(), bound) && PeersWaitForUs();
		if (*locked)
			return false;
	}
}

/* The fence as of now, and what it rests on: a connection, or (NULL) none. */
struct Sight
{
	queue::Goal goal;
	const connection::Notes *notes;
};

static Sight
LookAt(const Work *work, const shmem::Stream &stream, bool for_good)
{
	Sight sight = {queue::CurrentGoal(stream, work->route.stream), NULL};

	if (!for_good)
		sight.notes = connection::NotesOfCached(work->route.server, work->route.owner);
	if (sight.notes != NULL)
		sight.goal.opened_at = sight.notes->opened_at;
	return sight;
}

/* It is passed: by whoever, or over the one connection that it rests on; to a peer that has lost nothing. */
static bool
Passed(Work *work, const shmem::Stream &stream, const queue::Goal &goal, uint64 serial)
{
	bool flushed = queue::AllFlushed(stream);
	uint64 acked = pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&stream.acked));

	pg_read_barrier();
	bool current = queue::IsCurrent(stream, goal); /* else both are another stream's */

	work->inlined->only_serial = flushed && current ? 0 : serial;
	work->inlined->acked = current ? acked : 0;
	return true;
}

bool
AskForRetry(shmem::Stream &stream)
{
	constexpr int kEvery = 1000; /* ms */

	SpinLockAcquire(&stream.mutex);
	TimestampTz failed_at = stream.last_error_at;
	SpinLockRelease(&stream.mutex);
	if (!TimestampDifferenceExceeds(failed_at, GetCurrentTimestamp(), kEvery))
		return false;
	shmem::RequestRetry(stream);
	return true;
}

/* The same, and a try that fails at once is awaited.  Whether it got on. */
static bool
HurryRetry(shmem::Stream &stream, const queue::Goal &goal)
{
	constexpr int kPatience = 200; /* ms */
	TimestampTz until = connection::DeadlineIn(kPatience);

	SpinLockAcquire(&stream.mutex);
	int failures = stream.consecutive_failures;
	SpinLockRelease(&stream.mutex);
	if (!AskForRetry(stream))
		return false;
	for (;;)
	{
		if (queue::WaitConfirmed(stream, goal, connection::DeadlineIn(kPatience / 20)) ||
			!queue::IsCurrent(stream, goal))
			return true;
		SpinLockAcquire(&stream.mutex);
		bool retrying = stream.state == shmem::WorkerState::Retrying;
		bool failed = stream.consecutive_failures != failures;
		SpinLockRelease(&stream.mutex);
		if (!retrying || failed || GetCurrentTimestamp() >= until)
			return !retrying;
	}
}

/* Pass the fence as it stands now, at the stream's slot as it is used now. */
static bool
PassNow(Work *work, shmem::Stream &stream, const Sight &sight, connection::Failure *failure)
{
	uint64 serial = sight.notes != NULL ? sight.notes->serial : 0; /* the notes may go */

	if (queue::NeedsResync(work->route.stream))
		return FailForResync(work, failure);
	if (queue::Reached(stream, sight.goal))
		return Passed(work, stream, sight.goal, serial);
	SpinLockAcquire(&stream.mutex);
	shmem::WorkerState state = stream.paused ? shmem::WorkerState::Paused : stream.state;
	bool stuck = stream.paused || state == shmem::WorkerState::Retrying ||
				 state == shmem::WorkerState::Blocked;
	SpinLockRelease(&stream.mutex);

	int bound = DeadlockBound(stream);
	bool locked = false;

	if (state == shmem::WorkerState::Retrying && queue::NeedsWorker(stream, sight.goal))
		stuck = !HurryRetry(stream, sight.goal);
	if (!(stuck && queue::NeedsWorker(stream, sight.goal)) &&
		AwaitGoal(stream, sight.goal, bound, &locked))
		return Passed(work, stream, sight.goal, serial);
	if (queue::NeedsResync(work->route.stream)) /* by now */
		return FailForResync(work, failure);
	return locked ? FailForDeadlock(bound, failure) : FailForTime(stream, failure);
}

/*
 * The fence: all that was committed here on the stream before now must be at the
 * peer.  False, with the reason, when it is not and waiting is of no use or took
 * too long.  Whose slot became another stream's meanwhile begins anew.
 */
bool
PassFence(Work *work, bool for_good, connection::Failure *failure)
{
	work->inlined->only_serial = 0;
	if (catalog::MadeHere(work->route.stream))
		return true;
	for (;;)
	{
		shmem::Stream &stream = SharedStream(work);
		Sight sight = LookAt(work, stream, for_good);

		if (PassNow(work, stream, sight, failure))
			return true;
		if (queue::IsCurrent(stream, sight.goal))
			return false;
		CHECK_FOR_INTERRUPTS();
	}
}

bool
FenceIsOpen(Work *work)
{
	if (catalog::MadeHere(work->route.stream))
	{
		work->inlined->only_serial = 0;
		return true;
	}
	shmem::Stream &stream = SharedStream(work);

	if (queue::NeedsResync(work->route.stream))
		return false;
	Sight sight = LookAt(work, stream, false);

	if (queue::Reached(stream, sight.goal))
		return Passed(work, stream, sight.goal, sight.notes != NULL ? sight.notes->serial : 0);
	if (queue::NeedsWorker(stream, sight.goal))
		shmem::WakeWorker(stream);
	return false;
}

} // namespace mmrepl::transaction
