/*
 * lock_wait.cpp
 *		Lock waits here of a transaction that holds locks at a peer.
 *
 * A wait here for somebody who waits there is seen by neither node's deadlock
 * detector.  So local lock waits get the bound that remote ones have, and the
 * transaction that reaches it is told what it is to its user: a deadlock, to be
 * retried.
 */
#include "transaction_internal.hpp"

#include "mmrepl/base.hpp"

namespace mmrepl::transaction
{

static ExecutorRun_hook_type previous_executor_run;

/* Set the bound (ms), unless a lower one is set. */
static void
Bound(int bound)
{
	char value[16];

	if ((LockTimeout > 0 && LockTimeout <= bound) || !IsTransactionState() || IsInParallelMode())
		return;
	snprintf(value, sizeof(value), "%d", bound);
	(void) set_config_option("lock_timeout", value, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_LOCAL,
							 true, 0, false);
	current.lock_bound = bound;
}

void
BoundLocalWaits(const Work *work)
{
	const connection::Notes *notes = connection::NotesOf(work->inlined->conn);

	if (notes != NULL && notes->lock_timeout > 0)
		Bound(notes->lock_timeout);
}

/* Whether the error says that our bound was reached; NOWAIT has the same SQLSTATE. */
static bool
IsBoundReached(const ErrorData *error)
{
	return error->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE && LockTimeout == current.lock_bound &&
		   error->message_id != NULL &&
		   strcmp(error->message_id, "canceling statement due to lock timeout") == 0;
}

/*
 * Run body, which may wait for locks; the end of a wait that was too long is a 40P01.
 * The bound is set anew where a savepoint has taken it back: what was sent before it,
 * with what came after it, holds its locks at the peer all the same.
 */
template <typename Body>
static void
WaitingBounded(Body body)
{
	if (current.lock_bound == 0)
	{
		body();
		return;
	}
	Bound(current.lock_bound);
	ErrorData *error = Caught(body);

	if (error == NULL)
		return;
	if (IsBoundReached(error))
	{
		error->sqlerrcode = ERRCODE_T_R_DEADLOCK_DETECTED;
		error->message = pstrdup("deadlock or lock wait across nodes");
		error->detail = psprintf(
			"A lock was waited for longer than %d ms here, while locks are held at a peer.",
			current.lock_bound);
		error->hint = pstrdup("Retry the transaction.");
	}
	ReThrowError(error);
}

#if PG_VERSION_NUM >= 180000
static void
OnExecutorRun(QueryDesc *query, ScanDirection direction, uint64 count)
{
	WaitingBounded([&] {
		(previous_executor_run != NULL ? previous_executor_run
									   : standard_ExecutorRun)(query, direction, count);
	});
}
#else
static void
OnExecutorRun(QueryDesc *query, ScanDirection direction, uint64 count, bool execute_once)
{
	WaitingBounded([&] {
		(previous_executor_run != NULL
			 ? previous_executor_run
			 : standard_ExecutorRun)(query, direction, count, execute_once);
	});
}
#endif

void
RunUtilityBounded(ProcessUtility_hook_type previous, const UtilityCall &call)
{
	WaitingBounded([&] { RunUtility(previous, call); });
}

void
InitLockWaits()
{
	previous_executor_run = ExecutorRun_hook;
	ExecutorRun_hook = OnExecutorRun;
}

} // namespace mmrepl::transaction
