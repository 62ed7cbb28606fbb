/*
 * local_checks.cpp
 *		What must be true at this end of a pair.
 */
#include "registration_internal.hpp"

#include "mmrepl/capture.hpp"

namespace mmrepl::registration
{

namespace
{

/* Raise because changes of the relation cannot be replicated. */
[[noreturn]] void
Refuse(Relation rel, int sqlstate, const char *detail, const char *hint)
{
	ereport(ERROR,
			(errcode(sqlstate), errmsg("cannot replicate \"%s\"", RelationGetRelationName(rel)),
			 errdetail("%s", detail), errhint("%s", hint)));
}

/* Raise for relations that are no tables. */
void
RequireTable(Relation rel)
{
	constexpr const char *hint = "Replicate a table.";

	switch (rel->rd_rel->relkind)
	{
		case RELKIND_RELATION:
		case RELKIND_PARTITIONED_TABLE:
			return;
		case RELKIND_VIEW:
			Refuse(rel, ERRCODE_WRONG_OBJECT_TYPE, "It is a view.",
				   "Replicate the tables that the view reads.");
		case RELKIND_MATVIEW:
			Refuse(rel, ERRCODE_WRONG_OBJECT_TYPE, "It is a materialized view.",
				   "Replicate the tables that it reads, and refresh it at each node.");
		case RELKIND_FOREIGN_TABLE:
			Refuse(rel, ERRCODE_WRONG_OBJECT_TYPE, "It is a foreign table.",
				   "Replicate the table at its own server.");
		default:
			Refuse(rel, ERRCODE_WRONG_OBJECT_TYPE, "It is not a table.", hint);
	}
}

/* Raise for tables that would be gone, or emptied, while the peer keeps its copy. */
void
RequirePermanent(Relation rel)
{
	if (rel->rd_rel->relpersistence == RELPERSISTENCE_TEMP)
		Refuse(rel, ERRCODE_FEATURE_NOT_SUPPORTED, "It is a temporary table.",
			   "Replicate a permanent table.");
	if (rel->rd_rel->relpersistence == RELPERSISTENCE_UNLOGGED)
		Refuse(rel, ERRCODE_FEATURE_NOT_SUPPORTED,
			   "It is an unlogged table, which a crash empties.",
			   psprintf("ALTER TABLE %s SET LOGGED;", QualifiedName(rel)));
}

/* Raise for tables that belong to the system or to this extension. */
void
RequireUserTable(Relation rel)
{
	const char *schema = get_namespace_name(RelationGetNamespace(rel));

	if (IsSystemRelation(rel) || (schema != NULL && strcmp(schema, "information_schema") == 0))
		Refuse(rel, ERRCODE_FEATURE_NOT_SUPPORTED, "It is a system table.",
			   "Replicate a table of your own.");
	if (RelationGetNamespace(rel) == catalog::GetRelations().schema)
		Refuse(rel, ERRCODE_FEATURE_NOT_SUPPORTED, "It belongs to the extension mmrepl_bgw.",
			   "Replicate a table of your own.");
}

/* The best index there is to identify rows; *deferrable when a primary key is no good. */
Oid
ChooseKeyIndex(Relation rel, bool *deferrable)
{
	List *indexes = RelationGetIndexList(rel);
	Oid identity = InvalidOid;
	ListCell *cell;

	*deferrable = false;
	foreach(cell, indexes)
	{
		Oid index = lfirst_oid(cell);
		HeapTuple tuple = SearchSysCache1(INDEXRELID, ObjectIdGetDatum(index));

		if (!HeapTupleIsValid(tuple))
			continue;
		FormData_pg_index form = *(Form_pg_index) GETSTRUCT(tuple);

		ReleaseSysCache(tuple);
		if (form.indisprimary && form.indisvalid && form.indimmediate)
			return index;
		*deferrable |= form.indisprimary && !form.indimmediate;
		if (rel->rd_rel->relreplident == REPLICA_IDENTITY_INDEX && form.indisreplident &&
			form.indisvalid && form.indimmediate)
			identity = index;
	}
	return identity;
}

/* Raise because the table has no usable key. */
[[noreturn]] void
RefuseForKey(Relation rel, bool deferrable)
{
	char *name = QualifiedName(rel);

	if (deferrable)
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_INVALID_PAIR),
				 errmsg("cannot replicate \"%s\"", RelationGetRelationName(rel)),
				 errdetail("Its primary key is deferrable: a key may be there twice for a time, so "
						   "it cannot tell rows apart."),
				 errhint("Make the primary key NOT DEFERRABLE, or ALTER TABLE %s REPLICA IDENTITY "
						 "USING INDEX another unique index.",
						 name)));
	ereport(ERROR,
			(errcode(ERRCODE_MMREPL_INVALID_PAIR),
			 errmsg("cannot replicate \"%s\"", RelationGetRelationName(rel)),
			 errdetail("It has no key by which the peer could find a row."),
			 errhint("ALTER TABLE %s ADD PRIMARY KEY (...); or ALTER TABLE %s REPLICA IDENTITY "
					 "USING INDEX ...;",
					 name, name)));
}

