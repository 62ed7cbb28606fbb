/*
 * transaction.hpp
 *		What the current transaction has captured, and its way through commit.
 *
 * The only room that registers (sub)transaction callbacks.  Memory is
 * TopTransactionContext's; all of it is forgotten at the end of the transaction.
 */
#pragma once

#include "mmrepl/change.hpp"
#include "mmrepl/pg.hpp"
#include "mmrepl/stats.hpp"

namespace mmrepl::transaction
{

/* Install callbacks and hooks; called from _PG_init. */
void Init();

/* Which stream a capture goes to, and how. */
struct Route
{
	int32 stream;
	Oid server;
	Oid owner;
	const char *server_name; /* lives as long as the capture cache's entry */
	bool sync;
	bool queue_when_unreachable;
};

struct Work; /* one stream's part of the current transaction */

/*
 * The stream's part of this transaction, begun if need be; NULL when nothing is to
 * be captured, because the stream needs a resync.  Raises ERRCODE_MMREPL_NEEDS_RESYNC
 * when it does and the change is synchronous, or ERRCODE_MMREPL_CAPTURED_TOO_LATE when the transaction's changes have already
 * been given their place in the queue (another extension writes while it commits).
 */
Work *Use(const Route &route);

/* Whether what is captured now is executed at the peer inside this transaction. */
bool IsSync(const Work *work);

/*
 * A segment of the work with room for one more record, belonging to the
 * current subtransaction as far as undoing is concerned.
 */
change::Segment *SegmentFor(Work *work);

/* A record was appended: account for it, and spill what has grown too large. */
void Appended(Work *work, change::Segment *segment);

/* Count for a pair's statistics, added to the shared counters at commit, or when prepared; not what a savepoint undoes. */
void CountCapture(int32 pair_id, change::Kind kind);

/* Wake the launcher (new or changed streams) / this database's workers after a commit. */
void WakeLauncherAtCommit();
void WakeWorkersAtCommit();

/*
 * The current transaction changes whether the stream, which has this slot of shared
 * memory, needs a resync: shared memory follows its row at commit.  With `copying`
 * the transaction's own changes are queued all the same, without a limit; raises
 * when it has changed a replicated table of the stream before.
 */
void FollowResyncAtCommit(int32 stream, int slot, bool copying);

/* Remember to wake a stream's worker when this transaction ends in any way (ordering lock). */
void WakeStreamAtEnd(int stream_slot);

/*
 * If this transaction commits, the stream's worker is to try at once what it would
 * try later, and with `recover` to look for prepared transactions of ours.
 */
void RetryAtCommit(int stream_slot, bool recover);

} // namespace mmrepl::transaction
