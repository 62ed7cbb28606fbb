# Whoever is killed, and however a server is shut down with a backlog: it comes
# back, and nothing is lost, doubled or left behind.  Then the moments at which
# this is hardest, each held by a fault point.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use CrashLoad;
use FaultPoints;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $load = CrashLoad->new(conf => "wal_writer_delay = '10s'");
my ($alpha, $beta) = $load->nodes;

sub revive
{
	comes_back($_) foreach $alpha, $beta;
	$load->tidy;
	return;
}

sub pid_where
{
	my ($node, $where) = @_;

	return query($node, "SELECT pid FROM pg_stat_activity WHERE $where ORDER BY backend_start LIMIT 1");
}

# A background worker may still be on its way up after the blow before.
sub worker_of
{
	my ($node, $type) = @_;
	my $pid;

	until_true(sub { $pid = pid_where($node, "backend_type = '$type'") });
	return $pid;
}

# ---- kill -9 under load ----

my %victims = (
	"the source's postmaster" => sub { $alpha->{_pid} },
	"the peer's postmaster" => sub { $beta->{_pid} },
	'both postmasters' => sub { ($alpha->{_pid}, $beta->{_pid}) },
	'a worker' => sub { worker_of($alpha, 'mmrepl stream worker') },
	'the launcher' => sub { worker_of($alpha, 'mmrepl launcher') },
	'a capturing session' => sub { pid_where($alpha, "query LIKE '%counter SET n%'") },
	'a receiving session' => sub { pid_where($beta, "query LIKE '%mmrepl.apply%'") });

foreach my $victim (sort keys %victims)
{
	section "kill -9: $victim" => sub {
		my @pids;

		$load->run(
			during => sub {
				@pids = grep { $_ } $victims{$victim}->();
				kill('KILL', @pids) if @pids;
				return scalar @pids;
			});
		isnt("@pids", '', 'somebody was killed');
		revive();
		$load->check('nothing is lost or doubled');
	};
}

# ---- shutdown with a backlog ----

foreach my $mode ('immediate', 'fast', 'smart')
{
	section "shutdown with a backlog: $mode" => sub {
		$beta->close_to_peers;
		$load->run;
		cmp_ok($alpha->queued('beta'), '>', 20, 'there is a backlog');
		ok( IPC::Run::run(
				[ 'pg_ctl', '-D', $alpha->data_dir, '-m', $mode, '-t', $MmreplCluster::timeout, 'stop' ],
				'>', '/dev/null', '2>&1'),
			'the server ends');
		bring_back($alpha);
		$beta->open_to_peers;
		revive();
		$load->check('everything arrives');
	};
}

section 'smart shutdown with peers connected' => sub {
	$load->run;
	$load->check('both are at work');
	ok( IPC::Run::run(
			[ 'pg_ctl', '-D', $alpha->data_dir, '-m', 'smart', '-t', $MmreplCluster::timeout, 'stop' ],
			'>', '/dev/null', '2>&1'),
		'the server ends, although the peer is connected');
	bring_back($alpha);
	revive();
	$load->check('and goes on');
};

# ---- rotation ----

foreach my $point ('rotate-switched', 'rotate-emptied')
{
	section "crash in a rotation: $point" => sub {
		arm_fault($alpha, "$point:crash:1");
		foreach (1 .. 5)
		{
			last if fired($alpha, "$point:crash:1");
			$load->run;
		}
		ok(await_fault($alpha, "$point:crash:1"), 'it came to that');
		revive();
		disarm_faults($alpha);
		$load->check('nothing is lost or doubled');
	};
}

# ---- synchronous_commit = off ----

# Without the WAL writer nothing is flushed but what somebody waits for.
sub stop_wal_writer
{
	my $pid = pid_where($alpha, "backend_type = 'walwriter'");

	kill('STOP', $pid);
	return $pid;
}

foreach my $point ('worker-before-flush', 'worker-batch-sent', 'worker-peer-committed')
{
	section "synchronous_commit = off, crash at $point" => sub {
		my $fault = "$point:crash:1";

		query($alpha, "SELECT mmrepl.pause('beta')");
		query($alpha, "SELECT pg_switch_wal()");
		my $writer = stop_wal_writer();
		my $id = $load->{next}++;
		my $counter = 2 * ($id % 4);
		my $done = query($alpha, qq{
			SET synchronous_commit = off;
			BEGIN;
			UPDATE counter SET n = n + 1 WHERE id = $counter;
			INSERT INTO log VALUES (0, $id, $counter);
			COMMIT; SELECT 'done'});
		is($done, 'done', 'committed, not flushed');
		arm_fault($alpha, $fault);
		# Its own commit is not to be flushed, either.
		$alpha->psql('postgres',
			"SET synchronous_commit = off; SELECT mmrepl.resume('beta')");
		ok(await_fault($alpha, $fault), 'the worker came to that');
		until_true(sub { is_down($alpha) });
		kill('KILL', $writer);
		bring_back($alpha);
		disarm_faults($alpha);
		revive();
		$load->check('both have the transaction, or neither');
		my $there = query($beta, "SELECT count(*) FROM log WHERE id = $id AND origin = 0");
		note "it is there: $there";
		is($there, $point eq 'worker-before-flush' ? '0' : '1', 'lost before the flush, kept after it');
	};
}

$_->stop('fast') foreach $alpha, $beta;
done_testing();
