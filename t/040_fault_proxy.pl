# The fault proxy itself: what the tests of outages rely on.  The extension has
# no part in this.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultProxy;
use IPC::Run;
use IO::Select;
use IO::Socket::INET;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $node = MmreplCluster->create('alone');
my $proxy = FaultProxy->new(port => $node->port, buffer => 8192);

sub connstr
{
	return 'host=127.0.0.1 dbname=postgres port=' . $proxy->port;
}

# A session that goes through the proxy, and its id there.
sub through
{
	my $session = $node->session('postgres', '-d', connstr());
	my ($mine) = grep { ($_->{backend_pid} || 0) == $session->pid }
	  $proxy->connections;
	return ($session, $mine->{id});
}

sub seconds
{
	my ($code) = @_;
	my $before = Time::HiRes::time();
	$code->();
	return Time::HiRes::time() - $before;
}

# Whether that session exists at the server, as seen on another way.
sub at_server
{
	my ($session, $condition, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $pid = $session->pid;
	return $node->poll_ok(
		"SELECT $condition FROM (VALUES (1)) one LEFT JOIN pg_stat_activity ON pid = $pid",
		$name);
}

section 'messages and round trips' => sub {
	my ($session, $id) = through();
	my ($seen) = $proxy->connections;

	is($seen->{database}, 'postgres', 'the database is seen');
	ok(length $seen->{user}, 'and the user');
	$proxy->reset_counters;
	$session->ok('SELECT 1');
	my $one = $proxy->round_trips(only => [$id]);
	$proxy->reset_counters;
	$session->ok('SELECT 1; SELECT 2; SELECT 3');
	my $three = $proxy->round_trips;
	is($three - $one, 2, 'two statements more are two round trips more');
	$proxy->reset_counters;
	is($proxy->round_trips, 0, 'counters are reset');
	is($proxy->messages, 0, 'all of them');
	$session->ok('SELECT 1');
	($seen) = $proxy->connections;
	like($seen->{trace}, qr/^>Q <T <D <C <Z\b/, 'the trace has every message');

	is($proxy->round_trips(except => [$id]), 0, 'connections can be left out');
	$session->quit;

	my $long = $node->safe_psql(
		'postgres',
		"SELECT repeat('y', length('" . 'x' x 100_000 . "'))",
		connstr => connstr());
	is(length $long, 100_000, 'long messages pass both ways');
};

section 'hold and release' => sub {
	my ($session, $id) = through();
	my $rule = $proxy->rule(
		action => 'hold', from => 'client', type => 'Q', pattern => 'hold me');

	$session->ok(q{SELECT 'not that one'});
	is($proxy->hits($rule), 0, 'the pattern decides');
	$session->start(q{CREATE TABLE held AS SELECT 'hold me'});
	is($proxy->wait_for($rule), $id, 'the rule acts, and says on whom');
	my ($seen) = $proxy->connections;
	ok($seen->{held}, 'the connection is held');
	at_server($session, q{state = 'idle'}, 'nothing has arrived');
	is($node->safe_psql('postgres', q{SELECT to_regclass('held') IS NULL}),
		't', 'or was done');
	$proxy->release;
	my ($out, $err) = $session->finish;
	is($err, '', 'released, it goes on');
	is($node->safe_psql('postgres', q{SELECT to_regclass('held') IS NULL}),
		'f', 'and is done');

	$rule = $proxy->rule(
		action => 'hold', type => 'Q', pattern => 'after', when => 'after');
	$session->start(q{CREATE TABLE after AS SELECT 1});
	$proxy->wait_for($rule);
	$node->poll_ok(q{SELECT to_regclass('after') IS NOT NULL},
		'after: it is done, but not answered');
	$proxy->release;
	($out, $err) = $session->finish;
	is($err, '', 'until it is released');

	$proxy->hold(from => 'server', only => [$id]);
	$session->start(q{CREATE TABLE oneway AS SELECT 1});
	$node->poll_ok(q{SELECT to_regclass('oneway') IS NOT NULL},
		'one direction can be held');
	$proxy->release;
	$session->finish;
	$session->quit;
};

section 'the n-th message' => sub {
	my $rule = $proxy->rule(
		action => 'reset',
		from => 'client',
		type => 'Q',
		nth => 3,
		pattern => 'n-th');

	is($proxy->wait_for($rule, 0.05), 0, 'waiting for what does not come ends');
	my ($ret, $out, $err) = $node->psql(
		'postgres',
		join('', map { "SELECT 'n-th $_';\n" } (1 .. 4)),
		connstr => connstr());
	is($out, "n-th 1\nn-th 2", 'the third one is one too many');
	like($err, qr/connection|reset/, 'the client is told');
	is($proxy->hits($rule), 3, 'hits are counted');
	ok($proxy->wait_for($rule), 'the rule has acted');
};

section 'kill, reset, half-open' => sub {
	foreach my $action (qw(kill reset half_open))
	{
		my $alive = q{EXISTS (SELECT FROM pg_stat_activity
			WHERE query = 'SELECT pg_sleep(1000)' AND client_addr IS NOT NULL)};
		my ($out, $err) = ('', '');
		my $psql = IPC::Run::start(
			[ 'psql', '-XAtq', '-d', connstr(), '-c', 'SELECT pg_sleep(1000)' ],
			'>', \$out, '2>', \$err,
			my $timer = IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));

		$node->poll_ok("SELECT $alive", "$action: a statement runs");
		my $pid = $node->safe_psql('postgres',
			q{SELECT pid FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(1000)'
			  AND client_addr IS NOT NULL});
		my ($id) = map { $_->{id} } grep { ($_->{backend_pid} || 0) == $pid } $proxy->connections;
		is($proxy->$action(only => [$id]), 1, "$action: one connection");
		$node->safe_psql('postgres', q{
			SELECT pg_cancel_backend(pid) FROM pg_stat_activity
			WHERE query = 'SELECT pg_sleep(1000)'});
		$node->poll_ok("SELECT NOT $alive", "$action: gone at the server");
		if ($action eq 'half_open')
		{
			is(scalar($proxy->connections), 1, 'the client believes in it');
			ok($psql->pumpable, 'and waits');
			$proxy->kill;
		}
		$psql->finish;
		like($err, qr/server closed|reset|connection/, "$action: it is lost");
	}
};

