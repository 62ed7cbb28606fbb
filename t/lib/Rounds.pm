# Rounds.pm
#		Rounds of (load, fault, recovery): clients write at both nodes, something
#		breaks, everything comes up again, and nothing may be lost, done twice,
#		reordered or halved.
#
# NOTES
#		Each row has one node that writes it, so what is there at the end does not
#		depend on who was first.  Which load and which faults a round has follows
#		from the seed, which is printed; MMREPL_SEED is another one, MMREPL_ROUNDS
#		says how many rounds it has, MMREPL_FAULT is a pattern of the faults to choose
#		from.

package Rounds;

use strict;
use warnings;

use Client;
use History;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my @tables = qw(item twin bulk strict lenient clear_alpha clear_beta tx);

# A row of item and that of twin with the same id have the same token, always.
my $schema = q{
	CREATE TABLE item (id int PRIMARY KEY, token text);
	CREATE TABLE twin (id int PRIMARY KEY, token text);
	CREATE TABLE bulk (id int PRIMARY KEY, token text, filler text);
	CREATE TABLE strict (id int PRIMARY KEY, token text);
	CREATE TABLE lenient (id int PRIMARY KEY, token text);
	CREATE TABLE clear_alpha (id int PRIMARY KEY, token text);
	CREATE TABLE clear_beta (id int PRIMARY KEY, token text);
	CREATE TABLE tx (id serial PRIMARY KEY, token text UNIQUE);
	CREATE FUNCTION check_twins() RETURNS int STABLE LANGUAGE plpgsql AS $$
	DECLARE
		bad text;
	BEGIN
		SELECT string_agg(concat_ws(' ', id, item.token, twin.token), ', ') INTO bad
		FROM item FULL JOIN twin USING (id)
		WHERE item.token IS DISTINCT FROM twin.token;
		IF bad IS NOT NULL THEN
			RAISE EXCEPTION 'violated: half a transaction is seen: %', bad;
		END IF;
		RETURN 1;
	END $$;
};

###############################################################################
# The load

# A row of the client's node: alpha writes the odd ones, beta the even ones.
sub row
{
	my ($side, $rows) = @_;

	return 2 * int(rand($rows || 10)) + 1 + $side;
}

sub put
{
	my ($table, $id, $token) = @_;

	return "INSERT INTO $table VALUES ($id, '$token')"
	  . " ON CONFLICT (id) DO UPDATE SET token = '$token';";
}

sub put_twins
{
	my ($id, $token) = @_;

	return put('item', $id, $token) . put('twin', $id, $token);
}

my %writes = (
	single => sub { my ($side, $t) = @_; put_twins(row($side), $t) },
	several => sub {
		my ($side, $t) = @_;
		join ' ', map { put_twins(2 * $_ + 1 + $side, $t) } (2 .. 5);
	},
	delete => sub {
		my ($side) = @_;
		my $id = row($side);
		"DELETE FROM item WHERE id = $id; DELETE FROM twin WHERE id = $id"
		  . " AND NOT EXISTS (SELECT FROM item WHERE id = $id);";
	},
	bulk => sub {
		my ($side, $t) = @_;
		my $first = 2000 * int(rand(2)) + 1 + $side;
		my $rows = 100 + int(rand(700));
		"INSERT INTO bulk SELECT $first + 2 * g, '$t', repeat('x', 150)"
		  . " FROM generate_series(1, $rows) g"
		  . " ON CONFLICT (id) DO UPDATE SET token = excluded.token;";
	},
	shrink => sub {
		my ($side, $t) = @_;
		my $first = 200 * int(rand(20));
		"DELETE FROM bulk WHERE id % 2 = " . (1 - $side)
		  . " AND id BETWEEN $first AND $first + 400;";
	},
	savepoints => sub {
		my ($side, $t) = @_;
		my $id = row($side);
		"SAVEPOINT a; UPDATE item SET token = 'undone' WHERE id = $id;"
		  . ' SAVEPOINT b; '
		  . put('strict', $id, 'undone')
		  . ' ROLLBACK TO a;'
		  . put_twins($id, $t)
		  . ' SAVEPOINT c; '
		  . put('lenient', $id, $t)
		  . ' RELEASE c;';
	},
	strict => sub { my ($side, $t) = @_; put('strict', row($side), $t) },
	lenient => sub { my ($side, $t) = @_; put('lenient', row($side), $t) },
	mixed => sub {
		my ($side, $t) = @_;
		put_twins(row($side), $t) . put('strict', row($side), $t);
	},
	queued => sub {
		my ($side, $t) = @_;
		q{SET LOCAL mmrepl.mode = 'async'; } . put('strict', row($side), $t);
	},
	direct => sub {
		my ($side, $t) = @_;
		q{SET LOCAL mmrepl.mode = 'sync'; } . put_twins(row($side), $t);
	},
	at_commit => sub {
		my ($side, $t) = @_;
		q{SET LOCAL mmrepl.sync_flush = 'commit'; }
		  . put('strict', row($side), $t)
		  . put('lenient', row($side), $t);
	},
	clear => sub {
		my ($side, $t) = @_;
		my $table = $side ? 'clear_beta' : 'clear_alpha';
		(rand() < 0.3 ? "TRUNCATE $table; " : '') . put($table, row($side), $t);
	},
	failed => sub { my ($side) = @_; put_twins(row($side), 'never') . 'SELECT 1 / 0;' }
);

