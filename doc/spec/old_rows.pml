/*
 * old_rows.pml
 *		One row that both nodes write in sync mode, transactions in doubt, and what
 *		their late replay may do to it.
 *
 * doc/spec/README.md says what is modelled; doc/spec/check runs everything.
 * Beside each step stands the C++ function that it models.
 *
 * A configuration is given by -D:
 *	 COUNT_0	transactions of node 0
 *	 COUNT_1	transactions of node 1
 *	 LOSSES		how often a session is lost, at any time
 *	 CRASHES	how often node 1 dies and loses what it has not flushed: commits of
 *				node 0's transactions there, which are `applied`
 *	 TRAP_n		a mistake, see README.md
 */
#ifndef COUNT_0
#define COUNT_0 2
#endif
#ifndef COUNT_1
#define COUNT_1 1
#endif
#ifndef LOSSES
#define LOSSES 1
#endif
#ifndef CRASHES
#define CRASHES 0
#endif

#ifndef VALUES
#define VALUES 3
#endif
#define STEPS  4 /* two changes of each of two transactions */
#define NONE   255

#define PEER (1 - node)

typedef Node
{
	byte row;		/* what is committed */
	byte flushed;	/* what a crash leaves of it */
	byte lock;		/* 0: free, 1: of the node's own writer, 2: of the peer's session */
	byte n;			/* steps committed, not yet forgotten: the queue */
	byte before[STEPS];
	byte after[STEPS];
	byte there;		/* of these: at the peer (watermark and markers) */
	byte sure;		/* of these: flushed there */
	bool session;	/* the writer's session at the peer lives */
	bool zombie;	/* it is given up, its COMMIT is on its way */
	byte zombie_row;
	bool done;
}

Node nodes[2];
byte truth; /* the row after the last commit anywhere */
byte losses = LOSSES, crashes = CRASHES;

/* The last commit at node's peer: its row, and the queue up to there. */
inline CommitThere(value)
{
	nodes[PEER].row = value;
	nodes[PEER].lock = 0;
	nodes[node].there = nodes[node].n;
	if
#if CRASHES > 0
	:: node == 0 /* applied */
#endif
	:: else -> nodes[PEER].flushed = value; nodes[node].sure = nodes[node].n
	fi
}

/* A commit of its own, flushed with all that is before it. */
inline CommitHere(value)
{
	nodes[node].row = value;
	nodes[node].flushed = value;
	nodes[PEER].sure = nodes[PEER].there;
	nodes[node].lock = 0
}

proctype Writer(byte node; byte count)
{
	byte old, middle, new;

	do
	:: atomic { count > 0 && nodes[node].lock == 0 -> /* begins: the row is locked here */
		count--;
		nodes[node].lock = 1;
		old = nodes[node].row;
		select (middle : 0 .. VALUES - 1);
		select (new : 0 .. VALUES - 1)
	};
	if
	/* PassFence; the peer's session executes it: IsExpectedRow */
	:: atomic { nodes[node].there == nodes[node].n && nodes[PEER].lock == 0 ->
		if
#ifdef TRAP_4
		:: true ->
#else
		:: nodes[PEER].row == old ->
#endif
			nodes[PEER].lock = 2;
			nodes[node].session = true
		:: else -> nodes[node].lock = 0; goto over /* 40001 */
		fi
	}
	:: atomic { nodes[PEER].lock != 0 -> nodes[node].lock = 0; goto over } /* 40P01 */
	fi;
	if
	:: atomic { true -> /* rolled back */
		nodes[node].lock = 0;
		if
		:: nodes[node].session -> nodes[PEER].lock = 0
		:: else
		fi;
		goto over
	}
	:: atomic { true -> /* committed here, with its queued copy */
		assert(truth == old);
		truth = new;
		nodes[node].before[nodes[node].n] = old;
		nodes[node].after[nodes[node].n] = middle;
		nodes[node].before[nodes[node].n + 1] = middle;
		nodes[node].after[nodes[node].n + 1] = new;
		nodes[node].n = nodes[node].n + 2;
		CommitHere(new)
	}
	fi;
	if /* EndInline */
	:: atomic { nodes[node].session -> CommitThere(new) }
	:: atomic { nodes[node].session -> /* GiveUp */
		nodes[node].session = false;
		nodes[node].zombie = true;
		nodes[node].zombie_row = new
	}
	:: atomic { !nodes[node].session }
	fi;
over:
	atomic { nodes[node].session = false; old = 0; middle = 0; new = 0 }
	:: atomic { count == 0 -> break }
	od;
	nodes[node].done = true
}

