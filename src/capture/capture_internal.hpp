/*
 * capture_internal.hpp
 *		What the files of the room capture share: the cache of captured tables.
 */
#pragma once

#include "mmrepl/capture.hpp"
#include "mmrepl/catalog.hpp"
#include "mmrepl/change.hpp"
#include "mmrepl/transaction.hpp"

namespace mmrepl::capture
{

/* One pair that a trigger serves. */
struct Target
{
	int32 pair_id; /* 0: a trigger made by hand */
	transaction::Route route;
	change::RelationEncoder *encoder;
	change::RelationEncoder *checked_encoder; /* for sync mode: with the old row */
	bool subset;	   /* an update that touches none of the columns is no change */
	ExprState *filter; /* NULL: every row */
	change::Settings filter_settings;
};

struct CacheKey
{
	Oid relation;
	Oid trigger; /* InvalidOid: the registered pairs' trigger */
};

/* A table as one of its triggers captures it. */
struct CapturedTable
{
	CacheKey key;
	bool valid;
	uint64 generation;
	MemoryContext context;
	List *ancestors; /* OIDs of partitioned tables above it */
	List *row_types; /* OIDs of the relations of composite types in it */
	int n_targets;
	Target *targets;
	ExprContext *econtext;	/* for filters; NULL when there are none */
	char *skip_application; /* a trigger by hand does not capture this application */
};

/* The cached state for a relation and a trigger (NULL: the registered pairs'). */
CapturedTable *LookUp(Relation rel, Trigger *trigger);

void InitCache();
void InitTruncateHook();

} // namespace mmrepl::capture
