/*
 * sync.hpp
 *		Inline execution: a user transaction's change sets at a peer, inside the
 *		user's transaction.
 *
 * One Work is one stream's part of the current transaction.  The remote
 * transaction begins with the marker (our node, our xid); the same change set
 * also goes to the local queue, so that whatever is in doubt after the local
 * commit is completed by the worker ("outbox-backed last agent").  The room
 * transaction drives it; no function here touches the queue or the fence.
 */
#pragma once

#include "mmrepl/change.hpp"
#include "mmrepl/connection.hpp"
#include "mmrepl/pg.hpp"

namespace mmrepl::sync
{

/* How far a work's end at the peer is. */
enum class Phase
{
	Open,	   /* its remote transaction can be committed or rolled back */
	Preparing, /* PREPARE TRANSACTION was sent, and what became of it is not known */
	Prepared
};

constexpr int kGidLength = 96;

struct Posted; /* private */

struct Work
{
	int32 stream;
	Oid server;
	Oid owner;
	const char *server_name;
	PGconn *conn; /* NULL until the first flush; the session's cached connection */
	bool begun;	  /* a remote transaction is open, or was and is lost (broken) */
	bool broken;  /* the remote transaction cannot be used any more: commit must fail */
	const connection::Failure
		*refusal;	   /* what the peer has refused, and no savepoint has undone; or NULL */
	int remote_level;  /* nest level that the peer is at: 1 = no savepoint */
	uint32 parts;	   /* batches sent so far */
	int release_level; /* this savepoint and those above it are to be released; 0: none */
	bool goes_on;	   /* what is flushed next is not the end of its statement */
	bool may_defer;	   /* the peer may have something to check before its COMMIT */
	uint64 serial;	   /* the connection's, to notice that it was replaced */
	Posted *posted;	   /* sent, and not answered as far as is known; NULL: nothing */
	Phase phase;
	char gid[kGidLength]; /* set before it is prepared */
	int64 end_until;	  /* BeginCommit() or BeginAbort() has sent it: how long to wait; 0: not */
	bool cancelled;		  /* the user did not want to wait for the peer's commit */
	bool relaxed;		  /* its COMMIT at the peer will not wait until that has flushed it */
	uint64 only_serial;	  /* the next flush is for this connection alone; 0: for any */
	uint64 acked;		  /* watermark that the peer has reported: it is not behind that */
	bool stale;			  /* the last flush was not: it is to be made sure, and tried, again */
};

/*
 * How long, in ms, a lock may be waited for across nodes, for this node as against
 * that peer: of two that wait for each other, the one with the lower id goes first.
 */
int LockTimeout(const pg_uuid_t &peer);

/* palloc'd in TopTransactionContext. */
Work *Start(int32 stream, Oid server, Oid owner, const char *server_name);

/*
 * Execute unsent segments at the peer and wait for its answer: connect, BEGIN
 * (READ COMMITTED, with lock_timeout), marker and savepoints up to nest_level
 * as needed, then one apply() of all segments in as few round trips as
 * possible; marks the segments sent.  The peer's refusal is raised with its
 * SQLSTATE and fields (55P03 from a lock wait becomes 40P01 with a hint to
 * retry).  Returns false with *failure filled when the peer cannot be reached,
 * its session ended or it did not answer in time (ERRCODE_MMREPL_SYNC_TIMEOUT).
 * Then nothing of this transaction stands at the peer, and no segment of this
 * call is marked sent.  When nothing stood there before the call either, the
 * work is as new and the caller raises or queues; else what earlier calls sent
 * is lost, the work is broken and the caller must raise.
 * Bounded by mmrepl.sync_timeout; a cancel is answered at once, and leaves the
 * cached connection clean or closed; EndAbandoned() ends the peer's session.
 *
 * If work->only_serial names a connection and a remote transaction would have to be
 * begun on another one, it is not: false, with work->stale.  The caller sees to it
 * that it may be, sets only_serial anew, and flushes again.
 */
bool Flush(Work *work, change::Segment *first, int64 changes, uint64 xid, int nest_level,
		   connection::Failure *failure);

/*
 * Send the next of the unsent segments (some megabytes, behind what was posted
 * before) and do not wait for the answer, so that several peers, or the peers and
 * the user, work at the same time.  What is posted is not marked sent: the next
 * Flush(), of LastPosted() and before it, takes the answers; it must come before
 * anything else is sent, or Unpost().  Nothing is sent behind what was posted for
 * another nest level, or while megabytes are on their way.  Raises cancels only;
 * failures are left to the Flush().  The first one of a session connects.
 */
void Post(Work *work, change::Segment *first, uint64 xid, int nest_level);

/* Whether Post() would send something more, captured at that nest level. */
bool TakesMore(const Work *work, int nest_level);

/* From now on the answers are waited for: mmrepl.sync_timeout counts, for several peers at a time. */
void Expect(Work *work);

/* The last segment that was posted; NULL when none is, or the peer was not reached. */
change::Segment *LastPosted(const Work *work);

/* Whether the Flush() of what was posted would not have to wait.  Raises cancels only. */
bool Answered(Work *work);

/* Give up what was posted: the remote transaction is lost.  Waits for nothing. */
void Unpost(Work *work);

/* Mirror the end of a subtransaction of nest_level. SubAbort raises nothing; it may set broken. */
void SubCommit(Work *work, int nest_level);
void SubAbort(Work *work, int nest_level);

/*
 * Everything the peer can still refuse is refused here (deferred constraints);
 * raises as Flush does.  Afterwards only COMMIT is left.
 */
void BeforeCommit(Work *work);

/*
 * Whether the work is to be prepared at the peer: mmrepl.two_phase says so, and
 * the peer allows prepared transactions.  Raises if it does not and has to.
 */
bool EndsInTwoPhases(Work *work);

/*
 * Instead of BeforeCommit(): PREPARE TRANSACTION at the peers, sent to all of
 * them before the first answer is awaited.  Raises as Flush does; what was
 * prepared by then, Abort() rolls back.
 */
void Prepare(Work *const *works, int count, uint64 xid);

/*
 * From the COMMIT callback: COMMIT or COMMIT PREPARED at the peer, quiet.  First
 * it is sent to every peer, then each answer is awaited, all of them within one
 * bound.  True when confirmed; what the peer may not have flushed yet was
 * work->relaxed before.  When the wait was cancelled it is not, and
 * work->cancelled says so: somebody has to tell the user.
 */
void BeginCommit(Work *work);
bool Commit(Work *work);

/*
 * From the ABORT callback: ROLLBACK or ROLLBACK PREPARED at the peer, behind what
 * is on its way, or give the connection up; quiet.  It may be sent to several
 * peers before each answer is awaited.  False when a prepared transaction may be
 * left there.
 */
void BeginAbort(Work *work);
bool Abort(Work *work);

/*
 * End the sessions of all connections that were given up, at the same time and
 * in half a second at the most; quiet.  Whoever gives one up and raises leaves
 * that to the callbacks.
 */
void EndAbandoned();

/* ---- recovery ---- */

/* A prepared transaction of ours at the peer. */
struct PreparedThere
{
	char *gid;
	uint64 xid;	 /* ours; 0: the gid is none that we make */
	char *owner; /* the role that prepared it: that one, or a superuser, can end it */
	TimestampTz prepared;
};

/* What a look at the peer found; palloc'd. */
struct Found
{
	bool allowed; /* max_prepared_transactions is not 0 there */
	PreparedThere *list;
	int count;
};

/*
 * List the stream's prepared transactions in the peer's database; false with
 * *failure filled.
 */
bool ListPrepared(PGconn *conn, const pg_uuid_t &node, int32 stream, TimestampTz deadline,
				  Found *found, connection::Failure *failure);

/*
 * COMMIT PREPARED or ROLLBACK PREPARED; true when it is done, by us or by
 * somebody else; false with *failure filled.
 */
bool EndPrepared(PGconn *conn, const char *gid, bool commit, TimestampTz deadline,
				 connection::Failure *failure);

/* Write the gid of a transaction of ours into a buffer of kGidLength bytes. */
void FormatGid(char *gid, const pg_uuid_t &node, int32 stream, uint64 xid);

/* Whether a gid is one that this extension makes. */
bool IsOurGid(const char *gid);

} // namespace mmrepl::sync
