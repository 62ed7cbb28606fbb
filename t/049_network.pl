# Two nodes on two networks of their own, with a cable between them: packets
# that vanish in one direction or both, routes that lead nowhere, a cable that is
# pulled, an address that changes.  Nothing leaves this machine.
#
# The networks need user namespaces (or root); where there are none, the silence
# of t/041_outages.pl has to do.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

# The test itself runs in the network of the first node; that of the other is a
# child's.  Postgres wants no root, so we stay who we are and keep the rights
# that a network's owner has.
BEGIN
{
	my @alone = qw(unshare --user --map-current-user --keep-caps --net);

	if (!$ENV{MMREPL_OWN_NETWORK})
	{
		my $probe = q{ip link set lo up && unshare --net true &&
			ip link add cable0 type veth peer name cable1};

		if (system("@alone sh -c '$probe' >/dev/null 2>&1") != 0)
		{
			require Test::More;
			Test::More::plan(skip_all =>
				  'no network namespaces here (unshare --user --net and ip are needed)');
		}
		$ENV{MMREPL_OWN_NETWORK} = 1;
		exec @alone, $^X, (map { "-I$_" } @INC), $0, @ARGV or die "exec: $!";
	}
}

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my ($here_ip, $there_ip, $other_ip) = ('10.213.0.1', '10.213.0.2', '10.213.0.3');

sub run
{
	my (@command) = @_;
	system(@command) == 0 or die "failed: @command";
	return;
}

# The other network lives as long as a process that waits for the end of our pipe.
run(qw(ip link set lo up));
my $holder = open(my $holding, '|-', 'unshare', '--net', 'cat') or die "unshare: $!";
my @there = ('nsenter', "--net=/proc/$holder/ns/net");

sub own_network
{
	my $mine = readlink '/proc/self/ns/net';
	my $deadline = time + $MmreplCluster::timeout;

	while ((readlink("/proc/$holder/ns/net") || $mine) eq $mine)
	{
		die 'no second network' if time > $deadline;
		Time::HiRes::sleep(0.01);
	}
	return;
}
own_network();
run(qw(ip link add cable0 type veth peer name cable1 netns), $holder);
run(qw(ip addr add), "$here_ip/24", qw(dev cable0));
run(qw(ip link set cable0 up));
run(@there, qw(ip link set lo up));
run(@there, qw(ip addr add), "$there_ip/24", qw(dev cable1));
run(@there, qw(ip addr add), "$other_ip/24", qw(dev cable1));
run(@there, qw(ip link set cable1 up));

sub hardware
{
	my ($link, @where) = @_;
	my ($address) = `@where ip -o link show $link` =~ m{link/ether ([0-9a-f:]+)};
	die "no address of $link" if !$address;
	return $address;
}
my %hardware = (cable0 => hardware('cable0'), cable1 => hardware('cable1', @there));

# Packets to a node that is not there are dropped by the other end, unsaid.
sub drop
{
	my ($direction, $really) = @_;
	my $nobody = '02:00:00:00:00:99';

	if ($direction ne 'from')
	{
		run(qw(ip neigh replace), $_, 'lladdr', $really ? $nobody : $hardware{cable1},
			qw(dev cable0 nud permanent))
		  foreach ($there_ip, $other_ip);
	}
	if ($direction ne 'to')
	{
		run(@there, qw(ip neigh replace), $here_ip, 'lladdr',
			$really ? $nobody : $hardware{cable0},
			qw(dev cable1 nud permanent));
	}
	return;
}
drop('both', 0);

