/*
 * peer_check.cpp
 *		What must be true at the peer: the extension is there and may be called,
 *		and the remote table can take what the pair sends.
 *
 * Two round trips: the greeting, and one query of the peer's catalog.
 */
#include "registration_internal.hpp"

#include "mmrepl/connection.hpp"
#include "mmrepl/delivery.hpp"
#include "mmrepl/guc.hpp"

namespace mmrepl::registration
{

namespace
{

/* Columns of the answer; the first ones are the same in each row. */
enum Answer
{
	kKind,
	kPersistence,
	kMissingPrivileges,
	kHasKey,
	kUser,
	kName,
	kTypeSchema,
	kTypeName,
	kTypeText,
	kRequired,
	kGenerated,
	kModifier
};

/*
 * One row for each column of the table ($1, $2), at least one when it exists.
 * $3 is the array of the remote key columns.
 */
constexpr const char *kTableQuery =
	"SELECT c.relkind, c.relpersistence,"
	" (SELECT pg_catalog.string_agg(p.name, ', ')"
	"  FROM (VALUES ('INSERT'), ('UPDATE'), ('DELETE')) AS p(name)"
	"  WHERE NOT pg_catalog.has_table_privilege(c.oid, p.name)),"
	" EXISTS (SELECT FROM pg_catalog.pg_index i"
	"  WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indimmediate"
	"  AND i.indpred IS NULL AND i.indexprs IS NULL"
	"  AND (SELECT pg_catalog.array_agg(a.attname::text ORDER BY a.attname::text COLLATE \"C\")"
	"   FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, place)"
	"   JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum"
	"   WHERE k.place <= i.indnkeyatts)"
	"  = (SELECT pg_catalog.array_agg(w.name ORDER BY w.name COLLATE \"C\")"
	"   FROM pg_catalog.unnest($3::text[]) AS w(name))),"
	" current_user, a.attname, tn.nspname, t.typname, pg_catalog.format_type(t.oid, a.atttypmod),"
	" a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND t.typdefault IS NULL,"
	" a.attgenerated <> '', a.atttypmod"
	" FROM pg_catalog.pg_class c"
	" JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
	" LEFT JOIN (pg_catalog.pg_attribute a"
	"  JOIN pg_catalog.pg_type t ON t.oid = a.atttypid"
	"  JOIN pg_catalog.pg_namespace tn ON tn.oid = t.typnamespace)"
	" ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
	" WHERE n.nspname = $1 AND c.relname = $2";

/* What the checks of the answer need. */
struct Inquiry
{
	const PeerQuestion *question;
	const char *server; /* its name */
	const char *table;	/* the remote table, quoted */
	PGresult *answer;
};

/* A field of the answer. */
const char *
Field(const Inquiry &inquiry, int row, Answer column)
{
	return PQgetvalue(inquiry.answer, row, column);
}

/* A boolean field of the answer. */
bool
IsTrue(const Inquiry &inquiry, int row, Answer column)
{
	return Field(inquiry, row, column)[0] == 't';
}

/* Raise when the target of the table's changes is the table itself. */
void
RefuseSelf(const Inquiry &inquiry, const pg_uuid_t &peer)
{
	pg_uuid_t own = catalog::NodeId();
	Relation rel = inquiry.question->rel;

	if (memcmp(&own, &peer, sizeof(own)) != 0 ||
		strcmp(get_namespace_name(RelationGetNamespace(rel)), inquiry.question->remote_schema) !=
			0 ||
		strcmp(RelationGetRelationName(rel), inquiry.question->remote_table) != 0)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_MMREPL_INVALID_PAIR),
			 errmsg("the target of table %s is the table itself", QualifiedName(rel)),
			 errdetail("Server \"%s\" leads to this very database.", inquiry.server),
			 errhint("Check host, port and dbname: ALTER SERVER %s OPTIONS (SET ...); or name "
					 "another table in remote_table.",
					 quote_identifier(inquiry.server))));
}

/* A column's definition, for hints. */
char *
Definition(const Inquiry &inquiry, const PairColumn &column)
{
	Form_pg_attribute attribute =
		TupleDescAttr(RelationGetDescr(inquiry.question->rel), column.attnum - 1);

	return psprintf("%s %s", quote_identifier(column.remote),
					format_type_with_typemod(attribute->atttypid, attribute->atttypmod));
}

