# A server that needs a resync while a transaction is prepared there: it is ended as
# it was ended here, although nothing else is delivered.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => "autovacuum = off\nmmrepl.rotate_size = '64kB'\n"
	  . "mmrepl.max_queue_size = '128kB'\nmmrepl.recovery_interval = '2s'\n"
	  . "wal_level = replica\nmax_wal_senders = 2");

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

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE item (id int PRIMARY KEY, v text);
	CREATE TABLE other (id int PRIMARY KEY, v text);
});
$alpha->create_pair('item', 'beta');
$alpha->create_pair('other', 'beta', q{mode => 'sync'});
$alpha->make_load('item');
here(q{INSERT INTO item VALUES (1, 'start')});
synced();

# The record that tells what becomes of it is in the queue that was given up.
section 'prepared at the peer' => sub {
	my $prepared = 'SELECT count(*) FROM pg_prepared_xacts';
	my $session = $alpha->session;

	$session->ok(q{SET mmrepl.two_phase = 'on'});
	$alpha->append_conf('postgresql.conf', q{synchronous_standby_names = 'nobody'});
	$alpha->reload;
	$alpha->poll_query_until('postgres',
		q{SELECT current_setting('synchronous_standby_names') = 'nobody'});
	here('CHECKPOINT'); # it is the checkpointer that makes the setting hold
	$session->start(q{INSERT INTO other VALUES (5001, 'two phases')});
	$alpha->poll_ok(
		'SELECT count(*) = 1 FROM pg_stat_activity WHERE pid = '
		  . $session->pid . q{ AND wait_event = 'SyncRep'},
		'a transaction is prepared at the peer, its commit is recorded');
	$beta->close_to_peers;
	$alpha->stop('immediate');
	$alpha->append_conf('postgresql.conf', q{synchronous_standby_names = ''});
	$alpha->start;
	eval { $session->quit };
	is(there($prepared), '1', 'it is still there');
	ok($alpha->load_until('beta', q{state = 'needs resync'}, 40), 'the server needs a resync');
	$alpha->wait_for_log(qr/needs a resync, nothing is delivered/);
	$beta->open_to_peers;
	here(q{SELECT mmrepl.retry_now('beta')});
	$beta->poll_ok("SELECT ($prepared) = 0", 'it is ended all the same');
	is(there('SELECT v FROM other WHERE id = 5001'), 'two phases',
		'as it was here');
	is($alpha->state('beta'), 'needs resync', 'nothing else has changed');
	here(q{SELECT mmrepl.resync('beta', truncate => true)});
	synced();
	$alpha->same_rows($beta, $_) foreach ('item', 'other');
};

# Nobody waits for what will not come.
section 'given up while a session waits at the fence' => sub {
	my $blocker = $beta->session;
	my $session = $alpha->session;

	$blocker->ok(q{SET mmrepl.capture = off; BEGIN; UPDATE item SET v = v WHERE id = 1});
	here(q{UPDATE item SET v = 'waits there' WHERE id = 1});
	$session->ok(q{SET mmrepl.sync_timeout = '60s'});
	$session->start(q{INSERT INTO other VALUES (6001, 'waits here')});
	$alpha->poll_ok(
		q{SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = }
		  . $session->pid, 'a synchronous change waits for what is queued');
	ok($alpha->load_until('beta', q{resync_since IS NOT NULL}, 40), 'the server needs a resync');
	my (undef, $err, $took) = $session->finish;
	like($err, qr/ERROR:\s+MM015: the server needs a resync/, 'the one that waits is told so');
	like($err, qr/HINT:\s+SELECT mmrepl\.resync\('beta'\)/, '... and what to do');
	cmp_ok($took, '<', 45, '... and does not wait any longer');
	$blocker->ok('ROLLBACK');
	$_->quit foreach ($blocker, $session);
	here(q{SELECT mmrepl.resync('beta', truncate => true)});
	synced();
	$alpha->same_rows($beta, $_) foreach ('item', 'other');
};

foreach my $node ($alpha, $beta)
{
	ok( !$node->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
		$node->name . ': no crash in the log');
}
$alpha->stop('fast');
$beta->stop('fast');

done_testing();
