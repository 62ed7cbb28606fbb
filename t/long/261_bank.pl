# t/061_bank.pl for five minutes.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use Bank;
use Test::More;

Bank::run(
	seconds => $ENV{MMREPL_SECONDS} || 300,
	clients => 16,
	two_phase => 0.5,
	applied => 0.5,
	faults => [
		'cut', 'close', 'kill', 'immediate', 'fast', 'reset', 'stall',
		'lost answer', 'lost commit', 'black hole'
	]);

done_testing();
