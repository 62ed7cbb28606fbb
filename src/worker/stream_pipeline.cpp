/*
 * stream_pipeline.cpp
 *		Batches out, results in: up to kLanes remote transactions on their way.
 *
 * Each batch is followed by a Sync, so it is a transaction of its own at the
 * peer.  The parts of a large transaction stand between two Syncs.  When a batch
 * fails, the one behind it is refused by apply()'s fence (its `previous` is not
 * reached), and the connection is given up: what was not applied is read again.
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
static void
FlushCommits()
{
	XLogRecPtr lsn = pg_atomic_read_u64(&shmem::Get().commit_lsn);

	if (lsn != 0)
		XLogFlush(lsn);
}

static void
Broken(Session *session)
{
	connection::Failure failure = {};

	connection::Describe(session->conn, NULL, &failure);
	Fail(session, &failure, false);
}

/* Hand what is in the shipment's batch to libpq; false when the connection is lost. */
static bool
SendBatch(Session *session, Shipment *shipment)
{
	MMREPL_FAULT_POINT("worker-batch-built");
	bool sent =
		delivery::Send(session->conn, &shipment->batch) &&
		(shipment->all_sent ? PQpipelineSync(session->conn) : PQsendFlushRequest(session->conn));

	shipment->results_due++;
	session->progress = true;
	pg_atomic_fetch_add_u64(&session->shared->counters.bytes_sent, shipment->batch.buf.len);
	if (!sent)
		Broken(session);
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
	return budget;
}

bool
MayStart(const Session *session)
{
	if (session->outstanding == kLanes)
		return false;
	if (session->outstanding > 0 && !session->lanes[session->outstanding - 1].all_sent)
		return false;
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
	if (session->feed.from_tables || queue::SomebodyWaits(*session->shared) ||
		queue::PeekRing(*session->shared, session->slot) == NULL)
		return 0;
	return (long) Max(pace.started[pace.last] + guc::batch_delay - now, (TimestampTz) 0);
}

/*
 * Asleep without the latch: committing backends need not signal us.  Whatever
 * they set is seen afterwards.
 */
static void
Gather(const Session *session)
{
	long left = MayStart(session) ? Breather(session) : 0;

	if (left > 0)
		pg_usleep(left);
}

/* Fill and send one more batch; false when there is nothing to send. */
static bool
StartOne(Session *session)
{
	Shipment *shipment = &session->lanes[session->outstanding];

	StartShipment(shipment, session->shipments_context);
	if (!NextShipment(&session->feed, shipment, BudgetOf(session)) &&
		!SweepShipment(&session->feed, shipment))
	{
		EndShipment(shipment);
		return false;
	}
	session->outstanding++;
	NoteStart(&session->pace, shipment->transactions);
	MMREPL_FAULT_POINT("worker-before-flush");
	FlushCommits();
	if (!SendBatch(session, shipment))
		return false;
	/* Two parts of a large transaction are on their way, too. */
	return shipment->all_sent || SendNextPart(session, shipment);
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
		ConfirmPassed(&session->feed);
	int flushed = PQflush(session->conn);

	session->want_write = flushed == 1;
	if (flushed < 0)
		Broken(session);
}

/* ---- in ---- */

static void
PopOldest(Session *session)
{
	EndShipment(&session->lanes[0]);
	for (int i = 1; i < session->outstanding; i++)
		session->lanes[i - 1] = session->lanes[i];
	session->outstanding--;
	session->lanes[session->outstanding] = {};
}

/* One apply() has returned. */
static void
TakeResult(Session *session, const PGresult *res)
{
	Shipment *shipment = &session->lanes[0];

	shipment->results_due--;
	MMREPL_FAULT_POINT("worker-answer");
	if (!shipment->all_sent)
	{
		MMREPL_FAULT_POINT("worker-part-answer");
		(void) SendNextPart(session, shipment);
	}
	if (session->conn == NULL || shipment->results_due > 0)
		return; /* given up, or the answer to a part that is not the last */
	uint64 watermark = delivery::ReadWatermark(res);

	if (watermark >= shipment->confirm_to)
		return;
	connection::Failure failure = {};

	failure.sqlstate = ERRCODE_MMREPL_OUT_OF_ORDER;
	failure.message =
		psprintf("the peer stands at ticket %llu after a batch that ends at %llu",
				 (unsigned long long) watermark, (unsigned long long) shipment->confirm_to);
	Fail(session, &failure, true);
}

/* The peer refused, or lost, the oldest batch. */
static void
TakeFailure(Session *session, const PGresult *res)
{
	connection::Failure failure = {};

	connection::Describe(session->conn, res, &failure);
	Fail(session, &failure, true);
}

/* The oldest batch is committed at the peer. */
static void
TakeSync(Session *session)
{
	MMREPL_FAULT_POINT("worker-peer-committed");
	Applied(&session->feed, &session->lanes[0]);
	MMREPL_FAULT_POINT("worker-applied");
	PopOldest(session);
	NoteSuccess(session);
}

static void
Dispatch(Session *session, const PGresult *res)
{
	session->progress = true;
	if (session->outstanding == 0)
		return;
	switch (PQresultStatus(res))
	{
		case PGRES_TUPLES_OK:
			TakeResult(session, res);
			break;
		case PGRES_PIPELINE_SYNC:
			TakeSync(session);
			break;
		case PGRES_COMMAND_OK:
		case PGRES_PIPELINE_ABORTED:
			break;
		default:
			TakeFailure(session, res);
			break;
	}
}

/* Take every result that has arrived; false when the connection was given up. */
bool
Receive(Session *session)
{
	int nulls = 0;

	if (!PQconsumeInput(session->conn))
	{
		Broken(session);
		return false;
	}
	while (session->conn != NULL && nulls < 2 && !PQisBusy(session->conn))
	{
		PGresult *res = PQgetResult(session->conn);

		nulls = res == NULL ? nulls + 1 : 0;
		if (res == NULL)
			continue;
		Ensured([&] { Dispatch(session, res); }, [&] { PQclear(res); });
	}
	if (session->conn != NULL && PQstatus(session->conn) == CONNECTION_BAD)
		Broken(session);
	return session->conn != NULL;
}

} // namespace mmrepl::worker