/* The attribute of that name, not dropped; NULL when there is none. */
Form_pg_attribute
FindAttribute(TupleDesc desc, const char *name)
{
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attribute = TupleDescAttr(desc, i);

		if (!attribute->attisdropped && strcmp(NameStr(attribute->attname), name) == 0)
			return attribute;
	}
	return NULL;
}

/* Raise unless each name of the list is a column of the table, once. */
void
CheckNames(Relation rel, const List *names, const char *option)
{
	ListCell *cell;

	foreach(cell, names)
	{
		const char *name = (const char *) lfirst(cell);
		Form_pg_attribute attribute = FindAttribute(RelationGetDescr(rel), name);

		if (attribute == NULL)
			ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
							errmsg("column \"%s\" of table \"%s\" does not exist", name,
								   RelationGetRelationName(rel)),
							errdetail("It is named in %s.", option),
							errhint("Name columns of the local table.")));
		if (FindName(names, name) != foreach_current_index(cell))
			ereport(ERROR, (errcode(ERRCODE_DUPLICATE_COLUMN),
							errmsg("column \"%s\" is named twice in %s", name, option),
							errhint("Name each column once.")));
		if (IsVirtualColumn(attribute))
			ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
							errmsg("cannot replicate virtual generated column \"%s\"", name),
							errhint("Leave it out of %s: the peer computes it.", option)));
	}
}

/* Whether the pair replicates the column. */
bool
IsReplicated(Form_pg_attribute attribute, const PairRow &row)
{
	if (attribute->attisdropped)
		return false;
	if (row.columns == NIL)
		return attribute->attgenerated == '\0';
	return FindName(row.columns, NameStr(attribute->attname)) >= 0;
}

/* Whether the column belongs to the key. */
bool
IsKeyColumn(const Key &key, AttrNumber attnum)
{
	for (int i = 0; i < key.n; i++)
	{
		if (key.attnums[i] == attnum)
			return true;
	}
	return false;
}

/* Raise when a column of the key is not among the columns. */
void
CheckKeyIsThere(Relation rel, const Key &key, const PairRow &row)
{
	StringInfoData missing;

	initStringInfo(&missing);
	for (int i = 0; i < key.n; i++)
	{
		Form_pg_attribute attribute = TupleDescAttr(RelationGetDescr(rel), key.attnums[i] - 1);

		if (!IsReplicated(attribute, row))
			appendStringInfo(&missing, "%s\"%s\"", missing.len > 0 ? ", " : "",
							 NameStr(attribute->attname));
	}
	if (missing.len == 0)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_MMREPL_INVALID_PAIR),
			 errmsg("the columns to replicate lack key columns of \"%s\": %s",
					RelationGetRelationName(rel), missing.data),
			 row.columns == NIL
				 ? errdetail("Generated columns are replicated only when columns names them.")
				 : errdetail("The peer finds rows by the key, \"%s\".", get_rel_name(key.index)),
			 errhint("Name the key columns in columns, too.")));
}

