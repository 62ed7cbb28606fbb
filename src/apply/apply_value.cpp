/*
 * apply_value.cpp
 *		From the bytes of a change to datums of the local columns.
 *
 * The bytes are not trusted: lengths are checked, text is verified in the
 * sender's encoding, and everything else goes through receive and input
 * functions, which trust nothing themselves.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

/* Zero-terminated text; result is palloc'd unless the bytes could be used as they are. */
static char *
Convert(const Session *session, const char *bytes, uint32 length, uint32 *new_length)
{
	char *text = pg_any_to_server(bytes, (int) length, session->header.encoding);

	*new_length = text == bytes ? length : (uint32) strlen(text);
	return text;
}

/* A zero-terminated copy; raises when the bytes are no text. */
char *
ToServer(const Session *session, const char *bytes, uint32 length)
{
	uint32 new_length;
	char *text = Convert(session, bytes, length, &new_length);

	return text == bytes ? pnstrdup(text, new_length) : text;
}

/* ---- how a column is read ---- */

/* Types whose binary form is their text. */
static bool
IsPlainText(Oid type)
{
	return type == TEXTOID || type == VARCHAROID || type == BPCHAROID;
}

/* A binary value of the same type whose bytes are the datum, more or less. */
static Form
BinaryForm(Oid type)
{
	switch (type)
	{
		case BOOLOID:
			return Form::Bool;
		case INT2OID:
			return Form::Int16;
		case INT4OID:
			return Form::Int32;
		case INT8OID:
		case MONEYOID:
			return Form::Int64;
		case OIDOID:
		case FLOAT4OID:
			return Form::Bits32;
		case FLOAT8OID:
			return Form::Bits64;
		case UUIDOID:
			return Form::Uuid;
		case BYTEAOID:
			return Form::Bytea;
		default:
			return Form::Receive;
	}
}

/* The cheapest way that is right for the types on both sides. */
static Form
ChooseForm(const change::Column *column, Form_pg_attribute attribute, Oid base)
{
	if (attribute->attgenerated)
		return Form::Ignore;
	if (!column->binary || IsPlainText(column->type))
	{
		bool any_text = attribute->atttypid == TEXTOID ||
						(IsPlainText(attribute->atttypid) && attribute->atttypmod < 0);

		return any_text ? Form::Text : Form::Input;
	}
	if (base != column->type)
		return Form::Convert;
	return attribute->atttypid == base ? BinaryForm(base) : Form::Receive;
}

/* The settings that decide how the field's values are read. */
static change::Settings
SettingsToRead(const Field *field, const change::Column *column, Oid base)
{
	if (field->form == Form::Convert)
		return change::SettingsOf(base, NULL) | change::SettingsOf(column->type, NULL);
	return field->form == Form::Input ? change::SettingsOf(base, NULL) : change::kNoSettings;
}

/* Function lookups in CurrentMemoryContext, where the field lives. */
void
InitField(Field *field, const change::Column *column, Form_pg_attribute attribute)
{
	Oid base = getBaseType(attribute->atttypid);
	Oid function;

	field->attnum = attribute->attnum;
	field->typmod = attribute->atttypmod;
	field->domain = base != attribute->atttypid;
	field->form = ChooseForm(column, attribute, base);
	if (field->form == Form::Ignore)
	{
		if (column->key)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_COLUMN_REFERENCE),
					 errmsg("key column \"%s\" is generated here", NameStr(attribute->attname)),
					 errhint("Make it an ordinary column, or use another key.")));
		return;
	}
	if (field->form == Form::Receive)
		getTypeBinaryInputInfo(attribute->atttypid, &function, &field->ioparam);
	else
		getTypeInputInfo(attribute->atttypid, &function, &field->ioparam);
	fmgr_info(function, &field->function);
	field->to_read = SettingsToRead(field, column, base);
	field->to_compare = field->to_read | (attribute->attbyval ? 0 : change::SettingsOf(base, NULL));
}

/* ---- reading ---- */

/* A domain may have something against NULL. */
static void
CheckNull(Field *field)
{
	if (field->form == Form::Receive)
		ReceiveFunctionCall(&field->function, NULL, field->ioparam, field->typmod);
	else
		InputFunctionCall(&field->function, NULL, field->ioparam, field->typmod);
}

/* The bytes are copied: some receive functions write a byte behind the value for a while. */
static Datum
Receive(Session *session, Field *field, const change::Column *column, const change::Value *value)
{
	StringInfo scratch = &session->scratch;
	char room[change::kMaxTrimmedWidth];
	change::Value wide;

	value = change::Widen(column, value, room, &wide);
	resetStringInfo(scratch);
	appendBinaryStringInfo(scratch, value->data, (int) value->length);
	Datum datum = ReceiveFunctionCall(&field->function, scratch, field->ioparam, field->typmod);

	if (scratch->cursor != scratch->len)
		ereport(ERROR, (errcode(ERRCODE_INVALID_BINARY_REPRESENTATION),
						errmsg("incorrect binary data format")));
	return datum;
}

/* A text datum of verified bytes. */
static Datum
ReadText(Session *session, const change::Value *value)
{
	uint32 length;
	char *text = Convert(session, value->data, value->length, &length);

	return PointerGetDatum(cstring_to_text_with_len(text, (int) length));
}

