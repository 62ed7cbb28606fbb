/*
 * apply_target.cpp
 *		The table that a relation of the change set names here: found, checked,
 *		opened once a batch, and routed to its partitions.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

/* ---- finding and checking ---- */

pg_attribute_noreturn() static void NoSuchRelation(const char *schema, const char *table)
{
	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_TABLE),
			 errmsg("relation \"%s.%s\" does not exist", schema, table),
			 errhint("Create the table here, or point the pair elsewhere at the sending node with "
					 "mmrepl.alter_pair(..., remote_table => ...).")));
}

/* Raise unless the relation is an ordinary user's table. */
static void
CheckKind(Relation rel, const char *schema, const char *table)
{
	char kind = rel->rd_rel->relkind;
	Oid space = RelationGetNamespace(rel);

	if (kind != RELKIND_RELATION && kind != RELKIND_PARTITIONED_TABLE)
		ereport(ERROR, (errcode(ERRCODE_WRONG_OBJECT_TYPE),
						errmsg("\"%s.%s\" is not a table", schema, table),
						errhint("Only tables can be the target of replication.")));
	if (RelationGetRelid(rel) < (Oid) FirstNormalObjectId || IsSystemRelation(rel) ||
		space == catalog::GetRelations().schema)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("relation \"%s.%s\" cannot be written by replication", schema, table),
				 errdetail("It belongs to the system or to the extension itself.")));
	if (rel->rd_rel->relpersistence == RELPERSISTENCE_TEMP)
		ereport(ERROR, (errcode(ERRCODE_WRONG_OBJECT_TYPE),
						errmsg("\"%s.%s\" is a temporary table", schema, table),
						errhint("Only permanent tables can be the target of replication.")));
}

/* Who has none of these rights on a table may not make others wait for his lock of it either. */
struct Needed
{
	Oid caller;
	AclMode any;
};

/* RangeVarGetRelidExtended() calls it before it takes the lock. */
static void
RequireAnyPrivilege(const RangeVar *name, Oid relid, Oid, void *arg)
{
	const Needed *needed = (const Needed *) arg;
	char kind = OidIsValid(relid) ? get_rel_relkind(relid) : '\0';

	if (kind == '\0') /* there is no such table, or it is just going */
		return;
	if (pg_class_aclmask(relid, needed->caller, needed->any, ACLMASK_ANY) == ACL_NO_RIGHTS)
		aclcheck_error(ACLCHECK_NO_PRIV, get_relkind_objtype(kind), name->relname);
}

/* The name is looked up in the schema given, and nowhere else. */
Relation
OpenRelation(const Session *session, const char *schema, const char *table, LOCKMODE lockmode,
			 AclMode any)
{
	if (*schema == '\0' || *table == '\0')
		Malformed("A relation has no name.");
	RangeVar *name = makeRangeVar(pstrdup(schema), pstrdup(table), -1);
	Needed needed = {session->caller, any};
	Oid relid =
		RangeVarGetRelidExtended(name, lockmode, RVR_MISSING_OK, RequireAnyPrivilege, &needed);

	if (!OidIsValid(relid))
		NoSuchRelation(schema, table);
	Relation rel = relation_open(relid, NoLock);

	CheckKind(rel, schema, table);
	return rel;
}

/* Asks about the caller, whatever role is current. */
void
CheckPrivilege(const Session *session, Relation rel, AclMode mode)
{
	Oid relid = RelationGetRelid(rel);
	AclResult result = pg_class_aclcheck(relid, session->caller, mode);

	if (result != ACLCHECK_OK)
		aclcheck_error(result, get_relkind_objtype(rel->rd_rel->relkind),
					   RelationGetRelationName(rel));
	if (check_enable_rls(relid, session->caller, false) == RLS_ENABLED)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("role \"%s\" cannot replicate into \"%s\", which has row-level security",
						GetUserNameFromId(session->caller, true), RelationGetRelationName(rel)),
				 errhint("Let the peer's user mapping connect as the table's owner or as a role "
						 "with BYPASSRLS.")));
}

/* ---- columns ---- */

