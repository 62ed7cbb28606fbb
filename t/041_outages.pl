# Every way in which a peer can be away, with a proxy in between: writers never
# wait or fail, the view says what is wrong and when it is tried again, it goes
# on by itself, and both sides are equal afterwards.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultProxy;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => q{
mmrepl.retry_min_delay = '50ms'
mmrepl.retry_max_delay = '400ms'
mmrepl.connect_timeout = '500ms'
mmrepl.reply_timeout = '700ms'
});
my $proxy = FaultProxy->new(port => $beta->port, buffer => 4096);
my $last_id = 0;

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

sub there
{
	return $beta->safe_psql('postgres', $_[0]);
}

sub set_config
{
	my ($node, %settings) = @_;
	while (my ($setting, $value) = each %settings)
	{
		$node->safe_psql('postgres', "ALTER SYSTEM SET $setting = '$value'");
	}
	$node->reload;
	while (my ($setting, $value) = each %settings)
	{
		$node->poll_query_until('postgres',
			"SELECT current_setting('$setting') = '$value'")
		  or die "$setting was not set";
	}
	return;
}

# The condition holds for beta's row of the statistics, now or soon.
sub stat_ok
{
	my ($condition, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->poll_ok(
		"SELECT $condition FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'",
		$name) || diag($alpha->describe('beta'));
}

# Writes succeed within a bound that no wait for the peer would keep: the
# statements by statement_timeout, the commits by the clock.
sub writers_go_on
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $longest = 0;

	foreach my $round (1 .. 3)
	{
		my $id = ++$last_id;
		my $took = here(
			qq{SET statement_timeout = '3s';
			BEGIN;
			INSERT INTO item VALUES ($id, 'new');
			UPDATE item SET v = v || '+' WHERE id = greatest($id - 1, 1);
			SELECT clock_timestamp() AS before \\gset
			COMMIT;
			SELECT extract(epoch FROM clock_timestamp() - :'before')});
		$longest = $took if $took > $longest;
	}
	return cmp_ok($longest, '<', 3, "$name: writers do not wait");
}

# What an operator sees of a peer that is away.
sub outage_is_told
{
	my ($name, $sqlstate, $text) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return stat_ok(
		"state = 'retrying' AND last_error_sqlstate ~ '^(?:$sqlstate)\$'"
		  . " AND last_error ~ '$text' AND consecutive_failures > 0"
		  . ' AND next_retry_at IS NOT NULL AND last_error_at IS NOT NULL',
		"$name: the view says what is wrong");
}

# All is well again, soon and without anybody's doing.
sub recovers
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$alpha->wait_caught_up('beta') or return;
	stat_ok(
		q{state = 'streaming' AND consecutive_failures = 0 AND next_retry_at IS NULL},
		"$name: it goes on by itself");
	return $alpha->same_rows($beta, 'item', name => "$name: both sides are equal");
}

# The worker's connection is there, so that something can happen to it.  The view
# alone may speak of one that is lost, which the worker has not noticed yet.
sub worker_is_connected
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$last_id++;
	here("INSERT INTO item VALUES ($last_id, 'connected')");
	$alpha->wait_caught_up('beta');
	stat_ok(q{state = 'streaming'}, 'the worker is connected');
	return;
}

$alpha->create_table_on_both($beta,
	'CREATE TABLE item (id int PRIMARY KEY, v text)');
here(sprintf q{ALTER SERVER beta OPTIONS (SET port '%d')}, $proxy->port);
$alpha->create_pair('item', 'beta');
writers_go_on('at first');
recovers('at first');

###############################################################################

section 'nobody listens' => sub {
	$proxy->new_connections('refuse');
	$proxy->kill;
	writers_go_on('refused');
	outage_is_told('refused', '08001', 'refused');
	$proxy->new_connections('pass');
	recovers('refused');
};

section 'reset' => sub {
	$proxy->reset;
	writers_go_on('reset');
	recovers('reset');
};

section 'new connections are swallowed' => sub {
	$proxy->new_connections('black hole');
	$proxy->kill;
	writers_go_on('black hole');
	outage_is_told('black hole', '08001', 'timed out');
	$proxy->kill;
	$proxy->new_connections('pass');
	recovers('black hole');
};

# Packets are still acknowledged, so that the kernel sees nothing wrong.
foreach my $from ('client', 'server', undef)
{
	my $name = 'silence ' . ($from ? "of the $from" : 'both ways');

	section $name => sub {
		my @way = $from ? (from => $from) : ();

		# Each attempt that follows fails as well, for another reason (MM008): none of
		# them comes before somebody has looked at the first one.
		set_config($alpha,
			'mmrepl.retry_max_delay' => '1h',
			'mmrepl.retry_min_delay' => '1h');
		worker_is_connected();
		my $before = $alpha->stat('beta', 'retries');
		$proxy->hold(@way);
		writers_go_on($name);
		stat_ok("retries > $before", "$name: the worker notices");
		stat_ok(q{last_error ~ 'not answered' AND last_error_sqlstate = '08006'},
			"$name: and says so");
		is($alpha->stat('beta', 'retries'), $before + 1, "$name: it has failed once");
		set_config($alpha,
			'mmrepl.retry_max_delay' => '400ms',
			'mmrepl.retry_min_delay' => '50ms');
		here(q{SELECT mmrepl.retry_now('beta')});
		recovers($name);
		$proxy->kill;
		recovers("$name, and its end");
	};
}

