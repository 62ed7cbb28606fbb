/*
 * shmem.cpp
 *		Shared memory: request, set-up, and the registry of streams and databases.
 */
#include "mmrepl/shmem.hpp"

namespace mmrepl::shmem
{

constexpr int kMaxRegions = 4;

struct Region
{
	const char *name;
	Size (*size)();
	void (*init)(bool found, void *where);
};

static Region regions[kMaxRegions];
static int n_regions;
static State *state;
static InFlight *slots;
static char *rings;
static shmem_request_hook_type previous_request_hook;
static shmem_startup_hook_type previous_startup_hook;

void
AddRegion(const char *name, Size (*size)(), void (*init)(bool found, void *where))
{
	Assert(n_regions < kMaxRegions);
	regions[n_regions++] = {name, size, init};
}

/* Processes that can hold a ticket: every PGPROC's index is below this. */
static int
CountSlots()
{
	return MaxBackends + NUM_AUXILIARY_PROCS + max_prepared_xacts;
}

uint64
RingBytes()
{
	return (uint64) guc::ring_size * 1024;
}

static Size
RingsSize()
{
	return mul_size(guc::max_servers, RingBytes());
}

/* shmem_request_hook: every byte and lock that Startup() will take. */
static void
Request()
{
	if (previous_request_hook)
		previous_request_hook();
	RequestAddinShmemSpace(MAXALIGN(sizeof(State)));
	RequestAddinShmemSpace(mul_size(CountSlots(), sizeof(InFlight)));
	RequestAddinShmemSpace(RingsSize());
	for (int i = 0; i < n_regions; i++)
		RequestAddinShmemSpace(regions[i].size());
	RequestNamedLWLockTranche("mmrepl", 3);
}

static void
InitStream(Stream *stream)
{
	memset(stream, 0, sizeof(*stream));
	SpinLockInit(&stream->mutex);
	ConditionVariableInit(&stream->confirmed_cv);
	ConditionVariableInit(&stream->applied_cv);
	ConditionVariableInit(&stream->settled_cv);
}

static void
InitState()
{
	LWLockPadded *locks = GetNamedLWLockTranche("mmrepl");

	memset(state, 0, sizeof(*state));
	state->registry = &locks[0].lock;
	state->startup = &locks[1].lock;
	state->places = &locks[2].lock;
	SpinLockInit(&state->clock_mutex);
	state->last_ticket = state->first_ticket = ClockNow();
	state->n_slots = CountSlots();
	for (Stream &stream : state->streams)
		InitStream(&stream);
}

/* shmem_startup_hook: runs in the postmaster, again after a crash-restart. */
static void
Startup()
{
	bool found;

	if (previous_startup_hook)
		previous_startup_hook();
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	state = (State *) ShmemInitStruct("mmrepl state", sizeof(State), &found);
	if (!found)
		InitState();
	slots = (InFlight *) ShmemInitStruct("mmrepl in-flight tickets",
										 mul_size(CountSlots(), sizeof(InFlight)), &found);
	if (!found)
		memset(slots, 0, mul_size(CountSlots(), sizeof(InFlight)));
	rings = (char *) ShmemInitStruct("mmrepl rings", RingsSize(), &found);
	for (int i = 0; i < n_regions; i++)
	{
		void *where = ShmemInitStruct(regions[i].name, regions[i].size(), &found);

		regions[i].init(found, where);
	}
	LWLockRelease(AddinShmemInitLock);
}

void
Init()
{
	previous_request_hook = shmem_request_hook;
	shmem_request_hook = Request;
	previous_startup_hook = shmem_startup_hook;
	shmem_startup_hook = Startup;
}

bool
Ready()
{
	return state != NULL;
}

void
RequireReady()
{
	if (state == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_NOT_PRELOADED),
				 errmsg("mmrepl_bgw must be loaded through \"shared_preload_libraries\""),
				 errdetail("Without it changes could neither be ordered nor delivered."),
				 errhint("Add mmrepl_bgw to \"shared_preload_libraries\" (list it first) and "
						 "restart the server.")));
}

State &
Get()
{
	return *state;
}

InFlight &
SlotOf(int process_index)
{
	return slots[process_index];
}

InFlight &
MySlot()
{
	return slots[MyProcIndex()];
}

/* before_shmem_exit */
static void
ForgetPeerSession(int, Datum)
{
	pg_atomic_write_u32(&MySlot().peer_session, 0);
}

void
NotePeerSession()
{
	pg_atomic_uint32 *mine = &MySlot().peer_session;

	if (pg_atomic_read_u32(mine) == (uint32) MyProcPid)
		return;
	before_shmem_exit(ForgetPeerSession, (Datum) 0);
	pg_atomic_write_u32(mine, (uint32) MyProcPid);
	WakeLauncher();
}

char *
RingOf(int index)
{
	return rings + (Size) index * RingBytes();
}

int
FindStreamLocked(Oid database, int32 id)
{
	for (int i = 0; i < guc::max_servers; i++)
	{
		const Stream &stream = state->streams[i];

		if (stream.in_use && stream.database == database && stream.id == id)
			return i;
	}
	return -1;
}

