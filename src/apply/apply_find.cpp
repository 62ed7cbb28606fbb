/*
 * apply_find.cpp
 *		The existing row that a key names: found through a unique index, waited
 *		for, and locked.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

/* ---- which index ---- */

/* Whether the index' key columns are exactly those, in any order. */
static bool
CoversExactly(const Form_pg_index form, const AttrNumber *attnums, int count)
{
	if (form->indnkeyatts != count)
		return false;
	for (int i = 0; i < count; i++)
	{
		bool found = false;

		for (int j = 0; j < count && !found; j++)
			found = form->indkey.values[j] == attnums[i];
		if (!found)
			return false;
	}
	return true;
}

/*
 * How good the index is for finding rows; 0: not at all.  A deferrable one may
 * hold duplicates for a while, so only a primary key is taken then.
 */
static int
Rank(Relation index, const AttrNumber *attnums, int count)
{
	Form_pg_index form = index->rd_index;

	if (!form->indisunique || !form->indisvalid || index->rd_rel->relam != BTREE_AM_OID ||
		!CoversExactly(form, attnums, count) ||
		!heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL))
		return 0;
	if (!form->indimmediate)
		return form->indisprimary ? 1 : 0;
	if (form->indisprimary)
		return 4;
	return form->indisreplident ? 3 : 2;
}

/* Takes no lock beyond those of opening the indexes. */
Oid
ChooseKeyIndex(Relation rel, const AttrNumber *attnums, int count)
{
	List *indexes = RelationGetIndexList(rel);
	Oid best = InvalidOid;
	int best_rank = 0;
	ListCell *cell;

	foreach(cell, indexes)
	{
		Relation index = index_open(lfirst_oid(cell), AccessShareLock);
		int rank = Rank(index, attnums, count);

		if (rank > best_rank)
		{
			best_rank = rank;
			best = lfirst_oid(cell);
		}
		index_close(index, NoLock);
	}
	list_free(indexes);
	return best;
}

/* The scan allocates where the leaf lives. */
void
OpenSearch(Leaf *leaf, Oid index_oid)
{
	leaf->index = index_open(index_oid, RowExclusiveLock);
	leaf->scan = InContext(leaf->context, [&] {
		return BeginIndexScan(leaf->info->ri_RelationDesc, leaf->index, &leaf->dirty,
							  IndexRelationGetNumberOfKeyAttributes(leaf->index));
	});
}

/* The lock stays. */
void
CloseSearch(Leaf *leaf)
{
	index_endscan(leaf->scan);
	index_close(leaf->index, NoLock);
	leaf->scan = NULL;
	leaf->index = NULL;
}

/* Prepare the leaf's search; in the executor's context, where it stays. */
void
InitSearch(Leaf *leaf, Oid index_oid)
{
	leaf->context = CurrentMemoryContext;
	InitDirtySnapshot(leaf->dirty);
	OpenSearch(leaf, index_oid);

	Relation index = leaf->index;
	int n_keys = IndexRelationGetNumberOfKeyAttributes(index);

	leaf->n_keys = n_keys;
	leaf->keys = (ScanKeyData *) palloc0(sizeof(ScanKeyData) * n_keys);
	leaf->key_attnums = (AttrNumber *) palloc(sizeof(AttrNumber) * n_keys);
	for (int i = 0; i < n_keys; i++)
	{
		Oid type = index->rd_opcintype[i];
		Oid equal = get_opfamily_member(index->rd_opfamily[i], type, type, BTEqualStrategyNumber);

		MmreplEnsure(OidIsValid(equal), "missing operator %d(%u,%u) in opfamily %u",
					 BTEqualStrategyNumber, type, type, index->rd_opfamily[i]);
		leaf->key_attnums[i] = index->rd_index->indkey.values[i];
		ScanKeyEntryInitialize(&leaf->keys[i], 0, i + 1, BTEqualStrategyNumber, InvalidOid,
							   index->rd_indcollation[i], get_opcode(equal), (Datum) 0);
	}
}

/* ---- the search ---- */

/* False when a key value is NULL, which equals nothing. */
static bool
SetKeys(Leaf *leaf, TupleTableSlot *search)
{
	for (int i = 0; i < leaf->n_keys; i++)
	{
		int at = leaf->key_attnums[i] - 1;

		if (search->tts_isnull[at])
			return false;
		leaf->keys[i].sk_argument = search->tts_values[at];
	}
	return true;
}

/* The transaction that is inserting or deleting the row just returned, if any but ours. */
static TransactionId
Writer(const Leaf *leaf)
{
	return TransactionIdIsValid(leaf->dirty.xmin) ? leaf->dirty.xmin : leaf->dirty.xmax;
}

