# A peer that was restored from an older state has forgotten changes that it had
# confirmed.  They are in no queue any more: the stream must not go on as if
# nothing had happened, but stop, say why, and wait for the operator.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use File::Path ();
use MmreplCluster;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my ($alpha, $beta) = MmreplCluster->new_pair;
my $saved = $beta->basedir . '/saved';

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

# What beta has confirmed is written down about once a second.
sub written_down
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->poll_ok(
		q{SELECT bool_and(t.acked >= s.last_ticket)
		  FROM mmrepl.stream t JOIN mmrepl.pg_stat_mmrepl s
		  ON s.stream = t.stream_id},
		'what beta has confirmed is written down');
}

sub stopped
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->poll_ok(
		q{SELECT state = 'retrying' AND last_error_sqlstate = 'MM014'
		  FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'}, $name)
	  || diag($alpha->describe('beta'));
}

# The number of attempts grows: what is seen afterwards is the state after one.
sub tried_again
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $retries = $alpha->stat('beta', 'retries');

	return $alpha->poll_ok(
		"SELECT retries > $retries FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'",
		$name);
}

sub save_beta
{
	$beta->stop('fast');
	PostgreSQL::Test::RecursiveCopy::copypath($beta->data_dir, $saved);
	chmod 0700, $saved or die "could not chmod $saved: $!";
	$beta->start;
	return;
}

sub restore_beta
{
	$beta->stop('immediate');
	File::Path::rmtree($beta->data_dir);
	rename $saved, $beta->data_dir or die "could not rename $saved: $!";
	$beta->start;
	return;
}

$alpha->create_table_on_both($beta,
	'CREATE TABLE item (id int PRIMARY KEY, v text)');
$alpha->create_pair('item', 'beta');
here(q{INSERT INTO item SELECT g, 'kept' FROM generate_series(1, 10) g});
synced();
written_down();
save_beta();

section 'an outage alone is no loss' => sub {
	here(
		q{INSERT INTO item SELECT g, 'lost' FROM generate_series(11, 20) g;
		   UPDATE item SET v = 'lost' WHERE id = 1;
		   DELETE FROM item WHERE id = 2});
	synced();
	$alpha->poll_state('beta', 'streaming');
	written_down();
	$alpha->same_rows($beta, 'item');
};

section 'the peer is put back to an older state' => sub {
	restore_beta();
	is(there('SELECT count(*) FROM item'), '10', 'beta is as it was');

	# The stream has to meet it even when there is nothing to deliver, and
	# what is written now must not arrive as if nothing were missing.
	here(q{INSERT INTO item VALUES (21, 'behind')});
	stopped('the stream stops, with a state of its own');
	my $error = $alpha->stat('beta', 'last_error');
	like($error, qr/has lost changes that it had confirmed/,
		'last_error says what is wrong');
	like($error, qr/at ticket \d+ and has been at \d+/, 'with both tickets');
	like(
		$error,
		qr/HINT:.*mmrepl\.accept_peer\('beta'\)/,
		'and what is to be done');

	my $before = Time::HiRes::time();
	here("INSERT INTO item VALUES ($_, 'behind')") foreach (22 .. 30);
	cmp_ok(Time::HiRes::time() - $before, '<', 10, 'writers do not wait');
	is($alpha->queued('beta'), '10', 'their changes wait in the queue');

	tried_again('it tries again');
	here(q{SELECT mmrepl.retry_now('beta')});
	tried_again('also when it is told to');
	stopped('and finds the same');
	is(there('SELECT count(*), min(id), max(id) FROM item'),
		'10|1|10', 'nothing is skipped, nothing arrives');
	my ($ret, $out, $err) =
	  $alpha->psql('postgres', 'SELECT mmrepl.deal_sync_err_rec(100)');
	is("$ret $out", '0 f', 'delivery by hand does not do it either');
	like($err, qr/has lost changes/, 'and says why');
	is(there('SELECT count(*) FROM item'), '10', 'still nothing arrives');
};

