/*
 * stats_views.cpp
 *		The SQL function below pg_stat_mmrepl, and what sets counters to zero.
 */
#include "stats_internal.hpp"

namespace mmrepl::stats
{

/* ---- who may see what ---- */

bool
MaySeeData(Oid owner)
{
	return superuser() || has_privs_of_role(GetUserId(), owner);
}

bool
MaySeeStatistics(Oid owner)
{
	return MaySeeData(owner) || has_privs_of_role(GetUserId(), ROLE_PG_READ_ALL_STATS);
}

Datum
SqlMaySeeStatistics(FunctionCallInfo fcinfo)
{
	PG_RETURN_BOOL(MaySeeStatistics(PG_GETARG_OID(0)));
}

/* ---- a row under construction ---- */

constexpr int kMaxColumns = 32;

struct RowBuilder
{
	int count;
	Datum values[kMaxColumns];
	bool nulls[kMaxColumns];

	void Add(Datum value)
	{
		nulls[count] = false;
		values[count++] = value;
	}
	void AddNull()
	{
		nulls[count] = true;
		values[count++] = (Datum) 0;
	}
	/* NULL unless known. */
	void AddIf(bool known, Datum value)
	{
		if (known)
			Add(value);
		else
			AddNull();
	}
	/* A count, or another number that is never NULL. */
	void AddCount(pg_atomic_uint64 *counter)
	{
		Add(Int64GetDatum((int64) pg_atomic_read_u64(counter)));
	}
	/* A backlog: its parts are taken off one by one, so it may be short of zero for a moment. */
	void AddBacklog(pg_atomic_uint64 *counter)
	{
		Add(Int64GetDatum(Max((int64) pg_atomic_read_u64(counter), (int64) 0)));
	}
	/* A ticket or a time, for which zero means that there is none. */
	void AddUnlessZero(int64 value) { AddIf(value != 0, Int64GetDatum(value)); }
};

/* Send the row to the function's result. */
static void
PutRow(ReturnSetInfo *result, RowBuilder *row)
{
	MmreplEnsure(row->count == result->setDesc->natts, "row has %d columns instead of %d",
				 row->count, result->setDesc->natts);
	tuplestore_putvalues(result->setResult, result->setDesc, row->values, row->nulls);
}

/* ---- streams ---- */

/* What locks guard in a stream's block, copied. */
struct Sample
{
	int32 id;
	Oid owner;
	bool peer_known;
	pg_uuid_t peer_node;
	shmem::WorkerState state;
	int pid;
	uint64 last_ticket;
	int consecutive_failures;
	TimestampTz next_retry_at;
	TimestampTz last_error_at;
	TimestampTz last_apply_at;
	int64 last_lag_us;
	uint64 blocked_ticket;
	char last_error[shmem::kErrorLength];
	char last_error_sqlstate[6];
};

/*
 * A pause counts from the call on, and a state that only a running worker can be in
 * is that of a worker to come when none runs.
 */
shmem::WorkerState
ShownState(const shmem::Stream &stream)
{
	using shmem::WorkerState;

	if (stream.paused)
		return WorkerState::Paused;
	if (stream.worker_pid == 0 &&
		(stream.state == WorkerState::Streaming || stream.state == WorkerState::CatchingUp))
		return WorkerState::Starting;
	return stream.state;
}

/* Copy what the stream's spinlock guards. */
static void
CopyGuarded(shmem::Stream &stream, Sample *sample)
{
	SpinLockAcquire(&stream.mutex);
	sample->peer_known = stream.peer_known;
	sample->peer_node = stream.peer_node;
	sample->state = ShownState(stream);
	sample->pid = stream.worker_pid;
	sample->consecutive_failures = stream.consecutive_failures;
	sample->next_retry_at = stream.next_retry_at;
	sample->last_error_at = stream.last_error_at;
	sample->last_apply_at = stream.last_apply_at;
	sample->last_lag_us = stream.last_lag_us;
	sample->blocked_ticket = stream.blocked_ticket;
	memcpy(sample->last_error, stream.last_error, sizeof(sample->last_error));
	memcpy(sample->last_error_sqlstate, stream.last_error_sqlstate,
		   sizeof(sample->last_error_sqlstate));
	SpinLockRelease(&stream.mutex);
}

/* Fill the sample from a slot; false when it is no stream of this database. */
static bool
TakeSample(shmem::Stream &stream, Sample *sample)
{
	shmem::State &state = shmem::Get();

	LWLockAcquire(state.registry, LW_SHARED);
	if (!stream.in_use || stream.database != MyDatabaseId)
	{
		LWLockRelease(state.registry);
		return false;
	}
	sample->id = stream.id;
	sample->owner = stream.owner;
	SpinLockAcquire(&state.clock_mutex);
	sample->last_ticket = stream.last_ticket;
	SpinLockRelease(&state.clock_mutex);
	CopyGuarded(stream, sample);
	LWLockRelease(state.registry);
	return true;
}

/*
 * The age of the oldest transaction that is not confirmed; when none waits, how
 * long the newest confirmed one took; NULL when there was none.
 */
static void
AddReplayLag(RowBuilder *row, const Sample &sample, uint64 oldest_ticket)
{
	int64 lag = sample.last_lag_us;

	if (oldest_ticket != 0)
		lag = GetCurrentTimestamp() - shmem::TicketTime(oldest_ticket);
	else if (sample.last_apply_at == 0)
	{
		row->AddNull();
		return;
	}

	Interval *interval = (Interval *) palloc0(sizeof(Interval));

	interval->time = Max(lag, (int64) 0);
	row->Add(IntervalPGetDatum(interval));
}

/* The columns from queue_transactions to confirmed_ticket. */
static void
AddQueue(RowBuilder *row, shmem::Stream &stream, const Sample &sample)
{
	uint64 oldest = pg_atomic_read_u64(&stream.oldest_ticket);

	row->AddBacklog(&stream.queued_transactions);
	row->AddBacklog(&stream.queued_changes);
	row->AddBacklog(&stream.queued_bytes);
	row->AddIf(oldest != 0, TimestampTzGetDatum(shmem::TicketTime(oldest)));
	AddReplayLag(row, sample, oldest);
	row->AddUnlessZero((int64) sample.last_ticket);
	row->AddUnlessZero((int64) pg_atomic_read_u64(&stream.confirmed));
}

/* The last error; detail and context, which may show rows, to those only who may see these. */
static Datum
ShownError(const Sample &sample)
{
	const char *error = sample.last_error;
	int length = (int) (MaySeeData(sample.owner) ? strlen(error) : strcspn(error, "\n"));

	return PointerGetDatum(cstring_to_text_with_len(error, length));
}

/* The columns from consecutive_failures to last_error_at. */
static void
AddFailures(RowBuilder *row, const Sample &sample)
{
	bool failed = sample.last_error_at != 0;

	row->Add(Int32GetDatum(sample.consecutive_failures));
	row->AddUnlessZero(sample.next_retry_at);
	row->AddIf(failed, ShownError(sample));
	row->AddIf(failed, CStringGetTextDatum(sample.last_error_sqlstate));
	row->AddUnlessZero(sample.last_error_at);
}

/* A row of mmrepl.stat_streams(). */
static void
BuildStreamRow(RowBuilder *row, shmem::Stream &stream, const Sample &sample)
{
	shmem::Counters &counters = stream.counters;
	pg_uuid_t *peer = (pg_uuid_t *) palloc(sizeof(pg_uuid_t));

	*peer = sample.peer_node;
	row->Add(Int32GetDatum(sample.id));
	row->Add(CStringGetTextDatum(StateName(sample.state)));
	row->AddIf(sample.pid != 0, Int32GetDatum(sample.pid));
	AddQueue(row, stream, sample);
	row->AddCount(&counters.transactions_applied);
	row->AddCount(&counters.changes_applied);
	row->AddCount(&counters.bytes_sent);
	row->AddCount(&counters.batches);
	row->AddCount(&counters.retries);
	AddFailures(row, sample);
	row->AddCount(&counters.conflicts);
	row->AddCount(&counters.sync_transactions);
	row->AddCount(&counters.sync_failures);
	row->AddUnlessZero((int64) pg_atomic_read_u64(&counters.reset_at));
	row->AddIf(sample.peer_known, UUIDPGetDatum(peer));
	row->AddUnlessZero(sample.last_apply_at);
	row->AddUnlessZero((int64) sample.blocked_ticket);
	row->AddUnlessZero((int64) pg_atomic_read_u64(&stream.warned_at));
	row->AddCount(&counters.batches_ahead);
	row->AddCount(&counters.batches_redone);
}

Datum
StatStreams(FunctionCallInfo fcinfo)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	Sample sample;

