/*
 * row_filter.cpp
 *		A pair's row filter: from the text that a user wrote to an expression.
 *
 * A filter is stored deparsed, with every name qualified that is not in
 * pg_catalog, and is read and evaluated under fixed settings.  So it means the same
 * in every session, whatever settings the writer has.
 *
 * It may call functions of anybody's making, and to read it is to run code:
 * input functions of literals, functions that are simplified away.  Whoever
 * writes to the table, or happens to make it be read, must not lend them his
 * rights: they run with those of the pair's owner, who answers for the filter.
 */
#include "capture_internal.hpp"

#include "mmrepl/error.hpp"

namespace mmrepl::capture
{

namespace
{

/* Where an error in a filter is, for the error context. */
struct Source
{
	const char *filter;
	const char *table;
};

/* Moves an error's cursor from the user's query into the filter's text. */
void
DescribeSource(void *arg)
{
	const Source *source = static_cast<const Source *>(arg);
	int position = geterrposition();

	if (position > 0)
	{
		errposition(0);
		internalerrposition(position);
		internalerrquery(source->filter);
	}
	errcontext("row_filter of table \"%s\"", source->table);
}

/* Whether the statement is nothing but one expression without a name. */
bool
IsOneExpression(const SelectStmt *select)
{
	if (select->distinctClause != NIL || select->intoClause != NULL || select->fromClause != NIL ||
		select->whereClause != NULL || select->groupClause != NIL || select->havingClause != NULL ||
		select->windowClause != NIL || select->valuesLists != NIL || select->sortClause != NIL ||
		select->limitOffset != NULL || select->limitCount != NULL || select->lockingClause != NIL ||
		select->withClause != NULL || select->op != SETOP_NONE ||
		list_length(select->targetList) != 1)
		return false;
	return linitial_node(ResTarget, select->targetList)->name == NULL;
}

/* The filter's expression, unanalyzed; raises when it is more than one expression. */
Node *
ParseExpression(const char *filter)
{
	List *statements = raw_parser(filter, RAW_PARSE_PLPGSQL_EXPR);
	Node *statement = linitial_node(RawStmt, statements)->stmt;

	if (!IsA(statement, SelectStmt) || !IsOneExpression((SelectStmt *) statement))
		ereport(ERROR, (errcode(ERRCODE_SYNTAX_ERROR), errmsg("row_filter must be one expression"),
						errhint("Write what could stand behind WHERE, without WHERE.")));
	return linitial_node(ResTarget, ((SelectStmt *) statement)->targetList)->val;
}

/* Raises for constructs that need more than the row. */
void
CheckConstructs(const ParseState *pstate)
{
	if (pstate->p_hasSubLinks)
		ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						errmsg("row_filter must not contain a subquery"),
						errhint("Use columns of the row only.")));
	if (pstate->p_hasAggs)
		ereport(ERROR, (errcode(ERRCODE_GROUPING_ERROR),
						errmsg("row_filter must not contain an aggregate function"),
						errhint("Use columns of the row only.")));
	if (pstate->p_hasWindowFuncs)
		ereport(ERROR, (errcode(ERRCODE_WINDOWING_ERROR),
						errmsg("row_filter must not contain a window function"),
						errhint("Use columns of the row only.")));
	if (pstate->p_hasTargetSRFs)
		ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						errmsg("row_filter must not contain a set-returning function"),
						errhint("Use columns of the row only.")));
}

/* Raises for columns whose value a row event does not carry. */
void
CheckColumns(Relation rel, Node *expression)
{
	Bitmapset *used = NULL;
	int member = -1;

	pull_varattnos(expression, 1, &used);
	while ((member = bms_next_member(used, member)) >= 0)
	{
		AttrNumber attnum = member + FirstLowInvalidHeapAttributeNumber;

		if (attnum == 0)
			ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
							errmsg("row_filter must not refer to the whole row"),
							errhint("Name the columns.")));
		if (attnum < 0)
			ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
							errmsg("row_filter must not refer to system columns"),
							errhint("Use columns of the table only.")));
		if (IsVirtualColumn(TupleDescAttr(RelationGetDescr(rel), attnum - 1)))
			ereport(ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg("row_filter must not refer to virtual generated column \"%s\"",
							NameStr(TupleDescAttr(RelationGetDescr(rel), attnum - 1)->attname)),
					 errhint("Use the expression that the column is generated from.")));
	}
}

