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
#		is another one.  What strikes the nodes is in Masters.pm.

package Bank;

use strict;
use warnings;

use Client;
use Masters;
use MmreplCluster;
use Test::More;

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
	my %acked = Masters::acked(@$writers);

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
	Masters::judge($alpha, $beta, 'account', 'transfer');
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
	my ($alpha, $beta) = Masters::start($masters == 1 ? q{wal_writer_delay = '10s'} : ());

	$alpha->create_table_on_both($beta, $schema);
	$alpha->create_table_on_both($beta,
		"INSERT INTO account SELECT g, 1000 FROM generate_series(1, $accounts) g"
	);
	$alpha->create_pair_on_both($beta, $_, q{mode => 'sync'})
	  foreach ('account', 'transfer');

	my ($writers, $readers) =
	  start_clients($seed, $params{clients}, $params{two_phase}, $params{applied} || 0, $masters, $alpha, $beta);
	Masters::storm($params{seconds}, $params{faults}, 1, $masters > 1 ? ($alpha, $beta) : $beta);
	$_ = $_->finish foreach (@$writers, @$readers);
	Masters::settle($alpha, $beta);
	cmp_ok(judge($alpha, $beta, $writers, $readers),
		'>', 20 * $params{seconds}, 'there was a load');
	Masters::end($alpha, $beta);
	return;
}

1;
