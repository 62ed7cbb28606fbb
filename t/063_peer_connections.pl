# mmrepl.max_peer_connections: many sessions write synchronously over few
# connections, without an error; who gets none is told so in time, can be
# cancelled, and leaves nothing behind.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $bound = 5;
my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => "max_connections = 330\ndeadlock_timeout = 300ms\nmmrepl.max_peer_connections = $bound\n");

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

$alpha->create_table_on_both($beta,
	'CREATE TABLE item (id int PRIMARY KEY, v text);'
	  . 'CREATE TABLE other (id int PRIMARY KEY, v text)');
$alpha->create_pair('item', 'beta', q{mode => 'sync'});
$alpha->create_pair('other', 'beta',
	q{mode => 'sync', on_unreachable => 'queue'});
$alpha->poll_state('beta', 'streaming');
# Those that the pairs were checked over are just ending.
$beta->poll_query_until('postgres',
	'SELECT count(*) = 1 FROM pg_stat_activity WHERE client_addr IS NOT NULL')
  or die 'the worker is not the only one';
my ($worker) = $beta->peer_sessions;
my $last_id = 0;

# What sessions of alpha, as opposed to its worker, have open at beta.
my $watch = $beta->session;

sub at_peer
{
	return $watch->ok(
		"SELECT count(*) FROM pg_stat_activity WHERE client_addr IS NOT NULL AND pid <> $worker"
	);
}

sub insert { return "INSERT INTO item VALUES (" . ++$last_id . ", 'x')" }

sub set_bound
{
	$alpha->append_conf('postgresql.conf', "mmrepl.max_peer_connections = $_[0]");
	$alpha->reload;
	$alpha->poll_query_until('postgres', 'SHOW mmrepl.max_peer_connections', $_[0])
	  or die 'the setting was not read';
	return;
}

# Whether the session waits for a peer, or for a connection to one.
sub waits
{
	my ($session) = @_;
	return $alpha->poll_query_until('postgres',
		q{SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = }
		  . $session->pid) || die 'the session does not wait';
}

section 'idle sessions give their connections up' => sub {
	my @sessions = map { $alpha->session } (1 .. 3 * $bound);
	my $most = 0;
	my $longest = 0;

	foreach my $round (1, 2)
	{
		foreach my $session (@sessions)
		{
			my $before = Time::HiRes::time();

			$session->ok(insert());
			my $took = Time::HiRes::time() - $before;
			$longest = $took if $took > $longest;
			my $count = at_peer();
			$most = $count if $count > $most;
		}
	}
	is($most, $bound, 'so many connections as the setting allows');
	cmp_ok($longest, '<', 4, 'and nobody waits long for an idle session');
	$alpha->same_rows($beta, 'item');
	$_->quit foreach @sessions;
};

here('CREATE SEQUENCE ids START 100000');

# Hundreds of sessions that stay; and such that end after each transaction: a place was
# given away when its session here had ended, while the peer's was still there.
foreach my $load ([ 300, 4 ], [ 60, 4, '-C' ])
{
	my ($clients, $rounds, @connect) = @$load;

	section "$clients sessions @connect" => sub {
		my $script = PostgreSQL::Test::Utils::tempdir() . '/insert.sql';
		my $out = '';
		my ($most, $busiest) = (0, 0);

		# The last one in line waits for all the others, on a machine that may be slow.
		local $ENV{PGOPTIONS} = '-c mmrepl.sync_timeout=100s';
		here('DELETE FROM item WHERE id >= 100000');
		append_to_file($script,
			"BEGIN;\nINSERT INTO item VALUES (nextval('ids'), 'a');\n"
			  . "INSERT INTO item VALUES (nextval('ids'), 'b');\nCOMMIT;\n");
		my $here = $alpha->session;
		my $bench = IPC::Run::start(
			[
				'pgbench', '-n', '-h', $alpha->host, '-p', $alpha->port,
				'-c', $clients, '-j', 2, '-t', $rounds, @connect, '-f', $script, 'postgres'
			],
			'>', \$out, '2>', \$out);
		while ($bench->pumpable)
		{
			my $count = at_peer();
			$most = $count if $count > $most;
			$count = $here->ok(
				q{SELECT count(*) - 1 FROM pg_stat_activity WHERE backend_type = 'client backend' AND state = 'active'});
			$busiest = $count if $count > $busiest;
			eval { $bench->pump_nb; };
			Time::HiRes::usleep(3000);
		}
		ok($bench->finish, 'no error') or diag($out);
		my $all = $clients * $rounds;
		like($out, qr/transactions actually processed: $all\/$all$/m, 'all are acknowledged');
		cmp_ok($most, '<=', $bound, 'no more connections than the setting allows');
		cmp_ok($most, '>', 1, '... and several at a time');
		cmp_ok($busiest, '>', 5 * $bound, "... for many sessions at a time: $busiest");
		is(there('SELECT count(*) FROM item WHERE id >= 100000'), 2 * $all, '... and committed, here and there');
		$alpha->same_rows($beta, 'item');
		$here->quit;
	};
}

