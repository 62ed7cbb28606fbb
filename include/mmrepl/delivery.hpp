/*
 * delivery.hpp
 *		A batch of change sets and how it is handed to a peer: SELECT mmrepl.apply($1).
 *
 * The batch's format, read by the receiver (room apply):
 * (format: batch.hpp)
 */
#pragma once

#include "mmrepl/batch.hpp"
#include "mmrepl/change.hpp"
#include "mmrepl/connection.hpp"
#include "mmrepl/pg.hpp"

namespace mmrepl::delivery
{

/* A batch under construction; `buf` is in the context current at Begin(). */
struct Batch
{
	StringInfoData buf; /* the bytea's content */
	uint64 previous;
	uint64 last;
	uint64 first;
	int transactions;
	int64 changes;
	int segments_at; /* where the open transaction's segment count stands */
};

struct Header
{
	uint8 flags;
	pg_uuid_t node;
	int32 stream;
	uint64 clock;
	uint64 previous;
	uint64 sweep_xid;
	uint32 part;
};

void Begin(Batch *batch, const Header &header);
void AddTransaction(Batch *batch, uint64 ticket, uint64 xid, uint8 flags, int64 changes);
void AddSegment(Batch *batch, const char *data, uint32 length);
/* The transaction added last ends in this batch after all: take back kMore. */
void ClearMore(Batch *batch);
/* Whether the batch has a turn, and is executed ahead (kTurn, kAhead), both also when it was set. */
void SetTurn(Batch *batch, bool turn, bool ahead);
/* The batch's commit at the peer need not be flushed (kRelaxed). */
void SetRelaxed(Batch *batch);
/* Write the watermark that holds after the batch. */
void Finish(Batch *batch, uint64 last);

/* What the peer said of itself. */
struct Peer
{
	int protocol;
	pg_uuid_t node;
	uint64 watermark; /* of our stream */
	int server_version;
};

/*
 * SELECT mmrepl.hello(node, stream, protocol): raises the peer's error, or
 * ERRCODE_MMREPL_PEER_LACKS_EXTENSION with the CREATE EXTENSION command as hint.
 */
Peer Hello(PGconn *conn, const char *server_name, const pg_uuid_t &node, int32 stream,
		   TimestampTz deadline);

/* The same, but false with *failure filled (hints included) instead of an error. */
bool TryHello(PGconn *conn, const pg_uuid_t &node, int32 stream, TimestampTz deadline, Peer *peer,
			  connection::Failure *failure);

/*
 * Whether the peer stands behind a watermark that it has reported: it has lost changes
 * that it had confirmed.  Then *failure says so (ERRCODE_MMREPL_REWOUND), and how to go on.
 */
bool HasLostChanges(const Peer &peer, uint64 acked, const char *server_name,
					connection::Failure *failure);

/* Queue the batch for sending (non-blocking connection, extended protocol, binary parameter). */
bool Send(PGconn *conn, const Batch *batch);
/* Queue the BEGIN of a transaction that batches are to be parts of. */
bool SendBegin(PGconn *conn);

/* Queue, in a pipeline, what rolls back all that stands behind the last sync message; false as Send(). */
bool SendRollback(PGconn *conn);

/* The watermark that apply() returned. */
uint64 ReadWatermark(const PGresult *res);

} // namespace mmrepl::delivery