/* The attribute number of a column, or InvalidAttrNumber. */
static AttrNumber
FindColumn(TupleDesc desc, const char *name)
{
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attribute = TupleDescAttr(desc, i);

		if (!attribute->attisdropped && strcmp(NameStr(attribute->attname), name) == 0)
			return attribute->attnum;
	}
	return InvalidAttrNumber;
}

pg_attribute_noreturn() static void NoSuchColumn(const Target *target, const char *name)
{
	ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
					errmsg("column \"%s\" of relation \"%s.%s\" does not exist", name,
						   target->schema, target->table),
					errhint("Add the column here, or leave it out at the sending node with "
							"mmrepl.alter_pair(..., columns => ...).")));
}

/* Map the change's columns to local ones by name. */
static void
MapColumns(Session *session, Target *target, const change::Relation *relation)
{
	TupleDesc desc = RelationGetDescr(target->rel);
	Bitmapset *seen = NULL;

	target->n_fields = relation->n_columns;
	target->fields = (Field *) palloc0(sizeof(Field) * Max(relation->n_columns, 1));
	target->key_attnums = (AttrNumber *) palloc0(sizeof(AttrNumber) * Max(relation->n_keys, 1));
	for (int i = 0; i < relation->n_columns; i++)
	{
		const change::Column *column = &relation->columns[i];
		char *name = ToServer(session, column->name, strlen(column->name));
		AttrNumber attnum = FindColumn(desc, name);

		if (attnum == InvalidAttrNumber)
			NoSuchColumn(target, name);
		if (bms_is_member(attnum, seen))
			Malformed("A relation names a column twice.");
		seen = bms_add_member(seen, attnum);
		InitField(&target->fields[i], column, TupleDescAttr(desc, attnum - 1));
		target->to_read |= target->fields[i].to_read;
		target->to_compare |= target->fields[i].to_compare;
		if (column->key)
			target->key_attnums[target->n_keys++] = attnum;
	}
	bms_free(seen);
}

/* The columns that the change does not carry and that have a default. */
static void
InitDefaults(Target *target)
{
	TupleDesc desc = RelationGetDescr(target->rel);
	bool *carried = (bool *) palloc0(sizeof(bool) * (desc->natts + 1));

	target->defaults = (ExprState **) palloc(sizeof(ExprState *) * (desc->natts + 1));
	target->default_attnums = (AttrNumber *) palloc(sizeof(AttrNumber) * (desc->natts + 1));
	for (int i = 0; i < target->n_fields; i++)
		carried[target->fields[i].attnum] = true;
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attribute = TupleDescAttr(desc, i);

		if (attribute->attisdropped || attribute->attgenerated || carried[i + 1])
			continue;
		Expr *expression = (Expr *) build_column_default(target->rel, i + 1);

		if (expression == NULL)
			continue;
		expression = expression_planner(expression);
		target->volatile_defaults |= contain_volatile_functions((Node *) expression);
		target->default_attnums[target->n_defaults] = i + 1;
		target->defaults[target->n_defaults++] = ExecInitExpr(expression, NULL);
	}
	pfree(carried);
}

/* The columns that an UPDATE assigns. */
static Bitmapset *
AssignedColumns(const Target *target)
{
	Bitmapset *columns = NULL;

	for (int i = 0; i < target->n_fields; i++)
		if (target->fields[i].form != Form::Ignore)
			columns = bms_add_member(columns,
									 target->fields[i].attnum - FirstLowInvalidHeapAttributeNumber);
	return columns;
}

/* ---- key ---- */

/* "id, tenant" */
static char *
KeyNames(Relation rel, const AttrNumber *attnums, int count)
{
	StringInfoData names;

	initStringInfo(&names);
	for (int i = 0; i < count; i++)
		appendStringInfo(&names, "%s%s", i ? ", " : "",
						 quote_identifier(NameStr(
							 TupleDescAttr(RelationGetDescr(rel), attnums[i] - 1)->attname)));
	return names.data;
}

