/*
 * deal.cpp
 *		mmrepl.deal_sync_err_rec(): drain by hand, in the caller's session.
 *
 * It holds the stream's ordering lock until the caller's transaction ends, as the
 * worker holds it while it delivers: never both, and nothing is overtaken.  What
 * was delivered is committed at the peer, whatever becomes of the caller's
 * transaction.
 */
#include "worker_steer.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::worker
{

/* Oldest unconfirmed transaction of a stream; 0: none. */
static uint64
OldestOf(const catalog::StreamRow *row, int slot)
{
	uint64 after = pg_atomic_read_u64(&shmem::Get().streams[slot].confirmed);
	queue::Survey survey = {};
	queue::Collected waiting = queue::Collect(row->id, after, PG_UINT64_MAX, 1, &survey);

	return waiting.count == 0 ? 0 : waiting.refs[0].ticket;
}

/* The caller's stream that has waited longest; NULL: nothing waits.  One that was given up is not well. */
static catalog::StreamRow *
LongestWaiting(bool *all_well)
{
	catalog::StreamRow *chosen = NULL;
	uint64 oldest = PG_UINT64_MAX;
	ListCell *cell;

	foreach(cell, catalog::AllStreams())
	{
		catalog::StreamRow *row = (catalog::StreamRow *) lfirst(cell);

		if (!has_privs_of_role(GetUserId(), row->owner))
			continue;
		if (row->needs_resync)
		{
			ereport(WARNING, (errcode(ERRCODE_MMREPL_NEEDS_RESYNC),
							  errmsg("server \"%s\" needs a resync", NameStr(row->server_name)),
							  errhint("SELECT mmrepl.resync(%s);",
									  quote_literal_cstr(NameStr(row->server_name)))));
			*all_well = false;
			continue;
		}
		uint64 ticket = OldestOf(row, RequireSlot(row));

		if (ticket == 0 || ticket >= oldest)
			continue;
		oldest = ticket;
		chosen = row;
	}
	return chosen;
}

/* Hand one shipment over and wait until the peer has committed it; raises otherwise. */
static void
Deliver(PGconn *conn, const char *server, Feed *feed, Shipment *shipment)
{
	TimestampTz deadline = connection::DeadlineIn(guc::sync_timeout);

	if (shipment->large)
		PQclear(connection::Exec(conn, server, "BEGIN", deadline));
	for (;;)
	{
		PGresult *res = NULL;
		PGresult *last = NULL;

		MMREPL_FAULT_POINT("deal-batch-built");
		if (!delivery::Send(conn, &shipment->batch))
			connection::Report(conn, NULL, server, "mmrepl.apply()");
		while ((res = connection::GetResult(conn, deadline)) != NULL)
		{
			PQclear(last);
			last = res;
		}
		if (PQresultStatus(last) != PGRES_TUPLES_OK)
			connection::Report(conn, last, server, "mmrepl.apply()");
		PQclear(last);
		MMREPL_FAULT_POINT("deal-answer");
		pg_atomic_fetch_add_u64(&feed->shared->counters.bytes_sent, shipment->batch.buf.len);
		if (shipment->all_sent)
			break;
		deadline = connection::DeadlineIn(guc::sync_timeout);
		NextPart(feed, shipment, (int64) guc::batch_size * 1024);
	}
	if (shipment->large)
	{
		MMREPL_FAULT_POINT("deal-large-sent");
		PQclear(connection::Exec(conn, server, "COMMIT", deadline));
	}
	MMREPL_FAULT_POINT("deal-peer-committed");
	Applied(feed, shipment);
	MMREPL_FAULT_POINT("deal-applied");
}

/* Drain up to the limit over an open connection. */
static void
DrainOver(PGconn *conn, const char *server, Feed *feed, int64 limit)
{
	delivery::Peer peer = delivery::Hello(conn, server, feed->node, feed->stream,
										  connection::DeadlineIn(guc::connect_timeout));
	Budget budget = {(int64) guc::batch_size * 1024, guc::batch_transactions, limit};
	RecoveryPlace place = {conn, server, feed->node, feed->stream, feed->shared, NULL};
	connection::Failure failure = {};
	Leftovers left;

	if (!RecoverPrepared(place, &left, &failure))
		connection::ReportFailure(&failure, server, NULL);

	ResetFeed(feed, peer);
	while (budget.changes > 0)
	{
		Shipment shipment;

		CHECK_FOR_INTERRUPTS();
		StartShipment(&shipment, CurrentMemoryContext);
		if (!NextShipment(feed, &shipment, budget) && !SealNow(feed, &shipment))
		{
			EndShipment(&shipment);
			break;
		}
		XLogFlush(pg_atomic_read_u64(&shmem::Get().commit_lsn));
		Deliver(conn, server, feed, &shipment);
		budget.changes -= Max(shipment.changes, 1);
		EndShipment(&shipment);
	}
}

static void
Drain(const catalog::StreamRow *row, int64 limit)
{
	int slot = RequireSlot(row);
	connection::Failure failure = {};
	Feed feed;

	TakeOver(row, slot);
	MMREPL_FAULT_POINT("deal-locked");
	connection::Target *target = connection::Resolve(row->server, row->owner);
	PGconn *conn = connection::Open(target, connection::DeadlineIn(guc::connect_timeout), &failure);

	if (conn == NULL)
		connection::ReportFailure(&failure, target->server_name, NULL);
	Ensured(
		[&] {
			StartFeed(&feed, row->id, slot, true);
			DrainOver(conn, target->server_name, &feed, limit);
		},
		[&] { connection::Close(conn); });
	FreeFeed(&feed);
}

/* The 2013 function returned; so does this: what went wrong is a WARNING. */
static bool
DrainQuietly(const catalog::StreamRow *row, int64 limit)
{
	ErrorData *error = Attempted([&] { Drain(row, limit); });

	if (error == NULL)
		return true;
	if (error->sqlerrcode == ERRCODE_QUERY_CANCELED)
		ReThrowError(error);
	ereport(WARNING, (errcode(error->sqlerrcode),
					  errmsg("changes could not be delivered: %s", error->message),
					  error->detail != NULL ? errdetail_internal("%s", error->detail) : 0,
					  error->hint != NULL ? errhint("%s", error->hint) : 0,
					  error->context != NULL ? (errcontext("%s", error->context)) : 0));
	return false;
}

Datum
SqlDeal(FunctionCallInfo fcinfo)
{
	if (RecoveryInProgress())
	{
		ereport(NOTICE, (errmsg("this is a standby"),
						 errdetail("Queued changes are delivered by the primary.")));
		PG_RETURN_BOOL(false);
	}
	shmem::RequireReady();
	int64 limit = PG_ARGISNULL(0) ? PG_INT64_MAX : PG_GETARG_INT32(0);

	if (limit < 1)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("limit must be at least 1"),
				 errhint("Whole transactions are delivered, at least one.")));
	queue::EnsureReady();
	bool all_well = true;
	catalog::StreamRow *row = LongestWaiting(&all_well);

	PG_RETURN_BOOL((row == NULL || DrainQuietly(row, limit)) && all_well);
}

} // namespace mmrepl::worker
