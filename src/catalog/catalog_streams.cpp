/*
 * catalog_streams.cpp
 *		Reading and writing mmrepl.stream.
 *
 * Whoever changes or removes a row holds the row's lock (below) until its
 * transaction ends, so that no writer meets a tuple that another has replaced.
 */
#include "catalog_internal.hpp"

#include "mmrepl/shmem.hpp"

namespace mmrepl::catalog
{

/* ---- reading ---- */

static StreamRow
ReadRow(const Row &row)
{
	StreamRow stream;

	stream.id = DatumGetInt32(row.Get(attr::stream_id));
	stream.server = DatumGetObjectId(row.Get(attr::stream_server));
	stream.owner = DatumGetObjectId(row.Get(attr::stream_owner));
	stream.paused = DatumGetBool(row.Get(attr::stream_paused));
	stream.confirmed = (uint64) DatumGetInt64(row.Get(attr::stream_confirmed));
	stream.acked = (uint64) DatumGetInt64(row.Get(attr::stream_acked));
	stream.server_name = *DatumGetName(row.Get(attr::stream_server_name));
	stream.discarded = (uint64) DatumGetInt64(row.Get(attr::stream_discarded));
	stream.needs_resync = !row.IsNull(attr::stream_resync_since);
	return stream;
}

/* The first row that the keys select; false when there is none. */
static bool
ReadFirst(Oid Relations::*index, int n_keys, ScanKey keys, StreamRow *result)
{
	Relation table = OpenTable(&Relations::stream, AccessShareLock);
	bool found = false;

	ForEachRow(table, GetRelations().*index, n_keys, keys, [&](const Row &row) {
		*result = ReadRow(row);
		found = true;
		return false;
	});
	table_close(table, AccessShareLock);
	return found;
}

bool
FindStreamRow(Oid server, Oid owner, StreamRow *row)
{
	ScanKeyData keys[2];

	KeyOid(&keys[0], attr::stream_server, server);
	KeyOid(&keys[1], attr::stream_owner, owner);
	return ReadFirst(&Relations::stream_by_key, 2, keys, row);
}

bool
ReadStreamRow(int32 id, StreamRow *row)
{
	ScanKeyData key;

	KeyInt4(&key, attr::stream_id, id);
	return ReadFirst(&Relations::stream_by_id, 1, &key, row);
}

/* list_sort comparator: by stream id. */
static int
CompareStreams(const ListCell *a, const ListCell *b)
{
	int32 left = ((const StreamRow *) lfirst(a))->id;
	int32 right = ((const StreamRow *) lfirst(b))->id;

	return (left > right) - (left < right);
}

List *
AllStreams()
{
	Relation table = OpenTable(&Relations::stream, AccessShareLock);
	List *streams = NIL;

	ForEachRow(table, InvalidOid, 0, NULL, [&](const Row &row) {
		StreamRow *stream = (StreamRow *) palloc(sizeof(StreamRow));

		*stream = ReadRow(row);
		streams = lappend(streams, stream);
		return true;
	});
	table_close(table, AccessShareLock);
	list_sort(streams, CompareStreams);
	return streams;
}

bool
WasSkipped(int32 stream, uint64 xid)
{
	Relation table = OpenTable(&Relations::skipped, AccessShareLock);
	bool found = false;

	ForEachRow(table, InvalidOid, 0, NULL, [&](const Row &row) {
		found = (uint64) DatumGetInt64(row.Get(attr::skipped_xid)) == xid &&
				!row.IsNull(attr::skipped_stream) &&
				DatumGetInt32(row.Get(attr::skipped_stream)) == stream;
		return !found;
	});
	table_close(table, AccessShareLock);
	return found;
}

List *
StreamsToSteer(Oid server, bool *others)
{
	List *mine = NIL;
	ListCell *cell;

	*others = false;
	foreach(cell, AllStreams())
	{
		StreamRow *row = (StreamRow *) lfirst(cell);

		if (row->server != server)
			continue;
		if (has_privs_of_role(GetUserId(), row->owner))
			mine = lappend(mine, row);
		else
			*others = true;
	}
	return mine;
}

/* ---- streams of the current transaction ---- */

/* The streams that a transaction made, as far as there is room to remember them. */
static struct
{
	LocalTransactionId transaction;
	int count;
	int32 ids[16];
} made;

static void
NoteMade(int32 id)
{
	if (made.transaction != MyLocalTransaction())
		made.count = 0;
	made.transaction = MyLocalTransaction();
	if (made.count < (int) lengthof(made.ids))
		made.ids[made.count++] = id;
}

bool
MadeHere(int32 id)
{
	if (made.transaction != MyLocalTransaction())
		return false;
	for (int i = 0; i < made.count; i++)
		if (made.ids[i] == id)
			return true;
	return false;
}

/* ---- writing ---- */

/* A column and its new value. */
struct Assignment
{
	AttrNumber attribute;
	Datum value;
	bool null;
};

/* Take the lock of a stream's row until the transaction ends; false: not to be had at once. */
static bool
LockRow(int32 id, bool wait)
{
	LOCKTAG tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, GetRelations().stream, (Oid) id, 0);
	return LockAcquire(&tag, ExclusiveLock, false, !wait) != LOCKACQUIRE_NOT_AVAIL;
}

