/*
 * steer.cpp
 *		pause, resume, retry_now, skip, wait_for_replay.
 */
#include "mmrepl/fault.hpp"
#include "mmrepl/transaction.hpp"
#include "worker_steer.hpp"

namespace mmrepl::worker
{

/* ---- streams of a server ---- */

/* The shared slot of a stream, taken now if no scout has been there yet. */
int
RequireSlot(const catalog::StreamRow *row)
{
	queue::EnsureReady(); /* and refuse on a standby */
	return queue::RequireSlot(*row);
}

/*
 * The server's streams that the caller may steer: those whose owner's privileges
 * it has.  Raises when the server does not exist or all of them are others'.
 */
List *
StreamsToSteer(const char *server_name)
{
	Oid server = get_foreign_server_oid(server_name, false);
	bool others;

	queue::EnsureReady();
	List *mine = catalog::StreamsToSteer(server, &others);

	if (mine == NIL && others)
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
						errmsg("permission denied for replication to server \"%s\"", server_name),
						errdetail("Only owners of its pairs and superusers may do that.")));
	return mine;
}

static List *
RequireStreams(FunctionCallInfo fcinfo)
{
	shmem::RequireReady();
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("server name must not be null")));
	const char *name = NameStr(*PG_GETARG_NAME(0));
	List *streams = StreamsToSteer(name);

	if (streams == NIL)
		ereport(ERROR, (errcode(ERRCODE_MMREPL_NO_SUCH_PAIR),
						errmsg("nothing is replicated to server \"%s\"", name),
						errhint("Register a table with mmrepl.create_pair().")));
	return streams;
}

/* ---- pause, resume, retry ---- */

/* Takes effect at once; the row makes it outlive a restart. */
static void
SetPaused(const catalog::StreamRow *row, bool paused)
{
	int slot = RequireSlot(row);
	shmem::Stream &stream = shmem::Get().streams[slot];

	if (!catalog::SetPaused(row->id, paused))
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("replication stream %d was dropped meanwhile", row->id)));
	stats::SetPaused(stream, paused);
	pg_memory_barrier();
	transaction::WakeWorkersAtCommit();
	transaction::WakeStreamAtEnd(slot);
	shmem::WakeWorker(stream);
}

static Datum
PauseOrResume(FunctionCallInfo fcinfo, bool paused)
{
	ListCell *cell;

	foreach(cell, RequireStreams(fcinfo))
		SetPaused((const catalog::StreamRow *) lfirst(cell), paused);
	PG_RETURN_VOID();
}

Datum
SqlPause(FunctionCallInfo fcinfo)
{
	return PauseOrResume(fcinfo, true);
}

Datum
SqlResume(FunctionCallInfo fcinfo)
{
	return PauseOrResume(fcinfo, false);
}

Datum
SqlRetryNow(FunctionCallInfo fcinfo)
{
	ListCell *cell;

	foreach(cell, RequireStreams(fcinfo))
		shmem::RequestRetry(
			shmem::Get().streams[RequireSlot((const catalog::StreamRow *) lfirst(cell))]);
	PG_RETURN_VOID();
}

Datum
SqlAcceptPeer(FunctionCallInfo fcinfo)
{
	ListCell *cell;

	foreach(cell, RequireStreams(fcinfo))
	{
		const catalog::StreamRow *row = (const catalog::StreamRow *) lfirst(cell);
		int slot = RequireSlot(row);

		if (!catalog::ForgetAcked(row->id))
			ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
							errmsg("replication stream %d was dropped meanwhile", row->id)));
		pg_atomic_write_u64(&shmem::Get().streams[slot].acked, 0);
	}
	transaction::WakeWorkersAtCommit();
	PG_RETURN_VOID();
}

/* ---- waiting ---- */

pg_attribute_noreturn() static void RefuseToWait(const char *server)
{
	ereport(ERROR,
			(errcode(ERRCODE_MMREPL_NEEDS_RESYNC), errmsg("server \"%s\" needs a resync", server),
			 errdetail("Too much was waiting for it: what is committed here is not queued "
					   "any more."),
			 errhint("SELECT mmrepl.resync(%s);", quote_literal_cstr(server))));
}

/*
 * What the peer had confirmed is there, unless it was found to have lost it since, and
 * nobody has accepted that.
 */
