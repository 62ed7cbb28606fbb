/*
 * feed_internal.hpp
 *		What the files that make up the feed share.
 */
#pragma once

#include "worker_internal.hpp"

namespace mmrepl::worker
{

/* Start the shipment's batch; its header takes shipment->previous and sweep_xid. */
void BeginBatch(Feed *feed, Shipment *shipment, uint8 flags);

/* Finish an ordinary batch; its watermark is the feed's position. */
void CloseBatch(Feed *feed, Shipment *shipment);

/* Whether a prepared transaction's rows may have appeared since the tables were read. */
bool LateWork(const Feed *feed);

} // namespace mmrepl::worker
