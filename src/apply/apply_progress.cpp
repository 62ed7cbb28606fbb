/*
 * apply_progress.cpp
 *		What has been applied: a watermark for each stream of a peer, and markers
 *		of transactions that came outside of their stream's order.
 *
 * Both tables are written with the heap API, whatever the caller's rights are.
 * "Insert once" is decided under a short heavyweight lock on the key, so that
 * it never ends in a unique violation, which the sender would have to take for
 * a refusal.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

constexpr int kProgressColumns = 5; /* origin, stream, watermark, applied_at, conflicts */
constexpr int kMarkerColumns = 3;	/* origin, xid */

/* A search in one of the two tables by its primary key. */
struct KeySearch
{
	Relation rel;
	Relation index;
	int n_keys;
	ScanKeyData keys[3];
};

/* Open table and index; the locks stay until the transaction's end. */
static void
OpenSearch(KeySearch *search, Oid table, Oid index)
{
	search->rel = table_open(table, RowExclusiveLock);
	search->index = index_open(index, RowExclusiveLock);
}

/* Close what OpenSearch() opened. */
static void
CloseSearch(KeySearch *search)
{
	index_close(search->index, NoLock);
	table_close(search->rel, NoLock);
}

/* A search for the row of a stream; `node` must outlive it. */
static void
OpenProgress(KeySearch *search, const pg_uuid_t *node, int32 stream)
{
	const catalog::Relations &relations = catalog::GetRelations();

	OpenSearch(search, relations.progress, relations.progress_key);
	search->n_keys = 2;
	ScanKeyInit(&search->keys[0], 1, BTEqualStrategyNumber, F_UUID_EQ, UUIDPGetDatum(node));
	ScanKeyInit(&search->keys[1], 2, BTEqualStrategyNumber, F_INT4EQ, Int32GetDatum(stream));
}

/* A search for the marker of a transaction; `node` must outlive it. */
static void
OpenMarker(KeySearch *search, const pg_uuid_t *node, int32 stream, uint64 xid)
{
	const catalog::Relations &relations = catalog::GetRelations();

	OpenSearch(search, relations.marker, relations.marker_key);
	search->n_keys = 3;
	ScanKeyInit(&search->keys[0], 1, BTEqualStrategyNumber, F_UUID_EQ, UUIDPGetDatum(node));
	ScanKeyInit(&search->keys[1], 2, BTEqualStrategyNumber, F_INT4EQ, Int32GetDatum(stream));
	ScanKeyInit(&search->keys[2], 3, BTEqualStrategyNumber, F_INT8EQ, Int64GetDatum((int64) xid));
}

/* The row that the snapshot sees, into slot. */
static bool
Fetch(KeySearch *search, Snapshot snapshot, TupleTableSlot *slot)
{
	IndexScanDesc scan = BeginIndexScan(search->rel, search->index, snapshot, search->n_keys);

	index_rescan(scan, search->keys, search->n_keys, NULL, 0);
	bool found = index_getnext_slot(scan, ForwardScanDirection, slot);

	if (found)
		ExecMaterializeSlot(slot);
	index_endscan(scan);
	return found;
}

/* The row as of now, whatever the isolation level, into slot. */
static bool
FetchLatest(KeySearch *search, TupleTableSlot *slot)
{
	Snapshot snapshot = RegisterSnapshot(GetLatestSnapshot());
	bool found = Fetch(search, snapshot, slot);

	UnregisterSnapshot(snapshot);
	return found;
}

/* Whether the row exists once every transaction that is writing it has ended; ours count. */
static bool
ExistsSettled(KeySearch *search, TupleTableSlot *slot)
{
	SnapshotData dirty;

	InitDirtySnapshot(dirty);
	while (Fetch(search, &dirty, slot))
	{
		TransactionId writer = TransactionIdIsValid(dirty.xmin) ? dirty.xmin : dirty.xmax;

		if (!TransactionIdIsValid(writer))
			return true;
		XactLockTableWait(writer, search->rel, &slot->tts_tid, XLTW_InsertIndex);
		CHECK_FOR_INTERRUPTS();
	}
	return false;
}

