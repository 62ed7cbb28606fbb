/*
 * change_encode.cpp
 *		From rows to records.
 */
#include "change_internal.hpp"

namespace mmrepl::change
{

void
PutVarint(StringInfo buf, uint64 value)
{
	for (; value >= 0x80; value >>= 7)
		appendStringInfoCharMacro(buf, (char) (value | 0x80));
	appendStringInfoCharMacro(buf, (char) value);
}

void
PutString(StringInfo buf, const char *string)
{
	size_t length = strlen(string);

	PutVarint(buf, length);
	appendBinaryStringInfo(buf, string, (int) length);
}

/* Number relations as the segment before does, unless that leaves no number. */
static void
InheritNumbers(Segment *segment, const Segment *follows)
{
	if (follows->n_relations == kSegmentRelations)
		return;
	segment->n_relations = follows->n_relations;
	memcpy(segment->relations, follows->relations, sizeof(uint64) * follows->n_relations);
}

Segment *
NewSegment(MemoryContext context, uint32 seq, const Segment *follows)
{
	/* Most transactions end in their first segment; who needs another one will fill it. */
	const uint32 initial = seq == 0 || follows != NULL ? 512 : kSegmentTarget + 512;
	Segment *segment = (Segment *) MemoryContextAllocZero(context, sizeof(Segment));

	segment->context = context;
	segment->seq = seq;
	segment->capacity = initial;
	segment->data = (char *) MemoryContextAlloc(context, initial + VARHDRSZ);
	segment->data[VARHDRSZ] = kVersion;
	segment->length = 1;
	if (follows != NULL)
		InheritNumbers(segment, follows);
	return segment;
}

void
CloseSegment(Segment *segment)
{
	constexpr uint32 worth_it = 1024;

	segment->closed = true;
	if (segment->spilled || segment->capacity - segment->length < worth_it)
		return;
	segment->data = (char *) repalloc(segment->data, segment->length + VARHDRSZ);
	segment->capacity = segment->length;
}

void
TruncateSegment(Segment *segment, uint32 length, uint32 changes)
{
	segment->length = length;
	segment->changes = changes;
	for (int i = 0; i < segment->n_relations; i++)
		if (segment->relation_offsets[i] >= length)
			segment->relation_offsets[i] = 0; /* it keeps its number */
}

/* The segment's number for the relation; defines it if need be. */
static uint8
RelationNumber(Segment *segment, const RelationEncoder *rel)
{
	int i = segment->n_relations - 1;

	while (i >= 0 && segment->relations[i] != rel->serial)
		i--;
	if (i >= 0 && segment->relation_offsets[i] != 0)
		return (uint8) i;

	uint8 number = (uint8) (i >= 0 ? i : segment->n_relations);
	uint32 length = 1 + rel->definition_length;
	Cursor out = CursorAtEnd(segment);

	MmreplEnsure(number < kSegmentRelations, "segment defines too many relations");
	out.Head(kDefine, number);
	memcpy(out.Reserve(rel->definition_length), rel->definition, rel->definition_length);
	segment->relations[number] = rel->serial;
	segment->relation_offsets[number] = (uint16) segment->length;
	segment->relation_lengths[number] = length <= PG_UINT16_MAX ? (uint16) length : 0;
	segment->n_relations = Max(segment->n_relations, number + 1);
	segment->length = out.position;
	return number;
}

/* The value of a binary column without a function call. */
static void
PutFixed(Cursor &out, Wire wire, Datum value)
{
	switch (wire)
	{
		case Wire::Bool:
			out.Varint(2);
			out.U8(DatumGetBool(value) ? 1 : 0);
			break;
		case Wire::Int16:
			out.Trimmed(DatumGetInt16(value));
			break;
		case Wire::Int32:
			out.Trimmed(DatumGetInt32(value));
			break;
		case Wire::Int64:
			out.Trimmed(DatumGetInt64(value));
			break;
		case Wire::Bits32:
			out.Varint(5);
			out.U32((uint32) DatumGetInt32(value));
			break;
		case Wire::Bits64:
			out.Varint(9);
			out.U64((uint64) DatumGetInt64(value));
			break;
		default:
			out.Sized((const char *) DatumGetPointer(value), UUID_LEN);
			break;
	}
}

/* One column's value; detoasts. */
static void
PutValue(Cursor &out, ColumnEncoder *column, Datum value, bool isnull)
{
	Wire wire = column->wire;

	if (isnull)
		out.Varint(0);
	else if (IsFixed(wire))
		PutFixed(out, wire, value);
	else
	{
		Value bytes = BytesOf(wire, &column->output, value);

		out.Sized(bytes.data, bytes.length);
	}
}

/* What the column held before; a long value's digest. */
static void
PutOldValue(Cursor &out, ColumnEncoder *column, Datum value, bool isnull)
{
	Wire wire = column->wire;

	if (isnull)
		out.Varint(0);
	else if (IsFixed(wire))
		PutFixed(out, wire, value);
	else
	{
		Value bytes = BytesOf(wire, &column->output, value);

		if (bytes.length <= kDigestFrom)
		{
			out.Varint((uint64) bytes.length + 2);
			memcpy(out.Reserve(bytes.length), bytes.data, bytes.length);
			return;
		}
		out.Varint(1);
		out.Varint(bytes.length);
		Digest(bytes.data, bytes.length, out.Reserve(kDigestBytes));
	}
}

/* All columns, or the key columns only. */
static void
PutTuple(Cursor &out, RelationEncoder *rel, TupleTableSlot *row, bool key_only)
{
	slot_getallattrs(row);
	for (int i = 0; i < rel->n_columns; i++)
	{
		ColumnEncoder *column = &rel->columns[i];

		if (!key_only || column->key)
			PutValue(out, column, row->tts_values[column->attnum - 1],
					 row->tts_isnull[column->attnum - 1]);
	}
}

/* Take the record into the segment. */
static void
Commit(const Cursor &out)
{
	out.segment->length = out.position;
	out.segment->changes++;
}

void
AppendInsert(Segment *segment, RelationEncoder *rel, TupleTableSlot *row)
{
	uint8 number = RelationNumber(segment, rel);
	Cursor out = CursorAtEnd(segment);

	out.Head(kInsertRow, number);
	PutTuple(out, rel, row, false);
	Commit(out);
}

/* Whether the value is the same one, in TOAST. */
static bool
StayedInToast(Datum before, Datum after)
{
	return VARATT_IS_EXTERNAL_ONDISK(DatumGetPointer(after)) &&
		   VARATT_IS_EXTERNAL_ONDISK(DatumGetPointer(before)) &&
		   memcmp(DatumGetPointer(before), DatumGetPointer(after), TOAST_POINTER_SIZE) == 0;
}

bool
ValueChanged(int at, TupleTableSlot *old_row, TupleTableSlot *new_row)
{
	Form_pg_attribute attribute = TupleDescAttr(new_row->tts_tupleDescriptor, at);
	Datum before = old_row->tts_values[at];
	Datum after = new_row->tts_values[at];

	if (old_row->tts_isnull[at] || new_row->tts_isnull[at])
		return old_row->tts_isnull[at] != new_row->tts_isnull[at];
	if (attribute->attlen == -1 && StayedInToast(before, after))
		return false;
	return !datum_image_eq(before, after, attribute->attbyval, attribute->attlen);
}

static bool
KeyChanged(RelationEncoder *rel, TupleTableSlot *old_row, TupleTableSlot *new_row)
{
	slot_getallattrs(old_row);
	slot_getallattrs(new_row);
	for (int i = 0; i < rel->n_columns; i++)
		if (rel->columns[i].key && ValueChanged(rel->columns[i].attnum - 1, old_row, new_row))
			return true;
	return false;
}

/* What the update's other columns held before: a bitmap, and the values that were others. */
static void
PutBefore(Cursor &out, RelationEncoder *rel, TupleTableSlot *old_row, TupleTableSlot *new_row)
{
	uint32 bitmap_at = out.position;
	uint32 bitmap_bytes = (rel->n_columns + 7) / 8;

	memset(out.Reserve(bitmap_bytes), 0, bitmap_bytes);
	for (int i = 0; i < rel->n_columns; i++)
	{
		int at = rel->columns[i].attnum - 1;

		if (rel->columns[i].key || !ValueChanged(at, old_row, new_row))
			continue;
		out.segment->data[VARHDRSZ + bitmap_at + i / 8] |= (char) (1 << (i % 8));
		PutOldValue(out, &rel->columns[i], old_row->tts_values[at], old_row->tts_isnull[at]);
	}
}

/* The deleted row outside of its key. */
static void
PutRest(Cursor &out, RelationEncoder *rel, TupleTableSlot *old_row)
{
	for (int i = 0; i < rel->n_columns; i++)
	{
		int at = rel->columns[i].attnum - 1;

		if (!rel->columns[i].key)
			PutOldValue(out, &rel->columns[i], old_row->tts_values[at], old_row->tts_isnull[at]);
	}
}

/* The columns outside the key whose values stayed in TOAST; attributes have been read. */
static Bitmapset *
Unmoved(const RelationEncoder *rel, TupleTableSlot *old_row, TupleTableSlot *new_row)
{
	Bitmapset *unmoved = NULL;

	for (int i = 0; i < rel->n_columns; i++)
	{
		int at = rel->columns[i].attnum - 1;

		if (!rel->columns[i].key && TupleDescAttr(new_row->tts_tupleDescriptor, at)->attlen == -1 &&
			!old_row->tts_isnull[at] && !new_row->tts_isnull[at] &&
			StayedInToast(old_row->tts_values[at], new_row->tts_values[at]))
			unmoved = bms_add_member(unmoved, i);
	}
	return unmoved;
}

/*
 * The relation as an update needs it: without what stayed in TOAST.  It is kept beside
 * the whole one; who has seen that many sets of columns sends them all.
 */
static RelationEncoder *
Sparing(RelationEncoder *rel, TupleTableSlot *old_row, TupleTableSlot *new_row)
{
	constexpr int kMostSpared = 8;
	Bitmapset *unmoved = rel->whole ? NULL : Unmoved(rel, old_row, new_row);

	if (unmoved == NULL)
		return rel;
	for (RelationEncoder *each = rel->spared; each != NULL; each = each->spared)
		if (bms_equal(each->sparing, unmoved))
			return each;
	if (rel->n_spared == kMostSpared)
		return rel;
	RelationEncoder *partial =
		InContext(GetMemoryChunkContext(rel), [&] { return BuildPartial(rel, unmoved); });

	partial->spared = rel->spared;
	rel->spared = partial;
	rel->n_spared++;
	return partial;
}

void
AppendUpdate(Segment *segment, RelationEncoder *rel, TupleTableSlot *old_row,
			 TupleTableSlot *new_row)
{
	bool key_changed = KeyChanged(rel, old_row, new_row);

	rel = Sparing(rel, old_row, new_row);
	uint8 number = RelationNumber(segment, rel);
	Cursor out = CursorAtEnd(segment);

	out.Head(key_changed ? kMoveRow : kUpdateRow, number);
	if (key_changed)
		PutTuple(out, rel, old_row, true);
	PutTuple(out, rel, new_row, false);
	if (rel->checked)
		PutBefore(out, rel, old_row, new_row);
	Commit(out);
}

void
AppendDelete(Segment *segment, RelationEncoder *rel, TupleTableSlot *old_row)
{
	uint8 number = RelationNumber(segment, rel);
	Cursor out = CursorAtEnd(segment);

	out.Head(kDeleteRow, number);
	PutTuple(out, rel, old_row, true);
	if (rel->checked)
		PutRest(out, rel, old_row);
	Commit(out);
}

void
AppendTruncate(Segment *segment, RelationEncoder *rel)
{
	uint8 number = RelationNumber(segment, rel);
	Cursor out = CursorAtEnd(segment);

	out.Head(kEmpty, number);
	Commit(out);
}

} // namespace mmrepl::change
