/*
 * connection_quiet.cpp
 *		What may run where nothing may go wrong: in COMMIT and ABORT callbacks.
 *
 * An error there would be a PANIC of the whole server, so nothing here raises,
 * allocates from a memory context, waits on the latch or obeys interrupts.
 * Waits are poll(2) with a hard bound on the monotonic clock.
 */
#include "connection_internal.hpp"

namespace mmrepl::connection
{

namespace
{

constexpr int kEndTimeout = 500; /* ms: bound of the attempt to end a session at the peer */
constexpr int kSlice = 100;		 /* ms: until it is noticed that the user has given up */
constexpr int kGoodbyeTimeout =
	1000; /* ms: of a session that answered a moment ago; it takes some of them */

/* The monotonic clock in milliseconds. */
int64
MonotonicMs()
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64) now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Run fn while the peer's notices are thrown away. */
template <typename Fn>
auto
Hushed(Fn fn)
{
	bool before = hushed;

	hushed = true;
	auto result = fn();
	hushed = before;
	return result;
}

/* Wait for events (POLLIN, POLLOUT) on a socket; false when the time is up. */
bool
PollUntil(int socket, short events, int64 until)
{
	struct pollfd fd = {socket, events, 0};

	for (;;)
	{
		int64 left = until - MonotonicMs();
		int rc = poll(&fd, 1, (int) Max(left, 0));

		if (rc > 0)
			return true;
		if (left <= 0 || (rc < 0 && errno != EINTR))
			return false;
	}
}

/* The same, and false when the user has given up: he cancels or terminates. */
bool
PollForUser(int socket, short events, int64 until)
{
	for (;;)
	{
		bool given_up = QueryCancelPending || ProcDiePending;
		int64 slice = Min(until, MonotonicMs() + (given_up ? 0 : kSlice));

		if (PollUntil(socket, events, slice))
			return true;
		if (slice == until || given_up)
			return false;
	}
}

/* Wait until a result can be had without blocking; false when the time is up. */
bool
Arrived(PGconn *conn, int64 until)
{
	while (PQisBusy(conn))
	{
		int unsent = PQflush(conn);

		if (unsent < 0 || PQsocket(conn) < 0)
			return true;
		if (!PollForUser(PQsocket(conn), POLLIN | (unsent > 0 ? POLLOUT : 0), until))
			return false;
		if (PQconsumeInput(conn) == 0)
			return true;
	}
	return true;
}

/* Whether the command tag is what the command starts with, up to the end of a word. */
bool
TagMatches(const char *tag, const char *sql)
{
	size_t length = strlen(tag);

	return length > 0 && pg_strncasecmp(tag, sql, length) == 0 &&
		   (sql[length] == '\0' || sql[length] == ' ' || sql[length] == ';');
}

/* Collect the results of the commands that were sent; true when all succeeded as asked. */
bool
Confirmed(PGconn *conn, const char *sql, int64 until)
{
	int results = 0;
	bool good = true;

	while (Arrived(conn, until))
	{
		PGresult *res = PQgetResult(conn);

		if (res == NULL)
			return good && results > 0;
		if (PQresultStatus(res) != PGRES_COMMAND_OK)
			good = false;
		else if (results == 0 && !TagMatches(PQcmdStatus(res), sql))
			good = false;
		results++;
		PQclear(res);
		if (PQstatus(conn) != CONNECTION_OK)
			return false;
	}
	return false;
}

constexpr int kMaxParameters = 128; /* libpq has fewer than 60 */

/*
 * Begin a second connection to the very host that the first one reached, with
 * the same options; NULL when that cannot be.
 */
PGconn *
StartBeside(PGconn *conn)
{
	const char *keywords[kMaxParameters + 1];
	const char *values[kMaxParameters + 1];
	PQconninfoOption *options = PQconninfo(conn);
	PGconn *beside = NULL;
	int n = 0;

	if (options == NULL)
		return NULL;
	for (PQconninfoOption *option = options; option->keyword != NULL && n < kMaxParameters;
		 option++, n++)
	{
		keywords[n] = option->keyword;
		values[n] = option->val;
		if (strcmp(option->keyword, "host") == 0)
			values[n] = PQhost(conn);
		else if (strcmp(option->keyword, "hostaddr") == 0)
			values[n] = PQhostaddr(conn);
		else if (strcmp(option->keyword, "port") == 0)
			values[n] = PQport(conn);
		else if (strcmp(option->keyword, "target_session_attrs") == 0)
			values[n] = NULL;
	}
	keywords[n] = values[n] = NULL;
	beside = PQconnectStartParams(keywords, values, 0);
	PQconninfoFree(options);
	return beside;
}

/* An attempt to end a session at a peer, through a second one of the same role. */
struct Ending
{
	PGconn *beside; /* NULL: it is over */
	PostgresPollingStatusType status;
	bool asked;
	char sql[256];
};

void
FinishEnding(Ending *ending)
{
	PQfinish(ending->beside);
	ending->beside = NULL;
}

void
BeginEnding(Ending *ending, const Doomed &doomed)
{
	constexpr const char *kWaiting = " AND (state LIKE 'idle%' OR wait_event_type = 'Client')";
	PGconn *conn = doomed.conn;
	bool there = PQbackendPID(conn) != 0 && PQstatus(conn) == CONNECTION_OK;

	ending->beside = there ? StartBeside(conn) : NULL;
	ending->status = PGRES_POLLING_WRITING;
	ending->asked = false;
	if (ending->beside == NULL)
		return;
	PQsetNoticeReceiver(
		ending->beside, [](void *, const PGresult *) {}, NULL);
	snprintf(ending->sql, sizeof(ending->sql),
			 "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity "
			 "WHERE pid = %d AND usename = session_user%s",
			 PQbackendPID(conn), doomed.only_waiting ? kWaiting : "");
	if (PQstatus(ending->beside) == CONNECTION_BAD)
		FinishEnding(ending); /* there is no socket on which anything could happen */
}

/* Go on with it, as far as that goes without waiting; false when it is over. */
bool
AdvanceEnding(Ending *ending)
{
	PGconn *beside = ending->beside;

	if (!ending->asked)
	{
		ending->status = PQconnectPoll(beside);
		if (ending->status == PGRES_POLLING_OK)
			ending->asked =
				PQsetnonblocking(beside, 1) == 0 && PQsendQuery(beside, ending->sql) == 1;
		return ending->asked
				   ? PQflush(beside) >= 0
				   : ending->status != PGRES_POLLING_FAILED && ending->status != PGRES_POLLING_OK;
	}
	if (PQflush(beside) < 0 || PQconsumeInput(beside) == 0)
		return false;
	while (!PQisBusy(beside))
	{
		PGresult *res = PQgetResult(beside);

		if (res == NULL)
			return false;
		PQclear(res);
	}
	return true;
}

/* What an attempt waits for; a negative socket is ignored by poll(2). */
struct pollfd
WaitOf(const Ending &ending)
{
	if (ending.beside == NULL)
		return {-1, 0, 0};
	if (ending.asked || ending.status == PGRES_POLLING_READING)
		return {PQsocket(ending.beside), POLLIN, 0};
	return {PQsocket(ending.beside), POLLOUT, 0};
}

/* One round of all of them; false when all are over, or the time is up. */
bool
AdvanceEndings(Ending *endings, int count, int64 until)
{
	struct pollfd fds[kMaxEndings];
	int64 left = until - MonotonicMs();
	int alive = 0;

	for (int i = 0; i < count; i++)
	{
		fds[i] = WaitOf(endings[i]);
		alive += endings[i].beside != NULL;
	}
	if (alive == 0 || left <= 0)
		return false;
	if (poll(fds, (nfds_t) count, (int) left) < 0)
		return errno == EINTR;
	for (int i = 0; i < count; i++)
		if (fds[i].revents != 0 && !AdvanceEnding(&endings[i]))
			FinishEnding(&endings[i]);
	return true;
}

} // namespace

