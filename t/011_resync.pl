# A queue that would exceed mmrepl.max_queue_size: the log warns, then the server
# needs a resync and nothing is queued for it, until resync() copies its tables.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => "autovacuum = off\nmmrepl.rotate_size = '256kB'\n"
	  . "mmrepl.max_queue_size = '128kB'\nmmrepl.connect_timeout = '60s'");

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

sub there
{
	return $beta->safe_psql('postgres', $_[0]);
}

sub synced
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->wait_caught_up('beta');
}

sub stat_ok
{
	my ($condition, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->poll_ok(
		"SELECT $condition FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'",
		$name) || diag($alpha->describe('beta'));
}

my $size = q{SELECT sum(pg_relation_size(oid)) FROM pg_class
	WHERE relnamespace = 'mmrepl'::regnamespace AND relname ~ '^queue_[0-9]$'};
my $limit = 128 * 1024;
my $id = 1000;

# Nothing that is written is queued.
sub nothing_queued
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $before = here($size);

	here('CALL load(500)');
	here(q{INSERT INTO item SELECT g, repeat('x', 100)
		   FROM generate_series(100001, 103000) g});
	here(q{DELETE FROM item WHERE id > 100000});
	cmp_ok(here($size), '<=', $before, "$name: the queue does not grow");
	return is($alpha->queued('beta'), '0', "$name: nothing is shown as queued");
}

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE item (id int PRIMARY KEY, v text);
	CREATE TABLE other (id int PRIMARY KEY, v text);
	CREATE TABLE hand (id int PRIMARY KEY, v text);
	CREATE TABLE part (id int, r int, v text, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
	CREATE TABLE part_1 PARTITION OF part FOR VALUES IN (1);
	CREATE TABLE part_2 PARTITION OF part FOR VALUES IN (2);
});
$alpha->create_pair('item', 'beta');
$alpha->create_pair('other', 'beta');
$alpha->create_pair('part', 'beta');
$alpha->make_load('item');
here(
	q{
	CREATE TRIGGER by_hand AFTER INSERT OR UPDATE OR DELETE ON hand FOR EACH ROW
	  EXECUTE FUNCTION mmrepl.replicate('beta', 'public', 'hand', '', 'async');
	INSERT INTO item SELECT g, 'start' FROM generate_series(1, 50) g;
	INSERT INTO other SELECT g, 'start' FROM generate_series(1, 50) g;
	INSERT INTO hand SELECT g, 'start' FROM generate_series(1, 5) g;
	INSERT INTO part SELECT g, g % 2 + 1, 'start' FROM generate_series(1, 10) g;
});
synced();

###############################################################################

section 'the peer is away for too long' => sub {
	stat_ok(
		'queue_warned_at IS NULL AND resync_since IS NULL AND resync_reason IS NULL',
		'all is well');
	$beta->peer_down('fast');
	ok($alpha->load_until('beta', 'queue_warned_at IS NOT NULL', 40), 'it is said that much waits');
	ok($alpha->log_contains(qr/bytes of changes wait for stream/),
		'in the log, too');
	isnt($alpha->state('beta'), 'needs resync', 'before the limit is reached');

	# This one began before, and commits after.
	my $late = $alpha->session;
	$late->ok('BEGIN');
	$late->ok(q{UPDATE other SET v = 'late' WHERE id = 1});

	my ($ret, undef, $err) = (0);
	ok($alpha->load_until('beta', q{state = 'needs resync'}, 40), 'then the server needs a resync');
	ok($alpha->log_contains(
			qr/WARNING:  server "beta" needs a resync: changes are not queued/),
		'the log says so');
	cmp_ok($alpha->log_contains(qr/bytes of changes wait for stream/) ? 1 : 0,
		'==', 1, 'after the warning');
	stat_ok(
		q{resync_since <= now() AND resync_reason ~ 'max_queue_size'
		  AND resync_reason ~ 'mmrepl.resync'},
		'the view says since when, why, and what to do');
	stat_ok('queue_transactions = 0 AND queue_bytes = 0 AND oldest_queued_at IS NULL',
		'nothing waits any more');
	$late->ok(q{INSERT INTO other VALUES (1001, 'late')});
	$late->ok('COMMIT');
	$late->quit;
	nothing_queued('given up');
	$alpha->poll_ok("SELECT ($size) < 300 * 1024", 'the disk is free again')
	  || diag(here($size));

	foreach my $call (
		q{mmrepl.wait_for_replay('beta')},
		q{mmrepl.create_pair('hand', 'beta')},
		q{mmrepl.alter_pair('item', 'beta', copy_data => true)})
	{
		like($alpha->fails('postgres', "SELECT $call"),
			qr/ERROR:\s+MM015.*HINT:\s+SELECT mmrepl\.resync\('beta'\)/s,
			"$call says what to do");
	}
	($ret, my $out, $err) =
	  $alpha->psql('postgres', 'SELECT mmrepl.deal_sync_err_rec(10)');
	is("$ret $out", '0 f', 'deal_sync_err_rec: false');
	like($err, qr/WARNING:\s+server "beta" needs a resync/, 'with the reason');
};

