/*
 * pair_counts.cpp
 *		What the transaction has captured for each pair, for the statistics.
 *
 * One entry for each pair and nest level, the deepest level first.  What a
 * savepoint takes back does not count.  A transaction that is prepared counts
 * then: nothing tells us later what it has captured.
 */
#include "transaction_internal.hpp"

namespace mmrepl::transaction
{

namespace
{

/* The pair's entry among those of the level, which come first; NULL: there is none. */
PairCount *
FindCount(int32 pair_id, int level)
{
	PairCount *count = current.counts;

	while (count != NULL && count->level == level && count->pair_id != pair_id)
		count = count->next;
	return count != NULL && count->level == level ? count : NULL;
}

/* Take the first entry out of the list when it is of the level or of a deeper one; else NULL. */
PairCount *
TakeCount(int level)
{
	PairCount *count = current.counts;

	if (count == NULL || count->level < level)
		return NULL;
	current.counts = count->next;
	return count;
}

/* An entry becomes one of the outer level, or part of the pair's there. */
void
MoveOut(PairCount *count, int level)
{
	PairCount *outer = FindCount(count->pair_id, level);

	if (outer == NULL)
	{
		count->level = level;
		count->next = current.counts;
		current.counts = count;
		return;
	}
	outer->inserts += count->inserts;
	outer->updates += count->updates;
	outer->deletes += count->deletes;
	outer->truncates += count->truncates;
	pfree(count);
}

} // namespace

void
CountCapture(int32 pair_id, change::Kind kind)
{
	if (pair_id == 0 && kind != change::kTruncate) /* HasTruncated() asks for those */
		return;

	int level = GetCurrentTransactionNestLevel();
	PairCount *count = FindCount(pair_id, level);

	if (count == NULL)
	{
		count = (PairCount *) MemoryContextAllocZero(current.context, sizeof(PairCount));
		count->pair_id = pair_id;
		count->level = level;
		count->counters = pair_id == 0 ? NULL : stats::ForPair(MyDatabaseId, pair_id);
		count->next = current.counts;
		current.counts = count;
	}
	count->inserts += kind == change::kInsert;
	count->updates += kind == change::kUpdate;
	count->deletes += kind == change::kDelete;
	count->truncates += kind == change::kTruncate;
}

void
MergePairCounts(int level)
{
	PairCount *inner = NULL;
	PairCount *count;

	while ((count = TakeCount(level)) != NULL)
	{
		count->next = inner;
		inner = count;
	}
	while ((count = inner) != NULL)
	{
		inner = count->next;
		MoveOut(count, level - 1);
	}
}

void
UndoPairCounts(int level)
{
	PairCount *count;

	while ((count = TakeCount(level)) != NULL)
		pfree(count);
}

bool
HasTruncated()
{
	for (const PairCount *count = current.counts; count != NULL; count = count->next)
		if (count->truncates > 0)
			return true;
	return false;
}

void
AddPairCounts()
{
	for (PairCount *count = current.counts; count != NULL; count = count->next)
	{
		if (count->counters == NULL)
			continue;
		pg_atomic_fetch_add_u64(&count->counters->inserts, count->inserts);
		pg_atomic_fetch_add_u64(&count->counters->updates, count->updates);
		pg_atomic_fetch_add_u64(&count->counters->deletes, count->deletes);
		pg_atomic_fetch_add_u64(&count->counters->truncates, count->truncates);
	}
}

} // namespace mmrepl::transaction
