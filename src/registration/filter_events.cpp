/*
 * filter_events.cpp
 *		What row filters need stays: DDL after which a filter would not compile
 *		is refused.
 *
 * Nobody's command is to fail, or to wait, because of a filter that has nothing
 * to do with it.  So it is the names that the command has touched which tell the
 * filters that are looked at; and a filter that its owner may not use, since he
 * lost a right, is no reason to refuse anything.
 */
#include "registration_internal.hpp"

namespace mmrepl::registration
{

namespace
{

/* Whether the two characters could be next to each other in one name, or in one operator. */
bool
GoTogether(unsigned char a, unsigned char b)
{
	auto in_name = [](unsigned char c) { return isalnum(c) || c == '_' || c == '$' || c >= 0x80; };
	auto in_operator = [](unsigned char c) {
		return c != 0 && strchr("+-*/<>=~!@#%^&|`?", c) != NULL;
	};

	return (in_name(a) && in_name(b)) || (in_operator(a) && in_operator(b));
}

/* Whether the word stands in the text, and is not a part of another one. */
bool
HasWord(const char *text, const char *word)
{
	size_t length = strlen(word);

	for (const char *at = text; (at = strstr(at, word)) != NULL; at++)
	{
		if ((at == text || !GoTogether(at[-1], word[0])) &&
			!GoTogether(word[length - 1], at[length]))
			return true;
	}
	return false;
}

/*
 * Whether the text may name it, ".x" being a column or an attribute x.  Names are quoted
 * there where they have to be, whatever quote_all_identifiers is now.
 */
bool
MayName(const char *filter, const char *name)
{
	const char *dot = name[0] == '.' ? "." : "";
	const char *quoted = psprintf("%s%s", dot, quote_identifier(name + strlen(dot)));

	return HasWord(filter, name) || HasWord(filter, quoted);
}

/* Whether the text may name one of them. */
bool
MayNameOneOf(const char *filter, const List *names)
{
	ListCell *cell;

	foreach(cell, names)
	{
		if (MayName(filter, (const char *) lfirst(cell)))
			return true;
	}
	return false;
}

/* Raise when something that the filter needs is missing.  The table is locked. */
void
RequireFilter(const PairRow &row)
{
	Relation rel = try_relation_open(row.table, NoLock);

	if (rel == NULL)
		return;
	/* Those that do not capture may be in any state: a restore is under way. */
	if (OidIsValid(FindPairTriggers(rel).row))
	{
		ErrorData *error = Attempted([&] { RevalidateFilter(rel, row); });

		if (error != NULL && error->sqlerrcode != ERRCODE_INSUFFICIENT_PRIVILEGE)
			ReThrowError(error);
	}
	relation_close(rel, NoLock);
}

/* The names, or the last parts of qualified ones, that the parse tree of an object's name holds. */
List *
NameOf(Node *object)
{
	if (IsA(object, ObjectWithArgs))
		object = (Node *) ((ObjectWithArgs *) object)->objname;
	if (IsA(object, List))
		object = (Node *) llast((List *) object);
	return IsA(object, String) ? list_make1(strVal(object)) : NIL;
}

/* Whether a filter may name an object of the kind, or name another one in its schema. */
bool
IsOfFilters(ObjectType type)
{
	switch (type)
	{
		case OBJECT_COLLATION:
		case OBJECT_DOMAIN:
		case OBJECT_EXTENSION:
		case OBJECT_FUNCTION:
		case OBJECT_OPERATOR:
		case OBJECT_ROUTINE:
		case OBJECT_SCHEMA:
		case OBJECT_TYPE:
			return true;
		default:
			return false;
	}
}

/* Look at the filters that may name one of these; `all`: at all the others too that can be locked at once. */
void
RequireFilters(const List *names, bool all)
{
	ListCell *cell;

	foreach(cell, AllPairRows())
	{
		const PairRow *row = (const PairRow *) lfirst(cell);

		if (!row->enabled || row->row_filter == NULL)
			continue;
		if (MayNameOneOf(row->row_filter, names))
			LockRelationOid(row->table, AccessShareLock);
		else if (!all || !ConditionalLockRelationOid(row->table, AccessShareLock))
			continue;
		RequireFilter(*row);
	}
}

} // namespace

/*
 * A function was made, replaced or altered: it may be volatile now, or be called in
 * another one's place.  Or a value of a type has another name.
 */
void
RequireFiltersNaming(const List *name)
{
	if (catalog::ExtensionExists())
		RequireFilters(list_make1(strVal(llast(name))), false);
}

/* A column or an attribute was renamed: it may be named inside of another column, which does not follow. */
void
RequireFiltersInside(const char *name)
{
	RequireFilters(list_make1(psprintf(".%s", name)), false);
}

/* The new name may hide another object. */
void
RequireFiltersAfterRename(const RenameStmt *statement)
{
	if (!IsOfFilters(statement->renameType) || !catalog::ExtensionExists())
		return;

	List *names = statement->renameType == OBJECT_SCHEMA ? list_make1(statement->subname)
														 : NameOf(statement->object);

	RequireFilters(lappend(names, statement->newname), false);
}

/* What an extension has is not told by its name. */
void
RequireFiltersAfterMove(const AlterObjectSchemaStmt *statement)
{
	if (IsOfFilters(statement->objectType) && catalog::ExtensionExists())
		RequireFilters(NameOf(statement->object), statement->objectType == OBJECT_EXTENSION);
}

/* What a cast is needed for is not seen in the text. */
void
RequireFiltersAfterDrop()
{
	ListCell *cell;

	foreach(cell, AllPairRows())
	{
		if (((const PairRow *) lfirst(cell))->row_filter == NULL)
			continue;

		catalog::Dropped dropped = catalog::WhatWasDropped();

		RequireFilters(dropped.names, dropped.cast);
		return;
	}
}

} // namespace mmrepl::registration
