/*
 * change_encode.cpp
 *		From rows to records.
 */
#include "change_internal.hpp"

namespace mmrepl::change
{

static uint64 last_serial;

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

/* Whether a column has another value, to the byte.  A value that stayed in TOAST is not read. */
static bool
ValueChanged(int at, TupleTableSlot *old_row, TupleTableSlot *new_row)
{
	Form_pg_attribute attribute = TupleDescAttr(new_row->tts_tupleDescriptor, at);
	Datum before = old_row->tts_values[at];
	Datum after = new_row->tts_values[at];

	if (old_row->tts_isnull[at] || new_row->tts_isnull[at])
		return old_row->tts_isnull[at] != new_row->tts_isnull[at];
	if (attribute->attlen == -1 && VARATT_IS_EXTERNAL_ONDISK(DatumGetPointer(before)) &&
		VARATT_IS_EXTERNAL_ONDISK(DatumGetPointer(after)) &&
		memcmp(DatumGetPointer(before), DatumGetPointer(after), TOAST_POINTER_SIZE) == 0)
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

void
AppendUpdate(Segment *segment, RelationEncoder *rel, TupleTableSlot *old_row,
			 TupleTableSlot *new_row)
{
	bool key_changed = KeyChanged(rel, old_row, new_row);
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

/* ---- relation definitions ---- */

/* Whether a type's text form is the same under any settings. */
static bool
TextIsStable(Oid type)
{
	switch (type)
	{
		case JSONOID:
		case JSONBOID:
		case XMLOID:
		case NAMEOID:
		case CHAROID:
		case TSVECTOROID:
		case TSQUERYOID:
			return true;
		default:
			return get_typtype(type) == TYPTYPE_ENUM;
	}
}

/* Choose how a column travels. */
static void
BuildColumn(ColumnEncoder *column, const ColumnSpec &spec, Form_pg_attribute attribute)
{
	Oid base = getBaseType(attribute->atttypid);
	Oid function;
	bool is_varlena;

	column->attnum = spec.attnum;
	column->key = spec.key;
	column->binary = base < kFirstUnstableOid && WireOf(base) != Wire::Text;
	column->type = column->binary ? base : attribute->atttypid;
	column->wire = column->binary ? WireOf(base) : Wire::Text;
	column->by_text = !column->binary && !TextIsStable(base);
	if (column->binary)
		getTypeBinaryOutputInfo(column->type, &function, &is_varlena);
	else
		getTypeOutputInfo(column->type, &function, &is_varlena);
	fmgr_info(function, &column->output);
}

/* A column's entry in the definition. */
static void
PutColumn(StringInfo buf, const ColumnEncoder &column, const char *remote_name)
{
	size_t length = strlen(remote_name);

	MmreplEnsure(length <= kNameLength, "column name is too long: %s", remote_name);
	appendStringInfoCharMacro(buf, (char) (length | (column.key ? kKey : 0) |
										   (column.binary ? kBinary : 0)));
	appendBinaryStringInfo(buf, remote_name, (int) length);
	if (column.type < kFirstUnstableOid)
	{
		PutVarint(buf, column.type);
		return;
	}
	HeapTuple tuple = SearchSysCache1(TYPEOID, ObjectIdGetDatum(column.type));

	MmreplEnsure(HeapTupleIsValid(tuple), "cache lookup failed for type %u", column.type);
	Form_pg_type form = (Form_pg_type) GETSTRUCT(tuple);

	PutVarint(buf, 0);
	PutString(buf, get_namespace_name(form->typnamespace));
	PutString(buf, NameStr(form->typname));
	ReleaseSysCache(tuple);
}

/* Number of the rule in the shape of a relation. */
static uint8
ConflictBits(Conflict conflict)
{
	return conflict == Conflict::ApplyRemote ? 0 : conflict == Conflict::KeepLocal ? 1 : 2;
}

/* Shape and names. */
static void
PutNames(StringInfo buf, const RelationSpec &spec)
{
	bool is_public = strcmp(spec.remote_schema, "public") == 0;
	bool same = strcmp(spec.remote_schema, spec.local_schema) == 0 &&
				strcmp(spec.remote_table, spec.local_table) == 0;

	appendStringInfoCharMacro(buf,
							  (char) (ConflictBits(spec.conflict) | (is_public ? kPublic : 0) |
									  (same ? kSameNames : 0) | (spec.checked ? kChecked : 0)));
	if (!is_public)
		PutString(buf, spec.remote_schema);
	PutString(buf, spec.remote_table);
	if (same)
		return;
	PutString(buf, spec.local_schema);
	PutString(buf, spec.local_table);
}

RelationEncoder *
BuildRelationEncoder(const RelationSpec &spec, TupleDesc desc)
{
	RelationEncoder *rel = (RelationEncoder *) palloc0(sizeof(RelationEncoder));
	StringInfoData buf;

	rel->serial = ++last_serial;
	rel->checked = spec.checked;
	rel->n_columns = spec.n_columns;
	rel->columns = (ColumnEncoder *) palloc0(sizeof(ColumnEncoder) * spec.n_columns);
	initStringInfo(&buf);
	PutNames(&buf, spec);
	PutVarint(&buf, (uint64) spec.pair_id);
	PutVarint(&buf, (uint64) spec.n_columns);
	for (int i = 0; i < spec.n_columns; i++)
	{
		const ColumnSpec &column = spec.columns[i];

		BuildColumn(&rel->columns[i], column, TupleDescAttr(desc, column.attnum - 1));
		PutColumn(&buf, rel->columns[i], column.remote_name);
		rel->needs_text_format |= rel->columns[i].by_text;
	}
	rel->definition = buf.data;
	rel->definition_length = (uint32) buf.len;
	return rel;
}

/* ---- text format ---- */

int
BeginTextFormat()
{
	constexpr const char *path = "pg_catalog, pg_temp";
	const struct
	{
		const char *name;
		const char *value;
		bool holds; /* most of them are the defaults */
	} settings[] = {
		{"datestyle", "ISO", DateStyle == USE_ISO_DATES},
		{"intervalstyle", "postgres", IntervalStyle == INTSTYLE_POSTGRES},
		{"extra_float_digits", "3", extra_float_digits > 0},
		{"bytea_output", "hex", bytea_output == BYTEA_OUTPUT_HEX},
		{"array_nulls", "on", Array_nulls},
		{"search_path", path, strcmp(namespace_search_path, path) == 0},
	};
	int nest_level = NewGUCNestLevel();

	for (auto &setting : settings)
		if (!setting.holds)
			(void) set_config_option(setting.name, setting.value, PGC_USERSET, PGC_S_SESSION,
									 GUC_ACTION_SAVE, true, 0, false);
	return nest_level;
}

void
EndTextFormat(int nest_level)
{
	AtEOXact_GUC(true, nest_level);
}

} // namespace mmrepl::change
