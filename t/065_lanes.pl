# Lanes: while much waits, several connections execute batches at the peer side
# by side.  Whatever one batch does to the other's rows, the tables end as if
# they had come one after the other, readers see them in that order, and nobody
# is shown a failure.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) =
  MmreplCluster->new_pair(conf => <<'EOC');
mmrepl.retry_min_delay = '50ms'
mmrepl.connect_timeout = '1min' # after a failure no lane is opened for a while
deadlock_timeout = '3min'
EOC

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
	return $alpha->wait_caught_up('beta') || diag($alpha->describe('beta'));
}

sub set_config
{
	my ($setting, $value) = @_;
	here("ALTER SYSTEM SET $setting = '$value'");
	$alpha->reload;
	$alpha->poll_query_until('postgres', "SELECT current_setting('$setting') = '$value'")
	  or die "$setting was not set";
	return;
}

sub hold
{
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_query_until('postgres',
		q{SELECT state = 'paused' FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'})
	  or die 'not paused';
	return;
}

sub release
{
	here(q{SELECT mmrepl.resume('beta')});
	return;
}

# Sessions at beta that wait for a session's end.
sub behind
{
	my ($pid) = @_;
	return "SELECT pid FROM pg_stat_activity WHERE $pid = ANY (pg_blocking_pids(pid))";
}

# Those of alpha's that wait for their turn.
my $waiting = q{SELECT pid FROM pg_locks WHERE NOT granted AND locktype = 'object'
	AND classid = 'mmrepl.progress'::regclass AND objsubid <> 0};

# Passes once one batch stands at the gate and so many others wait, each for the turn
# of the one before it.  That is certain where these do nothing to each other: what
# fails ahead leaves those behind it to wait for the watermark.
sub await_turns
{
	my ($gate, $count, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $at_gate = behind($gate->pid);

	return $beta->poll_ok(
		"SELECT EXISTS ($at_gate) AND (SELECT count(*) FROM ($waiting) w) = $count", $name)
	  || die standing();
}

# For the log: how far both sides are.
sub standing
{
	return $alpha->describe('beta') . there(
		q{SELECT a.pid, state, wait_event_type, wait_event, left(query, 60), pg_blocking_pids(a.pid), locktype,
			relation::regclass, classid::regclass, objid, objsubid, mode
		FROM pg_stat_activity a LEFT JOIN pg_locks l ON l.pid = a.pid AND NOT granted
		WHERE backend_type = 'client backend'});
}

###############################################################################

section 'the setting' => sub {
	foreach my $wrong ('0', '9', '-1', 'two', '2x', '')
	{
		like($alpha->fails('postgres', "ALTER SERVER beta OPTIONS (ADD lanes '$wrong')"),
			qr/22023.*invalid number of lanes/, "lanes '$wrong' is refused");
	}
	here(q{ALTER SERVER beta OPTIONS (ADD lanes '2')});
	is(here('SHOW mmrepl.lanes'), '1', 'there is one lane by default');
	like($alpha->fails('postgres', q{ALTER USER MAPPING FOR CURRENT_USER SERVER beta OPTIONS (ADD lanes '2')}),
		qr/belongs to the server/, 'lanes are the server\'s');
};

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE gate (id int PRIMARY KEY, v bigint);
	CREATE TABLE item (id int PRIMARY KEY, u int NOT NULL, v bigint);
	CREATE TABLE other (id int PRIMARY KEY, v bigint);
	CREATE TABLE audited (id int PRIMARY KEY, version bigint);
	CREATE TABLE account (id int PRIMARY KEY, balance bigint);
	CREATE TABLE wide (id int PRIMARY KEY, v text);
	CREATE TABLE part (id int PRIMARY KEY, v bigint) PARTITION BY RANGE (id);
	CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (50);
	CREATE TABLE part_2 PARTITION OF part FOR VALUES FROM (50) TO (1000);
});
here('ALTER TABLE item ADD UNIQUE (u) DEFERRABLE'); # so that the source lets values change places
there(
	q{
	CREATE UNIQUE INDEX ON item (u);
	CREATE TABLE audit (seq bigserial, id int, version bigint, items bigint);
	CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO public.audit (id, version, items)
		VALUES (NEW.id, NEW.version, (SELECT coalesce(sum(v), 0) FROM public.item));
		RETURN NULL;
	END $$;
	CREATE TRIGGER audit AFTER INSERT OR UPDATE ON audited FOR EACH ROW EXECUTE FUNCTION audit();
	ALTER TABLE audited ENABLE REPLICA TRIGGER audit;
});
my @tables = qw(gate item other audited account part wide);
$alpha->create_pair($_, 'beta') foreach @tables;

###############################################################################

# Whatever was lost before, and for how many batches nothing is tried after that:
# they are made up for when some have been executed ahead and none was in vain.
sub settle
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	here('INSERT INTO gate VALUES (1, 0), (100, 0) ON CONFLICT DO NOTHING');
	foreach (1 .. 20)
	{
		my ($ahead, $redone) = map { $alpha->stat('beta', $_) } qw(batches_ahead batches_redone);

		hold();
		here(q{DO $$ BEGIN FOR i IN 1 .. 150 LOOP UPDATE gate SET v = v + 1 WHERE id = i % 50 + 10; COMMIT; END LOOP; END $$});
		release();
		synced();
		return
		  if $alpha->stat('beta', 'batches_redone') == $redone
		  && $alpha->stat('beta', 'batches_ahead') >= $ahead + 4;
	}
	die 'batches are not executed ahead: ' . $alpha->describe('beta');
}

