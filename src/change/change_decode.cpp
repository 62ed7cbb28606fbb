/*
 * change_decode.cpp
 *		From bytes that may be anything to changes; and to SQL text.
 */
#include "change_internal.hpp"

namespace mmrepl::change
{

constexpr uint64 kMaxColumns = MaxHeapAttributeNumber;

/* Every malformed input ends here. */
pg_attribute_noreturn() static void Malformed(const char *detail)
{
	ereport(ERROR, (errcode(ERRCODE_MMREPL_BAD_BATCH), errmsg("malformed replication data"),
					errdetail_internal("%s", detail)));
}

const char *
Reader::Bytes(uint32 count)
{
	if (count > length - position)
		Malformed("A length points past the end.");
	const char *at = data + position;

	position += count;
	return at;
}

uint8
Reader::U8()
{
	return (uint8) *Bytes(1);
}

uint16
Reader::U16()
{
	uint16 value;

	memcpy(&value, Bytes(2), 2);
	return pg_ntoh16(value);
}

uint32
Reader::U32()
{
	uint32 value;

	memcpy(&value, Bytes(4), 4);
	return pg_ntoh32(value);
}

uint64
Reader::U64()
{
	uint64 value;

	memcpy(&value, Bytes(8), 8);
	return pg_ntoh64(value);
}

uint64
Reader::Varint()
{
	uint64 value = 0;

	for (int shift = 0; shift < 64; shift += 7)
	{
		uint8 byte = U8();

		value |= (uint64) (byte & 0x7f) << shift;
		if (!(byte & 0x80))
			return value;
	}
	Malformed("A variable-length integer is too long.");
}

/* So many bytes as a palloc'd string. */
static char *
TakeString(Reader *in, uint64 count)
{
	if (count > in->length - in->position)
		Malformed("A string is longer than its segment.");
	const char *bytes = in->Bytes((uint32) count);

	if (memchr(bytes, '\0', count) != NULL)
		Malformed("A string holds a zero byte.");
	return pnstrdup(bytes, count);
}

char *
Reader::String()
{
	return TakeString(this, Varint());
}

/* ---- relations ---- */

static void
ReadColumn(Reader *in, Column *column)
{
	uint8 head = in->U8();

	column->name = TakeString(in, head & kNameLength);
	column->key = (head & kKey) != 0;
	column->binary = (head & kBinary) != 0;
	uint64 type = in->Varint();

	if (type >= kFirstUnstableOid)
		Malformed("A built-in type's OID is out of range.");
	column->type = (Oid) type;
	if (type == 0)
	{
		column->type_schema = in->String();
		column->type_name = in->String();
	}
	if (column->binary && WireOf(column->type) == Wire::Text)
		Malformed("A column is binary whose type has no portable binary form.");
}

static Conflict
ConflictOf(uint8 bits)
{
	switch (bits)
	{
		case 0:
			return Conflict::ApplyRemote;
		case 1:
			return Conflict::KeepLocal;
		case 2:
			return Conflict::Error;
	}
	Malformed("Unknown conflict rule.");
}

/* Shape and names. */
static void
ReadNames(Reader *in, Relation *rel)
{
	uint8 shape = in->U8();

	rel->conflict = ConflictOf(shape & kConflictMask);
	rel->checked = (shape & kChecked) != 0;
	rel->partial = (shape & kPartial) != 0;
	rel->remote_schema = (shape & kPublic) ? pstrdup("public") : in->String();
	rel->remote_table = in->String();
	rel->local_schema = (shape & kSameNames) ? rel->remote_schema : in->String();
	rel->local_table = (shape & kSameNames) ? rel->remote_table : in->String();
}

static Relation *
ReadRelation(Reader *in)
{
	Relation *rel = (Relation *) palloc0(sizeof(Relation));
	uint32 start = in->position;

	ReadNames(in, rel);
	rel->pair_id = (int32) in->Varint();
	uint64 n_columns = in->Varint();

	if (n_columns > kMaxColumns)
		Malformed("A relation has too many columns.");
	rel->n_columns = (int) n_columns;
	rel->columns = (Column *) palloc0(sizeof(Column) * (rel->n_columns + 1));
	for (int i = 0; i < rel->n_columns; i++)
	{
		ReadColumn(in, &rel->columns[i]);
		rel->n_keys += rel->columns[i].key;
	}
	rel->raw = in->data + start;
	rel->raw_length = in->position - start;
	return rel;
}

/* ---- changes ---- */

void
StartDecoding(Decoder *decoder, const char *data, uint32 length)
{
	memset(decoder, 0, sizeof(*decoder));
	decoder->reader = {data, length, 0};
	if (decoder->reader.U8() != kVersion)
		ereport(ERROR, (errcode(ERRCODE_MMREPL_BAD_BATCH),
						errmsg("replication data of an unknown version"),
						errhint("Update the extension mmrepl_bgw on the older node.")));
}

/* Take a definition; a number may not be defined twice in a segment. */
static void
DefineRelation(Decoder *decoder, uint8 number)
{
	if (decoder->relations[number] != NULL)
		Malformed("A segment defines a relation twice.");
	decoder->relations[number] = ReadRelation(&decoder->reader);
}

template <typename Element>
static Element *
EnsureValues(Element **values, int *capacity, int need)
{
	if (need > *capacity)
	{
		*values = (Element *) palloc(sizeof(Element) * need);
		*capacity = need;
	}
	return *values;
}

static void
ReadValues(Reader *in, Value *values, int count)
{
	for (int i = 0; i < count; i++)
	{
		uint64 length = in->Varint();

		if (length == 0)
		{
			values[i] = {NULL, 0};
			continue;
		}
		if (length - 1 > in->length - in->position)
			Malformed("A value is longer than its segment.");
		values[i].length = (uint32) (length - 1);
		values[i].data = in->Bytes(values[i].length);
	}
}

static void
ReadKey(Decoder *decoder, const Relation *rel)
{
	decoder->change.key =
		EnsureValues(&decoder->key_values, &decoder->key_capacity, Max(rel->n_keys, 1));
	ReadValues(&decoder->reader, decoder->change.key, rel->n_keys);
}

static void
ReadRow(Decoder *decoder, const Relation *rel)
{
	decoder->change.row =
		EnsureValues(&decoder->row_values, &decoder->row_capacity, Max(rel->n_columns, 1));
	ReadValues(&decoder->reader, decoder->change.row, rel->n_columns);
}

/* What one column held before. */
static void
ReadOldValue(Reader *in, const Column *column, OldValue *old)
{
	*old = {};
	if (column->binary && IsFixed(WireOf(column->type)))
	{
		ReadValues(in, &old->value, 1);
		return;
	}
	uint64 length = in->Varint();

	if (length == 0)
		return;
	if (length == 1)
	{
		length = in->Varint();
		old->value.length = (uint32) Min(length, (uint64) PG_UINT32_MAX);
		old->digest = in->Bytes(kDigestBytes);
		return;
	}
	if (length - 2 > in->length - in->position)
		Malformed("A value is longer than its segment.");
	old->value.length = (uint32) (length - 2);
	old->value.data = in->Bytes(old->value.length);
}

/* The old row of a checked relation's change; an update says which columns had other values. */
static void
ReadOldRow(Decoder *decoder, const Relation *rel, bool update)
{
	Reader *in = &decoder->reader;
	const char *bitmap = update ? in->Bytes((rel->n_columns + 7) / 8) : NULL;

	decoder->change.old =
		EnsureValues(&decoder->old_values, &decoder->old_capacity, Max(rel->n_columns, 1));
	for (int i = 0; i < rel->n_columns; i++)
	{
		OldValue *old = &decoder->change.old[i];

		*old = {.same = true};
		if (bitmap != NULL ? (bitmap[i / 8] >> (i % 8) & 1) != 0 : !rel->columns[i].key)
			ReadOldValue(in, &rel->columns[i], old);
	}
}

const Change *
Next(Decoder *decoder)
{
	Reader *in = &decoder->reader;
	Change *change = &decoder->change;
	uint8 head = kDefine;

	while (!in->AtEnd() && (head = in->U8()) >> kCodeShift == kDefine)
		DefineRelation(decoder, head);
	if (head >> kCodeShift == kDefine)
		return NULL;
	const Relation *rel = decoder->relations[head & (kSegmentRelations - 1)];

	if (rel == NULL)
		Malformed("A change names a relation that was not defined.");
	*change = {};
	change->relation = rel;
	switch (head >> kCodeShift)
	{
		case kInsertRow:
			change->kind = kInsert;
			ReadRow(decoder, rel);
			break;
		case kMoveRow:
			change->has_old_key = true;
			ReadKey(decoder, rel);
			[[fallthrough]];
		case kUpdateRow:
			change->kind = kUpdate;
			ReadRow(decoder, rel);
			if (rel->checked)
				ReadOldRow(decoder, rel, true);
			break;
		case kDeleteRow:
			change->kind = kDelete;
			ReadKey(decoder, rel);
			if (rel->checked)
				ReadOldRow(decoder, rel, false);
			break;
		case kEmpty:
			change->kind = kTruncate;
			break;
		default:
			Malformed("Unknown kind of change.");
	}
	return change;
}

/* ---- values ---- */

uint32
TrimmedWidth(Oid type)
{
	switch (WireOf(type))
	{
		case Wire::Int16:
			return 2;
		case Wire::Int32:
			return 4;
		case Wire::Int64:
			return 8;
		default:
			return 0;
	}
}

int64
ReadTrimmed(const Value *value, uint32 width)
{
	if (value->length == 0 || value->length > width)
		Malformed("An integer has a length that its type does not have.");
	int64 result = (int8) value->data[0];

	for (uint32 i = 1; i < value->length; i++)
		result = (int64) ((uint64) result << 8 | (uint8) value->data[i]);
	return result;
}

const Value *
Widen(const Column *column, const Value *value, char (&room)[kMaxTrimmedWidth], Value *wide)
{
	uint32 width = column->binary ? TrimmedWidth(column->type) : 0;

	if (width == 0)
		return value;
	uint64 bits = pg_hton64((uint64) ReadTrimmed(value, width) << (64 - 8 * width));

	memcpy(room, &bits, sizeof(room));
	*wide = {room, width};
	return wide;
}

/* ---- text ---- */

char *
ValueText(const Column *column, const Value *value)
{
	if (!column->binary || (WireOf(column->type) == Wire::Varlena && column->type != BYTEAOID))
		return pnstrdup(value->data, value->length);

	StringInfoData buf;
	Oid receive, output, ioparam;
	bool is_varlena;
	char room[kMaxTrimmedWidth];
	Value wide;

	value = Widen(column, value, room, &wide);
	initStringInfo(&buf);
	appendBinaryStringInfo(&buf, value->data, (int) value->length);
	getTypeBinaryInputInfo(column->type, &receive, &ioparam);
	Datum datum = OidReceiveFunctionCall(receive, &buf, ioparam, -1);

	if (buf.cursor != buf.len)
		Malformed("A binary value has bytes left over.");
	getTypeOutputInfo(column->type, &output, &is_varlena);
	return OidOutputFunctionCall(output, datum);
}

static void
AppendLiteral(StringInfo sql, const Column *column, const Value *value)
{
	if (value->data == NULL)
		appendStringInfoString(sql, "NULL");
	else
		appendStringInfoString(sql, quote_literal_cstr(ValueText(column, value)));
}

/* An identity column gets its value also where the table would rather make one. */
static void
AppendInsertSql(StringInfo sql, const Change *change, const char *table, const SqlShape &shape)
{
	const Relation *rel = change->relation;

	appendStringInfo(sql, "INSERT INTO %s(", table);
	for (int i = 0; i < rel->n_columns; i++)
		appendStringInfo(sql, "%s%s", i ? "," : "", quote_identifier(rel->columns[i].name));
	appendStringInfo(sql, ")%s VALUES(", shape.always ? " OVERRIDING SYSTEM VALUE" : "");
	for (int i = 0; i < rel->n_columns; i++)
	{
		if (i)
			appendStringInfoChar(sql, ',');
		AppendLiteral(sql, &rel->columns[i], &change->row[i]);
	}
	appendStringInfoChar(sql, ')');
}

/* WHERE over the key columns; values are the key's, or a whole row's. */
static void
AppendWhere(StringInfo sql, const Relation *rel, const Value *values, bool whole_row)
{
	int at = 0;
	bool first = true;

	appendStringInfoString(sql, " WHERE ");
	for (int i = 0; i < rel->n_columns; i++)
	{
		const Column *column = &rel->columns[i];

		if (!column->key)
			continue;
		const Value *value = &values[whole_row ? i : at++];

		appendStringInfo(sql, "%s%s", first ? "" : " AND ", quote_identifier(column->name));
		first = false;
		if (value->data == NULL)
		{
			appendStringInfoString(sql, " IS NULL");
			continue;
		}
		appendStringInfoString(sql, " = ");
		AppendLiteral(sql, column, value);
	}
}

/* Whether a key column keeps its value; it is not NULL. */
static bool
KeepsKey(const Value &before, const Value &after)
{
	return before.length == after.length && memcmp(before.data, after.data, before.length) == 0;
}

/*
 * The columns to be assigned: the key's where it has changed.  What is always generated
 * cannot be assigned, and is left alone by an UPDATE that does not make it anew.
 */
static Bitmapset *
Assigned(const Change *change, const SqlShape &shape)
{
	const Relation *rel = change->relation;
	Bitmapset *keys = NULL;
	Bitmapset *others = NULL;
	int at = 0;

	for (int i = 0; i < rel->n_columns; i++)
	{
		const Value *before =
			change->has_old_key && rel->columns[i].key ? &change->key[at++] : NULL;
		bool always = bms_is_member(i, shape.always);

		if (!rel->columns[i].key && !always)
			others = bms_add_member(others, i);
		if (rel->columns[i].key && !(always && before != NULL && KeepsKey(*before, change->row[i])))
			keys = bms_add_member(keys, i);
	}
	return change->has_old_key || others == NULL ? bms_union(keys, others) : others;
}

static void
AppendUpdateSql(StringInfo sql, const Change *change, const char *table, const SqlShape &shape)
{
	const Relation *rel = change->relation;
	Bitmapset *assigned = Assigned(change, shape);
	const char *before = "";
	int i = -1;

	appendStringInfo(sql, "UPDATE %s SET ", table);
	while ((i = bms_next_member(assigned, i)) >= 0)
	{
		appendStringInfo(sql, "%s%s = ", before, quote_identifier(rel->columns[i].name));
		AppendLiteral(sql, &rel->columns[i], &change->row[i]);
		before = ", ";
	}
	if (change->has_old_key)
		AppendWhere(sql, rel, change->key, false);
	else
		AppendWhere(sql, rel, change->row, true);
}

void
AppendSql(StringInfo sql, const Change *change, const SqlShape &shape)
{
	const Relation *rel = change->relation;
	int nest_level = BeginTextFormat(kTextSettings);
	char *table = quote_qualified_identifier(rel->remote_schema, rel->remote_table);

	switch (change->kind)
	{
		case kInsert:
			AppendInsertSql(sql, change, table, shape);
			break;
		case kUpdate:
			AppendUpdateSql(sql, change, table, shape);
			break;
		case kDelete:
			appendStringInfo(sql, "DELETE FROM %s", table);
			AppendWhere(sql, rel, change->key, false);
			break;
		default:
			appendStringInfo(sql, "TRUNCATE TABLE %s%s", shape.partitioned ? "" : "ONLY ", table);
			break;
	}
	EndTextFormat(nest_level);
}

/* ---- conflict rules ---- */

static const struct
{
	const char *name;
	Conflict conflict;
} conflict_names[] = {
	{"apply_remote", Conflict::ApplyRemote},
	{"keep_local", Conflict::KeepLocal},
	{"error", Conflict::Error},
};

bool
ConflictFromName(const char *name, Conflict *result)
{
	for (auto &each : conflict_names)
		if (strcmp(each.name, name) == 0)
		{
			*result = each.conflict;
			return true;
		}
	return false;
}

const char *
ConflictName(Conflict conflict)
{
	for (auto &each : conflict_names)
		if (each.conflict == conflict)
			return each.name;
	return "?";
}

} // namespace mmrepl::change
