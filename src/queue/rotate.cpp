/*
 * rotate.cpp
 *		First use after a restart, rotation of the queue tables, and emptying them.
 *
 * New rows go to the active table.  When it is large and the next one is empty,
 * the next one becomes active.  A table is emptied when its lock can be had at
 * once (so neither a dump nor a writer nor a prepared transaction is using it)
 * and every head row in it is at its peer.  It is truncated in place, as VACUUM
 * does: no catalog row changes, no file is made.
 */
#include "mmrepl/fault.hpp"
#include "queue_internal.hpp"

namespace mmrepl::queue
{

/* ---- first use ---- */

/* The highest ticket the queue knows, and the table that holds it. */
static uint64
HighestTicket(uint32 *table_of)
{
	uint64 highest = 0;

	*table_of = 0;
	WithLatestSnapshot([&] {
		ScanQueue([&](uint32 table, const Row &row, const ItemPointerData &) {
			if (row.ticket <= highest)
				return;
			highest = row.ticket;
			*table_of = table;
		});
	});
	return highest;
}

static uint64
HighestConfirmed()
{
	uint64 highest = 0;
	ListCell *cell;

	foreach(cell, catalog::AllStreams())
	{
		const catalog::StreamRow *row = (const catalog::StreamRow *) lfirst(cell);

		highest = Max(highest, Max(row->confirmed, row->discarded));
	}
	return highest;
}

/* The clock must not run behind tickets that were drawn before the restart. */
static void
RestoreClock(shmem::Database &database)
{
	uint32 table;
	uint64 highest = HighestTicket(&table);

	highest = Max(highest, HighestConfirmed());
	pg_atomic_write_u32(&database.active_table, table);
	RaiseClock(highest);
	MMREPL_FAULT_POINT("clock-raised");
	pg_write_barrier();
	pg_atomic_write_u32(&database.ready, 1);
	MMREPL_FAULT_POINT("clock-ready");
}

void
EnsureReady()
{
	shmem::Database &database = shmem::DatabaseOf(MyDatabaseId);

	if (likely(pg_atomic_read_u32(&database.ready)))
		return;
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("replication cannot be used on a standby"),
				 errdetail("The primary delivers the queue; after promotion this server does.")));
	/* Table locks first: nobody may wait for one while it holds the lock below. */
	LockRelationOid(catalog::GetRelations().stream, AccessShareLock);
	for (Oid queue : catalog::GetRelations().queue)
		LockRelationOid(queue, AccessShareLock);
	LWLockAcquire(shmem::Get().startup, LW_EXCLUSIVE);
	if (!pg_atomic_read_u32(&database.ready))
		RestoreClock(database);
	LWLockRelease(shmem::Get().startup);
}

/* ---- rotation ---- */

/*
 * Blocks of a queue table; InvalidBlockNumber when somebody has locked it, for
 * upkeep must not hold up delivery.  The lock is kept.
 */
static BlockNumber
BlocksOf(uint32 table)
{
	Oid oid = catalog::GetRelations().queue[table];

	if (!ConditionalLockRelationOid(oid, AccessShareLock))
		return InvalidBlockNumber;
	Relation rel = table_open(oid, NoLock);
	BlockNumber blocks = RelationGetNumberOfBlocks(rel);

	table_close(rel, NoLock);
	return blocks;
}

static BlockNumber
RotateBlocks()
{
	return (BlockNumber) ((uint64) guc::rotate_size * 1024 / BLCKSZ);
}

/* An empty table that is not active, the next one if possible; the active one: there is none. */
static uint32
EmptyOne(uint32 active)
{
	for (uint32 i = 1; i < shmem::kQueueTables; i++)
	{
		uint32 table = (active + i) % shmem::kQueueTables;

		if (BlocksOf(table) == 0)
			return table;
	}
	return active;
}

static void
SwitchTable(shmem::Database &database)
{
	uint32 active = pg_atomic_read_u32(&database.active_table);
	BlockNumber blocks = BlocksOf(active);

	if (blocks == InvalidBlockNumber || blocks < RotateBlocks())
		return;
	uint32 next = EmptyOne(active);

	if (next == active)
		return;
	MMREPL_FAULT_POINT("rotate-begin");
	pg_atomic_write_u32(&database.active_table, next);
	MMREPL_FAULT_POINT("rotate-switched");
}