# Two batches of two transactions.  The first one stands still at the gate until
# the second is as far as it comes by itself; what each of them does then is the
# second transaction of the one, and the first of the other.
sub meet
{
	my ($name, $first, $second, %expected) = @_;
	my $gate = $beta->session;
	my @second = ref $second ? @$second : ($second);
	my @first = ref $first ? @$first : ($first);

	settle();
	my %was = map { $_ => $alpha->stat('beta', $_) } qw(batches_ahead batches_redone retries);
	my $log = -s $beta->logfile;
	hold();
	here('DELETE FROM gate WHERE id = 1'); # an update would wait to be written with others
	here($_) foreach @first;
	here($_) foreach @second;
	here("UPDATE gate SET v = v + 1 WHERE id = 2");
	$gate->ok('BEGIN; UPDATE gate SET v = v WHERE id = 1');
	release();
	if ($expected{error})
	{
		ok( until_true(sub { $beta->log_contains($expected{error}, $log) }),
			"$name: the second one fails while it is ahead");
	}
	else
	{
		await_turns($gate, 1, "$name: the second one waits") if !$expected{waits};
		$beta->poll_ok($expected{waits}, "$name: the second one waits") || die standing()
		  if $expected{waits};
	}
	$expected{meanwhile}->() if $expected{meanwhile};
	my $begun = time;
	$gate->ok('COMMIT');
	$gate->quit;
	synced();
	cmp_ok(time - $begun, '<', 90, "$name: nobody has waited for deadlock_timeout");
	$alpha->same_rows($beta, $_, name => "$name: $_") foreach @tables;
	my $redone = $alpha->stat('beta', 'batches_redone') - $was{batches_redone};
	if ($expected{error} || $expected{redone})
	{
		cmp_ok($redone, '>', 0, "$name: it was done once more");
	}
	else
	{
		is($redone, 0, "$name: it was done once");
		cmp_ok($alpha->stat('beta', 'batches_ahead'), '>', $was{batches_ahead}, "$name: ahead");
	}
	is($alpha->stat('beta', 'retries'), $was{retries}, "$name: no failure is counted");
	return;
}

sub until_true
{
	my ($condition) = @_;

	foreach (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return 1 if $condition->();
		Time::HiRes::usleep(100_000);
	}
	return 0;
}

