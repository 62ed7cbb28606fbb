/*
 * pair_functions.cpp
 *		mmrepl.create_pair(), alter_pair(), drop_pair().
 *
 * Locks: the table is locked so that registrations of one table follow each
 * other (ShareUpdateExclusiveLock, which no reader or writer notices, and under
 * which the peer is asked), then against writers for as long as triggers are
 * made or rows are copied.  Nobody is locked out before he is known to own the
 * table.
 */
#include "registration_internal.hpp"

#include "mmrepl/capture.hpp"
#include "mmrepl/connection.hpp"
#include "mmrepl/shmem.hpp"
#include "mmrepl/stats.hpp"
#include "mmrepl/transaction.hpp"

namespace mmrepl::registration
{

namespace
{

constexpr const char *kModes[] = {"async", "sync"};
constexpr const char *kConflictResolutions[] = {"apply_remote", "keep_local", "error"};
constexpr const char *kOnUnreachable[] = {"error", "queue"};

/* Arguments of create_pair() and alter_pair(). */
enum Argument
{
	kLocalTable,
	kServer,
	kRemoteTable,
	kMode,
	kColumns,
	kColumnMap,
	kRowFilter,
	kConflictResolution,
	kUnreachable,
	kCopyData,
	kEnabled /* alter_pair() only */
};

/* Options as given; NULL and false: not given. */
struct Options
{
	const char *remote_table;
	const char *mode;
	bool has_columns;
	List *columns;
	bool has_map;
	List *map_local;
	List *map_remote;
	const char *row_filter;
	const char *conflict_resolution;
	const char *on_unreachable;
	bool copy_data;
	bool has_enabled;
	bool enabled;
};

/* Whether the function has the argument and it is not NULL. */
bool
IsGiven(FunctionCallInfo fcinfo, Argument argument)
{
	return PG_NARGS() > argument && !PG_ARGISNULL(argument);
}

/* Raise when an argument without a default is NULL. */
void
RequireGiven(FunctionCallInfo fcinfo, Argument argument, const char *name)
{
	if (!IsGiven(fcinfo, argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("%s must not be NULL", name),
				 errhint(
					 "Pass local_table and server, for example ('public.accounts', 'berlin').")));
}

/* A text argument, NULL when it is not given. */
const char *
TextArgument(FunctionCallInfo fcinfo, Argument argument)
{
	return IsGiven(fcinfo, argument) ? text_to_cstring(PG_GETARG_TEXT_PP(argument)) : NULL;
}

/* The names of the argument columns. */
List *
ColumnNames(ArrayType *array)
{
	Datum *elements;
	bool *nulls;
	int count;
	List *names = NIL;

	if (ARR_NDIM(array) > 1)
		ereport(ERROR, (errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR),
						errmsg("columns must be a list, not an array of more dimensions"),
						errhint("Write columns => '{id,name}'.")));
	deconstruct_array(array, NAMEOID, NAMEDATALEN, false, TYPALIGN_CHAR, &elements, &nulls, &count);
	for (int i = 0; i < count; i++)
	{
		if (nulls[i])
			ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
							errmsg("columns must not contain NULL"),
							errhint("Write columns => '{id,name}'.")));
		names = lappend(names, pstrdup(NameStr(*DatumGetName(elements[i]))));
	}
	return names;
}

/* Raise for words that are not among those allowed; NULL stands for a default if it may. */
void
CheckWords(const Options &options, bool null_allowed)
{
	if (options.mode != NULL || !null_allowed)
		RequireOneOf("mode", options.mode, kModes, lengthof(kModes));
	if (options.conflict_resolution != NULL || !null_allowed)
		RequireOneOf("conflict_resolution", options.conflict_resolution, kConflictResolutions,
					 lengthof(kConflictResolutions));
	if (options.on_unreachable != NULL || !null_allowed)
		RequireOneOf("on_unreachable", options.on_unreachable, kOnUnreachable,
					 lengthof(kOnUnreachable));
}

