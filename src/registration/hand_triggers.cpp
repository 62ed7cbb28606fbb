/*
 * hand_triggers.cpp
 *		Triggers that users make with CREATE TRIGGER ... mmrepl.replicate(...).
 *
 * Five arguments (server, remote schema, remote table, application_name, mode)
 * make a trigger a pair of its own; it uses the user mapping of the table's
 * owner.  Without arguments it serves the table's registered pairs: pg_dump
 * writes such triggers.
 */
#include "registration_internal.hpp"

#include "mmrepl/connection.hpp"
#include "mmrepl/shmem.hpp"

namespace mmrepl::registration
{

namespace
{

constexpr int kArguments = 5;

/* Arguments of a trigger made by hand. */
enum Argument
{
	kServer,
	kRemoteSchema,
	kRemoteTable,
	kApplication,
	kMode
};

/* Raise because of how the trigger is defined. */
[[noreturn]] void
Refuse(const Trigger *trigger, const char *detail, const char *hint)
{
	ereport(ERROR, (errcode(ERRCODE_INVALID_OBJECT_DEFINITION),
					errmsg("trigger \"%s\" cannot replicate", trigger->tgname),
					errdetail("%s", detail), errhint("%s", hint)));
}

/* Raise for triggers that would miss changes, or see them too early. */
void
CheckShape(const Trigger *trigger)
{
	bool row = TRIGGER_FOR_ROW(trigger->tgtype);
	bool truncate = TRIGGER_FOR_TRUNCATE(trigger->tgtype);

	if (!TRIGGER_FOR_AFTER(trigger->tgtype))
		Refuse(trigger, "Before the event it is not known what the row will be.",
			   "Make it an AFTER trigger.");
	if (row == truncate ||
		(truncate && (trigger->tgtype &
					  (TRIGGER_TYPE_INSERT | TRIGGER_TYPE_UPDATE | TRIGGER_TYPE_DELETE)) != 0))
		Refuse(trigger, "mmrepl.replicate() captures rows one by one, and TRUNCATE as a statement.",
			   "Make one trigger AFTER INSERT OR UPDATE OR DELETE ... FOR EACH ROW and another one "
			   "AFTER TRUNCATE ... FOR EACH STATEMENT.");
	if (trigger->tgnattr > 0)
		Refuse(trigger, "UPDATE OF a list of columns misses updates of other columns.",
			   "Use UPDATE without a list; mmrepl.create_pair() has the option columns.");
	if (trigger->tgqual != NULL)
		Refuse(trigger, "WHEN loses rows that enter or leave the condition.",
			   "Leave WHEN out; mmrepl.create_pair() has the option row_filter.");
	if (trigger->tgdeferrable)
		Refuse(trigger, "A deferred trigger sees changes out of their order.",
			   "Use CREATE TRIGGER without CONSTRAINT and DEFERRABLE.");
}

/* Raise unless the trigger has none or all of the arguments, and a mode that exists. */
void
CheckArguments(const Trigger *trigger)
{
	if (trigger->tgnargs != kArguments)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("trigger \"%s\" passes %d arguments to mmrepl.replicate()",
							   trigger->tgname, trigger->tgnargs),
						errdetail("It takes five: server, remote schema, remote table, "
								  "application_name, mode."),
						errhint("EXECUTE FUNCTION mmrepl.replicate('server', 'schema', 'table', "
								"'application_name', 'async'), or use mmrepl.create_pair().")));

	const char *mode = trigger->tgargs[kMode];

	if (pg_strcasecmp(mode, "sync") != 0 && pg_strcasecmp(mode, "async") != 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("invalid mode for trigger \"%s\": \"%s\"", trigger->tgname, mode),
						errhint("Available values: 'async', 'sync'.")));
}

/* A trigger without arguments: at most one for each event, and of use only with a pair. */
void
RegisterWithoutArguments(Relation rel, const Trigger *trigger)
{
	PairTriggers triggers = FindPairTriggers(rel);

	if (triggers.count >
		(OidIsValid(triggers.row) ? 1 : 0) + (OidIsValid(triggers.truncate) ? 1 : 0))
		Refuse(trigger, "Another trigger captures changes for the table's pairs already.",
			   "Leave it to mmrepl.create_pair() to make the triggers.");
	if (!IsInPairs(RelationGetRelid(rel)))
		ereport(WARNING, (errmsg("trigger \"%s\" captures nothing yet: table \"%s\" is in no pair",
								 trigger->tgname, RelationGetRelationName(rel)),
						  errhint("SELECT mmrepl.create_pair(%s, 'server');",
								  quote_literal_cstr(QualifiedName(rel)))));
}

/* DROP SERVER takes the trigger along with CASCADE, and is refused without. */
void
DependOnServer(Oid trigger, Oid server)
{
	ObjectAddress depender;
	ObjectAddress referenced;

	ObjectAddressSet(depender, TriggerRelationId, trigger);
	ObjectAddressSet(referenced, ForeignServerRelationId, server);
	recordDependencyOn(&depender, &referenced, DEPENDENCY_NORMAL);
}

/* Ask the peer whether it can take what the trigger sends. */
void
AskPeer(Relation rel, const Trigger *trigger, Oid server, Oid owner, int32 stream)
{
	PairRow all = {};
	PeerQuestion question = {};

	question.server = server;
	question.owner = owner;
	question.stream = stream;
	question.rel = rel;
	question.columns = ResolveColumns(rel, RequireKey(rel), all);
	question.remote_schema = trigger->tgargs[kRemoteSchema];
	question.remote_table = trigger->tgargs[kRemoteTable];
	CheckPeer(question);
}

