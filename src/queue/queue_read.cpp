/*
 * queue_read.cpp
 *		Reading the queue tables: what waits, in ticket order.
 */
#include "queue_internal.hpp"

namespace mmrepl::queue
{

/* ---- rows ---- */

void
DecodeRow(HeapTuple tuple, TupleDesc desc, Row *row)
{
	Datum values[kColumns];
	bool nulls[kColumns];

	heap_deform_tuple(tuple, desc, values, nulls);
	row->ticket = (uint64) DatumGetInt64(values[kTicket]);
	row->xid = (uint64) DatumGetInt64(values[kXid]);
	row->stream = DatumGetInt32(values[kStream]);
	row->flags = (uint16) DatumGetInt16(values[kFlags]);
	row->deleter = (tuple->t_data->t_infomask & HEAP_XMAX_INVALID) != 0
					   ? InvalidTransactionId
					   : HeapTupleHeaderGetRawXmax(tuple->t_data);
	row->seq = nulls[kSeq] ? 0 : (uint64) DatumGetInt64(values[kSeq]);
	row->changes = nulls[kChanges] ? 1 : (uint32) DatumGetInt32(values[kChanges]);
	bytea *payload = (bytea *) DatumGetPointer(values[kPayload]);

	row->payload = VARDATA_ANY(payload);
	row->payload_length = VARSIZE_ANY_EXHDR(payload);
}

Place
ReadPlace(const char *payload, uint32 length)
{
	change::Reader in = {payload, length, 0};
	Place place = {};

	place.table = in.U32();
	place.low = in.U32();
	place.high = in.U32();
	place.rows = in.U32();
	place.bytes = in.U64();
	MmreplEnsure(place.table < shmem::kQueueTables, "queue row names table %u", place.table);
	return place;
}

/* ---- single heads, sums ---- */

uint64
QueueBlocks()
{
	uint64 blocks = 0;

	for (Oid queue : catalog::GetRelations().queue)
	{
		Relation rel = table_open(queue, AccessShareLock);

		blocks += RelationGetNumberOfBlocks(rel);
		table_close(rel, AccessShareLock);
	}
	return blocks;
}

bool
FindHead(int32 stream, uint64 ticket, Ref *ref)
{
	bool found = false;

	WithLatestSnapshot([&] {
		ScanQueue([&](uint32 table, const Row &row, const ItemPointerData &tid) {
			if (row.stream != stream || !(row.flags & kHead) || row.ticket != ticket)
				return;
			*ref = RefOf(table, row, tid);
			found = true;
		});
	});
	return found;
}

/* Whether the row goes, as far as can be told now: its deletion may still be rolled back. */
static bool
IsGoing(const Row &row)
{
	return TransactionIdIsValid(row.deleter) &&
		   (TransactionIdIsInProgress(row.deleter) || TransactionIdDidCommit(row.deleter));
}

void
FindHeads(int32 stream, const uint64 *xids, int count, FoundHead *heads)
{
	memset(heads, 0, sizeof(FoundHead) * count);
	WithLatestSnapshot([&] {
		ScanQueue([&](uint32, const Row &row, const ItemPointerData &) {
			if (row.stream != stream || !(row.flags & kTwoPhase))
				return;
			for (int i = 0; i < count; i++)
				if (xids[i] == row.xid)
					heads[i] = {row.ticket, IsGoing(row)};
		});
	});
}

void
CountBacklog(int32 stream, uint64 after, uint64 upto, uint64 *transactions, uint64 *changes,
			 uint64 *bytes, uint64 *oldest, uint64 *oldest_bytes)
{
	Asked asked = {stream, after, DiscardedUpTo(stream)};

	*transactions = *changes = *bytes = *oldest = *oldest_bytes = 0;
	WithLatestSnapshot([&] {
		ScanQueue([&](uint32 table, const Row &row, const ItemPointerData &tid) {
			if (!Waits(row, asked) || row.ticket > upto)
				return;
			uint64 own_bytes = RefOf(table, row, tid).bytes;

			++*transactions;
			*changes += row.changes;
			*bytes += own_bytes;
			if (*oldest != 0 && *oldest < row.ticket)
				return;
			*oldest = row.ticket;
			*oldest_bytes = own_bytes;
		});
	});
}

/* ---- payloads ---- */

void
WalkPayload(const char *payload, uint32 length, SegmentSink sink, void *arg)
{
	change::Reader in = {payload, length, 0};

	while (!in.AtEnd())
	{
		uint64 announced = in.Varint();
		uint32 segment = announced == 0 ? in.length - in.position
										: (uint32) Min(announced, (uint64) PG_UINT32_MAX);

		sink(arg, in.Bytes(segment), segment);
	}
}

static int
CompareChunks(const void *left, const void *right)
{
	uint64 a = ((const ChunkRef *) left)->seq;
	uint64 b = ((const ChunkRef *) right)->seq;

	return a < b ? -1 : a > b ? 1 : 0;
}

/* Find a transaction's visible chunk rows, in order. */
static ChunkRef *
FindChunks(Relation rel, const Place &place, int32 stream, uint64 xid, uint32 *count)
{
	ChunkRef *chunks =
		(ChunkRef *) MemoryContextAllocHuge(CurrentMemoryContext,
											sizeof(ChunkRef) * Max((Size) place.rows, 1));
	uint32 found = 0;

	ScanTable(rel, place.low, place.high, [&](const Row &row, const ItemPointerData &tid) {
		if ((row.flags & kHead) || row.stream != stream || row.xid != xid)
			return;
		MmreplEnsure(found < place.rows, "queue holds more chunks than were written");
		chunks[found++] = {row.seq, tid};
	});
	qsort(chunks, found, sizeof(ChunkRef), CompareChunks);
	*count = found;
	return chunks;
}

void
OpenCursor(Cursor *cursor, const Place &place, int32 stream, uint64 xid)
{
	Relation rel = table_open(catalog::GetRelations().queue[place.table], AccessShareLock);

	*cursor = {};
	cursor->place = place;
	cursor->stream = stream;
	cursor->xid = xid;
	WithLatestSnapshot(
		[&] { cursor->chunks = FindChunks(rel, place, stream, xid, &cursor->count); });
	table_close(rel, AccessShareLock);
}

/*
 * Append the next chunk's bytes; false when its segment is complete with it.
 * What resync() has discarded may have made room for others meanwhile.
 */
static bool
JoinSlice(Relation rel, Cursor *cursor, StringInfo segment)
{
	const ChunkRef &chunk = cursor->chunks[cursor->next];
	bool same = false;
	bool there = FetchRow(rel, chunk.tid, [&](const Row &row) {
		same = !(row.flags & kHead) && row.stream == cursor->stream && row.xid == cursor->xid &&
			   row.seq == chunk.seq;
		if (same)
			appendBinaryStringInfo(segment, row.payload, (int) row.payload_length);
	});

	MmreplEnsure(there && same, "a chunk row of the queue vanished");
	cursor->next++;
	return cursor->next < cursor->count &&
		   cursor->chunks[cursor->next].seq >> kSliceBits == chunk.seq >> kSliceBits;
}

bool
ReadSome(Cursor *cursor, uint64 max_bytes, SegmentSink sink, void *arg)
{
	Relation rel = table_open(catalog::GetRelations().queue[cursor->place.table], AccessShareLock);
	StringInfoData segment;
	uint64 passed = 0;

	initStringInfo(&segment);
	WithLatestSnapshot([&] {
		while (cursor->next < cursor->count && passed < max_bytes)
		{
			CHECK_FOR_INTERRUPTS();
			resetStringInfo(&segment);
			while (JoinSlice(rel, cursor, &segment))
				;
			sink(arg, segment.data, (uint32) segment.len);
			passed += segment.len;
		}
	});
	pfree(segment.data);
	table_close(rel, AccessShareLock);
	return cursor->next < cursor->count;
}

/* Whether the row is the head that was found there; another may stand where that was discarded. */
static bool
IsHeadOf(const Row &row, const Ref &ref)
{
	return row.ticket == ref.ticket && row.xid == ref.xid && (row.flags & kHead);
}

/* Fetch a head row and pass it, decoded, to fn. */
template <typename Fn>
static void
WithHead(const Ref &ref, Fn fn)
{
	Relation rel = table_open(catalog::GetRelations().queue[ref.table], AccessShareLock);
	bool same = false;
	bool there = WithLatestSnapshot([&] {
		return FetchRow(rel, ref.tid, [&](const Row &row) {
			same = IsHeadOf(row, ref);
			if (same)
				fn(row);
		});
	});

	MmreplEnsure(there && same, "a head row of the queue vanished");
	table_close(rel, AccessShareLock);
}

Place
PlaceOf(const Ref &ref)
{
	Place place = {};

	WithHead(ref, [&](const Row &row) { place = ReadPlace(row.payload, row.payload_length); });
	return place;
}

void
ReadSegments(const Ref &ref, int32 stream, SegmentSink sink, void *arg)
{
	if (ref.flags & kChunked)
	{
		Cursor cursor;

		OpenCursor(&cursor, PlaceOf(ref), stream, ref.xid);
		ReadSome(&cursor, PG_UINT64_MAX, sink, arg);
		pfree(cursor.chunks);
		return;
	}
	WithHead(ref, [&](const Row &row) { WalkPayload(row.payload, row.payload_length, sink, arg); });
}

bool
RemoveHead(const Ref &ref)
{
	Relation rel = table_open(catalog::GetRelations().queue[ref.table], RowExclusiveLock);
	ItemPointerData tid = ref.tid;
	bool same = false;

	WithLatestSnapshot(
		[&] { (void) FetchRow(rel, tid, [&](const Row &row) { same = IsHeadOf(row, ref); }); });
	if (same)
	{
		simple_heap_delete(rel, &tid);
		CommandCounterIncrement();
	}
	table_close(rel, NoLock);
	return same;
}

} // namespace mmrepl::queue
