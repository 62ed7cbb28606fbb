# Two masters in sync mode that lock each other out, and sync and async changes
# of the same rows while the mode changes and the peer comes and goes.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use Client;
use History;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $deadlock_timeout = 300;    # ms
my $slack = 1.5;               # s, for a machine that has other things to do

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => join("\n",
		"deadlock_timeout = ${deadlock_timeout}ms",
		q{mmrepl.retry_min_delay = '20ms'},
		q{mmrepl.retry_max_delay = '200ms'}));

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE account (id int PRIMARY KEY, n int NOT NULL);
	INSERT INTO account SELECT g, 0 FROM generate_series(1, 10) g;
	CREATE TABLE item (id int PRIMARY KEY, token text);
	INSERT INTO item SELECT g, 'start' FROM generate_series(1, 4) g;
});
$alpha->create_pair_on_both($beta, 'account', q{mode => 'sync'});
$alpha->create_pair('item', 'beta',
	q{mode => 'sync', on_unreachable => 'queue'});
$_->safe_psql('postgres', 'UPDATE account SET n = 0') foreach ($alpha, $beta);

###############################################################################

section 'a deadlock across the nodes' => sub {
	my %session = map { $_->name => $_->session } ($alpha, $beta);
	my ($here, $there) = @session{qw(alpha beta)};

	# The node with the higher id waits twice as long: it is the one that goes on.
	my %id = map { $_->name => $_->safe_psql('postgres', 'SELECT mmrepl.node_id()') }
	  ($alpha, $beta);
	my ($loser, $winner) = sort { $id{$a} cmp $id{$b} } keys %id;

	foreach my $session ($here, $there)
	{
		$session->ok(q{SET statement_timeout = '20s'});
		$session->ok('BEGIN');
	}
	$here->ok('UPDATE account SET n = n + 1 WHERE id = 1');
	$there->ok('UPDATE account SET n = n + 1 WHERE id = 2');
	$here->start('UPDATE account SET n = n + 1 WHERE id = 2');
	$there->start('UPDATE account SET n = n + 1 WHERE id = 1');
	my ($out, $err, $took) = $session{$loser}->finish;
	like($err, qr/ERROR:\s+40P01: /, 'one of the two gets 40P01');
	like($err, qr/HINT:\s+Retry the transaction/, 'and the hint to retry');
	cmp_ok($took, '>', 1.9 * $deadlock_timeout / 1000,
		'after a wait that is no deadlock yet');
	cmp_ok($took, '<', 2 * $deadlock_timeout / 1000 + $slack,
		'within twice deadlock_timeout');
	$session{$loser}->run('ROLLBACK');
	($out, $err, $took) = $session{$winner}->finish;
	is($err, '', 'the other one goes on');
	$session{$winner}->ok('COMMIT');
	$alpha->same_rows($beta, 'account');
	is( $alpha->safe_psql(
			'postgres', 'SELECT n FROM account WHERE id < 3 ORDER BY id'),
		"1\n1",
		'what is there is what the other one did');

	# A lock_timeout of the user's that is shorter stays what it is, and so does
	# NOWAIT.
	my $waiting = $session{$loser};
	my $holding =
	  $loser eq 'alpha' ? $alpha->session : $beta->session;
	$holding->ok('BEGIN; SELECT * FROM account WHERE id = 3 FOR UPDATE');
	$waiting->ok(q{BEGIN; SET LOCAL lock_timeout = '50ms'});
	$waiting->ok('UPDATE account SET n = n WHERE id = 4');
	($out, $err) = $waiting->run('UPDATE account SET n = n WHERE id = 3');
	like($err, qr/ERROR:\s+55P03: .*lock timeout/,
		'the lock_timeout of the user is told as such');
	$waiting->ok('ROLLBACK');
	$waiting->ok('BEGIN; UPDATE account SET n = n WHERE id = 4');
	($out, $err) =
	  $waiting->run('SELECT * FROM account WHERE id = 3 FOR UPDATE NOWAIT');
	like($err, qr/ERROR:\s+55P03: could not obtain lock/, 'and NOWAIT, too');
	$waiting->ok('ROLLBACK');

	# The bound was set in a subtransaction, and gone with it; what it had sent for the
	# statement around it stays locked there.
	my $own = $loser eq 'alpha' ? $alpha : $beta;
	$own->safe_psql('postgres', q{
		CREATE FUNCTION in_vain() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			UPDATE account SET n = n WHERE id = 9;
			PERFORM 1 / 0;
		EXCEPTION WHEN division_by_zero THEN
			RETURN NULL;
		END $$;
		CREATE TRIGGER in_vain AFTER UPDATE ON account FOR EACH ROW WHEN (NEW.id = 4) EXECUTE FUNCTION in_vain()});
	$waiting->ok('BEGIN; UPDATE account SET n = n WHERE id = 4');
	($out, $err) = $waiting->run('SELECT * FROM account WHERE id = 3 FOR UPDATE');
	like($err, qr/ERROR:\s+40P01: /, 'a subtransaction that is rolled back leaves waits bounded');
	$waiting->ok('ROLLBACK');

	# plpgsql can catch it as what it is.
	$waiting->ok('BEGIN; UPDATE account SET n = n WHERE id = 4');
	($out, $err) = $waiting->run(
		q{DO $$BEGIN UPDATE account SET n = n WHERE id = 3;
		  EXCEPTION WHEN deadlock_detected THEN RAISE NOTICE 'caught'; END$$});
	like($err, qr/NOTICE:.*caught/, 'a function catches it as deadlock_detected');
	$waiting->ok('COMMIT');
	$_->quit foreach ($holding, values %session);
	$own->safe_psql('postgres', 'DROP TRIGGER in_vain ON account');
};

