/*
 * connection_places.cpp
 *		The bound on the connections that this node's sessions keep to one peer.
 *
 * A cached connection has a place, counted in shared memory for its server and
 * owner.  A session that finds none free stands in line.  Whoever ends a
 * transaction while somebody stands there gives its own connection up; one that
 * sits idle at its client is asked to, by the signal with which the server wakes
 * idle sessions to read invalidations: it runs an empty transaction, and that one's
 * end is such an end.  A place that is free goes to the first in line.  Whoever
 * has got one may keep it for some milliseconds: else each transaction of many
 * would have to connect.
 *
 * The LWLock `places` guards everything but the words that are atomic.
 */
#include "connection_internal.hpp"

#include "mmrepl/base.hpp"
#include "mmrepl/guc.hpp"
#include "mmrepl/shmem.hpp"

namespace mmrepl::connection
{

namespace
{

constexpr int kPools = shmem::kMaxStreams;
constexpr long kAskAgain = 1000; /* ms: somebody may have become idle without being seen */
constexpr int kLease = 20;		 /* ms: that a place may be kept at least */

/* The connections of one server and owner. */
struct Pool
{
	Oid database;
	Oid server;
	Oid owner;
	int held;				  /* places taken, and granted */
	int leaving;			  /* of these, on their way to being given back for those in line */
	pg_atomic_uint32 waiting; /* sessions in line */
};

/* What one process has and wants. */
struct Seat
{
	pg_atomic_uint64 idle; /* mask of pools: its connection has no transaction open */
	uint64 held;		   /* mask of pools */
	uint64 asked;		   /* mask of pools: it was woken to give the place up */
	TimestampTz since;	   /* it got its newest place */
	int wanted;			   /* the pool that it stands in line for; -1: none */
	uint64 turn;		   /* lower ones come first */
	pg_atomic_uint32 granted;
	int pid;
	Latch *latch;
};

struct Shared
{
	int bound; /* the setting, as whoever has read it last knows it; 0: none */
	TimestampTz bound_as_of;
	uint64 last_turn;
	Pool pools[kPools];
	Seat seats[FLEXIBLE_ARRAY_MEMBER]; /* by index of the process */
};

Shared *shared;

uint64
Bit(int pool)
{
	return UINT64CONST(1) << pool;
}

Seat &
Mine()
{
	return shared->seats[MyProcIndex()];
}

template <typename Fn>
auto
Locked(Fn fn)
{
	LWLockAcquire(shmem::Get().places, LW_EXCLUSIVE);
	if constexpr (__is_same(decltype(fn()), void))
	{
		fn();
		LWLockRelease(shmem::Get().places);
	}
	else
	{
		auto result = fn();

		LWLockRelease(shmem::Get().places);
		return result;
	}
}

/* ---- under the lock ---- */

/* The pool of a server and owner, begun if need be; -1 when there is no room for it. */
int
FindPool(Oid server, Oid owner)
{
	int unused = -1;

	for (int i = 0; i < kPools; i++)
	{
		Pool &pool = shared->pools[i];

		if (pool.held == 0 && pg_atomic_read_u32(&pool.waiting) == 0)
			unused = unused < 0 ? i : unused;
		else if (pool.database == MyDatabaseId && pool.server == server && pool.owner == owner)
			return i;
	}
	if (unused >= 0)
	{
		shared->pools[unused].database = MyDatabaseId;
		shared->pools[unused].server = server;
		shared->pools[unused].owner = owner;
	}
	return unused;
}

/* Whoever has stood in line for the longest time. */
Seat *
FirstInLine(int pool)
{
	Seat *first = NULL;

	for (int i = 0; i < MaxBackends; i++)
	{
		Seat &seat = shared->seats[i];

		if (seat.wanted == pool && (first == NULL || seat.turn < first->turn))
			first = &seat;
	}
	return first;
}

/* The session stands in line no more. */
void
LeaveLine(Seat *seat)
{
	if (seat->wanted < 0)
		return;
	pg_atomic_fetch_sub_u32(&shared->pools[seat->wanted].waiting, 1);
	seat->wanted = -1;
}

/* Whether the process may keep its places for now. */
bool
HasLease(const Seat &seat)
{
	return !TimestampDifferenceExceeds(seat.since, GetCurrentTimestamp(), kLease);
}

/* Whoever is the first in line now asks the idle ones. */
void
WakeFirst(int pool)
{
	Seat *first = pg_atomic_read_u32(&shared->pools[pool].waiting) > 0 ? FirstInLine(pool) : NULL;

	if (first != NULL)
		SetLatch(first->latch);
}

/* Give the pool's free places to the first in line. */
void
ServeLine(int index)
{
	Pool &pool = shared->pools[index];

	while (pg_atomic_read_u32(&pool.waiting) > 0 &&
		   (shared->bound == 0 || pool.held < shared->bound))
	{
		Seat *seat = FirstInLine(index);

		if (seat == NULL)
			return;
		LeaveLine(seat);
		seat->held |= Bit(index);
		seat->since = GetCurrentTimestamp();
		pool.held++;
		pg_atomic_write_u32(&seat->granted, 1);
		SetLatch(seat->latch);
		WakeFirst(index);
	}
}

void
StandInLine(Seat *seat, int pool)
{
	seat->pid = MyProcPid;
	seat->latch = MyLatch;
	seat->turn = ++shared->last_turn;
	seat->wanted = pool;
	pg_atomic_write_u32(&seat->granted, 0);
	pg_atomic_fetch_add_u32(&shared->pools[pool].waiting, 1);
	ServeLine(pool);
}

/*
 * Ask an idle session that was not asked yet to give its place up; with
 * `everyone` all of them.  True: it pays to look again when leases are over.
 */
bool
AskIdle(int pool, bool everyone)
{
	bool leased = false;

	for (int i = 0; i < MaxBackends; i++)
	{
		Seat &seat = shared->seats[i];

		if (!(seat.held & Bit(pool)))
			continue;
		if (HasLease(seat))
		{
			leased = true;
			continue;
		}
		if (!(pg_atomic_read_u64(&seat.idle) & Bit(pool)) ||
			(!everyone && (seat.asked & Bit(pool))))
			continue;
		seat.asked |= Bit(pool);
		WakeIdleSession(seat.pid);
		if (!everyone)
			return false;
	}
	return leased;
}

/* ---- deadlocks ---- */

/* Who has a place of a pool, and who stands in line for one. */
struct Parties
{
	int n_holders;
	int n_line;
	int *holders;
	int *line;
};

Parties
PartiesOf(int pool)
{
	Parties parties = {0, 0, (int *) palloc(sizeof(int) * MaxBackends),
					   (int *) palloc(sizeof(int) * MaxBackends)};

	Locked([&] {
		for (int i = 0; i < MaxBackends; i++)
		{
			const Seat &seat = shared->seats[i];

			if (seat.held & Bit(pool))
				parties.holders[parties.n_holders++] = seat.pid;
			if (seat.wanted == pool)
				parties.line[parties.n_line++] = seat.pid;
		}
	});
	return parties;
}

/* Whether the session waits for a lock of somebody in line; *us: who is this one. */
bool
WaitsForLine(int pid, const Parties &parties, bool *us)
{
	WaitChain chain = {};

	chain.Add(pid);
	for (int i = 0; i < chain.count; i++)
	{
		for (int k = 0; k < parties.n_line; k++)
			if (parties.line[k] == chain.pids[i])
			{
				*us |= chain.pids[i] == MyProcPid;
				return true;
			}
		chain.AddBlockersOf(i);
	}
	return false;
}

/*
 * Whether no place becomes free because everybody who has one waits for locks of
 * those in line, and one of them for ours.
 */
bool
IsDeadlock(int pool)
{
	Parties parties = PartiesOf(pool);
	bool us = false;

	for (int i = 0; i < parties.n_holders; i++)
		if (!WaitsForLine(parties.holders[i], parties, &us))
			return false;
	return us;
}

/* ---- waiting ---- */

/* Wait until a place was granted; false at the deadline, or (*deadlock) when it is in vain. */
bool
WaitInLine(Seat *seat, int pool, TimestampTz deadline, bool *deadlock)
{
	long bound = guc::sync_lock_timeout > 0 ? guc::sync_lock_timeout : 2L * DeadlockTimeout;
	TimestampTz look = DeadlineIn((int) Min(bound, INT_MAX));
	bool everyone = false;

	while (pg_atomic_read_u32(&seat->granted) == 0)
	{
		if (Remaining(look) == 0)
		{
			*deadlock = IsDeadlock(pool) && pg_atomic_read_u32(&seat->granted) == 0;
			if (*deadlock)
				return false;
			ereport(DEBUG1,
					(errmsg_internal("mmrepl: waiting for a connection to a peer is no deadlock")));
			look = DeadlineIn((int) Min(bound, INT_MAX));
		}
		long left = Remaining(deadline);
		bool leased = Locked([&] {
			ServeLine(pool); /* the bound may have been raised */
			return FirstInLine(pool) == seat && AskIdle(pool, everyone);
		});
		long longest = Min(leased ? kLease : kAskAgain, Max(Remaining(look), 1));

		if (left == 0)
			return false;
		int happened = WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
								 left < 0 ? longest : Min(left, longest), PeerWaitEvent());

		everyone = !leased && (happened & WL_TIMEOUT);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	return true;
}

void
FailCrowded(const char *server_name, bool too_many_servers, Failure *failure)
{
	SetFailure(failure, ERRCODE_TOO_MANY_CONNECTIONS,
			   psprintf("no connection to server \"%s\" is free", server_name));
	if (too_many_servers)
	{
		failure->detail = pstrdup("Sessions are connected to too many servers to count them.");
		return;
	}
	failure->detail = psprintf("All %d that \"mmrepl.max_peer_connections\" allows were in use by "
							   "transactions of other sessions.",
							   shared->bound);
	failure->hint = pstrdup("Raise mmrepl.max_peer_connections, or let sessions wait longer with "
							"mmrepl.sync_timeout.");
}

void
FailDeadlocked(const char *server_name, Failure *failure)
{
	SetFailure(failure, ERRCODE_T_R_DEADLOCK_DETECTED,
			   psprintf("deadlock while waiting for a connection to server \"%s\"", server_name));
	failure->detail =
		psprintf("Those who have the %d that \"mmrepl.max_peer_connections\" allows wait "
				 "for locks of sessions that stand in line for one.",
				 shared->bound);
	failure->hint = pstrdup("Retry the transaction, or raise mmrepl.max_peer_connections.");
}

/* The process ends: its connections are closed, and nobody waits for it or because of it. */
void
LeaveAll(int, Datum)
{
	Seat &seat = Mine();

	CloseWanted();
	CloseAll(0, (Datum) 0);
	Locked([&] {
		LeaveLine(&seat);
		for (int pool = 0; pool < kPools; pool++)
		{
			if (!(seat.held & Bit(pool)))
				continue;
			shared->pools[pool].held--;
			ServeLine(pool);
		}
		seat.held = seat.asked = 0;
		pg_atomic_write_u64(&seat.idle, 0);
	});
}

} // namespace

/* ---- the room's own ---- */

bool
TakePlace(Oid server, Oid owner, const char *server_name, TimestampTz deadline, int *place,
		  Failure *failure)
{
	static bool prepared = false;
	Seat &seat = Mine();
	bool granted = false;
	bool deadlock = false;

	if (!prepared)
		on_shmem_exit(LeaveAll, (Datum) 0);
	prepared = true;
	FollowBound();
	*place = Locked([&] {
		int pool = FindPool(server, owner);

		if (pool >= 0)
			StandInLine(&seat, pool);
		return pool;
	});
	if (*place < 0 && guc::max_peer_connections == 0)
		return true;
	if (*place >= 0)
		Guarded([&] { granted = WaitInLine(&seat, *place, deadline, &deadlock); },
				[&] { LeavePlace(*place); });
	if (granted)
		return true;
	if (*place >= 0)
		LeavePlace(*place);
	if (deadlock)
		FailDeadlocked(server_name, failure);
	else
		FailCrowded(server_name, *place < 0, failure);
	return false;
}

void
LeavePlace(int place)
{
	if (place < 0)
		return;
	Seat &seat = Mine();

	Locked([&] {
		if (seat.wanted >= 0)
		{
			LeaveLine(&seat);
			WakeFirst(place);
		}
		seat.asked &= ~Bit(place);
		pg_atomic_fetch_and_u64(&seat.idle, ~Bit(place));
		if (seat.held & Bit(place))
			shared->pools[place].held--;
		seat.held &= ~Bit(place);
		ServeLine(place);
	});
}

void
UsePlace(int place)
{
	if (place >= 0)
		pg_atomic_fetch_and_u64(&Mine().idle, ~Bit(place));
}

/* The second look is after `idle` was set: whoever comes later sees that, and asks. */
bool
RestPlace(int place)
{
	if (place < 0)
		return false;
	Seat &seat = Mine();
	Pool &pool = shared->pools[place];

	pg_atomic_fetch_or_u64(&seat.idle, Bit(place));
	if (pg_atomic_read_u32(&pool.waiting) == 0 &&
		(shared->bound == 0 || pool.held <= shared->bound) && seat.asked == 0)
		return false;
	return Locked([&] {
		int excess = shared->bound == 0 ? 0 : Max(pool.held - shared->bound, 0);
		int waiting = HasLease(seat) ? 0 : (int) pg_atomic_read_u32(&pool.waiting);
		bool wanted = waiting + excess > pool.leaving;

		seat.asked &= ~Bit(place);
		pool.leaving += wanted;
		return wanted;
	});
}

bool
PlaceIsWanted(int place)
{
	return place >= 0 && pg_atomic_read_u32(&shared->pools[place].waiting) > 0;
}

void
YieldPlace(int place)
{
	Locked([&] { shared->pools[place].leaving--; });
	LeavePlace(place);
}

/* Ask those that are idle for the places beyond the bound; the others give them up by themselves. */
static void
AskForExcess(int index)
{
	int excess = shared->bound == 0 ? 0 : shared->pools[index].held - shared->bound;

	for (int i = 0; i < MaxBackends && excess > 0; i++)
	{
		Seat &seat = shared->seats[i];

		if (!(seat.held & Bit(index)) || !(pg_atomic_read_u64(&seat.idle) & Bit(index)))
			continue;
		excess--;
		seat.asked |= Bit(index);
		WakeIdleSession(seat.pid);
	}
}

/* Who has read the configuration before somebody else did is not believed. */
void
FollowBound()
{
	if (PgReloadTime <= shared->bound_as_of)
		return;
	Locked([&] {
		if (PgReloadTime <= shared->bound_as_of)
			return;
		shared->bound_as_of = PgReloadTime;
		if (shared->bound == guc::max_peer_connections)
			return;
		shared->bound = guc::max_peer_connections;
		for (int pool = 0; pool < kPools; pool++)
		{
			ServeLine(pool);
			AskForExcess(pool);
		}
	});
}

/* ---- shared memory ---- */

Size
SharedSize()
{
	return add_size(offsetof(Shared, seats), mul_size(MaxBackends, sizeof(Seat)));
}

void
InitShared(bool found, void *where)
{
	shared = (Shared *) where;
	if (found)
		return;
	memset(shared, 0, SharedSize());
	shared->bound = guc::max_peer_connections;
	shared->bound_as_of = PgReloadTime;
	for (int i = 0; i < MaxBackends; i++)
		shared->seats[i].wanted = -1;
}

} // namespace mmrepl::connection
