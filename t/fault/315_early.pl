# What is executed at the peer while it commits here: it is committed there when it is
# committed here, and never else, whatever happens in between.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use FaultPoints;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Unflushed;

my ($alpha, $beta) = MmreplCluster->new_pair(conf => q{
	mmrepl.retry_min_delay = '20ms'
	mmrepl.retry_max_delay = '200ms'
	mmrepl.reply_timeout = '1s'
	mmrepl.batch_size = '64kB'
	wal_writer_delay = '10s'
	max_prepared_transactions = 5
	autovacuum = off
});

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

# At the peer each execution is counted, whether it stays or not; that of row 13 fails
# every other time.
$alpha->create_table_on_both($beta, q{
	CREATE TABLE item (id int PRIMARY KEY, n int);
	INSERT INTO item SELECT g, 0 FROM generate_series(1, 20) g});
there(q{
	CREATE SEQUENCE executed;
	CREATE SEQUENCE tries;
	CREATE FUNCTION count_it() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM nextval('public.executed');
		IF NEW.id = 13 AND nextval('public.tries') % 2 = 1 THEN
			RAISE EXCEPTION 'not at once';
		END IF;
		RETURN NULL;
	END $$;
	CREATE TRIGGER counting AFTER UPDATE ON item FOR EACH ROW EXECUTE FUNCTION count_it();
	ALTER TABLE item ENABLE ALWAYS TRIGGER counting;
	ALTER TABLE item ADD CONSTRAINT small CHECK (n < 1000)});
$alpha->create_pair('item', 'beta');
here('UPDATE item SET n = n WHERE id = 1');
$alpha->wait_caught_up('beta');

my $announced = 'commit-announced:wait:1';
my $writer = $alpha->session;

sub executed { return there('SELECT last_value FROM executed') }
sub row { return there("SELECT n FROM item WHERE id = $_[0]") }

sub is_locked
{
	return $beta->psql('postgres', "SELECT FROM item WHERE id = $_[0] FOR UPDATE NOWAIT", on_error_stop => 1) != 0;
}

# The statement, up to its commit, which waits; it has been sent to the peer.
sub begin_commit
{
	my ($sql) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $sent = point_hits($alpha, 'worker-early-sent');

	forget_fault($alpha, $announced);
	$writer->ok("SET mmrepl.fault = '$announced'");
	$writer->start($sql);
	ok(await_fault($alpha, $announced), 'it commits');
	ok(until_true(sub { point_hits($alpha, 'worker-early-sent') > $sent }), '... and is sent to the peer');
	return;
}

# ... and is executed there; returns how many were before.
sub commit_slowly
{
	my ($sql) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $before = executed();

	begin_commit($sql);
	ok(until_true(sub { executed() > $before }), '... which executes it');
	return $before;
}

# ... or is refused there.
sub commit_refused
{
	my ($sql) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $undone = point_hits($alpha, 'worker-early-undone');

	begin_commit($sql);
	ok(until_true(sub { point_hits($alpha, 'worker-early-undone') > $undone }), '... which refuses it');
	return;
}

sub commits
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	release_fault($alpha, $announced);
	my ($out, $err) = $writer->finish;
	is($err, '', 'it has committed');
	return;
}

# The writer is terminated while it commits.
sub aborts
{
	$alpha->terminate($writer->pid);
	eval { $writer->finish };
	eval { $writer->quit };
	$writer = $alpha->session;
	return;
}

sub is_equal
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'item', name => "$name: equal");
	return;
}

section 'committed there when it is committed here' => sub {
	my $retries = $alpha->stat('beta', 'retries');
	my $before = commit_slowly('UPDATE item SET n = 1 WHERE id = 2');

	is(row(2), '0', 'nobody there sees it');
	ok(is_locked(2), '... and the row is locked');
	is($alpha->state('beta'), 'streaming', 'the stream is well');
	is($alpha->stat('beta', 'queue_transactions'), '0', '... and nothing counts as waiting');
	my $began = time();
	commits();
	$beta->poll_ok('SELECT n = 1 FROM item WHERE id = 2', 'it is there');
	cmp_ok(time() - $began, '<', 5, '... at once, though nobody waits for it');
	is_equal('committed');
	is(row(2), '1', 'it is there');
	is(executed(), $before + 1, 'it was executed once');
	is($alpha->stat('beta', 'retries'), $retries, 'nothing was tried again');
};