static void
RequireNothingLost(shmem::Stream &stream, const char *server)
{
	if (pg_atomic_read_u64(&stream.lost) == 0 || pg_atomic_read_u64(&stream.acked) == 0)
		return;
	ereport(ERROR, (errcode(ERRCODE_MMREPL_REWOUND),
					errmsg("server \"%s\" has lost changes that it had confirmed", server),
					errhint("Bring its tables up to date, then run SELECT mmrepl.accept_peer(%s).",
							quote_literal_cstr(server))));
}

static void
RequireOrderly(shmem::Stream &stream, int32 id, const char *server)
{
	if (queue::NeedsResync(id))
		RefuseToWait(server);
	RequireNothingLost(stream, server);
}

/* Wait until all that was committed here on the stream before now is at the peer; false: not in time. */
static bool
AwaitStream(const catalog::StreamRow *row, const char *server, TimestampTz deadline)
{
	for (;;)
	{
		shmem::Stream &stream = shmem::Get().streams[RequireSlot(row)];
		queue::Goal goal = queue::CurrentGoal(stream, row->id);

		RequireOrderly(stream, row->id, server);
		shmem::WakeWorker(stream);
		bool reached = queue::WaitConfirmed(stream, goal, deadline);

		if (queue::IsCurrent(stream, goal))
			RequireOrderly(stream, row->id, server);
		if (reached)
			return true;
		if (queue::IsCurrent(stream, goal) || GetCurrentTimestamp() >= deadline)
			return false;
		CHECK_FOR_INTERRUPTS(); /* the slot has another use: once more, where the stream is now */
	}
}

Datum
SqlWaitForReplay(FunctionCallInfo fcinfo)
{
	ListCell *cell;
	bool reached = true;

	shmem::RequireReady();
	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
						errmsg("server and timeout must not be null")));
	TimestampTz deadline = DatumGetTimestampTz(
		DirectFunctionCall2(timestamptz_pl_interval, TimestampTzGetDatum(GetCurrentTimestamp()),
							PointerGetDatum(PG_GETARG_INTERVAL_P(1))));

	foreach(cell, StreamsToSteer(NameStr(*PG_GETARG_NAME(0))))
		reached &= AwaitStream((const catalog::StreamRow *) lfirst(cell),
							   NameStr(*PG_GETARG_NAME(0)), deadline);
	PG_RETURN_BOOL(reached);
}

/* ---- the ordering lock, from a session ---- */

/*
 * Take the stream's ordering lock until the end of the transaction; its worker
 * gives it up as soon as nothing is on its way, and is woken afterwards.
 */
void
TakeOver(const catalog::StreamRow *row, int slot)
{
	shmem::Stream &stream = shmem::Get().streams[slot];
	uint64 use = stream.epoch;
	auto request = [&](int by) {
		SpinLockAcquire(&stream.mutex);
		if (stream.epoch == use) /* else the slot is another stream's, or counts anew */
			stream.handover_requests += by;
		SpinLockRelease(&stream.mutex);
	};

	request(1);
	shmem::WakeWorker(stream);
	EnsuredAtExit([&] { (void) queue::TakeOrderingLock(row->id, false, true, NULL); },
				  [&] { request(-1); });
	transaction::WakeStreamAtEnd(slot);
}

/* ---- skip ---- */

struct Skipped
{
	ArrayBuildState *queries;
	int64 changes;
	int64 bytes;
};

/* SegmentSink: the SQL of each change, for the record. */
static void
RecordSegment(void *arg, const char *data, uint32 length)
{
	Skipped *skipped = (Skipped *) arg;
	change::Decoder decoder;
	const change::Change *change;
	queue::SqlWriter writer = {};

	change::StartDecoding(&decoder, data, length);
	while ((change = change::Next(&decoder)) != NULL)
	{
		StringInfoData sql;

		initStringInfo(&sql);
		queue::AppendSql(&sql, &writer, change);
		skipped->queries = accumArrayResult(skipped->queries, CStringGetTextDatum(sql.data), false,
											TEXTOID, CurrentMemoryContext);
		skipped->changes++;
		skipped->bytes += sql.len;
		pfree(sql.data);
	}
}

