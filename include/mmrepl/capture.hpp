/*
 * capture.hpp
 *		The trigger function: from a row event to records in the transaction's buffer.
 */
#pragma once

#include "mmrepl/change.hpp"

namespace mmrepl::capture
{

/* Register the capture cache's invalidation; called from _PG_init. */
void Init();

/* mmrepl.replicate(): body of the row and the TRUNCATE trigger. */
Datum SqlReplicate(FunctionCallInfo fcinfo);

/*
 * Row filters: one boolean expression over the relation's row, no subquery,
 * aggregate or set-returning or volatile function.  Whatever code there is in one
 * runs as the pair's owner, in a security-restricted operation.
 *
 * Raise with the reason when a stored filter does not compile any more.
 */
void CheckFilter(Relation rel, const char *filter, Oid owner);

/*
 * A filter as its author wrote it, parsed under the current settings, in the
 * form in which it is stored: names qualified, literals as the fixed settings have
 * them.  The second follows a column's rename (the relation has the new name already).
 * Raise like CheckFilter().
 */
char *CanonicalFilter(Relation rel, const char *filter, Oid owner);
char *RenameInFilter(Relation rel, const char *filter, Oid owner, const char *old_name,
					 const char *new_name);

/*
 * Capture every row of the table as an INSERT for this pair, in the current
 * transaction; returns their number.  The caller holds a lock that keeps writers
 * out.  Pair 0: for the triggers made by hand that name the server, if any.
 */
int64 CopyTable(Oid table, int32 pair_id, const char *server);

/* Capture a TRUNCATE of the table for this pair; under the same conditions. */
void CaptureTruncate(Oid table, int32 pair_id, const char *server);

} // namespace mmrepl::capture
