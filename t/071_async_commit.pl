# mmrepl.async_commit: COMMIT returns when the peers of async pairs have applied, or
# flushed, what was queued for them.  The transaction is committed here by then, and
# holds no lock; whatever ends the wait, it ends with a warning, and nothing is lost.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use Client;
use FaultPoints;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();
use Unflushed;

my $soon = 1 + 1;    # s: a busy machine takes its own share

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => q{
autovacuum = off
wal_writer_delay = '10s'
restart_after_crash = off
max_prepared_transactions = 5
wal_level = replica
max_wal_senders = 2
mmrepl.retry_min_delay = '20ms'
mmrepl.retry_max_delay = '200ms'
mmrepl.sync_timeout = '60s'
});

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

$beta->safe_psql('postgres', 'CREATE DATABASE second');
$beta->safe_psql('second', 'CREATE EXTENSION mmrepl_bgw');
$alpha->add_peer($beta, server => 'second', peer_dbname => 'second');
my $tables = q{
	CREATE TABLE item (id int PRIMARY KEY, n int);
	CREATE TABLE shared (id int PRIMARY KEY, n int);
	INSERT INTO item SELECT g, 0 FROM generate_series(1, 20) g;
	INSERT INTO shared SELECT g, 0 FROM generate_series(1, 20) g};
$alpha->create_table_on_both($beta, $tables);
$beta->safe_psql('second', $tables);
$alpha->create_table_on_both($beta, 'CREATE TABLE inlined (id int PRIMARY KEY, n int)');
$alpha->create_pair('item', 'beta');
$alpha->create_pair_on_both($beta, 'shared');
$alpha->create_pair('inlined', 'beta', q{mode => 'sync', on_unreachable => 'queue'});
here('UPDATE item SET n = n');
$alpha->wait_caught_up('beta');

my $holder = $beta->session;
my $reader = $beta->session;

# What the peer shows now, without the delay of a new connection.
sub seen { return $reader->ok($_[0]) }

# A session with the setting.
sub awaiting
{
	my ($setting, $timeout) = @_;
	my $session = $alpha->session;

	$session->ok("SET mmrepl.async_commit = '$setting'");
	$session->ok("SET mmrepl.sync_timeout = '$timeout'") if defined $timeout;
	return $session;
}

# Nothing can be applied to the row at the peer until release().
sub hold_row
{
	my ($id) = @_;

	$holder->ok("BEGIN; SELECT FROM item WHERE id = $id FOR UPDATE");
	return;
}

sub release
{
	$holder->ok('COMMIT');
	return $alpha->wait_caught_up('beta');
}

# The session has committed, and waits for the peer.
sub poll_waits
{
	my ($session, $id, $n) = @_;
	my $pid = $session->pid;

	return $alpha->poll_ok(
		"SELECT n = $n AND a.wait_event_type = 'Extension'
		 FROM item, pg_stat_activity a WHERE id = $id AND pid = $pid",
		'it is committed here, and waits');
}

# At the peer each flush waits for a standby that does not exist.
sub without_flushes
{
	my ($code) = @_;
	my $probe = $beta->session;
	my $pid = $probe->pid;

	there(q{ALTER SYSTEM SET synchronous_standby_names = 'nobody'});
	$beta->reload;
	$probe->start('DO $$ BEGIN LOOP UPDATE shared SET n = n WHERE id = 20; COMMIT; PERFORM pg_sleep(0.01); END LOOP; END $$');
	$beta->poll_ok("SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = $pid",
		'at the peer a flush waits for a standby');
	$code->();
	there('ALTER SYSTEM RESET synchronous_standby_names');
	$beta->reload;
	there("SELECT pg_terminate_backend($pid)");
	eval { $probe->quit };
	$alpha->wait_caught_up('beta');
	$beta->wait_caught_up('alpha');
	return;
}

# The sessions at the peer.
sub disconnect { return map { $_->quit } ($holder, $reader) }
sub connect_again { return ($holder, $reader) = ($beta->session, $beta->session) }

