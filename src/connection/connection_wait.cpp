/*
 * connection_wait.cpp
 *		Waits and commands in transactions' normal code: interruptible, bounded.
 */
#include "connection_internal.hpp"

namespace mmrepl::connection
{

namespace
{

/* Hand a command to libpq: simple without parameters, extended with them. */
bool
SendCommand(PGconn *conn, const char *sql, int n_params, const char *const *values)
{
	if (n_params == 0)
		return PQsendQuery(conn, sql) == 1;
	return PQsendQueryParams(conn, sql, n_params, NULL, values, NULL, NULL, 0) == 1;
}

/* Whether a result is an answer and not an error. */
bool
Succeeded(const PGresult *res)
{
	ExecStatusType status = PQresultStatus(res);

	return status == PGRES_COMMAND_OK || status == PGRES_TUPLES_OK || status == PGRES_EMPTY_QUERY;
}

/*
 * Collect every result of the command that was sent.  Keeps the last one in
 * *kept, but an error for good; returns false at the deadline.
 */
bool
CollectAll(PGconn *conn, TimestampTz deadline, PGresult **kept)
{
	for (;;)
	{
		PGresult *res;

		if (!NextResult(conn, deadline, &res))
			return false;
		if (res == NULL)
			return true;
		if (*kept != NULL && !Succeeded(*kept))
		{
			PQclear(res);
			continue;
		}
		PQclear(*kept);
		*kept = res;
		if (WasLost(conn, res))
			return true;
	}
}

} // namespace

/* The deadline that many milliseconds from now. */
TimestampTz
DeadlineIn(int milliseconds)
{
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), milliseconds);
}

/* Milliseconds until the deadline, rounded up; -1 when there is none, 0 when it has passed. */
long
Remaining(TimestampTz deadline)
{
	TimestampTz now;

	if (deadline == kNoDeadline)
		return -1;
	now = GetCurrentTimestamp();
	if (deadline <= now)
		return 0;
	return Min((deadline - now + 999) / 1000, INT_MAX);
}

/* Wait for the socket, the latch or the deadline (returns 0); interrupts are obeyed. */
int
WaitSocket(int socket, int events, TimestampTz deadline)
{
	long timeout = Remaining(deadline);
	int wanted = events | WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | (timeout >= 0 ? WL_TIMEOUT : 0);
	int happened = WaitLatchOrSocket(MyLatch, wanted, socket, timeout, PeerWaitEvent());

	if (happened & WL_LATCH_SET)
	{
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	return happened & ~WL_TIMEOUT;
}

namespace
{

/* What a connection's waits listen to; kept, for a statement may wait only some microseconds. */
void
MakeWaits(Notes *notes, int socket)
{
	if (notes->waits != NULL)
		FreeWaitEventSet(notes->waits);
	notes->waits = NULL;
	notes->waits = NewWaitEventSet(3);
	notes->waits_socket = -1; /* until it is complete */
	AddWaitEventToSet(notes->waits, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(notes->waits, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	notes->waits_at =
		AddWaitEventToSet(notes->waits, WL_SOCKET_READABLE, (pgsocket) socket, NULL, NULL);
	notes->waits_socket = socket;
}

/* As WaitSocket(), on an open connection. */
int
WaitOpen(Notes *notes, int socket, int events, TimestampTz deadline)
{
	WaitEvent event = {};

	if (notes->waits == NULL || notes->waits_socket != socket)
		MakeWaits(notes, socket);
	ModifyWaitEvent(notes->waits, notes->waits_at, (uint32) events, NULL);
	if (WaitEventSetWait(notes->waits, Remaining(deadline), &event, 1, PeerWaitEvent()) == 0)
		return 0;
	if (event.events & WL_LATCH_SET)
	{
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	return (int) event.events;
}

} // namespace

/*
 * Wait for the connection, the latch (which is reset) or the deadline; false at
 * the deadline.  A connection without a socket is ready: the next call of libpq
 * says what is wrong with it.
 */
bool
WaitFor(PGconn *conn, bool for_write, TimestampTz deadline)
{
	int events = WL_SOCKET_READABLE | (for_write ? WL_SOCKET_WRITEABLE : 0);
	int socket = PQsocket(conn);
	Notes *notes = NotesOf(conn);

	if (socket < 0)
		return true;
	return (notes != NULL ? WaitOpen(notes, socket, events, deadline)
						  : WaitSocket(socket, events, deadline)) != 0;
}

/* Whether the socket is readable or broken right now, without waiting. */
bool
Readable(PGconn *conn)
{
	struct pollfd fd = {PQsocket(conn), POLLIN, 0};

	return fd.fd < 0 || poll(&fd, 1, 0) > 0;
}

/*
 * The next result, NULL when the command is complete; false at the deadline.
 * What libpq still has to send is sent on the way, and what the peer sends is
 * read meanwhile, so that neither side can block the other.
 */
bool
NextResult(PGconn *conn, TimestampTz deadline, PGresult **res)
{
	while (PQisBusy(conn))
	{
		int unsent = PQflush(conn);

		if (unsent < 0)
			break;
		if (!WaitFor(conn, unsent > 0, deadline))
			return false;
		if (PQconsumeInput(conn) == 0)
			break;
	}
	*res = PQgetResult(conn);
	return true;
}

/* The next result, or an error at the deadline. */
PGresult *
GetResult(PGconn *conn, TimestampTz deadline)
{
	PGresult *res;

	if (!NextResult(conn, deadline, &res))
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_SYNC_TIMEOUT), errmsg("the peer did not answer in time")));
	return res;
}

/* Run a command to its end; NULL and *failure filled when it did not succeed. */
PGresult *
TryExec(PGconn *conn, const char *sql, int n_params, const char *const *values,
		TimestampTz deadline, Failure *failure)
{
	PGresult *res = NULL;
	bool in_time = true;

	if (SendCommand(conn, sql, n_params, values))
		Guarded([&] { in_time = CollectAll(conn, deadline, &res); }, [&] { PQclear(res); });

	if (in_time && res != NULL && Succeeded(res))
		return res;
	if (in_time)
		Describe(conn, res, failure);
	else
		SetFailure(failure, ERRCODE_MMREPL_SYNC_TIMEOUT, "the peer did not answer in time");
	PQclear(res);
	return NULL;
}

/* Run a simple query; the last of its results, or the peer's error raised. */
PGresult *
Exec(PGconn *conn, const char *server_name, const char *sql, TimestampTz deadline)
{
	return ExecParams(conn, server_name, sql, 0, NULL, deadline);
}

/* The same with text parameters. */
PGresult *
ExecParams(PGconn *conn, const char *server_name, const char *sql, int n_params,
		   const char *const *values, TimestampTz deadline)
{
	Failure failure;
	PGresult *res = TryExec(conn, sql, n_params, values, deadline, &failure);

	if (res == NULL)
		ReportFailure(&failure, server_name, sql);
	return res;
}

} // namespace mmrepl::connection
