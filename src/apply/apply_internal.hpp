/*
 * apply_internal.hpp
 *		What the files of the room apply share.
 *
 *	 apply.cpp			the call: header, transactions, parts, the SQL functions
 *	 apply_context.cpp	what error messages add, and the one error that is changed
 *	 apply_progress.cpp	watermark rows and markers
 *	 apply_turn.cpp		batches that are executed ahead of those before them
 *	 apply_target.cpp	a table that is written, opened once a batch
 *	 apply_keep.cpp		what is kept of it for the next batch
 *	 apply_trigger.cpp	which triggers fire, and when
 *	 apply_value.cpp	from a change's bytes to datums
 *	 apply_find.cpp		the row that a key names, locked
 *	 apply_compare.cpp	whether the row that is here is the one that was changed
 *	 apply_write.cpp	insert, update, delete
 *	 apply_conflict.cpp	what is done about a conflict
 *	 apply_undone.cpp	changes that those behind them undo
 *	 apply_collect.cpp	changes that wait to be written together
 *	 apply_bulk.cpp		runs of inserts
 *	 apply_group.cpp	runs of updates
 *	 apply_truncate.cpp	truncate
 */
#pragma once

#include "mmrepl/apply.hpp"
#include "mmrepl/batch.hpp"
#include "mmrepl/catalog.hpp"
#include "mmrepl/change.hpp"
#include "mmrepl/conflict.hpp"
#include "mmrepl/error.hpp"
#include "mmrepl/origin.hpp"
#include "mmrepl/stats.hpp"

namespace mmrepl::apply
{

/* Tickets and transaction ids are stored as bigint, with room to grow. */
constexpr uint64 kMaxNumber = UINT64CONST(1) << 62;

/* The head of a batch (batch.hpp). */
struct Header
{
	uint8 flags;
	int encoding; /* of the sender's database */
	pg_uuid_t node;
	int32 stream;
	uint64 clock;
	uint64 previous;
	uint64 last;
	uint64 sweep_xid;
	uint32 part;

