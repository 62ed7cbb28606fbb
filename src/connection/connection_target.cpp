/*
 * connection_target.cpp
 *		From a foreign server and a user mapping to libpq's parameters.
 */
#include "connection_internal.hpp"

#include "mmrepl/guc.hpp"

namespace mmrepl::connection
{

namespace
{

constexpr const char *kPasswordRequired = "password_required";
constexpr int kMaxTypos = 3; /* of a name that is still taken for a misspelt one */

/* Parameters under construction: each keyword once, room for all of libpq's. */
struct Parameters
{
	const char **keywords;
	const char **values;
	int count;
	int capacity;
};

/*
 * libpq's table of options, fetched once in the life of the process (it is
 * malloc'd by libpq and never freed).
 */
const PQconninfoOption *
LibpqOptions()
{
	static const PQconninfoOption *options = NULL;

	if (options == NULL)
		options = PQconndefaults();
	if (options == NULL)
		ereport(ERROR, (errcode(ERRCODE_FDW_OUT_OF_MEMORY),
						errmsg("could not get libpq's default connection options")));
	return options;
}

/*
 * The option of that name if it may be set by users: libpq's debugging options
 * may not, and client_encoding is always ours.
 */
const PQconninfoOption *
FindOption(const char *name)
{
	const PQconninfoOption *option = LibpqOptions();

	while (option->keyword != NULL && strcmp(option->keyword, name) != 0)
		option++;
	if (option->keyword == NULL || strchr(option->dispchar, 'D') != NULL ||
		strcmp(name, "client_encoding") == 0)
		return NULL;
	return option;
}

/* Whether the option says who connects rather than where to. */
bool
IsPersonal(const PQconninfoOption *option)
{
	return strchr(option->dispchar, '*') != NULL || strcmp(option->keyword, "user") == 0;
}

/* The value of a parameter, NULL when it is not set. */
const char *
Find(const Parameters *parameters, const char *keyword)
{
	for (int i = 0; i < parameters->count; i++)
	{
		if (strcmp(parameters->keywords[i], keyword) == 0)
			return parameters->values[i];
	}
	return NULL;
}

/* Set a parameter; a later value replaces an earlier one. */
void
Set(Parameters *parameters, const char *keyword, const char *value)
{
	int i = 0;

	while (i < parameters->count && strcmp(parameters->keywords[i], keyword) != 0)
		i++;
	MmreplEnsure(i < parameters->capacity, "too many connection parameters");
	parameters->keywords[i] = keyword;
	parameters->values[i] = value;
	if (i == parameters->count)
		parameters->count++;
}

/* Set a parameter that the user did not set. */
void
SetDefault(Parameters *parameters, const char *keyword, const char *value)
{
	if (Find(parameters, keyword) == NULL)
		Set(parameters, keyword, value);
}

bool
OptionsSetApplicationName(const Parameters *parameters)
{
	const char *options = Find(parameters, "options");

	return options != NULL && strstr(options, "application_name") != NULL;
}

/* Take over those options that libpq knows and that are not empty. */
void
AddOptions(Parameters *parameters, List *options)
{
	ListCell *cell;

	foreach(cell, options)
	{
		DefElem *element = lfirst_node(DefElem, cell);
		const char *value = defGetString(element);

		if (value[0] != '\0' && FindOption(element->defname) != NULL)
			Set(parameters, element->defname, value);
	}
}

/* Arrays with room for every option of libpq and the end mark. */
Parameters
NewParameters()
{
	const PQconninfoOption *option = LibpqOptions();
	Parameters parameters = {};

	while (option[parameters.capacity].keyword != NULL)
		parameters.capacity++;
	parameters.keywords = (const char **) palloc0((parameters.capacity + 1) * sizeof(char *));
	parameters.values = (const char **) palloc0((parameters.capacity + 1) * sizeof(char *));
	return parameters;
}

/*
 * What is ours: a dead peer is noticed within half a minute unless the options
 * say otherwise, text is in our encoding, and connect_timeout is left out
 * because the deadline of Open() does its work.
 */
void
AddDefaults(Parameters *parameters)
{
	/* The fallback would override an application_name in "options". */
	if (!OptionsSetApplicationName(parameters))
		SetDefault(parameters, "fallback_application_name", "mmrepl_bgw");
	SetDefault(parameters, "keepalives_idle", "10");
	SetDefault(parameters, "keepalives_interval", "5");
	SetDefault(parameters, "keepalives_count", "3");
	SetDefault(parameters, "tcp_user_timeout", "15000");
	Set(parameters, "client_encoding", GetDatabaseEncodingName());
}

/* The option of a list, NULL when it is not there. */
DefElem *
FindElement(List *options, const char *name)
{
	ListCell *cell;

	foreach(cell, options)
	{
		DefElem *element = lfirst_node(DefElem, cell);

		if (strcmp(element->defname, name) == 0)
			return element;
	}
	return NULL;
}

/*
 * Whether the owner must have given a password and the peer must ask for it:
 * everybody but a superuser, unless a superuser excused the mapping.  Without a
 * validator nobody has checked who wrote the excuse, so it does not count.
 */
bool
PasswordRequired(const ForeignDataWrapper *wrapper, const UserMapping *mapping, Oid owner)
{
	DefElem *excuse = FindElement(mapping->options, kPasswordRequired);

	if (superuser_arg(owner))
		return false;
	return excuse == NULL || !OidIsValid(wrapper->fdwvalidator) || defGetBoolean(excuse);
}

/* Whether the role has a mapping of its own, as opposed to PUBLIC's (InvalidOid). */
bool
HasMapping(Oid server, Oid role)
{
	return SearchSysCacheExists2(USERMAPPINGUSERSERVER, ObjectIdGetDatum(role),
								 ObjectIdGetDatum(server));
}

/*
 * Raise unless the mapping holds a password: one from a file or the server
 * process's environment is not the owner's.
 */
void
RequirePassword(const ForeignServer *server, const UserMapping *mapping, Oid owner)
{
	DefElem *password = FindElement(mapping->options, "password");
	const char *role;
	const char *name;

	if (password != NULL && defGetString(password)[0] != '\0')
		return;
	role = quote_identifier(GetUserNameFromId(owner, false));
	name = quote_identifier(server->servername);
	ereport(ERROR,
			(errcode(ERRCODE_S_R_E_PROHIBITED_SQL_STATEMENT_ATTEMPTED),
			 errmsg("password is required"),
			 errdetail("Non-superusers must provide a password in the user mapping for server "
					   "\"%s\".",
					   server->servername),
			 HasMapping(server->serverid, owner)
				 ? errhint("Run ALTER USER MAPPING FOR %s SERVER %s OPTIONS (ADD password '...').",
						   role, name)
				 : errhint("Run CREATE USER MAPPING FOR %s SERVER %s OPTIONS (user '...', "
						   "password '...').",
						   role, name)));
}

/* The server; raises when there is none. */
ForeignServer *
RequireServer(Oid oid)
{
	ForeignServer *server = GetForeignServerExtended(oid, FSV_MISSING_OK);

	if (server == NULL)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
						errmsg("foreign server with OID %u does not exist", oid)));
	return server;
}

