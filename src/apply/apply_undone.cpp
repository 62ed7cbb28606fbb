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

struct Row;

/* What a change does to the row with a key; one that changes the key is two of them. */
struct Step
{
	const char *at; /* see Session */
	Row *row;
	int next;	/* step of this row, 0: none */
	uint32 era; /* grows with each TRUNCATE */
	Image before;
	Image after;
};

struct Row
{
	char name[change::kDigestBytes]; /* of table and key */
	int last;
	const char *undone_to; /* the last step of a series that is not done */
};

/* What the batch does to every row of it. */
struct History
{
	HTAB *rows;
	Step *steps; /* in their order, from 1 */
	int count;
	int capacity;
	uint32 era;
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
			appendStringInfo(out, "%s:", quote_identifier(rel->columns[i].name));
			AppendColumn(out, before && !change->old[i].same
								  ? change->old[i]
								  : change::OldValue{.value = change->row[i]});
		}
	change::Digest(out->data, (uint64) out->len, image.digest);
	return image;
}

/* The row with the old key, or the new one. */
static Row *
RowOf(History *history, const change::Change *change, bool old_key)
{
	const change::Relation *rel = change->relation;
	StringInfo out = &history->scratch;
	char name[change::kDigestBytes];
	int at = 0;
	bool found;

	resetStringInfo(out);
	appendBinaryStringInfo(out, rel->remote_schema, (int) strlen(rel->remote_schema) + 1);
	appendBinaryStringInfo(out, rel->remote_table, (int) strlen(rel->remote_table) + 1);
	for (int i = 0; i < rel->n_columns; i++)
		if (rel->columns[i].key)
			AppendValue(out, old_key ? change->key[at++] : change->row[i]);
	change::Digest(out->data, (uint64) out->len, name);
	Row *row = (Row *) hash_search(history->rows, name, HASH_ENTER, &found);

	if (!found)
	{
		row->last = 0;
		row->undone_to = NULL;
	}
	return row;
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
	int number = ++history->count;

	if (row->last != 0)
		history->steps[row->last].next = number;
	row->last = number;
	history->steps[number] = {at, row, 0, history->era, before, after};
}

static void
AddChange(History *history, const char *at, const change::Change *change)
{
	if (change->kind == change::kTruncate)
	{
		history->era++;
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
	return history;
}

/* ---- deciding ---- */

static bool
Same(const Image &one, const Image &other)
{
	return one.there == other.there &&
		   (!one.there || memcmp(one.digest, other.digest, sizeof(one.digest)) == 0);
}

/* The step that ends the series which begins with this one; NULL if it is not undone. */
static const Step *
EndOfSeries(const History *history, const Step *first)
{
	for (const Step *step = first; step->era == first->era; step = &history->steps[step->next])
	{
		if (Same(first->before, step->after))
			return step;
		if (step->next == 0)
			break;
	}
	return NULL;
}

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

/* The change is not done: nor is what undoes it, at each of its rows. */
static void
PassOver(History *history, int number, const char *at)
{
	for (; number <= history->count && history->steps[number].at == at; number++)
	{
		const Step *end = EndOfSeries(history, &history->steps[number]);

		if (end != NULL && history->steps[number].row->undone_to < end->at)
			history->steps[number].row->undone_to = end->at;
	}
}

bool
IsUndone(Session *session)
{
	if (session->history == NULL)
		session->history = InContext(session->context, [&] { return ReadHistory(session); });
	int number = FirstAt(session->history, session->at);

	/* A change of the key is judged by the row that it was to find. */
	if (EndOfSeries(session->history, &session->history->steps[number]) == NULL)
		return false;
	PassOver(session->history, number, session->at);
	return true;
}

bool
IsPassedOver(Session *session)
{
	History *history = session->history;

	if (history == NULL)
		return false;
	int number = FirstAt(history, session->at);

	for (int i = number; i <= history->count && history->steps[i].at == session->at; i++)
		if (session->at <= history->steps[i].row->undone_to)
		{
			PassOver(history, number, session->at);
			return true;
		}
	return false;
}

} // namespace mmrepl::apply
