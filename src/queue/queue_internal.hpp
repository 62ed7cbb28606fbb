/*
 * queue_internal.hpp
 *		Columns and helpers that the files of the room queue share.
 */
#pragma once

#include "mmrepl/catalog.hpp"
#include "mmrepl/queue.hpp"

namespace mmrepl::queue
{

constexpr int kSliceBits = 20; /* of a chunk's seq: slices of one segment */

enum Column
{
	kTicket,
	kXid,
	kStream,
	kFlags,
	kSeq,
	kChanges,
	kPayload,
	kColumns
};

/* A queue row, decoded; payload points into the tuple. */
struct Row
{
	uint64 ticket;
	uint64 xid;
	int32 stream;
	uint64 seq;
	uint32 changes;
	uint16 flags;
	TransactionId deleter; /* somebody deletes it, did or tried to; invalid: nobody */
	const char *payload;
	uint32 payload_length;
};

/* Read the columns of a queue row; the payload is not copied. */
void DecodeRow(HeapTuple tuple, TupleDesc desc, Row *row);

/* Of which rows a reader asks whether they wait. */
struct Asked
{
	int32 stream;
	uint64 after;
	uint64 discarded;
};

/* Whether the row is a head that waits: prepared ones wait until they are removed. */
inline bool
Waits(const Row &row, const Asked &asked)
{
	return row.stream == asked.stream && (row.flags & kHead) && row.ticket > asked.discarded &&
		   (row.ticket > asked.after || (row.flags & kPrepared));
}

/* SlotOf() as this process last knew it: no lock is taken, and it may be out of date. */
int KnownSlot(int32 stream);

/* The row as a reader of the queue keeps it. */
Ref RefOf(uint32 table, const Row &row, const ItemPointerData &tid);

/* Blocks that all queue tables have; no lock is kept. */
uint64 QueueBlocks();

/* Place as the payload of a chunked head. */
void PutPlace(StringInfo buf, const Place &place);

/* Raise to the value; never lowers. */
inline void
AtomicMax(pg_atomic_uint64 *where, uint64 value)
{
	uint64 seen = pg_atomic_read_u64(where);

	while (seen < value && !pg_atomic_compare_exchange_u64(where, &seen, value))
		;
}

/* Reserve the part's ring entry, or note the gap; the clock spinlock is held. */
void Reserve(shmem::Stream &stream, Outgoing *out, uint64 ticket, uint64 xid);

/* The part's ring entry; it has one. */
RingEntry *EntryOf(const Outgoing *out);

/* Copy the payload into the reserved ring entry, if there is one. */
void FillEntry(const Outgoing *out);

/*
 * Scan a queue table (all of it, or those of the blocks low to high that it still
 * has) under the active snapshot.
 */
template <typename Fn>
void
ScanTable(Relation rel, BlockNumber low, BlockNumber high, Fn fn)
{
	BlockNumber blocks = low == InvalidBlockNumber ? 0 : RelationGetNumberOfBlocks(rel);
	HeapTuple tuple;

	if (low != InvalidBlockNumber && low >= blocks)
		return;

	TableScanDesc scan = table_beginscan_strat(rel, GetActiveSnapshot(), 0, NULL, true, false);

	if (low != InvalidBlockNumber)
		heap_setscanlimits(scan, low, Min(high, blocks - 1) - low + 1);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Row row;

		CHECK_FOR_INTERRUPTS();
		DecodeRow(tuple, RelationGetDescr(rel), &row);
		fn(row, tuple->t_self);
	}
	table_endscan(scan);
}

/* Fetch one row by its place and hand it, decoded, to fn; false when it is not there. */
template <typename Fn>
bool
FetchRow(Relation rel, const ItemPointerData &tid, Fn fn)
{
	HeapTupleData tuple;
	Buffer buffer;
	Row row;

	tuple.t_self = tid;
	if (!heap_fetch(rel, GetActiveSnapshot(), &tuple, &buffer, false))
		return false;
	DecodeRow(&tuple, RelationGetDescr(rel), &row);
	fn(row);
	ReleaseBuffer(buffer);
	return true;
}

template <typename Fn>
void
ScanQueue(Fn fn)
{
	const catalog::Relations &relations = catalog::GetRelations();

	for (uint32 table = 0; table < shmem::kQueueTables; table++)
	{
		Relation rel = table_open(relations.queue[table], AccessShareLock);

		ScanTable(rel, InvalidBlockNumber, 0,
				  [&](const Row &row, const ItemPointerData &tid) { fn(table, row, tid); });
		table_close(rel, AccessShareLock);
	}
}

/* Under a fresh snapshot, pushed as the active one. */
template <typename Fn>
auto
WithLatestSnapshot(Fn fn)
{
	PushActiveSnapshot(GetLatestSnapshot());
	if constexpr (__is_same(decltype(fn()), void))
	{
		fn();
		PopActiveSnapshot();
	}
	else
	{
		auto result = fn();

		PopActiveSnapshot();
		return result;
	}
}

} // namespace mmrepl::queue
