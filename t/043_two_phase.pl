# Two-phase commit with the peer: prepared there before the local commit, and
# ended there by the session, or else by the worker, whatever dies in between.
# Every section ends with both sides equal, nothing prepared, nothing in doubt.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my ($alpha, $beta) = MmreplCluster->new_pair(conf => <<'EOC');
mmrepl.two_phase = 'on'
mmrepl.sync_timeout = '1min'
mmrepl.recovery_interval = '2s'
autovacuum = off
wal_level = replica
max_wal_senders = 2
EOC
my $gamma = MmreplCluster->create('gamma', conf => 'max_prepared_transactions = 0');
my $prepared = q{SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE 'mmrepl\_%'};

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

sub there
{
	return $beta->safe_psql('postgres', $_[0]);
}

sub settled
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$alpha->wait_caught_up('beta');
	$beta->poll_ok("SELECT ($prepared) = 0", 'nothing is prepared at the peer')
	  || diag(there('SELECT * FROM pg_prepared_xacts'));
	$alpha->poll_ok('SELECT count(*) = 0 FROM mmrepl.in_doubt', 'nothing is in doubt')
	  || diag(here('SELECT * FROM mmrepl.in_doubt'));
	$alpha->same_rows($beta, 'item');
	return;
}

# A query that is true here sooner or later.
sub await
{
	my ($node, $query) = @_;
	$node->poll_query_until('postgres', $query) or die "never true: $query";
	return;
}

# Local commits wait behind their commit record: visible to nobody, not ended.
sub hold_commits
{
	my ($names) = @_;
	here("ALTER SYSTEM SET synchronous_standby_names = '$names'");
	$alpha->reload;
	await($alpha, "SELECT current_setting('synchronous_standby_names') = '$names'");
	here('CHECKPOINT'); # it is the checkpointer that makes the setting hold
	return;
}

sub waits_for_standby
{
	my ($session) = @_;
	await($alpha,
		'SELECT count(*) = 1 FROM pg_stat_activity WHERE pid = '
		  . $session->pid . q{ AND wait_event = 'SyncRep'});
	return;
}

# Ends like the power.
sub crash
{
	my ($node) = @_;
	$node->stop('immediate');
	$node->start;
	return;
}

$alpha->create_table_on_both($beta, 'CREATE TABLE item (id int PRIMARY KEY, v text)');
$alpha->create_pair('item', 'beta', q{mode => 'sync'});
here(q{INSERT INTO item SELECT g, 'start' FROM generate_series(1, 10) g});

###############################################################################

