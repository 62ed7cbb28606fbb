/*
 * ticket.cpp
 *		The ticket clock, in-flight tickets, and the ring.
 *
 * A ticket is a hybrid logical clock: max(wall clock, last + 1, highest applied
 * + 1), drawn as the last act before the head row is written.  Drawing it,
 * publishing it as in flight and reserving the ring entries are one step under
 * the clock spinlock, so that ring order is ticket order and no reader can see a
 * later ticket while an earlier one is unpublished.  It follows that a
 * transaction's ticket is greater than that of every transaction it depends on
 * (doc/design.md has the proof).
 */
#include "queue_internal.hpp"

namespace mmrepl::queue
{

/* ---- slots of streams ---- */

static uint64 seen_registrations = PG_UINT64_MAX;

static uint64
CurrentRegistrations()
{
	shmem::State &state = shmem::Get();

	SpinLockAcquire(&state.clock_mutex);
	uint64 registrations = state.registrations;
	SpinLockRelease(&state.clock_mutex);
	return registrations;
}

int
SlotOf(int32 stream)
{
	struct Known
	{
		int32 stream;
		int slot;
	};
	static Known known[8];
	static int n_known;
	uint64 registrations = CurrentRegistrations();

	if (registrations != seen_registrations)
	{
		n_known = 0;
		seen_registrations = registrations;
	}
	for (int i = 0; i < n_known; i++)
		if (known[i].stream == stream)
			return known[i].slot;

	int slot = shmem::FindStream(MyDatabaseId, stream);

	if (n_known == lengthof(known))
		n_known = 0;
	known[n_known++] = {stream, slot};
	return slot;
}

/* ---- ring, producer's side ---- */

/* Reserve an entry, or note the gap; the clock spinlock is held. */
static void
Reserve(shmem::Stream &stream, Outgoing *out, uint64 ticket, uint64 xid)
{
	uint64 bytes = shmem::RingBytes();
	uint64 size = MAXALIGN(sizeof(RingEntry) + out->payload.len);
	uint64 head = pg_atomic_read_u64(&stream.ring_head);
	uint64 tail = pg_atomic_read_u64(&stream.ring_tail);
	uint64 offset = head % bytes;
	uint64 filler = offset + size > bytes ? bytes - offset : 0;

	out->entry = 0;
	if (head + filler + size - tail > bytes)
	{
		pg_atomic_write_u64(&stream.ring_gap, ticket);
		return;
	}
	char *ring = shmem::RingOf(out->slot);

	if (filler >= sizeof(RingEntry))
	{
		RingEntry *entry = (RingEntry *) (ring + offset);

		entry->size = (uint32) filler;
		entry->filler = 1;
	}
	head += filler;
	RingEntry *entry = (RingEntry *) (ring + head % bytes);

	entry->ticket = ticket;
	entry->xid = xid;
	entry->size = (uint32) size;
	entry->payload_length = (uint32) out->payload.len;
	entry->changes = out->changes;
	entry->flags = out->flags;
	entry->filler = 0;
	pg_atomic_write_u32(&entry->state, (uint32) EntryState::Pending);
	pg_write_barrier();
	pg_atomic_write_u64(&stream.ring_head, head + size);
	out->entry = head + 1;
}

static RingEntry *
EntryOf(const Outgoing *out)
{
	return (RingEntry *) (shmem::RingOf(out->slot) + (out->entry - 1) % shmem::RingBytes());
}

void
FillEntry(const Outgoing *out)
{
	if (out->entry != 0)
		memcpy(EntryOf(out) + 1, out->payload.data, out->payload.len);
}

/* ---- drawing ---- */

/* The bit mask of the parts' streams; *everyone: one of them has no slot. */
static uint64
MaskOf(Outgoing **parts, int n_parts, bool *everyone)
{
	uint64 mask = 0;

	*everyone = false;
	for (int i = 0; i < n_parts; i++)
	{
		parts[i]->slot = SlotOf(parts[i]->stream);
		if (parts[i]->slot < 0)
			*everyone = true;
		else
			mask |= UINT64CONST(1) << parts[i]->slot;
	}
	return mask;
}

/* One try; 0 when a stream's slot changed meanwhile. */
static uint64
TryDraw(Outgoing **parts, int n_parts, uint64 xid, bool use_ring)
{
	shmem::State &state = shmem::Get();
	shmem::InFlight &mine = shmem::MySlot();
	uint64 now = shmem::ClockNow();
	bool everyone;
	uint64 mask = MaskOf(parts, n_parts, &everyone);

	SpinLockAcquire(&state.clock_mutex);
	if (state.registrations != seen_registrations)
	{
		SpinLockRelease(&state.clock_mutex);
		return 0;
	}
	uint64 applied = pg_atomic_read_u64(&state.applied_ticket);
	uint64 ticket = Max(now, Max(state.last_ticket, applied) + 1);

	state.last_ticket = ticket;
	pg_atomic_write_u64(&mine.streams, mask);
	pg_atomic_write_u32(&mine.everyone, everyone ? 1 : 0);
	pg_atomic_write_u64(&mine.ticket, ticket);
	for (int i = 0; i < n_parts; i++)
	{
		Outgoing *out = parts[i];

		out->entry = 0;
		if (out->slot < 0)
			continue;
		shmem::Stream &stream = state.streams[out->slot];

		stream.last_ticket = ticket;
		if (use_ring)
			Reserve(stream, out, ticket, xid);
	}
	SpinLockRelease(&state.clock_mutex);
	return ticket;
}

uint64
DrawTicket(Outgoing **parts, int n_parts, bool use_ring)
{
	uint64 xid = U64FromFullTransactionId(GetTopFullTransactionId());
	uint64 ticket;

	do
	{
		ticket = TryDraw(parts, n_parts, xid, use_ring);
	} while (ticket == 0);
	return ticket;
}

/* ---- settling ---- */

static void
AtomicMax(pg_atomic_uint64 *where, uint64 value)
{
	uint64 seen = pg_atomic_read_u64(where);

	while (seen < value && !pg_atomic_compare_exchange_u64(where, &seen, value))
		;
}

/* Committed work that the worker has to deliver: count it as waiting. */
static void
CountQueued(shmem::Stream &stream, const Outgoing *out, uint64 ticket)
{
	uint64 none = 0;

	pg_atomic_fetch_add_u64(&stream.queued_transactions, 1);
	pg_atomic_fetch_add_u64(&stream.queued_changes, out->changes);
	pg_atomic_fetch_add_u64(&stream.queued_bytes, out->counted_bytes);
	pg_atomic_compare_exchange_u64(&stream.oldest_ticket, &none, ticket);
}

void
Settle(Outgoing *out, uint64 ticket, Fate fate)
{
	if (fate == Fate::Committed || fate == Fate::Delivered)
		AtomicMax(&shmem::Get().commit_lsn, XactLastCommitEnd);
	if (out->slot < 0)
		return;
	shmem::Stream &stream = shmem::Get().streams[out->slot];
	EntryState state = fate == Fate::Committed	 ? EntryState::Committed
					   : fate == Fate::Delivered ? EntryState::Delivered
												 : EntryState::Aborted;

	if (fate == Fate::Committed)
		CountQueued(stream, out, ticket);
	if (out->entry != 0)
	{
		pg_write_barrier();
		pg_atomic_write_u32(&EntryOf(out)->state, (uint32) state);
	}
}

void
SettleTicket(Outgoing **parts, int n_parts)
{
	shmem::State &state = shmem::Get();

	pg_memory_barrier();
	pg_atomic_write_u64(&shmem::MySlot().ticket, 0);
	for (int i = 0; i < n_parts; i++)
	{
		if (parts[i]->slot >= 0)
			shmem::WakeWorker(state.streams[parts[i]->slot]);
		else
		{
			shmem::RequestScout();
			shmem::NudgeWorkersOf(MyDatabaseId); /* one may have come meanwhile */
		}
	}
}

uint64
ResolvedBelow(const shmem::Stream &, int slot)
{
	shmem::State &state = shmem::Get();
	uint64 bit = UINT64CONST(1) << slot;

	SpinLockAcquire(&state.clock_mutex);
	uint64 low = state.last_ticket + 1;

	for (int i = 0; i < state.n_slots; i++)
	{
		shmem::InFlight &each = shmem::SlotOf(i);
		uint64 ticket = pg_atomic_read_u64(&each.ticket);

		if (ticket != 0 && ticket < low &&
			((pg_atomic_read_u64(&each.streams) & bit) || pg_atomic_read_u32(&each.everyone)))
			low = ticket;
	}
	SpinLockRelease(&state.clock_mutex);
	pg_memory_barrier();
	return low;
}

void
RaiseClock(uint64 ticket)
{
	shmem::State &state = shmem::Get();

	SpinLockAcquire(&state.clock_mutex);
	state.last_ticket = Max(state.last_ticket, ticket);
	SpinLockRelease(&state.clock_mutex);
}

uint64
LastDrawn()
{
	shmem::State &state = shmem::Get();

	SpinLockAcquire(&state.clock_mutex);
	uint64 last = state.last_ticket;
	SpinLockRelease(&state.clock_mutex);
	return last;
}

uint64
LastTicket(const shmem::Stream &stream)
{
	shmem::State &state = shmem::Get();

	SpinLockAcquire(&state.clock_mutex);
	uint64 last = stream.last_ticket;
	SpinLockRelease(&state.clock_mutex);
	return last;
}

/* ---- ring, consumer's side ---- */

const RingEntry *
PeekRing(shmem::Stream &stream, int slot)
{
	uint64 bytes = shmem::RingBytes();

	for (;;)
	{
		uint64 tail = pg_atomic_read_u64(&stream.ring_tail);
		uint64 head = pg_atomic_read_u64(&stream.ring_head);

		if (tail == head)
			return NULL;
		pg_read_barrier();
		uint64 offset = tail % bytes;
		const RingEntry *entry = (const RingEntry *) (shmem::RingOf(slot) + offset);

		if (bytes - offset >= sizeof(RingEntry) && !entry->filler)
			return entry;
		pg_atomic_write_u64(&stream.ring_tail, tail + bytes - offset);
	}
}

const char *
EntryPayload(const RingEntry *entry)
{
	return (const char *) (entry + 1);
}

EntryState
StateOf(const RingEntry *entry)
{
	EntryState state =
		(EntryState) pg_atomic_read_u32(const_cast<pg_atomic_uint32 *>(&entry->state));

	pg_read_barrier();
	return state;
}

void
ConsumeRing(shmem::Stream &stream, const RingEntry *entry)
{
	uint64 size = entry->size;

	pg_memory_barrier();
	pg_atomic_fetch_add_u64(&stream.ring_tail, size);
}

/* ---- positions ---- */

void
Confirm(shmem::Stream &stream, uint64 ticket)
{
	if (pg_atomic_read_u64(&stream.confirmed) >= ticket)
		return;
	AtomicMax(&stream.confirmed, ticket);
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
CurrentGoal(const shmem::Stream &stream)
{
	return {LastTicket(stream), ReadLate(shmem::DatabaseOf(MyDatabaseId)).Expected()};
}

bool
Reached(const shmem::Stream &stream, const Goal &goal)
{
	uint64 confirmed = pg_atomic_read_u64(const_cast<pg_atomic_uint64 *>(&stream.confirmed));
	uint32 late = pg_atomic_read_u32(const_cast<pg_atomic_uint32 *>(&stream.late_confirmed));

	return confirmed >= goal.ticket && (int32) (late - goal.late) >= 0;
}

bool
WaitConfirmed(shmem::Stream &stream, const Goal &goal, TimestampTz deadline)
{
	bool reached;

	ConditionVariablePrepareToSleep(&stream.confirmed_cv);
	while (!(reached = Reached(stream, goal)))
	{
		long left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), deadline);

		if (left <= 0)
			break;
		ConditionVariableTimedSleep(&stream.confirmed_cv, Min(left, 60000L), PG_WAIT_EXTENSION);
	}
	ConditionVariableCancelSleep();
	return reached;
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
