/*
 * feed.cpp
 *		From the queue to batches, in ticket order, each transaction once.
 *
 * From the ring: entries are taken while they are settled; the gap is looked at
 * after each entry, and the late events after the whole batch, because both are
 * written before an entry that depends on them can be settled.
 * From the tables: first the lowest ticket in flight is read, then the snapshot
 * is taken, then everything visible below that ticket is sent in ticket order.
 */
#include "feed_internal.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::worker
{

#ifdef MMREPL_FAULT_POINTS
constexpr int kRefsAtATime = 20; /* so that a test needs many readings */
#else
constexpr int kRefsAtATime = 200000;
#endif

/* ---- shipments ---- */

void
StartShipment(Shipment *shipment, MemoryContext parent)
{
	*shipment = {};
	shipment->context = AllocSetContextCreate(parent, "mmrepl shipment", ALLOCSET_DEFAULT_SIZES);
}

void
EndShipment(Shipment *shipment)
{
	if (shipment->context != NULL)
		MemoryContextDelete(shipment->context);
	*shipment = {};
}

void
BeginBatch(Feed *feed, Shipment *shipment, uint8 flags)
{
	delivery::Header header = {};

	header.flags = flags;
	header.node = feed->node;
	header.stream = feed->stream;
	header.clock = shmem::ClockNow();
	header.previous = shipment->previous;
	header.sweep_xid = shipment->sweep_xid;
	header.part = shipment->part;
	delivery::Begin(&shipment->batch, header);
}

/* SegmentSink: append to the batch. */
static void
AddSegment(void *arg, const char *data, uint32 length)
{
	delivery::AddSegment((delivery::Batch *) arg, data, length);
}

static uint8
TransactionFlags(uint16 queue_flags)
{
	uint8 flags = 0;

	if (queue_flags & queue::kInlined)
		flags |= batch::kMarked;
	if (queue_flags & queue::kPrepared)
		flags |= batch::kMarked | batch::kLate;
	return flags;
}

void
Count(Feed *feed, Shipment *shipment, uint64 ticket, uint16 flags, uint32 changes, uint64 bytes)
{
	if (shipment->transactions++ == 0)
		shipment->first_ticket = ticket;
	shipment->changes += changes;
	shipment->bytes += bytes;
	shipment->last_ticket = ticket;
	if (flags & queue::kInlined)
		feed->inline_passed++;
}

/* A transaction as its head row or ring entry describes it. */
struct Waiting
{
	uint64 ticket;
	uint64 xid;
	uint16 flags;
	uint32 changes;
};

static void
OpenChunks(Feed *feed, Shipment *shipment, const queue::Place &place, uint64 xid)
{
	InTransaction([&] {
		InContext(shipment->context,
				  [&] { queue::OpenCursor(&shipment->cursor, place, feed->stream, xid); });
	});
}

/* Add a transaction's chunks to the batch. */
static void
AddChunks(Shipment *shipment)
{
	InTransaction([&] {
		(void) queue::ReadSome(&shipment->cursor, PG_UINT64_MAX, AddSegment, &shipment->batch);
	});
	pfree(shipment->cursor.chunks);
	shipment->cursor = {};
}

/*
 * A chunked transaction: one that exceeds a batch travels alone, in parts.
 * False: it has to wait for the next batch.
 */
static bool
TakeChunked(Feed *feed, Shipment *shipment, const queue::Place &place, const Waiting &waiting,
			const Budget &budget)
{
	bool large = place.bytes > (uint64) budget.bytes;

	/* It may take long, and nothing that was applied before shall wait for that. */
	feed->unsealed.first |=
		large && !feed->unsealed.sealing && (feed->unsealed.since != 0 || feed->relaxed_sent > 0);
	if (large && feed->unsealed.first)
		return false;
	if (shipment->transactions > 0 &&
		(large || shipment->batch.buf.len + place.bytes > (uint64) budget.bytes))
		return false;
	OpenChunks(feed, shipment, place, waiting.xid);
	if (large)
	{
		MMREPL_FAULT_POINT("feed-large-begun");
		shipment->large = true;
		shipment->large_xid = waiting.xid;
		shipment->large_flags = TransactionFlags(waiting.flags);
		shipment->large_changes = waiting.changes;
		return true;
	}
	delivery::AddTransaction(&shipment->batch, waiting.ticket, waiting.xid,
							 TransactionFlags(waiting.flags), waiting.changes);
	AddChunks(shipment);
	return true;
}

void
NextPart(Feed *feed, Shipment *shipment, int64 bytes)
{
	bool first = shipment->part == 0;
	bool more = false;

	InContext(shipment->context, [&] {
		if (!first)
			pfree(shipment->batch.buf.data);
		BeginBatch(feed, shipment, (first ? batch::kFirst : 0) | batch::kMore);
		delivery::AddTransaction(&shipment->batch, shipment->last_ticket, shipment->large_xid,
								 shipment->large_flags, first ? shipment->large_changes : 0);
		InTransaction([&] {
			more = queue::ReadSome(&shipment->cursor, bytes, AddSegment, &shipment->batch);
		});
		if (!more)
			delivery::ClearMore(&shipment->batch);
		delivery::Finish(&shipment->batch, shipment->confirm_to);
	});
	shipment->part++;
	shipment->all_sent = !more;
}

void
CloseBatch(Feed *feed, Shipment *shipment)
{
	shipment->confirm_to = feed->position;
	shipment->late_to = feed->late_reached;
	if (!shipment->large)
	{
		InContext(shipment->context, [&] { delivery::Finish(&shipment->batch, feed->position); });
		shipment->all_sent = true;
	}
}

static bool
Full(const Shipment *shipment, const Budget &budget)
{
	return shipment->large || shipment->transactions >= budget.transactions ||
		   shipment->changes >= budget.changes || shipment->batch.buf.len >= budget.bytes;
}

/* ---- from the ring ---- */

bool
GapAhead(const Feed *feed)
{
	return Max(pg_atomic_read_u64(&feed->shared->ring_gap),
			   pg_atomic_read_u64(&feed->shared->ring_taken)) > feed->position;
}

void
AddEntry(Shipment *shipment, const queue::RingEntry *entry)
{
	delivery::AddTransaction(&shipment->batch, entry->ticket, entry->xid,
							 TransactionFlags(entry->flags), entry->changes);
	queue::WalkPayload(queue::EntryPayload(entry), entry->payload_length, AddSegment,
					   &shipment->batch);
}

/* Put one committed entry into the shipment; false: it has to wait for the next. */
static bool
TakeEntry(Feed *feed, Shipment *shipment, const queue::RingEntry *entry, const Budget &budget)
{
	uint64 bytes = entry->payload_length;

	if (entry->flags & queue::kTombstone)
	{
		if (shipment->transactions > 0)
			return false;
		RefuseGivenUp();
	}
	if (entry->flags & queue::kChunked)
	{
		queue::Place place = queue::ReadPlace(queue::EntryPayload(entry), entry->payload_length);
		Waiting waiting = {entry->ticket, entry->xid, entry->flags, entry->changes};

		if (!TakeChunked(feed, shipment, place, waiting, budget))
			return false;
		bytes = place.bytes;
	}
	else
		AddEntry(shipment, entry);
	Count(feed, shipment, entry->ticket, entry->flags, entry->changes, bytes);
	return true;
}

/*
 * What a session applied and the peer may not have flushed is there if it was applied
 * after our connection was made, which has seen no crash of the peer.  If not, nobody
 * knows.
 */
static bool
MustDeliver(const Feed *feed, const queue::RingEntry *entry, queue::EntryState state)
{
	return state == queue::EntryState::Committed ||
		   (state == queue::EntryState::Applied && entry->ticket <= feed->opened_at);
}

/* An entry that the peer has. */
static void
PassInline(Feed *feed, uint64 ticket, queue::EntryState state)
{
	feed->inline_passed++;
	feed->passed_at = GetCurrentTimestamp();
	if (state == queue::EntryState::Applied)
		NotePassedUnsealed(feed, ticket);
}

/* Take settled entries in order until the budget is spent or something has to be awaited. */
static void
FillFromRing(Feed *feed, Shipment *shipment, const Budget &budget)
{
	const queue::RingEntry *entry;

	while (!Full(shipment, budget) && (entry = queue::PeekRing(*feed->shared, feed->slot)) != NULL)
	{
		if (GapAhead(feed))
		{
			feed->from_tables = true;
			return;
		}
		queue::EntryState state = queue::StateOf(entry);

		if (entry->ticket > feed->position)
		{
			if (state == queue::EntryState::Pending || state == queue::EntryState::Committing)
				return;
			if (MustDeliver(feed, entry, state))
			{
				if (!TakeEntry(feed, shipment, entry, budget))
					return;
			}
			else if (state != queue::EntryState::Aborted)
				PassInline(feed, entry->ticket, state);
			feed->position = entry->ticket;
		}
		queue::ConsumeRing(*feed->shared, entry);
	}
	if (GapAhead(feed))
		feed->from_tables = true;
}

bool
LateWork(const Feed *feed)
{
	shmem::LateWord late = queue::ReadLate(*feed->database);

	return feed->late_open || late.UnderWay() || late.Ended() != feed->late_seen;
}

/* ---- from the tables ---- */

/* Entries that the tables have covered need not stay in the ring. */
static void
TrimRing(Feed *feed)
{
	const queue::RingEntry *entry;

	while ((entry = queue::PeekRing(*feed->shared, feed->slot)) != NULL &&
		   entry->ticket <= feed->position)
		queue::ConsumeRing(*feed->shared, entry);
}

/* All of the tables: what comes first, and where the rest stands. */
static queue::Collected
SurveyTables(Feed *feed)
{
	feed->late_seen = queue::ReadLate(*feed->database).Ended();
	feed->refs_below = queue::ResolvedBelow(*feed->shared, feed->slot);
	MMREPL_FAULT_POINT("feed-lowest-read");
	feed->survey.context = feed->survey_context;
	queue::Collected waiting =
		queue::Collect(feed->stream, feed->position, feed->refs_below, kRefsAtATime, &feed->survey);

	feed->surveyed = true;
	feed->late_open = waiting.late_beyond;
	return waiting;
}

static void
ReadTables(Feed *feed)
{
	bool given_up = false;

	feed->from_tables = true; /* until all that is found now has been sent */
	InTransaction([&] {
		InContext(feed->context, [&] {
			queue::Collected waiting =
				feed->surveyed
					? queue::CollectMore(&feed->survey, feed->stream, feed->position, kRefsAtATime)
					: SurveyTables(feed);

			feed->refs = waiting.refs;
			feed->n_refs = waiting.count;
			feed->refs_complete = waiting.complete;
			given_up = waiting.given_up;
		});
	});
	feed->next_ref = 0;
	if (given_up)
	{
		DropRefs(feed);
		DropSurvey(feed);
		RefuseGivenUp();
	}
	if (feed->refs_complete)
		DropSurvey(feed);
}

static void
NoteLate(Feed *feed, Shipment *shipment, const queue::Ref &ref)
{
	if (!(ref.flags & queue::kPrepared))
		return;
	InContext(shipment->context, [&] {
		queue::Ref *copy = (queue::Ref *) palloc(sizeof(queue::Ref));

		*copy = ref;
		shipment->late = lappend(shipment->late, copy);
	});
	feed->late_unremoved++;
}

/* Put one waiting transaction into the shipment; false: it has to wait for the next. */
static bool
TakeRef(Feed *feed, Shipment *shipment, const queue::Ref &ref, const Budget &budget)
{
	if (ref.flags & queue::kTombstone)
	{
		if (shipment->transactions > 0)
			return false;
		RefuseGivenUp();
	}
	if (ref.flags & queue::kChunked)
	{
		Waiting waiting = {ref.ticket, ref.xid, ref.flags, ref.changes};

		if (!TakeChunked(feed, shipment, queue::PlaceOf(ref), waiting, budget))
			return false;
	}
	else
	{
		delivery::AddTransaction(&shipment->batch, ref.ticket, ref.xid, TransactionFlags(ref.flags),
								 ref.changes);
		queue::ReadSegments(ref, feed->stream, AddSegment, &shipment->batch);
	}
	NoteLate(feed, shipment, ref);
	Count(feed, shipment, ref.ticket, ref.flags, ref.changes, ref.bytes);
	return true;
}

static void
FillFromRefs(Feed *feed, Shipment *shipment, const Budget &budget)
{
	while (feed->next_ref < feed->n_refs && !Full(shipment, budget))
	{
		const queue::Ref &ref = feed->refs[feed->next_ref];

		if (!TakeRef(feed, shipment, ref, budget))
			return;
		feed->next_ref++;
		feed->position = Max(feed->position, ref.ticket);
	}
}

/* All that was read is in batches: go on from the next in flight, maybe with the ring. */
static void
EndOfRefs(Feed *feed)
{
	if (feed->refs_complete)
		feed->position = Max(feed->position, feed->refs_below - 1);
	if (feed->refs_complete && !feed->late_open)
		feed->late_reached = feed->late_seen;
	DropRefs(feed);
	TrimRing(feed);
	feed->from_tables =
		feed->tables_only || !feed->refs_complete || GapAhead(feed) || LateWork(feed);
}

/* Returns whether another reading may find more at once. */
static bool
FillFromTables(Feed *feed, Shipment *shipment, const Budget &budget)
{
	/* A late head on its way would be found again: its removal comes with the answer. */
	if (feed->refs == NULL && feed->late_unremoved > 0)
		return false;
	if (feed->refs == NULL)
		ReadTables(feed);
	bool found = feed->n_refs > 0;

	InTransaction([&] { FillFromRefs(feed, shipment, budget); });
	if (feed->next_ref == feed->n_refs)
		EndOfRefs(feed);
	return found || !feed->from_tables;
}

/* ---- both ---- */

/* What was put into the shipment from the ring is taken back; the tables have it. */
static void
Rewind(Feed *feed, Shipment *shipment)
{
	MemoryContext parent = MemoryContextGetParent(shipment->context);

	feed->late_unremoved -= list_length(shipment->late);
	EndShipment(shipment);
	StartShipment(shipment, parent);
	feed->from_tables = true;
}

bool
PausedNow(const Feed *feed)
{
	pg_read_barrier();
	return !feed->tables_only && feed->shared->paused;
}

/* One attempt to fill; true when it is worth another look. */
static bool
Fill(Feed *feed, Shipment *shipment, const Budget &budget)
{
	uint64 start = feed->position;
	uint32 late_start = feed->late_reached;
	bool tables = feed->from_tables || LateWork(feed);
	bool again = false;

	shipment->previous = feed->watermark;
	InContext(shipment->context, [&] {
		BeginBatch(feed, shipment, 0);
		if (tables)
			again = FillFromTables(feed, shipment, budget);
		else
			FillFromRing(feed, shipment, budget);
	});
	if (feed->passed_unsealed > start)
		MMREPL_FAULT_POINT("feed-passed");
	if (PausedNow(feed) || (!tables && LateWork(feed)))
	{
		ReadAgain(feed, start);
		Rewind(feed, shipment);
		feed->late_reached = late_start;
		return false;
	}
	return again || (!tables && feed->from_tables);
}

bool
NextShipment(Feed *feed, Shipment *shipment, const Budget &budget)
{
	bool again = true;

	while (again && shipment->transactions == 0 && !feed->unsealed.first)
	{
		if (shipment->batch.buf.data != NULL)
			pfree(shipment->batch.buf.data);
		again = Fill(feed, shipment, budget);
	}
	if (shipment->transactions == 0)
		return false;
	CloseBatch(feed, shipment);
	if (!shipment->large)
		feed->watermark = feed->position;
	else
	{
		NextPart(feed, shipment, budget.bytes);
		feed->watermark = shipment->confirm_to;
	}
	return true;
}

/*
 * Nothing waits: the backlog counters should say so, but a worker that died
 * between the peer's commit and its own book-keeping left something behind.  A
 * commit that comes meanwhile has drawn a ticket, or changes what was read.
 */
static void
ReconcileBacklog(Feed *feed)
{
	shmem::Stream &stream = *feed->shared;
	pg_atomic_uint64 *counters[] = {&stream.queued_transactions, &stream.queued_changes,
									&stream.queued_bytes, &stream.oldest_ticket};
	uint64 seen[lengthof(counters)];

	for (size_t i = 0; i < lengthof(counters); i++)
		seen[i] = pg_atomic_read_u64(counters[i]);
	if (queue::LastTicket(stream) > feed->position)
		return;
	for (size_t i = 0; i < lengthof(counters); i++)
		if (seen[i] != 0)
			(void) pg_atomic_compare_exchange_u64(counters[i], &seen[i], 0);
}

/*
 * With the ring empty and no gap, everything below the lowest ticket in flight
 * has been passed (read in this order).
 */
void
ConfirmPassed(Feed *feed)
{
	if (!feed->from_tables && queue::LastTicket(*feed->shared) > feed->position)
	{
		uint64 below = queue::ResolvedBelow(*feed->shared, feed->slot);

		if (queue::PeekRing(*feed->shared, feed->slot) == NULL && !GapAhead(feed) &&
			!LateWork(feed))
			feed->position = Max(feed->position, below - 1);
	}
	if (feed->unsealed.since == 0)
		queue::Confirm(*feed->shared, feed->position);
	queue::ConfirmLate(*feed->shared, feed->late_reached);
	if (!feed->from_tables && feed->unsealed.since == 0)
		ReconcileBacklog(feed);
}

} // namespace mmrepl::worker
