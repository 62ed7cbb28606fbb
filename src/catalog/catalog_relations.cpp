/*
 * catalog_relations.cpp
 *		Where the extension's tables are: cached OIDs, and their invalidation.
 *
 * An invalidation of one of our tables is mostly harmless (autovacuum sends
 * one).  It only asks for a new look; the generation moves when that look finds
 * something else than before.
 */
#include "catalog_internal.hpp"

namespace mmrepl::catalog
{

static Relations relations;	  /* as last resolved */
static bool resolved;		  /* relations was filled once and the extension was there since */
static bool relations_valid;  /* nothing has happened since it was filled */
static uint64 invalidations;  /* how often it was invalidated */
static uint64 generation = 1; /* see Generation() */

/* ---- invalidation ---- */

/* All members of Relations are OIDs: look at it as an array. */
static bool
IsOurs(Oid relation)
{
	constexpr int count = sizeof(Relations) / sizeof(Oid);
	const Oid *oids = (const Oid *) &relations;

	static_assert(sizeof(Relations) == count * sizeof(Oid));
	for (int i = 0; i < count; i++)
	{
		if (oids[i] == relation)
			return true;
	}
	return false;
}

/* A relation changed (InvalidOid: any may have). */
static void
OnRelcacheInvalidation(Datum, Oid relation)
{
	if (resolved && OidIsValid(relation) && !IsOurs(relation))
		return;
	relations_valid = false;
	invalidations++;
	ForgetNode();
}

/* A server, a user mapping or a role changed. */
static void
OnSyscacheInvalidation(Datum, int, uint32)
{
	generation++;
}

void
Init()
{
	CacheRegisterRelcacheCallback(OnRelcacheInvalidation, (Datum) 0);
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, OnSyscacheInvalidation, (Datum) 0);
	CacheRegisterSyscacheCallback(USERMAPPINGOID, OnSyscacheInvalidation, (Datum) 0);
	CacheRegisterSyscacheCallback(AUTHOID, OnSyscacheInvalidation, (Datum) 0);
}

/* ---- resolving ---- */

/* The name of every member of Relations but the schema. */
static const struct
{
	const char *name;
	Oid Relations::*where;
} relation_names[] = {
	{"pair", &Relations::pair},
	{"pair_by_table", &Relations::pair_by_table},
	{"stream", &Relations::stream},
	{"stream_pkey", &Relations::stream_by_id},
	{"stream_by_key", &Relations::stream_by_key},
	{"stream_id_seq", &Relations::stream_ids},
	{"node", &Relations::node},
	{"progress", &Relations::progress},
	{"progress_pkey", &Relations::progress_key},
	{"marker", &Relations::marker},
	{"marker_pkey", &Relations::marker_key},
	{"skipped", &Relations::skipped},
};

/* OID of a relation of the schema; when there is none, *missing is set to its name. */
static Oid
ResolveRelation(Oid schema, const char *name, const char **missing)
{
	Oid relation = get_relname_relid(name, schema);

	if (!OidIsValid(relation))
		*missing = name;
	return relation;
}

/*
 * Fill *result; false when the extension is not in this database, or not whole
 * (it may be in the making): *missing then names what was not found.
 */
static bool
Resolve(Relations *result, const char **missing)
{
	static const char *const queue_names[] = {"queue_0", "queue_1", "queue_2"};

	static_assert(lengthof(queue_names) == lengthof(Relations::queue));
	*result = {};
	*missing = NULL;
	if (!OidIsValid(get_extension_oid("mmrepl_bgw", true)))
		return false;
	result->schema = get_namespace_oid("mmrepl", true);
	if (!OidIsValid(result->schema))
	{
		*missing = "node";
		return false;
	}
	for (const auto &each : relation_names)
		result->*each.where = ResolveRelation(result->schema, each.name, missing);
	for (int i = 0; i < (int) lengthof(queue_names); i++)
		result->queue[i] = ResolveRelation(result->schema, queue_names[i], missing);
	return *missing == NULL;
}

/* Take the outcome of a look over; the generation moves when it is news. */
static void
Install(const Relations &fresh, bool exists, uint64 seen)
{
	if (resolved && (!exists || memcmp(&fresh, &relations, sizeof(fresh)) != 0))
		generation++;
	if (!resolved && exists)
		generation++;
	relations = fresh;
	resolved = exists;
	relations_valid = exists && invalidations == seen;
	if (!exists)
		ForgetNode();
}

/*
 * Look again; false when the extension is not there (whole).  Looking may
 * itself receive an invalidation: then the result serves this caller only.
 */
static bool
Refresh(const char **missing)
{
	Relations fresh;
	uint64 seen = invalidations;
	bool exists = Resolve(&fresh, missing);

	Install(fresh, exists, seen);
	return exists;
}

bool
ExtensionExists()
{
	return relations_valid || OidIsValid(get_extension_oid("mmrepl_bgw", true));
}

/* Raise: the extension is not here, or (missing is set) something of it is not. */
static void
ReportAbsent(const char *missing)
{
	if (missing == NULL)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
						errmsg("extension \"mmrepl_bgw\" does not exist in database \"%s\"",
							   get_database_name(MyDatabaseId)),
						errhint("CREATE EXTENSION mmrepl_bgw;")));
	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_TABLE),
			 errmsg("\"mmrepl.%s\" of extension \"mmrepl_bgw\" is missing", missing),
			 errhint("ALTER EXTENSION mmrepl_bgw UPDATE; or, if the installation is damaged, DROP "
					 "EXTENSION mmrepl_bgw and CREATE EXTENSION mmrepl_bgw.")));
}

const Relations &
GetRelations()
{
	const char *missing;

	if (unlikely(!relations_valid) && !Refresh(&missing))
		ReportAbsent(missing);
	return relations;
}

uint64
Generation()
{
	const char *missing;

	if (unlikely(resolved && !relations_valid) && IsTransactionState())
		Refresh(&missing);
	return generation;
}

/* ---- opening ---- */

Relation
OpenTable(Oid Relations::*which, LOCKMODE mode)
{
	/* The lock makes us hear of a drop that was committed meanwhile. */
	Relation table = try_table_open(GetRelations().*which, mode);

	if (likely(table != NULL))
		return table;
	relations_valid = false;
	return table_open(GetRelations().*which, mode);
}

void
Deform(Relation table, HeapTuple tuple, Row *row)
{
	TupleDesc desc = RelationGetDescr(table);

	MmreplEnsure(desc->natts <= kMaxColumns, "table \"%s\" has %d columns",
				 RelationGetRelationName(table), desc->natts);
	row->tuple = tuple;
	heap_deform_tuple(tuple, desc, row->values, row->nulls);
}

} // namespace mmrepl::catalog
