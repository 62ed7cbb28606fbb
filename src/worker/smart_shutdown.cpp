/*
 * smart_shutdown.cpp
 *		Sessions of peers do not hold up a smart shutdown.
 *
 * A smart shutdown waits for every client to leave, and tells nobody but the
 * server's status file.  Peers keep their connections for ever.  So while peers
 * are connected, the launcher looks into the file, and when the server is
 * stopping it ends their sessions as soon as they have no transaction open.
 * They come back when the server does.
 */
#include "worker_internal.hpp"

namespace mmrepl::worker
{

constexpr int64 kLookEvery = USECS_PER_SEC;
constexpr int64 kEndEvery = USECS_PER_SEC / 10; /* once the server is stopping */

/* Whether the postmaster has written that it is stopping; false when nobody can tell. */
static bool
ServerIsStopping()
{
	char text[2048];
	int fd = BasicOpenFile("postmaster.pid", O_RDONLY | PG_BINARY);

	if (fd < 0)
		return false;
	ssize_t length = read(fd, text, sizeof(text) - 1);

	close(fd);
	text[Max(length, 0)] = '\0';
	const char *line = text;

	for (int i = 1; i < LOCK_FILE_LINE_PM_STATUS && line != NULL; i++)
	{
		line = strchr(line, '\n');
		line = line == NULL ? NULL : line + 1;
	}
	return line != NULL && strncmp(line, PM_STATUS_STOPPING, strlen(PM_STATUS_STOPPING)) == 0;
}

/* End the session unless a transaction is open in it. */
static void
EndIfIdle(int pid)
{
	PGPROC *proc = BackendPidGetProc(pid);

	if (proc != NULL && !LocalTransactionIdIsValid(LocalTransactionOf(proc)))
		kill(pid, SIGTERM);
}

/* Do that for all; returns whether there was any. */
static bool
ForEachPeer(bool end)
{
	bool any = false;

	for (int i = 0; i < shmem::Get().n_slots; i++)
	{
		uint32 pid = pg_atomic_read_u32(&shmem::SlotOf(i).peer_session);

		any |= pid != 0;
		if (pid != 0 && end)
			EndIfIdle((int) pid);
	}
	return any;
}

TimestampTz
LetPeersGo()
{
	static TimestampTz next;
	TimestampTz now = GetCurrentTimestamp();

	if (next > now)
		return next;
	if (!ForEachPeer(false))
		return 0;
	bool stopping = ServerIsStopping();

	if (stopping)
		ForEachPeer(true);
	next = now + (stopping ? kEndEvery : kLookEvery);
	return next;
}

} // namespace mmrepl::worker