/*
 * The analyzed boolean expression over the relation's row (Vars of varno 1),
 * names and literals read under the current settings.  An alias may give the columns
 * other names than they have.
 */
Node *
Analyze(Relation rel, const char *filter, Alias *alias)
{
	ParseState *pstate = make_parsestate(NULL);
	ParseNamespaceItem *item;
	Node *expression;

	pstate->p_sourcetext = filter;
	item = addRangeTableEntryForRelation(pstate, rel, AccessShareLock, alias, false, true);
	addNSItemToQuery(pstate, item, false, true, true);
	expression = transformExpr(pstate, ParseExpression(filter), EXPR_KIND_OTHER);
	CheckConstructs(pstate);
	expression = coerce_to_boolean(pstate, expression, "row_filter");
	assign_expr_collations(pstate, expression);
	CheckColumns(rel, expression);
	if (contain_volatile_functions(expression))
		ereport(ERROR, (errcode(ERRCODE_INVALID_OBJECT_DEFINITION),
						errmsg("row_filter must not contain volatile functions"),
						errdetail("Whether a row is replicated must not depend on chance."),
						errhint("Use functions that are IMMUTABLE or STABLE only.")));
	free_parsestate(pstate);
	return expression;
}

/* Callback of check_functions_in_node(): not the server's own, or not immutable. */
bool
IsOtherFunction(Oid function, void *)
{
	return function >= FirstGenbkiObjectId || func_volatile(function) != PROVOLATILE_IMMUTABLE;
}

/*
 * Whether built-in functions for values of any type, as array_eq(), may call code of
 * anybody's making for those of this type.
 */
bool
IsOtherType(Oid type)
{
	Oid base = getBaseType(type);
	Oid element = get_element_type(base);

	if (OidIsValid(element))
		base = getBaseType(element);
	return base == RECORDOID || (base >= FirstGenbkiObjectId && get_typtype(base) != TYPTYPE_ENUM);
}

/*
 * Whether there is more in the expression than columns, constants and built-in
 * immutable functions.  Kinds of nodes that are not named here may do anything.
 */
bool
HasOtherCode(Node *node, void *context)
{
	if (node == NULL)
		return false;
	switch (nodeTag(node))
	{
		case T_Var:
		case T_Const:
			return IsOtherType(exprType(node));
		case T_List:
		case T_FuncExpr:
		case T_OpExpr:
		case T_DistinctExpr:
		case T_NullIfExpr:
		case T_ScalarArrayOpExpr:
		case T_BoolExpr:
		case T_NullTest:
		case T_BooleanTest:
		case T_RelabelType:
		case T_CoalesceExpr:
		case T_CaseExpr:
		case T_CaseWhen:
		case T_CaseTestExpr:
		case T_ArrayExpr:
			return check_functions_in_node(node, IsOtherFunction, NULL) ||
				   WalkExpression(node, HasOtherCode, context);
		default:
			return true;
	}
}

/* For who writes a filter, and for who meets one that does not compile any more. */
constexpr char kHintToWrite[] =
	"Write what could stand behind WHERE in a query of the table, for example row_filter => "
	"'id > 0'.";
constexpr char kHintToChange[] =
	"Put back what the filter needs, or change it: mmrepl.alter_pair(..., row_filter => '...').";

