# The queue over millions of transactions: with a live peer its files stay below
# 200 MB and the worker's memory flat; and a large backlog drains as fast as a
# small one.
#
# MMREPL_TRANSACTIONS (default 5 million) says how many, MMREPL_BACKLOG (default
# 2 million) how large the large backlog is.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

plan skip_all => 'takes long: run by make check-long'
  unless $ENV{MMREPL_LONG};

my $transactions = $ENV{MMREPL_TRANSACTIONS} || 5_000_000;
my $backlog = $ENV{MMREPL_BACKLOG} || 2_000_000;
my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => "max_wal_size = '4GB'\ncheckpoint_timeout = '1h'\nfsync = off");

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

my $size = q{SELECT sum(pg_relation_size(oid)) FROM pg_class
	WHERE relnamespace = 'mmrepl'::regnamespace AND relname ~ '^queue_[0-9]$'};

# What the process has allocated for itself, in kB.
sub memory_of
{
	my ($pid) = @_;

	return slurp_file("/proc/$pid/status") =~ /^RssAnon:\s+(\d+) kB/m ? $1 : die;
}

# Seconds of processor time that the process has used.
sub cpu_of
{
	my ($pid) = @_;
	my @fields = split / /, slurp_file("/proc/$pid/stat") =~ s/^.*\) //r;

	return ($fields[11] + $fields[12]) / 100;
}

sub worker
{
	return $alpha->stat('beta', 'pid');
}

# Single-row transactions, in that many sessions at a time; calls back meanwhile.
sub load
{
	my ($count, $sessions, $meanwhile) = @_;
	my @sessions = map { $alpha->session } (1 .. $sessions);
	my $each = int($count / $sessions);

	foreach my $i (0 .. $#sessions)
	{
		$sessions[$i]->ok('SET synchronous_commit = off');
		$sessions[$i]->start("CALL load($i, $each)");
	}
	my $pids = join(',', map { $_->pid } @sessions);
	while (here(qq{SELECT count(*) FROM pg_stat_activity
			WHERE pid IN ($pids) AND state = 'active'}) > 0)
	{
		$meanwhile->() if $meanwhile;
		Time::HiRes::sleep(0.2);
	}
	foreach my $session (@sessions)
	{
		my (undef, $err) = $session->finish;
		is($err, '', 'a session has written its share');
		$session->quit;
	}
	return;
}

sub synced
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(here(q{SELECT mmrepl.wait_for_replay('beta', '1 hour')}),
		't', 'all of it has arrived');
}

$alpha->create_table_on_both($beta,
	'CREATE TABLE item (id int PRIMARY KEY, n int)');
$alpha->create_pair('item', 'beta');
here(q{INSERT INTO item SELECT g, 0 FROM generate_series(0, 9999) g});
here(
	q{CREATE PROCEDURE load(start int, count int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. count LOOP
			UPDATE item SET n = n + 1 WHERE id = start * 1000 + i % 1000;
			COMMIT;
		END LOOP;
	END $$});
synced();

###############################################################################

section "$transactions transactions with a live peer" => sub {
	my ($highest, $first, $most) = (0, 0, 0);
	my $pid = worker();

	load($transactions / 10, 2);
	synced();
	$first = memory_of($pid);
	load(
		$transactions * 9 / 10,
		2,
		sub {
			my $now = here($size);
			my $memory = memory_of($pid);

			$highest = $now if $now > $highest;
			$most = $memory if $memory > $most;
		});
	synced();
	is(worker(), $pid, 'it is still the same worker');
	note("queue files: at most $highest bytes; worker: $first kB, at most $most kB");
	cmp_ok($highest, '<', 200_000_000, 'the queue files stay below 200 MB');
	cmp_ok(memory_of($pid), '<', $first + 8192, q{the worker's memory is flat});
	$alpha->same_rows($beta, 'item');
};

# Processor time is what the worker and the session at the peer need, whatever else
# runs here: on a quiet machine the slower of the two sets the pace.
section "a backlog of $backlog" => sub {
	my %seconds;

	foreach my $count (100_000, $backlog)
	{
		my $pid = worker();
		my ($lines, $cpu, $took);

		here(q{SELECT mmrepl.pause('beta')});
		$alpha->poll_state('beta', 'paused');
		load($count, 2);
		my @receivers = $beta->peer_sessions;
		my $cpu_of_all = sub {
			my $sum = cpu_of($pid);
			$sum += cpu_of($_) foreach (@receivers);
			return $sum;
		};
		is(scalar @receivers, 1, 'the worker has one session at the peer');
		$cpu = $cpu_of_all->();
		$took = Time::HiRes::time();
		here(q{SELECT mmrepl.resume('beta')});
		synced();
		$took = Time::HiRes::time() - $took;
		$seconds{$count} = ($cpu_of_all->() - $cpu) / $count;
		is(worker(), $pid, 'the worker lives');
		note(sprintf '%d: %.0f transactions/s, %.2f us of the processor each, %d kB',
			$count, $count / $took, 1e6 * $seconds{$count}, memory_of($pid));
		$alpha->same_rows($beta, 'item');
	}
	cmp_ok(
		$seconds{$backlog}, '<', $seconds{100_000} / 0.9,
		'a transaction of a large backlog costs no more than one of a small');
	$alpha->poll_ok("SELECT ($size) < 200000000", 'the files are small again');
};

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
