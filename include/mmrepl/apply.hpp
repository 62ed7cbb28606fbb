/*
 * apply.hpp
 *		The receiver: mmrepl.apply(bytea), mmrepl.hello(...).
 *
 * The trust boundary: any bytes may come, and none may crash the backend or
 * write what the calling role may not.
 */
#pragma once

#include "mmrepl/pg.hpp"

namespace mmrepl::apply
{

/*
 * Apply a batch (format: batch.hpp) in the current transaction; returns the
 * stream's watermark after it.  The watermark row is locked first.
 */
uint64 ApplyBatch(const char *data, uint32 length);

/* Shared memory: which batches have begun (apply_turn.cpp). */
Size SharedSize();
void InitShared(bool found, void *where);

/* The watermark of a peer's stream; makes the progress row when there is none. */
uint64 Watermark(const pg_uuid_t &node, int32 stream);

/* SQL: mmrepl.apply(bytea) and mmrepl.hello(uuid, integer, integer). */
Datum SqlApply(FunctionCallInfo fcinfo);
Datum SqlHello(FunctionCallInfo fcinfo);

/* Forget per-transaction state (called at the end of a transaction, committed or not). */
void AtTransactionEnd();

#ifdef MMREPL_FAULT_POINTS
/* The fault point of a transaction that has called apply() and is about to commit. */
void HitBeforeCommit();
#endif

} // namespace mmrepl::apply
