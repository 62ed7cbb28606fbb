# Chaos.pm
#		Two masters in sync mode do everything to a few rows at once while nodes are
#		killed and connections are cut.
#
# NOTES
#		Each row is born with a name, which stays with it when its key changes.  What
#		is done to a row is written down in the same transaction: each step of its
#		counter, each turn of its flag, its end.  Rows and records have to agree, in
#		every snapshot: an update that is lost, done twice or overwritten shows.  What a
#		transaction does and takes back is not written down, and must not show.
#
#		Values of the second unique index are used once: one that a transaction in doubt
#		had in passing, and that somebody else has taken since, would block the stream.

package Chaos;

use strict;
use warnings;

use Client;
use Masters;
use MmreplCluster;
use Test::More;

# What a row's key may be.
my $keys = 40;

my $schema = qq{
	CREATE TABLE item (id int PRIMARY KEY, born text NOT NULL, n int NOT NULL DEFAULT 1,
		flag bool NOT NULL DEFAULT false, v int NOT NULL DEFAULT 0, u int UNIQUE, doc text);
	CREATE TABLE part (id int PRIMARY KEY, born text NOT NULL, n int NOT NULL DEFAULT 1,
		flag bool NOT NULL DEFAULT false, v int NOT NULL DEFAULT 0, u int, doc text) PARTITION BY RANGE (id);
	ALTER TABLE part ALTER COLUMN doc SET STORAGE EXTERNAL;
	CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO ($keys / 2);
	CREATE TABLE part_2 PARTITION OF part FOR VALUES FROM ($keys / 2) TO (1000);
	CREATE TABLE record (token text, step int, tab text, what text, born text, n int, id int,
		PRIMARY KEY (token, step));
	CREATE TABLE done (token text PRIMARY KEY);

	CREATE VIEW wrong AS
	WITH life AS (
		SELECT tab, born, count(*) FILTER (WHERE what = 'n') AS steps,
			count(DISTINCT n) FILTER (WHERE what = 'n') AS different,
			max(n) FILTER (WHERE what = 'n') AS n,
			count(*) FILTER (WHERE what = 'flag') % 2 = 1 AS flag,
			count(*) FILTER (WHERE what = 'end') AS ends,
			(array_agg(id ORDER BY n DESC) FILTER (WHERE what = 'n'))[1] AS id
		FROM record GROUP BY tab, born),
	alive AS (
		SELECT 'item' AS tab, born, id, n, flag FROM item
		UNION ALL SELECT 'part', born, id, n, flag FROM part)
	SELECT tab, born, life.steps, life.different, life.n AS last, alive.n, life.flag AS turned, alive.flag, life.id AS moved,
		alive.id, life.ends
	FROM life FULL JOIN alive USING (tab, born)
	WHERE life.ends IS NULL OR life.steps IS DISTINCT FROM life.n OR life.different IS DISTINCT FROM life.n
		OR life.ends > 1 OR (life.ends = 1) = (alive.born IS NOT NULL)
		OR alive.n <> life.n OR alive.flag <> life.flag OR alive.id <> life.id;

	CREATE FUNCTION look() RETURNS int LANGUAGE plpgsql AS \$\$
	DECLARE
		found text;
	BEGIN
		SELECT string_agg(wrong::text, ' ') INTO found FROM (SELECT * FROM wrong LIMIT 5) wrong;
		IF found IS NOT NULL THEN
			RAISE EXCEPTION 'violated: %', found;
		END IF;
		RETURN 1;
	END \$\$;

	-- Both changes, the second one if the first one finds a row.
	CREATE FUNCTION there_and_back(first text, second text) RETURNS void LANGUAGE plpgsql AS \$\$
	DECLARE
		n_rows int;
	BEGIN
		EXECUTE first;
		GET DIAGNOSTICS n_rows = ROW_COUNT;
		IF n_rows > 0 THEN
			EXECUTE second;
		END IF;
	END \$\$;

	-- another mark, and the old one again
	CREATE FUNCTION other_mark(tab regclass, here int, mark int) RETURNS void LANGUAGE plpgsql AS \$\$
	DECLARE
		old int;
	BEGIN
		EXECUTE format('SELECT u FROM %s WHERE id = \$1 FOR UPDATE', tab) INTO old USING here;
		EXECUTE format('UPDATE %s SET u = \$2 WHERE id = \$1 AND NOT EXISTS (SELECT FROM %s WHERE u = \$2)', tab, tab)
			USING here, mark;
		EXECUTE format('UPDATE %s SET u = \$2 WHERE id = \$1', tab) USING here, old;
	END \$\$;
};

