/*
 * apply_write.cpp
 *		INSERT, UPDATE and DELETE of one row.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

using conflict::Action;
using conflict::Type;

/* ---- rights ---- */

/* Checked at the first change that needs it. */
static void
CheckOnce(const Session *session, Target *target, AclMode mode)
{
	if ((target->checked & mode) == mode)
		return;
	CheckPrivilege(session, target->rel, mode);
	target->checked |= mode;
}

/* ---- writing ---- */

/* Commands come and go while we look for rows; what is written belongs to the current one. */
static void
StampCommand(Target *target)
{
	target->estate->es_output_cid = GetCurrentCommandId(true);
}

/*
 * Insert where no row with this key was seen.  (A trigger may change the key:
 * then a violation says nothing about a race.)
 */
static void
InsertNew(Session *session, Target *target, Leaf *leaf, TupleTableSlot *row)
{
	StampCommand(target);
	if (!leaf->fires)
		session->inserting = leaf;
	ExecSimpleRelationInsert(leaf->info, target->estate, row);
	session->inserting = NULL;
}

/* Delete the row in leaf->found, which is locked. */
static void
DeleteFound(Target *target, Leaf *leaf)
{
	StampCommand(target);
	EvalPlanQualSetSlot(&target->epq, leaf->found);
	ExecSimpleRelationDelete(leaf->info, target->estate, &target->epq, leaf->found);
}

/*
 * Whether a stored value equals the incoming one; asked for values that live in
 * the TOAST table, which need not be written again then.
 */
static bool
IsSameToasted(Datum stored, Datum incoming)
{
	struct varlena *old_value = (struct varlena *) DatumGetPointer(stored);
	struct varlena *new_value = (struct varlena *) DatumGetPointer(incoming);

	if (!VARATT_IS_EXTERNAL_ONDISK(old_value) || VARATT_IS_EXTENDED(new_value) ||
		toast_raw_datum_size(stored) != VARSIZE(new_value))
		return false;
	struct varlena *plain = PG_DETOAST_DATUM(stored);
	bool same = memcmp(VARDATA(plain), VARDATA(new_value), VARSIZE(plain) - VARHDRSZ) == 0;

	pfree(plain);
	return same;
}

/* The existing row with the columns that came in laid over it, into target->merged (root layout). */
static void
Merge(Target *target, Leaf *leaf)
{
	TupleDesc desc = RelationGetDescr(target->rel);
	TupleTableSlot *old_row = FoundInRoot(leaf);
	TupleTableSlot *merged = target->merged;
	TupleTableSlot *incoming = target->row;

	slot_getallattrs(old_row);
	ExecClearTuple(merged);
	memcpy(merged->tts_values, old_row->tts_values, sizeof(Datum) * desc->natts);
	memcpy(merged->tts_isnull, old_row->tts_isnull, sizeof(bool) * desc->natts);
	for (int i = 0; i < target->n_fields; i++)
	{
		int at = target->fields[i].attnum - 1;

		if (target->fields[i].form == Form::Ignore ||
			(TupleDescAttr(desc, at)->attlen == -1 && !merged->tts_isnull[at] &&
			 !incoming->tts_isnull[at] &&
			 IsSameToasted(merged->tts_values[at], incoming->tts_values[at])))
			continue;
		merged->tts_values[at] = incoming->tts_values[at];
		merged->tts_isnull[at] = incoming->tts_isnull[at];
	}
	ExecStoreVirtualTuple(merged);
}

/* The row leaves its partition: delete there, insert where it belongs now. */
static void
Move(Session *session, Target *target, Leaf *from)
{
	slot_getallattrs(target->merged);
	DeleteFound(target, from);
	Leaf *to = Route(session, target, target->merged);

	StampCommand(target);
	ExecSimpleRelationInsert(to->info, target->estate, ToLeaf(to, target->merged));
}

/*
 * Whether the row was written that PeekRow() had found.  Not, if somebody else
 * has written it since, and ended: then what to do is decided anew.
 */
static bool
Written(TM_Result result)
{
	if (result == TM_Ok)
		return true;
	MmreplEnsure(result == TM_Updated || result == TM_Deleted,
				 "unexpected status %d of a row to be written", (int) result);
	return false;
}