/* Through the local type's input function, which applies the typmod, too. */
static Datum
Input(Field *field, char *text)
{
	return InputFunctionCall(&field->function, text, field->ioparam, field->typmod);
}

/* A uuid datum of sixteen bytes. */
static Datum
ReadUuid(const change::Value *value)
{
	pg_uuid_t *uuid = (pg_uuid_t *) palloc(sizeof(pg_uuid_t));
	change::Reader in = {value->data, value->length, 0};

	memcpy(uuid->data, in.Bytes(UUID_LEN), UUID_LEN);
	return UUIDPGetDatum(uuid);
}

/* Fixed-width forms; the reader checks that there are enough bytes. */
static Datum
ReadFixed(Form form, const change::Value *value)
{
	static const uint32 widths[] = {0, 1, 4, 8, UUID_LEN};
	change::Reader in = {value->data, value->length, 0};

	if (value->length != widths[(int) form])
		Malformed("A value of fixed width has another length.");
	switch (form)
	{
		case Form::Bool:
			return BoolGetDatum(in.U8() != 0);
		case Form::Bits32:
			return Int32GetDatum((int32) in.U32());
		case Form::Bits64:
			return Int64GetDatum((int64) in.U64());
		default:
			return ReadUuid(value);
	}
}

/* Raises what receive and input functions raise. */
Datum
ReadField(Session *session, Field *field, const change::Column *column, const change::Value *value)
{
	switch (field->form)
	{
		case Form::Ignore:
			break;
		case Form::Int16:
			return Int16GetDatum((int16) change::ReadTrimmed(value, sizeof(int16)));
		case Form::Int32:
			return Int32GetDatum((int32) change::ReadTrimmed(value, sizeof(int32)));
		case Form::Int64:
			return Int64GetDatum(change::ReadTrimmed(value, sizeof(int64)));
		case Form::Bool:
		case Form::Bits32:
		case Form::Bits64:
		case Form::Uuid:
			return ReadFixed(field->form, value);
		case Form::Bytea:
			return PointerGetDatum(cstring_to_text_with_len(value->data, (int) value->length));
		case Form::Text:
			return ReadText(session, value);
		case Form::Input:
			return Input(field, ToServer(session, value->data, value->length));
		case Form::Receive:
			return Receive(session, field, column, value);
		case Form::Convert:
			return Input(field, change::ValueText(column, value));
	}
	return (Datum) 0;
}

/* Put one value into the slot's arrays. */
static void
StoreValue(Session *session, Field *field, const change::Column *column, const change::Value *value,
		   TupleTableSlot *slot)
{
	int at = field->attnum - 1;

	if (value->data == NULL || field->form == Form::Ignore)
	{
		if (field->domain && field->form != Form::Ignore)
			CheckNull(field);
		return;
	}
	slot->tts_values[at] = ReadField(session, field, column, value);
	slot->tts_isnull[at] = false;
}

/* An empty slot with every column NULL. */
static void
ClearRow(TupleTableSlot *slot)
{
	ExecClearTuple(slot);
	memset(slot->tts_values, 0, sizeof(Datum) * slot->tts_tupleDescriptor->natts);
	memset(slot->tts_isnull, true, sizeof(bool) * slot->tts_tupleDescriptor->natts);
}

/* Columns that the change does not carry are NULL afterwards. */
void
ReadRow(Session *session, Target *target, const change::Change *change)
{
	int nest_level = change::BeginTextFormat(target->to_read);

	ClearRow(target->row);
	for (int i = 0; i < target->n_fields; i++)
		StoreValue(session, &target->fields[i], &change->relation->columns[i], &change->row[i],
				   target->row);
	ExecStoreVirtualTuple(target->row);
	change::EndTextFormat(nest_level);
}

/* The columns that the change does not carry get what an INSERT would give them. */
void
FillDefaults(Target *target)
{
	ExprContext *econtext = GetPerTupleExprContext(target->estate);

	for (int i = 0; i < target->n_defaults; i++)
	{
		int at = target->default_attnums[i] - 1;

		target->row->tts_values[at] =
			ExecEvalExpr(target->defaults[i], econtext, &target->row->tts_isnull[at]);
	}
}

/* All columns but the key are NULL afterwards. */
void
ReadKey(Session *session, Target *target, const change::Change *change)
{
	const change::Relation *relation = change->relation;
	int nest_level = change::BeginTextFormat(target->to_read);
	int at = 0;

	ClearRow(target->search);
	for (int i = 0; i < relation->n_columns; i++)
		if (relation->columns[i].key)
			StoreValue(session, &target->fields[i], &relation->columns[i], &change->key[at++],
					   target->search);
	ExecStoreVirtualTuple(target->search);
	change::EndTextFormat(nest_level);
}

/* All columns but the key are NULL afterwards; values are shared with the row. */
void
KeyOfRow(Target *target)
{
	ClearRow(target->search);
	for (int i = 0; i < target->n_keys; i++)
	{
		int at = target->key_attnums[i] - 1;

		target->search->tts_values[at] = target->row->tts_values[at];
		target->search->tts_isnull[at] = target->row->tts_isnull[at];
	}
	ExecStoreVirtualTuple(target->search);
}

} // namespace mmrepl::apply