# Each session waits at its fence for what is queued there; that waits at the other
# node for a lock of the session there.
section 'a deadlock through the queues' => sub {
	my %node = map { $_->name => $_ } ($alpha, $beta);
	my %other = (alpha => $beta, beta => $alpha);
	my %id = map { $_ => $node{$_}->safe_psql('postgres', 'SELECT mmrepl.node_id()') }
	  keys %node;
	my ($loser, $winner) = sort { $id{$a} cmp $id{$b} } keys %id;
	my %session = map { $_ => $node{$_}->session } keys %node;
	my %row = (alpha => 5, beta => 6);

	foreach my $name (sort keys %node)
	{
		$session{$name}->ok(q{SET statement_timeout = '30s'});
		$session{$name}->ok('BEGIN');
		$session{$name}->ok("SELECT * FROM account WHERE id = $row{$name} FOR UPDATE");
	}
	foreach my $name (sort keys %node)
	{
		my $wanted = $row{ $other{$name}->name };

		$node{$name}->safe_psql('postgres',
			"BEGIN; SET LOCAL mmrepl.mode = 'async'; UPDATE account SET n = n + 1 WHERE id = $wanted; COMMIT");
		$other{$name}->poll_ok(
			q{SELECT count(*) > 0 FROM pg_stat_activity
			  WHERE client_addr IS NOT NULL AND wait_event_type = 'Lock'},
			"what $name delivers waits for a lock");
	}
	$session{$_}->start('UPDATE account SET n = n + 1 WHERE id = ' . ($row{$_} + 2))
	  foreach sort keys %node;
	my ($out, $err, $took) = $session{$loser}->finish;
	like($err, qr/ERROR:\s+40P01: deadlock or lock wait across nodes/, 'one of the two gets 40P01');
	like($err, qr/DETAIL:\s+What is queued.*HINT:\s+Retry the transaction/s, 'and the hint to retry');
	cmp_ok($took, '>', 1.9 * $deadlock_timeout / 1000, 'after a wait that is no deadlock yet');
	cmp_ok($took, '<', 2.5 * $deadlock_timeout / 1000 + $slack,
		'about twice deadlock_timeout later');
	$session{$loser}->run('ROLLBACK');
	(undef, $err) = $session{$winner}->finish;
	is($err, '', 'the other one goes on');
	$session{$winner}->ok('COMMIT');
	$alpha->wait_caught_up('beta');
	$beta->wait_caught_up('alpha');
	$alpha->same_rows($beta, 'account');

	# Delivery that waits for somebody else, for nobody here, is waited for.
	my $holder = $beta->session;
	my $writer = $alpha->session;
	$holder->ok('BEGIN');
	$holder->ok('SELECT * FROM account WHERE id = 5 FOR UPDATE');
	$alpha->safe_psql('postgres',
		q{BEGIN; SET LOCAL mmrepl.mode = 'async'; UPDATE account SET n = n + 1 WHERE id = 5; COMMIT});
	$writer->start('UPDATE account SET n = n + 1 WHERE id = 6');
	Time::HiRes::sleep(5 * $deadlock_timeout / 1000);
	$holder->ok('ROLLBACK');
	(undef, $err, $took) = $writer->finish;
	is($err, '', 'who keeps no peer waiting waits as long as sync_timeout says');
	cmp_ok($took, '>', 4.9 * $deadlock_timeout / 1000, '... longer than a deadlock may last');
	$_->quit foreach ($holder, $writer, values %session);
	$alpha->same_rows($beta, 'account');
};

