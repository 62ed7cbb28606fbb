/*
 * stream_pipeline.cpp
 *		Batches out, results in: several remote transactions on their way.
 *
 * Each batch is followed by a Sync, at once or later (stream_early.cpp), so it is a
 * transaction of its own at the peer.  The parts of a large transaction stand between two Syncs.  When a batch
 * fails, the one behind it is refused by apply()'s fence (its `previous` is not
 * reached), and the connection is given up: what was not applied is read again.
 * Where there are several connections (stream_lanes.cpp) answers are taken from
 * the one that has the oldest batch, and a batch that is not executed ahead waits
 * for those that are.
 */
#include "stream_session.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::worker
{

/* ---- out ---- */

/*
 * With synchronous_commit = off a transaction is visible before its commit
 * record is flushed.  The peer must not have what a crash here would lose.
 */
void
FlushCommits()
{
	XLogRecPtr lsn = pg_atomic_read_u64(&shmem::Get().commit_lsn);

	MMREPL_FAULT_POINT("worker-before-flush");
	if (lsn != 0)
		XLogFlush(lsn);
}

void
Broken(Session *session, PGconn *conn)
{
	connection::Failure failure = {};

	connection::Describe(conn, NULL, &failure);
	Fail(session, &failure, false);
}

/* Hand what is in the shipment's batch to libpq; false when the connection is lost. */
static bool
SendBatch(Session *session, Shipment *shipment)
{
	PGconn *conn = LaneConn(session, shipment->lane);

	MMREPL_FAULT_POINT("worker-batch-built");
	bool sent = delivery::Send(conn, &shipment->batch) &&
				(shipment->all_sent && shipment->held == NULL ? PQpipelineSync(conn)
															  : PQsendFlushRequest(conn));

	shipment->sent = true;
	shipment->results_due++;
	session->progress = true;
	pg_atomic_fetch_add_u64(&session->shared->counters.bytes_sent, shipment->batch.buf.len);
	if (!sent)
		Broken(session, conn);
	MMREPL_FAULT_POINT("worker-batch-sent");
	return sent;
}

/* The next part of a large transaction; false when the connection is lost. */
static bool
SendNextPart(Session *session, Shipment *shipment)
{
	NextPart(&session->feed, shipment, (int64) guc::batch_size * 1024);
	return SendBatch(session, shipment);
}

static Budget
BudgetOf(const Session *session)
{
	Budget budget;

	budget.bytes = (int64) guc::batch_size * 1024;
	budget.transactions = Min((int64) guc::batch_transactions, session->group_limit);
	budget.changes = PG_INT64_MAX;
	if (session->lanes.draining && UsableLanes(session) > 1)
		budget.changes = session->lanes.group;
	return budget;
}

bool
MayStart(const Session *session)
{
	int outstanding = session->outstanding;

	if (outstanding >= Room(session) || session->lost > 0 || IsHeld(session))
		return false;
	if (outstanding > 0)
	{
		const Shipment &last = session->shipments[outstanding - 1];

		/* Late transactions alone move no watermark: what is behind them would not miss them. */
		if (!last.sent || !last.all_sent || last.undone ||
			(last.late != NIL && last.confirm_to == last.previous))
			return false;
	}
	return session->shared->handover_requests == 0 && !session->shared->paused;
}

/* ---- pace ---- */

static void
NoteStart(Pace *pace, int64 transactions)
{
	pace->last = (pace->last + 1) % kPaced;
	pace->sum += transactions - pace->transactions[pace->last];
	pace->transactions[pace->last] = transactions;
	pace->started[pace->last] = GetCurrentTimestamp();
}

/* Whether the last batches began so many microseconds and more after each other, on the average. */
static bool
Took(const Session *session, int64 each)
{
	const Pace &pace = session->pace;
	TimestampTz first = pace.started[(pace.last + 1) % kPaced];
	TimestampTz now = GetCurrentTimestamp();

	/* Later than that it is only when the clock was set back. */
	return now >= first + kPaced * each || now < first;
}

bool
IsFrequent(const Session *session)
{
	return session->pace.sum >= 2 * kPaced && !Took(session, INT64CONST(50) * 1000);
}

bool
IsLeisurely(const Session *session)
{
	return session->pace.sum < 2 * kPaced && Took(session, 1000);
}

/*
 * Microseconds to wait before the next batch, so that more transactions share
 * its costs at both ends: while the last batches came close upon each other,
 * with more than one transaction each, and nobody waits to see his own arrive.
 */
static long
Breather(const Session *session)
{
	const Pace &pace = session->pace;
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz window = (TimestampTz) kPaced * guc::batch_delay;

	if (pace.sum < 2 * kPaced || now - pace.started[(pace.last + 1) % kPaced] > window)
		return 0;
	if (session->lanes.draining && UsableLanes(session) > 1)
		return 0;
	if (session->feed.from_tables || queue::SomebodyWatches(*session->shared) ||
		queue::PeekRing(*session->shared, session->slot) == NULL)
		return 0;
	return (long) Max(pace.started[pace.last] + guc::batch_delay - now, (TimestampTz) 0);
}

/*
 * Committing backends do not wake us, but for one that is going to wait, as sessions
 * at the fence do.  What the latch was set for before is looked at afterwards.
 */
static void
Gather(const Session *session)
{
	long left = MayStart(session) ? (Breather(session) + 999) / 1000 : 0; /* ms */

	if (left == 0)
		return;
	(void) pg_atomic_exchange_u64(&session->shared->looks_at, shmem::kBreather);
	ResetLatch(MyLatch);
	if (!queue::SomebodyWatches(*session->shared))
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, left,
						 PG_WAIT_EXTENSION);
	(void) pg_atomic_exchange_u64(&session->shared->looks_at, 0);
	SetLatch(MyLatch);
}

