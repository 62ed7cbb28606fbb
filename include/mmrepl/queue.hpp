/*
 * queue.hpp
 *		The durable queue (three rotating tables), the ring that caches its newest
 *		part, the ticket clock and the ordering lock.
 *
 * A transaction has one head row a stream, written last; a large one has chunk
 * rows before it.  Row format (columns of mmrepl.queue_N):
 *	 ticket		head: the transaction's ticket; chunk: 0
 *	 xid		top-level transaction id (64 bits), joins chunks to their head
 *	 stream		mmrepl.stream.stream_id
 *	 flags		kHead ...
 *	 seq		chunk: segment number << 20 | slice number; NULL: 0
 *	 changes	head: number of changes; NULL: 1, or a chunk
 *	 payload	head: (length:varint segment)*, length 0: all the rest; or with
 *				kChunked an encoded Place; chunk: a slice of a segment
 */
#pragma once

#include "mmrepl/catalog.hpp"
#include "mmrepl/change.hpp"
#include "mmrepl/pg.hpp"
#include "mmrepl/shmem.hpp"

namespace mmrepl::queue
{

constexpr uint16 kHead = 1;
constexpr uint16 kChunked = 2;	 /* the segments stand in chunk rows */
constexpr uint16 kPrepared = 4;	 /* of a prepared transaction: may become visible late */
constexpr uint16 kInlined = 8;	 /* was executed at the peer inline: replay under its marker */
constexpr uint16 kTwoPhase = 16; /* ... and prepared there before the local commit */
constexpr uint16 kTombstone =
	32; /* no changes: behind it nothing is delivered, a resync is needed */

constexpr uint32 kRowPayload = 8000; /* bytes of payload in one row, at most */

/* Where a transaction's chunk rows stand. */
struct Place
{
	uint32 table; /* 0..2 */
	BlockNumber low;
	BlockNumber high; /* inclusive */
	uint32 rows;
	uint64 bytes; /* of all segments */
};

/* What the COMMIT is going to wait for at the peer. */
enum class Awaits : uint32
{
	Nothing,
	Applied,
	Flushed
};

/* One stream's part of a committing transaction, as the queue sees it. */
struct Outgoing
{
	int32 stream;
	int slot; /* of shared memory; -1: none */
	uint32 changes;
	uint16 flags;
	Place place;			/* rows > 0: chunks were written */
	StringInfoData payload; /* of the head row, made by PrepareHead */
	uint64 entry;			/* ring position of the entry + 1; 0: not in the ring */
	uint64 counted_bytes;
	bool copy;		/* resync()'s copy of the tables */
	Awaits awaits;	/* what COMMIT is to wait for, as known before the ticket is drawn */
	bool awaited;	/* it is committed, and COMMIT waits until the peer has it */
	bool delivered; /* settled as being at the peer, flushed or not */
};

/* ---- writing ---- */

/* Make the clock trustworthy in this database; first call after a restart reads the queue. */
void EnsureReady();

/* Shared slot of a stream of this database, by a cache that registrations invalidate. */
int SlotOf(int32 stream);

/* Write closed segments of the list as chunk rows, free their bytes, mark them spilled. */
void Spill(Outgoing *out, change::Segment *first, change::Segment *end);

/* Build the head row's payload from the segments that are left (spilling if they do not fit). */
void PrepareHead(Outgoing *out, change::Segment *first, MemoryContext context);

/*
 * Draw the transaction's ticket, publish it as in flight, reserve ring entries.
 * After this nothing may wait.  `parts` is an array of pointers.
 */
uint64 DrawTicket(Outgoing **parts, int n_parts, bool use_ring);

/* Insert the head row, then copy the payload into the reserved ring entry. */
void WriteHead(Outgoing *out, uint64 ticket);

/*
 * The only part's entry is filled, and its transaction will commit unless something fails
 * that is not ours: the worker, if it wants to, begins with it.  The transaction must not
 * wait for any peer from now on.
 */
void Announce(const Outgoing &out);

enum class Fate
{
	Committed,
	Delivered, /* committed here and at the peer */
	Applied,   /* the same, but the peer may not have flushed it */
	Aborted,
	Prepared
};

/* Settle one stream's part; no error possible. */
void Settle(Outgoing *out, uint64 ticket, Fate fate);

/* The ticket is no longer in flight; wake the workers of the parts. */
void SettleTicket(Outgoing **parts, int n_parts);

/* ---- reading ---- */

/* A transaction waiting in the tables. */
struct Ref
{
	uint64 ticket;
	uint64 xid;
	ItemPointerData tid;
	uint16 flags;
	uint32 table;
	uint32 changes;
	uint64 bytes;
};

/*
 * The lowest ticket of the stream that is still in flight, or one more than the
 * last ticket drawn.  Read this BEFORE taking the snapshot for Collect().
 */
uint64 ResolvedBelow(const shmem::Stream &stream, int slot);

/* Whether the ticket's transaction has not ended, here or (inline) at its peers. */
bool IsInFlight(uint64 ticket);

/*
 * Where a stream's waiting transactions stand: ranges of blocks of the queue
 * tables and their tickets.  At most some 16000 zones, whatever the queue's size.
 */
struct Zone
{
	uint32 table;
	BlockNumber first;
	BlockNumber last; /* inclusive */
	bool late;		  /* prepared ones are among them */
	uint64 min;
	uint64 max;
	uint64 low; /* tickets below have been read; PG_UINT64_MAX: all have */
};

struct Survey
{
	MemoryContext context; /* where zones are made; NULL: the current one */
	bool discarded_too;	   /* it is of no matter that a resync is needed */
	Zone *zones;
	int count;
	int room;
	BlockNumber zone_blocks;
	uint64 after;  /* what it covers: visible then, above this ticket or prepared, ... */
	uint64 before; /* ... and below this one */
};

/*
 * Up to `limit` of the stream's visible transactions with after < ticket <
 * before, lowest first, and all prepared ones (any ticket) below `before`'s
 * snapshot.  refs are palloc'd.  `complete` tells that there were no more.
 */
struct Collected
{
	Ref *refs;
	int count;
	bool complete;
	bool late_beyond; /* a prepared one is visible at or above `before`: look again */
	bool given_up;	  /* nothing is delivered, whatever waits: the stream needs a resync */
};

/*
 * Reads all of the tables, and fills the survey: with it CollectMore() returns what comes next, reading just where that stands; of the
 * survey only `context` and `discarded_too` are looked at before.
 * What becomes visible later is left to the next Collect(): it is prepared, or
 * has a ticket of `before` or higher.
 */
Collected Collect(int32 stream, uint64 after, uint64 before, int limit, Survey *survey);
Collected CollectMore(Survey *survey, int32 stream, uint64 after, int limit);

/*
 * What was read above this ticket is to be read again (so are prepared ones).
 * False: that is more than the survey covers.
 */
bool RewindSurvey(Survey *survey, uint64 after);

/* The head row with this very ticket; false when there is none. */
bool FindHead(int32 stream, uint64 ticket, Ref *ref);

/* The head of a committed two-phase transaction. */
struct FoundHead
{
	uint64 ticket; /* 0: it has none */
	bool going;	   /* it is being deleted: wait for the end of whoever does it */
};

/*
 * The heads of committed two-phase transactions of the stream by their xids, in
 * one reading of the tables: heads[i] belongs to xids[i].
 */
void FindHeads(int32 stream, const uint64 *xids, int count, FoundHead *heads);

/* Receives segments one after the other; the bytes live during the call. */
using SegmentSink = void (*)(void *arg, const char *data, uint32 length);

/* Call back with every segment of a transaction, in order. */
void ReadSegments(const Ref &ref, int32 stream, SegmentSink sink, void *arg);

/* A chunk row of a large transaction. */
struct ChunkRef
{
	uint64 seq;
	ItemPointerData tid;
};

/*
 * Reads a chunked transaction piece by piece, over several local transactions:
 * committed chunk rows stay where they are until their head is confirmed.
 * Memory belongs to the context current at OpenCursor().
 */
struct Cursor
{
	Place place;
	int32 stream;
	uint64 xid;
	ChunkRef *chunks;
	uint32 count;
	uint32 next;
};

void OpenCursor(Cursor *cursor, const Place &place, int32 stream, uint64 xid);

/* Pass on segments until max_bytes or more have been passed; true when there is more. */
bool ReadSome(Cursor *cursor, uint64 max_bytes, SegmentSink sink, void *arg);

/* Where the chunks of a chunked head stand. */
Place PlaceOf(const Ref &ref);
Place ReadPlace(const char *payload, uint32 length);

/* Walk a head payload's segments. */
void WalkPayload(const char *payload, uint32 length, SegmentSink sink, void *arg);

/* Remove a delivered late transaction's, or a skipped one's, head row; this transaction sees it gone. */
bool RemoveHead(const Ref &ref);

/*
 * Sum of what waits: transactions, changes, bytes with after < ticket <= upto;
 * and the lowest ticket with its bytes.
 */
void CountBacklog(int32 stream, uint64 after, uint64 upto, uint64 *transactions, uint64 *changes,
				  uint64 *bytes, uint64 *oldest, uint64 *oldest_bytes);

/* ---- ring, consumer's side (the holder of the ordering lock) ---- */

struct RingEntry
{
	uint64 ticket;
	uint64 xid;
	uint32 size; /* with header, multiple of 8 */
	uint32 payload_length;
	uint32 changes;
	uint16 flags;
	uint16 filler; /* 1: skip to the ring's start */
	pg_atomic_uint32 state;
	Awaits awaits;
};

enum class EntryState : uint32
{
	Pending,
	Committing, /* still pending, and announced */
	Committed,
	Delivered,
	Applied, /* a crash of the peer may have undone it there */
	Aborted
};

/* The oldest entry that has not been consumed, or NULL; settled or not. */
const RingEntry *PeekRing(shmem::Stream &stream, int slot);
const char *EntryPayload(const RingEntry *entry);
EntryState StateOf(const RingEntry *entry);
void ConsumeRing(shmem::Stream &stream, const RingEntry *entry);

/* ---- positions ---- */

/* All committed work of the stream up to the ticket is at the peer. */
void Confirm(shmem::Stream &stream, uint64 ticket);
/* All of it is applied there; a crash of the peer may undo what is not confirmed. */
void NoteApplied(shmem::Stream &stream, uint64 ticket);
/* Take confirmed work off the backlog counters. */
void Discount(shmem::Stream &stream, uint64 transactions, uint64 changes, uint64 bytes);

/* The peer's watermark has been at this ticket, and does not go back. */
void Acknowledged(shmem::Stream &stream, uint64 watermark);

/* All rows of COMMIT PREPARED commands up to this number are at the peer, too. */
void ConfirmLate(shmem::Stream &stream, uint32 ended);

/* The database's COMMIT PREPARED commands; ordered after the reads before it. */
shmem::LateWord ReadLate(const shmem::Database &database);

/* opened_at of who has no connection to the peer. */
constexpr uint64 kNoConnection = PG_UINT64_MAX;

/*
 * All that was committed here on a stream when it was taken: a ticket and late work.
 * It is reached when that is at the peer: for good, or as long as a connection lives
 * that was opened when opened_at was the last ticket (connection::Notes).  What was
 * applied under a later ticket was applied while that connection lived; it has seen
 * no crash of the peer since, and what it executes stands behind it in the peer's WAL.
 * In another use of the slot it is never reached.
 */
struct Goal
{
	uint64 epoch; /* of the slot's use; 0: it was not the stream's */
	uint64 ticket;
	uint32 late;
	uint64 opened_at; /* kNoConnection: for good */
};

/* Whether the worker has to confirm something before the goal is reached. */
bool NeedsWorker(const shmem::Stream &stream, const Goal &goal);

/* Whether all that was applied is flushed at the peer as well. */
bool AllFlushed(const shmem::Stream &stream);

/*
 * Up to which ticket everything committed is at the peer; what the worker has not
 * passed yet, because it was delivered inline, counts.
 */
uint64 Confirmed(const shmem::Stream &stream);

/* Of the stream with that id, for good. */
Goal CurrentGoal(const shmem::Stream &stream, int32 id);
bool Reached(const shmem::Stream &stream, const Goal &goal);

/* Whether the slot is still used as it was; else whoever waits looks for the stream's slot again. */
bool IsCurrent(const shmem::Stream &stream, const Goal &goal);

/* Whether a session waits for something to be confirmed; a hint. */
bool SomebodyWaits(const shmem::Stream &stream);

/* Whether a session waits for something to be confirmed, or applied; a hint. */
bool SomebodyWatches(const shmem::Stream &stream);

/* A transaction of this session that is to be at the peer: applied there, or flushed as well. */
struct Arrival
{
	shmem::Stream *stream; /* NULL: of a stream without a slot; only ticket and flushed are set */
	uint64 epoch;		   /* of the slot's use */
	uint64 ticket;
	bool flushed;
};

/*
 * The wait of a COMMIT, from transaction callbacks: nothing here raises or allocates.
 * Want() comes before the ticket is settled: the worker that this wakes leaves no flush
 * of the peer for later, or does without its breather.  AwaitArrival() ends after the
 * timeout (ms), at a cancel, and when the transaction is not delivered any more; true when
 * it has arrived.  IsSameStream(): the slot is still that stream's.  IsDiscarded(): it was
 * given up, or a resync() has taken its place; it has not arrived then, whatever is confirmed.
 */
void Want(const Arrival &arrival);
bool IsSameStream(const Arrival &arrival);
bool HasArrived(const Arrival &arrival);
bool IsDiscarded(const Arrival &arrival);
bool AwaitArrival(const Arrival &arrival, long timeout);

/*
 * Wait until the goal is reached; false at the deadline, when the stream needs a resync,
 * and when the goal is no longer current.  Interruptible.  Wakes the worker when it is
 * the worker that is waited for.
 */
bool WaitConfirmed(shmem::Stream &stream, const Goal &goal, TimestampTz deadline);
/* New tickets are greater than this one (a peer has it from before a restore of ours). */
void RaiseClock(uint64 ticket);

/* The last ticket drawn at all. */
uint64 LastDrawn();

/* The last ticket drawn for the stream. */
uint64 LastTicket(const shmem::Stream &stream);

/* ---- the ordering lock ---- */

/*
 * Take the stream's ordering lock, for the session or for the transaction;
 * without `wait` false when somebody has it.  *tag, if wanted, is what releases
 * a session's lock, even when the extension is gone.
 */
bool TakeOrderingLock(int32 stream, bool for_session, bool wait, LOCKTAG *tag);
void ReleaseOrderingLock(const LOCKTAG &tag);

/* ---- what may wait at the most; streams that need a resync ---- */

/* The stream's slot of shared memory, taken now if no scout has done so; -1: all are taken. */
int TakeSlot(const catalog::StreamRow &row);

/* The same, but who is about to leave a slot is waited for, some seconds.  Interruptible. */
int AwaitSlot(const catalog::StreamRow &row);
int RequireSlot(const catalog::StreamRow &row); /* the same; raises when all are taken */

/* Nothing up to this ticket is to be delivered; shmem::kNeedsResync: nothing at all. */
uint64 DiscardedUpTo(int32 stream);

/*
 * Whether nothing is queued for the stream.  A true answer is certain, and for
 * whoever holds a lock on a replicated table it stays true until he lets go.
 */
bool NeedsResync(int32 stream);

/* A change of the same was committed; no error possible. */
void SetDiscarded(shmem::Stream &stream, uint64 discarded);

/* Add what the tables held before the slot was taken to its counters, once. */
void CountOldBacklog(shmem::Stream &stream);

/* The transaction is the copy that resync() made: the limit is not for it. */
void NoteCopy(shmem::Stream &stream, uint64 ticket, uint64 bytes);

/* Whether with so many bytes more the stream's queue should be given up; may warn in the log. */
bool ExceedsLimit(int32 stream, uint64 bytes);

/* The warning of its size may come again, if less waits now. */
void ForgetWarning(shmem::Stream &stream);

/*
 * Note, in the current transaction, that the stream needs a resync; false when
 * somebody else has its row (and `wait` is false), or it is gone.
 */
bool GiveUp(int32 stream, const char *server, bool wait);

/* ---- upkeep, in a transaction of its own ---- */

/*
 * Take the next queue table when the active one is large; empty those all have
 * passed.  True when something large, or not active, is left.
 */
bool Rotate();

/* ---- for people ---- */

/* Knows what the SQL of a relation's changes needs; begins as {} in each segment. */
struct SqlWriter
{
	const change::Relation *relation;
	change::SqlShape shape;
};

/* Append the change as change::AppendSql() does. */
void AppendSql(StringInfo sql, SqlWriter *writer, const change::Change *change);

/* SQL: mmrepl.queued_changes(). */
Datum SqlQueuedChanges(FunctionCallInfo fcinfo);

} // namespace mmrepl::queue
