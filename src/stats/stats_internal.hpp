/*
 * stats_internal.hpp
 *		The tables of counters that the room's files share.
 */
#pragma once

#include "mmrepl/error.hpp"
#include "mmrepl/stats.hpp"

namespace mmrepl::stats
{

constexpr int kPlaces = 1024; /* in each table */

/* Conflicts met on a table with changes that came from a server's node. */
struct ConflictCounters
{
	pg_atomic_uint32 place; /* Place */
	Oid database;
	Oid relation;
	Oid server;
	pg_atomic_uint64 conflicts;
};

struct Shared
{
	slock_t mutex; /* taken to give away or leave a place; readers need none */
	PairCounters pairs[kPlaces];
	ConflictCounters conflicts[kPlaces];
};

/* The tables; NULL when the library was not preloaded. */
Shared *GetShared();

/* Whether an entry is taken; what it holds may be read after that. */
template <typename Entry>
inline bool
IsTaken(Entry &entry)
{
	bool taken = (Place) pg_atomic_read_u32(&entry.place) == Place::Taken;

	pg_read_barrier();
	return taken;
}

/* Count a conflict for pg_stat_mmrepl_pairs. */
void CountTableConflict(Oid relation, Oid server);

/* Set counters to zero. */
void ResetPair(PairCounters &counters);
void ResetConflicts(Oid server);

} // namespace mmrepl::stats
