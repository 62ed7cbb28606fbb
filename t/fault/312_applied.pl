# mmrepl.sync_commit = 'applied': crashes at the moments at which what the peer has, and
# what this node knows of it, differ most.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use FaultPoints;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Unflushed;

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => q{
autovacuum = off
restart_after_crash = off
wal_writer_delay = '10s'
mmrepl.retry_min_delay = '20ms'
mmrepl.retry_max_delay = '200ms'
mmrepl.sync_timeout = '60s'
});
my $next = 1;

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

$alpha->create_table_on_both($beta, $ledger);
$alpha->create_pair('account', 'beta', q{mode => 'sync'});
$alpha->poll_state('beta', 'streaming');

sub warm
{
	return warm_session($alpha, 'beta', 'INSERT INTO account VALUES (' . $next++ . ', 1)');
}

# The fault is in force for the worker: it is told before new sessions are made.
sub arm
{
	my ($fault) = @_;

	arm_fault($alpha, $fault);
	until_true(sub { query($alpha, 'SHOW mmrepl.fault') eq $fault }) or fail("$fault is set");
	return;
}

sub judge
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return judge_ledger($alpha, $beta, $_[0], 'account');
}

foreach my $point ('commit-before-peer', 'commit-after-peer', 'commit-entries-settled', 'commit-ticket-settled')
{
	foreach my $both (0, 1)
	{
		section "the source crashes at $point" . ($both ? ', and the peer' : '') => sub {
			my $session = warm();
			my $id = $next++;
			my $fault = "$point:crash:1";

			here(q{SELECT mmrepl.pause('beta')});
			$alpha->poll_state('beta', 'paused');
			my $writer = stop_flushing($beta);
			$session->ok("INSERT INTO account VALUES ($id, 1)");
			forget_fault($alpha, $fault);
			$session->ok("SET mmrepl.fault = '$fault'");
			eval { $session->run("UPDATE account SET n = n + 1 WHERE id = $id"); $session->quit };
			until_true(sub { is_down($alpha) });
			$both ? lose_unflushed($beta, $writer) : kill('CONT', $writer);
			bring_back($beta) if $both;
			is(there("SELECT count(*) FROM account WHERE id = $id"), '0', 'the peer has lost it') if $both;
			bring_back($alpha);
			here(q{SELECT mmrepl.resume('beta')});
			$alpha->poll_state('beta', 'streaming');
			here("UPDATE account SET n = n + 1 WHERE id = $id");
			judge($point);
			is(there(qq{SELECT string_agg(n::text, ' ') FROM written WHERE id = $id}), '1 2 3', '... in order');
		};
	}
}

# What was applied while a connection was being made: it proves nothing of that.
section 'the peer crashes while a session connects' => sub {
	my ($session, $id) = (warm(), $next++);
	my $late = $alpha->session;
	my $fault = 'connection-opening:wait:1';

	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	my $writer = stop_flushing($beta);
	$late->ok("SET mmrepl.fault = '$fault'");
	$late->start('INSERT INTO account VALUES (' . $next++ . ', 1)');
	ok(await_fault($alpha, $fault), 'it is about to');
	$session->ok("INSERT INTO account VALUES ($id, 1)");
	lose_unflushed($beta, $writer);
	bring_back($beta);
	is(there("SELECT count(*) FROM account WHERE id = $id"), '0', 'the peer has lost what was applied meanwhile');
	release_fault($alpha, $fault);
	my (undef, $err) = $late->finish;
	is($err, '', 'what it was about to do depends on nothing of that');
	(undef, $err) = $late->run("UPDATE account SET n = n + 1 WHERE id = $id");
	like($err, qr/ERROR:\s+MM008: /, 'what does is not executed there');
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->poll_state('beta', 'streaming');
	$late->ok("UPDATE account SET n = n + 1 WHERE id = $id");
	judge('connecting');
	is(there(qq{SELECT string_agg(n::text, ' ') FROM written WHERE id = $id}), '1 2', '... in order');
	eval { $_->quit } foreach ($session, $late);
};

# Its ticket is older than the worker's connection, its ring entry is settled later.
section 'the worker connects between the commit at the peer and its settlement' => sub {
	my ($session, $id) = (warm(), $next++);
	my $fault = 'commit-after-peer:wait:1';
	my $writer = stop_flushing($beta);

	forget_fault($alpha, $fault);
	$session->ok("SET mmrepl.fault = '$fault'");
	$session->start("INSERT INTO account VALUES ($id, 1)");
	ok(await_fault($alpha, $fault), 'the peer has committed');
	lose_unflushed($beta, $writer);
	bring_back($beta);
	is(there("SELECT count(*) FROM account WHERE id = $id"), '0', '... and lost it');
	$alpha->poll_state('beta', 'streaming');
	release_fault($alpha, $fault);
	my (undef, $err) = $session->finish;
	is($err, '', 'acknowledged');
	judge('the worker');
	is(there("SELECT count(*) FROM account WHERE id = $id"), '1', '... the peer has it again');
	eval { $session->quit };
};