section 'what one batch does to another' => sub {
	here(q{
		INSERT INTO gate SELECT g, 0 FROM generate_series(1, 100) g;
		INSERT INTO item SELECT g, g, g FROM generate_series(1, 40) g;
		INSERT INTO other SELECT g, g FROM generate_series(1, 40) g;
		INSERT INTO audited SELECT g, 0 FROM generate_series(1, 10) g;
		INSERT INTO account SELECT g, 1000 FROM generate_series(1, 10) g;
		INSERT INTO part SELECT g, g FROM generate_series(1, 99) g});
	synced();
	set_config('mmrepl.batch_transactions', '2');

	# The row that was inserted without a look is in the first one's way, though it was taken back.
	meet('insert of a deleted key', 'DELETE FROM other WHERE id = 1', 'INSERT INTO other VALUES (1, 100)', redone => 1);
	meet('update of an inserted row', 'INSERT INTO other VALUES (102, 0)', 'UPDATE other SET v = 7 WHERE id = 102');
	meet('delete of an inserted row', 'INSERT INTO other VALUES (103, 0)', 'DELETE FROM other WHERE id = 103');
	meet('update of a moved row', 'UPDATE other SET id = 104 WHERE id = 4', 'UPDATE other SET v = 7 WHERE id = 104');
	meet('insert where a row was moved away', 'UPDATE other SET id = 105 WHERE id = 5', 'INSERT INTO other VALUES (5, 5)', redone => 1);
	meet('insert with a value that was freed', 'DELETE FROM item WHERE id = 6', 'INSERT INTO item VALUES (106, 6, 1)',
		error => qr/duplicate key.*item_u/);
	meet('move onto a deleted key', 'DELETE FROM other WHERE id = 7', 'UPDATE other SET id = 7 WHERE id = 8',
		error => qr/duplicate key.*other_pkey/);
	meet('the same row', 'UPDATE other SET v = v * 2 WHERE id = 9', 'UPDATE other SET v = v + 1 WHERE id = 9',
		redone => 1);
	meet('insert, delete, insert', 'INSERT INTO other VALUES (110, 1)',
		q{BEGIN; DELETE FROM other WHERE id = 110; INSERT INTO other VALUES (110, 2); COMMIT});
	meet('delete of what is to be inserted again', 'BEGIN; DELETE FROM other WHERE id = 11; INSERT INTO other VALUES (11, 0); COMMIT',
		'DELETE FROM other WHERE id = 11', redone => 1);
	meet('insert behind TRUNCATE', 'TRUNCATE other', 'INSERT INTO other VALUES (12, 12)', redone => 1);
	meet('TRUNCATE behind insert', 'INSERT INTO other VALUES (13, 13)', 'TRUNCATE other');
	meet('a trigger that reads', 'UPDATE item SET v = v + 1000 WHERE id = 14',
		'UPDATE audited SET version = version + 1 WHERE id = 1');
	is( there('SELECT items FROM audit ORDER BY seq DESC LIMIT 1'),
		here('SELECT sum(v) FROM item'), 'the trigger sees what the first batch wrote');
	meet('a partitioned table', 'UPDATE part SET id = 60 + 100 WHERE id = 10', 'INSERT INTO part VALUES (10, 1)');

	my $user = $beta->session;
	meet('a lock of a user, requested between the two', 'INSERT INTO other VALUES (120, 0)', 'INSERT INTO other VALUES (121, 0)',
		meanwhile => sub {
			$user->start('BEGIN; LOCK TABLE other IN ACCESS EXCLUSIVE MODE; COMMIT');
			$beta->poll_ok(q{SELECT count(*) = 1 FROM pg_locks WHERE relation = 'other'::regclass AND NOT granted},
				'the user waits for the second one');
		});
	is(($user->finish)[1], '', 'and gets his lock');

	# A circle of the second one and a user, in which the first has no part.
	$user->ok('BEGIN; UPDATE other SET v = v WHERE id = 121');
	meet('a deadlock with a user', 'UPDATE gate SET v = v WHERE id = 3',
		'BEGIN; UPDATE other SET v = 5 WHERE id = 120; UPDATE other SET v = 5 WHERE id = 121; COMMIT',
		waits => q{SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'
			AND pid IN (SELECT pid FROM pg_locks WHERE relation = 'other'::regclass AND mode = 'RowExclusiveLock'))},
		meanwhile => sub { $user->ok('UPDATE other SET v = v WHERE id = 120; COMMIT') },
		redone => 1);
	$user->quit;

	is(there('SELECT coalesce(sum(conflicts), 0) FROM mmrepl.progress'), '0',
		'none of this was taken for a conflict');
	ok(!$beta->log_contains(qr/conflict detected/), 'nor does the log know of any');
	is($alpha->stat('beta', 'consecutive_failures'), '0', 'nothing failed');
	is($alpha->stat('beta', 'last_error'), '', 'and no error is shown');
};

