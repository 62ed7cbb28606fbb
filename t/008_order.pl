# 32 clients hammer a few rows, with savepoints, rollbacks, errors, deadlocks,
# changes of keys, deletes and inserts of the same key, and synchronous_commit on
# and off; between the nodes processes are terminated.  At every moment the peer
# shows whole transactions, and afterwards each row has had the same versions in
# the same order.
#
# t/long/208_order.pl is the same for two minutes.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use OrderTorture;
use Test::More;

OrderTorture::run(seconds => $ENV{MMREPL_SECONDS} || 12, clients => 32);

done_testing();