section 'all connections are in use' => sub {
	set_bound(1);
	my ($holder, $waiter, $third) = map { $alpha->session } (1 .. 3);

	$holder->ok('BEGIN');
	$holder->ok(insert());
	is(at_peer(), 1, 'a lower bound closes what is too many');

	# The bound of the wait.
	my ($lost, $took) = (insert());
	$waiter->ok(q{SET mmrepl.sync_timeout = '600ms'});
	$waiter->start($lost);
	my ($out, $err);
	($out, $err, $took) = $waiter->finish;
	like($err, qr/ERROR:\s+53300: no connection to server "beta" is free/,
		'too many connections');
	like($err, qr/DETAIL:\s+All 1 that "mmrepl\.max_peer_connections" allows/,
		'... with the setting');
	like($err, qr/HINT:\s+Raise mmrepl\.max_peer_connections/, '... and what to do');
	cmp_ok($took, '>', 0.59, 'not before sync_timeout');
	cmp_ok($took, '<', 5, 'and soon after it');
	is(here("SELECT count(*) FROM item WHERE id = $last_id"),
		0, 'nothing is left of the statement');

	# on_unreachable = 'queue': it goes on without.
	(undef, $err) = $waiter->run(q{INSERT INTO other VALUES (1, 'queued')});
	like($err, qr/NOTICE:.*server "beta" is not reached.*queued/s, 'or it is queued');
	unlike($err, qr/ERROR/, '... without an error');
	$waiter->ok(q{RESET mmrepl.sync_timeout});
	$alpha->wait_caught_up('beta');
	is(there('SELECT v FROM other'), 'queued', '... and arrives');

	# A cancel, a savepoint's repair, a termination: no place is lost.
	$waiter->start(insert());
	waits($waiter);
	here('SELECT pg_cancel_backend(' . $waiter->pid . ')');
	(undef, $err) = $waiter->finish;
	like($err, qr/ERROR:\s+57014: /, 'the wait can be cancelled');
	$third->start(insert());
	waits($third);
	$alpha->terminate($third->pid);
	eval { $third->quit };

	# The first in line gets it, as soon as it is free.
	$waiter->start(insert());
	waits($waiter);
	$holder->ok('COMMIT');
	(undef, $err, $took) = $waiter->finish;
	is($err, '', 'the next in line goes on when the transaction ends');
	$holder->ok(insert());
	is(at_peer(), 1, 'and gives its own up when the other one writes again');

	# A holder that is terminated, in a transaction and idle.
	foreach my $begin ('BEGIN', '')
	{
		$holder->ok($begin) if $begin ne '';
		$holder->ok(insert());
		$waiter->start(insert());
		waits($waiter) if $begin ne '';
		$alpha->terminate($holder->pid);
		eval { $holder->quit };
		(undef, $err) = $waiter->finish;
		is($err, '', "the holder is terminated: its place is free ($begin)");
		$holder = $alpha->session;
	}

	# A connection that does not come about keeps no place.
	$beta->close_to_peers;
	foreach my $try (1 .. 3)
	{
		(undef, $err) = $holder->run(insert());
		like($err, qr/ERROR/, 'the peer is not there');
	}
	$beta->open_to_peers;
	here(q{SELECT mmrepl.retry_now('beta')});
	$alpha->poll_state('beta', 'streaming');
	$_->ok(insert()) foreach ($holder, $waiter);

	# A higher bound is for those who wait already.
	$holder->ok('BEGIN');
	$holder->ok(insert());
	$waiter->start(insert());
	waits($waiter);
	set_bound(2);
	my $third_one = $alpha->session;
	$third_one->start(insert());
	(undef, $err) = $waiter->finish;
	is($err, '', 'a raised bound lets the waiting ones go on');
	(undef, $err) = $third_one->finish;
	is($err, '', '... and the new one');
	$holder->ok('COMMIT');
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'item');
	$_->quit foreach ($holder, $waiter, $third_one);
};

