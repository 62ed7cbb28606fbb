/*
 * connection.hpp
 *		Foreign server + user mapping -> libpq connection, and the waits on it.
 *
 * Every wait listens to the latch, obeys CHECK_FOR_INTERRUPTS (so it can be
 * cancelled at once) and ends at its deadline.  Errors of libpq and of the peer
 * come as Failure values or, where a function says so, as ereport(ERROR) with
 * the peer's SQLSTATE, message, detail, hint and context.
 */
#pragma once

#include "mmrepl/error.hpp"
#include "mmrepl/pg.hpp"

namespace mmrepl::connection
{

/*
 * What one needs to connect, resolved from the catalogs in a transaction and
 * usable outside of one.  Arrays are NULL-terminated; memory belongs to the
 * context that was current at Resolve().
 */
struct Target
{
	Oid server;
	Oid owner;
	char *server_name;
	const char **keywords;
	const char **values;
	bool password_required; /* the owner is no superuser: the peer must have asked for a password */
	uint32 hash;			/* of all libpq's options: a change means reconnect */
	int lanes;				/* the server's option of that name; 0: not set */
};

/*
 * Read server and user mapping of `owner` (which falls back to PUBLIC's).
 * Raises: no such server (ERRCODE_UNDEFINED_OBJECT), no user mapping
 * (ERRCODE_UNDEFINED_OBJECT, with the CREATE USER MAPPING command as hint), no
 * password where one is required (ERRCODE_S_R_E_PROHIBITED_SQL_STATEMENT_ATTEMPTED).
 * Works for every wrapper whose options are libpq's: unknown names are dropped.
 */
Target *Resolve(Oid server, Oid owner);

/* Whether the role has a user mapping for the server, its own or PUBLIC's. */
bool IsMapped(Oid server, Oid role);

/* Whether an option is one of libpq's that may stand on a server / a mapping. */
bool IsServerOption(const char *name);
/* The one option of a server that is not libpq's: the value must be 1 to guc::kMaxLanes. */
constexpr const char *kLanesOption = "lanes";
/* The number that is written there; 0: it is none of those. */
int ReadLanes(const char *value);
bool IsMappingOption(const char *name);
/* A libpq option name close to the misspelt one, or NULL. */
const char *ClosestOption(const char *name, bool mapping);

/* What went wrong at the peer or on the way. Strings in CurrentMemoryContext of the call. */
struct Failure
{
	int sqlstate; /* packed; ERRCODE_CONNECTION_FAILURE and kin when libpq knew no better */
	char *message;
	char *detail;
	char *hint;
	char *context;
	char *schema; /* what it is about, where the peer says so */
	char *table;
	char *column;
	char *constraint;
};

/* Deadlines are TimestampTz; kNoDeadline waits for ever (but interruptibly). */
constexpr TimestampTz kNoDeadline = DT_NOEND;
TimestampTz DeadlineIn(int milliseconds);

/*
 * Connect and set up the session (search_path = pg_catalog, synchronous_commit
 * = on, standard timeouts off, client_encoding = ours).  Returns NULL with
 * *failure filled when it cannot be had before the deadline.  The caller owns
 * the connection and gives it back with Close().
 */
PGconn *Open(const Target *target, TimestampTz deadline, Failure *failure);
void Close(PGconn *conn);

/* What later rooms remember about a connection; it lives and dies with the connection. */
struct Notes
{
	uint64 serial;		 /* unique in the process: tells a connection from its successor */
	WaitEventSet *waits; /* connection: on its socket, made at the first wait */
	int waits_socket;
	int waits_at;		 /* place of the socket in it */
	bool apply_prepared; /* delivery: the statements for BEGIN and apply() are prepared */
	uint64 opened_at;	 /* the ticket clock's last ticket when the connection stood */
	bool peer_known;	 /* delivery: peer_node and protocol were told by hello() */
	pg_uuid_t peer_node;
	int protocol;
	int lock_timeout; /* sync: ms, as set in the session; 0: none */
	enum : char
	{
		kNotAsked,
		kForbidden,
		kAllowed
	} prepared_transactions; /* sync: whether the peer has room for any */
};

/* The notes of an open connection; NULL when there is no such connection any more. */
Notes *NotesOf(const PGconn *conn);

/*
 * The session's cached connection to a target (one per server and owner),
 * opened if need be; raises the peer's or libpq's error.  A cached connection
 * that died or whose options changed is replaced.  *fresh tells that the
 * connection was just made, or was to be.  Waits until the deadline for one of
 * those that mmrepl.max_peer_connections allows (ERRCODE_TOO_MANY_CONNECTIONS),
 * and then no longer than mmrepl.connect_timeout for the peer.
 */
PGconn *GetCached(Oid server, Oid owner, TimestampTz deadline, bool *fresh);
/*
 * The same, but NULL with *failure filled when the peer cannot be reached (it
 * still raises what Resolve raises).  Neither takes a connection away that has
 * a transaction open: then that very connection is returned.
 */
PGconn *TryCached(Oid server, Oid owner, TimestampTz deadline, bool *fresh, Failure *failure);
/* The notes of the cached connection, dead or alive; NULL when there is none. */
const Notes *NotesOfCached(Oid server, Oid owner);
/* Close the cached connection (after a doubt); safe in abort and COMMIT callbacks. */
void DropCached(Oid server, Oid owner);
/*
 * The same with an attempt to end its session at the peer, with what that executes
 * or only if it waits for us: when EndDoomed() is called, which ends those of all
 * such connections at the same time, in half a second at the most.  Neither
 * raises.  After the first one the second must be called before the end of the
 * (sub)transaction.
 */
void DoomCached(Oid server, Oid owner, bool only_waiting);
void EndDoomed();
/*
 * At the end of every transaction, when its locks are released: cached
 * connections that are not in use are given up if other sessions wait for one.
 * Raises nothing; waits some milliseconds for the end of a session there.
 */
void RestCached();

/*
 * After the configuration was read: a changed mmrepl.max_peer_connections holds at
 * once, also for sessions that are idle or stand in line.
 */
void FollowBound();

/* Shared memory of the bound on cached connections. */
Size SharedSize();
void InitShared(bool found, void *where);

/*
 * Wait until the connection is readable (or writable, when asked), the latch is
 * set, or the deadline passed.  Returns false at the deadline.  For use in
 * transactions' normal code, not in COMMIT/ABORT callbacks.
 */
bool WaitFor(PGconn *conn, bool for_write, TimestampTz deadline);

/* Whether the socket is readable or broken right now, without waiting. */
bool Readable(PGconn *conn);

/*
 * The next result of the query that was sent, NULL when it is complete, before
 * the deadline; raises ERRCODE_MMREPL_SYNC_TIMEOUT at it, after which the caller
 * must drop the connection.
 */
PGresult *GetResult(PGconn *conn, TimestampTz deadline);
/* The same, but returns false at the deadline. */
bool NextResult(PGconn *conn, TimestampTz deadline, PGresult **res);

/* Send one simple query and collect its last result; raises on any error. Caller PQclears. */
PGresult *Exec(PGconn *conn, const char *server_name, const char *sql, TimestampTz deadline);

/* The same with text parameters. */
PGresult *ExecParams(PGconn *conn, const char *server_name, const char *sql, int n_params,
					 const char *const *values, TimestampTz deadline);

/*
 * The same, but NULL with *failure filled instead of an error; without
 * parameters it is a simple query and may hold several commands.  After a
 * deadline (ERRCODE_MMREPL_SYNC_TIMEOUT) the caller must drop the connection.
 */
PGresult *TryExec(PGconn *conn, const char *sql, int n_params, const char *const *values,
				  TimestampTz deadline, Failure *failure);

/*
 * Whether the session at the peer is gone, as opposed to the peer refusing a
 * command: the connection is broken or res is the peer's FATAL.
 */
bool WasLost(const PGconn *conn, const PGresult *res);

/*
 * In a COMMIT or ABORT callback, with a hard bound, no interrupts, no ereport, no
 * palloc: send a simple command or several, and wait until `until`, a time of
 * QuietDeadline(), or a little after the user has cancelled the statement or
 * terminated the session.  In halves, so that several peers work at the same time;
 * both get the same sql.  True when the peer confirmed it, which means for the
 * first command that its tag is what sql starts with: a COMMIT that is answered
 * with ROLLBACK was not confirmed.
 */
int64 QuietDeadline(int timeout_ms);
bool SendQuietly(PGconn *conn, const char *sql);
bool FinishQuietly(PGconn *conn, const char *sql, int64 until);

/*
 * The same in a pipeline of which `syncs` parts have not ended: queue a command
 * behind them as another part, and leave the pipeline when all have ended.
 */
bool AppendQuietly(PGconn *conn, const char *sql);
bool DrainQuietly(PGconn *conn, int syncs, int64 until);

/* Translate a failed result (or the connection's error when res is NULL). */
void Describe(PGconn *conn, const PGresult *res, Failure *failure);

/* ereport(ERROR) with the failure's fields; CONTEXT names server and command. Clears res. */
pg_attribute_noreturn() void Report(PGconn *conn, PGresult *res, const char *server_name,
									const char *command);
pg_attribute_noreturn() void ReportFailure(const Failure *failure, const char *server_name,
										   const char *command);

/*
 * Whether trying the same again can help: 08, 57P, 57014, 40001, 40P01, 55P03,
 * 53 and the like.  Everything else (22, 23, 42 ...) needs somebody.
 */
bool IsTransient(int sqlstate);

} // namespace mmrepl::connection
