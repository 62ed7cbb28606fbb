# A peer that is away, a stream that is held, and a transaction that the peer
# refuses: writers never notice, the operator sees all of it, and it goes on by
# itself or by the command that is meant for it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my ($alpha, $beta) = MmreplCluster->new_pair;

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

# The condition holds for beta's row of the statistics, now or soon.
sub stat_ok
{
	my ($condition, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->poll_ok(
		"SELECT $condition FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'",
		$name) || diag($alpha->describe('beta'));
}

sub set_config
{
	my ($setting, $value) = @_;
	here("ALTER SYSTEM SET $setting = '$value'");
	$alpha->reload;
	$alpha->poll_query_until('postgres',
		"SELECT current_setting('$setting') = '$value'")
	  or die "$setting was not set";
	return;
}

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE item (id int PRIMARY KEY, v text);
	CREATE TABLE other (id int PRIMARY KEY, v text);
});
$alpha->create_pair('item', 'beta');
$alpha->create_pair('other', 'beta');
here(q{INSERT INTO item SELECT g, 'start' FROM generate_series(1, 100) g});
synced();

###############################################################################

section 'the peer is stopped' => sub {
	$alpha->poll_state('beta', 'streaming');
	$beta->peer_down('fast');

	my $before = Time::HiRes::time();
	foreach my $id (101 .. 120)
	{
		here(
			"INSERT INTO item VALUES ($id, 'outage');
			  UPDATE item SET v = 'outage' WHERE id = $id - 100");
	}
	here(
		q{BEGIN; INSERT INTO other SELECT g, 'outage'
		   FROM generate_series(1, 60) g; COMMIT});
	cmp_ok(Time::HiRes::time() - $before, '<', 10, 'writers do not wait');

	$alpha->poll_state('beta', 'retrying');
	stat_ok(
		'next_retry_at > clock_timestamp()',
		'next_retry_at lies in the future');
	stat_ok('last_error IS NOT NULL AND last_error_at IS NOT NULL',
		'last_error says why');
	stat_ok(
		q{last_error_sqlstate ~ '^(08|57P)'},
		'last_error_sqlstate is one of connections');
	stat_ok('consecutive_failures > 0 AND retries > 0',
		'the failures are counted');
	stat_ok('queue_transactions = 41 AND queue_changes = 100',
		'the queue is counted');
	stat_ok(
		'queue_bytes > 0 AND oldest_queued_at < now()'
		  . ' AND confirmed_ticket < last_ticket',
		'and measured');
	is($alpha->queued('beta'), '100', 'sync_err_rec shows every change');
	is( here(
			q{SELECT count(*), count(DISTINCT ticket), count(DISTINCT xid)
			  FROM mmrepl.sync_err_rec}),
		'100|41|41',
		'and to which transaction it belongs');
	is( here(
			q{SELECT string_agg(DISTINCT nsp_name || '.' || table_name, ' ')
			  FROM mmrepl.sync_err_rec}),
		'public.item public.other',
		'and to which table');
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '100 ms')}),
		'f', 'wait_for_replay gives up after its timeout');
	here(
		'CREATE ROLE monitor LOGIN IN ROLE pg_monitor; CREATE ROLE nobody LOGIN'
	);
	is( $alpha->safe_psql(
			'postgres',
			'SELECT state FROM mmrepl.pg_stat_mmrepl',
			extra_params => [ '-U', 'monitor' ]),
		'retrying',
		'pg_monitor may read the statistics');
	my ($ret, $out) = $alpha->psql(
		'postgres',
		'SELECT count(*) FROM mmrepl.sync_err_rec',
		extra_params => [ '-U', 'nobody' ]);
	ok($ret != 0 || $out eq '0', 'and others do not see queued data');

	$beta->peer_up;
	synced();
	$alpha->poll_state('beta', 'streaming');
	stat_ok(
		'queue_transactions = 0 AND queue_changes = 0 AND queue_bytes = 0'
		  . ' AND oldest_queued_at IS NULL',
		'the queue is empty again');
	stat_ok('consecutive_failures = 0', 'no failure counts any more');
	is($alpha->queued('beta'), '0', 'sync_err_rec is empty');
	$alpha->same_rows($beta, $_) foreach ('item', 'other');
};