/* The arguments behind table and server. */
Options
ReadOptions(FunctionCallInfo fcinfo, bool altering)
{
	Options options = {};

	options.remote_table = TextArgument(fcinfo, kRemoteTable);
	options.mode = TextArgument(fcinfo, kMode);
	options.has_columns = IsGiven(fcinfo, kColumns);
	if (options.has_columns)
		options.columns = ColumnNames(PG_GETARG_ARRAYTYPE_P(kColumns));
	options.has_map = IsGiven(fcinfo, kColumnMap);
	if (options.has_map)
		ReadColumnMap(PG_GETARG_JSONB_P(kColumnMap), &options.map_local, &options.map_remote);
	options.row_filter = TextArgument(fcinfo, kRowFilter);
	options.conflict_resolution = TextArgument(fcinfo, kConflictResolution);
	options.on_unreachable = TextArgument(fcinfo, kUnreachable);
	options.copy_data = IsGiven(fcinfo, kCopyData) && PG_GETARG_BOOL(kCopyData);
	options.has_enabled = IsGiven(fcinfo, kEnabled);
	options.enabled = options.has_enabled && PG_GETARG_BOOL(kEnabled);
	CheckWords(options, altering);
	return options;
}

/* Raise because the text names no remote table. */
[[noreturn]] void
RefuseRemoteName(const char *text, const char *detail)
{
	ereport(ERROR, (errcode(ERRCODE_INVALID_NAME), errmsg("invalid remote_table: \"%s\"", text),
					errdetail("%s", detail), errhint("Write remote_table => 'schema.table'.")));
}

/* Split "table" or "schema.table", quoted as in SQL, into the row. */
void
SetRemoteName(PairRow *row, const char *text, const char *default_schema)
{
	List *names;

	if (!SplitIdentifierString(pstrdup(text), '.', &names) || names == NIL)
		RefuseRemoteName(text, "It is not the name of a table.");
	if (list_length(names) > 2)
		RefuseRemoteName(text, "The database is the server's.");
	row->remote_schema =
		list_length(names) == 2 ? (const char *) linitial(names) : pstrdup(default_schema);
	row->remote_table = (const char *) llast(names);
}

/* Put the options into the row; the filter in the form in which it is stored. */
void
ApplyOptions(PairRow *row, const Options &options, Relation rel)
{
	const char *schema = get_namespace_name(RelationGetNamespace(rel));

	if (options.remote_table != NULL)
		SetRemoteName(row, options.remote_table, schema);
	if (options.mode != NULL)
		row->mode = options.mode;
	if (options.has_columns)
		row->columns = options.columns;
	if (options.has_map)
	{
		row->map_local = options.map_local;
		row->map_remote = options.map_remote;
	}
	if (options.row_filter != NULL)
		row->row_filter = options.row_filter[0] == '\0'
							  ? NULL
							  : capture::CanonicalFilter(rel, options.row_filter, row->owner);
	if (options.conflict_resolution != NULL)
		row->conflict_resolution = options.conflict_resolution;
	if (options.on_unreachable != NULL)
		row->on_unreachable = options.on_unreachable;
	if (options.has_enabled)
		row->enabled = options.enabled;
}

/* The table, opened and locked against being dropped; raises when it does not exist. */
Relation
OpenTable(Oid table)
{
	Relation rel = try_relation_open(table, AccessShareLock);

	if (rel == NULL)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE),
						errmsg("relation with OID %u does not exist", table),
						errhint("Name the local table, for example 'public.accounts'.")));
	return rel;
}

/* Ask the peer whether it can take what the pair sends. */
void
AskPeer(Relation rel, const PairRow &row, Oid server, const PairColumns &columns)
{
	PeerQuestion question = {};

	question.server = server;
	question.owner = row.owner;
	question.stream = catalog::EnsureStreamRow(server, row.owner);
	question.rel = rel;
	question.columns = columns;
	question.remote_schema = row.remote_schema;
	question.remote_table = row.remote_table;
	CheckPeer(question);
}

/* The writers stay out from here to the end of the transaction. */
void
MakeTriggersAndCopy(Relation rel, const PairRow &row, bool copy_data)
{
	PairTriggers triggers = FindPairTriggers(rel);

	if (copy_data || !OidIsValid(triggers.row) || !OidIsValid(triggers.truncate))
		LockRelation(rel, ShareRowExclusiveLock);
	EnsurePairTriggers(rel);
	if (copy_data)
		(void) capture::CopyTable(row.table, row.id, row.server);
}

