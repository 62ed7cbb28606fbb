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

} // namespace mmrepl
