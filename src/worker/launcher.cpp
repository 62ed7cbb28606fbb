/*
 * launcher.cpp
 *		The launcher (one a cluster), the scouts (one a database, short-lived), and
 *		the registration of all processes.
 *
 * Nobody tells the launcher which databases hold replicated tables: a scout looks
 * into each connectable one after a restart, and again when a session asks for
 * it.  A scout registers the database's streams in shared memory; the launcher
 * keeps one worker running for each registered stream.
 */
#include "worker_internal.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::worker
{

constexpr int64 kScanEvery = INT64CONST(60) * USECS_PER_SEC;
constexpr int64 kHealthyAfter = INT64CONST(10) * USECS_PER_SEC;
constexpr int64 kMinRestart = INT64CONST(100) * 1000;
constexpr int64 kMaxRestart = INT64CONST(30) * USECS_PER_SEC;

/* What the launcher knows of a stream's worker. */
struct Ward
{
	uint64 epoch; /* of the slot's use that this is about */
	BackgroundWorkerHandle *handle;
	TimestampTz started_at;
	TimestampTz start_at; /* not before this */
	int64 delay;
};

static Ward wards[shmem::kMaxStreams];
static List *scouted;  /* OIDs of databases */
static List *to_scout; /* those that wait for their first look */
static TimestampTz next_scan;
static bool slots_exhausted;

/* ---- processes ---- */

static void
DescribeWorker(BackgroundWorker *worker, const char *function, const char *type)
{
	memset(worker, 0, sizeof(*worker));
	worker->bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker->bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker->bgw_restart_time = BGW_NEVER_RESTART;
	strlcpy(worker->bgw_library_name, "mmrepl_bgw", sizeof(worker->bgw_library_name));
	strlcpy(worker->bgw_function_name, function, sizeof(worker->bgw_function_name));
	strlcpy(worker->bgw_type, type, sizeof(worker->bgw_type));
	strlcpy(worker->bgw_name, type, sizeof(worker->bgw_name));
}

void
Init()
{
	BackgroundWorker worker;

	DescribeWorker(&worker, "mmrepl_launcher_main", "mmrepl launcher");
	worker.bgw_restart_time = 1;
	RegisterBackgroundWorker(&worker);
	InitDatabaseHook();
}

/* NULL, and one WARNING, while max_worker_processes is exhausted. */
static BackgroundWorkerHandle *
StartProcess(BackgroundWorker *worker)
{
	BackgroundWorkerHandle *handle = NULL;

	worker->bgw_notify_pid = MyProcPid;
	if (InContext(TopMemoryContext,
				  [&] { return RegisterDynamicBackgroundWorker(worker, &handle); }))
	{
		slots_exhausted = false;
		return handle;
	}
	if (!slots_exhausted)
		ereport(WARNING, (errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
						  errmsg("mmrepl: no background worker slot is free"),
						  errdetail("Changes stay queued until one is."),
						  errhint("Raise \"max_worker_processes\" and restart the server.")));
	slots_exhausted = true;
	return NULL;
}

/* ---- scouting ---- */

/* The scout that is out, one at a time; it may be held up without holding us up. */
static struct
{
	BackgroundWorkerHandle *handle; /* NULL: none */
	Oid database;
	TimestampTz retry_at; /* no slot was free: not before this */
	int failures;		  /* scouts in a row that did not come to their end */
} scout;

/*
 * Forget the scout.  If it died (an error, a termination), or a slot will be free only
 * later, its database is looked at again, after a second, and less and less often while this goes on.
 */
static void
DismissScout()
{
	bool done = pg_atomic_read_u32(&shmem::Get().scout_done) == scout.database;

	pfree(scout.handle);
	scout.handle = NULL;
	scout.failures = done ? 0 : Min(scout.failures + 1, 6);
	if (done)
		return;
	scouted = list_delete_oid(scouted, scout.database);
	next_scan = Min(next_scan, GetCurrentTimestamp() + (USECS_PER_SEC << (scout.failures - 1)));
}

static bool
ScoutIsOut()
{
	pid_t pid;

	if (scout.handle == NULL)
		return false;
	if (GetBackgroundWorkerPid(scout.handle, &pid) != BGWH_STOPPED)
		return true;
	DismissScout();
	return false;
}

/* Send a scout into the database; false: no slot is free. */
static bool
SendScout(Oid database)
{
	BackgroundWorker worker;

	DescribeWorker(&worker, "mmrepl_scout_main", "mmrepl scout");
	worker.bgw_main_arg = ObjectIdGetDatum(database);
	pg_atomic_write_u32(&shmem::Get().scout_done, InvalidOid);
	scout.handle = StartProcess(&worker);
	scout.database = database;
	if (scout.handle == NULL)
		scout.retry_at = GetCurrentTimestamp() + kMinRestart * 10;
	return scout.handle != NULL;
}

/* All databases; those that take connections also into *connectable. */
static List *
Databases(List **connectable)
{
	List *result = NIL;
	MemoryContext context = CurrentMemoryContext;

	InTransaction([&] {
		Relation rel = table_open(DatabaseRelationId, AccessShareLock);
		TableScanDesc scan = table_beginscan_catalog(rel, 0, NULL);
		HeapTuple tuple;

		while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
		{
			Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);

			InContext(context, [&] {
				result = lappend_oid(result, form->oid);
				if (form->datallowconn)
					*connectable = lappend_oid(*connectable, form->oid);
			});
		}
		table_endscan(scan);
		table_close(rel, AccessShareLock);
	});
	return result;
}