/* Raise when the pair is there already. */
void
RequireNoPair(const PairRow &row)
{
	PairRow other;

	if (!FindPairRow(row.table, row.server, &other))
		return;
	ereport(ERROR, (errcode(ERRCODE_MMREPL_PAIR_EXISTS),
					errmsg("table \"%s\" is already replicated to server \"%s\"",
						   get_rel_name(row.table), row.server),
					errdetail("It goes to table %s there, by pair %d.",
							  QualifiedName(other.remote_schema, other.remote_table), other.id),
					errhint("Use mmrepl.alter_pair() to change the pair.")));
}

/* The pair; raises when there is none. */
PairRow
RequirePair(Oid table, const char *server)
{
	PairRow row;

	if (!FindPairRow(table, server, &row))
		ereport(ERROR, (errcode(ERRCODE_MMREPL_NO_SUCH_PAIR),
						errmsg("there is no pair of table \"%s\" and server \"%s\"",
							   get_rel_name(table), server),
						errhint("SELECT * FROM mmrepl.pairs; shows all pairs.")));
	return row;
}

/* What a new pair is unless options say otherwise. */
PairRow
NewPair(Relation rel, const char *server)
{
	PairRow row = {};

	row.table = RelationGetRelid(rel);
	row.server = server;
	row.owner = GetUserId();
	row.remote_schema = get_namespace_name(RelationGetNamespace(rel));
	row.remote_table = pstrdup(RelationGetRelationName(rel));
	row.enabled = true;
	return row;
}

/* create_pair() with its arguments read. */
int32
CreatePair(Relation rel, const char *server_name, const Options &options)
{
	RequireReplicable(rel);
	RequireTableOwner(rel);

	Oid server = RequireServer(server_name, GetUserId());
	PairRow row = NewPair(rel, server_name);

	(void) connection::Resolve(server, row.owner);
	RequireNoResync(server, row.owner, server_name);
	LockRelation(rel, ShareUpdateExclusiveLock);
	RequireNoPair(row);

	Key key = RequireKey(rel);

	ApplyOptions(&row, options, rel);
	RequireNoHandTrigger(rel, row);
	AskPeer(rel, row, server, ResolveColumns(rel, key, row));

	LockRelation(rel, ShareRowExclusiveLock);
	InsertPairRow(&row);
	MakeTriggersAndCopy(rel, row, options.copy_data);
	WarnOfEarlier(rel);
	WakeLauncher();
	WakeWorkers();
	return row.id;
}

/* Raise unless the role may make these changes to the pair; see the door. */
void
RequireMayAlter(Relation rel, const PairRow &row, const Options &options)
{
	bool elsewhere = options.remote_table != NULL || options.has_columns || options.has_map;
	bool filters = options.row_filter != NULL && options.row_filter[0] != '\0';

	RequireTableOwner(rel);
	RequirePairOwner(row);
	if ((!elsewhere && !filters) || has_privs_of_role(GetUserId(), row.owner))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 elsewhere ? errmsg("must be owner of pair %d to change where its changes go", row.id)
					   : errmsg("must be owner of pair %d to give it a row filter", row.id),
			 errdetail("The pair connects with the user mapping of role \"%s\", and its filter "
					   "runs with the rights of that role.",
					   GetUserNameFromId(row.owner, false)),
			 errhint("Drop the pair and create one of your own.")));
}

/* alter_pair() with its arguments read. */
void
AlterPair(Relation rel, const char *server_name, const Options &options)
{
	RequireMayAlter(rel, RequirePair(RelationGetRelid(rel), server_name), options);
	LockRelation(rel, ShareUpdateExclusiveLock);

	PairRow row = RequirePair(RelationGetRelid(rel), server_name);
	Oid server = RequireServer(server_name, row.owner);

	RequireReplicable(rel);
	(void) connection::Resolve(server, row.owner);
	if (options.copy_data)
		RequireNoResync(server, row.owner, server_name);

	Key key = RequireKey(rel);

	ApplyOptions(&row, options, rel);

	PairColumns columns = ResolveColumns(rel, key, row);

	if (row.row_filter != NULL)
		capture::CheckFilter(rel, row.row_filter, row.owner);
	if (options.remote_table != NULL || options.has_columns || options.has_map || options.enabled ||
		options.copy_data)
		AskPeer(rel, row, server, columns);
	UpdatePairRow(&row);
	MakeTriggersAndCopy(rel, row, options.copy_data);
	WakeWorkers();
}