section 'half-open' => sub {
	worker_is_connected();
	$proxy->half_open;
	writers_go_on('half-open');
	recovers('half-open');
	$proxy->kill;
};

section 'silent for good, but present' => sub {

	# The peer works on a batch for longer than it may be silent.  Who asks it about
	# that has all the time that a machine may need to let him in.
	set_config($alpha, 'mmrepl.connect_timeout' => '30s');
	worker_is_connected();
	my $blocker = $beta->session;
	my $before = $alpha->stat('beta', 'retries');
	$blocker->ok('BEGIN; LOCK TABLE item IN SHARE MODE');
	writers_go_on('a lock at the peer');
	$beta->poll_ok(
		q{SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'
		  AND clock_timestamp() - query_start > interval '2 s'},
		'a lock at the peer: the batch waits longer than reply_timeout');
	is($alpha->stat('beta', 'retries'), $before,
		'a lock at the peer: who works is not disturbed');
	$blocker->ok('COMMIT');
	$blocker->quit;
	recovers('a lock at the peer');
	set_config($alpha, 'mmrepl.connect_timeout' => '500ms');
};

section 'a link of 1 kB/s' => sub {
	worker_is_connected();
	set_config($alpha, 'mmrepl.connect_timeout' => '30s');
	$proxy->throttle(1000, future => 1);
	here(q{INSERT INTO item SELECT -g, md5(g::text) FROM generate_series(1, 80) g});
	writers_go_on('slow');
	stat_ok('queue_changes > 0', 'slow: it takes a while');

	# Longer than reply_timeout, and nobody sees the bytes that the link holds.
	recovers('slow');
	$proxy->throttle(0, future => 1);
	set_config($alpha, 'mmrepl.connect_timeout' => '500ms');
};

