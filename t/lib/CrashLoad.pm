# CrashLoad.pm
#		Two masters, a load that uses everything, and what must hold after a crash.
#
# NOTES
#		Each transaction of the load counts: it adds one to a counter of its own
#		node and one row to a log, in one of several ways (async, sync, with
#		savepoints, prepared, large).  Triggers that fire for everybody write down
#		each version of a counter that is ever written at a node.  So a lost
#		transaction, half of one, and one that is applied twice all show.

package CrashLoad;

use strict;
use warnings;

use FaultPoints;
use IPC::Run;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

# Small enough that everything happens often: the ring overflows, tables rotate,
# transactions spill and travel in parts, and what waits goes over two lanes.
our $conf = q{
restart_after_crash = on
shared_buffers = '8MB'
log_min_messages = log
mmrepl.ring_size = '64kB'
mmrepl.rotate_size = '64kB'
mmrepl.batch_size = '64kB'
mmrepl.buffer_memory = '64kB'
mmrepl.retry_min_delay = '20ms'
mmrepl.retry_max_delay = '200ms'
mmrepl.sync_timeout = '5s'
mmrepl.lanes = 2
mmrepl.batch_transactions = 4
};

sub new
{
	my ($class, %params) = @_;
	my ($alpha, $beta) = MmreplCluster->new_pair(conf => $conf . ($params{conf} || ''));
	my $self = bless { nodes => [ $alpha, $beta ], next => 1, acked => [ [], [] ] }, $class;

	$alpha->create_table_on_both(
		$beta, q{
		CREATE TABLE counter (id int PRIMARY KEY, n bigint NOT NULL);
		CREATE TABLE scounter (id int PRIMARY KEY, n bigint NOT NULL);
		INSERT INTO counter SELECT g, 0 FROM generate_series(0, 7) g;
		INSERT INTO scounter SELECT g, 0 FROM generate_series(0, 7) g;
		CREATE TABLE log (origin int, id bigint, counter int, PRIMARY KEY (origin, id));
		CREATE TABLE slog (origin int, id bigint, counter int, PRIMARY KEY (origin, id));
		CREATE TABLE big (origin int, id bigint, part int, v text, PRIMARY KEY (origin, id, part));
		CREATE TABLE scratch0 (id bigint PRIMARY KEY);
		CREATE TABLE scratch1 (id bigint PRIMARY KEY);
		CREATE TABLE unwanted (id bigint PRIMARY KEY);
		CREATE TABLE written (what text, id int, n bigint);
		CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
		$$BEGIN INSERT INTO public.written VALUES (TG_TABLE_NAME, NEW.id, NEW.n); RETURN NULL; END$$;
		CREATE TRIGGER note AFTER INSERT OR UPDATE ON counter FOR EACH ROW EXECUTE FUNCTION note();
		CREATE TRIGGER note AFTER INSERT OR UPDATE ON scounter FOR EACH ROW EXECUTE FUNCTION note();
		ALTER TABLE counter ENABLE ALWAYS TRIGGER note;
		ALTER TABLE scounter ENABLE ALWAYS TRIGGER note;
	});
	$alpha->create_pair_on_both($beta, $_)
	  foreach qw(counter log big scratch0 scratch1 unwanted);
	$alpha->create_pair_on_both($beta, $_, q{mode => 'sync'}) foreach qw(scounter slog);
	return $self;
}

sub nodes { return @{ $_[0]->{nodes} } }
sub peer_of { return $_[0]->{nodes}->[ 1 - $_[1] ]->name }

# ---- the load ----

# psql: run the statements (one string, sent at once); if they succeed the
# transaction is acknowledged.
sub attempt
{
	my ($id, $sql) = @_;

	$sql =~ s/;\s*/\\;\n/g;
	return "$sql ;\n\\if :ERROR\nROLLBACK;\n\\else\n\\echo ack $id\n\\endif\n";
}

# The two statements by which a transaction is counted.
sub count_it
{
	my ($side, $id, $sync) = @_;
	my $counter = 2 * ($id % 4) + $side;
	my $s = $sync ? 's' : '';

	return "UPDATE ${s}counter SET n = n + 1 WHERE id = $counter; "
	  . "INSERT INTO ${s}log VALUES ($side, $id, $counter)";
}

# Undone to a savepoint.
sub undone
{
	my ($side, $id, $sync) = @_;
	my $s = $sync ? 's' : '';

	return "SAVEPOINT a; INSERT INTO ${s}log VALUES ($side, -$id, 0); ROLLBACK TO a; "
	  . 'SAVEPOINT b; ';
}