/* The index that finds rows; raises when the table has none over exactly the key columns. */
static Oid
RequireKeyIndex(Relation rel, const AttrNumber *attnums, int count)
{
	Oid index = count > 0 ? ChooseKeyIndex(rel, attnums, count) : InvalidOid;

	if (OidIsValid(index))
		return index;
	const char *schema = get_namespace_name(RelationGetNamespace(rel));
	const char *table = RelationGetRelationName(rel);
	char *names = KeyNames(rel, attnums, count);

	ereport(ERROR,
			(errcode(ERRCODE_INVALID_COLUMN_REFERENCE),
			 errmsg("relation \"%s.%s\" has no unique index over exactly the replicated key (%s)",
					schema, table, names),
			 errhint("ALTER TABLE %s ADD PRIMARY KEY (%s);",
					 quote_qualified_identifier(schema, table), names)));
}

/* ---- leaves ---- */

/* Maps by name between the root's layout and the leaf's, where they differ. */
static void
InitMaps(Leaf *leaf, Relation root)
{
	TupleDesc root_desc = RelationGetDescr(root);
	TupleDesc leaf_desc = RelationGetDescr(leaf->info->ri_RelationDesc);
	TupleConversionMap *map = convert_tuples_by_name(root_desc, leaf_desc);

	if (map == NULL)
		return;
	leaf->to_leaf = map->attrMap;
	leaf->to_root = convert_tuples_by_name(leaf_desc, root_desc)->attrMap;
}

/* The key columns in the leaf's layout. */
static AttrNumber *
LeafKey(const Target *target, const Leaf *leaf)
{
	AttrNumber *attnums = (AttrNumber *) palloc(sizeof(AttrNumber) * target->n_keys);

	for (int i = 0; i < target->n_keys; i++)
		attnums[i] = leaf->to_root ? leaf->to_root->attnums[target->key_attnums[i] - 1]
								   : target->key_attnums[i];
	return attnums;
}

/* Whether a column's value is computed when the row is written. */
static bool
HasGeneratedColumns(Relation rel)
{
	return rel->rd_att->constr != NULL && rel->rd_att->constr->has_generated_stored;
}

/* Make the leaf of a relation whose indexes are open; in the executor's context. */
static Leaf *
MakeLeaf(Session *session, Target *target, ResultRelInfo *info)
{
	Leaf *leaf = (Leaf *) palloc0(sizeof(Leaf));
	Relation rel = info->ri_RelationDesc;
	EState *estate = target->estate;

	leaf->info = info;
	leaf->schema = get_namespace_name(RelationGetNamespace(rel));
	TuneTriggers(session, target, leaf);
	leaf->plain = !leaf->queues && !HasGeneratedColumns(rel);
	if (info != target->info)
		InitMaps(leaf, target->rel);
	if (leaf->to_leaf)
	{
		leaf->converted = ExecInitExtraTupleSlot(estate, RelationGetDescr(rel), &TTSOpsVirtual);
		leaf->found_root =
			ExecInitExtraTupleSlot(estate, RelationGetDescr(target->rel), &TTSOpsVirtual);
	}
	leaf->found = info == target->info
					  ? ExecInitExtraTupleSlot(estate, target->desc, table_slot_callbacks(rel))
					  : table_slot_create(rel, &estate->es_tupleTable);
	InitSearch(leaf, RequireKeyIndex(rel, LeafKey(target, leaf), target->n_keys));
	leaf->next = target->leaves;
	target->leaves = leaf;
	return leaf;
}

/* A partition that routing has just opened. */
static Leaf *
AdoptPartition(Session *session, Target *target, ResultRelInfo *info)
{
	Relation rel = info->ri_RelationDesc;

	if (rel->rd_rel->relkind != RELKIND_RELATION)
		ereport(ERROR, (errcode(ERRCODE_WRONG_OBJECT_TYPE),
						errmsg("partition \"%s\" of \"%s.%s\" is not a table",
							   RelationGetRelationName(rel), target->schema, target->table),
						errhint("Only tables can be the target of replication.")));
	return InContext(target->estate->es_query_cxt, [&] { return MakeLeaf(session, target, info); });
}

/* Opens the partition when the row is the first for it; raises when there is none. */
Leaf *
Route(Session *session, Target *target, TupleTableSlot *row)
{
	if (target->proute == NULL)
		return target->leaves;
	ResultRelInfo *info =
		ExecFindPartition(target->mtstate, target->info, target->proute, row, target->estate);
	Leaf **link = &target->leaves;

	for (Leaf *leaf = *link; leaf != NULL; link = &leaf->next, leaf = *link)
	{
		if (leaf->info != info)
			continue;
		*link = leaf->next;
		leaf->next = target->leaves;
		target->leaves = leaf;
		return leaf;
	}
	return AdoptPartition(session, target, info);
}

