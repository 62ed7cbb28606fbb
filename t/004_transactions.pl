# Transactions of every shape arrive whole, once, and with the values they had:
# subtransactions, transactions that do not fit into memory, deferred work,
# cascades, prepared transactions, and every type.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my ($alpha, $beta) = MmreplCluster->new_pair;

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

sub there
{
	return $beta->safe_psql('postgres', $_[0]);
}

sub synced
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->wait_caught_up('beta');
}

# The same DDL on both sides, and a pair for every table it names.
sub paired
{
	my ($ddl, @tables) = @_;
	$alpha->create_table_on_both($beta, $ddl);
	$alpha->create_pair($_, 'beta') foreach @tables;
	return;
}

sub set_mode
{
	my ($mode, @tables) = @_;
	here("SELECT mmrepl.alter_pair('$_', 'beta', mode => '$mode')")
	  foreach @tables;
	return;
}

###############################################################################

section 'subtransactions' => sub {
	paired('CREATE TABLE sub (id int PRIMARY KEY, v text)', 'sub');
	foreach my $mode ('async', 'sync')
	{
		set_mode($mode, 'sub');
		here(
			q{
			BEGIN;
			INSERT INTO sub VALUES (1, 'top');
			SAVEPOINT a;
			INSERT INTO sub VALUES (2, 'a');
			SAVEPOINT b;
			INSERT INTO sub VALUES (3, 'b');
			UPDATE sub SET v = v || '-b';
			SAVEPOINT c;
			INSERT INTO sub VALUES (4, 'c');
			DELETE FROM sub WHERE id = 1;
			RELEASE c;
			ROLLBACK TO b;
			INSERT INTO sub VALUES (5, 'b again');
			RELEASE b;
			SAVEPOINT d;
			UPDATE sub SET v = v || '-d' WHERE id = 5;
			ROLLBACK TO d;
			ROLLBACK TO d;
			UPDATE sub SET v = v || '+d' WHERE id = 2;
			RELEASE a;
			SAVEPOINT e;
			INSERT INTO sub VALUES (6, 'e');
			COMMIT;});
		synced();
		is( there('SELECT * FROM sub ORDER BY id'),
			"1|top\n2|a+d\n5|b again\n6|e",
			"$mode: nested savepoints, released and rolled back");
		here('TRUNCATE sub');

		# A thousand blocks, every second one fails.
		here(
			q{
			DO $$
			BEGIN
				FOR i IN 1 .. 1000 LOOP
					BEGIN
						INSERT INTO sub VALUES (i, 'loop');
						UPDATE sub SET v = 'kept ' || i WHERE id = i;
						IF i % 2 = 0 THEN
							RAISE EXCEPTION 'no';
						END IF;
					EXCEPTION WHEN raise_exception THEN
						INSERT INTO sub VALUES (-i, 'handler');
					END;
				END LOOP;
			END$$;});
		synced();
		is( there(
				q{SELECT count(*) FILTER (WHERE id > 0 AND v = 'kept ' || id),
						 count(*) FILTER (WHERE id < 0),
						 count(*) FILTER (WHERE id > 0 AND id % 2 = 0)
				  FROM sub}),
			'500|500|0',
			"$mode: a plpgsql loop of 1000 blocks, half of which fail");
		$alpha->same_rows($beta, 'sub', name => "$mode: rows are equal");

		# An error inside a nested function takes only its own block along.
		here(
			q{
			DO $$
			BEGIN
				DELETE FROM sub WHERE id < 0;
				BEGIN
					DELETE FROM sub WHERE id < 500;
					BEGIN
						DELETE FROM sub WHERE id < 900;
						PERFORM 1 / 0;
					EXCEPTION WHEN division_by_zero THEN
						UPDATE sub SET v = 'inner' WHERE id = 999;
					END;
					INSERT INTO sub VALUES (999, 'duplicate');
				EXCEPTION WHEN unique_violation THEN
					UPDATE sub SET v = 'outer' WHERE id = 1;
				END;
			END$$;});
		synced();
		is( there(
				q{SELECT count(*), max(v) FILTER (WHERE id = 1),
						 max(v) FILTER (WHERE id = 999) FROM sub}),
			'500|outer|kept 999',
			"$mode: blocks within blocks");
		here('TRUNCATE sub');
		synced();
	}
};

