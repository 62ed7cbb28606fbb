/*
 * commit.cpp
 *		The only (sub)transaction callbacks and statement hooks of the extension.
 *
 * Commit sequence of a transaction that captured something:
 *	 PRE_COMMIT	1. what sync statements left behind is executed at the peers, and
 *				   everything the peers may refuse is refused (they wait for COMMIT);
 *				2. chunk rows, if any, are completed;
 *				3. the ticket is drawn, published as in flight, ring entries reserved;
 *				4. head rows are written, ring entries filled, and announced.
 *	 COMMIT		5. the peers of sync work commit (bounded; a doubt is the worker's);
 *				6. entries are settled, the ticket is no longer in flight, workers wake.
 *	 ABORT		peers roll back, entries and ticket are settled as aborted.
 * Steps 5 and 6 may not raise: an error there is a PANIC of the cluster.
 */
#include "transaction_internal.hpp"

#include "mmrepl/apply.hpp"
#include "mmrepl/base.hpp"
#include "mmrepl/fault.hpp"
#include "mmrepl/origin.hpp"

namespace mmrepl::transaction
{

static ExecutorFinish_hook_type previous_executor_finish;
static ProcessUtility_hook_type previous_process_utility;
static bool preparing_ours; /* PREPARE TRANSACTION with a gid as peers make them */

/* ---- PRE_COMMIT ---- */

/*
 * Let every peer of sync work refuse what it is going to refuse: those that are
 * last agents first, then those that prepare, all at the same time.
 */
static void
FinishInline(bool prepare)
{
	sync::Work *preparing[shmem::kMaxStreams];
	int n_preparing = 0;

	FlushPending();
	for (Work *work = current.works; work != NULL; work = work->next)
	{
		if (work->inlined == NULL || !work->inlined->begun)
			continue;
		if (prepare)
			ereport(ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg("cannot PREPARE a transaction that was replicated synchronously"),
					 errhint("Use SET LOCAL mmrepl.mode = 'async' in the transaction.")));
		ForceSyncCommit();
		if (work->changes == 0)
			continue;
		MmreplEnsure(n_preparing < shmem::kMaxStreams, "too many streams in a transaction");
		work->out.slot = queue::SlotOf(work->route.stream); /* whom Abort() may have to call */
		if (sync::EndsInTwoPhases(work->inlined))
			preparing[n_preparing++] = work->inlined;
		else
			sync::BeforeCommit(work->inlined);
	}
	if (n_preparing == 0)
		return;

	/*
	 * The peers will know us by our transaction id.  Were it not in the flushed
	 * WAL, a crash could give it to another transaction, which would then decide
	 * what becomes of this one there.
	 */
	XLogFlush(XactLastRecEnd);
	sync::Prepare(preparing, n_preparing, U64FromFullTransactionId(GetTopFullTransactionId()));
}

static int64
BytesOf(const Work *work)
{
	int64 bytes = (int64) work->out.place.bytes;

	for (const change::Segment *segment = work->first; segment != NULL; segment = segment->next)
		bytes += segment->data != NULL ? segment->length : 0;
	return bytes;
}

/* Whether the part is to be given up, and its stream with it. */
static bool
GivesUp(Work *work, bool prepare)
{
	if (work->too_large && prepare)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("cannot PREPARE a transaction that exceeds \"mmrepl.max_queue_size\""),
				 errdetail("Its changes for server \"%s\" were not queued.",
						   work->route.server_name)));
	if (work->too_large)
		return GiveUpPart(work, true);
	return !prepare && !work->out.copy && (work->out.flags & queue::kInlined) == 0 &&
		   queue::ExceedsLimit(work->route.stream, (uint64) BytesOf(work)) &&
		   GiveUpPart(work, false);
}

