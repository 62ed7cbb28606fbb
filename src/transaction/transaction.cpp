/*
 * transaction.cpp
 *		The buffer of the current transaction: segments, savepoint marks, spill.
 *
 * Spilling obeys one rule: chunk rows carry the id of the subtransaction that
 * writes them, so only what that subtransaction captured itself may be written
 * while it runs.  A mark per subtransaction says where its part begins.
 */
#include "transaction_internal.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::transaction
{

Current current;

/* ---- works ---- */

/* A sync change on a stream that had async ones: everything has to travel inline. */
static void
TurnSync(Work *work, bool queue_when_unreachable)
{
	if (work->degraded)
		return;
	if (!work->sync && work->spilled)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot replicate synchronously to server \"%s\" in this transaction",
						work->route.server_name),
				 errdetail("Earlier changes of the transaction for this server were asynchronous "
						   "and have been spilled to the queue."),
				 errhint("Use SET LOCAL mmrepl.mode = 'sync' from the beginning of the "
						 "transaction, or raise mmrepl.buffer_memory.")));
	work->route.queue_when_unreachable =
		queue_when_unreachable && (!work->sync || work->route.queue_when_unreachable);
	if (work->sync)
		return;
	work->sync = true;
	work->sync_level = GetCurrentTransactionNestLevel();
	work->unsent = work->changes;
}

static Work *
NewWork(const Route &route)
{
	if (current.context == NULL)
	{
		queue::EnsureReady();
		current.context =
			AllocSetContextCreate(TopTransactionContext, "mmrepl changes", ALLOCSET_DEFAULT_SIZES);
	}
	Work *work = (Work *) MemoryContextAllocZero(current.context, sizeof(Work));

	work->route = route;
	work->route.server_name = MemoryContextStrdup(current.context, route.server_name);
	work->out.stream = route.stream;
	work->out.slot = -1;
	work->out.copy = CopyOf(route.stream) != NULL;
	work->given_up = !work->out.copy && queue::NeedsResync(route.stream);
	work->next = current.works;
	current.works = work;
	return work;
}

/* Whether nothing is captured; where resync() may have come meanwhile, it is looked at again. */
static bool
StillGivenUp(Work *work)
{
	if (work->ask_again)
		work->given_up = queue::NeedsResync(work->route.stream);
	work->ask_again = false;
	return work->given_up;
}

Work *
Use(const Route &route)
{
	Work *work = current.works;

	if (unlikely(current.written))
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_CAPTURED_TOO_LATE),
				 errmsg("a replicated table was changed after the transaction's changes were "
						"queued"),
				 errdetail("Another extension writes to replicated tables while the transaction "
						   "commits."),
				 errhint("List mmrepl_bgw first in \"shared_preload_libraries\".")));
	while (work != NULL && work->route.stream != route.stream)
		work = work->next;
	if (work == NULL)
		work = NewWork(route);
	if (unlikely(work->given_up) && StillGivenUp(work))
	{
		int level = GetCurrentTransactionNestLevel();

		work->refused_level = work->refused_level == 0 ? level : Min(work->refused_level, level);
		RefuseSync(work, route);
		return NULL;
	}
	if (route.sync)
		TurnSync(work, route.queue_when_unreachable);
	return work;
}

bool
IsSync(const Work *work)
{
	return work->sync;
}

/* ---- segments and marks ---- */

static void
PushMark(Work *work, int level)
{
	Mark *mark = (Mark *) MemoryContextAllocZero(current.context, sizeof(Mark));

	mark->outer = work->marks;
	mark->level = level;
	mark->segment = work->last;
	mark->changes = work->changes;
	mark->place = work->out.place;
	if (work->last != NULL)
	{
		/* What is sent inline is sent at its own level: the child starts a segment. */
		mark->closed = work->last->closed;
		if (work->sync)
			change::CloseSegment(work->last);
		mark->length = work->last->length;
		mark->segment_changes = work->last->changes;
	}
	work->marks = mark;
}

/* Count the memory of a segment that is finished. */
static void
Hold(change::Segment *segment)
{
	Size bytes = change::Footprint(segment);

	current.held += bytes - segment->held;
	segment->held = (uint32) bytes;
}

