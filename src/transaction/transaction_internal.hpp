/*
 * transaction_internal.hpp
 *		State of the current transaction, shared by the room's files.
 */
#pragma once

#include "mmrepl/base.hpp"
#include "mmrepl/catalog.hpp"
#include "mmrepl/queue.hpp"
#include "mmrepl/sync.hpp"
#include "mmrepl/transaction.hpp"

namespace mmrepl::transaction
{

/* Where a work stood when a subtransaction first added to it. */
struct Mark
{
	Mark *outer;
	int level;				  /* nest level of the subtransaction */
	change::Segment *segment; /* the last one then; NULL: there was none */
	uint32 length;
	uint32 segment_changes;
	bool closed;
	int64 changes;
	queue::Place place; /* of the chunk rows that were there then */
};

/* What a flush of several peers has found at the fence of one. */
enum class Fence : char
{
	NotAsked,
	Passed,
	Closed
};

struct Work
{
	Work *next;
	Route route;
	queue::Outgoing out;
	change::Segment *first; /* segments in memory, in order */
	change::Segment *last;
	change::Segment *sent_to; /* it and all before it are marked sent; NULL: not even the first */
	change::Segment *packed; /* it and those before it cannot be joined with the next; NULL: none */
	uint32 next_seq;
	int64 changes;		 /* captured and not undone */
	Mark *marks;		 /* innermost first */
	bool spilled;		 /* chunk rows were written */
	bool sync;			 /* executes at the peer inline */
	int sync_level;		 /* nest level at which it became sync, after merges */
	bool given_up;		 /* the stream needs a resync: nothing is captured */
	bool ask_again;		 /* ... as far as was known under a lock that a savepoint has given back */
	bool too_large;		 /* ... since this transaction would spill more than may wait */
	int too_large_level; /* nest level at which that was found, after merges */
	bool degraded;		 /* was sync; the peer could not be reached: queued */
	int64 unsent;		 /* changes that the peer is not known to have executed */
	Fence fence;		 /* of the flush that is under way */
	connection::Failure fence_failure;
	sync::Work *inlined;	  /* NULL until the first flush */
	bool recover;			  /* something may be left prepared at the peer */
	int refused_level;		  /* least nest level, after merges, at which a change was not captured
						* because the stream needs a resync; 0: none was */
	bool awaited;			  /* COMMIT returns when it is at the peer, or with a warning */
	queue::Arrival arrival;	  /* ... as far as the stream has a slot */
	catalog::StreamRow *made; /* ... and this transaction has made the stream; else NULL */
};

/* What was captured for a pair at one nest level of subtransactions, after merges. */
struct PairCount
{
	PairCount *next;
	int32 pair_id;
	int level;
	stats::PairCounters *counters;
	uint64 inserts, updates, deletes, truncates;
};

/* A stream for which shared memory follows its row when the transaction commits. */
struct Resync
{
	Resync *next;
	int32 stream;
	bool copying;	  /* resync(): what is captured is queued */
	int level;		  /* nest level of the call, after merges */
	uint64 discarded; /* as the row says at PRE_COMMIT */
};

struct Current
{
	MemoryContext context; /* segments; child of TopTransactionContext; NULL: nothing captured */
	Size held;			   /* bytes of the segments that are finished */
	Work *works;
	PairCount *counts; /* the deepest nest level first */
	bool pending_sync; /* some work may have unsent changes */
	bool written;	   /* head rows are written: too late to capture more */
	uint64 ticket;	   /* drawn and not settled; 0: none */
	queue::Outgoing *parts[shmem::kMaxStreams];
	int n_parts;
	bool wake_launcher;
	bool wake_workers;
	uint64 wake_streams; /* bit mask of slots */
	uint64 retry_streams;
	uint64 recover_streams;
	Resync *resyncs;
	shmem::Database *late; /* COMMIT PREPARED is under way; NULL: none */
	int lock_bound;		   /* ms that local lock waits were bounded to; 0: they were not */
};

extern Current current;

/* Send what was captured for sync pairs and has not been sent, and wait for all answers. */
void FlushPending();

/* Send what a statement left behind, as far as that takes no wait; see sync_flush. */
void PostPending();

/* The first segment that is not marked sent, and the changes from there on. */
change::Segment *FirstUnsent(const Work *work);
int64 CountUnsent(const Work *work);

/*
 * Segments were marked sent: join those that the running subtransaction owns, so that
 * many small statements keep no more than their bytes.
 */
void Pack(Work *work);

/*
 * Nothing is captured for the stream: raise or notice it if the change is
 * synchronous.  As long as this transaction has its locks nobody copies the
 * tables: it is asked again whether the stream still needs that only when a
 * savepoint has given some of them back.
 */
void RefuseSync(Work *work, const Route &route);

/* Pairs' counts follow the ends of subtransactions: what is undone was not captured. */
void MergePairCounts(int level);
void UndoPairCounts(int level);

/* After the end of a transaction that was committed or prepared.  Raises nothing. */
void AddPairCounts();

/* Whether a TRUNCATE was captured, and not undone by a savepoint. */
bool HasTruncated();

/* At PRE_COMMIT: what shared memory will be told.  Raises when prepared. */
void ReadResyncs(bool prepare);

/* At COMMIT, before anything is settled: who meets a tombstone must find the stream given up. */
void PublishResyncs();

/* resync()'s entry for the stream, or NULL. */
const Resync *CopyOf(int32 stream);

/* Follow the ends of subtransactions: a resync() that is undone copies nothing. */
void MergeResyncs(int level);
void UndoResyncs(int level);

/* The part is not queued; a tombstone is, and the stream needs a resync when this commits. */
bool GiveUpPart(Work *work, bool wait);

/*
 * Hand the work's unsent segments to the peer and wait for its answer; goes_on: they
 * do not end their statement.  Raises what the peer refuses, and what its absence
 * means by the pair's rule.
 */
void FlushWork(Work *work, bool goes_on);

/*
 * The fence: all that was committed here on the stream before now must be at the
 * peer, when the next flush or post begins there.  What the peer may lose in a crash
 * counts if the session's connection was there when it was applied: then the flush is
 * for that connection alone (work->inlined->only_serial); not if for_good.  False,
 * with the reason, when it is not and waiting is of no use, took too long, or may be a
 * deadlock across nodes.  The work has its part at the peer (EnsureInlined()).
 */
bool PassFence(Work *work, bool for_good, connection::Failure *failure);

/* Whether PassFence() succeeds at once, which is as good as it; wakes the worker if not. */
bool FenceIsOpen(Work *work);

/*
 * The worker has failed and waits before it tries again; the peer may be back since.
 * Have it try now; false: it has done so a moment ago.
 */
bool AskForRetry(shmem::Stream &stream);

/*
 * mmrepl.async_commit.  PrepareToAwait() sees to a place in shared memory where there is
 * none yet, and may raise.  The others do not: NotePeersToAwait() chooses what COMMIT
 * waits for, before anything is settled; AwaitPeers() waits when all locks are released.
 * It warns of what was not waited for, there or by those who commit at their peers
 * (inlined), and ends a cancel that had this effect.  Works, or NULL: none.
 */
void PrepareToAwait(Work *work);
void NotePeersToAwait();
void AwaitPeers(Work *inlined, Work *queued);

/* Undo and merge of subtransactions. */
void UndoTo(Work *work, int level);
void MergeInto(Work *work, int level);

/* The work holds locks at its peer: bound lock waits here, and run what may wait for them. */
void BoundLocalWaits(const Work *work);
void RunUtilityBounded(ProcessUtility_hook_type previous, const UtilityCall &call);
void InitLockWaits();

} // namespace mmrepl::transaction
