/*
 * ddl_events.cpp
 *		The event trigger at the end of DDL commands: pairs follow renames, and
 *		DDL that would break a pair is refused, with the reason.
 *
 * It runs for every DDL command of the database, so what does not concern us
 * is told by the kind of command, before anything is looked up.
 */
#include "registration_internal.hpp"

#include "mmrepl/capture.hpp"
#include "mmrepl/shmem.hpp"

namespace mmrepl::registration
{

namespace
{

/* Call fn for the relation, when it exists. */
template <typename Fn>
void
WithRelation(const RangeVar *name, Fn fn)
{
	Oid oid = RangeVarGetRelid(name, NoLock, true);
	Relation rel = OidIsValid(oid) ? try_relation_open(oid, AccessShareLock) : NULL;

	if (rel == NULL)
		return;
	fn(rel);
	relation_close(rel, NoLock);
}

/* The relation's trigger of that name, copied; NULL when there is none. */
const Trigger *
FindTrigger(Relation rel, const char *name)
{
	const TriggerDesc *triggers = CopyTriggerDesc(rel->trigdesc);

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		if (strcmp(triggers->triggers[i].tgname, name) == 0)
			return &triggers->triggers[i];
	}
	return NULL;
}

/* Whether the statement makes a trigger that fires before that of a table's pairs. */
bool
MakesEarlier(const CreateTrigStmt *statement)
{
	return statement->row && statement->timing == TRIGGER_TYPE_AFTER &&
		   strcmp(statement->trigname, kRowTrigger) < 0;
}

/* CREATE TRIGGER. */
void
OnCreateTrigger(const CreateTrigStmt *statement)
{
	if (!catalog::ExtensionExists())
		return;
	if (MakesEarlier(statement))
		WithRelation(statement->relation, WarnOfEarlier);
	if (strcmp(strVal(llast(statement->funcname)), "replicate") != 0)
		return;
	WithRelation(statement->relation, [&](Relation rel) {
		Oid function = ReplicateFunction();
		const Trigger *trigger = FindTrigger(rel, statement->trigname);

		if (trigger != NULL && OidIsValid(function) && trigger->tgfoid == function)
			RegisterHandTrigger(rel, trigger);
	});
}

/* Whether a command of the statement is of one of the kinds. */
template <typename Predicate>
bool
HasCommand(const AlterTableStmt *statement, Predicate predicate)
{
	ListCell *cell;

	foreach(cell, statement->cmds)
	{
		if (predicate(*lfirst_node(AlterTableCmd, cell)))
			return true;
	}
	return false;
}

/* Whether the command switches triggers on or off. */
bool
IsAboutTriggers(const AlterTableCmd &command)
{
	switch (command.subtype)
	{
		case AT_EnableTrig:
		case AT_EnableAlwaysTrig:
		case AT_EnableReplicaTrig:
		case AT_DisableTrig:
		case AT_EnableTrigAll:
		case AT_DisableTrigAll:
		case AT_EnableTrigUser:
		case AT_DisableTrigUser:
			return true;
		default:
			return false;
	}
}

/* Raise when a pair of the relation, or of one below it, can no longer work. */
void
RevalidatePairsBelow(Oid relation)
{
	ListCell *cell, *pair;

	foreach(cell, find_all_inheritors(relation, NoLock, NULL))
	{
		List *pairs = PairRowsOfTable(lfirst_oid(cell));
		Relation rel = pairs == NIL ? NULL : try_relation_open(lfirst_oid(cell), AccessShareLock);

		if (rel == NULL)
			continue;
		/* A restore brings the pairs, then the keys one by one, and the triggers last. */
		bool captured = OidIsValid(FindPairTriggers(rel).row);

		foreach(pair, pairs)
		{
			if (captured && ((const PairRow *) lfirst(pair))->enabled)
				RevalidatePair(rel, *(const PairRow *) lfirst(pair));
		}
		relation_close(rel, NoLock);
	}
}

/* Whether an index of the table is its replica identity.  Takes no lock on the table. */
bool
HasIdentityIndex(Oid table)
{
	Relation indexes = table_open(IndexRelationId, AccessShareLock);
	ScanKeyData key;
	bool has = false;
	HeapTuple tuple;

	ScanKeyInit(&key, Anum_pg_index_indrelid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(table));

	SysScanDesc scan = systable_beginscan(indexes, IndexIndrelidIndexId, true, NULL, 1, &key);

	while (!has && HeapTupleIsValid(tuple = systable_getnext(scan)))
		has = ((Form_pg_index) GETSTRUCT(tuple))->indisreplident;
	systable_endscan(scan);
	table_close(indexes, AccessShareLock);
	return has;
}

/* Whether the table's key was an index that was named for that, and is no more.  Takes no lock either. */
bool
LostIdentityIndex(Oid table)
{
	HeapTuple tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(table));

