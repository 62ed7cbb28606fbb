/*
 * apply.cpp
 *		One call of mmrepl.apply(): a batch from header to watermark.
 */
#include "apply_internal.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::apply
{

/*
 * A large transaction that comes in parts: what the next part must follow.  It
 * is valid within the one transaction (and subtransaction) that saw part 0.
 */
static struct
{
	bool active;
	bool skip; /* the transaction is here already: its parts do nothing */
	TransactionId top_xid;
	SubTransactionId subxact;
	pg_uuid_t node;
	int32 stream;
	uint64 ticket;
	uint32 next_part;
	int64 conflicts;
} parts;

MMREPL_IN_TEST_BUILD(static bool applied_here;) /* this transaction has called apply() */

/* What came is not what batch.hpp describes; never returns. */
void
Malformed(const char *detail)
{
	ereport(ERROR, (errcode(ERRCODE_MMREPL_BAD_BATCH), errmsg("malformed replication batch"),
					errdetail_internal("%s", detail)));
}

/* A new command, seen by the active snapshot (which is apply()'s own copy). */
void
NextCommand()
{
	CommandCounterIncrement();
	UpdateActiveSnapshotCommandId();
}

/* Whether the owner could take the role of the caller at any time. */
bool
IsTrusted(const Session *session, Oid owner)
{
	return is_member_of_role(owner, session->caller);
}

/* The owner's code (triggers, defaults, domains) runs with the owner's rights. */
void
BecomeOwner(const Session *session, Oid owner, bool trusted)
{
	int restriction = trusted ? 0 : SECURITY_RESTRICTED_OPERATION;

	SetUserIdAndSecContext(owner, session->caller_sec_context | SECURITY_LOCAL_USERID_CHANGE |
									  restriction);
}

/* After an error the abort of the (sub)transaction does this. */
void
BecomeCaller(const Session *session)
{
	SetUserIdAndSecContext(session->caller, session->caller_sec_context);
}

/* ---- header ---- */

/* A number that is stored as bigint. */
static uint64
ReadNumber(change::Reader *in)
{
	uint64 number = in->U64();

	if (number > kMaxNumber)
		Malformed("A ticket or transaction id is out of range.");
	return number;
}

/* Raise unless the batch is of a protocol that is spoken here. */
static void
ReadMagic(change::Reader *in)
{
	if (in->U32() != batch::kMagic)
		ereport(ERROR, (errcode(ERRCODE_MMREPL_BAD_BATCH),
						errmsg("not a replication batch of protocol %d", batch::kProtocol),
						errhint("Update the extension mmrepl_bgw on the older node.")));
}

/* Fills the header; every field is within its range. */
static void
ReadHeader(change::Reader *in, Header *header)
{
	ReadMagic(in);
	header->flags = in->U8();
	if (header->flags & ~batch::kKnownFlags)
		Malformed("Unknown flags.");
	uint32 encoding = in->U32();

	if (encoding > INT_MAX || !PG_VALID_BE_ENCODING((int) encoding))
		Malformed("Unknown encoding.");
	header->encoding = (int) encoding;
	memcpy(header->node.data, in->Bytes(UUID_LEN), UUID_LEN);
	header->stream = (int32) in->U32();
	header->clock = ReadNumber(in);
	header->previous = ReadNumber(in);
	header->last = ReadNumber(in);
	header->sweep_xid = ReadNumber(in);
	header->part = in->U32();
	if (header->part > 0 && (header->flags & batch::kFirst))
		Malformed("A first part is numbered as a later one.");
	if ((header->flags & (batch::kTurn | batch::kAhead)) &&
		(header->part > 0 || (header->flags & (batch::kInline | batch::kFirst | batch::kMore))))
		Malformed("Neither a part nor an inline batch has a turn.");
}

/* Now and then. */
static void
SayThatClocksDiffer(const Header &header, uint64 ahead)
{
	constexpr int64 every = INT64CONST(600) * USECS_PER_SEC;
	static TimestampTz next;
	TimestampTz now = GetCurrentTimestamp();

	if (now < next)
		return;
	next = now + every;
	ereport(LOG_SERVER_ONLY,
			(errmsg("mmrepl: the clock of node %s is %llu s ahead of this server's",
					DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&header.node))),
					(unsigned long long) (ahead / USECS_PER_SEC)),
			 errdetail("Its changes are applied; its clock is not followed."),
			 errhint("Set the clocks of both servers.")));
}

