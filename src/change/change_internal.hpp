/*
 * change_internal.hpp
 *		What the files of the room change share.
 */
#pragma once

#include "mmrepl/change.hpp"

namespace mmrepl::change
{

/*
 * How a base type travels.  Only types whose OID is fixed for ever and whose
 * binary form is the same on every server are binary; send functions that
 * convert encodings are not used.
 */
Wire WireOf(Oid base_type);

/* Whether values are put without calling a function, as wide as their type says. */
bool IsFixed(Wire wire);

/* The bytes of a value that is not of fixed width; in the current context or inside the value. */
Value BytesOf(Wire wire, FmgrInfo *output, Datum value);

/* OIDs below this are assigned by hand and equal on all servers. */
constexpr Oid kFirstUnstableOid = 10000;

} // namespace mmrepl::change