/* A copy of the row's newest version, or NULL.  The row's lock is held. */
static HeapTuple
FetchRow(Relation table, int32 id)
{
	HeapTuple tuple = NULL;
	ScanKeyData key;

	KeyInt4(&key, attr::stream_id, id);
	ForEachRow(table, GetRelations().stream_by_id, 1, &key, [&](const Row &row) {
		tuple = heap_copytuple(row.tuple);
		return false;
	});
	return tuple;
}

/*
 * Replace columns of a row, whose lock is held, and make that visible; false
 * when the row is gone.  The new version stays on its page (HOT) unless the
 * key changes: autovacuum and a low fillfactor see to the room.
 */
static bool
AssignColumns(int32 id, const Assignment *assignments, int count)
{
	Relation table = OpenTable(&Relations::stream, RowExclusiveLock);
	HeapTuple old_tuple = FetchRow(table, id);
	Datum values[kMaxColumns] = {};
	bool nulls[kMaxColumns] = {};
	bool replaces[kMaxColumns] = {};

	if (old_tuple == NULL)
	{
		table_close(table, NoLock);
		return false;
	}
	for (int i = 0; i < count; i++)
	{
		values[assignments[i].attribute - 1] = assignments[i].value;
		nulls[assignments[i].attribute - 1] = assignments[i].null;
		replaces[assignments[i].attribute - 1] = true;
	}

	HeapTuple new_tuple =
		heap_modify_tuple(old_tuple, RelationGetDescr(table), values, nulls, replaces);

	CatalogTupleUpdate(table, &old_tuple->t_self, new_tuple);
	heap_freetuple(new_tuple);
	heap_freetuple(old_tuple);
	table_close(table, NoLock);
	CommandCounterIncrement();
	return true;
}

bool
SavePosition(int32 id, uint64 confirmed, uint64 acked)
{
	const Assignment assignments[] = {{attr::stream_confirmed, Int64GetDatum((int64) confirmed)},
									  {attr::stream_acked, Int64GetDatum((int64) acked)}};

	return !LockRow(id, false) || AssignColumns(id, assignments, lengthof(assignments));
}

bool
SetPaused(int32 id, bool paused)
{
	const Assignment assignment = {attr::stream_paused, BoolGetDatum(paused)};

	LockRow(id, true);
	return AssignColumns(id, &assignment, 1);
}

bool
ForgetAcked(int32 id)
{
	const Assignment assignment = {attr::stream_acked, Int64GetDatum(0)};

	LockRow(id, true);
	return AssignColumns(id, &assignment, 1);
}

bool
LockStreamRow(int32 id, bool wait)
{
	return LockRow(id, wait);
}

bool
SetNeedsResync(int32 id, const char *reason)
{
	const Assignment assignments[] = {{attr::stream_resync_since,
									   TimestampTzGetDatum(GetCurrentTimestamp())},
									  {attr::stream_resync_reason, CStringGetTextDatum(reason)}};

	return AssignColumns(id, assignments, lengthof(assignments));
}

bool
SetResynced(int32 id, uint64 discarded)
{
	const Assignment assignments[] = {{attr::stream_discarded, Int64GetDatum((int64) discarded)},
									  {attr::stream_acked, Int64GetDatum(0)},
									  {attr::stream_resync_since, (Datum) 0, true},
									  {attr::stream_resync_reason, (Datum) 0, true}};

	return AssignColumns(id, assignments, lengthof(assignments));
}

bool
DeleteStreamRow(int32 id)
{
	LockRow(id, true);

	Relation table = OpenTable(&Relations::stream, RowExclusiveLock);
	HeapTuple tuple = FetchRow(table, id);

	if (tuple != NULL)
	{
		CatalogTupleDelete(table, &tuple->t_self);
		heap_freetuple(tuple);
		CommandCounterIncrement();
	}
	table_close(table, NoLock);
	return tuple != NULL;
}

/* Point a stream's row to a server, by OID and name. */
static void
AssignServer(int32 id, Oid server, const char *name)
{
	NameData copy;

	namestrcpy(&copy, name);

	const Assignment assignments[] = {{attr::stream_server, ObjectIdGetDatum(server)},
									  {attr::stream_server_name, NameGetDatum(&copy)}};

	LockRow(id, true);
	AssignColumns(id, assignments, lengthof(assignments));
}

void
RenameStreams(Oid server, const char *name)
{
	ListCell *cell;

	foreach(cell, AllStreams())
	{
		const StreamRow *stream = (const StreamRow *) lfirst(cell);

		if (stream->server == server)
			AssignServer(stream->id, server, name);
	}
}

/* ---- a stream's first row ---- */

/* Whether a foreign server of that OID exists. */
static bool
ServerExists(Oid server)
{
	return SearchSysCacheExists1(FOREIGNSERVEROID, ObjectIdGetDatum(server));
}

/*
 * Take over the row that a server of this name has left behind: dropped and
 * made again, or renumbered by pg_upgrade.  Its queued work is meant for the
 * server that bears the name now.  Returns its id, or 0.
 */
