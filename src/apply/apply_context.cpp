/*
 * apply_context.cpp
 *		What error messages say about the change that was being applied.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

constexpr int kShownBytes = 64; /* of a text key */

/* The change's name in messages. */
static const char *
Operation(const change::Change *change)
{
	switch (change->kind)
	{
		case change::kInsert:
			return "INSERT";
		case change::kUpdate:
			return "UPDATE";
		case change::kDelete:
			return "DELETE";
		default:
			return "TRUNCATE";
	}
}

/*
 * Append a key value that can be shown without calling a function or looking
 * into a catalog (an error is being reported): integers and clean text.
 */
static void
AppendValue(StringInfo out, const Header &header, const change::Column &column,
			const change::Value &value)
{
	bool integer = column.binary &&
				   (column.type == INT8OID || column.type == INT4OID || column.type == INT2OID);

	if (value.data == NULL)
		appendStringInfoString(out, "null");
	else if (integer && value.length > 0 && value.length <= change::TrimmedWidth(column.type))
		appendStringInfo(out, INT64_FORMAT,
						 change::ReadTrimmed(&value, change::TrimmedWidth(column.type)));
	else if ((!column.binary || column.type == TEXTOID || column.type == VARCHAROID ||
			  column.type == BPCHAROID) &&
			 value.length <= kShownBytes && header.encoding == GetDatabaseEncoding() &&
			 pg_verify_mbstr(header.encoding, value.data, (int) value.length, true))
		appendBinaryStringInfo(out, value.data, (int) value.length);
	else
		appendStringInfoString(out, "...");
}

/* ", key (5, abc)": the values that find the row. */
static void
AppendKey(StringInfo out, const Session *session)
{
	const change::Change *change = session->change;
	const change::Relation *relation = change->relation;
	bool first = true;
	int at = 0;

	if (change->kind == change::kTruncate)
		return;
	appendStringInfoString(out, ", key (");
	for (int i = 0; i < relation->n_columns; i++)
	{
		const change::Column &column = relation->columns[i];

		if (!column.key)
			continue;
		if (!first)
			appendStringInfoString(out, ", ");
		first = false;
		AppendValue(out, session->header, column, change->key ? change->key[at++] : change->row[i]);
	}
	appendStringInfoChar(out, ')');
}

/* The same from a row's datums. */
static void
AppendDatum(StringInfo out, Oid type, Datum value, bool is_null)
{
	switch (is_null ? InvalidOid : type)
	{
		case InvalidOid:
			appendStringInfoString(out, "null");
			return;
		case INT2OID:
			appendStringInfo(out, "%d", DatumGetInt16(value));
			return;
		case INT4OID:
			appendStringInfo(out, "%d", DatumGetInt32(value));
			return;
		case INT8OID:
			appendStringInfo(out, INT64_FORMAT, DatumGetInt64(value));
			return;
		case TEXTOID:
		case VARCHAROID:
		case BPCHAROID:
			if (VARSIZE_ANY_EXHDR(DatumGetPointer(value)) <= kShownBytes)
			{
				appendBinaryStringInfo(out, VARDATA_ANY(DatumGetPointer(value)),
									   VARSIZE_ANY_EXHDR(DatumGetPointer(value)));
				return;
			}
	}
	appendStringInfoString(out, "...");
}

/* The key of a collected update, in the order of its columns, as AppendKey() has it. */
static void
AppendKeyOfRow(StringInfo out, const Target *target)
{
	const TupleTableSlot *row = target->search;
	const char *before = ", key (";

	for (int i = 0; i < target->n_keys; i++)
	{
		int at = target->key_attnums[i] - 1;

		appendStringInfoString(out, before);
		AppendDatum(out, TupleDescAttr(target->desc, at)->atttypid, row->tts_values[at],
					row->tts_isnull[at]);
		before = ", ";
	}
	appendStringInfoChar(out, ')');
}

/* The usual form of a uuid, without a function that could raise. */
static void
FormatNode(const pg_uuid_t &node, char *out)
{
	for (int i = 0; i < UUID_LEN; i++)
		out +=
			sprintf(out, (i == 4 || i == 6 || i == 8 || i == 10) ? "-%02x" : "%02x", node.data[i]);
}

/* "ticket 7 (INSERT, relation "s.t", key (5))", as far as it is known. */
static void
AppendWork(StringInfo out, const Session *session)
{
	if (session->header.Inline())
		appendStringInfo(out, "inline transaction %llu", (unsigned long long) session->xid);
	else if (session->ticket != 0)
		appendStringInfo(out, "ticket %llu", (unsigned long long) session->ticket);
	else
		appendStringInfo(out, "a batch of stream %d", session->header.stream);
	if (session->schema == NULL)
		return;
	appendStringInfoString(out, " (");
	if (session->change != NULL)
		appendStringInfo(out, "%s, ", Operation(session->change));
	else if (session->updating != NULL)
		appendStringInfoString(out, "UPDATE, ");
	appendStringInfo(out, "relation \"%s.%s\"", session->schema, session->table);
	if (session->change != NULL)
		AppendKey(out, session);
	else if (session->updating != NULL)
		AppendKeyOfRow(out, session->updating);
	appendStringInfoChar(out, ')');
}

/* One CONTEXT line; allocates where the error is being put together. */
void
AddContext(void *arg)
{
	const Session *session = (const Session *) arg;
	char node[40];
	StringInfoData work;

	FormatNode(session->header.node, node);
	initStringInfo(&work);
	AppendWork(&work, session);
	errcontext("applying %s from node %s", work.data, node);
	pfree(work.data);
}

/* Whether the error is the violation of the index in which the key was not found. */
static bool
IsLostRace(const ErrorData *error, const Leaf *leaf)
{
	Relation rel = leaf->info->ri_RelationDesc;

	return error->constraint_name != NULL && error->table_name != NULL &&
		   error->schema_name != NULL && leaf->schema != NULL &&
		   strcmp(error->constraint_name, RelationGetRelationName(leaf->index)) == 0 &&
		   strcmp(error->table_name, RelationGetRelationName(rel)) == 0 &&
		   strcmp(error->schema_name, leaf->schema) == 0;
}

/*
 * The key was not there when we looked, and then it was: somebody inserted it
 * in between.  A retry finds the row and treats it as the conflict that it is.
 */
void
ExplainLostRace(const Session *session)
{
	if (session->inserting == NULL || geterrcode() != ERRCODE_UNIQUE_VIOLATION)
		return;
	MemoryContext old = MemoryContextSwitchTo(session->context);
	ErrorData *error = CopyErrorData();

	if (!IsLostRace(error, session->inserting))
	{
		MemoryContextSwitchTo(old);
		return;
	}
	FlushErrorState();
	ErrorContextCallback callback = {error_context_stack, AddContext, (void *) session};

	error_context_stack = &callback;
	ereport(ERROR,
			(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
			 errmsg("could not serialize replicated insert due to a concurrent insert of its key"),
			 error->detail ? errdetail_internal("%s", error->detail) : 0));
}

} // namespace mmrepl::apply
