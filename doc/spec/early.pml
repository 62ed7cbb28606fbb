/*
 * early.pml
 *		What is executed at the peer before it has committed here.
 *
 * doc/spec/README.md says what is modelled; doc/spec/check runs everything.
 * Beside each step stands the C++ function that it models.  A step is one look at,
 * or change of, what others see; the ordinary way of the worker is in larger steps,
 * commit_order.pml has it in small ones.
 *
 * A configuration is given by -D:
 *	 N			transactions, each of a session of its own
 *	 LATE		bit mask: which of them end with PREPARE TRANSACTION
 *	 CRASHES	how often the source dies
 *	 LOSSES		how often the worker loses its connection
 *	 FAILURES	how often the peer fails to execute a batch
 *	 LANES		batches on their way
 *	 CAP		entries that fit into the ring
 *	 NO_ABORTS	every transaction commits, if nothing dies
 *	 TRAP_n		a mistake, see README.md
 */
#ifndef N
#define N 2
#endif
#ifndef LATE
#define LATE 0
#endif
#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef LOSSES
#define LOSSES 0
#endif
#ifndef FAILURES
#define FAILURES 0
#endif
#ifndef LANES
#define LANES 2
#endif
#ifndef CAP
#define CAP 2
#endif

#define BIT(i)		(1 << (i))
#define HAS(m, i)	(((m) >> (i)) & 1)
#define PREPARED(i) HAS(LATE, i)
#define NONE		N

/*
 * Transactions are alike but for LATE: so let them be numbered in the order in
 * which they draw.  Number i has ticket i + 1.
 */
#define TICK(i) ((i) + 1)

/* ---- the source: its WAL ---- */

byte records;  /* commit records */
byte record[N]; /* which one is the transaction's; 0: none */
byte flushed;  /* up to here they are on disk: at least, the rest may be, too */

#define DURABLE(i) (record[i] != 0 && record[i] <= flushed)

/* ---- the source: transactions; sets of them are bit masks ---- */

byte infl;	  /* whose InFlight.ticket is not 0 */
byte vis;	  /* committed and visible */
byte dead;	  /* aborted, or lost in a crash */
byte removed; /* late head row deleted after delivery */
byte deps[N]; /* all that was visible when the ticket was drawn */
byte running; /* sessions not yet at their end */
byte killed;  /* those that a crash has ended */

/* ---- the source: shared memory ---- */

byte last;		 /* State.last_ticket */
byte commit_lsn; /* State.commit_lsn */
byte confirmed;	 /* Stream.confirmed */
byte ring_gap;	 /* Stream.ring_gap */
byte ring_taken; /* Stream.ring_taken */
byte under_way;	 /* Database.late, the high half */
byte ended;		 /* Database.late, the low half */

/* The ring: entries in the order in which they were reserved, the first is ring[0]. */
#define PENDING	   0
#define COMMITTING 1
#define COMMITTED  2
#define ABORTED	   3
byte ring[CAP];
byte entries;
byte state[N]; /* RingEntry.state, by its transaction */
byte entry;	   /* who has an entry */

/* ---- the worker ---- */

byte position, sent_to; /* Feed.position, Feed.watermark */
bool from_tables;
byte below;		/* the reading ends here; 0: there is none */
byte seen;		/* what is left of it */
byte late_seen; /* Feed.late_seen */
bool late_open; /* Feed.late_open */
byte outstanding;
byte sent[2] = NONE; /* Session.shipments: the transaction, */
byte upto[2];		 /* Shipment.confirm_to */
byte held = NONE;	 /* Shipment.held of the first */
bool undone;		 /* Shipment.undone of the first */
byte not_early = NONE;
#ifdef TRAP_14
bool was_early;
#endif
bool worker_dead;
bool finished;

/* ---- the peer ---- */

byte watermark; /* mmrepl.progress */
byte delivered; /* applied and committed, with the marker of a late one */

