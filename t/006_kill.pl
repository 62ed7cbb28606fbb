# Under load in both directions the stream workers, the launchers and the
# sessions that apply at the peer are terminated at random.  Nothing may be
# lost, and nothing may be done twice.
#
# The load lasts 15 seconds, or 60 when MMREPL_LONG is set.  MMREPL_SEED
# makes another choice of victims.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use IPC::Run;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $seconds = $ENV{MMREPL_LONG} ? 60 : 15;
seed($ENV{MMREPL_LONG} ? 'random' : 2013);

# A ring and queue tables so small that both come round many times.
my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => "mmrepl.ring_size = '64kB'\nmmrepl.rotate_size = '256kB'");
my %peer = (alpha => $beta, beta => $alpha);

# Every transaction adds one to one of its node's own counters, and one row to
# the log: a lost transaction shows in the sums.  One that is applied twice does
# not, because rows are replicated and not additions; for that a trigger counts
# at each node how often a counter is written, by whomever.
$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE counter (id int PRIMARY KEY, n bigint NOT NULL, filler text);
	CREATE TABLE log (origin int, id bigserial, counter int, PRIMARY KEY (origin, id));
});
$alpha->safe_psql('postgres',
	q{INSERT INTO counter SELECT g, 0, repeat('x', 80) FROM generate_series(1, 1000) g}
);
$alpha->create_pair('counter', 'beta', 'copy_data => true');
$alpha->create_pair('log', 'beta');
$alpha->wait_caught_up('beta');
$beta->create_pair($_, 'alpha') foreach ('counter', 'log');
$alpha->same_rows($beta, 'counter', name => 'both start with the same rows');

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE written (id int);
	CREATE FUNCTION count_write() RETURNS trigger LANGUAGE plpgsql AS
	$$BEGIN INSERT INTO public.written VALUES (NEW.id); RETURN NULL; END$$;
	CREATE TRIGGER count_write AFTER INSERT OR UPDATE ON counter
	  FOR EACH ROW EXECUTE FUNCTION count_write();
	CREATE TRIGGER count_write AFTER INSERT OR UPDATE ON log
	  FOR EACH ROW EXECUTE FUNCTION count_write();
	ALTER TABLE counter ENABLE ALWAYS TRIGGER count_write;
	ALTER TABLE log ENABLE ALWAYS TRIGGER count_write;
});

my %load;
foreach my $node ($alpha, $beta)
{
	my $side = $node->name eq 'alpha' ? 0 : 1;
	my $script = $node->basedir . '/load.sql';

	append_to_file(
		$script, qq{
\\set id random(1, 500) * 2 - $side
BEGIN;
UPDATE counter SET n = n + 1 WHERE id = :id;
INSERT INTO log (origin, counter) VALUES ($side, :id);
END;
});
	my $run = { out => '', err => '' };
	$run->{harness} = IPC::Run::start(
		[
			'pgbench', '-n', '-M', 'prepared', '-c', '2', '-j', '1',
			'-T', $seconds, '-f', $script, $node->connstr('postgres')
		],
		'<',
		\undef,
		'>',
		\$run->{out},
		'2>',
		\$run->{err},
		IPC::Run::timeout($seconds + $MmreplCluster::timeout));
	$load{ $node->name } = $run;
}

sub load_is_running
{
	foreach my $run (values %load)
	{
		$run->{harness}->pump_nb if $run->{harness}->pumpable;
	}
	return grep { $_->{harness}->pumpable } values %load;
}

# Finds the victims of a kind on a node.
my %victims = (
	worker => q{SELECT pid FROM mmrepl.pg_stat_mmrepl WHERE pid IS NOT NULL},
	launcher => q{SELECT pid FROM pg_stat_activity
				  WHERE backend_type LIKE 'mmrepl%launcher%'},
	receiver => q{SELECT pid FROM pg_stat_activity
				  WHERE client_addr IS NOT NULL ORDER BY backend_start LIMIT 1});

# What has to be seen before the next blow: the victim has a successor.
my %revived = (
	worker => q{SELECT count(*) > 0 FROM mmrepl.pg_stat_mmrepl
				WHERE pid <> %d AND state IN ('streaming', 'catching up')},
	launcher => q{SELECT count(*) > 0 FROM pg_stat_activity
				  WHERE backend_type LIKE 'mmrepl%%launcher%%' AND pid <> %d},
	receiver => q{SELECT count(*) > 0 FROM pg_stat_activity
				  WHERE client_addr IS NOT NULL AND pid <> %d});

