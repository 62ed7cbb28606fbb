# Clients on each of two nodes insert, update and delete the same few rows, change their
# keys, and take back what they did, in sync mode both ways, while nodes are killed and
# connections are cut: no update is lost, both nodes are equal afterwards, every
# transaction that was acknowledged is present on both, and no replay was in conflict.
#
# t/long/270_sync_chaos.pl is the same for five minutes.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use Chaos;
use Test::More;

Chaos::run(
	seconds => $ENV{MMREPL_SECONDS} || 20,
	clients => 8,
	two_phase => 0.3,
	applied => 0.5,
	faults => [
		'cut', 'close', 'kill', 'immediate', 'fast', 'reset', 'stall',
		'lost answer', 'black hole', ('lost commit', 'late') x 3
	]);

done_testing();