void
CheckRow(Target *target, Leaf *leaf, TupleTableSlot *row)
{
	Relation rel = leaf->info->ri_RelationDesc;

	if (rel->rd_att->constr)
		ExecConstraints(leaf->info, row, target->estate);
	if (rel->rd_rel->relispartition)
		ExecPartitionCheck(leaf->info, row, target->estate, true);
}

/* A new version of the row in leaf->found, and its index entries; see Written(). */
static bool
WriteUpdate(Target *target, Leaf *leaf, TupleTableSlot *row)
{
	Relation rel = leaf->info->ri_RelationDesc;
	IndexesToUpdate indexes = kNoIndexes;
	TM_FailureData failure;
	LockTupleMode mode;

	CheckRow(target, leaf, row);
	TM_Result result =
		table_tuple_update(rel, &leaf->found->tts_tid, row, target->estate->es_output_cid,
						   InvalidSnapshot, InvalidSnapshot, true, &failure, &mode, &indexes);

	if (!Written(result))
		return false;
	if (indexes != kNoIndexes && leaf->info->ri_NumIndices > 0)
		list_free(InsertIndexEntriesOfUpdate(leaf->info, row, target->estate, indexes));
	return true;
}

/* Delete the row in leaf->found; see Written(). */
static bool
WriteDelete(Target *target, Leaf *leaf)
{
	TM_FailureData failure;

	StampCommand(target);
	return Written(table_tuple_delete(leaf->info->ri_RelationDesc, &leaf->found->tts_tid,
									  target->estate->es_output_cid, InvalidSnapshot,
									  InvalidSnapshot, true, &failure, false));
}

/* With the executor's help: triggers, rechecks, generated columns. */
static void
ExecuteUpdate(Target *target, Leaf *leaf, TupleTableSlot *row)
{
	EvalPlanQualSetSlot(&target->epq, row);
	ExecSimpleRelationUpdate(leaf->info, target->estate, &target->epq, leaf->found, row);
}

/*
 * Write the incoming columns over the row in leaf->found, which is locked unless
 * the leaf is plain and PeekRow() found it.  False: it was not and has changed.
 */
static bool
UpdateFound(Session *session, Target *target, Leaf *leaf, bool locked)
{
	Merge(target, leaf);
	TupleTableSlot *row = ToLeaf(leaf, target->merged);

	if (target->proute && !ExecPartitionCheck(leaf->info, row, target->estate, false))
	{
		/* What it shares with the row that was found goes with that one's pin. */
		ExecMaterializeSlot(target->merged);
		if (!locked && !LockPeeked(leaf, LockTupleExclusive))
			return false;
		Move(session, target, leaf);
		return true;
	}
	StampCommand(target);
	if (!locked)
		return WriteUpdate(target, leaf, row);
	ExecuteUpdate(target, leaf, row);
	return true;
}

/* A table that is published takes updates and deletes only with a replica identity. */
static void
CheckPublication(Leaf *leaf, CmdType command)
{
	bool *checked = command == CMD_UPDATE ? &leaf->may_update : &leaf->may_delete;

	if (!*checked)
		CheckCmdReplicaIdentity(leaf->info->ri_RelationDesc, command);
	*checked = true;
}

/*
 * Whether the row in leaf->found may be changed: it is the one that was changed at
 * the sender, or the pair's rule says that it does not matter.  Where it is not
 * locked, it is this very version that is written, or none.
 */
static bool
MayChange(Session *session, Target *target, Leaf *leaf, Type type, TupleTableSlot *search)
{
	if (!target->carries_old || IsExpectedRow(session, target, leaf, session->change))
		return true;
	return Resolve(session, target, leaf, type, search) == Action::Apply;
}

/* Update what PeekRow() found, or finds when that has changed since; false when there is none. */
static bool
UpdatePeeked(Session *session, Target *target, Leaf *leaf, TupleTableSlot *search, bool found)
{
	for (; found; found = PeekRow(leaf, search))
	{
		bool done = !MayChange(session, target, leaf, Type::UpdateOriginDiffers, search) ||
					UpdateFound(session, target, leaf, false);

		ExecClearTuple(leaf->found);
		if (done)
			return true;
		CHECK_FOR_INTERRUPTS();
	}
	return false;
}

