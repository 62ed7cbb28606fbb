/*
 * sync_protocol.pml
 *		Synchronous transactions of one stream: marker, outbox-backed last agent, two
 *		phases, recovery, the worker's replay, zombies, crashes of either node.
 *
 * doc/spec/README.md says what is modelled; doc/spec/check runs everything.
 * Beside each step stands the C++ function that it models.  A step is one look at,
 * or change of, what others see.
 *
 * A configuration is given by -D:
 *	 TWO		bit mask: transactions that are prepared at the peer
 *	 ASYNC		bit mask: transactions that are queued only
 *	 SAME_ROW	they all write one row, so that each waits for the one before
 *	 CRASHES	how often the source dies
 *	 PEER		how often the peer dies
 *	 LOSSES		how often a session loses its connection, or its patience
 *	 BREAKS		how often the worker loses its connection
 *	 TRAP_n		a mistake, see README.md
 */
#define N 2

#ifndef TWO
#define TWO 0
#endif
#ifndef ASYNC
#define ASYNC 0
#endif
#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef PEER
#define PEER 0
#endif
#ifndef LOSSES
#define LOSSES 0
#endif
#ifndef BREAKS
#define BREAKS 0
#endif

#define BIT(i)	  (1 << (i))
#define HAS(m, i) (((m) >> (i)) & 1)
#define TWO_PHASE(i) HAS(TWO, i)
#define QUEUED(i)	 HAS(ASYNC, i)
#define NONE		 N
#define ALL			 (BIT(N) - 1)
#define OTHER(i)	 (1 - (i))

/* ---- the source: what is durable ---- */

byte record;   /* commit record and head row are in the flushed WAL */
byte heads;	   /* of these: with a head row, the queued copy */
byte flushed;  /* transaction ids up to this one outlive a crash */

/* ---- the source: shared memory ---- */

byte begun;		/* transactions that have an id */
byte running;	/* of these: in the proc array */
byte number[N]; /* the transaction id, from 1 */
byte next = 1;	/* next id */
byte ended;		/* sessions that are at their end */
byte infl;		/* InFlight: ticket drawn, not settled */
byte ticket[N]; /* from 1, 0: none */
byte last;		/* Stream.last_ticket */
byte fate;		/* settled as Delivered */
byte settled;	/* Settle was called */
byte confirmed; /* Stream.confirmed */
bool request;	/* Stream.recovery_requests */
byte deps[N];	/* what was visible when the transaction last passed the fence */
byte row;		/* SAME_ROW: who has the row's lock here, from 1 */

/* ---- between the nodes ---- */

mtype = { Exec, Prepare, Commit, CommitPrepared, Rollback, RollbackPrepared, Ok, Error };
chan wire[N] = [1] of { mtype };   /* a session's command on its way */
chan answer[N] = [1] of { mtype };
byte open;		/* sessions that hold their connection */
bool sent;		/* the worker's batch is on its way: */
byte sent_t;	/* a transaction, NONE: a sweep */
byte sent_upto; /* the watermark after it */
bool done;		/* its answer is */
bool z_sent;	/* the same of a connection that the worker gave up */
byte z_t, z_upto;
bool lost; /* the worker's connection is gone */

/* ---- the peer ---- */

byte work;		/* remote transactions that are open */
byte prepared;	/* durable */
byte locked;	/* of both: their rows are written */
byte marked;	/* of both: the marker is inserted */
byte markers;	/* committed ones, by transaction id */
byte applied;	/* whose rows are committed */
byte watermark; /* mmrepl.progress */
byte sweep;		/* what the sweep removes, by transaction id */
#ifdef TRAP_1
byte holding; /* the marker that the worker's apply() has inserted */
#endif

byte crashes = CRASHES, peer_crashes = PEER, losses = LOSSES, breaks = BREAKS;
byte dead;		  /* sessions that died with the source */
bool worker_dead; /* and its worker */
bool finished;

#define COMMITTED (record & ~running)
/* Somebody holds, uncommitted, a marker with the id of i. */
#define MARKER_HELD(i)                                                                             \
	(HAS(marked, i) || (HAS(marked, OTHER(i)) && number[OTHER(i)] == number[i]))
#ifdef SAME_ROW
#define ROW_FREE(i) !HAS(locked, OTHER(i))
#else
#define ROW_FREE(i) true
#endif
#define RUNS(i) (HAS(running, i) || HAS(infl, i))

/* ---- what must hold when rows become visible at the peer ---- */