/* Raise when the role was dropped: PUBLIC's mapping is not meant for nobody. */
void
RequireRole(const ForeignServer *server, Oid owner)
{
	if (SearchSysCacheExists1(AUTHOID, ObjectIdGetDatum(owner)))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_OBJECT),
			 errmsg("the owner of pairs to server \"%s\" does not exist any more",
					server->servername),
			 errdetail("The role with OID %u was dropped.", owner),
			 errhint("SELECT mmrepl.drop_pair(local_table, server) FROM mmrepl.pairs WHERE owner = "
					 "'%u'; and let a role that is there create the pairs again.",
					 owner)));
}

/* The owner's mapping or PUBLIC's; raises when there is neither. */
UserMapping *
RequireMapping(const ForeignServer *server, Oid owner)
{
	const char *role;

	RequireRole(server, owner);
	if (IsMapped(server->serverid, owner))
		return GetUserMapping(owner, server->serverid);

	role = GetUserNameFromId(owner, false);
	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_OBJECT),
			 errmsg("role \"%s\" has no user mapping for server \"%s\"", role, server->servername),
			 errhint("Run CREATE USER MAPPING FOR %s SERVER %s OPTIONS (user '...', "
					 "password '...').",
					 quote_identifier(role), quote_identifier(server->servername))));
}

