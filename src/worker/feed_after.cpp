/*
 * feed_after.cpp
 *		What follows a delivery: positions, counters, late heads, markers.
 */
#include "feed_internal.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::worker
{

#ifdef MMREPL_FAULT_POINTS
constexpr uint64 kSweepEvery = 2; /* often enough for a test */
#else
constexpr uint64 kSweepEvery = 1000; /* inline transactions */
#endif

/*
 * What a crash of the peer costs at the most: this much is sent again.  The queue
 * keeps, and shows, it as long.  A flush is in the way of what comes behind it, so that
 * it is left to a pause of the stream, if there is one.  Of sync transactions we only
 * hear when we look.
 */
constexpr int64 kSealAfter = INT64CONST(200) * 1000;
constexpr int64 kPause = INT64CONST(10) * 1000;
constexpr int64 kPassedPause = INT64CONST(50) * 1000;
constexpr int64 kSealSoonAfter =
	INT64CONST(20) * 1000; /* while somebody waits, and more is to be sent */

/* ---- commits that are not flushed ---- */

/* Whether something is unsealed, and no seal is on its way. */
static bool
WantsSeal(const Feed *feed)
{
	return feed->unsealed.since != 0 && !feed->unsealed.sealing;
}

/* Whether something was unsealed so many microseconds ago, and no seal is on its way. */
static bool
UnsealedFor(const Feed *feed, int64 time)
{
	TimestampTz now = GetCurrentTimestamp();

	/* Later than that it is only when the clock was set back. */
	return WantsSeal(feed) && (now >= feed->unsealed.since + time || now < feed->unsealed.since);
}

TimestampTz
SealDueAt(const Feed *feed)
{
	const Unsealed &unsealed = feed->unsealed;

	return WantsSeal(feed) ? Min(unsealed.since + kSealAfter, unsealed.pause_ends) : 0;
}

static void
NoteUnsealed(Feed *feed, uint64 to, int64 pause)
{
	TimestampTz now = GetCurrentTimestamp();

	feed->unsealed.pause_ends = now + pause;
	if (feed->unsealed.since == 0)
		feed->unsealed.since = now;
	feed->unsealed.to = Max(feed->unsealed.to, to);
}

void
NoteUnsealed(Feed *feed, uint64 to)
{
	NoteUnsealed(feed, to, kPause);
}

/* It moves no watermark of the peer, which says nothing of it. */
void
NotePassedUnsealed(Feed *feed, uint64 ticket)
{
	NoteUnsealed(feed, 0, kPassedPause);
	feed->passed_unsealed = ticket;
}

/* Late heads are removed when the peer has their rows for good; large ones take long anyway. */
void
Relax(Feed *feed, Shipment *shipment, bool full)
{
	bool hurry = shipment->hurry || queue::SomebodyWaits(*feed->shared);

	if (!feed->relaxed_there || shipment->large || shipment->late != NIL ||
		shipment->transactions == 0 || (hurry && !full) ||
		UnsealedFor(feed, hurry ? kSealSoonAfter : kSealAfter))
		return;
	shipment->relaxed = true;
	feed->relaxed_sent++;
	delivery::SetRelaxed(&shipment->batch);
}

/* A batch without transactions, over what was passed. */
static void
MakeEmpty(Feed *feed, Shipment *shipment)
{
	shipment->previous = feed->watermark;
	InContext(shipment->context, [&] { BeginBatch(feed, shipment, 0); });
	CloseBatch(feed, shipment);
	feed->watermark = feed->position;
}

bool
SealShipment(Feed *feed, Shipment *shipment, bool more)
{
	int64 time = !queue::SomebodyWaits(*feed->shared) ? kSealAfter : more ? kSealSoonAfter : 0;

	return UnsealedFor(feed, time) && SealNow(feed, shipment);
}

bool
SealInPause(Feed *feed, Shipment *shipment)
{
	TimestampTz now = GetCurrentTimestamp();
	bool due = queue::SomebodyWaits(*feed->shared) || now >= SealDueAt(feed) ||
			   now < feed->unsealed.since; /* only when the clock was set back */

	return due && WantsSeal(feed) && SealNow(feed, shipment);
}

bool
SealNow(Feed *feed, Shipment *shipment)
{
	if (feed->unsealed.since == 0 && feed->relaxed_sent == 0)
		return false;
	feed->unsealed.first = false;
	MakeEmpty(feed, shipment);
	MMREPL_FAULT_POINT("seal-built");
	return true;
}

/* ---- after delivery ---- */

static void
RemoveLate(Feed *feed, Shipment *shipment)
{
	ListCell *cell;

	if (shipment->late == NIL)
		return;
	InTransaction([&] {
		foreach(cell, shipment->late)
			(void) queue::RemoveHead(*(const queue::Ref *) lfirst(cell));
		ForceSyncCommit(); /* or a crash brings them back, when their markers may be swept */
		MMREPL_FAULT_POINT("late-removing");
	});
	MMREPL_FAULT_POINT("late-removed");
	feed->late_unremoved -= list_length(shipment->late);
}

static void
NoteLag(shmem::Stream &stream, uint64 ticket)
{
	TimestampTz now = GetCurrentTimestamp();

	SpinLockAcquire(&stream.mutex);
	stream.last_apply_at = now;
	stream.last_lag_us = ticket == 0 ? stream.last_lag_us : now - shmem::TicketTime(ticket);
	SpinLockRelease(&stream.mutex);
}

/* The oldest transaction that waits now: the next one, as far as it is known. */
static void
NoteOldest(Feed *feed)
{
	shmem::Stream &stream = *feed->shared;
	const queue::RingEntry *entry = NULL;
	uint64 next = 0;

	if (feed->refs != NULL && feed->next_ref < feed->n_refs)
		next = feed->refs[feed->next_ref].ticket;
	else if (!feed->tables_only && (entry = queue::PeekRing(stream, feed->slot)) != NULL)
		next = entry->ticket;
	pg_atomic_write_u64(&stream.oldest_ticket, next);
}

void
Applied(Feed *feed, Shipment *shipment)
{
	shmem::Stream &stream = *feed->shared;
	shmem::Counters &counters = stream.counters;

	Unsealed *unsealed = &feed->unsealed;

	RemoveLate(feed, shipment);
	unsealed->transactions += shipment->transactions;
	unsealed->changes += shipment->changes;
	unsealed->bytes += shipment->bytes;
	/* Before it is confirmed: who has waited for that finds it counted. */
	pg_atomic_fetch_add_u64(&counters.transactions_applied, shipment->transactions);
	pg_atomic_fetch_add_u64(&counters.changes_applied, shipment->changes);
	pg_atomic_fetch_add_u64(&counters.batches, 1);
	NoteLag(stream, shipment->last_ticket);
	if (shipment->relaxed)
	{
		feed->relaxed_sent--;
		NoteUnsealed(feed, shipment->confirm_to);
		queue::NoteApplied(stream, shipment->confirm_to);
		MMREPL_FAULT_POINT("worker-unsealed");
		return;
	}
	queue::Discount(stream, unsealed->transactions, unsealed->changes, unsealed->bytes);
	NoteOldest(feed);
	*unsealed = {};
	if (feed->passed_unsealed > shipment->confirm_to) /* since this batch was filled */
		NotePassedUnsealed(feed, feed->passed_unsealed);
	MMREPL_CRASH_POINT("worker-confirming");
	queue::Confirm(stream, shipment->confirm_to);
	MMREPL_FAULT_POINT("worker-confirmed");
	queue::Acknowledged(stream, shipment->confirm_to);
	queue::ConfirmLate(stream, shipment->late_to);
}

/* ---- markers ---- */

/*
 * Markers of transactions with a lower xid than any running one are of no use
 * once everything these transactions queued is confirmed and the peer's
 * watermark has passed it: they cannot be replayed any more.
 */
static void
ChooseSweep(Feed *feed)
{
	TransactionId oldest = GetOldestActiveTransactionId(); /* first: `next` must not be older */

	MMREPL_FAULT_POINT("sweep-choosing");
	FullTransactionId next = ReadNextFullTransactionId();
	uint32 epoch = EpochFromFullTransactionId(next);

	if (oldest > XidFromFullTransactionId(next))
		epoch--;
	feed->sweep_xid = U64FromFullTransactionId(FullTransactionIdFromEpochAndXid(epoch, oldest));
	feed->sweep_after = queue::LastTicket(*feed->shared);
	feed->inline_passed = 0;
	MMREPL_FAULT_POINT("sweep-chosen");
}

bool
SweepShipment(Feed *feed, Shipment *shipment)
{
	if (feed->sweep_xid == 0 && feed->inline_passed >= kSweepEvery)
		ChooseSweep(feed);
	if (feed->sweep_xid == 0 || LateWork(feed) || feed->late_unremoved > 0 ||
		pg_atomic_read_u64(&feed->shared->confirmed) < feed->sweep_after)
		return false;
	shipment->sweep_xid = feed->sweep_xid;
	feed->sweep_xid = 0;
	MakeEmpty(feed, shipment);
	MMREPL_FAULT_POINT("sweep-built");
	return true;
}

} // namespace mmrepl::worker