section 'a transaction larger than its buffer' => sub {
	paired('CREATE TABLE big (id int PRIMARY KEY, v text)', 'big');
	my $session = $alpha->session;
	$session->start(
		q{
		BEGIN;
		INSERT INTO big SELECT g, 'before ' || g FROM generate_series(1, 100000) g;
		SAVEPOINT child;
		INSERT INTO big SELECT g, 'gone ' || g FROM generate_series(100001, 200000) g;
		UPDATE big SET v = 'gone' WHERE id < 100;
		ROLLBACK TO child;
		INSERT INTO big SELECT g, 'after ' || g FROM generate_series(200001, 300000) g;
		DELETE FROM big WHERE id % 1000 = 0;
		SAVEPOINT other;
		UPDATE big SET v = 'kept' WHERE id % 1000 = 1;
		RELEASE other;
		COMMIT});
	my ($out, $err) = $session->finish;
	is($err, '', 'a transaction of 300000 rows commits');
	my $total = here('SELECT count(*) FROM big');
	is($total, '199800', 'and holds what it should here');

	# It arrives whole: whoever looks sees nothing or all of it.
	$session->start(q{SELECT mmrepl.wait_for_replay('beta', '3 min')});
	my %seen;
	my $deadline = Time::HiRes::time() + $MmreplCluster::timeout;
	do
	{
		$seen{ there('SELECT count(*) FROM big') } = 1;
	} until ($seen{$total} || Time::HiRes::time() > $deadline);
	($out, $err) = $session->finish;
	is($out, 't', 'it arrives');
	is(join(' ', grep { $_ ne '0' && $_ ne $total } keys %seen),
		'', 'and is never seen in part');
	is( there(
			q{SELECT count(*) FILTER (WHERE v LIKE 'gone%'),
					   count(*) FILTER (WHERE v = 'kept') FROM big}),
		'0|200',
		'the child that was rolled back is not in it');
	$alpha->same_rows($beta, 'big');

	# The same, rolled back as a whole: nothing is left in the queue.
	here(q{BEGIN; DELETE FROM big; ROLLBACK});
	synced();
	$alpha->same_rows($beta, 'big', name => 'a large ROLLBACK');
	here('DELETE FROM big');
	synced();
	is(there('SELECT count(*) FROM big'), '0', 'a large DELETE');
	is($alpha->queued('beta'), '0', 'and nothing stays queued');
	$session->quit;

	# What a child has spilled goes with the child.
	here(
		q{
		SET mmrepl.buffer_memory = '64kB';
		DO $$
		BEGIN
			INSERT INTO big SELECT g, repeat('p', 50) FROM generate_series(1, 5000) g;
			FOR i IN 1 .. 20 LOOP
				BEGIN
					INSERT INTO big SELECT i * 10000 + g, repeat('c', 50)
					FROM generate_series(1, 2000) g;
					UPDATE big SET v = 'by ' || i WHERE id BETWEEN 1 AND 100;
					IF i % 2 = 0 THEN
						RAISE EXCEPTION 'no';
					END IF;
				EXCEPTION WHEN raise_exception THEN
					INSERT INTO big VALUES (-i, 'handler');
				END;
				UPDATE big SET v = v || '+' WHERE id BETWEEN 101 AND 200;
			END LOOP;
		END$$;});
	synced();
	is( there(
			q{SELECT count(*), count(*) FILTER (WHERE v = 'by 19'),
					 count(*) FILTER (WHERE v = 'handler') FROM big}),
		'25010|100|10',
		'children that spill, every second one rolled back');
	$alpha->same_rows($beta, 'big');
	here('DELETE FROM big');

	# Small work of others does not get mixed into it.
	my $other = $alpha->session;
	$other->ok('BEGIN');
	$other->ok(
		q{INSERT INTO big SELECT g, 'slow' FROM generate_series(1, 20000) g});
	foreach my $id (50001 .. 50003)
	{
		here("INSERT INTO big VALUES ($id, 'quick')");
	}
	synced();
	is(there('SELECT count(*) FROM big'),
		'3',
		'work committed meanwhile does not wait for a large transaction');
	$other->ok(
		q{INSERT INTO big SELECT g, 'slow' FROM generate_series(20001, 40000) g}
	);
	$other->ok('COMMIT');
	$other->quit;
	synced();
	$alpha->same_rows($beta, 'big', name => 'which follows when it commits');
};