section 'what aborts here after all' => sub {
	my ($applied, $pid) = map { $alpha->stat('beta', $_) } qw(transactions_applied pid);

	commit_slowly('UPDATE item SET n = 1 WHERE id = 3');
	ok(is_locked(3), 'the row is locked there');
	aborts();
	ok(until_true(sub { !is_locked(3) }), '... and soon no more');
	is(row(3), '0', 'it is not there');
	here('UPDATE item SET n = 5 WHERE id = 4');
	$alpha->wait_caught_up('beta');
	is($alpha->stat('beta', 'pid'), $pid, 'the worker has lived on');
	is($alpha->stat('beta', 'transactions_applied'), $applied + 1, 'what was undone is not counted as applied');
	is($alpha->stat('beta', 'consecutive_failures'), '0', 'nothing has failed');
	here('INSERT INTO item SELECT g, 0 FROM generate_series(1001, 30000) g');
	is_equal('aborted, then a large one');
	here('DELETE FROM item WHERE id > 1000');
	is_equal('small again');
};

section 'what is refused before it is committed is no failure' => sub {
	my ($pid, $errors) = map { $alpha->stat('beta', $_) } qw(pid last_error_at);

	commit_refused('UPDATE item SET n = 1 WHERE id = 13');
	is($alpha->state('beta'), 'streaming', 'the stream is well');
	commits();
	is_equal('refused at first');
	is(row(13), '1', 'it is there');
	commit_refused('UPDATE item SET n = 2 WHERE id = 13');
	aborts();
	is_equal('refused, then aborted');
	is($alpha->stat('beta', 'last_error_at'), $errors, 'no error was ever told of');
	is($alpha->stat('beta', 'pid'), $pid, 'it is the same worker');
	there(q{SELECT nextval('tries')}) if there('SELECT last_value FROM tries') % 2 == 1;

	commit_refused('UPDATE item SET n = 1000 WHERE id = 5');
	commits();
	$alpha->poll_state('beta', 'blocked');
	is($alpha->stat('beta', 'last_error_sqlstate'), '23514', 'what is refused for good blocks the stream when it is committed');
	there('ALTER TABLE item DROP CONSTRAINT small');
	here(q{SELECT mmrepl.retry_now('beta')});
	is_equal('refused, then not');
};

section 'a commit here that takes long' => sub {
	my $retries = $alpha->stat('beta', 'retries');
	my $before = commit_slowly('UPDATE item SET n = 1 WHERE id = 6');

	ok(until_true(sub { !is_locked(6) }), 'the row is not locked there for ever');
	is(row(6), '0', '... and as it was');
	is($alpha->state('beta'), 'streaming', 'the stream is well');
	commits();
	is_equal('slow');
	is(executed(), $before + 2, 'it was executed again');
	is($alpha->stat('beta', 'retries'), $retries, 'who waits for us is not silent');
};

section 'the row is locked at the peer' => sub {
	my $holder = $beta->session;

	$holder->ok('BEGIN; SELECT FROM item WHERE id = 7 FOR UPDATE');
	begin_commit('UPDATE item SET n = 1 WHERE id = 7');
	commits();
	here('UPDATE item SET n = 2 WHERE id = 8');
	$holder->ok('COMMIT');
	is_equal('locked');
	$holder->quit;
};

# The rows of a prepared transaction come with an old ticket while the other one is held.
section 'COMMIT PREPARED meanwhile' => sub {
	here(q{BEGIN; UPDATE item SET n = 1 WHERE id = 9; PREPARE TRANSACTION 'p'});
	commit_slowly('UPDATE item SET n = 1 WHERE id = 10');
	here(q{COMMIT PREPARED 'p'; UPDATE item SET n = 2 WHERE id = 9});
	is(row(9), '0', 'it comes behind what is held');
	commits();
	is_equal('late');
};