section 'the usual ends' => sub {
	my $log = -s $beta->logfile;

	there(q{ALTER SYSTEM SET log_statement = 'all'});
	$beta->reload;
	await($beta, q{SELECT current_setting('log_statement') = 'all'});

	my $session = $alpha->session;
	$session->ok(q{INSERT INTO item VALUES (11, 'committed')});
	is(there('SELECT v FROM item WHERE id = 11'),
		'committed', 'committed on both sides when COMMIT returns');
	my $text = PostgreSQL::Test::Utils::slurp_file($beta->logfile, $log);
	like($text, qr/PREPARE TRANSACTION 'mmrepl_[-0-9a-f]{36}_1_\d+'/, 'it was prepared there');
	like($text, qr/COMMIT PREPARED 'mmrepl_/, 'and committed in a second step');
	there('ALTER SYSTEM RESET log_statement');
	$beta->reload;

	$session->ok('BEGIN');
	$session->ok(q{INSERT INTO item VALUES (12, 'rolled back')});
	$session->ok('ROLLBACK');
	$session->ok('BEGIN');
	$session->ok(q{INSERT INTO item VALUES (13, 'kept')});
	$session->ok('SAVEPOINT a');
	$session->ok(q{INSERT INTO item VALUES (14, 'undone')});
	$session->ok('ROLLBACK TO a');
	$session->ok(q{UPDATE item SET v = 'after the savepoint' WHERE id = 1});
	$session->ok('COMMIT');
	$session->ok(q{BEGIN; SAVEPOINT a; DELETE FROM item WHERE id = 2; ROLLBACK TO a; COMMIT});
	is(there('SELECT string_agg(id::text, $$ $$ ORDER BY id) FROM item WHERE id > 10'),
		'11 13', 'rollback and savepoints');

	my ($out, $err) = $session->run(
		q{BEGIN; INSERT INTO item VALUES (15, 'x'); PREPARE TRANSACTION 'mine'});
	like($err, qr/ERROR:\s+0A000: cannot PREPARE a transaction that was replicated synchronously/,
		'a prepared transaction of the user is refused');
	$session->run('ROLLBACK');
	$session->quit;
	settled();
	is(here(q{SELECT sync_failures FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'}),
		'0', 'and no inline transaction was left to the worker');
};

section 'the peer refuses to prepare' => sub {
	there(
		q{CREATE TABLE parent (id int PRIMARY KEY);
		ALTER TABLE item ADD CONSTRAINT never CHECK (v <> 'never');
		CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS
		$$BEGIN IF NEW.v = 'late' THEN RAISE 'too late' USING ERRCODE = 'check_violation'; END IF;
		RETURN NEW; END$$;
		CREATE CONSTRAINT TRIGGER late AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION late();
		ALTER TABLE item ENABLE ALWAYS TRIGGER late});
	my $err = $alpha->fails('postgres', q{INSERT INTO item VALUES (20, 'late')});
	like($err, qr/ERROR:\s+23514: too late/, 'a deferred trigger there is the error of COMMIT');
	like($err, qr/PREPARE TRANSACTION/, 'whose context names the command');
	is(here('SELECT count(*) FROM item WHERE id = 20'), '0', 'nothing is committed here');

	# All places are taken, by somebody else.
	there(join '', map { "BEGIN; CREATE TABLE p$_ (); PREPARE TRANSACTION 'p$_';" } 1 .. 10);
	$err = $alpha->fails('postgres', q{INSERT INTO item VALUES (21, 'no room')});
	like($err, qr/ERROR:\s+53200: maximum number of prepared transactions reached/,
		'no place is left there: an error that may pass');
	there(join '', map { "ROLLBACK PREPARED 'p$_';" } 1 .. 10);
	here(q{INSERT INTO item VALUES (22, 'room')});
	settled();
};

section 'peers that allow none' => sub {
	$alpha->add_peer($gamma);
	$alpha->create_table_on_both($gamma, 'CREATE TABLE other (id int PRIMARY KEY, v text)');
	$alpha->create_pair('other', 'gamma', q{mode => 'sync'});

	my $err = $alpha->fails('postgres', q{INSERT INTO other VALUES (1, 'on')});
	like($err, qr/ERROR:\s+55000: server "gamma" does not allow prepared transactions/,
		q{'on' requires it});
	like($err, qr/HINT:.*max_prepared_transactions/, 'the hint says what to set');
	here(
		q{SET mmrepl.two_phase = 'auto';
		BEGIN; INSERT INTO other VALUES (1, 'auto'); INSERT INTO item VALUES (31, 'auto'); COMMIT});
	is($gamma->safe_psql('postgres', 'SELECT v FROM other'),
		'auto', q{'auto' goes on without where it is not allowed});
	is(there('SELECT v FROM item WHERE id = 31'), 'auto', 'and with it where it is');

	# One peer refuses: the other one, prepared already or not, rolls back.
	$gamma->safe_psql('postgres', q{ALTER TABLE other ADD CHECK (v <> 'bad')});
	here(q{ALTER SYSTEM SET mmrepl.two_phase = 'auto'});
	$alpha->reload;
	await($alpha, q{SELECT current_setting('mmrepl.two_phase') = 'auto'});
	$err = $alpha->fails('postgres',
		q{SET mmrepl.sync_flush = 'commit';
		BEGIN; INSERT INTO item VALUES (32, 'good'); INSERT INTO other VALUES (2, 'bad'); COMMIT});
	like($err, qr/ERROR:\s+23514/, 'one of two servers refuses');
	is(there('SELECT count(*) FROM item WHERE id = 32'), '0', 'the other one has nothing');
	$alpha->same_rows($gamma, 'other');
	here(q{ALTER SYSTEM RESET mmrepl.two_phase});
	$alpha->reload;
	await($alpha, q{SELECT current_setting('mmrepl.two_phase') = 'on'});
	settled();
};

section 'crash after the commit record' => sub {
	hold_commits('nobody');
	my $session = $alpha->session;
	$session->start(q{INSERT INTO item VALUES (40, 'recorded')});
	waits_for_standby($session);
	is(there($prepared), '1', 'prepared at the peer, the local commit is on its way');

	# A look comes by meanwhile: it must not decide.
	$alpha->poll_ok(
		q{SELECT state = 'running' AND kind = 'two-phase' AND since < clock_timestamp()
		  FROM mmrepl.in_doubt}, 'the worker has seen it, and shows it as running');
	is(there($prepared), '1', 'it leaves alone what has not ended here');
	$alpha->stop('immediate');
	$alpha->append_conf('postgresql.conf', q{synchronous_standby_names = ''});
	unlink $alpha->data_dir . '/postgresql.auto.conf';
	$alpha->append_conf('postgresql.auto.conf', '');
	is(there('SELECT count(*) FROM item WHERE id = 40'), '0', 'nobody sees it there');
	$alpha->start;
	eval { $session->quit };
	settled();
	is(there('SELECT v FROM item WHERE id = 40'), 'recorded', 'recovery has committed it');
};

# A session that has prepared the row's transaction at the peer and cannot write its
# commit record, behind another one (returned first) that it waits for.
sub held_between_the_two
{
	my ($id, $v) = @_;
	my $first = $alpha->session;
	my $second = $alpha->session;

	# NOTIFY makes committers wait for each other between PRE_COMMIT and commit record.
	hold_commits('nobody');
	$first->start(qq{BEGIN; CREATE TABLE made_$id (); NOTIFY turn; COMMIT});
	waits_for_standby($first);
	$second->ok('BEGIN');
	$second->ok("INSERT INTO item VALUES ($id, '$v')");
	$second->ok('NOTIFY turn');
	$second->start('COMMIT');
	await($beta, "SELECT ($prepared) = 1");
	return ($first, $second);
}

section 'crash before the commit record' => sub {
	my ($first, $second) = held_between_the_two(50, 'not recorded');

	$alpha->stop('immediate');
	unlink $alpha->data_dir . '/postgresql.auto.conf';
	$alpha->append_conf('postgresql.auto.conf', '');
	$alpha->start;
	eval { $_->quit } foreach ($first, $second);
	settled();
	is(here('SELECT count(*) FROM item WHERE id = 50'), '0', 'it is not committed here');
	is(there('SELECT count(*) FROM item WHERE id = 50'), '0', 'recovery has rolled it back');
};

section 'terminated between the two' => sub {
	my ($first, $second) = held_between_the_two(55, 'terminated');
	my $worker = $alpha->stat('beta', 'pid');

	die 'no worker' if $worker !~ /^\d+$/;
	kill 'STOP', $worker;
	my $alone = eval {
		$alpha->terminate($second->pid);
		$beta->poll_query_until('postgres', "SELECT ($prepared) = 0");
	};
	kill 'CONT', $worker;
	ok($alone, 'the session itself has rolled it back, for the worker stands still');
	hold_commits('');
	eval { $_->quit } foreach ($first, $second);
	settled();
	is(there('SELECT count(*) FROM item WHERE id = 55'), '0', 'and it is nowhere');
};

section 'the peer dies with it prepared' => sub {
	hold_commits('nobody');
	my $session = $alpha->session;
	$session->start(q{INSERT INTO item VALUES (60, 'outlives the peer')});
	waits_for_standby($session);
	is(there($prepared), '1', 'prepared at the peer');
	# What the worker has found there is shown once, not beside what the queue has.
	$alpha->poll_ok(q{SELECT state = 'running' FROM mmrepl.in_doubt}, 'the worker has seen it');
	$beta->stop('immediate');
	hold_commits('');
	my ($out, $err) = $session->finish;
	unlike($err, qr/ERROR/, 'COMMIT returns: committed here');
	$alpha->poll_ok(
		q{SELECT server = 'beta' AND kind = 'two-phase' AND state = 'committed'
			AND gid ~ '^mmrepl_' AND age > '0'
		  FROM mmrepl.in_doubt}, 'in doubt, and shown so');
	here('CREATE ROLE watcher LOGIN IN ROLE pg_monitor; CREATE ROLE stranger LOGIN');
	is( $alpha->safe_psql('postgres', 'SELECT count(*) FROM mmrepl.in_doubt',
			extra_params => [ '-U', 'watcher' ]), '1', 'to pg_monitor too');
	is( $alpha->safe_psql('postgres', 'SELECT count(*) FROM mmrepl.in_doubt',
			extra_params => [ '-U', 'stranger' ]), '0', 'and to nobody else');
	my $late = $alpha->fails('postgres', q{INSERT INTO item VALUES (61, 'overtakes')});
	like($late, qr/ERROR/, 'no later transaction goes before it');
	$beta->start;
	settled();
	is(there('SELECT v FROM item WHERE id = 60'), 'outlives the peer', 'the worker has committed it');
	$session->quit;
};

section 'a prepare that comes late' => sub {
	my $session = $alpha->session;
	$session->ok(q{SET mmrepl.sync_timeout = '3s'});
	$session->ok('BEGIN');
	$session->ok(q{INSERT INTO item VALUES (70, 'late')});
	my $peer = there(
		q{SELECT pid FROM pg_stat_activity WHERE client_addr IS NOT NULL
		  AND state = 'idle in transaction'});
	die "not one session: $peer" if $peer !~ /^\d+$/;
	kill 'STOP', $peer;
	my ($out, $err) = $session->run('COMMIT');
	like($err, qr/ERROR:\s+MM008: server "beta" did not answer in time/, 'the peer is silent');
	is(here('SELECT count(*) FROM item WHERE id = 70'), '0', 'it is rolled back here');
	kill 'CONT', $peer;
	$session->quit;
	await($beta, "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $peer");
	settled();
	is(there('SELECT count(*) FROM item WHERE id = 70'), '0', 'and there, when it has come');
};

section 'a prepared transaction in the way of the worker' => sub {
	# It holds a row that a batch on its way waits for: ended over another connection.
	$alpha->create_table_on_both($beta, 'CREATE TABLE async (id int PRIMARY KEY, v text)');
	$alpha->create_pair('async', 'beta');
	here(q{INSERT INTO async VALUES (1, 'start')});
	$alpha->wait_caught_up('beta');
	my $node = here('SELECT mmrepl.node_id()');
	my $xid = here('SELECT pg_current_xact_id()'); # committed nothing: aborted is as good
	$xid = here('BEGIN; SELECT pg_current_xact_id(); ROLLBACK');
	my $stream = $alpha->stat('beta', 'stream');
	there(
		"BEGIN; UPDATE async SET v = 'held'; PREPARE TRANSACTION 'mmrepl_${node}_${stream}_$xid'");
	here(q{UPDATE async SET v = 'moves on'});
	settled();
	is(there('SELECT v FROM async'), 'moves on', 'the worker got through');
};

section 'nobody guesses' => sub {
	my $node = here('SELECT mmrepl.node_id()');
	my $stream = $alpha->stat('beta', 'stream');
	my $log = -s $alpha->logfile;
	is(here(q{SELECT pg_xact_status('300') IS NULL}), 't', 'the log of old transactions is gone');
	there("BEGIN; CREATE TABLE q$_ (); PREPARE TRANSACTION 'mmrepl_${node}_${stream}_$_'")
	  foreach (here('SELECT pg_current_xact_id()'), 1_000_000_000, 300);
	$alpha->poll_ok(q{SELECT count(*) = 3 FROM mmrepl.in_doubt WHERE state = 'unknown'},
		'a number that was not used, one without a record, one of which there is no log');
	$alpha->wait_for_log(qr/WARNING:  mmrepl: prepared transaction "mmrepl_\S+" at server "beta" cannot be ended/,
		$log);
	is(there($prepared), '3', 'they are left alone');
	like(
		$alpha->fails('postgres', q{BEGIN; DELETE FROM mmrepl.pair; DROP USER MAPPING FOR CURRENT_USER SERVER beta; DROP SERVER beta}),
		qr/DETAIL:\s+Transactions of this database that are prepared there: 3/,
		'the server is not dropped as long as they are there');
	my $refused = $alpha->fails('postgres', q{DROP EXTENSION mmrepl_bgw});
	like($refused, qr/ERROR:\s+2BP01: cannot drop extension mmrepl_bgw while transactions/,
		'nor is the extension');
	like($refused, qr/DETAIL:.*mmrepl_${node}_${stream}_1000000000/s, '... the gids are named');
	foreach my $command ('DROP EXTENSION mmrepl_bgw CASCADE', 'DROP SERVER beta CASCADE',
		'SELECT mmrepl.adopt_node(force => true)')
	{
		my (undef, undef, $warning) = $alpha->psql('postgres', "BEGIN; $command; ROLLBACK");
		like($warning, qr/WARNING:.*(?:are left|stay prepared) at.*HINT:.*ROLLBACK PREPARED/s, "$command warns");
	}
	there("ROLLBACK PREPARED '$_'")
	  foreach (split /\n/, there(q{SELECT gid FROM pg_prepared_xacts}));
	settled();

	my $err = $alpha->fails('postgres',
		q{BEGIN; INSERT INTO async VALUES (5, 'mine'); PREPARE TRANSACTION 'mmrepl_mine'});
	like($err, qr/ERROR:\s+42939: transaction identifiers that begin with "mmrepl_" are reserved/,
		'and nobody else takes such names for changes that are captured');
};

section 'skipped while it is prepared there' => sub {
	hold_commits('nobody');
	my $session = $alpha->session;
	$session->start(q{INSERT INTO item VALUES (83, 'skipped')});
	waits_for_standby($session);
	$beta->stop('immediate');
	hold_commits('');
	$session->finish;
	$session->quit;
	$alpha->poll_ok(q{SELECT count(*) = 1 FROM mmrepl.in_doubt}, 'in doubt');
	my $log = -s $alpha->logfile;
	here(q{SELECT mmrepl.skip('beta', ticket, 'not wanted') FROM mmrepl.in_doubt});
	$beta->start;
	$beta->poll_ok("SELECT ($prepared) = 0", 'the peer is rid of it');
	$alpha->wait_for_log(qr/prepared transaction "mmrepl_\S+" at server "beta" was rolled back\n.*DETAIL:.*skip\(\)/,
		$log);
	is(there('SELECT count(*) FROM item WHERE id = 83'), '0', 'and does not have it: it was skipped');
	here(q{BEGIN; SET LOCAL mmrepl.mode = 'async'; DELETE FROM item WHERE id = 83; COMMIT});
	settled();
};

# skip() is not committed yet: the peer must neither get what it drops nor lose it.
section 'a look while skip() is under way' => sub {
	hold_commits('nobody');
	my $session = $alpha->session;
	$session->start(q{INSERT INTO item VALUES (84, 'skipped')});
	waits_for_standby($session);
	$beta->stop('immediate');
	hold_commits('');
	$session->finish;
	$alpha->poll_ok(q{SELECT count(*) = 1 FROM mmrepl.in_doubt}, 'in doubt');
	$session->ok('BEGIN');
	$session->ok(q{SELECT mmrepl.skip('beta', ticket, 'not wanted') FROM mmrepl.in_doubt});
	$beta->append_conf('postgresql.conf', q{log_statement = 'all'});
	my $log = -s $beta->logfile;
	$beta->start;
	# At the second look, what the first one asked for has been done.
	my $looks;
	for (my $until = time() + $MmreplCluster::timeout; time() < $until;)
	{
		$looks = () = PostgreSQL::Test::Utils::slurp_file($beta->logfile, $log) =~
		  /LEFT JOIN pg_prepared_xacts/g;
		last if $looks >= 2;
		Time::HiRes::usleep(50_000);
	}
	cmp_ok($looks, '>=', 2, 'the worker has looked, and has looked again');
	is(there($prepared), '1', 'it is prepared there still');
	$beta->append_conf('postgresql.conf', q{log_statement = 'none'});
	$beta->reload;
	$session->ok('COMMIT');
	$beta->poll_ok("SELECT ($prepared) = 0", 'afterwards the peer is rid of it');
	is(there('SELECT count(*) FROM item WHERE id = 84'), '0', 'and does not have it');
	here(q{BEGIN; SET LOCAL mmrepl.mode = 'async'; DELETE FROM item WHERE id = 84; COMMIT});
	settled();
	$session->quit;
};

section 'a queue that is given up with it' => sub {
	hold_commits('nobody');
	my $session = $alpha->session;
	$session->start(q{INSERT INTO item VALUES (85, 'given up')});
	waits_for_standby($session);
	$beta->stop('immediate');
	hold_commits('');
	$session->finish;
	here(q{ALTER SYSTEM SET mmrepl.max_queue_size = '64kB'});
	$alpha->reload;
	await($alpha, q{SELECT current_setting('mmrepl.max_queue_size') = '64kB'});
	here("INSERT INTO async SELECT g, repeat('x', 100) FROM generate_series($_ * 500, $_ * 500 + 400) g")
	  foreach 1 .. 4;
	$alpha->poll_state('beta', 'needs resync');
	is(here(q{SELECT kind, state, next_step FROM mmrepl.in_doubt}),
		'two-phase|committed|the worker commits the prepared transaction',
		'what was in doubt is still shown');
	here('ALTER SYSTEM RESET mmrepl.max_queue_size');
	$alpha->reload;
	await($alpha, q{SELECT current_setting('mmrepl.max_queue_size') <> '64kB'});
	$beta->start;
	here(q{SELECT mmrepl.resync('beta')});
	settled();
	is(there('SELECT v FROM item WHERE id = 85'), 'given up', 'it came with the copy of its table');
	$alpha->same_rows($beta, 'async');
	$session->quit;
};

section 'the worker dies, and by hand' => sub {
	hold_commits('nobody');
	my $session = $alpha->session;
	$session->start(q{INSERT INTO item VALUES (80, 'no worker')});
	waits_for_standby($session);
	here(q{SET synchronous_commit = local; SELECT mmrepl.pause('beta')});
	$alpha->terminate($alpha->stat('beta', 'pid'));
	$beta->close_to_peers;
	hold_commits('');
	$session->finish;
	$beta->open_to_peers;
	is(here('SELECT mmrepl.deal_sync_err_rec(10)'), 't', 'drained by hand');
	is(there('SELECT v FROM item WHERE id = 80'), 'no worker', 'after it was committed there');
	is(there($prepared), '0', 'nothing is prepared');
	here(q{SELECT mmrepl.resume('beta')});
	settled();
	$session->quit;
};

section 'the last agent in doubt' => sub {
	my $session = $alpha->session;
	$session->ok(q{SET mmrepl.two_phase = 'off'});
	$session->ok('BEGIN');
	$session->ok(q{INSERT INTO item VALUES (90, 'last agent')});
	hold_commits('nobody');
	$session->start('COMMIT');
	waits_for_standby($session);
	$beta->stop('immediate');
	hold_commits('');
	$session->finish;
	$alpha->poll_ok(
		q{SELECT kind = 'last agent' AND state = 'committed' AND gid IS NULL AND ticket > 0
		  FROM mmrepl.in_doubt}, 'in doubt, and shown so');
	$beta->start;
	settled();
	is(there('SELECT v FROM item WHERE id = 90'), 'last agent', 'the worker has replayed it');
	$session->quit;
};

done_testing();
