/*
 * connection_internal.hpp
 *		What the files of the room connection share.
 */
#pragma once

#include "mmrepl/connection.hpp"

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

/* libpq's text on a connection that could not be had, with the SQLSTATE that it holds. */
void DescribeConnecting(PGconn *conn, const char *server_name, Failure *failure);

} // namespace mmrepl::connection