/* The row itself, or the leaf's one slot for converted rows. */
TupleTableSlot *
ToLeaf(Leaf *leaf, TupleTableSlot *row)
{
	if (leaf->to_leaf == NULL)
		return row;
	return execute_attr_map_slot(leaf->to_leaf, row, leaf->converted);
}

/* The found row itself, or the leaf's one slot for it. */
TupleTableSlot *
FoundInRoot(Leaf *leaf)
{
	if (leaf->to_root == NULL)
		return leaf->found;
	return execute_attr_map_slot(leaf->to_root, leaf->found, leaf->found_root);
}

/* ---- opening and closing ---- */

/* What ExecFindPartition() wants to see. */
static void
InitRouting(Target *target)
{
	target->mtstate = makeNode(ModifyTableState);
	target->mtstate->ps.state = target->estate;
	target->mtstate->operation = CMD_INSERT;
	target->mtstate->resultRelInfo = target->info;
	target->proute = ExecSetupPartitionTupleRouting(target->estate, target->rel);
}

/* Executor state for the relation; the range table has this one entry. */
static void
InitExecutor(Target *target)
{
	EState *estate = target->estate;
	TupleDesc desc = target->desc = CreateTupleDescCopyConstr(RelationGetDescr(target->rel));

	InitTargetRangeTable(estate, target->rel, AssignedColumns(target));
	target->info = makeNode(ResultRelInfo);
	InitResultRelInfo(target->info, target->rel, 1, NULL, 0);
	estate->es_opened_result_relations = lappend(estate->es_opened_result_relations, target->info);
	InitEvalPlanQual(&target->epq, estate);
	/* Slots for heap tuples are turned into one without a copy on the way. */
	target->row = ExecInitExtraTupleSlot(estate, desc, &TTSOpsHeapTuple);
	target->search = ExecInitExtraTupleSlot(estate, desc, &TTSOpsVirtual);
	target->merged = ExecInitExtraTupleSlot(estate, desc, &TTSOpsHeapTuple);
}

/* ---- checks that look around ---- */

/* Whether a check of the domain may depend on more than the value.  The context keeps what is looked at. */
static bool
DomainMayRead(Oid type)
{
	DomainConstraintRef *domain = (DomainConstraintRef *) palloc(sizeof(DomainConstraintRef));
	ListCell *cell;

	InitDomainConstraintRef(type, domain, CurrentMemoryContext, false);
	foreach(cell, domain->constraints)
	{
		const DomainConstraintState *each = (const DomainConstraintState *) lfirst(cell);

		if (each->constrainttype == DOM_CONSTRAINT_CHECK &&
			contain_mutable_functions((Node *) each->check_expr))
			return true;
	}
	return false;
}

/* Whether a check of the table, or of a domain in it, may depend on more than the row. */
static bool
ChecksMayRead(Relation rel)
{
	const TupleConstr *constr = rel->rd_att->constr;

	for (int i = 0; constr != NULL && i < constr->num_check; i++)
		if (contain_mutable_functions((Node *) stringToNode(constr->check[i].ccbin)))
			return true;
	for (int i = 0; i < rel->rd_att->natts; i++)
	{
		Form_pg_attribute attribute = TupleDescAttr(rel->rd_att, i);

		if (!attribute->attisdropped && get_typtype(attribute->atttypid) == TYPTYPE_DOMAIN &&
			DomainMayRead(attribute->atttypid))
			return true;
	}
	return false;
}

/*
 * Columns, defaults, indexes and triggers of the relation.  Planning an
 * expression may already run functions in it, hence as the owner.
 */
static void
InitTarget(Session *session, Target *target, const change::Relation *relation)
{
	MapColumns(session, target, relation);
	if (!target->partial) /* of which nothing is inserted */
		InitDefaults(target);
	InitExecutor(target);
	target->reads = ChecksMayRead(target->rel);
	if (target->rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE)
	{
		RequireKeyIndex(target->rel, target->key_attnums, target->n_keys);
		InitRouting(target);
		target->fires = HasFiringTriggers(target->rel);
		return;
	}
	ExecOpenIndices(target->info, false);
	InitRun(target, MakeLeaf(session, target, target->info));
	JudgeKeeping(target);
}

