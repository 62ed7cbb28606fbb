/*
 * change_join.cpp
 *		Two segments that follow each other become one.
 *
 * They were closed early, each after one statement, and the later one repeats
 * definitions of the former one.  Records are copied as they are: both number
 * their relations alike.
 */
#include "change_internal.hpp"

namespace mmrepl::change
{

/* Whether a definition of the one segment is missing in the other. */
static bool
IsNew(const Segment *into, const Segment *from, int i)
{
	return from->relation_offsets[i] != 0 &&
		   (i >= into->n_relations || into->relation_offsets[i] == 0);
}

/* Whether both number their relations alike, and the definitions can be told apart. */
static bool
NumberedAlike(const Segment *into, const Segment *from)
{
	int shared = Min(into->n_relations, from->n_relations);

	for (int i = 0; i < from->n_relations; i++)
		if (from->relation_offsets[i] != 0 && from->relation_lengths[i] == 0)
			return false;
	return memcmp(into->relations, from->relations, sizeof(uint64) * shared) == 0;
}

/* Bytes at the segment's position that are a definition which the other one has; 0: none. */
static uint32
RepeatedAt(const Segment *into, const Segment *from, uint32 position, uint32 *until)
{
	*until = from->length;
	for (int i = 0; i < from->n_relations; i++)
	{
		uint32 offset = from->relation_offsets[i];

		if (offset == 0 || offset < position || IsNew(into, from, i))
			continue;
		if (offset == position)
			return from->relation_lengths[i];
		*until = Min(*until, offset);
	}
	return 0;
}

/* A piece of the other segment goes to the end, with the definitions that are in it. */
static void
AppendPiece(Segment *into, const Segment *from, uint32 begin, uint32 end)
{
	Cursor out = CursorAtEnd(into);

	memcpy(out.Reserve(end - begin), from->data + VARHDRSZ + begin, end - begin);
	for (int i = 0; i < from->n_relations; i++)
	{
		uint32 offset = from->relation_offsets[i];

		if (offset < begin || offset >= end || !IsNew(into, from, i))
			continue;
		into->relations[i] = from->relations[i];
		into->relation_offsets[i] = (uint16) (into->length + offset - begin);
		into->relation_lengths[i] = from->relation_lengths[i];
	}
	into->length = out.position;
}

bool
Absorb(Segment *into, const Segment *from)
{
	uint32 position = 1; /* behind the version */

	if (into->spilled || from->spilled || (uint64) into->length + from->length > kSegmentTarget ||
		!NumberedAlike(into, from))
		return false;
	(void) CursorAtEnd(into).Reserve(from->length); /* what can fail, fails here */
	while (position < from->length)
	{
		uint32 until;
		uint32 repeated = RepeatedAt(into, from, position, &until);

		if (repeated == 0)
			AppendPiece(into, from, position, until);
		position = repeated == 0 ? until : position + repeated;
	}
	for (int i = into->n_relations; i < from->n_relations; i++)
		into->relations[i] = from->relations[i];
	into->n_relations = Max(into->n_relations, from->n_relations);
	into->changes += from->changes;
	return true;
}

} // namespace mmrepl::change
