/*
 * apply_trigger.cpp
 *		Which triggers fire when a peer's changes are written, and when.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

/* Whether the trigger captures changes for a pair. */
static bool
IsOurTrigger(const Trigger *trigger)
{
	return get_func_namespace(trigger->tgfoid) == catalog::GetRelations().schema;
}

/* Whether the trigger is the second look at a deferrable constraint. */
static bool
IsRecheck(const Trigger *trigger)
{
	return trigger->tgfoid == F_UNIQUE_KEY_RECHECK && trigger->tgdeferrable;
}

/* Whether the trigger is enabled in replica role. */
static bool
FiresOnReplica(const Trigger *trigger)
{
	return trigger->tgenabled == TRIGGER_FIRES_ALWAYS ||
		   trigger->tgenabled == TRIGGER_FIRES_ON_REPLICA;
}

/* Whether a check of the index runs no code but the server's. */
static bool
IsPlainIndex(Oid index_oid)
{
	Relation index = index_open(index_oid, AccessShareLock);
	bool plain = heap_attisnull(index->rd_indextuple, Anum_pg_index_indexprs, NULL) &&
				 heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL);

	index_close(index, NoLock);
	return plain;
}

/*
 * The recheck of a deferrable unique constraint is an ordinary trigger, which
 * replica role would silence, and duplicates would stay: it is made to fire.
 * It waits for the transaction's end, because rows come one by one that changed
 * places in one statement; inline no longer than for the end of the statement,
 * if the constraint does not.  It does not wait if that would run an untrusted
 * owner's code when nobody guards against it any more.
 */
static void
TuneRecheck(const Session *session, Target *target, const Leaf *leaf, Trigger *trigger)
{
	bool may_wait = (target->trusted || !leaf->fires) && IsPlainIndex(trigger->tgconstrindid);
	bool at_statement = session->header.Inline() && !session->header.More() && !leaf->fires;

	trigger->tgenabled = TRIGGER_FIRES_ALWAYS;
	trigger->tgdeferrable = may_wait;
	trigger->tginitdeferred = may_wait && (trigger->tginitdeferred || !at_statement);
	target->rechecks_now |= !may_wait;
}

/* Whether the trigger checks a foreign key, as opposed to acting on one. */
static bool
ChecksForeignKey(const Trigger *trigger)
{
	switch (trigger->tgfoid)
	{
		case F_RI_FKEY_CHECK_INS:
		case F_RI_FKEY_CHECK_UPD:
		case F_RI_FKEY_NOACTION_DEL:
		case F_RI_FKEY_NOACTION_UPD:
		case F_RI_FKEY_RESTRICT_DEL:
		case F_RI_FKEY_RESTRICT_UPD:
			return trigger->tgenabled == TRIGGER_FIRES_ON_ORIGIN ||
				   trigger->tgenabled == TRIGGER_FIRES_ALWAYS;
		default:
			return false;
	}
}

/*
 * A foreign key is checked while there is somebody to be told: when the batch
 * is through, or at the transaction's end if the constraint says so.  The latter
 * also where the batch is not a whole statement, or where events are fired row
 * by row (which an untrusted owner's have to be, and at once).
 */
static void
TuneForeignKey(const Session *session, Target *target, Leaf *leaf, Trigger *trigger)
{
	trigger->tgenabled = TRIGGER_FIRES_ALWAYS;
	leaf->queues = true;
	if (leaf->fires && !target->trusted)
		trigger->tgdeferrable = trigger->tginitdeferred = false;
	else if (leaf->fires || session->header.More())
		trigger->tgdeferrable = trigger->tginitdeferred = true;
}

/* Leave in the leaf's private copy of the triggers those that check something. */
static void
TuneChecks(Session *session, Target *target, Leaf *leaf, TriggerDesc *triggers)
{
	for (int i = 0; i < triggers->numtriggers; i++)
	{
		Trigger *trigger = &triggers->triggers[i];

		if (IsRecheck(trigger))
		{
			TuneRecheck(session, target, leaf, trigger);
			leaf->queues = true;
		}
		else if (session->header.Inline() && ChecksForeignKey(trigger))
			TuneForeignKey(session, target, leaf, trigger);
		else
			continue;
		session->may_defer |= trigger->tginitdeferred;
	}
}

/*
 * Leave in the leaf's private copy of the triggers those that have work to do
 * in replica role.  Our own would only return.
 */
void
TuneTriggers(Session *session, Target *target, Leaf *leaf)
{
	TriggerDesc *triggers = leaf->info->ri_TrigDesc;
	int count = triggers ? triggers->numtriggers : 0;

	for (int i = 0; i < count; i++)
	{
		Trigger *trigger = &triggers->triggers[i];

		if (IsOurTrigger(trigger))
			trigger->tgenabled = TRIGGER_DISABLED;
		else if (TRIGGER_FOR_ROW(trigger->tgtype) && FiresOnReplica(trigger))
			leaf->fires = leaf->queues = true;
	}
	target->fires |= leaf->fires;
	session->may_defer |= leaf->fires;
	if (count > 0)
		TuneChecks(session, target, leaf, triggers);
	if (!leaf->queues)
		leaf->info->ri_TrigDesc = NULL;
}

/* Whether row triggers of the table's, which its partitions have too, fire in replica role. */
bool
HasFiringTriggers(Relation rel)
{
	const TriggerDesc *triggers = rel->trigdesc;

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
		if (TRIGGER_FOR_ROW(triggers->triggers[i].tgtype) &&
			!IsOurTrigger(&triggers->triggers[i]) && FiresOnReplica(&triggers->triggers[i]))
			return true;
	return false;
}

/*
 * Whether the events of a change are fired as soon as it is written: triggers of
 * the owner's, which run with the owner's rights, and rechecks that may not wait.
 * Others are fired at the end of the batch.
 */
bool
FiresAtOnce(const Session *session, const Target *target)
{
	if (!session->header.Inline())
		return target->proute != NULL || target->leaves->queues;
	return target->fires || target->rechecks_now || (target->proute != NULL && !target->trusted);
}

/* Of an inline batch: what is checked at the end of a statement is checked at its end. */
void
BeginBatchTriggers(const Session *session)
{
	if (session->header.Inline())
		AfterTriggerBeginQuery();
}

void
EndBatchTriggers(const Session *session)
{
	if (!session->header.Inline())
		return;
	NextCommand();
	AfterTriggerEndQuery(NULL);
}

} // namespace mmrepl::apply
