/*
 * compat.hpp
 *		Differences between the supported PostgreSQL major versions (15 to 18).
 *
 * Included by pg.hpp only.  Each entry names the version that changed the
 * server's interface; the extension is written against the newest form.
 */
#pragma once

#if PG_VERSION_NUM < 150000
#error "mmrepl_bgw needs PostgreSQL 15 or later"
#endif

extern "C" {
#if PG_VERSION_NUM >= 170000
#include "storage/procnumber.h"
#endif
}

/* 18: pg_noreturn, which stands before the type. */
#ifndef pg_attribute_noreturn
#define pg_attribute_noreturn() [[noreturn]]
#endif

namespace mmrepl
{

/* This backend's index in the shared array of processes (17: MyProcNumber). */
inline int
MyProcIndex()
{
#if PG_VERSION_NUM >= 170000
	return MyProcNumber;
#else
	return MyProc->pgprocno;
#endif
}

/* The wait event under which a process waits for a peer (17: WaitEventExtensionNew). */
inline uint32
PeerWaitEvent()
{
#if PG_VERSION_NUM >= 170000
	static uint32 event = 0;

	if (event == 0)
		event = WaitEventExtensionNew("MmreplPeer");
	return event;
#else
	return PG_WAIT_EXTENSION;
#endif
}

/* Let a session that is idle run an empty transaction; no error (17: proc numbers). */
inline void
WakeIdleSession(int pid)
{
#if PG_VERSION_NUM >= 170000
	(void) SendProcSignal(pid, PROCSIG_CATCHUP_INTERRUPT, INVALID_PROC_NUMBER);
#else
	(void) SendProcSignal(pid, PROCSIG_CATCHUP_INTERRUPT, InvalidBackendId);
#endif
}

/* The local id of a process's transaction (17: in vxid). */
inline LocalTransactionId
LocalTransactionOf(const PGPROC *proc)
{
#if PG_VERSION_NUM >= 170000
	return proc->vxid.lxid;
#else
	return proc->lxid;
#endif
}

/* The local id of this backend's transaction (17: in vxid). */
inline LocalTransactionId
MyLocalTransaction()
{
#if PG_VERSION_NUM >= 170000
	return MyProc->vxid.lxid;
#else
	return MyProc->lxid;
#endif
}

/* A wait event set that lives until it is freed (17: owned by a resource owner). */
inline WaitEventSet *
NewWaitEventSet(int events)
{
#if PG_VERSION_NUM >= 170000
	return CreateWaitEventSet(NULL, events);
#else
	return CreateWaitEventSet(TopMemoryContext, events);
#endif
}

/* Whether the role owns the relation, or is superuser (16: object_ownercheck). */
inline bool
OwnsRelation(Oid relation, Oid role)
{
#if PG_VERSION_NUM >= 160000
	return object_ownercheck(RelationRelationId, relation, role);
#else
	return pg_class_ownercheck(relation, role);
#endif
}

/* Whether this transaction has locked the relation against everybody (17: by OID). */
inline bool
HoldsExclusiveLock(Oid relation)
{
#if PG_VERSION_NUM >= 170000
	return CheckRelationOidLockedByMe(relation, AccessExclusiveLock, false);
#else
	LOCKTAG tag;

	SET_LOCKTAG_RELATION(tag, MyDatabaseId, relation);
	return LockHeldByMe(&tag, AccessExclusiveLock);
#endif
}

/* Whether the role owns the database, or is superuser (16: object_ownercheck). */
inline bool
OwnsDatabase(Oid database, Oid role)
{
#if PG_VERSION_NUM >= 160000
	return object_ownercheck(DatabaseRelationId, database, role);
#else
	return pg_database_ownercheck(database, role);
#endif
}

/* ACL check of a foreign server's USAGE (16: object_aclcheck). */
inline AclResult
ServerUsage(Oid server, Oid role)
{
#if PG_VERSION_NUM >= 160000
	return object_aclcheck(ForeignServerRelationId, server, role, ACL_USAGE);
#else
	return pg_foreign_server_aclcheck(server, role, ACL_USAGE);
#endif
}

/* ACL check of a schema (16: object_aclcheck). */
inline AclResult
SchemaPrivilege(Oid schema, Oid role, AclMode mode)
{
#if PG_VERSION_NUM >= 160000
	return object_aclcheck(NamespaceRelationId, schema, role, mode);
#else
	return pg_namespace_aclcheck(schema, role, mode);
#endif
}

/* Whether the column is generated when it is read (18: virtual generated columns). */
inline bool
IsVirtualColumn(Form_pg_attribute attribute)
{
#if PG_VERSION_NUM >= 180000
	return attribute->attgenerated == ATTRIBUTE_GENERATED_VIRTUAL;
#else
	(void) attribute;
	return false;
#endif
}

/* Set when a trigger fires; clones in partitions follow (16: tgparent, recurse). */
inline void
SetTriggerFiring(Relation rel, const char *name, char fires_when)
{
#if PG_VERSION_NUM >= 160000
	EnableDisableTrigger(rel, name, InvalidOid, fires_when, true, true, ShareRowExclusiveLock);
#else
	EnableDisableTrigger(rel, name, fires_when, true, ShareRowExclusiveLock);
#endif
}

/* expression_tree_walker (16: knows its callback's type). */
inline bool
WalkExpression(Node *node, bool (*walker)(Node *, void *), void *context)
{
#if PG_VERSION_NUM >= 160000
	return expression_tree_walker(node, walker, context);
#else
	return expression_tree_walker(node, (bool (*)())(void (*)()) walker, context);
#endif
}

/* index_beginscan (18: counts searches for EXPLAIN). */
inline IndexScanDesc
BeginIndexScan(Relation table, Relation index, Snapshot snapshot, int n_keys)
{
#if PG_VERSION_NUM >= 180000
	return index_beginscan(table, index, snapshot, NULL, n_keys, 0);
#else
	return index_beginscan(table, index, snapshot, n_keys, 0);
#endif
}

/* EvalPlanQualInit without a plan (16: names result relations). */
inline void
InitEvalPlanQual(EPQState *epqstate, EState *estate)
{
#if PG_VERSION_NUM >= 160000
	EvalPlanQualInit(epqstate, estate, NULL, NIL, -1, NIL);
#else
	EvalPlanQualInit(epqstate, estate, NULL, NIL, -1);
#endif
}

/*
 * A range table of one relation that is written (16: permissions stand apart;
 * 18: relations that pruning left).
 */
inline void
InitTargetRangeTable(EState *estate, Relation relation, Bitmapset *updated_columns)
{
	RangeTblEntry *rte = makeNode(RangeTblEntry);

	rte->rtekind = RTE_RELATION;
	rte->relid = RelationGetRelid(relation);
	rte->relkind = relation->rd_rel->relkind;
	rte->rellockmode = AccessShareLock;
#if PG_VERSION_NUM >= 160000
	List *permissions = NIL;

	addRTEPermissionInfo(&permissions, rte)->updatedCols = updated_columns;
#if PG_VERSION_NUM >= 180000
	ExecInitRangeTable(estate, list_make1(rte), permissions, bms_make_singleton(1));
#else
	ExecInitRangeTable(estate, list_make1(rte), permissions);
#endif
#else
	rte->updatedCols = updated_columns;
	ExecInitRangeTable(estate, list_make1(rte));
#endif
}

/* Which indexes need an entry for a new row version (16: perhaps only the summarizing ones). */
#if PG_VERSION_NUM >= 160000
using IndexesToUpdate = TU_UpdateIndexes;
constexpr IndexesToUpdate kNoIndexes = TU_None;
#else
using IndexesToUpdate = bool;
constexpr IndexesToUpdate kNoIndexes = false;
#endif

/* Index entries for the new version of an updated row; a list of indexes to be rechecked. */
inline List *
InsertIndexEntriesOfUpdate(ResultRelInfo *info, TupleTableSlot *row, EState *estate,
						   IndexesToUpdate which)
{
#if PG_VERSION_NUM >= 160000
	return ExecInsertIndexTuples(info, row, estate, true, false, NULL, NIL,
								 which == TU_Summarizing);
#else
	(void) which;
	return ExecInsertIndexTuples(info, row, estate, true, false, NULL, NIL);
#endif
}

/*
 * Index entries for a new row.  Of the unique indexes those listed do not raise
 * but set *conflict when another row, committed or not, has the key.
 */
inline List *
InsertIndexEntriesOfInsert(ResultRelInfo *info, TupleTableSlot *row, EState *estate, bool *conflict,
						   List *reporting)
{
#if PG_VERSION_NUM >= 160000
	return ExecInsertIndexTuples(info, row, estate, false, true, conflict, reporting, false);
#else
	return ExecInsertIndexTuples(info, row, estate, false, true, conflict, reporting);
#endif
}

/* TRUNCATE of open relations, neither cascading nor restarting sequences (16: run as owner). */
inline void
TruncateRelations(List *relations, List *oids, List *logged_oids)
{
#if PG_VERSION_NUM >= 160000
	ExecuteTruncateGuts(relations, oids, logged_oids, DROP_RESTRICT, false, false);
#else
	ExecuteTruncateGuts(relations, oids, logged_oids, DROP_RESTRICT, false);
#endif
}

} // namespace mmrepl