/*
 * The peer's clock: our later tickets are greater than what we have seen of it.  Not
 * if it is too far ahead: nothing would bring our tickets back to the time of day, and our
 * peers would follow.  What depends on each other is ordered by this node's own clock.
 */
static void
FollowClock(const Header &header)
{
	pg_atomic_uint64 *applied = &shmem::Get().applied_ticket;
	uint64 known = pg_atomic_read_u64(applied);

	if (header.clock <= known)
		return;
	uint64 now = shmem::ClockNow();

	if (header.clock > now + shmem::kMaxClockLead)
	{
		SayThatClocksDiffer(header, header.clock - now);
		return;
	}
	while (known < header.clock && !pg_atomic_compare_exchange_u64(applied, &known, header.clock))
		;
}

void
ReadTransaction(const Header &header, change::Reader *in, Transaction *transaction)
{
	if (in->U8() != batch::kTransaction)
		Malformed("A transaction does not begin where one should.");
	transaction->ticket = ReadNumber(in);
	transaction->xid = ReadNumber(in);
	transaction->flags = in->U8();
	transaction->segments = in->U32();
	if (transaction->flags & ~(batch::kMarked | batch::kLate))
		Malformed("Unknown flags of a transaction.");
	if (!header.Inline() && !header.More() && !(transaction->flags & batch::kLate) &&
		transaction->ticket > header.last)
		Malformed("A transaction is beyond the batch's watermark.");
}

/* ---- which transactions are applied ---- */

/* Raise unless this part follows the one before, in the same transaction. */
static void
CheckPart(const Header &header)
{
	if (parts.active && parts.next_part == header.part && parts.stream == header.stream &&
		memcmp(parts.node.data, header.node.data, UUID_LEN) == 0 &&
		parts.top_xid == GetTopTransactionIdIfAny() &&
		parts.subxact == GetCurrentSubTransactionId())
		return;
	ereport(ERROR, (errcode(ERRCODE_MMREPL_OUT_OF_ORDER),
					errmsg("part %u of a large transaction does not follow part %u of it",
						   header.part, header.part - 1),
					errdetail("All parts have to come in one transaction, in their order.")));
}

/* The transaction that the batch before left unfinished goes on. */
static bool
ContinueTransaction(const Transaction &transaction)
{
	if (transaction.ticket != parts.ticket)
		Malformed("A later part belongs to another transaction than the part before.");
	return !parts.skip;
}

/*
 * An inline transaction proves itself by its marker: part 0 inserts it, later
 * parts find it as an insert of this very transaction.
 */
static bool
AdmitInline(const Header &header, const Transaction &transaction, bool continues)
{
	if (continues ? HasOwnMarker(header.node, header.stream, transaction.xid)
				  : InsertMarker(header.node, header.stream, transaction.xid))
		return true;
	if (continues)
		ereport(ERROR, (errcode(ERRCODE_MMREPL_OUT_OF_ORDER),
						errmsg("part %u of inline transaction %llu came outside of it", header.part,
							   (unsigned long long) transaction.xid)));
	ereport(ERROR, (errcode(ERRCODE_MMREPL_OUT_OF_ORDER),
					errmsg("inline transaction %llu has been applied before",
						   (unsigned long long) transaction.xid)));
}

/* Whether the transaction has to be applied, or is here already. */
static bool
Admit(Session *session, const Transaction &transaction, bool first, uint64 watermark)
{
	const Header &header = session->header;
	bool continues = first && header.part > 0;

	if (header.Inline())
		return AdmitInline(header, transaction, continues);
	if (continues)
		return ContinueTransaction(transaction);
	if (!(transaction.flags & batch::kLate) && transaction.ticket <= watermark)
		return false;
	if (!(transaction.flags & (batch::kMarked | batch::kLate)))
		return true;
	(void) WaitForPredecessor(session);
	return InsertMarker(header.node, header.stream, transaction.xid);
}

const char *
Place(const change::Decoder *decoder)
{
	return decoder->reader.data + decoder->reader.position;
}

/*
 * Apply every change of a segment, in order.  Relations live as long as the segment,
 * and so does the change: an error handler may show it when this frame is gone.
 */
