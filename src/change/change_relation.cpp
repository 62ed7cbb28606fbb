/*
 * change_relation.cpp
 *		How a relation's rows are sent, and the definition that says so.
 */
#include "change_internal.hpp"

namespace mmrepl::change
{

static uint64 last_serial;

/* ---- columns ---- */

/* Choose how a column travels. */
static void
BuildColumn(ColumnEncoder *column, const ColumnSpec &spec, Form_pg_attribute attribute,
			List **row_types)
{
	Oid base = getBaseType(attribute->atttypid);
	Oid function;
	bool is_varlena;

	column->attnum = spec.attnum;
	column->key = spec.key;
	column->binary = base < kFirstUnstableOid && WireOf(base) != Wire::Text;
	column->type = column->binary ? base : attribute->atttypid;
	column->wire = column->binary ? WireOf(base) : Wire::Text;
	column->settings = column->binary ? kNoSettings : SettingsOf(base, row_types);
	if (column->binary)
		getTypeBinaryOutputInfo(column->type, &function, &is_varlena);
	else
		getTypeOutputInfo(column->type, &function, &is_varlena);
	fmgr_info(function, &column->output);
}

/* A column's entry in the definition. */
static void
PutColumn(StringInfo buf, const ColumnEncoder &column, const char *remote_name)
{
	size_t length = strlen(remote_name);

	MmreplEnsure(length <= kNameLength, "column name is too long: %s", remote_name);
	appendStringInfoCharMacro(buf, (char) (length | (column.key ? kKey : 0) |
										   (column.binary ? kBinary : 0)));
	appendBinaryStringInfo(buf, remote_name, (int) length);
	if (column.type < kFirstUnstableOid)
	{
		PutVarint(buf, column.type);
		return;
	}
	HeapTuple tuple = SearchSysCache1(TYPEOID, ObjectIdGetDatum(column.type));

	MmreplEnsure(HeapTupleIsValid(tuple), "cache lookup failed for type %u", column.type);
	Form_pg_type form = (Form_pg_type) GETSTRUCT(tuple);

	PutVarint(buf, 0);
	PutString(buf, get_namespace_name(form->typnamespace));
	PutString(buf, NameStr(form->typname));
	ReleaseSysCache(tuple);
}

/* Number of the rule in the shape of a relation. */
static uint8
ConflictBits(Conflict conflict)
{
	return conflict == Conflict::ApplyRemote ? 0 : conflict == Conflict::KeepLocal ? 1 : 2;
}

/* Shape and names. */
static void
PutNames(StringInfo buf, const RelationSpec &spec)
{
	bool is_public = strcmp(spec.remote_schema, "public") == 0;
	bool same = strcmp(spec.remote_schema, spec.local_schema) == 0 &&
				strcmp(spec.remote_table, spec.local_table) == 0;

	appendStringInfoCharMacro(buf,
							  (char) (ConflictBits(spec.conflict) | (is_public ? kPublic : 0) |
									  (same ? kSameNames : 0) | (spec.checked ? kChecked : 0)));
	if (!is_public)
		PutString(buf, spec.remote_schema);
	PutString(buf, spec.remote_table);
	if (same)
		return;
	PutString(buf, spec.local_schema);
	PutString(buf, spec.local_table);
}

RelationEncoder *
BuildRelationEncoder(const RelationSpec &spec, TupleDesc desc)
{
	RelationEncoder *rel = (RelationEncoder *) palloc0(sizeof(RelationEncoder));
	StringInfoData buf;

	rel->serial = ++last_serial;
	rel->checked = spec.checked;
	rel->whole = spec.whole || spec.checked;
	rel->n_columns = spec.n_columns;
	rel->columns = (ColumnEncoder *) palloc0(sizeof(ColumnEncoder) * spec.n_columns);
	rel->entries = (uint32 *) palloc(sizeof(uint32) * (spec.n_columns + 1));
	initStringInfo(&buf);
	PutNames(&buf, spec);
	PutVarint(&buf, (uint64) spec.pair_id);
	rel->columns_at = (uint32) buf.len;
	PutVarint(&buf, (uint64) spec.n_columns);
	rel->entries[0] = (uint32) buf.len;
	for (int i = 0; i < spec.n_columns; i++)
	{
		const ColumnSpec &column = spec.columns[i];

		BuildColumn(&rel->columns[i], column, TupleDescAttr(desc, column.attnum - 1),
					&rel->row_types);
		PutColumn(&buf, rel->columns[i], column.remote_name);
		rel->entries[i + 1] = (uint32) buf.len;
		rel->settings |= rel->columns[i].settings;
	}
	rel->definition = buf.data;
	rel->definition_length = (uint32) buf.len;
	return rel;
}

/* ---- without some columns ---- */

/* The definition without some columns. */
static void
SpareInDefinition(RelationEncoder *partial, const RelationEncoder *rel)
{
	StringInfoData buf;

	initStringInfo(&buf);
	appendBinaryStringInfo(&buf, rel->definition, (int) rel->columns_at);
	buf.data[0] |= kPartial;
	PutVarint(&buf, (uint64) partial->n_columns);
	for (int i = 0; i < rel->n_columns; i++)
		if (!bms_is_member(i, partial->sparing))
			appendBinaryStringInfo(&buf, rel->definition + rel->entries[i],
								   (int) (rel->entries[i + 1] - rel->entries[i]));
	partial->definition = buf.data;
	partial->definition_length = (uint32) buf.len;
}

RelationEncoder *
BuildPartial(const RelationEncoder *rel, const Bitmapset *sparing)
{
	RelationEncoder *partial = (RelationEncoder *) palloc0(sizeof(RelationEncoder));

	partial->serial = ++last_serial;
	partial->partial = true;
	partial->sparing = bms_copy(sparing);
	partial->columns = (ColumnEncoder *) palloc0(sizeof(ColumnEncoder) * rel->n_columns);
	for (int i = 0; i < rel->n_columns; i++)
	{
		if (bms_is_member(i, sparing))
			continue;
		ColumnEncoder *column = &partial->columns[partial->n_columns++];

		*column = rel->columns[i];
		fmgr_info_copy(&column->output, &rel->columns[i].output, CurrentMemoryContext);
		partial->settings |= column->settings;
	}
	SpareInDefinition(partial, rel);
	return partial;
}

} // namespace mmrepl::change