my %kinds = (
	async => [qw(single single several delete clear savepoints failed)],
	sync => [qw(strict lenient mixed strict at_commit savepoints)],
	mixed => [
		qw(single several delete clear savepoints strict lenient mixed queued direct
		  at_commit failed bulk)
	],
	bulk => [qw(bulk bulk shrink single mixed)]);

# What a client does: a transaction of one of the kinds, the row of tx last.
sub transactions
{
	my ($node, $kinds, $prefix) = @_;
	my $side = $node->name eq 'beta' ? 1 : 0;

	return sub {
		my ($number) = @_;
		my $kind = $kinds->[ rand @$kinds ];
		my $lax = rand() < 0.3;
		my $token = "$prefix.$number.$kind" . ($lax ? '.lax' : '');
		my $sql = 'BEGIN; '
		  . ($lax ? 'SET LOCAL synchronous_commit = off; ' : '')
		  . (rand() < 0.3 ? q{SET LOCAL mmrepl.two_phase = 'auto'; } : '')
		  . $writes{$kind}->($side, $token)
		  . " INSERT INTO tx (token) VALUES ('$token'); ";

		# What was written synchronously cannot be prepared: that fails.
		return ($token,
				$sql
			  . "PREPARE TRANSACTION '$token'; "
			  . (rand() < 0.2 ? 'ROLLBACK' : 'COMMIT')
			  . " PREPARED '$token';")
		  if rand() < 0.08 && $kind =~ /^(?:single|several|delete|bulk)$/;
		return ($token, $sql . (rand() < 0.1 ? 'ROLLBACK;' : 'COMMIT;'));
	};
}

###############################################################################
# The faults

my %faults;
my %peer;

sub either
{
	return rand() < 0.5 ? ($_[0], $_[1]) : ($_[1], $_[0]);
}

my %victims = (
	worker => 'SELECT pid FROM mmrepl.pg_stat_mmrepl WHERE pid IS NOT NULL',
	launcher => q{SELECT pid FROM pg_stat_activity
				  WHERE backend_type LIKE 'mmrepl%launcher%'},
	writer => q{SELECT pid FROM pg_stat_activity
				WHERE client_addr IS NULL AND backend_type = 'client backend'
				AND pid <> pg_backend_pid() AND query ~ 'INTO tx|COMMIT'
				ORDER BY random() LIMIT 1},
	receiver => q{SELECT pid FROM pg_stat_activity
				  WHERE client_addr IS NOT NULL ORDER BY random() LIMIT 1});

sub victim
{
	my ($node, $kind) = @_;
	my ($ret, $pid) = $node->psql('postgres', $victims{$kind});

	return $ret == 0 && $pid =~ /^\d+$/ ? $pid : 0;
}

foreach my $kind (keys %victims)
{
	$faults{"terminate $kind"} = sub {
		my ($one) = either(@_);

		foreach (1 .. 3)
		{
			my $pid = victim($one, $kind) or next;
			$one->psql('postgres', "SELECT pg_terminate_backend($pid)");
			Time::HiRes::sleep(rand(0.1));
		}
	};
	$faults{"kill $kind"} = sub {
		my ($one) = either(@_);
		my $pid = victim($one, $kind) or return;
		kill 'KILL', $pid;
	};
}