# A node in the other network: whatever starts it there is entered first.
my $conf = qq{
mmrepl.retry_min_delay = '50ms'
mmrepl.retry_max_delay = '400ms'
mmrepl.connect_timeout = '600ms'
mmrepl.reply_timeout = '1h'
mmrepl.sync_timeout = '3s'
};
my $alpha = MmreplCluster->create('alpha', conf => $conf);
my $beta = MmreplCluster->new('beta');
$beta->init(conf => "$conf\nlisten_addresses = '*'");
$beta->append_conf('pg_hba.conf', "host all all $here_ip/32 trust");
{
	my $bin = PostgreSQL::Test::Utils::tempdir();
	my ($pg_ctl) = grep { -x } map { "$_/pg_ctl" } split /:/, $ENV{PATH};

	append_to_file("$bin/pg_ctl",
		"#!/bin/sh\nexec @there '$pg_ctl' \"\$@\"\n");
	chmod 0755, "$bin/pg_ctl";
	local $ENV{PATH} = "$bin:$ENV{PATH}";
	$beta->start;
}
$beta->install_extension('postgres');

my $last_id = 0;
my $user = $beta->safe_psql('postgres', 'SELECT current_user');

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

sub there
{
	return $beta->safe_psql('postgres', $_[0]);
}

sub stat_ok
{
	my ($condition, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->poll_ok(
		"SELECT $condition FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'",
		$name) || diag($alpha->describe('beta'));
}

sub writers_go_on
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $before = Time::HiRes::time();

	foreach my $round (1 .. 3)
	{
		$last_id++;
		here(qq{SET statement_timeout = '3s';
			INSERT INTO item VALUES ($last_id, 'new');
			UPDATE item SET v = v || '+' WHERE id = $last_id - 1});
	}
	return cmp_ok(Time::HiRes::time() - $before, '<', 6, "$name: writers do not wait");
}

sub recovers
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$alpha->wait_caught_up('beta') or return;
	stat_ok(q{state = 'streaming' AND consecutive_failures = 0}, "$name: it goes on by itself");
	$beta->poll_ok(
		"SELECT count(*) = 1 FROM pg_stat_activity WHERE client_addr = '$here_ip'",
		"$name: sessions that are cut off end at the peer, too");
	return $alpha->same_rows($beta, 'item', name => "$name: both sides are equal");
}

# Dead connections are to be noticed soon here, by whoever has them.
$alpha->safe_psql(
	'postgres', sprintf q{
	CREATE SERVER beta FOREIGN DATA WRAPPER mmrepl_fdw
	  OPTIONS (host '%s', port '%d', dbname 'postgres', tcp_user_timeout '1500',
			   keepalives_idle '1', keepalives_interval '1', keepalives_count '2');
	CREATE USER MAPPING FOR CURRENT_USER SERVER beta OPTIONS (user '%s')},
	$there_ip, $beta->port, $user);
$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE item (id int PRIMARY KEY, v text);
	CREATE TABLE direct (id int PRIMARY KEY, v text);
});
$beta->safe_psql(
	'postgres', q{
	CREATE TABLE public.seen (id int, v text);
	CREATE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS
	  $$BEGIN INSERT INTO public.seen VALUES (NEW.id, NEW.v); RETURN NEW; END$$;
	CREATE TRIGGER see AFTER INSERT OR UPDATE ON item FOR EACH ROW EXECUTE FUNCTION public.see();
	ALTER TABLE item ENABLE REPLICA TRIGGER see;
});
$alpha->create_pair('item', 'beta');
writers_go_on('at first');
recovers('at first');
is( there(
		"SELECT count(*) FROM pg_stat_activity WHERE client_addr = '$here_ip'"),
	'1',
	'over the cable');

###############################################################################

