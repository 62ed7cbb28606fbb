# Commits that the peer does not flush: what they brought is seen at once, and
# confirmed only when it is there for good.  A peer that crashes in between gets
# it again.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use FaultPoints;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();
use Unflushed;

my ($alpha, $beta) = MmreplCluster->new_pair(conf => q{
	mmrepl.retry_min_delay = '20ms'
	mmrepl.retry_max_delay = '200ms'
	mmrepl.batch_size = '64kB'
	autovacuum = off
	checkpoint_timeout = '1h'
});
my $writer;
my $last = 0;

$alpha->create_table_on_both($beta, 'CREATE TABLE item (id int PRIMARY KEY, n int)');
$alpha->create_pair('item', 'beta');

# What was not flushed there is lost.
sub crash
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	lose_unflushed($beta, $writer);
	bring_back($beta);
	return;
}

sub has
{
	my ($id) = @_;

	return query($beta, "SELECT count(*) FROM item WHERE id = $id") eq '1';
}

# The fault is in force for the worker: it is told before new sessions are made.
sub arm
{
	my ($fault) = @_;

	arm_fault($alpha, $fault);
	until_true(sub { query($alpha, 'SHOW mmrepl.fault') eq $fault }) or fail("$fault is set");
	return;
}

sub hits { return point_hits($alpha, $_[0]) }

# A row that the peer shows, and its id.
sub insert
{
	$last++;
	query($alpha, "INSERT INTO item VALUES ($last, 0)");
	until_true(sub { has($last) }) or fail("row $last is seen at the peer");
	return $last;
}

# Passes when the peer gets everything, and nobody has complained.
sub mended
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$alpha->wait_caught_up('beta') || diag($alpha->describe('beta'));
	$alpha->poll_state('beta', 'streaming'); # batches are relaxed again
	$alpha->same_rows($beta, 'item', name => $name);
	is(query($alpha, 'SELECT count(*) FROM mmrepl.sync_err_rec'), '0', "$name: nothing waits");
	is(query($beta, 'SELECT sum(conflicts) FROM mmrepl.progress'), '0', "$name: no conflict");
	return;
}

$alpha->wait_caught_up('beta');
$alpha->poll_state('beta', 'streaming');

section 'a crash before the seal' => sub {
	my $fault = 'seal-built:wait:1';
	my $begins = 'feed-reset:wait:1';

	arm($fault);
	$writer = stop_flushing($beta);
	my $id = insert();
	ok(await_fault($alpha, $fault), 'it is to be sealed');
	is(query($alpha, 'SELECT count(*) FROM mmrepl.sync_err_rec'), '1', 'until then it is kept here');
	is($alpha->stat('beta', 'queue_transactions'), '1', 'and counts as waiting');
	query($alpha, "UPDATE item SET n = n + 1 WHERE id = $id");
	crash();
	ok(!has($id), 'the peer has lost it');
	arm($begins);
	release_fault($alpha, $fault);
	ok(await_fault($alpha, $begins), 'the worker begins again');
	is($alpha->stat('beta', 'queue_transactions'), '2', 'what was lost still counts');
	release_fault($alpha, $begins);
	mended('it comes again');
	disarm_faults($alpha);
};

section 'what is confirmed stays' => sub {
	foreach my $round (1 .. 3)
	{
		$writer = stop_flushing($beta);
		query($alpha, 'INSERT INTO item VALUES (' . ++$last . ', 0)');
		is(query($alpha, q{SELECT mmrepl.wait_for_replay('beta', '60 s')}), 't', 'confirmed');
		$beta->close_to_peers;
		crash();
		ok(has($last), 'and there after a crash');
		$beta->open_to_peers;
		mended("round $round");
	}
};

