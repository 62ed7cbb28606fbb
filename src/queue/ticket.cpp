/*
 * ticket.cpp
 *		The ticket clock and tickets in flight: drawing and settling.
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

static struct
{
	int32 stream;
	int slot;
} known[8];

static int n_known;

int
KnownSlot(int32 stream)
{
	for (int i = 0; i < n_known; i++)
		if (known[i].stream == stream && known[i].slot >= 0)
			return known[i].slot;
	return SlotOf(stream);
}

int
SlotOf(int32 stream)
{
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
	uint64 registrations = CurrentRegistrations(); /* as of which all of the slots are */
	uint64 mask = MaskOf(parts, n_parts, &everyone);

	SpinLockAcquire(&state.clock_mutex);
	if (state.registrations != registrations)
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

/*
 * An inline transaction is committed here and not known to be at the peer.  What
 * is confirmed is in doubt no more, so that the range need not be emptied.
 */
static void
NoteDoubt(shmem::Stream &stream, uint64 ticket)
{
	uint64 from = pg_atomic_read_u64(&stream.doubt_from);

	while ((from > ticket || from <= pg_atomic_read_u64(&stream.confirmed)) &&
		   !pg_atomic_compare_exchange_u64(&stream.doubt_from, &from, ticket))
		;
	AtomicMax(&stream.doubt_to, ticket);
}

/* What the fate means for the ring's consumer. */
static EntryState
StateFor(Fate fate)
{
	switch (fate)
	{
		case Fate::Committed:
			return EntryState::Committed;
		case Fate::Delivered:
			return EntryState::Delivered;
		case Fate::Applied:
			return EntryState::Applied;
		default:
			return EntryState::Aborted;
	}
}

void
Settle(Outgoing *out, uint64 ticket, Fate fate)
{
	EntryState state = StateFor(fate);

	if (state != EntryState::Aborted) /* before the entry says so: who sees that flushes to here */
		AtomicMax(&shmem::Get().commit_lsn, XactLastCommitEnd);
	if (out->slot < 0)
		return;
	shmem::Stream &stream = shmem::Get().streams[out->slot];

	if (fate == Fate::Applied) /* before the ticket is no longer in flight */
		AtomicMax(&stream.last_applied, ticket);
	if (fate == Fate::Committed)
	{
		if (out->flags & kInlined)
			NoteDoubt(stream, ticket);
		AtomicMax(&stream.last_queued, ticket);
		if (out->copy)
			NoteCopy(stream, ticket, out->counted_bytes);
		if (!(out->flags & kTombstone))
			CountQueued(stream, out, ticket);
	}
	out->delivered = fate == Fate::Delivered || fate == Fate::Applied;
	if (out->entry != 0)
	{
		pg_write_barrier();
		pg_atomic_write_u32(&EntryOf(out)->state, (uint32) state);
	}
}

/* What has no slot may belong to any of the database's streams by now. */
static void
NoteQueuedForAll(uint64 ticket)
{
	shmem::State &state = shmem::Get();

	for (int i = 0; i < guc::max_servers; i++)
		if (state.streams[i].in_use && state.streams[i].database == MyDatabaseId)
		{
			AtomicMax(&state.streams[i].last_queued, ticket);
			NoteDoubt(state.streams[i], ticket);
		}
}

/* Whether the worker, if it sleeps, has to be woken for the part. */
static bool
WantsWake(shmem::Stream &stream, const Outgoing *out)
{
	uint64 looks_at = pg_atomic_read_u64(&stream.looks_at);

	if (looks_at == 0 || (out->flags & kTombstone))
		return true;
	if (looks_at == shmem::kBreather)
		return out->awaited;
	return looks_at != shmem::kHeedless && !out->delivered;
}

/* Whoever stands there looks at the tickets in flight behind a full barrier, we at him behind another. */
static void
TellSettled(shmem::Stream &stream)
{
	if (!proclist_is_empty(&stream.settled_cv.wakeup))
		ConditionVariableBroadcast(&stream.settled_cv);
}

/* Wake who waits for the part's settlement: the worker, and sessions at the fence. */
static void
WakeFor(const Outgoing *out)
{
	if (out->slot < 0)
	{
		shmem::RequestScout();
		shmem::NudgeWorkersOf(MyDatabaseId); /* one may have come meanwhile */
		return;
	}
	shmem::Stream &stream = shmem::Get().streams[out->slot];

	if (WantsWake(stream, out))
		shmem::WakeWorker(stream);
	TellSettled(stream);
}

void
SettleTicket(Outgoing **parts, int n_parts)
{
	pg_atomic_uint64 *ticket = &shmem::MySlot().ticket;

	for (int i = 0; i < n_parts; i++)
		if (parts[i]->slot < 0)
			NoteQueuedForAll(pg_atomic_read_u64(ticket));
	pg_memory_barrier();
	pg_atomic_write_u64(ticket, 0);
	pg_memory_barrier(); /* the worker looks at the ring after it has cleared looks_at */
	for (int i = 0; i < n_parts; i++)
		WakeFor(parts[i]);
	if (pg_atomic_read_u32(&shmem::MySlot().everyone)) /* others took it for theirs, too */
		for (int i = 0; i < guc::max_servers; i++)
			TellSettled(shmem::Get().streams[i]);
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

bool
IsInFlight(uint64 ticket)
{
	for (int i = 0; i < shmem::Get().n_slots; i++)
		if (pg_atomic_read_u64(&shmem::SlotOf(i).ticket) == ticket)
			return true;
	return false;
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

} // namespace mmrepl::queue