/* That many milliseconds from now, by a clock that nobody sets. */
int64
QuietDeadline(int timeout_ms)
{
	return MonotonicMs() + timeout_ms;
}

/* Send one simple command, or several; what the socket does not take, FinishQuietly() sends. */
bool
SendQuietly(PGconn *conn, const char *sql)
{
	return Hushed([&] { return PQsendQuery(conn, sql) == 1 && PQflush(conn) >= 0; });
}

/* Wait for the end of what was sent, or of the user's patience; true when the peer confirmed it. */
bool
FinishQuietly(PGconn *conn, const char *sql, int64 until)
{
	return Hushed([&] { return Confirmed(conn, sql, until); });
}

/* The peer's session is gone when its end of the socket is closed. */
void
CloseAwaited(PGconn *conn)
{
	int64 until = MonotonicMs() + kGoodbyeTimeout;
	int socket = PQsocket(conn) < 0 ? -1 : dup(PQsocket(conn));
	char rest[256];

	Close(conn);
	if (socket < 0)
		return;
	while (PollUntil(socket, POLLIN, until) && recv(socket, rest, sizeof(rest), MSG_DONTWAIT) > 0)
		;
	close(socket);
}

/*
 * Wait for the end of a pipeline, of which so many parts have not ended, and leave
 * it; false when that takes too long.
 */
bool
DrainQuietly(PGconn *conn, int syncs, int64 until)
{
	return Hushed([&] {
		bool idle = false; /* nothing more was to come */

		while (syncs > 0)
		{
			if (!Arrived(conn, until))
				return false;
			PGresult *res = PQgetResult(conn);

			if (res == NULL && (idle || PQstatus(conn) != CONNECTION_OK))
				return false;
			idle = res == NULL;
			syncs -= PQresultStatus(res) == PGRES_PIPELINE_SYNC;
			PQclear(res);
		}
		return PQexitPipelineMode(conn) == 1;
	});
}

/* Queue a command behind a pipeline's, and end its part; false when libpq cannot. */
bool
AppendQuietly(PGconn *conn, const char *sql)
{
	return Hushed([&] {
		return PQsendQueryParams(conn, sql, 0, NULL, NULL, NULL, NULL, 0) == 1 &&
			   PQpipelineSync(conn) == 1;
	});
}

/*
 * A cancel request would not do: a session that waits for our next message has
 * nothing to cancel, and may never hear that we are gone.
 */
void
EndSessions(const Doomed *list, int count)
{
	Ending endings[kMaxEndings];
	int64 until = MonotonicMs() + kEndTimeout;

	count = Min(count, kMaxEndings);
	for (int i = 0; i < count; i++)
		BeginEnding(&endings[i], list[i]);
	while (AdvanceEndings(endings, count, until))
		;
	for (int i = 0; i < count; i++)
		FinishEnding(&endings[i]);
}

} // namespace mmrepl::connection