section 'wide rows' => sub {
	paired(
		q{CREATE TABLE wide (id int PRIMARY KEY, t text, b bytea, n int);
		  ALTER TABLE wide ALTER t SET STORAGE EXTERNAL},
		'wide');

	# Random, so that no compression makes them small.
	here(
		q{
		CREATE FUNCTION noise(bytes int) RETURNS text LANGUAGE sql AS
		$$SELECT left(string_agg(md5(random()::text), ''), bytes)
		  FROM generate_series(0, bytes / 32)$$;});
	foreach my $mode ('async', 'sync')
	{
		set_mode($mode, 'wide');
		here(
			q{
			INSERT INTO wide
			SELECT row_number() OVER (), noise(bytes), NULL, 0
			FROM unnest('{7900,7990,8000,8010,8191,8192,8193,16384,65536,100000}'::int[]) bytes;
			INSERT INTO wide SELECT 101, noise(1500000), NULL, 0;
			INSERT INTO wide SELECT 102, repeat('x', 20000000), NULL, 0;
			INSERT INTO wide
			SELECT 103, '', decode(noise(8000000), 'hex'), 0;
			INSERT INTO wide
			SELECT 200 + g, noise(20000), convert_to(noise(30000), 'UTF8'), 0
			FROM generate_series(1, 50) g;});
		synced();
		$alpha->same_rows($beta, 'wide', name => "$mode: inserts");

		# The wide values do not change and are not even read.
		here('UPDATE wide SET n = n + 1');
		here('UPDATE wide SET id = -id WHERE id > 100');
		here(q{UPDATE wide SET t = t || 'tail' WHERE id % 2 = 0});
		synced();
		$alpha->same_rows($beta, 'wide',
			name => "$mode: updates of and beside wide values");
		here('DELETE FROM wide');
		synced();
		is(there('SELECT count(*) FROM wide'), '0', "$mode: deletes");
	}
};

section 'deferred constraints and triggers' => sub {
	paired(
		q{
		CREATE TABLE boss (id int PRIMARY KEY, rank int
		  UNIQUE DEFERRABLE INITIALLY DEFERRED);
		CREATE TABLE worker (id int PRIMARY KEY, boss int
		  REFERENCES boss DEFERRABLE INITIALLY DEFERRED);
		CREATE TABLE audit (id int PRIMARY KEY, what text);
	}, 'boss', 'worker', 'audit');
	here(
		q{
		CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO audit VALUES (NEW.id, 'noted at commit');
			RETURN NULL;
		END$$;
		CREATE CONSTRAINT TRIGGER note AFTER INSERT ON worker
		DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION note();});
	here(
		q{
		BEGIN;
		INSERT INTO worker VALUES (1, 10), (2, 10);
		INSERT INTO boss VALUES (10, 1), (11, 2), (12, 3);
		COMMIT;});
	synced();
	$alpha->same_rows($beta, $_, name => "child before parent: $_")
	  foreach ('boss', 'worker');
	is( there('SELECT * FROM audit ORDER BY id'),
		"1|noted at commit\n2|noted at commit",
		'what a deferred trigger writes at commit is captured');
	here('UPDATE boss SET rank = 4 - rank');
	here(
		q{BEGIN; UPDATE boss SET rank = 3 WHERE id = 10;
		   UPDATE boss SET rank = 1 WHERE id = 12; COMMIT});
	synced();
	$alpha->same_rows($beta, 'boss', name => 'a deferred unique constraint');
	here(
		q{BEGIN; DELETE FROM boss WHERE id = 10;
		   UPDATE worker SET boss = 11; COMMIT});
	synced();
	$alpha->same_rows($beta, $_, name => "parent deleted before child: $_")
	  foreach ('boss', 'worker');

	# A commit that fails in a deferred constraint was never there.
	like(
		$alpha->fails(
			'postgres', q{BEGIN; INSERT INTO worker VALUES (99, 99); COMMIT}),
		qr/ERROR:\s+23503: /,
		'a deferred constraint fails at commit');
	synced();
	is(there('SELECT count(*) FROM worker WHERE id = 99'),
		'0', 'and nothing of it arrives');
};

