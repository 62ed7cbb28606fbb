/*
 * stream_lanes.cpp
 *		Several connections to the peer, while much waits to be sent.
 *
 * Batches go over the lanes in turn.  The peer executes one ahead of the commit
 * of the one before it, and commits in order (apply_turn.cpp).  Their answers are
 * taken in order, too.  A batch that was executed ahead in vain fails, and all
 * behind it: they are kept, and sent again over the first connection, one after
 * the other, as if there was but one lane.  So there is nothing that only lanes
 * can deliver, and nothing that has to be read from the queue again.
 *
 * How much is tried follows from what came of it: after a loss a batch goes alone,
 * after one loss upon another twice as many each time; and batches become
 * smaller, since those of fewer rows are less often in each other's way.
 */
#include "stream_session.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::worker
{

constexpr int64 kMostChanges = 500; /* in a batch that others are executed beside */
constexpr int64 kLeastChanges = 100;
constexpr int64 kMostAlone = 64; /* batches after a loss */
constexpr int kRuns = 4;		 /* successes after which a loss is not one upon another */
constexpr int kStreak = 16;		 /* successes after which batches may be larger */
constexpr int64 kOpenDelay = INT64CONST(30) * USECS_PER_SEC;
#ifdef MMREPL_FAULT_POINTS
constexpr int64 kIdle = USECS_PER_SEC / 50; /* often enough for a test */
constexpr int64 kAloneAfterFailure = 1;
#else
constexpr int64 kIdle = INT64CONST(10) * USECS_PER_SEC;
constexpr int64 kAloneAfterFailure = 8;
#endif

void
InitLanes(Session *session)
{
	session->lanes.group = kMostChanges;
	session->lanes.penalty = 1;
}

/* ---- how many ---- */

/* As set, for the server or for all. */
static int
LanesSet(const Session *session)
{
	if (session->target == NULL || !session->lanes.known_there)
		return 1;
	return session->target->lanes > 0 ? session->target->lanes : guc::lanes;
}

/* Not while somebody looks for a transaction that is refused. */
int
UsableLanes(const Session *session)
{
	if (Narrowing(session) || session->lanes.alone > 0)
		return 1;
	return LanesSet(session);
}

/* Whether the peer may still be busy with another batch over the last one's connection. */
static bool
IsBehindAnother(const Session *session)
{
	for (int i = 0; i < session->outstanding - 1; i++)
		if (session->shipments[i].lane == session->shipments[session->outstanding - 1].lane)
			return true;
	return false;
}

/*
 * Nothing follows a batch that the peer may not have begun with: who follows would
 * wait for its begin, no deadlock detector knows of that wait, and those that are
 * ahead of who follows already have rows.
 */
int
Room(const Session *session)
{
	int lanes = session->lanes.draining ? UsableLanes(session) : 1;

	if (lanes == 1)
		return kInFlight;
	return IsBehindAnother(session) ? session->outstanding : lanes + 1;
}

/* ---- connections ---- */

PGconn *
LaneConn(const Session *session, int lane)
{
	return lane == 0 ? session->conn : session->lanes.list[lane].conn;
}

void
MakeEvents(Session *session)
{
	if (session->events != NULL)
		FreeWaitEventSet(session->events);
	session->events = NULL;
	session->events = NewWaitEventSet(2 + guc::kMaxLanes);
	AddWaitEventToSet(session->events, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(session->events, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	for (int i = 0; i < guc::kMaxLanes; i++)
		if (LaneConn(session, i) != NULL)
			session->lanes.list[i].event =
				AddWaitEventToSet(session->events, WL_SOCKET_READABLE,
								  PQsocket(LaneConn(session, i)), NULL, NULL);
}

/* All but the first; those of a peer that is given up, or that have nothing to do. */
void
CloseLanes(Session *session)
{
	for (int i = 1; i < guc::kMaxLanes; i++)
	{
		Lane *lane = &session->lanes.list[i];

		if (lane->conn != NULL)
			connection::Close(lane->conn);
		*lane = {};
	}
}

/* 0: there is the first one only, if any. */
static int
HighestLane(const Session *session)
{
	int highest = 0;

	for (int i = 1; i < guc::kMaxLanes; i++)
		if (session->lanes.list[i].conn != NULL)
			highest = i;
	return highest;
}

TimestampTz
LanesRestAt(const Session *session)
{
	if (session->outstanding > 0 || HighestLane(session) == 0)
		return 0;
	return session->lanes.used_at + kIdle;
}

void
RestLanes(Session *session)
{
	TimestampTz at = LanesRestAt(session);

	if (at == 0)
		return;
	TimestampTz now = GetCurrentTimestamp();

	/* Later than that it is only when the clock was set back. */
	if (HighestLane(session) < LanesSet(session) && now < at && at <= now + kIdle)
		return;
	CloseLanes(session);
	MakeEvents(session);
	MMREPL_FAULT_POINT("worker-lanes-closed");
}

/* Whether the connection leads to the peer that the first one leads to, ready for batches. */
static bool
GreetBeside(Session *session, PGconn *conn, connection::Failure *failure)
{
	delivery::Peer peer = {};

	return delivery::TryHello(conn, session->feed.node, session->stream,
							  connection::DeadlineIn(guc::connect_timeout), &peer, failure) &&
		   memcmp(&peer.node, &session->shared->peer_node, sizeof(peer.node)) == 0 &&
		   peer.protocol >= batch::kLanesProtocol && PQenterPipelineMode(conn);
}

/* A lane's connection, which is not yet open; false: not now. */
static bool
OpenLane(Session *session, int lane)
{
	connection::Failure failure = {};
	bool ready = false;

	if (GetCurrentTimestamp() < session->lanes.open_at)
		return false;
	PGconn *conn =
		connection::Open(session->target, connection::DeadlineIn(guc::connect_timeout), &failure);

	if (conn != NULL)
		Guarded([&] { ready = GreetBeside(session, conn, &failure); },
				[&] { connection::Close(conn); });
	SetLatch(MyLatch); /* the waits may have swallowed a wake-up */
	if (!ready)
	{
		connection::Close(conn);
		session->lanes.open_at = GetCurrentTimestamp() + kOpenDelay;
		ereport(DEBUG1,
				(errmsg_internal("mmrepl: no further connection to server \"%s\": %s",
								 session->target->server_name,
								 failure.message != NULL ? failure.message : "another peer")));
		return false;
	}
	session->lanes.list[lane].conn = conn;
	session->feed.opened_at = connection::NotesOf(conn)->opened_at;
	MakeEvents(session);
	MMREPL_FAULT_POINT("worker-lane-opened");
	return true;
}

/* ---- which lane ---- */

/* Whether the batch may be executed before the one before it has committed. */
static bool
MayGoAhead(const Session *session)
{
	const Shipment *shipment = &session->shipments[session->outstanding - 1];
	const Shipment *before = shipment - 1;

	return session->lanes.draining && session->outstanding > 1 && shipment->turn && before->sent &&
		   before->turn && before->confirm_to > before->previous;
}

void
ChooseLane(Session *session, const Budget &budget)
{
	Shipment *shipment = &session->shipments[session->outstanding - 1];
	int lanes = UsableLanes(session);

	session->lanes.draining = session->feed.from_tables || IsFull(shipment, budget);
	shipment->turn = LanesSet(session) > 1 && !shipment->large && shipment->transactions > 0 &&
					 shipment->held == NULL;
	if (lanes > 1 && MayGoAhead(session))
	{
		int lane = (shipment[-1].lane + 1) % lanes;

		/* What was passed for this batch may not be there for a connection made after that. */
		if (LaneConn(session, lane) == NULL)
			(void) OpenLane(session, lane);
		else
		{
			shipment->ahead = true;
			shipment->lane = lane;
			session->lanes.used_at = GetCurrentTimestamp();
		}
	}
	if (shipment->turn)
		delivery::SetTurn(&shipment->batch, true, shipment->ahead);
}

/* ---- what became of it ---- */

/*
 * The victim of a deadlock may also be the one that is not ahead.  The parts of a
 * large transaction cannot be sent again.
 */
bool
IsLostAhead(const Session *session, const PGresult *res, int sqlstate)
{
	const Shipment *shipment = &session->shipments[session->lost];
	bool ahead = session->lost > 0 || shipment->ahead;

	if (connection::WasLost(AwaitedConn(session), res))
		return false;
	for (int i = session->lost; i < session->outstanding; i++)
	{
		const Shipment *each = &session->shipments[i];

		if (each->large && each->sent)
			return false;
		ahead |= sqlstate == ERRCODE_T_R_DEADLOCK_DETECTED && each->ahead && each->sent;
	}
	return ahead;
}

void
SendAgain(Session *session)
{
	Lanes &lanes = session->lanes;

	for (int i = 0; i < session->lost; i++)
	{
		Shipment *shipment = &session->shipments[i];

		shipment->failed = shipment->sent = shipment->ahead = false;
		shipment->lane = 0;
		shipment->results_due = 0;
		if (shipment->turn)
			delivery::SetTurn(&shipment->batch, true, false);
	}
	pg_atomic_fetch_add_u64(&session->shared->counters.batches_redone, session->lost);
	session->lost = 0;
	lanes.penalty = lanes.streak < kRuns ? Min(lanes.penalty * 2, kMostAlone) : 1;
	lanes.alone = lanes.penalty;
	lanes.streak = 0;
	lanes.group = Max(lanes.group * 3 / 4, kLeastChanges);
}

void
NoteLaneSuccess(Session *session, const Shipment *shipment)
{
	Lanes &lanes = session->lanes;

	if (!shipment->ahead)
	{
		lanes.alone = Max(lanes.alone - 1, 0);
		return;
	}
	pg_atomic_fetch_add_u64(&session->shared->counters.batches_ahead, 1);
	if (++lanes.streak % kStreak == 0)
		lanes.group = Min(lanes.group * 4 / 3, kMostChanges);
}

void
NoteLaneFailure(Session *session)
{
	session->lanes.alone = Max(session->lanes.alone, kAloneAfterFailure);
	session->lanes.draining = false;
	session->lanes.streak = 0;
}

} // namespace mmrepl::worker
