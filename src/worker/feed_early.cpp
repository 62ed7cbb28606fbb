/*
 * feed_early.cpp
 *		From the ring, before it has committed: a batch of one transaction that is
 *		held (stream_early.cpp).
 */
#include "feed_internal.hpp"

namespace mmrepl::worker
{

/*
 * What is before an entry, in the ring or not, was noted before the entry was announced:
 * so the gap and late work are looked at afterwards.
 */
static const queue::RingEntry *
Announced(const Feed *feed)
{
	if (feed->from_tables || feed->unsealed.first)
		return NULL;
	const queue::RingEntry *entry = queue::PeekRing(*feed->shared, feed->slot);

	if (entry == NULL || queue::StateOf(entry) != queue::EntryState::Committing ||
		entry->ticket <= feed->position || GapAhead(feed) || LateWork(feed) || PausedNow(feed))
		return NULL;
	return entry;
}

bool
EarlyShipment(Feed *feed, Shipment *shipment)
{
	const queue::RingEntry *entry = Announced(feed);

	if (entry == NULL)
		return false;
	shipment->previous = feed->watermark;
	InContext(shipment->context, [&] {
		BeginBatch(feed, shipment, 0);
		AddEntry(shipment, entry);
		delivery::Finish(&shipment->batch, entry->ticket);
	});
	Count(feed, shipment, entry->ticket, entry->flags, entry->changes, entry->payload_length);
	shipment->confirm_to = entry->ticket;
	shipment->late_to = feed->late_reached;
	shipment->all_sent = true;
	shipment->held = entry;
	shipment->hurry = entry->awaits == queue::Awaits::Flushed;
	Relax(feed, shipment, false);
	return true;
}

void
KeepEarly(Feed *feed, Shipment *shipment)
{
	feed->position = feed->watermark = shipment->confirm_to;
	queue::ConsumeRing(*feed->shared, shipment->held);
	shipment->held = NULL;
}

/* The entry stays where it is. */
void
TakeBackEarly(Feed *feed, Shipment *shipment)
{
	if (shipment->relaxed)
		feed->relaxed_sent--;
	else
		feed->unsealed.sealing = false;
	shipment->held = NULL;
	shipment->undone = true;
}

} // namespace mmrepl::worker