foreach my $direction ('both', 'to', 'from')
{
	my %name = (
		both => 'packets vanish both ways',
		to => 'packets to the peer vanish',
		from => q{the peer's packets vanish});
	my $name = $name{$direction};

	section $name => sub {
		stat_ok(q{state = 'streaming'}, 'connected');
		drop($direction, 1);
		writers_go_on($name);
		stat_ok(
			q{state = 'retrying' AND last_error_sqlstate ~ '^08' AND next_retry_at IS NOT NULL
			  AND consecutive_failures > 2 AND last_error ~ 'timed out'},
			"$name: noticed, and tried again");
		writers_go_on("$name, noticed");
		drop($direction, 0);
		recovers($name);
		is(there('SELECT count(*) = count(DISTINCT (id, v)) FROM public.seen'),
			't', "$name: each change has arrived once");
	};
}

foreach my $route ('blackhole', 'unreachable', 'prohibit')
{
	section "a route that is $route" => sub {
		stat_ok(q{state = 'streaming'}, 'connected');
		run(qw(ip route add), $route, "$there_ip/32");
		writers_go_on($route);
		stat_ok(
			q{state = 'retrying' AND last_error_sqlstate ~ '^08' AND consecutive_failures > 2},
			"$route: noticed, and tried again");
		run(qw(ip route del), $route, "$there_ip/32");
		recovers($route);
	};
}

section 'the cable is pulled' => sub {
	run(qw(ip link set cable0 down));
	writers_go_on('no cable');
	stat_ok(q{state = 'retrying' AND last_error_sqlstate ~ '^08' AND consecutive_failures > 2},
		'no cable: noticed, and tried again');
	run(qw(ip link set cable0 up));
	drop('both', 0);
	recovers('no cable');
};

section 'the peer moves' => sub {
	$alpha->safe_psql('postgres',
		q{ALTER SYSTEM SET mmrepl.retry_min_delay = '1h'});
	$alpha->safe_psql('postgres',
		q{ALTER SYSTEM SET mmrepl.retry_max_delay = '1h'});
	$alpha->reload;
	$alpha->poll_query_until('postgres',
		q{SELECT current_setting('mmrepl.retry_max_delay') = '1h'});
	run(@there, qw(ip addr del), "$there_ip/24", qw(dev cable1));
	run(@there, qw(ip addr add), "$other_ip/24", qw(dev cable1))
	  if `@there ip -o addr show dev cable1` !~ /\Q$other_ip\E/;
	drop('both', 0);
	writers_go_on('moved');
	stat_ok(
		q{state = 'retrying' AND next_retry_at > clock_timestamp() + interval '10 min'},
		'moved: the next attempt is far away');
	here("ALTER SERVER beta OPTIONS (SET host '$other_ip')");
	recovers('moved');
	$alpha->safe_psql('postgres', 'ALTER SYSTEM RESET ALL');
	$alpha->reload;
};

section 'a synchronous transaction whose packets vanish' => sub {
	$alpha->create_pair('direct', 'beta', q{mode => 'sync'});
	my $session = $alpha->session;

	$session->ok(q{INSERT INTO direct VALUES (1, 'before')});
	drop('both', 1);
	$session->start(q{INSERT INTO direct VALUES (2, 'timeout')});
	my ($out, $err, $took) = $session->finish;
	like($err, qr/ERROR:\s+(?:08|MM)\w{3}:/, 'the statement fails');
	cmp_ok($took, '<', 8, 'within sync_timeout');
	drop('both', 0);
	stat_ok(q{state = 'streaming'}, 'the peer is back');
	$session->ok(q{INSERT INTO direct VALUES (3, 'after')});

	# Between the two commits: committed here, and completed by the worker.
	drop('from', 1);
	$session->start(q{INSERT INTO direct VALUES (4, 'half')});
	($out, $err, $took) = $session->finish;
	isnt($err, '', 'no answer: the statement fails');
	drop('from', 0);
	stat_ok(q{state = 'streaming'}, 'the peer is back again');
	$session->quit;
	$alpha->wait_caught_up('beta');
	is(here(q{SELECT string_agg(id::text, ' ' ORDER BY id) FROM direct}),
		'1 3', 'what was told to have failed has not happened');
	$alpha->same_rows($beta, 'direct');
	$beta->poll_ok(
		q{SELECT count(*) = 0 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'},
		'and nothing hangs at the peer');
};

is($alpha->queued('beta'), '0', 'nothing is left queued');
ok(!$alpha->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
	'no crash in the log of the source');

$alpha->stop('fast');
$beta->stop('fast');
close $holding;

done_testing();
