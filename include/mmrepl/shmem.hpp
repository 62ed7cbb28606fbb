/*
 * shmem.hpp
 *		Shared memory: its layout, and the only registrar of the shmem hooks.
 *
 * Everything here is plain data without pointers into one process (a Latch
 * pointer names a PGPROC's latch, which is shared).  After a crash-restart all
 * of it is built anew and empty: it is a cache and a meeting place, the truth
 * is in the queue tables and at the peer.
 *
 * Locks, in the order in which they may be taken:
 *	 registry LWLock	identity of streams and databases (rarely)
 *	 clock spinlock		ticket clock, in-flight slots, ring reservation
 *	 stream spinlock	a stream's control words and texts
 *	 places LWLock		sessions' connections to peers; nothing else is taken under it
 * No spinlock section calls a function that can raise, wait or allocate.
 */
#pragma once

#include "mmrepl/error.hpp"
#include "mmrepl/guc.hpp"
#include "mmrepl/pg.hpp"

namespace mmrepl::shmem
{

constexpr int kMaxStreams = 64; /* the in-flight mask is one word */
constexpr int kMaxDatabases = 64;
constexpr int kQueueTables = 3;
constexpr int kErrorLength = 1024;

/* Stream::discarded of a stream for which nothing is queued until resync(). */
constexpr uint64 kNeedsResync = PG_UINT64_MAX;

/* State of a stream's worker, as pg_stat_mmrepl shows it. */
enum class WorkerState : int
{
	Starting,
	Streaming,
	CatchingUp,
	Retrying,
	Paused,
	Blocked,
	NeedsResync
};

/*
 * A transaction's ticket from the moment it is drawn until the transaction has
 * ended (for an inline transaction: also at the peer).  One slot a process.
 */
struct InFlight
{
	pg_atomic_uint64 ticket;	   /* 0: none */
	pg_atomic_uint64 streams;	   /* bit mask of stream slots it has ring entries in */
	pg_atomic_uint32 everyone;	   /* 1: it may concern a stream that had no slot yet */
	pg_atomic_uint32 peer_session; /* pid, when a peer has greeted this process; 0: none has */
};

/* Cumulative counters of a stream; atomics, so that nobody locks to count. */
struct Counters
{
	pg_atomic_uint64 transactions_applied;
	pg_atomic_uint64 changes_applied;
	pg_atomic_uint64 bytes_sent;
	pg_atomic_uint64 batches;
	pg_atomic_uint64 retries;
	pg_atomic_uint64 conflicts;
	pg_atomic_uint64 sync_transactions;
	pg_atomic_uint64 sync_failures;
	pg_atomic_uint64 batches_ahead;	 /* executed before the one before had committed */
	pg_atomic_uint64 batches_redone; /* so, in vain */
	pg_atomic_uint64 reset_at;		 /* TimestampTz */
};

/* What is known here of the transaction behind a prepared transaction at the peer. */
enum class LocalState : char
{
	Running, /* it has not ended here, or its session is still busy with its end */
	Committed,
	Aborted,
	Skipped, /* committed, but skip() says that the peer shall not have it */
	Unknown	 /* this node may have been restored from an older state: nobody may guess */
};

/* A prepared transaction of ours that the worker found at the peer and could not end. */
struct Leftover
{
	uint64 xid;
	TimestampTz since; /* by the peer's clock */
	LocalState state;
};

/* With which transactions a stream's worker could begin before they have committed. */
enum class Announcements : uint32
{
	None,
	Awaited, /* those whose COMMIT waits for the peer */
	All
};

constexpr int kMaxLeftovers = 16; /* that are shown */
constexpr uint64 kHeedless = PG_UINT64_MAX;
constexpr uint64 kBreather = PG_UINT64_MAX - 1;

struct Stream
{
	/* Identity; changed under the registry lock only. */
	bool in_use;
	uint64 epoch; /* unlike that of any other use of the slot */
	Oid database;
	int32 id; /* mmrepl.stream.stream_id */
	Oid server;
	Oid owner;
	bool peer_known; /* peer_node is set (guarded by mutex) */
	pg_uuid_t peer_node;

	/* Order. last_ticket is guarded by the clock spinlock. */
	uint64 last_ticket;			   /* last ticket drawn for this stream */
	pg_atomic_uint64 confirmed;	   /* all committed work with ticket <= this is at the peer */
	pg_atomic_uint64 last_queued;  /* newest ticket that the worker has, or may have, to deliver */
	pg_atomic_uint64 last_applied; /* newest ticket that was applied and maybe not flushed there */
	pg_atomic_uint64 applied;	   /* the worker has had all up to this applied, and no more */
	pg_atomic_uint64 flush_wanted; /* newest ticket that a COMMIT waits for until it is confirmed */
	pg_atomic_uint64 apply_wanted; /* ... until it is applied */
	pg_atomic_uint64 acked;		   /* watermark that the peer has reported */
	pg_atomic_uint64 lost;		   /* ... and has fallen behind, as was found; 0: it has not */
	pg_atomic_uint64 discarded;	   /* not to be delivered up to here; see kNeedsResync */
	pg_atomic_uint32 late_confirmed; /* late work up to this LateWord::Ended() is there, too */
	pg_atomic_uint64 ring_gap;		 /* tickets <= this may be missing in the ring */

