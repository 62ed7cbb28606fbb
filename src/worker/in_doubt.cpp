/*
 * in_doubt.cpp
 *		mmrepl.doubts(): synchronous transactions whose end at the peer is not known
 *		here, for the view mmrepl.in_doubt.
 *
 * What was committed here stands in the queue, in the range of tickets that was
 * in doubt and is not confirmed.  What was not, and is prepared at the peer all
 * the same, is what the worker last found there.
 */
#include "worker_internal.hpp"

#include "mmrepl/sync.hpp"

namespace mmrepl::worker
{

constexpr int kColumns = 8;
constexpr int kRefsAtATime = 65536;

/* One row of the view. */
struct Doubt
{
	int32 stream;
	bool two_phase;
	uint64 xid;
	uint64 ticket; /* 0: none was drawn, or it is not known */
	TimestampTz since;
	const char *state;
	const char *next_step;
};

static void
PutDoubt(ReturnSetInfo *result, const pg_uuid_t &node, const Doubt &doubt)
{
	Datum values[kColumns];
	bool nulls[kColumns] = {};
	char gid[sync::kGidLength];

	sync::FormatGid(gid, node, doubt.stream, doubt.xid);
	values[0] = Int32GetDatum(doubt.stream);
	values[1] = CStringGetTextDatum(doubt.two_phase ? "two-phase" : "last agent");
	values[2] = CStringGetTextDatum(gid);
	nulls[2] = !doubt.two_phase;
	values[3] = Int64GetDatum((int64) doubt.xid);
	values[4] = Int64GetDatum((int64) doubt.ticket);
	nulls[4] = doubt.ticket == 0;
	values[5] = TimestampTzGetDatum(doubt.since);
	values[6] = CStringGetTextDatum(doubt.state);
	values[7] = CStringGetTextDatum(doubt.next_step);
	tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
}

/* ---- committed here ---- */

static Doubt
CommittedDoubt(const catalog::StreamRow *row, const queue::Ref &ref)
{
	const char *last_agent = row->needs_resync ? "resync() replaces it by a copy of the tables"
											   : "the worker replays it, unless the peer has it";

	Doubt doubt = {};

	doubt.stream = row->id;
	doubt.two_phase = ref.flags & queue::kTwoPhase;
	doubt.xid = ref.xid;
	doubt.ticket = ref.ticket;
	doubt.since = shmem::TicketTime(ref.ticket);
	doubt.state = "committed";
	doubt.next_step = queue::IsInFlight(ref.ticket) ? "the session commits at the peer"
					  : doubt.two_phase				? "the worker commits the prepared transaction"
													: last_agent;
	return doubt;
}

/* Inline transactions in the range of tickets in doubt; also while nothing is delivered. */
template <typename Fn>
static void
ForEachCommitted(const catalog::StreamRow *row, shmem::Stream &stream, Fn fn)
{
	uint64 from = pg_atomic_read_u64(&stream.doubt_from);
	uint64 after = Max(pg_atomic_read_u64(&stream.confirmed), from == 0 ? 0 : from - 1);
	uint64 to = pg_atomic_read_u64(&stream.doubt_to);
	queue::Survey survey = {};

	if (row->needs_resync)
	{
		survey.discarded_too = true;
		after = Max(after, row->discarded);
	}
	if (after >= to)
		return;
	queue::Collected waiting = queue::Collect(row->id, after, to + 1, kRefsAtATime, &survey);

	for (;;)
	{
		for (int i = 0; i < waiting.count; i++)
			if (waiting.refs[i].ticket > after && (waiting.refs[i].flags & queue::kInlined))
				fn(CommittedDoubt(row, waiting.refs[i]));
		pfree(waiting.refs);
		if (waiting.complete)
			break;
		waiting = queue::CollectMore(&survey, row->id, after, kRefsAtATime);
	}
}

/* ---- prepared at the peer ---- */

static Doubt
PreparedDoubt(const catalog::StreamRow *row, const shmem::Leftover &left)
{
	Doubt doubt = {};

	doubt.stream = row->id;
	doubt.two_phase = true;
	doubt.xid = left.xid;
	doubt.since = left.since;
	switch (left.state)
	{
		case shmem::LocalState::Running:
			doubt.state = "running";
			doubt.next_step = "the session ends it";
			break;
		case shmem::LocalState::Aborted:
			doubt.state = "aborted";
			doubt.next_step = "the worker rolls the prepared transaction back";
			break;
		case shmem::LocalState::Skipped:
			doubt.state = "skipped";
			doubt.next_step = "the worker rolls the prepared transaction back";
			break;
		default:
			doubt.state = "unknown";
			doubt.next_step = "somebody has to decide: see the server log";
			break;
	}
	return doubt;
}

/* What the worker has found at the peer. */
struct AtPeer
{
	int count;
	shmem::Leftover each[shmem::kMaxLeftovers];
};

static void
CopyAtPeer(shmem::Stream &stream, AtPeer *left)
{
	SpinLockAcquire(&stream.mutex);
	left->count = stream.n_leftovers;
	memcpy(left->each, stream.leftovers, sizeof(left->each));
	SpinLockRelease(&stream.mutex);
}

/*
 * Everything in doubt of one stream.  A transaction that was found at the peer before
 * it was committed here stands in the queue by now: what the queue says is newer.
 */
template <typename Fn>
static void
ForEachDoubtOf(const catalog::StreamRow *row, shmem::Stream &stream, Fn fn)
{
	AtPeer left;

	CopyAtPeer(stream, &left); /* first, so that nothing is missed on its way to the queue */
	ForEachCommitted(row, stream, [&](const Doubt &doubt) {
		for (int i = 0; i < left.count; i++)
			if (left.each[i].xid == doubt.xid)
				left.each[i].state = shmem::LocalState::Committed;
		fn(doubt);
	});
	for (int i = 0; i < left.count; i++)
		if (left.each[i].state != shmem::LocalState::Committed)
			fn(PreparedDoubt(row, left.each[i]));
}

/* Everything in doubt of the streams that `wanted` says. */
template <typename Wanted, typename Fn>
static void
ForEachDoubt(Wanted wanted, Fn fn)
{
	ListCell *cell;

	foreach(cell, catalog::AllStreams())
	{
		const catalog::StreamRow *row = (const catalog::StreamRow *) lfirst(cell);
		int slot = queue::SlotOf(row->id);

		if (slot >= 0 && wanted(*row))
			ForEachDoubtOf(row, shmem::Get().streams[slot], fn);
	}
}

/* The names of what may be prepared at peers, one a line; NULL: nothing. */
char *
PreparedAtPeers()
{
	pg_uuid_t node = catalog::NodeId();
	char gid[sync::kGidLength];
	StringInfoData gids;

	initStringInfo(&gids);
	ForEachDoubt([](const catalog::StreamRow &) { return true; },
				 [&](const Doubt &doubt) {
					 if (!doubt.two_phase)
						 return;
					 sync::FormatGid(gid, node, doubt.stream, doubt.xid);
					 appendStringInfo(&gids, "%s%s", gids.len > 0 ? "\n" : "", gid);
				 });
	return gids.len > 0 ? gids.data : NULL;
}

void
WarnOfPrepared(const char *gids)
{
	ereport(WARNING, (errcode(ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST),
					  errmsg("prepared transactions of this database are left at its peers"),
					  errdetail("%s", gids),
					  errhint("At the peer, COMMIT PREPARED or ROLLBACK PREPARED each of them.")));
}

/* What the former node has prepared bears its name: the new one looks for its own. */
Datum
SqlAdoptNode(FunctionCallInfo fcinfo)
{
	bool moved = PG_GETARG_BOOL(0);

	shmem::RequireReady();
	char *gids = !moved && superuser() && catalog::HasNode() ? PreparedAtPeers() : NULL;
	pg_uuid_t *id = catalog::AdoptNode(moved, PG_GETARG_BOOL(1));

	if (gids != NULL)
		WarnOfPrepared(gids);
	PG_RETURN_UUID_P(id);
}

Datum
SqlDoubts(FunctionCallInfo fcinfo)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	pg_uuid_t node = catalog::NodeId();

	shmem::RequireReady();
	InitMaterializedSRF(fcinfo, 0);
	ForEachDoubt([](const catalog::StreamRow &row) { return stats::MaySeeStatistics(row.owner); },
				 [&](const Doubt &doubt) { PutDoubt(result, node, doubt); });
	PG_RETURN_NULL();
}

} // namespace mmrepl::worker
