# The bank with one master: at the other node nothing is flushed but what the worker
# seals, so that each of its crashes takes back what was acknowledged.  All of that
# comes again, in its order and once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use Bank;
use Test::More;

Bank::run(
	seconds => $ENV{MMREPL_SECONDS} || 6,
	clients => 8,
	masters => 1,
	two_phase => 0,
	applied => 1,
	faults => [ 'immediate', 'immediate', 'cut' ]);

done_testing();
