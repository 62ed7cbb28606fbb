/*
 * pair_stats.cpp
 *		The SQL functions below pg_stat_mmrepl_pairs: counters of the pairs that
 *		the caller may see, whose they are is told by mmrepl.pair.
 */
#include "registration_internal.hpp"

#include "mmrepl/shmem.hpp"
#include "mmrepl/stats.hpp"

namespace mmrepl::registration
{

namespace
{

/* Call fn for each pair of which the caller may see the statistics. */
template <typename Fn>
void
ForEachShownPair(Fn fn)
{
	ListCell *cell;

	foreach(cell, AllPairRows())
	{
		const PairRow *row = (const PairRow *) lfirst(cell);

		if (stats::MaySeeStatistics(row->owner))
			fn(*row);
	}
}

/* Send a row without NULLs to the function's result. */
template <int columns>
void
PutRow(FunctionCallInfo fcinfo, Datum (&values)[columns])
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	bool nulls[columns] = {};

	MmreplEnsure(result->setDesc->natts == columns, "row has %d columns instead of %d", columns,
				 result->setDesc->natts);
	tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
}

/* A counter's value. */
Datum
Count(pg_atomic_uint64 *counter)
{
	return Int64GetDatum((int64) pg_atomic_read_u64(counter));
}

} // namespace

/* SQL: mmrepl.stat_pairs(). */
Datum
SqlStatPairs(FunctionCallInfo fcinfo)
{
	shmem::RequireReady();
	InitMaterializedSRF(fcinfo, 0);
	ForEachShownPair([&](const PairRow &row) {
		stats::PairCounters *counters = stats::FindPair(MyDatabaseId, row.id);

		if (counters == NULL)
			return;
		Datum values[] = {Int32GetDatum(row.id), Count(&counters->inserts),
						  Count(&counters->updates), Count(&counters->deletes),
						  Count(&counters->truncates)};

		PutRow(fcinfo, values);
	});
	return (Datum) 0;
}

/* SQL: mmrepl.stat_conflicts(). */
Datum
SqlStatConflicts(FunctionCallInfo fcinfo)
{
	shmem::RequireReady();
	InitMaterializedSRF(fcinfo, 0);
	ForEachShownPair([&](const PairRow &row) {
		Oid server = get_foreign_server_oid(row.server, true);
		uint64 conflicts = stats::ConflictsOf(row.table, server);

		if (conflicts == 0)
			return;
		Datum values[] = {ObjectIdGetDatum(row.table), ObjectIdGetDatum(server),
						  Int64GetDatum((int64) conflicts)};

		PutRow(fcinfo, values);
	});
	return (Datum) 0;
}

} // namespace mmrepl::registration
