/*
 * connection_report.cpp
 *		What the peer or libpq said, as Failure values and as errors of ours.
 */
#include "connection_internal.hpp"

namespace mmrepl::connection
{

namespace
{

constexpr int kSqlstateLength = 5;

/* The packed form of five characters. */
int
PackSqlstate(const char *code)
{
	return MAKE_SQLSTATE(code[0], code[1], code[2], code[3], code[4]);
}

/* A copy without trailing newlines, or NULL for NULL. */
char *
CopyField(const char *text)
{
	return text == NULL ? NULL : pchomp(text);
}

/*
 * Where a line of a verbose message holds "28P01: " behind the severity, which
 * is in the peer's language; NULL when it does not.
 */
char *
FindSqlstate(char *line)
{
	char *colon = strstr(line, ":  ");
	char *code = colon == NULL ? NULL : colon + 3;

	if (code == NULL || strspn(code, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") != kSqlstateLength ||
		strncmp(code + kSqlstateLength, ": ", 2) != 0)
		return NULL;
	return code;
}

/* Whether a line of a verbose message is "LOCATION:  function, file:line", in any language. */
bool
IsLocation(const char *line)
{
	const char *colon = strstr(line, ":  ");
	const char *number = strrchr(line, ':');

	return colon != NULL && number != NULL && number > colon && strchr(colon, ',') != NULL &&
		   number[1] != '\0' && strspn(number + 1, "0123456789") == strlen(number + 1);
}

/* Until a connection stands, the peer's text may be in any encoding: keep it printable. */
void
MakeValid(char *text)
{
	if (pg_verifymbstr(text, strlen(text), true))
		return;
	for (char *c = text; *c != '\0'; c++)
	{
		if (IS_HIGHBIT_SET(*c))
			*c = '?';
	}
}

} // namespace

/* Fill *failure with something that no PGresult told. */
void
SetFailure(Failure *failure, int sqlstate, const char *message)
{
	*failure = {};
	failure->sqlstate = sqlstate;
	failure->message = pstrdup(message);
}

/*
 * What libpq says of an attempt to connect, the peer's SQLSTATE in it taken out
 * (of the last host that answered) and the source locations dropped.
 */
void
DescribeConnecting(PGconn *conn, const char *server_name, Failure *failure)
{
	char *text = pchomp(PQerrorMessage(conn));
	char *rest = text;
	StringInfoData message;

	*failure = {};
	failure->sqlstate = ERRCODE_SQLCLIENT_UNABLE_TO_ESTABLISH_SQLCONNECTION;
	if (PQconnectionNeedsPassword(conn))
		failure->sqlstate = ERRCODE_INVALID_PASSWORD;
	MakeValid(text);
	initStringInfo(&message);
	appendStringInfo(&message, "could not connect to server \"%s\": ", server_name);
	for (char *line; (line = strsep(&rest, "\n")) != NULL;)
	{
		char *code = FindSqlstate(line);

		if (IsLocation(line))
			continue;
		if (line != text)
			appendStringInfoChar(&message, '\n');
		if (code == NULL)
		{
			appendStringInfoString(&message, line);
			continue;
		}
		failure->sqlstate = PackSqlstate(code);
		appendBinaryStringInfo(&message, line, code - line);
		appendStringInfoString(&message, code + kSqlstateLength + 2);
	}
	failure->message = message.data;
}

/*
 * The fields of a failed result, or libpq's own message with a connection
 * failure's code where the peer said nothing.
 */
void
Describe(PGconn *conn, const PGresult *res, Failure *failure)
{
	const char *sqlstate = PQresultErrorField(res, PG_DIAG_SQLSTATE);

	failure->sqlstate = ERRCODE_CONNECTION_FAILURE;
	if (sqlstate != NULL && strlen(sqlstate) == kSqlstateLength)
		failure->sqlstate = PackSqlstate(sqlstate);
	failure->message = CopyField(PQresultErrorField(res, PG_DIAG_MESSAGE_PRIMARY));
	failure->detail = CopyField(PQresultErrorField(res, PG_DIAG_MESSAGE_DETAIL));
	failure->hint = CopyField(PQresultErrorField(res, PG_DIAG_MESSAGE_HINT));
	failure->context = CopyField(PQresultErrorField(res, PG_DIAG_CONTEXT));
	failure->schema = CopyField(PQresultErrorField(res, PG_DIAG_SCHEMA_NAME));
	failure->table = CopyField(PQresultErrorField(res, PG_DIAG_TABLE_NAME));
	failure->column = CopyField(PQresultErrorField(res, PG_DIAG_COLUMN_NAME));
	failure->constraint = CopyField(PQresultErrorField(res, PG_DIAG_CONSTRAINT_NAME));

	if (failure->message == NULL && res != NULL && PQresultErrorMessage(res)[0] != '\0')
		failure->message = CopyField(PQresultErrorMessage(res));
	if (failure->message == NULL)
		failure->message = CopyField(PQerrorMessage(conn));
	if (failure->message[0] == '\0')
		failure->message = pstrdup("could not obtain the peer's message");
}

/* Raise what a failed result says; the result is cleared. */
void
Report(PGconn *conn, PGresult *res, const char *server_name, const char *command)
{
	Failure failure;

	Describe(conn, res, &failure);
	PQclear(res);
	ReportFailure(&failure, server_name, command);
}

/* The failure's table is to be named: its context says nothing of it, as with foreign keys. */
static bool
NeedsTable(const Failure *failure)
{
	return failure->schema != NULL && failure->table != NULL &&
		   (failure->context == NULL || strstr(failure->context, "relation \"") == NULL);
}

static int
SetName(int field, const char *name)
{
	return name != NULL ? err_generic_string(field, name) : 0;
}

/* Raise a failure with all its fields, and where it happened as context. */
void
ReportFailure(const Failure *failure, const char *server_name, const char *command)
{
	ereport(ERROR,
			(errcode(failure->sqlstate), errmsg_internal("%s", failure->message),
			 failure->detail ? errdetail_internal("%s", failure->detail) : 0,
			 failure->hint ? errhint("%s", failure->hint) : 0,
			 SetName(PG_DIAG_SCHEMA_NAME, failure->schema),
			 SetName(PG_DIAG_TABLE_NAME, failure->table),
			 SetName(PG_DIAG_COLUMN_NAME, failure->column),
			 SetName(PG_DIAG_CONSTRAINT_NAME, failure->constraint),
			 failure->context ? (errcontext("%s", failure->context)) : 0,
			 NeedsTable(failure)
				 ? (errcontext("relation \"%s.%s\"", failure->schema, failure->table))
				 : 0,
			 command ? (errcontext("remote command on server \"%s\": %s", server_name, command))
					 : (errcontext("server \"%s\"", server_name))));
}

/* Whether the session at the peer is gone: no connection, or the peer's last words. */
bool
WasLost(const PGconn *conn, const PGresult *res)
{
	const char *severity = PQresultErrorField(res, PG_DIAG_SEVERITY_NONLOCALIZED);

	if (PQstatus(conn) != CONNECTION_OK)
		return true;
	return severity != NULL && (strcmp(severity, "FATAL") == 0 || strcmp(severity, "PANIC") == 0);
}

/*
 * Whether trying again can help without anybody's doing: connections,
 * resources, operators' interventions, failed serialisation, locks, a peer that
 * is a standby for the time being, and a batch out of turn (hello() puts it right).
 */
bool
IsTransient(int sqlstate)
{
	switch (sqlstate)
	{
		case ERRCODE_T_R_SERIALIZATION_FAILURE:
		case ERRCODE_T_R_DEADLOCK_DETECTED:
		case ERRCODE_T_R_STATEMENT_COMPLETION_UNKNOWN:
		case ERRCODE_TRANSACTION_ROLLBACK:
		case ERRCODE_LOCK_NOT_AVAILABLE:
		case ERRCODE_OBJECT_IN_USE:
		case ERRCODE_QUERY_CANCELED:
		case ERRCODE_READ_ONLY_SQL_TRANSACTION:
		case ERRCODE_IN_FAILED_SQL_TRANSACTION:
		case ERRCODE_IDLE_IN_TRANSACTION_SESSION_TIMEOUT:
		case MAKE_SQLSTATE('2', '5', 'P', '0', '4'): /* transaction_timeout of 17 */
		case ERRCODE_MMREPL_SYNC_TIMEOUT:
		case ERRCODE_MMREPL_OUT_OF_ORDER:
			return true;
		default:
			break;
	}
	if (sqlstate == ERRCODE_PROTOCOL_VIOLATION) /* malformed values, say receive functions */
		return false;
	switch (ERRCODE_TO_CATEGORY(sqlstate))
	{
		case ERRCODE_CONNECTION_EXCEPTION:
		case ERRCODE_INSUFFICIENT_RESOURCES:
		case ERRCODE_SYSTEM_ERROR:
			return true;
		case ERRCODE_OPERATOR_INTERVENTION: /* 57P.. is, 57014 was above */
			return PGUNSIXBIT(sqlstate >> 12) == 'P';
		default:
			return false;
	}
}

} // namespace mmrepl::connection
