/*
 * feed_begin.cpp
 *		A feed's begin, and what it forgets when it begins again.
 */
#include "feed_internal.hpp"
#include "mmrepl/fault.hpp"

namespace mmrepl::worker
{

void
StartFeed(Feed *feed, int32 stream, int slot, bool tables_only)
{
	*feed = {};
	feed->stream = stream;
	feed->slot = slot;
	feed->shared = &shmem::Get().streams[slot];
	feed->database = &shmem::DatabaseOf(MyDatabaseId);
	feed->tables_only = tables_only;
	InTransaction([&] { feed->node = catalog::NodeId(); });
	feed->context =
		AllocSetContextCreate(CurrentMemoryContext, "mmrepl feed", ALLOCSET_DEFAULT_SIZES);
	feed->survey_context =
		AllocSetContextCreate(CurrentMemoryContext, "mmrepl survey", ALLOCSET_DEFAULT_SIZES);
}

void
FreeFeed(Feed *feed)
{
	MemoryContextDelete(feed->context);
	MemoryContextDelete(feed->survey_context);
	feed->context = feed->survey_context = NULL;
}

void
DropRefs(Feed *feed)
{
	MemoryContextReset(feed->context);
	feed->refs = NULL;
	feed->n_refs = feed->next_ref = 0;
}

void
DropSurvey(Feed *feed)
{
	MemoryContextReset(feed->survey_context);
	feed->surveyed = false;
}

void
RefuseGivenUp()
{
	ereport(ERROR, (errcode(ERRCODE_MMREPL_NEEDS_RESYNC),
					errmsg("the stream needs a resync: too much was waiting")));
}

void
ReadAgain(Feed *feed, uint64 position)
{
	DropRefs(feed);
	feed->position = position;
	feed->passed_unsealed = Min(feed->passed_unsealed, position);
	if (feed->surveyed && !queue::RewindSurvey(&feed->survey, position))
		DropSurvey(feed);
}

/* The peer stands behind what it had confirmed. */
static void
RequirePeerNotRewound(const Feed *feed, const delivery::Peer &peer)
{
	catalog::StreamRow row = {};
	connection::Failure failure;

	InTransaction([&] { (void) catalog::ReadStreamRow(feed->stream, &row); });
	uint64 acked = Max(row.acked, pg_atomic_read_u64(&feed->shared->acked));

	bool lost = delivery::HasLostChanges(peer, acked, NameStr(row.server_name), &failure);

	pg_atomic_write_u64(&feed->shared->lost, lost ? acked : 0);
	pg_write_barrier(); /* acked grows again behind it */
	if (lost)
		connection::ReportFailure(&failure, NameStr(row.server_name), NULL);
}

/* Nothing would bring the clock back that has followed a ticket of another age. */
static void
RequireCredible(uint64 watermark, uint64 ours)
{
	if (watermark <= ours + shmem::kMaxClockLead)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_MMREPL_REWOUND),
			 errmsg("the peer has seen a ticket that is far ahead of this node's clock"),
			 errdetail("It stands at ticket %llu, which is the time %s.",
					   (unsigned long long) watermark,
					   timestamptz_to_str(shmem::TicketTime(watermark))),
			 errhint("Set the clock that is wrong. If this database was restored to a time before "
					 "its clock was wrong, make it a new node with SELECT "
					 "mmrepl.adopt_node(force => true), which empties the queue.")));
}

/*
 * The peer has seen a ticket that we have not drawn yet: this database was
 * restored from an older state.  New tickets are made greater; but what was
 * queued since the restart under lower ones would count as delivered.
 */
static void
RequireSourceNotRewound(Feed *feed, uint64 watermark)
{
	uint64 transactions, changes, bytes, oldest, oldest_bytes;
	uint64 drawn = queue::LastDrawn();

	if (watermark <= drawn)
		return;
	RequireCredible(watermark, Max(drawn, shmem::ClockNow()));
	uint64 after = Max(pg_atomic_read_u64(&feed->shared->confirmed), shmem::Get().first_ticket);

	queue::RaiseClock(watermark);
	InTransaction([&] {
		queue::CountBacklog(feed->stream, after, watermark, &transactions, &changes, &bytes,
							&oldest, &oldest_bytes);
	});
	if (transactions > 0)
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_REWOUND),
				 errmsg("the peer has seen later tickets than this database has drawn"),
				 errdetail("This database was restored from an older state; %llu transactions "
						   "queued since then bear tickets that the peer would take for old.",
						   (unsigned long long) transactions),
				 errhint("Copy the tables anew, and drop the queued transactions with "
						 "mmrepl.skip().")));
}

/*
 * What the peer has beyond what is confirmed may not have been flushed there.  Of
 * what it is not known how much it is, the backlog's counters are reconciled later.
 */
static void
ResetUnsealed(Feed *feed, uint64 watermark)
{
	Unsealed was = feed->unsealed;

	feed->unsealed = {};
	feed->relaxed_sent = 0;
	feed->passed_unsealed = 0; /* all of it is read again */
	if (!feed->relaxed_there || watermark <= pg_atomic_read_u64(&feed->shared->confirmed))
		queue::Acknowledged(*feed->shared, watermark);
	else
	{
		if (watermark >= was.to)
			feed->unsealed = {0, 0, false, false, 0, was.transactions, was.changes, was.bytes};
		NoteUnsealed(feed, watermark);
		feed->unsealed.first = true;
	}
}

void
ResetFeed(Feed *feed, const delivery::Peer &peer)
{
	uint64 discarded = pg_atomic_read_u64(&feed->shared->discarded);
	uint64 watermark = peer.watermark;

	if (discarded == shmem::kNeedsResync) /* no ticket: the feed must not begin there */
		RefuseGivenUp();
	RequirePeerNotRewound(feed, peer);
	RequireSourceNotRewound(feed, watermark);
	feed->relaxed_there = peer.protocol >= batch::kRelaxedProtocol;
	ResetUnsealed(feed, watermark);
	ReadAgain(feed, Max(Max(pg_atomic_read_u64(&feed->shared->confirmed), watermark), discarded));
	if (discarded > watermark)
		MMREPL_FAULT_POINT("resync-feed-begun");
	feed->watermark = watermark;
	feed->from_tables = true;
	feed->late_unremoved = 0;
	feed->late_reached = pg_atomic_read_u32(&feed->shared->late_confirmed);
	feed->late_open = false;
	MMREPL_FAULT_POINT("feed-reset");
}

} // namespace mmrepl::worker
