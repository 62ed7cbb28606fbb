# mmrepl.sync_commit = 'applied': COMMIT does not wait until the peer has flushed its
# part.  What the peer loses in a crash is brought again by the worker, and nobody
# executes anything there before that, unless his connection proves that nothing was lost.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultPoints;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();
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

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

$alpha->create_table_on_both(
	$beta, $ledger . q{
	INSERT INTO account SELECT g, 0 FROM generate_series(1, 20) g;
	CREATE TABLE queued (id int PRIMARY KEY)});
$alpha->create_pair('account', 'beta', q{mode => 'sync'});
$alpha->create_pair('queued', 'beta');
$alpha->poll_state('beta', 'streaming');

sub warm
{
	return warm_session($alpha, 'beta', 'UPDATE account SET n = n WHERE id = 20', @_);
}

# The worker neither delivers nor confirms: what is not flushed stays so.
sub hold
{
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	return;
}

sub go_on
{
	here(q{SELECT mmrepl.resume('beta')});
	return $alpha->wait_caught_up('beta');
}

# Whether the peer has flushed what the code does.
sub flushes
{
	my ($code) = @_;
	my $before = there('SELECT pg_current_wal_insert_lsn()');

	$code->();
	return there("SELECT pg_current_wal_flush_lsn() > '$before'");
}

sub judge
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return judge_ledger($alpha, $beta, $_[0], 'account', 'queued');
}

###############################################################################

section 'what COMMIT waits for' => sub {
	my $session = warm();

	hold();
	my $writer = stop_flushing($beta);
	my $update = sub { my ($id) = @_; return sub { $session->ok("UPDATE account SET n = n + 1 WHERE id = $id") } };

	is(flushes($update->(1)), 'f', q{'applied': not until the peer has flushed it});
	is(there('SELECT n FROM account WHERE id = 1'), '1', '... it is visible there');
	is(flushes($update->(2)), 'f', '... and the next one executes at once, although the worker is away');
	is(flushes(sub { $session->ok('BEGIN; SAVEPOINT a; UPDATE account SET n = 1 WHERE id = 3; RELEASE a; COMMIT') }),
		'f', '... in a subtransaction, too');
	$session->ok(q{SET mmrepl.sync_flush = 'commit'});
	is(flushes($update->(4)), 'f', '... or sent ahead');
	$session->ok('RESET mmrepl.sync_flush');

	is(flushes(sub {
				$session->ok('BEGIN; UPDATE account SET n = n + 1 WHERE id = 5');
				$session->ok(q{SET LOCAL mmrepl.sync_commit = 'flushed'; COMMIT})
		}),
		't', 'flushed, if that is what COMMIT finds set');
	is(flushes(sub {
				$session->ok(q{SET mmrepl.two_phase = 'auto'});
				$update->(6)->();
				$session->ok('RESET mmrepl.two_phase')
		}),
		't', 'in two phases it is flushed');
	$session->ok(q{RESET mmrepl.sync_commit});
	is(here('SHOW mmrepl.sync_commit'), 'flushed', 'the default');
	is(flushes($update->(7)), 't', '... waits for the flush');
	kill('CONT', $writer);
	go_on();
	judge('sync_commit');
	$session->quit;
};

section 'a server is not dropped before the flush' => sub {
	my $session = warm();

	hold();
	$session->ok('UPDATE account SET n = n + 1 WHERE id = 19');
	like(
		$alpha->fails(
			'postgres', q{
			BEGIN;
			SELECT mmrepl.drop_pair('account', 'beta'), mmrepl.drop_pair('queued', 'beta');
			DROP USER MAPPING FOR CURRENT_USER SERVER beta;
			DROP SERVER beta;
			COMMIT}),
		qr/2BP01.*may not be flushed/s, 'it is refused');
	$session->quit;
	go_on();
};

