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

/* The same relation without those columns (by their places), in the current context. */
RelationEncoder *BuildPartial(const RelationEncoder *rel, const Bitmapset *sparing);

/* OIDs below this are assigned by hand and equal on all servers. */
constexpr Oid kFirstUnstableOid = 10000;

/* The largest segment: what fits a bytea parameter with its batch header. */
constexpr uint64 kSegmentLimit = MaxAllocSize - 65536;

/* ---- raw output into a segment: a cursor that is committed at the end ---- */

struct Cursor
{
	Segment *segment;
	uint32 position; /* of the next byte, in the payload */

	/* Make room for more bytes; raises before anything is written. */
	char *Reserve(uint64 bytes)
	{
		uint64 need = (uint64) position + bytes;

		if (unlikely(need > segment->capacity))
			Grow(need);
		char *at = segment->data + VARHDRSZ + position;
		position += (uint32) bytes;
		return at;
	}
	void Grow(uint64 need)
	{
		if (need > kSegmentLimit)
			ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
							errmsg("row is too large to be replicated"),
							errdetail("One change may take up to %llu bytes.",
									  (unsigned long long) kSegmentLimit)));
		uint64 capacity = Min(Max(need, (uint64) segment->capacity * 2), kSegmentLimit);

		segment->data = (char *) repalloc(segment->data, capacity + VARHDRSZ);
		segment->capacity = (uint32) capacity;
	}
	void U8(uint8 value) { *Reserve(1) = (char) value; }
	void U16(uint16 value)
	{
		value = pg_hton16(value);
		memcpy(Reserve(2), &value, 2);
	}
	void U32(uint32 value)
	{
		value = pg_hton32(value);
		memcpy(Reserve(4), &value, 4);
	}
	void U64(uint64 value)
	{
		value = pg_hton64(value);
		memcpy(Reserve(8), &value, 8);
	}
	void Varint(uint64 value)
	{
		for (; value >= 0x80; value >>= 7)
			U8((uint8) (value | 0x80));
		U8((uint8) value);
	}
	/* Head of a record. */
	void Head(uint8 code, uint8 rel) { U8((uint8) (code << kCodeShift | rel)); }

	/* A number of bytes and then so many, without bytes that only repeat the sign. */
	void Trimmed(int64 value)
	{
		constexpr int room = 1 + (int) sizeof(int64);
		uint64 magnitude = (uint64) (value ^ (value >> 63));
		int bytes = magnitude == 0 ? 1 : pg_leftmost_one_pos64(magnitude) / 8 + 1;

		/* The sign needs a bit of its own. */
		if (bytes < (int) sizeof(int64) && (magnitude >> (8 * bytes - 1)) != 0)
			bytes++;
		uint64 wire = pg_hton64((uint64) value << (8 * ((int) sizeof(int64) - bytes)));
		char *at = Reserve(room);

		at[0] = (char) (bytes + 1);
		memcpy(at + 1, &wire, sizeof(wire));
		position -= (uint32) (sizeof(int64) - bytes);
	}
	void Sized(const char *bytes, uint64 length)
	{
		Varint(length + 1);
		memcpy(Reserve(length), bytes, length);
	}
};

inline Cursor
CursorAtEnd(Segment *segment)
{
	return Cursor{segment, segment->length};
}

} // namespace mmrepl::change
