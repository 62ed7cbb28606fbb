/*
 * apply_bulk.cpp
 *		Runs of inserts into one table: collected, and written together.
 *
 * A row is not looked for before it is inserted.  The entry in the key's index
 * is made in a way that reports a row with the same key instead of raising, the
 * test and the entry being one step for every other session; what then turns out
 * to be a conflict is taken back and treated as one.  That works for tables
 * whose only unique index is the key's: another one could raise first.
 *
 * What is collected is written before anything could see the difference: before
 * another kind of change to the table, before triggers or volatile defaults of
 * any table run, and at the end.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

constexpr int kBulkRows = 1000;
constexpr Size kBulkBytes = 65536;

/* The rows that wait to be inserted into a table. */
struct Bulk
{
	Target *next;		   /* in the list of those that have some */
	MemoryContext context; /* what writing needs */
	List *key_index;	   /* the one that reports instead of raising */
	int count;
	int n_slots;
	Size bytes;
	TupleTableSlot *slots[kBulkRows];
	uint64 tickets[kBulkRows];
	bool conflicts[kBulkRows];
};

/* ---- which tables ---- */

/* Whether an index but the key's could refuse a row. */
static bool
HasOtherConstraint(const Leaf *leaf)
{
	const ResultRelInfo *info = leaf->info;

	for (int i = 0; i < info->ri_NumIndices; i++)
	{
		const Relation index = info->ri_IndexRelationDescs[i];

		if (RelationGetRelid(index) != RelationGetRelid(leaf->index) &&
			(index->rd_index->indisunique || index->rd_index->indisexclusion))
			return true;
	}
	return false;
}

/* In the executor's context. */
void
InitBulk(Target *target, Leaf *leaf)
{
	if (!leaf->plain || target->proute != NULL || target->volatile_defaults ||
		!leaf->index->rd_index->indimmediate || HasOtherConstraint(leaf))
		return;
	target->bulk = (Bulk *) palloc0(sizeof(Bulk));
	target->bulk->context =
		AllocSetContextCreate(CurrentMemoryContext, "mmrepl apply bulk", ALLOCSET_DEFAULT_SIZES);
	target->bulk->key_index = list_make1_oid(RelationGetRelid(leaf->index));
}

/* ---- collecting ---- */

/* The next slot, made when it is needed for the first time. */
static TupleTableSlot *
NextSlot(Target *target)
{
	Bulk *bulk = target->bulk;

	if (bulk->count == bulk->n_slots)
		bulk->slots[bulk->n_slots++] = InContext(target->estate->es_query_cxt, [&] {
			return ExecInitExtraTupleSlot(target->estate, target->desc,
										  table_slot_callbacks(target->rel));
		});
	return bulk->slots[bulk->count];
}

/* The same values; memory is shared. */
static void
ShareRow(TupleTableSlot *to, TupleTableSlot *from)
{
	int natts = from->tts_tupleDescriptor->natts;

	slot_getallattrs(from);
	ExecClearTuple(to);
	memcpy(to->tts_values, from->tts_values, sizeof(Datum) * natts);
	memcpy(to->tts_isnull, from->tts_isnull, sizeof(bool) * natts);
	ExecStoreVirtualTuple(to);
}

/* Keep target->row to be inserted; what the table's checks refuse is refused now. */
void
Collect(Session *session, Target *target)
{
	Bulk *bulk = target->bulk;
	TupleTableSlot *slot = NextSlot(target);

	ShareRow(slot, target->row);
	CheckRow(target, target->leaves, slot);
	ExecMaterializeSlot(slot);
	if (bulk->count == 0)
	{
		bulk->next = session->collected;
		session->collected = target;
	}
	bulk->tickets[bulk->count++] = session->ticket;
	bulk->bytes += ExecFetchSlotHeapTuple(slot, false, NULL)->t_len;
	if (bulk->count == kBulkRows || bulk->bytes >= kBulkBytes)
		FlushCollected(session, target);
}

/* ---- writing ---- */

