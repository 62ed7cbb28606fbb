# mmrepl.sync_flush = 'commit': each statement's rows go to the peer at its end, and
# nobody waits for the answer before COMMIT.  That is where the peer's refusal, its
# silence and its end are told at the latest, and nothing is left on either side.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultProxy;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $soon = 1 + 1;    # s: answers come within one; a busy machine takes its own share
my $tries = 5;       # ... and now and then all of it: what is late each time is not its fault
my $endless = 10 * $MmreplCluster::timeout;

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => q{
max_prepared_transactions = 5
deadlock_timeout = '300ms'
mmrepl.retry_min_delay = '20ms'
mmrepl.retry_max_delay = '200ms'
mmrepl.sync_flush = 'commit'
mmrepl.sync_timeout = '1min'
});
my $proxy = FaultProxy->new(port => $beta->port);
my $port = $proxy->port;

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE account (id int PRIMARY KEY, n int NOT NULL, note text);
	INSERT INTO account SELECT g, 0 FROM generate_series(1, 20) g;
	CREATE TABLE queued (id int PRIMARY KEY, v text);
	CREATE TABLE async (id int PRIMARY KEY, v text)});
there(
	q{CREATE TABLE parent (id int PRIMARY KEY);
	ALTER TABLE account ADD CONSTRAINT small CHECK (n < 1000),
	  ADD CONSTRAINT one_note UNIQUE (note),
	  ADD parent int REFERENCES parent});
here(q{ALTER TABLE account ADD parent int});
here("ALTER SERVER beta OPTIONS (SET port '$port')");
$alpha->create_pair('account', 'beta', q{mode => 'sync'});
$alpha->create_pair('queued', 'beta', q{mode => 'sync', on_unreachable => 'queue'});
$alpha->create_pair('async', 'beta');
$alpha->poll_state('beta', 'streaming');

# A session with a connection to the peer, and what is known about that one.
sub warm
{
	$alpha->poll_state('beta', 'streaming');
	my %before = map { $_->{id} => 1 } $proxy->connections;
	my $session = $alpha->session;

	$session->ok('UPDATE account SET n = n WHERE id = 20');
	my ($mine) = grep { !$before{ $_->{id} } } $proxy->connections;
	return ($session, $mine->{id}, $mine->{backend_pid});
}

# What the peer's session holds locks on, and does.
sub locked { return there('SELECT count(*) FROM account') - there('SELECT count(*) FROM (SELECT FROM account FOR UPDATE SKIP LOCKED) AS free') }
sub peer_is { my ($pid, $state, $name) = @_; return $beta->poll_ok("SELECT count(*) = 1 FROM pg_stat_activity WHERE pid = $pid AND state = '$state'", $name) }

sub peer_is_free
{
	my ($pid, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $beta->poll_ok(
		qq{SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $pid AND state <> 'idle'},
		"$name: nothing is left at the peer");
}

sub equal
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$alpha->wait_caught_up('beta');
	return $alpha->same_rows($beta, $_, name => "$name: $_ is equal") foreach ('account', 'queued', 'async');
}

sub update { return join '; ', map { "UPDATE account SET n = n + 1 WHERE id = $_" } @_ }

###############################################################################

section 'statements do not wait' => sub {
	my ($session, $id, $pid) = warm();

	# No answer arrives, and yet all five go through, here and there.
	$proxy->reset_counters;
	$proxy->hold(only => [$id], from => 'server');
	$session->ok('BEGIN');
	$session->ok(update($_)) foreach (1 .. 5);
	$beta->poll_ok('SELECT count(*) = 15 FROM (SELECT FROM account FOR UPDATE SKIP LOCKED) AS free',
		'the peer executes each of them meanwhile');
	$session->start('COMMIT');
	$proxy->release(only => [$id]);
	my ($out, $err) = $session->finish;
	is($err, '', 'COMMIT takes the answers');
	is($proxy->round_trips(only => [$id]), 2, 'two trips, where statement mode has six');
	equal('five statements');

	# Answers that come meanwhile are taken, too.
	$session->ok('BEGIN');
	$session->ok(update($_)) foreach (1 .. 5);
	$session->ok('COMMIT');

	# One row, several statements: their order.
	$session->ok(q{BEGIN; UPDATE account SET n = n * 2 + 1 WHERE id = 1});
	$session->ok(q{UPDATE account SET n = n * 3 WHERE id = 1; UPDATE account SET id = 30 WHERE id = 1});
	$session->ok(q{DELETE FROM account WHERE id = 30; INSERT INTO account VALUES (1, 1)});
	$session->ok(q{UPDATE account SET n = n + 10 WHERE id = 1; COMMIT});
	is(there('SELECT n FROM account WHERE id = 1'), '11', 'changes of one row keep their order');
	equal('one row');
	is(scalar(grep { $_->{id} == $id } $proxy->connections), 1, 'over one connection');

	# More than goes out at once.
	$session->ok(
		q{BEGIN; INSERT INTO queued SELECT g, repeat('x', 1000) FROM generate_series(1, 6000) g});
	$session->ok(q{UPDATE queued SET v = repeat('y', 1000); DELETE FROM queued WHERE id % 2 = 0});
	$session->ok('COMMIT');
	equal('megabytes');
	$session->ok('DELETE FROM queued');
	$session->quit;
};

