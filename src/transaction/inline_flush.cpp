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

/* The pair says to go on without the peer: the work is queued like async work. */
static void
Degrade(Work *work, const connection::Failure *failure)
{
	work->degraded = true;
	work->sync = false;
	work->unsent = 0;
	if (work->inlined != NULL)
		(void) sync::Abort(work->inlined);
	sync::EndAbandoned();
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
	change::CloseSegment(last);
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

/*
 * The answers to what was posted; false when the peer was lost meanwhile.  If it was
 * lost with a connection that it was meant for, all is as if nothing had been posted.
 */
static bool
Collect(Work *work, connection::Failure *failure)
{
	change::Segment *last = sync::LastPosted(work->inlined);

	work->inlined->stale = false;
	return last == NULL || FlushTo(work, last, 1, false, failure) || work->inlined->stale;
}

/* Each unsent part at the level of its own subtransaction. */
static bool
FlushAll(Work *work, bool goes_on, connection::Failure *failure)
{
	return FlushBefore(work, work->marks, failure) &&
		   FlushTo(work, work->last, work->marks != NULL ? work->marks->level : 1, goes_on,
				   failure);
}

/*
 * What the peer has not been sent yet.  The fence is waited for once in a flush: of
 * several peers, all pass theirs before anything is sent.  What it said then holds for
 * this flush alone, used or not.  Once more only if it was passed for a connection that
 * turns out dead: then for good, since nobody knows what the peer has lost.
 */
static bool
SendRest(Work *work, bool goes_on, connection::Failure *failure)
{
	Fence fence = work->fence;

	work->fence = Fence::NotAsked;
	if (FirstUnsent(work) == NULL)
		return true;
	if (work->inlined->posted == NULL && fence == Fence::Closed)
	{
		*failure = work->fence_failure;
		return false;
	}
	if (!work->inlined->stale)
	{
		if (work->inlined->posted == NULL && fence != Fence::Passed &&
			!PassFence(work, false, failure))
			return false;
		if (FlushAll(work, goes_on, failure))
			return true;
	}
	return work->inlined->stale && PassFence(work, true, failure) &&
		   FlushAll(work, goes_on, failure);
}

/* Take the answers to what was posted, then with `all` send the rest and wait for it as well. */
static void
Exchange(Work *work, bool all, bool goes_on)
{
	connection::Failure failure = {};
	bool done = false;

	Guarded([&] { done = Collect(work, &failure) && (!all || SendRest(work, goes_on, &failure)); },
			[&] { CountSyncFailure(work); });
	if (done)
	{
		Pack(work);
		work->unsent = CountUnsent(work);
		BoundLocalWaits(work);
		return;
	}
	CountSyncFailure(work);
	if (!work->route.queue_when_unreachable || work->inlined->broken)
		connection::ReportFailure(&failure, work->route.server_name, NULL);
	Degrade(work, &failure);
}

void
FlushWork(Work *work, bool goes_on)
{
	if (!HasUnsent(work))
		return;
	EnsureInlined(work);
	MMREPL_FAULT_POINT("sync-begin");
	Exchange(work, true, goes_on);
	if (!work->degraded)
		MMREPL_FAULT_POINT("sync-executed");
}

/* ---- ahead of the commit ---- */

/* Send what there is to send; what fails is left to the flush. */
static void
PostRest(Work *work, int level)
{
	change::Segment *unsent = FirstUnsent(work);

	change::CloseSegment(work->last);
	work->inlined->goes_on = false;
	sync::Post(work->inlined, unsent, U64FromFullTransactionId(GetTopFullTransactionId()), level);
}

/*
 * Send what the statement has left behind, if nothing has to be waited for first,
 * and take the answers that have arrived.  The peer's refusal is raised as soon as
 * it is known; so is that the peer is not reached.
 */
static void
PostAhead(Work *work)
{
	change::Segment *posted;

	EnsureInlined(work);
	posted = sync::LastPosted(work->inlined);
	if (posted != NULL && sync::Answered(work->inlined))
		Exchange(work, false, false);
	else if (posted == work->last)
		return;
	if (!HasUnsent(work) || !sync::TakesMore(work->inlined, 1) || !FenceIsOpen(work))
		return;
	PostRest(work, 1);
	MMREPL_FAULT_POINT("sync-posted");
	if (sync::LastPosted(work->inlined) == NULL)
		FlushWork(work, false);
	else
		BoundLocalWaits(work);
}

/*
 * What a subtransaction has captured is held back: the peer would need a savepoint
 * of its own for it, and a round trip to go back there.
 */
void
PostPending()
{
	if (GetCurrentTransactionNestLevel() > 1)
		return;
	for (Work *work = current.works; work != NULL; work = work->next)
		if (HasUnsent(work) && work->marks == NULL)
			PostAhead(work);
}

/* ---- several peers ---- */

/*
 * Send what the work has, if it is all of one level, and do not wait.  Where
 * something was posted before, its answers come before the fence: the flush does
 * that.  False when the fence is closed.
 */
static bool
PostWork(Work *work)
{
	Mark *mark = work->marks;
	change::Segment *unsent = FirstUnsent(work);

	EnsureInlined(work);
	work->fence = Fence::NotAsked;
	if (mark != NULL && mark->segment != NULL && unsent->seq <= mark->segment->seq)
		return true;
	if (work->inlined->posted != NULL && !FenceIsOpen(work))
		return true;
	work->fence = PassFence(work, false, &work->fence_failure) ? Fence::Passed : Fence::Closed;
	if (work->fence == Fence::Passed)
		PostRest(work, mark != NULL ? mark->level : 1);
	return work->fence == Fence::Passed;
}

static void
UnpostAll()
{
	for (Work *work = current.works; work != NULL; work = work->next)
	{
		work->fence = Fence::NotAsked;
		if (work->inlined != NULL)
			sync::Unpost(work->inlined);
	}
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
		if (work->inlined != NULL)
			sync::Expect(work->inlined);
	for (Work *work = current.works; work != NULL; work = work->next)
	{
		if (first != NULL && (work->inlined == NULL || work->inlined->posted == NULL))
			continue;
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
			bool open = true;

			for (Work *work = current.works; work != NULL && open; work = work->next)
				if (HasUnsent(work))
					open = PostWork(work) || work->route.queue_when_unreachable;
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
