# The bank of t/061_bank.pl with mmrepl.sync_commit = 'applied' everywhere, and nodes
# that crash again and again: what was acknowledged and not flushed at the peer comes
# there again, and nothing is done to the accounts before it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use Bank;
use Test::More;

Bank::run(
	seconds => $ENV{MMREPL_SECONDS} || 8,
	clients => 8,
	two_phase => 0,
	applied => 1,
	faults => [ 'immediate', 'kill', 'cut' ]);

done_testing();
