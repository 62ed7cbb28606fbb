# t/070_sync_chaos.pl for five minutes.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use Chaos;
use Test::More;

Chaos::run(
	seconds => $ENV{MMREPL_SECONDS} || 300,
	clients => 8,
	two_phase => 0.3,
	applied => 0.5,
	faults => [
		'cut', 'close', 'kill', 'immediate', 'fast', 'reset', 'stall',
		'lost answer', 'black hole', ('lost commit', 'late') x 3
	]);

done_testing();
