/*
 * relaxed.pml
 *		Commits at the peer that are not flushed yet: what a crash of the peer may take
 *		back, who may pass the fence, and what may be called confirmed.
 *
 * doc/spec/README.md says what is modelled; doc/spec/check runs everything.
 * Beside each step stands the C++ function that it models.  A step is one look at,
 * or change of, what others see.
 *
 * A configuration is given by -D:
 *	 N			transactions, each of a session of its own
 *	 INLINE		bit mask: transactions that are executed inline ('applied')
 *	 LATE		bit mask: prepared transactions, which become visible late
 *	 PEER		how often the peer dies
 *	 CRASHES	how often the source dies
 *	 BREAKS		how often the worker loses its connection, or a batch fails
 *	 SERIAL		transactions begin one after the other; connections are made at any time
 *	 FLUSHED	batches of the worker may be flushed, not seals alone
 *	 TRAP_n		a mistake, see README.md
 */
#ifndef N
#define N 2
#endif
#ifndef INLINE
#define INLINE 0
#endif
#ifndef LATE
#define LATE 0
#endif
#ifndef PEER
#define PEER 1
#endif
#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef BREAKS
#define BREAKS 0
#endif

#define BIT(i)	  (1 << (i))
#define HAS(m, i) (((m) >> (i)) & 1)
#define INLINED(i) HAS(INLINE, i)
#define PREPARED(i) HAS(LATE, i)
#define NONE	  N
#define FAILED	  (N + 1)
#define ALL		  (BIT(N) - 1)
#define LANES	  2 /* batches on their way */

/* ---- the source: what is durable ---- */

byte vis;		/* committed, flushed, visible, with a queue row */
byte removed;	/* late heads that were removed */
byte ticket[N]; /* 0: none yet */
byte deps[N];	/* what has to be there before it */

/* ---- the source: shared memory ---- */

byte last;		   /* State.last_ticket */
byte infl;		   /* whose ticket is in flight */
byte committed;	   /* ring entries that are settled: to be delivered, */
byte applied;	   /* EntryState::Applied, */
byte aborted;	   /* or nothing */
byte confirmed;	   /* Stream.confirmed */
byte last_queued;  /* Stream.last_queued */
byte last_applied; /* Stream.last_applied */
byte applied_to;   /* Stream.applied: the worker's, which no crash of the peer takes back */

byte ended;		  /* sessions that are at their end */
byte dead;		  /* those that died with the source */
bool worker_dead; /* and its worker */
bool finished;

/* ---- the peer ---- */

/*
 * Its tables and its watermark as its WAL has them: [0] is flushed, [i] is what the
 * i-th commit behind it made of them.  A crash takes any number of the last ones.
 */
#define WAL (3 * N) /* checked */
byte wal_rows[WAL];
byte wal_mark[WAL];
byte end;
byte life = 1; /* of the peer: a connection ends with it */

#define ROWS	  wal_rows[end]
#define WATERMARK wal_mark[end]
#define DURABLE	  wal_rows[0]

/* Batches: transaction, previous, last, relaxed; and their answers. */
chan wire = [LANES] of { byte, byte, byte, bool };
chan answers = [LANES] of { byte, byte, bool };
chan zombie = [LANES] of { byte, byte, byte, bool }; /* of a connection that was given up */

byte peer_crashes = PEER, crashes = CRASHES, breaks = BREAKS;

/* ---- what must hold ---- */

/* Everything that is committed up to there is at the peer for good. */
#define FOR_GOOD(i, upto)                                                                          \
	(ticket[i] == 0 || ticket[i] > (upto) || PREPARED(i) || HAS(aborted, i) ||                     \
	 (HAS(committed | applied, i) && HAS(DURABLE, i)))

inline Confirm(upto)
{
	if
	:: (upto) > confirmed ->
		confirmed = upto;
		assert(FOR_GOOD(0, confirmed) && FOR_GOOD(1, confirmed));
#if N > 2
		assert(FOR_GOOD(2, confirmed))
#endif
	:: else
	fi
}

inline CheckDue(i)
{
	assert(!HAS(ROWS, i)); /* not twice */
	assert((deps[i] & ~ROWS) == 0) /* not before what it depends on */
}

inline Raise(what, to)
{
	if
	:: (to) > what -> what = to
	:: else
	fi
}

/* ---- the peer: commit, apply(), crash ---- */

