/*
 * registration.hpp
 *		Pairs: making, changing and dropping them, the triggers that they make,
 *		and the DDL around them.
 *
 * Whatever is wrong with a pair is said here, when it is registered, with the
 * command that repairs it: a change must not find out later.
 *
 * Who may do what: a pair is made by a role that owns the table and may use the
 * server, and connects with that role's user mapping for as long as it exists.
 * Changing it takes the ownership of the table; changing where the changes go
 * (remote_table, columns, column_map) or which go (row_filter) takes the pair's
 * owner's rights as well, since it is that role's mapping that is used, and with
 * that role's rights that the filter runs.  Dropping it takes one of both, and so
 * does removing its filter.
 */
#pragma once

#include "mmrepl/pg.hpp"

namespace mmrepl::registration
{

/* Watch commands that PostgreSQL would refuse without saying why; called from _PG_init. */
void Init();

/* SQL: mmrepl.create_pair(), alter_pair(), drop_pair(). */
Datum SqlCreatePair(FunctionCallInfo fcinfo);
Datum SqlAlterPair(FunctionCallInfo fcinfo);
Datum SqlDropPair(FunctionCallInfo fcinfo);

/* SQL: mmrepl.resync(server, truncate, force). */
Datum SqlResync(FunctionCallInfo fcinfo);

/* SQL: mmrepl.allow_apply(role), disallow_apply(role). */
Datum SqlAllowApply(FunctionCallInfo fcinfo);
Datum SqlDisallowApply(FunctionCallInfo fcinfo);

/* SQL: mmrepl.fdw_validator(options, catalog). */
Datum SqlFdwValidator(FunctionCallInfo fcinfo);

/* SQL: mmrepl.stat_pairs(), mmrepl.stat_conflicts(): of the pairs whose statistics the caller may see. */
Datum SqlStatPairs(FunctionCallInfo fcinfo);
Datum SqlStatConflicts(FunctionCallInfo fcinfo);

/* Event triggers: mmrepl.on_ddl_end(), mmrepl.on_drop(). */
Datum SqlOnDdlEnd(FunctionCallInfo fcinfo);
Datum SqlOnDrop(FunctionCallInfo fcinfo);

} // namespace mmrepl::registration
