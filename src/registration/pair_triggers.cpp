/*
 * pair_triggers.cpp
 *		The triggers that registered pairs need: one for rows, one for TRUNCATE.
 *
 * They have no arguments: capture looks the table's pairs up.  All pairs of a
 * table share them, and those of a partitioned table are cloned into its
 * partitions by PostgreSQL, where they serve pairs of the partition as well.
 * They are known by their function and the lack of arguments, not by name.
 */
#include "registration_internal.hpp"

namespace mmrepl::registration
{

namespace
{

/* Whether the trigger calls mmrepl.replicate(). */
bool
IsOurs(const Trigger &trigger, Oid function)
{
	return OidIsValid(function) && trigger.tgfoid == function;
}

/* Create one of the two, to fire always. */
void
CreateTriggerOf(Relation rel, const char *name, int16 events, bool for_each_row)
{
	CreateTrigStmt *statement = makeNode(CreateTrigStmt);
	Oid function = ReplicateFunction();

	MmreplEnsure(OidIsValid(function), "function mmrepl.replicate() is missing");
	statement->trigname = pstrdup(name);
	statement->funcname =
		list_make2(makeString(pstrdup("mmrepl")), makeString(pstrdup("replicate")));
	statement->row = for_each_row;
	statement->timing = TRIGGER_TYPE_AFTER;
	statement->events = events;
	(void) CreateTriggerFiringOn(statement, NULL, RelationGetRelid(rel), InvalidOid, InvalidOid,
								 InvalidOid, function, InvalidOid, NULL, false, false,
								 TRIGGER_FIRES_ALWAYS);
	CommandCounterIncrement();
}

/* Whether the trigger fires after a row's event. */
bool
IsRowTrigger(const Trigger &trigger)
{
	return TRIGGER_FOR_AFTER(trigger.tgtype) && TRIGGER_FOR_ROW(trigger.tgtype) &&
		   trigger.tgenabled != TRIGGER_DISABLED;
}

/* Warn that the trigger fires before ours; the one whose name is not the usual one should give way. */
void
WarnOfOrder(Relation rel, const char *name, const char *ours)
{
	bool renamed = strcmp(ours, kRowTrigger) != 0;

	ereport(WARNING,
			(errmsg("trigger \"%s\" of table \"%s\" fires before changes are captured", name,
					RelationGetRelationName(rel)),
			 errdetail("When it changes the row again, the newer version is captured before the "
					   "older one, and the peer keeps the older one."),
			 renamed ? errhint("ALTER TRIGGER %s ON %s RENAME TO %s;", quote_identifier(ours),
							   QualifiedName(rel), quote_identifier(kRowTrigger))
					 : errhint("ALTER TRIGGER %s ON %s RENAME TO a name that sorts behind \"%s\".",
							   quote_identifier(name), QualifiedName(rel), ours)));
}

/* Drop one trigger, with its clones. */
void
DropTrigger(Oid trigger)
{
	ObjectAddress address;

	if (!OidIsValid(trigger))
		return;
	ObjectAddressSet(address, TriggerRelationId, trigger);
	performDeletion(&address, DROP_CASCADE, PERFORM_DELETION_QUIETLY);
	CommandCounterIncrement();
}

/* Whether the trigger is a clone of a partitioned table's. */
bool
IsClone(Oid trigger)
{
	Relation triggers = table_open(TriggerRelationId, AccessShareLock);
	ScanKeyData key;
	bool clone = false;

	ScanKeyInit(&key, Anum_pg_trigger_oid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(trigger));
	SysScanDesc scan = systable_beginscan(triggers, TriggerOidIndexId, true, NULL, 1, &key);
	HeapTuple tuple = systable_getnext(scan);

	if (HeapTupleIsValid(tuple))
		clone = OidIsValid(((Form_pg_trigger) GETSTRUCT(tuple))->tgparentid);
	systable_endscan(scan);
	table_close(triggers, AccessShareLock);
	return clone;
}

/* Call fn for each partition below the table, opened; NoLock when they are locked already. */
template <typename Fn>
void
ForEachPartition(Relation rel, Fn fn)
{
	ListCell *cell;

	if (rel->rd_rel->relkind != RELKIND_PARTITIONED_TABLE)
		return;
	foreach(cell, find_all_inheritors(RelationGetRelid(rel), ShareRowExclusiveLock, NULL))
	{
		if (lfirst_oid(cell) == RelationGetRelid(rel))
			continue;
		Relation partition = table_open(lfirst_oid(cell), NoLock);

		fn(partition);
		table_close(partition, NoLock);
	}
}

/* Partitions' own row triggers make way for clones: two of them would capture twice. */
void
DropRowTriggersBelow(Relation rel)
{
	ForEachPartition(rel, [](Relation partition) {
		PairTriggers triggers = FindPairTriggers(partition);

		if (OidIsValid(triggers.row) && !IsClone(triggers.row))
			DropTrigger(triggers.row);
	});
}

/* Partitions with pairs of their own get triggers of their own when the clones went. */
void
EnsureTriggersBelow(Relation rel)
{
	ForEachPartition(rel, [](Relation partition) {
		if (PairRowsOfTable(RelationGetRelid(partition)) != NIL)
			EnsurePairTriggers(partition);
	});
}

} // namespace

/* Looked up in the extension's schema, without regard to the caller's rights. */
Oid
ReplicateFunction()
{
	return GetSysCacheOid3(PROCNAMEARGSNSP, Anum_pg_proc_oid, CStringGetDatum("replicate"),
						   PointerGetDatum(buildoidvector(NULL, 0)),
						   ObjectIdGetDatum(catalog::GetRelations().schema));
}

/* Those of the relation itself; the clone of a partitioned table's trigger counts. */
PairTriggers
FindPairTriggers(Relation rel)
{
	PairTriggers found = {};
	Oid function = ReplicateFunction();
	const TriggerDesc *triggers = rel->trigdesc;

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		const Trigger &trigger = triggers->triggers[i];

		if (!IsOurs(trigger, function) || trigger.tgnargs > 0)
			continue;
		found.count++;
		if (TRIGGER_FOR_TRUNCATE(trigger.tgtype))
			found.truncate = trigger.tgoid;
		else
			found.row = trigger.tgoid;
	}
	return found;
}