$alpha->poll_ok($victims{worker} =~ s/SELECT pid/SELECT count(*) > 0/r,
	'there is a worker');
is( $alpha->safe_psql(
		'postgres',
		q{SELECT count(*) FROM pg_stat_activity
		  WHERE backend_type LIKE 'mmrepl%launcher%'}),
	'1',
	'there is one launcher');

my %blows = (worker => 0, launcher => 0, receiver => 0);
while (load_is_running())
{
	my $node = (rand() < 0.5) ? $alpha : $beta;
	my $draw = rand();
	my $kind =
	  $draw < 0.45 ? 'worker' : $draw < 0.9 ? 'receiver' : 'launcher';

	# However few blows there is time for: two of each that have to be.
	$kind = 'worker' if $blows{worker} < 2;
	$kind = 'receiver' if $blows{receiver} < $blows{worker} && $blows{receiver} < 2;
	my $pid = $node->safe_psql('postgres', $victims{$kind});

	next unless $pid =~ /^\d+$/;
	$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
	$blows{$kind}++;
	my $revived = sprintf($revived{$kind}, $pid);

	# Without work nobody has to connect to the peer again.
	if ($kind eq 'receiver')
	{
		while (load_is_running())
		{
			last if $node->safe_psql('postgres', $revived) eq 't';
		}
		next;
	}
	$node->poll_query_until('postgres', $revived)
	  or BAIL_OUT("the $kind of " . $node->name . ' did not come back');
}
note join(', ', map { "$blows{$_} ${_}s" } sort keys %blows);
cmp_ok($blows{worker}, '>=', 2, 'workers were terminated');
cmp_ok($blows{receiver}, '>=', 2, 'receivers were terminated');

my %done;
foreach my $name (sort keys %load)
{
	my $run = $load{$name};
	ok($run->{harness}->finish, "$name: pgbench ended well")
	  or diag($run->{err});
	unlike($run->{err}, qr/error|abort/i, "$name: no client met an error");
	($done{$name}) =
	  $run->{out} =~ /number of transactions actually processed: (\d+)/;
	note "$name: $done{$name} transactions";
	cmp_ok($done{$name}, '>', 100, "$name: there was a load");
}

foreach my $node ($alpha, $beta)
{
	my $name = $node->name;
	$node->safe_psql('postgres', "SELECT mmrepl.retry_now('$_')")
	  foreach ($peer{$name}->name);
	$node->wait_caught_up($peer{$name}->name);
}
$alpha->same_rows($beta, $_) foreach ('counter', 'log');
foreach my $node ($alpha, $beta)
{
	my $name = $node->name;
	is( $node->safe_psql(
			'postgres',
			'SELECT origin, count(*) FROM log GROUP BY 1 ORDER BY 1'),
		"0|$done{alpha}\n1|$done{beta}",
		"$name: the log has one row for each transaction of each node");
	is( $node->safe_psql('postgres', 'SELECT sum(n) FROM counter'),
		$done{alpha} + $done{beta},
		"$name: the counters count each transaction once");
	is( $node->safe_psql(
			'postgres', q{
			SELECT count(*) FROM counter c
			WHERE n <> (SELECT count(*) FROM log WHERE counter = c.id)}),
		'0',
		"$name: every single counter agrees with the log");
	is( $node->safe_psql('postgres', 'SELECT count(*) FROM written'),
		2 * ($done{alpha} + $done{beta}),
		"$name: every row was written once");
	is( $node->safe_psql(
			'postgres', 'SELECT sum(conflicts) FROM mmrepl.progress'),
		'0',
		"$name: nothing arrived that was there before");
	is($node->queued($peer{$name}->name), '0', "$name: the queue is empty");
	$node->poll_state($peer{$name}->name, 'streaming');
	ok(!$node->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
		"$name: no crash in the log");
}

# Without load they come back as well.
foreach my $kind ('worker', 'launcher')
{
	my $pid = $alpha->safe_psql('postgres', $victims{$kind});
	$alpha->terminate($pid);
	$alpha->poll_ok(sprintf($revived{$kind}, $pid),
		"an idle $kind comes back");
}
$alpha->safe_psql('postgres', 'UPDATE counter SET n = n + 1 WHERE id = 2');
$alpha->wait_caught_up('beta');
$alpha->same_rows($beta, 'counter', name => 'and works');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