/* Its sessions: [0] is the worker's, [1] one that the worker gave up. */
bool busy[2]; /* in a transaction: it has the lock of the row in mmrepl.progress */
bool bad[2];  /* an error; all is ignored up to the next Sync */
byte open[2]; /* executed, not committed */
byte mark[2]; /* and so the watermark */

mtype = { EXECUTE, SYNC, UNDO }; /* apply(); the message; BEGIN, ROLLBACK, and the message */
mtype = { SYNCED, FAILED };

#define MESSAGES 4
chan wire = [MESSAGES] of { mtype, byte, byte, byte }; /* transaction, previous, last */
chan old_wire = [MESSAGES] of { mtype, byte, byte, byte };
chan answers = [MESSAGES] of { mtype };

#define OLD_ONE_GONE (!busy[1] && empty(old_wire))

byte crashes = CRASHES, losses = LOSSES, failures = FAILURES;

/* ---- what must hold ---- */

byte m_i; /* scratch of d_steps, always 0 outside */

/* A position may pass what is aborted, late, or delivered; nothing else. */
inline CheckPassed(w)
{
	m_i = 0;
	do
	:: m_i == N -> break
	:: else ->
		assert(last < TICK(m_i) || TICK(m_i) > (w) || PREPARED(m_i) || HAS(dead, m_i) ||
			   HAS(delivered, m_i));
		m_i++
	od;
	m_i = 0
}

/* What the peer commits is committed here, whatever happens. */
inline CheckCommitted(set)
{
	m_i = 0;
	do
	:: m_i == N -> break
	:: else ->
		assert(!HAS(set, m_i) || (HAS(vis, m_i) && DURABLE(m_i)));
		m_i++
	od;
	m_i = 0
}

inline Confirm(to)
{
	if
	:: (to) > confirmed -> confirmed = to; CheckPassed(confirmed)
	:: else
	fi
}

/* ---- a session (commit.cpp, ticket.cpp, ring.cpp) ---- */

/* TryDraw, Reserve: an entry may find no room in a ring that is not full, entries differ in size. */
inline Draw(i)
{
	atomic {
		last == i ->
		last++;
		infl = infl | BIT(i);
		deps[i] = vis;
		if
		:: PREPARED(i)
		:: !PREPARED(i) && entries < CAP ->
			ring[entries] = i;
			entry = entry | BIT(i);
			entries++
		:: !PREPARED(i) -> ring_gap = TICK(i)
		fi
	}
}

inline SetState(i, to)
{
	if
	:: HAS(entry, i) -> state[i] = to
	:: else
	fi
}

/* The commit record; flushed before anybody sees the transaction, or not. */
inline WriteRecord(i, now)
{
	records++;
	record[i] = records;
	if
	:: true -> flushed = records
	:: !(now) -> skip /* synchronous_commit = off */
	fi
}

#define RAISE_LSN(i) commit_lsn = (commit_lsn > record[i] -> commit_lsn : record[i])

/* Settle */
inline SettleCommitted(i)
{
#ifdef TRAP_4
	SetState(i, COMMITTED);
	d_step { RAISE_LSN(i) }
#else
	d_step { RAISE_LSN(i) };
	SetState(i, COMMITTED)
#endif
}

proctype Ordinary(byte i)
{
	{
		Draw(i);
		if
		:: SetState(i, COMMITTING) /* MayRunEarly, Announce */
		:: skip
		fi;
		if
		:: atomic { WriteRecord(i, false) };
			vis = vis | BIT(i);
			SettleCommitted(i)
#ifndef NO_ABORTS
		:: dead = dead | BIT(i);
			SetState(i, ABORTED)
#endif
		fi;
		infl = infl & ~BIT(i) /* SettleTicket */
	} unless { HAS(killed, i) };
	running--
}

