# Streams that lose their slots in shared memory and get others, while somebody waits
# for one of them: another stream's position must not be taken for its own.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use FaultPoints;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

# Two streams and two slots.
my ($alpha, $beta) = MmreplCluster->new_pair(conf => q{
	mmrepl.max_servers = 2
	mmrepl.retry_min_delay = '20ms'
	mmrepl.retry_max_delay = '200ms'
	mmrepl.sync_timeout = '60s'});
my $scout = 'scout-begun:wait:1';
my $held = 'worker-confirming:wait:1';

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

# The second stream leads to another database of the same server.
$beta->safe_psql('postgres', 'CREATE DATABASE gamma');
$beta->install_extension('gamma');
$alpha->add_peer($beta, server => 'gamma', peer_dbname => 'gamma');
$alpha->create_table_on_both($beta, 'CREATE TABLE item (id int PRIMARY KEY, n int)');
here('CREATE TABLE other (id int PRIMARY KEY, n int)');
$beta->safe_psql('gamma', 'CREATE TABLE other (id int PRIMARY KEY, n int)');
$alpha->create_pair('item', 'beta');
$alpha->create_pair('other', 'gamma');
here('INSERT INTO item SELECT g, 0 FROM generate_series(1, 10) g');
here('INSERT INTO other SELECT g, 0 FROM generate_series(1, 10) g');

sub caught_up
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->wait_caught_up('beta') && $alpha->wait_caught_up('gamma');
}

sub is_equal
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	caught_up();
	$alpha->same_rows($beta, 'item', name => "$name: item is equal");
	$alpha->same_rows($beta, 'other', name => "$name: other is equal", peer_dbname => 'gamma');
	return;
}

# The slots are in the order of the streams again.
sub begin
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	disarm_faults($alpha);
	$alpha->restart;
	caught_up();
	return;
}

