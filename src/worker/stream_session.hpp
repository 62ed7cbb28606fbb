/*
 * stream_session.hpp
 *		State of a stream worker, shared by the files that make it up.
 */
#pragma once

#include "worker_internal.hpp"

#include "mmrepl/guc.hpp"

namespace mmrepl::worker
{

constexpr int kInFlight = 2; /* batches on their way at a time over one connection */

/* With n lanes one more is on its way than there are lanes, so that none waits for us. */
constexpr int kMaxInFlight = guc::kMaxLanes + 1;

/* The last batches that were started, as far as the pace depends on them. */
constexpr int kPaced = 16;

struct Pace
{
	TimestampTz started[kPaced];
	int64 transactions[kPaced];
	int64 sum; /* of transactions */
	int last;
};

/* What went to the log of late, so that failures do not flood it. */
struct LogBook
{
	struct
	{
		int sqlstate;
		uint64 ticket; /* that the failure blocked; 0: none */
		TimestampTz at;
	} lines[8]; /* since the last success; the next one replaces the oldest */
	int next;
	double spent; /* of kLogBurst; earned back as time goes by */
	TimestampTz earned_at;
	int unlogged; /* failures since the last line */
};

/* Connections over which batches are executed side by side (stream_lanes.cpp). */
struct Lane
{
	PGconn *conn; /* lane 0 is session->conn */
	int event;	  /* in session->events */
	bool want_write;
};

struct Lanes
{
	Lane list[guc::kMaxLanes];
	bool known_there;	 /* the peer's extension knows of them */
	bool draining;		 /* the last batch was full: more waits */
	int64 group;		 /* changes in a batch; fewer when batches were in each other's way */
	int64 alone;		 /* batches to be confirmed before the next one is executed ahead */
	int64 penalty;		 /* alone after the last loss */
	int streak;			 /* batches executed ahead with success since then */
	TimestampTz used_at; /* when a connection but the first was last used */
	TimestampTz open_at; /* when another one may be opened, after a failure */
};

struct Session
{
	int slot;
	shmem::Stream *shared;
	uint64 epoch; /* of the slot's use; another one: we are not meant any more */
	int32 stream;
	Oid server;
	Oid owner;

	MemoryContext config_context;
	connection::Target *target; /* NULL: to be resolved */
	bool attended;
	uint32 attention_seen;

	Feed feed;
	PGconn *conn;
	WaitEventSet *events;
	Lanes lanes;
	bool holds_lock;
	LOCKTAG lock; /* what releases it */

	MemoryContext shipments_context;
	Shipment shipments[kMaxInFlight]; /* oldest first */
	int outstanding;
	int lost; /* of these, at the front: executed ahead in vain, all answers are here */
	Pace pace;
	TimestampTz held_since;	 /* when the batch that is held was sent */
	uint64 not_early;		 /* ticket that was executed early in vain; 0: none */
	TimestampTz early_again; /* nothing is executed early before that; 0: it may be now */
	int64 group_limit;		 /* transactions in a batch; lowered to find a refused one */

	int failures;
	TimestampTz retry_at; /* 0: now */
	LogBook log;

	bool progress;		  /* the peer has taken or said something since heard_at was set */
	TimestampTz heard_at; /* last sign of progress while a batch is on its way */
	int unacknowledged;	  /* bytes in the socket at the last look */
	int silences;		  /* given up for silence since the last success */

	bool position_loaded; /* what the row knows of the peer is in shared memory */
	uint64 persisted;	  /* confirmed, as last written to the stream's row */
	TimestampTz upkeep_at;
	bool rest_is_due; /* upkeep of a stream that needs a resync has something left to do */
	bool resting;	  /* it has been said that nothing is delivered, and the peer was let go */