/* Raise when two columns go to one remote column, or the map names a column that is not replicated. */
void
CheckMap(Relation rel, const PairColumns &columns, const PairRow &row)
{
	List *remote = NIL;
	ListCell *cell;

	foreach(cell, row.map_local)
	{
		const char *name = (const char *) lfirst(cell);

		if (!IsReplicated(FindAttribute(RelationGetDescr(rel), name), row))
			ereport(ERROR, (errcode(ERRCODE_MMREPL_INVALID_PAIR),
							errmsg("column \"%s\" of column_map is not replicated", name),
							errhint("Name it in columns, or leave it out of column_map.")));
	}
	for (int i = 0; i < columns.n; i++)
	{
		const char *name = columns.items[i].remote;
		int earlier = FindName(remote, name);

		if (earlier >= 0)
			ereport(ERROR,
					(errcode(ERRCODE_MMREPL_INVALID_PAIR),
					 errmsg("columns \"%s\" and \"%s\" would both go to remote column \"%s\"",
							columns.items[earlier].local, columns.items[i].local, name),
					 errhint("Map them to different columns in column_map, or leave one out of "
							 "columns.")));
		remote = lappend(remote, const_cast<char *>(name));
	}
}

/* The error context of RevalidatePair. */
void
DescribePair(void *arg)
{
	const PairRow *row = static_cast<const PairRow *>(arg);

	errcontext("pair %d, which replicates table \"%s\" to server \"%s\"", row->id,
			   get_rel_name(row->table), row->server);
}

} // namespace

/* palloc'd. */
char *
QualifiedName(const char *schema, const char *table)
{
	return quote_qualified_identifier(schema, table);
}

/* palloc'd. */
char *
QualifiedName(Relation rel)
{
	return QualifiedName(get_namespace_name(RelationGetNamespace(rel)),
						 RelationGetRelationName(rel));
}

/* palloc'd. */
char *
DropCommand(const PairRow &row)
{
	char *table =
		QualifiedName(get_namespace_name(get_rel_namespace(row.table)), get_rel_name(row.table));

	return psprintf("SELECT mmrepl.drop_pair(%s, %s);", quote_literal_cstr(table),
					quote_literal_cstr(row.server));
}

/* Says why, and what to replicate instead. */
void
RequireReplicable(Relation rel)
{
	RequireTable(rel);
	RequireUserTable(rel);
	RequirePermanent(rel);
}

/* Superusers own everything. */
void
RequireTableOwner(Relation rel)
{
	if (OwnsRelation(RelationGetRelid(rel), GetUserId()))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("must be owner of table %s", RelationGetRelationName(rel)),
			 errhint("ALTER TABLE %s OWNER TO %s; or let its owner do it.", QualifiedName(rel),
					 quote_identifier(GetUserNameFromId(GetUserId(), false)))));
}

/* Says how to make the server, or who may grant its use. */
Oid
RequireServer(const char *name, Oid role)
{
	Oid server = get_foreign_server_oid(name, true);

	if (!OidIsValid(server))
		ereport(
			ERROR,
			(errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("server \"%s\" does not exist", name),
			 errhint("CREATE SERVER %s FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (host '...', port "
					 "'...', dbname '...');",
					 quote_identifier(name))));
	if (ServerUsage(server, role) != ACLCHECK_OK)
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
						errmsg("permission denied for foreign server %s", name),
						errhint("GRANT USAGE ON FOREIGN SERVER %s TO %s;", quote_identifier(name),
								quote_identifier(GetUserNameFromId(role, false)))));
	return server;
}

