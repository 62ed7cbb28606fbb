# Twenty random rounds of (load, fault, recovery); t/long/209_rounds.pl has 200.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use Rounds;
use Test::More;

Rounds::run(rounds => 20);

done_testing();
