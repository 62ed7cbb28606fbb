/*
 * apply_compare.cpp
 *		Whether the row that is here is the one that was changed at the sender.
 *
 * Two values are the same when their datums are, byte for byte, or when they
 * look the same in the form in which they travel: what counts is what the
 * sender could have sent.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

constexpr int kShownBytes = 64; /* of each value of a row in a message */

/* ---- comparing ---- */

/* Whether the column's bytes are text on the wire, in the sender's encoding. */
static bool
IsTextOnWire(const change::Column *column)
{
	return !column->binary || column->type == TEXTOID || column->type == VARCHAROID ||
		   column->type == BPCHAROID;
}

/* A stored value as the sender's trigger would have sent it. */
static change::Value
ToWire(Session *session, const change::Column *column, Oid type, Datum stored)
{
	change::Value value = change::WireBytes(column, type, stored);

	if (!IsTextOnWire(column))
		return value;
	char *text = pg_server_to_any(value.data, (int) value.length, session->header.encoding);

	return text == value.data ? value : change::Value{text, (uint32) strlen(text)};
}

/* Whether the stored value is the one whose digest came. */
static bool
MatchesDigest(Session *session, const change::Column *column, Oid type, Datum stored,
			  const change::OldValue *old)
{
	char digest[change::kDigestBytes];
	change::Value value = ToWire(session, column, type, stored);

	if (value.length != old->value.length)
		return false;
	change::Digest(value.data, value.length, digest);
	return memcmp(digest, old->digest, sizeof(digest)) == 0;
}

/* Whether two values of the column look the same. */
static bool
SameText(Form_pg_attribute attribute, Datum one, Datum other)
{
	Oid function;
	bool is_varlena;

	getTypeOutputInfo(attribute->atttypid, &function, &is_varlena);
	return strcmp(OidOutputFunctionCall(function, one), OidOutputFunctionCall(function, other)) ==
		   0;
}

static bool
IsSameDatum(Form_pg_attribute attribute, Datum one, Datum other)
{
	return datum_image_eq(one, other, attribute->attbyval, attribute->attlen) ||
		   (!attribute->attbyval && SameText(attribute, one, other));
}

/* Whether the column of the found row holds what it held at the sender. */
static bool
IsSame(Session *session, Target *target, const change::Change *change, int i, TupleTableSlot *found)
{
	Field *field = &target->fields[i];
	const change::OldValue *old = &change->old[i];
	int at = field->attnum - 1;
	Form_pg_attribute attribute = TupleDescAttr(RelationGetDescr(target->rel), at);
	bool is_null =
		old->same ? target->row->tts_isnull[at] : old->value.data == NULL && old->digest == NULL;

	if (found->tts_isnull[at] || is_null)
		return found->tts_isnull[at] == is_null;
	if (old->digest != NULL)
		return MatchesDigest(session, &change->relation->columns[i], attribute->atttypid,
							 found->tts_values[at], old);
	Datum expected = old->same
						 ? target->row->tts_values[at]
						 : ReadField(session, field, &change->relation->columns[i], &old->value);

	return IsSameDatum(attribute, found->tts_values[at], expected);
}

/* Keys may be equal and not the same (1.0 and 1.00, letters where case does not count). */
static bool
HasSameKey(Target *target, TupleTableSlot *found)
{
	for (int i = 0; i < target->n_keys; i++)
	{
		int at = target->key_attnums[i] - 1;
		Form_pg_attribute attribute = TupleDescAttr(RelationGetDescr(target->rel), at);

		if (!IsSameDatum(attribute, found->tts_values[at], target->search->tts_values[at]))
			return false;
	}
	return true;
}

/* Columns that are generated here are not compared. */
static bool
HasSameValues(Session *session, Target *target, TupleTableSlot *found, const change::Change *change)
{
	for (int i = 0; i < target->n_fields; i++)
		if (!change->relation->columns[i].key && target->fields[i].form != Form::Ignore &&
			!IsSame(session, target, change, i, found))
			return false;
	return HasSameKey(target, found);
}