section 'restarts with a backlog' => sub {
	$beta->peer_down('immediate');

	# Positions are written down now and then: what beta had confirmed just
	# before the crash may be in the view again until beta is asked.
	my $behind = 'SELECT count(*) FROM mmrepl.sync_err_rec WHERE ticket > '
	  . $alpha->stat('beta', 'confirmed_ticket');
	here(
		q{INSERT INTO other SELECT g, repeat('x', 100)
		   FROM generate_series(1001, 3000) g});
	foreach my $id (4001 .. 4010)
	{
		here("INSERT INTO other VALUES ($id, 'single')");
	}
	is(here($behind), '2010', 'a backlog is queued');
	$alpha->stop('immediate');
	$alpha->start;
	is(here($behind), '2010', 'a crash of the source loses nothing of it');
	here(q{INSERT INTO other VALUES (4011, 'after the crash')});
	$alpha->restart;
	$beta->peer_up;
	synced();
	$alpha->same_rows($beta, 'other', name => 'all of it arrives, once');

	# The peer crashes while it is being fed.
	foreach my $round (1 .. 3)
	{
		here(
			qq{UPDATE other SET v = v || '$round';
				INSERT INTO item SELECT $round * 10000 + g, 'round $round'
				FROM generate_series(1, 2000) g});
		$beta->peer_down('immediate');
		here(qq{DELETE FROM item WHERE id = $round});
		$beta->peer_up;
	}
	synced();
	$alpha->same_rows($beta, $_, name => "$_: the peer crashed three times")
	  foreach ('item', 'other');
	is($alpha->queued('beta'), '0', 'the queue is empty again');
	stat_ok(
		'queue_transactions = 0 AND queue_changes = 0 AND queue_bytes = 0',
		'and is counted as such');
};

section 'retry_now' => sub {
	set_config('mmrepl.retry_max_delay', '1h');
	set_config('mmrepl.retry_min_delay', '30min');
	$beta->peer_down('fast');
	here(q{INSERT INTO item VALUES (200, 'retry_now')});
	$alpha->poll_state('beta', 'retrying');
	stat_ok(q{next_retry_at > clock_timestamp() + interval '1 min'},
		'the next attempt is far away');
	$beta->peer_up;
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '1 s')}),
		'f', 'it does not come early by itself');
	here(q{SELECT mmrepl.retry_now('beta')});
	synced();
	$alpha->poll_state('beta', 'streaming');
	is(there('SELECT v FROM item WHERE id = 200'),
		'retry_now', 'retry_now brings it at once');
	set_config('mmrepl.retry_min_delay', '100ms');
	set_config('mmrepl.retry_max_delay', '1s');
};

section 'pause and resume' => sub {
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here(q{INSERT INTO item VALUES (300, 'paused')});
	my $before = Time::HiRes::time();
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '500 ms')}),
		'f', 'paused: wait_for_replay says false');
	my $took = Time::HiRes::time() - $before;
	cmp_ok($took, '>=', 0.5, 'not before its timeout');
	cmp_ok($took, '<', 5, 'and not long after it');
	is(there('SELECT count(*) FROM item WHERE id = 300'),
		'0', 'nothing is sent');
	stat_ok('queue_changes = 1', 'it is queued');

	# A waiter that is there when the stream goes on gets its answer then.
	my $waiter = $alpha->session;
	$waiter->start(q{SELECT mmrepl.wait_for_replay('beta', '2 min')});
	here(q{SELECT mmrepl.resume('beta')});
	my ($out, $err, $waited) = $waiter->finish;
	is($out, 't', 'resumed: wait_for_replay says true');
	cmp_ok($waited, '<', 60, 'before its timeout');
	is(there('SELECT count(*) FROM item WHERE id = 300'),
		'1', 'and true it is');
	$alpha->poll_state('beta', 'streaming');

	# It can be cancelled, too.
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here(q{INSERT INTO item VALUES (301, 'paused')});
	$waiter->start(q{SELECT mmrepl.wait_for_replay('beta', '2 min')});
	$alpha->poll_query_until('postgres',
		q{SELECT state = 'active' FROM pg_stat_activity WHERE pid = }
		  . $waiter->pid);
	here('SELECT pg_cancel_backend(' . $waiter->pid . ')');
	($out, $err, $waited) = $waiter->finish;
	like($err, qr/57014/, 'wait_for_replay can be cancelled');
	$waiter->quit;
	here(q{SELECT mmrepl.resume('beta')});
	synced();
};

