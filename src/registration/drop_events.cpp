/*
 * drop_events.cpp
 *		The event trigger after DROP commands: pairs go with their table or
 *		their server, and nothing else that they need may go.
 *
 * What was dropped is not read from the list of dropped objects but seen from
 * what is missing: that also mends what was dropped while event triggers were
 * off.
 */
#include "registration_internal.hpp"

#include "mmrepl/queue.hpp"
#include "mmrepl/shmem.hpp"
#include "mmrepl/stats.hpp"

namespace mmrepl::registration
{

namespace
{

/* Pairs of tables that are no more. */
void
RemovePairsWithoutTable()
{
	ListCell *cell;

	foreach(cell, AllPairRows())
	{
		const PairRow *row = (const PairRow *) lfirst(cell);

		if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(row->table)))
			RemovePair(*row);
	}
}

/* Whether the stream's server is no more, neither by its OID nor by its name. */
bool
ServerIsGone(const catalog::StreamRow *stream)
{
	return !SearchSysCacheExists1(FOREIGNSERVEROID, ObjectIdGetDatum(stream->server)) &&
		   !OidIsValid(get_foreign_server_oid(NameStr(stream->server_name), true));
}

/* Whether the command is DROP SERVER of that server without CASCADE. */
bool
IsRestrictedDropOf(const Node *command, const char *server)
{
	const DropStmt *statement = (const DropStmt *) command;
	ListCell *cell;

	if (command == NULL || !IsA(command, DropStmt) ||
		statement->removeType != OBJECT_FOREIGN_SERVER || statement->behavior != DROP_RESTRICT)
		return false;
	foreach(cell, statement->objects)
	{
		if (strcmp(strVal(lfirst(cell)), server) == 0)
			return true;
	}
	return false;
}

/* Raise because of what still needs the server. */
[[noreturn]] void
RefuseDrop(const char *server, const char *detail, const char *hint)
{
	ereport(ERROR, (errcode(ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST),
					errmsg("cannot drop server %s because other objects depend on it", server),
					errdetail("%s", detail), errhint("%s", hint)));
}

/*
 * Whether there is no server of that name any more.  One that was renamed while
 * event triggers were off is still there by its OID.
 */
bool
NameIsGone(const char *server, const List *streams)
{
	ListCell *cell;

	if (OidIsValid(get_foreign_server_oid(server, true)))
		return false;
	foreach(cell, streams)
	{
		const catalog::StreamRow *stream = (const catalog::StreamRow *) lfirst(cell);

		if (strcmp(NameStr(stream->server_name), server) == 0 && !ServerIsGone(stream))
			return false;
	}
	return true;
}

/* The pair goes with DROP ... CASCADE of its server; without it, it stops the command. */
void
RemovePairOfServer(const PairRow &row, const Node *command)
{
	if (IsRestrictedDropOf(command, row.server))
		RefuseDrop(row.server,
				   psprintf("Table \"%s\" is replicated to it by pair %d.", get_rel_name(row.table),
							row.id),
				   "Use mmrepl.drop_pair(), or DROP SERVER ... CASCADE to drop the pairs too.");
	ereport(NOTICE,
			(errmsg("drop cascades to pair %d of table \"%s\"", row.id, get_rel_name(row.table))));
	RemovePair(row);
}

/* Our prepared transactions that the worker last found at the stream's peer and left there. */
int
PreparedThere(int32 stream)
{
	int slot = shmem::Ready() ? shmem::FindStream(MyDatabaseId, stream) : -1;

	return slot < 0 ? 0 : shmem::Get().streams[slot].n_leftovers;
}

/* Whether the peer would lose in a crash what nothing here would then bring again. */
bool
MayBeLostThere(int32 stream)
{
	int slot = shmem::Ready() ? shmem::FindStream(MyDatabaseId, stream) : -1;

	return slot >= 0 && !queue::AllFlushed(shmem::Get().streams[slot]);
}

/* This database's node id. */
char *
NodeText()
{
	pg_uuid_t node = catalog::NodeId();

	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&node)));
}

