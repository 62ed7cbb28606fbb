/*
 * catalog.hpp
 *		The extension's own tables: pairs, streams, node; every read of them
 *		and the identity of this database as a node.
 *
 * A stream is what is delivered in order: (foreign server, role whose user
 * mapping is used).  Its row in mmrepl.stream is made when its first pair is.
 */
#pragma once

#include "mmrepl/pg.hpp"

namespace mmrepl::catalog
{

enum class Mode : char
{
	Async = 'a',
	Sync = 's'
};

/* A row of mmrepl.pair, resolved; strings palloc'd in the caller's context. */
struct Pair
{
	int32 id; /* 0: a trigger made by hand */
	Oid local_table;
	Oid server;
	char *server_name;
	Oid owner;
	char *remote_schema;
	char *remote_table;
	Mode mode;
	bool queue_when_unreachable; /* on_unreachable = 'queue' */
	char conflict;				 /* change::Conflict */
	bool enabled;
	List *columns;	  /* of char *, local names; NIL: all */
	List *map_local;  /* of char *: column_map, local ... */
	List *map_remote; /* ... and remote names */
	char *row_filter; /* NULL: every row */
};

/* A row of mmrepl.stream. */
struct StreamRow
{
	int32 id;
	Oid server;
	Oid owner;
	bool paused;
	uint64 confirmed;	  /* as last written; the peer knows better */
	uint64 acked;		  /* watermark that the peer has reported at least */
	NameData server_name; /* as last seen; outlives the server */
	uint64 discarded;	  /* what was queued up to here is not delivered any more */
	bool needs_resync;	  /* nothing is queued, nor delivered */

	/* The same as one number: nothing up to this ticket is to be delivered. */
	uint64 DiscardedUpTo() const { return needs_resync ? PG_UINT64_MAX : discarded; }
};

/* OIDs of the extension's relations; cached, invalidated with the relcache. */
struct Relations
{
	Oid schema;
	Oid pair, pair_by_table;
	Oid stream, stream_by_id, stream_by_key, stream_ids;
	Oid node;
	Oid progress, progress_key;
	Oid marker, marker_key;
	Oid skipped;
	Oid queue[3];
};

/* Register invalidation callbacks; called from _PG_init. */
void Init();

/* Whether the extension exists in this database (current transaction's view). */
bool ExtensionExists();

/* Raises when the extension does not exist in this database. */
const Relations &GetRelations();

/*
 * Changes whenever anything the capture cache is built from may have changed
 * for all tables: a foreign server, a user mapping, the extension.  (A single
 * table's changes arrive as its relcache invalidation.)
 */
uint64 Generation();

/* Enabled pairs of a table, ordered by pair id. */
List *PairsOf(Oid table);

/* The pair of that id, whether it is enabled or not and its server exists or not; or NULL. */
Pair *FindPair(int32 id);

/* All pairs of a stream (for validation and statistics). */
List *PairsOfServer(Oid server);

/* The stream's row; false when there is none (or it is not visible yet). */
bool FindStreamRow(Oid server, Oid owner, StreamRow *row);
bool ReadStreamRow(int32 id, StreamRow *row);
List *AllStreams(); /* of StreamRow * */

/* Those to a server that the current user may steer: it has their owner's privileges. */
List *StreamsToSteer(Oid server, bool *others); /* *others: there are some that it may not */

/*
 * The stream's id, with its row inserted in the current transaction if there
 * was none.  Concurrent callers wait for each other's commit.  A row whose
 * server is gone is taken over when the server was made again under its name.
 */
int32 EnsureStreamRow(Oid server, Oid owner);

/*
 * Whether the stream's row was made by the current transaction: then nobody else
 * knows the stream, and nothing can be queued for it.  May say false if very many
 * streams were made.
 */
bool MadeHere(int32 id);

/*
 * Write the stream's positions into its row; false when the row is gone.  They
 * are advisory: left for the next time (and true is returned) while another
 * transaction holds the row.
 */
bool SavePosition(int32 id, uint64 confirmed, uint64 acked);

/* Pause or resume durably / forget what the peer has reported; false when the row is gone. */
bool SetPaused(int32 id, bool paused);
bool ForgetAcked(int32 id);

/*
 * The lock of a stream's row, until the transaction ends: nobody else changes the
 * row meanwhile.  False, without `wait`, when somebody has it.
 */
bool LockStreamRow(int32 id, bool wait);

/*
 * Note that the stream needs a resync, and why / that what is queued up to the
 * ticket is replaced by a copy of the tables, which also does for what the peer
 * may have lost.  The row's lock is held; false when the row is gone.
 */
bool SetNeedsResync(int32 id, const char *reason);
bool SetResynced(int32 id, uint64 discarded);

/* Remove the stream's row (nothing of it is queued any more); false when it was gone. */
bool DeleteStreamRow(int32 id);

/* Whether skip() has dropped the transaction's part for the stream. */
bool WasSkipped(int32 stream, uint64 xid);

/* Note the new name of a renamed server in the rows of its streams. */
void RenameStreams(Oid server, const char *name);

/* This database's node id (16 bytes). */
pg_uuid_t NodeId();

/*
 * Whether mmrepl.node was made by this very database; false in a copy made by
 * CREATE DATABASE ... TEMPLATE, which must not deliver the original's queue.
 */
bool NodeIsOurs();

/* Whether the database has an identity: a restored dump has none. */
bool HasNode();

/*
 * Make the identity this database's own: the same one if it has moved here, else a new
 * one, and nothing is queued any more.  Superusers only; raises if it is its own already,
 * unless forced.  Returns it, palloc'd.
 */
pg_uuid_t *AdoptNode(bool moved, bool force);

/* SQL: mmrepl.node_id(). */
Datum SqlNodeId(FunctionCallInfo fcinfo);

/* What a command dropped that an expression could need. */
struct Dropped
{
	List *
		names; /* of char *: of functions, operators, types, collations, schemas; ".x" of columns x */
	bool cast; /* a cast, which has no name */
};

/* Only in an event trigger for sql_drop. */
Dropped WhatWasDropped();

/* The role whose mapping a trigger made by hand uses: the table's owner. */
Oid TableOwner(Oid table);

} // namespace mmrepl::catalog
