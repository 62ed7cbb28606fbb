/*
 * delivery_batch.cpp
 *		Writing a batch: the frame of batch.hpp around segments as they are.
 */
#include "mmrepl/delivery.hpp"

namespace mmrepl::delivery
{

namespace
{

/* Where `last` stands: behind magic, flags, encoding, node, stream, clock and previous. */
constexpr int kLastAt = 4 + 1 + 4 + UUID_LEN + 4 + 8 + 8;

/* Where the flags stand: behind magic. */
constexpr int kFlagsAt = 4;

/* What the message and the receiver's bytea need besides the batch itself. */
constexpr Size kBatchLimit = MaxAllocSize - 1024;

/*
 * Raise unless so many more bytes can be sent: neither a buffer of ours nor a
 * bytea of the peer can hold more than one gigabyte.
 */
void
RequireRoom(const Batch *batch, Size bytes)
{
	if (batch->buf.len + bytes > kBatchLimit)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("changes are too large to be sent to a peer"),
				 errdetail("A batch of %zu bytes would be needed; the limit is %zu bytes.",
						   batch->buf.len + bytes, kBatchLimit),
				 errhint("Lower mmrepl.batch_size, or write fewer rows in one transaction.")));
}

/* Overwrite an integer that was written before its value was known. */
template <typename Int>
void
PutAt(StringInfo buf, int position, Int network_order)
{
	memcpy(buf->data + position, &network_order, sizeof(network_order));
}

} // namespace

/* An empty batch whose watermark does not move until Finish() says so. */
void
Begin(Batch *batch, const Header &header)
{
	*batch = {};
	batch->previous = header.previous;
	batch->last = header.previous;

	initStringInfo(&batch->buf);
	pq_sendint32(&batch->buf, batch::kMagic);
	pq_sendint8(&batch->buf, header.flags);
	pq_sendint32(&batch->buf, (uint32) GetDatabaseEncoding());
	pq_sendbytes(&batch->buf, (const char *) header.node.data, UUID_LEN);
	pq_sendint32(&batch->buf, (uint32) header.stream);
	pq_sendint64(&batch->buf, header.clock);
	pq_sendint64(&batch->buf, header.previous);
	Assert(batch->buf.len == kLastAt);
	pq_sendint64(&batch->buf, header.previous);
	pq_sendint64(&batch->buf, header.sweep_xid);
	pq_sendint32(&batch->buf, header.part);
}

/* Start a transaction; its segments follow with AddSegment(). */
void
AddTransaction(Batch *batch, uint64 ticket, uint64 xid, uint8 flags, int64 changes)
{
	RequireRoom(batch, 64);
	pq_sendint8(&batch->buf, batch::kTransaction);
	pq_sendint64(&batch->buf, ticket);
	pq_sendint64(&batch->buf, xid);
	pq_sendint8(&batch->buf, flags);
	batch->segments_at = batch->buf.len;
	pq_sendint32(&batch->buf, 0);

	if (batch->transactions == 0)
		batch->first = ticket;
	batch->transactions++;
	batch->changes += changes;
}

/* Append one segment to the transaction that was started last. */
void
AddSegment(Batch *batch, const char *data, uint32 length)
{
	uint32 count;

	MmreplEnsure(batch->segments_at > 0, "segment outside of a transaction");
	RequireRoom(batch, (Size) length + sizeof(uint32));
	pq_sendint32(&batch->buf, length);
	appendBinaryStringInfoNT(&batch->buf, data, length);

	memcpy(&count, batch->buf.data + batch->segments_at, sizeof(count));
	PutAt(&batch->buf, batch->segments_at, pg_hton32(pg_ntoh32(count) + 1));
}

/* The open transaction turned out to end in this batch: no further part follows. */
void
ClearMore(Batch *batch)
{
	batch->buf.data[kFlagsAt] &= (char) ~batch::kMore;
}

/* How the batch stands to those before and behind it, whatever was said of it before. */
void
SetTurn(Batch *batch, bool turn, bool ahead)
{
	uint8 flags = (uint8) batch->buf.data[kFlagsAt] & ~(batch::kTurn | batch::kAhead);

	batch->buf.data[kFlagsAt] =
		(char) (flags | (turn ? batch::kTurn : 0) | (ahead ? batch::kAhead : 0));
}

/* Whoever sets it sends a batch without it later. */
void
SetRelaxed(Batch *batch)
{
	batch->buf.data[kFlagsAt] |= (char) batch::kRelaxed;
}

/* Write the watermark that holds after the batch. */
void
Finish(Batch *batch, uint64 last)
{
	batch->last = last;
	PutAt(&batch->buf, kLastAt, pg_hton64(last));
}

} // namespace mmrepl::delivery
