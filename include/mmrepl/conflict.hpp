/*
 * conflict.hpp
 *		What kinds of conflict there are, what is decided, and how it is said.
 *
 * The names are PostgreSQL 18's (its logical replication's).
 */
#pragma once

#include "mmrepl/change.hpp"
#include "mmrepl/pg.hpp"

namespace mmrepl::conflict
{

enum class Type : int
{
	InsertExists,
	UpdateOriginDiffers,
	UpdateExists,
	UpdateMissing,
	DeleteOriginDiffers,
	DeleteMissing,
	MultipleUniqueConflicts
};

enum class Action : int
{
	Apply,	/* write the incoming row over what is there */
	Insert, /* an update of a missing row becomes an insert */
	Skip,
	Error
};

const char *Name(Type type);

/*
 * Pure policy: what to do; row_known: the change carries the whole row; at_writer:
 * the change is made in sync mode, and the user who makes it can be told.
 */
Action Decide(Type type, change::Conflict rule, bool row_known, bool at_writer);

} // namespace mmrepl::conflict
