# Moments that pass too quickly to be met: what a fault point holds still is looked at.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use FaultPoints;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(conf => q{
	mmrepl.retry_min_delay = '20ms'
	mmrepl.retry_max_delay = '200ms'
	autovacuum = off
});

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

$alpha->create_table_on_both($beta, q{
	CREATE TABLE item (id int PRIMARY KEY, n int);
	CREATE INDEX ON item (n); -- so that each version has an entry of its own in the key's index
	CREATE TABLE gate (id int PRIMARY KEY, n int)});
$alpha->create_pair($_, 'beta') foreach qw(item gate);

sub mended
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$alpha->wait_caught_up('beta') || diag($alpha->describe('beta'));
	$alpha->same_rows($beta, $_, name => "$name: $_ is equal") foreach qw(item gate);
	is(there('SELECT sum(conflicts) FROM mmrepl.progress'), '0', "$name: no conflict");
	return;
}

# The index leads to a version that was rolled back; before the update comes to it,
# it is gone and another row has its place.
section 'the place has been given to another row' => sub {
	my $fault = 'apply-located:wait:1';
	my $retries = $alpha->stat('beta', 'retries');

	here('INSERT INTO item SELECT g, 0 FROM generate_series(1, 10) g');
	$alpha->wait_caught_up('beta');
	here('DELETE FROM item WHERE id = 1');
	$alpha->wait_caught_up('beta');
	there('VACUUM (INDEX_CLEANUP ON) item');
	is(there('BEGIN; UPDATE item SET n = 1 WHERE id = 5 RETURNING ctid; ROLLBACK'),
		'(0,1)', 'a version that was rolled back, and stands before the valid one');
	arm_fault($beta, $fault);
	until_true(sub { query($beta, 'SHOW mmrepl.fault') eq $fault }) or fail("$fault is set");
	here('UPDATE item SET n = n + 10 WHERE id IN (5, 6)');
	ok(await_fault($beta, $fault), 'the rows are located');
	there('VACUUM (INDEX_CLEANUP ON) item');
	is(there('INSERT INTO item VALUES (11, 0) RETURNING ctid'), '(0,1)', 'another row gets the place');
	disarm_faults($beta);
	here(q{SET mmrepl.capture = off; INSERT INTO item VALUES (11, 0)});
	mended('the other row is as it was');
	is($alpha->stat('beta', 'retries'), $retries, '... and was not in the way');
};

# The peer confirms each batch, and lets batches be executed ahead.
section 'what is executed ahead is counted before it is confirmed' => sub {
	my $fault = 'worker-confirmed:wait:4';
	my @gates = map { $beta->session } 1 .. 2;
	my $stands = sub {
		return 'EXISTS (SELECT FROM pg_stat_activity WHERE ' . $_[0]->pid . ' = ANY (pg_blocking_pids(pid)))';
	};

	there(
		q{ALTER FUNCTION mmrepl.hello RENAME TO new_hello;
		CREATE FUNCTION mmrepl.hello(uuid, int, int, OUT protocol int, OUT node uuid, OUT watermark bigint, OUT server_version int)
		LANGUAGE sql AS 'SELECT 2, node, watermark, server_version FROM mmrepl.new_hello($1, $2, 2)'});
	here(q{ALTER SERVER beta OPTIONS (ADD lanes '2'); ALTER SYSTEM SET mmrepl.batch_transactions = 2});
	$alpha->reload;
	$beta->terminate_peers;
	# After a failure some batches go alone.
	foreach (1 .. 20)
	{
		here("INSERT INTO gate VALUES ($_, 0)");
		$alpha->wait_caught_up('beta');
	}
	my $ahead = $alpha->stat('beta', 'batches_ahead');

	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here("UPDATE gate SET n = n + 1 WHERE id = $_") foreach 1 .. 8;
	$gates[$_]->ok('BEGIN; UPDATE gate SET n = n WHERE id = ' . (1 + 2 * $_)) foreach 0, 1;
	arm_fault($alpha, $fault);
	until_true(sub { query($alpha, 'SHOW mmrepl.fault') eq $fault }) or fail("$fault is set");
	here(q{SELECT mmrepl.resume('beta')});
	$beta->poll_ok('SELECT ' . $stands->($gates[0]), 'the first batch stands still, behind it another lane is opened');
	$beta->poll_ok(q{SELECT count(*) = 2 FROM pg_stat_activity WHERE application_name = 'mmrepl_bgw' AND backend_type = 'client backend'}, '... it is');
	$gates[0]->ok('COMMIT');
	$beta->poll_ok('SELECT ' . $stands->($gates[1]) . q{ AND EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'object'
		AND classid = 'mmrepl.progress'::regclass AND objsubid <> 0)}, 'the second one does, and the third waits for its turn');
	$gates[1]->ok('COMMIT');
	ok(await_fault($alpha, $fault), 'the fourth one is confirmed');
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '1 min')}), 't', '... as is known');
	is($alpha->stat('beta', 'batches_ahead') - $ahead, 2, '... and counted');
	disarm_faults($alpha);
	$_->quit foreach @gates;
	mended('lanes');
	is($alpha->stat('beta', 'batches_ahead') - $ahead, 2, 'there were no more');
};

$_->stop('fast') foreach $alpha, $beta;
done_testing();