	bool Inline() const { return (flags & batch::kInline) != 0; }
	bool More() const { return (flags & batch::kMore) != 0; }
	bool Ahead() const { return (flags & batch::kAhead) != 0; }
};

/* How a column's bytes become a datum of the local column. */
enum class Form : char
{
	Ignore, /* generated here */
	Bool,
	Bits32,
	Bits64,
	Uuid,
	Int16, /* trimmed */
	Int32,
	Int64,
	Bytea,
	Text,	 /* bytes are text, the local type takes any text */
	Input,	 /* bytes are text, for the local type's input function */
	Receive, /* binary of the local type */
	Convert	 /* binary of another type: over its text */
};

/* A column of the change and its local counterpart. */
struct Field
{
	AttrNumber attnum;
	Form form;
	bool domain; /* NULL has to be looked at, too */
	Oid ioparam;
	int32 typmod;
	FmgrInfo function; /* receive or input */
	change::Settings to_read;
	change::Settings to_compare;
};

/*
 * A table that holds rows: the target itself, or one of its partitions.
 * Attribute numbers and slots are in its own layout unless they say "root".
 */
struct Leaf
{
	Leaf *next;
	ResultRelInfo *info;
	const char *schema;
	bool fires;		 /* has row triggers that fire in replica role and are not ours */
	bool queues;	 /* those, or rechecks of deferrable constraints */
	bool plain;		 /* neither, nor generated columns: rows are written without the executor */
	bool may_update; /* no publication is against it; plain only */
	bool may_delete;
	AttrMap *to_leaf; /* NULL: the layouts are equal */
	AttrMap *to_root;
	TupleTableSlot *converted;	/* a root row in this layout */
	TupleTableSlot *found;		/* the existing row, locked */
	TupleTableSlot *found_root; /* ... in the root's layout */
	Relation index;				/* over exactly the key columns, unique */
	Oid index_oid;				/* while it is closed (apply_keep.cpp) */
	int n_keys;
	ScanKeyData *keys;
	AttrNumber *key_attnums; /* in the index' order */
	SnapshotData dirty;
	IndexScanDesc scan;
	MemoryContext context; /* the scan's: it allocates as it goes, and outlives the row */
};

struct Run;		/* changes that wait to be written together */
struct History; /* what a batch does to each row */

/*
 * A relation of the change set at this node, open for the rest of the batch; of
 * simple tables everything but the open relations is kept for the next one.
 */
struct Target
{
	Target *next;
	MemoryContext context; /* everything of it */
	const char *raw;	   /* the definition it was made from */
	uint32 raw_length;
	int encoding; /* of its names */
	Oid relid;
	bool simple;	/* may be kept: nothing but the relation's own entry decides about it */
	bool stale;		/* that entry has changed since (only while it is kept) */
	uint64 changes; /* RelationChanges() before the relation was opened */
	change::Settings to_read; /* of the fields together */
	change::Settings to_compare;
	TupleDesc desc;		/* of the slots */
	const char *schema; /* in this database's encoding */
	const char *table;
	Relation rel;
	Oid owner;
	bool trusted;	   /* the owner may act as the caller anyway */
	bool fires;		   /* a leaf does */
	bool rechecks_now; /* a leaf has rechecks that do not wait for the transaction's end */
	AclMode checked;   /* privileges that the caller has proved */
	change::Conflict rule;
	bool carries_old; /* the relation is checked: made in sync mode */
	bool partial;	  /* columns that did not change did not come */
	bool at_writer;	  /* opened by an inline batch, which checks more */
	EState *estate;
	EPQState epq;
	ResultRelInfo *info;
	Oid *index_oids;		   /* of info, while they are closed (apply_keep.cpp) */
	Leaf *leaves;			   /* last used first */
	ModifyTableState *mtstate; /* partitioned only */
	PartitionTupleRouting *proute;
	int n_fields;
	Field *fields; /* as the change's columns */
	int n_keys;
	AttrNumber *key_attnums; /* root layout, as the change's key columns */
	TupleTableSlot *row;	 /* the incoming row */
	TupleTableSlot *search;	 /* its key, or the old one */
	TupleTableSlot *merged;	 /* the existing row with what came in */
	int n_defaults;
	AttrNumber *default_attnums;
	ExprState **defaults;
	bool volatile_defaults;
	bool reads; /* a check may look at other rows */
	Run *run;	/* NULL: rows of this table are written one by one */
};

constexpr int kRunRows = 1000;
constexpr int kGroupRows = 64;
constexpr Size kRunBytes = 65536;

/* Changes of one kind, inserts or updates, to a table with one leaf, in their order. */
struct Run
{
	Target *next;		   /* in the list of those that have some */
	MemoryContext context; /* what writing inserts needs */
	List *key_index;	   /* reports a key that is there instead of raising; NIL: no inserts */
	change::Kind kind;
	int count;
	Size bytes;
	int capacity; /* of tickets, at, inserts and conflicts; grows to kRunRows */
	uint64 *tickets;
	const char **at; /* Session::at */
	int n_inserts;	 /* slots made so far */
	TupleTableSlot **inserts;
	bool *conflicts;
	int n_updates;
	TupleTableSlot *updates[kGroupRows];
	ItemPointerData places[kGroupRows]; /* where the index says that the row is */
};

/* Which definition of the current segment belongs to which target. */
struct Binding
{
	const change::Relation *relation;
	Target *target;
};

/* A stream's row of mmrepl.progress, locked. */
struct Progress
{
	Relation rel;
	TupleTableSlot *slot;
	uint64 watermark;
	int64 conflicts;
};

/* A transaction's head in the batch. */
struct Transaction
{
	uint64 ticket;
	uint64 xid;
	uint8 flags;
	uint32 segments;
};

/* One call of apply(). */
struct Session
{
	Header header;
	Progress progress; /* of a queued batch; while it is ahead: not yet */
	bool ahead;		   /* the batch before may still be at work: see WaitForPredecessor() */
	bool quiet_waits;  /* log_lock_waits is on, but not while ahead */
	change::Reader reader;
	uint32 begin; /* where its transactions begin */
	Oid caller;
	int caller_sec_context;
	MemoryContext context; /* lives as long as the call */
	MemoryContext segment_context;
	int guc_level;
	bool began; /* origin::Enter() was called */
	int nest_level;
	Target *targets;
	Binding bindings[change::kSegmentRelations + 1];
	int n_bindings;
	Target *collected; /* targets with changes that wait */
	List *truncated;   /* relations of TRUNCATE records that wait to be done together */
	int64 conflicts;
	History *history;		/* NULL: nobody has asked for it */
	bool may_defer;			/* something may wait for the transaction's end to be checked */
	StringInfoData scratch; /* a value's bytes, for receive functions */