section 'what the peer refuses' => sub {
	my ($session, $id, $pid) = warm();
	my %sql = (
		'23514' => 'UPDATE account SET n = 1000 WHERE id = 2',
		'23505' => q{UPDATE account SET note = 'taken' WHERE id = 2},
		'23503' => 'UPDATE account SET parent = 7 WHERE id = 2',
		'40001' => 'UPDATE account SET n = n + 1 WHERE id = 3');

	there(q{UPDATE account SET note = 'taken' WHERE id = 4; UPDATE account SET n = 77 WHERE id = 3});
	foreach my $state (sort keys %sql)
	{
		$session->ok(q{SET mmrepl.sync_flush = 'statement'});
		my (undef, $direct) = $session->run($sql{$state});
		$session->ok(q{SET mmrepl.sync_flush = 'commit'; BEGIN});
		$session->ok(update(1));
		$proxy->hold(only => [$id], from => 'server');
		my (undef, $early) = $session->run($sql{$state});
		is($early, '', "$state: the statement passes");
		$session->start('COMMIT');
		$proxy->release(only => [$id]);
		my (undef, $err) = $session->finish;
		like($err, qr/ERROR:\s+$state: /, '... and COMMIT fails');
		# The number of changes that travelled together is all that differs.
		s/apply of \d+ changes|inline transaction \d+|stdin>:\d+|^LOCATION:.*//mg foreach ($direct, $err);
		is($err, $direct, '... with the message, detail and context that the statement would get');
		is(here('SELECT n FROM account WHERE id = 1'), '11', '... and nothing is left here');
		peer_is_free($pid, $state);
	}
	is(there('SELECT n FROM account WHERE id = 1'), '11', 'nor there');

	# Known before: the next statement says it, unless that is inside a subtransaction.
	$session->ok('BEGIN');
	$session->ok($sql{'23514'});
	peer_is($pid, 'idle in transaction (aborted)', 'the peer has refused');
	my $err = '';
	for (my $until = time + $MmreplCluster::timeout; time < $until;)
	{
		(undef, $err) = $session->run('UPDATE account SET n = 0 WHERE false');
		last if $err ne '';
		Time::HiRes::usleep(20_000);
	}
	like($err, qr/ERROR:\s+23514: .*"small"/, 'a later statement raises what the peer has said meanwhile');
	$session->ok('ROLLBACK');

	# In a subtransaction it is not taken for that one's.
	$session->ok('BEGIN');
	$session->ok($sql{'23514'});
	peer_is($pid, 'idle in transaction (aborted)', 'the peer has refused again');
	$session->ok('SAVEPOINT s');
	$session->ok(update(5));
	$session->ok('ROLLBACK TO s');
	(undef, $err) = $session->run(q{SET LOCAL mmrepl.sync_flush = 'statement'});
	like($err, qr/ERROR:\s+23514: /, 'who waits for statements again has to be told');
	$session->ok('ROLLBACK TO s');
	(undef, $err) = $session->run('COMMIT');
	like($err, qr/ERROR:\s+23514: .*"small"/, 'what a savepoint repairs is not that: COMMIT raises it again');
	there(q{UPDATE account SET note = NULL WHERE id = 4; UPDATE account SET n = 2 WHERE id = 3});
	$session->ok(update(1));
	is(scalar(grep { $_->{id} == $id } $proxy->connections), 1, 'all of it over one connection');
	equal('refusals');
	$session->quit;
};