# Start again what does not run; the old processes may take a moment to go.
sub revive
{
	my ($node) = @_;
	my $deadline = time + $MmreplCluster::timeout;

	return if defined $node->{_pid};
	until ($node->start(fail_ok => 1))
	{
		die $node->name . ' does not start' if time > $deadline;
		Time::HiRes::sleep(0.1);
	}
	return;
}

sub crash
{
	my (@nodes) = @_;

	foreach my $node (@nodes)
	{
		kill 'KILL', $node->{_pid};
		$node->{_pid} = undef;
	}
	return;
}

$faults{'kill postmaster'} = sub { my ($one) = either(@_); crash($one) };
$faults{'kill both postmasters'} = sub { crash(either(@_)) };
$faults{'immediate'} = sub { my ($one) = either(@_); $one->stop('immediate') };
$faults{'fast'} = sub { my ($one) = either(@_); $one->stop('fast') };
$faults{'both immediate'} = sub { $_->stop('immediate') foreach either(@_) };
$faults{'restart twice'} = sub {
	my ($one, $other) = either(@_);
	$one->restart;
	$other->stop('immediate');
	revive($other);
	$one->stop('immediate');
};
$faults{'pause and drain by hand'} = sub {
	my ($one) = either(@_);
	my $server = $peer{ $one->name };

	$one->psql('postgres', "SELECT mmrepl.pause('$server')");
	Time::HiRes::sleep(rand(0.2));
	$one->psql('postgres',
		'SELECT mmrepl.deal_sync_err_rec(' . int(1 + rand(200)) . ')')
	  foreach (1 .. 5);
};
$faults{'drain by hand'} = sub {
	my ($one) = either(@_);
	foreach (1 .. 8)
	{
		$one->psql('postgres',
			'SELECT mmrepl.deal_sync_err_rec(' . int(1 + rand(200)) . ')');
	}
};
$faults{'retry_now'} = sub {
	my ($one, $other) = either(@_);
	$other->terminate_peers;
	$one->psql('postgres', "SELECT mmrepl.retry_now('$peer{$one->name}')")
	  foreach (1 .. 5);
};
$faults{'closed'} = sub {
	my ($one) = either(@_);
	$one->{closed} = 1;
	$one->close_to_peers;
	Time::HiRes::sleep(rand(0.3));
};
$faults{'alter server'} = sub {
	my ($one, $other) = either(@_);
	my $port = $other->port;
	my $server = $peer{ $one->name };

	foreach my $host ('127.0.0.1', 'localhost', '127.0.0.1')
	{
		$one->psql('postgres',
			"ALTER SERVER $server OPTIONS (SET host '$host', SET port '$port')");
		Time::HiRes::sleep(rand(0.1));
	}
};
$faults{'switch modes'} = sub {
	my ($one) = either(@_);
	my $server = $peer{ $one->name };

	foreach my $mode ('sync', 'async', 'sync', 'async')
	{
		my $other = $mode eq 'sync' ? 'async' : 'sync';

		$one->psql(
			'postgres', qq{
			SELECT mmrepl.alter_pair('item', '$server', mode => '$mode');
			SELECT mmrepl.alter_pair('twin', '$server', mode => '$mode');
			SELECT mmrepl.alter_pair('strict', '$server', mode => '$other');
		});
		Time::HiRes::sleep(rand(0.1));
	}
	$one->psql('postgres',
		"SELECT mmrepl.alter_pair('strict', '$server', mode => 'sync')");
};
$faults{'large transaction'} = sub {
	my ($one) = either(@_);
	my $side = $one->name eq 'beta' ? 1 : 0;

	$one->psql(
		'postgres', qq{
		INSERT INTO bulk SELECT 10000 + 2 * g + $side, 'large', repeat('y', 200)
		FROM generate_series(1, 3000) g
		ON CONFLICT (id) DO UPDATE SET token = excluded.token;
	});
};
$faults{'checkpoint'} = sub {
	$_->psql('postgres', 'CHECKPOINT; VACUUM') foreach @_;
};

sub allowed_faults
{
	my @names = sort keys %faults;

	return grep { /^(?:$ENV{MMREPL_FAULT})$/ } @names if $ENV{MMREPL_FAULT};
	return @names;
}

