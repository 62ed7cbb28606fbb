/*
 * guc.hpp
 *		All settings of the extension (prefix mmrepl.).
 */
#pragma once

#include "mmrepl/pg.hpp"

namespace mmrepl::guc
{

/* mmrepl.mode: which mode the transaction's captures use. */
enum class Mode : int
{
	Pair, /* what the pair says */
	Async,
	Sync
};

/* mmrepl.two_phase: how a sync transaction ends at its peer. */
enum class TwoPhase : int
{
	Off,  /* last agent: the peer commits right after the local commit */
	Auto, /* prepared at the peer before the local commit where the peer allows it */
	On	  /* the same, and an error where the peer does not */
};

/* mmrepl.max_queue_action: what happens when a queue exceeds mmrepl.max_queue_size. */
enum class QueueAction : int
{
	Resync, /* nothing more is queued until mmrepl.resync() */
	Warn
};

/* mmrepl.sync_flush: when inline changes travel. */
enum class Flush : int
{
	Statement,
	Commit
};

/* mmrepl.sync_commit: what COMMIT waits for at the peers of sync pairs. */
enum class SyncCommit : int
{
	Flushed,
	Applied /* committed there; the peer flushes it soon, or the worker brings it again */
};

/* mmrepl.async_commit: what COMMIT waits for at the peers of async pairs. */
enum class AsyncCommit : int
{
	Queued, /* nothing: they are in the local queue */
	Applied,
	Flushed
};

extern int max_servers;			 /* streams that shared memory has room for */
extern int max_peer_connections; /* of sessions, to a peer; 0: any number */
extern int ring_size;			 /* kB of shared memory for each stream's ring */
extern int batch_size;			 /* kB of changes in one batch */
extern int batch_transactions;	 /* source transactions in one batch */
extern int batch_delay;			 /* us between batches under load */
constexpr int kMaxLanes = 8;
extern int lanes;			  /* connections over which a backlog is delivered */
extern int retry_min_delay;	  /* ms */
extern int retry_max_delay;	  /* ms */
extern int connect_timeout;	  /* ms */
extern int reply_timeout;	  /* ms of silence after which a peer is asked what it does; 0: never */
extern int sync_timeout;	  /* ms: bound of every wait for a peer in a user's transaction */
extern int sync_lock_timeout; /* ms: lock wait at the peer; 0: twice deadlock_timeout */
extern int buffer_memory;	  /* kB a transaction may hold before it spills to the queue */
extern int max_queue_size;	  /* kB that may wait for one server; 0: any number */
extern int recovery_interval; /* ms: between looks for prepared transactions of ours at a peer */
extern int rotate_size;		  /* kB of a queue table at which the next one is taken */
extern QueueAction max_queue_action;
extern TwoPhase two_phase;
extern Flush sync_flush;
extern SyncCommit sync_commit;
extern AsyncCommit async_commit;
extern Mode mode;
extern bool capture;	 /* off: triggers capture nothing (superuser) */
extern bool early_apply; /* what commits alone is executed at the peer meanwhile */
extern bool log_conflicts;

/* Define the settings; called from _PG_init. */
void Init();

} // namespace mmrepl::guc
