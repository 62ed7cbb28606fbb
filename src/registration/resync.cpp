/*
 * resync.cpp
 *		mmrepl.resync(): queue again for a server, beginning with its tables.
 *
 * Order matters.  First all tables of the stream are locked against writers: who
 * has been writing without being captured has ended, whoever comes later waits.
 * Then a ticket is read: all that is queued is older, and is discarded.  Then the
 * rows are queued, in one transaction with the note that all is well again.
 */
#include "registration_internal.hpp"

#include "mmrepl/capture.hpp"
#include "mmrepl/fault.hpp"
#include "mmrepl/queue.hpp"
#include "mmrepl/shmem.hpp"
#include "mmrepl/transaction.hpp"

namespace mmrepl::registration
{

namespace
{

/* A table of the stream; pair_id 0: its trigger was made by hand. */
struct CopiedTable
{
	Oid table;
	int32 pair_id;
	bool copied; /* a pair that is not enabled is locked only */
};

List *
AddTable(List *tables, Oid table, int32 pair_id, bool copied)
{
	CopiedTable *item = (CopiedTable *) palloc(sizeof(CopiedTable));

	*item = {table, pair_id, copied};
	return lappend(tables, item);
}

/* Whether the trigger was made by hand and captures rows for the server. */
bool
CapturesByHand(Relation catalog_table, HeapTuple tuple, Oid function, const char *server)
{
	Form_pg_trigger form = (Form_pg_trigger) GETSTRUCT(tuple);
	bool null;

	if (form->tgfoid != function || form->tgnargs != 5 || OidIsValid(form->tgparentid) ||
		!TRIGGER_FOR_ROW(form->tgtype))
		return false;
	Datum args =
		heap_getattr(tuple, Anum_pg_trigger_tgargs, RelationGetDescr(catalog_table), &null);

	/* The arguments follow each other, each with its zero byte; the first is the server. */
	return !null && strcmp(VARDATA_ANY(DatumGetByteaPP(args)), server) == 0;
}

/* The role's tables with triggers that were made by hand for the server. */
List *
AddHandTables(List *tables, Oid owner, const char *server)
{
	Relation catalog_table = table_open(TriggerRelationId, AccessShareLock);
	SysScanDesc scan = systable_beginscan(catalog_table, InvalidOid, false, NULL, 0, NULL);
	Oid function = ReplicateFunction();
	HeapTuple tuple;

	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_trigger form = (Form_pg_trigger) GETSTRUCT(tuple);

		if (CapturesByHand(catalog_table, tuple, function, server) &&
			catalog::TableOwner(form->tgrelid) == owner)
			tables = AddTable(tables, form->tgrelid, 0, true);
	}
	systable_endscan(scan);
	table_close(catalog_table, AccessShareLock);
	return tables;
}

/* list_sort comparator: by table, so that two who lock them do not wait for each other. */
int
CompareTables(const ListCell *a, const ListCell *b)
{
	const CopiedTable *left = (const CopiedTable *) lfirst(a);
	const CopiedTable *right = (const CopiedTable *) lfirst(b);

	if (left->table != right->table)
		return left->table < right->table ? -1 : 1;
	return (left->pair_id > right->pair_id) - (left->pair_id < right->pair_id);
}

/* Everything that is captured for the stream. */
List *
TablesOf(const catalog::StreamRow *stream, const char *server)
{
	List *tables = NIL;
	ListCell *cell;

	foreach(cell, AllPairRows())
	{
		const PairRow *row = (const PairRow *) lfirst(cell);

		if (row->owner == stream->owner && strcmp(row->server, server) == 0)
			tables = AddTable(tables, row->table, row->id, row->enabled);
	}
	tables = AddHandTables(tables, stream->owner, server);
	list_sort(tables, CompareTables);
	return tables;
}

/* Whether both lists, which are sorted, hold the same. */
bool
SameTables(const List *left, const List *right)
{
	if (list_length(left) != list_length(right))
		return false;
	for (int i = 0; i < list_length(left); i++)
	{
		const CopiedTable *a = (const CopiedTable *) list_nth(left, i);
		const CopiedTable *b = (const CopiedTable *) list_nth(right, i);

		if (a->table != b->table || a->pair_id != b->pair_id)
			return false;
	}
	return true;
}

/* Lock writers out of a table and what is below it. */
void
LockTable(Oid table)
{
	Relation rel = relation_open(table, AccessShareLock);

	RequireTableOwner(rel);
	LockRelation(rel, ShareRowExclusiveLock);
	relation_close(rel, NoLock);
	(void) find_all_inheritors(table, ShareRowExclusiveLock, NULL);
}

/*
 * Lock the stream's tables, then its row, and read a ticket; again, if by then it
 * has other tables.  Writers of a pair that is seen by nobody yet draw later ones.
 */
List *
LockAll(const catalog::StreamRow *stream, const char *server, uint64 *last)
{
	List *tables = NIL;

	for (;;)
	{
		const List *locked = tables;
		ListCell *cell;

		tables = TablesOf(stream, server);
		if (locked != NIL && SameTables(locked, tables))
			return tables;
		foreach(cell, tables)
			LockTable(((const CopiedTable *) lfirst(cell))->table);
		MMREPL_FAULT_POINT("resync-tables-locked");
		(void) catalog::LockStreamRow(stream->id, true);
		*last = queue::LastDrawn();
		MMREPL_FAULT_POINT("resync-ticket-read");
		if (tables == NIL)
			return tables;
	}
}

/* Queue the tables; returns the number of rows. */
int64
CopyTables(const List *tables, const char *server, bool truncate)
{
	int64 rows = 0;
	ListCell *cell;

	foreach(cell, tables)
	{
		const CopiedTable *item = (const CopiedTable *) lfirst(cell);

		if (item->copied && truncate)
			capture::CaptureTruncate(item->table, item->pair_id, server);
	}
	if (truncate)
		MMREPL_FAULT_POINT("resync-emptied");
	foreach(cell, tables)
	{
		const CopiedTable *item = (const CopiedTable *) lfirst(cell);

		if (item->copied)
			rows += capture::CopyTable(item->table, item->pair_id, server);
		MMREPL_FAULT_POINT("resync-table-copied");
	}
	return rows;
}

/* The copy is queued, whatever the pairs' modes are. */
int64
CopyQueued(const List *tables, const char *server, bool truncate)
{
	int nest_level = NewGUCNestLevel();

	(void) set_config_option("mmrepl.mode", "async", PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE,
							 true, 0, false);
	int64 rows = CopyTables(tables, server, truncate);

	AtEOXact_GUC(true, nest_level);
	return rows;
}

int64
Resync(const catalog::StreamRow *stream, const char *server, bool truncate)
{
	uint64 last = 0;
	List *tables = LockAll(stream, server, &last);
	int slot = queue::RequireSlot(*stream);

	transaction::FollowResyncAtCommit(stream->id, slot, true);
	if (!catalog::SetResynced(stream->id, last))
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("replication stream %d was dropped meanwhile", stream->id)));
	MMREPL_FAULT_POINT("resync-row-written");
	return CopyQueued(tables, server, truncate);
}

