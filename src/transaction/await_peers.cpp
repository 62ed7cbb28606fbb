/*
 * await_peers.cpp
 *		mmrepl.async_commit: COMMIT returns when the peers have what was queued; and
 *		what is said when it has not waited as long as it should have.
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
 * is sent inline is there already; resync() takes its time.
 */
static bool
IsAwaited(const Work *work)
{
	return (work->changes > 0 || work->refused_level > 0) && !work->sync && !work->out.copy &&
		   !(work->out.flags & queue::kTombstone);
}

void
PrepareToAwait(Work *work)
{
	catalog::StreamRow row = {};

	if (!Waits())
		return;
	if (IsAwaited(work))
		work->out.awaits = guc::async_commit == guc::AsyncCommit::Flushed ? queue::Awaits::Flushed
																		  : queue::Awaits::Applied;
	if (work->sync || queue::SlotOf(work->route.stream) >= 0 ||
		!catalog::ReadStreamRow(work->route.stream, &row))
		return;
	if (!catalog::MadeHere(row.id))
		(void) queue::TakeSlot(row);
	else /* not before it is there for everybody */
		InContext(current.context, [&] {
			work->made = (catalog::StreamRow *) palloc(sizeof(row));
			*work->made = row;
		});
}

/* Unless the slot has become another stream's. */
static void
WantAt(Work *work, int slot)
{
	shmem::Stream &stream = shmem::Get().streams[slot];

	work->arrival.epoch = stream.epoch;
	pg_read_barrier();
	if (queue::SlotOf(work->route.stream) != slot)
		return;
	work->arrival.stream = &stream;
	queue::Want(work->arrival);
}

void
NotePeersToAwait()
{
	if (!Waits())
		return;
	for (Work *work = current.works; work != NULL; work = work->next)
	{
		work->awaited = IsAwaited(work);
		if (!work->awaited || work->refused_level > 0 || current.ticket == 0)
			continue;
		work->out.awaited = true;
		work->arrival = {NULL, 0, current.ticket, guc::async_commit == guc::AsyncCommit::Flushed};
		if (work->out.slot >= 0)
			WantAt(work, work->out.slot);
	}
}

/* ---- the wait ---- */

static bool
Cancelled()
{
	return QueryCancelPending || ProcDiePending;
}

/* How a stream looks to who waits for it. */
struct Sight
{
	shmem::WorkerState state;
	bool fails;	   /* its peer was not reached several times in a row */
	bool unserved; /* it has no worker */
};

static Sight
LookAt(shmem::Stream &stream)
{
	constexpr int kTries = 3;

	SpinLockAcquire(&stream.mutex);
	Sight sight = {stream.paused ? shmem::WorkerState::Paused : stream.state,
				   stream.consecutive_failures >= kTries, stream.worker_pid == 0};
	SpinLockRelease(&stream.mutex);
	return sight;
}

/* Whether somebody has to do something before it can arrive, or the peer is away. */
static bool
IsStopped(const queue::Arrival &arrival, const Sight &sight)
{
	using shmem::WorkerState;

	return !queue::IsSameStream(arrival) || queue::IsDiscarded(arrival) ||
		   sight.state == WorkerState::Paused || sight.state == WorkerState::Blocked ||
		   sight.state == WorkerState::NeedsResync ||
		   (sight.state == WorkerState::Retrying && sight.fails);
}

/*
 * Until the time of QuietDeadline(); true when it has arrived.  That the stream has
 * stopped is noticed within a second, that nobody serves it when he who looks has seen
 * no worker several times.  Connections that others need are not kept meanwhile.
 */
static bool
Await(const queue::Arrival &arrival, int64 until)
{
	constexpr int64 kLook = 1000; /* ms */
	constexpr int kPatience = 4;  /* looks */
	int unserved = 0;

	while (!queue::HasArrived(arrival))
	{
		Sight sight = LookAt(*arrival.stream);
		int64 left = until - connection::QuietDeadline(0);

		unserved = sight.unserved ? unserved + 1 : 0;
		if (Cancelled() || left <= 0 || unserved > kPatience || IsStopped(arrival, sight))
		{
			if (sight.state == shmem::WorkerState::Retrying)
				(void) AskForRetry(*arrival.stream);
			return false;
		}
		if (!queue::AwaitArrival(arrival, (long) Min(left, kLook)))
			connection::RestCached();
	}
	return true;
}

/*
 * Streams that the transaction itself has made get their places now that it is
 * committed.  A worker that has come before us may have left the flush for later.
 */
