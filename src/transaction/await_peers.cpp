/*
 * await_peers.cpp
 *		mmrepl.async_commit: COMMIT returns when the peers have what was queued.
 *
 * Like the server's own synchronous replication it waits when the transaction is
 * committed here, and so can only be given up, with a warning, and not undone.
 * Unlike that it waits without the transaction's locks, so that no transaction can
 * wait for the waiting one, here or across nodes.
 */
#include "transaction_internal.hpp"

#include "mmrepl/catalog.hpp"

namespace mmrepl::transaction
{

/* A peer's session does not wait: what it applied would wait with it. */
static bool
Waits()
{
	return guc::async_commit != guc::AsyncCommit::Queued && shmem::Ready() &&
		   pg_atomic_read_u32(&shmem::MySlot().peer_session) == 0;
}

/*
 * Whether COMMIT has to wait for the work: it was captured, or would have been.  What
 * is sent inline is there already; who was told that his changes are queued, or not
 * even that, is not told again; resync() takes its time.
 */
static bool
IsAwaited(const Work *work)
{
	return (work->changes > 0 || work->refused_level > 0) && !work->sync && !work->degraded &&
		   !work->out.copy && !(work->out.flags & queue::kTombstone);
}

void
PrepareToAwait(const Work *work)
{
	catalog::StreamRow row = {};

	if (Waits() && !work->sync && !catalog::MadeHere(work->route.stream) &&
		queue::SlotOf(work->route.stream) < 0 && catalog::ReadStreamRow(work->route.stream, &row))
		(void) queue::TakeSlot(row);
}

void
NotePeersToAwait()
{
	if (!Waits())
		return;
	for (Work *work = current.works; work != NULL; work = work->next)
	{
		work->awaited = IsAwaited(work);
		if (!work->awaited || work->refused_level > 0 || current.ticket == 0 || work->out.slot < 0)
			continue;
		shmem::Stream &stream = shmem::Get().streams[work->out.slot];

		work->arrival = {&stream, stream.epoch, current.ticket,
						 guc::async_commit == guc::AsyncCommit::Flushed};
		queue::Want(work->arrival);
	}
}

/* ---- the wait ---- */

/*
 * Whether there is no sense in waiting, for now: somebody has to do something about
 * the stream, or its peer was not reached several times in a row.
 */
static bool
IsStopped(const queue::Arrival &arrival, shmem::WorkerState *state)
{
	constexpr int kTries = 3;
	shmem::Stream &stream = *arrival.stream;

	SpinLockAcquire(&stream.mutex);
	*state = stream.paused ? shmem::WorkerState::Paused : stream.state;
	bool fails = stream.consecutive_failures >= kTries;
	SpinLockRelease(&stream.mutex);
	if (pg_atomic_read_u64(&stream.discarded) == shmem::kNeedsResync)
		*state = shmem::WorkerState::NeedsResync; /* the worker may not have said so yet */
	return !queue::IsSameStream(arrival) || *state == shmem::WorkerState::Paused ||
		   *state == shmem::WorkerState::Blocked || *state == shmem::WorkerState::NeedsResync ||
		   (*state == shmem::WorkerState::Retrying && fails);
}

/* True when it has arrived.  That the stream has stopped is noticed within a second. */
static bool
Await(const queue::Arrival &arrival, TimestampTz deadline)
{
	constexpr int kLook = 1000; /* ms */
	shmem::WorkerState state;

	while (!queue::HasArrived(arrival))
	{
		if (QueryCancelPending || ProcDiePending || GetCurrentTimestamp() >= deadline ||
			IsStopped(arrival, &state))
			return false;
		(void) queue::AwaitArrival(arrival, Min(deadline, connection::DeadlineIn(kLook)));
	}
	return true;
}

/*
 * To the client alone: the worker has told the log what is wrong, and there may be many
 * of these.
 */
static void
TellAway(const Work *work, bool cancelled)
{
	shmem::WorkerState state = shmem::WorkerState::NeedsResync;
	bool refused = work->refused_level > 0;
	bool away = work->arrival.stream == NULL || !queue::IsSameStream(work->arrival);

	if (!refused && !away)
		(void) IsStopped(work->arrival, &state);
	ereport(WARNING_CLIENT_ONLY,
			(errcode(cancelled ? ERRCODE_QUERY_CANCELED : ERRCODE_MMREPL_SYNC_TIMEOUT),
			 errmsg("the transaction is not known to be %s at server \"%s\"",
					guc::async_commit == guc::AsyncCommit::Flushed ? "flushed" : "applied",
					work->route.server_name),
			 !refused && away
				 ? errdetail("It is committed here, and queued; nothing delivers it yet.")
			 : state == shmem::WorkerState::NeedsResync
				 ? errdetail("It is committed here. The server needs a resync: nothing is "
							 "delivered to it.")
				 : errdetail("It is committed here, and queued; the stream is \"%s\".",
							 stats::StateName(state)),
			 errhint("See mmrepl.pg_stat_mmrepl for the reason.")));
}

void
AwaitPeers(Work *works)
{
	TimestampTz deadline = works == NULL ? 0 : connection::DeadlineIn(guc::sync_timeout);
	bool cancelled = false;

	for (Work *work = works; work != NULL; work = work->next)
	{
		if (!work->awaited || (work->arrival.stream != NULL && Await(work->arrival, deadline)))
			continue;
		cancelled |= QueryCancelPending || ProcDiePending;
		TellAway(work, cancelled);
	}
	if (cancelled)
		QueryCancelPending = false; /* it has had its effect */
}

} // namespace mmrepl::transaction
