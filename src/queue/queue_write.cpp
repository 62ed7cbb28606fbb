/*
 * queue_write.cpp
 *		Head and chunk rows, written with the heap API in the user's transaction.
 */
#include "mmrepl/fault.hpp"
#include "queue_internal.hpp"

namespace mmrepl::queue
{

/* ---- rows ---- */

static HeapTuple
FormRow(TupleDesc desc, const Row &row, bytea *payload)
{
	Datum values[kColumns];
	bool nulls[kColumns] = {};

	/* What most rows have in common costs them nothing. */
	nulls[kSeq] = row.seq == 0;
	nulls[kChanges] = row.changes == 1 || !(row.flags & kHead);
	values[kTicket] = Int64GetDatum((int64) row.ticket);
	values[kXid] = Int64GetDatum((int64) row.xid);
	values[kStream] = Int32GetDatum(row.stream);
	values[kSeq] = Int64GetDatum((int64) row.seq);
	values[kChanges] = Int32GetDatum((int32) row.changes);
	values[kFlags] = Int16GetDatum((int16) row.flags);
	values[kPayload] = PointerGetDatum(payload);
	return heap_form_tuple(desc, values, nulls);
}

static void
InsertRow(Relation rel, const Row &row, bytea *payload, ItemPointer where)
{
	HeapTuple tuple = FormRow(RelationGetDescr(rel), row, payload);

	heap_insert(rel, tuple, GetCurrentCommandId(true), 0, NULL);
	*where = tuple->t_self;
	heap_freetuple(tuple);
}

static uint64
TopXid()
{
	return U64FromFullTransactionId(GetTopFullTransactionId());
}

/* Open the table that the transaction's rows go to; its choice holds once chunks are there. */
static Relation
OpenTable(Outgoing *out)
{
	if (out->place.rows == 0)
		out->place.table = pg_atomic_read_u32(&shmem::DatabaseOf(MyDatabaseId).active_table);
	return table_open(catalog::GetRelations().queue[out->place.table], RowExclusiveLock);
}

/* ---- chunks ---- */

static void
NoteChunk(Place *place, const ItemPointerData &tid)
{
	BlockNumber block = ItemPointerGetBlockNumber(&tid);

	if (place->rows == 0 || block < place->low)
		place->low = block;
	if (place->rows == 0 || block > place->high)
		place->high = block;
	place->rows++;
}

/* One segment as one or more chunk rows. */
static void
WriteSegment(Relation rel, Outgoing *out, const change::Segment *segment)
{
	union
	{
		char bytes[VARHDRSZ + kRowPayload];
		int32 align;
	} slice;
	Row row = {};
	uint64 number = 0;

	row.xid = TopXid();
	row.stream = out->stream;
	for (uint32 at = 0; at < segment->length; at += kRowPayload, number++)
	{
		uint32 length = Min(kRowPayload, segment->length - at);
		ItemPointerData tid;

		MmreplEnsure(number < (UINT64CONST(1) << kSliceBits), "segment has too many slices");
		row.seq = (uint64) segment->seq << kSliceBits | number;
		memcpy(slice.bytes + VARHDRSZ, segment->data + VARHDRSZ + at, length);
		SET_VARSIZE(slice.bytes, length + VARHDRSZ);
		InsertRow(rel, row, (bytea *) slice.bytes, &tid);
		NoteChunk(&out->place, tid);
		MMREPL_FAULT_POINT("queue-chunk-written");
	}
	out->place.bytes += segment->length;
}

void
Spill(Outgoing *out, change::Segment *first, change::Segment *end)
{
	Relation rel = OpenTable(out);

	for (change::Segment *segment = first; segment != end; segment = segment->next)
	{
		if (segment->spilled)
			continue;
		WriteSegment(rel, out, segment);
		pfree(segment->data);
		segment->data = NULL;
		segment->spilled = true;
	}
	table_close(rel, NoLock);
}

/* ---- heads ---- */

void
PutPlace(StringInfo buf, const Place &place)
{
	pq_sendint32(buf, place.table);
	pq_sendint32(buf, place.low);
	pq_sendint32(buf, place.high);
	pq_sendint32(buf, place.rows);
	pq_sendint64(buf, place.bytes);
}

static void
PutSegments(StringInfo buf, const change::Segment *first)
{
	for (const change::Segment *segment = first; segment != NULL; segment = segment->next)
	{
		change::PutVarint(buf, segment->next != NULL ? segment->length : 0);
		appendBinaryStringInfo(buf, segment->data + VARHDRSZ, (int) segment->length);
	}
}

/* Whether the segments, with their lengths, fit one row. */
static bool
FitsRow(const change::Segment *first)
{
	uint64 bytes = 0;

	for (const change::Segment *segment = first; segment != NULL; segment = segment->next)
		bytes += sizeof(uint32) + segment->length;
	return bytes <= kRowPayload;
}

void
PrepareHead(Outgoing *out, change::Segment *first, MemoryContext context)
{
	if (out->place.rows > 0 || !FitsRow(first))
		Spill(out, first, NULL);
	InContext(context, [&] { initStringInfo(&out->payload); });
	if (out->place.rows > 0)
	{
		out->flags |= kChunked;
		PutPlace(&out->payload, out->place);
		out->counted_bytes = out->place.bytes;
		return;
	}
	PutSegments(&out->payload, first);
	out->counted_bytes = (uint64) out->payload.len;
}

/* Write the header of so many bytes, the short one if it can be; returns its size. */
static int
StartVarlena(char *varlena, int length)
{
	if (length + VARHDRSZ_SHORT <= VARATT_SHORT_MAX)
	{
		SET_VARSIZE_SHORT(varlena, length + VARHDRSZ_SHORT);
		return VARHDRSZ_SHORT;
	}
	SET_VARSIZE(varlena, length + VARHDRSZ);
	return VARHDRSZ;
}

void
WriteHead(Outgoing *out, uint64 ticket)
{
	union
	{
		char bytes[VARHDRSZ + kRowPayload];
		int32 align;
	} payload;
	Row row = {};
	ItemPointerData tid;
	Relation rel = OpenTable(out);

	row.ticket = ticket;
	row.xid = TopXid();
	row.stream = out->stream;
	row.changes = out->changes;
	row.flags = out->flags;
	memcpy(payload.bytes + StartVarlena(payload.bytes, out->payload.len), out->payload.data,
		   out->payload.len);
	InsertRow(rel, row, (bytea *) payload.bytes, &tid);
	table_close(rel, NoLock);
	MMREPL_FAULT_POINT("queue-head-written");
	FillEntry(out);
	MMREPL_FAULT_POINT("queue-entry-filled");
}

} // namespace mmrepl::queue
