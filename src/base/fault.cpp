/*
 * fault.cpp
 *		What happens at a fault point.  In a release build this file is empty.
 */
#include "mmrepl/fault.hpp"

#ifdef MMREPL_FAULT_POINTS

#include "mmrepl/error.hpp"

/* The section's first entry, and the end of its last one. */
extern "C" {
extern const mmrepl::fault::Point *__start_mmrepl_fault_points[];
extern const mmrepl::fault::Point *__stop_mmrepl_fault_points[];
}

namespace mmrepl::fault
{

char *setting;

constexpr const char *kDirectory = "mmrepl_fault"; /* in the data directory */
constexpr int kMaxPoints = 256;
constexpr int kPollEvery = 5000; /* microseconds, while waiting */

enum class Action
{
	Error,
	Fatal,
	Kill,
	Crash,
	Wait
};

static constexpr const char *action_names[] = {"error", "fatal", "kill", "crash", "wait"};

struct Armed
{
	const Point *point; /* NULL: nothing is */
	Action action;
	uint32 nth;
};

static Armed armed;

/* Hits of a setting are counted together, whichever processes they come from. */
static struct Shared
{
	slock_t mutex;
	char setting[NAMEDATALEN * 2]; /* that is being counted */
	uint32 count;
	pg_atomic_uint64 hits[kMaxPoints]; /* of each point, since the server's start */
} * shared;

/* ---- points ---- */

static int
CountPoints()
{
	return (int) (__stop_mmrepl_fault_points - __start_mmrepl_fault_points);
}

static const Point *
PointAt(int index)
{
	return __start_mmrepl_fault_points[index];
}

static int
IndexOf(const Point *point)
{
	int index = 0;

	while (PointAt(index) != point)
		index++;
	return index;
}

static const Point *
FindPoint(const char *name, size_t length)
{
	for (int i = 0; i < CountPoints(); i++)
		if (strlen(PointAt(i)->name) == length && strncmp(PointAt(i)->name, name, length) == 0)
			return PointAt(i);
	return NULL;
}

/* ---- the setting ---- */

static bool
ParseAction(const char *name, size_t length, Action *action)
{
	for (size_t i = 0; i < lengthof(action_names); i++)
		if (strlen(action_names[i]) == length && strncmp(action_names[i], name, length) == 0)
		{
			*action = (Action) i;
			return true;
		}
	return false;
}

/* 'point:action:nth'; NULL, or what is wrong with it. */
static const char *
Parse(const char *value, Armed *result)
{
	const char *action = strchr(value, ':');
	const char *nth = action == NULL ? NULL : strchr(action + 1, ':');
	char *end;

	*result = {};
	if (value[0] == '\0')
		return NULL;
	if (nth == NULL || strlen(value) >= sizeof(shared->setting))
		return "It has the form point:action:nth.";
	result->point = FindPoint(value, action - value);
	if (result->point == NULL)
		return "There is no such point.";
	if (!ParseAction(action + 1, nth - action - 1, &result->action))
		return "Actions are error, fatal, kill, crash and wait.";
	if (result->point->legal == Legal::Crashes && result->action <= Action::Fatal)
		return "Errors are not legal at this point.";
	result->nth = (uint32) strtoul(nth + 1, &end, 10);
	return result->nth == 0 || *end != '\0' ? "The last part is a number from 1." : NULL;
}

bool
CheckSetting(char **value, void **, GucSource)
{
	Armed parsed;
	const char *wrong = Parse(*value, &parsed);

	if (wrong != NULL)
		GUC_check_errdetail("%s", wrong);
	return wrong == NULL;
}

void
AssignSetting(const char *value, void *)
{
	if (Parse(value, &armed) != NULL)
		armed = {};
}

/* ---- firing ---- */

/* Whether this is the nth time; then the count begins anew. */
static bool
CountHit()
{
	SpinLockAcquire(&shared->mutex);
	if (strcmp(shared->setting, setting) != 0)
	{
		strlcpy(shared->setting, setting, sizeof(shared->setting));
		shared->count = 0;
	}
	bool due = ++shared->count == armed.nth;

	if (due)
		shared->count = 0;
	SpinLockRelease(&shared->mutex);
	return due;
}

static void
PathOfMark(char *path, size_t size)
{
	snprintf(path, size, "%s/%s", kDirectory, setting);
}

/* Leave the mark; false when it is there: the setting has fired before. */
static bool
Mark()
{
	char path[MAXPGPATH];
	char text[32];

	PathOfMark(path, sizeof(path));
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);

