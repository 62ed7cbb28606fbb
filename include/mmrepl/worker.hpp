/*
 * worker.hpp
 *		Launcher, stream workers, and the SQL functions that steer them.
 */
#pragma once

#include "mmrepl/pg.hpp"

namespace mmrepl::worker
{

/* Register the launcher; called from _PG_init while preloading. */
void Init();

/* SQL functions; see API comments in the install script. */
Datum SqlDeal(FunctionCallInfo fcinfo);
Datum SqlWaitForReplay(FunctionCallInfo fcinfo);
Datum SqlPause(FunctionCallInfo fcinfo);
Datum SqlResume(FunctionCallInfo fcinfo);
Datum SqlRetryNow(FunctionCallInfo fcinfo);
Datum SqlAcceptPeer(FunctionCallInfo fcinfo);
Datum SqlAdoptNode(FunctionCallInfo fcinfo);
Datum SqlSkip(FunctionCallInfo fcinfo);
Datum SqlDoubts(FunctionCallInfo fcinfo);

} // namespace mmrepl::worker