###############################################################################
# A round

sub recover
{
	my (@nodes) = @_;

	revive($_) foreach @nodes;
	insist(
		sub {
			foreach my $node (@nodes)
			{
				my $server = $peer{ $node->name };

				if ($node->{closed})
				{
					$node->open_to_peers;
					$node->{closed} = 0;
				}
				$node->safe_psql('postgres',
					"SELECT mmrepl.resume('$server'); SELECT mmrepl.retry_now('$server')"
				);
				end_prepared($node);
			}
		});
	return;
}

# Of all tables at once.
sub fingerprint
{
	my ($node) = @_;

	return $node->safe_psql(
		'postgres',
		join(' UNION ALL ',
			map { "SELECT '$_', count(*), sum(hashtext(t.*::text)) FROM $_ t" }
			  @tables)
		  . ' ORDER BY 1');
}

# What a client has prepared and left behind ends one way or the other.
sub end_prepared
{
	my ($node) = @_;

	foreach my $gid (
		split /\n/,
		$node->safe_psql(
			'postgres', q{SELECT gid FROM pg_prepared_xacts WHERE gid ~ '^[ab][.]'}))
	{
		# The client may be about to end it itself.
		$node->psql('postgres',
			(rand() < 0.5 ? 'COMMIT' : 'ROLLBACK') . " PREPARED '$gid'");
	}
	return;
}

# What was acknowledged is there.  A crash may forget what said that it may.
sub acknowledged
{
	my ($nodes, $clients) = @_;
	my %expected;

	foreach my $client (@$clients)
	{
		$expected{$_} = 1 foreach grep { !/lax$/ } @{ $client->{acked} };
	}
	foreach my $node (@$nodes)
	{
		my %there = map { $_ => 1 }
		  split /\n/, $node->safe_psql('postgres', 'SELECT token FROM tx');
		my @missing = grep { !$there{$_} } sort keys %expected;

		is(scalar(@missing), 0,
			scalar(keys %expected)
			  . ' acknowledged transactions are present on '
			  . $node->name)
		  or diag("missing: @missing[0 .. (@missing > 9 ? 9 : $#missing)]");
	}
	return;
}

# Every error that a client may meet; anything else is a surprise.
my $expected_errors =
  qr/^(?:08\w{3}|0A000|28000|42704|55000|57\w{3}|40\w{3}|22012|25P02|55P03|MM\w{3}|53300|55006)/;

sub judge
{
	my ($nodes, $clients, $readers) = @_;
	my ($alpha, $beta) = @$nodes;

	foreach my $node (@$nodes)
	{
		$node->wait_caught_up($peer{ $node->name });
		$node->poll_ok(
			q{SELECT NOT EXISTS (SELECT FROM mmrepl.in_doubt)
			  AND NOT EXISTS (SELECT FROM pg_prepared_xacts)},
			'nothing is in doubt or prepared on ' . $node->name);
	}
	History::same($alpha, $beta,
		'every row had the same versions in the same order');
	acknowledged($nodes, $clients);
	is(fingerprint($beta), fingerprint($alpha), 'all tables are the same');
	foreach my $reader (@$readers)
	{
		my @bad = grep { /violated/ } keys %{ $reader->{errors} };

		is(scalar(@bad), 0,
			'in ' . @{ $reader->{tried} } . ' snapshots every transaction is whole')
		  or diag($bad[0]);
	}
	foreach my $client (@$clients)
	{
		my @strange =
		  grep { !/$expected_errors/ } sort keys %{ $client->{errors} };

		is(scalar(@strange), 0, 'no client met an error of another kind')
		  or diag("$strange[0]");
	}
	return;
}

