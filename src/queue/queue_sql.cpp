/*
 * queue_sql.cpp
 *		The SQL of queued changes, for people.
 *
 * Changes say nothing about identity columns and partitions: the table here, whose
 * definition the peer's is like, is asked when the SQL is wanted.
 */
#include "queue_internal.hpp"

namespace mmrepl::queue
{

/* The local column that travels under that name. */
static const char *
LocalName(const catalog::Pair *pair, const char *remote)
{
	ListCell *from, *to;

	if (pair == NULL)
		return remote;
	forboth(from, pair->map_local, to, pair->map_remote)
	{
		if (strcmp((const char *) lfirst(to), remote) == 0)
			return (const char *) lfirst(from);
	}
	return remote;
}

static bool
IsAlwaysIdentity(Oid table, const char *column)
{
	HeapTuple tuple = SearchSysCacheAttName(table, column);

	if (!HeapTupleIsValid(tuple))
		return false;
	bool result = ((Form_pg_attribute) GETSTRUCT(tuple))->attidentity == ATTRIBUTE_IDENTITY_ALWAYS;

	ReleaseSysCache(tuple);
	return result;
}

/* The table whose changes they are, by its name where there is no pair; it may be gone. */
static Oid
LocalTable(const catalog::Pair *pair, const change::Relation *relation)
{
	if (pair != NULL)
		return pair->local_table;
	Oid schema = get_namespace_oid(relation->local_schema, true);

	return OidIsValid(schema) ? get_relname_relid(relation->local_table, schema) : InvalidOid;
}

static change::SqlShape
ShapeOf(const change::Relation *relation)
{
	const catalog::Pair *pair =
		relation->pair_id == 0 ? NULL : catalog::FindPair(relation->pair_id);
	Oid table = LocalTable(pair, relation);
	change::SqlShape shape = {};

	if (!OidIsValid(table))
		return shape;
	shape.partitioned = get_rel_relkind(table) == RELKIND_PARTITIONED_TABLE;
	for (int i = 0; i < relation->n_columns; i++)
		if (IsAlwaysIdentity(table, LocalName(pair, relation->columns[i].name)))
			shape.always = bms_add_member(shape.always, i);
	return shape;
}

void
AppendSql(StringInfo sql, SqlWriter *writer, const change::Change *change)
{
	if (writer->relation != change->relation)
		*writer = {change->relation, ShapeOf(change->relation)};
	change::AppendSql(sql, change, writer->shape);
}

} // namespace mmrepl::queue