/* The rows into the table, still without index entries. */
static void
InsertRows(Target *target)
{
	Bulk *bulk = target->bulk;
	CommandId cid = GetCurrentCommandId(true);

	if (bulk->count == 1)
		table_tuple_insert(target->rel, bulk->slots[0], cid, 0, NULL);
	else
		table_multi_insert(target->rel, bulk->slots, bulk->count, cid, 0, NULL);
}

/* Index entries of every row; returns how many have a key that is there already. */
static int
InsertEntries(Session *session, Target *target)
{
	Bulk *bulk = target->bulk;
	ResultRelInfo *info = target->info;
	int n_conflicts = 0;

	for (int i = 0; i < bulk->count; i++)
	{
		bulk->conflicts[i] = false;
		session->ticket = bulk->tickets[i];
		list_free(InsertIndexEntriesOfInsert(info, bulk->slots[i], target->estate,
											 &bulk->conflicts[i], bulk->key_index));
		n_conflicts += bulk->conflicts[i];
	}
	return n_conflicts;
}

/* Take back a row that this transaction has inserted. */
static void
TakeBack(Target *target, TupleTableSlot *slot)
{
	TM_FailureData failure;
	TM_Result result = table_tuple_delete(target->rel, &slot->tts_tid, GetCurrentCommandId(true),
										  InvalidSnapshot, InvalidSnapshot, true, &failure, false);

	MmreplEnsure(result == TM_Ok, "unexpected status %d of a row just inserted", (int) result);
}

/* All of them are taken back first: one may have the key of another. */
static void
ResolveConflicts(Session *session, Target *target)
{
	Bulk *bulk = target->bulk;

	NextCommand();
	for (int i = 0; i < bulk->count; i++)
		if (bulk->conflicts[i])
			TakeBack(target, bulk->slots[i]);
	NextCommand();
	for (int i = 0; i < bulk->count; i++)
		if (bulk->conflicts[i])
		{
			session->ticket = bulk->tickets[i];
			ShareRow(target->row, bulk->slots[i]);
			PlaceRow(session, target, target->leaves, target->row);
		}
}

/* In the memory of the bulk, with the owner's rights. */
static void
Write(Session *session, Target *target)
{
	Bulk *bulk = target->bulk;

	InsertRows(target);
	if (target->info->ri_NumIndices > 0 && InsertEntries(session, target) > 0)
		ResolveConflicts(session, target);
	for (int i = 0; i < bulk->count; i++)
		ExecClearTuple(bulk->slots[i]);
	bulk->count = 0;
	bulk->bytes = 0;
}

/* Errors name ticket and table; which row it was is not known to all of them. */
void
FlushCollected(Session *session, Target *target)
{
	uint64 ticket = session->ticket;
	const change::Change *change = session->change;
	const char *schema = session->schema;
	const char *table = session->table;
	Target **link = &session->collected;
	Oid user;
	int sec_context;

	while (*link != target)
		link = &(*link)->bulk->next;
	*link = target->bulk->next;
	session->change = NULL;
	session->schema = target->schema;
	session->table = target->table;
	GetUserIdAndSecContext(&user, &sec_context);
	BecomeOwner(session, target->owner, target->trusted);
	InContext(target->bulk->context, [&] { Write(session, target); });
	SetUserIdAndSecContext(user, sec_context);
	MemoryContextReset(target->bulk->context);
	session->ticket = ticket;
	session->change = change;
	session->schema = schema;
	session->table = table;
}

/* Everything that was collected. */
void
FlushAllCollected(Session *session)
{
	while (session->collected != NULL)
		FlushCollected(session, session->collected);
}

/*
 * What must be in the tables before the change: all of it if the change may run
 * code that looks, else what was collected for the same table, unless it is one
 * more insert there.
 */
void
FlushBefore(Session *session, Target *target, change::Kind kind, bool observed)
{
	Target *next;

	if (observed)
	{
		FlushAllCollected(session);
		return;
	}
	for (Target *each = session->collected; each != NULL; each = next)
	{
		next = each->bulk->next;
		if (each == target ? kind != change::kInsert
						   : RelationGetRelid(each->rel) == RelationGetRelid(target->rel))
			FlushCollected(session, each);
	}
}

} // namespace mmrepl::apply