section 'pause, and deliver by hand' => sub {
	my $dealer = $alpha->session;

	commit_slowly('UPDATE item SET n = 2 WHERE id = 10');
	my $began = time();
	here(q{SELECT mmrepl.pause('beta')});
	ok(until_true(sub { !is_locked(10) }) && time() - $began < 5, 'what is held is rolled back at once');
	commits();
	$alpha->poll_state('beta', 'paused');
	is(row(10), '1', 'a pause holds from the call on');
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->poll_state('beta', 'streaming');
	$alpha->wait_caught_up('beta');
	is(row(10), '2', 'it is there');
	here('UPDATE item SET n = 3 WHERE id = 10');
	$alpha->wait_caught_up('beta');
	commit_slowly('UPDATE item SET n = 4 WHERE id = 10');
	$dealer->start(q{SELECT mmrepl.deal_sync_err_rec(10)});
	commits();
	my ($out, $err) = $dealer->finish;
	is($err, '', 'who delivers by hand has his turn');
	is_equal('by hand');
	$dealer->quit;
};

# The worker looks at its configuration, and would have to wait for that, when it has
# let the peer commit.
section 'a lock on the tables of the extension' => sub {
	my ($caller, $locker) = map { $alpha->session } 1, 2;

	commit_slowly('UPDATE item SET n = 5 WHERE id = 10');
	$caller->ok(q{BEGIN; SELECT mmrepl.resume('beta')});
	$locker->start('BEGIN; LOCK TABLE mmrepl.stream');
	$alpha->poll_ok('SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pid = ' . $locker->pid . ')',
		'somebody is about to lock a table');
	$caller->ok('COMMIT');    # calls for the worker's attention
	is(($locker->finish)[1], '', '... and has done so');
	commits();
	$beta->poll_ok('SELECT n = 5 FROM item WHERE id = 10', 'it is there all the same');
	$locker->ok('COMMIT');
	is_equal('locked tables');
	$_->quit foreach $caller, $locker;
};

section 'what is not for that' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE empty (id int PRIMARY KEY)');
	$alpha->create_pair('empty', 'beta');
	$alpha->wait_caught_up('beta');
	forget_fault($alpha, $announced);
	$writer->ok("SET mmrepl.fault = '$announced'");
	$writer->ok('TRUNCATE empty');
	ok(!fired($alpha, $announced), 'TRUNCATE');
	$alpha->create_table_on_both($beta, 'CREATE TABLE by_hand (id int PRIMARY KEY)');
	here(q{CREATE TRIGGER hand AFTER TRUNCATE ON by_hand FOR EACH STATEMENT
		   EXECUTE FUNCTION mmrepl.replicate('beta', 'public', 'by_hand', 'app', 'async')});
	$writer->ok('TRUNCATE by_hand');
	ok(!fired($alpha, $announced), '... by a trigger of the user');
	$writer->ok('BEGIN ISOLATION LEVEL SERIALIZABLE; UPDATE item SET n = 1 WHERE id = 18; COMMIT');
	ok(!fired($alpha, $announced), 'SERIALIZABLE');
	$writer->ok('INSERT INTO item SELECT g, 0 FROM generate_series(1001, 3000) g');
	ok(!fired($alpha, $announced), 'a large one');
	$writer->ok('DELETE FROM item WHERE id > 1000');
	commit_slowly('BEGIN; SAVEPOINT s; TRUNCATE empty; ROLLBACK TO s; UPDATE item SET n = 6 WHERE id = 10; COMMIT');
	commits();
	is_equal('all of it');
};

section 'the peer goes away meanwhile' => sub {
	commit_slowly('UPDATE item SET n = 1 WHERE id = 11');
	$beta->terminate_peers;
	ok(until_true(sub { !is_locked(11) }), 'the row is not locked any more');
	is(row(11), '0', '... and as it was');
	commits();
	is_equal('its session was terminated');
	commit_slowly('UPDATE item SET n = 2 WHERE id = 11');
	$beta->stop('immediate');
	$beta->start;
	is(row(11), '1', 'its crash has undone it');
	commits();
	is_equal('it crashed');
};