/*
 * Insert the row unless it exists; returns whether it was inserted.  Of those
 * who try at the same time, all but one wait for that one's commit or abort.
 */
static bool
InsertOnce(KeySearch *search, TupleTableSlot *slot, Datum *values, uint32 hash)
{
	Oid table = RelationGetRelid(search->rel);
	bool nulls[kProgressColumns] = {};

	LockDatabaseObject(table, hash, 0, ExclusiveLock);
	bool exists = ExistsSettled(search, slot);

	if (!exists)
	{
		HeapTuple tuple = heap_form_tuple(RelationGetDescr(search->rel), values, nulls);

		CatalogTupleInsert(search->rel, tuple);
		heap_freetuple(tuple);
		CommandCounterIncrement();
	}
	UnlockDatabaseObject(table, hash, 0, ExclusiveLock);
	return !exists;
}

/* Names the key in the lock table; two keys that collide only wait for each other. */
static uint32
HashKey(const pg_uuid_t &node, uint64 number)
{
	return hash_combine(hash_bytes(node.data, UUID_LEN),
						hash_bytes((const unsigned char *) &number, sizeof(number)));
}

/* ---- progress ---- */

/* Make the row of a stream unless somebody else does. */
static void
InsertProgress(KeySearch *search, TupleTableSlot *slot, const pg_uuid_t &node, int32 stream)
{
	Datum values[kProgressColumns] = {UUIDPGetDatum(&node), Int32GetDatum(stream), Int64GetDatum(0),
									  TimestampTzGetDatum(GetCurrentTimestamp()), Int64GetDatum(0)};

	InsertOnce(search, slot, values, HashKey(node, (uint32) stream));
}

/* Lock the newest version of the row in the slot; false when it was deleted meanwhile. */
static bool
LockRow(KeySearch *search, TupleTableSlot *slot)
{
	TM_FailureData failure;
	Snapshot snapshot = RegisterSnapshot(GetLatestSnapshot());
	TM_Result result = table_tuple_lock(search->rel, &slot->tts_tid, snapshot, slot,
										GetCurrentCommandId(false), LockTupleNoKeyExclusive,
										LockWaitBlock, TUPLE_LOCK_FLAG_FIND_LAST_VERSION, &failure);

	UnregisterSnapshot(snapshot);
	MmreplEnsure(result == TM_Ok || result == TM_Deleted,
				 "unexpected status %d of a row of mmrepl.progress", (int) result);
	return result == TM_Ok;
}

/* A bigint column of the row. */
static int64
GetNumber(TupleTableSlot *slot, int attnum)
{
	bool is_null;
	Datum value = slot_getattr(slot, attnum, &is_null);

	return is_null ? 0 : DatumGetInt64(value);
}

/* Open the row, made if need be, and lock it when asked; leaves the table open. */
static void
LoadProgress(Progress *progress, const pg_uuid_t &node, int32 stream, bool lock)
{
	KeySearch search;

	OpenProgress(&search, &node, stream);
	TupleTableSlot *slot = table_slot_create(search.rel, NULL);

	for (;;)
	{
		CHECK_FOR_INTERRUPTS();
		if (!FetchLatest(&search, slot))
			InsertProgress(&search, slot, node, stream);
		else if (!lock || LockRow(&search, slot))
			break;
	}
	progress->rel = search.rel;
	progress->slot = slot;
	progress->watermark = (uint64) GetNumber(slot, 3);
	progress->conflicts = GetNumber(slot, 5);
	index_close(search.index, NoLock);
}

/* The row as of now. */
void
ReadProgress(Progress *progress, const pg_uuid_t &node, int32 stream)
{
	LoadProgress(progress, node, stream, false);
}

/* The row as whoever held it has left it, locked until the transaction ends. */
void
LockProgress(Progress *progress, const pg_uuid_t &node, int32 stream)
{
	LoadProgress(progress, node, stream, true);
}