/* Hash of everything that a new connection would be made from. */
uint32
HashOf(const Parameters *parameters, bool password_required)
{
	uint32 hash = password_required ? 1 : 0;

	for (int i = 0; i < parameters->count; i++)
	{
		const char *keyword = parameters->keywords[i];
		const char *value = parameters->values[i];

		hash = hash_combine(hash, hash_bytes((const unsigned char *) keyword, strlen(keyword)));
		hash = hash_combine(hash, hash_bytes((const unsigned char *) value, strlen(value)));
	}
	return hash;
}

} // namespace

bool
IsMapped(Oid server, Oid role)
{
	return HasMapping(server, role) || HasMapping(server, InvalidOid);
}

/* Everything one needs to connect as `owner`; see the door for what it raises. */
Target *
Resolve(Oid server_oid, Oid owner)
{
	ForeignServer *server = RequireServer(server_oid);
	UserMapping *mapping = RequireMapping(server, owner);
	ForeignDataWrapper *wrapper = GetForeignDataWrapper(server->fdwid);
	Target *target = (Target *) palloc0(sizeof(Target));
	Parameters parameters = NewParameters();

	target->password_required = PasswordRequired(wrapper, mapping, owner);
	if (target->password_required)
		RequirePassword(server, mapping, owner);

	AddOptions(&parameters, wrapper->options);
	AddOptions(&parameters, server->options);
	AddOptions(&parameters, mapping->options);
	AddDefaults(&parameters);

	target->server = server_oid;
	target->owner = owner;
	target->server_name = server->servername;
	target->keywords = parameters.keywords;
	target->values = parameters.values;
	target->hash = HashOf(&parameters, target->password_required);
	if (DefElem *lanes = FindElement(server->options, kLanesOption); lanes != NULL)
		target->lanes = ReadLanes(defGetString(lanes));
	return target;
}

int
ReadLanes(const char *value)
{
	char *end;
	long number;

	errno = 0;
	number = strtol(value, &end, 10);
	return errno == 0 && end != value && *end == '\0' && number >= 1 && number <= guc::kMaxLanes
			   ? (int) number
			   : 0;
}

/* Whether a server may carry the option: ours, or any of libpq's that is no secret and no user. */
bool
IsServerOption(const char *name)
{
	const PQconninfoOption *option = FindOption(name);

	if (strcmp(name, kLanesOption) == 0)
		return true;

	return option != NULL && !IsPersonal(option);
}

/* Whether a user mapping may carry the option: user, secrets, the client's certificate. */
bool
IsMappingOption(const char *name)
{
	const PQconninfoOption *option;

	if (strcmp(name, kPasswordRequired) == 0)
		return true;
	option = FindOption(name);
	return option != NULL &&
		   (IsPersonal(option) || strcmp(name, "sslcert") == 0 || strcmp(name, "sslkey") == 0);
}

/* The permitted option with the fewest typos in it, NULL when none is close. */
const char *
ClosestOption(const char *name, bool mapping)
{
	const char *closest = NULL;
	int length = strlen(name);
	int limit = Min(kMaxTypos, length / 2);

	if (length > NAMEDATALEN)
		return NULL;
	for (const PQconninfoOption *option = LibpqOptions(); option->keyword != NULL; option++)
	{
		int distance;

		if (!(mapping ? IsMappingOption(option->keyword) : IsServerOption(option->keyword)))
			continue;
		distance = varstr_levenshtein_less_equal(name, length, option->keyword,
												 strlen(option->keyword), 1, 1, 1, limit, true);
		if (distance <= limit)
		{
			closest = option->keyword;
			limit = distance - 1;
		}
	}
	return closest;
}

} // namespace mmrepl::connection
