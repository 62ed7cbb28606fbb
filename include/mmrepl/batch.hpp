/*
 * batch.hpp
 *		The frame in which change sets travel to a peer: read by apply, written
 *		by delivery.  (A door of the room change.)
 *
 *	 batch		 := magic:u32 ('MMR1') flags:u8 encoding:u32 node:16 bytes
 *					stream:u32 clock:u64 previous:u64 last:u64 sweep_xid:u64 part:u32
 *					transaction*
 *	 transaction := 'X' ticket:u64 xid:u64 flags:u8 segments:u32 (length:u32 bytes)*
 *
 *	 flags		 kInline: sent in a user's transaction (sync): no watermark is
 *				 looked at, the transaction's marker (node, xid) is inserted once.
 *				 kMore: the last transaction goes on in a further batch of the same
 *				 remote transaction (part counts from 0), or, inline, the statement
 *				 does: what is to be checked at its end is not checked yet; kFirst: part 0 of such.
 *				 kTurn: a batch that follows may be executed before this one has committed.
 *				 kAhead: this is one; its predecessor has kTurn.  Both since protocol 2.
 *				 kRelaxed: the commit need not be flushed; a later batch without this
 *				 flag makes it last, were it empty.  Since protocol 3.
 *	 previous	 watermark that must be there before (fence against a batch that
 *				 overtakes a failed one); last: the watermark afterwards.  What is executed ahead
 *				 looks at it when its rows are written, and nothing else may be there.
 *	 sweep_xid	 markers of this node with a lower xid are no longer needed (0: none).
 *	 transaction flags: kMarked: insert the marker first, skip the transaction when
 *				 it is there already; kLate: not covered by the watermark (a prepared
 *				 transaction that ended late), always kMarked too.
 */
#pragma once

#include "mmrepl/pg.hpp"

namespace mmrepl::batch
{

constexpr uint32 kMagic = 0x4D4D5231; /* "MMR1": protocols 1 to 3 */
constexpr int kProtocol = 3;
constexpr int kOldestProtocol = 1;
constexpr int kLanesProtocol = 2;	/* has kTurn and kAhead */
constexpr int kRelaxedProtocol = 3; /* has kRelaxed */

constexpr uint8 kInline = 1; /* flags of a batch */
constexpr uint8 kFirst = 2;
constexpr uint8 kMore = 4;
constexpr uint8 kTurn = 8;
constexpr uint8 kAhead = 16;
constexpr uint8 kRelaxed = 32;
constexpr uint8 kKnownFlags = 63;

/* What apply() returns for an inline batch when something may be checked at the end only. */
constexpr uint64 kMayDefer = 1;

constexpr uint8 kMarked = 1; /* flags of a transaction */
constexpr uint8 kLate = 2;

constexpr char kTransaction = 'X';

} // namespace mmrepl::batch