section 'savepoints, cursors, views, prepared transactions' => sub {
	my ($session, $id, $pid) = warm();

	$session->ok('BEGIN; ' . update(6));
	$session->ok('SAVEPOINT a; ' . update(7));
	$session->ok('ROLLBACK TO a; ' . update(8));
	$session->ok('SAVEPOINT b; ' . update(9) . '; RELEASE b; RELEASE a');
	$session->ok(update(6));
	$session->ok(
		q{DO $$ BEGIN
			UPDATE account SET n = n + 1 WHERE id = 10;
			FOR i IN 1 .. 2 LOOP
				BEGIN
					UPDATE account SET n = n + 1 WHERE id = 11;
					RAISE division_by_zero;
				EXCEPTION WHEN division_by_zero THEN
					UPDATE account SET n = n + 1 WHERE id = 12;
				END;
			END LOOP;
		END $$});
	$session->ok('DECLARE c CURSOR FOR SELECT id FROM account ORDER BY id FOR UPDATE');
	$session->ok('FETCH 3 FROM c');
	$session->ok('UPDATE account SET n = n + 100 WHERE CURRENT OF c');
	$session->ok('FETCH 1 FROM c');
	$session->ok('UPDATE account SET n = n + 100 WHERE CURRENT OF c; CLOSE c');
	like($session->ok('SELECT server, state FROM mmrepl.pg_stat_mmrepl'),
		qr/beta\|streaming/, 'the view can be read in the middle of it');
	like($session->ok('SELECT count(*) FROM mmrepl.pg_stat_mmrepl_pairs, mmrepl.sync_err_rec'),
		qr/0/, '... and the others');
	$session->ok(q{INSERT INTO async VALUES (1, 'beside'); COPY account FROM PROGRAM 'echo 21,1,,' (FORMAT csv)});
	$session->ok('COMMIT');
	is(there('SELECT string_agg(n::text, $$ $$ ORDER BY id) FROM account WHERE id BETWEEN 6 AND 12'),
		'2 0 1 1 1 0 2', 'savepoints are obeyed');
	equal('savepoints');
	$session->ok('BEGIN');
	$session->ok(update(1));
	$session->ok('ROLLBACK');
	peer_is_free($pid, 'ROLLBACK');
	is(scalar(grep { $_->{id} == $id } $proxy->connections), 1, '... and the connection is kept');

	$session->ok('BEGIN');
	$session->ok(update(1));
	my (undef, $err) = $session->run(q{PREPARE TRANSACTION 'mine'});
	like($err, qr/ERROR:\s+0A000: cannot PREPARE/, 'PREPARE TRANSACTION is refused');
	peer_is_free($pid, 'PREPARE TRANSACTION');
	foreach my $two_phase ('auto', 'on')
	{
		$session->ok("SET mmrepl.two_phase = '$two_phase'; BEGIN");
		$session->ok(update($_)) foreach (1 .. 3);
		$session->ok('COMMIT');
		$session->ok('BEGIN');
		$session->ok(update(1));
		$session->ok('UPDATE account SET n = 1000 WHERE id = 2');
		(undef, $err) = $session->run('COMMIT');
		like($err, qr/ERROR:\s+23514: /, "two_phase $two_phase: COMMIT is refused");
		is(there('SELECT count(*) FROM pg_prepared_xacts'), '0', '... and nothing prepared');
	}
	equal('two phases');
	$session->quit;
};

section 'a lock at the peer' => sub {
	my ($session, $id, $pid) = warm();
	my $other = $beta->session;

	$other->ok('BEGIN; UPDATE account SET n = n WHERE id = 5');
	$session->ok(q{SET mmrepl.sync_lock_timeout = '200ms'});
	$session->ok(q{BEGIN; SELECT 1});
	$session->ok(update(5));
	my (undef, $err) = $session->run('COMMIT');
	like($err, qr/ERROR:\s+40P01: .*HINT:\s+Retry/s, 'sync_lock_timeout: COMMIT gets 40P01');
	peer_is_free($pid, 'sync_lock_timeout');

	# The time in which the client thinks is not the peer's.  There is no event to await: time has to pass.
	$session->ok(qq{SET mmrepl.sync_lock_timeout = '${endless}s'; SET mmrepl.sync_timeout = '3s'});
	$session->ok('BEGIN');
	$session->ok(update(5));
	$session->ok('SELECT pg_sleep(3.2)');
	$session->start('COMMIT');
	$alpha->poll_ok(q{SELECT state = 'active' AND wait_event IS NOT NULL AND query LIKE 'COMMIT%' OR state = 'idle'
		FROM pg_stat_activity WHERE pid = } . $session->pid, 'COMMIT waits, or has given up');
	$other->ok('ROLLBACK');
	(undef, $err) = $session->finish;
	is($err, '', 'sync_timeout counts from COMMIT on');
	my $took;
	foreach my $try (1 .. $tries)
	{
		$session->ok(q{SET mmrepl.sync_timeout = '600ms'});
		$other->ok('BEGIN; UPDATE account SET n = n WHERE id = 5');
		$session->ok('BEGIN');
		$session->ok(update(5));
		$session->start('COMMIT');
		(undef, $err, $took) = $session->finish;
		like($err, qr/ERROR:\s+MM008: /, '... and ends the wait');
		$other->ok('ROLLBACK');
		last if $took < 0.6 + $soon;
	}
	cmp_ok($took, '<', 0.6 + $soon, '... in time');
	peer_is_free($pid, 'sync_timeout');
	$other->quit;
	$session->quit;
	equal('locks');
};

