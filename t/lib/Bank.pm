# Bank.pm
#		Two masters in sync mode move money between the same accounts while nodes
#		are killed and connections are cut.
#
# NOTES
#		A transfer names itself in its first statement, under a primary key: a
#		client that does not know what became of it tries again under the same
#		name, and "exists already" is an answer, too.
#
#		Faults and transfers follow from the seed, which is printed; MMREPL_SEED
#		is another one.

package Bank;

use strict;
use warnings;

use Client;
use FaultProxy;
use MmreplCluster;
use Test::More;
use Time::HiRes ();

my $accounts = 1000;

my $schema = qq{
	CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL);
	CREATE TABLE transfer (token text PRIMARY KEY, a int, b int, amount int);
	CREATE FUNCTION check_sum() RETURNS int LANGUAGE plpgsql AS \$\$
	DECLARE
		total bigint;
	BEGIN
		SELECT sum(balance) INTO total FROM account;
		IF total <> 1000 * $accounts THEN
			RAISE EXCEPTION 'violated: the accounts hold %', total;
		END IF;
		RETURN 1;
	END \$\$;
};

# What a client does: one transfer after the other, each until it is done.
sub transfers
{
	my ($prefix, $two_phase, $applied) = @_;
	my $done = 0;
	my ($token, $sql);

	return sub {
		my ($number, $last) = @_;

		if (!defined $token || $last->{acked} || $last->{state} eq '23505')
		{
			my ($a, $b) =
			  sort { $a <=> $b } map { 1 + int(rand($accounts)) } (1, 2);
			my $amount = int(rand(200)) - 100;

			# Nobody at the other node can see in the accounts that these are missing.
			$amount = 0 if rand() < 0.125;
			$b = $a if rand() < 0.125;

			$done++;
			$token = "$prefix.$done";
			$sql = 'BEGIN; '
			  . (rand() < 0.3 ? q{SET LOCAL mmrepl.sync_flush = 'commit'; } : '')
			  . (rand() < $applied ? q{SET LOCAL mmrepl.sync_commit = 'applied'; } : '')
			  . (rand() < $two_phase ? q{SET LOCAL mmrepl.two_phase = 'on'; } : '')
			  . "INSERT INTO transfer VALUES ('$token', $a, $b, $amount);"
			  . " UPDATE account SET balance = balance - $amount WHERE id = $a;"
			  . " UPDATE account SET balance = balance + $amount WHERE id = $b;"
			  . ' COMMIT;';
		}
		return ($token, $sql);
	};
}

# One blow; what it stops is brought back by heal().
sub strike
{
	my ($one, $faults) = @_;
	my $fault = $faults->[ rand @$faults ];

	if ($fault eq 'immediate')
	{
		$one->stop('immediate');
	}
	elsif ($fault eq 'fast')
	{
		$one->stop('fast');
	}
	elsif ($fault eq 'kill')
	{
		my ($ret, $pid) = $one->psql(
			'postgres', q{SELECT pid FROM pg_stat_activity
						  WHERE backend_type = 'client backend'
						  AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1});
		kill 'KILL', $pid if $ret == 0 && $pid =~ /^\d+$/;
	}
	elsif ($fault eq 'cut')
	{
		# the sessions of the other node's writers, in whatever they are doing
		$one->psql('postgres',
			q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			  WHERE client_addr IS NOT NULL});
	}
	elsif ($fault eq 'close')
	{
		$one->{closed} = 1;
		$one->close_to_peers;
		Time::HiRes::sleep(rand(0.5));
	}
	elsif ($fault eq 'reset')
	{
		$one->{proxy}->reset;
	}
	elsif ($fault eq 'lost answer' || $fault eq 'lost commit')
	{
		# of the next few COMMITs, one a connection
		$one->{proxy}->rule(
			action => 'reset',
			from => 'client',
			pattern => 'COMMIT',
			when => $fault eq 'lost answer' ? 'after' : 'before',
			times => 4);
		Time::HiRes::sleep(0.3);
	}
	elsif ($fault eq 'stall')
	{
		$one->{proxy}->hold;
		Time::HiRes::sleep(rand(1));
		$one->{proxy}->release;
	}
	elsif ($fault eq 'black hole')
	{
		$one->{proxy}->new_connections('black hole');
		$one->{proxy}->reset;
		Time::HiRes::sleep(rand(1));
	}
	return $fault;
}

sub heal
{
	my ($node) = @_;

	$node->{proxy}->clear;
	$node->{proxy}->new_connections('pass');
	$node->start unless defined $node->{_pid};
	insist(
		sub {
			$node->safe_psql('postgres', 'SELECT true');
			$node->open_to_peers if $node->{closed};
			$node->{closed} = 0;
		});
	return;
}

sub start_clients
{
	my ($seed, $clients, $two_phase, $applied, $masters, @nodes) = @_;
	my (@writers, @readers);

	foreach my $node (@nodes)
	{
		foreach my $client (1 .. ($masters-- > 0 ? $clients : 0))
		{
			push @writers,
			  Client->start($node,
				transfers(substr($node->name, 0, 1) . $client, $two_phase, $applied),
				seed => $seed++);
		}
		push @readers,
		  Client->start($node, sub { return ($_[0], 'SELECT check_sum();') },
			pause => 0.02);
	}
	return (\@writers, \@readers);
}