section 'a transaction that the peer refuses' => sub {
	there(q{ALTER TABLE item ADD CONSTRAINT good CHECK (v <> 'bad')});
	my $was = $alpha->stat('beta', 'transactions_applied');
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here(q{INSERT INTO item VALUES (400, 'before')});
	here(
		q{BEGIN; INSERT INTO item VALUES (401, 'same transaction');
		   INSERT INTO item VALUES (402, 'bad'); COMMIT});
	here(q{INSERT INTO item VALUES (403, 'after')});
	here(q{INSERT INTO other VALUES (403, 'after')});
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->poll_state('beta', 'blocked');
	stat_ok(q{last_error_sqlstate = '23514'}, q{the peer's SQLSTATE is kept});
	stat_ok(q{last_error ~ 'good'}, q{and the peer's message});
	is( there(
			q{SELECT string_agg(id::text, ' ') FROM item WHERE id BETWEEN 400 AND 499}
		),
		'400',
		'what was before it arrives, of itself nothing, and nothing after it'
	);
	is(there('SELECT count(*) FROM other WHERE id = 403'),
		'0', 'not in another table either');
	stat_ok('queue_transactions = 3 AND queue_changes = 4',
		'the rest waits in the queue');
	here(q{INSERT INTO item VALUES (404, 'later')});
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '500 ms')}),
		'f', 'writers do not notice, the queue grows');
	$alpha->poll_state('beta', 'blocked');

	there('ALTER TABLE item DROP CONSTRAINT good');
	here(q{SELECT mmrepl.retry_now('beta')});
	synced();
	$alpha->poll_state('beta', 'streaming');
	$alpha->same_rows($beta, $_, name => "$_: repaired, it goes on")
	  foreach ('item', 'other');
	here('DELETE FROM item WHERE id = 402');
	synced();

	# The same with a column that is gone.
	there('ALTER TABLE other RENAME COLUMN v TO w');
	here(q{INSERT INTO other VALUES (500, 'column gone')});
	$alpha->poll_state('beta', 'blocked');
	stat_ok(q{last_error_sqlstate ~ '^(42|55|MM)'},
		'a missing column blocks');
	stat_ok(q{last_error ~ '\mv\M'}, 'the error names the column');
	there('ALTER TABLE other RENAME COLUMN w TO v');
	here(q{SELECT mmrepl.retry_now('beta')});
	synced();
	$alpha->same_rows($beta, 'other', name => 'the column is back');

	# And with a table that is gone.
	there('ALTER TABLE other RENAME TO elsewhere');
	here(q{INSERT INTO other VALUES (501, 'table gone')});
	$alpha->poll_state('beta', 'blocked');
	stat_ok(q{last_error ~ 'other'}, 'the error names the table');
	there('ALTER TABLE elsewhere RENAME TO other');
	here(q{SELECT mmrepl.retry_now('beta')});
	synced();
	$alpha->same_rows($beta, 'other', name => 'the table is back');
};