section 'sync pairs' => sub {
	here(
		q{SELECT mmrepl.alter_pair('other', 'beta', mode => 'sync')});
	like(
		$alpha->fails('postgres', q{INSERT INTO other VALUES (2001, 'sync')}),
		qr/ERROR:\s+MM015.*needs a resync/s,
		q{on_unreachable 'error': the statement fails});
	here(
		q{SELECT mmrepl.alter_pair('other', 'beta', on_unreachable => 'queue')});
	my ($ret, $out, $err) =
	  $alpha->psql('postgres', q{INSERT INTO other VALUES (2001, 'queue')});
	is($ret, 0, q{'queue': it is done here});
	like($err, qr/NOTICE:  server "beta" needs a resync/, 'with a NOTICE');
	here(q{SELECT mmrepl.alter_pair('other', 'beta', mode => 'async')});
};

section 'it outlives a crash, and the peer that is back' => sub {
	$alpha->stop('immediate');
	$alpha->start;
	is($alpha->state('beta'), 'needs resync', 'after a crash');
	nothing_queued('after a crash');
	$beta->peer_up;
	here(q{SELECT mmrepl.retry_now('beta')});
	here('CALL load(10)');
	stat_ok('pid IS NOT NULL', 'a worker is there');
	is($alpha->state('beta'), 'needs resync', 'the peer is back: nothing changes');
	is(there('SELECT count(*) FROM item'), '50', 'and nothing is delivered');
};

section 'resync()' => sub {
	like(
		$alpha->fails(
			'postgres',
			q{BEGIN; SELECT mmrepl.resync('beta'); PREPARE TRANSACTION 'p'}),
		qr/ERROR:\s+0A000/,
		'not in a transaction that is prepared');
	here(
		q{BEGIN; SAVEPOINT s; SELECT mmrepl.resync('beta'); ROLLBACK TO s;
		   INSERT INTO other VALUES (3001, 'rolled back'); COMMIT});
	is($alpha->state('beta'), 'needs resync', 'rolled back: nothing happened');
	here(q{BEGIN; SELECT mmrepl.resync('beta'); ROLLBACK});
	is($alpha->state('beta'), 'needs resync', 'all of it rolled back');

	# A transaction that has not been captured is waited for, and a later one waits.
	my $early = $alpha->session;
	my $resync = $alpha->session;
	$early->ok('BEGIN');
	$early->ok(q{INSERT INTO item VALUES (100, 'early')});
	$resync->start(q{SELECT mmrepl.resync('beta')});
	$alpha->poll_ok(
		'SELECT wait_event_type = ' . q{'Lock'} . ' FROM pg_stat_activity WHERE pid = '
		  . $resync->pid,
		'resync() waits for writers');
	$early->ok(q{UPDATE item SET v = 'early' WHERE id = 1});
	$early->ok('COMMIT');
	my ($rows, $err) = $resync->finish;
	is($rows, here(q{SELECT (SELECT count(*) FROM item) + (SELECT count(*) FROM other)
			+ (SELECT count(*) FROM hand) + (SELECT count(*) FROM part)}),
		'it returns the number of rows');
	like($err, qr/NOTICE.*deleted.*HINT.*truncate/s, 'and says what it does not do');
	here(q{UPDATE item SET v = 'after' WHERE id = 2});
	synced();
	$alpha->poll_state('beta', 'streaming');
	stat_ok('resync_since IS NULL AND resync_reason IS NULL AND queue_warned_at IS NULL',
		'all is well again');
	$alpha->same_rows($beta, $_) foreach ('item', 'other', 'hand', 'part');
	like($alpha->fails('postgres', q{SELECT mmrepl.resync('beta')}),
		qr/ERROR:\s+55000.*force/s, 'it is refused where nothing is wrong');
	$_->quit foreach ($early, $resync);
};