	if (!HeapTupleIsValid(tuple))
		return false;
	bool named = ((Form_pg_class) GETSTRUCT(tuple))->relreplident == REPLICA_IDENTITY_INDEX;

	ReleaseSysCache(tuple);
	return named && !HasIdentityIndex(table);
}

/*
 * Raise when one of the pairs of the database that the command concerns can no longer
 * work; only their tables are locked.  Those that do not capture may be in any state:
 * a restore is under way.
 */
template <typename Predicate>
void
RevalidatePairs(Predicate concerns)
{
	ListCell *cell;

	foreach(cell, AllPairRows())
	{
		const PairRow *row = (const PairRow *) lfirst(cell);

		if (!row->enabled || !concerns(*row))
			continue;

		Relation rel = try_relation_open(row->table, AccessShareLock);

		if (rel == NULL)
			continue;
		if (OidIsValid(FindPairTriggers(rel).row))
			RevalidatePair(rel, *row);
		relation_close(rel, NoLock);
	}
}

/* ALTER TYPE, ALTER FOREIGN TABLE: the typed tables, or children, that it has locked are other ones now. */
void
OnAlterAbove()
{
	if (catalog::ExtensionExists())
		RevalidatePairs([](const PairRow &row) { return HoldsExclusiveLock(row.table); });
}

/* Pairs of partitions that have been detached. */
void
OnDetach(const AlterTableStmt *statement)
{
	ListCell *cell;

	foreach(cell, statement->cmds)
	{
		const AlterTableCmd *command = lfirst_node(AlterTableCmd, cell);

		if (command->subtype == AT_DetachPartition ||
			command->subtype == AT_DetachPartitionFinalize)
			WithRelation(castNode(PartitionCmd, command->def)->name, RestorePairTriggers);
	}
}

/* ALTER TABLE: nothing that a pair needs may go, and what is enabled is enabled always. */
void
OnAlterTable(const AlterTableStmt *statement)
{
	if (statement->objtype == OBJECT_TYPE || statement->objtype == OBJECT_FOREIGN_TABLE)
		OnAlterAbove();
	if (statement->objtype != OBJECT_TABLE || !catalog::ExtensionExists())
		return;
	OnDetach(statement);
	WithRelation(statement->relation, [&](Relation rel) {
		if (HasCommand(statement, IsAboutTriggers))
		{
			KeepFiringAlways(rel);
			WarnOfDisabled(rel);
		}
		RevalidatePairsBelow(RelationGetRelid(rel));
		if (HasCommand(statement, [](const AlterTableCmd &command) {
				return command.subtype == AT_ChangeOwner;
			}))
		{
			RevalidateHandTriggers(rel);
			NoticePairsOfOthers(rel);
		}
	});
}

/* The pair goes on writing to the same remote column; say so when that needed a mapping. */
void
MapRenamedColumn(PairRow *row, const char *old_name, const char *new_name)
{
	int listed = FindName(row->columns, old_name);
	int mapped = FindName(row->map_local, old_name);

	if (listed >= 0)
		lfirst(list_nth_cell(row->columns, listed)) = pstrdup(new_name);
	if (mapped >= 0)
		lfirst(list_nth_cell(row->map_local, mapped)) = pstrdup(new_name);
	else if (row->columns == NIL || listed >= 0)
	{
		row->map_local = lappend(row->map_local, pstrdup(new_name));
		row->map_remote = lappend(row->map_remote, pstrdup(old_name));
		ereport(NOTICE,
				(errmsg("pair %d still replicates column \"%s\" to column \"%s\" at server \"%s\"",
						row->id, new_name, old_name, row->server),
				 errhint("When the column is renamed there as well, set column_map with "
						 "mmrepl.alter_pair().")));
	}
}