section 'cascades at the source' => sub {
	paired(
		q{
		CREATE TABLE top (id int PRIMARY KEY);
		CREATE TABLE mid (id int PRIMARY KEY,
		  top int REFERENCES top ON DELETE CASCADE ON UPDATE CASCADE,
		  up int REFERENCES mid ON DELETE CASCADE);
		CREATE TABLE low (id int PRIMARY KEY,
		  mid int REFERENCES mid ON DELETE SET NULL,
		  top int DEFAULT 0 REFERENCES top
			ON DELETE SET DEFAULT ON UPDATE CASCADE);
	}, 'top', 'mid', 'low');
	here(
		q{INSERT INTO top SELECT generate_series(0, 5);
		   INSERT INTO mid SELECT g, g % 5 + 1, CASE WHEN g > 5 THEN g - 5 END
		   FROM generate_series(1, 30) g;
		   INSERT INTO low SELECT g, g % 30 + 1, g % 5 + 1
		   FROM generate_series(1, 60) g});
	synced();
	here('DELETE FROM top WHERE id IN (1, 2)');
	here('UPDATE top SET id = id + 100 WHERE id = 3');
	synced();
	$alpha->same_rows($beta, $_) foreach ('top', 'mid', 'low');
	is( there('SELECT count(*) FROM low WHERE mid IS NULL'),
		here('SELECT count(*) FROM low WHERE mid IS NULL'),
		'SET NULL arrived');
	cmp_ok(there('SELECT count(*) FROM mid'), '<', 30, 'CASCADE arrived');
	set_mode('sync', 'top', 'mid', 'low');
	here('DELETE FROM top WHERE id IN (4, 103)');
	$alpha->same_rows($beta, $_, name => "sync: $_")
	  foreach ('top', 'mid', 'low');
};

section 'statements of several kinds of change' => sub {
	paired(
		q{
		CREATE TABLE kind (id int PRIMARY KEY, v text);
		CREATE TABLE attic (id int PRIMARY KEY, v text);
	}, 'kind', 'attic');
	here(q{INSERT INTO kind SELECT g, 'v' || g FROM generate_series(1, 100) g}
	);
	here(
		q{WITH d AS (DELETE FROM kind WHERE id <= 10 RETURNING *)
		   INSERT INTO attic SELECT * FROM d});
	here(
		q{WITH d AS (DELETE FROM kind WHERE id BETWEEN 11 AND 20 RETURNING *),
				i AS (INSERT INTO kind SELECT id + 1000, v FROM d RETURNING *),
				u AS (UPDATE kind SET v = 'cte' WHERE id BETWEEN 21 AND 30
					  RETURNING *)
		   INSERT INTO attic SELECT * FROM i UNION ALL SELECT * FROM u});
	here(
		q{INSERT INTO kind SELECT g, 'upsert' FROM generate_series(90, 110) g
		   ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v});
	here(
		q{INSERT INTO kind VALUES (90, 'no'), (111, 'yes')
		   ON CONFLICT DO NOTHING});
	here(
		q{MERGE INTO kind USING (SELECT generate_series(85, 115) AS id) s
		   ON kind.id = s.id
		   WHEN MATCHED AND s.id < 90 THEN DELETE
		   WHEN MATCHED THEN UPDATE SET v = 'merged'
		   WHEN NOT MATCHED THEN INSERT VALUES (s.id, 'merge new')});
	here(   qq{COPY kind FROM stdin;\n}
		  . join('', map { "$_\tcopied \\\\ \\N$_\n" } (2000 .. 2999))
		  . "3000\t\\N\n\\.\n");
	synced();
	$alpha->same_rows($beta, $_) foreach ('kind', 'attic');
	is( there(
			q{SELECT count(*) FILTER (WHERE v = 'merged'),
					   count(*) FILTER (WHERE v = 'merge new'),
					   count(*) FILTER (WHERE id BETWEEN 2000 AND 3000)
				FROM kind}),
		'22|4|1001',
		'CTE, upsert, MERGE and COPY did what they should');
};

section 'one row, many times' => sub {
	paired('CREATE TABLE same (id int PRIMARY KEY, n int)', 'same');
	foreach my $mode ('async', 'sync')
	{
		set_mode($mode, 'same');
		here('INSERT INTO same VALUES (1, 10), (2, 20), (3, 0)');
		here(
			q{BEGIN; UPDATE same SET id = 0 WHERE id = 1;
			   UPDATE same SET id = 1 WHERE id = 2;
			   UPDATE same SET id = 2 WHERE id = 0; COMMIT});
		synced();
		is(there('SELECT * FROM same ORDER BY id'),
			"1|20\n2|10\n3|0", "$mode: two rows swap their keys");
		here(
			q{BEGIN; INSERT INTO same VALUES (5, 5);
			   DELETE FROM same WHERE id = 5; COMMIT});
		here(
			q{BEGIN; DELETE FROM same WHERE id = 1;
			   INSERT INTO same VALUES (1, 21);
			   UPDATE same SET n = 22 WHERE id = 1;
			   DELETE FROM same WHERE id = 1;
			   INSERT INTO same VALUES (1, 23); COMMIT});
		synced();
		is(there('SELECT * FROM same ORDER BY id'),
			"1|23\n2|10\n3|0",
			"$mode: inserted and deleted, deleted and inserted");
		here(
			q{DO $$BEGIN FOR i IN 1 .. 1000 LOOP
			   UPDATE same SET n = n + 1 WHERE id = 3; END LOOP; END$$});
		synced();
		is(there('SELECT n FROM same WHERE id = 3'),
			'1000', "$mode: updated 1000 times in one transaction");
		here(
			q{DO $$BEGIN FOR i IN 1 .. 100 LOOP
			   UPDATE same SET n = n + 1 WHERE id = 3; COMMIT;
			   END LOOP; END$$});
		synced();
		is(there('SELECT n FROM same WHERE id = 3'),
			'1100', "$mode: updated in 100 transactions of a procedure");
		here(
			q{BEGIN; INSERT INTO same VALUES (7, 7); TRUNCATE same;
			   INSERT INTO same VALUES (8, 8); COMMIT});
		synced();
		is(there('SELECT * FROM same'), '8|8', "$mode: TRUNCATE in between");
		here('DELETE FROM same');
		synced();
	}
};

