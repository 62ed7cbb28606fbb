/*
 * apply_undone.cpp
 *		Changes that those behind them undo, and that come late.
 *
 * A transaction that is in doubt has lost its locks at this node.  Our own writers go on
 * with a row nevertheless, if the sender has the one that we have (see IsExpectedRow()).
 * It has where the transaction left the row as it was: updated it without changing it,
 * updated it there and back, inserted and deleted it.  They have written at both nodes
 * then, and what comes late must not overwrite that.  So where a change finds another row
 * than its sender had, and those behind it bring back the row that was there before,
 * neither it nor they are done.
 *
 * It is rows that are brought back, and a change of the key has two of them: the one that
 * goes, and the one that comes.  Where one is brought back and the other is not, the change
 * is half done: as the INSERT, or the DELETE, that it is for the other row.
 *
 * Such a series may be of several transactions.  Looked at is one batch: what undoes a
 * change only in the next one, another part of a large transaction, is not seen.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

/* A row as far as it travels, but for its key. */
struct Image
{
	bool there;
	char digest[change::kDigestBytes];
};

/* A row that changes name, or (without a key) a remote table. */
struct Row
{
	char name[change::kDigestBytes];
	uint32 era;	   /* of a table: grows with each TRUNCATE */
	int undone_to; /* the last step that is not done, 0: none */
};

/* What a change does to the row with a key; one that changes the key is two of them. */
struct Step
{
	const char *at; /* see Session */
	Row *row;
	uint32 era; /* of the table */
	int end; /* the first step, from this one on, that brings back what this one found; 0: none */
	Image before;
	Image after;
};

/* What the batch does to every row of it. */
struct History
{
	HTAB *rows;
	Step *steps; /* in their order, from 1 */
	int count;
	int capacity;
	const change::Relation *relation; /* of the change before, in its segment */
	Row *table;						  /* ... and its table */
	StringInfoData scratch;
};

/* ---- reading ---- */

static void
AppendValue(StringInfo out, const change::Value &value)
{
	appendBinaryStringInfo(out, (const char *) &value.length, sizeof(value.length));
	appendStringInfoChar(out, value.data == NULL ? 'n' : 'v');
	if (value.data != NULL)
		appendBinaryStringInfo(out, value.data, (int) value.length);
}

/* A long value as its digest, which may be all that is known of it. */
static void
AppendColumn(StringInfo out, const change::OldValue &column)
{
	char digest[change::kDigestBytes];

	if (column.digest == NULL && column.value.length <= change::kDigestFrom)
	{
		AppendValue(out, column.value);
		return;
	}
	if (column.digest == NULL)
		change::Digest(column.value.data, column.value.length, digest);
	appendBinaryStringInfo(out, (const char *) &column.value.length, sizeof(column.value.length));
	appendStringInfoChar(out, 'd');
	appendBinaryStringInfo(out, column.digest ? column.digest : digest, sizeof(digest));
}

/* The row before, or after, the change; one that is not known is like no other. */
static Image
ImageOf(History *history, const change::Change *change, bool before)
{
	const change::Relation *rel = change->relation;
	StringInfo out = &history->scratch;
	Image image = {};

	image.there = change->kind != (before ? change::kInsert : change::kDelete);
	if (!image.there || (before && !rel->checked))
		return image;
	resetStringInfo(out);
	for (int i = 0; i < rel->n_columns; i++)
		if (!rel->columns[i].key)
		{
			appendBinaryStringInfo(out, rel->columns[i].name,
								   (int) strlen(rel->columns[i].name) + 1);
			AppendColumn(out, before && !change->old[i].same
								  ? change->old[i]
								  : change::OldValue{.value = change->row[i]});
		}
	change::Digest(out->data, (uint64) out->len, image.digest);
	return image;
}

/* The row of that name, which is in the scratch. */
static Row *
NamedRow(History *history)
{
	char name[change::kDigestBytes];
	bool found;

	change::Digest(history->scratch.data, (uint64) history->scratch.len, name);
	Row *row = (Row *) hash_search(history->rows, name, HASH_ENTER, &found);

	if (!found)
	{
		row->era = 0;
		row->undone_to = 0;
	}
	return row;
}