section 'delay and throttle' => sub {
	my ($session, $id) = through();

	$proxy->delay(150, only => [$id]);
	cmp_ok(seconds(sub { $session->ok('SELECT 1') }),
		'>=', 0.3, 'delay: there and back');
	$proxy->delay(0, only => [$id]);
	$proxy->throttle(20_000, only => [$id]);
	cmp_ok(seconds(sub { $session->ok(q{SELECT repeat('z', 10000)}) }),
		'>=', 0.45, 'throttle: so many bytes a second');
	$proxy->throttle(0);
	is(length $session->ok(q{SELECT repeat('z', 200000)}),
		200_000, 'both can be taken back');
	$session->quit;
};

section 'new connections' => sub {
	my $address = '127.0.0.1:' . $proxy->port;

	$proxy->new_connections('refuse');
	ok(!IO::Socket::INET->new($address), 'refuse: nobody listens');
	like($!, qr/refused/, 'and the client is told');

	$proxy->new_connections('black hole');
	my $client = IO::Socket::INET->new($address);
	ok($client, 'black hole: it is accepted');
	# An SSLRequest, which any server answers.
	syswrite $client, pack('NN', 8, 80877103);
	is(scalar(IO::Select->new($client)->can_read(0.3)),
		undef, 'and nothing is said');

	$proxy->new_connections('pass');
	$client = IO::Socket::INET->new($address);
	syswrite $client, pack('NN', 8, 80877103);
	ok(IO::Select->new($client)->can_read($FaultProxy::timeout),
		'pass: the server answers');
	sysread $client, my $answer, 1;
	like($answer, qr/^[NS]$/, 'with one byte');
};

my $port = $proxy->port;
eval { $proxy->rule(action => 'explode') };
like($@, qr/unknown action/, 'mistakes in rules are refused');
eval { $proxy->rule(action => 'kill', typ => 'Q') };
like($@, qr/unknown part/, 'in their names, too');
undef $proxy;
ok(!IO::Socket::INET->new("127.0.0.1:$port"), 'the proxy ends with its object');

$node->stop('fast');
done_testing();