/* A batch that is not ahead goes over the first connection, behind others like it. */
static bool
MayGo(const Session *session, int index)
{
	for (int i = 0; i < index && !session->shipments[index].ahead; i++)
		if (session->shipments[i].ahead)
			return false;
	return true;
}

/* Send what waits to be sent, in order; false when the connection is lost. */
static bool
SendFilled(Session *session)
{
	for (int i = 0; i < session->outstanding && session->lost == 0; i++)
	{
		Shipment *shipment = &session->shipments[i];

		if (shipment->sent)
			continue;
		if (!MayGo(session, i))
			break;
		if (shipment->held == NULL)
			FlushCommits();
		if (!SendBatch(session, shipment))
			return false;
		/* Two parts of a large transaction are on their way, too. */
		if (!shipment->all_sent && !SendNextPart(session, shipment))
			return false;
	}
	return true;
}

/*
 * What goes into the next batch, if anything.  What was applied before a transaction
 * that is refused is confirmed, however long that blocks the stream.
 */
static bool
FillShipment(Session *session, Shipment *shipment, const Budget &budget)
{
	Feed *feed = &session->feed;

	if (SealShipment(feed, shipment, session->lanes.draining))
		return true;
	if (!feed->unsealed.first && NextShipment(feed, shipment, budget))
	{
		if (!Narrowing(session))
			Relax(feed, shipment, IsFull(shipment, budget));
		return true;
	}
	return feed->unsealed.first ? SealNow(feed, shipment)
								: SweepShipment(feed, shipment) || SealInPause(feed, shipment);
}

bool
Launch(Session *session)
{
	const Shipment &shipment = session->shipments[session->outstanding];

	session->feed.unsealed.sealing |= !shipment.relaxed;
	session->outstanding++;
	NoteStart(&session->pace, shipment.transactions);
	ChooseLane(session, BudgetOf(session));
	return SendFilled(session);
}

/* Fill and send one more batch; false when there is nothing to send. */
static bool
StartOne(Session *session)
{
	Shipment *shipment = &session->shipments[session->outstanding];
	Budget budget = BudgetOf(session);

	StartShipment(shipment, session->shipments_context);
	if (!FillShipment(session, shipment, budget))
	{
		EndShipment(shipment);
		session->lanes.draining = false;
		return false;
	}
	return Launch(session);
}

/* What libpq still has goes to the kernel, as far as that takes it. */
void
Flush(Session *session)
{
	for (int i = 0; i < guc::kMaxLanes && session->conn != NULL; i++)
	{
		PGconn *conn = LaneConn(session, i);
		int flushed = conn == NULL ? 0 : PQflush(conn);

		session->lanes.list[i].want_write = flushed == 1;
		if (flushed < 0)
			Broken(session, conn);
	}
}

void
Send(Session *session)
{
	Gather(session);
	while (session->conn != NULL && MayStart(session) && StartOne(session))
		;
	if (session->conn == NULL)
		return;
	if (session->outstanding == 0 && !session->shared->paused)
	{
		ConfirmPassed(&session->feed);
		StartEarly(session);
	}
	if (session->conn != NULL)
		Flush(session);
}

bool
Seal(Session *session)
{
	Shipment *shipment = &session->shipments[0];

	if (session->conn == NULL || !session->holds_lock || session->feed.unsealed.since == 0)
		return false;
	StartShipment(shipment, session->shipments_context);
	(void) SealNow(&session->feed, shipment);
	session->outstanding = 1;
	if (!SendFilled(session))
		return false;
	Flush(session);
	return session->outstanding > 0;
}

/* ---- in ---- */

static void
PopOldest(Session *session)
{
	EndShipment(&session->shipments[0]);
	for (int i = 1; i < session->outstanding; i++)
		session->shipments[i - 1] = session->shipments[i];
	session->outstanding--;
	session->shipments[session->outstanding] = {};
}