/* Who owns the relation that was opened, and where messages say it is. */
void
AdoptRelation(Session *session, Target *target)
{
	target->relid = RelationGetRelid(target->rel);
	target->owner = target->rel->rd_rel->relowner;
	target->trusted = IsTrusted(session, target->owner);
	target->checked = 0;
}

/* Find, check and open the relation; memory is the target's own. */
static Target *
OpenTarget(Session *session, const change::Relation *relation)
{
	Target *target = (Target *) palloc0(sizeof(Target));

	target->context = CurrentMemoryContext;
	target->changes = RelationChanges();
	target->raw =
		(char *) memcpy(palloc(relation->raw_length), relation->raw, relation->raw_length);
	target->raw_length = relation->raw_length;
	target->encoding = session->header.encoding;
	target->rule = relation->conflict;
	target->carries_old = relation->checked;
	target->partial = relation->partial;
	target->at_writer = session->header.Inline();
	session->schema = target->schema =
		ToServer(session, relation->remote_schema, strlen(relation->remote_schema));
	session->table = target->table =
		ToServer(session, relation->remote_table, strlen(relation->remote_table));
	target->rel =
		OpenRelation(session, target->schema, target->table, RowExclusiveLock, kWriteRights);
	AdoptRelation(session, target);
	target->estate = CreateExecutorState();
	BecomeOwner(session, target->owner, target->trusted);
	InContext(target->estate->es_query_cxt, [&] { InitTarget(session, target, relation); });
	BecomeCaller(session);
	return target;
}

/* In a context of its own below the session's. */
static Target *
MakeTarget(Session *session, const change::Relation *relation)
{
	MemoryContext context =
		AllocSetContextCreate(session->context, "mmrepl apply target", ALLOCSET_SMALL_SIZES);

	return InContext(context, [&] { return OpenTarget(session, relation); });
}

/* The target of an equal definition, or NULL. */
static Target *
FindTarget(Session *session, const change::Relation *relation)
{
	for (Target *target = session->targets; target != NULL; target = target->next)
		if (target->raw_length == relation->raw_length &&
			memcmp(target->raw, relation->raw, relation->raw_length) == 0)
			return target;
	return NULL;
}

/*
 * By the decoded relation first (most changes), then by the definition's bytes
 * (every segment repeats it).
 */
Target *
TargetOf(Session *session, const change::Relation *relation)
{
	for (int i = 0; i < session->n_bindings; i++)
		if (session->bindings[i].relation == relation)
			return session->bindings[i].target;
	Target *target = FindTarget(session, relation);

	if (target == NULL)
	{
		target = Reopen(session, relation);
		if (target == NULL)
			target = MakeTarget(session, relation);
		/* Ahead, only keys and built-in types may decide, which meet others at the row. */
		if (!target->simple || target->carries_old)
			(void) WaitForPredecessor(session);
		target->next = session->targets;
		session->targets = target;
	}
	if (session->n_bindings < (int) lengthof(session->bindings))
		session->bindings[session->n_bindings++] = {relation, target};
	return target;
}

/* The locks stay until the transaction's end. */
static void
CloseTarget(Target *target)
{
	EState *estate = target->estate;

	for (Leaf *leaf = target->leaves; leaf != NULL; leaf = leaf->next)
		CloseSearch(leaf);
	EvalPlanQualEnd(&target->epq);
	ExecResetTupleTable(estate->es_tupleTable, false);
	if (target->proute)
		ExecCleanupTupleRouting(target->mtstate, target->proute);
	else
		ExecCloseIndices(target->info);
	table_close(target->rel, NoLock);
	FreeExecutorState(estate);
	MemoryContextDelete(target->context);
}

/* Every target, with everything written; the next change opens its own again. */
void
CloseTargets(Session *session)
{
	FlushAllCollected(session);
	while (session->targets != NULL)
	{
		Target *target = session->targets;

		session->targets = target->next;
		if (MayKeep(target))
			Keep(target);
		else
			CloseTarget(target);
	}
	session->n_bindings = 0;
}

} // namespace mmrepl::apply
