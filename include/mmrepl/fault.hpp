/*
 * fault.hpp
 *		Fault points: places where a test build can be made to fail.
 *
 * A point is declared by writing one of the macros below where the state has just
 * changed; nothing else has to be told of it.  A test build (the objects of
 * `make fault-library`, compiled with MMREPL_FAULT_POINTS) has the setting
 *		mmrepl.fault = 'point:action:nth'
 * which fires once: at the nth time that any process with this setting comes to
 * the point.  That it has fired is a file, mmrepl_fault/<the setting> in the data
 * directory, which holds the process id and outlives a crash; removing it arms
 * the setting anew.  Actions:
 *		error	ereport(ERROR)
 *		fatal	ereport(FATAL): the process ends as if it was terminated
 *		kill	SIGKILL to the process: the server restarts itself
 *		crash	SIGKILL to the postmaster and to the process: the server is down
 *		wait	until the file is emptied; cancellable where errors are legal
 * In a release build the macros are nothing, and there is no setting.
 *
 * The macros stand in .cpp files only, not in templates, and each name once.
 */
#pragma once

#include "mmrepl/pg.hpp"

#ifdef MMREPL_FAULT_POINTS

namespace mmrepl::fault
{

enum class Legal
{
	Errors, /* the caller may ereport(ERROR) here */
	Crashes /* it may not: only kill, crash and wait are accepted */
};

struct Point
{
	const char *name;
	const char *file;
	int line;
	Legal legal;
};

/* A process has come to the point; does whatever the setting says. */
void Hit(const Point *point);

/* Counters in shared memory; without them (not preloaded) nothing fires. */
Size SharedSize();
void InitShared(bool found, void *where);

/* The setting's value and its hooks. */
extern char *setting;
bool CheckSetting(char **value, void **extra, GucSource source);
void AssignSetting(const char *value, void *extra);

} // namespace mmrepl::fault

/* The linker makes an array of all pointers that stand in this section. */
#define MMREPL_DECLARE_POINT(point_name, point_legal)                                              \
	do                                                                                             \
	{                                                                                              \
		static const mmrepl::fault::Point fault_point = {point_name, __FILE__, __LINE__,           \
														 mmrepl::fault::Legal::point_legal};       \
		__attribute__((section("mmrepl_fault_points"),                                             \
					   used)) static const mmrepl::fault::Point *fault_entry = &fault_point;       \
		mmrepl::fault::Hit(fault_entry);                                                           \
	} while (0)

#define MMREPL_FAULT_POINT(name) MMREPL_DECLARE_POINT(name, Errors)
#define MMREPL_CRASH_POINT(name) MMREPL_DECLARE_POINT(name, Crashes)
#define MMREPL_IN_TEST_BUILD(...) __VA_ARGS__

#else

#define MMREPL_FAULT_POINT(name) ((void) 0)
#define MMREPL_CRASH_POINT(name) ((void) 0)
#define MMREPL_IN_TEST_BUILD(...)

#endif