static void
InsertSkipped(int32 stream, const char *server, const queue::Ref &ref, Skipped *skipped,
			  text *reason)
{
	Relation rel = table_open(catalog::GetRelations().skipped, RowExclusiveLock);
	int columns = RelationGetDescr(rel)->natts; /* a newer version may have more */
	Datum *values = (Datum *) palloc0(sizeof(Datum) * columns);
	bool *nulls = (bool *) palloc0(sizeof(bool) * columns);

	values[0] = DirectFunctionCall1(namein, CStringGetDatum(server));
	values[1] = Int64GetDatum((int64) ref.ticket);
	values[2] = Int64GetDatum((int64) ref.xid);
	values[3] = Int64GetDatum(skipped->changes);
	values[4] = makeArrayResult(skipped->queries, CurrentMemoryContext);
	values[5] = PointerGetDatum(reason);
	values[6] = DirectFunctionCall1(namein, CStringGetDatum(GetUserNameFromId(GetUserId(), false)));
	values[7] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[8] = Int32GetDatum(stream);
	for (int i = 9; i < columns; i++)
		nulls[i] = true;
	simple_heap_insert(rel, heap_form_tuple(RelationGetDescr(rel), values, nulls));
	table_close(rel, RowExclusiveLock);
}

/* Drop the transaction from the stream, on the record; false: it is not queued there. */
static bool
SkipIn(const catalog::StreamRow *row, const char *server, uint64 ticket, text *reason,
	   int64 *changes)
{
	int slot = RequireSlot(row);
	shmem::Stream &stream = shmem::Get().streams[slot];
	Skipped skipped = {};
	queue::Ref ref = {};

	TakeOver(row, slot);
	if (!queue::FindHead(row->id, ticket, &ref))
		return false;
	if (pg_atomic_read_u64(&stream.confirmed) >= ticket && !(ref.flags & queue::kPrepared))
		return false;
	if (pg_atomic_read_u64(&stream.discarded) >= ticket)
		return false;
	skipped.queries = initArrayResult(TEXTOID, CurrentMemoryContext, false);
	queue::ReadSegments(ref, row->id, RecordSegment, &skipped);
	MMREPL_FAULT_POINT("skip-read");
	InsertSkipped(row->id, server, ref, &skipped, reason);
	MMREPL_FAULT_POINT("skip-recorded");
	(void) queue::RemoveHead(ref);
	MMREPL_FAULT_POINT("skip-removed");
	queue::Discount(stream, 1, ref.changes, ref.bytes);
	/* Not before the end of this transaction: it may be prepared at the peer, and is to be rolled back. */
	transaction::RetryAtCommit(slot, (ref.flags & queue::kTwoPhase) != 0);
	*changes = skipped.changes;
	return true;
}

/* Why the transaction is dropped: whoever finds the tables different will ask. */
static text *
RequireReason(FunctionCallInfo fcinfo)
{
	text *reason = PG_ARGISNULL(2) ? NULL : PG_GETARG_TEXT_PP(2);
	int at = 0;
	int length = reason == NULL ? 0 : VARSIZE_ANY_EXHDR(reason);

	while (at < length && isspace((unsigned char) VARDATA_ANY(reason)[at]))
		at++;
	if (at == length)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("a transaction is not dropped without a reason"),
				 errhint("Say why, for the record in mmrepl.skipped: mmrepl.skip(server, ticket, "
						 "'reason').")));
	return reason;
}

Datum
SqlSkip(FunctionCallInfo fcinfo)
{
	List *streams = RequireStreams(fcinfo);
	const char *server = NameStr(*PG_GETARG_NAME(0));
	int64 changes = 0;
	ListCell *cell;

	if (PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("ticket must not be null")));
	uint64 ticket = (uint64) PG_GETARG_INT64(1);
	text *reason = RequireReason(fcinfo);

	foreach(cell, streams)
		if (SkipIn((const catalog::StreamRow *) lfirst(cell), server, ticket, reason, &changes))
			PG_RETURN_INT64(changes);
	ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
					errmsg("no transaction with ticket %llu is queued for server \"%s\"",
						   (unsigned long long) ticket, server),
					errhint("See column \"ticket\" of mmrepl.sync_err_rec.")));
}

} // namespace mmrepl::worker