/* The caller's streams of the server; raises when there are none, or only others'. */
List *
MyStreams(Oid server, const char *name)
{
	bool others;
	List *mine = catalog::StreamsToSteer(server, &others);

	if (mine == NIL)
		ereport(ERROR,
				(errcode(others ? ERRCODE_INSUFFICIENT_PRIVILEGE : ERRCODE_MMREPL_NO_SUCH_PAIR),
				 others ? errmsg("permission denied for replication to server \"%s\"", name)
						: errmsg("nothing is replicated to server \"%s\"", name)));
	return mine;
}

} // namespace

/* Raise: the stream takes nothing, so that a copy would be lost. */
void
RequireNoResync(Oid server, Oid owner, const char *name)
{
	catalog::StreamRow row = {};

	if (catalog::FindStreamRow(server, owner, &row) && row.needs_resync)
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_NEEDS_RESYNC), errmsg("server \"%s\" needs a resync", name),
				 errdetail("Too much was waiting for it; nothing is queued now."),
				 errhint("SELECT mmrepl.resync(%s);", quote_literal_cstr(name))));
}

/* SQL: mmrepl.resync(server, truncate, force) returns the number of rows copied. */
Datum
SqlResync(FunctionCallInfo fcinfo)
{
	shmem::RequireReady();
	queue::EnsureReady(); /* and refuse on a standby */
	const char *name = NameStr(*PG_GETARG_NAME(0));
	bool truncate = PG_GETARG_BOOL(1);
	bool force = PG_GETARG_BOOL(2);
	bool any = false;
	int64 rows = 0;
	ListCell *cell;

	foreach(cell, MyStreams(get_foreign_server_oid(name, false), name))
	{
		const catalog::StreamRow *row = (const catalog::StreamRow *) lfirst(cell);

		if (!row->needs_resync && !force)
			continue;
		rows += Resync(row, name, truncate);
		any = true;
	}
	if (!any)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("server \"%s\" needs no resync", name),
						errhint("mmrepl.alter_pair(..., copy_data => true) copies one table again, "
								"force => true all of them instead of what is queued.")));
	if (!truncate)
		ereport(NOTICE,
				(errmsg("rows that were deleted here meanwhile are still at server \"%s\"", name),
				 errhint("With truncate => true its tables are emptied first.")));
	WakeLauncher();
	WakeWorkers();
	MMREPL_FAULT_POINT("resync-done");
	PG_RETURN_INT64(rows);
}

} // namespace mmrepl::registration