	/* For messages. */
	uint64 ticket;
	uint64 xid;
	const change::Change *change;
	const char *at;		/* where the change ends in the batch: its identity in there */
	const char *schema; /* of the table being written; NULL: none yet */
	const char *table;
	const Target *updating; /* a collected update; the key is in its search slot */
	Leaf *inserting;		/* the key was looked up there and not found */
};

/* ---- apply.cpp ---- */

/* Raise ERRCODE_MMREPL_BAD_BATCH. */
pg_attribute_noreturn() void Malformed(const char *detail);

/* Fill the head of the batch's next transaction; its segments follow in the reader. */
void ReadTransaction(const Header &header, change::Reader *in, Transaction *transaction);
/* Where the change ends that the decoder has read last. */
const char *Place(const change::Decoder *decoder);

/* Make what was written visible to what follows. */
void NextCommand();

/*
 * The caller's rights become those of the role that owns the table, and back.
 * Code of an owner who is not trusted cannot leave anything behind.
 */
bool IsTrusted(const Session *session, Oid owner);
void BecomeOwner(const Session *session, Oid owner, bool trusted);
void BecomeCaller(const Session *session);

/* ---- apply_context.cpp ---- */

/* Error context callback; arg is the Session. */
void AddContext(void *arg);
/* From an error handler: raise 40001 instead of a unique violation that a race caused. */
void ExplainLostRace(const Session *session);

/* ---- apply_progress.cpp ---- */

/* Open and read the row, made when missing; Lock...: also lock it, and wait for whoever did. */
void ReadProgress(Progress *progress, const pg_uuid_t &node, int32 stream);
void LockProgress(Progress *progress, const pg_uuid_t &node, int32 stream);
void SaveProgress(Progress *progress, uint64 watermark, int64 more_conflicts);
void CloseProgress(Progress *progress);

/* False when the transaction has a marker already; waits for one that is uncommitted. */
bool InsertMarker(const pg_uuid_t &node, int32 stream, uint64 xid);
/* Whether this very transaction inserted the marker. */
bool HasOwnMarker(const pg_uuid_t &node, int32 stream, uint64 xid);
void SweepMarkers(const pg_uuid_t &node, int32 stream, uint64 below_xid);

/* ---- apply_turn.cpp ---- */

/* Let batches that follow this one wait for its end. */
void TakeTurn(const Session *session);
/*
 * The batch is executed ahead until WaitForPredecessor() or its end.  Returns when
 * the one before it has begun; raises when that one has failed or does not come.
 */
void BeginAhead(Session *session);
/*
 * To be called before anything is decided that the batches before this one could
 * change without meeting us at a row: whether a row is missing, or in conflict; a
 * marker; TRUNCATE; all of a table that is not simple.  Waits for their end and
 * locks the watermark row; true when it has done so just now, and what was seen
 * before has to be looked at again.  Raises ERRCODE_MMREPL_OUT_OF_ORDER when they
 * have failed.  Cheap when the batch is not ahead.
 */
bool WaitForPredecessor(Session *session);
/* From an error handler. */
void StopAhead(Session *session);

/* ---- apply_target.cpp ---- */

/* One of them it takes to write rows. */
constexpr AclMode kWriteRights = ACL_INSERT | ACL_UPDATE | ACL_DELETE;

/*
 * The relation of that name, locked, writable by apply() at all; raises otherwise, and
 * before it is locked if the caller holds none of these privileges.
 */
Relation OpenRelation(const Session *session, const char *schema, const char *table,
					  LOCKMODE lockmode, AclMode any);
/* Raise unless the caller holds the privilege and no row security applies to it. */
void CheckPrivilege(const Session *session, Relation rel, AclMode mode);
Target *TargetOf(Session *session, const change::Relation *relation);
void CloseTargets(Session *session);
/* Owner and rights of target->rel, which was opened just now. */
void AdoptRelation(Session *session, Target *target);
/* The leaf that holds, or would hold, the row (root layout). */
Leaf *Route(Session *session, Target *target, TupleTableSlot *row);
/* The row in the leaf's layout. */
TupleTableSlot *ToLeaf(Leaf *leaf, TupleTableSlot *row);
/* The leaf's existing row in the root's layout. */
TupleTableSlot *FoundInRoot(Leaf *leaf);

/* ---- apply_conflict.cpp ---- */

/*
 * Decide about a conflict, count it and say so; raises when the pair's rule is
 * 'error'.  `row` has the key, in the leaf's layout.
 */
conflict::Action Resolve(Session *session, Target *target, Leaf *leaf, conflict::Type type,
						 TupleTableSlot *row);

/* ---- apply_undone.cpp ---- */

/*
 * To be asked about a change of a checked relation, of the queue, that is in conflict:
 * whether it is one of a series that leaves its row (InsertExists: the one with the new
 * key, else the one with the old key) as it was.  Then neither it nor the rest of the
 * series is to be done at that row; WhatIsLeft() says so.  Reads the whole batch when it is
 * asked for the first time.
 */
bool IsUndone(Session *session, conflict::Type type);
/*
 * What is to be done of the change at session->at: the change itself, NULL if it is part
 * of such a series, or, where the key changes and only one of its rows is in one, an
 * INSERT or a DELETE of the other, which lives as long as the change.
 */
const change::Change *WhatIsLeft(Session *session, const change::Change *change);

/* ---- apply_keep.cpp ---- */

/* Decide whether the target may be kept. */
void JudgeKeeping(Target *target);
/* A kept target of the same definition, open again, or NULL. */
Target *Reopen(Session *session, const change::Relation *relation);
/* Close the relations and keep the rest, if that is allowed. */
bool MayKeep(const Target *target);
void Keep(Target *target);
/* Grows when this process learns of a change to a relation's definition. */
uint64 RelationChanges();

/* ---- apply_trigger.cpp ---- */

/* Choose the leaf's triggers; sets fires and queues. */
void TuneTriggers(Session *session, Target *target, Leaf *leaf);
bool HasFiringTriggers(Relation rel);
bool FiresAtOnce(const Session *session, const Target *target);
/* Around the changes of a batch. */
void BeginBatchTriggers(const Session *session);
void EndBatchTriggers(const Session *session);

/* ---- apply_value.cpp ---- */

/* A name or other text of the sender in this database's encoding, checked. */
char *ToServer(const Session *session, const char *bytes, uint32 length);
void InitField(Field *field, const change::Column *column, Form_pg_attribute attribute);
/* Fill target->row from the change's row: all fields, defaults for the rest. */
void ReadRow(Session *session, Target *target, const change::Change *change);
void FillDefaults(Target *target);
/* Fill target->search from the change's key, or from the key columns of target->row. */
void ReadKey(Session *session, Target *target, const change::Change *change);
void KeyOfRow(Target *target);

/* The datum of a value that is not NULL, in the current context.  Needs field->to_read. */
Datum ReadField(Session *session, Field *field, const change::Column *column,
				const change::Value *value);

/* ---- apply_find.cpp ---- */

/* The best unique index over exactly these columns, or InvalidOid. */
Oid ChooseKeyIndex(Relation rel, const AttrNumber *attnums, int count);
void InitSearch(Leaf *leaf, Oid index);
/* The search's relations and its scan, for the time of a batch; closed by CloseSearch(). */
void OpenSearch(Leaf *leaf, Oid index);
void CloseSearch(Leaf *leaf);
/* Find the row with the key of `search` (leaf layout) into leaf->found and lock it. */
bool FindRow(Leaf *leaf, TupleTableSlot *search, LockTupleMode mode);
/* The same without the lock, for WriteUpdate() and WriteDelete(). */
bool PeekRow(Leaf *leaf, TupleTableSlot *search);
/*
 * PeekRow() in two steps, for rows that are looked for together.  Locate() asks the
 * index and starts to fetch the page into the processor's caches; invalid: it knows none.
 * StopLocating() gives up its pins.  PeekRowAt() looks there first; no more than a hint,
 * since everything may have changed in between.
 */
ItemPointerData Locate(Leaf *leaf, TupleTableSlot *search);
void StopLocating(Leaf *leaf);
bool PeekRowAt(Leaf *leaf, TupleTableSlot *search, const ItemPointerData &place);
/* Lock what PeekRow() found; false when it has changed since. */
bool LockPeeked(Leaf *leaf, LockTupleMode mode);
/* "(id)=(5)", or NULL when it may not be shown. */
char *DescribeKey(Leaf *leaf, TupleTableSlot *row);

/* ---- apply_compare.cpp ---- */

/*
 * Whether the row in leaf->found is the one that an update or delete changed at the
 * sender, as far as its columns travel; always true when the old row did not come.
 * An update's new row must have been read into target->row, its old key into target->search.
 */
bool IsExpectedRow(Session *session, Target *target, Leaf *leaf, const change::Change *change);
/* Both rows, for a message; leaf NULL: there is none here.  NULL: not to be shown. */
char *DescribeRows(Session *session, Target *target, Leaf *leaf);

/* ---- apply_write.cpp ---- */

void ApplyRowChange(Session *session, const change::Change *change);
/* Raise when the table's own checks refuse the row (leaf layout). */
void CheckRow(Target *target, Leaf *leaf, TupleTableSlot *row);
/* Insert target->row, in the leaf's layout `row`; a row with its key may be there. */
void PlaceRow(Session *session, Target *target, Leaf *leaf, TupleTableSlot *row);

/* Update the row of that key; `place` is a hint, see PeekRowAt(). */
void WriteCollectedUpdate(Session *session, Target *target, TupleTableSlot *row,
						  const ItemPointerData &place);

/* ---- apply_collect.cpp ---- */

/* Decide whether changes to the target's only leaf are collected. */
void InitRun(Target *target, Leaf *leaf);
bool CollectsInserts(const Target *target);
bool CollectsUpdates(const Target *target);
/* Write target->row later, together with others. */
void CollectInsert(Session *session, Target *target);
void CollectUpdate(Session *session, Target *target);
/* Write what was collected for a target, for all, or what must precede a change. */
void FlushCollected(Session *session, Target *target);
void FlushAllCollected(Session *session);
void FlushBefore(Session *session, Target *target, const change::Change *change, bool observed);

/* ---- apply_bulk.cpp, apply_group.cpp ---- */

/* Write target->run; in the memory of the run, with the owner's rights. */
void WriteInserts(Session *session, Target *target);
void WriteUpdates(Session *session, Target *target);
/* Let `to` have the values of `from`; memory is shared. */
void ShareRow(TupleTableSlot *to, TupleTableSlot *from);

/* ---- apply_truncate.cpp ---- */

/* Remember a TRUNCATE; done by FlushTruncates() together with its neighbours. */
void AddTruncate(Session *session, const change::Relation *relation);
void FlushTruncates(Session *session);

} // namespace mmrepl::apply
