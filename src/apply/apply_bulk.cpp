/*
 * apply_bulk.cpp
 *		Runs of inserts into one table, written together.
 *
 * A row is not looked for before it is inserted.  The entry in the key's index
 * is made in a way that reports a row with the same key instead of raising, the
 * test and the entry being one step for every other session; what then turns out
 * to be a conflict is taken back and treated as one.  That works for tables
 * whose only unique index is the key's: another one could raise first.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

/* The rows into the table, still without index entries. */
static void
InsertRows(Target *target)
{
	Run *run = target->run;
	CommandId cid = GetCurrentCommandId(true);

	if (run->count == 1)
		table_tuple_insert(target->rel, run->inserts[0], cid, 0, NULL);
	else
		table_multi_insert(target->rel, run->inserts, run->count, cid, 0, NULL);
}

/* Index entries of every row; returns how many have a key that is there already. */
static int
InsertEntries(Session *session, Target *target)
{
	Run *run = target->run;
	ResultRelInfo *info = target->info;
	int n_conflicts = 0;

	for (int i = 0; i < run->count; i++)
	{
		run->conflicts[i] = false;
		session->ticket = run->tickets[i];
		list_free(InsertIndexEntriesOfInsert(info, run->inserts[i], target->estate,
											 &run->conflicts[i], run->key_index));
		n_conflicts += run->conflicts[i];
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
	Run *run = target->run;

	NextCommand();
	for (int i = 0; i < run->count; i++)
		if (run->conflicts[i])
			TakeBack(target, run->inserts[i]);
	NextCommand();
	for (int i = 0; i < run->count; i++)
		if (run->conflicts[i])
		{
			session->ticket = run->tickets[i];
			session->at = run->at[i];
			ShareRow(target->row, run->inserts[i]);
			PlaceRow(session, target, target->leaves, target->row);
		}
}

void
WriteInserts(Session *session, Target *target)
{
	Run *run = target->run;

	InsertRows(target);
	if (target->info->ri_NumIndices > 0 && InsertEntries(session, target) > 0)
		ResolveConflicts(session, target);
	for (int i = 0; i < run->count; i++)
		ExecClearTuple(run->inserts[i]);
}

} // namespace mmrepl::apply
