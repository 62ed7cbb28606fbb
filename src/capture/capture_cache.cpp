/*
 * capture_cache.cpp
 *		The backend's cache of captured tables.
 *
 * An entry is built at the first row event and dropped when the relation, an
 * ancestor or a composite type of it, or anything catalog::Generation() covers has
 * changed; one with filters also when a function has, which may have been simplified
 * away.  An entry may be in use further up the stack when it is replaced: its memory
 * is then handed to the transaction, not freed at once.
 */
#include "capture_internal.hpp"

namespace mmrepl::capture
{

static HTAB *cache;

struct CacheSlot
{
	CacheKey key;
	CapturedTable *table;
};

/* ---- invalidation ---- */

static uint64 invalidations; /* so far; an entry that is being built is not found by them */

/* Whether what was built from the relation's definition is in the entry; InvalidOid: any. */
static bool
DependsOn(const CapturedTable *table, Oid relation)
{
	return !OidIsValid(relation) || table->key.relation == relation ||
		   list_member_oid(table->ancestors, relation) ||
		   list_member_oid(table->row_types, relation);
}

/* The entries for which the predicate holds are built again when they are needed. */
template <typename Predicate>
static void
Invalidate(Predicate concerns)
{
	HASH_SEQ_STATUS scan;
	CacheSlot *slot;

	invalidations++;
	if (cache == NULL)
		return;
	hash_seq_init(&scan, cache);
	while ((slot = (CacheSlot *) hash_seq_search(&scan)) != NULL)
	{
		if (slot->table != NULL && concerns(slot->table))
			slot->table->valid = false;
	}
}

static void
OnRelcacheInvalidation(Datum, Oid relation)
{
	Invalidate([&](const CapturedTable *table) { return DependsOn(table, relation); });
}

/* A function was made, replaced or dropped, or other roles may call it. */
static void
OnFunctionInvalidation(Datum, int, uint32)
{
	Invalidate([](const CapturedTable *table) { return table->econtext != NULL; });
}

void
InitCache()
{
	CacheRegisterRelcacheCallback(OnRelcacheInvalidation, (Datum) 0);
	CacheRegisterSyscacheCallback(PROCOID, OnFunctionInvalidation, (Datum) 0);
}

static CacheSlot *
FindSlot(const CacheKey &key)
{
	bool found;

	if (cache == NULL)
	{
		HASHCTL control = {};

		control.keysize = sizeof(CacheKey);
		control.entrysize = sizeof(CacheSlot);
		control.hcxt = CacheMemoryContext;
		cache = hash_create("mmrepl captured tables", 64, &control,
							HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	CacheSlot *slot = (CacheSlot *) hash_search(cache, &key, HASH_ENTER, &found);

	if (!found)
		slot->table = NULL;
	return slot;
}

/* ---- building ---- */

/* Attribute numbers of the key: primary key, else replica identity index. */
static Bitmapset *
KeyColumns(Relation rel)
{
	Bitmapset *key = RelationGetIndexAttrBitmap(rel, INDEX_ATTR_BITMAP_PRIMARY_KEY);

	if (key == NULL)
		key = RelationGetIndexAttrBitmap(rel, INDEX_ATTR_BITMAP_IDENTITY_KEY);
	if (key == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_INVALID_PAIR),
				 errmsg("replicated table \"%s\" has no key any more",
						RelationGetRelationName(rel)),
				 errdetail("Without a primary key or a replica identity index the peer could not "
						   "find the rows."),
				 errhint(
					 "Add a primary key, or use ALTER TABLE ... REPLICA IDENTITY USING INDEX.")));
	return key;
}

/* The relation's columns with the names of these, which are columns of a partitioned table above it. */
static Bitmapset *
SameNames(Relation rel, Relation above, const Bitmapset *columns)
{
	Bitmapset *same = NULL;
	int member = -1;

	while ((member = bms_next_member(columns, member)) >= 0)
	{
		AttrNumber attnum = member + FirstLowInvalidHeapAttributeNumber;
		const char *name = NameStr(TupleDescAttr(RelationGetDescr(above), attnum - 1)->attname);

		same = bms_add_member(same, get_attnum(RelationGetRelid(rel), name) -
										FirstLowInvalidHeapAttributeNumber);
	}
	return same;
}

/* The key is that of the table that the pair names: a partition may have another one, or none. */
static Bitmapset *
KeyOf(Relation rel, const catalog::Pair *pair)
{
	if (pair->local_table == RelationGetRelid(rel))
		return KeyColumns(rel);

	Relation named = relation_open(pair->local_table, AccessShareLock);
	Bitmapset *key = SameNames(rel, named, KeyColumns(named));

	relation_close(named, AccessShareLock);
	return key;
}

static bool
ListHasName(List *names, const char *name)
{
	ListCell *cell;

	foreach(cell, names)
		if (strcmp((const char *) lfirst(cell), name) == 0)
			return true;
	return false;
}

static const char *
RemoteName(const catalog::Pair *pair, const char *local)
{
	ListCell *from, *to;

	forboth(from, pair->map_local, to, pair->map_remote)
	{
		if (strcmp((const char *) lfirst(from), local) == 0)
			return (const char *) lfirst(to);
	}
	return local;
}

/* Raise when a column that the pair names is gone. */
static void
CheckColumnsExist(Relation rel, const catalog::Pair *pair)
{
	ListCell *cell;

	foreach(cell, pair->columns)
	{
		const char *name = (const char *) lfirst(cell);

		if (get_attnum(RelationGetRelid(rel), name) == InvalidAttrNumber)
			ereport(ERROR,
					(errcode(ERRCODE_UNDEFINED_COLUMN),
					 errmsg("column \"%s\" of replicated table \"%s\" does not exist", name,
							RelationGetRelationName(rel)),
					 errhint("Use mmrepl.alter_pair('%s', '%s', columns => ...) to give the pair's "
							 "columns anew.",
							 RelationGetRelationName(rel), pair->server_name)));
	}
}

/* The columns that travel; returns how many. */
static int
ChooseColumns(Relation rel, const catalog::Pair *pair, change::ColumnSpec *columns)
{
	TupleDesc desc = RelationGetDescr(rel);
	Bitmapset *key = KeyOf(rel, pair);
	int count = 0;

	CheckColumnsExist(rel, pair);
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attribute = TupleDescAttr(desc, i);
		const char *name = NameStr(attribute->attname);
		bool is_key = bms_is_member(attribute->attnum - FirstLowInvalidHeapAttributeNumber, key);

		if (attribute->attisdropped || (pair->columns == NIL ? attribute->attgenerated != '\0'
															 : !ListHasName(pair->columns, name)))
			continue;
		columns[count++] = {attribute->attnum, pstrdup(RemoteName(pair, name)), is_key};
	}
	return count;
}