/* The stream goes, and with it what is queued: only when the user said CASCADE. */
void
RemoveStream(const catalog::StreamRow *stream, bool restricted)
{
	const char *server = NameStr(stream->server_name);
	uint64 queued = QueuedTransactions(stream->id);
	int prepared = PreparedThere(stream->id);

	if (prepared > 0 && restricted)
		RefuseDrop(server,
				   psprintf("Transactions of this database that are prepared there: %d.", prepared),
				   "They are ended by the worker: see mmrepl.in_doubt. DROP SERVER ... CASCADE "
				   "leaves them there.");
	if (queued > 0 && restricted)
		RefuseDrop(server,
				   psprintf("Transactions that are queued for it: " UINT64_FORMAT ".", queued),
				   psprintf("SELECT mmrepl.wait_for_replay(%s); or DROP SERVER ... CASCADE to "
							"discard them.",
							quote_literal_cstr(server)));
	if (restricted && MayBeLostThere(stream->id))
		RefuseDrop(server, "The last transactions are there, but may not be flushed yet.",
				   psprintf("SELECT mmrepl.wait_for_replay(%s); or DROP SERVER ... CASCADE.",
							quote_literal_cstr(server)));
	if (prepared > 0)
		ereport(WARNING,
				(errmsg("transactions of this database stay prepared at server \"%s\": %d", server,
						prepared),
				 errhint("There, COMMIT PREPARED or ROLLBACK PREPARED what pg_prepared_xacts shows "
						 "as mmrepl_%s_%d_...",
						 NodeText(), stream->id)));
	if (queued > 0)
		ereport(
			WARNING,
			(errmsg("transactions that are queued for server \"%s\" are discarded: " UINT64_FORMAT,
					server, queued)));
	(void) catalog::DeleteStreamRow(stream->id);
	WakeLauncher();
	WakeWorkers();
}

/* Pairs and streams of servers that are no more. */
void
RemoveWhatServersLeft(const Node *command)
{
	List *streams = catalog::AllStreams();
	ListCell *cell;

	foreach(cell, AllPairRows())
	{
		const PairRow *row = (const PairRow *) lfirst(cell);

		if (NameIsGone(row->server, streams))
			RemovePairOfServer(*row, command);
	}
	foreach(cell, streams)
	{
		const catalog::StreamRow *stream = (const catalog::StreamRow *) lfirst(cell);

		if (ServerIsGone(stream))
			RemoveStream(stream, IsRestrictedDropOf(command, NameStr(stream->server_name)));
	}
}

/* The table of DROP TRIGGER name ON table; InvalidOid when it is gone. */
Oid
TableOfDroppedTrigger(const List *names)
{
	List *table = list_truncate(list_copy(names), list_length(names) - 1);

	return RangeVarGetRelid(makeRangeVarFromNameList(table), NoLock, true);
}

/* Raise when the table is in pairs and lacks one of their triggers now. */
void
RequirePairTriggers(Oid table)
{
	List *pairs = PairRowsOfTable(table);
	Relation rel = pairs == NIL ? NULL : try_relation_open(table, AccessShareLock);

	if (rel == NULL)
		return;

	PairTriggers triggers = FindPairTriggers(rel);
	const PairRow *row = (const PairRow *) linitial(pairs);

	if (!OidIsValid(triggers.row) || !OidIsValid(triggers.truncate))
		ereport(ERROR,
				(errcode(ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST),
				 errmsg("cannot drop the trigger: pair %d of table \"%s\" would lose changes",
						row->id, RelationGetRelationName(rel)),
				 errdetail(
					 "The triggers that call mmrepl.replicate() without arguments capture the "
					 "changes of the table's pairs."),
				 errhint("%s drops them with the table's last pair.", DropCommand(*row))));
	relation_close(rel, NoLock);
}

/* DROP TRIGGER: those of pairs stay, unless nothing can be captured anyway. */
void
OnDropTrigger(const DropStmt *statement)
{
	ListCell *cell;

	if (!shmem::Ready())
		return;
	foreach(cell, statement->objects)
	{
		Oid table = TableOfDroppedTrigger((const List *) lfirst(cell));

		if (OidIsValid(table))
			RequirePairTriggers(table);
	}
}

} // namespace

/* SQL: event trigger mmrepl_sql_drop. */
Datum
SqlOnDrop(FunctionCallInfo fcinfo)
{
	if (!CALLED_AS_EVENT_TRIGGER(fcinfo))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_EVENT_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("mmrepl.on_drop() was not called by an event trigger")));

	const Node *command = ((const EventTriggerData *) fcinfo->context)->parsetree;

	if (IsBinaryUpgrade || !catalog::ExtensionExists())
		PG_RETURN_VOID();
	RemovePairsWithoutTable();
	RemoveWhatServersLeft(command);
	RequireFiltersAfterDrop();
	if (command != NULL && IsA(command, DropStmt) &&
		((const DropStmt *) command)->removeType == OBJECT_TRIGGER)
		OnDropTrigger((const DropStmt *) command);
	RevalidateAfterDrop();
	PG_RETURN_VOID();
}

} // namespace mmrepl::registration
