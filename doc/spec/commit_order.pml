/*
 * commit_order.pml
 *		Commit order, the ring, the queue tables and late transactions of one stream.
 *
 * doc/spec/README.md says what is modelled; doc/spec/check runs everything.
 * Beside each step stands the C++ function that it models.  Each step is one
 * access to shared memory, or one section under the clock spinlock.
 *
 * A configuration is given by -D:
 *	 N			transactions
 *	 PREP		bit mask: which of them end with PREPARE TRANSACTION
 *	 CRASHES	how often the worker loses its connection and all it knows
 *	 REGISTER	0: the stream has its slot from the start; 1: it gets one at any
 *				time; 2: it has one, and may move to another one at any time
 *	 BATCH		transactions in a batch (Budget), 1 or 2
 *	 LANES		batches on their way (kInFlight)
 *	 CAP		entries that fit into the ring
 *	 NO_ABORTS	every ordinary transaction commits
 *	 TRAP_n		a mistake, see README.md
 */
#ifndef N
#define N 3
#endif
#ifndef PREP
#define PREP 0
#endif
#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef REGISTER
#define REGISTER 0
#endif
#ifndef BATCH
#define BATCH 2
#endif
#ifndef LANES
#define LANES 1
#endif
#ifndef CAP
#define CAP 2
#endif

#define BIT(i)		(1 << (i))
#define HAS(m, i)	(((m) >> (i)) & 1)
#define PREPARED(i) HAS(PREP, i)
#define NONE		N

/*
 * Transactions are alike but for PREP: so let them be numbered in the order in
 * which they draw.  Number i has ticket i + 1.
 */
#define TICK(i)		((i) + 1)

/* Transactions: sets of them are bit masks. */
byte infl;		 /* whose InFlight.ticket is not 0 */
byte everyone;	 /* InFlight.everyone */
byte slot_of[N]; /* InFlight.streams: the use of a slot it was drawn for, 0: none */
byte vis;		 /* committed and visible */
byte dead;		 /* aborted */
byte removed;	 /* late head row deleted after delivery */
byte deps[N];	 /* all that was visible before the ticket was drawn */

/* shmem::State, shmem::Stream, shmem::Database */
byte last;			 /* State.last_ticket */
byte slot;			 /* which use of a slot the stream has, 0: none */
byte confirmed;		 /* Stream.confirmed */
byte late_confirmed; /* Stream.late_confirmed */
byte ring_gap;		 /* Stream.ring_gap */
byte ring_taken;	 /* highest ticket that was consumed from the ring; see README, trap 11 */
byte under_way;		 /* Database.late, the high half */
byte ended;			 /* Database.late, the low half */
bool latch;			 /* of the worker */

/* The ring: entries in the order in which they were reserved, the first is ring[0]. */
#define PENDING	  0
#define COMMITTED 1
#define ABORTED	  2
byte ring[CAP];
byte entries;	 /* ring_head - ring_tail */
byte state[N];	 /* RingEntry.state, by its transaction */
byte entry;		 /* who has an entry */

/* The peer. */
byte watermark; /* mmrepl.progress */
byte delivered; /* applied, with the marker of a late one */
byte late_set[3]; /* which late ones had ended when Ended() was 0, 1, 2 (for the assertion) */

/* A batch: two transactions, previous, last; late_to comes back with the answer. */
chan wire = [LANES] of { byte, byte, byte, byte, byte };
chan answers = [LANES] of { byte, byte, byte, byte };
#if CRASHES > 0 || REGISTER == 2
#define ZOMBIES
chan zombie = [LANES] of { byte, byte, byte, byte }; /* of a session that the worker gave up */
#endif

byte running; /* transactions not yet at their end */

/* ---- assertions ---- */

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

/* ---- drawing and settling (ticket.cpp, ring.cpp) ---- */

/* Reserve: an entry may find no room in a ring that is not full, entries differ in size. */
inline Reserve(i)
{
	if
	:: slot == 0 -> skip
	:: slot != 0 && entries < CAP ->
		ring[entries] = i;
		entry = entry | BIT(i);
		entries++
	:: slot != 0 -> ring_gap = TICK(i)
	fi
}