###############################################################################

# A backlog of random changes to few keys, and of transfers.
my $backlogs = 0;

sub backlog
{
	my ($n) = @_;
	my $new = 1_000_000 * ++$backlogs;

	here(
		qq{SELECT setseed(0.$backlogs);
		DO \$\$
		DECLARE k int; m int;
		BEGIN
			FOR i IN 1 .. $n LOOP
				k := 1 + random() * 30;
				m := 1 + random() * 30;
				CASE (random() * 9)::int
				WHEN 0 THEN DELETE FROM item WHERE id = k;
				WHEN 1, 2 THEN INSERT INTO item VALUES (k, $new + 2 * i, i) ON CONFLICT (id) DO UPDATE SET v = i;
				WHEN 3 THEN UPDATE item SET id = -k, v = i WHERE id = k AND NOT EXISTS (SELECT FROM item WHERE id = -k);
				WHEN 4 THEN UPDATE item SET u = $new + 2 * i + 1 WHERE id = k;
				WHEN 5 THEN DELETE FROM other WHERE id = k; INSERT INTO other VALUES (k, i);
				WHEN 6 THEN UPDATE part SET id = (id + 50) % 100, v = i WHERE id = k AND NOT EXISTS (SELECT FROM part WHERE id = (k + 50) % 100);
				WHEN 7 THEN UPDATE gate SET v = i WHERE id = k;
				ELSE
					UPDATE account SET balance = balance - 1 WHERE id = 1 + k % 10;
					UPDATE account SET balance = balance + 1 WHERE id = 1 + m % 10;
				END CASE;
				IF i % 7 = 0 THEN UPDATE audited SET version = version + 1 WHERE id = 1 + m % 10; END IF;
				INSERT INTO other VALUES (10000 + i, i) ON CONFLICT (id) DO UPDATE SET v = i;
				IF i % 401 = 0 THEN TRUNCATE other; END IF;
				COMMIT;
			END LOOP;
		END \$\$});
	return;
}

# So many transactions that do nothing to each other, nor to what settle() does.
my $calm = 20_000;

sub calm
{
	my ($n) = @_;

	here(
		qq{DO \$\$
		BEGIN
			FOR i IN 1 .. $n LOOP
				IF i % 2 = 0 AND i <= 10 THEN
					UPDATE account SET balance = balance + 1 WHERE id = i - 1;
					UPDATE account SET balance = balance - 1 WHERE id = i;
				ELSE
					INSERT INTO other VALUES ($calm + i, i);
				END IF;
				COMMIT;
			END LOOP;
		END \$\$});
	$calm += $n;
	return;
}

# Everything is there, once, and came in order.
sub judge
{
	my ($name) = @_;

	synced();
	$alpha->same_rows($beta, $_, name => "$name: $_") foreach @tables;
	is( there(
			q{SELECT count(*) FROM (SELECT version - lag(version) OVER (PARTITION BY id ORDER BY seq) d FROM audit) s
			   WHERE d <> 1}),
		'0', "$name: versions came in order, each once");
	is( there(q{SELECT count(*) FROM audited a WHERE version <> (SELECT max(version) FROM audit WHERE id = a.id)}),
		'0', "$name: up to the last one");
	is($alpha->queued('beta'), '0', "$name: nothing is left");
	return;
}

set_config('mmrepl.batch_transactions', '15');