bool
IsExpectedRow(Session *session, Target *target, Leaf *leaf, const change::Change *change)
{
	if (!change->relation->checked)
		return true;
	int nest_level = change::BeginTextFormat(target->to_compare);
	TupleTableSlot *found = FoundInRoot(leaf);

	slot_getallattrs(found);
	bool same = HasSameValues(session, target, found, change);

	change::EndTextFormat(nest_level);
	return same;
}

/* ---- showing ---- */

static void
AppendShown(StringInfo out, bool first, const char *text)
{
	int length = (int) strlen(text);
	int shown = pg_mbcliplen(text, length, kShownBytes);

	appendStringInfo(out, "%s%.*s%s", first ? "" : ", ", shown, text, shown < length ? "..." : "");
}

/* A value that came, in the server's encoding. */
static const char *
TextOf(Session *session, const change::Column *column, const change::Value *value)
{
	if (value->data == NULL)
		return "null";
	if (IsTextOnWire(column))
		return ToServer(session, value->data, value->length);
	return change::ValueText(column, value);
}

static const char *
OldText(Session *session, const change::Change *change, int i, int *key)
{
	const change::Column *column = &change->relation->columns[i];
	const change::OldValue *old = &change->old[i];

	if (column->key && change->key != NULL)
		return TextOf(session, column, &change->key[(*key)++]);
	if (old->same)
		return TextOf(session, column, &change->row[i]);
	if (old->digest != NULL)
		return psprintf("<%u bytes>", old->value.length);
	return TextOf(session, column, &old->value);
}

/* The row as it was at the sender. */
static void
AppendExpected(StringInfo out, Session *session, const change::Change *change)
{
	int key = 0;

	for (int i = 0; i < change->relation->n_columns; i++)
		AppendShown(out, i == 0, OldText(session, change, i, &key));
}

static void
AppendFound(StringInfo out, Target *target, TupleTableSlot *found)
{
	TupleDesc desc = RelationGetDescr(target->rel);

	for (int i = 0; i < target->n_fields; i++)
	{
		int at = target->fields[i].attnum - 1;
		Oid function;
		bool is_varlena;

		if (found->tts_isnull[at])
		{
			AppendShown(out, i == 0, "null");
			continue;
		}
		getTypeOutputInfo(TupleDescAttr(desc, at)->atttypid, &function, &is_varlena);
		AppendShown(out, i == 0, OidOutputFunctionCall(function, found->tts_values[at]));
	}
}

static void
AppendNames(StringInfo out, const Target *target)
{
	TupleDesc desc = RelationGetDescr(target->rel);

	for (int i = 0; i < target->n_fields; i++)
		appendStringInfo(out, "%s%s", i ? ", " : "",
						 quote_identifier(
							 NameStr(TupleDescAttr(desc, target->fields[i].attnum - 1)->attname)));
}

/* Both rows as they travel: the settings are the same. */
static void
AppendRows(StringInfo out, Session *session, Target *target, Leaf *leaf)
{
	appendStringInfoString(out, "The row that was changed: (");
	AppendNames(out, target);
	appendStringInfoString(out, ") = (");
	AppendExpected(out, session, session->change);
	if (leaf == NULL)
	{
		appendStringInfoString(out, "). There is no such row at the peer.");
		return;
	}
	TupleTableSlot *found = FoundInRoot(leaf);

	slot_getallattrs(found);
	appendStringInfoString(out, "). The row at the peer: (");
	AppendFound(out, target, found);
	appendStringInfoString(out, ").");
}

/* NULL for a caller who may not read the table. */
char *
DescribeRows(Session *session, Target *target, Leaf *leaf)
{
	StringInfoData out;

	if (session->change->old == NULL ||
		pg_class_aclcheck(RelationGetRelid(target->rel), session->caller, ACL_SELECT) !=
			ACLCHECK_OK)
		return NULL;
	int nest_level = change::BeginTextFormat(change::kTextSettings);

	initStringInfo(&out);
	AppendRows(&out, session, target, leaf);
	change::EndTextFormat(nest_level);
	return out.data;
}

} // namespace mmrepl::apply