static int32
TakeOverRow(Oid server, const char *server_name, Oid owner)
{
	ListCell *cell;

	foreach(cell, AllStreams())
	{
		const StreamRow *stream = (const StreamRow *) lfirst(cell);

		if (stream->owner != owner || ServerExists(stream->server) ||
			strcmp(NameStr(stream->server_name), server_name) != 0)
			continue;
		AssignServer(stream->id, server, server_name);
		return stream->id;
	}
	return 0;
}

/* Insert a row and make it visible to this transaction; returns its id. */
static int32
InsertRow(Oid server, const char *server_name, Oid owner)
{
	Relation table = OpenTable(&Relations::stream, RowExclusiveLock);
	int32 id = (int32) nextval_internal(GetRelations().stream_ids, false);
	Datum values[kMaxColumns] = {};
	bool nulls[kMaxColumns] = {};
	NameData name;

	namestrcpy(&name, server_name);
	values[attr::stream_id - 1] = Int32GetDatum(id);
	values[attr::stream_server - 1] = ObjectIdGetDatum(server);
	values[attr::stream_owner - 1] = ObjectIdGetDatum(owner);
	values[attr::stream_paused - 1] = BoolGetDatum(false);
	values[attr::stream_confirmed - 1] = Int64GetDatum(0);
	values[attr::stream_server_name - 1] = NameGetDatum(&name);
	values[attr::stream_acked - 1] = Int64GetDatum(0);
	values[attr::stream_discarded - 1] = Int64GetDatum(0);
	nulls[attr::stream_resync_since - 1] = nulls[attr::stream_resync_reason - 1] = true;

	HeapTuple tuple = heap_form_tuple(RelationGetDescr(table), values, nulls);

	CatalogTupleInsert(table, tuple);
	heap_freetuple(tuple);
	table_close(table, NoLock);
	CommandCounterIncrement();
	NoteMade(id);
	return id;
}

/*
 * Only one transaction at a time may give a server a stream; the others wait
 * here and then find its row.  The lock also keeps the server from being
 * dropped under us.  Raises when it has been dropped already.
 */
static const char *
LockServer(Oid server)
{
	LockDatabaseObject(ForeignServerRelationId, server, 0, ShareUpdateExclusiveLock);
	if (!ServerExists(server))
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
						errmsg("foreign server with OID %u does not exist", server),
						errdetail("It was dropped by another session.")));
	return GetForeignServer(server)->servername;
}

int32
EnsureStreamRow(Oid server, Oid owner)
{
	StreamRow row;

	if (FindStreamRow(server, owner, &row))
		return row.id;

	const char *server_name = LockServer(server);

	if (FindStreamRow(server, owner, &row))
		return row.id;

	int32 id = TakeOverRow(server, server_name, owner);

	return id != 0 ? id : InsertRow(server, server_name, owner);
}

/* ---- after a move to another cluster ---- */

/*
 * A server OID that no server has, one for each stream: rows are parked there,
 * so that they can exchange servers without meeting in the unique index.
 */
static Oid
ParkingPlace(int32 stream)
{
	return (Oid) (PG_UINT32_MAX - (uint32) stream);
}

/* Point a parked row to its server again; a row of that server stands in the way of it. */
static void
Unpark(const StreamRow *stream, Oid server)
{
	StreamRow other;

	if (FindStreamRow(server, stream->owner, &other))
		ereport(WARNING, (errcode(ERRCODE_MMREPL_WRONG_NODE),
						  errmsg("stream %d of server \"%s\" has been replaced by stream %d",
								 stream->id, NameStr(stream->server_name), other.id),
						  errdetail("What is queued under the old one stays there, undelivered.")));
	else
		AssignServer(stream->id, server, NameStr(stream->server_name));
}

/* What the peer knows of the former node says nothing of the new one. */
static void
ForgetPositions(int32 stream)
{
	const Assignment start[] = {{attr::stream_confirmed, Int64GetDatum(0)},
								{attr::stream_acked, Int64GetDatum(0)}};
	int slot = shmem::FindStream(MyDatabaseId, stream);

	AssignColumns(stream, start, lengthof(start));
	if (slot >= 0)
		pg_atomic_write_u64(&shmem::Get().streams[slot].acked, 0);
}

void
RelinkStreams(bool forget_positions)
{
	List *streams = AllStreams();
	ListCell *cell;

	foreach(cell, streams)
	{
		const StreamRow *stream = (const StreamRow *) lfirst(cell);
		Oid server = get_foreign_server_oid(NameStr(stream->server_name), true);

		LockRow(stream->id, true);
		if (forget_positions)
			ForgetPositions(stream->id);
		if (server != stream->server)
			AssignServer(stream->id, ParkingPlace(stream->id), NameStr(stream->server_name));
	}
	foreach(cell, streams)
	{
		const StreamRow *stream = (const StreamRow *) lfirst(cell);
		Oid server = get_foreign_server_oid(NameStr(stream->server_name), true);

		if (OidIsValid(server) && server != stream->server)
			Unpark(stream, server);
	}
}

} // namespace mmrepl::catalog