section 'a copy that is larger than the limit, and truncate' => sub {
	here(q{INSERT INTO item SELECT g, repeat('w', 100) FROM generate_series(200001, 202000) g});
	my $state = $alpha->state('beta');
	is($state, 'needs resync', 'one transaction alone is more than may wait');
	there(q{INSERT INTO item VALUES (999999, 'only there')});
	here('DELETE FROM item WHERE id = 3');
	is($beta->safe_psql('postgres', 'SELECT count(*) FROM item WHERE id = 3'),
		'1', 'a row is only there');

	# The copy waits, and what is written meanwhile: the limit is for the latter.
	$beta->peer_down('fast');
	here(q{SELECT mmrepl.resync('beta', truncate => true)});
	here(q{UPDATE item SET v = 'behind the copy' WHERE id = 4});
	isnt($alpha->state('beta'), 'needs resync', 'the copy may be larger');
	$alpha->restart;
	here(q{UPDATE item SET v = 'behind the copy' WHERE id = 5});
	isnt($alpha->state('beta'), 'needs resync', 'also after a restart');
	$beta->peer_up;
	synced();
	$alpha->same_rows($beta, $_, name => "$_: nothing is there that is not here")
	  foreach ('item', 'other', 'hand', 'part');

	# What spills is noticed before it has filled the disk.
	$beta->peer_down('fast');
	my $session = $alpha->session;
	$session->ok(q{SET mmrepl.buffer_memory = '64kB'});
	my (undef, $err) = $session->run(
		q{INSERT INTO other SELECT g, repeat('z', 1000) FROM generate_series(10001, 20000) g});
	like($err, qr/WARNING:.*beta.*needs a resync/s, 'a large transaction');
	cmp_ok(here($size), '<', 4_000_000, 'is not spilled to its end');
	is($alpha->state('beta'), 'needs resync', 'the server needs a resync');
	$session->quit;
	$beta->peer_up;
	here(q{SELECT mmrepl.resync('beta', truncate => true)});
	synced();
	$alpha->same_rows($beta, $_) foreach ('item', 'other');
};

section 'prepared transactions' => sub {
	my $item = here('SELECT count(*) FROM item');

	here(q{BEGIN; INSERT INTO hand VALUES (100, 'prepared'); PREPARE TRANSACTION 'before'});
	$beta->peer_down('fast');
	ok($alpha->load_until('beta', q{state = 'needs resync'}, 40), 'the server needs a resync');
	here(q{BEGIN; INSERT INTO other VALUES (4001, 'prepared'); PREPARE TRANSACTION 'after'});
	here(q{COMMIT PREPARED 'before'; COMMIT PREPARED 'after'});
	$beta->peer_up;
	here(q{SELECT mmrepl.resync('beta', truncate => true)});
	here(q{UPDATE hand SET v = 'later' WHERE id = 100});
	synced();
	is(there('SELECT v FROM hand WHERE id = 100'), 'later',
		'what was prepared before is not delivered after the copy');
	$alpha->same_rows($beta, $_) foreach ('item', 'other', 'hand');
};

# What a savepoint gives back are also the locks that kept resync() away.
section 'resync() between two savepoints of a transaction' => sub {
	my $session = $alpha->session;

	$beta->peer_down('fast');
	ok($alpha->load_until('beta', q{state = 'needs resync'}, 40), 'the server needs a resync');
	$session->ok('BEGIN');
	$session->ok('SAVEPOINT s');
	$session->ok(q{INSERT INTO item VALUES (900001, 'not captured')});
	$session->ok('ROLLBACK TO s');
	here(q{SELECT mmrepl.resync('beta', truncate => true)});
	$session->ok(q{INSERT INTO item VALUES (900002, 'captured again')});
	$session->ok('COMMIT');
	$session->quit;
	$beta->peer_up;
	synced();
	is(there('SELECT string_agg(id::text, $$ $$) FROM item WHERE id IN (900001, 900002)'),
		'900002', 'what came after the copy is behind it');
	$alpha->same_rows($beta, 'item');
};

section 'given up while the worker connects' => sub {
	my $before = $alpha->stat('beta', 'pid');

	# The peer's kernel accepts the connection, and nobody answers.
	kill 'STOP', $beta->{_pid};
	$alpha->terminate($before);
	$alpha->poll_ok(
		qq{SELECT wait_event_type = 'Extension' FROM pg_stat_activity JOIN mmrepl.pg_stat_mmrepl
		   USING (pid) WHERE server = 'beta' AND pid <> $before}, 'a worker connects');
	ok($alpha->load_until('beta', q{state = 'needs resync'}, 40), 'the server needs a resync');
	my $log = -s $alpha->logfile;
	kill 'CONT', $beta->{_pid};
	$alpha->wait_for_log(qr/mmrepl: stream \d+ needs a resync, nothing is delivered/, $log);
	cmp_ok($alpha->stat('beta', 'coalesce(confirmed_ticket, 0)'),
		'<', $alpha->stat('beta', 'last_ticket'), 'nothing counts as delivered');
	here(q{SELECT mmrepl.resync('beta', truncate => true)});
	here(q{UPDATE item SET v = 'delivered' WHERE id = 2});
	synced();
	$alpha->same_rows($beta, $_) foreach ('item', 'other', 'hand', 'part');
};

kill 'CONT', $beta->{_pid}; # whatever has happened

