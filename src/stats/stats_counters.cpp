/*
 * stats_counters.cpp
 *		Counters of pairs and of conflicts: two small open-addressing tables.
 *
 * A place is given away and left under the spinlock; searches and counting take
 * no lock.  Whoever holds a pointer to an entry that is given to another pair
 * meanwhile miscounts by a few, which statistics can bear.
 */
#include "stats_internal.hpp"

namespace mmrepl::stats
{

static Shared *shared;

Shared *
GetShared()
{
	return shared;
}

Size
SharedSize()
{
	return MAXALIGN(sizeof(Shared));
}

void
ResetPair(PairCounters &counters)
{
	shmem::SetToZero(counters.inserts, counters.updates, counters.deletes, counters.truncates);
}

/* Make a new entry's atomics usable. */
static void
InitEntry(PairCounters *entry)
{
	pg_atomic_init_u32(&entry->place, (uint32) Place::Free);
	pg_atomic_init_u64(&entry->inserts, 0);
	pg_atomic_init_u64(&entry->updates, 0);
	pg_atomic_init_u64(&entry->deletes, 0);
	pg_atomic_init_u64(&entry->truncates, 0);
}

static void
InitEntry(ConflictCounters *entry)
{
	pg_atomic_init_u32(&entry->place, (uint32) Place::Free);
	pg_atomic_init_u64(&entry->conflicts, 0);
}

void
InitShared(bool found, void *where)
{
	shared = (Shared *) where;
	if (found)
		return;
	memset(shared, 0, sizeof(*shared));
	SpinLockInit(&shared->mutex);
	for (PairCounters &entry : shared->pairs)
		InitEntry(&entry);
	for (ConflictCounters &entry : shared->conflicts)
		InitEntry(&entry);
}

/* ---- keys ---- */

struct PairKey
{
	Oid database;
	int32 pair_id;

	uint32 Hash() const { return murmurhash32(database) ^ murmurhash32((uint32) pair_id); }
	bool Matches(const PairCounters &entry) const
	{
		return entry.pair_id == pair_id && entry.database == database;
	}
	void Take(PairCounters *entry) const
	{
		entry->database = database;
		entry->pair_id = pair_id;
		ResetPair(*entry);
	}
};

struct ConflictKey
{
	Oid database;
	Oid relation;
	Oid server;

	uint32 Hash() const
	{
		return murmurhash32(database) ^ murmurhash32(relation + murmurhash32(server));
	}
	bool Matches(const ConflictCounters &entry) const
	{
		return entry.relation == relation && entry.server == server && entry.database == database;
	}
	void Take(ConflictCounters *entry) const
	{
		entry->database = database;
		entry->relation = relation;
		entry->server = server;
		pg_atomic_write_u64(&entry->conflicts, 0);
	}
};

/* ---- the tables ---- */

/*
 * The key's entry, or NULL.  When vacancy is given, it is set to the first
 * place that the key could take, or NULL when the table is full.
 */
template <typename Entry, typename Key>
static Entry *
Search(Entry *table, const Key &key, Entry **vacancy)
{
	uint32 start = key.Hash();

	if (vacancy != NULL)
		*vacancy = NULL;
	for (uint32 i = 0; i < kPlaces; i++)
	{
		Entry *entry = &table[(start + i) % kPlaces];

		if (IsTaken(*entry))
		{
			if (key.Matches(*entry))
				return entry;
			continue;
		}
		if (vacancy != NULL && *vacancy == NULL)
			*vacancy = entry;
		if ((Place) pg_atomic_read_u32(&entry->place) == Place::Free)
			return NULL;
	}
	return NULL;
}

/* The key's entry, made if need be; NULL when the table is full. */
template <typename Entry, typename Key>
static Entry *
SearchOrTake(Entry *table, const Key &key)
{
	Entry *vacancy;
	Entry *entry = Search(table, key, &vacancy);

	if (entry != NULL || vacancy == NULL)
		return entry;
	SpinLockAcquire(&shared->mutex);
	entry = Search(table, key, &vacancy);
	if (entry == NULL && vacancy != NULL)
	{
		key.Take(vacancy);
		pg_write_barrier();
		pg_atomic_write_u32(&vacancy->place, (uint32) Place::Taken);
		entry = vacancy;
	}
	SpinLockRelease(&shared->mutex);
	return entry;
}

/* Leave an entry's place to others. */
template <typename Entry>
static void
Leave(Entry *entry)
{
	SpinLockAcquire(&shared->mutex);
	pg_atomic_write_u32(&entry->place, (uint32) Place::Left);
	SpinLockRelease(&shared->mutex);
}

PairCounters *
ForPair(Oid database, int32 pair_id)
{
	if (shared == NULL)
		return NULL;
	return SearchOrTake(shared->pairs, PairKey{database, pair_id});
}

PairCounters *
FindPair(Oid database, int32 pair_id)
{
	if (shared == NULL)
		return NULL;
	return Search(shared->pairs, PairKey{database, pair_id}, (PairCounters **) NULL);
}

void
ForgetPair(Oid database, int32 pair_id)
{
	PairCounters *entry = FindPair(database, pair_id);

	if (entry != NULL)
		Leave(entry);
}

void
CountTableConflict(Oid relation, Oid server)
{
	ConflictCounters *entry =
		SearchOrTake(shared->conflicts, ConflictKey{MyDatabaseId, relation, server});

	if (entry != NULL)
		pg_atomic_fetch_add_u64(&entry->conflicts, 1);
}

uint64
ConflictsOf(Oid relation, Oid server)
{
	ConflictCounters *entry = Search(shared->conflicts, ConflictKey{MyDatabaseId, relation, server},
									 (ConflictCounters **) NULL);

	return entry == NULL ? 0 : pg_atomic_read_u64(&entry->conflicts);
}

/* Forget this database's conflicts with a server, or (InvalidOid) with all. */
void
ResetConflicts(Oid server)
{
	for (ConflictCounters &entry : shared->conflicts)
	{
		if (IsTaken(entry) && entry.database == MyDatabaseId &&
			(!OidIsValid(server) || entry.server == server))
			Leave(&entry);
	}
}

} // namespace mmrepl::stats