# The statement with its record: what it returns of each row is written down.
sub recorded
{
	my ($what, $place, $statement) = @_;

	return "WITH w AS ($statement RETURNING born, n, id)"
	  . " INSERT INTO record SELECT '$place->{token}', $place->{step}, '$place->{table}', '$what', born, n, id FROM w;";
}

# What the first statement does is taken back by the second.
sub there_and_back
{
	my ($first, $second) = @_;

	return "SELECT there_and_back('$first', '$second');";
}

# A new value for the columns that no record is about.
sub values_for
{
	my ($at) = @_;

	return rand() < 0.4 ? sprintf('doc = repeat(md5(%d::text), 100)', rand 5) : 'v = v + 1'
	  if $at->{table} eq 'part';
	return 'v = v + 1' if rand() < 0.5;
	return 'u = NULL' if rand() < 0.3;
	return "u = $at->{mark}";
}

# A row that has not been there, with the name that the place gives it.
sub new_row
{
	my ($place, $key) = @_;
	my $u = $place->{table} eq 'item' && rand() < 0.5 ? $place->{mark} : 'NULL';
	my $doc = $place->{table} eq 'part' && rand() < 0.3 ? q{repeat(md5('new'), 100)} : 'NULL';

	return "INSERT INTO $place->{table} (id, born, u, doc) VALUES ($key, '$place->{token}.$place->{step}', $u, $doc)";
}

# What may be done: [weight, name, code]; the code gets the place, a key of a row and another one.
my @deeds = (
	[ 6, 'insert', sub {
		my ($at, $key) = @_;
		return recorded('n', $at, new_row($at, $key) . (rand() < 0.8 ? ' ON CONFLICT DO NOTHING' : ''));
	} ],
	[ 8, 'upsert', sub {
		my ($at, $key) = @_;
		return recorded('n', $at, new_row($at, $key)
			. " ON CONFLICT (id) DO UPDATE SET n = $at->{table}.n + 1, v = $at->{table}.v + 1");
	} ],
	[ 12, 'update', sub {
		my ($at, $key) = @_;
		return recorded('n', $at, "UPDATE $at->{table} SET n = n + 1, " . values_for($at) . " WHERE id = $key");
	} ],
	[ 8, 'toggle', sub {
		my ($at, $key) = @_;
		return recorded('flag', $at, "UPDATE $at->{table} SET flag = NOT flag WHERE id = $key");
	} ],
	[ 4, 'delete', sub {
		my ($at, $key) = @_;
		return recorded('end', $at, "DELETE FROM $at->{table} WHERE id = $key");
	} ],
	[ 6, 'another key', sub {
		my ($at, $key, $other) = @_;
		return recorded('n', $at, "UPDATE $at->{table} SET id = $other, n = n + 1 WHERE id = $key"
			. " AND NOT EXISTS (SELECT FROM $at->{table} WHERE id = $other)");
	} ],
	[ 3, 'no change', sub {
		my ($at, $key) = @_;
		return "UPDATE $at->{table} SET v = v WHERE id IN ($key, $key + 1);";
	} ],
	[ 12, 'there and back', sub {
		my ($at, $key) = @_;
		return there_and_back("UPDATE $at->{table} SET v = v + 7, flag = NOT flag WHERE id = $key",
			"UPDATE $at->{table} SET v = v - 7, flag = NOT flag WHERE id = $key");
	} ],
	[ 8, 'inserted and deleted', sub {
		my ($at, $key) = @_;
		return new_row($at, $key) . ' ON CONFLICT DO NOTHING;'
		  . " DELETE FROM $at->{table} WHERE born = '$at->{token}.$at->{step}';";
	} ],
	[ 6, 'deleted and inserted', sub {
		my ($at, $key) = @_;
		return "WITH d AS (DELETE FROM $at->{table} WHERE id = $key RETURNING *) INSERT INTO $at->{table} SELECT * FROM d;";
	} ],
	[ 4, 'key there and back', sub {
		my ($at, $key, $other) = @_;
		return there_and_back("UPDATE $at->{table} SET id = $other WHERE id = $key"
			  . " AND NOT EXISTS (SELECT FROM $at->{table} WHERE id = $other)",
			"UPDATE $at->{table} SET id = $key WHERE id = $other");
	} ],
	[ 4, 'mark there and back', sub {
		my ($at, $key) = @_;
		return sprintf "SELECT other_mark('%s', %d, %d);", $at->{table}, $key, $at->{mark};
	} ],
	[ 4, 'inserted, and another key', sub {
		my ($at, $key, $other) = @_;
		my $born = "$at->{token}.$at->{step}";
		return recorded('n', $at, new_row($at, $key) . ' ON CONFLICT DO NOTHING')
		  . recorded('n', { %$at, step => $at->{step} . '00' },
			"UPDATE $at->{table} SET id = $other, n = n + 1 WHERE born = '$born'"
			  . " AND NOT EXISTS (SELECT FROM $at->{table} WHERE id = $other)");
	} ],
);

