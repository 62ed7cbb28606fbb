/*
 * sync_end.cpp
 *		The ends of subtransactions and of the transaction, from their callbacks.
 *
 * Nothing here raises, and nothing allocates: an error in a COMMIT callback
 * would be a PANIC.
 */
#include "sync_internal.hpp"

#include "mmrepl/fault.hpp"
#include "mmrepl/guc.hpp"

namespace mmrepl::sync
{

namespace
{

constexpr int kMaxQuietTimeout = 5000; /* ms */
constexpr int kRollbackTimeout = 400;  /* ms: ending the session does it as well */

/* The nest level that the peer is at when savepoints that are to be released do not count. */
int
EffectiveLevel(const Work *work)
{
	return work->release_level > 0 ? work->release_level - 1 : work->remote_level;
}

/* Whether the work's connection is open, and not a successor at the same address. */
bool
IsHeld(const Work *work)
{
	const connection::Notes *notes = work->conn == NULL ? NULL : connection::NotesOf(work->conn);

	return notes != NULL && notes->serial == work->serial;
}

} // namespace

/* Bound of a command that runs in a callback, in milliseconds. */
int
QuietTimeout()
{
	return Min(guc::sync_timeout, kMaxQuietTimeout);
}

/* What was posted is counted when its answer comes. */
uint32
Kept(const Work *work)
{
	return work->posted != NULL ? work->posted->kept : work->parts;
}

/* Whether the connection is the one on which the remote transaction was begun, and alive. */
bool
Usable(const Work *work)
{
	return IsHeld(work) && PQstatus(work->conn) == CONNECTION_OK;
}

/* Forget the connection and what was sent over it; the cached connection stays open. */
void
Reset(Work *work)
{
	work->conn = NULL;
	work->begun = false;
	work->refusal = NULL;
	work->remote_level = 1;
	work->release_level = 0;
	work->parts = 0;
	work->may_defer = false;
	work->posted = NULL;
	work->serial = 0;
	work->phase = Phase::Open;
	work->end_until = 0;
	work->relaxed = false;
}

/*
 * Close the connection and remember what is lost: a broken work counts as begun,
 * so that nobody commits without asking it.
 */
void
Drop(Work *work, uint32 kept)
{
	if (IsHeld(work))
		connection::DropCached(work->server, work->owner);
	Reset(work);
	if (kept > 0)
		work->broken = work->begun = true;
}

/*
 * The same, and the session there is to be ended: it may never hear that we are
 * gone.  That is tried by EndAbandoned(), for all at the same time.
 */
void
Abandon(Work *work, uint32 kept)
{
	if (IsHeld(work))
		connection::DoomCached(work->server, work->owner, false);
	Drop(work, kept);
}

void
EndAbandoned()
{
	connection::EndDoomed();
}

/*
 * A subtransaction of that level has become part of its parent.  Its savepoint
 * is released with the next thing that is sent: COMMIT releases them all.
 */
void
SubCommit(Work *work, int nest_level)
{
	if (work->begun && EffectiveLevel(work) >= nest_level)
		work->release_level = nest_level;
}

/*
 * A subtransaction of that level is undone: so is what it did at the peer, which
 * also repairs a remote transaction that failed in it.
 */
void
SubAbort(Work *work, int nest_level)
{
	char sql[96];

	if (!work->begun || work->broken || EffectiveLevel(work) < nest_level)
		return;
	snprintf(sql, sizeof(sql), "ROLLBACK TO SAVEPOINT s%d; RELEASE SAVEPOINT s%d", nest_level,
			 nest_level);
	MMREPL_CRASH_POINT("sync-savepoint-undoing");
	if (Usable(work) && connection::SendQuietly(work->conn, sql) &&
		connection::FinishQuietly(work->conn, sql, connection::QuietDeadline(QuietTimeout())))
	{
		work->remote_level = nest_level - 1;
		work->release_level = 0;
		work->refusal = NULL;
	}
	else
		Abandon(work, work->parts);
}

/* Whether the peer is asked for the work's end at all: its session stands as it should. */
static bool
CanEnd(const Work *work)
{
	PGTransactionStatusType expected =
		work->phase == Phase::Prepared ? PQTRANS_IDLE : PQTRANS_INTRANS;

	return work->begun && !work->broken && Usable(work) &&
		   PQtransactionStatus(work->conn) == expected;
}

/* What commits the work at the peer. */
static void
CommandToCommit(const Work *work, char *sql, size_t size)
{
	if (work->phase == Phase::Prepared)
		snprintf(sql, size, "COMMIT PREPARED '%s'", work->gid);
	else
		strlcpy(sql, "COMMIT", size);
}

/* Tell the peer to commit. */
void
BeginCommit(Work *work)
{
	char sql[kGidLength + 32];

	if (!CanEnd(work))
		return;
	CommandToCommit(work, sql, sizeof(sql));
	if (connection::SendQuietly(work->conn, sql))
		work->end_until = connection::QuietDeadline(QuietTimeout());
}

/*
 * Wait for the peer's answer to BeginCommit(); true when it was confirmed.  A
 * cancel ends the wait, not the commit.
 * Anything else leaves it in doubt, and the worker completes it.  A slow COMMIT
 * is not disturbed: it may be waiting for a standby of the peer, which it would
 * then not do any more.  But a session that never got it would keep its locks,
 * and the worker waiting.
 */
bool
Commit(Work *work)
{
	char sql[kGidLength + 32];

	CommandToCommit(work, sql, sizeof(sql));
	if (work->phase == Phase::Prepared)
		MMREPL_CRASH_POINT("two-phase-committing");
	if (work->end_until == 0 || !connection::FinishQuietly(work->conn, sql, work->end_until))
	{
		work->cancelled = QueryCancelPending || ProcDiePending;
		if (IsHeld(work))
			connection::DoomCached(work->server, work->owner, true);
		Drop(work, work->parts);
		return false;
	}
	Reset(work);
	return true;
}

/* What rolls the work back at the peer; the buffer has kGidLength + 32 bytes. */
static void
CommandToRollBack(const Work *work, char *sql, size_t size)
{
	if (work->phase == Phase::Prepared)
		snprintf(sql, size, "ROLLBACK PREPARED '%s'", work->gid);
	else
		strlcpy(sql, "ROLLBACK", size);
}

/* Send the command; false when the session cannot take it. */
static bool
SendRollback(Work *work)
{
	char sql[kGidLength + 32];

	CommandToRollBack(work, sql, sizeof(sql));
	if (work->phase == Phase::Prepared)
		return CanEnd(work) && connection::SendQuietly(work->conn, sql);
	if (work->phase == Phase::Preparing || !Usable(work))
		return false;
	if (work->posted != NULL)
		return work->posted->outcome == Outcome::Done && connection::AppendQuietly(work->conn, sql);
	return work->begun && PQpipelineStatus(work->conn) == PQ_PIPELINE_OFF &&
		   connection::SendQuietly(work->conn, sql);
}

void
BeginAbort(Work *work)
{
	if (SendRollback(work))
		work->end_until = connection::QuietDeadline(kRollbackTimeout);
}

/* Wait for the end of what BeginAbort() has sent; whether it was confirmed. */
static bool
AwaitRollback(Work *work)
{
	char sql[kGidLength + 32];

	if (work->end_until == 0)
		return false;
	if (work->posted != NULL)
		return connection::DrainQuietly(work->conn, work->posted->pipeline.syncs + 1,
										work->end_until) &&
			   PQtransactionStatus(work->conn) == PQTRANS_IDLE;
	CommandToRollBack(work, sql, sizeof(sql));
	return connection::FinishQuietly(work->conn, sql, work->end_until);
}

/* ROLLBACK at the peer, or give the connection up; false when something prepared may be left. */
bool
Abort(Work *work)
{
	bool prepared = work->phase != Phase::Open;

	if (prepared)
		MMREPL_CRASH_POINT("two-phase-rolling-back");
	else if (work->conn != NULL)
		MMREPL_CRASH_POINT("sync-rolling-back");
	if (work->end_until == 0)
		BeginAbort(work);

	bool done = AwaitRollback(work);

	if (!done && prepared)
		Drop(work, 0);
	else if (!done)
		Abandon(work, 0);
	Reset(work);
	return done || !prepared;
}

} // namespace mmrepl::sync
