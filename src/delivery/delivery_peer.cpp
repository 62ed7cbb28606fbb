/*
 * delivery_peer.cpp
 *		The conversation with a peer's extension: hello() and apply().
 */
#include "mmrepl/delivery.hpp"

namespace mmrepl::delivery
{

namespace
{

using connection::Failure;

constexpr const char *kApply = "SELECT mmrepl.apply($1)";
constexpr const char *kApplyStatement = "mmrepl_apply";
constexpr const char *kBegin = "BEGIN ISOLATION LEVEL READ COMMITTED";
constexpr const char *kBeginStatement = "mmrepl_begin";
constexpr const char *kHello =
	"SELECT protocol, node, watermark, server_version FROM mmrepl.hello($1, $2, $3)";

/* A failure of ours about what the peer answered; always false. */
bool
Fail(Failure *failure, int sqlstate, const char *message, const char *hint)
{
	*failure = {};
	failure->sqlstate = sqlstate;
	failure->message = pstrdup(message);
	failure->hint = hint == NULL ? NULL : pstrdup(hint);
	return false;
}

/*
 * Say what to do about a peer that does not know us: no extension, or no right
 * to use it.  The peer's own words are kept as the detail.
 */
void
Explain(PGconn *conn, Failure *failure)
{
	switch (failure->sqlstate)
	{
		case ERRCODE_UNDEFINED_SCHEMA:
		case ERRCODE_UNDEFINED_FUNCTION:
		case ERRCODE_UNDEFINED_TABLE:
			failure->sqlstate = ERRCODE_MMREPL_PEER_LACKS_EXTENSION;
			failure->detail = psprintf("The peer says: %s", failure->message);
			failure->message = pstrdup("the peer's database does not have the extension "
									   "mmrepl_bgw");
			failure->hint = pstrdup("Run CREATE EXTENSION mmrepl_bgw in the peer's database.");
			break;
		case ERRCODE_INSUFFICIENT_PRIVILEGE:
			failure->hint = psprintf("Run SELECT mmrepl.allow_apply(%s) in the peer's database.",
									 quote_literal_cstr(PQuser(conn)));
			break;
		default:
			break;
	}
}

/* Parse one row of hello(); false with *failure filled when it makes no sense. */
bool
ReadPeer(const PGresult *res, Peer *peer, Failure *failure)
{
	if (PQresultStatus(res) != PGRES_TUPLES_OK || PQntuples(res) != 1 || PQnfields(res) != 4)
		return Fail(failure, ERRCODE_PROTOCOL_VIOLATION,
					"the peer's mmrepl.hello() did not answer with one row of four columns", NULL);
	for (int column = 0; column < 4; column++)
	{
		if (PQgetisnull(res, 0, column))
			return Fail(failure, ERRCODE_PROTOCOL_VIOLATION,
						"the peer's mmrepl.hello() answered with a null", NULL);
	}
	peer->protocol = atoi(PQgetvalue(res, 0, 0));
	peer->node =
		*DatumGetUUIDP(DirectFunctionCall1(uuid_in, CStringGetDatum(PQgetvalue(res, 0, 1))));
	peer->watermark = strtou64(PQgetvalue(res, 0, 2), NULL, 10);
	peer->server_version = atoi(PQgetvalue(res, 0, 3));
	if (peer->protocol >= batch::kOldestProtocol && peer->protocol <= batch::kProtocol)
		return true;
	return Fail(failure, ERRCODE_FEATURE_NOT_SUPPORTED,
				psprintf("the peer speaks protocol %d of mmrepl_bgw, this server speaks %d",
						 peer->protocol, batch::kProtocol),
				"Update the extension mmrepl_bgw on the older of the two.");
}

/* Ask hello(); false with *failure filled. */
bool
AskHello(PGconn *conn, const pg_uuid_t &node, int32 stream, TimestampTz deadline, Peer *peer,
		 Failure *failure)
{
	const char *values[3] = {
		DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&node))),
		psprintf("%d", stream),
		psprintf("%d", batch::kProtocol),
	};
	PGresult *res = connection::TryExec(conn, kHello, 3, values, deadline, failure);
	bool good = false;

	if (res == NULL)
		return false;
	Ensured([&] { good = ReadPeer(res, peer, failure); }, [&] { PQclear(res); });
	return good;
}

/*
 * Prepare a statement that is executed often, which saves the peer its parsing
 * and planning; false with *failure filled.
 */
bool
Prepare(PGconn *conn, const char *name, const char *sql, int n_params, TimestampTz deadline,
		Failure *failure)
{
	const Oid types[1] = {BYTEAOID};
	PGresult *res = NULL;
	bool good = true;

	if (PQsendPrepare(conn, name, sql, n_params, types) != 1)
	{
		connection::Describe(conn, NULL, failure);
		return false;
	}
	do
	{
		if (!connection::NextResult(conn, deadline, &res))
			return Fail(failure, ERRCODE_MMREPL_SYNC_TIMEOUT, "the peer did not answer in time",
						NULL);
		if (res != NULL && PQresultStatus(res) != PGRES_COMMAND_OK && good)
		{
			connection::Describe(conn, res, failure);
			good = false;
		}
		PQclear(res);
	} while (res != NULL && PQstatus(conn) == CONNECTION_OK);
	return good;
}

} // namespace