# Few keys have most of it.
sub any_key
{
	return 1 + int($keys * rand()**2);
}

sub deed
{
	my ($at, $key, $other) = @_;
	my $sum = 0;

	$sum += $_->[0] foreach @deeds;
	my $number = rand $sum;
	foreach my $deed (@deeds)
	{
		return $deed->[2]->($at, $key, $other) if ($number -= $deed->[0]) < 0;
	}
	return;
}

# One to three deeds, mostly in the order of their keys; some within a savepoint that is
# rolled back.
sub deeds
{
	my ($token, $mark) = @_;
	my @keys = map { any_key() } (0 .. int rand 3);
	my $step = 0;
	my $sql = '';

	@keys = sort { $a <=> $b } @keys if rand() < 0.9;
	foreach my $key (@keys)
	{
		my $at = { token => $token, step => ++$step, mark => 10 * $mark + $step, table => rand() < 0.5 ? 'item' : 'part' };
		my $other = any_key();
		my $undone = rand() < 0.15;

		$sql .= ' SAVEPOINT s;' if $undone;
		$sql .= ' ' . deed($at, $key, $other);
		$sql .= ' ROLLBACK TO s;' if $undone;
	}
	return $sql;
}

# What a client does: one transaction after the other, each under a name of its own.
sub transactions
{
	my ($prefix, $first_mark, $two_phase, $applied) = @_;

	return sub {
		my ($number) = @_;
		my $token = "$prefix.$number";
		my $sql = 'BEGIN;'
		  . (rand() < 0.3 ? q{ SET LOCAL mmrepl.sync_flush = 'commit';} : '')
		  . (rand() < $applied ? q{ SET LOCAL mmrepl.sync_commit = 'applied';} : '')
		  . (rand() < $two_phase ? q{ SET LOCAL mmrepl.two_phase = 'on';} : '')
		  . deeds($token, $first_mark + $number)
		  . " INSERT INTO done VALUES ('$token');"
		  . ' COMMIT;';

		return ($token, $sql);
	};
}

sub judge
{
	my ($alpha, $beta, $writers, $readers) = @_;
	my %acked = Masters::acked(@$writers);

	foreach my $reader (@$readers)
	{
		my @bad = grep { /violated/ } keys %{ $reader->{errors} };

		is(scalar(@bad), 0,
			'rows and records agree in ' . @{ $reader->{tried} } . ' snapshots')
		  or diag($bad[0]);
	}
	foreach my $node ($alpha, $beta)
	{
		my $name = $node->name;
		my %there = map { $_ => 1 }
		  split /\n/, $node->safe_psql('postgres', 'SELECT token FROM done');
		my @missing = grep { !$there{$_} } sort keys %acked;

		is(scalar(@missing), 0, "$name has every acknowledged transaction")
		  or diag("missing: @missing[0 .. (@missing > 9 ? 9 : $#missing)]");
		is($node->safe_psql('postgres', 'SELECT * FROM wrong LIMIT 10'),
			'', "$name: rows and records agree at the end");
	}
	Masters::judge($alpha, $beta, 'item', 'part', 'record', 'done');
	return scalar keys %acked;
}

# run(seconds => how long, clients => how many on each node, faults => [names], two_phase
# => the part of the transactions that commits in two phases, applied => the part whose
# COMMIT does not wait for the peer's flush)
sub run
{
	my (%params) = @_;
	my $seed = seed(2013);
	my ($alpha, $beta) = Masters::start();
	my (@writers, @readers);

	$alpha->create_table_on_both($beta, $schema);
	$alpha->create_pair_on_both($beta, $_, q{mode => 'sync'})
	  foreach ('item', 'part', 'record', 'done');
	foreach my $node ($alpha, $beta)
	{
		foreach my $client (1 .. $params{clients})
		{
			push @writers,
			  Client->start($node,
				transactions(substr($node->name, 0, 1) . $client, 1_000_000 * @writers, $params{two_phase}, $params{applied}),
				seed => $seed++);
		}
		push @readers,
		  Client->start($node, sub { return ($_[0], 'SELECT look();') }, pause => 0.3);
	}
	Masters::storm($params{seconds}, $params{faults}, 0.3, $alpha, $beta);
	$_ = $_->finish foreach (@writers, @readers);
	Masters::settle($alpha, $beta);
	cmp_ok(judge($alpha, $beta, \@writers, \@readers),
		'>', 5 * $params{seconds}, 'there was a load');
	Masters::end($alpha, $beta);
	return;
}

1;
