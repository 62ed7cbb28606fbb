/*
 * worker_internal.hpp
 *		What launcher, stream worker, deal_sync_err_rec and the steering functions share.
 */
#pragma once

#include "mmrepl/catalog.hpp"
#include "mmrepl/connection.hpp"
#include "mmrepl/delivery.hpp"
#include "mmrepl/queue.hpp"
#include "mmrepl/shmem.hpp"
#include "mmrepl/stats.hpp"
#include "mmrepl/worker.hpp"

namespace mmrepl::worker
{

/*
 * What the peer has committed, and would lose in a crash: it has not flushed it, as
 * far as is known.  None of it is confirmed.  The next commit that is flushed there
 * seals it.
 */
struct Unsealed
{
	TimestampTz since;		/* 0: there is nothing of the kind */
	TimestampTz pause_ends; /* when it is sealed, unless it becomes more */
	bool first;				/* it is to be sealed before anything else is sent */
	bool sealing;			/* a batch that will do so is on its way */
	uint64 to;
	int64 transactions; /* of it, on the backlog's counters until then */
	int64 changes;
	int64 bytes;
};

/*
 * A feed turns a stream's queue into batches, in order.  It reads the ring while
 * the ring has everything after `position`, else the tables.  Only the holder of
 * the stream's ordering lock may use one.
 */
struct Feed
{
	int32 stream;
	int slot;
	shmem::Stream *shared;
	shmem::Database *database;
	pg_uuid_t node;
	MemoryContext context;
	bool tables_only; /* deal_sync_err_rec: leave the ring to the worker */

	uint64 position;	/* everything up to here is in a batch, or needs none */
	uint64 watermark;	/* of the peer once all batches made so far are applied */
	bool relaxed_there; /* the peer knows of commits that are not flushed */
	Unsealed unsealed;
	int relaxed_sent;		/* relaxed batches on their way */
	uint64 opened_at;		/* last ticket drawn when the newest of our connections stood */
	uint64 passed_unsealed; /* newest ticket passed that a session applied; 0: none */
	bool from_tables;
	uint32 late_seen;	 /* commands ended (LateWord) when the tables were last read */
	bool late_open;		 /* that reading saw late work it could not take yet */
	uint32 late_reached; /* late work up to here is in shipments, or was none */
	int late_unremoved;	 /* late heads in shipments that are not removed yet */

	queue::Ref *refs; /* of the last reading of the tables; NULL: none */
	int n_refs;
	int next_ref;
	bool refs_complete;
	uint64 refs_below;

	MemoryContext survey_context;
	queue::Survey survey; /* where the rest stands, while surveyed */
	bool surveyed;