	shmem::RequireReady();
	InitMaterializedSRF(fcinfo, 0);
	for (int i = 0; i < guc::max_servers; i++)
	{
		shmem::Stream &stream = shmem::Get().streams[i];
		RowBuilder row = {};

		if (!TakeSample(stream, &sample) || !MaySeeStatistics(sample.owner))
			continue;
		BuildStreamRow(&row, stream, sample);
		PutRow(result, &row);
	}
	return (Datum) 0;
}

/* ---- reset ---- */

/* Set this database's streams to a server, or (InvalidOid) all of them, to zero. */
static void
ResetStreams(Oid server)
{
	uint64 now = (uint64) GetCurrentTimestamp();

	for (int i = 0; i < guc::max_servers; i++)
	{
		shmem::Stream &stream = shmem::Get().streams[i];
		shmem::Counters &counters = stream.counters;

		if (!stream.in_use || stream.database != MyDatabaseId ||
			(OidIsValid(server) && stream.server != server))
			continue;
		shmem::SetToZero(counters.transactions_applied, counters.changes_applied,
						 counters.bytes_sent, counters.batches, counters.retries,
						 counters.conflicts, counters.sync_transactions, counters.sync_failures,
						 counters.batches_ahead, counters.batches_redone);
		pg_atomic_write_u64(&counters.reset_at, now);
	}
}

/* Set the counters of all of this database's pairs to zero. */
static void
ResetAllPairs()
{
	for (PairCounters &entry : GetShared()->pairs)
	{
		if (IsTaken(entry) && entry.database == MyDatabaseId)
			ResetPair(entry);
	}
}

/* The same for the pairs whose ids the array holds. */
static void
ResetPairs(ArrayType *pair_ids)
{
	Datum *ids;
	int count;

	deconstruct_array(pair_ids, INT4OID, sizeof(int32), true, TYPALIGN_INT, &ids, NULL, &count);
	for (int i = 0; i < count; i++)
	{
		PairCounters *counters = ForPair(MyDatabaseId, DatumGetInt32(ids[i]));

		if (counters != NULL)
			ResetPair(*counters);
	}
}

Datum
ResetCounters(FunctionCallInfo fcinfo)
{
	Oid server = InvalidOid;

	shmem::RequireReady();
	if (!PG_ARGISNULL(0))
		server = get_foreign_server_oid(NameStr(*PG_GETARG_NAME(0)), false);
	ResetStreams(server);
	ResetConflicts(server);
	if (!OidIsValid(server))
		ResetAllPairs();
	else if (!PG_ARGISNULL(1))
		ResetPairs(PG_GETARG_ARRAYTYPE_P(1));
	PG_RETURN_VOID();
}

} // namespace mmrepl::stats