section 'who executes at the peer next' => sub {
	my $session = warm();
	my $late;

	hold();
	$session->ok('UPDATE account SET n = n + 1 WHERE id = 8');
	$session->ok('UPDATE account SET n = n + 1 WHERE id = 8');

	# The connection was made later: what it finds proves nothing.
	$late = $alpha->session;
	my (undef, $err) = $late->run('UPDATE account SET n = n + 1 WHERE id = 8');
	like($err, qr/ERROR:\s+MM008: .*earlier changes/, 'not over a later connection while nothing can be confirmed');
	like($err, qr/"paused"/, '... with the reason');
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '100 ms')}), 'f', '... nor does wait_for_replay() take it for safe');
	$session->ok('UPDATE account SET n = n + 1 WHERE id = 8');
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	$late->ok('UPDATE account SET n = n + 1 WHERE id = 8');

	# The worker comes when it is needed.
	$late->quit;
	foreach (1 .. 5)
	{
		$session->ok('UPDATE account SET n = n + 1 WHERE id = 9');
		my $start = Time::HiRes::time();
		here('UPDATE account SET n = n + 1 WHERE id = 9');
		cmp_ok(Time::HiRes::time() - $start, '<', 10, 'a new session waits for the worker, not for sync_timeout');
	}

	# What was flushed, or in two phases, needs no proof.
	foreach my $set (q{mmrepl.sync_commit = 'flushed'}, q{mmrepl.two_phase = 'auto'}, q{mmrepl.two_phase = 'on'})
	{
		$session->ok("SET $set");
		$alpha->wait_caught_up('beta');
		hold();
		$session->ok('UPDATE account SET n = n + 1 WHERE id = 10');
		here('UPDATE account SET n = n + 1 WHERE id = 10');
		pass("behind $set a new session goes on at once");
		$session->ok(q{RESET mmrepl.two_phase; SET mmrepl.sync_commit = 'applied'});
		go_on();
	}
	judge('next');
	$session->quit;
};

section 'the peer crashes' => sub {
	my ($session, $other, $posting) = (warm(), warm(), warm());

	$posting->ok(q{SET mmrepl.sync_flush = 'commit'});
	$alpha->wait_caught_up('beta');
	hold();
	my $writer = stop_flushing($beta);
	$session->ok("INSERT INTO account VALUES ($_, 1)") foreach (30 .. 34);
	$session->ok('UPDATE account SET n = n + 1 WHERE id = 30') foreach (1 .. 5);
	is(there('SELECT count(*) FROM account WHERE id >= 30'), '5', 'acknowledged, and there');
	lose_unflushed($beta, $writer);
	bring_back($beta);
	is(there('SELECT count(*) FROM account WHERE id >= 30'), '0', 'the peer has lost it');

	# Connections from before it are dead; over a new one nothing is executed yet.
	foreach ([ 'statement', $other ], [ 'commit', $posting ])
	{
		my ($flush, $client) = @$_;
		my (undef, $err) = $client->run('UPDATE account SET n = n + 1 WHERE id = 30');
		like($err, qr/ERROR:\s+MM008: .*earlier changes/, "sync_flush = '$flush': the fence is closed again");
		(undef, $err) = $client->run('BEGIN; UPDATE account SET n = n + 1 WHERE id = 30; COMMIT');
		like($err, qr/ERROR:\s+MM008: .*earlier changes/, '... still');
		$client->run('ROLLBACK');
	}
	is(there('SELECT count(*) FROM account WHERE id >= 30'), '0', 'nothing is there yet');

	here(q{SELECT mmrepl.resume('beta')});
	$alpha->poll_state('beta', 'streaming');
	foreach my $client ($other, $posting, $session)
	{
		$client->ok('UPDATE account SET n = n + 1 WHERE id = 30');
	}
	is(there('SELECT n FROM account WHERE id = 30'), '9', 'then it is, with what depends on it');
	judge('a crash of the peer');
	is(there(q{SELECT string_agg(n::text, ' ') FROM written WHERE id = 30}), '1 2 3 4 5 6 7 8 9', '... in order');
	$_->quit foreach ($session, $other, $posting);
};

section 'both crash' => sub {
	my $session = warm();

	hold();
	my $writer = stop_flushing($beta);
	$session->ok("INSERT INTO account VALUES ($_, 1)") foreach (40 .. 44);
	$session->ok('UPDATE account SET n = n + 1 WHERE id = 40') foreach (1 .. 5);
	$alpha->stop('immediate');
	lose_unflushed($beta, $writer);
	eval { $session->quit };
	bring_back($beta);
	is(there('SELECT count(*) FROM account WHERE id >= 40'), '0', 'the peer has lost it');
	$alpha->start;
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->poll_state('beta', 'streaming');
	here('UPDATE account SET n = n + 1 WHERE id = 40');
	judge('both crash');
	is(there(q{SELECT string_agg(n::text, ' ') FROM written WHERE id = 40}), '1 2 3 4 5 6 7', '... in order');
};