section 'this server crashes meanwhile' => sub {
	commit_slowly('UPDATE item SET n = 1 WHERE id = 12');
	$alpha->stop('immediate');
	eval { $writer->quit };
	ok(until_true(sub { !is_locked(12) }), 'the peer rolls it back');
	is(row(12), '0', 'it is not there');
	$alpha->start;
	$writer = $alpha->session;
	is_equal('crashed');
	here('UPDATE item SET n = 7 WHERE id = 12');
	is_equal('after that');
};

section 'what is not flushed here' => sub {
	my $fault = 'worker-unsealed:crash:1'; # a flush of the peer is behind one here
	my $wal_writer = stop_flushing($alpha);

	arm_fault($alpha, $fault);
	until_true(sub { (query($alpha, 'SHOW mmrepl.fault') // '') eq $fault }) or fail("$fault is set");
	$writer->ok('SET synchronous_commit = off');
	commit_slowly('UPDATE item SET n = 8 WHERE id = 12');
	release_fault($alpha, $announced);
	ok(await_fault($alpha, $fault), 'the server crashes behind it');
	kill('KILL', $wal_writer);
	eval { $writer->finish };
	eval { $writer->quit };
	disarm_faults($alpha);
	comes_back($alpha);
	$writer = $alpha->session;
	is(row(12), '8', 'it is there');
	is(here('SELECT n FROM item WHERE id = 12'), '8', '... and here');
	is_equal('not flushed');
};

section 'errors and crashes of the worker' => sub {
	foreach my $point (qw(worker-early-sent worker-early-kept worker-early-undone))
	{
		foreach my $action (qw(error fatal kill crash))
		{
			my $fault = "$point:$action:1";

			arm_fault($alpha, $fault);
			until_true(sub { (query($alpha, 'SHOW mmrepl.fault') // '') eq $fault }) or fail("$fault is set");
			forget_fault($alpha, $announced);
			$writer->ok("SET mmrepl.fault = '$announced'");
			$writer->start('UPDATE item SET n = n + 1 WHERE id = ' . ($point =~ /undone/ ? 13 : 14));
			await_fault($alpha, $announced) or fail('it commits');
			release_fault($alpha, $announced) if $point =~ /kept/ && until_true(sub { is_locked(14) });
			ok(await_fault($alpha, $fault), "$fault has fired");
			disarm_faults($alpha);
			comes_back($alpha);
			eval { $writer->finish };
			eval { $writer->quit };
			$writer = $alpha->session;
			is_equal($fault);
			there(q{SELECT nextval('tries')}) if there('SELECT last_value FROM tries') % 2 == 1;
		}
	}
};

section 'COMMIT waits for the peer' => sub {
	foreach my $setting (qw(applied flushed))
	{
		$writer->ok("SET mmrepl.async_commit = '$setting'");
		my $before = commit_slowly('UPDATE item SET n = n + 1 WHERE id = 15');
		commits();
		is(row(15), here('SELECT n FROM item WHERE id = 15'), "$setting: it is there");
		is(executed(), $before + 1, '... after one execution');
	}
	commit_slowly('UPDATE item SET n = n + 1 WHERE id = 15');
	aborts();
	here('UPDATE item SET n = n + 1 WHERE id = 15');
	is_equal('awaited, and aborted');
};

section 'switched off' => sub {
	here('ALTER SYSTEM SET mmrepl.early_apply = off');
	$alpha->reload;
	until_true(sub { query($alpha, 'SHOW mmrepl.early_apply') eq 'off' }) or fail('it is off');
	here('UPDATE item SET n = n + 1 WHERE id = 15'); # the worker is told by then
	$alpha->wait_caught_up('beta');
	my $sent = point_hits($alpha, 'worker-early-sent');

	foreach (1 .. 5)
	{
		here('UPDATE item SET n = n + 1 WHERE id = 15');
		$alpha->wait_caught_up('beta');
	}
	is(point_hits($alpha, 'worker-early-sent'), $sent, 'nothing is executed early');
	is_equal('off');
};

$writer->quit;
$_->stop('fast') foreach $alpha, $beta;
done_testing();