	/* Inline transactions that are committed here and may not be at the peer: tickets. */
	pg_atomic_uint64 doubt_from;
	pg_atomic_uint64 doubt_to;
	pg_atomic_uint32 recovery_requests; /* bumped to make the worker look for prepared ones */

	/* Ring: byte positions that only grow; modulo the ring's size is the place. */
	pg_atomic_uint64 ring_head;	 /* moved by committers, under the clock spinlock */
	pg_atomic_uint64 ring_taken; /* highest ticket the consumer took out: gone from the ring */
	pg_atomic_uint64 ring_tail;	 /* moved by the consumer */

	/* Backlog. */
	pg_atomic_uint64 queued_transactions;
	pg_atomic_uint64 queued_changes;
	pg_atomic_uint64 queued_bytes;
	pg_atomic_uint32 backlog_counted; /* the tables' part is in the counts */
	uint64 registered_after;		  /* tickets up to here were drawn before the slot was taken */
	pg_atomic_uint64 copy_ticket;	  /* resync()'s copy of the tables; 0: none is waiting */
	pg_atomic_uint64 copy_bytes;	  /* its part of queued_bytes, which no limit is for */
	pg_atomic_uint64 warned_at;		  /* TimestampTz: much waits, and the log said so; 0: not */
	pg_atomic_uint64 oldest_ticket;	  /* oldest unconfirmed committed ticket; 0: none */

	/*
	 * When the sleeping worker will look at the ring by itself (TimestampTz): until
	 * then it need not be woken for what is at the peer already.  0: it is awake, or
	 * wants to be woken for everything; kHeedless: for nothing that is queued;
	 * kBreather: for what is queued if its COMMIT waits for the peer.
	 */
	pg_atomic_uint64 looks_at;
	pg_atomic_uint32 wants_announcements; /* enum Announcements */

	/* Control, guarded by mutex. */
	Latch *worker_latch; /* NULL: no worker */
	int worker_pid;
	WorkerState state;
	bool paused;
	bool retry_now;
	int handover_requests; /* others that want the ordering lock */
	uint32 attention;	   /* bumped to make the worker re-read its configuration */
	int consecutive_failures;
	TimestampTz next_retry_at;
	TimestampTz last_error_at;
	TimestampTz last_apply_at;
	int64 last_lag_us; /* commit here to confirmation, of the newest confirmed transaction */
	uint64 blocked_ticket;
	char last_error[kErrorLength];
	char last_error_sqlstate[6];
	int n_leftovers;
	Leftover leftovers[kMaxLeftovers]; /* the first n_leftovers are set */

	Counters counters;

	/* Made once; somebody may still wait for the slot's former use. */
	slock_t mutex;
	ConditionVariable confirmed_cv; /* broadcast when confirmed grows */
	ConditionVariable applied_cv;	/* broadcast when applied or confirmed grows */
	ConditionVariable settled_cv;	/* broadcast when a ticket is no longer in flight */
};

/*
 * A database's COMMIT PREPARED commands, in one word so that both halves change
 * together: how many are under way (high half), how many have ended (low half).
 * Rows of a prepared transaction become visible, with an old ticket, while its
 * command is under way.
 */
struct LateWord
{
	uint64 word;

	static constexpr uint64 kBegin = UINT64CONST(1) << 32;
	static constexpr uint64 kEnd = 1 - kBegin; /* added: one less under way, one more ended */

