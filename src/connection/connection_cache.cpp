/*
 * connection_cache.cpp
 *		The session's cached connections, one for each server and owner.
 *
 * Changes of servers, mappings, wrappers and roles only mark the entries; a
 * marked connection is compared with its new options when it is asked for, and
 * others are closed then if they are idle.  A connection with an open
 * transaction is never closed here: somebody holds it.  Each has a place among
 * those that mmrepl.max_peer_connections allows.
 */
#include "connection_internal.hpp"

#include "mmrepl/guc.hpp"

namespace mmrepl::connection
{

namespace
{

constexpr int kDrainRounds = 16; /* reads of an idle connection before it is taken for broken */

struct Key
{
	Oid server;
	Oid owner;
};

struct Entry
{
	Key key; /* first: the hash key */
	PGconn *conn;
	uint32 hash; /* of the options that it was made from */
	bool invalidated;
	int place; /* -1: none, or not counted */
};

HTAB *cache = NULL;

/* Run fn for every entry; fn must not add or remove entries. */
template <typename Fn>
void
ForEach(Fn fn)
{
	HASH_SEQ_STATUS scan;

	hash_seq_init(&scan, cache);
	while (Entry *entry = (Entry *) hash_seq_search(&scan))
		fn(entry);
}

/* Give an entry's connection up; raises nothing. */
void
CloseEntry(Entry *entry)
{
	PGconn *conn = entry->conn;

	entry->conn = NULL;
	Close(conn);
	LeavePlace(entry->place);
	entry->place = -1;
}

/* Syscache callback: something that connections are made from has changed. */
void
Invalidate(Datum, int, uint32)
{
	ForEach([](Entry *entry) { entry->invalidated = true; });
}

/* Make the cache with its callbacks on first use. */
void
Prepare()
{
	HASHCTL control = {};

	if (cache != NULL)
		return;
	control.keysize = sizeof(Key);
	control.entrysize = sizeof(Entry);
	control.hcxt = TopMemoryContext;
	cache = hash_create("mmrepl connections", 8, &control, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, Invalidate, (Datum) 0);
	CacheRegisterSyscacheCallback(FOREIGNDATAWRAPPEROID, Invalidate, (Datum) 0);
	CacheRegisterSyscacheCallback(USERMAPPINGOID, Invalidate, (Datum) 0);
	CacheRegisterSyscacheCallback(AUTHOID, Invalidate, (Datum) 0);
}

/* The entry of a server and owner, made if need be. */
Entry *
EntryOf(Oid server, Oid owner)
{
	Key key = {server, owner};
	bool found;
	Entry *entry;

	Prepare();
	entry = (Entry *) hash_search(cache, &key, HASH_ENTER, &found);
	if (!found)
	{
		entry->conn = NULL;
		entry->hash = 0;
		entry->invalidated = false;
		entry->place = -1;
	}
	return entry;
}

/* Whether somebody has a transaction open on it. */
bool
InTransaction(PGconn *conn)
{
	PGTransactionStatusType status = PQtransactionStatus(conn);

	return status == PQTRANS_INTRANS || status == PQTRANS_INERROR;
}

/*
 * Whether an idle connection is alive as far as one can see without asking.
 * Data on it are a message that the peer sent by itself (a changed parameter, a
 * notice) or its end; they are read and judged.
 */
bool
Alive(PGconn *conn)
{
	if (PQtransactionStatus(conn) != PQTRANS_IDLE)
		return false;
	for (int round = 0; Readable(conn); round++)
	{
		if (round == kDrainRounds || PQconsumeInput(conn) == 0 || PQisBusy(conn))
			return false;
	}
	return PQstatus(conn) == CONNECTION_OK;
}

/* Close the other entries' connections that may be out of date and that nobody uses. */
void
CloseStale(const Entry *wanted)
{
	ForEach([&](Entry *entry) {
		if (entry != wanted && entry->invalidated &&
			PQtransactionStatus(entry->conn) == PQTRANS_IDLE)
			CloseEntry(entry);
	});
}

/*
 * The target as the catalogs have it now.  The mark is taken off first: it may
 * be set again while the catalogs are read.
 */
Target *
ResolveEntry(Entry *entry)
{
	entry->invalidated = false;
	return Resolve(entry->key.server, entry->key.owner);
}

/* Whether an entry's connection was made from options that hold no more. */
bool
Outdated(Entry *entry)
{
	bool outdated = false;

	if (entry->invalidated)
		Guarded([&] { outdated = ResolveEntry(entry)->hash != entry->hash; },
				[&] { CloseEntry(entry); });
	return outdated;
}

/* Open an entry's connection; false with *failure filled when it cannot be had. */
bool
OpenEntry(Entry *entry, TimestampTz deadline, Failure *failure)
{
	Target *target = ResolveEntry(entry);
	auto give_up = [&] { CloseEntry(entry); };
	int place; /* the entry's only when it was got */

	EndDoomed(); /* one may have this entry's place still */
	if (!TakePlace(entry->key.server, entry->key.owner, target->server_name, deadline, &place,
				   failure))
		return false;
	entry->place = place;
	Guarded(
		[&] {
			entry->conn = Open(target, Min(deadline, DeadlineIn(guc::connect_timeout)), failure);
		},
		give_up);
	entry->hash = target->hash;
	if (entry->conn == NULL)
		give_up();
	return entry->conn != NULL;
}

} // namespace

/*
 * The session's connection, alive and up to date as far as one can see; NULL
 * with *failure filled when it cannot be had.
 */
PGconn *
TryCached(Oid server, Oid owner, TimestampTz deadline, bool *fresh, Failure *failure)
{
	Entry *entry = EntryOf(server, owner);

	*fresh = false;
	CloseStale(entry);
	if (entry->conn != NULL)
		UsePlace(entry->place);
	if (entry->conn != NULL && InTransaction(entry->conn))
		return entry->conn;
	if (entry->conn != NULL && (!Alive(entry->conn) || Outdated(entry)))
		CloseEntry(entry);
	if (entry->conn != NULL)
		return entry->conn;
	*fresh = true;
	return OpenEntry(entry, deadline, failure) ? entry->conn : NULL;
}

/* The same, or an error. */
PGconn *
GetCached(Oid server, Oid owner, TimestampTz deadline, bool *fresh)
{
	Failure failure;
	PGconn *conn = TryCached(server, owner, deadline, fresh, &failure);

	if (conn == NULL)
		ReportFailure(&failure, GetForeignServer(server)->servername, NULL);
	return conn;
}

/* The entry if there is one; raises nothing and allocates nothing. */
static Entry *
FindEntry(Oid server, Oid owner)
{
	Key key = {server, owner};

	return cache == NULL ? NULL : (Entry *) hash_search(cache, &key, HASH_FIND, NULL);
}

const Notes *
NotesOfCached(Oid server, Oid owner)
{
	const Entry *entry = FindEntry(server, owner);

	return entry == NULL || entry->conn == NULL ? NULL : NotesOf(entry->conn);
}

/* Close the cached connection if there is one; raises nothing and allocates nothing. */
void
DropCached(Oid server, Oid owner)
{
	Entry *entry = FindEntry(server, owner);

	if (entry != NULL)
		CloseEntry(entry);
}

/* The same, when EndDoomed() has tried to end its session at the peer. */
void
DoomCached(Oid server, Oid owner, bool only_waiting)
{
	Entry *entry = FindEntry(server, owner);

	if (entry == NULL || entry->conn == NULL)
		return;
	Doom({entry->conn, only_waiting, entry->place});
	entry->conn = NULL;
	entry->place = -1;
}

/* Others wait for it, or there are more than are allowed. */
void
RestCached()
{
	if (cache == NULL)
		return;
	ForEach([](Entry *entry) {
		if (entry->conn == NULL || PQtransactionStatus(entry->conn) != PQTRANS_IDLE ||
			!RestPlace(entry->place))
			return;
		CloseAwaited(entry->conn);
		entry->conn = NULL;
		YieldPlace(entry->place);
		entry->place = -1;
	});
}

/*
 * The process ends, and others wait for its places: the peers' sessions end before
 * the places are given away, or there would be more than are allowed.
 */
void
CloseWanted()
{
	if (cache == NULL)
		return;
	ForEach([](Entry *entry) {
		if (entry->conn == NULL || PQtransactionStatus(entry->conn) == PQTRANS_ACTIVE ||
			!PlaceIsWanted(entry->place))
			return;
		CloseAwaited(entry->conn);
		entry->conn = NULL;
	});
}

} // namespace mmrepl::connection
