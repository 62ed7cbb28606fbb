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
constexpr int kRollbackTimeout = 500;  /* ms: ending the session does it as well */

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
	work->remote_level = 1;
	work->release_level = 0;
	work->parts = 0;
	work->may_defer = false;
	work->posted = NULL;
	work->serial = 0;
	work->phase = Phase::Open;
	work->commit_until = 0;
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

/* The same, after trying to end the session there: it may never hear that we are gone. */
void
Abandon(Work *work, uint32 kept)
{
	if (IsHeld(work))
		connection::EndSession(work->conn, false);
	Drop(work, kept);
}

/* Roll the remote transaction back, by closing the connection if need be. */
void
RollBack(Work *work)
{
	if (work->begun && Usable(work) &&
		connection::ExecQuietly(work->conn, "ROLLBACK", kRollbackTimeout))
		Reset(work);
	else
		Abandon(work, 0);
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
		work->commit_until = connection::QuietDeadline(QuietTimeout());
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
	if (work->commit_until == 0 || !connection::FinishQuietly(work->conn, sql, work->commit_until))
	{
		work->cancelled = QueryCancelPending || ProcDiePending;
		if (IsHeld(work))
			connection::EndSession(work->conn, true);
		Drop(work, work->parts);
		return false;
	}
	Reset(work);
	return true;
}

/* Roll a prepared transaction back; false when it may be there still, or come yet. */
static bool
RollBackPrepared(Work *work)
{
	char sql[kGidLength + 32];
	bool done;

	snprintf(sql, sizeof(sql), "ROLLBACK PREPARED '%s'", work->gid);
	MMREPL_CRASH_POINT("two-phase-rolling-back");
	done = work->phase == Phase::Prepared && CanEnd(work) &&
		   connection::ExecQuietly(work->conn, sql, kRollbackTimeout);
	if (!done)
		Drop(work, 0);
	Reset(work);
	return done;
}

/* ROLLBACK at the peer, or close the connection; false when something prepared may be left. */
bool
Abort(Work *work)
{
	if (work->phase != Phase::Open)
		return RollBackPrepared(work);
	if (work->conn != NULL)
	{
		MMREPL_CRASH_POINT("sync-rolling-back");
		RollBack(work);
	}
	Reset(work);
	return true;
}

} // namespace mmrepl::sync
