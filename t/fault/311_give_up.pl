# A queue that is given up (mmrepl.max_queue_size), and resync(): at every fault
# point of the two, with every action that is legal there, while others write.
# Nothing is discarded without being said, and resync(), tried again until it
# succeeds, makes both nodes equal.  The points, give-up-... and resync-..., are
# asked from the library: a new one is in this test.
#
# `make check` takes some cases, which a seed chooses; MMREPL_LONG takes all.
# MMREPL_SEED makes other choices, MMREPL_FAULTS takes those that match (a pattern
# over point:action:nth).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use FaultPoints;
use IPC::Run;
use List::Util qw(shuffle);
use MmreplCluster;
use Test::More;
use Time::HiRes qw(time);

seed($ENV{MMREPL_LONG} ? 'random' : 2013);

# Small enough for a stream to be given up within half a second.
my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => q{
restart_after_crash = on
autovacuum = off
shared_buffers = '8MB'
log_min_messages = log
mmrepl.ring_size = '64kB'
mmrepl.rotate_size = '64kB'
mmrepl.buffer_memory = '64kB'
mmrepl.max_queue_size = '64kB'
mmrepl.retry_min_delay = '20ms'
mmrepl.retry_max_delay = '200ms'
mmrepl.sync_timeout = '5s'
});
my @points = grep { $_->{name} =~ $FaultPoints::give_up } fault_points($alpha);

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE item (id bigint PRIMARY KEY, writer int, v text);
	CREATE TABLE counter (id int PRIMARY KEY, n bigint NOT NULL);
	CREATE TABLE churn (id bigint PRIMARY KEY, v text);
	CREATE TABLE synced (id bigint PRIMARY KEY);
});
$alpha->create_pair($_, 'beta') foreach qw(item counter churn);
$alpha->create_pair('synced', 'beta', q{mode => 'sync', on_unreachable => 'queue'});
$alpha->safe_psql('postgres', 'INSERT INTO counter SELECT g, 0 FROM generate_series(0, 3) g');

# ---- writers ----

my $next = 1;     # id of a transaction, and of its row
my @acked;        # ids whose commit was acknowledged
my $filler = 400; # bytes

# psql: the statements are sent at once; if they succeed, so the id is said.
sub attempt
{
	my ($id, $sql) = @_;

	$sql =~ s/;\s*/\\;\n/g;
	return "$sql ;\n\\if :ERROR\nROLLBACK;\n\\else\n\\echo ack $id\n\\endif\n";
}

# What makes a transaction count.
sub counted
{
	my ($id, $writer) = @_;

	return "INSERT INTO item VALUES ($id, $writer, repeat('v', $filler)); "
	  . "UPDATE counter SET n = n + 1 WHERE id = $writer";
}

# A transaction with more than may wait for a server.
my $large = q{INSERT INTO churn SELECT g, repeat('x', 9000) FROM generate_series(1000001, 1000030) g};

sub start_psql
{
	my ($name, $script) = @_;
	my $run = { out => '', err => '' };
	my $file = $alpha->basedir . "/$name.sql";

	open(my $to, '>', $file) or die "$file: $!";
	print $to $script;
	close($to);
	$run->{harness} = IPC::Run::start(
		[ 'psql', '-XAtq', '-d', $alpha->connstr('postgres'), '-f', $file ],
		'<', \undef, '>', \$run->{out}, '2>', \$run->{err},
		IPC::Run::timeout($MmreplCluster::timeout));
	return $run;
}

sub finish_psql
{
	my ($run) = @_;
	my $ends = eval { $run->{harness}->finish; 1 };

	ok(0, 'psql ends') || diag($run->{out}, $run->{err}, $alpha->describe('beta')) unless $ends;
	$run->{harness}->kill_kill unless $ends;
	push @acked, $run->{out} =~ /^ack (\d+)$/mg;
	return;
}

# Two of them, with so many transactions each.
sub start_writers
{
	my ($count) = @_;
	my @runs;

	foreach my $writer (0, 1)
	{
		my $script = '';

		foreach (1 .. $count)
		{
			my $id = $next++;

			$script .= attempt($id,
				    'BEGIN; '
				  . counted($id, $writer)
				  . "; INSERT INTO churn VALUES ($id); DELETE FROM churn WHERE id < $id - 20"
				  . " AND id % 2 = $id % 2; COMMIT");
		}
		push @runs, start_psql("writer$writer", $script);
	}
	return @runs;
}

# Statements of a session in the foreground.
sub run_script
{
	finish_psql(start_psql('script', join('', @_)));
	return;
}

# ---- what is looked at ----

sub revive
{
	comes_back($alpha);
	return;
}

