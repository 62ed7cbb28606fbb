/*
 * fdw_validator.cpp
 *		mmrepl_fdw's validator: options of servers and user mappings.
 *
 * A server says where the peer is, a user mapping who connects: secrets never
 * stand on a server, whose options everybody can read.
 */
#include "registration_internal.hpp"

#include "mmrepl/connection.hpp"
#include "mmrepl/guc.hpp"

namespace mmrepl::registration
{

namespace
{

/* Raise because the option is not known there. */
[[noreturn]] void
RefuseOption(const char *name, Oid catalog)
{
	bool server = catalog == ForeignServerRelationId;
	bool mapping = catalog == UserMappingRelationId;
	const char *closest = server || mapping ? connection::ClosestOption(name, mapping) : NULL;
	const char *hint;

	if (server && connection::IsMappingOption(name))
		hint = "The option belongs to the user mapping: CREATE USER MAPPING ... OPTIONS (...).";
	else if (mapping && connection::IsServerOption(name))
		hint = "The option belongs to the server: ALTER SERVER ... OPTIONS (...).";
	else if (closest != NULL)
		hint = psprintf("Perhaps you meant the option \"%s\".", closest);
	else if (server)
		hint = "A server takes libpq's connection options, such as host, port and dbname.";
	else if (mapping)
		hint = "A user mapping takes user, password, sslcert, sslkey, sslpassword and "
			   "password_required.";
	else
		hint = "There are no options here: they stand on servers and user mappings.";
	ereport(ERROR, (errcode(ERRCODE_FDW_INVALID_OPTION_NAME), errmsg("invalid option \"%s\"", name),
					errhint("%s", hint)));
}

/* Raise unless it is a port number. */
void
CheckPort(const char *text, const char *value)
{
	char *end;
	long port;

	errno = 0;
	port = strtol(value, &end, 10);
	if (errno == 0 && *end == '\0' && port >= 1 && port <= 65535)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("invalid port: \"%s\"", text),
			 errhint("A port is a number from 1 to 65535; several hosts have theirs separated by "
					 "commas.")));
}

/* Several ports are separated by commas; an empty one is the default. */
void
CheckPorts(const char *text)
{
	char *rest = pstrdup(text);
	char *part;

	while ((part = strsep(&rest, ",")) != NULL)
	{
		if (part[0] != '\0')
			CheckPort(text, part);
	}
}

/* Raise unless it is a number of connections. */
void
CheckLanes(const char *text)
{
	if (connection::ReadLanes(text) == 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("invalid number of lanes: \"%s\"", text),
						errhint("A stream has 1 to %d lanes.", guc::kMaxLanes)));
}

/* Raise because only superusers may set the option on a user mapping. */
[[noreturn]] void
RefuseForUser(const char *what)
{
	ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE), errmsg("%s is superuser-only", what),
					errhint("User mappings with this option may be created and modified only by "
							"superusers.")));
}

/* Options with which a user would connect as somebody else, or read the server's files. */
void
CheckPrivileged(DefElem *option)
{
	const char *name = option->defname;

	if (strcmp(name, "password_required") == 0)
	{
		if (!defGetBoolean(option) && !superuser())
			RefuseForUser("password_required=false");
	}
	else if ((strcmp(name, "sslcert") == 0 || strcmp(name, "sslkey") == 0 ||
			  strcmp(name, "passfile") == 0) &&
			 !superuser())
		RefuseForUser(name);
}

/* Raise unless the option may stand there with that value. */
void
CheckOption(DefElem *option, Oid catalog)
{
	bool known = catalog == ForeignServerRelationId ? connection::IsServerOption(option->defname)
				 : catalog == UserMappingRelationId ? connection::IsMappingOption(option->defname)
													: false;

	if (!known)
		RefuseOption(option->defname, catalog);
	if (strcmp(option->defname, "port") == 0)
		CheckPorts(defGetString(option));
	if (strcmp(option->defname, connection::kLanesOption) == 0)
		CheckLanes(defGetString(option));
	if (catalog == UserMappingRelationId)
		CheckPrivileged(option);
}

} // namespace

/* SQL: mmrepl.fdw_validator(options text[], catalog oid). */
Datum
SqlFdwValidator(FunctionCallInfo fcinfo)
{
	List *options = untransformRelOptions(PG_GETARG_DATUM(0));
	Oid catalog = PG_GETARG_OID(1);
	ListCell *cell;

	foreach(cell, options)
		CheckOption(lfirst_node(DefElem, cell), catalog);
	PG_RETURN_VOID();
}

} // namespace mmrepl::registration
