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
 * Parse a row filter over the relation's row: one boolean expression, no
 * subquery, aggregate or set-returning or volatile function.  Returns the
 * simplified expression in CurrentMemoryContext, Vars of varno 1.  Raises with
 * the reason when it is not acceptable.
 */
Node *ParseFilter(Relation rel, const char *filter);

/* The settings under which what ParseFilter() returned is evaluated. */
change::Settings SettingsOfFilter(Node *filter);

/*
 * A filter as its author wrote it, parsed under the current settings, in the
 * form in which it is stored and ParseFilter() reads it: names qualified, literals as
 * the fixed settings have them.  The second follows a column's rename (the relation has the new name already).
 */
char *CanonicalFilter(Relation rel, const char *filter);
char *RenameInFilter(Relation rel, const char *filter, const char *old_name, const char *new_name);

/*
 * Capture every row of the table as an INSERT for this pair, in the current
 * transaction; returns their number.  The caller holds a lock that keeps writers
 * out.  Pair 0: for the triggers made by hand that name the server, if any.
 */
int64 CopyTable(Oid table, int32 pair_id, const char *server);

/* Capture a TRUNCATE of the table for this pair; under the same conditions. */
void CaptureTruncate(Oid table, int32 pair_id, const char *server);

} // namespace mmrepl::capture
