/*
 * transaction_resync.cpp
 *		Streams that need a resync: what the transaction has to do with them.
 */
#include "transaction_internal.hpp"

#include "mmrepl/catalog.hpp"
#include "mmrepl/fault.hpp"

namespace mmrepl::transaction
{

void
RefuseSync(Work *work, const Route &route)
{
	if (!route.sync || work->degraded)
		return;
	if (!route.queue_when_unreachable)
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_NEEDS_RESYNC),
				 errmsg("cannot replicate synchronously to server \"%s\": it needs a resync",
						route.server_name),
				 errdetail("Too much was waiting for it."),
				 errhint("SELECT mmrepl.resync(%s);", quote_literal_cstr(route.server_name))));
	work->degraded = true;
	MMREPL_FAULT_POINT("give-up-sync-degraded");
	ereport(NOTICE, (errmsg("server \"%s\" needs a resync: the transaction's changes for it are "
							"not queued",
							route.server_name)));
}

const Resync *
CopyOf(int32 stream)
{
	const Resync *resync = current.resyncs;

	while (resync != NULL && !(resync->copying && resync->stream == stream))
		resync = resync->next;
	return resync;
}

void
FollowResyncAtCommit(int32 stream, int slot, bool copying)
{
	for (Work *work = current.works; work != NULL && copying; work = work->next)
	{
		if (work->route.stream != stream)
			continue;
		if (work->changes > 0 || work->inlined != NULL)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("cannot resync in a transaction that has changed replicated tables"),
					 errhint("Call mmrepl.resync() in a transaction of its own.")));
		work->out.copy = true; /* all that it had captured is undone */
		work->given_up = work->ask_again = work->too_large = false;
		MMREPL_FAULT_POINT("resync-work-copies");
	}
	Resync *resync = (Resync *) MemoryContextAllocZero(TopTransactionContext, sizeof(Resync));

	resync->stream = stream;
	resync->copying = copying;
	resync->level = GetCurrentTransactionNestLevel();
	resync->next = current.resyncs;
	current.resyncs = resync;
	WakeStreamAtEnd(slot);
	if (copying)
		MMREPL_FAULT_POINT("resync-followed");
	else
		MMREPL_FAULT_POINT("give-up-followed");
}

void
MergeResyncs(int level)
{
	for (Resync *resync = current.resyncs; resync != NULL; resync = resync->next)
	{
		resync->level = Min(resync->level, level - 1);
		MMREPL_CRASH_POINT("resync-savepoint-merged");
	}
}

/*
 * Nothing here raises.  What the stream's row says is read again at the commit; what is
 * captured from here on is not the copy any more, and perhaps not to be captured.
 */
void
UndoResyncs(int level)
{
	for (Resync *resync = current.resyncs; resync != NULL; resync = resync->next)
		if (resync->level >= level)
		{
			resync->copying = false;
			MMREPL_CRASH_POINT("resync-savepoint-undone");
		}
	for (Work *work = current.works; work != NULL; work = work->next)
		if (work->out.copy && CopyOf(work->route.stream) == NULL)
		{
			work->out.copy = false;
			work->given_up = work->ask_again = true;
			MMREPL_CRASH_POINT("resync-work-undone");
		}
}

bool
GiveUpPart(Work *work, bool wait)
{
	catalog::StreamRow row = {};

	bool noted = queue::GiveUp(work->route.stream, work->route.server_name, wait) &&
				 catalog::ReadStreamRow(work->route.stream, &row);

	if (!noted && !wait)
		return false;
	row.needs_resync = false; /* shared memory is told when this commits, not before */
	int slot = noted ? queue::TakeSlot(row) : -1;

	if (slot >= 0)
		FollowResyncAtCommit(work->route.stream, slot, false);
	work->out.flags = queue::kHead | queue::kTombstone;
	work->out.changes = 0;
	work->out.place = {};
	InContext(current.context, [&] { initStringInfo(&work->out.payload); });
	MMREPL_FAULT_POINT("give-up-tombstone-made");
	return true;
}

/*
 * What the rows say now is what they say at commit: their locks are held, or taken
 * again when a savepoint has given them back.
 */
void
ReadResyncs(bool prepare)
{
	catalog::StreamRow row = {};

	if (current.resyncs != NULL && prepare)
		ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						errmsg("cannot PREPARE a transaction that has called mmrepl.resync()")));
	for (Resync *resync = current.resyncs; resync != NULL; resync = resync->next)
	{
		(void) catalog::LockStreamRow(resync->stream, true);
		resync->discarded = catalog::ReadStreamRow(resync->stream, &row) ? row.DiscardedUpTo() : 0;
		if (resync->discarded == shmem::kNeedsResync)
			MMREPL_FAULT_POINT("give-up-row-read");
		else
			MMREPL_FAULT_POINT("resync-row-read");
	}
}

/* Wherever the stream's slot is by now.  Nothing here raises. */
void
PublishResyncs()
{
	for (const Resync *resync = current.resyncs; resync != NULL; resync = resync->next)
	{
		if (resync->discarded == shmem::kNeedsResync)
			MMREPL_CRASH_POINT("give-up-visible");
		else
			MMREPL_CRASH_POINT("resync-visible");
		shmem::WithSlotOf(MyDatabaseId, resync->stream, [&](int slot) {
			queue::SetDiscarded(shmem::Get().streams[slot], resync->discarded);
			WakeStreamAtEnd(slot);
		});
		if (resync->discarded == shmem::kNeedsResync)
			MMREPL_CRASH_POINT("give-up-published");
		else
			MMREPL_CRASH_POINT("resync-published");
	}
}

} // namespace mmrepl::transaction
