/*
 * catalog_node.cpp
 *		The identity of this database as a node: mmrepl.node.
 */
#include "catalog_internal.hpp"

#include "mmrepl/shmem.hpp"

namespace mmrepl::catalog
{

struct Identity
{
	pg_uuid_t id;
	uint64 system_identifier;
	Oid database;
};

static Identity identity; /* as last read */
static bool identity_valid;
static uint64 forgotten; /* how often ForgetNode() was called */

void
ForgetNode()
{
	identity_valid = false;
	forgotten++;
}

/* Read the row into *result and, when asked, copy it; false when there is none. */
static bool
ReadNode(Relation table, Identity *result, HeapTuple *copy)
{
	bool found = false;

	ForEachRow(table, InvalidOid, 0, NULL, [&](const Row &row) {
		result->id = *DatumGetUUIDP(row.Get(attr::node_id));
		result->system_identifier = (uint64) DatumGetInt64(row.Get(attr::node_system_identifier));
		result->database = DatumGetObjectId(row.Get(attr::node_database));
		if (copy != NULL)
			*copy = heap_copytuple(row.tuple);
		found = true;
		return false;
	});
	return found;
}

/* Read the identity if it is not known; false when the table is empty. */
static bool
LoadIdentity()
{
	if (likely(identity_valid))
		return true;

	Relation table = OpenTable(&Relations::node, AccessShareLock);
	uint64 before = forgotten;
	bool found = ReadNode(table, &identity, NULL);

	/* What an invalidation overtook serves this caller only. */
	identity_valid = found && forgotten == before;
	table_close(table, AccessShareLock);
	return found;
}

/* The identity, cached; raises when the table is empty. */
static const Identity &
GetIdentity()
{
	if (!LoadIdentity())
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_WRONG_NODE),
				 errmsg("this database has no identity as a node: table mmrepl.node is empty"),
				 errhint("SELECT mmrepl.adopt_node();")));
	return identity;
}

pg_uuid_t
NodeId()
{
	return GetIdentity().id;
}

bool
HasNode()
{
	return LoadIdentity();
}

bool
NodeIsOurs()
{
	const Identity &node = GetIdentity();

	return node.system_identifier == GetSystemIdentifier() && node.database == MyDatabaseId;
}

Datum
SqlNodeId(FunctionCallInfo)
{
	shmem::RequireReady();

	pg_uuid_t *result = (pg_uuid_t *) palloc(sizeof(pg_uuid_t));

	*result = NodeId();
	PG_RETURN_UUID_P(result);
}

/* ---- adoption ---- */

/* Replace (or, if it is missing, write) the row of mmrepl.node; every backend forgets it. */
static void
WriteNode(const Identity &node)
{
	Relation table = OpenTable(&Relations::node, ShareRowExclusiveLock);
	Datum values[] = {UUIDPGetDatum(&node.id), Int64GetDatum((int64) node.system_identifier),
					  ObjectIdGetDatum(node.database)};
	bool nulls[lengthof(values)] = {};
	HeapTuple fresh = heap_form_tuple(RelationGetDescr(table), values, nulls);
	HeapTuple old_tuple = NULL;
	Identity old_identity;

	if (ReadNode(table, &old_identity, &old_tuple))
		CatalogTupleUpdate(table, &old_tuple->t_self, fresh);
	else
		CatalogTupleInsert(table, fresh);
	CacheInvalidateRelcache(table);
	table_close(table, NoLock);
	CommandCounterIncrement();
}

/*
 * Empty the queue of a copy: it is the original's, which delivers it itself.
 * (TRUNCATE also waits for whoever is writing to it.)
 */
static void
EmptyQueue()
{
	TruncateStmt *stmt = makeNode(TruncateStmt);

	for (Oid queue : GetRelations().queue)
		stmt->relations =
			lappend(stmt->relations, makeRangeVar(get_namespace_name(GetRelations().schema),
												  get_rel_name(queue), -1));
	stmt->behavior = DROP_RESTRICT;
	ExecuteTruncate(stmt);
	CommandCounterIncrement();
	ereport(NOTICE, (errmsg("the queue of this copy has been emptied"),
					 errdetail("What the original had queued is delivered by the original.")));
}

/*
 * Raise when the caller may not, or need not, change the identity, which
 * decides what peers take for applied.
 */
static void
CheckAdoption(bool force)
{
	if (!superuser())
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
						errmsg("must be superuser to change the identity of a node")));
	if (!force && HasNode() && NodeIsOurs())
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("this database is the one that its identity was made for"),
						errdetail("It replicates already; its queue would be lost to its peers."),
						errhint("If it is a physical copy beside the original: SELECT "
								"mmrepl.adopt_node(force => true);")));
}

pg_uuid_t *
AdoptNode(bool moved, bool force)
{
	CheckAdoption(force);
	pg_uuid_t *id = (pg_uuid_t *) palloc(sizeof(pg_uuid_t));

	*id = moved ? NodeId() : *DatumGetUUIDP(OidFunctionCall0(F_GEN_RANDOM_UUID));
	WriteNode({*id, GetSystemIdentifier(), MyDatabaseId});
	if (!moved)
		EmptyQueue();
	RelinkStreams(!moved);
	return id;
}

} // namespace mmrepl::catalog