inline Applied(i)
{
	assert(HAS(record, i)); /* never there, but not here */
	assert(!HAS(applied, i)); /* not twice */
	assert((deps[i] & record & ~applied) == 0); /* not before what it depends on */
	applied = applied | BIT(i);
	deps[i] = 0
}

/* The remote transaction is no more. */
inline Gone(i)
{
	work = work & ~BIT(i);
	prepared = prepared & ~BIT(i);
	locked = locked & ~BIT(i);
	marked = marked & ~BIT(i)
}

inline CommitThere(i)
{
	Gone(i);
	markers = markers | BIT(number[i]);
	Applied(i)
}

/* What two phases promise: the locks stay until the end that the source has decided. */
inline RollBackThere(i)
{
	assert(!HAS(running | record, i));
	Gone(i)
}

/* ---- a session at the source ---- */

/* Send a command and wait for the answer: `good` tells whether it was confirmed. */
inline Ask(i, command)
{
	atomic {
		if
		:: HAS(open, i) -> wire[i]!command
		:: else
		fi
	};
	if
	:: atomic { answer[i]?[Ok] -> answer[i]?_; good = true }
	:: atomic { answer[i]?[Error] -> answer[i]?_; good = false }
	:: atomic { !HAS(open, i) && empty(answer[i]) -> good = false }
	:: atomic { HAS(open, i) && losses > 0 -> losses--; open = open & ~BIT(i); good = false }
	fi
}

/* PassFence: nothing is on its way, and nothing that was queued is unconfirmed (Reached). */
inline PassFence(i)
{
	atomic {
#ifndef TRAP_8
		infl == 0 && (!HAS(record & ~fate, OTHER(i)) || HAS(running, OTHER(i)) ||
					  ticket[OTHER(i)] <= confirmed);
#endif
		deps[i] = COMMITTED
	}
}

/* AbortTransaction, then OnXactEvent(ABORT): sync::Abort, CallRecovery. */
inline AbortHere(i)
{
	running = running & ~BIT(i);
	if
	:: phase == 0 -> Ask(i, Rollback)
	:: phase == 2 -> Ask(i, RollbackPrepared)
	:: phase == 1 -> good = false
	fi;
	d_step {
		if
		:: phase != 0 && !good -> request = true
		:: else
		fi;
		infl = infl & ~BIT(i)
	};
	goto over
}

proctype Session(byte i)
{
	byte phase = 0; /* sync::Phase: Open, Preparing, Prepared */
	bool good = false;

	{
#ifdef SAME_ROW
	atomic { row == 0 -> row = i + 1 };
#endif
	d_step { /* GetTopFullTransactionId */
		begun = begun | BIT(i);
		running = running | BIT(i);
		number[i] = next;
		next++
	};
	if
	:: QUEUED(i) -> goto commit
	:: else
	fi;
	PassFence(i);
	open = open | BIT(i);
	Ask(i, Exec); /* Flush, SendPart */
	if
	:: !good -> AbortHere(i)
	:: else
	fi;
#ifdef TRAP_10
	Ask(i, Commit);
#else
	if
	:: !TWO_PHASE(i) -> goto commit
	:: else
	fi;
#ifndef TRAP_7
	d_step { /* FinishInline: XLogFlush */
		if
		:: flushed < number[i] -> flushed = number[i]
		:: else
		fi
	};
#endif
	phase = 1;
	Ask(i, Prepare); /* SendPrepare, Collect */
	if
	:: !good -> AbortHere(i)
	:: else
	fi;
	phase = 2;
#endif
commit:
	skip;
	d_step { /* DrawTicket */
		last++;
		ticket[i] = last;
		infl = infl | BIT(i);
		if
		:: QUEUED(i) -> deps[i] = COMMITTED
		:: else
		fi
	};
	if
	:: true -> AbortHere(i) /* a serialization failure, a cancel, another extension */
	:: d_step { true -> /* the commit record, flushed: ForceSyncCommit */
		record = record | BIT(i);
		if
		:: flushed < number[i] -> flushed = number[i]
		:: else
		fi
	}
	fi;
	/* ... here it may wait for a standby ... */
	running = running & ~BIT(i); /* ProcArrayEndTransaction: visible */
#ifdef TRAP_9
	infl = infl & ~BIT(i);
#endif
#ifndef TRAP_10
	if /* OnXactEvent(COMMIT), EndInline, sync::Commit */
	:: QUEUED(i) -> good = false
	:: else ->
		if
		:: TWO_PHASE(i) -> Ask(i, CommitPrepared)
		:: else -> Ask(i, Commit)
		fi
	fi;
#endif
	d_step { /* Settle */
		if
		:: good -> fate = fate | BIT(i)
		:: else
		fi;
		settled = settled | BIT(i)
	};
	d_step { /* SettleTicket, CallRecovery */
		infl = infl & ~BIT(i);
		if
		:: TWO_PHASE(i) && !good -> request = true
		:: else
		fi
	};
over:
	skip
	} unless { HAS(dead, i) };
	d_step {
		open = open & ~BIT(i);
		ended = ended | BIT(i);
		if
		:: row == i + 1 -> row = 0
		:: else
		fi;
		phase = 0;
		good = false
	}
}

