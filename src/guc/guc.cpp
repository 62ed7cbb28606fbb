/*
 * guc.cpp
 *		All settings of the extension.
 */
#include "mmrepl/guc.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::guc
{

int max_servers = 8;
int max_peer_connections = 0;
int ring_size = 4096;
int batch_size = 1024;
int batch_transactions = 2000;
int batch_delay = 10000;
int lanes = 1;
int retry_min_delay = 100;
int retry_max_delay = 30000;
int connect_timeout = 10000;
int reply_timeout = 60000;
int sync_timeout = 10000;
int sync_lock_timeout = 0;
int buffer_memory = 4096;
int max_queue_size = 0;
int recovery_interval = 60000;
int rotate_size = 65536;
QueueAction max_queue_action = QueueAction::Resync;
TwoPhase two_phase = TwoPhase::Off;
Flush sync_flush = Flush::Statement;
SyncCommit sync_commit = SyncCommit::Flushed;
AsyncCommit async_commit = AsyncCommit::Queued;
Mode mode = Mode::Pair;
bool capture = true;
bool early_apply = true;
bool log_conflicts = true;

static const struct config_enum_entry mode_options[] = {
	{"pair", (int) Mode::Pair, false},
	{"async", (int) Mode::Async, false},
	{"sync", (int) Mode::Sync, false},
	{NULL, 0, false},
};

static const struct config_enum_entry two_phase_options[] = {
	{"off", (int) TwoPhase::Off, false},
	{"auto", (int) TwoPhase::Auto, false},
	{"on", (int) TwoPhase::On, false},
	{NULL, 0, false},
};

static const struct config_enum_entry queue_action_options[] = {
	{"resync", (int) QueueAction::Resync, false},
	{"warn", (int) QueueAction::Warn, false},
	{NULL, 0, false},
};

static const struct config_enum_entry flush_options[] = {
	{"statement", (int) Flush::Statement, false},
	{"commit", (int) Flush::Commit, false},
	{NULL, 0, false},
};

static const struct config_enum_entry sync_commit_options[] = {
	{"flushed", (int) SyncCommit::Flushed, false},
	{"applied", (int) SyncCommit::Applied, false},
	{NULL, 0, false},
};

static const struct config_enum_entry async_commit_options[] = {
	{"queued", (int) AsyncCommit::Queued, false},
	{"applied", (int) AsyncCommit::Applied, false},
	{"flushed", (int) AsyncCommit::Flushed, false},
	{NULL, 0, false},
};

/* An integer setting with its unit flag. */
static void
DefineInt(const char *name, const char *what, const char *more, int *variable, int min, int max,
		  GucContext context, int flags)
{
	DefineCustomIntVariable(name, what, more, variable, *variable, min, max, context, flags, NULL,
							NULL, NULL);
}

/* Sizes and bounds of the worker's side. */
static void
DefineWorkerSettings()
{
	DefineInt("mmrepl.batch_size", "Bytes of changes that one batch holds at the most.", NULL,
			  &batch_size, 64, 65536, PGC_SIGHUP, GUC_UNIT_KB);
	DefineInt("mmrepl.batch_transactions", "Source transactions that one batch holds at the most.",
			  NULL, &batch_transactions, 1, 100000, PGC_SIGHUP, 0);
	DefineInt("mmrepl.batch_delay",
			  "Microseconds from one batch to the next while many transactions commit.",
			  "A transaction that comes alone is sent at once.", &batch_delay, 0, 20000, PGC_SIGHUP,
			  0);
	DefineCustomBoolVariable(
		"mmrepl.early_apply", "Execute a transaction at the peer while it commits here.",
		"The peer commits it when it is committed and flushed here. Only what comes alone.",
		&early_apply, true, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineInt("mmrepl.lanes", "Connections over which what waits for a server is delivered.",
			  "With more than one, the server executes batches side by side and commits them in "
			  "order. A server's option \"lanes\" has precedence.",
			  &lanes, 1, kMaxLanes, PGC_SIGHUP, 0);
	DefineInt("mmrepl.connect_timeout", "Longest wait for a connection to a peer.", NULL,
			  &connect_timeout, 100, 600000, PGC_USERSET, GUC_UNIT_MS);
	DefineInt(
		"mmrepl.max_peer_connections",
		"Connections to one peer that sessions hold for synchronous changes; 0 sets no limit.",
		"Each server and owner of pairs counts by itself.", &max_peer_connections, 0, 262143,
		PGC_SIGHUP, 0);
	DefineInt("mmrepl.max_queue_size", "Changes that may wait for one server; 0 sets no limit.",
			  "mmrepl.max_queue_action says what happens when more would wait.", &max_queue_size, 0,
			  INT_MAX, PGC_SIGHUP, GUC_UNIT_KB);
	DefineCustomEnumVariable("mmrepl.max_queue_action",
							 "What happens when mmrepl.max_queue_size is exceeded.",
							 "'resync' queues nothing more for the server until mmrepl.resync(); "
							 "'warn' only writes to the server log.",
							 (int *) &max_queue_action, (int) QueueAction::Resync,
							 queue_action_options, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineInt("mmrepl.recovery_interval",
			  "Longest time between two looks for prepared transactions of ours at a peer.",
			  "Only peers whose max_prepared_transactions is not 0 are looked at.",
			  &recovery_interval, 1000, 3600000, PGC_SIGHUP, GUC_UNIT_MS);
	DefineInt("mmrepl.reply_timeout",
			  "Silence of a peer that has a batch to apply after which it is asked what it does.",
			  "It may work on it; else the connection is given up. 0 waits for ever.",
			  &reply_timeout, 0, 3600000, PGC_SIGHUP, GUC_UNIT_MS);
	DefineInt("mmrepl.retry_max_delay", "Longest delay between two tries to reach a peer.", NULL,
			  &retry_max_delay, 10, 3600000, PGC_SIGHUP, GUC_UNIT_MS);
	DefineInt("mmrepl.retry_min_delay", "First delay between two tries to reach a peer.",
			  "It doubles with every failure, with jitter, up to mmrepl.retry_max_delay.",
			  &retry_min_delay, 10, 3600000, PGC_SIGHUP, GUC_UNIT_MS);
	DefineInt("mmrepl.rotate_size", "Size at which a queue table is relieved by the next one.",
			  NULL, &rotate_size, 64, 16777216, PGC_SIGHUP, GUC_UNIT_KB);
}

/* What fixes the size of shared memory; such settings exist only while preloading. */
static void
DefineSharedMemorySettings()
{
	DefineInt("mmrepl.max_servers", "Streams (server and user mapping) that can be served at once.",
			  "Each takes mmrepl.ring_size of shared memory and one background worker.",
			  &max_servers, 1, 64, PGC_POSTMASTER, 0);
	DefineInt("mmrepl.ring_size", "Shared memory for each stream's newest changes.", NULL,
			  &ring_size, 64, 1048576, PGC_POSTMASTER, GUC_UNIT_KB);
}

/* What a session chooses for its own transactions. */
static void
DefineSessionSettings()
{
	DefineInt("mmrepl.buffer_memory",
			  "Memory that a transaction's captured changes may take before they spill.", NULL,
			  &buffer_memory, 64, MAX_KILOBYTES, PGC_USERSET, GUC_UNIT_KB);
	DefineInt("mmrepl.sync_lock_timeout", "Longest wait for a lock at the peer of a sync pair.",
			  "0 takes twice deadlock_timeout.", &sync_lock_timeout, 0, INT_MAX, PGC_USERSET,
			  GUC_UNIT_MS);
	DefineInt("mmrepl.sync_timeout", "Longest wait for the peer of a sync pair.",
			  "And of a COMMIT for what mmrepl.async_commit asks for.", &sync_timeout, 10, 3600000,
			  PGC_USERSET, GUC_UNIT_MS);
	DefineCustomBoolVariable("mmrepl.capture", "Capture changes of replicated tables.",
							 "Off, the session's changes stay local.", &capture, true, PGC_SUSET, 0,
							 NULL, NULL, NULL);
	DefineCustomBoolVariable("mmrepl.log_conflicts", "Log conflicts found while applying.", NULL,
							 &log_conflicts, true, PGC_SUSET, 0, NULL, NULL, NULL);
	DefineCustomEnumVariable("mmrepl.mode", "Mode of this transaction's captures.",
							 "'pair' leaves it to each pair.", (int *) &mode, (int) Mode::Pair,
							 mode_options, PGC_USERSET, 0, NULL, NULL, NULL);
	DefineCustomEnumVariable("mmrepl.two_phase",
							 "How a transaction of sync pairs ends at its peer.",
							 "'off': the peer commits right after the local commit. 'auto': it "
							 "prepares before and commits after it, if it allows prepared "
							 "transactions. 'on': the same, and an error if it does not.",
							 (int *) &two_phase, (int) TwoPhase::Off, two_phase_options,
							 PGC_USERSET, 0, NULL, NULL, NULL);
	DefineCustomEnumVariable("mmrepl.sync_commit",
							 "What COMMIT waits for at the peers of sync pairs.",
							 "'flushed': that the peer has written it to disk. 'applied': that it "
							 "is committed and visible there; should the peer crash before it is "
							 "on disk, it is delivered again.",
							 (int *) &sync_commit, (int) SyncCommit::Flushed, sync_commit_options,
							 PGC_USERSET, 0, NULL, NULL, NULL);
	DefineCustomEnumVariable("mmrepl.async_commit",
							 "What COMMIT waits for at the peers of async pairs.",
							 "'queued': nothing. 'applied': that the changes are committed and "
							 "visible there. 'flushed': that they are on disk there. "
							 "mmrepl.sync_timeout bounds the wait, which ends with a warning.",
							 (int *) &async_commit, (int) AsyncCommit::Queued, async_commit_options,
							 PGC_USERSET, 0, NULL, NULL, NULL);
	DefineCustomEnumVariable("mmrepl.sync_flush", "When changes of sync pairs travel.", NULL,
							 (int *) &sync_flush, (int) Flush::Statement, flush_options,
							 PGC_USERSET, 0, NULL, NULL, NULL);
}

/* What only a test build has. */
static void
DefineTestSettings()
{
#ifdef MMREPL_FAULT_POINTS
	DefineCustomStringVariable("mmrepl.fault", "Fault to inject: point:action:nth.", NULL,
							   &fault::setting, "", PGC_SUSET, GUC_NOT_IN_SAMPLE,
							   fault::CheckSetting, fault::AssignSetting, NULL);
#endif
}

void
Init()
{
	if (process_shared_preload_libraries_in_progress)
		DefineSharedMemorySettings();
	DefineWorkerSettings();
	DefineSessionSettings();
	DefineTestSettings();
	MarkGUCPrefixReserved("mmrepl");
}

} // namespace mmrepl::guc