/* Whether the error is about what the filter says. */
bool
IsAboutText(int sqlstate)
{
	int category = ERRCODE_TO_CATEGORY(sqlstate);

	return category == ERRCODE_SYNTAX_ERROR_OR_ACCESS_RULE_VIOLATION ||
		   category == ERRCODE_DATA_EXCEPTION || category == ERRCODE_INVALID_SCHEMA_NAME;
}

/* Raise the error again; those that PostgreSQL's parser raises often have no hint. */
[[noreturn]] void
RaiseWithHint(ErrorData *error, const char *hint)
{
	if (error->hint == NULL && IsAboutText(error->sqlerrcode))
		error->hint = pstrdup(hint);
	ReThrowError(error);
}

/* Run fn while errors are placed in the filter's text, and get the hint if they have none. */
template <typename Fn>
auto
WithSource(Relation rel, const char *filter, const char *hint, Fn fn)
{
	Source source = {filter, RelationGetRelationName(rel)};
	ErrorContextCallback callback = {error_context_stack, DescribeSource, &source};
	decltype(fn()) result = {};

	error_context_stack = &callback;
	ErrorData *error = Caught([&] { result = fn(); });

	error_context_stack = callback.previous;
	if (error != NULL)
		RaiseWithHint(error, hint);
	return result;
}

/* The expression as text that means the same under the fixed settings. */
char *
Deparse(Relation rel, Node *expression)
{
	int nest_level = change::BeginTextFormat(change::kAllSettings);
	List *context = deparse_context_for(RelationGetRelationName(rel), RelationGetRelid(rel));
	char *result = deparse_expression(expression, context, false, false);

	change::EndTextFormat(nest_level);
	return result;
}

/* An alias under which one column still has its old name. */
Alias *
AliasBeforeRename(Relation rel, const char *old_name, const char *new_name)
{
	TupleDesc desc = RelationGetDescr(rel);
	List *names = NIL;

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attribute = TupleDescAttr(desc, i);
		const char *name = NameStr(attribute->attname);

		if (!attribute->attisdropped)
			names =
				lappend(names, makeString(pstrdup(strcmp(name, new_name) == 0 ? old_name : name)));
	}
	return makeAlias(RelationGetRelationName(rel), names);
}

} // namespace

/* The simplified expression, made ready; raises when it does not compile any more. */
Filter
CompileFilter(Relation rel, const char *filter, Oid owner)
{
	return WithSource(rel, filter, kHintToChange, [&] {
		return AsOwner(owner, change::kAllSettings, [&] {
			Expr *expression = expression_planner((Expr *) Analyze(rel, filter, NULL));

			return Filter{ExecInitExpr(expression, NULL), HasOtherCode((Node *) expression, NULL)};
		});
	});
}

/* Nothing is simplified: that would run the functions in it. */
void
CheckFilter(Relation rel, const char *filter, Oid owner)
{
	(void) WithSource(rel, filter, kHintToChange, [&] {
		return AsOwner(owner, change::kAllSettings, [&] { return Analyze(rel, filter, NULL); });
	});
}

/* A user's filter in the form in which it is stored; raises when it is not acceptable. */
char *
CanonicalFilter(Relation rel, const char *filter, Oid owner)
{
	Node *expression = WithSource(rel, filter, kHintToWrite, [&] {
		return AsOwner(owner, change::kNoSettings, [&] { return Analyze(rel, filter, NULL); });
	});
	char *result = Deparse(rel, expression);

	(void) CompileFilter(rel, result, owner);
	return result;
}

/* A stored filter after a column's rename, in the form in which it is stored. */
char *
RenameInFilter(Relation rel, const char *filter, Oid owner, const char *old_name,
			   const char *new_name)
{
	Alias *alias = AliasBeforeRename(rel, old_name, new_name);
	Node *expression = WithSource(rel, filter, kHintToChange, [&] {
		return AsOwner(owner, change::kAllSettings, [&] { return Analyze(rel, filter, alias); });
	});

	return Deparse(rel, expression);
}

} // namespace mmrepl::capture
