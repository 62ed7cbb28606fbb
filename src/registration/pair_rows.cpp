/*
 * pair_rows.cpp
 *		The table mmrepl.pair: its rows read and written with the heap API.
 *
 * Users have no right on the table; who may do what is decided by the callers.
 */
#include "registration_internal.hpp"

namespace mmrepl::registration
{

namespace
{

/* Columns of mmrepl.pair. */
enum Column : AttrNumber
{
	kPairId = 1,
	kLocalTable,
	kServer,
	kOwner,
	kRemoteSchema,
	kRemoteTable,
	kMode,
	kColumns,
	kColumnMap,
	kRowFilter,
	kConflictResolution,
	kOnUnreachable,
	kEnabled
};

constexpr int kNumColumns = kEnabled;

/* A row under construction or being read. */
struct Fields
{
	Datum values[kNumColumns];
	bool nulls[kNumColumns];

	Datum &operator[](AttrNumber column) { return values[column - 1]; }
};

/* The name as a value of type name, palloc'd. */
Datum
NameValue(const char *name)
{
	return DirectFunctionCall1(namein, CStringGetDatum(name));
}

/* The column of type name as a string. */
char *
NameField(Datum value)
{
	return pstrdup(NameStr(*DatumGetName(value)));
}

/* Names of a name[]. */
List *
NamesOf(Datum array)
{
	Datum *elements;
	int count;
	List *names = NIL;

	deconstruct_array(DatumGetArrayTypeP(array), NAMEOID, NAMEDATALEN, false, TYPALIGN_CHAR,
					  &elements, NULL, &count);
	for (int i = 0; i < count; i++)
		names = lappend(names, NameField(elements[i]));
	return names;
}

/* A name[] of the names. */
Datum
NameArray(const List *names)
{
	Datum *elements = (Datum *) palloc(sizeof(Datum) * (list_length(names) + 1));
	int count = 0;
	ListCell *cell;

	foreach(cell, names)
		elements[count++] = NameValue((const char *) lfirst(cell));
	return PointerGetDatum(
		construct_array(elements, count, NAMEOID, NAMEDATALEN, false, TYPALIGN_CHAR));
}

/* A jsonb object of local to remote names. */
Datum
MapObject(const PairRow *row)
{
	StringInfoData json;
	ListCell *local, *remote;

	initStringInfo(&json);
	appendStringInfoChar(&json, '{');
	forboth(local, row->map_local, remote, row->map_remote)
	{
		if (json.len > 1)
			appendStringInfoChar(&json, ',');
		escape_json(&json, (const char *) lfirst(local));
		appendStringInfoChar(&json, ':');
		escape_json(&json, (const char *) lfirst(remote));
	}
	appendStringInfoChar(&json, '}');
	return DirectFunctionCall1(jsonb_in, CStringGetDatum(json.data));
}

/* The row as a tuple of the table. */
HeapTuple
FormPair(const PairRow *row, TupleDesc desc)
{
	Fields f = {};

	f[kPairId] = Int32GetDatum(row->id);
	f[kLocalTable] = ObjectIdGetDatum(row->table);
	f[kServer] = NameValue(row->server);
	f[kOwner] = ObjectIdGetDatum(row->owner);
	f[kRemoteSchema] = NameValue(row->remote_schema);
	f[kRemoteTable] = NameValue(row->remote_table);
	f[kMode] = CStringGetTextDatum(row->mode);
	f[kConflictResolution] = CStringGetTextDatum(row->conflict_resolution);
	f[kOnUnreachable] = CStringGetTextDatum(row->on_unreachable);
	f[kEnabled] = BoolGetDatum(row->enabled);
	f.nulls[kColumns - 1] = row->columns == NIL;
	f.nulls[kColumnMap - 1] = row->map_local == NIL;
	f.nulls[kRowFilter - 1] = row->row_filter == NULL;
	if (row->columns != NIL)
		f[kColumns] = NameArray(row->columns);
	if (row->map_local != NIL)
		f[kColumnMap] = MapObject(row);
	if (row->row_filter != NULL)
		f[kRowFilter] = CStringGetTextDatum(row->row_filter);
	return heap_form_tuple(desc, f.values, f.nulls);
}

/* The tuple as a row, in CurrentMemoryContext. */
PairRow *
ReadPair(HeapTuple tuple, TupleDesc desc)
{
	PairRow *row = (PairRow *) palloc0(sizeof(PairRow));
	Fields f = {};

	MmreplEnsure(desc->natts >= kNumColumns, "table mmrepl.pair has too few columns");
	heap_deform_tuple(tuple, desc, f.values, f.nulls);
	row->tid = tuple->t_self;
	row->id = DatumGetInt32(f[kPairId]);
	row->table = DatumGetObjectId(f[kLocalTable]);
	row->server = NameField(f[kServer]);
	row->owner = DatumGetObjectId(f[kOwner]);
	row->remote_schema = NameField(f[kRemoteSchema]);
	row->remote_table = NameField(f[kRemoteTable]);
	row->mode = TextDatumGetCString(f[kMode]);
	row->conflict_resolution = TextDatumGetCString(f[kConflictResolution]);
	row->on_unreachable = TextDatumGetCString(f[kOnUnreachable]);
	row->enabled = DatumGetBool(f[kEnabled]);
	if (!f.nulls[kColumns - 1])
		row->columns = NamesOf(f[kColumns]);
	if (!f.nulls[kColumnMap - 1])
		ReadColumnMap(DatumGetJsonbP(f[kColumnMap]), &row->map_local, &row->map_remote);
	if (!f.nulls[kRowFilter - 1])
		row->row_filter = TextDatumGetCString(f[kRowFilter]);
	return row;
}

/* Rows that match the keys, through the index when there are keys. */
List *
ScanPairs(ScanKeyData *keys, int n_keys)
{
	const catalog::Relations &relations = catalog::GetRelations();
	Relation pair = table_open(relations.pair, AccessShareLock);
	SysScanDesc scan =
		systable_beginscan(pair, relations.pair_by_table, n_keys > 0, NULL, n_keys, keys);
	List *rows = NIL;
	HeapTuple tuple;

	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
		rows = lappend(rows, ReadPair(tuple, RelationGetDescr(pair)));
	systable_endscan(scan);
	table_close(pair, AccessShareLock);
	return rows;
}

/* Make caches forget what they know of the table's pairs. */
void
Changed(Oid table)
{
	if (SearchSysCacheExists1(RELOID, ObjectIdGetDatum(table)))
		CacheInvalidateRelcacheByRelid(table);
	CommandCounterIncrement();
}

/* The next pair id; users need no right on the sequence. */
int32
NextPairId()
{
	Oid sequence = get_relname_relid("pair_id_seq", catalog::GetRelations().schema);

	MmreplEnsure(OidIsValid(sequence), "sequence mmrepl.pair_id_seq is missing");
	return (int32) nextval_internal(sequence, false);
}

[[noreturn]] void
RefuseMap(const char *detail)
{
	ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("invalid column_map"),
					errdetail("%s", detail),
					errhint("Write column_map => '{\"local column\": \"remote column\"}'.")));
}

