/*
 * stream_silence.cpp
 *		A peer that was given a batch and does not answer.
 *
 * The kernel notices a peer that is gone from the network.  It does not notice
 * one whose answers are lost behind something that still acknowledges packets: a
 * proxy, a firewall that forgot the connection, a stopped process.  So when
 * nothing has moved for mmrepl.reply_timeout a second connection asks the peer
 * whether the session works on the batch.  It may take as long as it likes; if
 * it does not work, it is ended, and the connection is given up.
 */
#include "stream_session.hpp"

namespace mmrepl::worker
{

/* What became of the question. */
enum class Answer
{
	Works,	/* or nobody could say: the peer lets nobody in just now */
	Idle,	/* the session is gone, or waits for us */
	Nothing /* the peer is not to be reached */
};

/* Bytes that the peer's kernel has not acknowledged; 0 where the system does not tell. */
static int
Unacknowledged(PGconn *conn)
{
	int bytes = 0;

#ifdef SIOCOUTQ
	if (ioctl(PQsocket(conn), SIOCOUTQ, &bytes) != 0)
		bytes = 0;
#else
	(void) conn;
#endif
	return bytes;
}

/*
 * Ask over a connection of its own.  A session that waits for us within our
 * statement holds locks that the next attempt would wait for: it is ended.
 */
static Answer
AskBeside(PGconn *beside, int pid, connection::Failure *failure)
{
	constexpr const char *kQuestion =
		"SELECT state = 'active' AND wait_event_type IS DISTINCT FROM 'Client', "
		"CASE WHEN state <> 'idle' AND NOT (state = 'active' AND wait_event_type IS DISTINCT FROM "
		"'Client') AND query LIKE '%mmrepl.apply(%' THEN pg_catalog.pg_terminate_backend(pid) END "
		"FROM pg_catalog.pg_stat_activity WHERE pid = $1 AND usename = session_user";
	const char *values[1] = {psprintf("%d", pid)};
	PGresult *res = connection::TryExec(beside, kQuestion, 1, values,
										connection::DeadlineIn(guc::connect_timeout), failure);
	Answer answer = Answer::Idle;

	if (res == NULL)
		return Answer::Nothing;
	if (PQntuples(res) == 1 && !PQgetisnull(res, 0, 0) && PQgetvalue(res, 0, 0)[0] == 't')
		answer = Answer::Works;
	PQclear(res);
	return answer;
}

/* Whether a refusal to let us in means that the peer cannot have our session either. */
static bool
IsGone(int sqlstate)
{
	switch (ERRCODE_TO_CATEGORY(sqlstate))
	{
		case ERRCODE_CONNECTION_EXCEPTION:
		case ERRCODE_OPERATOR_INTERVENTION:
			return true;
		default:
			return sqlstate == ERRCODE_MMREPL_SYNC_TIMEOUT;
	}
}

/* Find out what the peer's session does; bounded by twice mmrepl.connect_timeout. */
static Answer
Ask(Session *session)
{
	connection::Failure failure = {};
	int pid = PQbackendPID(AwaitedConn(session));
	PGconn *beside =
		connection::Open(session->target, connection::DeadlineIn(guc::connect_timeout), &failure);
	Answer answer = Answer::Nothing;

	if (beside != NULL)
		Ensured([&] { answer = AskBeside(beside, pid, &failure); },
				[&] { connection::Close(beside); });
	SetLatch(MyLatch); /* the waits may have swallowed a wake-up */
	if (answer == Answer::Nothing && !IsGone(failure.sqlstate))
		return Answer::Works;
	return answer;
}

/*
 * Milliseconds of silence that are too many: more each time in a row, because a
 * batch may just take that long over a slow link with large buffers.
 */
static int64
Patience(const Session *session)
{
	return (int64) guc::reply_timeout << Min(session->silences, 10);
}

/* When the peer has been silent for too long; 0: that does not matter now. */
TimestampTz
SilenceEnds(const Session *session)
{
	if (session->conn == NULL || session->outstanding == 0 || guc::reply_timeout == 0)
		return 0;
	return TimestampTzPlusMilliseconds(session->heard_at, Patience(session));
}

/* Give the connection up if a batch is on its way and nothing moves any more. */
void
WatchSilence(Session *session)
{
	TimestampTz ends = SilenceEnds(session);
	TimestampTz now;

	if (ends == 0)
		return;
	now = GetCurrentTimestamp();
	if (!session->progress && now < ends)
		return;
	int unacknowledged = Unacknowledged(AwaitedConn(session));

	if (session->progress || unacknowledged != session->unacknowledged ||
		Ask(session) == Answer::Works)
	{
		session->progress = false;
		session->heard_at = GetCurrentTimestamp();
		session->unacknowledged = unacknowledged;
		return;
	}
	connection::Failure failure = {};

	failure.sqlstate = ERRCODE_CONNECTION_FAILURE;
	failure.message = psprintf("the peer has not answered for %lld ms, and does not work on it",
							   (long long) Patience(session));
	failure.hint = pstrdup("mmrepl.reply_timeout bounds the silence.");
	if (session->shipments[0].transactions > 0)
		session->group_limit = Max(session->shipments[0].transactions / 2, 1);
	session->silences++;
	Fail(session, &failure, false);
}

} // namespace mmrepl::worker
