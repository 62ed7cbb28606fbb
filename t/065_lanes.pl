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
  MmreplCluster->new_pair(conf => "mmrepl.retry_min_delay = '50ms'\ndeadlock_timeout = '20s'\n");

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

# Sessions of alpha's that wait for their turn.
my $waiting = q{SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'object'
	AND classid = 'mmrepl.progress'::regclass AND objsubid <> 0};

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
my @tables = qw(gate item other audited account part);
$alpha->create_pair($_, 'beta') foreach @tables;

###############################################################################

# Whatever was lost before: so many batches make up for it.
sub settle
{
	here(q{DO $$ BEGIN FOR i IN 1 .. 150 LOOP UPDATE gate SET v = v + 1 WHERE id = i % 50 + 10; COMMIT; END LOOP; END $$});
	synced();
	return;
}

# Two batches of two transactions.  The first one stands still at the gate until
# the second is as far as it comes by itself; what each of them does then is the
# second transaction of the one, and the first of the other.
sub meet
{
	my ($name, $first, $second, %expected) = @_;
	my $gate = $beta->session;
	my %was = map { $_ => $alpha->stat('beta', $_) } qw(batches_ahead batches_redone retries);
	my $log = -s $beta->logfile;
	my @second = ref $second ? @$second : ($second);
	my @first = ref $first ? @$first : ($first);

	settle();
	hold();
	here("UPDATE gate SET v = v + 1 WHERE id = 1");
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
		$beta->poll_ok("SELECT ($waiting) = 1", "$name: the second one waits for the first")
		  or die $alpha->describe('beta');
	}
	$gate->ok('COMMIT');
	$gate->quit;
	synced();
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
	is($beta->stat('alpha', 'coalesce(conflicts, 0)'), '0', 'none of this was taken for a conflict')
	  if $beta->stat('alpha', 'count(*)');
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
	my $was = $alpha->stat('beta', 'batches_ahead');
	my $retries = $alpha->stat('beta', 'retries');

	here(q{ALTER SERVER beta OPTIONS (SET lanes '3')});
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
	hold();
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

section 'sessions that are killed' => sub {
	set_config('mmrepl.batch_transactions', '2');
	foreach my $victim ('the batch that is waited for', 'the batch that waits')
	{
		my $gate = $beta->session;
		my $waiter = $waiting =~ s/count\(\*\)/pid/r;

		settle();
		hold();
		here('UPDATE gate SET v = v + 1 WHERE id = 100');
		backlog(300);
		$gate->ok('BEGIN; UPDATE gate SET v = v WHERE id = 100');
		release();
		$beta->poll_ok("SELECT ($waiting) > 0", 'a batch waits for the one before it');
		my $pid = $victim =~ /waits$/ ? there("$waiter LIMIT 1")
		  : there(q{SELECT pid FROM pg_stat_activity WHERE query LIKE '%mmrepl.apply%'
			AND wait_event IN ('transactionid', 'tuple') ORDER BY xact_start LIMIT 1});
		$beta->terminate($pid);
		$gate->ok('COMMIT');
		$gate->quit;
		judge("$victim was killed");
	}
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

is($alpha->queued('beta'), '0', 'nothing is left queued');
ok(!$_->log_contains(qr/PANIC|TRAP:|was terminated by signal(?! 3)/), 'no crash in the log of ' . $_->name)
  foreach ($alpha);
$_->stop('fast') foreach ($alpha, $beta);

done_testing();
