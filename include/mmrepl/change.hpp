/*
 * change.hpp
 *		The change set: the one value that capture, queue, delivery, apply and
 *		sync_err_rec exchange, and its one codec.
 *
 * A transaction's change set is a sequence of segments, each self-contained:
 *
 *	 segment  := version:u8 record*
 *	 record   := 'R' rel:u16 relation		defines rel for the rest of the segment
 *			   | 'I' rel:u16 tuple			the new row
 *			   | 'U' rel:u16 flags:u8 [key] tuple	flags & kOldKey: key values before
 *			   | 'D' rel:u16 key			key values of the row that went
 *			   | 'T' rel:u16				TRUNCATE
 *	 relation := string:remote schema, string:remote table, string:local schema,
 *				 string:local table, conflict:u8, pair:varint, columns:varint, column*
 *	 column   := string:remote name, flags:u8, type
 *	 type     := oid:varint when it is built in (< 16384),
 *				 else 0:varint string:schema string:name
 *	 tuple    := value of every column, in the relation's order
 *	 key      := value of every key column, in the relation's order
 *	 value    := length+1:varint bytes | 0:varint (NULL)
 *	 string   := length:varint bytes
 *
 * Integers are big-endian; varint is LEB128.  A value's bytes are the type's
 * binary send format when the column has kBinary, else its text form under the
 * settings of TextFormat; text is in the database encoding of the sender,
 * which the batch header names.  (Binary is used only for built-in types whose
 * send format holds no text, except that text types send their plain bytes.)
 *
 * Decoding trusts nothing: each length is checked, an error is
 * ERRCODE_MMREPL_BAD_BATCH and never a crash.
 */
#pragma once

#include "mmrepl/error.hpp"
#include "mmrepl/pg.hpp"

namespace mmrepl::change
{

constexpr uint8 kVersion = 1;

enum Kind : char
{
	kRelation = 'R',
	kInsert = 'I',
	kUpdate = 'U',
	kDelete = 'D',
	kTruncate = 'T'
};

constexpr uint8 kOldKey = 1; /* flags of an update */

constexpr uint8 kKey = 1; /* flags of a column */
constexpr uint8 kBinary = 2;

enum class Conflict : char
{
	ApplyRemote = 'a',
	KeepLocal = 'k',
	Error = 'e'
};

/* The parsing of 'apply_remote' and so on; false when there is no such name. */
bool ConflictFromName(const char *name, Conflict *result);
const char *ConflictName(Conflict conflict);

/* ---- writing ---- */

/* How one column of a captured table is sent. */
struct ColumnEncoder
{
	int16 attnum;
	bool key;
	bool binary;
	bool by_text; /* text form depends on settings: needs TextFormat */
	Oid type;	  /* of the column, domains flattened when binary */
	FmgrInfo output;
};

/*
 * A relation as its segments describe it.  Built once per cached pair, in the
 * cache's context.
 */
struct RelationEncoder
{
	uint64 serial;	  /* unique in the process: identifies the definition in a segment */
	char *definition; /* the 'relation' of the grammar */
	uint32 definition_length;
	int n_columns;
	ColumnEncoder *columns;
	bool needs_text_format;
};

/* What a RelationEncoder is built from; strings are copied into the definition. */
struct ColumnSpec
{
	int16 attnum;
	const char *remote_name;
	bool key;
};

struct RelationSpec
{
	const char *remote_schema;
	const char *remote_table;
	const char *local_schema;
	const char *local_table;
	Conflict conflict;
	int32 pair_id;
	int n_columns;
	const ColumnSpec *columns;
};

/* Build in CurrentMemoryContext; reads the type catalogs. */
RelationEncoder *BuildRelationEncoder(const RelationSpec &spec, TupleDesc desc);

constexpr uint32 kSegmentTarget = 7900; /* a segment is closed when it reaches this */
constexpr int kSegmentRelations = 32;	/* and when it defines more relations than this */

/* One segment while it is being written.  Memory belongs to `context`. */
struct Segment
{
	Segment *next;
	uint32 seq; /* place in the transaction's change set */
	bool closed;
	bool spilled; /* the bytes are in the queue table; data is freed */
	bool sent;	  /* handed to the peer inline */
	uint32 changes;
	uint32 length;
	uint32 capacity;
	char *data; /* payload behind VARHDRSZ bytes of room for a varlena header */
	MemoryContext context;
	int n_relations;
	uint64 relations[kSegmentRelations];		/* serials defined so far */
	uint32 relation_offsets[kSegmentRelations]; /* where their definitions start */
};

Segment *NewSegment(MemoryContext context, uint32 seq);

/* Whether another record may be started in it. */
inline bool
HasRoom(const Segment *segment)
{
	return !segment->closed && segment->length < kSegmentTarget &&
		   segment->n_relations < kSegmentRelations;
}

/*
 * Append a record.  Slots' attributes are read with slot_getattr; values are
 * detoasted.  On an error the segment is as before.
 */
void AppendInsert(Segment *segment, RelationEncoder *rel, TupleTableSlot *row);
void AppendUpdate(Segment *segment, RelationEncoder *rel, TupleTableSlot *old_row,
				  TupleTableSlot *new_row);
void AppendDelete(Segment *segment, RelationEncoder *rel, TupleTableSlot *old_row);
void AppendTruncate(Segment *segment, RelationEncoder *rel);

/* Cut the segment back to an earlier length; forgets later definitions. */
void TruncateSegment(Segment *segment, uint32 length, uint32 changes);

/*
 * The settings under which text forms are made and read (ISO dates, shortest
 * exact floats, hex bytea, empty search_path): Begin returns a GUC nest level
 * for End.  An error in between is undone by the transaction's abort.
 */
int BeginTextFormat();
void EndTextFormat(int nest_level);

/* ---- reading ---- */

/* Bounds-checked cursor over bytes of a batch. */
struct Reader
{
	const char *data;
	uint32 length;
	uint32 position;

