/*
 * sync_pipeline.cpp
 *		One round trip of a remote transaction: everything that has to happen at
 *		the peer for a part of the segments goes out in one libpq pipeline.
 *
 * In the pipeline stand, as far as they are needed: BEGIN, the release of
 * savepoints of ended subtransactions, the marker, savepoints up to the current
 * nest level, apply().  The marker of a transaction that first writes in a
 * subtransaction travels in a batch of its own before the savepoints, so that no
 * ROLLBACK TO SAVEPOINT can take it away.  Answers come in the same order, and
 * each moves the work by one step: whatever happens, the work knows where the
 * peer stands.
 */
#include "sync_internal.hpp"

#include "mmrepl/catalog.hpp"
#include "mmrepl/delivery.hpp"
#include "mmrepl/fault.hpp"

namespace mmrepl::sync
{

namespace
{

using change::Segment;

constexpr int kPartBytes = 4 * 1024 * 1024; /* of segments in one batch */

/* What a successful answer means for the work. */
enum Step : char
{
	kBegin = 'B',
	kRelease = 'R',
	kSavepoint = 'S',
	kApply = 'A'
};

/* Queue a command without parameters. */
void
QueueSql(Pipeline *pipeline, Step step, const char *sql)
{
	if (!pipeline->sent)
		return;
	pipeline->sent = PQsendQueryParams(pipeline->conn, sql, 0, NULL, NULL, NULL, NULL, 0) == 1;
	appendStringInfoChar(&pipeline->steps, step);
}

void
QueueBegin(Pipeline *pipeline)
{
	pipeline->sent = pipeline->sent && delivery::SendBegin(pipeline->conn);
	appendStringInfoChar(&pipeline->steps, kBegin);
}

/* Microseconds since the Unix epoch, which is what the ticket clock counts. */
uint64
ClockNow()
{
	constexpr int64 kEpochs = (int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY;

	return (uint64) (GetCurrentTimestamp() + kEpochs);
}

/* Queue a batch of the segments from first up to, not including, end. */
void
QueueBatch(Pipeline *pipeline, const Segment *first, const Segment *end)
{
	const Request *request = pipeline->request;
	delivery::Batch batch;
	delivery::Header header = {};

	if (!pipeline->sent)
		return;
	header.flags = batch::kInline | (pipeline->parts == 0 ? batch::kFirst : 0) |
				   (end != NULL || request->work->goes_on ? batch::kMore : 0) |
				   (request->work->relaxed ? batch::kRelaxed : 0);
	header.node = catalog::NodeId();
	header.stream = request->work->stream;
	header.clock = ClockNow();
	header.part = pipeline->parts;

	delivery::Begin(&batch, header);
	delivery::AddTransaction(&batch, 0, request->xid, 0, 0);
	for (const Segment *segment = first; segment != end; segment = segment->next)
	{
		if (segment->sent)
			continue;
		MmreplEnsure(!segment->spilled, "segment %u was spilled before it was sent", segment->seq);
		delivery::AddSegment(&batch, segment->data + VARHDRSZ, segment->length);
		batch.changes += segment->changes;
	}
	pipeline->sent = delivery::Send(pipeline->conn, &batch);
	pipeline->parts++;
	appendStringInfoChar(&pipeline->steps, kApply);
	pfree(batch.buf.data);
}

/* Queue what must stand at the peer before the segments do. */
void
QueuePrelude(Pipeline *pipeline)
{
	const Request *request = pipeline->request;
	const Work *work = request->work;
	int level = work->begun ? work->remote_level : 1;
	char sql[64];

	if (!work->begun)
		QueueBegin(pipeline);
	if (work->release_level > 0)
	{
		snprintf(sql, sizeof(sql), "RELEASE SAVEPOINT s%d", work->release_level);
		QueueSql(pipeline, kRelease, sql);
		level = work->release_level - 1;
	}
	if (work->parts == 0 && level < request->nest_level)
		QueueBatch(pipeline, NULL, NULL);
	while (++level <= request->nest_level)
	{
		snprintf(sql, sizeof(sql), "SAVEPOINT s%d", level);
		QueueSql(pipeline, kSavepoint, sql);
	}
}

/* The end of the part that starts at first: some megabytes further on, or NULL. */
Segment *
EndOfPart(Segment *first)
{
	Size bytes = 0;
	Segment *segment = first;

	while (segment != NULL && (segment == first || bytes + segment->length <= kPartBytes))
	{
		if (!segment->sent)
			bytes += segment->length;
		segment = segment->next;
	}
	return segment;
}

/* The peer has done a step. */
void
Advance(Work *work, char step)
{
	switch (step)
	{
		case kBegin:
			work->begun = true;
			work->remote_level = 1;
			break;
		case kRelease:
			work->remote_level = work->release_level - 1;
			work->release_level = 0;
			break;
		case kSavepoint:
			work->remote_level++;
			break;
		case kApply:
			work->parts++;
			break;
		default:
			break;
	}
}

/*
 * Take one result in; the outcome becomes Refused at the first error, whose fields
 * are kept (what follows it in the pipeline is only told to be aborted), and
 * Lost when the session is over.
 */
void
TakeResult(Pipeline *pipeline, const PGresult *res, char step)
{
	Outcome *outcome = &pipeline->outcome;
	ExecStatusType status = PQresultStatus(res);

	if (status == PGRES_COMMAND_OK || status == PGRES_TUPLES_OK)
	{
		Advance(pipeline->request->work, step);
		if (step == kApply && delivery::ReadWatermark(res) == batch::kMayDefer)
			pipeline->request->work->may_defer = true;
		return;
	}
	if (*outcome == Outcome::Done)
	{
		connection::Describe(pipeline->conn, res, pipeline->request->failure);
		*outcome = Outcome::Refused;
	}
	if (connection::WasLost(pipeline->conn, res))
		*outcome = Outcome::Lost;
}

/* Fill the failure with what libpq says, unless the peer said something before. */
Outcome
LostUnless(Pipeline *pipeline, Outcome outcome)
{
	if (outcome == Outcome::Done)
		connection::Describe(pipeline->conn, NULL, pipeline->request->failure);
	return Outcome::Lost;
}

/* The peer is silent: neither refusal nor answer. */
Outcome
TimedOut(Pipeline *pipeline)
{
	connection::Failure *failure = pipeline->request->failure;

	*failure = {};
	failure->sqlstate = ERRCODE_MMREPL_SYNC_TIMEOUT;
	failure->message =
		psprintf("server \"%s\" did not answer in time", pipeline->request->work->server_name);
	failure->hint = pstrdup("mmrepl.sync_timeout bounds the wait.");
	return Outcome::Lost;
}

/*
 * Take the answers in until the parts that were sent have all ended, the session
 * is lost or the deadline has passed: then false, and what has come is taken.
 */
bool
TakeAnswers(Pipeline *pipeline, TimestampTz deadline)
{
	while (pipeline->syncs > 0 && pipeline->outcome != Outcome::Lost)
	{
		PGresult *res;

		if (!connection::NextResult(pipeline->conn, deadline, &res))
			return false;
		if (res == NULL) /* one command is complete */
		{
			if (PQstatus(pipeline->conn) != CONNECTION_OK ||
				pipeline->step++ >= pipeline->steps.len)
				pipeline->outcome = LostUnless(pipeline, pipeline->outcome);
			continue;
		}
		Ensured(
			[&] {
				if (PQresultStatus(res) == PGRES_PIPELINE_SYNC)
					pipeline->syncs--;
				else
					TakeResult(pipeline, res, pipeline->steps.data[pipeline->step]);
			},
			[&] { PQclear(res); });
	}
	return true;
}

/* Make ready for parts of a remote transaction; the steps live in the current context. */
void
StartPipeline(Pipeline *pipeline, const Request *request)
{
	pipeline->request = request;
	pipeline->conn = request->work->conn;
	pipeline->parts = request->work->parts;
	pipeline->sent = PQenterPipelineMode(pipeline->conn) == 1;
	initStringInfo(&pipeline->steps);
	QueuePrelude(pipeline);
}

/* Send a part, behind those that were sent before; false when libpq cannot. */
bool
SendSegments(Pipeline *pipeline, const Segment *first, const Segment *end)
{
	QueueBatch(pipeline, first, end);
	pipeline->sent = pipeline->sent && PQpipelineSync(pipeline->conn) == 1;
	pipeline->syncs += pipeline->sent;
	return pipeline->sent;
}

/* Wait for the answers to what was sent. */
Outcome
FinishPipeline(Pipeline *pipeline)
{
	MMREPL_FAULT_POINT("sync-part-sent");
	if (!TakeAnswers(pipeline, pipeline->request->deadline))
		pipeline->outcome = TimedOut(pipeline);

	MMREPL_FAULT_POINT("sync-part-answer");
	if (pipeline->outcome != Outcome::Lost && PQexitPipelineMode(pipeline->conn) != 1)
		pipeline->outcome = LostUnless(pipeline, pipeline->outcome);
	pfree(pipeline->steps.data);
	return pipeline->outcome;
}

} // namespace

/* One round trip with the next part of the segments; see the private header. */
Outcome
SendPart(const Request &request, Segment **next)
{
	Pipeline pipeline = {};
	Segment *end = EndOfPart(*next);

	StartPipeline(&pipeline, &request);
	if (!SendSegments(&pipeline, *next, end))
		return LostUnless(&pipeline, Outcome::Done);
	*next = end;
	return FinishPipeline(&pipeline);
}

Posted *
StartPost(const Request &request, Segment *first)
{
	Posted *posted = (Posted *) MemoryContextAllocZero(TopTransactionContext, sizeof(Posted));

	posted->request = request;
	posted->request.failure = &posted->failure;
	posted->kept = request.work->parts;
	posted->first = first;
	return posted;
}

/* What libpq keeps in its buffer goes out with the first look at the answers. */
void
PostPart(Posted *posted, Segment *from)
{
	Segment *end = EndOfPart(from);

	InContext(TopTransactionContext, [&] {
		if (posted->last == NULL)
			StartPipeline(&posted->pipeline, &posted->request);
		if (!SendSegments(&posted->pipeline, from, end))
			posted->outcome = LostUnless(&posted->pipeline, Outcome::Done);
	});
	for (Segment *segment = from; segment != end; segment = segment->next)
	{
		posted->last = segment;
		posted->bytes += segment->length;
	}
}

bool
MayPost(const Posted *posted)
{
	return posted->outcome == Outcome::Done && posted->bytes < kPartBytes;
}

bool
Arrived(Posted *posted)
{
	if (posted->outcome != Outcome::Done || posted->last == NULL)
		return true;
	return TakeAnswers(&posted->pipeline, GetCurrentTimestamp()) ||
		   posted->pipeline.outcome != Outcome::Done;
}

Outcome
FinishPost(const Request &request, Segment **next, bool *fresh)
{
	Posted *posted = request.work->posted;
	Outcome outcome = posted->outcome;

	request.work->posted = NULL;
	*fresh = posted->fresh;
	if (!posted->expected)
		posted->request.deadline = request.deadline;
	if (outcome == Outcome::Done)
		outcome = FinishPipeline(&posted->pipeline);
	*request.failure = posted->failure;
	if (posted->last != NULL)
		*next = posted->last->next;
	pfree(posted);
	return outcome;
}

} // namespace mmrepl::sync
