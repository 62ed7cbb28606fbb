/*
 * change.hpp
 *		The change set: the one value that capture, queue, delivery, apply and
 *		sync_err_rec exchange, and its one codec.
 *
 * A transaction's change set is a sequence of segments, each self-contained:
 *
 *	 segment  := version:u8 record*
 *	 record   := head:u8 body		head is code << 5 | rel, rel below kSegmentRelations
 *		code kDefine:	 relation	defines rel for the rest of the segment
 *			 kInsertRow: tuple		the new row
 *			 kUpdateRow: tuple [before]	the new row; its key is the old one's, too
 *			 kMoveRow:	 key tuple [before]	key values before, the new row
 *			 kDeleteRow: key [rest]	key values of the row that went
 *			 kEmpty:				TRUNCATE
 *	 relation := shape:u8, names, pair:varint, columns:varint, column*
 *				 shape: the conflict rule, kPublic, kSameNames, kChecked, kPartial
 *	 names	  := [string:remote schema], string:remote table
 *				 [string:local schema, string:local table]
 *				 the first not with kPublic: it is "public"; the last two not with
 *				 kSameNames: they are the remote ones
 *	 column   := head:u8, bytes of the remote name, type
 *				 head: the name's length, kKey, kBinary
 *	 type     := oid:varint when it is built in (< 16384),
 *				 else 0:varint string:schema string:name
 *	 tuple    := value of every column, in the relation's order
 *	 key      := value of every key column, in the relation's order
 *	 value    := length+1:varint bytes | 0:varint (NULL)
 *	 before   := bitmap of the columns, old value of each one whose bit is set; the
 *				 others' is the one in the tuple (only where the relation is checked)
 *	 rest     := old value of every column outside the key (only where it is checked)
 *	 old value := value, for types of fixed width; else
 *				 length+2:varint bytes | 1:varint length:varint digest | 0:varint (NULL)
 *	 string   := length:varint bytes
 *
 * Integers are big-endian; varint is LEB128.  A value's bytes are the type's
 * binary send format when the column has kBinary, integers and instants (see
 * TrimmedWidth) without leading bytes that only repeat the sign, one byte at
 * least; else its text form under the
 * settings of BeginTextFormat(); text is in the database encoding of the sender,
 * which the batch header names.  (Binary is used only for built-in types whose
 * send format holds no text, except that text types send their plain bytes.)
 *
 * A relation is *checked* when its changes were captured in sync mode: then the
 * receiver can tell whether its row is the one that was changed at the sender.
 * Old values longer than kDigestFrom travel as their digest.
 *
 * A relation is *partial* when columns of the pair are not in it, because the
 * updates that it is for left their values where they were, in TOAST.  The row is
 * not known then where it is missing.
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
	kInsert = 'I',
	kUpdate = 'U',
	kDelete = 'D',
	kTruncate = 'T'
};

/* Codes of records. */
constexpr uint8 kDefine = 0;
constexpr uint8 kInsertRow = 1;
constexpr uint8 kUpdateRow = 2;
constexpr uint8 kMoveRow = 3;
constexpr uint8 kDeleteRow = 4;
constexpr uint8 kEmpty = 5;
constexpr int kCodeShift = 5;

/* Head of a column. */
constexpr uint8 kNameLength = 0x3f;
constexpr uint8 kKey = 0x40;
constexpr uint8 kBinary = 0x80;
static_assert(NAMEDATALEN <= kNameLength + 1, "names do not fit the head of a column");

/* Shape of a relation. */
constexpr uint8 kConflictMask = 0x03;
constexpr uint8 kPublic = 0x04;
constexpr uint8 kSameNames = 0x08;
constexpr uint8 kChecked = 0x10;
constexpr uint8 kPartial = 0x20;

enum class Conflict : char
{
	ApplyRemote = 'a',
	KeepLocal = 'k',
	Error = 'e'
};

constexpr uint32 kDigestFrom = 128; /* longer old values are replaced by their digest */
constexpr int kDigestBytes = 16;

/* The parsing of 'apply_remote' and so on; false when there is no such name. */
bool ConflictFromName(const char *name, Conflict *result);
const char *ConflictName(Conflict conflict);

/* ---- settings of texts ---- */

/* Which settings a text depends on. */
using Settings = uint32;