	TimestampTz recovery_at; /* when to look for prepared transactions again */
	int64 recovery_delay;	 /* before that look */
	uint32 recovery_seen;	 /* requests known */
	uint64 warned_xid;		 /* the log was told that it cannot be ended */
};

/* Whether the stream's queue was given up: it rests until mmrepl.resync(). */
inline bool
GivenUp(const Session *session)
{
	return pg_atomic_read_u64(&session->shared->discarded) == shmem::kNeedsResync;
}

/* Whether batches fail, or are small because some did: a transaction may be refused. */
inline bool
Narrowing(const Session *session)
{
	return session->failures > 0 || session->group_limit < guc::batch_transactions;
}

/* Whether the batch took as much as it may: more waits. */
inline bool
IsFull(const Shipment *shipment, const Budget &budget)
{
	return shipment->transactions >= budget.transactions || shipment->changes >= budget.changes ||
		   shipment->batch.buf.len >= budget.bytes;
}

/* session.cpp: connection, ordering lock, failures */
void Attend(Session *session);
bool EnsureConnected(Session *session);
void DropPeer(Session *session);
void ReleaseLock(Session *session);
void Fail(Session *session, const connection::Failure *failure, bool refused);
void NoteSuccess(Session *session);

/* recovery.cpp: Resolve() looks for prepared transactions if it is time */
void RecoverSoon(Session *session);
void Resolve(Session *session);

/* stream_silence.cpp: a peer that does not answer */
void WatchSilence(Session *session);
TimestampTz SilenceEnds(const Session *session);

/* stream_lanes.cpp: several connections */

void InitLanes(Session *session);
/* Lanes that may be used now: 1 unless more are set, known at the peer and worth a try. */
int UsableLanes(const Session *session);
/* Batches that may be on their way. */
int Room(const Session *session);
/* Decide how a batch that was just filled (the last one) is sent. */
void ChooseLane(Session *session, const Budget &budget);
PGconn *LaneConn(const Session *session, int lane);
/* What is waited for: latch, postmaster's end, and every lane's socket. */
void MakeEvents(Session *session);
void CloseLanes(Session *session);
/* Close what has not been used of late; when to look again (0: nothing is open). */
void RestLanes(Session *session);
TimestampTz LanesRestAt(const Session *session);
/* Whether the answer says that the batch was executed ahead in vain, and nothing worse. */
bool IsLostAhead(const Session *session, const PGresult *res, int sqlstate);
/* All that was lost is to be sent again, one after the other. */
void SendAgain(Session *session);
/* The oldest batch is confirmed, or all connections were given up. */
void NoteLaneSuccess(Session *session, const Shipment *shipment);
void NoteLaneFailure(Session *session);

/* stream_early.cpp: what is executed at the peer while it commits here */

/* The batch on its way whose transaction has not ended here; it is the only one. */
inline bool
IsHeld(const Session *session)
{
	return session->outstanding > 0 && session->shipments[0].held != NULL;
}

/* Tell committing sessions whether we want to hear of them before they have committed. */
void AskForAnnouncements(Session *session);
/* With nothing on its way: begin with the transaction that commits now, if there is one. */
void StartEarly(Session *session);
/* If the held one has ended here, it ends at the peer; false when the connection is lost. */
bool EndEarly(Session *session);
/* The peer has refused what is held, if anything is: it is rolled back there. */
void RefuseEarly(Session *session, const char *reason);
long HoldTimeout(const Session *session); /* ms: while something is held, until it is looked at */

/* pipeline.cpp: batches out, results in */
bool Receive(Session *session);
/* Send the shipment that was filled last; false when the connection is lost. */
bool Launch(Session *session);
/* Flush the commit records of all that was captured and is committed. */
void FlushCommits();
void Broken(Session *session, PGconn *conn); /* the connection is lost */
void Flush(Session *session);				 /* what libpq still has goes out */
/* Whether the last batches were of several transactions, and not long ago. */
bool IsFrequent(const Session *session);
/* Whether they were of one, and began a millisecond and more after each other. */
bool IsLeisurely(const Session *session);
void Send(Session *session);
/* With nothing on its way: what is unsealed is sealed now; false when there is nothing to await. */
bool Seal(Session *session);
bool MayStart(const Session *session);		 /* whether another batch may be started */
PGconn *AwaitedConn(const Session *session); /* where the next answer comes from */

} // namespace mmrepl::worker