/* The string in the value, palloc'd. */
char *
StringOf(const JsonbValue *value)
{
	if (value->type != jbvString)
		RefuseMap("The value of each key must be a string, the name of the remote column.");
	if (value->val.string.len == 0 || value->val.string.len >= NAMEDATALEN)
		RefuseMap("A column's name has one to 63 bytes.");
	return pnstrdup(value->val.string.val, value->val.string.len);
}

} // namespace

/* The two lists have the same length; a NULL or empty map leaves them empty. */
void
ReadColumnMap(Jsonb *map, List **local, List **remote)
{
	JsonbIterator *iterator = JsonbIteratorInit(&map->root);
	JsonbValue value;
	JsonbIteratorToken token;

	*local = *remote = NIL;
	if (!JB_ROOT_IS_OBJECT(map))
		RefuseMap("It must be an object.");
	while ((token = JsonbIteratorNext(&iterator, &value, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			*local = lappend(*local, StringOf(&value));
		else if (token == WJB_VALUE)
			*remote = lappend(*remote, StringOf(&value));
	}
	MmreplEnsure(list_length(*local) == list_length(*remote), "column_map read wrongly");
}

/* The first match counts. */
int
FindName(const List *names, const char *name)
{
	ListCell *cell;

	foreach(cell, names)
	{
		if (strcmp((const char *) lfirst(cell), name) == 0)
			return foreach_current_index(cell);
	}
	return -1;
}

/* False when there is no such pair; *row is then untouched. */
bool
FindPairRow(Oid table, const char *server, PairRow *row)
{
	ScanKeyData keys[2];
	NameData name;
	List *rows;

	namestrcpy(&name, server);
	ScanKeyInit(&keys[0], kLocalTable, BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(table));
	ScanKeyInit(&keys[1], kServer, BTEqualStrategyNumber, F_NAMEEQ, NameGetDatum(&name));
	rows = ScanPairs(keys, 2);
	if (rows == NIL)
		return false;
	*row = *(PairRow *) linitial(rows);
	return true;
}

/* All pairs of the table, enabled or not. */
List *
PairRowsOfTable(Oid table)
{
	ScanKeyData key;

	ScanKeyInit(&key, kLocalTable, BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(table));
	return ScanPairs(&key, 1);
}

/* All pairs of this database. */
List *
AllPairRows()
{
	return ScanPairs(NULL, 0);
}

/* Whether the pair is enabled does not matter. */
bool
IsInPairs(Oid table)
{
	ListCell *cell;

	if (PairRowsOfTable(table) != NIL)
		return true;
	if (!get_rel_relispartition(table))
		return false;
	foreach(cell, get_partition_ancestors(table))
	{
		if (PairRowsOfTable(lfirst_oid(cell)) != NIL)
			return true;
	}
	return false;
}

/* Gives the row its id. */
void
InsertPairRow(PairRow *row)
{
	Relation pair = table_open(catalog::GetRelations().pair, RowExclusiveLock);

	row->id = NextPairId();
	HeapTuple tuple = FormPair(row, RelationGetDescr(pair));

	CatalogTupleInsert(pair, tuple);
	row->tid = tuple->t_self;
	table_close(pair, RowExclusiveLock);
	Changed(row->table);
}

/* Replaces the row that row->tid names. */
void
UpdatePairRow(PairRow *row)
{
	Relation pair = table_open(catalog::GetRelations().pair, RowExclusiveLock);
	HeapTuple tuple = FormPair(row, RelationGetDescr(pair));

	CatalogTupleUpdate(pair, &row->tid, tuple);
	row->tid = tuple->t_self;
	table_close(pair, RowExclusiveLock);
	Changed(row->table);
}

/* Deletes the row that row->tid names. */
void
DeletePairRow(const PairRow *row)
{
	Relation pair = table_open(catalog::GetRelations().pair, RowExclusiveLock);
	ItemPointerData tid = row->tid;

	CatalogTupleDelete(pair, &tid);
	table_close(pair, RowExclusiveLock);
	Changed(row->table);
}

} // namespace mmrepl::registration
