/*
 * stats_streams.cpp
 *		Setting and counting in a stream's block of shared memory.
 */
#include "stats_internal.hpp"

namespace mmrepl::stats
{

const char *
StateName(shmem::WorkerState state)
{
	switch (state)
	{
		case shmem::WorkerState::Starting:
			return "starting";
		case shmem::WorkerState::Streaming:
			return "streaming";
		case shmem::WorkerState::CatchingUp:
			return "catching up";
		case shmem::WorkerState::Retrying:
			return "retrying";
		case shmem::WorkerState::Paused:
			return "paused";
		case shmem::WorkerState::Blocked:
			return "blocked";
		case shmem::WorkerState::NeedsResync:
			return "needs resync";
	}
	return "unknown";
}

void
SetState(shmem::Stream &stream, shmem::WorkerState state)
{
	SpinLockAcquire(&stream.mutex);
	stream.state = state;
	SpinLockRelease(&stream.mutex);
}

/*
 * Copy a message, cut at a character boundary.  What a peer said before the
 * encoding was agreed on may be invalid here: such bytes become question marks.
 */
static void
CopyMessage(char *target, const char *message)
{
	int length = (int) strlen(message);

	if (pg_verifymbstr(message, length, true))
		length = pg_mbcliplen(message, length, shmem::kErrorLength - 1);
	else
		length = Min(length, shmem::kErrorLength - 1);
	memcpy(target, message, length);
	target[length] = '\0';
	if (pg_verifymbstr(target, length, true))
		return;
	for (char *at = target; *at != '\0'; at++)
	{
		if (IS_HIGHBIT_SET(*at))
			*at = '?';
	}
}

/* The error's part of the slot, whose spinlock is held; `text` is a whole buffer. */
static void
PutError(shmem::Stream &stream, int sqlstate, const char *text, TimestampTz at)
{
	memcpy(stream.last_error, text, shmem::kErrorLength);
	memcpy(stream.last_error_sqlstate, unpack_sql_state(sqlstate),
		   sizeof(stream.last_error_sqlstate));
	stream.last_error_at = at;
}

void
SetError(shmem::Stream &stream, int sqlstate, const char *message)
{
	char text[shmem::kErrorLength];
	TimestampTz now = GetCurrentTimestamp();

	CopyMessage(text, message != NULL ? message : "");
	SpinLockAcquire(&stream.mutex);
	PutError(stream, sqlstate, text, now);
	SpinLockRelease(&stream.mutex);
}

void
SetSetback(shmem::Stream &stream, int sqlstate, const char *message, const Setback &setback)
{
	char text[shmem::kErrorLength];

	CopyMessage(text, message != NULL ? message : "");
	SpinLockAcquire(&stream.mutex);
	PutError(stream, sqlstate, text, setback.at);
	stream.state = setback.state;
	stream.consecutive_failures = setback.failures;
	stream.next_retry_at = setback.next_retry_at;
	stream.blocked_ticket = setback.blocked_ticket;
	if (setback.failures > 0)
		pg_atomic_fetch_add_u64(&stream.counters.retries, 1);
	SpinLockRelease(&stream.mutex);
}

void
SetPaused(shmem::Stream &stream, bool paused)
{
	SpinLockAcquire(&stream.mutex);
	stream.paused = paused;
	if (paused)
		stream.state = shmem::WorkerState::Paused;
	else if (stream.state == shmem::WorkerState::Paused)
		stream.state = shmem::WorkerState::Starting;
	SpinLockRelease(&stream.mutex);
}

/* Whether the stream is this database's and leads to the node. */
static bool
LeadsTo(shmem::Stream &stream, const pg_uuid_t &node)
{
	if (!stream.in_use || stream.database != MyDatabaseId)
		return false;
	SpinLockAcquire(&stream.mutex);
	bool result = stream.peer_known && memcmp(&stream.peer_node, &node, sizeof(pg_uuid_t)) == 0;
	SpinLockRelease(&stream.mutex);
	return result;
}

/*
 * Conflicts are shown with the way to the peer they came from; changes of a
 * peer that nothing goes back to are counted in mmrepl.progress only.
 */
void
CountConflict(const pg_uuid_t &origin, Oid relation)
{
	if (!shmem::Ready())
		return;
	for (int i = 0; i < guc::max_servers; i++)
	{
		shmem::Stream &stream = shmem::Get().streams[i];

		if (!LeadsTo(stream, origin))
			continue;
		pg_atomic_fetch_add_u64(&stream.counters.conflicts, 1);
		CountTableConflict(relation, stream.server);
		return;
	}
}

} // namespace mmrepl::stats