/* PREPARE TRANSACTION and COMMIT PREPARED: both flush, and before anybody sees them. */
proctype Prepared(byte i)
{
	{
		Draw(i);
		atomic { infl = infl & ~BIT(i); flushed = records }
	} unless { HAS(killed, i) };
	if
	:: HAS(dead, i) -> goto over
	:: else
	fi;
again:
	{
		atomic { !HAS(killed, i) -> under_way++ }; /* BeginLateCommit */
		atomic { WriteRecord(i, true) };
		vis = vis | BIT(i);
		atomic { under_way--; ended++ } /* EndLateCommit */
	} unless { HAS(killed, i) };
	atomic {
		if
		:: HAS(killed, i) && !HAS(vis, i) -> killed = killed & ~BIT(i); goto again /* who finds it prepared */
		:: else
		fi
	};
over:
	running--
}

/* ---- the peer ---- */

inline RollBack(s)
{
	busy[s] = false;
	open[s] = 0;
	mark[s] = 0
}

inline Fails(s)
{
	RollBack(s);
	bad[s] = true;
	if
	:: s == 0 -> answers!FAILED
	:: else
	fi
}

/*
 * apply(); within atomic.  Who holds the row of mmrepl.progress is waited for.  A late
 * transaction is known by its marker, the others by the watermark.
 */
inline Execute(s, t, previous, to)
{
	mark[s] = (busy[s] -> mark[s] : watermark);
	busy[s] = true;
	if
	:: mark[s] >= previous ->
		if
		:: HAS(delivered | open[s], t) || (!PREPARED(t) && TICK(t) <= mark[s])
		:: else ->
			assert((deps[t] & ~(delivered | open[s])) == 0);
			open[s] = open[s] | BIT(t)
		fi;
		mark[s] = (mark[s] > to -> mark[s] : to)
	:: mark[s] < previous -> Fails(s) /* MM011 */
	:: s == 0 && failures > 0 -> failures--; Fails(s)
	fi
}

inline Commit(s)
{
	if
	:: busy[s] ->
		assert((delivered & open[s]) == 0);
		delivered = delivered | open[s];
		watermark = mark[s];
		CheckCommitted(open[s]);
		CheckPassed(watermark);
		RollBack(s)
	:: else
	fi
}

proctype Peer()
{
	byte t = 0, previous = 0, to = 0;

end_peer:
	do
	:: atomic { wire?[EXECUTE, _, _, _] && (bad[0] || !busy[1]) ->
		wire?EXECUTE, t, previous, to;
		if
		:: bad[0]
		:: else -> Execute(0, t, previous, to)
		fi;
		t = 0; previous = 0; to = 0
	}
	:: atomic { wire?SYNC, _, _, _ ->
		if
		:: true -> Commit(0)
		:: busy[0] && failures > 0 -> failures--; Fails(0) /* a deferred constraint */
		fi;
		bad[0] = false;
		answers!SYNCED
	}
	:: atomic { wire?UNDO, _, _, _ ->
		RollBack(0);
		bad[0] = false;
		answers!SYNCED
	}
#if LOSSES + CRASHES + FAILURES > 0
	/* The session that was given up: what had been sent arrives, then it ends. */
	:: atomic { old_wire?[EXECUTE, _, _, _] && (bad[1] || !busy[0]) ->
		old_wire?EXECUTE, t, previous, to;
		if
		:: bad[1]
		:: else -> Execute(1, t, previous, to)
		fi;
		t = 0; previous = 0; to = 0
	}
	:: atomic { old_wire?SYNC, _, _, _ ->
		Commit(1);
		bad[1] = false
	}
	:: atomic { old_wire?UNDO, _, _, _ ->
		RollBack(1);
		bad[1] = false
	}
	:: atomic { empty(old_wire) && (busy[1] || bad[1]) ->
		RollBack(1);
		bad[1] = false
	}
#endif
	od
}

/* ---- the worker: looks ---- */

#define GAP_AHEAD (ring_gap > position || ring_taken > position)
#define LATE_WORK (late_open || under_way > 0 || ended != late_seen)

/* ResolvedBelow */
#if N > 2
#define IN_FLIGHT_2 HAS(infl, 2)
#else
#define IN_FLIGHT_2 false
#endif
#define RESOLVED_BELOW                                                                             \
	(HAS(infl, 0) -> TICK(0) : (HAS(infl, 1) -> TICK(1) : (IN_FLIGHT_2 -> TICK(2) : last + 1)))