section 'the peer crashes before the seal' => sub {
	my ($session, $id) = (warm(), $next++);
	my $fault = 'seal-built:wait:1';
	my $writer = stop_flushing($beta);

	arm($fault);
	$session->ok("INSERT INTO account VALUES ($id, 1)");
	ok(await_fault($alpha, $fault), 'it is to be sealed');
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '100 ms')}), 'f', 'until then it is not confirmed');
	lose_unflushed($beta, $writer);
	bring_back($beta);
	is(there("SELECT count(*) FROM account WHERE id = $id"), '0', 'the peer has lost it');
	disarm_faults($alpha);
	judge('before the seal');
	is(there("SELECT count(*) FROM account WHERE id = $id"), '1', '... the peer has it again');
	eval { $session->quit };
};

# The flush that a seal waits for covers what was there before it alone.
section 'what is passed behind a seal that is on its way' => sub {
	my ($sent, $built) = ('worker-batch-sent:wait:1', 'seal-built:wait:1');
	my ($session, $id, $writer, $sealed);

	$session = warm();
	for (my $try = 0; $try < 10 && !$sealed; $try++) # not where markers are swept, which seals as well
	{
		arm($sent);
		my $seals = point_hits($alpha, 'seal-built');
		$writer = stop_flushing($beta);
		$session->ok('INSERT INTO account VALUES (' . $next++ . ', 1)');
		my $end = there('SELECT pg_current_wal_insert_lsn()');
		ok(await_fault($alpha, $sent), 'something is on its way');
		$sealed = point_hits($alpha, 'seal-built') > $seals
		  && point_hits($alpha, 'sweep-chosen') == point_hits($alpha, 'sweep-built');
		$beta->poll_ok("SELECT pg_current_wal_flush_lsn() >= '$end'", '... a seal, and it is flushed there') if $sealed;
		kill('CONT', $writer) if !$sealed;
		disarm_faults($alpha) if !$sealed;
		$alpha->wait_caught_up('beta') if !$sealed;
	}
	ok($sealed, 'a seal is on its way');
	$id = $next++;
	$session->ok("INSERT INTO account VALUES ($id, 1)");
	arm($built);
	release_fault($alpha, $sent);
	ok(await_fault($alpha, $built), 'what came after it is to be sealed, too');
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '100 ms')}), 'f', 'until then it is not confirmed');
	lose_unflushed($beta, $writer);
	bring_back($beta);
	is(there("SELECT count(*) FROM account WHERE id = $id"), '0', 'the peer has lost it');
	disarm_faults($alpha);
	judge('behind a seal');
	is(there("SELECT count(*) FROM account WHERE id = $id"), '1', '... the peer has it again');
	eval { $session->quit };
};

section 'what is confirmed is flushed' => sub {
	my ($session, $id) = (warm(), $next++);
	my $writer = stop_flushing($beta);

	$session->ok("INSERT INTO account VALUES ($id, 1)");
	$alpha->wait_caught_up('beta');
	$beta->close_to_peers;
	lose_unflushed($beta, $writer);
	bring_back($beta);
	is(there("SELECT count(*) FROM account WHERE id = $id"), '1', 'it is there after a crash');
	$beta->open_to_peers;
	judge('confirmed');
	eval { $session->quit };
};

# What was passed is taken back by the pause: nothing is left to be sealed.
section 'a pause while the worker passes' => sub {
	my ($session, $id) = (warm(), $next++);
	my $fault = 'feed-passed:wait:1';

	arm($fault);
	$session->ok("INSERT INTO account VALUES ($id, 1)");
	ok(await_fault($alpha, $fault), 'the worker passes what was applied');
	here(q{SELECT mmrepl.pause('beta')});
	disarm_faults($alpha);
	is( here(q{SET statement_timeout = '20s'; SELECT mmrepl.deal_sync_err_rec(1)}),
		't', 'it lets the ordering lock go');
	here(q{SELECT mmrepl.resume('beta')});
	judge('a pause');
	$session->quit;
};

ok(!$_->log_contains(qr/PANIC|TRAP:/), 'no crash of its own in the log of ' . $_->name) foreach ($alpha, $beta);
$_->stop('fast') foreach ($alpha, $beta);

done_testing();