static void
FreeSegment(change::Segment *segment)
{
	current.held -= segment->held;
	if (segment->data != NULL)
		pfree(segment->data);
	pfree(segment);
}

change::Segment *
SegmentFor(Work *work)
{
	int level = GetCurrentTransactionNestLevel();

	if (level > 1 && (work->marks == NULL || work->marks->level < level))
		PushMark(work, level);
	if (work->last != NULL && change::HasRoom(work->last))
		return work->last;

	/* What a statement has sent is joined later: it takes no more room than it needs. */
	bool early = work->sync && work->last != NULL && work->last->length < change::kSegmentTarget;
	change::Segment *segment =
		change::NewSegment(current.context, work->next_seq++, early ? work->last : NULL);

	if (work->last != NULL)
	{
		change::CloseSegment(work->last);
		Hold(work->last);
		work->last->next = segment;
	}
	else
		work->first = segment;
	work->last = segment;
	return segment;
}

static void
FreeSegments(change::Segment *segment)
{
	while (segment != NULL)
	{
		change::Segment *next = segment->next;

		FreeSegment(segment);
		segment = next;
	}
}

change::Segment *
FirstUnsent(const Work *work)
{
	change::Segment *segment = work->sent_to != NULL ? work->sent_to->next : work->first;

	while (segment != NULL && segment->sent)
		segment = segment->next;
	return segment;
}

int64
CountUnsent(const Work *work)
{
	int64 count = 0;

	for (const change::Segment *segment = FirstUnsent(work); segment != NULL;
		 segment = segment->next)
		count += segment->changes;
	return count;
}

/* The segment goes into the one before it. */
static bool
Join(Work *work, change::Segment *into, change::Segment *segment)
{
	if (!change::Absorb(into, segment))
		return false;
	into->next = segment->next;
	if (work->last == segment)
		work->last = into;
	if (work->sent_to == segment)
		work->sent_to = into;
	FreeSegment(segment);
	Hold(into);
	return true;
}

/*
 * What the marks speak of stays as it is: only what came after the innermost one is
 * joined.  Each segment is looked at once, or once again after an undo.
 */
void
Pack(Work *work)
{
	change::Segment *at = work->sent_to != NULL ? work->sent_to->next : work->first;
	const change::Segment *floor = work->marks != NULL ? work->marks->segment : NULL;

	for (; at != NULL && at->sent; at = at->next)
		work->sent_to = at;
	if (work->sent_to == NULL)
		return;
	at = work->packed != NULL ? work->packed : work->first;
	if (floor != NULL && at->seq <= floor->seq)
		at = floor->next;
	while (at != NULL && at->seq < work->sent_to->seq)
		if (!Join(work, at, at->next))
			at = at->next;
	if (at != NULL && at->sent)
		work->packed = at;
}

/* All sync changes of the work are undone: what is left was captured as async. */
static void
TurnAsync(Work *work)
{
	if (work->inlined != NULL)
		sync::Abort(work->inlined);
	work->inlined = NULL;
	work->sync = false;
	work->sent_to = work->packed = NULL;
	for (change::Segment *segment = work->first; segment != NULL; segment = segment->next)
		segment->sent = false;
}

/* What comes after the last segment is going to be freed. */
static void
StepBack(change::Segment **at, change::Segment *last)
{
	if (*at != NULL && (last == NULL || (*at)->seq > last->seq))
		*at = last;
}

/* Forget what the subtransaction of this level, and those within, added. */
void
UndoTo(Work *work, int level)
{
	while (work->marks != NULL && work->marks->level >= level)
	{
		Mark *mark = work->marks;
		change::Segment *last = mark->segment;

		StepBack(&work->sent_to, last);
		StepBack(&work->packed, last);
		FreeSegments(last != NULL ? last->next : work->first);
		work->last = last;
		if (last != NULL)
		{
			last->next = NULL;
			last->closed = mark->closed || last->sent;
			change::TruncateSegment(last, mark->length, mark->segment_changes);
		}
		else
			work->first = NULL;
		work->changes = mark->changes;
		work->out.place = mark->place;
		work->spilled = mark->place.rows > 0;
		work->marks = mark->outer;
		pfree(mark);
	}
	/* What was too large is undone, and with it all that has been left out since. */
	if (work->too_large && work->too_large_level >= level)
	{
		work->too_large = false;
		MMREPL_CRASH_POINT("give-up-cut-undone");
	}
	if (work->refused_level >= level)
		work->refused_level = 0;
	/* With the locks of what is undone nobody keeps resync() away any more. */
	work->ask_again |= work->given_up && !work->too_large;
	if (work->sync && work->sync_level >= level)
		TurnAsync(work);
	work->unsent = work->sync ? CountUnsent(work) : 0;
}

