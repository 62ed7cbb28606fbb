/*
 * apply_truncate.cpp
 *		TRUNCATE: neighbouring records are one command, as they were at the
 *		sender, since tables that reference each other go only together.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

/* Whether a synchronous transaction for the pair's target is, or may be, in doubt. */
static bool
IsInDoubt(const catalog::Pair *pair)
{
	for (shmem::Stream &stream : shmem::Get().streams)
		if (stream.in_use && stream.database == MyDatabaseId && stream.server == pair->server &&
			stream.owner == pair->owner &&
			pg_atomic_read_u64(&stream.doubt_to) > pg_atomic_read_u64(&stream.confirmed))
			return true;
	return false;
}

/*
 * A change carries its old row, TRUNCATE nothing: what is in doubt would be gone here,
 * and come to its target behind this TRUNCATE.  With the table's lock: whoever wrote
 * before has ended, and what is in doubt is known.
 */
static void
RefuseDoubt(const Session *session, Relation rel)
{
	ListCell *cell;

	foreach(cell, catalog::PairsOf(RelationGetRelid(rel)))
	{
		const catalog::Pair *pair = (const catalog::Pair *) lfirst(cell);

		if (pair->mode == catalog::Mode::Sync && IsInDoubt(pair))
			ereport(ERROR,
					(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
					 errmsg("could not serialize replicated TRUNCATE of relation \"%s.%s\"",
							session->schema, session->table),
					 errdetail("A transaction of the peer is in doubt at its server \"%s\": what "
							   "it wrote would come there after the TRUNCATE.",
							   pair->server_name),
					 errhint("Retry the transaction. The peer's mmrepl.in_doubt shows what is in "
							 "doubt.")));
	}
}

/*
 * Lock the table and remember it.  All tables are closed first: TRUNCATE
 * rebuilds indexes, which must not be open.
 */
void
AddTruncate(Session *session, const change::Relation *relation)
{
	(void) WaitForPredecessor(session);
	CloseTargets(session);
	MemoryContext old = MemoryContextSwitchTo(session->context);

	session->schema = ToServer(session, relation->remote_schema, strlen(relation->remote_schema));
	session->table = ToServer(session, relation->remote_table, strlen(relation->remote_table));
	Relation rel =
		OpenRelation(session, session->schema, session->table, AccessExclusiveLock, ACL_TRUNCATE);

	CheckPrivilege(session, rel, ACL_TRUNCATE);
	if (session->header.Inline())
		RefuseDoubt(session, rel);
	session->truncated = lappend(session->truncated, rel);
	MemoryContextSwitchTo(old);
}

/* The three lists that core's TRUNCATE takes. */
struct Work
{
	List *relations;
	List *oids;
	List *logged_oids;
};

/* Add the relation unless it is there; returns whether it was added. */
static bool
AddRelation(Work *work, Relation rel)
{
	Oid relid = RelationGetRelid(rel);

	if (list_member_oid(work->oids, relid))
		return false;
	work->relations = lappend(work->relations, rel);
	work->oids = lappend_oid(work->oids, relid);
	if (RelationIsLogicallyLogged(rel))
		work->logged_oids = lappend_oid(work->logged_oids, relid);
	return true;
}

/* The partitions below, locked. */
static void
AddPartitions(Work *work, Relation rel)
{
	List *children = find_all_inheritors(RelationGetRelid(rel), AccessExclusiveLock, NULL);
	ListCell *cell;

	foreach(cell, children)
	{
		if (list_member_oid(work->oids, lfirst_oid(cell)))
			continue;
		AddRelation(work, table_open(lfirst_oid(cell), NoLock));
	}
}

/* Whether user's triggers would run on TRUNCATE of the table. */
static bool
HasTriggers(Relation rel)
{
	Oid own = catalog::GetRelations().schema;
	TriggerDesc *triggers = rel->trigdesc;

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		Trigger *trigger = &triggers->triggers[i];

		if (TRIGGER_FOR_TRUNCATE(trigger->tgtype) &&
			(trigger->tgenabled == TRIGGER_FIRES_ALWAYS ||
			 trigger->tgenabled == TRIGGER_FIRES_ON_REPLICA) &&
			get_func_namespace(trigger->tgfoid) != own)
			return true;
	}
	return false;
}

/* One owner's code must not run with another owner's rights. */
static bool
CanGoTogether(List *relations)
{
	Oid owner = ((Relation) linitial(relations))->rd_rel->relowner;
	bool triggers = false;
	bool one_owner = true;
	ListCell *cell;

	foreach(cell, relations)
	{
		Relation rel = (Relation) lfirst(cell);

		triggers |= HasTriggers(rel);
		one_owner &= rel->rd_rel->relowner == owner;
	}
	return one_owner || !triggers;
}

/* Truncate the tables together, as the owner of the first. */
static void
Truncate(const Session *session, List *relations)
{
	Work work = {};
	ListCell *cell;

	foreach(cell, relations)
		AddRelation(&work, (Relation) lfirst(cell));
	foreach(cell, relations)
	{
		Relation rel = (Relation) lfirst(cell);

		if (rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE)
			AddPartitions(&work, rel);
	}
	Oid owner = ((Relation) linitial(relations))->rd_rel->relowner;

	BecomeOwner(session, owner, IsTrusted(session, owner));
	TruncateRelations(work.relations, work.oids, work.logged_oids);
	BecomeCaller(session);
	foreach(cell, work.relations)
		if (!list_member_ptr(relations, lfirst(cell)))
			table_close((Relation) lfirst(cell), NoLock);
	NextCommand();
}

/* Do what waits, together where that is possible; relations are closed, locks stay. */
void
FlushTruncates(Session *session)
{
	List *relations = session->truncated;
	ListCell *cell;

	if (relations == NIL)
		return;
	session->truncated = NIL;
	InContext(session->context, [&] {
		if (CanGoTogether(relations))
			Truncate(session, relations);
		else
			foreach(cell, relations)
				Truncate(session, list_make1(lfirst(cell)));
	});
	foreach(cell, relations)
		table_close((Relation) lfirst(cell), NoLock);
	list_free(relations);
}

} // namespace mmrepl::apply