static void
NameTable(StringInfo out, const char *schema, const char *table)
{
	appendBinaryStringInfo(out, schema, (int) strlen(schema) + 1);
	appendBinaryStringInfo(out, table, (int) strlen(table) + 1);
}

/*
 * The row with the old key, or the new one.  Tables of the sender that share a table here
 * have rows of their own: each may bring other columns.
 */
static Row *
RowOf(History *history, const change::Change *change, bool old_key)
{
	const change::Relation *rel = change->relation;
	StringInfo out = &history->scratch;
	int at = 0;

	resetStringInfo(out);
	NameTable(out, rel->remote_schema, rel->remote_table);
	NameTable(out, rel->local_schema, rel->local_table);
	for (int i = 0; i < rel->n_columns; i++)
		if (rel->columns[i].key)
			AppendValue(out, old_key ? change->key[at++] : change->row[i]);
	return NamedRow(history);
}

static Row *
TableOf(History *history, const change::Relation *rel)
{
	if (rel != history->relation)
	{
		resetStringInfo(&history->scratch);
		NameTable(&history->scratch, rel->remote_schema, rel->remote_table);
		history->table = NamedRow(history);
		history->relation = rel;
	}
	return history->table;
}

static void
AddStep(History *history, const char *at, Row *row, const Image &before, const Image &after)
{
	if (history->count + 1 >= history->capacity)
	{
		history->capacity *= 2;
		history->steps =
			(Step *) repalloc_huge(history->steps, sizeof(Step) * (Size) history->capacity);
	}
	history->steps[++history->count] = {at, row, history->table->era, 0, before, after};
}

static void
AddChange(History *history, const char *at, const change::Change *change)
{
	Row *table = TableOf(history, change->relation);

	if (change->kind == change::kTruncate)
	{
		table->era++;
		return;
	}
	Image before = ImageOf(history, change, true);
	Image after = ImageOf(history, change, false);

	if (!change->has_old_key)
	{
		AddStep(history, at, RowOf(history, change, change->kind == change::kDelete), before,
				after);
		return;
	}
	AddStep(history, at, RowOf(history, change, true), before, {});
	AddStep(history, at, RowOf(history, change, false), {}, after);
}

static void
AddSegment(History *history, const char *data, uint32 length)
{
	change::Decoder *decoder = (change::Decoder *) palloc(sizeof(change::Decoder));

	history->relation = NULL;
	change::StartDecoding(decoder, data, length);
	while (const change::Change *change = change::Next(decoder))
	{
		CHECK_FOR_INTERRUPTS();
		AddChange(history, Place(decoder), change);
	}
}

/* All of the batch, once more from its begin. */
static void
AddBatch(Session *session, History *history)
{
	change::Reader in = session->reader;
	MemoryContext segment =
		AllocSetContextCreate(CurrentMemoryContext, "mmrepl apply history", ALLOCSET_DEFAULT_SIZES);

	in.position = session->begin;
	while (!in.AtEnd())
	{
		Transaction transaction;

		ReadTransaction(session->header, &in, &transaction);
		for (uint32 i = 0; i < transaction.segments; i++)
		{
			uint32 length = in.U32();
			const char *data = in.Bytes(length);

			InContext(segment, [&] { AddSegment(history, data, length); });
			MemoryContextReset(segment);
		}
	}
	MemoryContextDelete(segment);
}

/* What a step leaves of a row; without padding, for it is hashed. */
struct State
{
	Row *row;
	uint32 era;
	uint32 there;
	char digest[change::kDigestBytes];
};
static_assert(sizeof(State) == sizeof(Row *) + 2 * sizeof(uint32) + change::kDigestBytes);

struct Reached
{
	State state;
	int step;
};

static State
StateOf(const Step &step, const Image &image)
{
	State state = {step.row, step.era, image.there, {}};

	memcpy(state.digest, image.digest, sizeof(state.digest));
	return state;
}

