/*
 * lanes.pml
 *		Batches of one stream that are executed side by side, and commit in order.
 *
 * doc/spec/README.md says what is modelled; doc/spec/check runs everything.
 * Beside each step stands the C++ function that it models.
 *
 * A configuration is given by -D:
 *	 B			batches; number i ends at ticket i and follows ticket i - 1
 *	 L			lanes
 *	 R			rows; which of them a batch writes, and in which order, is left open
 *	 WRITES		bit mask: the rows that every batch writes
 *	 LOOKS		a batch may look at row 0 and not write it
 *	 LOSSES		how often the sender gives all its connections up
 *	 LARGE		bit mask: batches that have no turn (a large transaction, a sweep)
 *	 ANY_VICTIM	a deadlock may also end who is not ahead
 *	 TRAP_n		a mistake, see README.md
 */
#ifndef B
#define B 3
#endif
#ifndef L
#define L 2
#endif
#ifndef R
#define R 2
#endif
#ifndef LOSSES
#define LOSSES 0
#endif
#ifndef LARGE
#define LARGE 0
#endif

#define BIT(i)	  (1 << (i))
#define HAS(m, i) (((m) >> (i)) & 1)

/* ---- the peer ---- */

#define GENERATIONS (LOSSES + 1)
#define SESSIONS	(L * GENERATIONS)
#define NOBODY		SESSIONS

/* What a session may hold and wait for: rows, turns (0 .. B), the watermark row. */
#define TURN(i)	  (R + (i))
#define PROGRESS  (R + B + 1)
#define NOTHING	  (R + B + 2)

byte owner[NOTHING + 1];	/* nobody owns NOTHING */
byte wants[SESSIONS + 1];	/* nobody wants anything for NOBODY */
byte taken;					/* Turns.taken: batches that have begun, once */
byte watermark;				/* mmrepl.progress */
byte row[R];				/* the last batch that has written it, committed */
byte writes[B + 1];			/* which rows the batch writes */
byte given_up;				/* connections that the sender has closed */
bool finished;				/* everything is confirmed */

/* ---- the connections ---- */

#define AHEAD 1
chan wire[SESSIONS] = [B] of { byte, byte };	/* batch, flags */
chan answer[SESSIONS] = [B] of { byte, byte };	/* batch, verdict */

#define DONE	 0
#define LOST	 1	/* it was executed ahead in vain */
#define DEADLOCK 2	/* it was not ahead, and the victim of a deadlock */
#define REFUSED	 3

byte m_i, m_r; /* scratch of d_steps */

#define BLOCKER(s) owner[wants[s]]

/* Whether who waits is part of a circle (deadlock detector): at most SESSIONS long. */
#define CIRCLE_2(s) (BLOCKER(BLOCKER(s)) == (s))
#define CIRCLE_3(s) (BLOCKER(BLOCKER(BLOCKER(s))) == (s))
#define CIRCLE_4(s) (BLOCKER(BLOCKER(BLOCKER(BLOCKER(s)))) == (s))
#define CIRCLE(s)	((s) != NOBODY && (CIRCLE_2(s) || CIRCLE_3(s) || CIRCLE_4(s)))

/* The end of a transaction: all its locks at once. */
inline Release(s)
{
	d_step {
		m_i = 0;
		do
		:: m_i < NOTHING && owner[m_i] == (s) -> owner[m_i] = NOBODY; m_i++
		:: m_i < NOTHING && owner[m_i] != (s) -> m_i++
		:: m_i == NOTHING -> break
		od;
		m_i = 0;
		wants[s] = NOTHING
	}
}

inline Fail(s, verdict_)
{
	Release(s);
	verdict = verdict_
}

/* Within atomic.  The wait for a lock ends when it is had, or with the transaction: then verdict is set. */
inline Acquire(s, what)
{
	wants[s] = what;
	if
	:: owner[what] == NOBODY || owner[what] == (s) ->
		owner[what] = (s);
		wants[s] = NOTHING
	:: CIRCLE(s) && ahead -> Fail(s, LOST)
#ifdef ANY_VICTIM
	:: CIRCLE(s) && !ahead -> Fail(s, (flags == AHEAD -> LOST : DEADLOCK))
#endif
	:: HAS(given_up, s) && owner[what] != (s) -> Fail(s, LOST)
	fi
}

