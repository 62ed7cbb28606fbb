/*
 * apply_conflict.cpp
 *		A row that is not as the change expects it: what is done, and how it is said.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

using conflict::Action;
using conflict::Type;

/* What the log says was done. */
static const char *
ActionText(const Target *target, Type type, Action action)
{
	if (action == Action::Skip && type == Type::UpdateMissing && target->partial)
		return "The remote change is skipped: what it left unchanged did not come with it.";
	switch (action)
	{
		case Action::Apply:
			return "The remote row replaces the local one.";
		case Action::Insert:
			return "The remote row is inserted.";
		case Action::Skip:
			return "The remote change is skipped.";
		default:
			return "";
	}
}

static bool
IsMissing(Type type)
{
	return type == Type::UpdateMissing || type == Type::DeleteMissing;
}

/*
 * A change that was made in sync mode finds another row here than at the sender,
 * or none.  Its writer is told, and nothing is overwritten.
 */
pg_attribute_noreturn() static void RefuseDifference(Session *session, Target *target, Leaf *leaf,
													 Type type)
{
	char *rows = DescribeRows(session, target, IsMissing(type) ? NULL : leaf);

	ereport(ERROR,
			(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
			 errmsg("could not serialize replicated change: conflict=%s on relation \"%s.%s\"",
					conflict::Name(type), target->schema, target->table),
			 rows ? errdetail("%s", rows) : 0, errtable(target->rel),
			 errhint(
				 "Retry the transaction. If it fails again the rows differ for good: repair the "
				 "row at the peer, or overwrite it with SET LOCAL mmrepl.mode = 'async', assigning "
				 "anew what is in TOAST.")));
}

/* Whether the change is executed inside the transaction that made it, in sync mode. */
static bool
IsAtWriter(const Session *session, const Target *target)
{
	return session->header.Inline() && target->carries_old;
}

/*
 * The change is refused.  An INSERT is refused with the error that the table
 * would have raised itself, so that the sender's user knows it.
 */
pg_attribute_noreturn() static void Refuse(const Target *target, Leaf *leaf, Type type,
										   const char *key)
{
	if (type == Type::InsertExists)
		ereport(ERROR, (errcode(ERRCODE_UNIQUE_VIOLATION),
						errmsg("duplicate key value violates unique constraint \"%s\"",
							   RelationGetRelationName(leaf->index)),
						key ? errdetail("Key %s already exists.", key) : 0,
						errtableconstraint(leaf->info->ri_RelationDesc,
										   RelationGetRelationName(leaf->index))));
	ereport(ERROR,
			(errcode(ERRCODE_MMREPL_CONFLICT),
			 errmsg("conflict detected on relation \"%s.%s\": conflict=%s", target->schema,
					target->table, conflict::Name(type)),
			 key ? errdetail(IsMissing(type)
								 ? "Key %s is not present."
								 : "The row with key %s is not the one that was changed.",
							 key)
				 : 0,
			 errhint("Repair the row here, then call mmrepl.retry_now() or mmrepl.skip() at the "
					 "sending node.")));
}

Action
Resolve(Session *session, Target *target, Leaf *leaf, Type type, TupleTableSlot *row)
{
	MmreplEnsure(!session->ahead, "conflict found ahead of the batch before");
	if (target->carries_old && !session->header.Inline() && IsUndone(session, type))
		return Action::Skip;
	bool row_known = type != Type::DeleteMissing && !target->partial;
	bool at_writer = IsAtWriter(session, target);
	Action action = conflict::Decide(type, target->rule, row_known, at_writer);

	session->conflicts++;
	stats::CountConflict(session->header.node, RelationGetRelid(target->rel));
	if (action == Action::Error && at_writer && type != Type::InsertExists)
		RefuseDifference(session, target, leaf, type);
	if (action == Action::Error)
		Refuse(target, leaf, type, DescribeKey(leaf, row));
	if (guc::log_conflicts)
	{
		char *key = DescribeKey(leaf, row);

		ereport(LOG, (errmsg("conflict detected on relation \"%s.%s\": conflict=%s", target->schema,
							 target->table, conflict::Name(type)),
					  errdetail_log("%s%s%s%s", key ? "Key " : "", key ? key : "", key ? ". " : "",
									ActionText(target, type, action))));
	}
	return action;
}

} // namespace mmrepl::apply