/* The row must be locked.  No indexed column changes: the update is heap-only where there is room. */
void
SaveProgress(Progress *progress, uint64 watermark, int64 more_conflicts)
{
	bool should_free;
	HeapTuple old = ExecFetchSlotHeapTuple(progress->slot, false, &should_free);
	Datum values[kProgressColumns] = {};
	bool nulls[kProgressColumns] = {};
	bool replace[kProgressColumns] = {false, false, true, true, true};

	values[2] = Int64GetDatum((int64) watermark);
	values[3] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[4] = Int64GetDatum(progress->conflicts + more_conflicts);
	HeapTuple tuple =
		heap_modify_tuple(old, RelationGetDescr(progress->rel), values, nulls, replace);

	CatalogTupleUpdate(progress->rel, &progress->slot->tts_tid, tuple);
	heap_freetuple(tuple);
	if (should_free)
		heap_freetuple(old);
}

/* The lock on the row stays. */
void
CloseProgress(Progress *progress)
{
	ExecDropSingleTupleTableSlot(progress->slot);
	table_close(progress->rel, NoLock);
}

/* Waits for nobody but a session that is just making the same row. */
uint64
Watermark(const pg_uuid_t &node, int32 stream)
{
	Progress progress;

	ReadProgress(&progress, node, stream);
	CloseProgress(&progress);
	return progress.watermark;
}

/* ---- markers ---- */

/* Of several transactions that insert the same marker exactly one commits with true. */
bool
InsertMarker(const pg_uuid_t &node, int32 stream, uint64 xid)
{
	KeySearch search;
	Datum values[kMarkerColumns] = {UUIDPGetDatum(&node), Int32GetDatum(stream),
									Int64GetDatum((int64) xid)};

	OpenMarker(&search, &node, stream, xid);
	TupleTableSlot *slot = table_slot_create(search.rel, NULL);
	bool inserted = InsertOnce(&search, slot, values, HashKey(node, xid));

	ExecDropSingleTupleTableSlot(slot);
	CloseSearch(&search);
	return inserted;
}

/* An insert that was rolled back to a savepoint does not count. */
bool
HasOwnMarker(const pg_uuid_t &node, int32 stream, uint64 xid)
{
	KeySearch search;
	bool own = false;

	OpenMarker(&search, &node, stream, xid);
	TupleTableSlot *slot = table_slot_create(search.rel, NULL);

	if (FetchLatest(&search, slot))
	{
		bool is_null;
		Datum writer = slot_getsysattr(slot, MinTransactionIdAttributeNumber, &is_null);

		own = TransactionIdIsCurrentTransactionId(DatumGetTransactionId(writer));
	}
	ExecDropSingleTupleTableSlot(slot);
	CloseSearch(&search);
	return own;
}

/* A marker that another session is deleting at the moment is left to it. */
static void
DeleteMarker(Relation rel, ItemPointer tid, Snapshot snapshot)
{
	TM_FailureData failure;

	table_tuple_delete(rel, tid, GetCurrentCommandId(true), snapshot, InvalidSnapshot, false,
					   &failure, false);
}

/* Delete the markers that no batch can ask for any more. */
void
SweepMarkers(const pg_uuid_t &node, int32 stream, uint64 below_xid)
{
	KeySearch search;

	OpenMarker(&search, &node, stream, below_xid);
	ScanKeyInit(&search.keys[2], 3, BTLessStrategyNumber, F_INT8LT,
				Int64GetDatum((int64) below_xid));
	TupleTableSlot *slot = table_slot_create(search.rel, NULL);
	Snapshot snapshot = RegisterSnapshot(GetLatestSnapshot());
	IndexScanDesc scan = BeginIndexScan(search.rel, search.index, snapshot, search.n_keys);

	index_rescan(scan, search.keys, search.n_keys, NULL, 0);
	while (index_getnext_slot(scan, ForwardScanDirection, slot))
	{
		CHECK_FOR_INTERRUPTS();
		DeleteMarker(search.rel, &slot->tts_tid, snapshot);
	}
	index_endscan(scan);
	UnregisterSnapshot(snapshot);
	ExecDropSingleTupleTableSlot(slot);
	CloseSearch(&search);
}

} // namespace mmrepl::apply