/* Find the row by its key and update it, if the rule lets; false when there is none. */
static bool
UpdateRow(Session *session, Target *target, Leaf *leaf, TupleTableSlot *search, LockTupleMode mode)
{
	constexpr Type type = Type::UpdateOriginDiffers;

	if (!leaf->plain)
		return FindRow(leaf, search, mode) && (!MayChange(session, target, leaf, type, search) ||
											   UpdateFound(session, target, leaf, true));
	CheckPublication(leaf, CMD_UPDATE);
	return UpdatePeeked(session, target, leaf, search, PeekRow(leaf, search));
}

/* Find the row by its key and delete it, if the rule lets; false when there is none. */
static bool
DeleteRow(Session *session, Target *target, Leaf *leaf, TupleTableSlot *search)
{
	constexpr Type type = Type::DeleteOriginDiffers;

	if (!leaf->plain)
	{
		if (!FindRow(leaf, search, LockTupleExclusive))
			return false;
		if (MayChange(session, target, leaf, type, search))
			DeleteFound(target, leaf);
		return true;
	}
	CheckPublication(leaf, CMD_DELETE);
	while (PeekRow(leaf, search))
	{
		bool done = !MayChange(session, target, leaf, type, search) || WriteDelete(target, leaf);

		ExecClearTuple(leaf->found);
		if (done)
			return true;
		CHECK_FOR_INTERRUPTS();
	}
	return false;
}

/* ---- changes ---- */

void
PlaceRow(Session *session, Target *target, Leaf *leaf, TupleTableSlot *row)
{
	bool found = FindRow(leaf, row, LockTupleNoKeyExclusive);

	if (found && WaitForPredecessor(session))
		found = FindRow(leaf, row, LockTupleNoKeyExclusive);
	if (!found)
	{
		InsertNew(session, target, leaf, row);
		return;
	}
	if (Resolve(session, target, leaf, Type::InsertExists, row) == Action::Apply)
	{
		CheckOnce(session, target, ACL_UPDATE);
		(void) UpdateFound(session, target, leaf, true);
	}
}

/* Insert target->row, now or later. */
static void
InsertRow(Session *session, Target *target)
{
	FillDefaults(target);
	if (CollectsInserts(target))
	{
		CollectInsert(session, target);
		return;
	}
	Leaf *leaf = Route(session, target, target->row);

	PlaceRow(session, target, leaf, ToLeaf(leaf, target->row));
}

/* There is no row to be updated: the rule may want the new one nevertheless. */
static void
PlaceMissing(Session *session, Target *target, Leaf *leaf, TupleTableSlot *search)
{
	if (Resolve(session, target, leaf, Type::UpdateMissing, search) != Action::Insert)
		return;
	CheckOnce(session, target, ACL_INSERT);
	FillDefaults(target);
	Leaf *to = Route(session, target, target->row);

	PlaceRow(session, target, to, ToLeaf(to, target->row));
}

/*
 * Whether the new key, in target->row, is taken, and what comes there goes again: that
 * would be a unique violation, of a row that need not be here.
 */
static bool
MeetsUndone(Session *session, Target *target)
{
	if (session->header.Inline() || !target->carries_old)
		return false;
	KeyOfRow(target);
	Leaf *leaf = Route(session, target, target->search);
	bool found = PeekRow(leaf, ToLeaf(leaf, target->search));

	ExecClearTuple(leaf->found);
	return found && IsUndone(session, Type::InsertExists);
}

/* Found by the old key where the key changes, else by the key in the new row. */
static void
Update(Session *session, Target *target, const change::Change *change)
{
	LockTupleMode mode = change->has_old_key ? LockTupleExclusive : LockTupleNoKeyExclusive;

	ReadRow(session, target, change);
	if (!change->has_old_key && CollectsUpdates(target))
	{
		CollectUpdate(session, target);
		return;
	}
	if (change->has_old_key && MeetsUndone(session, target))
		return;
	if (change->has_old_key)
		ReadKey(session, target, change);
	else
		KeyOfRow(target);
	Leaf *leaf = Route(session, target, target->search);
	TupleTableSlot *search = ToLeaf(leaf, target->search);

	if (!UpdateRow(session, target, leaf, search, mode) &&
		!(WaitForPredecessor(session) && UpdateRow(session, target, leaf, search, mode)))
		PlaceMissing(session, target, leaf, search);
}