int
FindStream(Oid database, int32 id)
{
	LWLockAcquire(state->registry, LW_SHARED);
	int index = FindStreamLocked(database, id);
	LWLockRelease(state->registry);
	return index;
}

bool
PositionsOf(Oid database, int32 id, Positions *positions)
{
	LWLockAcquire(state->registry, LW_SHARED);
	int index = FindStreamLocked(database, id);

	if (index >= 0)
		*positions = {pg_atomic_read_u64(&state->streams[index].confirmed),
					  pg_atomic_read_u64(&state->streams[index].discarded)};
	LWLockRelease(state->registry);
	return index >= 0;
}

/* Whether a transaction on its way has entries in the slot's ring; clock spinlock held. */
static bool
HasEntriesOnTheWay(int index)
{
	for (int i = 0; i < state->n_slots; i++)
		if (pg_atomic_read_u64(&slots[i].ticket) != 0 &&
			(pg_atomic_read_u64(&slots[i].streams) & (UINT64CONST(1) << index)))
			return true;
	return false;
}

/*
 * Give a free slot to a stream; false when a transaction still uses its ring.
 * Tickets drawn before this moment may not be in the ring: they are in the gap,
 * and the tables have them.  Those in flight may concern this stream without
 * saying so.
 */
static bool
ActivateStream(int index, uint64 confirmed)
{
	Stream *stream = &state->streams[index];

	pg_write_barrier(); /* who waits for the slot's former use sees that the epoch has gone */
	pg_atomic_write_u64(&stream->confirmed, confirmed);
	pg_atomic_write_u64(&stream->ring_head, 0);
	pg_atomic_write_u64(&stream->ring_tail, 0);
	pg_atomic_write_u64(&stream->ring_taken, 0);
	SpinLockAcquire(&state->clock_mutex);
	bool quiet = !HasEntriesOnTheWay(index);

	if (quiet)
	{
		for (int i = 0; i < state->n_slots; i++)
			pg_atomic_write_u32(&slots[i].everyone, 1);
		stream->registered_after = state->last_ticket;
		pg_atomic_write_u64(&stream->ring_gap, state->last_ticket);
		pg_atomic_write_u64(&stream->last_queued, state->last_ticket);
		pg_atomic_write_u64(&stream->doubt_to, state->last_ticket);
		stream->last_ticket = state->last_ticket;
		stream->in_use = true;
		stream->epoch = ++state->registrations;
	}
	SpinLockRelease(&state->clock_mutex);
	return quiet;
}

/* Whether a worker is at the slot, of its present use or of the one before. */
static bool
HasWorker(const Stream *stream)
{
	return stream->worker_pid != 0 && BackendPidGetProc(stream->worker_pid) != NULL;
}

/* Free a slot; its worker, if there is one, ends.  The slot is not used again before it has. */
static void
DeactivateStream(Stream *stream)
{
	if (HasWorker(stream) && stream->worker_pid != MyProcPid)
		kill(stream->worker_pid, SIGTERM);
	SpinLockAcquire(&state->clock_mutex);
	stream->in_use = false;
	state->registrations++;
	SpinLockRelease(&state->clock_mutex);
	ConditionVariableBroadcast(&stream->applied_cv);
	ConditionVariableBroadcast(&stream->confirmed_cv);
	ConditionVariableBroadcast(&stream->settled_cv);
}

void
LeaveStream(Stream &stream)
{
	SpinLockAcquire(&stream.mutex);
	if (stream.worker_pid == MyProcPid)
	{
		stream.worker_latch = NULL;
		stream.worker_pid = 0;
	}
	SpinLockRelease(&stream.mutex);
	ConditionVariableBroadcast(&stream.settled_cv);
	WakeLauncher();
}

/* Whether the slot is free, but for a worker or a transaction of its former use. */
static bool
IsBeingLeft(int index)
{
	if (state->streams[index].in_use)
		return false;
	if (HasWorker(&state->streams[index]))
		return true;
	SpinLockAcquire(&state->clock_mutex);
	bool on_the_way = HasEntriesOnTheWay(index);
	SpinLockRelease(&state->clock_mutex);
	return on_the_way;
}

/* The first such slot, or -1. */
static int
FirstLeft()
{
	int index = 0;

	while (index < guc::max_servers && !IsBeingLeft(index))
		index++;
	return index < guc::max_servers ? index : -1;
}

bool
HasLeavers()
{
	return FirstLeft() >= 0;
}

bool
AwaitLeaver(long timeout)
{
	int index = FirstLeft();

	if (index < 0)
		return false;
	while (IsBeingLeft(index) && !ConditionVariableTimedSleep(&state->streams[index].settled_cv,
															  timeout, PG_WAIT_EXTENSION))
		;
	ConditionVariableCancelSleep();
	return true;
}