constexpr Settings kNoSettings = 0;
constexpr Settings kDateStyle = 1 << 0;
constexpr Settings kIntervalStyle = 1 << 1;
constexpr Settings kTimeZone = 1 << 2;
constexpr Settings kFloatDigits = 1 << 3;
constexpr Settings kByteaOutput = 1 << 4;
constexpr Settings kArrayNulls = 1 << 5;
constexpr Settings kMonetary = 1 << 6;
constexpr Settings kXmlOption = 1 << 7;
constexpr Settings kNames = 1 << 8;
constexpr Settings kExpressions = 1 << 9; /* what nobody's values depend on, but functions */
constexpr Settings kTextSettings = kExpressions - 1;
constexpr Settings kAllSettings = kTextSettings | kExpressions;

/*
 * Those of the text forms of a type, until a composite type that is part of it gets other
 * columns: then there is a relcache invalidation of its relation, which is appended to
 * *row_types unless that is NULL.
 */
Settings SettingsOf(Oid type, List **row_types);

/*
 * Give these settings the values under which texts are made and read, at the sender and
 * at the receiver: ISO dates in UTC, shortest exact floats, hex bytea, NULL in arrays,
 * money of the C locale, xml content, no user's schema in search_path, ...  Returns what
 * End needs, and costs next to nothing where they have these values.  An error in
 * between is undone by the abort of the (sub)transaction.
 */
int SetTextFormat(Settings settings);
void ResetTextFormat(int nest_level);

/* Most rows depend on none. */
inline int
BeginTextFormat(Settings settings)
{
	return likely(settings == kNoSettings) ? 0 : SetTextFormat(settings);
}

inline void
EndTextFormat(int nest_level)
{
	if (unlikely(nest_level != 0))
		ResetTextFormat(nest_level);
}

/* ---- writing ---- */

/* How a value's bytes are made. */
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

/* How one column of a captured table is sent. */
struct ColumnEncoder
{
	int16 attnum;
	bool key;
	bool binary;
	Wire wire;
	Settings settings; /* of its text form, if that is what is sent */
	Oid type;		   /* of the column, domains flattened when binary */
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
	Settings settings; /* of its columns: what BeginTextFormat() needs before a row is appended */
	List *row_types;   /* relations of composite types, on which the settings depend */
	bool checked;	   /* updates and deletes carry the old row */
	bool whole;		   /* updates bring every column */
	bool partial;
	uint32 columns_at;		 /* where the number of columns stands in the definition */
	uint32 *entries;		 /* where each one's entry starts there, and where the last one ends */
	RelationEncoder *spared; /* partial ones made of this one, the newest first */
	Bitmapset *sparing;		 /* the columns, by their place in that one, that a partial one lacks */
	int n_spared;
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
	bool checked;
	bool whole;
	int32 pair_id;
	int n_columns;
	const ColumnSpec *columns;
};

/* Build in CurrentMemoryContext; reads the type catalogs. */
RelationEncoder *BuildRelationEncoder(const RelationSpec &spec, TupleDesc desc);

constexpr uint32 kSegmentTarget = 7900;			   /* a segment is closed when it reaches this */
constexpr int kSegmentRelations = 1 << kCodeShift; /* and when it defines this many relations */

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
	uint32 held; /* bytes of memory that its owner has counted for it */
	char *data;	 /* payload behind VARHDRSZ bytes of room for a varlena header */
	MemoryContext context;
	int n_relations;
	uint64 relations[kSegmentRelations];		/* serials with a number */
	uint16 relation_offsets[kSegmentRelations]; /* where their definitions start; 0: not in here */
	uint16 relation_lengths[kSegmentRelations]; /* of their records; 0: too long to tell */
};
static_assert(kSegmentTarget <= PG_UINT16_MAX, "definitions start where an offset cannot say");

/*
 * An empty segment.  One that follows a segment which was closed early is given
 * that one (else NULL): it numbers relations alike, so that Absorb() can join them.
 */
Segment *NewSegment(MemoryContext context, uint32 seq, const Segment *follows);

/* Memory of the segment, in bytes. */
inline Size
Footprint(const Segment *segment)
{
	return sizeof(Segment) + (segment->data == NULL ? 0 : segment->capacity);
}

/*
 * Append the records of the segment that comes next, without the definitions that
 * are there already; false, with nothing done, if they do not fit.  Frees nothing.
 */
bool Absorb(Segment *into, const Segment *from);

