/*
 * queue_collect.cpp
 *		Collecting what waits, lowest tickets first, a bounded number at a time.
 *
 * One pass over the tables finds the lowest tickets, and notes, in a survey, in
 * which blocks the others stand.  Further readings go to those blocks only, so
 * that a backlog costs two looks at each of its rows, however large it is.  The
 * README says why nothing is missed.
 */
#include "queue_internal.hpp"

namespace mmrepl::queue
{

#ifdef MMREPL_FAULT_POINTS
constexpr BlockNumber kZoneBlocks = 1; /* so that a test has many zones */
#else
constexpr BlockNumber kZoneBlocks = 64; /* at least */
#endif
constexpr BlockNumber kMaxZones = 16384; /* a larger queue has larger zones */

/* ---- the lowest tickets ---- */

static int
CompareRefs(const void *left, const void *right)
{
	uint64 a = ((const Ref *) left)->ticket;
	uint64 b = ((const Ref *) right)->ticket;

	return a < b ? -1 : a > b ? 1 : 0;
}

/* The lowest `limit` refs seen so far, kept in an array of twice that size. */
struct Lowest
{
	Ref *refs;
	int count;
	int limit;
	uint64 cutoff; /* higher tickets are not wanted any more */
	bool dropped;

	void Start(int how_many)
	{
		*this = {};
		limit = how_many;
		cutoff = PG_UINT64_MAX;
		refs = (Ref *) MemoryContextAllocHuge(CurrentMemoryContext, sizeof(Ref) * 2 * limit);
	}
	void Add(const Ref &ref)
	{
		if (ref.ticket > cutoff)
		{
			dropped = true;
			return;
		}
		refs[count++] = ref;
		if (count == 2 * limit)
			Cut();
	}
	/* Sort them; with enough of them, higher tickets than theirs are not wanted. */
	void Cut()
	{
		qsort(refs, count, sizeof(Ref), CompareRefs);
		if (count < limit)
			return;
		dropped |= count > limit;
		count = limit;
		cutoff = refs[limit - 1].ticket;
	}
	/* Whether nothing with this ticket or a higher one is wanted. */
	bool Excludes(uint64 ticket)
	{
		if (count > limit || (count == limit && cutoff == PG_UINT64_MAX))
			Cut();
		return ticket > cutoff;
	}
	Collected Result()
	{
		Collected result = {};

		Cut();
		result.refs = refs;
		result.count = count;
		result.complete = !dropped;
		return result;
	}
};

Ref
RefOf(uint32 table, const Row &row, const ItemPointerData &tid)
{
	Ref ref = {};

	ref.ticket = row.ticket;
	ref.xid = row.xid;
	ref.tid = tid;
	ref.flags = row.flags;
	ref.table = table;
	ref.changes = row.changes;
	ref.bytes = row.payload_length;
	if (row.flags & kChunked)
		ref.bytes = ReadPlace(row.payload, row.payload_length).bytes;
	return ref;
}

/* ---- the survey ---- */

/* Blocks of a zone, so that all tables together have a bounded number of zones. */
static BlockNumber
ZoneBlocks()
{
	return Max(kZoneBlocks, (BlockNumber) (QueueBlocks() / kMaxZones + 1));
}

/* The zone of the block, which no block noted before lies behind. */
static Zone *
ZoneOf(Survey *survey, uint32 table, BlockNumber block)
{
	Zone *last = survey->count > 0 ? &survey->zones[survey->count - 1] : NULL;

	if (last != NULL && last->table == table &&
		last->first / survey->zone_blocks == block / survey->zone_blocks)
		return last;
	if (survey->count == survey->room)
	{
		survey->room = Max(survey->room * 2, 64);
		survey->zones =
			survey->zones == NULL
				? (Zone *) MemoryContextAlloc(survey->context, sizeof(Zone) * survey->room)
				: (Zone *) repalloc(survey->zones, sizeof(Zone) * survey->room);
	}
	last = &survey->zones[survey->count++];
	*last = {};
	last->table = table;
	last->first = block;
	last->min = last->low = PG_UINT64_MAX;
	return last;
}

static void
Note(Survey *survey, uint32 table, const Row &row, const ItemPointerData &tid)
{
	BlockNumber block = ItemPointerGetBlockNumber(&tid);
	Zone *zone = ZoneOf(survey, table, block);

	zone->last = block;
	zone->min = zone->low = Min(zone->min, row.ticket);
	zone->max = Max(zone->max, row.ticket);
	zone->late |= (row.flags & kPrepared) != 0;
}

/* Everything up to the ticket has been read. */
static void
Advance(Survey *survey, uint64 ticket)
{
	for (int i = 0; i < survey->count; i++)
	{
		Zone *zone = &survey->zones[i];

		if (zone->low <= ticket)
			zone->low = zone->max > ticket ? ticket + 1 : PG_UINT64_MAX;
	}
}

bool
RewindSurvey(Survey *survey, uint64 after)
{
	if (after < survey->after)
		return false;
	for (int i = 0; i < survey->count; i++)
	{
		Zone *zone = &survey->zones[i];

		zone->low = zone->max > after || zone->late ? zone->min : PG_UINT64_MAX;
	}
	return true;
}

static int
CompareZones(const void *left, const void *right)
{
	uint64 a = ((const Zone *) left)->low;
	uint64 b = ((const Zone *) right)->low;

	return a < b ? -1 : a > b ? 1 : 0;
}

/* ---- collecting ---- */

static Asked
Ask(const Survey &survey, int32 stream, uint64 after)
{
	return {stream, after, survey.discarded_too ? 0 : DiscardedUpTo(stream)};
}

Collected
Collect(int32 stream, uint64 after, uint64 before, int limit, Survey *survey)
{
	bool late_beyond = false;
	Asked asked = Ask(*survey, stream, after);
	Lowest lowest;

	lowest.Start(limit);
	*survey = {survey->context != NULL ? survey->context : CurrentMemoryContext,
			   survey->discarded_too};
	survey->after = after;
	survey->before = before;
	survey->zone_blocks = ZoneBlocks();
	WithLatestSnapshot([&] {
		ScanQueue([&](uint32 table, const Row &row, const ItemPointerData &tid) {
			if (!Waits(row, asked))
				return;
			if (row.ticket < before)
			{
				lowest.Add(RefOf(table, row, tid));
				Note(survey, table, row, tid);
			}
			else if (row.flags & kPrepared)
				late_beyond = true;
		});
	});
	Collected result = lowest.Result();

	result.late_beyond = late_beyond;
	result.given_up = asked.discarded == shmem::kNeedsResync;
	Advance(survey, result.complete ? PG_UINT64_MAX : lowest.cutoff);
	return result;
}

/* What waits in the zone and has not been read. */
static void
CollectZone(const Survey *survey, const Zone &zone, const Asked &asked, Lowest *lowest)
{
	Relation rel = table_open(catalog::GetRelations().queue[zone.table], AccessShareLock);

	ScanTable(rel, zone.first, zone.last, [&](const Row &row, const ItemPointerData &tid) {
		if (Waits(row, asked) && row.ticket >= zone.low && row.ticket < survey->before)
			lowest->Add(RefOf(zone.table, row, tid));
	});
	table_close(rel, AccessShareLock);
}

Collected
CollectMore(Survey *survey, int32 stream, uint64 after, int limit)
{
	Asked asked = Ask(*survey, stream, after);
	Lowest lowest;

	lowest.Start(limit);
	qsort(survey->zones, survey->count, sizeof(Zone), CompareZones);
	WithLatestSnapshot([&] {
		for (int i = 0; i < survey->count; i++)
		{
			const Zone &zone = survey->zones[i];

			if (zone.low == PG_UINT64_MAX)
				break;
			if (lowest.Excludes(zone.low))
			{
				lowest.dropped = true;
				break;
			}
			CollectZone(survey, zone, asked, &lowest);
		}
	});
	Collected result = lowest.Result();

	result.given_up = asked.discarded == shmem::kNeedsResync;
	Advance(survey, result.complete ? PG_UINT64_MAX : lowest.cutoff);
	return result;
}

} // namespace mmrepl::queue