static void
ApplySegment(Session *session, const char *data, uint32 length)
{
	MemoryContext old = MemoryContextSwitchTo(session->segment_context);

	MemoryContextReset(session->segment_context);
	change::Decoder *decoder = (change::Decoder *) palloc(sizeof(change::Decoder));

	session->n_bindings = 0;
	change::StartDecoding(decoder, data, length);
	while ((session->change = change::Next(decoder)) != NULL)
	{
		CHECK_FOR_INTERRUPTS();
		session->at = Place(decoder);
		if (session->change->kind == change::kTruncate)
			AddTruncate(session, session->change->relation);
		else
		{
			FlushTruncates(session);
			ApplyRowChange(session, session->change);
		}
		session->schema = session->table = NULL;
	}
	MemoryContextSwitchTo(old);
}

/* Apply what the watermark does not cover; returns whether the last one was applied. */
static bool
ApplyTransactions(Session *session, uint64 watermark)
{
	bool apply = false;

	session->begin = session->reader.position;
	BeginBatchTriggers(session);
	for (bool first = true; !session->reader.AtEnd(); first = false)
	{
		Transaction transaction;

		ReadTransaction(session->header, &session->reader, &transaction);
		session->ticket = transaction.ticket;
		session->xid = transaction.xid;
		apply = Admit(session, transaction, first, watermark);
		MMREPL_FAULT_POINT("apply-transaction-begun");
		for (uint32 i = 0; i < transaction.segments; i++)
		{
			uint32 length = session->reader.U32();
			const char *data = session->reader.Bytes(length);

			if (apply)
				ApplySegment(session, data, length);
		}
		FlushTruncates(session);
		MMREPL_FAULT_POINT("apply-transaction-written");
	}
	FlushAllCollected(session);
	EndBatchTriggers(session);
	CloseTargets(session);
	return apply;
}

/* Remember what the next part has to follow. */
static void
ExpectPart(const Session *session, bool applied)
{
	const Header &header = session->header;
	int64 before = header.part > 0 ? parts.conflicts : 0;

	if (session->ticket == 0)
		Malformed("A part without a transaction.");
	parts.active = true;
	parts.skip = !applied;
	parts.top_xid = GetTopTransactionId();
	parts.subxact = GetCurrentSubTransactionId();
	parts.node = header.node;
	parts.stream = header.stream;
	parts.ticket = session->ticket;
	parts.next_part = header.part + 1;
	parts.conflicts = before + session->conflicts;
}

/* ---- the call ---- */

/* Raise when a batch is missing before this one. */
static void
CheckPrevious(const Header &header, uint64 watermark)
{
	if (header.previous <= watermark)
		return;
	ereport(ERROR, (errcode(ERRCODE_MMREPL_OUT_OF_ORDER),
					errmsg("replication batch follows ticket %llu, which is not here yet",
						   (unsigned long long) header.previous),
					errdetail("The last ticket of stream %d that was applied here is %llu.",
							  header.stream, (unsigned long long) watermark),
					errhint("The batch before has failed, or this node was restored from an older "
							"state; the sender starts again after mmrepl.hello().")));
}

/*
 * The stream's row is locked first: a session that still executes an earlier attempt
 * holds it, we wait for its end and see what it has left to do.  One that is ahead locks
 * it later.  The lock is written, so the commit of a batch that has nothing to do is
 * flushed as well, with all before it.  Returns the watermark that is or will be found.
 */
static uint64
EnterStream(Session *session)
{
	const Header &header = session->header;

	if (header.flags & batch::kTurn)
		TakeTurn(session);
	if (header.Ahead())
	{
		BeginAhead(session);
		return header.previous;
	}
	LockProgress(&session->progress, header.node, header.stream);
	MMREPL_FAULT_POINT("apply-locked");
	if (header.part > 0)
		CheckPart(header);
	else
		CheckPrevious(header, session->progress.watermark);
	return session->progress.watermark;
}

/* A batch of the queue. */
static uint64
ApplyQueued(Session *session)
{
	const Header &header = session->header;
	Progress &progress = session->progress;
	bool applied = ApplyTransactions(session, EnterStream(session));

	(void) WaitForPredecessor(session);
	MMREPL_FAULT_POINT("apply-rows-written");
	uint64 watermark = progress.watermark;

	if (header.More())
	{
		ExpectPart(session, applied);
		MMREPL_FAULT_POINT("apply-part-done");
	}
	else
	{
		int64 conflicts = session->conflicts + (header.part > 0 ? parts.conflicts : 0);

		parts.active = false;
		watermark = Max(watermark, header.last);
		if (watermark > progress.watermark || conflicts > 0)
			SaveProgress(&progress, watermark, conflicts);
		MMREPL_FAULT_POINT("apply-watermark-saved");
		if (header.sweep_xid != 0)
		{
			SweepMarkers(header.node, header.stream, header.sweep_xid);
			MMREPL_FAULT_POINT("apply-markers-swept");
		}
	}
	CloseProgress(&progress);
	return watermark;
}

