/*
 * apply_grants.cpp
 *		mmrepl.allow_apply(role), disallow_apply(role): the rights that a peer's
 *		user mapping needs here.
 */
#include "registration_internal.hpp"

namespace mmrepl::registration
{

namespace
{

/* Functions that a peer calls. */
constexpr const char *kPeerFunctions[] = {"apply", "hello", "node_id"};

/* The owner of the extension's schema, and so of the extension. */
Oid
ExtensionOwner(Oid schema)
{
	HeapTuple tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(schema));

	MmreplEnsure(HeapTupleIsValid(tuple), "schema %u is gone", schema);
	Oid owner = ((Form_pg_namespace) GETSTRUCT(tuple))->nspowner;

	ReleaseSysCache(tuple);
	return owner;
}

/* Raise unless the current role may give the rights away. */
void
RequireExtensionOwner(Oid schema, const char *function)
{
	if (superuser() || has_privs_of_role(GetUserId(), ExtensionOwner(schema)))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("permission denied for function %s", function),
			 errhint("Only superusers and the owner of the extension may decide which roles apply "
					 "peers' changes.")));
}

/* The function as GRANT wants it. */
ObjectWithArgs *
NameFunction(HeapTuple tuple)
{
	Form_pg_proc form = (Form_pg_proc) GETSTRUCT(tuple);
	ObjectWithArgs *object = makeNode(ObjectWithArgs);

	object->objname = list_make2(makeString(get_namespace_name(form->pronamespace)),
								 makeString(pstrdup(NameStr(form->proname))));
	for (int i = 0; i < form->pronargs; i++)
		object->objargs =
			lappend(object->objargs, makeTypeNameFromOid(form->proargtypes.values[i], -1));
	return object;
}

/* All functions of the extension's schema that peers call. */
List *
PeerFunctions(Oid schema)
{
	List *objects = NIL;

	for (const char *name : kPeerFunctions)
	{
		CatCList *list = SearchSysCacheList1(PROCNAMEARGSNSP, CStringGetDatum(name));

		for (int i = 0; i < list->n_members; i++)
		{
			HeapTuple tuple = &list->members[i]->tuple;

			if (((Form_pg_proc) GETSTRUCT(tuple))->pronamespace == schema)
				objects = lappend(objects, NameFunction(tuple));
		}
		ReleaseSysCacheList(list);
	}
	return objects;
}

/* GRANT or REVOKE one privilege on the objects. */
void
Grant(bool grant, ObjectType type, List *objects, const char *privilege, const char *role)
{
	GrantStmt *statement = makeNode(GrantStmt);
	AccessPriv *access = makeNode(AccessPriv);
	RoleSpec *grantee = makeNode(RoleSpec);

	access->priv_name = pstrdup(privilege);
	grantee->roletype = ROLESPEC_CSTRING;
	grantee->rolename = pstrdup(role);
	grantee->location = -1;
	statement->is_grant = grant;
	statement->targtype = ACL_TARGET_OBJECT;
	statement->objtype = type;
	statement->objects = objects;
	statement->privileges = list_make1(access);
	statement->grantees = list_make1(grantee);
	statement->behavior = DROP_RESTRICT;
	ExecuteGrantStmt(statement);
	CommandCounterIncrement();
}

/* What allow_apply() grants, disallow_apply() takes back: no trace of the role is left. */
void
SetApply(bool allow, const char *role, const char *function)
{
	Oid schema = catalog::GetRelations().schema;

	RequireExtensionOwner(schema, function);
	if (!OidIsValid(get_role_oid(role, true)))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("role \"%s\" does not exist", role),
				 errhint("CREATE ROLE %s LOGIN PASSWORD '...';", quote_identifier(role))));
	Grant(allow, OBJECT_SCHEMA, list_make1(makeString(get_namespace_name(schema))), "usage", role);
	Grant(allow, OBJECT_FUNCTION, PeerFunctions(schema), "execute", role);
}

} // namespace

/* SQL: mmrepl.allow_apply(role name). */
Datum
SqlAllowApply(FunctionCallInfo fcinfo)
{
	SetApply(true, NameStr(*PG_GETARG_NAME(0)), "allow_apply");
	PG_RETURN_VOID();
}

/* SQL: mmrepl.disallow_apply(role name). */
Datum
SqlDisallowApply(FunctionCallInfo fcinfo)
{
	SetApply(false, NameStr(*PG_GETARG_NAME(0)), "disallow_apply");
	PG_RETURN_VOID();
}

} // namespace mmrepl::registration