/* WaitForPredecessor, PassFence: the turn before, then the watermark row. */
inline PassFence(s, i)
{
#ifdef TRAP_3
	owner[TURN(i - 1)] == NOBODY || HAS(given_up, s);
#else
	atomic {
		Acquire(s, TURN(i - 1));
		if
		:: owner[TURN(i - 1)] == s -> owner[TURN(i - 1)] = NOBODY /* a shared lock, given back */
		:: else
		fi
	};
#endif
	atomic {
	if
	:: verdict == DONE -> Acquire(s, PROGRESS)
	:: else
	fi;
	if
	:: verdict != DONE
#ifdef TRAP_1
	:: verdict == DONE && watermark < i - 1
#else
	:: verdict == DONE && watermark < i - 1 -> Fail(s, LOST)
#endif
#ifdef TRAP_2
	:: verdict == DONE && watermark > i - 1
#else
	:: verdict == DONE && watermark > i - 1 -> Fail(s, LOST)
#endif
	:: verdict == DONE && watermark == i - 1
	fi;
	ahead = false
	}
}

/* AwaitBegin: no detector knows of this wait.  Its bound matters only where nothing will come any more. */
inline BeginAhead(s, i)
{
	ahead = true;
	if
	:: owner[TURN(i - 1)] != NOBODY
	:: owner[TURN(i - 1)] == NOBODY && watermark == i - 1 -> PassFence(s, i)
	:: owner[TURN(i - 1)] == NOBODY && (watermark > i - 1 || (HAS(taken, i - 1) && watermark < i - 1)) ->
		Fail(s, LOST)
	:: HAS(given_up, s) -> Fail(s, LOST)
	fi
}

/* A row's writer is waited for; what it has left is written over.  The right one, or what is seen is wrong. */
inline WriteRows(s, i)
{
	do
	:: left == 0 || verdict != DONE -> break
	:: atomic { verdict == DONE && left != 0 ->
		if
		:: HAS(left, 0) -> r = 0
#if R > 1
		:: HAS(left, 1) -> r = 1
#endif
		fi;
		Acquire(s, r);
		left = left & ~BIT(r)
		}
	od
}

/* What the batch must have found in a row: the last batch before it that writes there. */
inline CheckRows(i)
{
	m_r = 0;
	do
	:: m_r == R -> break
	:: else ->
		if
		:: HAS(writes[i], m_r) ->
			m_i = i - 1;
			do
			:: m_i == 0 || HAS(writes[m_i], m_r) -> break
			:: else -> m_i--
			od;
			assert(row[m_r] == m_i);
			row[m_r] = i
		:: else
		fi;
		m_r++
	od;
	m_r = 0;
	m_i = 0
}

/* TakeTurn; within atomic */
inline Begin(s, i)
{
	seen = 255;
	left = writes[i];
	if
	:: !HAS(LARGE, i) ->
		Acquire(s, TURN(i));
		if
		:: verdict == DONE -> taken = taken | BIT(i)
		:: else
		fi
	:: else
	fi
}

/* EnterStream */
inline Enter(s, i)
{
	if
	:: verdict != DONE
	:: verdict == DONE && flags == AHEAD -> BeginAhead(s, i)
	:: verdict == DONE && flags != AHEAD ->
		atomic {
			Acquire(s, PROGRESS);
			if
			:: verdict == DONE && watermark < i - 1 -> Fail(s, REFUSED)
			:: else
			fi
		}
	fi
}

/* A row that is only looked at: a trigger, a missing row. */
inline Look(s, i)
{
	if
#ifdef TRAP_4
	:: verdict == DONE -> seen = row[0]
#else
	:: ahead && verdict == DONE -> PassFence(s, i); seen = row[0]
	:: !ahead && verdict == DONE -> seen = row[0]
#endif
	:: skip
	fi
}

/* The commit, if Sync has come; within atomic.  A batch that is here already is skipped. */
inline End(s, i)
{
	if
	:: verdict == DONE && applies && HAS(given_up, s) -> verdict = LOST
	:: verdict == DONE && applies ->
		assert(watermark == i - 1);
		m_i = i - 1;
		do
		:: seen == 255 || m_i == 0 || HAS(writes[m_i], 0) -> break
		:: else -> m_i--
		od;
		assert(seen == 255 || seen == m_i);
		m_i = 0;
		CheckRows(i);
		watermark = i
	:: verdict != DONE || !applies
	fi;
	Release(s)
}

proctype Session(byte s)
{
	byte batch, flags, verdict, left, r, seen;
	bool ahead, applies;

end:
	do
	:: atomic { wire[s] ? batch, flags ->
		if
		:: HAS(given_up, s) -> break /* the rest never arrives */
		:: skip
		fi;
		Begin(s, batch)
		}
		Enter(s, batch);
		applies = verdict == DONE && (ahead || watermark < batch);
		if
		:: applies ->
#ifdef LOOKS
			Look(s, batch);
#endif
			WriteRows(s, batch);
			if
			:: verdict == DONE && ahead -> PassFence(s, batch)
			:: else
			fi
		:: else
		fi;
		atomic {
			End(s, batch);
			if
			:: !HAS(given_up, s) -> answer[s] ! batch, verdict
			:: else
			fi;
			batch = 0; flags = 0; verdict = 0; left = 0; r = 0; seen = 0; ahead = false; applies = false
		}
	:: finished || HAS(given_up, s) && empty(wire[s]) -> break
	od
}

