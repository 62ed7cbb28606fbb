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

/* A row filter that is ready to be evaluated. */
struct Filter
{
	ExprState *state; /* NULL: every row passes */
	bool as_owner;	  /* it is not made of built-in immutable functions only */
};

/* One pair that a trigger serves. */
struct Target
{
	int32 pair_id;	/* 0: a trigger made by hand */
	bool inherited; /* from a partitioned table above, which sees TRUNCATE itself */
	transaction::Route route;
	change::RelationEncoder *encoder;
	change::RelationEncoder *checked_encoder; /* for sync mode: with the old row */
	bool subset; /* an update that touches none of the columns is no change */
	Filter filter;
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
	bool evaluating;		/* a filter that may run anything is under way */
	char *skip_application; /* a trigger by hand does not capture this application */
};

/*
 * Run fn with the rights of the role and no others, as maintenance commands run
 * what a table's owner has put into an index: in a security-restricted operation,
 * under these settings as they are fixed for texts; what is changed there is
 * changed back.  After an error the abort of the (sub)transaction does so.
 */
template <typename Fn>
inline auto
AsOwner(Oid owner, change::Settings settings, Fn fn)
{
	Oid user;
	int context;
	int nest_level;

	GetUserIdAndSecContext(&user, &context);
	SetUserIdAndSecContext(owner,
						   context | SECURITY_LOCAL_USERID_CHANGE | SECURITY_RESTRICTED_OPERATION);
	nest_level = NewGUCNestLevel();
	(void) change::BeginTextFormat(settings);

	auto result = fn();

	AtEOXact_GUC(false, nest_level); /* and all within */
	SetUserIdAndSecContext(user, context);
	return result;
}

/*
 * A stored filter in CurrentMemoryContext, Vars of varno 1; parsed and simplified as
 * the owner of its pair.  Raises with the reason when it does not compile any more.
 */
Filter CompileFilter(Relation rel, const char *filter, Oid owner);

/* The cached state for a relation and a trigger (NULL: the registered pairs'). */
CapturedTable *LookUp(Relation rel, Trigger *trigger);

/* Whether the function is mmrepl.replicate(). */
bool IsReplicate(Oid function);

/* Whether this session's writes are those of the application (NULL: of none), which a trigger skips. */
bool SkipsSession(const char *application);

void InitCache();
void InitTruncateHook();

} // namespace mmrepl::capture
