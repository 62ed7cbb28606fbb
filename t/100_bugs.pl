# Bugs that were found once and must not come back: the stream worker and the
# sessions that meet it.  Each part says what went wrong.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use IPC::Run;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my ($alpha, $beta) = MmreplCluster->new_pair(allows_streaming => 1);

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
	return $alpha->wait_caught_up($_[0] || 'beta');
}

sub set_config
{
	my ($node, $setting, $value) = @_;
	$node->safe_psql('postgres', "ALTER SYSTEM SET $setting = '$value'");
	$node->reload;
	$node->poll_query_until('postgres',
		"SELECT current_setting('$setting') = '$value'")
	  or die "$setting was not set";
	return;
}

# A session waits for an event of that type.
sub waits
{
	my ($node, $pid, $condition, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $node->poll_ok(
		"SELECT count(*) = 1 FROM pg_stat_activity WHERE pid = $pid AND $condition",
		$name);
}

# From now on commits of that node wait, unless they are local.  The server
# knows a little later than its sessions do: a session commits until it is held.
sub hold_commits
{
	my ($node) = @_;
	my $canary = $node->session;

	$canary->ok('CREATE TABLE canary (n int); CREATE TABLE freed ()');
	set_config($node, 'synchronous_standby_names', 'nobody');
	$canary->start(
		q{DO $$ BEGIN
			WHILE to_regclass('freed') IS NOT NULL LOOP
				INSERT INTO canary VALUES (1);
				COMMIT;
			END LOOP;
		  END $$});
	waits($node, $canary->pid, q{wait_event = 'SyncRep'}, 'commits are held');
	return $canary;
}

sub free_commits
{
	my ($node, $canary) = @_;

	$node->safe_psql('postgres',
		'SET synchronous_commit = local; DROP TABLE freed');
	set_config($node, 'synchronous_standby_names', '');
	$canary->finish;
	$canary->ok('DROP TABLE canary');
	$canary->quit;
	return;
}

my $started = 'SELECT pg_postmaster_start_time()';
my $worker = q{SELECT pid FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'};

$alpha->create_table_on_both($beta,
	'CREATE TABLE item (id int PRIMARY KEY, v text)');
$alpha->create_pair('item', 'beta');
here(q{INSERT INTO item SELECT g, 'start' FROM generate_series(1, 10) g});
synced();
my $start_time = here($started);

###############################################################################

# An error that the worker raised inside one of its own transactions left that
# transaction open: the next one ended the process by a signal, and with it
# every session of the server.
section 'the user mapping is dropped and made again' => sub {
	$alpha->poll_state('beta', 'streaming');
	foreach my $round (1 .. 5)
	{
		here('DROP USER MAPPING FOR CURRENT_USER SERVER beta');
		$alpha->poll_state('beta', 'retrying');
		$alpha->poll_ok(
			q{SELECT consecutive_failures > 1
			  FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'},
			'it fails more than once');
		my $user = there('SELECT current_user');
		here("CREATE USER MAPPING FOR CURRENT_USER SERVER beta OPTIONS (user '$user')");
		$alpha->poll_state('beta', 'streaming');
		here("INSERT INTO item VALUES (100 + $round, 'mapping')");
		synced();
	}
	$alpha->same_rows($beta, 'item');
	is(here($started), $start_time, 'the server was never restarted');
	ok(!$alpha->log_contains('terminated by signal'),
		'and no process was ended by a signal');
};

# A session that was terminated while it waited for the ordering lock left its
# request for it behind, to which the worker gave way for ever.
section 'a session that waits for the stream is terminated' => sub {
	my $id = 200;

	foreach my $end ('pg_terminate_backend', 'pg_cancel_backend')
	{
		foreach my $call (
			'SELECT mmrepl.deal_sync_err_rec(1)',
			q{SELECT mmrepl.skip('beta', max(ticket), 'not wanted')
			  FROM mmrepl.sync_err_rec})
		{
			my ($what) = $call =~ /mmrepl\.(\w+)/;
			here(q{SELECT mmrepl.pause('beta')});
			here("INSERT INTO item VALUES ($id + $_, 'waiting')")
			  foreach (1 .. 3);

			my $holder = $alpha->session;
			my $waiter = $alpha->session;
			$holder->ok('BEGIN');
			is($holder->ok('SELECT mmrepl.deal_sync_err_rec(1)'),
				't', "$what: a session delivers, and holds the stream");
			$waiter->start($call);
			waits(
				$alpha, $waiter->pid,
				q{wait_event_type = 'Lock'},
				'another one waits for it');
			here("SELECT $end(" . $waiter->pid . ')');
			waits($alpha, $holder->pid, 'NOT EXISTS (SELECT FROM pg_locks'
				  . ' WHERE NOT granted AND pid = ' . $waiter->pid . ')',
				"$end: it waits no more");
			$holder->ok('COMMIT');
			here(q{SELECT mmrepl.resume('beta')});
			synced();
			is(there("SELECT count(*) FROM item WHERE id > $id"),
				'3', "$end in $what: the stream goes on");
			$holder->quit;
			eval { $waiter->quit };
			$id += 10;
			there("DELETE FROM item WHERE id > 200");
		}
	}
	here('SET mmrepl.capture = off; DELETE FROM item WHERE id > 200');
	$alpha->same_rows($beta, 'item');
};

# The first call registered the stream and asked for a worker that then held the
# lock when the second call came, without looking at who waited.
section 'skip and deal right after the stream was made' => sub {
	my $port = $beta->port;
	my $user = there('SELECT current_user');

	foreach my $what ('deal', 'skip', 'skip of nothing')
	{
		my $number = $what eq 'deal' ? 1 : $what eq 'skip' ? 2 : 3;
		my $server = "fresh$number";
		my $setup = qq{
			SET statement_timeout = '20s';
			CREATE SERVER $server FOREIGN DATA WRAPPER mmrepl_fdw
			  OPTIONS (host '127.0.0.1', port '$port', dbname 'postgres');
			CREATE USER MAPPING FOR CURRENT_USER SERVER $server
			  OPTIONS (user '$user');
			SELECT mmrepl.create_pair('$server', '$server');
		};
		$alpha->create_table_on_both($beta,
			"CREATE TABLE $server (id int PRIMARY KEY)");
		my $session = $alpha->session;
		$session->ok($setup);
		if ($what eq 'deal')
		{
			$session->ok("INSERT INTO $server VALUES (1)");
			is($session->ok('SELECT mmrepl.deal_sync_err_rec(10)'),
				't', "$what returns");
			$session->ok("INSERT INTO $server VALUES (2)");
			is($session->ok('SELECT mmrepl.deal_sync_err_rec(10)'),
				't', 'and once more');
		}
		elsif ($what eq 'skip')
		{
			$session->ok("SELECT mmrepl.pause('$server')");
			$session->ok("INSERT INTO $server VALUES (1)");
			$session->ok("INSERT INTO $server VALUES (2)");
			foreach my $count (1 .. 2)
			{
				is( $session->ok(
						qq{SELECT mmrepl.skip('$server', min(ticket), 'early')
						   FROM mmrepl.sync_err_rec WHERE dst_server = '$server'}
					),
					'1',
					"$what returns, $count");
			}
			$session->ok("SELECT mmrepl.resume('$server')");
		}
		else
		{
			$session->ok("INSERT INTO $server VALUES (1)");
			foreach my $count (1 .. 2)
			{
				my ($out, $err) =
				  $session->run("SELECT mmrepl.skip('$server', 1, 'none')");
				like($err, qr/ERROR:\s+42704/, "$what returns, $count");
			}
		}
		$session->ok("INSERT INTO $server VALUES (3)");
		synced($server);
		is( there("SELECT string_agg(id::text, ' ' ORDER BY id) FROM $server"),
			$what eq 'deal' ? '1 2 3' : $what eq 'skip' ? '3' : '1 3',
			'the stream goes on');
		$session->ok("DROP SERVER $server CASCADE");
		$session->quit;
	}
};

# What pause() had put into shared memory stayed there when it was rolled back.
section 'pause and resume that are rolled back' => sub {
	here(q{BEGIN; SELECT mmrepl.pause('beta'); ROLLBACK});
	here(q{INSERT INTO item VALUES (300, 'not paused')});
	synced();
	$alpha->poll_state('beta', 'streaming');
	is(there('SELECT count(*) FROM item WHERE id = 300'),
		'1', 'the stream is running');

	here(q{BEGIN; SAVEPOINT s; SELECT mmrepl.pause('beta');
		   ROLLBACK TO s; INSERT INTO item VALUES (301, 'not paused'); COMMIT});
	synced();
	$alpha->poll_state('beta', 'streaming');

	here(q{SELECT mmrepl.pause('beta')});
	here(q{INSERT INTO item VALUES (302, 'paused')});
	my $session = $alpha->session;
	$session->ok('BEGIN');
	$session->ok(q{SELECT mmrepl.resume('beta')});
	$session->ok('ROLLBACK');
	$session->quit;
	$alpha->poll_state('beta', 'paused');
	here(q{SELECT mmrepl.resume('beta')});
	synced();
	$alpha->same_rows($beta, 'item');

	# The end of a prepared transaction called nobody: after ROLLBACK PREPARED it was paused.
	like($alpha->fails('postgres', q{BEGIN; SELECT mmrepl.pause('beta'); PREPARE TRANSACTION 'p'}),
		qr/0A000: cannot PREPARE a transaction that has steered delivery/,
		'a pause cannot be prepared');
	$alpha->poll_state('beta', 'streaming');

	# The worker, called to look at its row for another reason, found the old value
	# there and took a pause back that was about to be committed: what was committed
	# after pause() had returned could still be sent.
	my $pauser = $alpha->session;
	$pauser->ok('BEGIN');
	$pauser->ok(q{SELECT mmrepl.pause('beta')});
	here(q{SELECT mmrepl.alter_pair('item', 'beta', conflict_resolution => 'apply_remote')});
	here(q{INSERT INTO item VALUES (303, 'paused')});
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '500 ms')}),
		'f', 'a pause holds while other configuration is read');
	is(there('SELECT count(*) FROM item WHERE id = 303'), '0', 'nothing is sent');
	is($alpha->state('beta'), 'paused', 'and it is shown');
	$pauser->ok('COMMIT');
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '100 ms')}), 'f', 'then it stays so');
	$pauser->ok(q{SELECT mmrepl.resume('beta')});
	$pauser->quit;
	synced();
	$alpha->same_rows($beta, 'item');
};

