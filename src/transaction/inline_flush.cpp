/*
 * inline_flush.cpp
 *		What was captured for sync pairs travels: the fence, the flush, several
 *		peers at a time, and what is done when one is not reached.
 */
#include "transaction_internal.hpp"

#include "mmrepl/catalog.hpp"
#include "mmrepl/fault.hpp"

namespace mmrepl::transaction
{

static change::Segment *
FirstUnsent(Work *work)
{
	change::Segment *segment = work->first;

	while (segment != NULL && segment->sent)
		segment = segment->next;
	return segment;
}

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
		slot = queue::TakeSlot(row);
	}
	if (slot < 0)
		ereport(ERROR, (errcode(ERRCODE_MMREPL_TOO_MANY_STREAMS),
						errmsg("too many servers are replicated to"),
						errhint("Raise mmrepl.max_servers and restart the server.")));
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

/*
 * The fence: all that was committed here on the stream before now must be at the
 * peer.  False, with the reason, when it is not and waiting is of no use or took
 * too long.
 */
static bool
PassFence(Work *work, connection::Failure *failure)
{
	if (catalog::MadeHere(work->route.stream))
		return true;

	shmem::Stream &stream = SharedStream(work);
	queue::Goal goal = queue::CurrentGoal(stream);

	if (queue::NeedsResync(work->route.stream))
		return FailForResync(work, failure);
	if (queue::Reached(stream, goal))
		return true;
	SpinLockAcquire(&stream.mutex);
	shmem::WorkerState state = stream.state;
	SpinLockRelease(&stream.mutex);
	bool stuck = state == shmem::WorkerState::Retrying || state == shmem::WorkerState::Paused ||
				 state == shmem::WorkerState::Blocked;

	shmem::WakeWorker(stream);
	if (!(stuck && queue::HasQueued(stream)) &&
		queue::WaitConfirmed(stream, goal, connection::DeadlineIn(guc::sync_timeout)))
		return true;
	if (queue::NeedsResync(work->route.stream)) /* by now */
		return FailForResync(work, failure);
	*failure = {};
	failure->sqlstate = ERRCODE_MMREPL_SYNC_TIMEOUT;
	failure->message = pstrdup("earlier changes for the server are still queued");
	failure->detail = psprintf("The stream is \"%s\".", stats::StateName(state));
	failure->hint = pstrdup("See mmrepl.pg_stat_mmrepl for the reason, or let the pair queue with "
							"on_unreachable => 'queue'.");
	return false;
}

/* The pair says to go on without the peer: the work is queued like async work. */
static void
Degrade(Work *work, const connection::Failure *failure)
{
	work->degraded = true;
	work->sync = false;
	work->unsent = 0;
	if (work->inlined != NULL)
		sync::Abort(work->inlined);
	work->inlined = NULL;
	ereport(NOTICE,
			(errmsg("server \"%s\" is not reached: the transaction's changes for it are queued",
					work->route.server_name),
			 errdetail_internal("%s", failure->message)));
}

static void
CountSyncFailure(Work *work)
{
	int slot = queue::SlotOf(work->route.stream);

	if (slot >= 0)
		pg_atomic_fetch_add_u64(&shmem::Get().streams[slot].counters.sync_failures, 1);
}

/* Send what is unsent up to and including `last`, captured at this nest level. */
static bool
FlushTo(Work *work, change::Segment *last, int level, bool goes_on, connection::Failure *failure)
{
	uint64 xid = U64FromFullTransactionId(GetTopFullTransactionId());
	change::Segment *unsent = FirstUnsent(work);
	bool done = false;

	if (last == NULL || unsent == NULL || unsent->seq > last->seq)
		return true;
	change::Segment *rest = last->next;

	work->inlined->goes_on = goes_on;
	last->closed = true;
	last->next = NULL; /* the flush takes the list as far as it goes */
	Ensured([&] { done = sync::Flush(work->inlined, unsent, work->unsent, xid, level, failure); },
			[&] { last->next = rest; });
	return done;
}

