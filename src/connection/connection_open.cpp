/*
 * connection_open.cpp
 *		Making and closing connections.
 *
 * Every connection of the process is on one list from the moment it exists, so
 * that its notes are found and the file descriptor that fd.c counts for it is
 * given back exactly once.
 */
#include "connection_internal.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::connection
{

bool hushed = false;

namespace
{

/* An open connection; in TopMemoryContext. */
struct Opened
{
	Opened *next;
	PGconn *conn;
	Notes notes;
	bool doomed;
	bool only_waiting; /* doomed: its session at the peer is left alone while it works */
	int place;		   /* doomed: to be given back with it */
};

Opened *opened = NULL;

/*
 * libpq's notice receiver: what the peer remarks goes to our log at DEBUG1, not
 * to stderr.
 */
void
ReceiveNotice(void *, const PGresult *res)
{
	const char *message;

	if (hushed)
		return;
	message = PQresultErrorField(res, PG_DIAG_MESSAGE_PRIMARY);
	ereport(DEBUG1, (errmsg_internal("message from a peer: %s", message ? message : "")));
}

/*
 * Begin to connect; NULL with *failure filled when there is no file descriptor
 * or no memory for it.  Everything else shows in the connection's status.
 */
PGconn *
StartConnecting(const Target *target, Failure *failure)
{
	static uint64 last_serial = 0;
	Opened *entry = (Opened *) MemoryContextAllocZero(TopMemoryContext, sizeof(Opened));

	if (last_serial == 0)
		on_proc_exit(CloseAll, (Datum) 0);
	entry->notes.serial = ++last_serial;
	if (!AcquireExternalFD())
	{
		pfree(entry);
		SetFailure(failure, ERRCODE_INSUFFICIENT_RESOURCES,
				   "could not connect to a peer: too many open files on the local server");
		failure->hint = pstrdup("Raise the server's max_files_per_process and/or \"ulimit -n\".");
		return NULL;
	}
	entry->conn = PQconnectStartParams(target->keywords, target->values, 0);
	if (entry->conn == NULL)
	{
		ReleaseExternalFD();
		pfree(entry);
		SetFailure(failure, ERRCODE_OUT_OF_MEMORY, "could not connect to a peer: out of memory");
		return NULL;
	}
	entry->next = opened;
	opened = entry;
	PQsetNoticeReceiver(entry->conn, ReceiveNotice, NULL);
	return entry->conn;
}

/*
 * Drive libpq until the connection stands or failed; false at the deadline.
 * The socket may be another one after each step.
 */
bool
PollConnecting(PGconn *conn, TimestampTz deadline)
{
	PostgresPollingStatusType status = PGRES_POLLING_WRITING;

	while (PQstatus(conn) != CONNECTION_BAD && status != PGRES_POLLING_OK &&
		   status != PGRES_POLLING_FAILED)
	{
		int event = status == PGRES_POLLING_READING ? WL_SOCKET_READABLE : WL_SOCKET_WRITEABLE;
		int happened = WaitSocket(PQsocket(conn), event, deadline);

		if (happened == 0)
			return false;
		if (happened & event)
			status = PQconnectPoll(conn);
	}
	return true;
}

/*
 * Whether the connection stands before the deadline.  A refusal carries its
 * SQLSTATE only in libpq's verbose text, which is why that is asked for.
 */
bool
Connect(PGconn *conn, const Target *target, TimestampTz deadline, Failure *failure)
{
	PQsetErrorVerbosity(conn, PQERRORS_VERBOSE);
	if (!PollConnecting(conn, deadline))
	{
		SetFailure(failure, ERRCODE_SQLCLIENT_UNABLE_TO_ESTABLISH_SQLCONNECTION,
				   psprintf("could not connect to server \"%s\": timed out", target->server_name));
		return false;
	}
	if (PQstatus(conn) != CONNECTION_OK)
	{
		DescribeConnecting(conn, target->server_name, failure);
		return false;
	}
	PQsetErrorVerbosity(conn, PQERRORS_DEFAULT);
	return true;
}

/*
 * Whether whoever must use a password has used it: otherwise he would come in
 * with the identity of our server process.
 */
bool
CheckPasswordUsed(PGconn *conn, const Target *target, Failure *failure)
{
	if (!target->password_required || PQconnectionUsedPassword(conn))
		return true;
	SetFailure(failure, ERRCODE_S_R_E_PROHIBITED_SQL_STATEMENT_ATTEMPTED, "password is required");
	failure->detail = pstrdup("Non-superuser cannot connect if the peer does not request a "
							  "password.");
	failure->hint = psprintf("Change the peer's authentication method (pg_hba.conf), or let a "
							 "superuser run ALTER USER MAPPING ... SERVER %s OPTIONS (ADD "
							 "password_required 'false').",
							 quote_identifier(target->server_name));
	return false;
}

/*
 * The peer is to notice that we are gone as soon as we notice that it is:
 * otherwise its session would keep its locks for the two hours that are the
 * usual default.  (Over a unix-domain socket these settings mean nothing.)
 */
void
AppendKeepalives(StringInfo sql, const Target *target)
{
	constexpr const char *kNames[][2] = {{"keepalives_idle", "tcp_keepalives_idle"},
										 {"keepalives_interval", "tcp_keepalives_interval"},
										 {"keepalives_count", "tcp_keepalives_count"},
										 {"tcp_user_timeout", "tcp_user_timeout"}};

	for (int i = 0; target->keywords[i] != NULL; i++)
	{
		for (const auto &name : kNames)
			if (strcmp(target->keywords[i], name[0]) == 0)
				appendStringInfo(sql, " SET %s = %d;", name[1], Max(atoi(target->values[i]), 0));
	}
}

/*
 * One round trip that makes the session what the rest relies on, whatever the
 * peer's role and database have as defaults.
 */
bool
SetUpSession(PGconn *conn, const Target *target, TimestampTz deadline, Failure *failure)
{
	int version = PQserverVersion(conn);
	PGresult *res;
	StringInfoData sql;

	initStringInfo(&sql);
	appendStringInfoString(&sql,
						   "SET search_path = pg_catalog, pg_temp; SET synchronous_commit = on; "
						   "SET default_transaction_isolation = 'read committed'; "
						   "SET statement_timeout = 0; SET lock_timeout = 0; "
						   "SET idle_in_transaction_session_timeout = 0;");
	if (version >= 140000)
		appendStringInfoString(&sql, " SET idle_session_timeout = 0;");
	if (version >= 170000)
		appendStringInfoString(&sql, " SET transaction_timeout = 0;");
	AppendKeepalives(&sql, target);
	if (PQsetnonblocking(conn, 1) != 0)
	{
		Describe(conn, NULL, failure);
		return false;
	}
	res = TryExec(conn, sql.data, 0, NULL, deadline, failure);
	PQclear(res);
	pfree(sql.data);
	return res != NULL;
}

} // namespace

/* Process exit: the peers get a proper goodbye. */
void
CloseAll(int, Datum)
{
	while (opened != NULL)
		Close(opened->conn);
}

/* The last ticket that was drawn; a server without the library preloaded draws none. */
static uint64
LastTicket()
{
	uint64 last = 0;

	if (shmem::Ready())
	{
		SpinLockAcquire(&shmem::Get().clock_mutex);
		last = shmem::Get().last_ticket;
		SpinLockRelease(&shmem::Get().clock_mutex);
	}
	return last;
}

/* A connection that is ready for use; NULL with *failure filled when it cannot be had. */
PGconn *
Open(const Target *target, TimestampTz deadline, Failure *failure)
{
	PGconn *conn;
	bool ready = false;

	MMREPL_FAULT_POINT("connection-opening");
	conn = StartConnecting(target, failure);
	if (conn == NULL)
		return NULL;
	Guarded(
		[&] {
			ready = Connect(conn, target, deadline, failure) &&
					CheckPasswordUsed(conn, target, failure) &&
					SetUpSession(conn, target, deadline, failure);
		},
		[&] { Close(conn); });
	if (!ready)
	{
		Close(conn);
		return NULL;
	}

	/* Not before: what is applied under a later ticket has to find the peer that we found. */
	NotesOf(conn)->opened_at = LastTicket();
	ereport(DEBUG3, (errmsg_internal("mmrepl: connected to server \"%s\"", target->server_name)));
	return conn;
}

/* Close a connection; raises nothing and allocates nothing.  NULL is no connection. */
void
Close(PGconn *conn)
{
	for (Opened **link = &opened; *link != NULL; link = &(*link)->next)
	{
		Opened *entry = *link;
		bool before = hushed;

		if (entry->conn != conn)
			continue;
		*link = entry->next;
		if (entry->notes.waits != NULL)
			FreeWaitEventSet(entry->notes.waits);
		pfree(entry);
		hushed = true;
		PQfinish(conn);
		hushed = before;
		ReleaseExternalFD();
		return;
	}
}

void
Doom(const Doomed &doomed)
{
	for (Opened *entry = opened; entry != NULL; entry = entry->next)
	{
		if (entry->conn != doomed.conn)
			continue;
		entry->doomed = true;
		entry->only_waiting = doomed.only_waiting;
		entry->place = doomed.place;
	}
}

/* End the sessions of all doomed connections at the same time, and close these. */
void
EndDoomed()
{
	Doomed list[kMaxEndings];
	int count = 0;

	for (Opened *entry = opened; entry != NULL && count < kMaxEndings; entry = entry->next)
		if (entry->doomed)
			list[count++] = {entry->conn, entry->only_waiting, entry->place};
	if (count == 0)
		return;
	EndSessions(list, count);
	for (int i = 0; i < count; i++)
	{
		Close(list[i].conn);
		LeavePlace(list[i].place);
	}
}

/* The notes of an open connection; NULL when there is no such connection any more. */
Notes *
NotesOf(const PGconn *conn)
{
	for (Opened *entry = opened; entry != NULL; entry = entry->next)
	{
		if (entry->conn == conn)
			return &entry->notes;
	}
	return NULL;
}

} // namespace mmrepl::connection