inline Commit(rows, mark, relaxed)
{
	if
	:: relaxed ->
		assert(end + 1 < WAL);
		wal_rows[end + 1] = rows;
		wal_mark[end + 1] = mark;
		end++
	:: else -> /* flushes all that is before it */
		wal_rows[0] = rows;
		wal_mark[0] = mark;
		do
		:: end == 0 -> break
		:: else -> wal_rows[end] = 0; wal_mark[end] = 0; end--
		od
	fi
}

/* Of one batch; a late one is known by its marker, the others by the watermark or theirs. */
inline Apply(t, upto, relaxed)
{
	if
	:: t == NONE -> rows = ROWS
	:: t < NONE && (HAS(ROWS, t) || (ticket[t] <= WATERMARK && !PREPARED(t))) -> rows = ROWS
	:: else ->
		CheckDue(t);
		rows = ROWS | BIT(t)
	fi;
	if
	:: upto < WATERMARK -> upto = WATERMARK
	:: else
	fi;
	Commit(rows, upto, relaxed);
	rows = 0
}

#ifdef TRAP_3
#define IN_TURN true
#else
#define IN_TURN (WATERMARK >= previous) /* else MM011 */
#endif

proctype Peer()
{
	byte t = 0, previous = 0, upto = 0, rows = 0, m = 0;
	bool relaxed = false;

end_peer:
	do
	:: atomic { wire?t, previous, upto, relaxed ->
		if
		:: IN_TURN -> m = upto; Apply(t, upto, relaxed); answers!t, m, relaxed; m = 0
		:: !IN_TURN -> answers!FAILED, 0, false
		:: breaks > 0 -> breaks--; answers!FAILED, 0, false /* a deadlock, a cancel */
		fi;
		t = 0; previous = 0; upto = 0; relaxed = false
	}
	:: atomic { zombie?t, previous, upto, relaxed ->
		if
		:: IN_TURN -> Apply(t, upto, relaxed)
		:: true
		fi;
		t = 0; previous = 0; upto = 0; relaxed = false
	}
	:: atomic { peer_crashes > 0 && !finished && last > 0 ->
		peer_crashes--;
		life++;
		do
		:: end > 0 -> wal_rows[end] = 0; wal_mark[end] = 0; end--
		:: break
		od;
		/* Recovery ends with a checkpoint: what is left stays. */
		rows = ROWS; upto = WATERMARK;
		Commit(rows, upto, false);
		rows = 0; upto = 0;
		do
		:: nempty(wire) -> wire?_, _, _, _
		:: empty(wire) -> break
		od;
		do
		:: nempty(zombie) -> zombie?_, _, _, _
		:: empty(zombie) -> break
		od
	}
	od
}

/* ---- connections ---- */

/*
 * A connection ends with the peer's life; 0: there is none.  Its stamp, opened_at, is
 * the last ticket, read after the connection is established: whatever is applied under
 * a later ticket finds this life of the peer, or a later one.
 */
inline Connect(my_life, stamp)
{
	my_life = life;
	stamp = last
}

/* The mistake: what is drawn, applied and lost in between has a later ticket, too. */
inline ConnectStampFirst(my_life, stamp)
{
	stamp = last;
	my_life = life
}

#ifdef TRAP_8
#define ConnectSession ConnectStampFirst
#else
#define ConnectSession Connect
#endif
#ifdef TRAP_10
#define ConnectWorker ConnectStampFirst
#else
#define ConnectWorker Connect
#endif

/* ---- a session ---- */

#define IN_FLIGHT(i, upto) (HAS(infl, i) && ticket[i] <= (upto))
#if N > 2
#define RESOLVED(upto) !(IN_FLIGHT(0, upto) || IN_FLIGHT(1, upto) || IN_FLIGHT(2, upto))
#else
#define RESOLVED(upto) !(IN_FLIGHT(0, upto) || IN_FLIGHT(1, upto))
#endif

/* AppliedUpTo */
#define AT_LEAST_APPLIED(upto) (confirmed >= (upto) || applied_to >= (upto))

/* Whether this connection proves that what is not confirmed is there. */
#ifdef TRAP_5
#define PROVES true
#elif defined(TRAP_14)
#define PROVES (confirmed >= (stamp < goal -> stamp : goal))
#else
#define PROVES (confirmed >= (stamp < last_applied -> stamp : last_applied))
#endif

/* What the worker has had applied counts for a connection, not for good. */
#ifdef TRAP_12
#define FOR_GOOD_UPTO AT_LEAST_APPLIED
#else
#define FOR_GOOD_UPTO(upto) (confirmed >= (upto))
#endif