/* Whether the work has something for the queue; if so, it is ready to be written. */
static bool
PreparePart(Work *work, bool prepare)
{
	if (work->changes == 0 && !work->too_large)
		return false;
	work->out.changes = (uint32) Min(work->changes, (int64) PG_UINT32_MAX);
	work->out.flags = queue::kHead;
	if (prepare)
		work->out.flags |= queue::kPrepared;
	if (work->inlined != NULL && work->inlined->begun)
		work->out.flags |= queue::kInlined;
	if (work->inlined != NULL && work->inlined->phase == sync::Phase::Prepared)
		work->out.flags |= queue::kTwoPhase;
	if (!prepare)
		PrepareToAwait(work);
	if (!GivesUp(work, prepare))
		queue::PrepareHead(&work->out, work->first, current.context);
	return true;
}

/* Collect the works that have something to queue, chunk rows complete. */
static void
PrepareParts(bool prepare)
{
	current.n_parts = 0;
	for (Work *work = current.works; work != NULL; work = work->next)
	{
		if (!PreparePart(work, prepare))
			continue;
		MmreplEnsure(current.n_parts < shmem::kMaxStreams, "too many streams in a transaction");
		current.parts[current.n_parts++] = &work->out;
	}
}

/*
 * A prepared transaction of a peer holds no queue rows, so that its COMMIT
 * PREPARED need not stop the workers; nobody else may take such a name.
 */
static void
RequireForeignGid()
{
	if (preparing_ours)
		ereport(ERROR, (errcode(ERRCODE_RESERVED_NAME),
						errmsg("transaction identifiers that begin with \"mmrepl_\" are reserved"),
						errdetail("The transaction changed replicated tables.")));
}

/*
 * Whether the peer may execute it before it is committed here: it is all that the
 * transaction does to any peer, nothing that is left waits for one, it hardly can
 * fail, and asks there for locks of rows only.
 */
static bool
MayRunEarly(bool prepare)
{
	return !prepare && current.n_parts == 1 && current.works->next == NULL &&
		   current.works->inlined == NULL && current.resyncs == NULL && !current.works->out.copy &&
		   current.works->out.flags == queue::kHead && !IsolationIsSerializable() &&
		   !HasTruncated();
}

static void
BeforeCommit(bool prepare)
{
	if (current.works == NULL && current.resyncs == NULL)
		return;
	MMREPL_FAULT_POINT("commit-begin");
	FinishInline(prepare);
	MMREPL_FAULT_POINT("commit-peers-ready");
	PrepareParts(prepare);
	ReadResyncs(prepare);
	current.written = true;
	if (current.n_parts == 0)
		return;
	if (prepare)
		RequireForeignGid();
	MMREPL_FAULT_POINT("commit-parts-ready");
	current.ticket = queue::DrawTicket(current.parts, current.n_parts, !prepare);
	MMREPL_FAULT_POINT("commit-ticket-drawn");
	for (int i = 0; i < current.n_parts; i++)
		queue::WriteHead(current.parts[i], current.ticket);
	MMREPL_FAULT_POINT("commit-heads-written");
	if (prepare)
		MMREPL_FAULT_POINT("prepare-heads-written");
	if (MayRunEarly(prepare))
	{
		queue::Announce(current.works->out);
		MMREPL_FAULT_POINT("commit-announced");
	}
}

/* ---- after the end; nothing here may raise ---- */

static void
CountSync(const Work *work, bool delivered)
{
	if (work->out.slot < 0)
		return;
	shmem::Counters &counters = shmem::Get().streams[work->out.slot].counters;

	pg_atomic_fetch_add_u64(delivered ? &counters.sync_transactions : &counters.sync_failures, 1);
}

/*
 * A prepared transaction may be left at the peer: the worker looks.  Not before
 * the ticket is settled: until then it would leave ours alone.
 */
static void
CallRecovery()
{
	for (Work *work = current.works; work != NULL; work = work->next)
		if (work->recover && work->out.slot >= 0)
			shmem::RequestRecovery(shmem::Get().streams[work->out.slot]);
}