/* Raise unless the role may drop the pair. */
void
RequireMayDrop(Relation rel, const PairRow &row)
{
	if (OwnsRelation(RelationGetRelid(rel), GetUserId()) ||
		has_privs_of_role(GetUserId(), row.owner))
		return;
	ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					errmsg("must be owner of pair %d or of table \"%s\" to drop the pair", row.id,
						   RelationGetRelationName(rel)),
					errhint("Let role \"%s\" do it.",
							GetUserNameFromId(catalog::TableOwner(RelationGetRelid(rel)), false))));
}

/* Say that what is queued is still delivered. */
void
NoticeQueued(const PairRow &row)
{
	Oid server = get_foreign_server_oid(row.server, true);
	catalog::StreamRow stream;
	uint64 queued;

	if (!OidIsValid(server) || !catalog::FindStreamRow(server, row.owner, &stream))
		return;
	queued = QueuedTransactions(stream.id);
	if (queued > 0)
		ereport(
			NOTICE,
			(errmsg(
				"transactions that are queued for server \"%s\" are still delivered: " UINT64_FORMAT,
				row.server, queued)));
}

} // namespace

/* Also when the extension is not preloaded: then nothing is counted. */
uint64
QueuedTransactions(int32 stream)
{
	int slot = shmem::Ready() ? shmem::FindStream(MyDatabaseId, stream) : -1;

	if (slot < 0)
		return 0;
	return pg_atomic_read_u64(&shmem::Get().streams[slot].queued_transactions);
}

/* Nobody is there to be woken when the extension is not preloaded. */
void
WakeLauncher()
{
	if (shmem::Ready())
		transaction::WakeLauncherAtCommit();
}

/* Nobody is there to be woken when the extension is not preloaded. */
void
WakeWorkers()
{
	if (shmem::Ready())
		transaction::WakeWorkersAtCommit();
}

/* The table may be gone. */
void
RemovePair(const PairRow &row)
{
	DeletePairRow(&row);
	if (shmem::Ready())
		stats::ForgetPair(MyDatabaseId, row.id);
	if (PairRowsOfTable(row.table) == NIL)
	{
		Relation rel = try_relation_open(row.table, AccessExclusiveLock);

		if (rel != NULL)
		{
			DropPairTriggers(rel);
			relation_close(rel, NoLock);
		}
	}
	WakeLauncher();
	WakeWorkers();
}

/* SQL: mmrepl.create_pair(...) returns the pair's id. */
Datum
SqlCreatePair(FunctionCallInfo fcinfo)
{
	shmem::RequireReady();
	RequireGiven(fcinfo, kLocalTable, "local_table");
	RequireGiven(fcinfo, kServer, "server");

	Options options = ReadOptions(fcinfo, false);
	Relation rel = OpenTable(PG_GETARG_OID(kLocalTable));
	int32 id = CreatePair(rel, NameStr(*PG_GETARG_NAME(kServer)), options);

	relation_close(rel, NoLock);
	PG_RETURN_INT32(id);
}

/* SQL: mmrepl.alter_pair(...). */
Datum
SqlAlterPair(FunctionCallInfo fcinfo)
{
	shmem::RequireReady();
	RequireGiven(fcinfo, kLocalTable, "local_table");
	RequireGiven(fcinfo, kServer, "server");

	Options options = ReadOptions(fcinfo, true);
	Relation rel = OpenTable(PG_GETARG_OID(kLocalTable));

	AlterPair(rel, NameStr(*PG_GETARG_NAME(kServer)), options);
	relation_close(rel, NoLock);
	PG_RETURN_VOID();
}

/* SQL: mmrepl.drop_pair(local_table, server). */
Datum
SqlDropPair(FunctionCallInfo fcinfo)
{
	shmem::RequireReady();
	RequireGiven(fcinfo, kLocalTable, "local_table");
	RequireGiven(fcinfo, kServer, "server");

	const char *server = NameStr(*PG_GETARG_NAME(kServer));
	Relation rel = OpenTable(PG_GETARG_OID(kLocalTable));

	RequireMayDrop(rel, RequirePair(RelationGetRelid(rel), server));
	LockRelation(rel, AccessExclusiveLock);

	PairRow row = RequirePair(RelationGetRelid(rel), server);

	RemovePair(row);
	relation_close(rel, NoLock);
	NoticeQueued(row);
	PG_RETURN_VOID();
}

} // namespace mmrepl::registration
