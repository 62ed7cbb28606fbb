/*
 * capture.cpp
 *		The trigger function mmrepl.replicate().
 *
 * Nothing here runs SQL or reads a catalog when the table is cached: a row event
 * costs the encoding of its values into the transaction's buffer.
 */
#include "capture_internal.hpp"
#include "mmrepl/origin.hpp"
#include "mmrepl/shmem.hpp"

namespace mmrepl::capture
{

void
Init()
{
	InitCache();
	InitTruncateHook();
}

/* Refuse calls that are not an AFTER trigger's. */
static TriggerData *
CheckCall(FunctionCallInfo fcinfo)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("mmrepl.replicate() was not called by a trigger")));

	TriggerData *data = (TriggerData *) fcinfo->context;
	bool truncate = TRIGGER_FIRED_BY_TRUNCATE(data->tg_event);

	if (!TRIGGER_FIRED_AFTER(data->tg_event) || TRIGGER_FIRED_FOR_ROW(data->tg_event) == truncate)
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("mmrepl.replicate() must be fired AFTER INSERT OR UPDATE OR DELETE FOR "
						"EACH ROW, or AFTER TRUNCATE FOR EACH STATEMENT"),
				 errhint("Let mmrepl.create_pair() create the triggers.")));
	return data;
}

/* An empty name is that of no application. */
bool
SkipsSession(const char *application)
{
	return application != NULL && application[0] != '\0' && application_name != NULL &&
		   strcmp(application, application_name) == 0;
}

/* The route of this transaction: mmrepl.mode overrides the pair. */
static transaction::Route
RouteOf(const Target *target)
{
	transaction::Route route = target->route;

	if (guc::mode != guc::Mode::Pair)
		route.sync = guc::mode == guc::Mode::Sync;
	return route;
}

/* Whether the filter says true of the row that the context holds. */
static bool
Evaluate(CapturedTable *table, Target *target)
{
	bool isnull;
	Datum result = ExecEvalExprSwitchContext(target->filter.state, table->econtext, &isnull);

	return !isnull && DatumGetBool(result);
}

/* Raise: one evaluation would take place in the middle of another one, with the same memory. */
[[noreturn]] static void
RefuseNested(Oid table)
{
	ereport(ERROR, (errcode(ERRCODE_OBJECT_IN_USE),
					errmsg("row_filter of table \"%s\" has written to a table that it filters",
						   get_rel_name(table)),
					errhint("Use functions that only read.")));
}

/* The same with the rights of the pair's owner, whatever the writer's settings are. */
static bool
EvaluateAsOwner(CapturedTable *table, Target *target)
{
	bool passes = false;

	if (table->evaluating)
		RefuseNested(table->key.relation);
	table->evaluating = true;
	Ensured(
		[&] {
			passes = AsOwner(target->route.owner, change::kAllSettings,
							 [&] { return Evaluate(table, target); });
		},
		[&] { table->evaluating = false; });
	return passes;
}

static bool
Passes(CapturedTable *table, Target *target, TupleTableSlot *row)
{
	if (target->filter.state == NULL)
		return true;
	table->econtext->ecxt_scantuple = row;
	bool passes = unlikely(target->filter.as_owner) ? EvaluateAsOwner(table, target)
													: Evaluate(table, target);

	ResetExprContext(table->econtext);
	return passes;
}

/* Whether none of the pair's columns has another value. */
static bool
TouchesNothing(const Target *target, TupleTableSlot *old_row, TupleTableSlot *new_row)
{
	slot_getallattrs(old_row);
	slot_getallattrs(new_row);
	for (int i = 0; i < target->encoder->n_columns; i++)
		if (change::ValueChanged(target->encoder->columns[i].attnum - 1, old_row, new_row))
			return false;
	return true;
}

/*
 * What the event is for this target: an update that leaves its filter is a
 * delete, one that enters it an insert.  False: nothing for this target.
 */
static bool
KindFor(CapturedTable *table, Target *target, TupleTableSlot *old_row, TupleTableSlot *new_row,
		change::Kind *kind)
{
	bool was = old_row != NULL && Passes(table, target, old_row);
	bool is = new_row != NULL && Passes(table, target, new_row);

	if (!was && !is)
		return false;
	*kind = !was ? change::kInsert : !is ? change::kDelete : change::kUpdate;
	return *kind != change::kUpdate || !target->subset || !TouchesNothing(target, old_row, new_row);
}

/* A copy of the table is under way: it replaces what the peer has. */
static bool copying;

/* Append one record to the target's part of the transaction. */
static void
Append(Target *target, change::Kind kind, TupleTableSlot *old_row, TupleTableSlot *new_row)
{
	transaction::Route route = RouteOf(target);
	transaction::Work *work = transaction::Use(route);

	if (work == NULL)
		return;
	change::Segment *segment = transaction::SegmentFor(work);
	change::RelationEncoder *encoder = route.sync && transaction::IsSync(work) && !copying
										   ? target->checked_encoder
										   : target->encoder;

	switch (kind)
	{
		case change::kInsert:
			change::AppendInsert(segment, encoder, new_row);
			break;
		case change::kUpdate:
			change::AppendUpdate(segment, encoder, old_row, new_row);
			break;
		case change::kDelete:
			change::AppendDelete(segment, encoder, old_row);
			break;
		default:
			change::AppendTruncate(segment, encoder);
			break;
	}
	transaction::Appended(work, segment);
	transaction::CountCapture(target->pair_id, kind);
}

