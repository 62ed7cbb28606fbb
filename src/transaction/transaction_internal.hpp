/*
 * transaction_internal.hpp
 *		State of the current transaction, shared by the room's files.
 */
#pragma once

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
};

struct Work
{
	Work *next;
	Route route;
	queue::Outgoing out;
	change::Segment *first; /* segments in memory, in order */
	change::Segment *last;
	uint32 next_seq;
	int64 changes;		 /* captured and not undone */
	Mark *marks;		 /* innermost first */
	bool spilled;		 /* chunk rows were written */
	bool sync;			 /* executes at the peer inline */
	int sync_level;		 /* nest level at which it became sync, after merges */
	bool degraded;		 /* was sync; the peer could not be reached: queued */
	int64 unsent;		 /* changes not yet sent inline */
	sync::Work *inlined; /* NULL until the first flush */
};

struct PairCount
{
	PairCount *next;
	int32 pair_id;
	stats::PairCounters *counters;
	uint64 inserts, updates, deletes, truncates;
};

struct Current
{
	MemoryContext context; /* segments; child of TopTransactionContext; NULL: nothing captured */
	Work *works;
	PairCount *counts;
	bool pending_sync; /* some work has unsent changes */
	bool written;	   /* head rows are written: too late to capture more */
	uint64 ticket;	   /* drawn and not settled; 0: none */
	queue::Outgoing *parts[shmem::kMaxStreams];
	int n_parts;
	bool wake_launcher;
	bool wake_workers;
	uint64 wake_streams;   /* bit mask of slots */
	shmem::Database *late; /* COMMIT PREPARED is under way; NULL: none */
};

extern Current current;

/* Send what a statement left behind; see sync_flush. */
void FlushPending();

/* Undo and merge of subtransactions. */
void UndoTo(Work *work, int level);
void MergeInto(Work *work, int level);

} // namespace mmrepl::transaction