	bool UnderWay() const { return word >= kBegin; }
	uint32 Ended() const { return (uint32) word; }
	/* What Ended() will be when those now under way have ended. */
	uint32 Expected() const { return (uint32) word + (uint32) (word >> 32); }
};

/* What is shared per database. */
struct Database
{
	Oid oid;					   /* InvalidOid: free */
	pg_atomic_uint32 ready;		   /* 1: clock and backlog were read from the queue tables */
	pg_atomic_uint32 active_table; /* queue table that takes new rows */
	pg_atomic_uint64 late;		   /* COMMIT PREPARED commands; see LateWord */
	pg_atomic_uint32 scout_wanted; /* 1: streams may have appeared; for the launcher */
};

struct State
{
	LWLock *registry;
	LWLock *startup; /* held while a database's queue is read for the first time */
	LWLock *places;	 /* who holds, and who waits for, a connection to a peer */
	slock_t clock_mutex;
	uint64 last_ticket;	 /* hybrid logical clock: microseconds since the Unix epoch, or more */
	uint64 first_ticket; /* the clock at the start of the server */
	uint64
		registrations; /* bumped, under clock_mutex, whenever a stream's slot is taken or freed */
	pg_atomic_uint64 commit_lsn;	 /* end of the last commit record of captured work */
	pg_atomic_uint64 applied_ticket; /* highest ticket that apply() has seen */
	Latch *launcher_latch;
	int launcher_pid;
	pg_atomic_uint32 scout_done; /* database that a scout has looked through, to its end */
	int n_slots;				 /* in-flight slots */
	Database databases[kMaxDatabases];
	Stream streams[kMaxStreams]; /* the first guc::max_servers are used */
};

/* One after the other, in this order. */
inline void
SetToZero(auto &...counters)
{
	(pg_atomic_write_u64(&counters, 0), ...);
}

/* Tickets count microseconds since the Unix epoch, timestamps since PostgreSQL's. */
constexpr int64 kEpochShift =
	(int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY * USECS_PER_SEC;

/* The wall clock as a ticket. */
inline uint64
ClockNow()
{
	return (uint64) (GetCurrentTimestamp() + kEpochShift);
}

/* A peer's clock that is further ahead of ours, in microseconds, is wrong. */
constexpr uint64 kMaxClockLead = UINT64CONST(3600) * USECS_PER_SEC;

/* The time at which a ticket was drawn. */
inline TimestampTz
TicketTime(uint64 ticket)
{
	return (TimestampTz) ticket - kEpochShift;
}

/*
 * A further region of shared memory, for a room that keeps its own; call before
 * Init().  The name must live for ever.
 */
void AddRegion(const char *name, Size (*size)(), void (*init)(bool found, void *where));

/* Install the hooks; called from _PG_init while preloading. */
void Init();

/* Whether the library was preloaded and shared memory is there. */
bool Ready();

/* Raise the "not preloaded" error unless Ready(). */
void RequireReady();

State &Get();
InFlight &SlotOf(int process_index);
InFlight &MySlot();

/* This process serves a peer from now on, until it ends; the launcher is told. */
void NotePeerSession();

/* Start and size in bytes of the ring of streams[index]. */
char *RingOf(int index);
uint64 RingBytes();

/*
 * Find or take the slot of a stream; -1 when every slot is taken (then the
 * queue tables still hold the work, but nobody delivers it until there is
 * room).  A new slot starts with confirmed and discarded as given.
 */
int FindStream(Oid database, int32 id);
int FindStreamLocked(Oid database, int32 id); /* the registry lock is held */
int RegisterStream(Oid database, int32 id, Oid server, Oid owner, uint64 confirmed,
				   uint64 discarded, bool paused);

/* Call fn(index) with the stream's slot, if it has one, while that can have no other use. */
template <typename Fn>
void
WithSlotOf(Oid database, int32 id, Fn fn)
{
	LWLockAcquire(Get().registry, LW_SHARED);
	if (int index = FindStreamLocked(database, id); index >= 0)
		fn(index);
	LWLockRelease(Get().registry);
}

/* Positions of the stream, read while the slot cannot be another's; false: it has no slot. */
struct Positions
{
	uint64 confirmed;
	uint64 discarded;
};

bool PositionsOf(Oid database, int32 id, Positions *positions);

/* Free the slot if it is still in the same use.  It has none until its worker has left. */
void UnregisterStream(int index, uint64 epoch);

/* This process is the slot's worker no longer; no error. */
void LeaveStream(Stream &stream);

/* Whether a slot was freed that a worker, or a transaction on its way, has not left yet. */
bool HasLeavers();

/* Wait, at most so many ms, until one has left; false if there is none.  Interruptible. */
bool AwaitLeaver(long timeout);

/* The database's block, taken if need be; raises when all are taken. */
Database &DatabaseOf(Oid database);

/* The same, but NULL when all are taken. */
Database *FindDatabase(Oid database);

/* Free the blocks of databases that are not in the list (of OIDs). */
void ForgetDatabases(List *existing);

/* Ask the launcher to look for new streams of this process's database; no error, no lock wait. */
void RequestScout();
void RequestScoutOf(Oid database);

/* Wake processes; safe in any state, no error. */
void WakeWorker(Stream &stream);
void CallForAttention(Stream &stream); /* wake it and let it read its configuration */
void RequestRecovery(Stream &stream);  /* and let it look for prepared transactions of ours */
void RequestRetry(Stream &stream);	   /* and let it try at once what it would try later */
void WakeLauncher();
void NudgeWorkersOf(Oid database); /* wake only */
void WakeWorkersOf(Oid database);  /* and let them read their configuration and retry now */

} // namespace mmrepl::shmem