#ifdef TRAP_8
#define IS_HELD false
#else
#define IS_HELD (held != NONE)
#endif

/* MayStart; nothing is sent behind late transactions before they are answered. */
#define MAY_START                                                                                  \
	(outstanding < LANES && !IS_HELD && !undone &&                                                 \
	 (outstanding == 0 || !PREPARED(sent[outstanding - 1])))

#define HEAD ring[0]

/* ---- the worker: steps, within atomic ---- */

inline FlushCommits()
{
	flushed = (flushed > commit_lsn -> flushed : commit_lsn)
}

/* Nobody writes to it any more. */
inline ConsumeHead()
{
	assert(state[HEAD] == COMMITTED || state[HEAD] == ABORTED);
	ring_taken = (ring_taken > TICK(HEAD) -> ring_taken : TICK(HEAD));
	entry = entry & ~BIT(HEAD);
	ring[0] = ring[1];
	ring[1] = 0;
	entries--
}

inline SendBatch(t, to)
{
	wire!EXECUTE, t, sent_to, to;
	sent[outstanding] = t;
	upto[outstanding] = to;
	outstanding++
}

/* A batch, and Sync */
inline Send(t)
{
	FlushCommits();
	SendBatch(t, position);
	wire!SYNC, 0, 0, 0;
	sent_to = position
}

/* EarlyShipment, Launch */
inline SendEarly(t)
{
	SendBatch(t, TICK(t));
#ifdef TRAP_1
	wire!SYNC, 0, 0, 0;
#endif
#ifdef TRAP_5
	position = TICK(t);
#endif
	held = t;
#ifdef TRAP_14
	was_early = true
#endif
}

/* KeepEarly */
inline Keep()
{
	position = upto[0];
#ifndef TRAP_10
	sent_to = upto[0];
#endif
	if
	:: entries > 0 && HEAD == held -> ConsumeHead()
	:: else
	fi;
	held = NONE;
#ifndef TRAP_3
	FlushCommits();
#endif
	wire!SYNC, 0, 0, 0
}

inline Undo()
{
#ifndef TRAP_16
	not_early = held;
#endif
#ifdef TRAP_15
	ConsumeHead();
#endif
	held = NONE;
	undone = true;
	wire!UNDO, 0, 0, 0
}

inline PopOldest()
{
	sent[0] = sent[1];
	upto[0] = upto[1];
	sent[1] = NONE;
	upto[1] = 0;
	undone = false;
#ifdef TRAP_14
	was_early = false;
#endif
	outstanding--
}

/* SurveyTables: first the lowest ticket in flight, then the snapshot */
inline Survey()
{
	late_seen = ended;
	late_open = false;
	below = RESOLVED_BELOW;
	m_i = 0;
	do
	:: m_i == N -> break
	:: else ->
		if
		:: HAS(vis & ~removed, m_i) && PREPARED(m_i) && TICK(m_i) >= below -> late_open = true
		:: HAS(vis & ~removed, m_i) && TICK(m_i) < below && (PREPARED(m_i) || TICK(m_i) > position) ->
			seen = seen | BIT(m_i)
		:: else
		fi;
		m_i++
	od;
	m_i = 0
}

#if N > 2
#define FIRST_SEEN (HAS(seen, 0) -> 0 : (HAS(seen, 1) -> 1 : 2))
#else
#define FIRST_SEEN (HAS(seen, 0) -> 0 : 1)
#endif

/* What was sent is executed later, in part, or never. */
inline DropPeer()
{
	do
	:: nempty(wire) -> wire?k, t, previous, to; old_wire!k, t, previous, to
	:: break
	od;
	do
	:: nempty(wire) -> wire?_, _, _, _
	:: empty(wire) -> break
	od;
	do
	:: nempty(answers) -> answers?_
	:: empty(answers) -> break
	od;
	k = 0; t = 0; previous = 0; to = 0;
	busy[1] = busy[0]; bad[1] = bad[0]; open[1] = open[0]; mark[1] = mark[0];
	busy[0] = false; bad[0] = false; open[0] = 0; mark[0] = 0;
	outstanding = 0; sent[0] = NONE; sent[1] = NONE; upto[0] = 0; upto[1] = 0;
	held = NONE; undone = false;
#ifdef TRAP_14
	was_early = false;
#endif
	position = 0; sent_to = 0; from_tables = false; below = 0; seen = 0; late_open = false
}

