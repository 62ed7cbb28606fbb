/*
 * queue_view.cpp
 *		mmrepl.queued_changes(): the queue as rows with SQL text, for sync_err_rec.
 */
#include "queue_internal.hpp"

#include "mmrepl/stats.hpp"

namespace mmrepl::queue
{

constexpr int kViewColumns = 11;
constexpr int kRefsAtATime = 65536;

struct View
{
	ReturnSetInfo *result;
	const catalog::StreamRow *stream;
	const char *server_name;
	const Ref *ref;
	const char *state;
	int64 id;
	MemoryContext per_segment;
};

static const char *
KindName(change::Kind kind)
{
	switch (kind)
	{
		case change::kInsert:
			return "INSERT";
		case change::kUpdate:
			return "UPDATE";
		case change::kDelete:
			return "DELETE";
		default:
			return "TRUNCATE";
	}
}

static Datum
NameDatum(const char *string)
{
	return DirectFunctionCall1(namein, CStringGetDatum(string));
}

static void
PutChange(View *view, SqlWriter *writer, const change::Change *change)
{
	Datum values[kViewColumns];
	bool nulls[kViewColumns] = {};
	StringInfoData sql;

	initStringInfo(&sql);
	AppendSql(&sql, writer, change);
	values[0] = Int64GetDatum(++view->id);
	values[1] = NameDatum(change->relation->local_schema);
	values[2] = NameDatum(change->relation->local_table);
	values[3] = CStringGetTextDatum(view->server_name);
	values[4] = CStringGetTextDatum(sql.data);
	values[5] = TimestampTzGetDatum(shmem::TicketTime(view->ref->ticket));
	values[6] = Int64GetDatum((int64) view->ref->ticket);
	values[7] = Int64GetDatum((int64) view->ref->xid);
	values[8] = CStringGetTextDatum(KindName(change->kind));
	values[9] = CStringGetTextDatum(view->state);
	values[10] = Int32GetDatum(change->relation->pair_id);
	nulls[10] = change->relation->pair_id == 0;
	tuplestore_putvalues(view->result->setResult, view->result->setDesc, values, nulls);
}

/* SegmentSink: decode a segment's changes into rows. */
static void
PutSegment(void *arg, const char *data, uint32 length)
{
	View *view = (View *) arg;

	InContext(view->per_segment, [&] {
		change::Decoder decoder;
		const change::Change *change;
		SqlWriter writer = {};

		change::StartDecoding(&decoder, data, length);
		while ((change = change::Next(&decoder)) != NULL)
			PutChange(view, &writer, change);
	});
	MemoryContextReset(view->per_segment);
}

/* What waits of one stream, oldest first, a bounded number of refs at a time. */
static void
PutStream(View *view)
{
	int slot = SlotOf(view->stream->id);
	uint64 after = view->stream->confirmed;
	uint64 blocked = 0;
	Survey survey = {};

	if (slot >= 0)
	{
		after = Confirmed(shmem::Get().streams[slot]);
		blocked = shmem::Get().streams[slot].blocked_ticket;
	}
	Collected waiting = Collect(view->stream->id, after, PG_UINT64_MAX, kRefsAtATime, &survey);

	for (;;)
	{
		for (int i = 0; i < waiting.count; i++)
		{
			view->ref = &waiting.refs[i];
			view->state = view->ref->ticket == blocked	  ? "blocked"
						  : (view->ref->flags & kInlined) ? "in doubt"
														  : "queued";
			ReadSegments(*view->ref, view->stream->id, PutSegment, view);
		}
		pfree(waiting.refs);
		if (waiting.complete)
			break;
		waiting = CollectMore(&survey, view->stream->id, after, kRefsAtATime);
	}
}

/* The streams whose data the caller may see. */
static List *
VisibleStreams()
{
	List *visible = NIL;
	ListCell *cell;

	foreach(cell, catalog::AllStreams())
		if (stats::MaySeeData(((const catalog::StreamRow *) lfirst(cell))->owner))
			visible = lappend(visible, lfirst(cell));
	return visible;
}

Datum
SqlQueuedChanges(FunctionCallInfo fcinfo)
{
	View view = {};
	ListCell *cell;

	shmem::RequireReady();
	InitMaterializedSRF(fcinfo, 0);
	view.result = (ReturnSetInfo *) fcinfo->resultinfo;
	view.per_segment =
		AllocSetContextCreate(CurrentMemoryContext, "mmrepl queue view", ALLOCSET_DEFAULT_SIZES);
	List *streams = VisibleStreams();

	/* Until the end of the transaction: what is listed must not be emptied meanwhile. */
	if (streams != NIL)
		for (Oid queue : catalog::GetRelations().queue)
			LockRelationOid(queue, AccessShareLock);
	foreach(cell, streams)
	{
		view.stream = (const catalog::StreamRow *) lfirst(cell);
		ForeignServer *server = GetForeignServerExtended(view.stream->server, FSV_MISSING_OK);

		view.server_name = server != NULL ? server->servername : "(dropped)";
		PutStream(&view);
	}
	PG_RETURN_NULL();
}

} // namespace mmrepl::queue