section 'skip' => sub {
	there(q{ALTER TABLE item ADD CONSTRAINT good CHECK (v <> 'bad')});
	here(
		q{BEGIN; INSERT INTO item VALUES (600, 'bad'), (601, 'skipped');
		   UPDATE other SET v = 'skipped' WHERE id = 500; COMMIT});
	here(q{INSERT INTO item VALUES (602, 'behind')});
	$alpha->poll_state('beta', 'blocked');
	my $ticket = here(q{SELECT min(ticket) FROM mmrepl.sync_err_rec});

	# What is not there cannot be skipped.
	my $err = $alpha->fails('postgres',
		qq{SELECT mmrepl.skip('beta', $ticket - 1, 'wrong ticket')});
	like($err, qr/ERROR:\s+\w{5}: /, 'an unknown ticket is refused');
	is($alpha->queued('beta'), '4', 'and nothing is dropped');

	is( here(
			qq{SELECT mmrepl.skip('beta', $ticket, 'known to be bad, 2013-03')}
		),
		'3',
		'skip returns the number of changes');
	is( here(
			qq{SELECT count(*) FROM mmrepl.skipped s
			   WHERE s::text LIKE '%known to be bad, 2013-03%'
			   AND s::text LIKE '%$ticket%'}),
		'1',
		'and is on the record');
	synced();
	$alpha->poll_state('beta', 'streaming');
	is( there(
			q{SELECT string_agg(id::text, ' ') FROM item WHERE id >= 600
				AND id < 700}),
		'602',
		'the stream goes on behind it');
	is(there(q{SELECT v FROM other WHERE id = 500}),
		'column gone', 'nothing of the skipped transaction was done');
	stat_ok('queue_transactions = 0', 'the queue is empty');
	there('ALTER TABLE item DROP CONSTRAINT good');
	here(
		q{DELETE FROM item WHERE id IN (600, 601);
		   UPDATE other SET v = 'column gone' WHERE id = 500});
	synced();

	# A paused stream loses one transaction in the middle of the queue.
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here("INSERT INTO item VALUES ($_, 'middle')") foreach (610 .. 612);
	$ticket = here(
		q{SELECT ticket FROM mmrepl.sync_err_rec ORDER BY id OFFSET 1 LIMIT 1}
	);
	is(here("SELECT mmrepl.skip('beta', $ticket, 'the second of three')"),
		'1', 'skip in the middle of a paused queue');
	is($alpha->queued('beta'), '2', 'leaves the others');
	here(q{SELECT mmrepl.resume('beta')});
	synced();
	is( there(
			q{SELECT string_agg(id::text, ' ' ORDER BY id) FROM item
			  WHERE id BETWEEN 610 AND 619}),
		'610 612',
		'which arrive');
	here('DELETE FROM item WHERE id = 611');
	synced();
	$alpha->same_rows($beta, $_) foreach ('item', 'other');
};

section 'sync pairs and a peer that is away' => sub {
	$alpha->create_table_on_both(
		$beta, q{
		CREATE TABLE strict (id int PRIMARY KEY, v text);
		CREATE TABLE lenient (id int PRIMARY KEY, v text);
	});
	$alpha->create_pair('strict', 'beta', q{mode => 'sync'});
	$alpha->create_pair('lenient', 'beta',
		q{mode => 'sync', on_unreachable => 'queue'});
	here(
		q{INSERT INTO strict VALUES (1, 'up'); INSERT INTO lenient VALUES (1, 'up')}
	);
	is( there(
			'SELECT (SELECT count(*) FROM strict) + (SELECT count(*) FROM lenient)'
		),
		'2',
		'both write through');

	$beta->peer_down('fast');
	my $before = Time::HiRes::time();
	my $err =
	  $alpha->fails('postgres', q{INSERT INTO strict VALUES (2, 'down')});
	like(
		$err,
		qr/ERROR:\s+(?:08\w{3}|57P\d\d|MM\w{3}): /,
		q{on_unreachable 'error': the statement fails});
	like($err, qr/beta/, 'and names the server');
	is(here('SELECT count(*) FROM strict'), '1', 'nothing is kept here');

	# Nobody waits for a peer that is known to be away.
	foreach my $id (1 .. 10)
	{
		$alpha->fails('postgres', q{INSERT INTO strict VALUES (3, 'down')});
	}
	cmp_ok(Time::HiRes::time() - $before,
		'<', 15, 'nor does anybody wait long for it');

	$before = Time::HiRes::time();
	foreach my $id (2 .. 10)
	{
		here("INSERT INTO lenient VALUES ($id, 'down')");
	}
	cmp_ok(Time::HiRes::time() - $before,
		'<', 15, q{on_unreachable 'queue': the statements succeed});
	is( here(
			q{SELECT count(*) FROM mmrepl.sync_err_rec
			   WHERE table_name = 'lenient'}),
		'9',
		'and are queued');

	$beta->peer_up;
	synced();
	$alpha->poll_state('beta', 'streaming');
	here(
		q{INSERT INTO lenient VALUES (11, 'up again');
		   INSERT INTO strict VALUES (2, 'up again')});
	is( there(
			'SELECT (SELECT count(*) FROM lenient), (SELECT count(*) FROM strict)'
		),
		'11|2',
		'when the peer is back they write through again');
	$alpha->same_rows($beta, $_) foreach ('strict', 'lenient');
	stat_ok('sync_failures > 0', 'sync_failures counts');
};

is($alpha->queued('beta'), '0', 'nothing is left queued');
ok(!$alpha->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
	'no crash in the log of the source');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