/* What was captured before the mark, each part at the level of its own subtransaction. */
static bool
FlushBefore(Work *work, const Mark *mark, connection::Failure *failure)
{
	if (mark == NULL)
		return true;
	return FlushBefore(work, mark->outer, failure) &&
		   FlushTo(work, mark->segment, mark->outer != NULL ? mark->outer->level : 1, true,
				   failure);
}

static bool
HasUnsent(const Work *work)
{
	return work->sync && work->unsent > 0;
}

static void
EnsureInlined(Work *work)
{
	if (work->inlined == NULL)
		work->inlined = InContext(TopTransactionContext, [&] {
			return sync::Start(work->route.stream, work->route.server, work->route.owner,
							   work->route.server_name);
		});
}

void
FlushWork(Work *work, bool goes_on)
{
	connection::Failure failure = {};
	bool done = false;

	if (!HasUnsent(work))
		return;
	EnsureInlined(work);
	MMREPL_FAULT_POINT("sync-begin");
	Guarded(
		[&] {
			done = (work->inlined->posted != NULL || PassFence(work, &failure)) &&
				   FlushBefore(work, work->marks, &failure) &&
				   FlushTo(work, work->last, work->marks != NULL ? work->marks->level : 1, goes_on,
						   &failure);
		},
		[&] { CountSyncFailure(work); });
	if (done)
	{
		work->unsent = 0;
		BoundLocalWaits(work);
		MMREPL_FAULT_POINT("sync-executed");
		return;
	}
	CountSyncFailure(work);
	if (!work->route.queue_when_unreachable || work->inlined->broken)
		connection::ReportFailure(&failure, work->route.server_name, NULL);
	Degrade(work, &failure);
}

/* ---- several peers ---- */

/* Send what the work has, if it is all of one level, and do not wait; what fails is left to the flush. */
static void
PostWork(Work *work)
{
	connection::Failure failure = {};
	Mark *mark = work->marks;
	change::Segment *unsent = FirstUnsent(work);

	EnsureInlined(work);
	if (mark != NULL && mark->segment != NULL && unsent->seq <= mark->segment->seq)
		return;
	if (!PassFence(work, &failure))
		return;
	work->last->closed = true;
	work->inlined->goes_on = false;
	sync::Post(work->inlined, unsent, U64FromFullTransactionId(GetTopFullTransactionId()),
			   mark != NULL ? mark->level : 1);
}

static void
UnpostAll()
{
	for (Work *work = current.works; work != NULL; work = work->next)
		if (work->inlined != NULL)
			sync::Unpost(work->inlined);
}

/* Nobody is to wait any longer. */
static bool
IsCancel(const ErrorData *error)
{
	return error->sqlerrcode == ERRCODE_QUERY_CANCELED ||
		   ERRCODE_TO_CATEGORY(error->sqlerrcode) == ERRCODE_OPERATOR_INTERVENTION;
}

/*
 * Take the answers of all of them, so that each work knows where its peer stands,
 * and then raise the first error.
 */
static void
FlushPosted()
{
	ErrorData *first = NULL;

	for (Work *work = current.works; work != NULL; work = work->next)
	{
		ErrorData *error = Caught([&] { FlushWork(work, false); });

		if (first == NULL)
			first = error;
		if (error != NULL && IsCancel(error))
			break;
	}
	if (first == NULL)
		return;
	UnpostAll();
	ReThrowError(first);
}

/* The peers execute their parts at the same time: it takes as long as the slowest. */
static void
FlushTogether()
{
	Guarded(
		[&] {
			for (Work *work = current.works; work != NULL; work = work->next)
				if (HasUnsent(work))
					PostWork(work);
		},
		[&] { UnpostAll(); });
	FlushPosted();
}

void
FlushPending()
{
	int count = 0;

	if (!current.pending_sync)
		return;
	current.pending_sync = false;
	for (Work *work = current.works; work != NULL; work = work->next)
		count += HasUnsent(work);
	if (count > 1)
		FlushTogether();
	else
		for (Work *work = current.works; work != NULL; work = work->next)
			FlushWork(work, false);
}

} // namespace mmrepl::transaction