section 'the sender remembers' => sub {
	$alpha->stop('immediate');
	$alpha->start;
	stopped('after a crash of the sender the stream is stopped as before');
	here(q{BEGIN; SELECT mmrepl.accept_peer('beta'); ROLLBACK});
	here(q{SELECT mmrepl.retry_now('beta')});
	tried_again('accept_peer that was rolled back: it tries again');
	stopped('and is stopped as before');
	is(there('SELECT count(*) FROM item'), '10', 'nothing has arrived');
	is($alpha->queued('beta'), '10', 'everything is still queued');
};

section 'accept_peer' => sub {
	like(
		$alpha->fails('postgres', q{SELECT mmrepl.accept_peer('nowhere')}),
		qr/42704/, 'a server that does not exist is refused');

	# By hand: what beta has lost.
	there(
		q{SET mmrepl.capture = off;
		   INSERT INTO item SELECT g, 'lost' FROM generate_series(11, 20) g;
		   UPDATE item SET v = 'lost' WHERE id = 1;
		   DELETE FROM item WHERE id = 2});
	here(q{SELECT mmrepl.accept_peer('beta')});
	synced();
	$alpha->poll_state('beta', 'streaming');
	$alpha->same_rows($beta, 'item', name => 'what was queued has arrived');
	is(there('SELECT count(*) FROM item WHERE id > 20'), '10', 'all of it');
	here(q{INSERT INTO item VALUES (31, 'later'); DELETE FROM item WHERE id = 3});
	synced();
	$alpha->same_rows($beta, 'item', name => 'and later rows arrive');
	is($alpha->queued('beta'), '0', 'the queue is empty');
	written_down();
};

section 'an old peer that has confirmed all that it ever will' => sub {
	save_beta();
	synced();
	restore_beta();
	here(q{INSERT INTO item VALUES (40, 'the same state')});
	synced();
	$alpha->same_rows($beta, 'item',
		name => 'a copy that has lost nothing is accepted');
	written_down();
};

section 'a peer that was made anew' => sub {
	$alpha->create_table_on_both($beta, "CREATE TABLE $_ (id int PRIMARY KEY)") foreach qw(strict lenient);
	$alpha->create_pair('strict', 'beta', q{mode => 'sync'});
	$alpha->create_pair('lenient', 'beta', q{mode => 'sync', on_unreachable => 'queue'});
	here('INSERT INTO strict VALUES (1)');
	synced();
	there('DROP EXTENSION mmrepl_bgw CASCADE; CREATE EXTENSION mmrepl_bgw');

	# The worker has a connection still, and nothing to send: a session is the first that finds out.
	like($alpha->fails('postgres', 'INSERT INTO strict VALUES (2)'),
		qr/ERROR:\s+MM014: .*has lost changes that it had confirmed.*HINT:.*mmrepl\.accept_peer\('beta'\)/s,
		'a synchronous change is refused');
	$alpha->restart;
	like($alpha->fails('postgres', 'INSERT INTO strict VALUES (2)'), qr/ERROR:\s+MM0(?:08|14)/, '... and after a restart');
	is(there('SELECT count(*) FROM strict'), '1', '... and is not there');
	stopped('the worker connects, and finds it, too');
	like($alpha->fails('postgres', q{SELECT mmrepl.wait_for_replay('beta')}), qr/ERROR:\s+MM014: .*HINT:.*accept_peer/s,
		'nothing is queued, and yet not all is there');
	here('INSERT INTO lenient VALUES (1)');
	is(there('SELECT count(*) FROM lenient'), '0', 'what may wait, waits');
	here(q{INSERT INTO item VALUES (50, 'anew')});
	stopped('is noticed like one that was restored');
	is(there('SELECT count(*) FROM item WHERE id = 50'),
		'0', 'and gets nothing');
	here(q{SELECT mmrepl.accept_peer('beta')});
	synced();
	$alpha->same_rows($beta, 'item', name => 'until it is accepted');
	here('INSERT INTO strict VALUES (2)');
	$alpha->same_rows($beta, $_) foreach qw(strict lenient);
};

ok(!$alpha->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
	'no crash in the log of the sender');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
