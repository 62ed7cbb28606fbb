# How often a synchronous transaction has to wait for its peer, counted by the
# proxy: one round trip for each statement and one for the end.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultProxy;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair;
my $proxy = FaultProxy->new(port => $beta->port);
my $port = $proxy->port;

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE account (id int PRIMARY KEY, balance numeric, note text);
});
here("ALTER SERVER beta OPTIONS (SET port '$port')");
$alpha->create_pair('account', 'beta', q{mode => 'sync'});
$alpha->poll_state('beta', 'streaming');

# The worker has a connection as well, which is no part of this.
my @worker = map { $_->{id} } $proxy->connections;
my $session = $alpha->session;
$session->ok(q{INSERT INTO account SELECT g, 100 FROM generate_series(1, 20000) g});
is(scalar(grep { my $id = $_->{id}; !grep { $_ == $id } @worker } $proxy->connections),
	1, 'the session has a connection of its own, and keeps it');

# Run SQL in the session; the number of round trips that its connection makes.
sub round_trips
{
	my ($sql) = @_;
	$proxy->reset_counters;
	$session->ok($sql);
	return $proxy->round_trips(except => \@worker);
}

sub trips_are
{
	my ($expected, $sql, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $trips = round_trips($sql);

	is($trips, $expected, $name)
	  or diag(map { "$_->{id}: $_->{trace}\n" }
		  grep { my $id = $_->{id}; !grep { $_ == $id } @worker } $proxy->connections);
	return;
}

my $change = 'UPDATE account SET balance = balance + 1';

trips_are(2, "$change WHERE id = 1", 'one row: the statement, and the end');
trips_are(2, q{INSERT INTO account VALUES (100001, 1)}, 'an INSERT likewise');
trips_are(2, q{DELETE FROM account WHERE id = 100001}, 'and a DELETE');
trips_are(2, "BEGIN; $change WHERE id = 1; COMMIT", 'in a block, too');
trips_are(3, "BEGIN; $change WHERE id = 1; $change WHERE id = 2; COMMIT",
	'two statements: two, and the end');
trips_are(3, "BEGIN; $change WHERE id = 1; SAVEPOINT s; $change WHERE id = 2; RELEASE s; COMMIT",
	'savepoints travel with what comes next');
trips_are(2, "$change WHERE id <= 100", 'a hundred rows are not more than one');
trips_are(0, 'SELECT count(*) FROM account', 'who writes nothing waits for nobody');
trips_are(0, "$change WHERE id < 0", 'a statement without rows likewise');
my $trips = round_trips("$change WHERE id BETWEEN 1 AND 10000");
cmp_ok($trips, '<', 10, "10000 rows: $trips");

# Where the peer may still refuse at the end it is asked once more.
$beta->safe_psql('postgres',
	'ALTER TABLE account ADD UNIQUE (note) DEFERRABLE INITIALLY DEFERRED');
trips_are(3, "$change WHERE id = 1", 'a deferred constraint is asked for');
my (undef, $err) = $session->run(
	q{UPDATE account SET note = 'twice' WHERE id IN (3, 4)});
like($err, qr/23505/, 'and refuses');
$session->ok(q{BEGIN; UPDATE account SET note = 'twice' WHERE id IN (3, 4);
	UPDATE account SET note = NULL WHERE id = 4; COMMIT});
$beta->safe_psql('postgres',
	'ALTER TABLE account DROP CONSTRAINT account_note_key');
trips_are(2, "$change WHERE id = 1", 'without it nobody is asked');
$trips = round_trips(q{UPDATE account SET note = repeat('x', 1000)});
cmp_ok($trips, '<', 20, "20 MB: $trips");

# Without an answer to any of them.
my ($mine) = grep { my $id = $_; !grep { $_ == $id } @worker } map { $_->{id} } $proxy->connections;
$session->ok(q{SET mmrepl.sync_flush = 'commit'; BEGIN});
$proxy->reset_counters;
$proxy->hold(only => [$mine], from => 'server');
$session->ok("$change WHERE id = $_") foreach (1 .. 5);
$session->start('COMMIT');
$proxy->release(only => [$mine]);
(undef, $err) = $session->finish;
is($err, '', 'all of them go through');
is($proxy->round_trips(except => \@worker),
	2, q{sync_flush 'commit': five statements, together, and the end});
$session->quit;

$alpha->wait_caught_up('beta');
$alpha->same_rows($beta, 'account');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