/* ---- the peer ---- */

inline Reply(i, what)
{
	if
	:: HAS(open, i) -> answer[i]!what
	:: else
	fi
}

/* What waits for the marker of t waits for its holder's end (InsertMarker). */
#ifdef TRAP_4
#define MARKER_FREE(t) true
#else
#define MARKER_FREE(t) !MARKER_HELD(t)
#endif

/* apply() of the worker's batch, one transaction: Admit, ApplySegment, SaveProgress, SweepMarkers. */
inline ApplyBatch(t, upto)
{
	if
	:: t == NONE ->
		markers = markers & ~sweep;
		sweep = 0
	:: t != NONE && ticket[t] <= watermark
	:: t != NONE && ticket[t] > watermark && !QUEUED(t) && HAS(markers, number[t])
	:: else ->
		if
		:: !QUEUED(t) -> markers = markers | BIT(number[t])
		:: else
		fi;
		Applied(t)
	fi;
	if
	:: upto > watermark -> watermark = upto
	:: else
	fi
}

#define MAY_APPLY(t) (t == NONE || (QUEUED(t) && ROW_FREE(t)) || (MARKER_FREE(t) && ROW_FREE(t)))

proctype Remote(byte i)
{
end_remote:
	do
	/* Marker, then rows (InsertMarker, ApplySegment). */
	:: atomic { wire[i]?[Exec] && MARKER_FREE(i) && ROW_FREE(i) ->
		wire[i]?_;
		work = work | BIT(i);
		locked = locked | BIT(i);
#ifndef TRAP_1
		marked = marked | BIT(i);
#endif
		Reply(i, Ok)
	}
	:: atomic { wire[i]?[Prepare] ->
		wire[i]?_;
		if
		:: !HAS(work, i) -> Reply(i, Error)
		:: HAS(work, i) && HAS(prepared, OTHER(i)) && number[OTHER(i)] == number[i] ->
			Gone(i); /* the name is in use */
			Reply(i, Error)
		:: else ->
			work = work & ~BIT(i);
			prepared = prepared | BIT(i);
			Reply(i, Ok)
		fi
	}
#ifdef TRAP_1
	/* The marker comes with the commit; who replays holds it until he has the rows. */
	:: atomic { wire[i]?[Commit] && holding != number[i] ->
#else
	:: atomic { wire[i]?[Commit] ->
#endif
		wire[i]?_;
		if
		:: HAS(work, i) -> CommitThere(i); Reply(i, Ok)
		:: else -> Reply(i, Error)
		fi
	}
	:: atomic { wire[i]?[CommitPrepared] ->
		wire[i]?_;
		if
		:: HAS(prepared, i) -> CommitThere(i); Reply(i, Ok)
		:: else -> Reply(i, Error)
		fi
	}
	:: atomic { wire[i]?[Rollback] -> wire[i]?_; Gone(i); Reply(i, Ok) }
	:: atomic { wire[i]?[RollbackPrepared] ->
		wire[i]?_;
		if
		:: HAS(prepared, i) -> RollBackThere(i); Reply(i, Ok)
		:: else -> Reply(i, Error)
		fi
	}
	/* What was sent before the connection was given up arrives late, or never. */
#ifdef TRAP_1
	:: atomic { !HAS(open, i) && nempty(wire[i]) && !(wire[i]?[Commit] && holding == number[i]) ->
#else
	:: atomic { !HAS(open, i) && nempty(wire[i]) ->
#endif
		wire[i]?_
	}
	:: atomic { !HAS(open, i) && nempty(answer[i]) -> answer[i]?_ }
	/* Then the session sees that nobody is there. */
	:: atomic { !HAS(open, i) && empty(wire[i]) && HAS(work, i) -> Gone(i) }
	od
}

proctype Apply()
{
end_apply:
	do
#ifdef TRAP_1
	:: atomic { sent && holding == 0 && sent_t != NONE && !QUEUED(sent_t) &&
			!HAS(markers, number[sent_t]) && MARKER_FREE(sent_t) -> holding = number[sent_t] }
	:: atomic { sent && holding != 0 && !HAS(locked, sent_t) ->
		holding = 0; ApplyBatch(sent_t, sent_upto); sent = false; done = true }
	:: atomic { sent && holding == 0 && (sent_t == NONE || QUEUED(sent_t) ||
			HAS(markers, number[sent_t])) ->
#else
	:: atomic { sent && MAY_APPLY(sent_t) ->
#endif
		ApplyBatch(sent_t, sent_upto);
		sent = false;
		done = true
	}
	:: atomic { z_sent && MAY_APPLY(z_t) ->
		ApplyBatch(z_t, z_upto);
		z_sent = false; z_t = 0; z_upto = 0
	}
	:: atomic { z_sent -> z_sent = false; z_t = 0; z_upto = 0 }
	od
}

/* ---- the worker ---- */

/* Something is prepared there whose end is known here: the next look finds it (PlanRecovery). */
#ifdef TRAP_11
#define LOOK_DUE request
#else
#define ENDED_HERE(i) (HAS(prepared & ~running & ~infl, i) && number[i] < next)
#define LOOK_DUE	  (request || ENDED_HERE(0) || ENDED_HERE(1))
#endif

#ifdef TRAP_12
#define MAY_LOOK (!sent && !done)
#else
#define MAY_LOOK true /* over a connection of its own: LookBeside */
#endif

/* The first transaction behind the position: settled, and nothing before it is in flight. */
#define READY(t)                                                                                   \
	(HAS(COMMITTED & settled, t) && ticket[t] > position &&                                        \
	 !(HAS(infl, OTHER(t)) && ticket[OTHER(t)] < ticket[t]) &&                                     \
	 !(HAS(COMMITTED, OTHER(t)) && ticket[OTHER(t)] > position && ticket[OTHER(t)] < ticket[t]))

#define SAME(i) (BIT(i) | (number[OTHER(i)] == number[i] && HAS(begun, OTHER(i)) -> BIT(OTHER(i)) : 0))

/* RecoverPrepared of one: Decide, EndOne. */
inline Resolve(i)
{
	if
	:: HAS(found, i) ->
		/* AskLog: the transaction with this id */
#ifdef TRAP_6
		runs = false;
#else
		runs = (running & SAME(i)) != 0;
#endif
		d_step { /* FindHeads, IsInFlight */
#ifdef TRAP_2
			known = false;
#else
			known = (COMMITTED & SAME(i) & TWO) != 0;
#endif
#ifndef TRAP_6
			runs = runs || (known && (infl & SAME(i)) != 0)
#endif
		};
		atomic { /* EndPrepared */
			if
			:: lost || runs || !HAS(prepared, i)
#ifdef TRAP_3
			:: else -> CommitThere(i)
#else
			:: number[i] >= next /* WasUsed: nobody guesses */
			:: !lost && !runs && HAS(prepared, i) && number[i] < next && known -> CommitThere(i)
			:: !lost && !runs && HAS(prepared, i) && number[i] < next && !known -> RollBackThere(i)
#endif
			fi;
			runs = false;
			known = false
		}
	:: else
	fi
}

inline Look()
{
	d_step { request = false; found = prepared }; /* ListPrepared */
	Resolve(0);
	Resolve(1);
	found = 0
}

inline Send(t)
{
	d_step {
		if
		:: HAS(fate, t) -> position = ticket[t]; confirmed = position
		:: else ->
			sent = true;
			sent_t = t;
			sent_upto = ticket[t];
			position = ticket[t]
		fi
	}
}

proctype Worker()
{
	byte position = 0, found = 0, sweep_ids = 0, sweep_after = 0;
	bool runs = false, known = false, chosen = false;

again:
	{
	skip;
connect:
	skip;
	d_step { /* OpenPeer, Greet */
		lost = false;
		sent = false;
		done = false;
		position = (confirmed > watermark -> confirmed : watermark);
		sweep_ids = 0;
		sweep_after = 0
	};
	Look();
	do
	:: atomic { lost -> goto connect }
	:: atomic { !lost && MAY_LOOK && LOOK_DUE -> skip }; Look()
	:: atomic { !lost && !sent && !done && READY(0) -> Send(0) }
	:: atomic { !lost && !sent && !done && READY(1) -> Send(1) }
	:: d_step { !lost && done -> /* Applied */
		done = false;
		if
		:: sent_upto > confirmed -> confirmed = sent_upto
		:: else
		fi;
		sent_t = 0;
		sent_upto = 0
	}
	:: d_step { !lost && !sent && !done && infl == 0 && confirmed < last &&
			!READY(0) && !READY(1) && (record & running) == 0 -> /* ConfirmPassed */
		position = last;
		confirmed = last
	}
	:: d_step { !chosen && !lost && markers != 0 -> /* ChooseSweep: ids below the oldest running one */
		chosen = true;
		sweep_ids = (next > 1 -> 2 : 0) | (next > 2 -> 4 : 0) | (next > 3 -> 8 : 0);
		if
		:: HAS(running, 0) -> sweep_ids = sweep_ids & (BIT(number[0]) - 1)
		:: else
		fi;
		if
		:: HAS(running, 1) -> sweep_ids = sweep_ids & (BIT(number[1]) - 1)
		:: else
		fi;
		sweep_after = last
	}
#ifdef TRAP_5
	:: d_step { sweep_ids != 0 && !lost && !sent && !done ->
#else
	:: d_step { sweep_ids != 0 && !lost && !sent && !done && confirmed >= sweep_after -> /* SweepShipment */
#endif
		sweep = sweep_ids;
		sweep_ids = 0;
		sent = true;
		sent_t = NONE;
		sent_upto = position
	}
	:: atomic { !lost && breaks > 0 && ended != ALL -> /* Fail, DropPeer */
		breaks--;
		if
		:: sent && !z_sent -> z_sent = true; z_t = sent_t; z_upto = sent_upto
		:: true
		fi;
		sent = false;
		done = false;
		lost = true
	}
	:: atomic { ended == ALL && !lost && !request && prepared == 0 && work == 0 && empty(wire[0]) &&
			empty(wire[1]) && !sent && !done && !z_sent && (record == 0 || position >= last) &&
			confirmed >= position ->
		break
	}
	od;
	skip; /* At the end both sides are equal. */
	d_step {
		assert(applied == record);
		assert(locked == 0 && marked == 0);
		finished = true
	}
	} unless { worker_dead };
	if
	:: d_step { worker_dead -> worker_dead = false; found = 0; runs = false; known = false; position = 0;
		chosen = false; sweep_ids = 0; sweep_after = 0 };
		goto again
	:: finished
	fi
}

/* ---- what dies ---- */

/* Shared memory is lost, and every transaction id that no flushed WAL tells of. */
inline SourceDies()
{
	d_step {
		crashes--;
		dead = begun & ~ended;
		running = 0;
		infl = 0;
		settled = record;
		fate = 0;
		confirmed = 0;
		request = false;
		open = 0;
		next = flushed + 1;
		worker_dead = true;
		if
		:: sent && !z_sent -> z_sent = true; z_t = sent_t; z_upto = sent_upto
		:: else
		fi;
		sent = false;
		done = false;
		sent_t = 0;
		sent_upto = 0;
		lost = true
	}
}

/* Prepared transactions and what is committed outlive it. */
inline PeerDies()
{
	d_step {
		peer_crashes--;
		work = 0;
		locked = locked & prepared;
		marked = marked & prepared;
		open = 0;
		if
		:: nempty(wire[0]) -> wire[0]?_
		:: empty(wire[0])
		fi;
		if
		:: nempty(wire[1]) -> wire[1]?_
		:: empty(wire[1])
		fi;
		if
		:: nempty(answer[0]) -> answer[0]?_
		:: empty(answer[0])
		fi;
		if
		:: nempty(answer[1]) -> answer[1]?_
		:: empty(answer[1])
		fi;
		z_sent = false;
		z_t = 0;
		z_upto = 0;
		sent = false;
		sent_t = 0;
		sent_upto = 0;
#ifdef TRAP_1
		holding = 0;
#endif
		done = false;
		lost = true
	}
}

proctype Fate()
{
end_fate:
	do
	:: atomic { crashes > 0 && !finished && begun != 0 -> SourceDies() }
	:: atomic { peer_crashes > 0 && !finished && begun != 0 -> PeerDies() }
	:: finished -> break
	od
}

init
{
	atomic {
		run Session(0);
		run Session(1);
		run Remote(0);
		run Remote(1);
		run Apply();
		run Worker();
#if CRASHES + PEER > 0
		run Fate()
#endif
	}
}
