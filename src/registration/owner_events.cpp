/*
 * owner_events.cpp
 *		DDL after which a pair's owner is not what it was: said when it happens, with
 *		the commands that help, since the stream would say so only later and to others.
 *
 * A pair belongs to the role that made it, not to the table's owner, and no command
 * of PostgreSQL hands it on: that role's user mapping is used, which is not handed
 * on either.
 */
#include "registration_internal.hpp"

#include "mmrepl/connection.hpp"

namespace mmrepl::registration
{

namespace
{

/* Warn of the role's pairs that have lost the mapping which they connect with. */
void
WarnOfLostMappings(Oid role)
{
	const char *name = GetUserNameFromId(role, false);
	ListCell *cell;

	foreach(cell, AllPairRows())
	{
		const PairRow *row = (const PairRow *) lfirst(cell);
		Oid server = get_foreign_server_oid(row->server, true);

		if (row->owner != role || !OidIsValid(server) || connection::IsMapped(server, role))
			continue;
		ereport(WARNING,
				(errmsg("pair %d of table \"%s\" has no user mapping for server \"%s\" any more",
						row->id, get_rel_name(row->table), row->server),
				 errdetail("Its owner is role \"%s\". Changes are queued and wait.", name),
				 errhint("CREATE USER MAPPING FOR %s SERVER %s OPTIONS (...); or %s",
						 quote_identifier(name), quote_identifier(row->server),
						 DropCommand(*row))));
	}
}

} // namespace

/* DROP OWNED BY takes user mappings along. */
void
OnDropOwned(const DropOwnedStmt *statement)
{
	ListCell *cell;

	WakeWorkers();
	if (!catalog::ExtensionExists())
		return;
	foreach(cell, roleSpecsToIds(statement->roles))
		WarnOfLostMappings(lfirst_oid(cell));
}

/* DROP USER MAPPING; PUBLIC's may be anybody's. */
void
OnDropUserMapping(const DropUserMappingStmt *statement)
{
	WakeWorkers();
	if (statement->user->roletype == ROLESPEC_PUBLIC || !catalog::ExtensionExists())
		return;

	Oid role = get_rolespec_oid(statement->user, true);

	if (OidIsValid(role))
		WarnOfLostMappings(role);
}

/* ALTER TABLE ... OWNER TO: say which pairs belong to somebody who does not own the table any more. */
void
NoticePairsOfOthers(Relation rel)
{
	ListCell *cell;

	foreach(cell, PairRowsOfTable(RelationGetRelid(rel)))
	{
		const PairRow *row = (const PairRow *) lfirst(cell);
		const char *role = GetUserNameFromId(row->owner, true);

		if (role == NULL || OwnsRelation(RelationGetRelid(rel), row->owner))
			continue;
		ereport(NOTICE,
				(errmsg("pair %d of table \"%s\" still belongs to role \"%s\"", row->id,
						RelationGetRelationName(rel), role),
				 errdetail("It connects to server \"%s\" with the user mapping of that role.",
						   row->server),
				 errhint("To end that, %s and let another role create the pair.",
						 DropCommand(*row))));
	}
}

} // namespace mmrepl::registration