inline Publish(i)
{
	infl = infl | BIT(i);
	slot_of[i] = slot;
#ifndef TRAP_8
	if
	:: slot == 0 -> everyone = everyone | BIT(i)
	:: else -> everyone = everyone & ~BIT(i)
	fi
#endif
}

inline DrawOnly(i)
{
	last == i; /* its turn */
	deps[i] = vis; /* whatever it waited for or saw is visible by now */
	last++
}

/* TryDraw: one section under clock_mutex. */
inline Draw(i, use_ring)
{
#if defined(TRAP_2)
	atomic { DrawOnly(i); if :: use_ring -> Reserve(i) :: else fi };
	d_step { Publish(i) }
#elif defined(TRAP_6)
	d_step { DrawOnly(i); Publish(i) };
	atomic { if :: use_ring -> Reserve(i) :: else fi }
#else
	atomic { DrawOnly(i); Publish(i); if :: use_ring -> Reserve(i) :: else fi }
#endif
}

/* SettleTicket: InFlight.ticket = 0, then WakeWorker. */
inline SettleTicket(i)
{
	d_step { infl = infl & ~BIT(i); everyone = everyone & ~BIT(i); slot_of[i] = 0; latch = true }
}

/* Settle: the entry's state. */
inline Settle(i, fate)
{
	d_step { if :: HAS(entry, i) -> state[i] = fate :: else fi }
}

/* ResolvedBelow: under clock_mutex. */
inline ResolvedBelow(low)
{
	d_step {
		low = last + 1;
		m_i = 0;
		do
		:: m_i == N -> break
		:: else ->
			if
			:: HAS(infl, m_i) && TICK(m_i) < low && (slot_of[m_i] == slot || HAS(everyone, m_i)) ->
				low = TICK(m_i)
			:: else
			fi;
			m_i++
		od;
		m_i = 0
	}
}

/* ---- a session (commit.cpp) ---- */

proctype Transaction(byte i)
{
	Draw(i, true); /* BeforeCommit: DrawTicket, WriteHead; nobody sees the row yet */
	if
	:: true ->
#ifdef TRAP_3
		SettleTicket(i);
		vis = vis | BIT(i);
		Settle(i, COMMITTED);
		latch = true
#elif defined(TRAP_12)
		vis = vis | BIT(i);
		SettleTicket(i);
		Settle(i, COMMITTED);
		latch = true
#else
		vis = vis | BIT(i); /* commit record, then out of the proc array */
		Settle(i, COMMITTED); /* AfterEnd, SettleAll: Settle ... */
		/* ... here a sync part commits at its peer, up to 5 s (EndInline) ... */
		SettleTicket(i) /* ... and at last SettleTicket */
#endif
#ifndef NO_ABORTS
	:: true ->
		dead = dead | BIT(i);
		Settle(i, ABORTED);
		SettleTicket(i)
#endif
	fi;
	running--
}

proctype Preparing(byte i)
{
	Draw(i, false); /* PRE_PREPARE: BeforeCommit(true), no ring entry */
	SettleTicket(i); /* XACT_EVENT_PREPARE */
	if
	:: under_way++; /* BeginLateCommit */
		vis = vis | BIT(i); /* FinishPreparedTransaction; locks go before the command's end */
		d_step { /* EndLateCommit: both halves of the word in one step */
			under_way--;
			ended++;
			late_set[ended] = late_set[ended - 1] | BIT(i)
		};
		latch = true /* NudgeWorkersOf */
	:: dead = dead | BIT(i) /* ROLLBACK PREPARED */
	fi;
	running--
}

/* ---- the peer (apply.cpp) ---- */

/* Admit: late ones by their marker, others by the watermark. */
inline Deliver(t)
{
	if
	:: t == NONE -> skip
	:: t != NONE && PREPARED(t) && HAS(delivered, t) -> skip
	:: t != NONE && !PREPARED(t) && TICK(t) <= watermark -> skip
	:: else ->
		assert(HAS(vis, t));
		assert(!HAS(delivered, t)); /* not twice */
		assert((deps[t] & ~delivered) == 0); /* not before what it depends on */
		delivered = delivered | BIT(t);
		deps[t] = 0
	fi
}