/* In memory that lasts as long as the row. */
static void
WriteUpdateAt(Session *session, Target *target, const ItemPointerData &place)
{
	Leaf *leaf = target->leaves;
	TupleTableSlot *search = target->search;

	KeyOfRow(target);
	session->updating = target;
	CheckPublication(leaf, CMD_UPDATE);
	if (!UpdatePeeked(session, target, leaf, search, PeekRowAt(leaf, search, place)) &&
		!(WaitForPredecessor(session) &&
		  UpdateRow(session, target, leaf, search, LockTupleNoKeyExclusive)))
		PlaceMissing(session, target, leaf, search);
}

void
WriteCollectedUpdate(Session *session, Target *target, TupleTableSlot *row,
					 const ItemPointerData &place)
{
	TupleTableSlot *own = target->row;

	ResetPerTupleExprContext(target->estate);
	target->row = row;
	InContext(GetPerTupleMemoryContext(target->estate),
			  [&] { WriteUpdateAt(session, target, place); });
	target->row = own;
}

/* A row that is gone already is no reason to stop, unless the rule says so. */
static void
Delete(Session *session, Target *target, const change::Change *change)
{
	ReadKey(session, target, change);
	Leaf *leaf = Route(session, target, target->search);
	TupleTableSlot *search = ToLeaf(leaf, target->search);

	if (!DeleteRow(session, target, leaf, search) &&
		!(WaitForPredecessor(session) && DeleteRow(session, target, leaf, search)))
		Resolve(session, target, leaf, Type::DeleteMissing, search);
}

/* ---- one change ---- */

/* What the caller must be allowed to do, conflicts aside. */
static AclMode
NeededPrivilege(change::Kind kind)
{
	switch (kind)
	{
		case change::kInsert:
			return ACL_INSERT;
		case change::kUpdate:
			return ACL_UPDATE;
		default:
			return ACL_DELETE;
	}
}

/* Whether anything of ours may look at what the change wrote. */
static bool
IsObserved(const Target *target)
{
	return target->volatile_defaults || target->reads || target->fires;
}

/* A change of the key may turn out to be undone at one of its rows: the other half goes on. */
static bool
GoesOn(Session *session)
{
	if (!session->change->has_old_key)
		return false;
	const change::Change *left = WhatIsLeft(session, session->change);

	if (left == NULL || left == session->change)
		return false;
	session->change = left;
	return true;
}

/* session->change, as the owner, in memory that lasts as long as the change. */
static void
Dispatch(Session *session, Target *target)
{
	do
	{
		const change::Change *change = session->change;

		CheckOnce(session, target, NeededPrivilege(change->kind));
		switch (change->kind)
		{
			case change::kInsert:
				ReadRow(session, target, change);
				InsertRow(session, target);
				break;
			case change::kUpdate:
				Update(session, target, change);
				break;
			default:
				Delete(session, target, change);
				break;
		}
	} while (GoesOn(session));
}

/*
 * Triggers are the owner's code and run with the owner's rights.  Where there
 * are but rechecks of constraints, those are handed on to the transaction's end,
 * which a restricted role could not do.
 */
static void
DispatchWithTriggers(Session *session, Target *target)
{
	AfterTriggerBeginQuery();
	Dispatch(session, target);
	if (!target->fires)
		BecomeCaller(session);
	AfterTriggerEndQuery(target->estate);
}

/*
 * Rights are the caller's to ask and the owner's to use.  Commands are counted
 * only where something could see the difference; rows that are touched twice
 * are noticed when they are found (LockFound).
 */
void
ApplyRowChange(Session *session, const change::Change *change)
{
	Target *target = TargetOf(session, change->relation);

	session->schema = target->schema;
	session->table = target->table;
	CheckOnce(session, target, NeededPrivilege(change->kind));
	if (session->collected != NULL)
		FlushBefore(session, target, change,
					target->proute != NULL || target->leaves->queues || IsObserved(target));
	const change::Change *left = WhatIsLeft(session, change);

	if (left == NULL)
		return;
	session->change = left;
	ResetPerTupleExprContext(target->estate);
	BecomeOwner(session, target->owner, target->trusted);
	InContext(GetPerTupleMemoryContext(target->estate), [&] {
		if (FiresAtOnce(session, target))
			DispatchWithTriggers(session, target);
		else
			Dispatch(session, target);
	});
	BecomeCaller(session);
	if (IsObserved(target))
		NextCommand();
}

} // namespace mmrepl::apply
