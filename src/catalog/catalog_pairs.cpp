/*
 * catalog_pairs.cpp
 *		Reading mmrepl.pair.
 */
#include "catalog_internal.hpp"

namespace mmrepl::catalog
{

/* The elements of a name[] as a list of palloc'd strings. */
static List *
NamesOf(Datum array)
{
	Datum *elements;
	int count;
	List *names = NIL;

	deconstruct_array(DatumGetArrayTypeP(array), NAMEOID, NAMEDATALEN, false, TYPALIGN_CHAR,
					  &elements, NULL, &count);
	for (int i = 0; i < count; i++)
		names = lappend(names, pstrdup(NameStr(*DatumGetName(elements[i]))));
	return names;
}

/* Raise: what stands in column_map is no object of strings. */
static void
BadColumnMap(int32 pair_id)
{
	ereport(ERROR,
			(errcode(ERRCODE_MMREPL_INVALID_PAIR),
			 errmsg("column map of pair %d is not an object of column names", pair_id),
			 errhint("Use mmrepl.alter_pair(..., column_map => '{\"local\": \"remote\"}').")));
}

/* Split {"local": "remote", ...} into the pair's two lists. */
static void
ReadColumnMap(Pair *pair, Datum map)
{
	Jsonb *json = DatumGetJsonbP(map);
	JsonbIterator *iterator = JsonbIteratorInit(&json->root);
	JsonbValue value;
	JsonbIteratorToken token = JsonbIteratorNext(&iterator, &value, true);

	if (token != WJB_BEGIN_OBJECT)
		BadColumnMap(pair->id);
	while ((token = JsonbIteratorNext(&iterator, &value, true)) != WJB_DONE)
	{
		if (token == WJB_END_OBJECT)
			continue;
		if (value.type != jbvString)
			BadColumnMap(pair->id);

		List **list = token == WJB_KEY ? &pair->map_local : &pair->map_remote;

		*list = lappend(*list, pnstrdup(value.val.string.val, value.val.string.len));
	}
}

/* Set the pair's options that are words; the table's constraints know the others. */
static void
ReadWords(Pair *pair, const Row &row)
{
	char *mode = TextDatumGetCString(row.Get(attr::pair_mode));
	char *conflict = TextDatumGetCString(row.Get(attr::pair_conflict_resolution));
	char *unreachable = TextDatumGetCString(row.Get(attr::pair_on_unreachable));

	pair->mode = strcmp(mode, "sync") == 0 ? Mode::Sync : Mode::Async;
	pair->conflict = conflict[0]; /* change::Conflict uses the first letters */
	pair->queue_when_unreachable = strcmp(unreachable, "queue") == 0;
	pfree(mode);
	pfree(conflict);
	pfree(unreachable);
}

/* A row as a Pair; its server may turn out not to exist. */
static Pair *
ReadPair(const Row &row)
{
	Pair *pair = (Pair *) palloc0(sizeof(Pair));

	pair->id = DatumGetInt32(row.Get(attr::pair_id));
	pair->local_table = DatumGetObjectId(row.Get(attr::pair_local_table));
	pair->server_name = pstrdup(NameStr(*DatumGetName(row.Get(attr::pair_server))));
	pair->server = get_foreign_server_oid(pair->server_name, true);
	pair->owner = DatumGetObjectId(row.Get(attr::pair_owner));
	pair->remote_schema = pstrdup(NameStr(*DatumGetName(row.Get(attr::pair_remote_schema))));
	pair->remote_table = pstrdup(NameStr(*DatumGetName(row.Get(attr::pair_remote_table))));
	ReadWords(pair, row);
	if (!row.IsNull(attr::pair_columns))
		pair->columns = NamesOf(row.Get(attr::pair_columns));
	if (!row.IsNull(attr::pair_column_map))
		ReadColumnMap(pair, row.Get(attr::pair_column_map));
	if (!row.IsNull(attr::pair_row_filter))
		pair->row_filter = TextDatumGetCString(row.Get(attr::pair_row_filter));
	pair->enabled = DatumGetBool(row.Get(attr::pair_enabled));
	return pair;
}

/* Raise unless the pair's server exists: its changes would go nowhere. */
static void
RequireServer(const Pair *pair)
{
	if (OidIsValid(pair->server))
		return;

	char *table =
		quote_qualified_identifier(get_namespace_name(get_rel_namespace(pair->local_table)),
								   get_rel_name(pair->local_table));

	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_OBJECT),
			 errmsg("server \"%s\" does not exist", pair->server_name),
			 errdetail("Table %s is replicated to it by pair %d, so its changes cannot be queued.",
					   table, pair->id),
			 errhint("Create the server again, or SELECT mmrepl.drop_pair(%s, %s);",
					 quote_literal_cstr(table), quote_literal_cstr(pair->server_name))));
}

/* list_sort comparator: by pair id. */
static int
ComparePairs(const ListCell *a, const ListCell *b)
{
	int32 left = ((const Pair *) lfirst(a))->id;
	int32 right = ((const Pair *) lfirst(b))->id;

	return (left > right) - (left < right);
}

List *
PairsOf(Oid table)
{
	Relation rel = OpenTable(&Relations::pair, AccessShareLock);
	List *pairs = NIL;
	ScanKeyData key;

	KeyOid(&key, attr::pair_local_table, table);
	ForEachRow(rel, GetRelations().pair_by_table, 1, &key, [&](const Row &row) {
		if (DatumGetBool(row.Get(attr::pair_enabled)))
			pairs = lappend(pairs, ReadPair(row));
		return true;
	});
	table_close(rel, AccessShareLock);
	list_sort(pairs, ComparePairs);

	ListCell *cell;

	foreach(cell, pairs)
		RequireServer((const Pair *) lfirst(cell));
	return pairs;
}

Pair *
FindPair(int32 id)
{
	Relation rel = OpenTable(&Relations::pair, AccessShareLock);
	Pair *pair = NULL;

	ForEachRow(rel, InvalidOid, 0, NULL, [&](const Row &row) {
		if (DatumGetInt32(row.Get(attr::pair_id)) == id)
			pair = ReadPair(row);
		return pair == NULL;
	});
	table_close(rel, AccessShareLock);
	return pair;
}

List *
PairsOfServer(Oid server)
{
	const char *name = GetForeignServer(server)->servername;
	Relation rel = OpenTable(&Relations::pair, AccessShareLock);
	List *pairs = NIL;

	ForEachRow(rel, InvalidOid, 0, NULL, [&](const Row &row) {
		if (namestrcmp(DatumGetName(row.Get(attr::pair_server)), name) == 0)
			pairs = lappend(pairs, ReadPair(row));
		return true;
	});
	table_close(rel, AccessShareLock);
	list_sort(pairs, ComparePairs);
	return pairs;
}

Oid
TableOwner(Oid table)
{
	HeapTuple tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(table));

	if (!HeapTupleIsValid(tuple))
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE),
						errmsg("relation with OID %u does not exist", table)));

	Oid owner = ((Form_pg_class) GETSTRUCT(tuple))->relowner;

	ReleaseSysCache(tuple);
	return owner;
}

} // namespace mmrepl::catalog