/* Raise because the remote table does not exist. */
[[noreturn]] void
RefuseMissingTable(const Inquiry &inquiry)
{
	const PairColumns &columns = inquiry.question->columns;
	StringInfoData list;
	StringInfoData keys;

	initStringInfo(&list);
	initStringInfo(&keys);
	for (int i = 0; i < columns.n; i++)
	{
		appendStringInfo(&list, "%s, ", Definition(inquiry, columns.items[i]));
		if (columns.items[i].key)
			appendStringInfo(&keys, "%s%s", keys.len > 0 ? ", " : "",
							 quote_identifier(columns.items[i].remote));
	}
	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_TABLE),
			 errmsg("table %s does not exist at server \"%s\"", inquiry.table, inquiry.server),
			 errdetail("Changes of local table %s would have nowhere to go.",
					   QualifiedName(inquiry.question->rel)),
			 errhint("At the peer: CREATE TABLE %s (%sPRIMARY KEY (%s));", inquiry.table, list.data,
					 keys.data)));
}

/* Raise unless it is a permanent table that the peer's user may write. */
void
CheckTable(const Inquiry &inquiry)
{
	char kind = Field(inquiry, 0, kKind)[0];

	if (kind != RELKIND_RELATION && kind != RELKIND_PARTITIONED_TABLE)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"%s\" at server \"%s\" is not a table", inquiry.table, inquiry.server),
				 errhint("Name a table in remote_table.")));
	if (Field(inquiry, 0, kPersistence)[0] != RELPERSISTENCE_PERMANENT)
		ereport(ERROR, (errcode(ERRCODE_MMREPL_REMOTE_MISMATCH),
						errmsg("table %s at server \"%s\" is not permanent", inquiry.table,
							   inquiry.server),
						errdetail("A crash of the peer would empty it."),
						errhint("At the peer: ALTER TABLE %s SET LOGGED;", inquiry.table)));
	if (!PQgetisnull(inquiry.answer, 0, kMissingPrivileges))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for table %s at server \"%s\"", inquiry.table,
						inquiry.server),
				 errdetail("Role \"%s\" there lacks %s.", Field(inquiry, 0, kUser),
						   Field(inquiry, 0, kMissingPrivileges)),
				 errhint("At the peer: GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON %s TO %s;",
						 inquiry.table, quote_identifier(Field(inquiry, 0, kUser)))));
}

/* The row of the answer that describes the column, or -1. */
int
FindRemoteColumn(const Inquiry &inquiry, const char *name)
{
	for (int row = 0; row < PQntuples(inquiry.answer); row++)
	{
		if (!PQgetisnull(inquiry.answer, row, kName) &&
			strcmp(Field(inquiry, row, kName), name) == 0)
			return row;
	}
	return -1;
}

/* Raise unless the remote column's type has the name of the local one's. */
void
CheckType(const Inquiry &inquiry, const PairColumn &column, int row)
{
	Oid type = TupleDescAttr(RelationGetDescr(inquiry.question->rel), column.attnum - 1)->atttypid;
	HeapTuple tuple = SearchSysCache1(TYPEOID, ObjectIdGetDatum(type));

	MmreplEnsure(HeapTupleIsValid(tuple), "cache lookup failed for type %u", type);
	Form_pg_type form = (Form_pg_type) GETSTRUCT(tuple);
	bool same =
		strcmp(NameStr(form->typname), Field(inquiry, row, kTypeName)) == 0 &&
		strcmp(get_namespace_name(form->typnamespace), Field(inquiry, row, kTypeSchema)) == 0;

	ReleaseSysCache(tuple);
	if (same)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_DATATYPE_MISMATCH),
			 errmsg("column \"%s\" of table %s at server \"%s\" has another type", column.remote,
					inquiry.table, inquiry.server),
			 errdetail("It is %s there, and local column \"%s\" of table %s is %s.",
					   Field(inquiry, row, kTypeText), column.local,
					   QualifiedName(inquiry.question->rel), format_type_be(type)),
			 errhint("At the peer: ALTER TABLE %s ALTER COLUMN %s TYPE %s; or leave the column out "
					 "of columns.",
					 inquiry.table, quote_identifier(column.remote), format_type_be(type))));
}

/* Whether the remote column's precision or length can be too small for the local one's. */
bool
MayNotFit(Form_pg_attribute local, int32 remote)
{
	if (remote < 0 || remote == local->atttypmod)
		return false;
	if (local->atttypid == NUMERICOID || local->atttypid == INTERVALOID)
		return true;
	return local->atttypmod < 0 || remote < local->atttypmod;
}

