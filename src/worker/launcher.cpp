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
static List *scouted; /* OIDs of databases */
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

/* Look into one database and wait until that is done; false: try again later. */
static bool
Scout(Oid database)
{
	BackgroundWorker worker;

	DescribeWorker(&worker, "mmrepl_scout_main", "mmrepl scout");
	worker.bgw_main_arg = ObjectIdGetDatum(database);
	BackgroundWorkerHandle *handle = StartProcess(&worker);

	if (handle == NULL)
		return false;
	(void) WaitForBackgroundWorkerShutdown(handle);
	pfree(handle);
	return true;
}

static List *
ConnectableDatabases()
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

			if (form->datallowconn)
				InContext(context, [&] { result = lappend_oid(result, form->oid); });
		}
		table_endscan(scan);
		table_close(rel, AccessShareLock);
	});
	return result;
}

/* Databases that were not there at the last look. */
static void
ScoutNewDatabases()
{
	List *databases = ConnectableDatabases();
	bool all = true;
	ListCell *cell;

	foreach(cell, databases)
	{
		Oid database = lfirst_oid(cell);

		if (list_member_oid(scouted, database))
			continue;
		if (Scout(database))
			InContext(TopMemoryContext, [&] { scouted = lappend_oid(scouted, database); });
		else
			all = false;
	}
	next_scan = GetCurrentTimestamp() + (all ? kScanEvery : kMinRestart * 10);
}

/*
 * Databases whose sessions asked for a look; false when there was none.  A scout
 * is waited for with our latch, so a request may have come unnoticed meanwhile:
 * ask again until there is none.
 */
static bool
ScoutOnRequest()
{
	bool any = false;

	for (shmem::Database &database : shmem::Get().databases)
	{
		uint32 wanted = 1;

		if (!OidIsValid(database.oid) ||
			!pg_atomic_compare_exchange_u32(&database.scout_wanted, &wanted, 0))
			continue;
		if (Scout(database.oid))
			any = true;
		else
		{
			pg_atomic_write_u32(&database.scout_wanted, 1);
			next_scan = Min(next_scan, GetCurrentTimestamp() + kMinRestart * 10);
		}
	}
	return any;
}

void
RunScout(Oid)
{
	InTransaction([] {
		ListCell *cell;

		if (!catalog::ExtensionExists())
			return;
		queue::EnsureReady();
		foreach(cell, catalog::AllStreams())
		{
			catalog::StreamRow *row = (catalog::StreamRow *) lfirst(cell);
			int slot = shmem::RegisterStream(MyDatabaseId, row->id, row->server, row->owner,
											 row->confirmed, row->paused);

			if (slot < 0)
				ereport(WARNING, (errcode(ERRCODE_MMREPL_TOO_MANY_STREAMS),
								  errmsg("mmrepl: stream %d cannot be served", row->id),
								  errdetail("Its changes are queued and stay so."),
								  errhint("Raise \"mmrepl.max_servers\" and restart the server.")));
		}
	});
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
	wards[slot].handle = StartProcess(&worker);
	wards[slot].started_at = GetCurrentTimestamp();
	if (wards[slot].handle == NULL)
		wards[slot].start_at = wards[slot].started_at + kMinRestart * 10;
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
			ScoutNewDatabases();
		while (ScoutOnRequest())
			;
		TimestampTz due = SuperviseWorkers();

		due = due == 0 ? next_scan : Min(due, next_scan);
		long timeout = Max(TimestampDifferenceMilliseconds(GetCurrentTimestamp(), due), 1L);

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, timeout,
						 PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
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