/* Says who may do what about it. */
void
RequirePairOwner(const PairRow &row)
{
	if (SearchSysCacheExists1(AUTHOID, ObjectIdGetDatum(row.owner)))
		return;
	ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
					errmsg("the owner of pair %d does not exist any more", row.id),
					errdetail("The role with OID %u was dropped.", row.owner),
					errhint("%s and create the pair again.", DropCommand(row))));
}

/* The primary key, else the index of REPLICA IDENTITY USING INDEX. */
Key
RequireKey(Relation rel)
{
	bool deferrable;
	Key key = {};

	key.index = ChooseKeyIndex(rel, &deferrable);
	if (!OidIsValid(key.index))
		RefuseForKey(rel, deferrable);

	HeapTuple tuple = SearchSysCache1(INDEXRELID, ObjectIdGetDatum(key.index));

	MmreplEnsure(HeapTupleIsValid(tuple), "index %u is gone", key.index);
	Form_pg_index form = (Form_pg_index) GETSTRUCT(tuple);

	key.n = form->indnkeyatts;
	for (int i = 0; i < key.n; i++)
		key.attnums[i] = form->indkey.values[i];
	ReleaseSysCache(tuple);
	return key;
}

/* In the table's order; strings belong to the relation and the row. */
PairColumns
ResolveColumns(Relation rel, const Key &key, const PairRow &row)
{
	TupleDesc desc = RelationGetDescr(rel);
	PairColumns columns = {};

	CheckNames(rel, row.columns, "columns");
	CheckNames(rel, row.map_local, "column_map");
	CheckKeyIsThere(rel, key, row);
	columns.items = (PairColumn *) palloc(sizeof(PairColumn) * desc->natts);
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attribute = TupleDescAttr(desc, i);

		if (!IsReplicated(attribute, row))
			continue;
		const char *local = NameStr(attribute->attname);
		int mapped = FindName(row.map_local, local);
		const char *remote = mapped < 0 ? local : (const char *) list_nth(row.map_remote, mapped);

		columns.items[columns.n++] = {attribute->attnum, local, remote,
									  IsKeyColumn(key, attribute->attnum)};
	}
	CheckMap(rel, columns, row);
	return columns;
}

/* Nothing is asked of the peer. */
void
RevalidatePair(Relation rel, const PairRow &row)
{
	ErrorContextCallback callback = {error_context_stack, DescribePair,
									 const_cast<PairRow *>(&row)};

	error_context_stack = &callback;
	RequireReplicable(rel);
	(void) ResolveColumns(rel, RequireKey(rel), row);
	error_context_stack = callback.previous;
	RevalidateFilter(rel, row);
}

/* Raises also when the pair's owner has lost a right that it needs. */
void
RevalidateFilter(Relation rel, const PairRow &row)
{
	ErrorContextCallback callback = {error_context_stack, DescribePair,
									 const_cast<PairRow *>(&row)};

	if (row.row_filter == NULL)
		return;
	error_context_stack = &callback;
	capture::CheckFilter(rel, row.row_filter, row.owner);
	error_context_stack = callback.previous;
}

/* The hint lists what is allowed. */
void
RequireOneOf(const char *option, const char *value, const char *const *allowed, int n_allowed)
{
	StringInfoData list;

	initStringInfo(&list);
	for (int i = 0; i < n_allowed; i++)
	{
		if (value != NULL && strcmp(value, allowed[i]) == 0)
			return;
		appendStringInfo(&list, "%s'%s'", i > 0 ? ", " : "", allowed[i]);
	}
	ereport(ERROR, (errcode(value == NULL ? ERRCODE_NULL_VALUE_NOT_ALLOWED
										  : ERRCODE_INVALID_PARAMETER_VALUE),
					value == NULL ? errmsg("%s must not be NULL", option)
								  : errmsg("invalid value for %s: \"%s\"", option, value),
					errhint("Available values: %s.", list.data)));
}

} // namespace mmrepl::registration