static void
CaptureRow(CapturedTable *table, Target *target, TupleTableSlot *old_row, TupleTableSlot *new_row)
{
	change::Kind kind;

	if (!KindFor(table, target, old_row, new_row, &kind))
		return;
	int nest_level = change::BeginTextFormat(target->encoder->settings);

	Append(target, kind, old_row, new_row);
	change::EndTextFormat(nest_level);
}

static void
CaptureEvent(CapturedTable *table, TriggerData *data)
{
	TupleTableSlot *old_row = NULL;
	TupleTableSlot *new_row = NULL;

	if (TRIGGER_FIRED_BY_INSERT(data->tg_event))
		new_row = data->tg_trigslot;
	else
		old_row = data->tg_trigslot;
	if (TRIGGER_FIRED_BY_UPDATE(data->tg_event))
		new_row = data->tg_newslot;
	for (int i = 0; i < table->n_targets; i++)
	{
		Target *target = &table->targets[i];

		if (!TRIGGER_FIRED_BY_TRUNCATE(data->tg_event))
			CaptureRow(table, target, old_row, new_row);
		else if (!target->inherited)
			Append(target, change::kTruncate, NULL, NULL);
	}
}

Datum
SqlReplicate(FunctionCallInfo fcinfo)
{
	TriggerData *data = CheckCall(fcinfo);

	shmem::RequireReady();
	if (!guc::capture || origin::Applying())
		PG_RETURN_POINTER(NULL);

	CapturedTable *table = LookUp(data->tg_relation, data->tg_trigger);

	if (table->n_targets > 0 && !SkipsSession(table->skip_application))
		CaptureEvent(table, data);
	PG_RETURN_POINTER(NULL);
}

/* ---- copies of whole tables ---- */

/* By its schema and name. */
bool
IsReplicate(Oid function)
{
	return get_func_namespace(function) == catalog::GetRelations().schema &&
		   strcmp(get_func_name(function), "replicate") == 0;
}

/* The trigger made by hand that captures rows of the relation for the server, or NULL. */
static Trigger *
HandTriggerFor(Relation rel, const char *server)
{
	TriggerDesc *triggers = rel->trigdesc;

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		Trigger *trigger = &triggers->triggers[i];

		if (trigger->tgnargs == 5 && TRIGGER_FOR_ROW(trigger->tgtype) &&
			strcmp(trigger->tgargs[0], server) == 0 && IsReplicate(trigger->tgfoid))
			return trigger;
	}
	return NULL;
}

/* What the pair (0: a trigger made by hand) captures of the relation; NULL: nothing. */
static CapturedTable *
TableFor(Relation rel, int32 pair_id, const char *server)
{
	Trigger *trigger = pair_id == 0 ? HandTriggerFor(rel, server) : NULL;

	return pair_id == 0 && trigger == NULL ? NULL : LookUp(rel, trigger);
}

/* Capture the rows of one table that holds rows; returns their number. */
static int64
CopyRows(Relation rel, int32 pair_id, const char *server)
{
	CapturedTable *table = TableFor(rel, pair_id, server);
	int64 rows = 0;

	if (table == NULL)
		return 0;

	TupleTableSlot *slot = table_slot_create(rel, NULL);
	TableScanDesc scan = table_beginscan(rel, GetActiveSnapshot(), 0, NULL);
	MemoryContext per_row =
		AllocSetContextCreate(CurrentMemoryContext, "mmrepl copied row", ALLOCSET_DEFAULT_SIZES);

	while (table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		CHECK_FOR_INTERRUPTS();
		rows++;
		InContext(per_row, [&] {
			copying = true;
			Ensured(
				[&] {
					for (int i = 0; i < table->n_targets; i++)
						if (table->targets[i].pair_id == pair_id)
							CaptureRow(table, &table->targets[i], NULL, slot);
				},
				[] { copying = false; });
		});
		MemoryContextReset(per_row);
	}
	MemoryContextDelete(per_row);
	table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	return rows;
}

int64
CopyTable(Oid table, int32 pair_id, const char *server)
{
	List *relations = find_all_inheritors(table, ShareRowExclusiveLock, NULL);
	int64 rows = 0;
	ListCell *cell;

	PushActiveSnapshot(GetLatestSnapshot());
	foreach(cell, relations)
	{
		Relation rel = table_open(lfirst_oid(cell), NoLock);

		/* Children by plain inheritance are tables of their own. */
		if (RELKIND_HAS_STORAGE(rel->rd_rel->relkind) &&
			(RelationGetRelid(rel) == table || rel->rd_rel->relispartition))
			rows += CopyRows(rel, pair_id, server);
		table_close(rel, NoLock);
	}
	PopActiveSnapshot();
	return rows;
}

void
CaptureTruncate(Oid table, int32 pair_id, const char *server)
{
	Relation rel = table_open(table, ShareRowExclusiveLock);

	CapturedTable *captured = TableFor(rel, pair_id, server);

	for (int i = 0; captured != NULL && i < captured->n_targets; i++)
		if (captured->targets[i].pair_id == pair_id)
			Append(&captured->targets[i], change::kTruncate, NULL, NULL);
	table_close(rel, NoLock);
}

} // namespace mmrepl::capture