/* Whether the row was written by this transaction. */
static bool
IsOwnRow(TupleTableSlot *row)
{
	bool is_null;
	Datum xmin = slot_getsysattr(row, MinTransactionIdAttributeNumber, &is_null);

	return TransactionIdIsCurrentTransactionId(DatumGetTransactionId(xmin));
}

/* Take the next match instead of ours, if there is one and it is not ours. */
static void
PreferOther(Leaf *leaf)
{
	TupleTableSlot *other = table_slot_create(leaf->info->ri_RelationDesc, NULL);
	bool take = index_getnext_slot(leaf->scan, ForwardScanDirection, other) && !IsOwnRow(other);

	if (take)
		ExecCopySlot(leaf->found, other);
	else
		leaf->dirty.xmin = leaf->dirty.xmax = InvalidTransactionId;
	ExecDropSingleTupleTableSlot(other);
}

/*
 * The next match into leaf->found.  A deferrable key may have two rows for the
 * moment, one that this transaction moved there and one that is still to be
 * moved away.  The latter is meant: the one that is not ours, or else the
 * first, as versions are mostly stored in the order in which they were made.
 * `keep`: a copy of the row, which needs no pin.
 */
static bool
NextMatch(Leaf *leaf, bool keep)
{
	if (!index_getnext_slot(leaf->scan, ForwardScanDirection, leaf->found))
		return false;
	if (keep)
		ExecMaterializeSlot(leaf->found);
	if (!leaf->index->rd_index->indimmediate && !TransactionIdIsValid(Writer(leaf)) &&
		IsOwnRow(leaf->found))
		PreferOther(leaf);
	return true;
}

/*
 * Lock what was found.  False: it has changed meanwhile, look again.  A row that
 * the current command wrote cannot be locked by it; this is the one case in
 * which a change has to be made visible to the next one.
 */
static bool
LockFound(Leaf *leaf, LockTupleMode mode)
{
	TM_FailureData failure;
	TM_Result result =
		table_tuple_lock(leaf->info->ri_RelationDesc, &leaf->found->tts_tid, GetActiveSnapshot(),
						 leaf->found, GetCurrentCommandId(false), mode, LockWaitBlock, 0, &failure);

	switch (result)
	{
		case TM_Ok:
			return true;
		case TM_Updated:
		case TM_Deleted:
			return false;
		case TM_Invisible:
		case TM_SelfModified:
			NextCommand();
			return false;
		default:
			break;
	}
	MmreplEnsure(false, "unexpected status %d of a row to be locked", (int) result);
	return false;
}

/*
 * Whether the row that was found can be written by the current command; a row
 * that this very command wrote cannot, so another one begins.
 */
static void
MakeWritable(Leaf *leaf)
{
	if (!IsOwnRow(leaf->found))
		return;
	bool is_null;
	Datum cmin = slot_getsysattr(leaf->found, MinCommandIdAttributeNumber, &is_null);

	if (DatumGetCommandId(cmin) >= GetCurrentCommandId(false))
		NextCommand();
}

/* Look once; waits for whoever is writing the row.  *again: look again. */
static bool
TryFind(Leaf *leaf, const LockTupleMode *mode, bool *again)
{
	*again = false;
	index_rescan(leaf->scan, leaf->keys, leaf->n_keys, NULL, 0);
	if (!NextMatch(leaf, mode != NULL))
		return false;
	TransactionId writer = Writer(leaf);

	if (TransactionIdIsValid(writer))
	{
		XactLockTableWait(writer, leaf->info->ri_RelationDesc, &leaf->found->tts_tid, XLTW_Lock);
		*again = true;
		return false;
	}
	if (mode != NULL)
		*again = !LockFound(leaf, *mode);
	else
		MakeWritable(leaf);
	return !*again;
}

/* Look until there is an answer.  Pins of the scan are dropped at the end; the slot keeps its own. */
static bool
Search(Leaf *leaf, TupleTableSlot *search, const LockTupleMode *mode)
{
	bool again = true;
	bool found = false;

	if (!SetKeys(leaf, search))
		return false;
	MemoryContext old = MemoryContextSwitchTo(leaf->context);

	while (again)
	{
		CHECK_FOR_INTERRUPTS();
		found = TryFind(leaf, mode, &again);
	}
	index_rescan(leaf->scan, leaf->keys, leaf->n_keys, NULL, 0);
	MemoryContextSwitchTo(old);
	return found;
}

