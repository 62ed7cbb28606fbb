/*
 * registration_internal.hpp
 *		What the files of the room registration share.
 */
#pragma once

#include "mmrepl/catalog.hpp"
#include "mmrepl/error.hpp"
#include "mmrepl/pg.hpp"
#include "mmrepl/registration.hpp"

namespace mmrepl::registration
{

/* ---- pair_rows.cpp: the table mmrepl.pair ---- */

/* A row as it stands in the table, whether or not the pair is enabled. */
struct PairRow
{
	ItemPointerData tid;
	int32 id;
	Oid table;
	const char *server;
	Oid owner;
	const char *remote_schema;
	const char *remote_table;
	const char *mode;
	List *columns;			/* of char *; NIL: all */
	List *map_local;		/* of char *: column_map, local ... */
	List *map_remote;		/* ... and remote names */
	const char *row_filter; /* NULL: every row */
	const char *conflict_resolution;
	const char *on_unreachable;
	bool enabled;
};

bool FindPairRow(Oid table, const char *server, PairRow *row);
List *PairRowsOfTable(Oid table); /* of PairRow * */
List *AllPairRows();
/* Whether a pair of the table, or of a partitioned table above it, is registered. */
bool IsInPairs(Oid table);

/* Write, invalidate what caches know of the table, and make it visible to this command. */
void InsertPairRow(PairRow *row);
void UpdatePairRow(PairRow *row);
void DeletePairRow(const PairRow *row);

/* column_map as two lists of names; raises when it is no object of strings. */
void ReadColumnMap(Jsonb *map, List **local, List **remote);

/* The place of a name in a list of char *, or -1. */
int FindName(const List *names, const char *name);

/* ---- local_checks.cpp: what must be true here ---- */

/* The index that identifies rows. */
struct Key
{
	Oid index;
	int n;
	AttrNumber attnums[INDEX_MAX_KEYS];
};

/* A column that a pair replicates. */
struct PairColumn
{
	AttrNumber attnum;
	const char *local;
	const char *remote;
	bool key;
};

struct PairColumns
{
	int n;
	PairColumn *items;
};

/* "schema.table", quoted where need be. */
char *QualifiedName(Relation rel);
char *QualifiedName(const char *schema, const char *table);
/* The command that drops the pair, for hints. */
char *DropCommand(const PairRow &row);

/* Raise unless it is a table whose changes can be replicated. */
void RequireReplicable(Relation rel);
/* Raise unless the current role owns it. */
void RequireTableOwner(Relation rel);
/* The server's OID; raises when there is none or the role may not use it. */
Oid RequireServer(const char *name, Oid role);
/* Raises when the role that owns the pair was dropped. */
void RequirePairOwner(const PairRow &row);
/* Raises when the table has no usable key. */
Key RequireKey(Relation rel);
/* The columns to replicate; raises when the lists of the row do not fit the table. */
PairColumns ResolveColumns(Relation rel, const Key &key, const PairRow &row);
/* All of it for a pair that exists; the error's context names the pair. */
void RevalidatePair(Relation rel, const PairRow &row);
void RevalidateFilter(Relation rel, const PairRow &row); /* that part of it */

/* ---- resync.cpp ---- */

/* Raise when nothing is queued for the stream, as a copy of a table would have to be. */
void RequireNoResync(Oid server, Oid owner, const char *name);

/* ---- peer_check.cpp: what must be true at the peer ---- */

struct PeerQuestion
{
	Oid server;
	Oid owner;
	int32 stream;
	Relation rel;
	PairColumns columns;
	const char *remote_schema;
	const char *remote_table;
};

/*
 * Raise unless the peer has the extension and a table that can take the
 * changes.  A peer that cannot be reached is a WARNING.
 */
void CheckPeer(const PeerQuestion &question);

/* ---- pair_triggers.cpp ---- */

/*
 * Triggers of an event fire in the order of their names.  Ours comes first, before
 * those of foreign keys too: a trigger before it that changes the row again would
 * have its newer version captured before the older one.
 */
constexpr const char *kRowTrigger = "!mmrepl_capture";
constexpr const char *kTruncateTrigger = "!mmrepl_truncate";

/* The triggers without arguments, which serve the table's pairs; InvalidOid: there is none. */
struct PairTriggers
{
	Oid row;
	Oid truncate;
	int count;
};

/* mmrepl.replicate(); InvalidOid when it is gone. */
Oid ReplicateFunction();
PairTriggers FindPairTriggers(Relation rel);
/* Create what is missing of them, firing always. */
void EnsurePairTriggers(Relation rel);
void DropPairTriggers(Relation rel);
/* After DETACH PARTITION took the clones: pairs of the table, and below it, get triggers of their own. */
void RestorePairTriggers(Relation rel);
/* Triggers of ours that fire as `origin` fire always: no replica role escapes capture. */
void KeepFiringAlways(Relation rel);
/* Warn of triggers of ours that are disabled. */
void WarnOfDisabled(Relation rel);
/* Warn of row triggers that fire before that of the table's pairs. */
void WarnOfEarlier(Relation rel);

/* ---- ddl_events.cpp ---- */

/* After something was dropped: raise when that took the key of a pair's table, or a column that a pair names. */
void RevalidateAfterDrop();

/* ---- filter_events.cpp: raise when DDL took what the row filter of a pair needs ---- */

void RequireFiltersNaming(const List *name);
void RequireFiltersInside(const char *name);
void RequireFiltersAfterRename(const RenameStmt *statement);
void RequireFiltersAfterMove(const AlterObjectSchemaStmt *statement);
/* Only in the event trigger for sql_drop. */
void RequireFiltersAfterDrop();

/* ---- owner_events.cpp ---- */

void OnDropOwned(const DropOwnedStmt *statement);
void OnDropUserMapping(const DropUserMappingStmt *statement);
void NoticePairsOfOthers(Relation rel);

/* ---- hand_triggers.cpp ---- */

/*
 * A trigger of ours was made by CREATE TRIGGER: raise unless its changes can be
 * replicated, make its stream, and tie it to its server.
 */
void RegisterHandTrigger(Relation rel, const Trigger *trigger);
/* Raises when such a trigger sends the changes to where the pair would. */
void RequireNoHandTrigger(Relation rel, const PairRow &row);
/* After DDL on the table: raise when a trigger with arguments can no longer work. */
void RevalidateHandTriggers(Relation rel);

/* Raise unless the value is one of the list. */
void RequireOneOf(const char *option, const char *value, const char *const *allowed, int n_allowed);

/* ---- shared by functions and event triggers (pair_functions.cpp) ---- */

/* Delete the row, and the table's triggers when it was the last; wakes whom it concerns. */
void RemovePair(const PairRow &row);
/* Wake the launcher / the workers at commit, when there are any. */
void WakeLauncher();
void WakeWorkers();
/* Committed transactions that wait for the stream, as shared memory knows. */
uint64 QueuedTransactions(int32 stream);

} // namespace mmrepl::registration
