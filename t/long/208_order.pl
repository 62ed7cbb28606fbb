# t/008_order.pl for two minutes.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use OrderTorture;
use Test::More;

OrderTorture::run(seconds => $ENV{MMREPL_SECONDS} || 120, clients => 32);

done_testing();