/* The row cannot change any more until our transaction ends. */
bool
FindRow(Leaf *leaf, TupleTableSlot *search, LockTupleMode mode)
{
	return Search(leaf, search, &mode);
}

/*
 * The row can change until it is written: whoever writes it finds out then.
 * leaf->found points into the page; who is done with it clears the slot.
 */
bool
PeekRow(Leaf *leaf, TupleTableSlot *search)
{
	return Search(leaf, search, NULL);
}

/* ---- looking ahead ---- */

/*
 * Start to fetch a page that is in shared buffers, and its buffer's header, into the
 * processor's caches: all of it, for whoever visits the page may prune it.
 */
static void
FetchAhead(Relation rel, BlockNumber block)
{
	constexpr int line = 64;
	Buffer buffer = PrefetchBuffer(rel, MAIN_FORKNUM, block).recent_buffer;

	if (!BufferIsValid(buffer) || BufferIsLocal(buffer))
		return;
	const char *page = (const char *) BufferGetPage(buffer);

	__builtin_prefetch(GetBufferDescriptor(buffer - 1), 1);
	for (int at = 0; at < BLCKSZ; at += line)
		__builtin_prefetch(page + at, 1);
}

ItemPointerData
Locate(Leaf *leaf, TupleTableSlot *search)
{
	ItemPointerData place;

	ItemPointerSetInvalid(&place);
	if (!SetKeys(leaf, search))
		return place;
	InContext(leaf->context, [&] {
		index_rescan(leaf->scan, leaf->keys, leaf->n_keys, NULL, 0);
		ItemPointer tid = index_getnext_tid(leaf->scan, ForwardScanDirection);

		if (tid != NULL)
			place = *tid;
	});
	if (ItemPointerIsValid(&place))
		FetchAhead(leaf->info->ri_RelationDesc, ItemPointerGetBlockNumber(&place));
	return place;
}

void
StopLocating(Leaf *leaf)
{
	index_rescan(leaf->scan, leaf->keys, leaf->n_keys, NULL, 0);
}

/* Whether the row in leaf->found has the key that SetKeys() has set. */
static bool
HasKey(Leaf *leaf)
{
	for (int i = 0; i < leaf->n_keys; i++)
	{
		ScanKeyData *key = &leaf->keys[i];
		bool is_null;
		Datum value = slot_getattr(leaf->found, leaf->key_attnums[i], &is_null);

		if (is_null || !DatumGetBool(FunctionCall2Coll(&key->sk_func, key->sk_collation, value,
													   key->sk_argument)))
			return false;
	}
	return true;
}

/* Whether a row is there that nobody else is writing; in the scan's memory. */
static bool
FetchAt(Leaf *leaf, ItemPointerData place)
{
	bool more = false;

	return table_index_fetch_tuple(leaf->scan->xs_heapfetch, &place, &leaf->dirty, leaf->found,
								   &more, NULL) &&
		   !TransactionIdIsValid(Writer(leaf));
}

/*
 * Whether it is the row of that key.  The place may have been given to another row
 * since the index was asked, so its key is looked at.
 */
static bool
IsAt(Leaf *leaf, TupleTableSlot *search, const ItemPointerData &place)
{
	return ItemPointerIsValid(&place) && SetKeys(leaf, search) &&
		   InContext(leaf->context, [&] { return FetchAt(leaf, place); }) && HasKey(leaf);
}

bool
PeekRowAt(Leaf *leaf, TupleTableSlot *search, const ItemPointerData &place)
{
	if (!IsAt(leaf, search, place))
		return PeekRow(leaf, search);
	MakeWritable(leaf);
	return true;
}

/* False: it has changed since it was found, look again. */
bool
LockPeeked(Leaf *leaf, LockTupleMode mode)
{
	ExecMaterializeSlot(leaf->found);
	return InContext(leaf->context, [&] { return LockFound(leaf, mode); });
}

/* Calls output functions: not for error handlers. */
char *
DescribeKey(Leaf *leaf, TupleTableSlot *row)
{
	Datum values[INDEX_MAX_KEYS];
	bool nulls[INDEX_MAX_KEYS];

	for (int i = 0; i < leaf->n_keys; i++)
		values[i] = slot_getattr(row, leaf->key_attnums[i], &nulls[i]);
	for (int i = leaf->n_keys; i < IndexRelationGetNumberOfAttributes(leaf->index); i++)
	{
		values[i] = (Datum) 0;
		nulls[i] = true;
	}
	return BuildIndexValueDescription(leaf->index, values, nulls);
}

} // namespace mmrepl::apply
