# A synchronous transaction whose peer stops answering, at each message of the
# conversation in turn: a cancel, a termination and a timeout end the wait soon,
# nothing is left at the peer, the session's next transaction works, and both
# sides are equal without anybody's doing.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultProxy;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use SlowClient;
use Test::More;
use Time::HiRes ();

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => q{
mmrepl.retry_min_delay = '20ms'
mmrepl.retry_max_delay = '200ms'
mmrepl.sync_timeout = '2s'
});
my $proxy = FaultProxy->new(port => $beta->port);
my $port = $proxy->port;
my $last_id = 0;

# Answers come within a second; that a machine is busy, and that the cancel is sent
# by a psql that has to start, takes its own share.
my $soon = 1 + 1;

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE item (id int PRIMARY KEY, v text, UNIQUE (v) DEFERRABLE INITIALLY DEFERRED);
});
here("ALTER SERVER beta OPTIONS (SET port '$port')");
$alpha->create_pair('item', 'beta', q{mode => 'sync'});
$alpha->poll_state('beta', 'streaming');

sub worker_ids
{
	my ($pid) = @_;
	return map { $_->{id} } $proxy->connections;
}

# A session with a cached connection that has been used, and the connection's id.
sub warm_session
{
	$alpha->poll_state('beta', 'streaming');
	my %before = map { $_->{id} => 1 } $proxy->connections;
	my $session = $alpha->session;

	$last_id++;
	$session->ok("INSERT INTO item VALUES ($last_id, 'warm $last_id')");
	my ($mine) = grep { !$before{ $_->{id} } } $proxy->connections;
	return ($session, $mine->{id}, $mine->{backend_pid});
}

