/*
 * sql_api.cpp
 *		Every function that SQL can call: its C symbol, and the room it is in.
 */
#include "mmrepl/apply.hpp"
#include "mmrepl/capture.hpp"
#include "mmrepl/catalog.hpp"
#include "mmrepl/error.hpp"
#include "mmrepl/queue.hpp"
#include "mmrepl/registration.hpp"
#include "mmrepl/stats.hpp"
#include "mmrepl/worker.hpp"

using namespace mmrepl;

/* Pairs. */
MMREPL_FUNCTION(mmrepl_replicate, capture::SqlReplicate);
MMREPL_FUNCTION(mmrepl_create_pair, registration::SqlCreatePair);
MMREPL_FUNCTION(mmrepl_alter_pair, registration::SqlAlterPair);
MMREPL_FUNCTION(mmrepl_drop_pair, registration::SqlDropPair);
MMREPL_FUNCTION(mmrepl_resync, registration::SqlResync);
MMREPL_FUNCTION(mmrepl_fdw_validator, registration::SqlFdwValidator);
MMREPL_FUNCTION(mmrepl_on_ddl_end, registration::SqlOnDdlEnd);
MMREPL_FUNCTION(mmrepl_on_drop, registration::SqlOnDrop);

/* The receiver. */
MMREPL_FUNCTION(mmrepl_apply, apply::SqlApply);
MMREPL_FUNCTION(mmrepl_hello, apply::SqlHello);
MMREPL_FUNCTION(mmrepl_allow_apply, registration::SqlAllowApply);
MMREPL_FUNCTION(mmrepl_disallow_apply, registration::SqlDisallowApply);

/* The node. */
MMREPL_FUNCTION(mmrepl_node_id, catalog::SqlNodeId);
MMREPL_FUNCTION(mmrepl_adopt_node, worker::SqlAdoptNode);

/* The queue. */
MMREPL_FUNCTION(mmrepl_queued_changes, queue::SqlQueuedChanges);
MMREPL_FUNCTION(mmrepl_deal_sync_err_rec, worker::SqlDeal);
MMREPL_FUNCTION(mmrepl_wait_for_replay, worker::SqlWaitForReplay);
MMREPL_FUNCTION(mmrepl_pause, worker::SqlPause);
MMREPL_FUNCTION(mmrepl_resume, worker::SqlResume);
MMREPL_FUNCTION(mmrepl_accept_peer, worker::SqlAcceptPeer);
MMREPL_FUNCTION(mmrepl_retry_now, worker::SqlRetryNow);
MMREPL_FUNCTION(mmrepl_skip, worker::SqlSkip);
MMREPL_FUNCTION(mmrepl_doubts, worker::SqlDoubts);

/* Statistics. */
MMREPL_FUNCTION(mmrepl_stat_streams, stats::StatStreams);
MMREPL_FUNCTION(mmrepl_stat_pairs, registration::SqlStatPairs);
MMREPL_FUNCTION(mmrepl_stat_conflicts, registration::SqlStatConflicts);
MMREPL_FUNCTION(mmrepl_reset_counters, stats::ResetCounters);
MMREPL_FUNCTION(mmrepl_may_see_statistics, stats::SqlMaySeeStatistics);
