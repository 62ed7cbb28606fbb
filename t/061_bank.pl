# Sixteen clients on each of two nodes move money between 1,000 accounts, in sync
# mode both ways, while nodes are killed and connections are cut: the total is
# right in every snapshot, both nodes are equal afterwards, and every transfer
# that was acknowledged is present on both.
#
# t/long/261_bank.pl is the same for five minutes.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use Bank;
use Test::More;

Bank::run(
	seconds => $ENV{MMREPL_SECONDS} || 20,
	clients => 16,
	two_phase => 0.5,
	applied => 0.5,
	faults => [
		'cut', 'close', 'kill', 'immediate', 'fast', 'reset', 'stall',
		'lost answer', 'lost commit', 'black hole'
	]);

done_testing();