# Enough rows to be spilled and to travel in parts, and some that are found together.
sub bulk
{
	my ($side, $id) = @_;

	return "INSERT INTO big SELECT $side, $id, g, repeat('x', 9000) FROM generate_series(1, 20) g; "
	  . "UPDATE big SET v = 'changed' WHERE origin = $side AND id = $id AND part <= 3";
}

sub script
{
	my ($self, $side) = @_;
	my $peer = $self->peer_of($side);
	my $id = $self->{next};
	my @do;
	my $add = sub {
		my ($before, $sync, $after) = @_;

		push @do, attempt($id,
			'BEGIN; ' . $before . count_it($side, $id, $sync) . ($after || '') . '; COMMIT');
		$id++;
	};

	# What a crash leaves prepared, until tidy() ends it, may hold a row.
	push @do, "SET lock_timeout = '1s';\n";

	# Sync, with savepoints, with async changes before and after, and given up.
	$add->('', 1);
	$add->(undone($side, $id, 1), 1, '; RELEASE b');
	$add->("INSERT INTO scratch$side VALUES ($id); ", 1, "; INSERT INTO scratch$side VALUES (-$id)");
	push @do, "BEGIN; INSERT INTO slog VALUES ($side, -$id, 0); ROLLBACK;\n";

	# Sent by the statements, answered for at COMMIT.
	push @do, "SET mmrepl.sync_flush = 'commit';\n";
	$add->('', 1);
	push @do, "BEGIN; INSERT INTO slog VALUES ($side, -$id, 0); ROLLBACK;\n";
	push @do, "RESET mmrepl.sync_flush;\n";

	# The peer need not flush.
	push @do, "SET mmrepl.sync_commit = 'applied';\n";
	$add->('', 1);
	$add->(undone($side, $id, 1), 1, '; RELEASE b');
	push @do, "RESET mmrepl.sync_commit;\n";

	# The peer commits in two phases.
	push @do, "SET mmrepl.two_phase = 'on';\n";
	$add->('', 1);
	push @do, "RESET mmrepl.two_phase;\n";

	# Async, with savepoints, and given up.
	$add->('', 0);
	$add->(undone($side, $id, 0), 0, '; RELEASE b');
	push @do, "BEGIN; INSERT INTO log VALUES ($side, -$id, 0); ROLLBACK;\n";
	$add->("TRUNCATE scratch$side; ", 0);

	# Large: spilled, in a subtransaction too.
	$add->(bulk($side, $id) . '; ', 0);
	$add->(
		'SAVEPOINT a; ' . bulk($side, $id) . '; ROLLBACK TO a; SAVEPOINT b; '
		  . bulk($side, $id) . '; RELEASE b; ', 0);

	# Prepared: committed, refused (the name is taken), and given up.
	my $gid = "load_${side}_$id";
	push @do, "BEGIN\\;\n" . join("\\;\n", split(/; /, count_it($side, $id, 0)))
	  . "\\;\nPREPARE TRANSACTION '$gid';\n\\if :ERROR\nROLLBACK;\n\\else\n"
	  . "BEGIN; INSERT INTO log VALUES ($side, -$id, 0); PREPARE TRANSACTION '$gid';\nROLLBACK;\n"
	  . attempt($id++, "COMMIT PREPARED '$gid'") . "\\endif\n";
	push @do, "BEGIN; INSERT INTO log VALUES ($side, -$id, 0); PREPARE TRANSACTION '${gid}b';\n"
	  . "ROLLBACK PREPARED '${gid}b';\n";

	# By hand, and skipped.
	push @do, "SELECT mmrepl.pause('$peer');\n";
	$add->('', 0);
	$add->(bulk($side, $id) . '; ', 0);
	push @do, "SELECT mmrepl.deal_sync_err_rec(100000);\n" x 3;
	push @do, "INSERT INTO unwanted VALUES ($side + 2 * $id);\n";
	push @do, "SELECT mmrepl.skip('$peer', ticket, 'a test') FROM mmrepl.sync_err_rec "
	  . "WHERE table_name = 'unwanted' LIMIT 1;\n";

	# A backlog of many batches.
	push @do, "DO \$\$ BEGIN FOR i IN 1 .. 40 LOOP INSERT INTO scratch$side VALUES ($id * 1000 + i); COMMIT; "
	  . "END LOOP; END \$\$;\n";
	push @do, "SELECT mmrepl.resume('$peer');\n";

	# A new worker.
	push @do, "SELECT pg_terminate_backend(pid) FROM mmrepl.pg_stat_mmrepl WHERE server = '$peer';\n";
	$add->('', 0);
	$add->('', 0);
	$self->{after} = $id;
	return join('', map { "\\echo at $_\n$do[$_]" } 0 .. $#do);
}

# Run the load on both nodes at the same time.  What fails, fails.  `during` is
# called when something has been acknowledged at both, until it returns true.
sub run
{
	my ($self, %params) = @_;
	my @runs;

	foreach my $side (0, 1)
	{
		my ($out, $err) = ('', '');
		my $script = $self->script($side);
		my $file = $self->{nodes}->[$side]->basedir . '/load.sql';

		open(my $to, '>', $file) or die $!;
		print $to $script;
		close($to);
		my $run = { out => \$out, err => \$err };
		$run->{harness} = IPC::Run::start(
			[ 'psql', '-XAtq', '-d', $self->{nodes}->[$side]->connstr('postgres'), '-f', $file ],
			'<', \undef, '>', $run->{out}, '2>', $run->{err},
			IPC::Run::timeout($MmreplCluster::timeout));
		push @runs, $run;
	}
	if ($params{during})
	{
		my $begun = 0;

		until_true(
			sub {
				my @running = grep { $_->{harness}->pumpable } @runs;
				$_->{harness}->pump_nb foreach @running;
				$begun ||= !grep { ${ $_->{out} } !~ /^ack/m } @runs;
				return !@running || ($begun && $params{during}->());
			});
	}
	foreach my $side (0, 1)
	{
		my $run = $runs[$side];

		eval { $run->{harness}->finish; 1 } or $self->hangs($side, $run);
		push @{ $self->{acked}->[$side] }, ${ $run->{out} } =~ /^ack (\d+)$/mg;
		$self->{last_output}->[$side] = ${ $run->{out} } . ${ $run->{err} };
	}
	$self->{next} = $self->{after};
	return;
}

# A transaction is prepared at the peer and fails here.
sub fail_two_phases
{
	my ($self, $side) = @_;

	return $self->two_phases_with($side, 'commit-heads-written:error:1');
}

# The same, with a crash: the worker has something to recover.
sub break_two_phases
{
	my ($self, $side) = @_;

	return $self->two_phases_with($side, 'two-phase-prepared:kill:1');
}

sub two_phases_with
{
	my ($self, $side, $fault) = @_;
	my $node = $self->{nodes}->[$side];

	forget_fault($node, $fault);
	# At the first try the fence may still be closed.  The nodes' own faults may
	# fire now, that of the peer, too: it may have begun to recover only just now.
	until_true(
		sub {
			return fired($node, $fault) if firing($node, $fault); # who was killed is still ending
			bring_back($_) foreach grep { is_down($_) } @{ $self->{nodes} };
			query($node, "SET mmrepl.fault = '$fault'; SET mmrepl.two_phase = 'on'; "
				. "INSERT INTO slog VALUES ($side, -$self->{next}, 0)");
			return fired($node, $fault);
		}) or fail($node->name . " comes to $fault");
	return;
}

# The load has not come to its end: say where it stands.
sub hangs
{
	my ($self, $side, $run) = @_;
	my $node = $self->{nodes}->[$side];

	fail('the load of ' . $node->name . ' ends');
	diag(${ $run->{out} }, ${ $run->{err} });
	foreach (0, 1)
	{
		diag($self->{nodes}->[$_]->name, "\n", query($self->{nodes}->[$_],
			q{SELECT pid, state, wait_event, backend_type, left(query, 200) FROM pg_stat_activity}) // 'down');
		diag($self->{nodes}->[$_]->describe($self->peer_of($_)));
	}
	$run->{harness}->kill_kill;
	return;
}

# ---- afterwards ----

# What a client, or an operator, has to do after a crash.
sub tidy
{
	my ($self) = @_;

	foreach my $side (0, 1)
	{
		my $node = $self->{nodes}->[$side];
		my $peer = $self->peer_of($side);
		my $left = query($node, "SELECT string_agg(gid, ' ') FROM pg_prepared_xacts WHERE gid LIKE 'load%'");

		foreach my $gid (split / /, $left || '')
		{
			my $kept = $gid !~ /b$/;

			defined query($node, ($kept ? 'COMMIT' : 'ROLLBACK') . " PREPARED '$gid'")
			  or fail("$gid could be ended");
			push @{ $self->{acked}->[$side] }, $gid =~ /_(\d+)$/ if $kept;
		}
		query($node, "SELECT mmrepl.resume('$peer')")
		  if (query($node, "SELECT count(*) FROM mmrepl.stream WHERE paused") || 0) > 0;
	}
	return;
}

my $summary = q{
	SELECT concat_ws(E'\n',
	 (SELECT 'counter ' || string_agg(id || '=' || n, ' ' ORDER BY id) FROM counter),
	 (SELECT 'scounter ' || string_agg(id || '=' || n, ' ' ORDER BY id) FROM scounter),
	 (SELECT 'log ' || count(*) || ' ' || coalesce(sum(hashtext(log::text)), 0) FROM log),
	 (SELECT 'slog ' || count(*) || ' ' || coalesce(sum(hashtext(slog::text)), 0) FROM slog),
	 (SELECT 'big ' || count(*) || ' ' || coalesce(sum(hashtext(big::text)), 0) FROM big),
	 (SELECT 'scratch0 ' || count(*) || ' ' || coalesce(sum(id), 0) FROM scratch0),
	 (SELECT 'scratch1 ' || count(*) || ' ' || coalesce(sum(id), 0) FROM scratch1))};

# What must not be: a name for each kind, empty when all is well.
my $wrongs = q{
	SELECT concat_ws(', ',
	 (SELECT 'half of a transaction' FROM counter c
	  WHERE n <> (SELECT count(*) FROM log WHERE counter = c.id AND id > 0) LIMIT 1),
	 (SELECT 'half of a sync transaction' FROM scounter c
	  WHERE n <> (SELECT count(*) FROM slog WHERE counter = c.id AND id > 0) LIMIT 1),
	 (SELECT 'something that was rolled back' FROM (TABLE log UNION ALL TABLE slog) l WHERE id < 0 LIMIT 1),
	 (SELECT 'a version written twice: ' || min(concat_ws(' ', what, id, n))
	  FROM (SELECT what, id, n FROM written GROUP BY 1, 2, 3 HAVING count(*) > 1) d HAVING count(*) > 0),
	 (SELECT 'a version never written' FROM
	  (SELECT 'counter' AS what, id, n FROM counter UNION ALL SELECT 'scounter', id, n FROM scounter) c
	  WHERE n <> (SELECT count(*) FROM written w WHERE w.what = c.what AND w.id = c.id) LIMIT 1),
	 (SELECT 'a prepared transaction' FROM pg_prepared_xacts LIMIT 1),
	 (SELECT 'a conflict' FROM mmrepl.progress WHERE conflicts > 0 LIMIT 1),
	 (SELECT 'a queued change' FROM mmrepl.sync_err_rec LIMIT 1))};

# Passes when both nodes have become equal by themselves, and nothing is lost,
# doubled, halved or left behind.
sub check
{
	my ($self, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my ($alpha, $beta) = $self->nodes;
	my ($a, $b) = ('', '');
	my @wrong;

	until_true(
		sub {
			($a, $b) = map { query($_, $summary) // 'down' } ($alpha, $beta);
			return $a eq $b && $a ne 'down';
		}) or push @wrong, "nodes differ:\n$a\n--\n$b";
	foreach my $side (0, 1)
	{
		my $node = $self->{nodes}->[$side];
		my $peer = $self->peer_of($side);

		until_true(
			sub {
				(query($node, "SELECT mmrepl.wait_for_replay('$peer', '1 s')") // '') eq 't'
				  && query($node, "SELECT state = 'streaming' AND queue_transactions = 0 "
					  . "FROM mmrepl.pg_stat_mmrepl WHERE server = '$peer'") eq 't';
			}) or push @wrong, 'stuck: ' . $node->describe($peer);
		my $found;

		# The peer's worker may still have to end what it finds prepared here.
		until_true(sub { $found = query($node, $wrongs); return defined $found && $found eq '' });
		push @wrong, $node->name . " has $found" if !defined $found || $found ne '';
		push @wrong, map { "lost at $_" } $self->lost($side);
	}
	ok(!@wrong, $name) or diag(join("\n", @wrong));
	return !@wrong;
}

# Acknowledged transactions that are not there, at either node.
sub lost
{
	my ($self, $side) = @_;
	my $ids = join(',', @{ $self->{acked}->[$side] });

	return map {
		my $missing = query($_, qq{
			SELECT string_agg(a::text, ' ') FROM unnest('{$ids}'::bigint[]) a
			WHERE NOT EXISTS (SELECT FROM log WHERE origin = $side AND id = a)
			  AND NOT EXISTS (SELECT FROM slog WHERE origin = $side AND id = a)}) // 'everything';
		$missing ne '' ? $_->name . ": $missing" : ()
	} $self->nodes;
}

1;