# All slots are given up, and the scout that would take them again has to wait; who
# stands at one of them looks for another by himself.
sub send_away
{
	my ($but) = (@_, '');
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	my $workers = join(',', grep { $_ ne $but } map { $alpha->stat($_, 'pid') } qw(beta gamma));

	arm_fault($alpha, $scout);
	until_true(sub { (query($alpha, 'SHOW mmrepl.fault') // '') eq $scout }) or fail("$scout is set");
	like($alpha->fails('postgres', 'ALTER DATABASE postgres RENAME TO mine'), qr/0A000/, 'a command that is refused');
	ok(await_fault($alpha, $scout), 'a scout is about to take the slots');
	$alpha->poll_ok("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid IN ($workers)", 'the workers have left');
	return;
}

# Whether somebody still waits; what he has waited for in vain would have ended that.
sub still_waits
{
	my ($session) = @_;

	return here('SELECT state FROM pg_stat_activity WHERE pid = ' . $session->pid) eq 'active';
}

section 'wait_for_replay()' => sub {
	begin();
	my ($waiter, $holder) = map { $_->session } $alpha, $beta;

	$holder->ok('BEGIN; SELECT FROM item WHERE id = 1 FOR UPDATE');
	here('UPDATE item SET n = 1 WHERE id = 1');
	$waiter->start(q{SELECT mmrepl.wait_for_replay('beta', '60s')});
	$alpha->poll_ok('SELECT wait_event_type = \'Extension\' FROM pg_stat_activity WHERE pid = ' . $waiter->pid, 'somebody waits for beta');
	send_away();
	here('UPDATE other SET n = 1 WHERE id = 1');
	$alpha->wait_caught_up('gamma');                # which takes a slot
	ok(still_waits($waiter), "gamma's confirmation is not beta's");
	release_fault($alpha, $scout);
	$holder->ok('COMMIT');
	my ($out, $err) = $waiter->finish;
	is("$out$err", 't', 'beta has it');
	is(there('SELECT n FROM item WHERE id = 1'), '1', '... indeed');
	$_->quit foreach $waiter, $holder;
	is_equal('waited');
};

section 'the fence' => sub {
	begin();
	my ($writer, $holder) = map { $_->session } $alpha, $beta;

	$holder->ok('BEGIN; SELECT FROM item WHERE id = 1 FOR UPDATE');
	here('UPDATE item SET n = 2 WHERE id = 1; UPDATE item SET n = 2 WHERE id = 2');
	$writer->ok(q{SET mmrepl.mode = 'sync'});
	$writer->start('UPDATE item SET n = 3 WHERE id = 2');
	$alpha->poll_ok('SELECT wait_event_type = \'Extension\' FROM pg_stat_activity WHERE pid = ' . $writer->pid, 'somebody stands at the fence');
	send_away();
	here('UPDATE other SET n = 2 WHERE id = 1');
	$alpha->wait_caught_up('gamma');
	ok(still_waits($writer), "gamma's confirmation does not open it");
	release_fault($alpha, $scout);
	$holder->ok('COMMIT');
	my ($out, $err) = $writer->finish;
	is($err, '', 'it was passed when beta had confirmed');
	$_->quit foreach $writer, $holder;
	is_equal('passed');
};

section 'a worker that is about to confirm' => sub {
	begin();
	$beta->close_to_peers('gamma');
	here('UPDATE other SET n = 3 WHERE id = 1');
	arm_fault($alpha, $held);
	until_true(sub { (query($alpha, 'SHOW mmrepl.fault') // '') eq $held }) or fail("$held is set");
	here('UPDATE item SET n = 4 WHERE id = 1');
	ok(await_fault($alpha, $held), 'beta has committed, and it was not noted yet');
	my $pid = fired($alpha, $held);

	send_away($pid);
	here(q{SELECT mmrepl.retry_now('gamma')});      # takes a slot
	here('UPDATE other SET n = 3 WHERE id = 2');
	release_fault($alpha, $held);
	$alpha->poll_ok("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $pid", 'its worker has left');
	release_fault($alpha, $scout);
	$beta->open_to_peers;
	is_equal('confirmed');
};

# Who waits for the tables that resync() locks is captured as soon as it has ended,
# wherever the stream is by then.
section 'resync()' => sub {
	begin();
	my ($session, $writer) = map { $alpha->session } 1, 2;

	$beta->close_to_peers('postgres');
	here(q{ALTER SYSTEM SET mmrepl.max_queue_size = '64kB'; SELECT pg_reload_conf()});
	$alpha->poll_ok(q{SELECT current_setting('mmrepl.max_queue_size') = '64kB'}, 'there is a limit');
	here('INSERT INTO item SELECT g, 0 FROM generate_series(101, 20000) g');
	is($alpha->state('beta'), 'needs resync', 'beta is given up');
	here('ALTER SYSTEM RESET mmrepl.max_queue_size; SELECT pg_reload_conf()');
	$beta->open_to_peers;
	$session->ok(q{BEGIN; SELECT mmrepl.resync('beta')});
	send_away();
	here(q{SELECT mmrepl.retry_now('gamma')});      # takes the slot that was beta's
	release_fault($alpha, $scout);
	$alpha->poll_ok('SELECT count(*) = 2 FROM mmrepl.pg_stat_mmrepl WHERE pid IS NOT NULL', 'there are workers again');
	$alpha->poll_state('beta', 'needs resync');
	$writer->start('INSERT INTO item VALUES (100, 0)');
	$alpha->poll_ok("SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = " . $writer->pid, 'somebody waits for the table');
	my $worker = $alpha->stat('beta', 'pid');

	kill('STOP', $worker);
	$session->ok('COMMIT');
	$writer->finish;
	kill('CONT', $worker);
	is_equal('resynced');
	$_->quit foreach $session, $writer;
};

# A slot is not free as long as a transaction has something to say there.  Nobody
# else asks for the stream that had to wait for that.
section 'a transaction that takes its time to end' => sub {
	my $ending = 'commit-visible:wait:1';

	begin();
	my $writer = $alpha->session;

	$writer->ok("SET mmrepl.fault = '$ending'");
	$writer->start('UPDATE item SET n = 5 WHERE id = 1');
	ok(await_fault($alpha, $ending), 'a transaction is about to end');
	like($alpha->fails('postgres', 'ALTER DATABASE postgres RENAME TO mine'), qr/0A000/, 'a command that is refused');
	$alpha->poll_ok('SELECT count(*) = 1 FROM mmrepl.pg_stat_mmrepl WHERE pid IS NOT NULL', 'one stream has a slot');
	$alpha->poll_ok(q{SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'mmrepl scout'}, 'a scout has waited for the other');
	release_fault($alpha, $ending);
	$writer->finish;
	$alpha->poll_ok('SELECT count(*) = 2 FROM mmrepl.pg_stat_mmrepl WHERE pid IS NOT NULL', 'so has the other in the end');
	$writer->quit;
	is_equal('ended');
};

# A worker that has been started for a slot enters it when it is another database's.
section 'a worker that comes too late' => sub {
	my $entering = 'worker-entering:wait:1';

	here(q{SELECT mmrepl.drop_pair('other', 'gamma'); DROP SERVER gamma CASCADE});
	$alpha->install_extension('second');
	$alpha->add_peer($beta, dbname => 'second', server => 'gamma', peer_dbname => 'gamma');
	$alpha->safe_psql('second', 'CREATE TABLE other (id int PRIMARY KEY, n int)');
	disarm_faults($alpha);
	$alpha->restart;
	$alpha->wait_caught_up('beta');
	$alpha->create_pair('other', 'gamma', undef, 'second');
	$alpha->wait_caught_up('gamma', 'second');

	arm_fault($alpha, $entering);
	until_true(sub { (query($alpha, 'SHOW mmrepl.fault') // '') eq $entering }) or fail("$entering is set");
	here(q{SELECT pg_terminate_backend(pid) FROM mmrepl.pg_stat_mmrepl});
	ok(await_fault($alpha, $entering), 'a worker is about to enter the slot of beta');
	arm_fault($alpha, $scout);
	until_true(sub { (query($alpha, 'SHOW mmrepl.fault') // '') eq $scout }) or fail("$scout is set");
	like($alpha->fails($_, "ALTER DATABASE $_ RENAME TO mine"), qr/0A000/, "$_ loses its slot") foreach qw(second postgres);
	ok(await_fault($alpha, $scout), 'a scout is about to take slots');
	$alpha->safe_psql('second', q{SELECT mmrepl.retry_now('gamma'); INSERT INTO other VALUES (100, 0)});
	release_fault($alpha, $scout);
	$alpha->poll_ok('SELECT pid IS NOT NULL FROM mmrepl.pg_stat_mmrepl', 'beta has another slot');
	release_fault($alpha, $entering);
	$beta->poll_ok('SELECT count(*) = 1 FROM other WHERE id = 100', 'what is queued in the other database is delivered', 'gamma');
	ok(!$alpha->log_contains(qr/is linked to another server/), '... by a worker of its own');
	$alpha->wait_caught_up('beta');
};

$_->stop('fast') foreach $alpha, $beta;
done_testing();
