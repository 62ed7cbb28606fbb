/*
 * origin.hpp
 *		"This write came from a peer": the backend-local mark that prevents loops.
 */
#pragma once

#include "mmrepl/pg.hpp"

namespace mmrepl::origin
{

/*
 * True while mmrepl.apply() writes.  It is no setting: no user can set it and
 * no pooler can lose it.
 */
bool Applying();

/*
 * Mark what follows as coming from a peer, in the session's replica role;
 * Leave() on normal return.  Does not nest.
 */
void Enter();
void Leave();

/*
 * Clear the mark and give the session its own role back; safe at any time.  At
 * the abort of a subtransaction its nest level is given: the mark stays when it
 * was set further out, for that apply() goes on.  0: clear it in any case.
 */
void Reset(int aborted_nest_level = 0);

} // namespace mmrepl::origin