section 'readers' => sub {
	my $retries = $alpha->stat('beta', 'retries');

	here(q{ALTER SERVER beta OPTIONS (SET lanes '3')});
	settle();
	there(
		q{CREATE TABLE seen (total bigint);
		  CREATE PROCEDURE watch() LANGUAGE plpgsql AS $$
		  BEGIN
			WHILE NOT EXISTS (SELECT FROM gate WHERE id = 1000) LOOP
				INSERT INTO seen SELECT sum(balance) FROM account;
				COMMIT;
				PERFORM pg_sleep(0.002);
			END LOOP;
		  END $$});
	my $reader = $beta->session;
	my $was = $alpha->stat('beta', 'batches_ahead');
	hold();
	calm(4 * 15);
	backlog(2000);
	here('INSERT INTO gate VALUES (1000, 0)');
	$reader->start('CALL watch()');
	release();
	judge('a backlog over three lanes');
	my ($out, $err) = $reader->finish;
	is($err, '', 'the reader comes to its end');
	$reader->quit;
	is(there('SELECT DISTINCT total FROM seen'), '10000', 'no reader has seen half a transaction');
	cmp_ok($alpha->stat('beta', 'batches_ahead'), '>', $was, 'batches were executed ahead');
	is($alpha->stat('beta', 'retries'), $retries, 'nothing failed');
	ok(!$beta->log_contains(qr/conflict detected/), 'nothing was taken for a conflict');
	note 'ahead: ', $alpha->stat('beta', 'batches_ahead'), ', redone: ', $alpha->stat('beta', 'batches_redone');
};

###############################################################################

# A backlog whose first batch stands still while two others, over a lane each, wait
# for their turn: what is done then to one of them.  (All four that may be on their
# way do nothing to each other.)
sub disturb
{
	my ($name, $disturb) = @_;
	my $gate = $beta->session;

	settle();
	hold();
	here('DELETE FROM gate WHERE id = 100');
	calm(7);
	backlog(200);
	$gate->ok('BEGIN; UPDATE gate SET v = v WHERE id = 100');
	release();
	await_turns($gate, 2, "$name: batches wait for the one before them");
	$disturb->(there(behind($gate->pid)));
	$gate->ok('COMMIT');
	$gate->quit;
	judge($name);
	return;
}