/* ---- the worker ---- */

/* What Next() looks at first; the entry it names is the head of the ring. */
#define MAY_BE_EARLY(i)                                                                            \
	(outstanding == 0 && held == NONE && state[i] == COMMITTING && not_early != (i) &&             \
	 TICK(i) > position)
#ifdef TRAP_13
#define IN_TABLES false
#else
#define IN_TABLES from_tables
#endif
#ifdef TRAP_2
#define TO_BE_KEPT (state[held] != COMMITTING)
#else
#define TO_BE_KEPT (state[held] == COMMITTED)
#endif

proctype Worker()
{
	mtype k = 0;
	byte t = 0, previous = 0, to = 0;

again:
	{
	skip;
connect:
	atomic { !busy[1] -> /* Greet, ResetFeed; mmrepl.hello() waits for who has the row */
		position = (confirmed > watermark -> confirmed : watermark);
		sent_to = watermark;
		from_tables = true
	};
	do
	/* ---- the ordinary way: Fill, FillFromRing, FillFromTables ---- */
	:: atomic { MAY_START && !from_tables && (GAP_AHEAD || LATE_WORK) -> from_tables = true }
	:: atomic { MAY_START && !from_tables && !GAP_AHEAD && !LATE_WORK && entries > 0 &&
			(TICK(HEAD) <= position || state[HEAD] == COMMITTED || state[HEAD] == ABORTED) ->
		t = HEAD;
		if
		:: TICK(t) <= position -> ConsumeHead()
		:: TICK(t) > position && state[t] == ABORTED -> position = TICK(t); ConsumeHead()
		:: TICK(t) > position && state[t] == COMMITTED ->
			position = TICK(t);
			ConsumeHead();
			Send(t)
		fi;
		t = 0
	}
	:: MAY_START && from_tables && below == 0 ->
progress_reading:
		d_step { Survey() }
	:: atomic { MAY_START && from_tables && below != 0 && seen != 0 ->
		t = FIRST_SEEN;
		seen = seen & ~BIT(t);
		position = (position > TICK(t) -> position : TICK(t));
		Send(t);
		t = 0
	}
	:: atomic { MAY_START && from_tables && below != 0 && seen == 0 -> /* EndOfRefs, TrimRing */
		position = (position > below - 1 -> position : below - 1);
		below = 0;
		do
		:: entries > 0 && TICK(HEAD) <= position -> ConsumeHead()
		:: else -> break
		od;
		from_tables = GAP_AHEAD || LATE_WORK
	}
	:: d_step { outstanding == 0 && !from_tables && entries == 0 && !GAP_AHEAD && !LATE_WORK &&
			RESOLVED_BELOW - 1 > position -> /* ConfirmPassed */
		position = RESOLVED_BELOW - 1;
		Confirm(position)
	}
	/* ---- StartEarly: the announcement, and then the gap and the late word ---- */
#ifdef TRAP_6
	:: atomic { !IN_TABLES && outstanding == 0 && !GAP_AHEAD };
		atomic {
			if
			:: entries > 0 && MAY_BE_EARLY(HEAD) && !LATE_WORK -> SendEarly(HEAD)
			:: else
			fi
		}
#elif defined(TRAP_7)
	:: atomic { !IN_TABLES && outstanding == 0 && !LATE_WORK };
		atomic {
			if
			:: entries > 0 && MAY_BE_EARLY(HEAD) && !GAP_AHEAD -> SendEarly(HEAD)
			:: else
			fi
		}
#else
	:: atomic { !IN_TABLES && entries > 0 && MAY_BE_EARLY(HEAD) -> t = HEAD };
		if
		:: GAP_AHEAD ->
progress_gap:
			t = 0
		:: !GAP_AHEAD ->
			if
			:: atomic { !LATE_WORK -> SendEarly(t); t = 0 }
			:: LATE_WORK ->
progress_late:
				t = 0
			fi
		fi
#endif
#ifdef TRAP_12
	:: atomic { !IN_TABLES && entries > 1 && MAY_BE_EARLY(ring[1]) && !GAP_AHEAD && !LATE_WORK ->
		t = ring[1];
		SendEarly(t);
		t = 0
	}
#endif
	/* ---- EndEarly ---- */
	:: atomic { held != NONE && TO_BE_KEPT -> Keep() }
	:: atomic { held != NONE && !TO_BE_KEPT -> Undo() } /* aborted, or held too long */
	/* ---- Receive ---- */
	:: atomic { answers?FAILED ->
		if
#ifdef TRAP_11
		:: held != NONE /* as if nothing had happened */
#else
		:: held != NONE -> Undo()
#endif
		:: held == NONE && undone
#ifdef TRAP_14
		:: held == NONE && !undone && was_early -> undone = true
		:: held == NONE && !undone && !was_early -> OLD_ONE_GONE; DropPeer(); goto connect
#else
		:: held == NONE && !undone -> OLD_ONE_GONE; DropPeer(); goto connect
#endif
		fi
	}
	:: atomic { answers?SYNCED ->
		if
#ifndef TRAP_9
		:: undone
#endif
#ifdef TRAP_9
		:: true ->
#else
		:: !undone -> /* Applied */
#endif
			if
			:: PREPARED(sent[0]) -> removed = removed | BIT(sent[0])
			:: else
			fi;
			Confirm(upto[0])
		fi;
		PopOldest()
	}
	:: atomic { losses > 0 && outstanding > 0 && OLD_ONE_GONE ->
		losses--;
		DropPeer();
		goto connect
	}
	:: atomic { running == 0 && outstanding == 0 && entries == 0 && !from_tables && !GAP_AHEAD &&
			!LATE_WORK && OLD_ONE_GONE ->
		assert(delivered == vis);
		finished = true;
		break
	}
	od
	} unless { worker_dead };
	atomic {
		if
		:: worker_dead ->
			worker_dead = false;
			DropPeer();
			late_seen = 0;
			not_early = NONE;
			goto again
		:: else
		fi
	}
}