my $warning = qr/WARNING:  .*the transaction is not known to be/;

###############################################################################

section 'what COMMIT waits for' => sub {
	is(here('SHOW mmrepl.async_commit'), 'queued', 'the default');
	like(
		$alpha->fails('postgres', q{SET mmrepl.async_commit = 'on'}),
		qr/22023.*HINT:.*queued, applied, flushed/s,
		'another value is refused');

	my $session = awaiting('applied');
	my $pid = $session->pid;

	hold_row(1);
	here('UPDATE item SET n = 1 WHERE id = 1');
	pass(q{'queued': COMMIT returns though the peer cannot apply it});
	$session->start('UPDATE item SET n = 2 WHERE id = 1');
	poll_waits($session, 1, 2);
	here('UPDATE item SET n = 3 WHERE id = 1');
	is(here("SELECT count(*) FROM pg_locks WHERE pid = $pid AND granted"), '0', '... it holds no lock');
	is(here("SELECT backend_xid IS NULL FROM pg_stat_activity WHERE pid = $pid"), 't', '... and is no running transaction');
	$holder->ok('COMMIT');
	my (undef, $err) = $session->finish;
	is($err, '', '... it returns when the peer has applied it');
	cmp_ok(there('SELECT n FROM item WHERE id = 1'), '>=', 2, '... where it is seen then');
	$alpha->wait_caught_up('beta');

	my @stale = grep {
		$session->ok("UPDATE item SET n = 100 + $_ WHERE id = 2");
		seen('SELECT n FROM item WHERE id = 2') != 100 + $_
	} 1 .. 30;
	is("@stale", '', 'thirty of them: each is seen there at once');

	$session->ok('BEGIN; UPDATE item SET n = 4 WHERE id = 3; SAVEPOINT a; UPDATE item SET n = 5 WHERE id = 4; ROLLBACK TO a; COMMIT');
	is(seen('SELECT n FROM item WHERE id = 3'), '4', 'with a subtransaction');
	$session->ok('INSERT INTO item SELECT g, g FROM generate_series(1000, 60000) g');
	is(seen('SELECT count(*) FROM item WHERE id >= 1000'), '59001', 'a large one, in chunks');
	$session->ok('DELETE FROM item WHERE id >= 1000');
	is(seen('SELECT count(*) FROM item WHERE id >= 1000'), '0', '... and away');
	$session->ok(q{BEGIN; UPDATE item SET n = 6 WHERE id = 3; ROLLBACK});
	$session->ok(q{SELECT 1});
	$session->quit;
};

