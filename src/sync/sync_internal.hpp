/*
 * sync_internal.hpp
 *		What the files of the room sync share.
 */
#pragma once

#include "mmrepl/sync.hpp"

namespace mmrepl::sync
{

/* How a conversation with the peer ended. */
enum class Outcome
{
	Done,
	Refused, /* the peer raised an error; the session is there */
	Stale,	 /* another connection than the one asked for: nothing was sent over it */
	Lost	 /* the session is gone, or silent until the deadline */
};

/* Something to be executed at the peer. */
struct Request
{
	Work *work;
	uint64 xid;
	int nest_level;
	TimestampTz deadline;
	connection::Failure *failure; /* filled unless Done */
};

/* A pipeline under way: the commands sent, and how far their answers have come. */
struct Pipeline
{
	const Request *request;
	PGconn *conn;
	StringInfoData steps;
	int step;		 /* the one whose answer is next */
	int syncs;		 /* ends of parts that are still to come */
	uint32 parts;	 /* batches sent with it and before */
	bool sent;		 /* false: libpq refused to send */
	Outcome outcome; /* of the answers */
};

/*
 * Parts that were sent without waiting for their answers, one behind the other in
 * one pipeline: so that several peers work at a time, or the user does.
 */
struct Posted
{
	Request request;
	connection::Failure failure;
	Pipeline pipeline;
	Outcome outcome; /* of the way to the peer; Done: they were sent */
	bool fresh;		 /* the connection was made for it */
	bool expected;	 /* the request's deadline is the answer's */
	uint32 kept;	 /* batches that stood at the peer before */
	Size bytes;
	change::Segment *first;
	change::Segment *last; /* NULL: none was sent */
};

/* A Posted that lives as long as the transaction, as do its strings. */
Posted *StartPost(const Request &request, change::Segment *first);

/* Send the next part, and do not wait. */
void PostPart(Posted *posted, change::Segment *from);

/* Whether another part may be sent: not if megabytes are on their way. */
bool MayPost(const Posted *posted);

/* Take in what has arrived, without waiting; whether FinishPost() will not wait either. */
bool Arrived(Posted *posted);

/* The answers to what was posted, or why it was not sent; moves *next behind it. */
Outcome FinishPost(const Request &request, change::Segment **next, bool *fresh);

/*
 * Get the session's connection into the work, introduced to the peer and with
 * the right lock_timeout; *fresh tells that it was just made.
 */
Outcome Reach(const Request &request, bool *fresh);

/*
 * Send the next part of the unsent segments from *next on, with whatever has to
 * be done before it, and wait for the answers; moves *next behind the part.
 */
Outcome SendPart(const Request &request, change::Segment **next);

/* Whether the work's remote transaction is still there and can be used. */
bool Usable(const Work *work);

/* Forget the connection and what was sent over it; raises nothing. */
void Reset(Work *work);

/* The batches that stand at the peer if what is on its way there is lost. */
uint32 Kept(const Work *work);

/*
 * The remote transaction is lost: close the connection.  What the first `kept`
 * batches held is lost as well, so with any the work is broken.  Raises nothing.
 */
void Drop(Work *work, uint32 kept);

/* The same, and what still runs there is to be ended: by EndAbandoned(). */
void Abandon(Work *work, uint32 kept);

/* Raise what the peer refused; a lock wait that was too long is a deadlock to the user. */
[[noreturn]] void RaiseRefusal(const Work *work, const connection::Failure *failure,
							   const char *command);

/* Raise unless the remote transaction, if one was begun, is there and can be used. */
void RequireUsable(Work *work);

/* What a failed command means: the session was lost with it (or stayed silent), or refused it. */
Outcome Judge(const Work *work, const connection::Failure *failure);

/* With two_phase = 'on': raise unless the peer allows prepared transactions.  *allowed tells. */
Outcome RequireTwoPhase(const Request &request, bool *allowed);

/* Bound of a command that runs in a callback, in milliseconds. */
int QuietTimeout();

} // namespace mmrepl::sync