/* A mapping of a column to its own name is none. */
void
DropIdleMapping(PairRow *row, const char *name)
{
	int mapped = FindName(row->map_local, name);

	if (mapped < 0 || strcmp((const char *) list_nth(row->map_remote, mapped), name) != 0)
		return;
	row->map_local = list_delete_nth_cell(row->map_local, mapped);
	row->map_remote = list_delete_nth_cell(row->map_remote, mapped);
}

/* The pairs of one table follow the rename of a column. */
void
RenameColumn(Oid table, const char *old_name, const char *new_name)
{
	List *pairs = PairRowsOfTable(table);
	Relation rel = pairs == NIL ? NULL : try_relation_open(table, AccessShareLock);
	ListCell *cell;

	if (rel == NULL)
		return;
	foreach(cell, pairs)
	{
		PairRow *row = (PairRow *) lfirst(cell);

		MapRenamedColumn(row, old_name, new_name);
		DropIdleMapping(row, new_name);
		if (row->row_filter != NULL)
			row->row_filter =
				capture::RenameInFilter(rel, row->row_filter, row->owner, old_name, new_name);
		UpdatePairRow(row);
	}
	relation_close(rel, NoLock);
}

/* The pairs of a table, and of those below it, follow the rename of a column. */
void
RenameColumnBelow(Oid table, const RenameStmt *statement)
{
	ListCell *cell;

	foreach(cell, find_all_inheritors(table, NoLock, NULL))
		RenameColumn(lfirst_oid(cell), statement->subname, statement->newname);
}

/* The typed tables (CREATE TABLE ... OF) of a composite type. */
List *
TablesOfType(Oid type)
{
	Relation classes = table_open(RelationRelationId, AccessShareLock);
	List *tables = NIL;
	ScanKeyData key;
	HeapTuple tuple;

	ScanKeyInit(&key, Anum_pg_class_reloftype, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(type));

	SysScanDesc scan = systable_beginscan(classes, InvalidOid, false, NULL, 1, &key);

	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
		tables = lappend_oid(tables, ((Form_pg_class) GETSTRUCT(tuple))->oid);
	systable_endscan(scan);
	table_close(classes, AccessShareLock);
	return tables;
}

/* ALTER TABLE ... RENAME COLUMN; a foreign table may have children that are replicated. */
void
OnRenameColumn(const RenameStmt *statement)
{
	if (!catalog::ExtensionExists())
		return;
	WithRelation(statement->relation,
				 [&](Relation rel) { RenameColumnBelow(RelationGetRelid(rel), statement); });
	RequireFiltersInside(statement->subname);
}

/* ALTER TYPE ... RENAME ATTRIBUTE: with CASCADE the type's tables are renamed a column of. */
void
OnRenameAttribute(const RenameStmt *statement)
{
	if (!catalog::ExtensionExists())
		return;
	WithRelation(statement->relation, [&](Relation type) {
		ListCell *cell;

		foreach(cell, TablesOfType(type->rd_rel->reltype))
			RenameColumnBelow(lfirst_oid(cell), statement);
	});
	RequireFiltersInside(statement->subname);
}

/* The first trigger made by hand that names the server; InvalidOid: there is none. */
Oid
HandTriggerOf(Oid server)
{
	Relation depend = table_open(DependRelationId, AccessShareLock);
	ScanKeyData keys[2];
	Oid found = InvalidOid;
	HeapTuple tuple;

	ScanKeyInit(&keys[0], Anum_pg_depend_refclassid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(ForeignServerRelationId));
	ScanKeyInit(&keys[1], Anum_pg_depend_refobjid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(server));

	SysScanDesc scan = systable_beginscan(depend, DependReferenceIndexId, true, NULL, 2, keys);

	while (!OidIsValid(found) && HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_depend form = (Form_pg_depend) GETSTRUCT(tuple);

		if (form->classid == TriggerRelationId)
			found = form->objid;
	}
	systable_endscan(scan);
	table_close(depend, AccessShareLock);
	return found;
}