section 'applied, flushed' => sub {
	my $applied = awaiting('applied');
	my $flushed = awaiting('flushed');
	$applied->ok(q{SET mmrepl.sync_timeout = '5s'});
	my $writer = stop_flushing($beta);
	my $insert = sub { return there('SELECT pg_current_wal_insert_lsn()') };
	my $is_flushed = sub { return there("SELECT pg_current_wal_flush_lsn() > '$_[0]'") };

	my $from = $insert->();
	$flushed->ok('UPDATE item SET n = 1 WHERE id = 5');
	is($is_flushed->($from), 't', q{'flushed': it is on disk there});
	is(here(q{SELECT confirmed_ticket = last_ticket AND queue_transactions = 0 FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'}),
		't', '... and nothing waits here any more');

	# Each batch is full, and its flush is left for later although somebody waits for it.
	here('ALTER SYSTEM SET mmrepl.batch_transactions = 1');
	here('ALTER SYSTEM SET mmrepl.early_apply = off');    # which is never full
	$alpha->reload;
	$alpha->poll_ok(q{SELECT current_setting('mmrepl.batch_transactions') = '1'}, 'small batches');
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->poll_state('beta', 'streaming');
	kill('CONT', $writer);

	$flushed->ok(q{SET mmrepl.sync_timeout = '500ms'});
	without_flushes(
		sub {
			my (undef, $err) = $flushed->run('UPDATE item SET n = 2 WHERE id = 5');
			like($err, qr/$warning flushed at server "beta"/, q{'flushed' waits for the peer's flush});
			is(here('SELECT n FROM item WHERE id = 5'), '2', '... it is committed here');
			is(seen('SELECT n FROM item WHERE id = 5'), '2', '... and applied there');
		});
	without_flushes(
		sub {
			my $start = Time::HiRes::time();
			my (undef, $err) = $applied->run('UPDATE item SET n = 3 WHERE id = 5');
			is($err, '', q{'applied' does not});
			cmp_ok(Time::HiRes::time() - $start, '<', $soon, '... and is woken when it is applied');
			is(seen('SELECT n FROM item WHERE id = 5'), '3', '... it is seen there');
		});
	here('ALTER SYSTEM RESET mmrepl.batch_transactions');
	here('ALTER SYSTEM RESET mmrepl.early_apply');
	$alpha->reload;
	$_->quit foreach ($applied, $flushed);
};

section 'what the peer loses comes again' => sub {
	my $session = awaiting('applied');
	my $worker = here(q{SELECT pid FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'});
	my $lost = 0;

	# The worker is stopped before it asks for the flush, some time if not the first time.
	for (my $try = 1; !$lost && $try <= 20; $try++)
	{
		my $writer = stop_flushing($beta);

		$session->ok("UPDATE item SET n = $try WHERE id = 6;\n\\! kill -STOP $worker");
		disconnect();
		lose_unflushed($beta, $writer);
		bring_back($beta);
		$lost = there('SELECT n FROM item WHERE id = 6') < $try;
		kill('CONT', $worker);
		$alpha->wait_caught_up('beta');
		is(there('SELECT n FROM item WHERE id = 6'), $try, 'it is there, or comes again');
		connect_again();
	}
	ok($lost, 'applied, lost, and brought again');
	$session->quit;
};

section 'the wait ends' => sub {
	my $session = awaiting('applied', '1s');

	hold_row(7);
	my $start = Time::HiRes::time();
	my (undef, $err) = $session->run('UPDATE item SET n = 1 WHERE id = 7');
	my $took = Time::HiRes::time() - $start;
	like(
		$err,
		qr/WARNING:  MM\d+: the transaction is not known to be applied at server "beta".*DETAIL:  It is committed here, and queued; the stream is "[\w ]+".*HINT:/s,
		'after sync_timeout, with a warning');
	cmp_ok($took, '>=', 1, '... not before');
	cmp_ok($took, '<', 1 + $soon, '... and not long after');
	$session->quit;

	foreach my $way ('pg_cancel_backend', 'pg_terminate_backend')
	{
		my $n = $way eq 'pg_cancel_backend' ? 2 : 3;

		$session = awaiting('applied');
		$session->start("UPDATE item SET n = $n WHERE id = 7");
		poll_waits($session, 7, $n);
		my $pid = $session->pid;
		$start = Time::HiRes::time();
		here("SELECT $way($pid)");
		if ($n == 2)
		{
			(undef, $err) = $session->finish;
			like($err, qr/WARNING:  57014: the transaction is not known to be applied/, "$way: a warning");
			is($session->ok('SELECT 1'), '1', '... and no error comes after it');
			$session->quit;
		}
		else
		{
			$alpha->poll_ok("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $pid)", "$way: the session ends");
			eval { $session->quit };
		}
		cmp_ok(Time::HiRes::time() - $start, '<', $soon, '... soon');
		is(here('SELECT n FROM item WHERE id = 7'), $n, '... what it did is committed');
	}
	release();
	is(there('SELECT n FROM item WHERE id = 7'), '3', 'all of it arrives');
};

section 'in a procedure' => sub {
	my $loop = 'DO $$ BEGIN FOR i IN 1 .. 3 LOOP UPDATE item SET n = n + 1 WHERE id = 14; COMMIT; END LOOP; END $$';
	my $session = awaiting('applied');

	hold_row(14);
	$session->start($loop);
	poll_waits($session, 14, 1);
	here('SELECT pg_cancel_backend(' . $session->pid . ')');
	my (undef, $err) = $session->finish;
	like($err, qr/WARNING:  57014: .*ERROR:  57014: .*user request/s, 'a cancel ends more than the wait');
	is(here('SELECT n FROM item WHERE id = 14'), '1', '... nothing is done behind it');

	my $start = Time::HiRes::time();
	(undef, $err) = $session->run("SET statement_timeout = '2s'; $loop");
	like($err, qr/WARNING:  57014: .*ERROR:  57014: .*statement timeout/s, 'so does statement_timeout');
	cmp_ok(Time::HiRes::time() - $start, '<', 2 + $soon, '... in time');
	is(here('SELECT n FROM item WHERE id = 14'), '2', '... and nothing is done behind that');
	$session->ok('RESET statement_timeout');
	release();
	(undef, $err) = $session->run($loop);
	is($err, '', 'it waits and goes on');
	is(seen('SELECT n FROM item WHERE id = 14'), '5', '... all of it');
	$session->quit;
};

section 'a stream that has stopped' => sub {
	my $session = awaiting('applied');

	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	my $start = Time::HiRes::time();
	my (undef, $err) = $session->run('UPDATE item SET n = 1 WHERE id = 8');
	like($err, qr/$warning applied at server "beta".*the stream is "paused"/s, 'paused: a warning');
	cmp_ok(Time::HiRes::time() - $start, '<', $soon, '... at once');
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');

	hold_row(8);
	$session->start('UPDATE item SET n = 5 WHERE id = 8');
	poll_waits($session, 8, 5);
	$start = Time::HiRes::time();
	here(q{SELECT mmrepl.pause('beta')});
	(undef, $err) = $session->finish;
	like($err, qr/$warning applied at server "beta".*the stream is "paused"/s, 'paused while it waits: a warning');
	cmp_ok(Time::HiRes::time() - $start, '<', 1 + $soon, '... soon');
	here(q{SELECT mmrepl.resume('beta')});
	release();

	there('ALTER TABLE item ADD CONSTRAINT good CHECK (n <> 77)');
	(undef, $err) = $session->run('UPDATE item SET n = 77 WHERE id = 8');
	like($err, qr/$warning applied at server "beta".*the stream is "blocked"/s, 'blocked: a warning');
	there('ALTER TABLE item DROP CONSTRAINT good');
	here(q{SELECT mmrepl.retry_now('beta')});
	$alpha->wait_caught_up('beta');

	disconnect();
	$beta->stop;
	$alpha->poll_ok(q{SELECT consecutive_failures >= 3 FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'}, 'the peer is not reached');
	$start = Time::HiRes::time();
	(undef, $err) = $session->run('UPDATE item SET n = 2 WHERE id = 8');
	like($err, qr/$warning applied at server "beta".*the stream is "retrying"/s, 'retrying: a warning');
	cmp_ok(Time::HiRes::time() - $start, '<', $soon, '... at once');
	(undef, $err) = $session->run('BEGIN; INSERT INTO inlined VALUES (1, 1); UPDATE item SET n = n WHERE id = 8; COMMIT');
	like($err, qr/NOTICE: .*$warning applied at server "beta"/s, 'what was to be synchronous, and is queued, is not exempt');

	# It is back, and the next try is far away.
	here(qq{ALTER SYSTEM SET mmrepl.retry_$_ = '1h'}) foreach ('max_delay', 'min_delay');
	$alpha->reload;
	$alpha->poll_ok(q{SELECT next_retry_at > now() + interval '10min' FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'}, 'the next try is far away');
	$beta->start;
	ok(until_true(sub { return ($session->run('UPDATE item SET n = 2 WHERE id = 8'))[1] eq '' }),
		'those who do not wait have it tried');
	here(qq{ALTER SYSTEM RESET mmrepl.retry_$_}) foreach ('max_delay', 'min_delay');
	$alpha->reload;
	$alpha->wait_caught_up('beta');
	$alpha->poll_state('beta', 'streaming');
	(undef, $err) = $session->run('UPDATE item SET n = 3 WHERE id = 8');
	is($err, '', 'the peer is back: it is awaited again');
	is(there('SELECT n FROM item WHERE id = 8'), '3', '... and there');
	$session->quit;
	connect_again();
};

section 'a stream that is given up' => sub {
	my $session = awaiting('flushed');

	hold_row(9);
	$session->start('UPDATE item SET n = 1 WHERE id = 9');
	poll_waits($session, 9, 1);
	$alpha->safe_psql('postgres', q{ALTER SYSTEM SET mmrepl.max_queue_size = '64kB'});
	$alpha->reload;
	$alpha->poll_ok(q{SELECT current_setting('mmrepl.max_queue_size') = '64kB'}, 'a small limit');
	here('INSERT INTO item SELECT g, g FROM generate_series(100, 20000) g');
	my (undef, $err, $took) = $session->finish;
	like($err, qr/$warning flushed.*needs a resync/s, 'the wait is in vain, and ends');
	cmp_ok($took, '<', 30, '... long before sync_timeout');
	(undef, $err) = $session->run('UPDATE item SET n = 2 WHERE id = 9');
	like($err, qr/$warning flushed.*needs a resync/s, 'nothing is queued any more: that is said each time');
	(undef, $err) = $session->run('BEGIN; SAVEPOINT a; UPDATE item SET n = 2 WHERE id = 9; ROLLBACK TO a; COMMIT');
	is($err, '', '... not of what is undone');
	$holder->ok('COMMIT');
	$alpha->safe_psql('postgres', 'ALTER SYSTEM RESET mmrepl.max_queue_size');
	$alpha->reload;
	here(q{SELECT mmrepl.resync('beta')});
	$alpha->wait_caught_up('beta');
	is($alpha->fingerprint('item'), $beta->fingerprint('item'), 'both sides are equal after the resync');

	hold_row(9);
	$session->start('UPDATE item SET n = 3 WHERE id = 9');
	poll_waits($session, 9, 3);
	here(q{SELECT mmrepl.resync('beta', force => true)});
	(undef, $err, $took) = $session->finish;
	like($err, qr/$warning flushed.*resync\(\) has taken it out/s, 'a resync() comes in between');
	cmp_ok($took, '<', 30, '... which ends the wait');
	release();
	$session->quit;
};

section 'several peers, modes, prepared transactions' => sub {
	my $session = awaiting('applied');

	my (undef, $created) = $session->run(q{SELECT mmrepl.create_pair('item', 'second', copy_data => true)});
	is($created, '', 'the stream is new: its worker is awaited, too');
	is($beta->safe_psql('second', 'SELECT count(*) FROM item'), here('SELECT count(*) FROM item'), '... the copy is there');

	foreach my $n (1 .. 10)
	{
		$session->ok("UPDATE item SET n = $n WHERE id = 10");
		my $second = $beta->safe_psql('second', 'SELECT n FROM item WHERE id = 10');
		is(there('SELECT n FROM item WHERE id = 10') . " $second", "$n $n", 'both peers have it');
	}
	hold_row(10);
	$session->start('UPDATE item SET n = 11 WHERE id = 10');
	poll_waits($session, 10, 11);
	$beta->poll_ok('SELECT n = 11 FROM item WHERE id = 10', 'one peer has it, and the other one is awaited', 'second');
	$holder->ok('COMMIT');
	my (undef, $err) = $session->finish;
	is($err, '', '... until it has it, too');

	$session->ok(q{BEGIN; SET LOCAL mmrepl.mode = 'sync'; UPDATE item SET n = 12 WHERE id = 10; COMMIT});
	is(there('SELECT n FROM item WHERE id = 10'), '12', 'a synchronous transaction');
	$session->ok(q{BEGIN; UPDATE item SET n = 13 WHERE id = 10; PREPARE TRANSACTION 'one'});
	hold_row(10);
	my $start = Time::HiRes::time();
	(undef, $err) = $session->run(q{COMMIT PREPARED 'one'});
	is($err, '', 'COMMIT PREPARED does not wait');
	cmp_ok(Time::HiRes::time() - $start, '<', $soon, '... at all');
	release();
	$alpha->wait_caught_up('second');
	is(there('SELECT n FROM item WHERE id = 10'), '13', '... and arrives');

	# The end of a synchronous transaction is waited for at one peer, and the queue of another one.
	my $far = $beta->session('second');
	$_->safe_psql($_ == $beta ? 'second' : 'postgres', 'CREATE TABLE afar (id int PRIMARY KEY, n int)') foreach ($alpha, $beta);
	$alpha->create_pair('afar', 'second');
	$session->ok('INSERT INTO afar VALUES (1, 0)');
	$far->ok('BEGIN; SELECT FROM afar FOR UPDATE');
	without_flushes(
		sub {
			$session->start('BEGIN; UPDATE afar SET n = 1; INSERT INTO inlined VALUES (2, 2); COMMIT');
			my $pid = $session->pid;
			$beta->poll_ok(q{SELECT count(*) > 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'}, 'a peer commits');
			$start = Time::HiRes::time();
			here("SELECT pg_cancel_backend($pid)");
			(undef, $err) = $session->finish;
			cmp_ok(Time::HiRes::time() - $start, '<', $soon, 'one cancel ends the wait for both of them');
			like($err, qr/WARNING:  57014: the commit at server "beta" was not waited for/, '... with a warning for the one');
			like($err, qr/WARNING:  57014: the transaction is not known to be applied at server "second"/, '... and for the other');
			$far->ok('ROLLBACK');
		});
	$far->quit;
	$alpha->wait_caught_up('second');

	# Who waits gives up a connection that he does not need.
	here('ALTER SYSTEM SET mmrepl.max_peer_connections = 1');
	$alpha->reload;
	$alpha->poll_ok(q{SELECT current_setting('mmrepl.max_peer_connections') = '1'}, 'one connection');
	my $other = $alpha->session;
	$session->ok('INSERT INTO inlined VALUES (3, 3)');
	$far = $beta->session('second');
	$far->ok('BEGIN; SELECT FROM afar FOR UPDATE');
	$session->start('UPDATE afar SET n = 2');
	my $pid = $session->pid;
	$alpha->poll_ok("SELECT n = 2 AND a.wait_event_type = 'Extension' FROM afar, pg_stat_activity a WHERE pid = $pid", 'it waits');
	$start = Time::HiRes::time();
	$other->ok('INSERT INTO inlined VALUES (6, 6)');
	cmp_ok(Time::HiRes::time() - $start, '<', 1 + $soon, 'the connection of one that waits is not kept from others');
	$far->ok('ROLLBACK');
	is(($session->finish)[1], '', '... and he goes on waiting');
	$_->quit foreach ($far, $other);
	here('ALTER SYSTEM RESET mmrepl.max_peer_connections');
	$alpha->reload;
	$session->quit;
};

section 'one place after the other' => sub {
	my $session = awaiting('flushed');

	# What was too large is undone, and the rest is queued as ever.
	hold_row(11);
	here(q{ALTER SYSTEM SET mmrepl.max_queue_size = '1MB'});
	$alpha->reload;
	$alpha->poll_ok(q{SELECT current_setting('mmrepl.max_queue_size') = '1MB'}, 'a small limit');
	$session->ok(q{SET mmrepl.buffer_memory = '64kB'});
	$session->start(
		q{BEGIN; UPDATE item SET n = 1 WHERE id = 11; SAVEPOINT a;
		  INSERT INTO item SELECT g, g FROM generate_series(100000, 300000) g; ROLLBACK TO a; COMMIT});
	poll_waits($session, 11, 1);
	release();
	is(($session->finish)[1], '', '... and is awaited');
	here('ALTER SYSTEM RESET mmrepl.max_queue_size');
	$alpha->reload;
	$session->quit;

	# Nobody can look for streams after the restart, nor serve them: the launcher and the
	# server's own are all the workers that there may be.
	$alpha->append_conf('postgresql.conf', 'max_worker_processes = 2');
	$alpha->restart;
	$session = awaiting('flushed');
	my $start = Time::HiRes::time();
	my (undef, $err) = $session->run('UPDATE item SET n = 2 WHERE id = 11');
	like($err, qr/$warning flushed at server "beta".*the stream has no worker/s, 'no worker: a warning');
	cmp_ok(Time::HiRes::time() - $start, '<', 30, '... long before sync_timeout');
	$alpha->append_conf('postgresql.conf', 'max_worker_processes = 20');
	hold_row(11);
	$alpha->restart;
	$session = awaiting('flushed');
	$session->start('UPDATE item SET n = 12 WHERE id = 11');
	poll_waits($session, 11, 12);
	release();
	(undef, $err) = $session->finish;
	is($err, '', 'right after a restart');
	is(there('SELECT n FROM item WHERE id = 11'), '12', '... it is there');

	# One that waits for two peers, of which one is no peer any more.
	my $other = $beta->session('second');
	$_->ok('BEGIN; SELECT FROM item WHERE id = 11 FOR UPDATE') foreach ($holder, $other);
	$session->start('UPDATE item SET n = 3 WHERE id = 11');
	poll_waits($session, 11, 3);
	here('SELECT pg_cancel_backend(' . $session->pid . ')');
	(undef, $err) = $session->finish;
	my @cancelled = $err =~ /WARNING:  57014: the transaction is not known to be flushed at server "(\w+)"/g;
	is(join(' ', sort @cancelled), 'beta second', 'a cancel, with two peers behind');
	$holder->ok('COMMIT');
	$session->start('UPDATE item SET n = 4 WHERE id = 11');
	poll_waits($session, 11, 4);
	here('DROP SERVER second CASCADE');
	(undef, $err, my $took) = $session->finish;
	like($err, qr/$warning flushed at server "second".*Nothing delivers it/s, 'the server is dropped');
	cmp_ok($took, '<', 30, '... which ends the wait');
	$other->ok('COMMIT');
	$other->quit;
	$session->quit;
};

section 'what cannot be said' => sub {
	my $name = "b\x{c3}\x{bc}";

	# The name has a character that the client's encoding does not have.
	here(q{CREATE DATABASE wide TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C'});
	$alpha->safe_psql('wide', 'CREATE EXTENSION mmrepl_bgw; CREATE TABLE odd (id int PRIMARY KEY)');
	there('CREATE TABLE odd (id int PRIMARY KEY)');
	$alpha->add_peer($beta, server => $name, dbname => 'wide');
	$alpha->create_pair('odd', $name, undef, 'wide');
	$alpha->safe_psql('wide', "SELECT mmrepl.pause('$name')");
	$alpha->poll_ok(q{SELECT state = 'paused' FROM mmrepl.pg_stat_mmrepl}, 'paused', 'wide');
	my $session = $alpha->session('wide');
	$session->ok(q{SET mmrepl.async_commit = 'applied'; SET client_encoding = 'WIN1251'});
	my (undef, $err) = $session->run('INSERT INTO odd VALUES (1)');
	is($err, '', 'the client is not told');
	is($session->ok('SELECT count(*) FROM odd'), '1', '... and goes on');
	(undef, $err) = $session->run(q{SET statement_timeout = '100ms'; SELECT pg_sleep(1000)});
	like($err, qr/57014/, '... and can be cancelled');
	ok($alpha->log_contains(qr/LOG:  the transaction is not known to be applied at server "$name"/), '... the log is');
	$session->quit;
	$alpha->safe_psql('wide', qq{DROP SERVER "$name" CASCADE; DROP EXTENSION mmrepl_bgw});
	here('DROP DATABASE wide WITH (FORCE)');
};

section 'many that wait' => sub {
	my @sessions = map { awaiting($_ % 2 ? 'flushed' : 'applied') } 1 .. 8;
	my $other = $beta->session;
	my $first = awaiting('flushed');

	# The first one's batch is on its way alone, the others' behind it, for another row.
	hold_row(12);
	$first->start('UPDATE item SET n = 1 WHERE id = 12');
	poll_waits($first, 12, 1);
	$other->ok('BEGIN; SELECT FROM item WHERE id = 13 FOR UPDATE');
	foreach my $session (@sessions)
	{
		$session->start('UPDATE item SET n = n + 1 WHERE id = 13');
	}
	poll_waits($_, 13, 8) foreach @sessions;
	$holder->ok('COMMIT');
	$first->finish;
	my $ticks = sub {
		my $sum = 0;
		foreach my $session (@sessions)
		{
			my @stat = split / /, (slurp_file('/proc/' . $session->pid . '/stat') =~ s/.*\) //r);
			$sum += $stat[11] + $stat[12];
		}
		return $sum;
	};
	my $before = $ticks->();
	$alpha->safe_psql('postgres', 'SELECT pg_sleep(2)');
	cmp_ok($ticks->() - $before, '<', 8, 'those whose turn has not come sleep');
	$other->ok('COMMIT');
	is(($_->finish)[1], '', 'it comes') foreach @sessions;
	$_->quit foreach (@sessions, $first, $other);
	$alpha->wait_caught_up('beta');
};

section 'many that wait, again and again' => sub {
	my $script = $alpha->basedir . '/one_row.sql';
	my %took;

	# Between two batches nobody waits for a moment: they are about to do so again.
	here('DELETE FROM item WHERE id >= 1000');
	here('INSERT INTO item SELECT g, 0 FROM generate_series(1000, 1999) g');
	here('ALTER SYSTEM SET fsync = on');
	append_to_file($script, "\\set id random(1000, 1999)\nUPDATE item SET n = n + 1 WHERE id = :id;\n");
	foreach my $delay (0, 20000, 0, 20000)
	{
		here("ALTER SYSTEM SET mmrepl.batch_delay = $delay");
		$alpha->reload;
		$alpha->poll_ok("SELECT current_setting('mmrepl.batch_delay')::int = $delay", 'another pace');
		local $ENV{PGOPTIONS} = '-c mmrepl.async_commit=applied';
		my $start = Time::HiRes::time();
		$alpha->command_ok(
			[ 'pgbench', '-n', '-c', '8', '-t', '200', '-f', $script, '-h', $alpha->host, '-p', $alpha->port, 'postgres' ],
			'eight clients');
		my $time = Time::HiRes::time() - $start;
		$took{$delay} = $time if !$took{$delay} || $time < $took{$delay};
	}
	cmp_ok($took{20000}, '<', 2 * $took{0} + 1, 'they need no longer because batches keep a pace');
	is(here('SELECT sum(n) FROM item WHERE id >= 1000'), '6400', '... and all of them did something');
	here("ALTER SYSTEM RESET $_") foreach ('mmrepl.batch_delay', 'fsync');
	$alpha->reload;
	$alpha->wait_caught_up('beta');
};

section 'two masters that wait for each other' => sub {
	my $number = 0;
	my @clients;

	foreach my $node ($alpha, $beta)
	{
		$node->safe_psql('postgres', qq{ALTER SYSTEM SET mmrepl.async_commit = '$_'}) foreach ($number++ % 2 ? 'applied' : 'flushed');
		$node->reload;
		foreach my $client (1 .. 4)
		{
			my $first = $number * 4 + $client;
			push @clients, Client->start(
				$node,
				sub {
					my ($count) = @_;
					return ($count, "BEGIN; UPDATE shared SET n = n + 1 WHERE id = 1 + ($first + $count) % 20; COMMIT;");
				});
		}
	}
	$alpha->poll_ok('SELECT sum(n) > 400 FROM shared', 'the load runs');
	my @reports = map { $_->finish } @clients;
	my @said = map { keys %{ $_->{said} }, keys %{ $_->{errors} } } @reports;
	is("@said", '', 'no wait ended before its time');
	$alpha->wait_caught_up('beta');
	$beta->wait_caught_up('alpha');
};

disconnect();
done_testing();
