# Bugs that only a fault at the wrong moment shows.  Each names what was wrong.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use CrashLoad;
use FaultPoints;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $load = CrashLoad->new(conf => "synchronous_commit = off");
my ($alpha, $beta) = $load->nodes;
my $bulk = "INSERT INTO big SELECT 0, %d, g, repeat('x', 9000) FROM generate_series(1, 20) g";

# What is counted like the load's transactions, with the given id.
sub counted
{
	my ($id) = @_;
	my $counter = 2 * ($id % 4);

	return "UPDATE counter SET n = n + 1 WHERE id = $counter; INSERT INTO log VALUES (0, $id, $counter)";
}

section 'rolled back chunk rows, and the table emptied before the next ones' => sub {
	my $session = $alpha->session;
	my $tables = q{SELECT max(pg_relation_size(('mmrepl.queue_' || n)::regclass))
				   FROM generate_series(0, 2) n};

	# The first table is larger than the second spill will make it.
	$session->ok('BEGIN');
	$session->ok('SAVEPOINT a');
	$session->ok(sprintf($bulk, $_)) foreach 1001 .. 1003;
	$session->ok('ROLLBACK TO a');
	until_true(
		sub {
			query($alpha, 'INSERT INTO scratch0 SELECT coalesce(max(id), 0) + 1 FROM scratch0');
			return query($alpha, $tables) < 100_000;
		}) or fail('the rolled back rows are emptied');
	$session->ok(sprintf($bulk, 1004));
	$session->ok('COMMIT');
	$session->quit;
	$alpha->wait_caught_up('beta');
	$load->check('the transaction is read from where it stands');
};

section 'late rows that are delivered by hand' => sub {
	query($alpha, "SELECT mmrepl.pause('beta')");
	query($alpha, 'BEGIN; ' . counted(2001) . "; PREPARE TRANSACTION 'late'");
	query($alpha, "COMMIT PREPARED 'late'");
	my ($out, $err);
	$alpha->psql('postgres', 'SELECT mmrepl.deal_sync_err_rec(1000)', stdout => \$out, stderr => \$err);
	is("$out$err", 't', 'nothing was wrong');
	is($alpha->queued('beta'), '0', 'they are gone');
	query($alpha, "SELECT mmrepl.resume('beta')");
	$load->check('and were delivered once');
};

# Their markers may be swept as soon as they are removed: if they came back they
# would be applied again.
section 'a crash does not bring back late rows that were removed' => sub {
	my $writer = query($alpha, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'");

	kill('STOP', $writer);
	query($alpha, 'BEGIN; ' . counted(3001) . "; PREPARE TRANSACTION 'late'");
	query($alpha, "COMMIT PREPARED 'late'");
	ok( until_true(
			sub {
				query($alpha, 'SELECT sum(n) FROM (SELECT count(*) AS n FROM mmrepl.queue_0 WHERE flags & 4 > 0 '
					. 'UNION ALL SELECT count(*) FROM mmrepl.queue_1 WHERE flags & 4 > 0 '
					. 'UNION ALL SELECT count(*) FROM mmrepl.queue_2 WHERE flags & 4 > 0) q') eq '0';
			}),
		'they were delivered and removed');
	$beta->close_to_peers;
	kill('KILL', $alpha->{_pid});
	until_true(sub { is_down($alpha) });
	kill('KILL', $writer);
	bring_back($alpha);
	is($alpha->queued('beta'), '0', 'they stay away');
	$beta->open_to_peers;
	$load->check('and were applied once');
};

# The oldest running transaction must not be newer than the next one: the bound
# would have been taken for one of the epoch before.
section 'transactions that begin while markers are about to be swept' => sub {
	my $fault = 'sweep-choosing:wait:1';
	my $retries = $alpha->stat('beta', 'retries');
	my $session = $alpha->session;

	arm_fault($alpha, $fault);
	until_true(
		sub {
			query($alpha, "SET mmrepl.sync_timeout = '500ms'; INSERT INTO slog SELECT 0, coalesce(min(id), 0) - 1, 0 FROM slog");
			return fired($alpha, $fault);
		}) or fail('markers are about to be swept');
	query($alpha, 'SELECT txid_current()') foreach 1, 2;
	$session->ok('BEGIN; SELECT txid_current()');
	release_fault($alpha, $fault);
	$alpha->wait_caught_up('beta');
	$session->ok('COMMIT');
	$session->quit;
	disarm_faults($alpha);
	is($alpha->stat('beta', 'retries'), $retries, 'the sweep was not refused');
	query($alpha, 'DELETE FROM slog WHERE id < 0');
	$load->check('nothing is lost or doubled');
};

section 'a scout that dies does not leave a backlog alone' => sub {
	$beta->close_to_peers;
	query($alpha, 'BEGIN; ' . counted(4001) . '; COMMIT');
	arm_fault($alpha, 'scout-begun:error:1');
	$alpha->stop('fast');
	$beta->open_to_peers;
	$alpha->start;
	ok(await_fault($alpha, 'scout-begun:error:1'), 'the scout has died');
	disarm_faults($alpha);
	# Nothing is asked of the extension at the source: that would send another scout.
	ok(until_true(sub { query($beta, 'SELECT count(*) FROM log WHERE id = 4001') eq '1' }),
		'the backlog is delivered all the same');
	$load->check('nothing is lost or doubled');
};

# The peer's savepoint was given up before ours: nothing undid there what was undone here.
section 'a savepoint that fails when it is released' => sub {
	my $session = $alpha->session;

	$session->ok(q{SET mmrepl.fault = 'savepoint-release:error:1'});
	$session->ok(q{
		DO $$
		BEGIN
			INSERT INTO slog VALUES (0, 5001, 0);
			BEGIN
				INSERT INTO slog VALUES (0, -5002, 0);
			EXCEPTION WHEN serialization_failure THEN
				INSERT INTO slog VALUES (0, 5003, 0);
			END;
		END $$});
	$session->quit;
	is(query($_, 'SELECT string_agg(id::text, \' \' ORDER BY id) FROM slog WHERE abs(id) BETWEEN 5001 AND 5003'),
		'5001 5003', $_->name . ' has what was not undone') foreach $alpha, $beta;
	query($alpha, 'DELETE FROM slog WHERE id IN (5001, 5003)');
	$load->check('nothing is lost or doubled');
};

$_->stop('fast') foreach $alpha, $beta;
done_testing();