#ifdef TRAP_5
#define END (nodes[node].there + 2)
#else
#define END nodes[node].n
#endif

/* A step of the queue does not find the row that it expects: IsUndone. */
inline Differs()
{
	until = NONE;
#ifndef TRAP_1
	other = at;
	do
	:: other < END && nodes[node].after[other] == nodes[node].before[at] ->
		until = other;
		break
#ifdef TRAP_2
	:: else -> break
#else
	:: other < END && nodes[node].after[other] != nodes[node].before[at] -> other++
	:: other >= END -> break
#endif
	od;
	other = 0;
#endif
#if !defined(TRAP_1) && !defined(TRAP_2) && !defined(TRAP_3) && !defined(TRAP_5)
	assert(until != NONE); /* nobody's work is overwritten */
#endif
	if
	:: until == NONE -> nodes[PEER].row = nodes[node].after[at]
	:: else
	fi
}

/* The queue of a node, in one batch; what is locked there is waited for. */
proctype Worker(byte node)
{
	byte at = 0, until = NONE, other = 0;

end_worker:
	do
	:: d_step { nodes[node].there < nodes[node].n && nodes[PEER].lock == 0 && !nodes[node].session ->
		at = nodes[node].there;
		until = NONE;
		do
		:: at >= END -> break
		:: else ->
			if
#ifndef TRAP_3
			:: until != NONE && at <= until /* IsPassedOver */
#endif
			:: else ->
				if
				:: nodes[PEER].row == nodes[node].before[at] ->
					nodes[PEER].row = nodes[node].after[at]
				:: else -> Differs()
				fi
			fi;
			at++
		od;
		nodes[node].there = END;
		nodes[node].sure = nodes[node].there;
		nodes[PEER].flushed = nodes[PEER].row;
		at = 0;
		until = NONE
	}
	od
}

/* What happens to sessions, and to node 1. */
proctype Fate()
{
	byte node;

end_fate:
	do
	:: atomic { losses > 0 && nodes[0].session && nodes[1].lock == 2 ->
		losses--; nodes[0].session = false; nodes[1].lock = 0 }
	:: atomic { losses > 0 && nodes[1].session && nodes[0].lock == 2 ->
		losses--; nodes[1].session = false; nodes[0].lock = 0 }
	:: d_step { nodes[0].zombie -> nodes[0].zombie = false; node = 0; CommitThere(nodes[0].zombie_row);
		nodes[0].zombie_row = 0; node = 0 }
	:: d_step { nodes[1].zombie -> nodes[1].zombie = false; node = 1; CommitThere(nodes[1].zombie_row);
		nodes[1].zombie_row = 0; node = 0 }
	:: d_step { losses > 0 && nodes[0].zombie -> losses--; nodes[0].zombie = false; nodes[0].zombie_row = 0;
		nodes[1].lock = 0 }
	:: d_step { losses > 0 && nodes[1].zombie -> losses--; nodes[1].zombie = false; nodes[1].zombie_row = 0;
		nodes[0].lock = 0 }
	:: d_step { crashes > 0 && nodes[1].lock != 1 && !nodes[1].session ->
		/* (one of its own writers would have died, too: like a rollback) */
		crashes--;
		nodes[1].row = nodes[1].flushed;
		nodes[0].there = nodes[0].sure;
		nodes[0].zombie = false;
		nodes[0].zombie_row = 0;
		nodes[0].session = false;
		nodes[1].lock = 0
	}
	od
}

#define QUIET(i) (nodes[i].done && nodes[i].there == nodes[i].n && !nodes[i].zombie && nodes[i].lock == 0)

init
{
	atomic {
		run Writer(0, COUNT_0);
		run Writer(1, COUNT_1);
		run Worker(0);
		run Worker(1);
		run Fate()
	};
	QUIET(0) && QUIET(1);
	/* It may be lost once more. */
	d_step {
		QUIET(0) && QUIET(1) && crashes == 0;
		assert(nodes[0].row == nodes[1].row);
		assert(nodes[0].row == truth)
	}
}