/* The caller holds ShareRowExclusiveLock or more on the table. */
void
EnsurePairTriggers(Relation rel)
{
	PairTriggers triggers = FindPairTriggers(rel);

	if (!OidIsValid(triggers.row))
	{
		DropRowTriggersBelow(rel);
		CreateTriggerOf(rel, kRowTrigger,
						TRIGGER_TYPE_INSERT | TRIGGER_TYPE_UPDATE | TRIGGER_TYPE_DELETE, true);
	}
	if (!OidIsValid(triggers.truncate))
		CreateTriggerOf(rel, kTruncateTrigger, TRIGGER_TYPE_TRUNCATE, false);
}

/* The caller holds AccessExclusiveLock on the table.  Clones of a parent's triggers stay. */
void
DropPairTriggers(Relation rel)
{
	PairTriggers triggers = FindPairTriggers(rel);

	if (OidIsValid(triggers.row) && !IsClone(triggers.row))
	{
		DropTrigger(triggers.row);
		EnsureTriggersBelow(rel);
	}
	DropTrigger(triggers.truncate);
}

/* Does nothing where they are, or where there is no pair. */
void
RestorePairTriggers(Relation rel)
{
	if (PairRowsOfTable(RelationGetRelid(rel)) != NIL)
	{
		LockRelation(rel, ShareRowExclusiveLock);
		EnsurePairTriggers(rel);
	}
	EnsureTriggersBelow(rel);
}

/* What a user disabled, or let fire in replica role only, stays so.  A partition's clones are its own here. */
void
KeepFiringAlways(Relation rel)
{
	Oid function = ReplicateFunction();
	List *names = NIL;
	ListCell *cell;

	for (int i = 0; rel->trigdesc != NULL && i < rel->trigdesc->numtriggers; i++)
	{
		const Trigger &trigger = rel->trigdesc->triggers[i];

		if (IsOurs(trigger, function) && trigger.tgenabled == TRIGGER_FIRES_ON_ORIGIN)
			names = lappend(names, pstrdup(trigger.tgname));
	}
	foreach(cell, names)
	{
		LockRelation(rel, ShareRowExclusiveLock);
		SetTriggerFiring(rel, (const char *) lfirst(cell), TRIGGER_FIRES_ALWAYS);
		CommandCounterIncrement();
	}
}

/* A disabled trigger is the user's decision, but not one to make unawares. */
void
WarnOfDisabled(Relation rel)
{
	Oid function = ReplicateFunction();
	const TriggerDesc *triggers = CopyTriggerDesc(rel->trigdesc);

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		const Trigger &trigger = triggers->triggers[i];

		if (!IsOurs(trigger, function) || trigger.tgenabled == TRIGGER_FIRES_ALWAYS)
			continue;
		ereport(WARNING,
				(errmsg("changes of table \"%s\" are not all captured: trigger \"%s\" is %s",
						RelationGetRelationName(rel), trigger.tgname,
						trigger.tgenabled == TRIGGER_DISABLED ? "disabled"
															  : "not enabled for every session"),
				 errhint("ALTER TABLE %s ENABLE ALWAYS TRIGGER %s;", QualifiedName(rel),
						 quote_identifier(trigger.tgname))));
	}
}

/* Triggers of an event fire in the order in which the descriptor has them, that of their names. */
void
WarnOfEarlier(Relation rel)
{
	Oid row = FindPairTriggers(rel).row;
	const TriggerDesc *triggers = CopyTriggerDesc(rel->trigdesc);
	int ours = 0;

	if (!OidIsValid(row))
		return;
	while (triggers->triggers[ours].tgoid != row)
		ours++;
	for (int i = 0; i < ours; i++)
	{
		if (IsRowTrigger(triggers->triggers[i]))
			WarnOfOrder(rel, triggers->triggers[i].tgname, triggers->triggers[ours].tgname);
	}
}

} // namespace mmrepl::registration
