/*
 * queue_limit.cpp
 *		What waits for one server at the most, and streams that need a resync.
 *
 * A stream whose queue would exceed mmrepl.max_queue_size is given up: the
 * transaction that finds that out notes it in mmrepl.stream and queues, instead
 * of its changes, a tombstone: a head row without changes, behind which nothing
 * is delivered.  It needs no worker for that.  From then on nothing is queued for
 * the stream, until resync() copies its tables.
 */
#include "mmrepl/fault.hpp"
#include "queue_internal.hpp"

namespace mmrepl::queue
{

/* ---- slots ---- */

int
TakeSlot(const catalog::StreamRow &row)
{
	int slot = SlotOf(row.id);

	if (slot < 0)
	{
		slot = shmem::RegisterStream(MyDatabaseId, row.id, row.server, row.owner, row.confirmed,
									 row.DiscardedUpTo(), row.paused);
		shmem::WakeLauncher();
	}
	return slot;
}

/* A row that was changed before the slot was taken has told shared memory of it in vain. */
static void
FollowSince(const catalog::StreamRow &row)
{
	catalog::StreamRow now = {};

	if (!catalog::ReadStreamRow(row.id, &now) || now.DiscardedUpTo() == row.DiscardedUpTo())
		return;
	shmem::WithSlotOf(MyDatabaseId, row.id, [&](int slot) {
		shmem::Stream &stream = shmem::Get().streams[slot];

		if (pg_atomic_read_u64(&stream.discarded) == row.DiscardedUpTo())
			SetDiscarded(stream, now.DiscardedUpTo());
	});
}

int
AwaitSlot(const catalog::StreamRow &row)
{
	constexpr int kTries = 5;
	int slot = SlotOf(row.id);

	if (slot >= 0)
		return slot;
	for (int i = 0; (slot = TakeSlot(row)) < 0 && i < kTries && shmem::AwaitLeaver(1000); i++)
		;
	if (slot >= 0)
		FollowSince(row);
	return slot;
}

int
RequireSlot(const catalog::StreamRow &row)
{
	int slot = AwaitSlot(row);

	if (slot < 0)
		ereport(ERROR, (errcode(ERRCODE_MMREPL_TOO_MANY_STREAMS),
						errmsg("too many servers are replicated to"),
						errhint("Raise \"mmrepl.max_servers\" and restart the server.")));
	return slot;
}

uint64
DiscardedUpTo(int32 stream)
{
	catalog::StreamRow row = {};
	shmem::Positions positions;

	if (shmem::PositionsOf(MyDatabaseId, stream, &positions))
		return positions.discarded;
	return catalog::ReadStreamRow(stream, &row) ? row.DiscardedUpTo() : 0;
}

/* A look without a lock may be at another stream's slot: what it denies is left to chance. */
bool
NeedsResync(int32 stream)
{
	int slot = KnownSlot(stream);

	if (slot >= 0 &&
		likely(pg_atomic_read_u64(&shmem::Get().streams[slot].discarded) != shmem::kNeedsResync))
		return false;
	return DiscardedUpTo(stream) == shmem::kNeedsResync;
}

void
SetDiscarded(shmem::Stream &stream, uint64 discarded)
{
	if (discarded != pg_atomic_read_u64(&stream.discarded))
	{
		shmem::SetToZero(stream.acked, stream.queued_transactions, stream.queued_changes,
						 stream.queued_bytes, stream.oldest_ticket, stream.copy_ticket,
						 stream.warned_at);
		MMREPL_CRASH_POINT("give-up-counts-cleared");
	}
	pg_atomic_write_u64(&stream.discarded, discarded);
	SpinLockAcquire(&stream.mutex);
	if (stream.state == shmem::WorkerState::NeedsResync)
		stream.state = shmem::WorkerState::Starting;
	SpinLockRelease(&stream.mutex);
	ConditionVariableBroadcast(&stream.confirmed_cv);
	ConditionVariableBroadcast(&stream.applied_cv);
	ConditionVariableBroadcast(&stream.settled_cv);
}

/* ---- what waits ---- */

void
CountOldBacklog(shmem::Stream &stream)
{
	uint64 transactions = 0, changes = 0, bytes = 0, oldest_bytes = 0, oldest = 0, none = 0;
	uint32 not_counted = 0;
	uint64 confirmed = pg_atomic_read_u64(&stream.confirmed);
	uint64 discarded = pg_atomic_read_u64(&stream.discarded);

	if (!pg_atomic_compare_exchange_u32(&stream.backlog_counted, &not_counted, 1))
		return;
	bool counted = false;

	EnsuredAtExit(
		[&] {
			CountBacklog(stream.id, Max(confirmed, discarded), stream.registered_after,
						 &transactions, &changes, &bytes, &oldest, &oldest_bytes);
			MMREPL_FAULT_POINT("give-up-backlog-read");
			counted = true;
		},
		[&] {
			if (!counted)
				pg_atomic_write_u32(&stream.backlog_counted, 0);
		});
	pg_atomic_fetch_add_u64(&stream.queued_transactions, (int64) transactions);
	pg_atomic_fetch_add_u64(&stream.queued_changes, (int64) changes);
	pg_atomic_fetch_add_u64(&stream.queued_bytes, (int64) bytes);
	if (oldest != 0)
		pg_atomic_compare_exchange_u64(&stream.oldest_ticket, &none, oldest);
	/* The first transaction behind what was discarded is the copy of the tables. */
	if (oldest != 0 && confirmed <= discarded && discarded != 0)
		NoteCopy(stream, oldest, oldest_bytes);
}

void
NoteCopy(shmem::Stream &stream, uint64 ticket, uint64 bytes)
{
	pg_atomic_write_u64(&stream.copy_bytes, bytes);
	pg_write_barrier();
	MMREPL_CRASH_POINT("resync-copy-noting");
	pg_atomic_write_u64(&stream.copy_ticket, ticket);
	MMREPL_CRASH_POINT("resync-copy-noted");
}

/* Bytes that wait for the stream, and that the limit is for. */
static uint64
Waiting(shmem::Stream &stream)
{
	uint64 waiting = pg_atomic_read_u64(&stream.queued_bytes);
	uint64 copy = pg_atomic_read_u64(&stream.copy_ticket);

	if (copy == 0 || pg_atomic_read_u64(&stream.confirmed) >= copy)
		return waiting;
	uint64 bytes = pg_atomic_read_u64(&stream.copy_bytes);

	return waiting > bytes ? waiting - bytes : 0;
}

static uint64
Limit()
{
	return (uint64) guc::max_queue_size * 1024;
}

/* With a limit that will be enforced the log warns before. */
static uint64
WarningLimit()
{
	return guc::max_queue_action == guc::QueueAction::Warn ? Limit() : Limit() / 4 * 3;
}

/* Once, and again after it was less. */
static void
WarnOfSize(shmem::Stream &stream, uint64 waiting)
{
	uint64 never = 0;

	if (!pg_atomic_compare_exchange_u64(&stream.warned_at, &never, (uint64) GetCurrentTimestamp()))
		return;
	ereport(LOG_SERVER_ONLY,
			(errmsg("mmrepl: %llu bytes of changes wait for stream %d",
					(unsigned long long) waiting, stream.id),
			 errdetail("\"mmrepl.max_queue_size\" is %d kB; %s", guc::max_queue_size,
					   guc::max_queue_action == guc::QueueAction::Warn
						   ? "the queue goes on growing."
						   : "when more would wait, nothing is queued for the server until "
							 "mmrepl.resync() copies its tables."),
			 errhint("See mmrepl.pg_stat_mmrepl for why they are not delivered.")));
}

void
ForgetWarning(shmem::Stream &stream)
{
	if (pg_atomic_read_u64(&stream.warned_at) != 0 &&
		(guc::max_queue_size == 0 || Waiting(stream) < WarningLimit()))
		pg_atomic_write_u64(&stream.warned_at, 0);
}

/* Bytes that the queue tables have on disk: more than all streams' payloads. */
static uint64
BytesOnDisk()
{
	return QueueBlocks() * BLCKSZ;
}

/*
 * Bytes that wait for a stream for which there is no slot, so that nobody counts
 * them; no less than that.  The tables are read when so much has been added to them,
 * for whatever stream, that more than `enough` could be waiting, and now and then.
 */
static uint64
WaitingUncounted(int32 stream, uint64 enough)
{
	constexpr int64 every = INT64CONST(10) * USECS_PER_SEC;
	static struct
	{
		int32 stream;
		uint64 waiting;
		uint64 on_disk;
		TimestampTz at;
	} last;
	uint64 on_disk = BytesOnDisk();
	TimestampTz now = GetCurrentTimestamp();
	uint64 transactions, changes, oldest, oldest_bytes;
	catalog::StreamRow row = {};

	if (last.stream == stream && on_disk >= last.on_disk && now - last.at < every &&
		last.waiting + (on_disk - last.on_disk) <= enough)
		return last.waiting + (on_disk - last.on_disk);
	if (!catalog::ReadStreamRow(stream, &row))
		return 0;
	CountBacklog(stream, Max(row.confirmed, row.discarded), PG_UINT64_MAX, &transactions, &changes,
				 &last.waiting, &oldest, &oldest_bytes);
	last.stream = stream;
	last.on_disk = on_disk;
	last.at = now;
	return last.waiting;
}

/*
 * The stream's shared slot, taken if no scout has done so, with what waited before
 * in its count, unless a worker is about to count it; -1: there is no room for it.
 */
static int
CountedSlot(int32 stream)
{
	catalog::StreamRow row = {};
	int slot = SlotOf(stream);

	if (slot < 0 && catalog::ReadStreamRow(stream, &row))
		slot = TakeSlot(row);
	if (slot < 0)
		return -1;
	shmem::Stream &shared = shmem::Get().streams[slot];

	if (pg_atomic_read_u32(&shared.backlog_counted) == 0 && shared.worker_pid == 0)
		CountOldBacklog(shared);
	return slot;
}

bool
ExceedsLimit(int32 stream, uint64 bytes)
{
	int slot = KnownSlot(stream);

	if (guc::max_queue_size == 0)
		return false;
	if (slot >= 0 && pg_atomic_read_u32(&shmem::Get().streams[slot].backlog_counted))
	{
		if (Waiting(shmem::Get().streams[slot]) + bytes <= WarningLimit())
			return false;
	}
	else if (BytesOnDisk() + bytes <= WarningLimit())
		return false;
	slot = CountedSlot(stream);
	if (slot < 0) /* nobody will deliver it, and nobody counts */
		return guc::max_queue_action == guc::QueueAction::Resync &&
			   (bytes > Limit() || WaitingUncounted(stream, Limit() - bytes) > Limit() - bytes);
	uint64 waiting = Waiting(shmem::Get().streams[slot]) + bytes;

	if (waiting > WarningLimit())
		WarnOfSize(shmem::Get().streams[slot], waiting);
	return waiting > Limit() && guc::max_queue_action == guc::QueueAction::Resync;
}

bool
GiveUp(int32 stream, const char *server, bool wait)
{
	char *reason;

	if (!catalog::LockStreamRow(stream, wait))
		return false;
	MMREPL_FAULT_POINT("give-up-row-locked");
	reason = psprintf("more than \"mmrepl.max_queue_size\" (%d kB) would have waited\n"
					  "HINT:  When the server is reached again, SELECT mmrepl.resync(%s).",
					  guc::max_queue_size, quote_literal_cstr(server));
	if (!catalog::SetNeedsResync(stream, reason))
		return false;
	MMREPL_FAULT_POINT("give-up-row-written");
	ereport(WARNING,
			(errcode(ERRCODE_MMREPL_NEEDS_RESYNC),
			 errmsg("server \"%s\" needs a resync: changes are not queued for it any more", server),
			 errdetail("More than \"mmrepl.max_queue_size\" (%d kB) would have waited.",
					   guc::max_queue_size),
			 errhint("When the server is reached again, SELECT mmrepl.resync(%s).",
					 quote_literal_cstr(server))));
	return true;
}

} // namespace mmrepl::queue