inline Apply(a, b, upto)
{
	Deliver(a);
	Deliver(b);
	if
	:: upto > watermark -> watermark = upto
	:: else
	fi;
	CheckPassed(watermark)
}

proctype Peer()
{
	byte a = 0, b = 0, previous = 0, upto = 0, late = 0;

end_peer:
	do
	:: d_step {
		wire?a, b, previous, upto, late ->
		assert(watermark >= previous); /* else MM011 */
		Apply(a, b, upto);
		answers!a, b, upto, late;
		a = 0; b = 0; previous = 0; upto = 0; late = 0
	}
#ifdef ZOMBIES
	:: d_step { /* apply() of a session that is given up: fenced by `previous` */
		zombie?a, b, previous, upto ->
		if
		:: watermark >= previous -> Apply(a, b, upto)
		:: else
		fi;
		a = 0; b = 0; previous = 0; upto = 0
	}
#endif
	od
}

/* ---- the worker (feed.cpp, feed_after.cpp, stream_pipeline.cpp) ---- */

/* GapAhead */
#ifdef TRAP_11
#define GAP_AHEAD (ring_gap > position)
#else
#define GAP_AHEAD (ring_gap > position || ring_taken > position)
#endif

/* LateWork */
#if PREP
#define LATE_WORK (late_open || under_way > 0 || ended != late_seen)
#else
#define LATE_WORK false
#endif

#define RING_EMPTY (entries == 0)
#define FIRST	   ring[0]

inline Raise(to)
{
	if
	:: position < to -> position = to
	:: else
	fi
}

inline Ship(t)
{
	if
	:: n_ship == 0 -> ship0 = t
	:: else -> ship1 = t
	fi;
	n_ship++
}

/* ConsumeRing: nobody may settle an entry whose room is free again. */
inline Consume()
{
	assert(state[FIRST] != PENDING);
	if
	:: TICK(FIRST) > ring_taken -> ring_taken = TICK(FIRST)
	:: else
	fi;
	state[FIRST] = 0;
	entry = entry & ~BIT(FIRST);
#if CAP > 1
	ring[0] = ring[1];
	ring[1] = 0;
#else
	ring[0] = 0;
#endif
	entries--
}

/* Collect, as one MVCC snapshot `seen`: what waits below `below`. */
inline Collect(seen)
{
	m_i = 0;
	refs = 0;
	late_open = false;
	do
	:: m_i == N -> break
	:: else ->
		if
		:: !HAS(seen, m_i) -> skip
		:: HAS(seen, m_i) && TICK(m_i) < below ->
			if
			:: TICK(m_i) > position || PREPARED(m_i) -> refs = refs | BIT(m_i)
			:: else
			fi
		:: HAS(seen, m_i) && TICK(m_i) >= below ->
#ifndef TRAP_7
			if
			:: PREPARED(m_i) -> late_open = true
			:: else
			fi
#else
			skip
#endif
		fi;
		m_i++
	od;
	m_i = 0;
	have_refs = true;
	found = refs != 0
}

/* The lowest ticket among refs. */
inline LowestRef(t)
{
	t = NONE;
	m_i = 0;
	do
	:: m_i == N -> break
	:: else ->
		if
		:: HAS(refs, m_i) ->
			if
			:: t == NONE -> t = m_i
			:: t != NONE && TICK(m_i) < TICK(t) -> t = m_i
			:: else
			fi
		:: else
		fi;
		m_i++
	od;
	m_i = 0
}

/* Confirm, ConfirmLate */
inline Confirm(upto, late)
{
	d_step {
		CheckPassed(upto);
		assert((late_set[late] & ~delivered) == 0);
		if
		:: upto > confirmed -> confirmed = upto
		:: else
		fi;
		late_confirmed = late
	}
}

/* RegisterStream, ActivateStream: the fresh slot's ring is empty, what was drawn is in the gap. */
inline Activate()
{
	d_step {
		registrations--;
		slot++;
#ifndef TRAP_8
		everyone = infl;
#endif
		ring_gap = last;
		ring_taken = 0;
		do
		:: entries > 0 -> entries--; ring[entries] = 0
		:: else -> break
		od;
		entry = 0; /* the old slot's ring stays as long as they need it: HasEntriesOnTheWay */
		confirmed = 0; /* the stream's row is behind; the peer's watermark is not */
		late_confirmed = 0
	}
}