/* Warn of values that the peer would round or refuse. */
void
CheckModifier(const Inquiry &inquiry, const PairColumn &column, int row)
{
	Form_pg_attribute local =
		TupleDescAttr(RelationGetDescr(inquiry.question->rel), column.attnum - 1);
	char *here = format_type_with_typemod(local->atttypid, local->atttypmod);

	if (!MayNotFit(local, pg_strtoint32(Field(inquiry, row, kModifier))))
		return;
	ereport(WARNING,
			(errcode(ERRCODE_MMREPL_REMOTE_MISMATCH),
			 errmsg("values of column \"%s\" may not fit table %s at server \"%s\"", column.local,
					inquiry.table, inquiry.server),
			 errdetail("The column is %s here and %s there: the peer would round or refuse values.",
					   here, Field(inquiry, row, kTypeText)),
			 errhint("At the peer: ALTER TABLE %s ALTER COLUMN %s TYPE %s;", inquiry.table,
					 quote_identifier(column.remote), here)));
}

/* Raise unless the peer has a column that can be written with the local one's values. */
void
CheckColumn(const Inquiry &inquiry, const PairColumn &column)
{
	int row = FindRemoteColumn(inquiry, column.remote);

	if (row < 0)
		ereport(
			ERROR,
			(errcode(ERRCODE_UNDEFINED_COLUMN),
			 errmsg("column \"%s\" of table %s at server \"%s\" does not exist", column.remote,
					inquiry.table, inquiry.server),
			 errdetail("Local column \"%s\" of table %s would go to it.", column.local,
					   QualifiedName(inquiry.question->rel)),
			 errhint("At the peer: ALTER TABLE %s ADD COLUMN %s; or see columns and column_map.",
					 inquiry.table, Definition(inquiry, column))));
	if (IsTrue(inquiry, row, kGenerated))
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_REMOTE_MISMATCH),
				 errmsg("column \"%s\" of table %s at server \"%s\" is generated there",
						column.remote, inquiry.table, inquiry.server),
				 errdetail("Local column \"%s\" of table %s would go to it.", column.local,
						   QualifiedName(inquiry.question->rel)),
				 errhint("Leave the column out of columns, or at the peer: ALTER TABLE %s ALTER "
						 "COLUMN %s DROP EXPRESSION;",
						 inquiry.table, quote_identifier(column.remote))));
	CheckType(inquiry, column, row);
	CheckModifier(inquiry, column, row);
}

/* Raise unless a unique index there is on exactly the columns of the key. */
void
CheckRemoteKey(const Inquiry &inquiry)
{
	const PairColumns &columns = inquiry.question->columns;
	StringInfoData keys;

	if (IsTrue(inquiry, 0, kHasKey))
		return;
	initStringInfo(&keys);
	for (int i = 0; i < columns.n; i++)
	{
		if (columns.items[i].key)
			appendStringInfo(&keys, "%s%s", keys.len > 0 ? ", " : "",
							 quote_identifier(columns.items[i].remote));
	}
	ereport(ERROR,
			(errcode(ERRCODE_MMREPL_REMOTE_MISMATCH),
			 errmsg("table %s at server \"%s\" has no unique index on (%s)", inquiry.table,
					inquiry.server, keys.data),
			 errdetail("These columns identify rows of local table %s. The index must be valid and "
					   "not partial, deferrable or on expressions.",
					   QualifiedName(inquiry.question->rel)),
			 errhint("At the peer: ALTER TABLE %s ADD PRIMARY KEY (%s);", inquiry.table,
					 keys.data)));
}

/* Raise when the peer wants a value for a column that is never sent. */
void
CheckOtherColumns(const Inquiry &inquiry)
{
	const PairColumns &columns = inquiry.question->columns;

	for (int row = 0; row < PQntuples(inquiry.answer); row++)
	{
		bool sent = false;

		if (PQgetisnull(inquiry.answer, row, kName) || !IsTrue(inquiry, row, kRequired))
			continue;
		for (int i = 0; i < columns.n; i++)
			sent |= strcmp(columns.items[i].remote, Field(inquiry, row, kName)) == 0;
		if (sent)
			continue;
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_REMOTE_MISMATCH),
				 errmsg("column \"%s\" of table %s at server \"%s\" is NOT NULL, has no default, "
						"and is not replicated",
						Field(inquiry, row, kName), inquiry.table, inquiry.server),
				 errdetail("No column of local table %s goes to it, so the peer would refuse every "
						   "new row.",
						   QualifiedName(inquiry.question->rel)),
				 errhint("At the peer: ALTER TABLE %s ALTER COLUMN %s SET DEFAULT ...; or see "
						 "columns and column_map.",
						 inquiry.table, quote_identifier(Field(inquiry, row, kName)))));
	}
}

