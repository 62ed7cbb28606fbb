/*
 * origin.cpp
 *		The mark of what a peer wrote, and the replica role that goes with it.
 */
#include "mmrepl/origin.hpp"

namespace mmrepl::origin
{

static int entered_level;	/* transaction nest level of Enter(); 0: not applying */
static int role_of_session; /* what SessionReplicationRole was before */

/* Cheap: asked for every row that is written anywhere. */
bool
Applying()
{
	return entered_level > 0;
}

/*
 * Sets the variable itself: going through set_config would throw away every
 * cached plan of the session at each call.
 */
void
Enter()
{
	Assert(entered_level == 0);
	role_of_session = SessionReplicationRole;
	entered_level = GetCurrentTransactionNestLevel();
	SessionReplicationRole = SESSION_REPLICATION_ROLE_REPLICA;
}

/* Without effect when nothing was entered. */
void
Leave()
{
	if (entered_level == 0)
		return;
	entered_level = 0;
	SessionReplicationRole = role_of_session;
}

/* Raises nothing. */
void
Reset(int aborted_nest_level)
{
	if (aborted_nest_level == 0 || entered_level >= aborted_nest_level)
		Leave();
}

} // namespace mmrepl::origin