section 'isolation levels and read-only' => sub {
	here(
		q{BEGIN ISOLATION LEVEL SERIALIZABLE; INSERT INTO same VALUES (1, 1); COMMIT;
		   BEGIN ISOLATION LEVEL REPEATABLE READ; INSERT INTO same VALUES (2, 2); COMMIT}
	);
	set_mode('async', 'same');
	here(
		q{BEGIN ISOLATION LEVEL SERIALIZABLE; INSERT INTO same VALUES (3, 3); COMMIT;
		   BEGIN ISOLATION LEVEL REPEATABLE READ; INSERT INTO same VALUES (4, 4); COMMIT;
		   BEGIN; INSERT INTO same VALUES (5, 5);
		   SET TRANSACTION READ ONLY; COMMIT;
		   SET synchronous_commit = off; INSERT INTO same VALUES (6, 6)});
	synced();
	is(there(q{SELECT string_agg(id::text, ' ' ORDER BY id) FROM same}),
		'1 2 3 4 5 6', 'every isolation level, read-only at the end');
};

section 'prepared transactions' => sub {
	paired('CREATE TABLE twophase (id int PRIMARY KEY, v text)', 'twophase');
	here(
		q{BEGIN; INSERT INTO twophase VALUES (1, 'committed');
		   SAVEPOINT s; INSERT INTO twophase VALUES (2, 'gone');
		   ROLLBACK TO s; INSERT INTO twophase VALUES (3, 'committed');
		   PREPARE TRANSACTION 'one'});
	here(
		q{BEGIN; INSERT INTO twophase VALUES (4, 'rolled back');
		   PREPARE TRANSACTION 'two'});
	here(q{INSERT INTO twophase VALUES (5, 'meanwhile')});
	synced();
	is(there('SELECT id FROM twophase'),
		'5', 'prepared transactions hold nobody up and do not arrive');
	here(q{ROLLBACK PREPARED 'two'});
	here(q{COMMIT PREPARED 'one'});
	synced();
	$alpha->poll_ok(q{SELECT count(*) = 0 FROM mmrepl.sync_err_rec},
		'the queue runs empty');
	is( there('SELECT * FROM twophase ORDER BY id'),
		"1|committed\n3|committed\n5|meanwhile",
		'COMMIT PREPARED arrives, ROLLBACK PREPARED does not');

	# A prepared transaction outlives the server, and so does its delivery.
	here(
		q{BEGIN; UPDATE twophase SET v = 'after restart' WHERE id = 1;
		   INSERT INTO twophase
		   SELECT g, 'many' FROM generate_series(1000, 1999) g;
		   PREPARE TRANSACTION 'three'});
	$alpha->restart;
	here(q{INSERT INTO twophase VALUES (6, 'meanwhile')});
	synced();
	is(there('SELECT count(*) FROM twophase'), '4', 'after a restart');
	here(q{COMMIT PREPARED 'three'});
	synced();
	$alpha->same_rows($beta, 'twophase',
		name => 'COMMIT PREPARED after a restart arrives');

	# What a sync pair promises, PREPARE cannot keep: a clear error.
	set_mode('sync', 'twophase');
	like(
		$alpha->fails(
			'postgres', q{BEGIN; INSERT INTO twophase VALUES (7, 'sync');
			PREPARE TRANSACTION 'four'}),
		qr/ERROR:\s+\w{5}: /,
		'PREPARE TRANSACTION of a sync transaction is refused');
	is(here('SELECT count(*) FROM pg_prepared_xacts'),
		'0', 'and not prepared');
	is(there('SELECT count(*) FROM twophase WHERE id = 7'),
		'0', 'nor done at the peer');
	$alpha->same_rows($beta, 'twophase');
};