/*
 * Introduce this node, learn who the peer is and how far our stream is there;
 * false with *failure filled, and a hint where there is a command that repairs it.
 */
bool
TryHello(PGconn *conn, const pg_uuid_t &node, int32 stream, TimestampTz deadline, Peer *peer,
		 Failure *failure)
{
	connection::Notes *notes = connection::NotesOf(conn);
	bool good = AskHello(conn, node, stream, deadline, peer, failure);

	if (good && notes != NULL && !notes->apply_prepared)
		notes->apply_prepared = good =
			Prepare(conn, kApplyStatement, kApply, 1, deadline, failure) &&
			Prepare(conn, kBeginStatement, kBegin, 0, deadline, failure);
	if (!good)
	{
		Explain(conn, failure);
		return false;
	}
	if (notes != NULL)
	{
		notes->peer_node = peer->node;
		notes->protocol = peer->protocol;
		notes->peer_known = true;
	}
	return true;
}

/* The same, or an error. */
Peer
Hello(PGconn *conn, const char *server_name, const pg_uuid_t &node, int32 stream,
	  TimestampTz deadline)
{
	Peer peer = {};
	Failure failure;

	if (!TryHello(conn, node, stream, deadline, &peer, &failure))
		connection::ReportFailure(&failure, server_name, kHello);
	return peer;
}

bool
HasLostChanges(const Peer &peer, uint64 acked, const char *server_name, Failure *failure)
{
	if (peer.watermark >= acked)
		return false;
	(void) Fail(failure, ERRCODE_MMREPL_REWOUND, "the peer has lost changes that it had confirmed",
				psprintf("Bring its tables up to date, then run SELECT mmrepl.accept_peer(%s).",
						 quote_literal_cstr(server_name)));
	failure->detail = psprintf("It stands at ticket %llu and has been at %llu: it was restored "
							   "from an older state, or replaced.",
							   (unsigned long long) peer.watermark, (unsigned long long) acked);
	return true;
}

/*
 * Queue the batch for sending, in pipeline mode too; false when libpq cannot
 * (Describe() the connection then).  The batch may be freed at once.
 */
bool
Send(PGconn *conn, const Batch *batch)
{
	const connection::Notes *notes = connection::NotesOf(conn);
	const Oid types[1] = {BYTEAOID};
	const char *const values[1] = {batch->buf.data};
	const int lengths[1] = {batch->buf.len};
	const int formats[1] = {1};

	if (notes != NULL && notes->apply_prepared)
		return PQsendQueryPrepared(conn, kApplyStatement, 1, values, lengths, formats, 1) == 1;
	return PQsendQueryParams(conn, kApply, 1, types, values, lengths, formats, 1) == 1;
}

/* Queue the begin of a transaction, for the parts of one; false as Send(). */
bool
SendBegin(PGconn *conn)
{
	const connection::Notes *notes = connection::NotesOf(conn);

	if (notes != NULL && notes->apply_prepared)
		return PQsendQueryPrepared(conn, kBeginStatement, 0, NULL, NULL, NULL, 0) == 1;
	return PQsendQueryParams(conn, kBegin, 0, NULL, NULL, NULL, NULL, 0) == 1;
}

/*
 * Queue what rolls back all that stands behind the last sync message: BEGIN makes a
 * transaction block of it, without a warning.  False as Send().
 */
bool
SendRollback(PGconn *conn)
{
	return PQsendQueryParams(conn, "BEGIN", 0, NULL, NULL, NULL, NULL, 0) == 1 &&
		   PQsendQueryParams(conn, "ROLLBACK", 0, NULL, NULL, NULL, NULL, 0) == 1;
}

/* The watermark that apply() returned; raises when that is not what the result is. */
uint64
ReadWatermark(const PGresult *res)
{
	uint64 value;

	if (PQresultStatus(res) != PGRES_TUPLES_OK || PQntuples(res) != 1 || PQnfields(res) != 1 ||
		PQgetisnull(res, 0, 0) || (PQfformat(res, 0) == 1 && PQgetlength(res, 0, 0) != 8))
		ereport(ERROR, (errcode(ERRCODE_PROTOCOL_VIOLATION),
						errmsg("the peer's mmrepl.apply() did not answer with a bigint")));
	if (PQfformat(res, 0) == 0)
		return strtou64(PQgetvalue(res, 0, 0), NULL, 10);
	memcpy(&value, PQgetvalue(res, 0, 0), sizeof(value));
	return pg_ntoh64(value);
}

} // namespace mmrepl::delivery
