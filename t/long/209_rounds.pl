# t/009_rounds.pl with 200 rounds.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use Rounds;
use Test::More;

Rounds::run(rounds => 200);

done_testing();
