/*
 * change_internal.hpp
 *		What the files of the room change share.
 */
#pragma once

#include "mmrepl/change.hpp"

namespace mmrepl::change
{

/* How the bytes of a binary column are made without calling a function. */
enum class Wire : char
{
	Bool,
	Int16, /* integers, sent trimmed */
	Int32,
	Int64,
	Bits32, /* sent at full width */
	Bits64,
	Varlena, /* the plain bytes of text and bytea */
	Uuid,
	Function, /* the type's send function */
	Text	  /* not binary: the type's output function */
};

/*
 * How a base type travels.  Only types whose OID is fixed for ever and whose
 * binary form is the same on every server are binary; send functions that
 * convert encodings are not used.
 */
Wire WireOf(Oid base_type);

/* OIDs below this are assigned by hand and equal on all servers. */
constexpr Oid kFirstUnstableOid = 10000;

} // namespace mmrepl::change