/* Whether another record may be started in it. */
inline bool
HasRoom(const Segment *segment)
{
	return !segment->closed && segment->length < kSegmentTarget &&
		   segment->n_relations < kSegmentRelations;
}

/* Whether a column (from 0) has another value, to the byte.  A value that stayed in TOAST is not read. */
bool ValueChanged(int at, TupleTableSlot *old_row, TupleTableSlot *new_row);

/*
 * Append a record.  Slots' attributes are read with slot_getattr; values are
 * detoasted.  An update spares those that stayed in TOAST, which are not read, unless
 * the relation is whole or checked.  On an error the segment is as before.
 */
void AppendInsert(Segment *segment, RelationEncoder *rel, TupleTableSlot *row);
void AppendUpdate(Segment *segment, RelationEncoder *rel, TupleTableSlot *old_row,
				  TupleTableSlot *new_row);
void AppendDelete(Segment *segment, RelationEncoder *rel, TupleTableSlot *old_row);
void AppendTruncate(Segment *segment, RelationEncoder *rel);

/* Nothing is appended any more: the room that is left is given back.  May be called again. */
void CloseSegment(Segment *segment);

/* Cut the segment back to an earlier length; forgets later definitions. */
void TruncateSegment(Segment *segment, uint32 length, uint32 changes);

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
	bool checked;
	bool partial;
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

/* What a column held before, as far as it travelled. */
struct OldValue
{
	bool same;			/* as in the new row */
	const char *digest; /* of a value that is too long to travel; NULL: `value` is it */
	Value value;		/* with a digest only its length */
};

/* One decoded record; the arrays belong to the decoder and live until the next Next(). */
struct Change
{
	Kind kind;
	const Relation *relation;
	bool has_old_key;
	Value *key;	   /* n_keys: delete, and update with has_old_key */
	Value *row;	   /* n_columns: insert and update */
	OldValue *old; /* n_columns, those of the key unset: update and delete when checked */
};

/*
 * Decoder over one segment.  Relations are palloc'd in the context that is
 * current at each Next().
 */
struct Decoder
{
	Reader reader;
	Relation *relations[kSegmentRelations]; /* by their numbers; NULL: not defined */
	Change change;
	Value *key_values;
	Value *row_values;
	OldValue *old_values;
	int key_capacity;
	int row_capacity;
	int old_capacity;
};

void StartDecoding(Decoder *decoder, const char *data, uint32 length);

/* The next change, or NULL at the end; definitions are handled inside. */
const Change *Next(Decoder *decoder);

/* What the SQL of a relation's changes needs to know of the table, besides the changes. */
struct SqlShape
{
	Bitmapset *always; /* columns, by their place, that are GENERATED ALWAYS AS IDENTITY */
	bool partitioned;
};

/*
 * Append the change as one SQL statement, correctly quoted, as sync_err_rec
 * shows it and as a peer without the extension could run it.
 */
void AppendSql(StringInfo sql, const Change *change, const SqlShape &shape);

/*
 * Full width, in bytes, of a type whose binary values travel without leading
 * sign bytes; 0 for others.
 */
uint32 TrimmedWidth(Oid type);

constexpr uint32 kMaxTrimmedWidth = 8;

/*
 * The value in the type's own send format: *wide, made of the bytes in `room`,
 * or the value itself when it is not a trimmed one.
 */
const Value *Widen(const Column *column, const Value *value, char (&room)[kMaxTrimmedWidth],
				   Value *wide);

/* A trimmed value; raises when it is empty or longer than `width`. */
int64 ReadTrimmed(const Value *value, uint32 width);

/*
 * The text form of a value of a built-in type in binary form, which needs the settings of
 * the type, or its text.  palloc'd.
 */
char *ValueText(const Column *column, const Value *value);

/*
 * The bytes that a column's value has on the wire, made of a local value of
 * local_type; text is in the server's encoding.  Needs the settings of both types.
 * palloc'd or pointing into the value.
 */
Value WireBytes(const Column *column, Oid local_type, Datum value);

/* The first kDigestBytes of the SHA-256 of some bytes. */
void Digest(const char *bytes, uint64 length, char *digest);

/* ---- raw writing, for batch headers ---- */
void PutVarint(StringInfo buf, uint64 value);
void PutString(StringInfo buf, const char *string);

} // namespace mmrepl::change
