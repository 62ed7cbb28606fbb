/*
 * feed_internal.hpp
 *		What the files that make up the feed share.
 */
#pragma once

#include "worker_internal.hpp"

namespace mmrepl::worker
{

/* A transaction was passed that the peer has, and may not have flushed. */
void NotePassedUnsealed(Feed *feed, uint64 ticket);

/* Start the shipment's batch; its header takes shipment->previous and sweep_xid. */
void BeginBatch(Feed *feed, Shipment *shipment, uint8 flags);

/* Finish an ordinary batch; its watermark is the feed's position. */
void CloseBatch(Feed *feed, Shipment *shipment);

/* Add a transaction that stands in the ring as a whole to the batch. */
void AddEntry(Shipment *shipment, const queue::RingEntry *entry);

/* Account for a transaction that goes into the shipment. */
void Count(Feed *feed, Shipment *shipment, uint64 ticket, uint16 flags, uint32 changes,
		   uint64 bytes);

/*
 * Whether the ring may lack something behind the position: what found no room in
 * it, or what was taken out and, after a failure, has to be read again.
 */
bool GapAhead(const Feed *feed);

/* Forget what was read of the tables / where the rest stands. */
void DropRefs(Feed *feed);
void DropSurvey(Feed *feed);

/*
 * Raise: the stream needs a resync.  What stands in the queue is not delivered, and
 * must not be passed over as if it were.  Shared memory knows before the transaction
 * that gave the stream up is settled: whoever was on his way from before begins
 * again, and finds the same out, or that it has been resynced since.
 */
pg_attribute_noreturn() void RefuseGivenUp();

/* What was passed on the way to this ticket waits for a flush at the peer. */
void NoteUnsealed(Feed *feed, uint64 to);

/* Go back to the ticket: what was read above it and is in no batch is read again. */
void ReadAgain(Feed *feed, uint64 position);

} // namespace mmrepl::worker