/* From the last step to the first, so that the nearest one is known. */
static void
FindEnds(History *history)
{
	HASHCTL control = {};

	control.keysize = sizeof(State);
	control.entrysize = sizeof(Reached);
	control.hcxt = CurrentMemoryContext;
	HTAB *states = hash_create("mmrepl states of rows", history->count, &control,
							   HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);

	for (int i = history->count; i > 0; i--)
	{
		Step &step = history->steps[i];
		State after = StateOf(step, step.after);
		State before = StateOf(step, step.before);

		((Reached *) hash_search(states, &after, HASH_ENTER, NULL))->step = i;
		const Reached *end = (const Reached *) hash_search(states, &before, HASH_FIND, NULL);

		step.end = end == NULL ? 0 : end->step;
	}
	hash_destroy(states);
}

static History *
ReadHistory(Session *session)
{
	History *history = (History *) palloc0(sizeof(History));
	HASHCTL control = {};

	control.keysize = change::kDigestBytes;
	control.entrysize = sizeof(Row);
	control.hcxt = CurrentMemoryContext;
	history->rows =
		hash_create("mmrepl rows of a batch", 256, &control, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	history->capacity = 256;
	history->steps = (Step *) palloc(sizeof(Step) * (Size) history->capacity);
	initStringInfo(&history->scratch);
	AddBatch(session, history);
	FindEnds(history);
	return history;
}

/* ---- deciding ---- */

/* The first step of the change at that place. */
static int
FirstAt(const History *history, const char *at)
{
	int low = 1;
	int high = history->count;

	while (low < high)
	{
		int middle = low + (high - low) / 2;

		if (history->steps[middle].at < at)
			low = middle + 1;
		else
			high = middle;
	}
	MmreplEnsure(history->steps[low].at == at, "a change is missing in its batch's history");
	return low;
}

/* The last one: another one where the key changes. */
static int
LastAt(const History *history, int first)
{
	bool two = first < history->count && history->steps[first + 1].at == history->steps[first].at;

	return two ? first + 1 : first;
}

/* The change is not done: nor is what undoes it, at each of its rows. */
static void
PassOver(History *history, int first, int last)
{
	for (int i = first; i <= last; i++)
	{
		Row *row = history->steps[i].row;

		row->undone_to = Max(row->undone_to, history->steps[i].end);
	}
}

static bool
IsOver(const History *history, int number)
{
	return number <= history->steps[number].row->undone_to;
}

bool
IsUndone(Session *session, conflict::Type type)
{
	if (session->history == NULL)
		session->history = InContext(session->context, [&] { return ReadHistory(session); });
	History *history = session->history;
	int first = FirstAt(history, session->at);
	int last = LastAt(history, first);

	if (history->steps[type == conflict::Type::InsertExists ? last : first].end == 0)
		return false;
	PassOver(history, first, last);
	return true;
}

/* What the change does to the row with the new key. */
static void
MakeInsert(change::Change *half)
{
	half->kind = change::kInsert;
	half->key = NULL;
	half->old = NULL;
}

/* What the change does to the row with the old key; its old values are all given. */
static void
MakeDelete(change::Change *half)
{
	int n = half->relation->n_columns;
	change::OldValue *old = NULL;

	if (half->old != NULL)
	{
		old = (change::OldValue *) palloc(sizeof(change::OldValue) * (Size) n);
		for (int i = 0; i < n; i++)
			old[i] = half->old[i].same ? change::OldValue{.value = half->row[i]} : half->old[i];
	}
	half->kind = change::kDelete;
	half->row = NULL;
	half->old = old;
}

const change::Change *
WhatIsLeft(Session *session, const change::Change *change)
{
	History *history = session->history;

	if (history == NULL)
		return change;
	int first = FirstAt(history, session->at);
	int last = LastAt(history, first);
	bool goes = !IsOver(history, first);
	bool comes = !IsOver(history, last);

	if (goes && comes)
		return change;
	PassOver(history, first, last);
	goes = goes && !IsOver(history, first);
	comes = comes && !IsOver(history, last);
	/* Of a partial relation there is not enough for a new row. */
	if (!goes && (!comes || change->relation->partial))
		return NULL;
	return InContext(session->segment_context, [&] {
		change::Change *half = (change::Change *) palloc(sizeof(change::Change));

		*half = *change;
		half->has_old_key = false;
		if (goes)
			MakeDelete(half);
		else
			MakeInsert(half);
		return half;
	});
}

} // namespace mmrepl::apply