/* The oldest batch whose answer is not complete; NULL: none is on its way. */
static Shipment *
Awaited(Session *session)
{
	Shipment *shipment = &session->shipments[session->lost];

	return session->lost < session->outstanding && shipment->sent ? shipment : NULL;
}

PGconn *
AwaitedConn(const Session *session)
{
	const Shipment *shipment = Awaited((Session *) session);

	return LaneConn(session, shipment != NULL ? shipment->lane : 0);
}

/* One apply() has returned. */
static void
TakeResult(Session *session, Shipment *shipment, const PGresult *res)
{
	shipment->results_due--;
	MMREPL_FAULT_POINT("worker-answer");
	if (shipment->undone)
		return;
	if (!shipment->all_sent)
	{
		MMREPL_FAULT_POINT("worker-part-answer");
		(void) SendNextPart(session, shipment);
	}
	if (session->conn == NULL || shipment->results_due > 0)
		return; /* given up, or the answer to a part that is not the last */
	uint64 watermark = delivery::ReadWatermark(res);

	if (watermark >= shipment->confirm_to)
	{
		/* Those before it are there by other means: a session that was given up.  They are asked for. */
		shipment->failed = session->lost > 0;
		return;
	}
	connection::Failure failure = {};

	failure.sqlstate = ERRCODE_MMREPL_OUT_OF_ORDER;
	failure.message =
		psprintf("the peer stands at ticket %llu after a batch that ends at %llu",
				 (unsigned long long) watermark, (unsigned long long) shipment->confirm_to);
	Fail(session, &failure, true);
}

/* The peer refused, or lost, the oldest batch. */
static void
TakeFailure(Session *session, Shipment *shipment, const PGresult *res)
{
	connection::Failure failure = {};
	bool early = shipment->held != NULL || shipment->undone;

	connection::Describe(AwaitedConn(session), res, &failure);
	if (early && !connection::WasLost(AwaitedConn(session), res))
		RefuseEarly(session, failure.message);
	else if (IsLostAhead(session, res, failure.sqlstate))
		shipment->failed = true;
	else
		Fail(session, &failure, !early);
}

/* It has failed, and so do all that were sent behind it; when all have, they are sent again. */
static void
TakeLoss(Session *session)
{
	session->lost++;
	if (Awaited(session) == NULL)
		SendAgain(session);
}

/* The oldest batch is committed at the peer. */
static void
TakeSync(Session *session)
{
	MMREPL_FAULT_POINT("worker-peer-committed");
	NoteLaneSuccess(session,
					&session->shipments[0]); /* before it is confirmed, as what else is counted */
	Applied(&session->feed, &session->shipments[0]);
	MMREPL_FAULT_POINT("worker-applied");
	PopOldest(session);
	NoteSuccess(session);
}

static void
Dispatch(Session *session, const PGresult *res)
{
	Shipment *shipment = Awaited(session);

	session->progress = true;
	if (shipment == NULL)
		return;
	switch (PQresultStatus(res))
	{
		case PGRES_TUPLES_OK:
			TakeResult(session, shipment, res);
			break;
		case PGRES_PIPELINE_SYNC:
			if (shipment->undone)
				PopOldest(session);
			else if (shipment->failed)
				TakeLoss(session);
			else
				TakeSync(session);
			break;
		case PGRES_COMMAND_OK:
		case PGRES_PIPELINE_ABORTED:
			break;
		default:
			TakeFailure(session, shipment, res);
			break;
	}
}

/* Read what has come, over every connection; what is not awaited yet is kept by libpq. */
static void
Consume(Session *session)
{
	for (int i = 0; i < guc::kMaxLanes && session->conn != NULL; i++)
	{
		PGconn *conn = LaneConn(session, i);

		if (conn != NULL && !PQconsumeInput(conn))
			Broken(session, conn);
	}
}

/* Take every result that has arrived; false when the connection was given up. */
bool
Receive(Session *session)
{
	int nulls = 0;

	Consume(session);
	while (session->conn != NULL && nulls < 2 && !PQisBusy(AwaitedConn(session)))
	{
		PGresult *res = PQgetResult(AwaitedConn(session));

		nulls = res == NULL ? nulls + 1 : 0;
		if (res == NULL)
			continue;
		Ensured([&] { Dispatch(session, res); }, [&] { PQclear(res); });
	}
	for (int i = 0; i < guc::kMaxLanes && session->conn != NULL; i++)
		if (PGconn *conn = LaneConn(session, i); conn != NULL && PQstatus(conn) == CONNECTION_BAD)
			Broken(session, conn);
	/* Also while nothing new is started: what was filled goes out before anybody else delivers. */
	if (session->conn != NULL && SendFilled(session))
		Flush(session);
	return session->conn != NULL;
}

} // namespace mmrepl::worker