# A session that stands in line has a lock that the only one with a place waits for.
section 'a deadlock about connections' => sub {
	here('CREATE TABLE plain (id int PRIMARY KEY); INSERT INTO plain VALUES (1)');
	set_bound(1);
	my ($holder, $waiter) = map { $alpha->session } (1 .. 2);

	$holder->ok(insert());
	$waiter->ok('BEGIN; SELECT * FROM plain FOR UPDATE');
	$holder->ok('BEGIN');
	$holder->start('SELECT * FROM plain FOR UPDATE');
	$alpha->poll_ok(q{SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = } . $holder->pid,
		'who has the connection waits for a lock');
	$waiter->start(insert());
	my (undef, $err, $took) = $waiter->finish;
	like($err, qr/ERROR:\s+40P01: deadlock while waiting for a connection to server "beta"/,
		'who has the lock and wants the connection gets 40P01');
	like($err, qr/HINT:\s+Retry the transaction/, '... and the hint to retry');
	cmp_ok($took, '<', 4, '... long before sync_timeout');
	$waiter->ok('ROLLBACK');
	(undef, $err) = $holder->finish;
	is($err, '', 'the other one goes on');
	$holder->ok('COMMIT');

	# No deadlock: who has the connection waits for nobody in line.  That is looked at, and found.
	my $log = -s $alpha->logfile;
	$holder->ok('BEGIN; SELECT * FROM plain FOR UPDATE');
	$holder->ok(insert());
	$waiter->start(insert());
	$alpha->wait_for_log(qr/waiting for a connection to a peer is no deadlock/, $log);
	$holder->ok('COMMIT');
	(undef, $err) = $waiter->finish;
	is($err, '', 'who is waited for by nobody waits on');
	$alpha->same_rows($beta, 'item');
	$_->quit foreach ($holder, $waiter);
};

# Nobody asks for a connection, and yet the setting holds.
section 'a lower bound is for those who are idle' => sub {
	set_bound(4);
	# The worker has connected again meanwhile.
	$beta->poll_ok('SELECT count(*) = 1 FROM pg_stat_activity WHERE client_addr IS NOT NULL', 'only the worker is there');
	($worker) = $beta->peer_sessions;
	my @sessions = map { $alpha->session } (1 .. 4);

	$_->ok(insert()) foreach @sessions;
	is(at_peer(), 4, 'four connections');
	set_bound(2);
	$watch->{deadline} = time + $PostgreSQL::Test::Utils::timeout_default;
	Time::HiRes::usleep(20_000) while at_peer() > 2 && time < $watch->{deadline};
	is(at_peer(), 2, 'two of them are given up, without anybody wanting one');
	$_->ok(insert()) foreach @sessions;
	$alpha->same_rows($beta, 'item');
	$_->quit foreach @sessions;
};

foreach my $node ($alpha, $beta)
{
	ok(!$node->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
		'no crash in the log of ' . $node->name);
}

$watch->quit;
$alpha->stop('fast');
$beta->stop('fast');

done_testing();