section 'cancelled' => sub {
	my @cases = (
		[ 'while COMMIT collects', 'COMMIT', 'pg_cancel_backend' ],
		[ 'while COMMIT collects', 'COMMIT', 'pg_terminate_backend' ],
		[ 'in a statement that waits for nobody', 'SELECT pg_sleep(60)', 'pg_cancel_backend' ],
		[ 'by ROLLBACK', 'ROLLBACK', undef ]);

	my $watch = $alpha->session;

	# What happens to one session, and how long that takes.
	my $cancelled = sub {
		my ($name, $sql, $function) = @_;
		my ($session, $id, $pid) = warm();
		my $before = here('SELECT sum(n) FROM account');

		$proxy->hold(only => [$id], from => 'server');
		$session->ok('BEGIN');
		$session->ok(update(1));
		$beta->poll_ok('SELECT count(*) = 20 FROM (SELECT FROM account FOR UPDATE SKIP LOCKED) AS free', "$name: executed there");
		$session->start($sql);
		$alpha->poll_ok(q{SELECT wait_event IS NOT NULL FROM pg_stat_activity WHERE state = 'active' AND pid = } . $session->pid, '... it waits')
		  if $function;
		my $start = Time::HiRes::time();
		$watch->ok("SELECT $function(" . $session->pid . ')') if $function;
		if ($function && $function =~ /terminate/)
		{
			$alpha->poll_ok('SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = ' . $session->pid, '... the session ends');
		}
		else
		{
			my (undef, $err) = $session->finish;
			like($err, $function ? qr/ERROR:\s+57014/ : qr/^$/, '... the error');
		}
		my $took = Time::HiRes::time() - $start;
		peer_is_free($pid, $name);
		is(here('SELECT sum(n) FROM account'), $before, '... nothing is changed here');
		$proxy->kill(only => [$id]);
		return $took if $function && $function =~ /terminate/;
		$session->run('ROLLBACK');
		$session->ok(update(1));
		$session->quit;
		equal($name);
		return $took;
	};
	foreach my $case (@cases)
	{
		my ($name, $sql, $function) = @$case;
		my $took;

		$name .= ", $function" if $function;
		foreach my $try (1 .. $tries)
		{
			$took = $cancelled->($name, $sql, $function);
			last if $took < $soon;
		}
		cmp_ok($took, '<', $soon, "$name: within a second");
	}
	$watch->quit;
};

section 'the peer dies between the statement and COMMIT' => sub {
	foreach my $answered (0, 1)
	{
		my $when = $answered ? 'after its answer' : 'before its answer';
		my ($session, $id, $pid) = warm();
		my $before = here('SELECT sum(n) FROM account');

		$proxy->hold(only => [$id], from => 'server') unless $answered;
		$session->ok('BEGIN');
		$session->ok(update(1));
		peer_is($pid, 'idle in transaction', "on_unreachable error, $when");
		$session->ok(q{SET LOCAL mmrepl.sync_flush = 'statement'; SET LOCAL mmrepl.sync_flush = 'commit'})
		  if $answered;
		$proxy->reset(only => [$id]);
		my (undef, $err) = $session->run('COMMIT');
		if ($answered)
		{
			like($err, qr/ERROR:\s+08006: /, '... COMMIT fails');
			is(here('SELECT sum(n) FROM account'), $before, '... and nothing is changed');
		}
		else
		{
			is($err, '', '... all is sent again over a new connection');
		}
		$session->ok(update(1));
		$session->quit;
		equal($when);
	}

	# The peer is gone for good, with what it has executed.
	my ($session, $id, $pid) = warm();
	$proxy->hold(only => [$id], from => 'server');
	$session->ok('BEGIN');
	$session->ok(q{INSERT INTO queued VALUES (3, 'three')});
	peer_is($pid, 'idle in transaction', 'on_unreachable queue');
	$proxy->new_connections('refuse');
	$proxy->reset;
	my (undef, $err) = $session->run('COMMIT');
	like($err, qr/NOTICE:.*server "beta" is not reached.*queued/s, 'what it had executed is queued');
	unlike($err, qr/ERROR/, '... and the transaction commits');
	$session->ok('BEGIN');
	(undef, $err) = $session->run(q{INSERT INTO queued VALUES (4, 'four')});
	unlike($err, qr/ERROR/, 'an absent peer: the statement passes');
	$session->ok('COMMIT');
	$session->ok('BEGIN');
	(undef, $err) = $session->run(update(1) . '; COMMIT');
	like($err, qr/ERROR:\s+(?:MM008|08\w{3}): /, '... and fails, by COMMIT, for who wants no queue');
	$session->ok('ROLLBACK');
	$proxy->new_connections('pass');
	here(q{SELECT mmrepl.retry_now('beta')});
	$alpha->poll_state('beta', 'streaming');
	equal('back again');
	$session->ok(update(1));
	$session->quit;
	equal('in sync again');
};