# The peer's savepoints were counted by the levels of the local subtransactions
# at the time of the flush: with a trigger's own block in between they differed,
# and the session ended with FATAL.
section 'exception blocks, triggers, and a peer that refuses' => sub {
	$alpha->create_table_on_both(
		$beta, q{
		CREATE TABLE strict (id int PRIMARY KEY, v text);
		CREATE TABLE note (id serial PRIMARY KEY, v text);
	});
	there(
		q{ALTER TABLE strict ADD CONSTRAINT good CHECK (v <> 'bad');
		   ALTER TABLE note ADD CONSTRAINT good CHECK (v <> 'bad note')});
	$alpha->create_pair($_, 'beta', q{mode => 'sync'})
	  foreach ('strict', 'note');
	here(
		q{
		CREATE FUNCTION take_note() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			BEGIN
				INSERT INTO note (v) VALUES (NEW.v || ' note');
				IF NEW.v = 'raise' THEN
					RAISE division_by_zero;
				END IF;
			EXCEPTION WHEN division_by_zero THEN
				INSERT INTO note (v) VALUES ('raised');
			END;
			RETURN NULL;
		END $$;
		CREATE TRIGGER a_first AFTER INSERT ON strict
		  FOR EACH ROW EXECUTE FUNCTION take_note();
		CREATE TRIGGER z_last AFTER UPDATE ON strict
		  FOR EACH ROW EXECUTE FUNCTION take_note();
		CREATE FUNCTION try(sql text) RETURNS text LANGUAGE plpgsql AS $$
		BEGIN
			BEGIN
				EXECUTE sql;
			EXCEPTION WHEN check_violation THEN
				RETURN 'refused';
			END;
			RETURN 'done';
		END $$;
	});

	my $session = $alpha->session;
	my ($out, $err) = $session->run(q{INSERT INTO strict VALUES (1, 'bad')});
	like($err, qr/ERROR:\s+23514/, 'a plain statement: an ordinary error');
	unlike($err, qr/FATAL|PANIC|server closed/, 'not a fatal one');
	is($session->ok(q{SELECT try($$INSERT INTO strict VALUES (2, 'bad')$$)}),
		'refused', 'in an exception block it is caught');
	is($session->ok(q{SELECT try($$INSERT INTO strict VALUES (3, 'fine')$$)}),
		'done', 'the session goes on');
	is($session->ok(q{SELECT try($$INSERT INTO strict VALUES (4, 'raise')$$)}),
		'done', q{an error in the trigger's own block});
	$session->ok('BEGIN');
	is($session->ok(q{SELECT try($$INSERT INTO strict VALUES (5, 'fine')$$)}),
		'done', 'in a transaction: the first');
	is( $session->ok(
			q{SELECT try($$INSERT INTO strict VALUES (6, 'fine'), (7, 'bad')$$)}
		),
		'refused',
		'the second is refused');
	is( $session->ok(
			q{SELECT try($$SELECT try('UPDATE strict SET v = ''raise'' WHERE id = 3')$$)}
		),
		'done',
		'the third is nested');
	$session->ok('SAVEPOINT s');
	($out, $err) = $session->run(q{UPDATE strict SET id = 8, v = 'bad' WHERE id = 5});
	like($err, qr/ERROR:\s+23514/, 'the fourth is refused');
	$session->ok('ROLLBACK TO s');
	is($session->ok(q{SELECT try($$INSERT INTO strict VALUES (9, 'fine')$$)}),
		'done', 'the fifth');
	$session->ok('COMMIT');
	is( $session->ok('SELECT pg_backend_pid()'),
		$session->pid, 'it is still the same session');
	$session->quit;
	is( here(q{SELECT string_agg(id || v, ' ' ORDER BY id) FROM strict}),
		'3raise 4raise 5fine 9fine', 'here is what succeeded');
	synced();
	$alpha->same_rows($beta, $_) foreach ('strict', 'note');
};

# COMMIT PREPARED registered an exit callback anew each time, until there was no
# room; and what it committed was lost to the worker when its ticket was higher
# than one in flight at that time.
section 'COMMIT PREPARED' => sub {
	my $session = $alpha->session;
	foreach my $id (400 .. 429)
	{
		$session->ok(
			"BEGIN; INSERT INTO item VALUES ($id, 'prepared'); PREPARE TRANSACTION 'p$id'"
		);
		my ($out, $err) = $session->run("COMMIT PREPARED 'p$id'");
		is($err, '', "COMMIT PREPARED $id") if $err ne '' || $id == 429;
	}
	my ($out, $err) = $session->run(q{COMMIT PREPARED 'none'});
	like($err, qr/42704/, 'of one that does not exist');
	$session->quit;
	synced();
	is(there('SELECT count(*) FROM item WHERE id BETWEEN 400 AND 429'),
		'30', 'all of them arrive');
	ok(!$alpha->log_contains('before_shmem_exit'),
		'nothing about exit callbacks is in the log');

	# The order of arrival, by a trigger that fires at the receiver.
	there(
		q{
		CREATE TABLE arrival (n serial, id int);
		CREATE FUNCTION arrive() RETURNS trigger LANGUAGE plpgsql AS
		  'BEGIN INSERT INTO public.arrival (id) VALUES (NEW.id); RETURN NULL; END';
		CREATE TRIGGER arrive AFTER INSERT ON item
		  FOR EACH ROW EXECUTE FUNCTION arrive();
		ALTER TABLE item ENABLE ALWAYS TRIGGER arrive;
	});
	my $local = 'SET synchronous_commit = local';
	here(
		qq{BEGIN; INSERT INTO item VALUES (500, 'prepared before');
		   PREPARE TRANSACTION 'before'});
	here(q{INSERT INTO item VALUES (501, 'passes it')});
	synced();
	my $canary = hold_commits($alpha);
	my $held = $alpha->session;
	$held->ok('SET synchronous_commit = on');
	$held->start(q{INSERT INTO item VALUES (502, 'held')});
	waits(
		$alpha, $held->pid,
		q{wait_event = 'SyncRep'},
		'a transaction is in flight');
	here(
		qq{$local; BEGIN; INSERT INTO item VALUES (503, 'prepared after');
		   PREPARE TRANSACTION 'after'});
	here(qq{$local; INSERT INTO item VALUES (504, 'between')});
	here(qq{$local; COMMIT PREPARED 'after'});
	here(qq{$local; COMMIT PREPARED 'before'});
	here(qq{$local; INSERT INTO item VALUES (505, 'last')});
	$beta->poll_ok('SELECT count(*) = 1 FROM item WHERE id = 500',
		'what was prepared before it does not wait for it');
	is(there('SELECT count(*) FROM item WHERE id > 501'),
		'0', 'what comes after it does');
	free_commits($alpha, $canary);
	($out, $err) = $held->finish;
	is($err, '', 'it ends');
	$held->quit;
	synced();
	is( there(q{SELECT string_agg(id::text, ' ' ORDER BY n) FROM arrival}),
		'501 500 502 503 504 505', 'then all of them arrive, in order');
	$alpha->same_rows($beta, 'item');
	$alpha->poll_state('beta', 'streaming');
	there('DROP TRIGGER arrive ON item');
};

# The narrowing down of a batch waited for the next attempt at each step.
section 'a refused transaction in the middle of a batch' => sub {
	there(q{ALTER TABLE item ADD CONSTRAINT good CHECK (v <> 'bad')});
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	set_config($alpha, 'mmrepl.retry_max_delay', '1h');
	set_config($alpha, 'mmrepl.retry_min_delay', '30min');
	here(
		join(';',
			map { "BEGIN; INSERT INTO item VALUES ($_, '"
				  . ($_ == 1077 ? 'bad' : 'good') . "'); COMMIT" }
			  (1001 .. 1200)));
	my $before = Time::HiRes::time();
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->poll_ok(
		q{SELECT state = 'blocked' FROM mmrepl.pg_stat_mmrepl
		  WHERE server = 'beta'}, 'it is found');
	cmp_ok(Time::HiRes::time() - $before, '<', 15, 'at once');
	is( there('SELECT count(*), max(id) FROM item WHERE id > 1000'),
		'76|1076', 'what was before it has arrived');
	is( here(
			q{SELECT r.dst_query ~ '1077' FROM mmrepl.sync_err_rec r
			  WHERE ticket = (SELECT blocked_ticket FROM mmrepl.pg_stat_mmrepl
							  WHERE server = 'beta')}),
		't',
		'and it is the one that is said to be refused');
	there('ALTER TABLE item DROP CONSTRAINT good');
	here(q{SELECT mmrepl.retry_now('beta')});
	synced();
	set_config($alpha, 'mmrepl.retry_min_delay', '100ms');
	set_config($alpha, 'mmrepl.retry_max_delay', '1s');
	$alpha->same_rows($beta, 'item');
};

# A worker that ended after the peer's commit and before its own book-keeping
# left the transactions counted as waiting, for ever.
section 'a worker ends between commit and book-keeping' => sub {
	my $empty =
	  q{SELECT queue_transactions = 0 AND queue_changes = 0 AND queue_bytes = 0
		AND oldest_queued_at IS NULL
		FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'};

	# The peer's commit is held until the worker is gone.
	$alpha->poll_state('beta', 'streaming');
	my $canary = hold_commits($beta);
	here(q{INSERT INTO item VALUES (2000, 'held'), (2001, 'held')});
	$beta->poll_ok(
		q{SELECT count(*) > 0 FROM pg_stat_activity
		  WHERE wait_event = 'SyncRep' AND client_addr IS NOT NULL},
		'the peer is committing');
	$alpha->terminate(here($worker));
	free_commits($beta, $canary);
	synced();
	$alpha->poll_ok($empty, 'nothing is counted as waiting')
	  || diag($alpha->describe('beta'));

	# The same by chance, many times, while three clients write.
	my ($out, $err) = ('', '');
	my $script = $alpha->basedir . '/load.sql';
	append_to_file($script, "UPDATE item SET v = random() WHERE id = :client_id + 1;\n");
	my $load = IPC::Run::start(
		[
			'pgbench', '-n', '-c', '3', '-T', 4 * $MmreplCluster::timeout, '-f', $script,
			$alpha->connstr('postgres')
		],
		'<', \undef, '>', \$out, '2>', \$err,
		IPC::Run::timeout(4 * $MmreplCluster::timeout));
	my $blows = 0;
	my $until = Time::HiRes::time() + 4;
	while ($blows < 5 || Time::HiRes::time() < $until)
	{
		$load->pump_nb;
		$load->pumpable or die "the load ended: $err";
		my $pid = here($worker);
		next unless $pid =~ /^\d+$/;
		here("SELECT pg_terminate_backend($pid)");
		$blows++;
		$alpha->poll_query_until('postgres',
			"SELECT pid <> $pid AND state <> 'starting' FROM mmrepl.pg_stat_mmrepl"
			  . q{ WHERE server = 'beta'})
		  or die 'the worker did not come back';
	}
	$load->signal('TERM');
	$load->finish;
	unlike($err, qr/ERROR|FATAL|aborted/, 'no client of the load failed');
	synced();
	$alpha->poll_ok($empty, 'nothing is counted as waiting')
	  || diag($alpha->describe('beta'));
	$alpha->same_rows($beta, 'item');
};

is(here($started), $start_time, 'the server was never restarted');
foreach my $node ($alpha, $beta)
{
	ok( !$node->log_contains(qr/PANIC|TRAP:|terminated by signal/),
		$node->name . ': no crash in the log');
}

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
