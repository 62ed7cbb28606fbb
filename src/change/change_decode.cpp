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

char *
Reader::String()
{
	uint64 count = Varint();

	if (count > length - position)
		Malformed("A string is longer than its segment.");
	const char *bytes = Bytes((uint32) count);

	if (memchr(bytes, '\0', count) != NULL)
		Malformed("A string holds a zero byte.");
	return pnstrdup(bytes, count);
}

/* ---- relations ---- */

static void
ReadColumn(Reader *in, Column *column)
{
	column->name = in->String();
	uint8 flags = in->U8();
	uint64 type = in->Varint();

	column->key = (flags & kKey) != 0;
	column->binary = (flags & kBinary) != 0;
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
ReadConflict(Reader *in)
{
	switch ((Conflict) in->U8())
	{
		case Conflict::ApplyRemote:
			return Conflict::ApplyRemote;
		case Conflict::KeepLocal:
			return Conflict::KeepLocal;
		case Conflict::Error:
			return Conflict::Error;
	}
	Malformed("Unknown conflict rule.");
}

static Relation *
ReadRelation(Reader *in)
{
	Relation *rel = (Relation *) palloc0(sizeof(Relation));
	uint32 start = in->position;

	rel->remote_schema = in->String();
	rel->remote_table = in->String();
	rel->local_schema = in->String();
	rel->local_table = in->String();
	rel->conflict = ReadConflict(in);
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
DefineRelation(Decoder *decoder)
{
	uint16 number = decoder->reader.U16();

	if (decoder->n_relations > kSegmentRelations)
		Malformed("A segment defines too many relations.");
	for (int i = 0; i < decoder->n_relations; i++)
		if (decoder->relation_ids[i] == number)
			Malformed("A segment defines a relation twice.");
	decoder->relation_ids[decoder->n_relations] = number;
	decoder->relations[decoder->n_relations] = ReadRelation(&decoder->reader);
	decoder->n_relations++;
}

static Relation *
LookUpRelation(Decoder *decoder)
{
	uint16 number = decoder->reader.U16();

	for (int i = 0; i < decoder->n_relations; i++)
		if (decoder->relation_ids[i] == number)
			return decoder->relations[i];
	Malformed("A change names a relation that was not defined.");
}

static Value *
EnsureValues(Value **values, int *capacity, int need)
{
	if (need > *capacity)
	{
		*values = (Value *) palloc(sizeof(Value) * need);
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

const Change *
Next(Decoder *decoder)
{
	Reader *in = &decoder->reader;
	Change *change = &decoder->change;
	uint8 kind = kRelation;

	while (!in->AtEnd() && (kind = in->U8()) == kRelation)
		DefineRelation(decoder);
	if (kind == kRelation)
		return NULL;
	*change = {};
	change->kind = (Kind) kind;
	Relation *rel = LookUpRelation(decoder);

	change->relation = rel;
	switch (change->kind)
	{
		case kInsert:
			ReadRow(decoder, rel);
			break;
		case kUpdate:
			change->has_old_key = (in->U8() & kOldKey) != 0;
			if (change->has_old_key)
				ReadKey(decoder, rel);
			ReadRow(decoder, rel);
			break;
		case kDelete:
			ReadKey(decoder, rel);
			break;
		case kTruncate:
			break;
		default:
			Malformed("Unknown kind of change.");
	}
	return change;
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

static void
AppendInsertSql(StringInfo sql, const Change *change, const char *table)
{
	const Relation *rel = change->relation;

	appendStringInfo(sql, "INSERT INTO %s(", table);
	for (int i = 0; i < rel->n_columns; i++)
		appendStringInfo(sql, "%s%s", i ? "," : "", quote_identifier(rel->columns[i].name));
	appendStringInfoString(sql, ") VALUES(");
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

static void
AppendUpdateSql(StringInfo sql, const Change *change, const char *table)
{
	const Relation *rel = change->relation;
	bool set_keys = change->has_old_key || rel->n_keys == rel->n_columns;
	bool first = true;

	appendStringInfo(sql, "UPDATE %s SET ", table);
	for (int i = 0; i < rel->n_columns; i++)
	{
		const Column *column = &rel->columns[i];

		if (column->key && !set_keys)
			continue;
		appendStringInfo(sql, "%s%s = ", first ? "" : ", ", quote_identifier(column->name));
		AppendLiteral(sql, column, &change->row[i]);
		first = false;
	}
	if (change->has_old_key)
		AppendWhere(sql, rel, change->key, false);
	else
		AppendWhere(sql, rel, change->row, true);
}

void
AppendSql(StringInfo sql, const Change *change)
{
	const Relation *rel = change->relation;
	char *table = quote_qualified_identifier(rel->remote_schema, rel->remote_table);

	switch (change->kind)
	{
		case kInsert:
			AppendInsertSql(sql, change, table);
			break;
		case kUpdate:
			AppendUpdateSql(sql, change, table);
			break;
		case kDelete:
			appendStringInfo(sql, "DELETE FROM %s", table);
			AppendWhere(sql, rel, change->key, false);
			break;
		default:
			appendStringInfo(sql, "TRUNCATE TABLE ONLY %s", table);
			break;
	}
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