section 'opposite orders under load' => sub {
	my $before = $alpha->safe_psql('postgres', 'SELECT sum(n) FROM account');
	my %writers;

	foreach my $node ($alpha, $beta)
	{
		push @{ $writers{ $node->name } }, Client->start(
			$node,
			sub {
				my ($a, $b) = (1 + int(rand(10)), 1 + int(rand(9)));
				$b++ if $b >= $a;
				return ($_[0],
					'BEGIN; '
					  . "UPDATE account SET n = n + 1 WHERE id = $a; "
					  . "UPDATE account SET n = n + 1 WHERE id = $b; COMMIT;");
			},
			seed => $_,
			pause => 0.01) foreach (1 .. 4);
	}
	Time::HiRes::sleep(5);
	my ($acked, %errors, %hints) = (0);
	foreach my $name (sort keys %writers)
	{
		my $done = 0;

		foreach my $report (map { $_->finish } @{ $writers{$name} })
		{
			$done += @{ $report->{acked} };
			$errors{ substr $_, 0, 5 } += $report->{errors}->{$_}
			  foreach keys %{ $report->{errors} };
			$hints{$_} += $report->{said}->{$_} foreach keys %{ $report->{said} };
		}
		cmp_ok($done, '>', 3, "$name goes on: $done transactions");
		$acked += $done;
	}
	my $deadlocks = delete $errors{'40P01'};
	my $aftermath = delete $errors{'25P02'};
	cmp_ok($deadlocks, '>', 0, "there were deadlocks: $deadlocks");
	is(join(', ', map { "$_: $errors{$_}" } sort keys %errors),
		'', 'and no other errors');
	$alpha->wait_caught_up('beta');
	$beta->wait_caught_up('alpha');
	$alpha->same_rows($beta, 'account');
	is($alpha->safe_psql('postgres', 'SELECT sum(n) FROM account'),
		$before + 2 * $acked, 'every increment counts, once');
};

section 'modes that change, and a peer that comes and goes' => sub {
	my $failures = $alpha->stat('beta', 'sync_failures');
	my @modes = (
		'', q{SET LOCAL mmrepl.mode = 'async'; },
		q{SET LOCAL mmrepl.mode = 'sync'; },
		q{SET LOCAL mmrepl.sync_flush = 'commit'; });
	my @writers;

	History::install($_, 'item') foreach ($alpha, $beta);
	foreach my $client (1 .. 6)
	{
		push @writers, Client->start(
			$alpha,
			sub {
				my $token = "$client.$_[0]";
				my ($a, $b) = sort { $a <=> $b } map { 1 + int(rand(4)) } (1, 2);
				return ($token,
					'BEGIN; '
					  . $modes[ rand @modes ]
					  . "UPDATE item SET token = '$token' WHERE id = $a; "
					  . "UPDATE item SET token = '$token' WHERE id = $b; COMMIT;");
			},
			seed => $client,
			pause => 0.005);
	}
	foreach my $round (1 .. 4)
	{
		$beta->close_to_peers;
		$alpha->poll_state('beta', 'retrying');
		$alpha->poll_ok(
			q{SELECT queue_changes > 0 FROM mmrepl.pg_stat_mmrepl
			  WHERE server = 'beta'}, 'what is written now is queued');
		$beta->open_to_peers;
		$alpha->safe_psql('postgres',
			"SELECT mmrepl.alter_pair('item', 'beta', mode => '$_')")
		  foreach ('async', 'sync');

		# Orderly return: once the queue is empty, changes go directly again.
		my $direct = $alpha->stat('beta', 'sync_transactions');
		$alpha->poll_ok(
			"SELECT sync_transactions > $direct FROM mmrepl.pg_stat_mmrepl"
			  . q{ WHERE server = 'beta'}, 'and goes directly again');
	}
	my ($acked, $degraded, %errors) = (0, 0);
	foreach my $report (map { $_->finish } @writers)
	{
		$acked += @{ $report->{acked} };
		$errors{$_} += $report->{errors}->{$_} foreach keys %{ $report->{errors} };
		$degraded += $report->{said}->{$_}
		  foreach grep { /is not reached.*are queued/ } keys %{ $report->{said} };
	}
	$alpha->wait_caught_up('beta');
	History::same($alpha, $beta,
		"$acked transactions: every row had the same versions in the same order");
	$alpha->same_rows($beta, 'item');
	cmp_ok($degraded, '>', 0, "$degraded notices say that changes are queued");
	cmp_ok($alpha->stat('beta', 'sync_failures'),
		'>', $failures, 'the view counts them');

	# What stood at the peer when the connection was cut cannot be queued.
	my @strange = grep { !/^(?:08006|25P02|40P01|40001|57P01)/ } sort keys %errors;
	is("@strange", '', 'no error but of transactions that had begun there');
	is( $beta->safe_psql(
			'postgres', 'SELECT sum(conflicts) FROM mmrepl.progress'),
		'0',
		'no change met a row that it did not expect');
};

foreach my $node ($alpha, $beta)
{
	ok(!$node->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
		'no crash in the log of ' . $node->name);
	$node->stop('fast');
}

done_testing();
