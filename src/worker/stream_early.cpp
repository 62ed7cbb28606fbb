/*
 * stream_early.cpp
 *		What is executed at the peer while it commits here.
 *
 * When its head row is written nothing but the local commit is left of a
 * transaction, and most of that is waiting for the disk.  A transaction that comes
 * alone is sent at that moment, without the sync message behind it: the peer
 * executes it, and cannot commit.  When it is committed and flushed here, the sync
 * message follows, and all is as if it had been sent now.  When it has failed here
 * after all, takes long, or the peer refuses it before that, it is rolled back
 * there; if it commits here, it is sent again in the ordinary way.  If the
 * connection is lost meanwhile the peer's session ends, and rolls back.
 *
 * The peer keeps locks meanwhile.  So the worker does nothing else, and nothing else
 * is on its way.
 */
#include "stream_session.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::worker
{

/* Locks are kept at the peer for so long at the most; by us, as long as we are there. */
#ifdef MMREPL_FAULT_POINTS
constexpr int64 kHoldAtMost = INT64CONST(10) * USECS_PER_SEC; /* a test looks meanwhile */
constexpr int64 kNotFor = 0;
#else
constexpr int64 kHoldAtMost = INT64CONST(200) * 1000;
constexpr int64 kNotFor = INT64CONST(60) * USECS_PER_SEC; /* after one in vain */
#endif

/* It was of no use of late, so that everything would be done twice. */
static bool
IsSpared(const Session *session)
{
	TimestampTz now = GetCurrentTimestamp();

	/* Later than that it is only when the clock was set back. */
	return session->early_again != 0 && now < session->early_again &&
		   now >= session->early_again - kNotFor;
}

/*
 * What is executed early takes processor time and wakes processes while the session
 * here commits: that is for those who wait for the peer, and else for a stream with
 * little to do.  Under load there is enough to be executed that has committed.
 */
static shmem::Announcements
Wanted(const Session *session)
{
	using shmem::Announcements;

	if (!guc::early_apply || session->conn == NULL || !session->holds_lock ||
		session->outstanding > 0 || !MayStart(session) || Narrowing(session) || IsSpared(session))
		return Announcements::None;
	if (IsFrequent(session))
		return Announcements::None;
	return IsLeisurely(session) ? Announcements::All : Announcements::Awaited;
}

/* The entry that is announced, wanted, and next; NULL: there is none. */
static const queue::RingEntry *
Next(const Session *session, shmem::Announcements wanted)
{
	if (wanted == shmem::Announcements::None)
		return NULL;
	const queue::RingEntry *entry = queue::PeekRing(*session->shared, session->slot);

	if (entry == NULL || queue::StateOf(entry) != queue::EntryState::Committing ||
		entry->ticket == session->not_early ||
		(wanted == shmem::Announcements::Awaited && entry->awaits == queue::Awaits::Nothing))
		return NULL;
	return entry;
}

/* What is announced before we ask is seen here, what comes later wakes us. */
void
AskForAnnouncements(Session *session)
{
	shmem::Announcements wanted = Wanted(session);

	if (pg_atomic_exchange_u32(&session->shared->wants_announcements, (uint32) wanted) !=
			(uint32) wanted &&
		Next(session, wanted) != NULL)
		SetLatch(MyLatch);
}

void
StartEarly(Session *session)
{
	Shipment *shipment = &session->shipments[0];

	if (Next(session, Wanted(session)) == NULL)
		return;
	StartShipment(shipment, session->shipments_context);
	if (!EarlyShipment(&session->feed, shipment))
	{
		EndShipment(shipment);
		return;
	}
	session->held_since = GetCurrentTimestamp();
	(void) Launch(session);
	MMREPL_FAULT_POINT("worker-early-sent");
}

static TimestampTz
HoldEnds(const Session *session)
{
	return session->held_since + kHoldAtMost;
}

long
HoldTimeout(const Session *session)
{
	long left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), HoldEnds(session));

	/* More than that it is only when the clock was set back. */
	return Max(Min(left, (long) (kHoldAtMost / 1000)), 1L);
}

/* It is committed here. */
static void
Keep(Session *session)
{
	KeepEarly(&session->feed, &session->shipments[0]);
	MMREPL_FAULT_POINT("worker-early-kept");
	FlushCommits();
	session->progress = true;
	if (!PQpipelineSync(session->conn))
		Broken(session, session->conn);
}

static void
UndoEarly(Session *session, const char *reason)
{
	Shipment *shipment = &session->shipments[0];

	if (shipment->held == NULL)
		return;
	ereport(DEBUG1, (errmsg_internal("mmrepl: ticket %llu is not executed early: %s",
									 (unsigned long long) shipment->confirm_to, reason)));
	session->not_early = shipment->confirm_to;
	TakeBackEarly(&session->feed, shipment);
	MMREPL_FAULT_POINT("worker-early-undone");
	session->progress = true;
	if (!delivery::SendRollback(session->conn) || !PQpipelineSync(session->conn))
		Broken(session, session->conn);
}

void
RefuseEarly(Session *session, const char *reason)
{
	session->early_again = GetCurrentTimestamp() + kNotFor;
	UndoEarly(session, reason);
}

/* It goes on being held if it still commits, and there is time left. */
static void
UndoIfLate(Session *session)
{
	TimestampTz now = GetCurrentTimestamp();

	/* Earlier than that it is only when the clock was set back. */
	if (now < HoldEnds(session) && now >= session->held_since)
		return;
	RefuseEarly(session, "it takes long to commit");
}

/*
 * What has become of it.  The entry is the transaction's as long as the ring is the
 * stream's.  A pause holds from the call on.
 */
static void
Judge(Session *session, const Shipment &shipment)
{
	queue::EntryState state = queue::StateOf(shipment.held);

	if (shipment.held->ticket != shipment.confirm_to || session->shared->epoch != session->epoch)
		UndoEarly(session, "the stream is another");
	else if (PausedNow(&session->feed))
		UndoEarly(session, "the stream is paused");
	else if (state == queue::EntryState::Committing)
		UndoIfLate(session);
	else if (state == queue::EntryState::Committed)
		Keep(session);
	else
		UndoEarly(session, "it has aborted");
}

bool
EndEarly(Session *session)
{
	if (IsHeld(session))
		Judge(session, session->shipments[0]);
	Flush(session);
	return session->conn != NULL;
}

} // namespace mmrepl::worker
