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

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE account (id int PRIMARY KEY, n int NOT NULL);
	CREATE TABLE written (id int, n int);
	CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
	$$BEGIN INSERT INTO public.written VALUES (NEW.id, NEW.n); RETURN NULL; END$$;
	CREATE TRIGGER note AFTER INSERT OR UPDATE ON account FOR EACH ROW EXECUTE FUNCTION note();
	ALTER TABLE account ENABLE ALWAYS TRIGGER note});
$alpha->create_pair('account', 'beta', q{mode => 'sync'});
$alpha->poll_state('beta', 'streaming');

# Without the WAL writer nothing is flushed at the peer but what somebody waits for.
sub stop_wal_writer
{
	my $pid = there(q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'});

	there('CHECKPOINT');
	kill('STOP', $pid);
	return $pid;
}

sub crash_peer
{
	my ($wal_writer) = @_;

	kill('KILL', $wal_writer);
	until_true(sub { is_down($beta) });
	return;
}

# A session whose connection to the peer is older than what follows.
sub warm
{
	my $session = $alpha->session;

	$session->ok(q{SET mmrepl.sync_commit = 'applied'});
	$session->ok('INSERT INTO account VALUES (' . $next++ . ', 1)');
	$alpha->wait_caught_up('beta');
	return $session;
}

sub judge
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'account', name => "$name: both are equal");
	is(there('SELECT sum(conflicts) FROM mmrepl.progress'), '0', '... without a conflict');
	is(there('SELECT count(*) FROM (SELECT FROM written GROUP BY id, n HAVING count(*) > 1) twice'),
		'0', '... each change is there once');
	is(here('SELECT count(*) FROM mmrepl.in_doubt'), '0', '... nothing is in doubt');
	is($alpha->queued('beta'), '0', '... and nothing is queued');
	return;
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
			my $writer = stop_wal_writer();
			$session->ok("INSERT INTO account VALUES ($id, 1)");
			forget_fault($alpha, $fault);
			$session->ok("SET mmrepl.fault = '$fault'");
			eval { $session->run("UPDATE account SET n = n + 1 WHERE id = $id"); $session->quit };
			until_true(sub { is_down($alpha) });
			$both ? crash_peer($writer) : kill('CONT', $writer);
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
	my $writer = stop_wal_writer();
	$late->ok("SET mmrepl.fault = '$fault'");
	$late->start('INSERT INTO account VALUES (' . $next++ . ', 1)');
	ok(await_fault($alpha, $fault), 'it is about to');
	$session->ok("INSERT INTO account VALUES ($id, 1)");
	crash_peer($writer);
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
	my $writer = stop_wal_writer();

	forget_fault($alpha, $fault);
	$session->ok("SET mmrepl.fault = '$fault'");
	$session->start("INSERT INTO account VALUES ($id, 1)");
	ok(await_fault($alpha, $fault), 'the peer has committed');
	crash_peer($writer);
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

# What was passed is taken back by the pause: nothing is left to be sealed.
section 'a pause while the worker passes' => sub {
	my ($session, $id) = (warm(), $next++);
	my $fault = 'feed-passed:wait:1';

	arm_fault($alpha, $fault);
	until_true(sub { query($alpha, 'SHOW mmrepl.fault') eq $fault }) or fail("$fault is set");
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
