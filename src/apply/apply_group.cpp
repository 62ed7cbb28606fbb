/*
 * apply_group.cpp
 *		Runs of updates of one table: found together, written in their order.
 *
 * Rows at random places are in memory, but seldom in the processor's caches, and
 * most of the time of an update goes into waiting for them.  So the index is asked
 * for a group of rows first, and their pages are on the way while it is asked for
 * the next ones.
 */
#include "apply_internal.hpp"

#include "mmrepl/fault.hpp"

namespace mmrepl::apply
{

/* A run of one is somebody's only change: it is looked for when it is written. */
static void
LocateAll(Target *target)
{
	Run *run = target->run;

	for (int i = 0; i < run->count; i++)
		run->places[i] = Locate(target->leaves, run->updates[i]);
	StopLocating(target->leaves);
	MMREPL_FAULT_POINT("apply-located");
}

void
WriteUpdates(Session *session, Target *target)
{
	Run *run = target->run;

	if (run->count > 1)
		LocateAll(target);
	else
		ItemPointerSetInvalid(&run->places[0]);
	for (int i = 0; i < run->count; i++)
	{
		session->ticket = run->tickets[i];
		WriteCollectedUpdate(session, target, run->updates[i], run->places[i]);
		ExecClearTuple(run->updates[i]);
	}
	session->updating = NULL;
	StopLocating(target->leaves);
}

} // namespace mmrepl::apply