#ifdef SERIAL
#define MY_TURN(i) (ended & (BIT(i) - 1)) == BIT(i) - 1
#else
#define MY_TURN(i) skip
#endif

proctype Session(byte i)
{
	byte my_life = 0, stamp = 0; /* the cached connection */
	byte goal = 0, late_goal = 0, seen = 0;
	bool strictly = false; /* ask without regard to the connection */
	bool any = false;	   /* only_serial is 0: the fence was strict */
	bool good = false;

	{
	if
	:: !INLINED(i) -> MY_TURN(i); goto commit
	:: INLINED(i) -> skip
	:: INLINED(i) -> ConnectSession(my_life, stamp) /* for an earlier transaction */
	fi;

	MY_TURN(i);
	deps[i] = vis;
fence: /* PassFence: the looks of Reached, in their order; for the connection, or for good */
	atomic { goal = last; late_goal = vis & LATE };
	(late_goal & ~removed) == 0;
	if
	:: confirmed >= goal
	:: atomic { confirmed < goal && RESOLVED(goal) -> skip };
#ifdef TRAP_14
		goal = last_applied;
#endif
		seen = last_queued;
		if
		:: my_life != 0 && !strictly -> AT_LEAST_APPLIED(seen); PROVES
		:: my_life == 0 || strictly -> FOR_GOOD_UPTO(seen); FOR_GOOD_UPTO(last_applied)
		fi
	fi;
	seen = last_applied; /* AllFlushed */
	any = (my_life == 0 || strictly || confirmed >= seen);
	/* Flush: over this connection, or, if the fence was strict, over any. */
	atomic {
		goal = 0; late_goal = 0; seen = 0;
		if
		:: my_life == life -> CheckDue(i); goto commit
		:: my_life != life && any -> skip
		:: my_life != life && !any -> /* stale */
			my_life = 0; stamp = 0;
#ifndef TRAP_6
			strictly = true;
			goto fence
#endif
		fi
	};
	ConnectSession(my_life, stamp);
	atomic {
		if
		:: my_life == life -> CheckDue(i)
		:: else -> my_life = 0; stamp = 0 /* lost: it is queued */
		fi
	};

commit:
	atomic { /* DrawTicket */
		any = false; strictly = false;
		last++;
		ticket[i] = last;
		infl = infl | BIT(i);
		deps[i] = (my_life == 0 -> vis : deps[i])
	};
	if
	:: PREPARED(i) -> infl = infl & ~BIT(i) /* PREPARE TRANSACTION */
	:: else
	fi;
	vis = vis | BIT(i); /* the commit record, flushed; visible */
	if
	:: PREPARED(i) -> goto over
	:: my_life == 0
	:: atomic { my_life != 0 ->
		if
		:: my_life == life -> Commit((ROWS | BIT(i)), WATERMARK, true); good = true
		:: my_life == life -> Commit((ROWS | BIT(i)), WATERMARK, true) /* the answer is lost */
		:: true /* the command is lost */
		fi
	}
	fi;
	if /* Settle */
	:: good ->
#ifndef TRAP_9
		d_step { Raise(last_applied, ticket[i]) };
#endif
		applied = applied | BIT(i)
	:: !good ->
		d_step { Raise(last_queued, ticket[i]) };
		committed = committed | BIT(i)
	fi;
	infl = infl & ~BIT(i); /* SettleTicket */
#ifdef TRAP_9
	d_step {
		if
		:: good -> Raise(last_applied, ticket[i])
		:: else
		fi
	};
#endif
over:
	skip
	} unless { HAS(dead, i) };
	d_step {
		ended = ended | BIT(i);
		my_life = 0; stamp = 0; goal = 0; late_goal = 0; seen = 0;
		strictly = false; any = false; good = false
	}
}

/* ---- the worker ---- */

/* What stands between the position and i. */
#define BEFORE(j, i)                                                                               \
	(ticket[j] > position && ticket[j] < ticket[i] && !PREPARED(j) && !HAS(aborted, j))