sub judge
{
	my ($alpha, $beta, $writers, $readers) = @_;
	my (%acked, %errors);

	foreach my $writer (@$writers)
	{
		$acked{$_} = 1 foreach @{ $writer->{acked} };
		$errors{ substr $_, 0, 5 } += $writer->{errors}->{$_}
		  foreach keys %{ $writer->{errors} };
	}
	note scalar(keys %acked) . ' transfers; errors: '
	  . join(', ', map { "$_ $errors{$_}" } sort keys %errors);
	foreach my $reader (@$readers)
	{
		my @bad = grep { /violated/ } keys %{ $reader->{errors} };

		is(scalar(@bad), 0,
			'the total is right in ' . @{ $reader->{tried} } . ' snapshots')
		  or diag($bad[0]);
	}
	foreach my $node ($alpha, $beta)
	{
		my $name = $node->name;
		my %there = map { $_ => 1 }
		  split /\n/,
		  $node->safe_psql('postgres', 'SELECT token FROM transfer');
		my @missing = grep { !$there{$_} } sort keys %acked;

		is(scalar(@missing), 0, "$name has every acknowledged transfer")
		  or diag("missing: @missing[0 .. (@missing > 9 ? 9 : $#missing)]");
		is( $node->safe_psql('postgres', 'SELECT sum(balance) FROM account'),
			1000 * $accounts,
			"$name: the total is right at the end");
		is( $node->safe_psql(
				'postgres', q{
				SELECT count(*) FROM account LEFT JOIN
					(SELECT id, sum(amount) AS moved
					 FROM (SELECT a AS id, -amount AS amount FROM transfer
						   UNION ALL SELECT b, amount FROM transfer) parts
					 GROUP BY id) sums USING (id)
				WHERE balance <> 1000 + coalesce(moved, 0)}),
			'0',
			"$name: every account holds what its transfers made of it");
	}
	$alpha->same_rows($beta, $_) foreach ('account', 'transfer');
	return scalar keys %acked;
}

# run(seconds => how long, clients => how many on each node, faults => [names],
# two_phase => the part of the transfers that commits in two phases, applied => the
# part whose COMMIT does not wait for the peer's flush, masters => 1 if clients write to
# one node alone, and the other is struck: what that has not flushed nobody else flushes there)
sub run
{
	my (%params) = @_;
	my $seed = seed(2013);
	my $masters = $params{masters} || 2;
	my ($alpha, $beta) = MmreplCluster->new_pair(
		conf => join("\n",
			'max_connections = 120',
			'restart_after_crash = on',
			'deadlock_timeout = 100ms',
			q{mmrepl.retry_min_delay = '20ms'},
			q{mmrepl.retry_max_delay = '200ms'},
			'max_prepared_transactions = 60',
			$masters == 1 ? q{wal_writer_delay = '10s'} : (),
			q{mmrepl.recovery_interval = '1s'},
			q{mmrepl.sync_timeout = '5s'}));

	$alpha->create_table_on_both($beta, $schema);
	$alpha->create_table_on_both($beta,
		"INSERT INTO account SELECT g, 1000 FROM generate_series(1, $accounts) g"
	);
	$_->{proxy} = FaultProxy->new(port => $_->port) foreach ($alpha, $beta);
	foreach ([ $alpha, $beta ], [ $beta, $alpha ])
	{
		my ($node, $peer) = @$_;

		$node->safe_psql('postgres',
			sprintf(q{ALTER SERVER %s OPTIONS (SET port '%d')},
				$peer->name, $peer->{proxy}->port));
	}
	$alpha->create_pair_on_both($beta, $_, q{mode => 'sync'})
	  foreach ('account', 'transfer');

	my ($writers, $readers) =
	  start_clients($seed, $params{clients}, $params{two_phase}, $params{applied} || 0, $masters, $alpha, $beta);
	my $until = Time::HiRes::time() + $params{seconds};
	my %blows;
	while (Time::HiRes::time() < $until)
	{
		my $one = $masters > 1 && rand() < 0.5 ? $alpha : $beta;

		Time::HiRes::sleep(0.3 + rand(0.7));
		# A server that is just starting anew does not let it happen.
		eval { $blows{ strike($one, $params{faults}) }++; 1 } or note "blow: $@";
		Time::HiRes::sleep(rand(0.3));
		heal($_) foreach ($alpha, $beta);
	}
	$_ = $_->finish foreach (@$writers, @$readers);
	note 'blows: ' . join(', ', map { "$_ $blows{$_}" } sort keys %blows);
	heal($_) foreach ($alpha, $beta);
	$_->[0]->safe_psql('postgres', "SELECT mmrepl.retry_now('$_->[1]')")
	  foreach ([ $alpha, 'beta' ], [ $beta, 'alpha' ]);
	foreach ([ $alpha, 'beta' ], [ $beta, 'alpha' ])
	{
		my ($node, $server) = @$_;

		$node->wait_caught_up($server);
		$node->poll_ok(
			q{SELECT NOT EXISTS (SELECT FROM mmrepl.in_doubt)
			  AND NOT EXISTS (SELECT FROM pg_prepared_xacts)},
			'nothing is in doubt or prepared on ' . $node->name);
	}
	cmp_ok(judge($alpha, $beta, $writers, $readers),
		'>', 20 * $params{seconds}, 'there was a load');
	foreach my $node ($alpha, $beta)
	{
		ok(!$node->log_contains(qr/PANIC|TRAP:/),
			'no crash of its own in the log of ' . $node->name);
		$node->stop('fast');
	}
	return;
}

1;
