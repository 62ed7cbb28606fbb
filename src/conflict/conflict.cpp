/*
 * conflict.cpp
 *		The policy: what is done about a conflict.
 */
#include "mmrepl/conflict.hpp"

namespace mmrepl::conflict
{

/* The name in logs and views; never NULL. */
const char *
Name(Type type)
{
	switch (type)
	{
		case Type::InsertExists:
			return "insert_exists";
		case Type::UpdateOriginDiffers:
			return "update_origin_differs";
		case Type::UpdateExists:
			return "update_exists";
		case Type::UpdateMissing:
			return "update_missing";
		case Type::DeleteOriginDiffers:
			return "delete_origin_differs";
		case Type::DeleteMissing:
			return "delete_missing";
		case Type::MultipleUniqueConflicts:
			return "multiple_unique_conflicts";
	}
	return "unknown";
}

/*
 * What "the remote side wins" means.  Where that would take the removal of a
 * row that the change does not name, it is an error.
 */
static Action
RemoteWins(Type type, bool row_known)
{
	switch (type)
	{
		case Type::InsertExists:
		case Type::UpdateOriginDiffers:
		case Type::DeleteOriginDiffers:
			return Action::Apply;
		case Type::UpdateMissing:
			return row_known ? Action::Insert : Action::Skip;
		case Type::DeleteMissing:
			return Action::Skip;
		case Type::UpdateExists:
		case Type::MultipleUniqueConflicts:
			break;
	}
	return Action::Error;
}

/*
 * Total: every type under every rule has an answer.  Nothing is overwritten while
 * the writer can be told that the rows are not what he has seen.
 */
Action
Decide(Type type, change::Conflict rule, bool row_known, bool at_writer)
{
	switch (rule)
	{
		case change::Conflict::ApplyRemote:
			return at_writer ? Action::Error : RemoteWins(type, row_known);
		case change::Conflict::KeepLocal:
			return Action::Skip;
		case change::Conflict::Error:
			break;
	}
	return Action::Error;
}

} // namespace mmrepl::conflict
