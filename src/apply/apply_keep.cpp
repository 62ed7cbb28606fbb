/*
 * apply_keep.cpp
 *		What is kept of a table from one batch to the next.
 *
 * Opening a target costs more than a small batch.  Of a simple one, that is one
 * that depends on nothing but its relation's cache entry, everything is kept but
 * the open relations themselves: columns, conversions, slots, executor state.
 * Each batch looks up the name, takes the locks and asks for rights anew.  An
 * invalidation of the cache entry makes what is kept stale; the lock is taken
 * before that is looked at.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

constexpr int kKeptTargets = 256;

static Target *kept; /* last used first */
static int n_kept;
static uint64 changes; /* of relations, as far as this process knows */

/* Relation cache callback. */
static void
OnRelationChange(Datum, Oid relid)
{
	changes++;
	for (Target *target = kept; target != NULL; target = target->next)
		if (!OidIsValid(relid) || target->relid == relid)
			target->stale = true;
}

/* Compared by Keep() with what it was before the relation was locked. */
uint64
RelationChanges()
{
	static bool registered = false;

	if (!registered)
		CacheRegisterRelcacheCallback(OnRelationChange, (Datum) 0);
	registered = true;
	return changes;
}

/* ---- which ---- */

/* Types and functions that no user can replace. */
static bool
HasBuiltInColumns(const Target *target)
{
	for (int i = 0; i < target->n_fields; i++)
	{
		const Field &field = target->fields[i];
		Form_pg_attribute attribute = TupleDescAttr(target->desc, field.attnum - 1);

		if (attribute->atttypid >= (Oid) FirstNormalObjectId)
			return false;
	}
	return true;
}

/* Indexes whose state is nothing but their relation. */
static bool
HasSimpleIndexes(const Target *target)
{
	const ResultRelInfo *info = target->info;

	for (int i = 0; i < info->ri_NumIndices; i++)
		if (info->ri_IndexRelationDescs[i]->rd_rel->relam != BTREE_AM_OID ||
			info->ri_IndexRelationInfo[i]->ii_Expressions != NIL ||
			info->ri_IndexRelationInfo[i]->ii_Predicate != NIL ||
			info->ri_IndexRelationInfo[i]->ii_ExclusionOps != NULL)
			return false;
	return true;
}

/* Expressions may hold what a later CREATE OR REPLACE FUNCTION changes. */
void
JudgeKeeping(Target *target)
{
	TupleConstr *constraints = RelationGetDescr(target->rel)->constr;

	target->simple = target->proute == NULL && target->leaves->plain && target->n_defaults == 0 &&
					 (constraints == NULL || constraints->num_check == 0) &&
					 !target->rel->rd_rel->relispartition && HasBuiltInColumns(target) &&
					 HasSimpleIndexes(target);
	target->index_oids = (Oid *) palloc(sizeof(Oid) * Max(target->info->ri_NumIndices, 1));
}

/* ---- keeping ---- */

/* The one that was used longest ago. */
static void
ForgetOldest()
{
	Target **link = &kept;

	while ((*link)->next != NULL)
		link = &(*link)->next;
	MemoryContextDelete((*link)->context);
	*link = NULL;
	n_kept--;
}

/* What lives as long as the process. */
static MemoryContext
KeptContext()
{
	static MemoryContext context = NULL;

	if (context == NULL)
		context =
			AllocSetContextCreate(TopMemoryContext, "mmrepl apply kept", ALLOCSET_SMALL_SIZES);
	return context;
}

/* No pin may stay: slots are emptied. */
static void
ClearSlots(Target *target)
{
	ExecClearTuple(target->row);
	ExecClearTuple(target->search);
	ExecClearTuple(target->merged);
	ExecClearTuple(target->leaves->found);
}

/* An index may have appeared while we wrote, whose builder waits for our end. */
bool
MayKeep(const Target *target)
{
	return target->simple && target->changes == changes;
}

/* Locks stay until the transaction's end. */
void
Keep(Target *target)
{
	ResultRelInfo *info = target->info;
	Leaf *leaf = target->leaves;

	ClearSlots(target);
	if (n_kept == kKeptTargets)
		ForgetOldest();
	leaf->index_oid = RelationGetRelid(leaf->index);
	CloseSearch(leaf);
	for (int i = 0; i < info->ri_NumIndices; i++)
	{
		target->index_oids[i] = RelationGetRelid(info->ri_IndexRelationDescs[i]);
		index_close(info->ri_IndexRelationDescs[i], NoLock);
		info->ri_IndexRelationDescs[i] = NULL;
	}
	table_close(target->rel, NoLock);
	target->rel = info->ri_RelationDesc = NULL;
	MemoryContextSetParent(target->context, KeptContext());
	target->next = kept;
	kept = target;
	n_kept++;
}

/* ---- reopening ---- */

/* The kept target of an equal definition, or NULL; stale ones go. */
static Target *
FindKept(Session *session, const change::Relation *relation)
{
	Target **link = &kept;

	while (*link != NULL)
	{
		Target *target = *link;

		if (target->stale)
		{
			*link = target->next;
			n_kept--;
			MemoryContextDelete(target->context);
			continue;
		}
		if (target->encoding == session->header.encoding &&
			target->at_writer == session->header.Inline() &&
			target->raw_length == relation->raw_length &&
			memcmp(target->raw, relation->raw, relation->raw_length) == 0)
			return target;
		link = &target->next;
	}
	return NULL;
}

/* Unlink a target that FindKept() returned; it belongs to the session now. */
static void
Unlink(Session *session, Target *target)
{
	Target **link = &kept;

	while (*link != target)
		link = &(*link)->next;
	*link = target->next;
	n_kept--;
	MemoryContextSetParent(target->context, session->context);
}

/* Open what Keep() closed. */
static void
OpenAgain(Session *session, Target *target, Relation rel)
{
	ResultRelInfo *info = target->info;
	Leaf *leaf = target->leaves;

	target->rel = info->ri_RelationDesc = rel;
	AdoptRelation(session, target);
	for (int i = 0; i < info->ri_NumIndices; i++)
		info->ri_IndexRelationDescs[i] = index_open(target->index_oids[i], RowExclusiveLock);
	leaf->may_update = leaf->may_delete = false;
	OpenSearch(leaf, leaf->index_oid);
}

/* Whether the name still means the relation is known only with its lock. */
Target *
Reopen(Session *session, const change::Relation *relation)
{
	Target *target = FindKept(session, relation);

	if (target == NULL)
		return NULL;
	target->changes = RelationChanges();
	session->schema = target->schema;
	session->table = target->table;
	Relation rel = InContext(session->context, [&] {
		return OpenRelation(session, target->schema, target->table, RowExclusiveLock, kWriteRights);
	});
	bool same = !target->stale && RelationGetRelid(rel) == target->relid;

	Unlink(session, target);
	if (same)
	{
		OpenAgain(session, target, rel);
		return target;
	}
	table_close(rel, NoLock);
	session->schema = session->table = NULL;
	MemoryContextDelete(target->context);
	return NULL;
}

} // namespace mmrepl::apply
