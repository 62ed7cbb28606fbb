/*
 * catalog_internal.hpp
 *		Scans of the extension's tables, and the layout of their rows.
 */
#pragma once

#include "mmrepl/catalog.hpp"
#include "mmrepl/error.hpp"

namespace mmrepl::catalog
{

/* Attribute numbers; they follow the install script. */
namespace attr
{
enum Node : AttrNumber
{
	node_id = 1,
	node_system_identifier,
	node_database
};

enum Pair : AttrNumber
{
	pair_id = 1,
	pair_local_table,
	pair_server,
	pair_owner,
	pair_remote_schema,
	pair_remote_table,
	pair_mode,
	pair_columns,
	pair_column_map,
	pair_row_filter,
	pair_conflict_resolution,
	pair_on_unreachable,
	pair_enabled
};

enum Stream : AttrNumber
{
	stream_id = 1,
	stream_server,
	stream_owner,
	stream_paused,
	stream_confirmed,
	stream_server_name,
	stream_acked,
	stream_discarded,
	stream_resync_since,
	stream_resync_reason
};

enum Skipped : AttrNumber
{
	skipped_xid = 3,
	skipped_stream = 9
};
} // namespace attr

constexpr int kMaxColumns = 16; /* no table of the extension has more */

/* A row taken apart. */
struct Row
{
	HeapTuple tuple;
	Datum values[kMaxColumns];
	bool nulls[kMaxColumns];

	Datum Get(AttrNumber attribute) const { return values[attribute - 1]; }
	bool IsNull(AttrNumber attribute) const { return nulls[attribute - 1]; }
};

/* Open one of the extension's tables; raises when the extension is gone. */
Relation OpenTable(Oid Relations::*which, LOCKMODE mode);

/* Take a row apart; values point into the tuple. */
void Deform(Relation table, HeapTuple tuple, Row *row);

/*
 * Call fn(const Row &) for every row that the keys select; it returns false to
 * stop.  Each scan sees what is committed now, whatever the transaction's
 * isolation level: these rows steer the extension, as catalogs steer the server.
 */
template <typename Fn>
inline void
ForEachRow(Relation table, Oid index, int n_keys, ScanKey keys, Fn fn)
{
	Snapshot snapshot = RegisterSnapshot(GetLatestSnapshot());
	SysScanDesc scan = systable_beginscan(table, index, OidIsValid(index), snapshot, n_keys, keys);
	HeapTuple tuple;
	Row row;

	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Deform(table, tuple, &row);
		if (!fn(row))
			break;
	}
	systable_endscan(scan);
	UnregisterSnapshot(snapshot);
}

/* A scan key for equality with an OID or an integer. */
inline void
KeyOid(ScanKey key, AttrNumber attribute, Oid value)
{
	ScanKeyInit(key, attribute, BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(value));
}

inline void
KeyInt4(ScanKey key, AttrNumber attribute, int32 value)
{
	ScanKeyInit(key, attribute, BTEqualStrategyNumber, F_INT4EQ, Int32GetDatum(value));
}

/* Forget this database's identity (its row may have changed). */
void ForgetNode();

/*
 * Point the rows of streams to the servers that bear their names now, and, for
 * a copy that becomes a node of its own, take back what they know of the peers.
 */
void RelinkStreams(bool forget_positions);

} // namespace mmrepl::catalog