/* The position of a stream below which its rows may go; none left: everything may. */
static uint64
ConfirmedOf(int32 stream)
{
	shmem::Positions positions;
	catalog::StreamRow row = {};

	if (shmem::PositionsOf(MyDatabaseId, stream, &positions))
		return positions.confirmed;
	return catalog::ReadStreamRow(stream, &row) ? row.confirmed : PG_UINT64_MAX;
}

/* What of the stream that was looked at last is not needed. */
struct Position
{
	int32 stream;
	uint64 confirmed;
	uint64 discarded;
};

/* Whether the row is a head that is not at its peer. */
static bool
Needed(const Row &row, Position *position)
{
	if (!(row.flags & kHead))
		return false;
	if (row.stream != position->stream)
		*position = {row.stream, ConfirmedOf(row.stream), DiscardedUpTo(row.stream)};
	/* What was prepared at a peer needs its record until it is ended there. */
	if (row.ticket <= position->discarded && !(row.flags & kTwoPhase))
		return false;
	return row.ticket > position->confirmed ||
		   ((row.flags & kPrepared) && position->confirmed != PG_UINT64_MAX);
}

/*
 * A head that was needed when this process last looked, one for each table: as
 * long as it is, there is no need to look at the others.
 */
static ItemPointerData witnesses[shmem::kQueueTables];

static bool
WitnessHolds(Relation rel, const ItemPointerData &witness)
{
	bool needed = false;
	Position position = {};

	if (!ItemPointerIsValid(&witness) ||
		ItemPointerGetBlockNumber(&witness) >= RelationGetNumberOfBlocks(rel))
		return false;
	WithLatestSnapshot([&] {
		(void) FetchRow(rel, witness, [&](const Row &row) { needed = Needed(row, &position); });
	});
	return needed;
}

/*
 * Look for a head that is needed, the newest first: in a table that is being
 * drained the look is short, and the one found is needed for longest.
 */
static bool
FindWitness(Relation rel, ItemPointer witness)
{
	bool found = false;
	Position position = {};

	ItemPointerSetInvalid(witness);
	WithLatestSnapshot([&] {
		TableScanDesc scan = table_beginscan_strat(rel, GetActiveSnapshot(), 0, NULL, true, false);
		HeapTuple tuple;

		while (!found && (tuple = heap_getnext(scan, BackwardScanDirection)) != NULL)
		{
			Row row;

			CHECK_FOR_INTERRUPTS();
			DecodeRow(tuple, RelationGetDescr(rel), &row);
			found = Needed(row, &position);
			if (found)
				*witness = tuple->t_self;
		}
		table_endscan(scan);
	});
	return found;
}

/* Empty one table if nobody uses it and nothing in it is needed; we share-lock it. */
static bool
EmptyTable(uint32 table)
{
	bool emptied = false;
	Oid oid = catalog::GetRelations().queue[table];
	Relation rel = table_open(oid, NoLock);

	if (!WitnessHolds(rel, witnesses[table]) &&
		ConditionalLockRelationOid(oid, AccessExclusiveLock))
	{
		MMREPL_FAULT_POINT("rotate-locked");
		if (!FindWitness(rel, &witnesses[table]))
		{
			MMREPL_FAULT_POINT("rotate-emptying");
			table_relation_nontransactional_truncate(rel);
			MMREPL_FAULT_POINT("rotate-emptied");
			emptied = true;
		}
	}
	table_close(rel, NoLock);
	return emptied;
}

/* One process of the database at a time; the lock ends with the transaction. */
static bool
TakeUpkeepLock()
{
	LOCKTAG tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, catalog::GetRelations().queue[0], 0, 1);
	return LockAcquire(&tag, ExclusiveLock, false, true) != LOCKACQUIRE_NOT_AVAIL;
}

bool
Rotate()
{
	shmem::Database &database = shmem::DatabaseOf(MyDatabaseId);
	bool left = false;

	if (!TakeUpkeepLock())
		return true;
	SwitchTable(database);
	for (uint32 table = 0; table < shmem::kQueueTables; table++)
	{
		if (table == pg_atomic_read_u32(&database.active_table))
			continue;
		BlockNumber blocks = BlocksOf(table);

		if (blocks != 0)
			left |= blocks == InvalidBlockNumber || !EmptyTable(table);
	}
	return left || BlocksOf(pg_atomic_read_u32(&database.active_table)) >= RotateBlocks();
}

} // namespace mmrepl::queue