/* ---- the sender (stream_lanes.cpp, stream_pipeline.cpp) ---- */

proctype Sender()
{
	byte first = 1, next = 1; /* on their way: first .. next - 1 */
	byte lost, i, verdict, losses, b;
	byte lane[B + 2];
	byte is_ahead, is_sent; /* bit masks */
	byte base;				/* the first session of this generation */
	bool behind, go, followers;

	do
	:: first > B -> break
	:: atomic { first <= B ->
			/* IsBehindAnother */
			behind = false;
			i = first;
			do
			:: i + 1 >= next -> break
			:: else ->
				behind = behind || lane[i] == lane[next - 1];
				i++
			od;
#ifdef TRAP_5
			behind = false;
#endif
			/* SendFilled: the first that is not sent; MayGo */
			i = first;
			do
			:: i == next || !HAS(is_sent, i) -> break
			:: else -> i++
			od;
			go = i < next && lost == 0;
			b = first;
			do
			:: b >= i -> break
			:: else ->
#ifndef TRAP_6
				go = go && (HAS(is_ahead, i) || !HAS(is_ahead, b));
#endif
				b++
			od;
			b = 0;
		if
		/* Room, ChooseLane: ahead or not, as it happens */
		:: next <= B && lost == 0 && next - first < L + 1 && !behind &&
		   (next == first || HAS(is_sent, next - 1)) ->
			lane[next] = 0;
			if
			:: next > first && !HAS(LARGE, next) && !HAS(LARGE, next - 1) ->
				is_ahead = is_ahead | BIT(next);
				lane[next] = (lane[next - 1] + 1) % L
			:: skip
			fi;
			next++
		:: go ->
			wire[base + lane[i]] ! i, HAS(is_ahead, i);
			is_sent = is_sent | BIT(i)
		/* Receive: the answers, in order */
		:: first + lost < next && HAS(is_sent, first + lost) && nempty(answer[base + lane[first + lost]]) ->
			answer[base + lane[first + lost]] ? b, verdict;
			assert(b == first + lost);
			atomic {
				followers = false;
				i = b + 1;
				do
				:: i >= next -> break
				:: else -> followers = followers || (HAS(is_ahead, i) && HAS(is_sent, i)); i++
				od;
				i = 0
			};
			if
			:: verdict == DONE && lost == 0 ->
				is_ahead = is_ahead & ~BIT(first);
				is_sent = is_sent & ~BIT(first);
				first++
			/* TakeResult */
			:: verdict == DONE && lost > 0 ->
				assert(given_up != 0);
				lost++
			/* IsLostAhead, TakeLoss */
			:: verdict != DONE && (HAS(is_ahead, b) || lost > 0 || (verdict == DEADLOCK && followers)) ->
				lost++
			:: else ->
				assert(false)
			fi;
			/* SendAgain */
			if
			:: lost > 0 && (first + lost == next || !HAS(is_sent, first + lost)) ->
				atomic {
					i = first;
					do
					:: i == first + lost -> break
					:: else ->
						is_ahead = is_ahead & ~BIT(i);
						is_sent = is_sent & ~BIT(i);
						lane[i] = 0;
						i++
					od;
					lost = 0;
					i = 0
				}
			:: else
			fi;
			b = 0;
			verdict = 0
		/* Fail, DropPeer, Greet */
		:: losses < LOSSES ->
			losses++;
			i = 0;
			do
			:: i == L -> break
			:: else -> given_up = given_up | BIT(base + i); i++
			od;
			base = base + L;
			is_ahead = 0;
			is_sent = 0;
			lost = 0;
			i = 0;
			first = watermark + 1;
			next = first
		fi
		}
	od;
	assert(watermark == B);
	finished = true
}

init
{
	byte i;

	atomic {
		for (i : 0 .. NOTHING) {
			owner[i] = NOBODY
		}
		for (i : 0 .. NOBODY) {
			wants[i] = NOTHING
		}
		for (i : 1 .. B) {
#ifdef WRITES
			writes[i] = WRITES
#else
			select(m_r : 0 .. BIT(R) - 1);
			writes[i] = m_r
#endif
		}
		m_r = 0;
		for (i : 0 .. SESSIONS - 1) {
			run Session(i)
		}
		i = 0;
		run Sender()
	}
}