section 'all kinds on one stream' => sub {
	my ($applied, $flushed) = (warm(), warm('flushed'));
	my $steps = sub {
		foreach (1 .. 4)
		{
			$applied->ok('UPDATE account SET n = n + 1 WHERE id = 11');
			$flushed->ok('UPDATE account SET n = n + 1 WHERE id = 11');
			$applied->ok(q{SET mmrepl.mode = 'async'; UPDATE account SET n = n + 1 WHERE id = 11; RESET mmrepl.mode});
			$applied->ok('UPDATE account SET n = n + 1 WHERE id = 11');
			$flushed->ok('UPDATE account SET n = n + 1 WHERE id = 11; INSERT INTO queued SELECT count(*) FROM queued');
		}
	};

	$steps->();
	$beta->stop('immediate');
	$applied->ok(q{SET mmrepl.mode = 'async'; UPDATE account SET n = n + 1 WHERE id = 11; RESET mmrepl.mode});
	$beta->start;
	$alpha->poll_state('beta', 'streaming');
	$steps->();
	is(here('SELECT n FROM account WHERE id = 11'), '41', 'each was done here');
	judge('mixed');
	is(there(q{SELECT bool_and(n = place) FROM
			   (SELECT n, row_number() OVER () AS place FROM written WHERE id = 11 AND n > 0) w}),
		't', '... in order');
	$_->quit foreach ($applied, $flushed);
};

section 'a peer that is back' => sub {
	my $session = warm();

	$alpha->safe_psql('postgres', "ALTER SYSTEM SET $_ = '10 min'") foreach qw(mmrepl.retry_min_delay mmrepl.retry_max_delay);
	$alpha->reload;
	$alpha->poll_ok(q{SELECT current_setting('mmrepl.retry_min_delay') = '10min'}, 'the worker would try again much later');
	my $writer = stop_flushing($beta);

	$session->ok('UPDATE account SET n = n + 1 WHERE id = 18');
	lose_unflushed($beta, $writer);
	$alpha->poll_ok(
		q{SELECT state = 'retrying' AND last_error_at < clock_timestamp() - interval '1 s'
		  FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'}, 'it has failed');
	bring_back($beta);
	$session->ok('UPDATE account SET n = n + 1 WHERE id = 18');
	is(there('SELECT n FROM account WHERE id = 18'), '2', 'it tries at once for who needs it');
	$alpha->safe_psql('postgres', "ALTER SYSTEM RESET $_") foreach qw(mmrepl.retry_min_delay mmrepl.retry_max_delay);
	$alpha->reload;
	judge('a peer that is back');
	$session->quit;
};

# An older build of the extension at the peer.
section 'a peer that flushes always' => sub {
	there(
		q{ALTER FUNCTION mmrepl.hello(uuid, int, int) RENAME TO hello_of_today;
		  ALTER FUNCTION mmrepl.apply(bytea) RENAME TO apply_of_today;
		  CREATE FUNCTION mmrepl.hello(uuid, int, int, OUT protocol int, OUT node uuid, OUT watermark bigint, OUT server_version int)
			LANGUAGE sql AS 'SELECT * FROM mmrepl.hello_of_today($1, $2, 2)';
		  CREATE FUNCTION mmrepl.apply(batch bytea) RETURNS bigint LANGUAGE plpgsql AS $$
		  BEGIN
			IF get_byte(batch, 4) & 96 <> 0 THEN RAISE 'unknown flags'; END IF;
			RETURN mmrepl.apply_of_today(batch);
		  END $$});
	$beta->terminate_peers;
	$alpha->poll_state('beta', 'streaming');
	my $session = warm();

	hold();
	my $writer = stop_flushing($beta);
	is(flushes(sub { $session->ok('UPDATE account SET n = n + 1 WHERE id = 12') }), 't', 'it is asked for nothing else');
	here('UPDATE account SET n = n + 1 WHERE id = 12');
	pass('... and a new session goes on at once');
	kill('CONT', $writer);
	go_on();
	judge('an older peer');
	$session->quit;
};

is($alpha->queued('beta'), '0', 'nothing is left queued');
ok(!$_->log_contains(qr/PANIC|TRAP:/), 'no crash of its own in the log of ' . $_->name) foreach ($alpha, $beta);
$_->stop('fast') foreach ($alpha, $beta);

done_testing();
