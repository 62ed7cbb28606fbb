/*
 * stats.hpp
 *		Counters in shared memory, and who may see them.
 *
 * The functions know shared memory only; the views of the install script join
 * them with mmrepl.stream.  What belongs to a pair is shown by the room registration,
 * which knows whose the pair is.
 */
#pragma once

#include "mmrepl/pg.hpp"
#include "mmrepl/shmem.hpp"

namespace mmrepl::stats
{

/* Whether a place in one of the tables of counters is taken. */
enum class Place : uint32
{
	Free,
	Taken,
	Left /* was taken: free for a newcomer, but a search goes on behind it */
};

/* Counters of one pair, in shared memory. */
struct PairCounters
{
	pg_atomic_uint32 place; /* Place */
	Oid database;
	int32 pair_id;
	pg_atomic_uint64 inserts;
	pg_atomic_uint64 updates;
	pg_atomic_uint64 deletes;
	pg_atomic_uint64 truncates;
};

/* Bytes of shared memory, and its set-up; called by the shmem room's hooks through these pointers. */
Size SharedSize();
void InitShared(bool found, void *where);

/* The counters of a pair; NULL when the table is full (counting is then skipped). */
PairCounters *ForPair(Oid database, int32 pair_id);
PairCounters *FindPair(Oid database, int32 pair_id); /* NULL: nothing was counted */
void ForgetPair(Oid database, int32 pair_id);

/* Set a stream's error fields (rate-limiting of the log is the worker's). */
void SetError(shmem::Stream &stream, int sqlstate, const char *message);

/* A failure of delivery, as the view has it: all of it or nothing is seen. */
struct Setback
{
	TimestampTz at;
	shmem::WorkerState state;
	int failures; /* in a row; 0: it is no failed attempt */
	TimestampTz next_retry_at;
	uint64 blocked_ticket; /* 0: none */
};

/* Publishes it, and counts a failed attempt.  The log is to have it before: who sees it may look there. */
void SetSetback(shmem::Stream &stream, int sqlstate, const char *message, const Setback &setback);
void SetState(shmem::Stream &stream, shmem::WorkerState state);

/* A pause, or its end, from now on; the state that is shown follows. */
void SetPaused(shmem::Stream &stream, bool paused);
const char *StateName(shmem::WorkerState state);
/* The state as pg_stat_mmrepl has it; the caller holds the stream's mutex. */
shmem::WorkerState ShownState(const shmem::Stream &stream);

/* Count a conflict found here while applying what came from the peer's node. */
void CountConflict(const pg_uuid_t &origin, Oid relation);
/* Those of a table of this database with changes that came from the server's node. */
uint64 ConflictsOf(Oid relation, Oid server);

/* Whether the current user may see statistics / queued data of the pairs of a role. */
bool MaySeeStatistics(Oid owner);
bool MaySeeData(Oid owner);

/*
 * SQL: mmrepl.stat_streams(), mmrepl.reset_counters(server, pair ids) for
 * mmrepl.stat_reset(server), and mmrepl.may_see_statistics(owner).
 */
Datum StatStreams(FunctionCallInfo fcinfo);
Datum ResetCounters(FunctionCallInfo fcinfo);
Datum SqlMaySeeStatistics(FunctionCallInfo fcinfo);

} // namespace mmrepl::stats