section 'pause and drop while the peer is silent' => sub {
	worker_is_connected();
	set_config($alpha, 'mmrepl.reply_timeout' => '1h');
	$proxy->hold;
	$proxy->new_connections('black hole');
	writers_go_on('silent');
	here(q{SET statement_timeout = '5s'; SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here(q{SET statement_timeout = '5s'; SELECT mmrepl.resume('beta')});

	# The stream's last pair goes, and the stream with it, while a batch is on its way.
	my $worker = $alpha->stat('beta', 'pid');
	here(q{SET statement_timeout = '5s';
		   SELECT mmrepl.drop_pair('item', 'beta');});
	writers_go_on('dropped');
	$proxy->kill;
	$proxy->new_connections('pass');
	set_config($alpha, 'mmrepl.reply_timeout' => '700ms');
	here(q{DELETE FROM item});
	there(q{DELETE FROM item});
	$alpha->create_pair('item', 'beta');
	writers_go_on('registered again');
	$alpha->wait_caught_up('beta');
	here('UPDATE item SET v = v');
	there('DELETE FROM item');
	here('DELETE FROM item');
	recovers('registered again');
};

section 'out of connections' => sub {
	$beta->safe_psql('postgres', 'ALTER ROLE CURRENT_USER SUPERUSER');
	there(q{CREATE ROLE carrier LOGIN CONNECTION LIMIT 1;
			SELECT mmrepl.allow_apply('carrier');
			GRANT ALL ON item TO carrier});
	here(q{ALTER USER MAPPING FOR CURRENT_USER SERVER beta OPTIONS (SET user 'carrier')});
	recovers('a role of its own');
	there('ALTER ROLE carrier CONNECTION LIMIT 0');
	$proxy->kill;
	writers_go_on('out of connections');
	outage_is_told('out of connections', '53300', 'too many connections');
	there('ALTER ROLE carrier CONNECTION LIMIT 5');
	recovers('out of connections');
};

section 'an error that comes and goes' => sub {
	# A new worker has no log lines behind it.
	$alpha->terminate($alpha->stat('beta', 'pid'));
	recovers('a new worker');
	my $log = -s $alpha->logfile;
	my $failures = $alpha->stat('beta', 'retries');

	# Errors of several kinds, with ports and process ids in their texts.
	foreach my $round (1 .. 12)
	{
		$proxy->new_connections($round % 2 ? 'refuse' : 'black hole');
		$proxy->kill;
		my $before = $alpha->stat('beta', 'retries');
		stat_ok("retries > $before + 1", "failure of round $round");
	}
	$proxy->kill;
	$proxy->new_connections('pass');
	recovers('errors in turn');
	cmp_ok($alpha->stat('beta', 'retries') - $failures, '>', 20, 'many failures');
	my $lines = () = slurp_file($alpha->logfile, $log) =~ /delivery to server "beta" failed/g;
	cmp_ok($lines, '>', 0, 'the log has them');
	cmp_ok($lines, '<=', 10, 'but is not flooded');

	# A connection that is lost over and over, with successes between.
	$log = -s $alpha->logfile;
	foreach my $round (1 .. 30)
	{
		$proxy->kill;
		$last_id++;
		here("INSERT INTO item VALUES ($last_id, 'flapping')");
		$alpha->poll_query_until('postgres', q{
			SELECT mmrepl.wait_for_replay('beta', '10 s')});
	}
	recovers('flapping');
	$lines = () = slurp_file($alpha->logfile, $log) =~ /delivery to server "beta" (?:failed|goes on)/g;
	cmp_ok($lines, '<=', 15, 'a flapping connection does not flood it either');
};

section 'the delay' => sub {
	set_config($alpha,
		'mmrepl.retry_min_delay' => '10ms',
		'mmrepl.retry_max_delay' => '40ms');
	$proxy->new_connections('refuse');
	$proxy->kill;
	here(q{INSERT INTO item VALUES (1000000, 'delay')});
	stat_ok('consecutive_failures > 5', 'failing');
	my $delays = here(
		q{
		CREATE TEMP TABLE delay (failures int PRIMARY KEY, ms numeric);
		DO $$
		BEGIN
			WHILE (SELECT count(*) FROM delay) < 12 LOOP
				PERFORM pg_stat_clear_snapshot(), pg_sleep(0.001);
				INSERT INTO delay SELECT consecutive_failures,
					1000 * extract(epoch FROM next_retry_at - last_error_at)
				FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta' AND next_retry_at IS NOT NULL
				ON CONFLICT DO NOTHING;
			END LOOP;
		END $$;
		SELECT max(ms) <= 40, min(ms) >= 20, count(DISTINCT round(ms, 1)) > 3 FROM delay});
	is($delays, 't|t|t',
		'it has a cap, a half of it at least, and is never the same twice');
	$proxy->new_connections('pass');
	recovers('the delay');
};

section 'who wakes it' => sub {
	set_config($alpha,
		'mmrepl.retry_max_delay' => '1h',
		'mmrepl.retry_min_delay' => '1h');
	my $far = q{state = 'retrying' AND next_retry_at > clock_timestamp() + interval '10 min'};
	my $asleep = sub {
		$last_id++;
		here("INSERT INTO item VALUES ($last_id, 'asleep')");
		stat_ok($far, 'the next attempt is far away');
	};

	$proxy->new_connections('refuse');
	$proxy->kill;
	$asleep->();
	$proxy->new_connections('pass');
	is(here(q{SELECT mmrepl.wait_for_replay('beta', '300 ms')}),
		'f', 'and does not come by itself');
	here(q{SELECT mmrepl.retry_now('beta')});
	recovers('retry_now');

	# The address changes.
	$proxy->new_connections('refuse');
	$proxy->kill;
	$asleep->();
	here(sprintf q{ALTER SERVER beta OPTIONS (SET port '%d')}, $beta->port);
	recovers('ALTER SERVER');
	$proxy->new_connections('pass');
	here(sprintf q{ALTER SERVER beta OPTIONS (SET port '%d')}, $proxy->port);
	recovers('ALTER SERVER, back');

	# A password is rotated.
	there(q{ALTER ROLE carrier PASSWORD 'old'});
	here(q{ALTER USER MAPPING FOR CURRENT_USER SERVER beta OPTIONS (ADD password 'old')});
	recovers('a password');
	$beta->set_hba(peers => 'scram-sha-256', reload => 1);
	there(q{ALTER ROLE carrier PASSWORD 'new'});
	$proxy->kill;
	$asleep->();
	here(q{SELECT mmrepl.retry_now('beta')});
	outage_is_told('a rotated password', '28P01', 'password');
	here(q{ALTER USER MAPPING FOR CURRENT_USER SERVER beta OPTIONS (SET password 'new')});
	recovers('ALTER USER MAPPING');

	# A server without TLS is asked for it.
	here(q{ALTER SERVER beta OPTIONS (ADD sslmode 'require')});
	$asleep->();
	outage_is_told('TLS', '08001', 'SSL');
	here(q{ALTER SERVER beta OPTIONS (SET sslmode 'prefer')});
	recovers('TLS');
	set_config($alpha,
		'mmrepl.retry_min_delay' => '50ms',
		'mmrepl.retry_max_delay' => '400ms');
};

section 'a peer that restarts in a loop' => sub {
	foreach my $mode (qw(fast immediate fast immediate))
	{
		writers_go_on("restarts: $mode");
		$beta->restart if $mode eq 'fast';
		if ($mode eq 'immediate')
		{
			$beta->stop('immediate');
			writers_go_on('restarts: down');
			$beta->start;
		}
	}
	recovers('restarts');
};

is($alpha->queued('beta'), '0', 'nothing is left queued');
ok(!$alpha->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
	'no crash in the log of the source');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