section 'what the peer has when it is greeted need not be flushed' => sub {
	my $dies = 'worker-unsealed:fatal:1';
	my $seals = 'seal-built:wait:1';

	arm($dies);
	$writer = stop_flushing($beta);
	my $id = insert();
	ok(await_fault($alpha, $dies), 'the worker dies before the seal');
	arm($seals);
	ok(await_fault($alpha, $seals), 'the next one seals it');
	is(query($alpha, 'SELECT count(*) FROM mmrepl.sync_err_rec'), '1', 'until then it is kept here');
	crash();
	ok(!has($id), 'the peer has lost it');
	release_fault($alpha, $seals);
	mended('it comes again');
	disarm_faults($alpha);
};

section 'a pause seals' => sub {
	$writer = stop_flushing($beta);
	my $id = insert();
	query($alpha, q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	is(query($alpha, 'SELECT count(*) FROM mmrepl.sync_err_rec'), '0', 'nothing waits');
	crash();
	ok(has($id), 'it is there after a crash');
	query($alpha, q{SELECT mmrepl.resume('beta')});
	mended('after the pause');
};

section 'deal_sync_err_rec() seals' => sub {
	my $fault = 'worker-unsealed:fatal:1';

	arm($fault);
	$writer = stop_flushing($beta);
	my $id = insert();
	ok(await_fault($alpha, $fault), 'the worker dies before the seal');
	query($alpha, q{SELECT mmrepl.pause('beta')});
	disarm_faults($alpha);
	is(query($alpha, 'SELECT mmrepl.deal_sync_err_rec(10)'), 't', 'it is dealt with by hand');
	crash();
	ok(has($id), 'it is there after a crash');
	query($alpha, q{SELECT mmrepl.resume('beta')});
	mended('after that');
};

# Behind what was applied comes a batch that stands still.
sub waits_for_nobody
{
	my ($name, $next) = @_;
	my $fault = 'worker-unsealed:wait:1';
	my $holder = $beta->session;

	$holder->ok('BEGIN; SELECT FROM item WHERE id = 1 FOR UPDATE');
	arm($fault);
	insert();
	ok(await_fault($alpha, $fault), "$name: a row is applied");
	my $waiter = $alpha->session;

	$waiter->start(q{SELECT mmrepl.wait_for_replay('beta', '1 min')});
	$alpha->poll_ok(q{SELECT count(*) = 1 FROM pg_stat_activity WHERE query LIKE 'SELECT mmrepl.wait%' AND wait_event = 'Extension'},
		"$name: somebody waits for it");
	query($alpha, $next);
	release_fault($alpha, $fault);
	is(($waiter->finish)[0], 't', "$name: and waits for nothing else");
	$beta->poll_ok('SELECT count(*) = 1 FROM pg_locks WHERE NOT granted', "$name: what is behind it does");
	$holder->ok('COMMIT');
	$_->quit foreach $holder, $waiter;
	disarm_faults($alpha);
	mended($name);
	return;
}

section 'what is applied waits for nothing behind it' => sub {
	waits_for_nobody('a row', 'UPDATE item SET n = n + 1 WHERE id = 1');
	waits_for_nobody('a large transaction',
		'UPDATE item SET n = n + 1 WHERE id = 1; INSERT INTO item SELECT g, 0 FROM generate_series(100001, 120000) g');
};

section 'what is sealed is sealed once' => sub {
	my ($batches, $seals) = ($alpha->stat('beta', 'batches'), hits('seal-built'));

	foreach (1 .. 3)
	{
		insert();
		query($alpha, q{SELECT mmrepl.wait_for_replay('beta', '60 s')});
	}
	is(hits('seal-built') - $seals, 3, 'a seal for each transaction that comes alone');
	is($alpha->stat('beta', 'batches') - $batches, 6, 'and no other batch');
};

# The first one stands still, relaxed, and so does the second one later.
section 'a large transaction behind what is still on its way' => sub {
	my ($id, $other) = (insert(), insert());
	my ($first, $second, $waiter) = ($beta->session, $beta->session, $alpha->session);
	my $blocked = sub {
		my ($session) = @_;
		return 'SELECT count(*) = 1 FROM pg_stat_activity WHERE ' . $session->pid . ' = ANY (pg_blocking_pids(pid))';
	};

	$alpha->wait_caught_up('beta');
	my $seals = hits('seal-built');

	$first->ok("BEGIN; SELECT FROM item WHERE id = $id FOR UPDATE");
	$second->ok("BEGIN; SELECT FROM item WHERE id = $other FOR UPDATE");
	query($alpha, "UPDATE item SET n = n + 1 WHERE id = $id");
	$beta->poll_ok($blocked->($first), 'a relaxed batch stands still');
	$waiter->start(q{SELECT mmrepl.wait_for_replay('beta', '1 min')});
	$alpha->poll_ok(q{SELECT count(*) = 1 FROM pg_stat_activity WHERE query LIKE 'SELECT mmrepl.wait%' AND wait_event = 'Extension'},
		'somebody waits for it');
	query($alpha, "UPDATE item SET n = n + 1 WHERE id = $other; INSERT INTO item SELECT g, 0 FROM generate_series(200001, 220000) g");
	until_true(sub { hits('seal-built') > $seals }) or fail('its seal is built');
	$first->ok('COMMIT');
	is(($waiter->finish)[0], 't', 'it is sealed, and waited for no longer');
	$beta->poll_ok($blocked->($second), 'while the large one stands still');
	is(hits('seal-built') - $seals, 1, 'that was one seal');
	$second->ok('COMMIT');
	$_->quit foreach $first, $second, $waiter;
	mended('a large one');
};

# It has something to seal, for which it is late, and tries to get the lock all the time.
section 'the worker has not the ordering lock' => sub {
	my $fault = 'worker-unsealed:wait:1';
	my $session = $alpha->session;

	arm($fault);
	insert();
	ok(await_fault($alpha, $fault), 'something is unsealed');
	$session->start('BEGIN; SELECT mmrepl.deal_sync_err_rec(1)');
	$alpha->poll_ok(q{SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND locktype = 'object'}, 'somebody else wants the lock');
	$beta->terminate_peers;
	disarm_faults($alpha);
	is(($session->finish)[0], 't', 'and gets it');
	my $begun = Time::HiRes::time();
	my $before = hits('worker-locked');
	until_true(sub { hits('worker-locked') > $before + 30 }) or fail('the worker tries to get it');
	my $tries = hits('worker-locked') - $before;
	cmp_ok($tries, '<=', 10 * (Time::HiRes::time() - $begun) + 10, 'ten times a second');
	$session->ok('COMMIT');
	$session->quit;
	mended('afterwards');
};

section 'a server is not dropped before the seal' => sub {
	my $fault = 'worker-unsealed:wait:1';

	arm($fault);
	my $id = insert();
	ok(await_fault($alpha, $fault), 'a row is applied');
	like(
		$alpha->fails('postgres', q{
			BEGIN;
			SELECT mmrepl.drop_pair('item', 'beta');
			DROP USER MAPPING FOR CURRENT_USER SERVER beta;
			DROP SERVER beta;
			COMMIT}),
		qr/2BP01.*queued for it: 1/s, 'it is refused');
	release_fault($alpha, $fault);
	disarm_faults($alpha);
	mended('after that');
};

section 'an older peer flushes every batch' => sub {
	query(
		$beta, q{
		ALTER FUNCTION mmrepl.hello RENAME TO new_hello;
		CREATE FUNCTION mmrepl.hello(uuid, int, int, OUT protocol int, OUT node uuid, OUT watermark bigint, OUT server_version int)
		LANGUAGE sql AS 'SELECT 2, node, watermark, server_version FROM mmrepl.new_hello($1, $2, 2)'});
	$beta->terminate_peers;
	$writer = stop_flushing($beta);
	my $id = insert();
	$beta->close_to_peers;
	crash();
	ok(has($id), 'it is there after a crash');
	$beta->open_to_peers;
	mended('after that');
	query($beta, 'DROP FUNCTION mmrepl.hello; ALTER FUNCTION mmrepl.new_hello RENAME TO hello');
};

$_->stop('fast') foreach $alpha, $beta;
done_testing();