/*
 * The relation that the pair names: the table itself or the root it is a partition of.
 * A trigger made by hand may leave out events and applications: what its update left
 * alone need not be at the peer.
 */
static void
BuildEncoder(Target *target, Relation rel, const catalog::Pair *pair)
{
	change::ColumnSpec columns[MaxHeapAttributeNumber];
	change::RelationSpec spec = {};

	spec.remote_schema = pair->remote_schema;
	spec.remote_table = pair->remote_table;
	spec.local_schema = get_namespace_name(get_rel_namespace(pair->local_table));
	spec.local_table = get_rel_name(pair->local_table);
	spec.conflict = (change::Conflict) pair->conflict;
	spec.whole = pair->id == 0;
	spec.pair_id = pair->id;
	spec.n_columns = ChooseColumns(rel, pair, columns);
	spec.columns = columns;
	target->encoder = change::BuildRelationEncoder(spec, RelationGetDescr(rel));
	spec.checked = true;
	target->checked_encoder = change::BuildRelationEncoder(spec, RelationGetDescr(rel));
	target->subset = pair->columns != NIL;
}

/*
 * The stream's id.  When its row has to be made, the entry must not outlive an
 * abort of this transaction: the invalidation takes care of that.
 */
static int32
StreamOf(Relation rel, const catalog::Pair *pair)
{
	catalog::StreamRow row;

	if (catalog::FindStreamRow(pair->server, pair->owner, &row))
		return row.id;
	int32 id = catalog::EnsureStreamRow(pair->server, pair->owner);

	CacheInvalidateRelcacheByRelid(RelationGetRelid(rel));
	CommandCounterIncrement();
	transaction::WakeLauncherAtCommit();
	return id;
}

static void
BuildFilter(CapturedTable *table, Target *target, Relation rel, const catalog::Pair *pair)
{
	if (pair->row_filter == NULL)
		return;
	if (table->econtext == NULL)
		table->econtext = CreateStandaloneExprContext();
	target->filter = CompileFilter(rel, pair->row_filter, pair->owner);
}

static void
BuildTarget(CapturedTable *table, Target *target, Relation rel, const catalog::Pair *pair)
{
	target->pair_id = pair->id;
	target->inherited = pair->local_table != RelationGetRelid(rel);
	target->route.server = pair->server;
	target->route.owner = pair->owner;
	target->route.server_name = pstrdup(pair->server_name);
	target->route.sync = pair->mode == catalog::Mode::Sync;
	target->route.queue_when_unreachable = pair->queue_when_unreachable;
	target->route.stream = StreamOf(rel, pair);
	BuildEncoder(target, rel, pair);
	table->row_types = list_concat_unique_oid(table->row_types, target->encoder->row_types);
	BuildFilter(table, target, rel, pair);
}

