/*
 * base.hpp
 *		Small things of the server that several rooms do in the same way.
 */
#pragma once

#include "mmrepl/pg.hpp"

namespace mmrepl
{

/* The arguments of a ProcessUtility hook, to be passed on as they came. */
struct UtilityCall
{
	PlannedStmt *statement;
	const char *text;
	bool read_only;
	ProcessUtilityContext context;
	ParamListInfo params;
	QueryEnvironment *environment;
	DestReceiver *dest;
	QueryCompletion *completion;
};

/* Run the utility statement through the hook that was there before, or the server's own. */
inline void
RunUtility(ProcessUtility_hook_type previous, const UtilityCall &call)
{
	(previous != NULL ? previous : standard_ProcessUtility)(call.statement, call.text,
															call.read_only, call.context,
															call.params, call.environment,
															call.dest, call.completion);
}

/* Sessions, and those for which they wait: a set of process ids, in the order of finding. */
struct WaitChain
{
	static constexpr int kMax = 256; /* sessions that are asked about, at the most */

	int pids[kMax];
	int count;

	void Add(int pid);
	/* Add whom the i-th one waits for: for a lock, or behind somebody in line for it. */
	void AddBlockersOf(int i);
};

} // namespace mmrepl