/* Commit at the peer; the fate tells whether the worker has anything left to do. */
static queue::Fate
EndInline(Work *work)
{
	if (work->inlined == NULL || !work->inlined->begun)
		return queue::Fate::Committed;
	if (work->changes == 0)
	{
		(void) sync::Abort(work->inlined);
		return queue::Fate::Committed;
	}
	MMREPL_CRASH_POINT("commit-before-peer");
	bool relaxed = work->inlined->relaxed;
	bool delivered = sync::Commit(work->inlined);

	work->recover = !delivered && (work->out.flags & queue::kTwoPhase);
	MMREPL_CRASH_POINT("commit-after-peer");
	CountSync(work, delivered);
	if (!delivered)
		return queue::Fate::Committed;
	return relaxed ? queue::Fate::Applied : queue::Fate::Delivered;
}

/* Tell every peer what becomes of it, before any answer is awaited. */
static void
BeginInlineEnds(bool commit)
{
	if (commit)
		MMREPL_CRASH_POINT("commit-before-peers");
	for (Work *work = current.works; work != NULL; work = work->next)
		if (work->inlined == NULL)
			continue;
		else if (!commit)
			sync::BeginAbort(work->inlined);
		else if (work->inlined->begun && work->changes > 0)
			sync::BeginCommit(work->inlined);
}

static void
SettleAll(queue::Fate fate)
{
	if (fate == queue::Fate::Committed)
		NotePeersToAwait();
	BeginInlineEnds(fate == queue::Fate::Committed);
	for (Work *work = current.works; work != NULL; work = work->next)
	{
		queue::Fate own = fate;

		if (fate == queue::Fate::Committed)
			own = EndInline(work);
		else if (work->inlined != NULL)
			work->recover = !sync::Abort(work->inlined);
		if (current.ticket != 0 && (work->changes > 0 || work->too_large))
			queue::Settle(&work->out, current.ticket, own);
	}
	sync::EndAbandoned();
	MMREPL_CRASH_POINT("commit-entries-settled");
	if (current.ticket != 0)
		queue::SettleTicket(current.parts, current.n_parts);
	CallRecovery();
}

/* What to do when the transaction has released everything. */
static struct
{
	bool launcher;
	bool workers;
	uint64 streams; /* bit mask of slots */
	uint64 retry;
	uint64 recover;
	Work *works;   /* of which some peer's commit was not waited for; NULL: of none */
	Work *awaited; /* of which some are to be at their peers before COMMIT returns; NULL: of none */
} later;

static void
NoteLater(bool committed)
{
	later.streams |= current.wake_streams;
	if (!committed)
		return;
	later.launcher |= current.wake_launcher;
	later.workers |= current.wake_workers;
	later.retry |= current.retry_streams;
	later.recover |= current.recover_streams;
	for (Work *work = current.works; work != NULL; work = work->next)
	{
		if (work->inlined != NULL && work->inlined->cancelled)
			later.works = current.works;
		if (work->awaited)
			later.awaited = current.works;
	}
}

/* Call fn with the stream of each slot of a bit mask. */
template <typename Fn>
static void
ForStreams(uint64 slots, Fn fn)
{
	for (int slot = 0; slots != 0; slot++, slots >>= 1)
		if (slots & 1)
			fn(shmem::Get().streams[slot]);
}

/*
 * Only now: who is woken must find our invalidations sent, or it would read its
 * configuration from stale caches, and our locks free.
 */