section 'several targets' => sub {
	my @targets = ('one', 'two', 'three');
	my $ddl = 'CREATE TABLE many (id int PRIMARY KEY, v text)';

	here($ddl);
	foreach my $target (@targets)
	{
		$beta->install_extension($target);
		$beta->safe_psql($target, $ddl);
		$beta->safe_psql($target, q{
			CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
			BEGIN
				IF NEW.v = 'slow' THEN
					PERFORM pg_advisory_lock(1), pg_advisory_unlock(1);
				ELSIF NEW.v = current_database() THEN
					RAISE EXCEPTION 'bad';
				END IF;
				RETURN NEW;
			END$$;
			CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON many
			FOR EACH ROW EXECUTE FUNCTION slow();
			ALTER TABLE many ENABLE ALWAYS TRIGGER slow});
		$alpha->add_peer($beta, server => $target, peer_dbname => $target);
		$alpha->create_pair('many', $target, q{mode => 'sync'});
	}
	my $session = $alpha->session;
	my @holders = map { $beta->session($_) } @targets;

	$session->ok(q{INSERT INTO many VALUES (1, 'quick')});
	$session->ok("SET mmrepl.sync_timeout = '${endless}s'; SET mmrepl.sync_lock_timeout = '${endless}s'");
	$_->ok('SELECT pg_advisory_lock(1)') foreach @holders;
	$session->ok('BEGIN');
	$session->ok(q{INSERT INTO many VALUES (2, 'slow')});
	$session->ok(q{UPDATE many SET v = 'slow' WHERE id = 1});
	is(here('SELECT count(*) FROM many'), '1', 'no statement waits');
	$session->start('COMMIT');
	foreach my $left (3, 2, 1)
	{
		$beta->poll_ok(
			"SELECT count(*) = $left FROM pg_stat_activity WHERE client_addr IS NOT NULL AND wait_event = 'advisory'",
			"$left of them work, at the same time");
		is(here('SELECT state FROM pg_stat_activity WHERE pid = ' . $session->pid), 'active', '... and COMMIT waits');
		(shift @holders)->quit;
	}
	my (undef, $error) = $session->finish;
	is($error, '', '... until they are done');
	$session->ok('RESET ALL');
	foreach my $target (@targets)
	{
		$session->ok('BEGIN');
		$session->run(q{INSERT INTO many VALUES (3, 'quick')});
		$session->run("UPDATE many SET v = '$target' WHERE id = 3");
		my (undef, $err) = $session->run('COMMIT');
		my $count = here('SELECT count(*) FROM many');
		is($count, '2', "$target refuses: nothing is left here");
		is($beta->safe_psql($_, 'SELECT count(*) FROM many'), '2', "... nor in $_") foreach @targets;
	}
	$session->quit;
};