#define LATE_BEFORE(j, i) (HAS(vis & LATE & ~removed, j) && ticket[j] < ticket[i])
#if N > 2
#define FIRST(i)	  !(BEFORE(0, i) || BEFORE(1, i) || BEFORE(2, i))
#define NO_LATE(i)	  !(LATE_BEFORE(0, i) || LATE_BEFORE(1, i) || LATE_BEFORE(2, i))
#define WAITS(i)	  (ticket[i] > position && !PREPARED(i) && !HAS(aborted, i))
#define NOTHING_WAITS !(WAITS(0) || WAITS(1) || WAITS(2))
#else
#define FIRST(i)	  !(BEFORE(0, i) || BEFORE(1, i))
#define NO_LATE(i)	  !(LATE_BEFORE(0, i) || LATE_BEFORE(1, i))
#define WAITS(i)	  (ticket[i] > position && !PREPARED(i) && !HAS(aborted, i))
#define NOTHING_WAITS !(WAITS(0) || WAITS(1))
#endif

#define MAY_SEND (outstanding < LANES && !late_sent)

/* The next one in order: late; of the tables, while there is a reading; of the ring. */
#define LATE_NEXT(i)	(MAY_SEND && HAS(vis & LATE & ~removed, i) && FIRST(i) && NO_LATE(i))
#define NEXT(i)			(MAY_SEND && WAITS(i) && FIRST(i) && NO_LATE(i))
#define FROM_TABLES(i)	(NEXT(i) && below > ticket[i] && HAS(seen, i))
#define COMMITTED(i)	(NEXT(i) && below == 0 && HAS(committed, i))
#define APPLIED(i)		(NEXT(i) && below == 0 && HAS(applied, i))
#define IN_READING(i)	(WAITS(i) && below > ticket[i] && HAS(seen, i))
#define TABLES_READ		(below != 0 && !IN_READING(0) && !IN_READING(1) && MAY_SEND)

#ifdef TRAP_7
#define PASSED(i) true
#else
#define PASSED(i) (ticket[i] > stamp)
#endif

/* CloseBatch, SendBatch; over a connection that is dead nothing arrives. */
inline SendBatch(t, is_relaxed)
{
	if
	:: my_life == life -> wire!t, sent_to, position, is_relaxed
	:: else
	fi;
	sent_to = position;
	outstanding++;
	if
	:: is_relaxed -> unsealed = position
	:: else -> sealing = position
	fi
}

inline Ship(t)
{
	position = ticket[t];
	if
	:: true -> SendBatch(t, true)
#ifdef FLUSHED
	:: true -> SendBatch(t, false)
#endif
	fi
}

/* Nothing is sent behind it before it is answered. */
inline ShipLate(t)
{
	late_sent = true;
#ifdef TRAP_4
	SendBatch(t, true)
#else
	SendBatch(t, false)
#endif
}

/* FillFromRing of an entry that a session has brought */
inline Pass(t)
{
	if
	:: PASSED(t) -> position = ticket[t]; unsealed = position
	:: !PASSED(t) -> Ship(t)
	fi
}