	TimestampTz passed_at; /* when the ring last had something that was delivered already */
	uint64 inline_passed;  /* inline transactions passed since markers were swept */
	uint64 sweep_xid;	   /* candidate for sweeping markers below, 0: none */
	uint64 sweep_after;	   /* ... once everything up to this ticket is confirmed */
};

/* One remote transaction on its way: a batch, or the parts of a large one. */
struct Shipment
{
	MemoryContext context;
	delivery::Batch batch;
	int64 transactions;
	int64 changes;
	int64 bytes; /* of queue payload, for the backlog counters */
	uint64 first_ticket;
	uint64 confirm_to;	/* all up to here is confirmed when it is applied */
	uint64 last_ticket; /* newest transaction in it: for the lag */
	uint64 previous;	/* the peer's watermark before it */
	uint64 sweep_xid;
	uint32 late_to; /* the feed's late_reached when it was closed */
	List *late;		/* of queue::Ref *: heads to remove afterwards */
	bool relaxed;	/* the peer commits it without a flush */
	bool large;		/* a chunked transaction in parts */
	queue::Cursor cursor;
	uint64 large_xid;
	uint8 large_flags;
	uint64 large_changes;
	uint32 part;
	int lane;	/* the connection that it goes over */
	bool turn;	/* another one may be executed ahead of its commit */
	bool ahead; /* it is executed ahead of the one before it */
	/* Not NULL: of a transaction that has not ended here; the sync message is not sent. */
	const queue::RingEntry *held;
	bool undone;	 /* it was held, and is rolled back there */
	bool hurry;		 /* the peer's flush will be waited for */
	bool sent;		 /* at least its first part */
	bool failed;	 /* executed ahead in vain: it is sent again */
	bool all_sent;	 /* every part and, unless it is held, the sync message */
	int results_due; /* apply() results not yet received */
};

/* How much one batch may take. */
struct Budget
{
	int64 bytes;
	int64 transactions;
	int64 changes;
};

void StartFeed(Feed *feed, int32 stream, int slot, bool tables_only);
void FreeFeed(Feed *feed);

/*
 * Begin again after `confirmed` and the peer's watermark; whether what is between
 * them was flushed there is not known.  Raises
 * ERRCODE_MMREPL_REWOUND when one of the two was restored from an older state:
 * then nobody can tell from here what is missing where; and
 * ERRCODE_MMREPL_NEEDS_RESYNC when the stream was given up meanwhile.
 */
void ResetFeed(Feed *feed, const delivery::Peer &peer);

/*
 * Fill the shipment with the next batch; false when nothing is ready.  May move
 * the position over work that needs no delivery.  Runs a local transaction of
 * its own when it has to read the tables and none is open.
 */
bool NextShipment(Feed *feed, Shipment *shipment, const Budget &budget);

/*
 * The same with the transaction that commits just now, if it is the next one: it is held.
 * Nothing else may be filled until it has been kept (it is committed here) or taken back.
 */
bool EarlyShipment(Feed *feed, Shipment *shipment);
void KeepEarly(Feed *feed, Shipment *shipment);
void TakeBackEarly(Feed *feed, Shipment *shipment);

/* The next part of a large transaction is put into shipment->batch. */
void NextPart(Feed *feed, Shipment *shipment, int64 bytes);

/* Nothing on its way and nothing found: confirm what was passed; true when it did move. */
void ConfirmPassed(Feed *feed);

/* Whether a prepared transaction's rows may have appeared since the tables were read. */
bool LateWork(const Feed *feed);

/* An empty batch that only moves the watermark and sweeps markers, if it is time. */
bool SweepShipment(Feed *feed, Shipment *shipment);

/*
 * Let the peer commit the shipment, which was just filled, without a flush: it is
 * seen there, and answered, a flush earlier.  Not when the last flush was a while
 * ago, or somebody waits and this is, not being full, perhaps the last one.
 */
void Relax(Feed *feed, Shipment *shipment, bool full);

/* Whether somebody has called for a pause; ordered after the reads before it. */
bool PausedNow(const Feed *feed);

/* When a seal is due though nobody waits for it; 0: never. */
TimestampTz SealDueAt(const Feed *feed);

/*
 * A batch without changes whose commit seals what is unsealed: if that is overdue, or
 * somebody waits (a while longer if more is to be sent: that would seal it, too); with
 * nothing to be sent, if that lasts for a while, or somebody waits; or now.  False: there
 * is nothing to seal, or it can wait.
 */
bool SealShipment(Feed *feed, Shipment *shipment, bool more);
bool SealInPause(Feed *feed, Shipment *shipment);
bool SealNow(Feed *feed, Shipment *shipment);

/* The peer has it: positions, counters, late heads. */
void Applied(Feed *feed, Shipment *shipment);

void StartShipment(Shipment *shipment, MemoryContext parent);
void EndShipment(Shipment *shipment);

/* Run fn in a transaction, unless one is open (deal_sync_err_rec has its caller's). */
template <typename Fn>
void
InTransaction(Fn fn)
{
	bool own = !IsTransactionState();
	MemoryContext context = CurrentMemoryContext;

	if (own)
	{
		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
		MemoryContextSwitchTo(context);
	}
	fn();
	if (own)
	{
		CommitTransactionCommand();
		MemoryContextSwitchTo(context);
	}
}

/* recovery.cpp: prepared transactions of a stream at its peer */

/* Where to look. */
struct RecoveryPlace
{
	PGconn *conn; /* idle, not in pipeline mode */
	const char *server;
	pg_uuid_t node;
	int32 stream;
	shmem::Stream *shared;
	uint64 *warned; /* xid that the log was last told of; NULL: tell nobody */
};

/* What is left there, and why. */
struct Leftovers
{
	shmem::Leftover list[shmem::kMaxLeftovers];
	int count;
	bool allowed; /* more can come: max_prepared_transactions is not 0 there */
	bool running; /* one of them has not ended here */
};

/*
 * End what can be ended, and show the rest in the view; false with *failure
 * filled when the connection is lost.
 */
bool RecoverPrepared(const RecoveryPlace &place, Leftovers *left, connection::Failure *failure);

/* The gids of what may be prepared at peers, as far as is known here, one a line; NULL: nothing. */
char *PreparedAtPeers();

/* WARNING: nobody but the user will end them. */
void WarnOfPrepared(const char *gids);

/*
 * smart_shutdown.cpp: end peers' sessions when the server is stopping; returns
 * when to look again (0: when a peer has come).
 */
TimestampTz LetPeersGo();

/* database_hook.cpp */
void InitDatabaseHook();

/* Entry points of the processes; bgw_extra holds nothing, the argument what they serve. */
void RunLauncher();
void RunScout(Oid database);
void RunStream(int slot);

} // namespace mmrepl::worker