static void
TakePlaces(Work *works)
{
	for (Work *work = works; work != NULL; work = work->next)
	{
		int slot = work->awaited && work->made != NULL ? queue::TakeSlot(*work->made) : -1;

		if (slot < 0)
			continue;
		WantAt(work, slot);
		shmem::WakeWorker(shmem::Get().streams[slot]);
	}
}

/* ---- the warning ---- */

static bool
LacksResync(const Work *work)
{
	const shmem::Stream *stream = work->arrival.stream;

	return work->refused_level > 0 ||
		   (stream != NULL && queue::IsSameStream(work->arrival) &&
			pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&stream->discarded)) ==
				shmem::kNeedsResync);
}

static int
WhyAway(const Work *work)
{
	const queue::Arrival &arrival = work->arrival;

	if (LacksResync(work))
		return errdetail("It is committed here. The server needs a resync: nothing is delivered "
						 "to it.");
	if (arrival.stream == NULL || !queue::IsSameStream(arrival))
		return errdetail("It is committed here. Nothing delivers it to the server.");
	if (queue::IsDiscarded(arrival))
		return errdetail("It is committed here. resync() has taken it out of the queue, and copies "
						 "the tables instead.");
	Sight sight = LookAt(*arrival.stream);

	return sight.unserved ? errdetail("It is committed here, and queued; the stream has no worker.")
						  : errdetail("It is committed here, and queued; the stream is \"%s\".",
									  stats::StateName(sight.state));
}

static int
CodeOf(const Work *work)
{
	if (LacksResync(work))
		return ERRCODE_MMREPL_NEEDS_RESYNC;
	if (ProcDiePending)
		return ERRCODE_ADMIN_SHUTDOWN;
	return QueryCancelPending ? ERRCODE_QUERY_CANCELED : ERRCODE_MMREPL_SYNC_TIMEOUT;
}

/*
 * Report at that level, where nothing may raise.  What cannot be converted to the
 * client's encoding is an error, which also forgets that interrupts are held off.  Then
 * the log is told.
 */
template <typename Report>
static void
Tell(int level, Report report)
{
	uint32 interrupts = InterruptHoldoffCount;
	uint32 cancels = QueryCancelHoldoffCount;
	ErrorData *error = Caught([&] { report(level); });

	if (error == NULL)
		return;
	InterruptHoldoffCount = interrupts;
	QueryCancelHoldoffCount = cancels;
	FreeErrorData(error);
	report(LOG_SERVER_ONLY);
}

/* To the client alone, if there is one: there may be many of these, and the log has the cause. */
static void
TellAway(const Work *work)
{
	Tell(whereToSendOutput == DestRemote ? WARNING_CLIENT_ONLY : WARNING, [&](int level) {
		ereport(level,
				(errcode(CodeOf(work)),
				 errmsg("the transaction is not known to be %s at server \"%s\"",
						guc::async_commit == guc::AsyncCommit::Flushed ? "flushed" : "applied",
						work->route.server_name),
				 WhyAway(work), errhint("See mmrepl.pg_stat_mmrepl for the reason.")));
	});
}

/*
 * The user did not want to wait for a peer's commit: he is told what that means.  A
 * slow client keeps nobody waiting: the locks are released by now.
 */
static bool
TellCancelled(Work *works)
{
	bool cancelled = false;

	for (Work *work = works; work != NULL; work = work->next)
	{
		if (work->inlined == NULL || !work->inlined->cancelled)
			continue;
		cancelled = true;
		Tell(WARNING, [&](int level) {
			ereport(level,
					(errcode(ERRCODE_QUERY_CANCELED),
					 errmsg("the commit at server \"%s\" was not waited for",
							work->route.server_name),
					 errdetail("The transaction is committed here; the worker completes it there."),
					 errhint("See mmrepl.in_doubt.")));
		});
	}
	return cancelled;
}

/* True when a cancel has ended the wait. */
static bool
AwaitQueued(Work *works)
{
	int64 until = works == NULL ? 0 : connection::QuietDeadline(guc::sync_timeout);
	bool cancelled = false;

	TakePlaces(works);
	for (Work *work = works; work != NULL; work = work->next)
	{
		if (!work->awaited || (work->arrival.stream != NULL && Await(work->arrival, until)))
			continue;
		cancelled |= Cancelled();
		TellAway(work);
	}
	return cancelled;
}

/*
 * A cancel has had its effect when it has ended a wait.  But not where the COMMIT is
 * one of a procedure: that does not go on as if nothing had been asked for.
 */
void
AwaitPeers(Work *inlined, Work *queued)
{
	bool cancelled = TellCancelled(inlined);

	cancelled |= AwaitQueued(queued);
	if (cancelled && !SPI_inside_nonatomic_context())
		QueryCancelPending = false;
}

} // namespace mmrepl::transaction