# The integers around both signs of powers of two.
sub around
{
	return map { my $n = 1 << $_; ($n - 1, $n, -$n, -$n - 1) } @_;
}

section 'every type' => sub {
	# Types of the same name have other OIDs there.
	there(
		q{CREATE TYPE shift1 AS ENUM ('x'); CREATE TYPE shift2 AS (a int);
			CREATE DOMAIN shift3 AS int; CREATE TABLE shift4 (a int)});
	my $xml = $alpha->psql('postgres', q{SELECT '<a/>'::xml}) == 0;
	my @types = (
		[
			'numeric',
			q{'NaN'}, q{'Infinity'}, q{'-Infinity'}, '0.00', '-0.000001',
			'1e100', '123456789012345678901234567890.0987654321'
		],
		[ 'numeric(10,3)', '1.5', '-99999.999', q{'NaN'} ],
		[ 'int2', '-32768', '32767', around(7) ],
		[ 'int4', '-2147483648', '2147483647', around(7, 8, 15, 16, 23) ],
		[
			'int8',
			'-9223372036854775808',
			'9223372036854775807',
			around(7, 15, 16, 23, 31, 32, 39, 47, 55)
		],
		[
			'float4', q{'-0'},
			q{'NaN'}, q{'Infinity'},
			q{'-Infinity'}, '1.17549435e-38',
			'3.4028235e38', '0.1'
		],
		[
			'float8', q{'-0'},
			q{'NaN'}, q{'Infinity'},
			q{'-Infinity'}, '5e-324',
			'1.7976931348623157e308', '0.1',
			'0.30000000000000004'
		],
		[ 'bool', 'true', 'false' ],
		[
			'date', q{'infinity'},
			q{'-infinity'}, q{'4713-01-01 BC'},
			q{'0001-12-31 BC'}, q{'5874897-12-31'},
			q{'2024-02-29'}
		],
		[
			'timestamp',
			q{'infinity'},
			q{'-infinity'},
			q{'4713-01-01 00:00:00 BC'},
			q{'294276-12-31 23:59:59.999999'},
			q{'2000-01-01 00:00:00.000001'}
		],
		[ 'timestamp(0)', q{'2013-03-13 09:31:20.5'} ],
		[
			'timestamptz', q{'infinity'}, q{'-infinity'},
			q{'4713-01-01 00:00:00+00 BC'},
			q{'2013-03-31 02:30:00 Europe/Berlin'}
		],
		[ 'time', q{'00:00:00'}, q{'24:00:00'}, q{'23:59:59.999999'} ],
		[
			'timetz', q{'00:00:00+15:59:59'},
			q{'24:00:00-15:59'}, q{'12:00:00.5+05:30'}
		],
		[
			'interval',
			q{'1 year -2 mons 3 days -04:05:06.789'},
			q{'-178000000 years'},
			q{'0'}, q{'1 mon'}, q{'30 days'}, q{'720 hours'}
		],
		[ 'text', q{''}, q{E'\\\\\\n\\t\\'"'}, q{U&'\\2028\\+01F418'} ],
		[ 'varchar(5)', q{''}, q{'äöü'} ],
		[ 'char(5)', q{''}, q{'a'}, q{'ab   '} ],
		[ '"char"', q{'a'}, q{''} ],
		[ 'name', q{'a name'} ],
		[
			'bytea', q{''}, q{'\\x00'}, q{'\\x0001ff005c27'},
			q{decode(repeat('00ff', 5000), 'hex')}
		],
		[ 'bit(3)', q{B'101'} ],
		[ 'varbit', q{B''}, q{B'1010101010101'} ],
		[ 'money', q{'-92233720368547758.08'}, q{'0.01'} ],
		[ 'uuid', q{'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'} ],
		[
			'inet', q{'::1'},
			q{'10.1.2.3/8'}, q{'2001:db8::/32'},
			q{'0.0.0.0/0'}
		],
		[ 'cidr', q{'10.0.0.0/8'}, q{'::/0'} ],
		[ 'macaddr', q{'08:00:2b:01:02:03'} ],
		[ 'macaddr8', q{'08:00:2b:01:02:03:04:05'} ],
		[ 'json', q{'{"a": 1, "a":2 }'}, q{'null'}, q{'"\\u0000"'} ],
		[
			'jsonb', q{'{"b": [1, 2.50, null, "x"], "a": {"": -0}}'},
			q{'[]'}, q{'null'}, q{'123456789012345678901234567890.5'}
		],
		[ 'jsonpath', q{'$.a[*] ? (@ > 1)'} ],
		[
			'int4[]', q{'{}'},
			q{'{1,NULL,3}'}, q{'[-1:1]={1,2,3}'},
			q{'{{1,2},{3,4}}'}
		],
		[ 'text[]', q{'{}'}, q{'{"a b","",NULL,"NULL","\\"","\\\\"}'} ],
		[ 'numeric[]', q{'{NaN,1.50,Infinity}'} ],
		[ 'timestamptz[]', q{'{infinity,"2020-01-01 00:00:00+00"}'} ],
		[ 'bytea[]', q{ARRAY['\\x00'::bytea, '\\xff00']} ],
		[ 'int4range', q{'empty'}, q{'[1,10)'}, q{'(,)'}, q{'(5,]'} ],
		[ 'numrange', q{'(1.5,NaN]'}, q{'[,0)'} ],
		[
			'tstzrange',
			q{'[2020-01-01 00:00+00,infinity)'},
			q{'(-infinity,2020-01-01 00:00+00]'}
		],
		[ 'int8multirange', q{'{}'}, q{'{[1,5),[7,9)}'} ],
		[ 'point', q{'(1.5,-0)'} ],
		[ 'polygon', q{'((0,0),(0,1),(1,1))'} ],
		[ 'path', q{'[(0,0),(1,1)]'}, q{'((0,0),(1,1))'} ],
		[ 'box', q{'(1,1),(0,0)'} ],
		[ 'circle', q{'<(1,2),3>'} ],
		[ 'line', q{'{1,2,3}'} ],
		[ 'lseg', q{'[(0,0),(1,1)]'} ],
		[ 'tsvector', q{'a:1A fat:2 cat:3,4B ''q '''}, q{''} ],
		[ 'tsquery', q{'fat & (rat | !cat:*A)'} ],
		[ 'pg_lsn', q{'16/B374D848'} ],
		[ 'xid8', q{'18446744073709551615'} ],
		[ 'oid', '4294967295' ],
		[ 'regclass', q{'pg_class'} ],
		[ 'my_enum', q{'sad'}, q{'so so'}, q{'it''s "ok"'} ],
		[ 'my_enum[]', q{'{sad,NULL,"so so"}'} ],
		[ 'my_domain', q{'10'} ],
		[ 'my_domain[]', q{'{1,2}'} ],
		[
			'my_composite', q{'(1,"a ""b"" , c",sad)'},
			q{'(,,)'}, q{ROW(NULL, '', 'so so')}
		],
		[
			'my_composite[]',
			q{ARRAY[ROW(1, 'x', 'sad')::my_composite, NULL]}
		],
		[ 'my_nested', q{ROW(ROW(1, '\\', 'sad'), ARRAY[NULL, 1])} ],
		[ 'my_range', q{'[0.1,0.2)'} ],
		[ '"My Type"', q{'A'}, q{'b c'} ]);
	push @types, [ 'xml', q{'<a b="c">&amp;</a>'}, q{'text <b/>'} ] if $xml;

	my $columns = '';
	my $most = 0;
	my $n = 0;
	foreach my $type (@types)
	{
		$n++;
		$columns .= ", c$n $type->[0]";
		$most = $#{$type} if $#{$type} > $most;
	}
	paired(
		qq{
		CREATE TYPE my_enum AS ENUM ('sad', 'so so', 'it''s "ok"');
		CREATE DOMAIN my_domain AS int CHECK (VALUE > 0);
		CREATE TYPE my_composite AS (a int, b text, c my_enum);
		CREATE TYPE my_nested AS (x my_composite, y int[]);
		CREATE TYPE my_range AS RANGE (SUBTYPE = float8);
		CREATE TYPE "My Type" AS ENUM ('A', 'b c');
		CREATE TABLE types (id int PRIMARY KEY$columns);
	}, 'types');

	# Row i holds the i-th value of every type, or NULL.
	my $row = sub {
		my ($id, $i) = @_;
		return "($id, "
		  . join(', ',
			map { defined $_->[$i] ? "($_->[$i])::$_->[0]" : 'NULL' } @types)
		  . ')';
	};
	foreach my $mode ('async', 'sync')
	{
		set_mode($mode, 'types');
		foreach my $i (1 .. $most + 1)
		{
			here("INSERT INTO types VALUES " . $row->($i, $i));
		}
		synced();
		$alpha->same_rows($beta, 'types', name => "$mode: INSERT");

		# From NULL and back to it, and all at once.
		foreach my $i (1 .. $most)
		{
			my $set = join(', ', map { "c$_" } (1 .. $n));
			here(   "UPDATE types SET ($set) = "
				  . ($row->(0, $i) =~ s/^\(0, /(/r)
				  . ' WHERE id = '
				  . ($i + 1));
		}
		here(q{UPDATE types SET c1 = NULL, c12 = NULL WHERE id = 1});
		synced();
		$alpha->same_rows($beta, 'types', name => "$mode: UPDATE");

		# One by one, to name the type that is wrong.
		my @wrong;
		foreach my $i (1 .. $n)
		{
			my $sql =
			  qq{SELECT md5(string_agg(coalesce(c$i\::text, 'null'), '|' ORDER BY id)) FROM types};
			push @wrong, $types[ $i - 1 ][0] if here($sql) ne there($sql);
		}
		is(join(' ', @wrong), '', "$mode: every type on its own");
		here('DELETE FROM types');
		synced();
		is(there('SELECT count(*) FROM types'), '0', "$mode: DELETE");
	}
};

section 'keys of every type' => sub {
	my %keys = (
		key_text => [ 'text', q{''}, q{'a''b\\'}, q{'ž'} ],
		key_numeric => [ 'numeric', q{'NaN'}, '1.50', q{'-Infinity'} ],
		key_float => [ 'float8', q{'NaN'}, q{'-0'}, '0.1' ],
		key_tstz =>
		  [ 'timestamptz', q{'infinity'}, q{'2020-01-01 00:00+05'} ],
		key_uuid => [ 'uuid', q{'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'} ],
		key_bytea => [ 'bytea', q{''}, q{'\\x00'}, q{'\\x0001'} ],
		key_enum => [ 'my_enum', q{'sad'}, q{'so so'} ],
		key_range => [ 'int4range', q{'empty'}, q{'[1,2)'} ],
		key_array => [ 'int[]', q{'{}'}, q{'{1,NULL}'} ],
		key_char => [ 'char(4)', q{'a'}, q{''} ],
		key_inet => [ 'inet', q{'10.0.0.1/8'}, q{'10.0.0.1'} ],
		key_interval => [ 'interval', q{'1 mon'}, q{'31 days'} ]);
	foreach my $table (sort keys %keys)
	{
		my ($type, @values) = @{ $keys{$table} };
		paired("CREATE TABLE $table (k $type PRIMARY KEY, n int)", $table);
		here(   "INSERT INTO $table VALUES "
			  . join(', ', map { "($_, 0)" } @values)
			  . "; UPDATE $table SET n = n + 1");
	}
	synced();
	foreach my $table (sort keys %keys)
	{
		$alpha->same_rows($beta, $table, name => "$table: update by key");
		here("DELETE FROM $table");
	}
	synced();
	foreach my $table (sort keys %keys)
	{
		is(there("SELECT count(*) FROM $table"), '0',
			"$table: delete by key");
	}
};

section 'generated and identity columns' => sub {
	paired(
		q{
		CREATE TABLE made (
			id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
			other int GENERATED BY DEFAULT AS IDENTITY,
			serial serial,
			v int DEFAULT 7,
			twice int GENERATED ALWAYS AS (v * 2) STORED,
			at timestamptz DEFAULT clock_timestamp());
	}, 'made');
	here(
		q{INSERT INTO made (v) SELECT g FROM generate_series(1, 5) g;
		   INSERT INTO made DEFAULT VALUES;
		   INSERT INTO made (id, v) OVERRIDING SYSTEM VALUE VALUES (100, 100);
		   UPDATE made SET v = v + 1 WHERE id < 3;
		   UPDATE made SET id = DEFAULT WHERE id = 5});
	synced();
	$alpha->same_rows($beta, 'made');
	is(there('SELECT twice FROM made WHERE id = 100'),
		'200', 'a generated column is computed there');
	set_mode('sync', 'made');
	here(
		q{INSERT INTO made (v) VALUES (1000);
		   UPDATE made SET v = -v WHERE id = 100});
	synced();
	$alpha->same_rows($beta, 'made', name => 'made: the same in sync mode');
};

is($alpha->queued('beta'), '0', 'nothing is left queued');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