/* The subtransaction of this level ended well: its part is its parent's now. */
void
MergeInto(Work *work, int level)
{
	Mark *mark = work->marks;

	work->sync_level = Min(work->sync_level, level - 1);
	work->too_large_level = Min(work->too_large_level, level - 1);
	work->refused_level = Min(work->refused_level, level - 1);
	if (mark == NULL || mark->level != level)
		return;
	if (level - 1 > 1 && (mark->outer == NULL || mark->outer->level < level - 1))
	{
		mark->level = level - 1;
		return;
	}
	work->marks = mark->outer;
	pfree(mark);
}

/* ---- spill ---- */

/* The first segment that the running (sub)transaction owns alone. */
static change::Segment *
FirstOwned(Work *work)
{
	if (work->marks == NULL)
		return work->first;
	return work->marks->segment != NULL ? work->marks->segment->next : work->first;
}

/* Unlink and free the segments from `from` up to, not including, the last one. */
static void
DropSpilled(Work *work, change::Segment *from)
{
	change::Segment **link = &work->first;
	change::Segment *before = NULL;

	for (; *link != from; link = &before->next)
		before = *link;
	if (work->sent_to != work->last)
		StepBack(&work->sent_to, before);
	if (work->packed != work->last)
		StepBack(&work->packed, before);
	while (*link != work->last)
	{
		change::Segment *gone = *link;

		*link = gone->next;
		FreeSegment(gone);
	}
}

/*
 * Write the finished segments of the running (sub)transaction to the queue table.  Only
 * behind SegmentFor(), which has marked where they begin.
 */
static void
SpillWork(Work *work)
{
	change::Segment *from = FirstOwned(work);

	if (from == NULL || from == work->last)
		return;
	if (!work->sync && !work->out.copy &&
		queue::ExceedsLimit(work->route.stream, work->out.place.bytes))
	{
		work->given_up = work->too_large = true;
		work->too_large_level = GetCurrentTransactionNestLevel();
		MMREPL_FAULT_POINT("give-up-cut-off");
		return;
	}
	MMREPL_FAULT_POINT("spill-begin");
	queue::Spill(&work->out, from, work->last);
	work->spilled = true;
	DropSpilled(work, from);
	MMREPL_FAULT_POINT("spill-end");
}

/* ---- accounting ---- */

static bool
OverBudget()
{
	return current.held > (Size) guc::buffer_memory * 1024;
}

void
Appended(Work *work, change::Segment *segment)
{
	work->changes++;
	if (work->sync)
	{
		work->unsent++;
		current.pending_sync = true;
	}
	bool full = !change::HasRoom(segment);

	/* Once in each segment: what others own may keep us beyond the budget. */
	if (full)
		Hold(segment);
	if (!(full || segment->changes == 1) || !OverBudget())
		return;
	FlushWork(work, true);
	if (OverBudget())
		SpillWork(work);
}

void
WakeLauncherAtCommit()
{
	(void) shmem::DatabaseOf(MyDatabaseId); /* so that the commit callback need not look for it */
	current.wake_launcher = true;
}

void
WakeWorkersAtCommit()
{
	current.wake_workers = true;
}

void
WakeStreamAtEnd(int stream_slot)
{
	current.wake_streams |= UINT64CONST(1) << stream_slot;
}

void
RetryAtCommit(int stream_slot, bool recover)
{
	current.retry_streams |= UINT64CONST(1) << stream_slot;
	current.recover_streams |= recover ? UINT64CONST(1) << stream_slot : 0;
}

} // namespace mmrepl::transaction
