# The queue at rest and under load: its files stay flat while the peer is there,
# and nothing that goes on around it (long transactions, vacuum, dumps, locks)
# stops delivery or is stopped by it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

# Each look at the tables' size counts: small tables make the rotation visible.
my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => "autovacuum = off\nmmrepl.rotate_size = '256kB'");

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

sub there
{
	return $beta->safe_psql('postgres', $_[0]);
}

sub synced
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->wait_caught_up('beta');
}

my $size = q{SELECT sum(pg_relation_size(oid)) FROM pg_class
	WHERE relnamespace = 'mmrepl'::regnamespace AND relname ~ '^queue_[0-9]$'};

$alpha->create_table_on_both($beta,
	'CREATE TABLE item (id int PRIMARY KEY, n int)');
$alpha->create_pair('item', 'beta');
here(q{INSERT INTO item SELECT g, 0 FROM generate_series(1, 100) g});
here(
	q{CREATE PROCEDURE load(count int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. count LOOP
			UPDATE item SET n = n + 1 WHERE id = i % 100 + 1;
			COMMIT;
		END LOOP;
	END $$});
synced();

###############################################################################

section 'the files stay flat while the peer is there' => sub {
	my $load = $alpha->session;
	my $highest = 0;

	$load->ok('SET synchronous_commit = off');
	foreach my $round (1 .. 6)
	{
		$load->ok('CALL load(5000)');
		synced();
		my $now = here($size);
		$highest = $now if $now > $highest;
		# The worker looks at the tables once a second, which is less often than
		# a fast machine fills them.
		$alpha->poll_ok("SELECT ($size) < 512 * 1024", "round $round: emptied");
	}
	# What 5000 transactions queue is about 900 kB.
	cmp_ok(here(q{SELECT sum(n) FROM item}), '==', 30000, 'all was written');
	cmp_ok($highest, '<', 2_000_000, 'the files were never larger than a round');
	$alpha->same_rows($beta, 'item');
	$load->quit;
	$alpha->poll_ok(
		"SELECT ($size) < 2 * 1024 * 1024",
		'and are small again in the end') || diag(here($size));
};

# One that waits for a lock of its own would be stopped by the first of these,
# a rotation that waits for its lock by all of them.
section 'locks and long transactions' => sub {
	my $reader = $alpha->session;
	my $writer = $alpha->session;
	my $idle = $alpha->session;
	my $locker = $alpha->session;

	$alpha->create_table_on_both($beta,
		'CREATE TABLE late (id int PRIMARY KEY, n int)');
	$alpha->create_pair('late', 'beta');
	synced();

	$reader->ok('BEGIN ISOLATION LEVEL REPEATABLE READ');
	$reader->ok('SELECT count(*) FROM item');
	$reader->ok('SELECT count(*) FROM mmrepl.sync_err_rec');
	$writer->ok('BEGIN');
	$writer->ok('INSERT INTO late VALUES (1, 1)');
	$idle->ok('BEGIN');
	$idle->ok('SELECT pg_current_xact_id()');

	here('CALL load(9000)');
	synced();
	$alpha->same_rows($beta, 'item',
		name => 'long transactions do not stop delivery');
	cmp_ok(here($size), '>', 512 * 1024,
		'the tables that somebody has read are not emptied');
	my ($ret, undef, $err) = $alpha->psql(
		'postgres', 'SET statement_timeout = 30000; VACUUM; VACUUM mmrepl.queue_0');
	is("$ret$err", '0', 'vacuum goes through');
	here('CALL load(1000)');
	synced();
	$alpha->command_ok(
		[ 'pg_dump', '--lock-wait-timeout=30000', '-f', $alpha->basedir . '/dump.sql',
		  '-d', $alpha->connstr('postgres') ],
		'so does pg_dump');
	is(there('SELECT count(*) FROM late'), '0',
		'what is not committed is not there');

	$reader->ok('COMMIT');
	$idle->ok('COMMIT');
	$writer->ok('COMMIT');
	synced();
	is(there('SELECT count(*) FROM late'), '1', 'and then it is');
	here('CALL load(2000)');
	synced();
	$alpha->poll_ok(
		"SELECT ($size) < 1024 * 1024",
		'the tables are emptied once nobody reads them') || diag(here($size));

	# A queue table is locked against everything, as by a tool that rewrites it.
	# Neither upkeep nor the ring needs it while nobody writes to it: no table
	# becomes the active one meanwhile, and the active one has a row.
	$alpha->append_conf('postgresql.conf', q{mmrepl.rotate_size = '1GB'});
	$alpha->reload;
	foreach my $round (1 .. 3)
	{
		here("UPDATE item SET n = n + 1 WHERE id = $round");
		synced();
	}
	my $bytes = q{SELECT q FROM unnest('{queue_0,queue_1,queue_2}'::text[]) q
		WHERE pg_relation_size(('mmrepl.' || q)::regclass)};
	$alpha->poll_ok("SELECT count(*) = 1 FROM ($bytes > 0) a",
		'all queue tables but the active one are emptied');
	my ($locked) = split /\n/, here("$bytes = 0");
	$alpha->poll_state('beta', 'streaming');
	$locker->ok('BEGIN');
	$locker->ok("LOCK TABLE mmrepl.$locked IN ACCESS EXCLUSIVE MODE");
	foreach my $round (1 .. 20)
	{
		here("SET statement_timeout = '60s'; UPDATE item SET n = n + 1 WHERE id = $round");
		last unless synced();
	}
	$alpha->same_rows($beta, 'item', name => 'a locked queue table does not stop delivery');
	$locker->ok('COMMIT');

	# And a table of a pair: its writers wait, others do not.
	$locker->ok('BEGIN');
	$locker->ok('LOCK TABLE item IN ACCESS EXCLUSIVE MODE');
	here('INSERT INTO late VALUES (2, 2)');
	synced();
	is(there('SELECT count(*) FROM late'), '2', 'nor does a locked table of a pair');
	$locker->ok('COMMIT');
	$_->quit foreach ($reader, $writer, $idle, $locker);
};

ok(!$alpha->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
	'no crash in the log of the source');
$alpha->stop('fast');
$beta->stop('fast');

done_testing();