/* Raise when a trigger made by hand names the server in its arguments. */
void
RefuseRenameUnderTriggers(Oid server, const char *old_name)
{
	Oid trigger = HandTriggerOf(server);
	ObjectAddress address;

	if (!OidIsValid(trigger))
		return;
	ObjectAddressSet(address, TriggerRelationId, trigger);
	ereport(ERROR,
			(errcode(ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST),
			 errmsg("cannot rename server \"%s\" because a trigger names it", old_name),
			 errdetail("The server's name is an argument of %s.",
					   getObjectDescription(&address, false)),
			 errhint("In one transaction drop the trigger, rename the server, and create the "
					 "trigger with the new name.")));
}

/* ALTER SERVER ... RENAME: pairs and streams follow. */
void
OnRenameServer(const RenameStmt *statement)
{
	const char *old_name = strVal(statement->object);
	ListCell *cell;

	if (!catalog::ExtensionExists())
		return;

	Oid server = get_foreign_server_oid(statement->newname, false);

	RefuseRenameUnderTriggers(server, old_name);
	foreach(cell, AllPairRows())
	{
		PairRow *row = (PairRow *) lfirst(cell);

		if (strcmp(row->server, old_name) != 0)
			continue;
		row->server = statement->newname;
		UpdatePairRow(row);
	}
	catalog::RenameStreams(server, statement->newname);
	WakeLauncher();
	WakeWorkers();
}

/* Renames that pairs follow, or that change what they do. */
void
OnRename(const RenameStmt *statement)
{
	if (statement->renameType == OBJECT_COLUMN)
		OnRenameColumn(statement);
	else if (statement->renameType == OBJECT_ATTRIBUTE)
		OnRenameAttribute(statement);
	else if (statement->renameType == OBJECT_FOREIGN_SERVER)
		OnRenameServer(statement);
	else if (statement->renameType == OBJECT_TRIGGER && catalog::ExtensionExists())
		WithRelation(statement->relation, WarnOfEarlier);
	else
		RequireFiltersAfterRename(statement);
}

} // namespace

/* Who drops a column has locked its table; an index is dropped CONCURRENTLY under other locks. */
void
RevalidateAfterDrop()
{
	RevalidatePairs([](const PairRow &row) {
		return HoldsExclusiveLock(row.table) || LostIdentityIndex(row.table);
	});
}

/* SQL: event trigger mmrepl_ddl_end. */
Datum
SqlOnDdlEnd(FunctionCallInfo fcinfo)
{
	if (!CALLED_AS_EVENT_TRIGGER(fcinfo))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_EVENT_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("mmrepl.on_ddl_end() was not called by an event trigger")));

	const Node *command = ((const EventTriggerData *) fcinfo->context)->parsetree;

	if (command == NULL)
		PG_RETURN_VOID();
	if (IsA(command, CreateTrigStmt))
		OnCreateTrigger((const CreateTrigStmt *) command);
	if (IsBinaryUpgrade)
		PG_RETURN_VOID();
	switch (nodeTag(command))
	{
		case T_AlterTableStmt:
			OnAlterTable((const AlterTableStmt *) command);
			break;
		case T_RenameStmt:
			OnRename((const RenameStmt *) command);
			break;
		case T_AlterObjectSchemaStmt:
			RequireFiltersAfterMove((const AlterObjectSchemaStmt *) command);
			break;
		case T_AlterFunctionStmt:
			RequireFiltersNaming(((const AlterFunctionStmt *) command)->func->objname);
			break;
		case T_CreateFunctionStmt:
			RequireFiltersNaming(((const CreateFunctionStmt *) command)->funcname);
			break;
		case T_AlterEnumStmt:
			RequireFiltersNaming(((const AlterEnumStmt *) command)->typeName);
			break;
		case T_AlterForeignServerStmt:
		case T_AlterFdwStmt:
		case T_CreateUserMappingStmt:
		case T_AlterUserMappingStmt:
			WakeWorkers();
			break;
		case T_DropUserMappingStmt:
			OnDropUserMapping((const DropUserMappingStmt *) command);
			break;
		case T_DropOwnedStmt:
			OnDropOwned((const DropOwnedStmt *) command);
			break;
		default:
			break;
	}
	PG_RETURN_VOID();
}

} // namespace mmrepl::registration