proctype Worker()
{
	byte my_life = 0, stamp = 0;
	byte position = 0, sent_to = 0, outstanding = 0;
	byte unsealed = 0; /* up to here something was passed relaxed, or by a session */
	byte sealing = 0;  /* the last of what is flushed that was sent */
	byte below = 0, seen = 0, t = 0, k = 0, upto = 0;
	bool relaxed = false, late_sent = false;

again:
	{
	skip;
connect:
	ConnectWorker(my_life, stamp);
	atomic { /* Greet, ResetFeed */
		if
		:: my_life != life -> goto connect
		:: else
		fi;
		position = (confirmed > WATERMARK -> confirmed : WATERMARK);
		sent_to = WATERMARK;
		unsealed = position;
		sealing = confirmed;
		outstanding = 0;
		late_sent = false;
#ifdef TRAP_2
		Confirm(position)
#endif
	};
	/* SurveyTables: first the lowest ticket in flight, then the snapshot */
	d_step {
		below = last + 1;
		do
		:: k == N -> break
		:: else ->
			if
			:: HAS(infl, k) && ticket[k] < below -> below = ticket[k]
			:: else
			fi;
			k++
		od;
		k = 0
	};
	seen = vis;
	do
	:: atomic { nempty(answers) ->
		answers?t, upto, relaxed;
		outstanding--;
		if
		:: t == FAILED -> goto drop
		:: t < N && PREPARED(t) -> removed = removed | BIT(t); late_sent = false /* RemoveLate */
		:: else
		fi;
		t = 0;
		if
#ifdef TRAP_1
		:: true -> Confirm(upto); upto = 0
#else
		:: !relaxed -> Confirm(upto); upto = 0
		:: relaxed
#endif
		fi;
		relaxed = false
	}
	/* NoteApplied: two steps, before anything else is looked at */
	if
	:: upto > 0 ->
#ifdef TRAP_11
		d_step { Raise(applied_to, upto) };
		d_step { Raise(last_applied, upto); upto = 0 }
#else
#ifndef TRAP_13
		d_step { Raise(last_applied, upto) };
#endif
		d_step { Raise(applied_to, upto); upto = 0 }
#endif
	:: upto == 0
	fi
	:: atomic { FROM_TABLES(0) -> Ship(0) }
	:: atomic { FROM_TABLES(1) -> Ship(1) }
	:: atomic { COMMITTED(0) -> Ship(0) }
	:: atomic { COMMITTED(1) -> Ship(1) }
	:: atomic { APPLIED(0) -> Pass(0) }
	:: atomic { APPLIED(1) -> Pass(1) }
	:: atomic { LATE_NEXT(0) -> ShipLate(0) }
	:: atomic { LATE_NEXT(1) -> ShipLate(1) }
#if N > 2
	:: atomic { FROM_TABLES(2) -> Ship(2) }
	:: atomic { COMMITTED(2) -> Ship(2) }
	:: atomic { APPLIED(2) -> Pass(2) }
	:: atomic { LATE_NEXT(2) -> ShipLate(2) }
	:: atomic { TABLES_READ && !IN_READING(2) ->
#else
	:: atomic { TABLES_READ ->
#endif
		position = (position > below - 1 -> position : below - 1);
		below = 0;
		seen = 0
	}
	/* A seal, after a while or because somebody waits: a batch without a transaction */
	:: atomic { MAY_SEND && below == 0 && unsealed > confirmed && unsealed > sealing ->
		SendBatch(NONE, false)
	}
	/* ConfirmPassed */
	:: atomic { outstanding == 0 && below == 0 && unsealed <= confirmed && confirmed < last &&
			infl == 0 && NOTHING_WAITS ->
		position = last;
		Confirm(position)
	}
	:: atomic { my_life != life -> goto drop }
	:: atomic { breaks > 0 && outstanding > 0 -> breaks--; goto drop }
	/* At the end both sides are equal. */
	:: atomic { ended == ALL && infl == 0 && outstanding == 0 && below == 0 && my_life == life &&
			confirmed == last && (vis & LATE & ~removed) == 0 && empty(zombie) ->
		assert(ROWS == vis && DURABLE == vis);
		finished = true;
		break
	}
	od;
	goto over;
drop: /* Fail, DropPeer: what is on its way is executed later, or never */
	atomic {
		do
		:: nempty(wire) ->
			wire?t, k, upto, relaxed;
			if
			:: nfull(zombie) -> zombie!t, k, upto, relaxed
			:: true
			fi
		:: empty(wire) -> break
		od;
		do
		:: nempty(answers) -> answers?_, _, _
		:: empty(answers) -> break
		od;
		t = 0; k = 0; upto = 0; relaxed = false; below = 0; seen = 0
	};
	goto connect
	} unless { worker_dead };
	d_step {
		worker_dead = false;
		my_life = 0; stamp = 0; position = 0; sent_to = 0; outstanding = 0; unsealed = 0; sealing = 0;
		below = 0; seen = 0; t = 0; k = 0; upto = 0; relaxed = false; late_sent = false
	};
	goto again;
over:
	skip
}

/* ---- the source dies: shared memory is lost ---- */

proctype Fate()
{
	byte a, b, c;
	bool d;

end_fate:
	atomic { crashes > 0 && !finished && last > 0 ->
		crashes--;
		dead = ALL & ~ended;
		aborted = aborted | (infl & ~vis);
		infl = 0;
		committed = vis & ~LATE;
		applied = 0;
		confirmed = 0; /* the stream's row may be as far behind */
		last_queued = last;
		last_applied = 0;
		applied_to = 0;
		worker_dead = true;
		do
		:: nempty(wire) ->
			wire?a, b, c, d;
			if
			:: nfull(zombie) -> zombie!a, b, c, d
			:: true
			fi
		:: empty(wire) -> break
		od;
		do
		:: nempty(answers) -> answers?_, _, _
		:: empty(answers) -> break
		od;
		a = 0; b = 0; c = 0; d = false
	}
}

init
{
	atomic {
		run Peer();
		run Worker();
		run Session(0);
		run Session(1);
#if N > 2
		run Session(2);
#endif
#if CRASHES > 0
		run Fate()
#endif
	}
}