# What was sent is kept for the queue, as bytes: for each statement there were hundreds
# of them, which were walked for each further one.
section 'a hundred thousand statements' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE busy (id int PRIMARY KEY, n int NOT NULL);'
		  . 'INSERT INTO busy SELECT g, 0 FROM generate_series(1, 5000) g');
	$alpha->create_pair('busy', 'beta', q{mode => 'sync'});
	my ($session, $id, $pid) = warm();
	$session->ok("SET mmrepl.sync_timeout = '${endless}s'");

	foreach my $case ([ 'commit', 100_000, '4MB' ], [ 'commit', 5_000, '256kB' ], [ 'statement', 5_000, '256kB' ])
	{
		my ($flush, $count, $memory) = @$case;
		my $name = "$count statements, sync_flush $flush, buffer_memory $memory";

		$session->ok("SET mmrepl.sync_flush = '$flush'; SET mmrepl.buffer_memory = '$memory'; BEGIN");
		$session->ok(
			"DO \$\$ BEGIN FOR i IN 1 .. $count LOOP"
			  . ' UPDATE busy SET n = n + 1 WHERE id = i % 5000 + 1; END LOOP; END $$');
		my $bytes = $session->ok(
			q{SELECT sum(total_bytes) FROM pg_backend_memory_contexts WHERE name = 'mmrepl changes'});
		my $bound = 4 * here("SELECT pg_size_bytes('$memory')");
		cmp_ok($bytes, '<', $bound, "$name: no more memory than a few times the setting");
		$session->ok('COMMIT');
		$alpha->wait_caught_up('beta');
		$alpha->same_rows($beta, 'busy', name => "$name: both sides are equal");
	}
	is(there('SELECT sum(n) FROM busy'), '110000', 'each was executed once');
	$session->quit;
};

# The same bytes, joined, are what the worker replays when the peer has lost its part:
# of more tables than a segment can number, with savepoints between.
section 'what was joined is replayed' => sub {
	$alpha->create_table_on_both($beta,
		join '', map { "CREATE TABLE t$_ (id int PRIMARY KEY, v text); INSERT INTO t$_ VALUES (1, '');" } 1 .. 36);
	$alpha->create_pair("t$_", 'beta', q{mode => 'sync'}) foreach (1 .. 36);

	foreach my $case ([ 'commit', '4MB' ], [ 'statement', '4MB' ], [ 'commit', '64kB' ])
	{
		my ($flush, $memory) = @$case;
		my $name = "sync_flush $flush, buffer_memory $memory";
		my ($session, $id, $pid) = warm();
		my $rule = $proxy->rule(type => 'Q', pattern => '^Q....COMMIT', action => 'hold',
			from => 'client', when => 'before', only => [$id]);

		$session->ok("SET mmrepl.sync_flush = '$flush'; SET mmrepl.buffer_memory = '$memory';"
			  . "SET mmrepl.sync_timeout = '${endless}s'");
		$session->start(
			q{DO $$
			BEGIN
				FOR i IN 1 .. 800 LOOP
					EXECUTE format('UPDATE t%s SET v = right(v, 1000) || %L', i * i % 36 + 1, i || ' ');
					EXECUTE format('INSERT INTO t%s VALUES (%s, %L)', i % 3 + 1, i + 1, repeat('x', i % 200));
					CONTINUE WHEN i % 10 <> 0;
					BEGIN
						EXECUTE format('UPDATE t%s SET v = v || %L', i % 36 + 1, 'undone');
						EXECUTE format('DELETE FROM t%s WHERE id > 1', i % 3 + 1);
						IF i % 20 = 0 THEN
							RAISE division_by_zero;
						END IF;
						UPDATE t36 SET v = v || 'kept';
						UPDATE t35 SET v = v || 'kept';
					EXCEPTION WHEN division_by_zero THEN
						EXECUTE format('UPDATE t%s SET v = v || %L', i % 35 + 1, 'caught');
					END;
				END LOOP;
			END $$});
		ok($proxy->wait_for($rule), "$name: the peer is to commit");
		here('SELECT pg_cancel_backend(' . $session->pid . ')');
		my (undef, $err) = $session->finish;
		like($err, qr/WARNING:\s+57014/, '... and nobody waits for that');
		$proxy->kill(only => [$id]);
		$proxy->clear;
		$session->quit;
		ok($alpha->wait_caught_up('beta'), '... the worker does it all again');
		my @different = grep {
			my $sql = "SELECT md5(string_agg(t::text, '|' ORDER BY id)) FROM t$_ AS t";
			here($sql) ne there($sql)
		} (1 .. 36);
		is("@different", '', '... and all tables are equal');
		here("SET mmrepl.mode = 'async'; " . join ';', map { "DELETE FROM t$_ WHERE id > 1" } (1 .. 3));
		$alpha->wait_caught_up('beta');
	}
};

foreach my $node ($alpha, $beta)
{
	ok(!$node->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
		'no crash in the log of ' . $node->name);
	$node->stop('fast');
}

done_testing();