static void
OnResourceRelease(ResourceReleasePhase phase, bool, bool top_level, void *)
{
	if (phase != RESOURCE_RELEASE_AFTER_LOCKS || !top_level)
		return;
	connection::RestCached();
	if (later.streams != 0)
		MMREPL_CRASH_POINT("commit-before-wake");
	ForStreams(later.recover, shmem::RequestRecovery);
	ForStreams(later.retry, shmem::RequestRetry);
	ForStreams(later.streams, shmem::CallForAttention);
	if (later.launcher && shmem::Ready())
		shmem::RequestScout();
	if (later.workers && shmem::Ready())
		shmem::WakeWorkersOf(MyDatabaseId);

	Work *works = later.works;
	Work *awaited = later.awaited;

	later = {};
	AwaitPeers(works, awaited);
}

static void
EndLateCommit(shmem::Database &database)
{
	MMREPL_CRASH_POINT("late-ending");
	pg_atomic_fetch_add_u64(&database.late, (int64) shmem::LateWord::kEnd);
	MMREPL_CRASH_POINT("late-ended");
	shmem::NudgeWorkersOf(MyDatabaseId);
}

/* The fault point of each way in which a transaction can end. */
static void
HitEnd([[maybe_unused]] queue::Fate fate)
{
	if (fate == queue::Fate::Committed)
		MMREPL_CRASH_POINT("commit-visible");
	else if (fate == queue::Fate::Prepared)
		MMREPL_CRASH_POINT("prepare-durable");
	else if (current.ticket != 0)
		MMREPL_CRASH_POINT("abort-with-ticket");
	else
		MMREPL_CRASH_POINT("abort-begin");
}

static void
AfterEnd(queue::Fate fate)
{
	if (fate == queue::Fate::Committed)
		PublishResyncs();
	if (current.works != NULL)
	{
		HitEnd(fate);
		SettleAll(fate);
		MMREPL_CRASH_POINT("commit-ticket-settled");
		if (fate != queue::Fate::Aborted)
			AddPairCounts();
	}
	if (current.late != NULL)
		EndLateCommit(*current.late);
	NoteLater(fate == queue::Fate::Committed);
	current = {};
	preparing_ours = false;
	origin::Reset();
	apply::AtTransactionEnd();
}

/* The worker is told at the transaction's end, of which a prepared one says nothing to us. */
static void
RefusePrepare()
{
	if (current.wake_streams != 0 || current.retry_streams != 0)
		ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						errmsg("cannot PREPARE a transaction that has steered delivery"),
						errdetail("It has called mmrepl.pause(), resume(), skip(), "
								  "deal_sync_err_rec() or resync().")));
}

static void
OnXactEvent(XactEvent event, void *)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
			MMREPL_IN_TEST_BUILD(apply::HitBeforeCommit());
			BeforeCommit(false);
			break;
		case XACT_EVENT_PRE_PREPARE:
			RefusePrepare();
			BeforeCommit(true);
			break;
		case XACT_EVENT_COMMIT:
			AfterEnd(queue::Fate::Committed);
			break;
		case XACT_EVENT_PREPARE:
			AfterEnd(queue::Fate::Prepared);
			break;
		case XACT_EVENT_ABORT:
			AfterEnd(queue::Fate::Aborted);
			break;
		default:
			break;
	}
}

/* ---- subtransactions ---- */

/* Not before nothing can fail any more: what fails on its way here is undone at the peer, too. */
static void
OnSubCommit(int level)
{
	MergePairCounts(level);
	for (Work *work = current.works; work != NULL; work = work->next)
	{
		if (work->inlined != NULL)
			sync::SubCommit(work->inlined, level);
		MergeInto(work, level);
	}
}

static void
OnSubAbort(int level)
{
	bool pending = false;

	MMREPL_CRASH_POINT("savepoint-abort");
	UndoPairCounts(level);
	for (Work *work = current.works; work != NULL; work = work->next)
	{
		if (work->inlined != NULL)
			sync::SubAbort(work->inlined, level);
		UndoTo(work, level);
		pending |= work->unsent > 0;
	}
	sync::EndAbandoned();
	current.pending_sync = pending;
}

