# More tables than the receiver keeps ready from one batch to the next.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use Test::More;

my $tables = 300;
my ($alpha, $beta) = MmreplCluster->new_pair(conf => "mmrepl.batch_transactions = 50\n");

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

$alpha->create_table_on_both($beta, qq{
	DO \$\$ BEGIN
		FOR i IN 1 .. $tables LOOP
			EXECUTE format('CREATE TABLE many_%s (id int PRIMARY KEY, v int, t text)', i);
		END LOOP;
	END \$\$;
	CREATE FUNCTION all_rows() RETURNS text LANGUAGE plpgsql AS \$\$
	DECLARE
		one text;
		result text := '';
	BEGIN
		FOR i IN 1 .. $tables LOOP
			EXECUTE format('SELECT md5(coalesce(string_agg(concat_ws(\$1, id, v, t), \$1 ORDER BY id), \$1)) FROM many_%s', i)
				INTO one USING ',';
			result := result || one;
		END LOOP;
		RETURN md5(result);
	END \$\$});
here("SELECT count(mmrepl.create_pair(('many_' || g)::regclass, 'beta')) FROM generate_series(1, $tables) g");

# Transactions on tables $from to $to, in an order that is another one each time.
sub write_rows
{
	my ($rounds, $from, $to) = @_;

	here(qq{DO \$\$
		DECLARE
			n int := 0;
			i int;
		BEGIN
			FOR round IN 1 .. $rounds LOOP
				FOR i IN SELECT g FROM generate_series($from, $to) g ORDER BY hashint4(g * 1000 + round) LOOP
					EXECUTE format('INSERT INTO many_%s AS m VALUES (1 + \$1 %% 3, \$1, repeat(\$2, 20))
						ON CONFLICT (id) DO UPDATE SET v = m.v + 1', i) USING round, 'x';
					n := n + 1;
					IF n % 7 = 0 THEN
						COMMIT;
					END IF;
				END LOOP;
			END LOOP;
		END \$\$});
	return;
}

sub equal
{
	my ($name) = @_;

	$alpha->wait_caught_up('beta');
	return is(there('SELECT all_rows()'), here('SELECT all_rows()'), $name);
}

section 'tables in turn' => sub {
	write_rows(8, 1, $tables);
	equal('all tables');
	is(there('SELECT count(*) FROM many_17'), '3', 'and they have rows');
};

section 'some often, the others seldom' => sub {
	write_rows(1, 1, 20), write_rows(1, 1, $tables) foreach (1 .. 3);
	equal('all tables');
};

# What was kept of them is of no use any more, wherever it stands in the list.
section 'tables that change' => sub {
	there(qq{DO \$\$ BEGIN
		FOR i IN 1 .. $tables BY 10 LOOP
			EXECUTE format('ALTER TABLE many_%s ADD w int, ADD more int DEFAULT 5', i);
			EXECUTE format('UPDATE many_%s SET w = v', i);
			EXECUTE format('ALTER TABLE many_%s DROP v', i);
			EXECUTE format('ALTER TABLE many_%s RENAME w TO v', i);
			EXECUTE format('CREATE INDEX ON many_%s (v)', i + 1);
			EXECUTE format('ALTER TABLE many_%s RENAME TO gone; CREATE TABLE many_%s (LIKE gone INCLUDING ALL);
				INSERT INTO many_%s SELECT * FROM gone; DROP TABLE gone', i + 2, i + 2, i + 2);
		END LOOP;
	END \$\$});
	write_rows(4, 1, $tables);
	equal('all tables');
	is(there('SELECT string_agg(DISTINCT more::text, $$ $$) FROM many_11'), '5', 'the new columns');
	is(there(
			q{SET enable_seqscan = off; SET enable_bitmapscan = off;
			  SELECT count(*) FROM many_12 WHERE v > 0}),
		here('SELECT count(*) FROM many_12 WHERE v > 0'), 'the new indexes');
};

done_testing();