/* ---- the source dies: shared memory is lost, and what is not on disk ---- */

proctype Fate()
{
end_fate:
	atomic { crashes > 0 && !finished && last > 0 && OLD_ONE_GONE ->
		crashes--;
		do
		:: flushed < records -> flushed++
		:: break
		od;
		records = flushed;
		m_i = 0;
		do
		:: m_i == last -> break
		:: else ->
			if
			:: DURABLE(m_i) -> vis = vis | BIT(m_i)
			:: !DURABLE(m_i) ->
				vis = vis & ~BIT(m_i);
				record[m_i] = 0;
				if
				:: !PREPARED(m_i) || HAS(infl, m_i) -> dead = dead | BIT(m_i)
				:: else
				fi
			fi;
			killed = killed | BIT(m_i);
			m_i++
		od;
		m_i = 0;
		infl = 0;
		commit_lsn = 0;
		confirmed = 0; /* the stream's row may be as far behind */
		ring_gap = last;
		ring_taken = 0;
		under_way = 0;
		ended = 0;
		entry = 0;
		do
		:: entries > 0 -> entries--; ring[entries] = 0
		:: entries == 0 -> break
		od;
		worker_dead = true
	}
}

init
{
	byte i;

	atomic {
		running = N;
		for (i : 0 .. N - 1) {
			if
			:: PREPARED(i) -> run Prepared(i)
			:: else -> run Ordinary(i)
			fi
		}
		i = 0;
		run Peer();
		run Worker();
#if CRASHES > 0
		run Fate()
#endif
	}
}