sub stream
{
	my ($condition) = @_;

	return (query($alpha, "SELECT $condition FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'") // '') eq
	  't';
}

sub given_up { return stream('resync_since IS NOT NULL') }

my $summary = q{
	SELECT concat_ws(E'\n',
	 (SELECT 'item ' || count(*) || ' ' || coalesce(sum(hashtext(i::text)), 0) FROM item i),
	 (SELECT 'counter ' || string_agg(id || '=' || n, ' ' ORDER BY id) FROM counter),
	 (SELECT 'churn ' || count(*) || ' ' || coalesce(sum(hashtext(c::text)), 0) FROM churn c),
	 (SELECT 'synced ' || count(*) || ' ' || coalesce(sum(id), 0) FROM synced),
	 (SELECT 'half of a transaction: ' || id FROM counter c
	  WHERE n <> (SELECT count(*) FROM item WHERE writer = c.id) LIMIT 1))};

# Equal, whole, and nothing that was acknowledged is missing.
sub tables_hold
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my ($a, $b) = map { query($_, $summary) // 'down' } ($alpha, $beta);
	my $ids = join(',', @acked);
	my $lost = query($alpha, qq{
		SELECT string_agg(a::text, ' ') FROM unnest('{$ids}'::bigint[]) a
		WHERE a NOT IN (SELECT id FROM item UNION ALL SELECT id FROM synced)}) // 'all';

	is($b, $a, "$name: both nodes have the same");
	unlike($a, qr/half/, "$name: whole transactions");
	return is($lost, '', "$name: nothing that was acknowledged is lost");
}

# ---- one case ----

# The peer is away, or the stream is paused, while others write: it is given up.
my %away = (
	'the peer is closed' => [ sub { $beta->close_to_peers }, sub { $beta->open_to_peers } ],
	'the stream is paused' => [
		sub { until_true(sub { defined query($alpha, q{SELECT mmrepl.pause('beta')}) }) },
		sub { until_true(sub { defined query($alpha, q{SELECT mmrepl.resume('beta')}) }) }
	]);

sub fill
{
	my $id = $next++;

	# Larger than what may wait, and undone; then nothing has happened.
	run_script(attempt($id, 'BEGIN; ' . counted($id, 2) . "; SAVEPOINT a; $large; ROLLBACK TO a; COMMIT"));
	revive();
	my @writers = start_writers(70);
	finish_psql($_) foreach @writers;
	revive();
	foreach (1 .. 5)
	{
		last if given_up();
		$id = $next++;
		run_script(
			attempt($id, 'BEGIN; ' . counted($id, 2) . "; $large; DELETE FROM churn WHERE id >= 1000000; COMMIT"));
		revive();
	}
	return;
}

# What is done to a stream that was given up, and leaves it so.
sub write_on
{
	my ($first, $second) = ($next++, $next++);

	run_script(
		attempt($first, "INSERT INTO synced VALUES ($first)"),
		attempt($second, 'BEGIN; ' . counted($second, 2)
			  . q{; SAVEPOINT a; SELECT mmrepl.resync('beta', truncate => true); ROLLBACK TO a; COMMIT}));
	revive();
	return;
}

# With everybody still: the stream is given up, which is said, or all of it arrives.
sub nothing_is_silent
{
	my $found = until_true(
		sub {
			return 'given up' if stream(q{state = 'needs resync' AND resync_reason ~ 'max_queue_size'});
			return 'delivered'
			  if stream('resync_since IS NULL')
			  && (query($alpha, q{SELECT mmrepl.wait_for_replay('beta', '1 s')}) // '') eq 't'
			  && !given_up();
			return '';
		});

	ok($found, 'it is given up, or delivers') || diag($alpha->describe('beta'));
	tables_hold('not given up') if $found eq 'delivered';
	return;
}

# As an operator would, until it has succeeded, while others write.
sub resync
{
	my $id = $next++;
	my @writers = start_writers(25);

	run_script(attempt($id, 'BEGIN; ' . counted($id, 3)
			  . q{; SAVEPOINT a; SELECT mmrepl.resync('beta', truncate => true); RELEASE a; COMMIT}));
	revive();
	finish_psql($_) foreach @writers;
	revive();
	return;
}

sub settles
{
	my $settled = until_true(
		sub {
			bring_back($alpha) if is_down($alpha);
			query($alpha, q{SELECT mmrepl.resync('beta', truncate => true)}) if given_up();
			return (query($alpha, q{SELECT mmrepl.wait_for_replay('beta', '1 s')}) // '') eq 't'
			  && stream(q{state = 'streaming' AND queue_transactions = 0 AND queue_bytes = 0
				AND resync_since IS NULL AND resync_reason IS NULL AND pid IS NOT NULL})
			  && (query($alpha, 'SELECT count(*) FROM mmrepl.sync_err_rec') // '') eq '0';
		});

	ok($settled, 'it streams, and nothing waits') || diag($alpha->describe('beta'));
	return $settled;
}

# Given up and brought back, once.
sub cycle
{
	my ($away) = @_;

	$away->[0]->();
	fill();
	write_on() if given_up();
	$away->[1]->();
	nothing_is_silent();
	resync();
	return settles();
}

# What only a start, or a row that somebody else has changed, brings about.
sub cycle_after_start
{
	shut_down($alpha);
	bring_back($alpha);
	revive();
	query($alpha, q{UPDATE mmrepl.stream SET resync_since = now(), resync_reason = 'max_queue_size, by hand'});
	query($alpha, q{SELECT mmrepl.pause('beta'); SELECT mmrepl.resume('beta')});
	ok(until_true(sub { bring_back($alpha) if is_down($alpha);
				stream(q{last_error ~ 'needs a resync|fault point' OR resync_since IS NULL}) }), 'it is followed');
	resync();
	return settles();
}

sub empty_tables
{
	query($alpha, 'BEGIN; TRUNCATE item, churn, synced; UPDATE counter SET n = 0; COMMIT');
	@acked = ();
	return;
}

sub one_case
{
	my ($fault) = @_;
	my $started = time();
	my ($how) = shuffle(sort keys %away);

	note "$fault: $how";
	empty_tables();
	arm_fault($alpha, $fault);
	cycle($away{$how});
	cycle_after_start() unless fired($alpha, $fault);
	ok(fired($alpha, $fault), "$fault: it has fired");
	disarm_faults($alpha);
	revive();
	settles();
	tables_hold($fault);
	note sprintf('%.1f s', time() - $started);
	return;
}

# ---- every point is on the way ----

my %hits;

# Counters begin anew when a server does.
sub note_hits
{
	$hits{ $_->{name} } += $_->{hits} foreach fault_points($alpha);
	return;
}

section 'without faults' => sub {
	foreach my $how (sort keys %away)
	{
		cycle($away{$how});
		tables_hold($how);
	}
	note_hits();
	cycle_after_start();
	tables_hold('after a start');
	note_hits();
	is(join(' ', grep { !$hits{$_} } map { $_->{name} } @points), '', 'the load has come by every point');
};

# ---- the cases ----

my $wanted = $ENV{MMREPL_FAULTS} // '.';
my @cases;
foreach my $point (@points)
{
	push @cases, map { "$point->{name}:$_:1" } $point->{errors} ? qw(error fatal kill crash) : qw(kill crash);
}
@cases = shuffle(grep { /$wanted/ } @cases);
$#cases = 19 if @cases > 20 && !$ENV{MMREPL_LONG} && !$ENV{MMREPL_FAULTS};
foreach my $fault (@cases)
{
	section $fault => sub { one_case($fault) };
}

# ---- bugs ----

# The worker that counts what waits says beforehand that it has: whoever ended it
# made the queue look empty, and the limit let that much more wait.
section 'terminated while it counts what waits' => sub {
	my $fault = 'give-up-backlog-read:fatal:1';

	empty_tables();
	settles();
	query($alpha, q{SELECT mmrepl.pause('beta')});
	run_script(map { my $id = $next++; attempt($id, 'BEGIN; ' . counted($id, 0) . '; COMMIT') } 1 .. 30);
	my $bytes = $alpha->stat('beta', 'queue_bytes');
	cmp_ok($bytes, '>', 30 * $filler, 'there is a backlog');
	arm_fault($alpha, $fault);
	$alpha->restart;
	ok(await_fault($alpha, $fault), 'it has fired');
	# At least that: the position that outlives a restart may lag.
	ok(until_true(sub { stream("queue_bytes >= $bytes") }), 'the next worker counts')
	  || diag($alpha->describe('beta'));
	disarm_faults($alpha);
	query($alpha, q{SELECT mmrepl.resume('beta')});
	settles();
	tables_hold('in the end');
};

# The worker had noted that it rests before it did, and was never to say why.
section 'an error when the worker comes to rest' => sub {
	my $fault = 'give-up-peer-dropped:error:1';

	empty_tables();
	settles();
	query($alpha, q{SELECT mmrepl.pause('beta')});
	arm_fault($alpha, $fault);
	fill();
	ok(await_fault($alpha, $fault), 'it has fired');
	ok( until_true(sub { stream(q{last_error ~ 'needs a resync' AND consecutive_failures = 0}) }),
		'the view says why nothing is delivered')
	  || diag($alpha->describe('beta'));
	disarm_faults($alpha);
	query($alpha, q{SELECT mmrepl.resume('beta')});
	settles();
	tables_hold('in the end');
};

$_->stop('fast') foreach $alpha, $beta;
done_testing();