	bool AtEnd() const { return position >= length; }
	uint8 U8();
	uint16 U16();
	uint32 U32();
	uint64 U64();
	uint64 Varint();
	const char *Bytes(uint32 count); /* not zero-terminated, inside data */
	char *String();					 /* palloc'd copy, zero-terminated */
};

struct Column
{
	char *name; /* at the receiver */
	bool key;
	bool binary;
	Oid type;		   /* built-in type, else InvalidOid */
	char *type_schema; /* of a type that is not built in */
	char *type_name;
};

struct Relation
{
	const char *raw; /* the definition's bytes, for caching by content */
	uint32 raw_length;
	char *remote_schema;
	char *remote_table;
	char *local_schema;
	char *local_table;
	Conflict conflict;
	int32 pair_id;
	int n_columns;
	int n_keys;
	Column *columns;
};

/* A value as it stands in the segment: NULL data for SQL NULL. */
struct Value
{
	const char *data;
	uint32 length;
};

/* One decoded record; the arrays belong to the decoder and live until the next Next(). */
struct Change
{
	Kind kind;
	const Relation *relation;
	bool has_old_key;
	Value *key; /* n_keys: delete, and update with has_old_key */
	Value *row; /* n_columns: insert and update */
};

/*
 * Decoder over one segment.  Relations are palloc'd in the context that is
 * current at each Next().
 */
struct Decoder
{
	Reader reader;
	Relation *relations[kSegmentRelations + 1];
	uint16 relation_ids[kSegmentRelations + 1];
	int n_relations;
	Change change;
	Value *key_values;
	Value *row_values;
	int key_capacity;
	int row_capacity;
};

void StartDecoding(Decoder *decoder, const char *data, uint32 length);

/* The next change, or NULL at the end; definitions are handled inside. */
const Change *Next(Decoder *decoder);

/*
 * Append the change as one SQL statement, correctly quoted, as sync_err_rec
 * shows it and as a peer without the extension could run it.
 */
void AppendSql(StringInfo sql, const Change *change);

/* The text form of a value of a built-in type in binary form, or its text. palloc'd. */
char *ValueText(const Column *column, const Value *value);

/* ---- raw writing, for batch headers ---- */
void PutVarint(StringInfo buf, uint64 value);
void PutString(StringInfo buf, const char *string);

} // namespace mmrepl::change