/* All checks of the answer. */
void
CheckAnswer(const Inquiry &inquiry)
{
	const PairColumns &columns = inquiry.question->columns;

	if (PQntuples(inquiry.answer) == 0)
		RefuseMissingTable(inquiry);
	CheckTable(inquiry);
	for (int i = 0; i < columns.n; i++)
		CheckColumn(inquiry, columns.items[i]);
	CheckRemoteKey(inquiry);
	CheckOtherColumns(inquiry);
}

/* The remote names of the key columns as the text form of a text[]. */
char *
RemoteKeyArray(const PairColumns &columns)
{
	Datum *names = (Datum *) palloc(sizeof(Datum) * columns.n);
	int count = 0;

	for (int i = 0; i < columns.n; i++)
	{
		if (columns.items[i].key)
			names[count++] = CStringGetTextDatum(columns.items[i].remote);
	}
	ArrayType *array = construct_array(names, count, TEXTOID, -1, false, TYPALIGN_INT);

	return OidOutputFunctionCall(F_ARRAY_OUT, PointerGetDatum(array));
}

/* Who is greeted as whom. */
struct Greeting
{
	const char *server; /* its name */
	const char *user;	/* the role at the peer */
};

/* While the peer is greeted: a missing right there has a well-known cause. */
void
HintAtGrant(void *arg)
{
	const Greeting *greeting = static_cast<const Greeting *>(arg);

	if (geterrcode() == ERRCODE_INSUFFICIENT_PRIVILEGE)
		errhint("At the peer of server \"%s\": SELECT mmrepl.allow_apply(%s);", greeting->server,
				quote_literal_cstr(greeting->user));
}

/* The node id of the peer; raises when the extension is not there or may not be called. */
pg_uuid_t
Greet(PGconn *conn, Inquiry *inquiry, TimestampTz deadline)
{
	Greeting greeting = {inquiry->server, PQuser(conn)};
	ErrorContextCallback callback = {error_context_stack, HintAtGrant, &greeting};
	delivery::Peer peer;

	error_context_stack = &callback;
	peer = delivery::Hello(conn, inquiry->server, catalog::NodeId(), inquiry->question->stream,
						   deadline);
	error_context_stack = callback.previous;
	return peer.node;
}

/* All checks, over an open connection. */
void
Inquire(PGconn *conn, Inquiry *inquiry)
{
	TimestampTz deadline = connection::DeadlineIn(guc::connect_timeout);
	const PeerQuestion *question = inquiry->question;
	const char *values[3] = {question->remote_schema, question->remote_table,
							 RemoteKeyArray(question->columns)};

	RefuseSelf(*inquiry, Greet(conn, inquiry, deadline));
	inquiry->answer =
		connection::ExecParams(conn, inquiry->server, kTableQuery, 3, values, deadline);
	Ensured([&] { CheckAnswer(*inquiry); }, [&] { PQclear(inquiry->answer); });
}

/*
 * The peer is away: say so, and go on.  One that is there and does not let us in,
 * has no such database, or asks for no password, is no outage: raise.
 */
void
WarnUnchecked(const Inquiry &inquiry, const connection::Failure &failure)
{
	if (!connection::IsTransient(failure.sqlstate))
		connection::ReportFailure(&failure, inquiry.server, NULL);
	ereport(WARNING,
			(errcode(failure.sqlstate),
			 errmsg("could not check table %s at server \"%s\": the server cannot be reached",
					inquiry.table, inquiry.server),
			 errdetail("%s", failure.message != NULL ? failure.message : "No answer."),
			 errhint(
				 "Changes are queued; the worker delivers them, and reports what is wrong, when "
				 "the server is back.")));
}

} // namespace

/* Waits for the peer, at most mmrepl.connect_timeout for each of connect and checks. */
void
CheckPeer(const PeerQuestion &question)
{
	connection::Target *target = connection::Resolve(question.server, question.owner);
	connection::Failure failure = {};
	Inquiry inquiry = {&question, target->server_name,
					   QualifiedName(question.remote_schema, question.remote_table), NULL};
	PGconn *conn = connection::Open(target, connection::DeadlineIn(guc::connect_timeout), &failure);

	if (conn == NULL)
		WarnUnchecked(inquiry, failure);
	else
		Ensured([&] { Inquire(conn, &inquiry); }, [&] { connection::Close(conn); });
}

} // namespace mmrepl::registration