int
RegisterStream(Oid database, int32 id, Oid server, Oid owner, uint64 confirmed, uint64 discarded,
			   bool paused)
{
	LWLockAcquire(state->registry, LW_EXCLUSIVE);
	int index = FindStreamLocked(database, id);

	/* The extension was dropped and made again: the number means another stream now. */
	if (index >= 0 &&
		(state->streams[index].server != server || state->streams[index].owner != owner))
	{
		DeactivateStream(&state->streams[index]);
		index = -1;
	}
	for (int i = 0; index < 0 && i < guc::max_servers; i++)
	{
		Stream *stream = &state->streams[i];

		if (stream->in_use || HasWorker(stream))
			continue;
		pg_write_barrier(); /* who sees any of what follows sees that the former use has ended */
		SpinLockAcquire(&stream->mutex);
		memset(stream, 0, offsetof(Stream, mutex));
		SpinLockRelease(&stream->mutex);
		stream->database = database;
		stream->id = id;
		stream->server = server;
		stream->owner = owner;
		stream->paused = paused;
		stream->state = paused ? WorkerState::Paused : WorkerState::Starting;
		pg_atomic_write_u64(&stream->discarded, discarded);
		pg_atomic_write_u64(&stream->counters.reset_at, (uint64) GetCurrentTimestamp());
		if (ActivateStream(i, confirmed))
			index = i;
	}
	LWLockRelease(state->registry);
	return index;
}

void
UnregisterStream(int index, uint64 epoch)
{
	LWLockAcquire(state->registry, LW_EXCLUSIVE);
	if (state->streams[index].in_use && state->streams[index].epoch == epoch)
		DeactivateStream(&state->streams[index]);
	LWLockRelease(state->registry);
}

static Database *mine; /* this process's block, found once */

/* The database's block, taken if there is a free one; the registry lock is held. */
static Database *
TakeDatabase(Oid database)
{
	Database *free_one = NULL;

	for (Database &each : state->databases)
	{
		if (each.oid == database)
			return &each;
		if (!OidIsValid(each.oid) && free_one == NULL)
			free_one = &each;
	}
	if (free_one == NULL)
		return NULL;
	pg_atomic_write_u32(&free_one->ready, 0);
	pg_atomic_write_u32(&free_one->active_table, 0);
	pg_atomic_write_u64(&free_one->late, 0);
	pg_atomic_write_u32(&free_one->scout_wanted, 0);
	pg_write_barrier();
	free_one->oid = database;
	return free_one;
}

Database *
FindDatabase(Oid database)
{
	if (mine != NULL && mine->oid == database)
		return mine;
	LWLockAcquire(state->registry, LW_EXCLUSIVE);
	mine = TakeDatabase(database);
	LWLockRelease(state->registry);
	return mine;
}

Database &
DatabaseOf(Oid database)
{
	Database *block = FindDatabase(database);

	if (block == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_TOO_MANY_STREAMS),
				 errmsg("mmrepl_bgw is in use in too many databases of this cluster"),
				 errdetail("At most %d databases can hold replicated tables.", kMaxDatabases)));
	return *block;
}

void
ForgetDatabases(List *existing)
{
	LWLockAcquire(state->registry, LW_EXCLUSIVE);
	for (Database &each : state->databases)
		if (OidIsValid(each.oid) && !list_member_oid(existing, each.oid))
			each.oid = InvalidOid;
	LWLockRelease(state->registry);
}

void
WakeWorker(Stream &stream)
{
	SpinLockAcquire(&stream.mutex);
	Latch *latch = stream.worker_latch;
	SpinLockRelease(&stream.mutex);
	if (latch != NULL)
		SetLatch(latch);
}

void
CallForAttention(Stream &stream)
{
	SpinLockAcquire(&stream.mutex);
	stream.attention++;
	SpinLockRelease(&stream.mutex);
	WakeWorker(stream);
}

void
RequestRecovery(Stream &stream)
{
	pg_atomic_fetch_add_u32(&stream.recovery_requests, 1);
	WakeWorker(stream);
}

void
RequestRetry(Stream &stream)
{
	SpinLockAcquire(&stream.mutex);
	stream.retry_now = true;
	SpinLockRelease(&stream.mutex);
	WakeWorker(stream);
}

void
RequestScout()
{
	if (mine != NULL)
		pg_atomic_write_u32(&mine->scout_wanted, 1);
	WakeLauncher();
}

void
RequestScoutOf(Oid database)
{
	for (Database &each : state->databases)
		if (each.oid == database)
			pg_atomic_write_u32(&each.scout_wanted, 1);
	WakeLauncher();
}

void
WakeLauncher()
{
	Latch *latch = state->launcher_latch;

	if (latch != NULL)
		SetLatch(latch);
}

void
NudgeWorkersOf(Oid database)
{
	for (int i = 0; i < guc::max_servers; i++)
		if (state->streams[i].in_use && state->streams[i].database == database)
			WakeWorker(state->streams[i]);
}

void
WakeWorkersOf(Oid database)
{
	for (int i = 0; i < guc::max_servers; i++)
	{
		Stream &stream = state->streams[i];

		if (!stream.in_use || stream.database != database)
			continue;
		SpinLockAcquire(&stream.mutex);
		stream.attention++;
		stream.retry_now = true;
		SpinLockRelease(&stream.mutex);
		WakeWorker(stream);
	}
}

} // namespace mmrepl::shmem