section 'sessions that are killed' => sub {
	set_config('mmrepl.batch_transactions', '2');
	disturb('the batch that is waited for is killed', sub { $beta->terminate(@_) });
	disturb('the batch that waits is killed', sub { $beta->terminate(there(behind(@_))) });

	my $retries = $alpha->stat('beta', 'retries');
	my $redone = $alpha->stat('beta', 'batches_redone');
	disturb('the batch that waits is cancelled', sub {
		my $pid = there(behind(@_));
		there("SELECT pg_cancel_backend($pid)");
		$beta->poll_ok("SELECT NOT EXISTS (SELECT FROM pg_locks WHERE pid = $pid AND NOT granted)", 'it waits no more');
	});
	is($alpha->stat('beta', 'retries'), $retries, 'a cancel of what is ahead is no failure');
	cmp_ok($alpha->stat('beta', 'batches_redone'), '>', $redone, 'it was done once more');

	disturb('the worker is killed', sub {
		$alpha->terminate(here(q{SELECT pid FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'}));
	});
};

# Of two that are ahead the later one is the first at a row.  Either may be the one
# that gives way, and when it is the earlier one, nobody waits for a turn any more.
section 'two that are ahead are in each other\'s way' => sub {
	my ($first, $second) = map { $beta->session } 1 .. 2;

	settle();
	my %was = map { $_ => $alpha->stat('beta', $_) } qw(batches_redone retries);
	hold();
	here('DELETE FROM gate WHERE id = 100');
	here('INSERT INTO other VALUES (30001, 1)');
	here('DELETE FROM gate WHERE id = 99');
	here("UPDATE account SET balance = balance + $_ WHERE id = 1") foreach 1, -1;
	here('INSERT INTO other VALUES (30002, 1)');
	$first->ok('BEGIN; UPDATE gate SET v = v WHERE id = 100');
	$second->ok('BEGIN; UPDATE gate SET v = v WHERE id = 99');
	release();
	my ($one, $two) = map { behind($_->pid) } $first, $second;
	$beta->poll_ok("SELECT EXISTS ($one) AND EXISTS ($two) AND (SELECT count(*) FROM ($waiting) w) = 1",
		'the third one has the row, and waits for its turn')
	  or die standing();
	$second->ok('COMMIT');
	my $behind = behind(there($one));
	$beta->poll_ok(
		qq{SELECT (SELECT count(*) FROM ($behind) b) = 1 AND
		   (SELECT count(*) FROM pg_locks WHERE NOT granted) = 2},
		'one of the two has given way')
	  or die standing();
	note 'left: ', there(qq{SELECT locktype FROM pg_locks WHERE NOT granted AND pid IN ($behind)});
	$first->ok('COMMIT');
	$_->quit foreach $first, $second;
	judge('in each other\'s way');
	cmp_ok($alpha->stat('beta', 'batches_redone'), '>', $was{batches_redone}, 'it was done once more');
	is($alpha->stat('beta', 'retries'), $was{retries}, 'no failure is counted');
};

###############################################################################

section 'a transaction that is refused' => sub {
	my $was = $alpha->stat('beta', 'batches_ahead');

	there('ALTER TABLE account ALTER balance SET NOT NULL');
	settle();
	hold();
	here("UPDATE gate SET v = v + 1 WHERE id = $_") foreach 1 .. 8;
	here('DELETE FROM gate WHERE id = 9');
	here('UPDATE account SET balance = NULL WHERE id = 5');
	my $ticket = here('SELECT max(ticket) FROM mmrepl.sync_err_rec');
	here("INSERT INTO gate VALUES (3000 + $_, 0)") foreach 1 .. 9;
	my $gate = $beta->session;
	$gate->ok('BEGIN; UPDATE gate SET v = v WHERE id = 9');
	release();
	await_turns($gate, 2, 'batches wait for the one that will be refused');
	$gate->ok('COMMIT');
	$gate->quit;
	$alpha->poll_state('beta', 'blocked');
	is($alpha->stat('beta', 'blocked_ticket'), $ticket, 'the stream is blocked by that one');
	is(there('SELECT sum(v) FROM gate WHERE id < 10'), here('SELECT sum(v) FROM gate WHERE id < 10'),
		'what was before it is there');
	is(there('SELECT count(*) FROM gate WHERE id > 3000'), '0', 'and nothing that is behind it');
	here("SELECT mmrepl.skip('beta', $ticket, 'refused')");
	synced();
	is(there('SELECT balance FROM account WHERE id = 5') ne '', 1, 'it was skipped');
	$alpha->same_rows($beta, 'gate', name => 'and what is behind it has come');
	here('UPDATE account SET balance = 7 WHERE id = 5');
	settle();
	judge('after a refusal');
	cmp_ok($alpha->stat('beta', 'batches_ahead'), '>', $was, 'batches are executed ahead again');
};

section 'prepared transactions' => sub {
	settle();
	my $was = $alpha->stat('beta', 'batches_ahead');
	my $log = -s $beta->logfile;

	here("BEGIN; INSERT INTO gate VALUES (2000 + $_, 0), (2100 + $_, 0); UPDATE gate SET v = v + 1 WHERE id = 60 + $_; PREPARE TRANSACTION 'late_$_'")
	  foreach 1 .. 4;
	backlog(20);    # behind them, and there before they are
	synced();
	hold();
	calm(8);
	backlog(20);
	foreach my $i (1 .. 4)
	{
		here("COMMIT PREPARED 'late_$i'");
		here("UPDATE gate SET v = v + 1 WHERE id IN (2000 + $i, 60 + $i)");
		backlog(20);
	}
	release();
	judge('transactions that were prepared earlier');
	ok(!$beta->log_contains(qr/conflict detected/, $log), 'they came before what was done to their rows');
	cmp_ok($alpha->stat('beta', 'batches_ahead'), '>', $was, 'batches were executed ahead');
};

# A large transaction, one that has to wait for it on the same connection, and
# two that could be executed ahead of that one: the last of them must not get a
# row that the large one still wants.
section 'a batch that has not begun' => sub {
	my $gate = $beta->session;

	set_config('mmrepl.batch_size', '64kB');
	settle();
	my %was = map { $_ => $alpha->stat('beta', $_) } qw(batches_redone retries bytes_sent);
	hold();
	here(q{
		BEGIN;
		INSERT INTO wide SELECT g, repeat('x', 1000) FROM generate_series(1, 100) g;
		UPDATE gate SET v = v + 1 WHERE id = 1;
		UPDATE gate SET v = v + 1 WHERE id = 7;
		COMMIT});
	here("UPDATE gate SET v = v + 1 WHERE id = $_") foreach 2 .. 7;
	$gate->ok('BEGIN; UPDATE gate SET v = v WHERE id = 1');
	release();
	$alpha->poll_ok("SELECT bytes_sent > $was{bytes_sent} + 100000 FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'",
		'the large one has been sent');
	$beta->poll_ok(q{SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'}, 'and stands still');
	$gate->ok('COMMIT');
	$gate->quit;
	judge('behind a large transaction');
	is($alpha->stat('beta', $_), $was{$_}, "$_: as before") foreach qw(batches_redone retries);
	set_config('mmrepl.batch_size', '1MB');
};

section 'the peer restarts' => sub {
	hold();
	backlog(600);
	my $from = there('SELECT sum(watermark) FROM mmrepl.progress');
	release();
	$beta->poll_ok("SELECT sum(watermark) > $from FROM mmrepl.progress", 'some of it is there');
	$beta->peer_down('immediate');
	$beta->peer_up;
	judge('the peer was restarted');
};

section 'steering' => sub {
	hold();
	backlog(600);
	release();
	foreach (1 .. 3)
	{
		hold();
		release();
	}
	here(q{ALTER SERVER beta OPTIONS (SET lanes '2')});
	backlog(100);
	here(q{ALTER SERVER beta OPTIONS (DROP lanes)});
	backlog(100);
	judge('paused and altered meanwhile');
	$beta->poll_ok(
		q{SELECT count(*) = 1 FROM pg_stat_activity WHERE client_addr IS NOT NULL AND application_name = 'mmrepl_bgw'},
		'without lanes there is one connection');

	set_config('mmrepl.lanes', '4');
	hold();
	backlog(600);
	release();
	here('SELECT mmrepl.deal_sync_err_rec(10000)');
	judge('delivered by hand meanwhile');
};

# An older build of the extension at the peer.
section 'a peer that knows no lanes' => sub {
	there(
		q{ALTER FUNCTION mmrepl.hello(uuid, int, int) RENAME TO hello_of_today;
		  ALTER FUNCTION mmrepl.apply(bytea) RENAME TO apply_of_today;
		  CREATE FUNCTION mmrepl.hello(uuid, int, int, OUT protocol int, OUT node uuid, OUT watermark bigint, OUT server_version int)
			LANGUAGE sql AS 'SELECT * FROM mmrepl.hello_of_today($1, $2, 1)';
		  CREATE FUNCTION mmrepl.apply(batch bytea) RETURNS bigint LANGUAGE plpgsql AS $$
		  BEGIN
			IF get_byte(batch, 4) & 56 <> 0 THEN RAISE 'unknown flags'; END IF;
			RETURN mmrepl.apply_of_today(batch);
		  END $$});
	$beta->terminate_peers;
	here('UPDATE gate SET v = v + 1 WHERE id = 2');
	synced();
	my $was = $alpha->stat('beta', 'batches_ahead');
	hold();
	backlog(300);
	release();
	judge('a peer of protocol 1');
	is($alpha->stat('beta', 'batches_ahead'), $was, 'nothing is executed ahead');
	is($alpha->stat('beta', 'last_error') =~ /unknown flags/ ? 1 : 0, 0, 'it is told of no turns');
	$beta->poll_ok('SELECT count(*) = 1 FROM pg_stat_activity WHERE client_addr IS NOT NULL',
		'there is one connection');
};

is($alpha->queued('beta'), '0', 'nothing is left queued');
ok(!$_->log_contains(qr/PANIC|TRAP:|was terminated by signal(?! 3)/), 'no crash in the log of ' . $_->name)
  foreach ($alpha, $beta);
$_->stop('fast') foreach ($alpha, $beta);

done_testing();