/* Look for databases that have come or gone since the last look. */
static void
LookAtDatabases()
{
	List *connectable = NIL;
	List *existing = Databases(&connectable);
	ListCell *cell;

	shmem::ForgetDatabases(existing);
	InContext(TopMemoryContext, [&] {
		foreach(cell, connectable)
			if (!list_member_oid(scouted, lfirst_oid(cell)))
				to_scout = list_append_unique_oid(to_scout, lfirst_oid(cell));
	});
	next_scan = GetCurrentTimestamp() + kScanEvery;
}

/* A database whose sessions asked for a look goes first. */
static Oid
RequestedDatabase()
{
	for (shmem::Database &database : shmem::Get().databases)
	{
		uint32 wanted = 1;

		if (OidIsValid(database.oid) &&
			pg_atomic_compare_exchange_u32(&database.scout_wanted, &wanted, 0))
			return database.oid;
	}
	return InvalidOid;
}

/* If no scout is out and one is wanted, send it; returns when to try again (0: at an event). */
static TimestampTz
SendNextScout()
{
	if (ScoutIsOut())
		return 0;
	if (scout.retry_at > GetCurrentTimestamp())
		return scout.retry_at;
	Oid database = RequestedDatabase();

	if (OidIsValid(database))
	{
		if (!SendScout(database))
			shmem::RequestScoutOf(database);
	}
	else if (to_scout != NIL)
	{
		database = linitial_oid(to_scout);
		if (SendScout(database))
			InContext(TopMemoryContext, [&] {
				scouted = lappend_oid(scouted, database);
				to_scout = list_delete_first(to_scout);
			});
	}
	else
		return 0;
	return scout.handle == NULL ? scout.retry_at : 0;
}

/* Give the stream a slot; false when one is free, but not yet: another scout is to come. */
static bool
ServeStream(const catalog::StreamRow &row)
{
	if (queue::AwaitSlot(row) >= 0)
		return true;
	if (shmem::HasLeavers())
		return false;
	ereport(WARNING, (errcode(ERRCODE_MMREPL_TOO_MANY_STREAMS),
					  errmsg("mmrepl: stream %d cannot be served", row.id),
					  errdetail("Its changes are queued and stay so."),
					  errhint("Raise \"mmrepl.max_servers\" and restart the server.")));
	return true;
}

void
RunScout(Oid)
{
	bool done = true;

	InTransaction([&] {
		ListCell *cell;

		if (!catalog::ExtensionExists())
			return;
		MMREPL_FAULT_POINT("scout-begun");
		queue::EnsureReady();
		foreach(cell, catalog::AllStreams())
		{
			done &= ServeStream(*(const catalog::StreamRow *) lfirst(cell));
			MMREPL_FAULT_POINT("scout-registered");
		}
	});
	if (done)
		pg_atomic_write_u32(&shmem::Get().scout_done, MyDatabaseId);
}

/* ---- supervision ---- */

static bool
WorkerLives(int slot)
{
	Ward &ward = wards[slot];
	pid_t pid;

	if (ward.handle != NULL)
	{
		if (GetBackgroundWorkerPid(ward.handle, &pid) != BGWH_STOPPED)
			return true;
		pfree(ward.handle);
		ward.handle = NULL;
		bool healthy = GetCurrentTimestamp() - ward.started_at > kHealthyAfter;

		ward.delay = healthy ? kMinRestart : Min(Max(ward.delay * 2, kMinRestart), kMaxRestart);
		ward.start_at = GetCurrentTimestamp() + ward.delay;
	}
	int other = shmem::Get().streams[slot].worker_pid; /* started by an earlier launcher */

	return other != 0 && BackendPidGetProc(other) != NULL;
}

