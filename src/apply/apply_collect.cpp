/*
 * apply_collect.cpp
 *		Changes of one kind to one table: collected, and written together.
 *
 * What is collected is written before anything could see the difference: before
 * another kind of change to the table, before triggers, volatile defaults or
 * checks that may look around run for any table, and at the end.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

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
InitRun(Target *target, Leaf *leaf)
{
	if (!leaf->plain || target->proute != NULL || target->volatile_defaults || target->reads ||
		!leaf->index->rd_index->indimmediate)
		return;
	target->run = (Run *) palloc0(sizeof(Run));
	target->run->context =
		AllocSetContextCreate(CurrentMemoryContext, "mmrepl apply run", ALLOCSET_DEFAULT_SIZES);
	if (!HasOtherConstraint(leaf))
		target->run->key_index = list_make1_oid(RelationGetRelid(leaf->index));
}

bool
CollectsInserts(const Target *target)
{
	return target->run != NULL && target->run->key_index != NIL;
}

/* Not where the old row came: it is compared, and shown when it differs. */
bool
CollectsUpdates(const Target *target)
{
	return target->run != NULL && !target->carries_old;
}

/* ---- collecting ---- */

template <typename Element>
static void
Enlarge(Element **array, int used, int capacity)
{
	Element *larger = (Element *) palloc(sizeof(Element) * capacity);

	if (used > 0)
		memcpy(larger, *array, sizeof(Element) * used);
	if (*array != NULL)
		pfree(*array);
	*array = larger;
}

/* Room for one more row: a table that has few at a time, as most have, needs little memory. */
static void
MakeRoom(const Target *target)
{
	Run *run = target->run;

	if (run->count < run->capacity)
		return;
	int capacity = Min(Max(4 * run->capacity, kGroupRows), kRunRows);

	InContext(target->estate->es_query_cxt, [&] {
		Enlarge(&run->tickets, run->count, capacity);
		Enlarge(&run->at, run->count, capacity);
		Enlarge(&run->inserts, run->n_inserts, capacity);
		Enlarge(&run->conflicts, 0, capacity);
	});
	run->capacity = capacity;
}

/* The next slot, made when it is needed for the first time. */
static TupleTableSlot *
NextSlot(const Target *target, TupleTableSlot **slots, int *n_slots,
		 const TupleTableSlotOps *operations)
{
	Run *run = target->run;

	if (run->count == *n_slots)
		slots[(*n_slots)++] = InContext(target->estate->es_query_cxt, [&] {
			return ExecInitExtraTupleSlot(target->estate, target->desc, operations);
		});
	return slots[run->count];
}

void
ShareRow(TupleTableSlot *to, TupleTableSlot *from)
{
	int natts = from->tts_tupleDescriptor->natts;

	slot_getallattrs(from);
	ExecClearTuple(to);
	memcpy(to->tts_values, from->tts_values, sizeof(Datum) * natts);
	memcpy(to->tts_isnull, from->tts_isnull, sizeof(bool) * natts);
	ExecStoreVirtualTuple(to);
}

/* One more, of so many bytes; writes them all when there are enough. */
static void
Add(Session *session, Target *target, change::Kind kind, Size bytes, int most)
{
	Run *run = target->run;

	if (run->count == 0)
	{
		Target **end = &session->collected; /* tables are written in the order in which they came */

		while (*end != NULL)
			end = &(*end)->run->next;
		run->kind = kind;
		run->next = NULL;
		*end = target;
	}
	run->tickets[run->count] = session->ticket;
	run->at[run->count++] = session->at;
	run->bytes += bytes;
	if (run->count == most || run->bytes >= kRunBytes)
		FlushCollected(session, target);
}

/* What the table's checks refuse is refused now. */
void
CollectInsert(Session *session, Target *target)
{
	Run *run = target->run;

	MakeRoom(target);
	TupleTableSlot *slot =
		NextSlot(target, run->inserts, &run->n_inserts, table_slot_callbacks(target->rel));

	ShareRow(slot, target->row);
	CheckRow(target, target->leaves, slot);
	ExecMaterializeSlot(slot);
	Add(session, target, change::kInsert, ExecFetchSlotHeapTuple(slot, false, NULL)->t_len,
		kRunRows);
}

void
CollectUpdate(Session *session, Target *target)
{
	Run *run = target->run;

	MakeRoom(target);
	TupleTableSlot *slot = NextSlot(target, run->updates, &run->n_updates, &TTSOpsVirtual);

	ShareRow(slot, target->row);
	Size bytes = heap_compute_data_size(target->desc, slot->tts_values, slot->tts_isnull);

	ExecMaterializeSlot(slot);
	Add(session, target, change::kUpdate, bytes, kGroupRows);
}

/* ---- writing ---- */

/* Errors name ticket and table; which row was inserted is not known to all of them. */
void
FlushCollected(Session *session, Target *target)
{
	uint64 ticket = session->ticket;
	const change::Change *change = session->change;
	const char *at = session->at;
	const char *schema = session->schema;
	const char *table = session->table;
	Target **link = &session->collected;
	Oid user;
	int sec_context;

	while (*link != target)
		link = &(*link)->run->next;
	*link = target->run->next;
	session->change = NULL;
	session->schema = target->schema;
	session->table = target->table;
	GetUserIdAndSecContext(&user, &sec_context);
	BecomeOwner(session, target->owner, target->trusted);
	InContext(target->run->context, [&] {
		if (target->run->kind == change::kInsert)
			WriteInserts(session, target);
		else
			WriteUpdates(session, target);
	});
	target->run->count = 0;
	target->run->bytes = 0;
	SetUserIdAndSecContext(user, sec_context);
	MemoryContextReset(target->run->context);
	session->ticket = ticket;
	session->change = change;
	session->at = at;
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

/* Whether the change will be collected behind what was collected for its table. */
static bool
Joins(const Target *target, const change::Change *change)
{
	return change->kind == target->run->kind && !change->has_old_key;
}

/*
 * What must be in the tables before the change: all of it if the change may run
 * code that looks, else what was collected for the same table, unless the change
 * is one more of them.
 */
void
FlushBefore(Session *session, Target *target, const change::Change *change, bool observed)
{
	Target *next;

	if (observed)
	{
		FlushAllCollected(session);
		return;
	}
	for (Target *each = session->collected; each != NULL; each = next)
	{
		next = each->run->next;
		if (each == target ? !Joins(target, change)
						   : RelationGetRelid(each->rel) == RelationGetRelid(target->rel))
			FlushCollected(session, each);
	}
}

} // namespace mmrepl::apply
