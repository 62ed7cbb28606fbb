/*
 * connection_internal.hpp
 *		What the files of the room connection share.
 */
#pragma once

#include "mmrepl/connection.hpp"
#include "mmrepl/shmem.hpp"

namespace mmrepl::connection
{

/* While true, the peer's notices are thrown away instead of logged: nothing may be allocated. */
extern bool hushed;

/* Milliseconds until the deadline, rounded up; -1 when there is none, 0 when it has passed. */
long Remaining(TimestampTz deadline);

/*
 * Wait for one of the socket's events (WL_SOCKET_*), the latch or the deadline;
 * returns the events, none at the deadline.  A set latch is reset, and
 * interrupts are obeyed.
 */
int WaitSocket(int socket, int events, TimestampTz deadline);

/* Fill *failure with something that no PGresult told. */
void SetFailure(Failure *failure, int sqlstate, const char *message);

/* Close every connection of the process; an exit callback. */
void CloseAll(int, Datum);

/* A connection that is given up, whose session at the peer is to end. */
struct Doomed
{
	PGconn *conn;
	bool only_waiting; /* not if it works */
	int place;
};

constexpr int kMaxEndings = shmem::kMaxStreams;

/*
 * Try to end these sessions, all at the same time, in half a second; raises
 * nothing, and the connections are open afterwards.
 */
void EndSessions(const Doomed *list, int count);

/* Note that a connection is doomed; EndDoomed() ends and closes it.  Raises nothing. */
void Doom(const Doomed &doomed);

/* Close one connection, and wait a little for the end of the peer's session.  Raises nothing. */
void CloseAwaited(PGconn *conn);

/* The same for the cached ones whose places others wait for; when the process ends. */
void CloseWanted();

/* ---- places: the bound on cached connections, see connection_places.cpp; -1: uncounted ---- */

/* Get a place, waiting in line if need be; false with *failure filled at the deadline. */
bool TakePlace(Oid server, Oid owner, const char *server_name, TimestampTz deadline, int *place,
			   Failure *failure);

/* Give it back; raises nothing. */
void LeavePlace(int place);

/* The place's connection is used for a transaction from now on. */
void UsePlace(int place);

/*
 * It is not: the session keeps it, or (true) closes it because others wait, and
 * then says YieldPlace().
 */
bool RestPlace(int place);
void YieldPlace(int place);

/* Whether somebody stands in line for a place of that kind. */
bool PlaceIsWanted(int place);

/* libpq's text on a connection that could not be had, with the SQLSTATE that it holds. */
void DescribeConnecting(PGconn *conn, const char *server_name, Failure *failure);

} // namespace mmrepl::connection