# Nothing of that session runs, or keeps locks, at the peer.
sub peer_is_clean
{
	my ($pid, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return $beta->poll_ok(
		qq{SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $pid AND state <> 'idle'},
		"$name: nothing is left at the peer");
}

sub equal_and_usable
{
	my ($session, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	if ($session)
	{
		$last_id++;
		my (undef, $err) =
		  $session->run("INSERT INTO item VALUES ($last_id, 'next $last_id')");
		is($err, '', "$name: the next transaction works");
		$session->quit;
	}
	$alpha->wait_caught_up('beta');
	return $alpha->same_rows($beta, 'item', name => "$name: both sides are equal");
}

# The messages of one transaction: begin and statement, second statement, the
# check of constraints, the commit.  Each is held before and after it is
# forwarded, which is to say: it does not arrive, or its answer does not.
my @messages = (
	[ 'first statement', type => 'B', pattern => 'mmrepl_apply|MMR1', nth => 1 ],
	[ 'second statement', type => 'B', pattern => 'mmrepl_apply|MMR1', nth => 2 ],
	[ 'check', type => 'Q', pattern => 'SET CONSTRAINTS' ],
	[ 'commit', type => 'Q', pattern => '^Q....COMMIT' ]);
my %ways = (
	'pg_cancel_backend' => qr/57014|WARNING|^$/,
	'pg_terminate_backend' => qr/57P01|terminat|closed|^$/,
	'statement_timeout' => qr/57014|MM\w{3}|^$/,
	'sync_timeout' => qr/MM\w{3}|^$/);

foreach my $message (@messages)
{
	my ($step, %rule) = @$message;

	foreach my $when ('before', 'after')
	{
		foreach my $way (sort keys %ways)
		{
			my $name = "$step, held $when, $way";

			# Of a commit only the wait can be cancelled; else its own bound ends it.
			next if $step eq 'commit' && $way =~ /timeout/ && $way ne 'sync_timeout';

			section $name => sub {
				my ($session, $id, $peer_pid) = warm_session();
				my ($one, $two) = ($last_id + 1, $last_id + 2);
				$last_id += 2;
				my $rule = $proxy->rule(
					%rule,
					action => 'hold',
					from => 'client',
					when => $when,
					only => [$id]);

				$session->ok(q{SET statement_timeout = '700ms'})
				  if $way eq 'statement_timeout';
				$session->start(
					qq{BEGIN;
					INSERT INTO item VALUES ($one, 'held $one');
					INSERT INTO item VALUES ($two, 'held $two');
					COMMIT});
				ok($proxy->wait_for($rule), 'the conversation is held');
				my $before = Time::HiRes::time();
				here("SELECT $way(" . $session->pid . ')') if $way =~ /^pg_/;
				my ($out, $err);
				if ($way eq 'pg_terminate_backend')
				{
					$alpha->poll_ok(
						'SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = '
						  . $session->pid,
						'the session ends');
				}
				else
				{
					($out, $err) = $session->finish;
				}
				my $took = Time::HiRes::time() - $before;
				# The server switches statement_timeout off when COMMIT begins.
				my $late = $way eq 'sync_timeout'
				  || ($way eq 'statement_timeout' && $step eq 'check');
				my $bound = $soon + ($late ? 2 : 0);
				cmp_ok($took, '<', $bound, 'the wait ends soon');
				peer_is_clean($peer_pid, 'while the connection still hangs');
				$proxy->kill(only => [$id]);
				$session = undef if $way eq 'pg_terminate_backend';
				$session->ok('RESET statement_timeout; ROLLBACK') if $session;
				equal_and_usable($session, 'afterwards');

				my $count = here("SELECT count(*) FROM item WHERE id IN ($one, $two)");
				if ($step eq 'commit')
				{
					is($count, 2, 'it is committed here, and so it is there');
					like($err, qr/WARNING:\s+57014: the commit at server "beta" was not waited for/,
						'... which a warning says')
					  if $way eq 'pg_cancel_backend';
				}
				else
				{
					is($count, 0, 'it is rolled back');
					like($err, $ways{$way}, 'the error says why') if defined $err;
				}
			};
		}
	}
}

# A client that does not read the warning keeps its session, and nobody else: the
# warning was raised with all locks held once.
section 'the warning about a commit comes when the locks are released' => sub {
	$alpha->poll_state('beta', 'streaming');
	my %before = map { $_->{id} => 1 } $proxy->connections;
	my $client = SlowClient->new($alpha);
	my $id = ++$last_id;

	$client->ok(q{SET mmrepl.sync_timeout = '60s'}); # it is the cancel that ends the wait

	$client->ok("INSERT INTO item VALUES ($id, 'warm $id')");
	my ($mine) = map { $_->{id} } grep { !$before{ $_->{id} } } $proxy->connections;
	my $fill = $client->filler;
	my $rule = $proxy->rule(
		type => 'Q', pattern => '^Q....COMMIT', action => 'hold', from => 'client',
		when => 'after', only => [$mine]);
	my $other = $alpha->session;

	$client->ok("BEGIN; UPDATE item SET v = 'slow $id' WHERE id = $id");
	$other->start("SET mmrepl.mode = 'async'; SELECT v FROM item WHERE id = $id FOR UPDATE");
	$alpha->poll_ok(
		q{SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = } . $other->pid,
		'somebody waits for the row');
	$client->start("$fill; COMMIT");
	ok($proxy->wait_for($rule), 'the peer has committed, and its answer is held');
	here('SELECT pg_cancel_backend(' . $client->pid . ')');
	ok($client->is_stuck, 'the session waits for its client to read the warning');
	my ($out, $err) = $other->finish;
	is("$out$err", "slow $id", 'and who waits for the row gets it');
	is(here('SELECT wait_event FROM pg_stat_activity WHERE pid = ' . $client->pid),
		'ClientWrite', '... meanwhile');
	my ($text, $tag) = $client->finish;
	like($text, qr/57014 .*the commit at server "beta" was not waited for/s, 'the client reads it');
	is($tag, 'COMMIT', '... and that it is committed');
	$proxy->kill(only => [$mine]);
	$proxy->clear;
	$client->ok("UPDATE item SET v = 'after $id' WHERE id = $id");
	$_->quit foreach ($client, $other);
	equal_and_usable(undef, 'a slow client');
};

section 'idle connections and a restart of the peer' => sub {
	my @sessions = map { $alpha->session } (1 .. 3);
	my $write = sub {
		my ($name) = @_;
		foreach my $session (@sessions)
		{
			$last_id++;
			my (undef, $err) =
			  $session->run("INSERT INTO item VALUES ($last_id, 'idle $last_id')");
			is($err, '', $name);
		}
	};

	$write->('before');
	$beta->restart;
	$alpha->poll_state('beta', 'streaming');
	$write->('after a restart');
	$beta->stop('immediate');
	$beta->start;
	$alpha->poll_state('beta', 'streaming');
	$write->('after a crash');
	$proxy->reset;
	$alpha->poll_state('beta', 'streaming');
	$write->('after a reset of every connection');
	$_->quit foreach @sessions;
	equal_and_usable(undef, 'idle connections');
};

is($alpha->queued('beta'), '0', 'nothing is left queued');
ok(!$alpha->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
	'no crash in the log of the source');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
