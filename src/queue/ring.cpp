/*
 * ring.cpp
 *		The ring: a stream's newest transactions in shared memory, in ticket order.
 *
 * Committers reserve entries under the clock spinlock and settle them when they
 * end; one consumer, the holder of the ordering lock, takes settled ones.  What
 * does not fit leaves a gap: up to that ticket the tables have to be read.
 */
#include "queue_internal.hpp"

namespace mmrepl::queue
{

/* ---- ring, producer's side ---- */

void
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
	entry->awaits = out->awaits;
	pg_atomic_write_u32(&entry->state, (uint32) EntryState::Pending);
	pg_write_barrier();
	pg_atomic_write_u64(&stream.ring_head, head + size);
	out->entry = head + 1;
}

RingEntry *
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

/* Who begins to want announcements looks at the ring behind a full barrier, we at him behind another. */
void
Announce(const Outgoing &out)
{
	if (out.entry == 0)
		return;
	shmem::Stream &stream = shmem::Get().streams[out.slot];

	pg_write_barrier();
	pg_atomic_write_u32(&EntryOf(&out)->state, (uint32) EntryState::Committing);
	pg_memory_barrier();
	shmem::Announcements wanted =
		(shmem::Announcements) pg_atomic_read_u32(&stream.wants_announcements);

	if (wanted == shmem::Announcements::All ||
		(wanted == shmem::Announcements::Awaited && out.awaits != Awaits::Nothing))
		shmem::WakeWorker(stream);
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

	AtomicMax(&stream.ring_taken, entry->ticket);
	pg_memory_barrier();
	pg_atomic_fetch_add_u64(&stream.ring_tail, size);
}

} // namespace mmrepl::queue