/* Until the end of the transaction, of which this is the last batch. */
static void
RelaxCommit(const Header &header)
{
	if ((header.flags & batch::kRelaxed) && synchronous_commit != SYNCHRONOUS_COMMIT_OFF)
		(void) set_config_option("synchronous_commit", "off", PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_LOCAL, true, 0, false);
}

/* Until the end of the call; the sessions of peers have it already. */
static void
SecureSearchPath()
{
	constexpr const char *path = "pg_catalog, pg_temp";

	if (strcmp(namespace_search_path, path) != 0)
		set_config_option("search_path", path, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0,
						  false);
}

/* Everything that an error does not undo by itself is undone by the caller's handler. */
static void
Begin(Session *session)
{
	session->context =
		AllocSetContextCreate(CurrentMemoryContext, "mmrepl apply", ALLOCSET_DEFAULT_SIZES);
	session->segment_context =
		AllocSetContextCreate(session->context, "mmrepl apply segment", ALLOCSET_DEFAULT_SIZES);
	GetUserIdAndSecContext(&session->caller, &session->caller_sec_context);
	session->nest_level = GetCurrentTransactionNestLevel();
	session->guc_level = NewGUCNestLevel();
	SecureSearchPath();
	origin::Enter();
	session->began = true;
	PushCopiedSnapshot(GetLatestSnapshot());
}

/* Undo Begin(), with the work visible to the rest of the statement. */
static void
End(Session *session)
{
	NextCommand();
	PopActiveSnapshot();
	origin::Leave();
	AtEOXact_GUC(false, session->guc_level);
	MemoryContextDelete(session->context);
}

/* The call between the header and the error handler; returns the watermark. */
static uint64
Run(Session *session)
{
	ErrorContextCallback callback = {error_context_stack, AddContext, session};
	uint64 watermark = 0;

	error_context_stack = &callback;
	Begin(session);
	InContext(session->context, [&] {
		initStringInfo(&session->scratch);
		MMREPL_FAULT_POINT("apply-begun");
		if (session->header.Inline())
		{
			ApplyTransactions(session, 0);
			MMREPL_FAULT_POINT("apply-inline-written");
			watermark = session->may_defer ? batch::kMayDefer : 0;
		}
		else
			watermark = ApplyQueued(session);
	});
	End(session);
	error_context_stack = callback.previous;
	MMREPL_IN_TEST_BUILD(applied_here = true);
	return watermark;
}

/* apply() inside of apply(): a trigger that calls it. */
static void
RefuseNesting()
{
	if (origin::Applying())
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("mmrepl.apply() cannot be called while it runs")));
}

/* Nothing of a refused batch stays: the caller's transaction aborts, this session is as before. */
uint64
ApplyBatch(const char *data, uint32 length)
{
	Session *session = (Session *) palloc0(sizeof(Session));
	uint64 watermark = 0;

	PreventCommandIfReadOnly("mmrepl.apply()");
	PreventCommandIfParallelMode("mmrepl.apply()");
	RefuseNesting();
	session->reader = {data, length, 0};
	ReadHeader(&session->reader, &session->header);
	FollowClock(session->header);
	RelaxCommit(session->header);
	Guarded([&] { watermark = Run(session); },
			[&] {
				StopAhead(session);
				if (session->began)
					origin::Reset(session->nest_level);
				ExplainLostRace(session);
			});
	pfree(session);
	return watermark;
}

#ifdef MMREPL_FAULT_POINTS
void
HitBeforeCommit()
{
	if (applied_here)
		MMREPL_FAULT_POINT("apply-before-commit");
}
#endif

/* A part of the next transaction cannot follow one of this. */
void
AtTransactionEnd()
{
#ifdef MMREPL_FAULT_POINTS
	if (applied_here)
		MMREPL_CRASH_POINT("apply-after-end");
	applied_here = false;
#endif
	parts.active = false;
}

/* ---- SQL ---- */

/* mmrepl.apply(bytea) */
Datum
SqlApply(FunctionCallInfo fcinfo)
{
	shmem::RequireReady();
	bytea *bytes = PG_GETARG_BYTEA_PP(0);

	PG_RETURN_INT64((int64) ApplyBatch(VARDATA_ANY(bytes), VARSIZE_ANY_EXHDR(bytes)));
}

} // namespace mmrepl::apply