section 'given up, and its user mapping is dropped' => sub {
	$beta->peer_down('fast');
	ok($alpha->load_until('beta', q{state = 'needs resync'}, 40), 'the server needs a resync');
	stat_ok(q{last_error ~ 'needs a resync'}, 'the worker knows');
	my $log = -s $alpha->logfile;
	here('DROP USER MAPPING FOR CURRENT_USER SERVER beta');
	stat_ok(q{last_error ~ 'user mapping' AND consecutive_failures >= 3},
		'it tries less and less often');
	my $text = PostgreSQL::Test::Utils::slurp_file($alpha->logfile, $log);
	ok($text !~ /needs a resync, nothing is delivered/, 'and says nothing twice');
	my $user = here('SELECT current_user'); # the same on both nodes
	here("CREATE USER MAPPING FOR CURRENT_USER SERVER beta OPTIONS (user '$user')");
	$beta->peer_up;
	here(q{SELECT mmrepl.resync('beta', truncate => true)});
	synced();
	$alpha->same_rows($beta, 'item');
};

section 'a pair goes and another comes while resync() waits' => sub {
	my ($writer, $other, $resync) = map { $alpha->session } (1 .. 3);

	$alpha->create_table_on_both($beta, 'CREATE TABLE swapped (id int PRIMARY KEY, v text)');
	$writer->ok('BEGIN');
	$writer->ok(q{UPDATE item SET v = 'in the way' WHERE id = 2});
	$resync->start(q{SELECT mmrepl.resync('beta', force => true)});
	my $waits = 'SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND pid = ' . $resync->pid;
	$alpha->poll_ok("$waits AND relation = 'item'::regclass", 'it waits for a writer');
	here(q{SELECT mmrepl.drop_pair('other', 'beta'); SELECT mmrepl.create_pair('swapped', 'beta')});
	$other->ok('BEGIN');
	$other->ok(q{INSERT INTO swapped VALUES (1, 'in the way, too')});
	$writer->ok('COMMIT');
	$alpha->poll_ok("$waits AND relation = 'swapped'::regclass", q{and for the new table's});
	$other->ok('COMMIT');
	$resync->finish;
	here(q{SELECT mmrepl.drop_pair('swapped', 'beta'); SELECT mmrepl.create_pair('other', 'beta')});
	synced();
	$alpha->same_rows($beta, $_) foreach ('item', 'swapped');
	$_->quit foreach ($writer, $other, $resync);
};

# No worker runs, nor will: the writers decide.
section 'without a worker' => sub {
	$beta->peer_down('fast');
	$alpha->append_conf('postgresql.conf', 'max_worker_processes = 1');
	$alpha->restart;
	stat_ok('pid IS NULL', 'no worker is there');
	ok($alpha->load_until('beta', q{state = 'needs resync'}, 40), 'the server needs a resync');
	nothing_queued('without a worker');
	$alpha->append_conf('postgresql.conf', 'max_worker_processes = 24');
	$alpha->restart;
	$beta->peer_up;
	here(q{SELECT mmrepl.resync('beta', truncate => true)});
	synced();
	$alpha->same_rows($beta, $_) foreach ('item', 'other', 'hand', 'part');
};

section 'many writers at the limit' => sub {
	$alpha->append_conf('postgresql.conf', q{mmrepl.max_queue_size = '32kB'});
	$alpha->reload;
	foreach my $round (1 .. 3)
	{
		my @writers = map { $alpha->session } (1 .. 4);

		$_->start('CALL load(1500)') foreach (@writers);
		foreach my $writer (@writers)
		{
			my (undef, $err) = $writer->finish;
			unlike($err, qr/ERROR/, "round $round: a writer ends well");
			$writer->quit;
		}
		my $state = $alpha->state('beta');
		note("round $round: $state");
		here(qq{SELECT mmrepl.resync('beta', truncate => true, force => true)});
		synced();
		$alpha->same_rows($beta, 'item', name => "round $round: the same rows");
	}
};

section q{'warn' drops nothing} => sub {
	$alpha->append_conf('postgresql.conf',
		qq{mmrepl.max_queue_size = '64kB'\nmmrepl.max_queue_action = 'warn'});
	$alpha->reload;
	$alpha->poll_query_until('postgres',
		q{SELECT current_setting('mmrepl.max_queue_action') = 'warn'});
	$beta->peer_down('fast');
	ok($alpha->load_until('beta', 'queue_bytes > 128 * 1024', 40), 'twice as much waits');
	stat_ok('queue_warned_at IS NOT NULL AND resync_since IS NULL',
		'there is a warning, and nothing else');
	$beta->peer_up;
	synced();
	stat_ok('queue_warned_at IS NULL', 'the warning goes when the queue is empty');
	$alpha->same_rows($beta, 'item');
};

foreach my $node ($alpha, $beta)
{
	ok( !$node->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
		$node->name . ': no crash in the log');
}
$alpha->stop('fast');
$beta->stop('fast');

done_testing();