	if (fd < 0)
		return false;
	snprintf(text, sizeof(text), "%d\n", MyProcPid);
	bool written = write(fd, text, strlen(text)) == (ssize_t) strlen(text);

	close(fd);
	return written;
}

/* Whether a test has emptied, or removed, the mark. */
static bool
Released()
{
	char path[MAXPGPATH];
	struct stat status;

	PathOfMark(path, sizeof(path));
	return stat(path, &status) != 0 || status.st_size == 0;
}

static void
WaitForRelease(const Point *point)
{
	while (!Released() && PostmasterIsAlive())
	{
		pg_usleep(kPollEvery);
		if (point->legal == Legal::Errors)
			CHECK_FOR_INTERRUPTS();
	}
}

static void
Fire(const Point *point)
{
	write_stderr("mmrepl: fault \"%s\" fires in process %d, %s:%d\n", setting, MyProcPid,
				 point->file, point->line);
	switch (armed.action)
	{
		case Action::Error:
		case Action::Fatal:
			ereport(armed.action == Action::Error ? ERROR : FATAL,
					(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
					 errmsg("fault point \"%s\" was reached", point->name)));
			break;
		case Action::Crash:
			kill(PostmasterPid, SIGKILL);
			[[fallthrough]];
		case Action::Kill:
			kill(MyProcPid, SIGKILL);
			break;
		case Action::Wait:
			WaitForRelease(point);
			break;
	}
}

void
Hit(const Point *point)
{
	if (shared == NULL)
		return;
	pg_atomic_fetch_add_u64(&shared->hits[IndexOf(point)], 1);
	if (armed.point == point && CountHit() && Mark())
		Fire(point);
}

/* ---- shared memory, SQL ---- */

Size
SharedSize()
{
	return sizeof(Shared);
}

void
InitShared(bool found, void *where)
{
	shared = (Shared *) where;
	if (found)
		return;
	memset(shared, 0, sizeof(Shared));
	SpinLockInit(&shared->mutex);
	(void) MakePGDirectory(kDirectory);
	MmreplEnsure(CountPoints() <= kMaxPoints, "there are more than %d fault points", kMaxPoints);
}

/*
 * All points with what they allow and how often they were hit.  No script of the
 * extension has it; tests say
 *		CREATE FUNCTION fault_points(OUT name text, OUT errors boolean, OUT hits bigint)
 *		RETURNS SETOF record LANGUAGE c AS '$libdir/mmrepl_bgw', 'mmrepl_fault_points';
 */
static Datum
SqlFaultPoints(FunctionCallInfo fcinfo)
{
	InitMaterializedSRF(fcinfo, 0);
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;

	for (int i = 0; i < CountPoints(); i++)
	{
		const Point *point = PointAt(i);
		uint64 hits = shared == NULL ? 0 : pg_atomic_read_u64(&shared->hits[i]);
		Datum values[] = {CStringGetTextDatum(point->name),
						  BoolGetDatum(point->legal == Legal::Errors), Int64GetDatum((int64) hits)};
		bool nulls[lengthof(values)] = {};

		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	return (Datum) 0;
}

} // namespace mmrepl::fault

MMREPL_FUNCTION(mmrepl_fault_points, mmrepl::fault::SqlFaultPoints);

#endif