sub one_round
{
	my ($nodes, $number, $plan) = @_;
	my (@clients, @readers);

	srand($plan->{seed});
	foreach my $node (@$nodes)
	{
		foreach my $client (1, 2)
		{
			push @clients,
			  Client->start(
				$node,
				transactions(
					$node, $kinds{ $plan->{load} },
					substr($node->name, 0, 1) . ".$number.$client"),
				seed => $plan->{seed} + $client,
				pause => 0.002);
		}
		push @readers,
		  Client->start(
			$node,
			sub { return ($_[0], 'SELECT check_twins();') },
			pause => 0.02);
	}
	foreach my $fault (@{ $plan->{faults} })
	{
		Time::HiRes::sleep($plan->{calm});
		next if grep { !defined $_->{_pid} } @$nodes;

		# A server that is just starting anew does not let it happen.
		eval { $faults{$fault}->(@$nodes); 1 } or note "$fault: $@";
	}
	Time::HiRes::sleep($plan->{calm});
	recover(@$nodes);
	Time::HiRes::sleep($plan->{calm} / 2);
	@clients = map { $_->finish } @clients;
	@readers = map { $_->finish } @readers;
	recover(@$nodes);
	judge($nodes, \@clients, \@readers);
	my $acked = 0;
	$acked += @{ $_->{acked} } foreach @clients;
	note "$acked transactions were acknowledged";
	return $acked;
}

# Everything that is random is drawn here, so that a round can be told by its seed.
sub plan_of
{
	my ($seed) = @_;
	my @names = allowed_faults();

	srand($seed);
	my @loads = sort keys %kinds;
	my $load = $loads[ rand @loads ];
	my @chosen = map { $names[ rand @names ] } (1 .. (rand() < 0.3 ? 2 : 1));

	return {
		seed => $seed,
		load => $load,
		faults => \@chosen,
		calm => 0.1 + rand(0.3)
	};
}

# run(rounds => how many)
sub run
{
	my (%params) = @_;
	my $seed = seed(2013);
	my $rounds = $ENV{MMREPL_ROUNDS} || $params{rounds};
	my ($alpha, $beta) = MmreplCluster->new_pair(
		conf => join("\n",
			'restart_after_crash = on',
			'deadlock_timeout = 100ms',
			q{mmrepl.ring_size = '64kB'},
			q{mmrepl.rotate_size = '128kB'},
			q{mmrepl.batch_size = '64kB'},
			q{mmrepl.buffer_memory = '64kB'},
			q{mmrepl.batch_transactions = 50},
			q{mmrepl.retry_min_delay = '20ms'},
			q{mmrepl.retry_max_delay = '200ms'},
			q{mmrepl.sync_timeout = '5s'},
			q{mmrepl.recovery_interval = '1s'}));
	my $acked = 0;

	%peer = (alpha => 'beta', beta => 'alpha');
	$alpha->create_table_on_both($beta, $schema);

	# Each node numbers its transactions for itself.
	$alpha->safe_psql('postgres', 'ALTER SEQUENCE tx_id_seq INCREMENT 2 START 1 RESTART');
	$beta->safe_psql('postgres', 'ALTER SEQUENCE tx_id_seq INCREMENT 2 START 2 RESTART');
	foreach my $node ($alpha, $beta)
	{
		my $server = $peer{ $node->name };

		$node->create_pair($_, $server)
		  foreach ('item', 'twin', 'bulk', 'tx', 'clear_' . $node->name);
		$node->create_pair('strict', $server, q{mode => 'sync'});
		$node->create_pair('lenient', $server,
			q{mode => 'sync', on_unreachable => 'queue'});
	}

	# A table without triggers is applied in another way than one with them.
	History::install($_, grep { !/^(?:twin|bulk|tx)$/ } @tables)
	  foreach ($alpha, $beta);

	foreach my $number (1 .. $rounds)
	{
		my $plan = plan_of($seed + 1000 * $number);
		my $name = "round $number: $plan->{load} load; "
		  . join(', ', @{ $plan->{faults} });

		section $name => sub {
			$acked += one_round([ $alpha, $beta ], $number, $plan);
		} or do {
			diag("$name failed; seed $seed");
			last;
		};
		History::forget($alpha, $beta);
	}
	cmp_ok($acked, '>', 10 * $rounds,
		"$acked transactions were acknowledged in $rounds rounds");
	foreach my $node ($alpha, $beta)
	{
		is( $node->safe_psql(
				'postgres', 'SELECT sum(conflicts) FROM mmrepl.progress'),
			'0',
			$node->name . ': no change met a row that it did not expect');
		is($node->queued($peer{ $node->name }), '0', 'nothing is queued');
		ok(!$node->log_contains(qr/PANIC|TRAP:/),
			'no crash of its own in the log of ' . $node->name);
		$node->stop('fast');
	}
	return;
}

1;