proctype Worker()
{
	byte position = 0; /* Feed */
	byte sent_to = 0; /* Feed.watermark */
	bool from_tables = true, late_open = false;
	byte late_seen = 0, late_reached = 0;
	byte refs = 0, below = 0; /* Feed.refs, refs_below */
	bool have_refs = false, found = false;
	byte ship0 = NONE, ship1 = NONE, n_ship = 0; /* Shipment */
	byte outstanding = 0;
	byte start = 0, late_start = 0, t = 0, b = 0, upto = 0, late = 0;
	bool tables = false, again = false;
	byte crashes = CRASHES;
	byte registrations = (REGISTER > 0 -> 1 : 0);

	if
	:: slot == 0 -> Activate()
	:: else
	fi;

greet: /* Greet, ResetFeed */
	atomic {
		position = (confirmed > watermark -> confirmed : watermark);
		sent_to = watermark;
		from_tables = true;
		late_open = false;
#ifndef TRAP_10
		late_reached = late_confirmed;
#endif
		refs = 0; have_refs = false; found = false; n_ship = 0; outstanding = 0;
		ship0 = NONE; ship1 = NONE
	}

round:
	/* Receive: TakeSync, Applied */
	do
	:: empty(answers) -> break
	:: nempty(answers) ->
		d_step {
			answers?t, b, upto, late;
			/* RemoveLate */
			if :: t != NONE && PREPARED(t) -> removed = removed | BIT(t) :: else fi;
			if :: b != NONE && PREPARED(b) -> removed = removed | BIT(b) :: else fi;
			outstanding--
		};
		Confirm(upto, late);
		d_step { t = 0; b = 0; upto = 0; late = 0 }
	od;

send: /* Send, StartOne, NextShipment */
	if
	:: outstanding == LANES -> goto wait
	:: else -> again = true
	fi;

fill: /* NextShipment's loop, Fill */
	if
	:: !again || n_ship > 0 -> goto filled
	:: else
	fi;
	d_step {
		start = position;
		late_start = late_reached;
		tables = from_tables || LATE_WORK
	};
	if
	:: tables -> goto from_the_tables
	:: else
	fi;

from_the_ring: /* FillFromRing */
	if
	:: n_ship == BATCH -> goto ring_end
	:: else
	fi;
#ifdef TRAP_4
	if
	:: GAP_AHEAD -> from_tables = true; goto ring_done
	:: else
	fi;
	atomic {
		if
		:: RING_EMPTY -> goto ring_end
		:: else -> t = FIRST
		fi
	};
#else
	atomic { /* PeekRing */
		if
		:: RING_EMPTY -> goto ring_end
		:: else -> t = FIRST
		fi
	};
	atomic {
		if
		:: GAP_AHEAD -> from_tables = true; goto ring_done
		:: else
		fi
	};
#endif
	atomic { /* StateOf, TakeEntry */
		if
		:: TICK(t) > position && state[t] == PENDING -> goto ring_done
		:: TICK(t) > position && state[t] == COMMITTED -> Ship(t); position = TICK(t)
		:: TICK(t) > position && state[t] == ABORTED -> position = TICK(t)
		:: TICK(t) <= position
		fi
	};
	d_step { Consume(); t = 0 };
	goto from_the_ring;

ring_end:
	atomic { if :: GAP_AHEAD -> from_tables = true :: else fi };
ring_done:
	atomic {
		t = 0;
		again = from_tables; /* what Fill returns */
#ifndef TRAP_5
		if
		:: LATE_WORK -> /* Rewind */
			position = start;
			late_reached = late_start;
			n_ship = 0; ship0 = NONE; ship1 = NONE;
			from_tables = true;
			refs = 0; have_refs = false; found = false;
			again = false
		:: else
		fi
#endif
	};
	goto fill;

from_the_tables: /* FillFromTables, ReadTables */
	if
	:: have_refs -> goto take_refs
	:: else
	fi;
#if PREP
	late_seen = ended;
#endif
#ifdef TRAP_1
	b = vis & ~removed;
	ResolvedBelow(below);
	d_step { Collect(b); b = 0 };
#else
	ResolvedBelow(below);
	d_step { Collect((vis & ~removed)) };
#endif
#ifndef TRAP_9
	from_tables = true;
#endif
take_refs: /* FillFromRefs */
	atomic {
		do
		:: refs == 0 || n_ship == BATCH -> break
		:: else ->
			LowestRef(t);
			Ship(t);
			Raise(TICK(t));
			refs = refs & ~BIT(t)
		od;
		t = 0
	};
	if
	:: refs != 0 -> again = true; goto fill
	:: else
	fi;
	d_step { /* EndOfRefs */
		Raise(below - 1);
		if
		:: !late_open -> late_reached = late_seen
		:: else
		fi;
		have_refs = false
	};
	do /* TrimRing */
	:: atomic { !RING_EMPTY && TICK(FIRST) <= position -> Consume() }
	:: atomic { RING_EMPTY || TICK(FIRST) > position -> break }
	od;
	from_tables = GAP_AHEAD;
	d_step {
		from_tables = from_tables || LATE_WORK;
		again = found || !from_tables;
		found = false;
		below = 0
	};
	goto fill;

filled:
	if
	:: n_ship == 0 -> goto nothing
	:: else
	fi;
#if CRASHES > 0
	if
	:: d_step { crashes > 0 -> crashes-- }; goto crash
	:: true
	fi;
#endif
	d_step { /* CloseBatch, SendBatch */
		wire!ship0, ship1, sent_to, position, late_reached;
		sent_to = position;
		outstanding++;
		n_ship = 0; ship0 = NONE; ship1 = NONE
	};
	goto send;

nothing: /* Send: ConfirmPassed */
	if
	:: outstanding > 0 -> goto wait
	:: else
	fi;
	if
	:: !from_tables && last > position ->
		ResolvedBelow(below);
		if
		:: RING_EMPTY ->
			if
			:: !GAP_AHEAD ->
				d_step {
					if
					:: !LATE_WORK -> Raise(below - 1)
					:: else
					fi
				}
			:: else
			fi
		:: else
		fi;
		below = 0
	:: else
	fi;
	Confirm(position, late_reached);

wait: /* what is not used any more is set to 0, for fewer states */
	atomic { start = 0; late_start = 0; tables = false; again = false };
end_wait: /* Wait: latch or socket */
	if
	:: d_step { latch || nempty(answers) -> latch = false }; goto round
#if CRASHES > 0
	:: d_step { crashes > 0 && running + under_way + outstanding > 0 -> crashes-- }; goto crash
#endif
#if REGISTER == 2
	:: atomic { registrations > 0 && running > 0 -> Activate() }; goto crash
#endif
	:: running == 0 && !latch && empty(answers) && empty(wire) && outstanding == 0 -> skip
	fi;

	/* At the end everything is delivered, confirmed, and the ring is in use again. */
	assert(delivered == vis);
	assert(confirmed == last);
	assert(late_confirmed == ended);
	assert(!from_tables && RING_EMPTY);
	goto end_all;

#ifdef ZOMBIES
crash: /* Fail, DropPeer: what is on its way arrives later, or never */
	atomic {
		do
		:: nempty(wire) ->
			wire?t, b, upto, late, _;
			if
			:: nfull(zombie) -> zombie!t, b, upto, late
			:: true
			fi
		:: empty(wire) -> break
		od;
		do
		:: nempty(answers) -> answers?_, _, _, _
		:: empty(answers) -> break
		od;
		t = 0; b = 0; upto = 0; late = 0; start = 0; late_start = 0; below = 0;
		tables = false; again = false
	};
	goto greet;
#endif

end_all:
	skip
}

init
{
	atomic {
		byte i = 0;

		slot = (REGISTER == 1 -> 0 : 1);
		running = N;
		run Peer();
		run Worker();
		do
		:: i == N -> break
		:: i < N && PREPARED(i) -> run Preparing(i); i++
		:: i < N && !PREPARED(i) -> run Transaction(i); i++
		od;
		i = 0
	}
}