/*
 * The stream of a trigger with arguments; raises when the table's owner may not
 * use the server.  A superuser may have the trigger use it all the same: pg_dump
 * puts grants behind triggers.
 */
int32
StreamOf(Relation rel, const Trigger *trigger, Oid *server)
{
	Oid owner = catalog::TableOwner(RelationGetRelid(rel));

	*server = RequireServer(trigger->tgargs[kServer], superuser() ? GetUserId() : owner);
	(void) connection::Resolve(*server, owner);
	return catalog::EnsureStreamRow(*server, owner);
}

/* Raise when a pair of the table sends its changes to where the trigger would. */
void
RequireNoSuchPair(Relation rel, const Trigger *trigger)
{
	PairRow pair;

	if (!FindPairRow(RelationGetRelid(rel), trigger->tgargs[kServer], &pair) ||
		strcmp(pair.remote_schema, trigger->tgargs[kRemoteSchema]) != 0 ||
		strcmp(pair.remote_table, trigger->tgargs[kRemoteTable]) != 0)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_MMREPL_PAIR_EXISTS),
			 errmsg("table \"%s\" is already replicated to server \"%s\"",
					RelationGetRelationName(rel), pair.server),
			 errdetail("It goes to table %s there, by pair %d: each change would arrive twice.",
					   QualifiedName(pair.remote_schema, pair.remote_table), pair.id),
			 errhint("Leave the trigger out, or %s before.", DropCommand(pair))));
}

/* A trigger with arguments. */
void
RegisterWithArguments(Relation rel, const Trigger *trigger)
{
	Oid owner = catalog::TableOwner(RelationGetRelid(rel));
	Oid server;
	int32 stream;

	CheckArguments(trigger);
	RequireReplicable(rel);
	RequireTableOwner(rel);
	(void) RequireKey(rel);
	RequireNoSuchPair(rel, trigger);
	stream = StreamOf(rel, trigger, &server);
	AskPeer(rel, trigger, server, owner, stream);
	DependOnServer(trigger->tgoid, server);
	WakeLauncher();
}

/* Where nothing can be checked: what was checked once, and is restored now, depends as before. */
void
RestoreDependency(const Trigger *trigger)
{
	Oid server = trigger->tgnargs == kArguments
					 ? get_foreign_server_oid(trigger->tgargs[kServer], true)
					 : InvalidOid;

	if (OidIsValid(server))
		DependOnServer(trigger->tgoid, server);
}

} // namespace

/*
 * While pg_upgrade restores the schema everything was checked before.  Not
 * preloaded, nothing can be made; the trigger then fails whenever it fires.
 */
void
RegisterHandTrigger(Relation rel, const Trigger *trigger)
{
	if (IsBinaryUpgrade || !shmem::Ready())
		RestoreDependency(trigger);
	else
	{
		CheckShape(trigger);
		if (trigger->tgnargs == 0)
			RegisterWithoutArguments(rel, trigger);
		else
			RegisterWithArguments(rel, trigger);
		KeepFiringAlways(rel);
	}
	if (!IsBinaryUpgrade && !shmem::Ready())
		ereport(WARNING,
				(errcode(ERRCODE_MMREPL_NOT_PRELOADED),
				 errmsg("trigger \"%s\" was not checked: mmrepl_bgw is not preloaded",
						trigger->tgname),
				 errhint("Add mmrepl_bgw to shared_preload_libraries and restart the server: until "
						 "then writes to the table fail.")));
}

void
RequireNoHandTrigger(Relation rel, const PairRow &row)
{
	Oid function = ReplicateFunction();
	const TriggerDesc *triggers = CopyTriggerDesc(rel->trigdesc);

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		const Trigger *trigger = &triggers->triggers[i];

		if (!OidIsValid(function) || trigger->tgfoid != function ||
			trigger->tgnargs != kArguments || trigger->tgenabled == TRIGGER_DISABLED ||
			strcmp(trigger->tgargs[kServer], row.server) != 0 ||
			strcmp(trigger->tgargs[kRemoteSchema], row.remote_schema) != 0 ||
			strcmp(trigger->tgargs[kRemoteTable], row.remote_table) != 0)
			continue;
		ereport(ERROR,
				(errcode(ERRCODE_MMREPL_PAIR_EXISTS),
				 errmsg("table \"%s\" is already replicated to server \"%s\"",
						RelationGetRelationName(rel), row.server),
				 errdetail("Trigger \"%s\" sends its changes to table %s there: each change "
						   "would arrive twice.",
						   trigger->tgname, QualifiedName(row.remote_schema, row.remote_table)),
				 errhint("DROP TRIGGER %s ON %s;", quote_identifier(trigger->tgname),
						 QualifiedName(rel))));
	}
}

/*
 * A disabled trigger may be in any state.  The owner's mapping is looked at as well.
 * A clone in a partition goes by the key of the table that the trigger was made on.
 */
void
RevalidateHandTriggers(Relation rel)
{
	Oid function = ReplicateFunction();
	const TriggerDesc *triggers = CopyTriggerDesc(rel->trigdesc);

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		const Trigger *trigger = &triggers->triggers[i];
		Oid server;

		if (!OidIsValid(function) || trigger->tgfoid != function ||
			trigger->tgnargs != kArguments || trigger->tgenabled == TRIGGER_DISABLED)
			continue;
		RequireReplicable(rel);
		if (!trigger->tgisclone)
			(void) RequireKey(rel);
		(void) StreamOf(rel, trigger, &server);
		WakeLauncher();
	}
}

} // namespace mmrepl::registration