static void
StartWorker(int slot)
{
	BackgroundWorker worker;
	const shmem::Stream &stream = shmem::Get().streams[slot];

	DescribeWorker(&worker, "mmrepl_stream_main", "mmrepl stream worker");
	snprintf(worker.bgw_name, sizeof(worker.bgw_name), "mmrepl stream %d of database %u", stream.id,
			 stream.database);
	worker.bgw_main_arg = Int32GetDatum(slot);
	MMREPL_FAULT_POINT("launcher-starting");
	wards[slot].handle = StartProcess(&worker);
	MMREPL_FAULT_POINT("launcher-started");
	wards[slot].started_at = GetCurrentTimestamp();
	if (wards[slot].handle != NULL)
		return;
	wards[slot].start_at = wards[slot].started_at + kMinRestart * 10;
	stats::SetError(shmem::Get().streams[slot], ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
					"no background worker slot is free\n"
					"HINT:  Raise \"max_worker_processes\" and restart the server.");
}

/* Start what is missing; returns when to look again (0: at an event). */
static TimestampTz
SuperviseWorkers()
{
	TimestampTz due = 0;

	for (int slot = 0; slot < guc::max_servers; slot++)
	{
		const shmem::Stream &stream = shmem::Get().streams[slot];

		if (!stream.in_use || WorkerLives(slot))
			continue;
		if (wards[slot].epoch != stream.epoch)
			wards[slot] = {stream.epoch, NULL, 0, 0, 0};
		if (wards[slot].start_at <= GetCurrentTimestamp())
			StartWorker(slot);
		if (wards[slot].handle == NULL)
			due = due == 0 ? wards[slot].start_at : Min(due, wards[slot].start_at);
	}
	return due;
}

/* The earlier of two times, of which 0 is none. */
static TimestampTz
Earlier(TimestampTz a, TimestampTz b)
{
	return a == 0 ? b : b == 0 ? a : Min(a, b);
}

static void
LeaveLauncher(int, Datum)
{
	shmem::State &state = shmem::Get();

	if (state.launcher_pid != MyProcPid)
		return;
	state.launcher_latch = NULL;
	state.launcher_pid = 0;
}

void
RunLauncher()
{
	MemoryContext round =
		AllocSetContextCreate(TopMemoryContext, "mmrepl launcher", ALLOCSET_DEFAULT_SIZES);

	shmem::Get().launcher_pid = MyProcPid;
	shmem::Get().launcher_latch = MyLatch;
	before_shmem_exit(LeaveLauncher, (Datum) 0);
	MemoryContextSwitchTo(round);
	for (;;)
	{
		if (GetCurrentTimestamp() >= next_scan)
			LookAtDatabases();
		TimestampTz due = Earlier(SendNextScout(), SuperviseWorkers());

		due = Earlier(Earlier(due, next_scan), LetPeersGo());
		long timeout = Max(TimestampDifferenceMilliseconds(GetCurrentTimestamp(), due), 1L);

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, timeout,
						 PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			connection::FollowBound();
		}
		MemoryContextReset(round);
	}
}

/* ---- what the server starts ---- */

static void
StartUp(Oid database)
{
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	if (OidIsValid(database))
		BackgroundWorkerInitializeConnectionByOid(database, InvalidOid, 0);
	else
		BackgroundWorkerInitializeConnection(NULL, NULL, 0);
}

extern "C" {
MMREPL_EXPORT void mmrepl_launcher_main(Datum arg);
MMREPL_EXPORT void mmrepl_scout_main(Datum arg);
MMREPL_EXPORT void mmrepl_stream_main(Datum arg);
}

void
mmrepl_launcher_main(Datum)
{
	StartUp(InvalidOid);
	RunLauncher();
}

void
mmrepl_scout_main(Datum arg)
{
	StartUp(DatumGetObjectId(arg));
	RunScout(DatumGetObjectId(arg));
}

void
mmrepl_stream_main(Datum arg)
{
	int slot = DatumGetInt32(arg);

	StartUp(shmem::Get().streams[slot].database);
	RunStream(slot);
}

} // namespace mmrepl::worker