/* The table that the trigger was made on: its partitions have clones. */
static Oid
TableOfTrigger(const Trigger *trigger)
{
	Relation triggers = table_open(TriggerRelationId, AccessShareLock);
	Oid oid = trigger->tgoid;
	Oid table = InvalidOid;

	while (OidIsValid(oid))
	{
		ScanKeyData key;

		ScanKeyInit(&key, Anum_pg_trigger_oid, BTEqualStrategyNumber, F_OIDEQ,
					ObjectIdGetDatum(oid));
		SysScanDesc scan = systable_beginscan(triggers, TriggerOidIndexId, true, NULL, 1, &key);
		HeapTuple tuple = systable_getnext(scan);

		MmreplEnsure(HeapTupleIsValid(tuple), "trigger %u is gone", oid);
		table = ((Form_pg_trigger) GETSTRUCT(tuple))->tgrelid;
		oid = ((Form_pg_trigger) GETSTRUCT(tuple))->tgparentid;
		systable_endscan(scan);
	}
	table_close(triggers, AccessShareLock);
	return table;
}

/* The pair that the five arguments of a trigger made by hand describe. */
static catalog::Pair *
PairOfTrigger(Relation rel, const Trigger *trigger)
{
	catalog::Pair *pair = (catalog::Pair *) palloc0(sizeof(catalog::Pair));
	char **args = trigger->tgargs;

	pair->local_table = trigger->tgisclone ? TableOfTrigger(trigger) : RelationGetRelid(rel);
	pair->server_name = args[0];
	pair->server = get_foreign_server_oid(args[0], false);
	pair->owner = catalog::TableOwner(RelationGetRelid(rel));
	pair->remote_schema = args[1];
	pair->remote_table = args[2];
	pair->mode = pg_strcasecmp(args[4], "sync") == 0 ? catalog::Mode::Sync : catalog::Mode::Async;
	pair->conflict = (char) change::Conflict::ApplyRemote;
	pair->enabled = true;
	return pair;
}

static void
CheckTriggerArguments(const Trigger *trigger)
{
	if (trigger->tgnargs == 5 && (pg_strcasecmp(trigger->tgargs[4], "sync") == 0 ||
								  pg_strcasecmp(trigger->tgargs[4], "async") == 0))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("trigger \"%s\" passes wrong arguments to mmrepl.replicate()", trigger->tgname),
			 errhint("Pass (server, remote schema, remote table, application_name, 'sync' or "
					 "'async'), or use mmrepl.create_pair().")));
}

/* Pairs of the table and of the partitioned tables above it. */
static List *
PairsWithAncestors(const CapturedTable *table, Relation rel)
{
	List *pairs = catalog::PairsOf(RelationGetRelid(rel));
	ListCell *cell;

	foreach(cell, table->ancestors)
		pairs = list_concat(pairs, catalog::PairsOf(lfirst_oid(cell)));
	return pairs;
}

static void
BuildTable(CapturedTable *table, Relation rel, Trigger *trigger)
{
	List *pairs;
	ListCell *cell;

	if (rel->rd_rel->relispartition)
		table->ancestors = get_partition_ancestors(RelationGetRelid(rel));
	if (trigger != NULL && trigger->tgnargs > 0)
	{
		CheckTriggerArguments(trigger);
		pairs = list_make1(PairOfTrigger(rel, trigger));
		table->skip_application = pstrdup(trigger->tgargs[3]);
	}
	else
		pairs = PairsWithAncestors(table, rel);
	table->targets = (Target *) palloc0(sizeof(Target) * (list_length(pairs) + 1));
	foreach(cell, pairs)
	{
		const catalog::Pair *pair = (const catalog::Pair *) lfirst(cell);

		BuildTarget(table, &table->targets[table->n_targets], rel, pair);
		table->n_targets++;
	}
}

static CapturedTable *
Build(const CacheKey &key, Relation rel, Trigger *trigger)
{
	/* Under the transaction until it is whole, so that an error frees it. */
	MemoryContext context =
		AllocSetContextCreate(TopTransactionContext, "mmrepl captured table", ALLOCSET_SMALL_SIZES);
	CapturedTable *table = (CapturedTable *) MemoryContextAllocZero(context, sizeof(CapturedTable));

	table->key = key;
	table->context = context;
	(void) catalog::GetRelations(); /* a first look moves the generation */
	table->generation = catalog::Generation();
	uint64 before = invalidations;

	InContext(context, [&] { BuildTable(table, rel, trigger); });
	table->valid = invalidations == before; /* else it serves this row only */
	return table;
}

static bool
IsCurrent(const CapturedTable *table)
{
	return table != NULL && table->valid && table->generation == catalog::Generation();
}

CapturedTable *
LookUp(Relation rel, Trigger *trigger)
{
	bool by_hand = trigger != NULL && trigger->tgnargs > 0;
	CacheKey key = {RelationGetRelid(rel), by_hand ? trigger->tgoid : InvalidOid};
	CacheSlot *slot = FindSlot(key);

	if (likely(IsCurrent(slot->table)))
		return slot->table;

	CapturedTable *table = Build(key, rel, trigger);

	slot = FindSlot(key); /* building may have moved the hash */
	if (slot->table != NULL)
		MemoryContextSetParent(slot->table->context, TopTransactionContext);
	MemoryContextSetParent(table->context, CacheMemoryContext);
	slot->table = table;
	return table;
}

} // namespace mmrepl::capture
