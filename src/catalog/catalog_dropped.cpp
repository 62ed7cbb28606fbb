/*
 * catalog_dropped.cpp
 *		What the DDL command that is ending has dropped, as far as an expression
 *		could name it.
 */
#include "catalog_internal.hpp"

namespace mmrepl::catalog
{

/* The columns are those of the function; their order is that of the query. */
static constexpr const char *kDroppedQuery =
	"SELECT d.classid, coalesce(d.object_name, d.address_names[pg_catalog.cardinality("
	"d.address_names)]), d.objsubid FROM pg_catalog.pg_event_trigger_dropped_objects() d";

/* Whether an expression can name objects of the catalog. */
static bool
IsNamedInExpressions(Oid catalog)
{
	switch (catalog)
	{
		case CollationRelationId:
		case NamespaceRelationId:
		case OperatorRelationId:
		case ProcedureRelationId:
		case TypeRelationId:
			return true;
		default:
			return false;
	}
}

/* Look at one row of the query's result; its name, if it has one that counts, goes into the list. */
static void
AddDropped(HeapTuple tuple, TupleDesc desc, Dropped *dropped, MemoryContext context)
{
	bool is_null;
	Oid catalog = DatumGetObjectId(SPI_getbinval(tuple, desc, 1, &is_null));
	char *name = SPI_getvalue(tuple, desc, 2);
	bool column = catalog == RelationRelationId &&
				  DatumGetInt32(SPI_getbinval(tuple, desc, 3, &is_null)) != 0;

	dropped->cast |= catalog == CastRelationId;
	if (name == NULL || !(column || IsNamedInExpressions(catalog)))
		return;
	InContext(context, [&] {
		dropped->names = lappend(dropped->names, column ? psprintf(".%s", name) : pstrdup(name));
	});
}

Dropped
WhatWasDropped()
{
	MemoryContext context = CurrentMemoryContext;
	Dropped dropped = {};

	(void) SPI_connect();
	int result = SPI_execute(kDroppedQuery, false, 0);

	MmreplEnsure(result == SPI_OK_SELECT, "list of dropped objects cannot be read: %d", result);
	for (uint64 i = 0; i < SPI_processed; i++)
		AddDropped(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, &dropped, context);
	SPI_finish();
	return dropped;
}

} // namespace mmrepl::catalog