static void
OnSubXactEvent(SubXactEvent event, SubTransactionId, SubTransactionId, void *)
{
	int level = GetCurrentTransactionNestLevel();

	if (event == SUBXACT_EVENT_ABORT_SUB)
	{
		origin::Reset(level);
		UndoResyncs(level);
	}
	if (event == SUBXACT_EVENT_COMMIT_SUB)
		MergeResyncs(level);
	if (current.works == NULL)
		return;
	switch (event)
	{
		case SUBXACT_EVENT_PRE_COMMIT_SUB:
			MMREPL_FAULT_POINT("savepoint-release");
			break;
		case SUBXACT_EVENT_COMMIT_SUB:
			OnSubCommit(level);
			break;
		case SUBXACT_EVENT_ABORT_SUB:
			OnSubAbort(level);
			break;
		default: /* START_SUB: nothing that may raise */
			break;
	}
}

/* ---- statements ---- */

/*
 * After a statement's AFTER triggers: sync changes travel now, and are waited for
 * or not.  What the peer has refused meanwhile is no error of ROLLBACK.
 */
static void
AfterStatement(bool ends_something)
{
	if (!current.pending_sync || !IsTransactionState())
		return;
	if (guc::sync_flush == guc::Flush::Statement)
		FlushPending();
	else if (!ends_something)
		PostPending();
}

static void
OnExecutorFinish(QueryDesc *query)
{
	if (previous_executor_finish)
		previous_executor_finish(query);
	else
		standard_ExecutorFinish(query);
	/* A referential action's query leaves its row events to the outer query. */
	if (!(query->estate->es_top_eflags & EXEC_FLAG_SKIP_TRIGGERS))
		AfterStatement(false);
}

/* Whether the command is of that kind; *ours: with the name of a peer's transaction. */
static bool
IsTransactionCommand(const PlannedStmt *statement, TransactionStmtKind kind, bool *ours)
{
	const TransactionStmt *command = (const TransactionStmt *) statement->utilityStmt;

	if (!IsA(command, TransactionStmt) || command->kind != kind)
		return false;
	*ours = command->gid != NULL && sync::IsOurGid(command->gid);
	return true;
}

/*
 * Rows of a prepared transaction appear with an old ticket: workers must look for
 * them from before the command until after it has ended, in whatever way.
 */
static void
BeginLateCommit()
{
	shmem::Database *database = shmem::FindDatabase(MyDatabaseId);

	if (database == NULL || current.late != NULL)
		return;
	pg_atomic_fetch_add_u64(&database->late, (int64) shmem::LateWord::kBegin);
	current.late = database;
	MMREPL_FAULT_POINT("late-begun");
}

static void
OnProcessUtility(PlannedStmt *statement, const char *text, bool read_only,
				 ProcessUtilityContext context, ParamListInfo params, QueryEnvironment *environment,
				 DestReceiver *dest, QueryCompletion *completion)
{
	bool transaction_command = IsA(statement->utilityStmt, TransactionStmt);
	bool ours;

	if (shmem::Ready() && IsTransactionCommand(statement, TRANS_STMT_COMMIT_PREPARED, &ours) &&
		!ours)
		BeginLateCommit();
	if (IsTransactionCommand(statement, TRANS_STMT_PREPARE, &ours))
		preparing_ours = ours;
	RunUtilityBounded(previous_process_utility,
					  {statement, text, read_only, context, params, environment, dest, completion});
	if (current.late != NULL)
		MMREPL_FAULT_POINT("late-visible");
	AfterStatement(transaction_command);
}

void
Init()
{
	RegisterXactCallback(OnXactEvent, NULL);
	RegisterSubXactCallback(OnSubXactEvent, NULL);
	RegisterResourceReleaseCallback(OnResourceRelease, NULL);
	previous_executor_finish = ExecutorFinish_hook;
	ExecutorFinish_hook = OnExecutorFinish;
	InitLockWaits();
	previous_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = OnProcessUtility;
}

} // namespace mmrepl::transaction
