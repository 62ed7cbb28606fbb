# How changes are written at the receiver: rows that somebody there has locked,
# changes or removes at the same moment, rows that one batch touches twice.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair;

# Keep what follows back until release(), so that it arrives as one batch.
sub hold
{
	$alpha->safe_psql('postgres', q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	return;
}

sub release
{
	$alpha->safe_psql('postgres', q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	return;
}

# Wait until apply() at beta waits for the session there.
sub await_blocked
{
	my ($session) = @_;

	ok( $beta->poll_query_until(
			'postgres',
			'SELECT count(*) > 0 FROM pg_stat_activity WHERE '
			  . $session->pid
			  . ' = ANY (pg_blocking_pids(pid))'),
		'apply waits for the session at the receiver');
	return;
}

sub conflicts
{
	return $beta->safe_psql('postgres',
		'SELECT coalesce(sum(conflicts), 0) FROM mmrepl.progress');
}

$alpha->create_table_on_both($beta,
	'CREATE TABLE item (id int PRIMARY KEY, v text, n int DEFAULT 0)');
$alpha->create_pair('item', 'beta');
$alpha->safe_psql('postgres',
	q{INSERT INTO item SELECT i, 'start' FROM generate_series(1, 100) i});
$alpha->wait_caught_up('beta');

###############################################################################

# A row that is only locked is found, and then waited for where it is written:
# what its owner has made of it meanwhile decides.
section 'a row that is locked, then changed, when it is to be written' => sub {
	foreach my $case (
		[ 1, q{UPDATE item SET v = 'beta' WHERE id = 1}, 'UPDATE', 0 ],
		[ 2, q{DELETE FROM item WHERE id = 2}, 'UPDATE', 1 ],
		[ 3, q{UPDATE item SET v = 'beta' WHERE id = 3}, 'DELETE', 0 ],
		[ 4, q{DELETE FROM item WHERE id = 4}, 'DELETE', 1 ],
		[ 5, q{SELECT 1}, 'UPDATE', 0 ])
	{
		my ($id, $there, $here, $more) = @$case;
		my $before = conflicts();
		my $session = $beta->session;

		$session->ok('BEGIN');
		$session->ok("SELECT 1 FROM item WHERE id = $id FOR UPDATE");
		$alpha->safe_psql('postgres', $here eq 'UPDATE'
			? "UPDATE item SET v = 'alpha' WHERE id = $id"
			: "DELETE FROM item WHERE id = $id");
		await_blocked($session);
		$session->ok($there);
		$session->ok('COMMIT');
		$session->quit;
		$alpha->wait_caught_up('beta');
		is( $beta->safe_psql(
				'postgres', "SELECT v FROM item WHERE id = $id"),
			$here eq 'UPDATE' ? 'alpha' : '',
			"$there, then the $here from alpha");
		is(conflicts() - $before, $more, "conflicts: $more");
	}
	$alpha->same_rows($beta, 'item');
};

# What the current command wrote it cannot write again.
section 'rows that a batch touches more than once' => sub {
	hold();
	$alpha->safe_psql(
		'postgres', q{
		UPDATE item SET n = n + 1 WHERE id BETWEEN 10 AND 20;
		UPDATE item SET n = n + 1 WHERE id BETWEEN 10 AND 20;
		BEGIN;
		UPDATE item SET n = n + 1 WHERE id BETWEEN 10 AND 20;
		UPDATE item SET n = n + 1 WHERE id BETWEEN 10 AND 20;
		UPDATE item SET id = id + 1000 WHERE id = 12;
		UPDATE item SET id = 12 WHERE id = 13;
		DELETE FROM item WHERE id = 14;
		INSERT INTO item VALUES (14, 'again'), (2000, 'new');
		UPDATE item SET v = 'newer' WHERE id = 2000;
		DELETE FROM item WHERE id = 2000;
		COMMIT;
		DELETE FROM item WHERE id = 15;
		INSERT INTO item VALUES (15, 'again');
		DELETE FROM item WHERE id = 15;
		INSERT INTO item VALUES (15, 'and again'), (2001, 'new');
		UPDATE item SET v = 'newer' WHERE id IN (15, 2001);
	});
	my $before = conflicts();

	release();
	$alpha->same_rows($beta, 'item');
	is(conflicts() - $before, 0, 'without a conflict');
};

# Index entries: of rows that stay on their page none is made.
section 'secondary indexes follow updates' => sub {
	$beta->safe_psql('postgres', 'CREATE INDEX item_v ON item (v)');
	$alpha->safe_psql('postgres',
		q{UPDATE item SET v = 'found ' || id WHERE id BETWEEN 30 AND 40});
	$alpha->wait_caught_up('beta');
	is( $beta->safe_psql(
			'postgres', q{
			SET enable_seqscan = off;
			SELECT count(*) FROM item WHERE v BETWEEN 'found' AND 'foune'}),
		11,
		'rows are found by what was updated');
};

# Inserts are written together, and the key is not looked up before: what is
# there already is found when the index entry is made.
section 'runs of inserts that meet rows with their keys' => sub {
	foreach my $case (
		[ 'apply_remote', "string_agg(v, ',' ORDER BY id)", 'alpha,alpha,alpha' ],
		[ 'keep_local', "string_agg(v, ',' ORDER BY id)", 'beta,beta,alpha' ])
	{
		my ($rule, $query, $expected) = @$case;
		my $table = "run_$rule";
		my $before = conflicts();

		$alpha->create_table_on_both($beta,
			"CREATE TABLE $table (id int PRIMARY KEY, v text);
			 CREATE INDEX ON $table (v)");
		$alpha->create_pair($table, 'beta',
			"conflict_resolution => '$rule'");
		$beta->safe_psql('postgres',
			"INSERT INTO $table VALUES (700, 'beta'), (2100, 'beta')");
		$alpha->safe_psql('postgres',
			"INSERT INTO $table SELECT i, 'alpha' FROM generate_series(1, 3000) i"
		);
		$alpha->wait_caught_up('beta');
		is(conflicts() - $before, 2, "$rule: two conflicts");
		is( $beta->safe_psql(
				'postgres',
				"SELECT $query FROM $table WHERE id IN (700, 2100, 2101)"),
			$expected,
			"$rule: what became of the rows");
		is( $beta->safe_psql(
				'postgres', "SET enable_seqscan = off;
				SELECT count(*), count(DISTINCT id) FROM $table WHERE id > 0"),
			'3000|3000',
			"$rule: each row once");
		is( $beta->safe_psql(
				'postgres', "SET enable_seqscan = off;
				SELECT count(*) FROM $table WHERE v = 'beta'"),
			$rule eq 'keep_local' ? 2 : 0,
			"$rule: the other index agrees");
	}
};

# Updates are collected, located together, and written in their order.
section 'runs of updates' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE step (id int PRIMARY KEY, u int UNIQUE, v text, filler text)'
	);
	$alpha->create_pair('step', 'beta');
	$alpha->safe_psql('postgres',
		q{INSERT INTO step SELECT i, i, 'start', repeat('x', 500) FROM generate_series(1, 300) i}
	);
	$alpha->wait_caught_up('beta');

	# Another unique key is handed on from row to row; two rows are not there.
	hold();
	$beta->safe_psql('postgres', 'DELETE FROM step WHERE id IN (150, 250)');
	$alpha->safe_psql(
		'postgres', q{
		UPDATE step SET u = -1 WHERE id = 1;
		DO $$ BEGIN
			FOR i IN 2 .. 300 LOOP
				UPDATE step SET u = i - 1 WHERE id = i;
			END LOOP;
		END $$;
		UPDATE step SET v = 'once', filler = repeat('y', 700);
		UPDATE step SET v = v || ' and again' WHERE id % 2 = 0;
		UPDATE step SET id = id + 1000 WHERE id % 50 = 0;
		UPDATE step SET v = v || ' elsewhere' WHERE id > 1000;
	});
	my $before = conflicts();

	release();
	is(conflicts() - $before, 2, 'a conflict for each row that was gone');
	$alpha->same_rows($beta, 'step');

	# Somebody holds rows of the run, and changes or removes them.
	my $session = $beta->session;

	$before = conflicts();
	$session->ok('BEGIN');
	$session->ok('SELECT 1 FROM step WHERE id IN (20, 30) FOR UPDATE');
	$alpha->safe_psql('postgres',
		q{UPDATE step SET v = 'alpha' WHERE id BETWEEN 10 AND 40});
	await_blocked($session);
	$session->ok(
		q{UPDATE step SET v = 'beta', filler = repeat('z', 2000) WHERE id = 20});
	$session->ok('DELETE FROM step WHERE id = 30');
	$session->ok('COMMIT');
	$session->quit;
	$alpha->wait_caught_up('beta');
	is(conflicts() - $before, 1, 'a conflict for the row that was removed');
	$alpha->same_rows($beta, 'step');

	# A row in the middle that is refused is named.
	$beta->safe_psql('postgres',
		q{ALTER TABLE step ADD CONSTRAINT fine CHECK (v <> 'wrong')});
	$alpha->safe_psql('postgres',
		q{UPDATE step SET v = CASE id WHEN 44 THEN 'wrong' ELSE 'right' END WHERE id BETWEEN 41 AND 49}
	);
	$alpha->poll_state('beta', 'blocked');
	like(
		$alpha->stat('beta', 'last_error'),
		qr/violates check constraint "fine".*UPDATE, relation "public.step", key \(44\)/s,
		'the refused row of a run is named');
	$beta->safe_psql('postgres', 'ALTER TABLE step DROP CONSTRAINT fine');
	$alpha->safe_psql('postgres', q{SELECT mmrepl.retry_now('beta')});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'step');
};

section 'an insert whose key somebody is just inserting' => sub {
	foreach my $end ('COMMIT', 'ROLLBACK')
	{
		my $id = $end eq 'COMMIT' ? 501 : 502;
		my $before = conflicts();
		my $session = $beta->session;

		$session->ok('BEGIN');
		$session->ok("INSERT INTO item VALUES ($id, 'beta')");
		$alpha->safe_psql('postgres',
			"INSERT INTO item SELECT i, 'alpha' FROM generate_series($id, $id + 300, 100) i"
		);
		await_blocked($session);
		$session->ok($end);
		$session->quit;
		$alpha->wait_caught_up('beta');
		is( $beta->safe_psql(
				'postgres', "SELECT v FROM item WHERE id = $id"),
			'alpha',
			"$end: the row of alpha");
		is(conflicts() - $before, $end eq 'COMMIT' ? 1 : 0, "$end: conflicts");
	}
	$alpha->same_rows($beta, 'item');
};

# Whoever looks at the table must find what came before.
section 'collected inserts are there when triggers look' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE note (id int PRIMARY KEY, seen int)');
	$alpha->create_pair('note', 'beta');
	$beta->safe_psql(
		'postgres', q{
		CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			NEW.seen := (SELECT count(*) FROM public.item WHERE id > 10000);
			RETURN NEW;
		END $$;
		CREATE TRIGGER look BEFORE INSERT ON note FOR EACH ROW
			EXECUTE FUNCTION look();
		ALTER TABLE note ENABLE ALWAYS TRIGGER look;});
	$alpha->safe_psql(
		'postgres', q{
		BEGIN;
		INSERT INTO item SELECT i, 'many' FROM generate_series(10001, 10010) i;
		INSERT INTO note VALUES (1, 0);
		INSERT INTO item SELECT i, 'many' FROM generate_series(10011, 10020) i;
		INSERT INTO note VALUES (2, 0);
		COMMIT;});
	$alpha->wait_caught_up('beta');
	is( $beta->safe_psql(
			'postgres', q{SELECT string_agg(seen::text, ',' ORDER BY id) FROM note}),
		'10,20',
		'the trigger sees the rows that were inserted before its own');
};

# So must a check that reads another table, however bad an idea that is.
section 'collected changes are there when checks look' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE shop (id int PRIMARY KEY, is_open bool);
		 CREATE TABLE sale (id int PRIMARY KEY, shop int);
		 CREATE TABLE refund (id int PRIMARY KEY, shop int)');
	$alpha->create_pair($_, 'beta') foreach qw(shop sale refund);
	$beta->safe_psql(
		'postgres', q{
		CREATE FUNCTION is_open(int) RETURNS bool LANGUAGE plpgsql AS
			'BEGIN RETURN (SELECT s.is_open FROM public.shop s WHERE s.id = $1); END';
		ALTER TABLE sale ADD CHECK (is_open(shop));
		CREATE DOMAIN opened AS int CHECK (is_open(VALUE));
		ALTER TABLE refund ALTER shop TYPE opened});
	$alpha->safe_psql(
		'postgres', q{
		INSERT INTO shop SELECT i, false FROM generate_series(1, 9) i;
		BEGIN; UPDATE shop SET is_open = true WHERE id = 1; INSERT INTO sale VALUES (1, 1); COMMIT;
		BEGIN; UPDATE shop SET is_open = true WHERE id = 2; INSERT INTO refund VALUES (1, 2); COMMIT;
		BEGIN; INSERT INTO shop VALUES (10, true); UPDATE sale SET shop = 10; UPDATE refund SET shop = 10; COMMIT});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, $_) foreach qw(shop sale refund);
};

# Another unique constraint could raise before the key is found to be there.
section 'two unique constraints' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE two (u int UNIQUE, id int PRIMARY KEY)');
	$alpha->create_pair('two', 'beta');
	$beta->safe_psql('postgres', 'INSERT INTO two VALUES (5, 5), (60, 61)');
	$alpha->safe_psql('postgres', 'INSERT INTO two VALUES (5, 5)');
	$alpha->wait_caught_up('beta');
	pass('a row that is there in both is a conflict of the key');

	$alpha->safe_psql('postgres',
		'INSERT INTO two SELECT i * 10, i FROM generate_series(1, 6) i WHERE i <> 5');
	$alpha->poll_state('beta', 'blocked');
	like( $alpha->stat('beta', 'last_error'),
		qr/duplicate key value violates unique constraint "two_u_key".*INSERT, relation "public.two", key \(6\)/s,
		'a violation of the other one is refused, with the row');
	$beta->safe_psql('postgres', 'DELETE FROM two WHERE id = 61');
	$alpha->safe_psql('postgres', q{SELECT mmrepl.retry_now('beta')});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'two');
};

# Two parts of a large transaction are on their way at a time.
section 'a large transaction of which a part is refused' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE large (id int PRIMARY KEY, v text)');
	$alpha->create_pair('large', 'beta');
	$alpha->safe_psql('postgres',
		q{ALTER SYSTEM SET mmrepl.batch_size = '64kB'});
	$alpha->reload;
	$beta->safe_psql('postgres',
		'ALTER TABLE large ADD CONSTRAINT small CHECK (id <> 3000)');
	$alpha->safe_psql('postgres',
		q{INSERT INTO large
			SELECT i, repeat(md5(i::text), 4) FROM generate_series(1, 6000) i});
	$alpha->safe_psql('postgres', q{UPDATE large SET v = 'last' WHERE id = 6000});
	$alpha->poll_state('beta', 'blocked');
	like(
		$alpha->stat('beta', 'last_error'),
		qr/violates check constraint "small".*INSERT, relation "public.large", key \(3000\)/s,
		'a part in the middle is refused');
	is($beta->safe_psql('postgres', 'SELECT count(*) FROM large'),
		0, 'nothing of the transaction is there');
	$beta->safe_psql('postgres', 'ALTER TABLE large DROP CONSTRAINT small');
	$alpha->safe_psql('postgres', q{SELECT mmrepl.retry_now('beta')});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'large');
	$alpha->safe_psql('postgres', 'ALTER SYSTEM RESET mmrepl.batch_size');
	$alpha->reload;
};

# The table's own rules hold for what is written directly.
section 'checks and publications at the receiver' => sub {
	$beta->safe_psql('postgres',
		'ALTER TABLE item ADD CONSTRAINT small CHECK (n < 1000)');
	$alpha->safe_psql('postgres', 'UPDATE item SET n = 1000 WHERE id = 50');
	$alpha->poll_state('beta', 'blocked');
	like(
		$alpha->stat('beta', 'last_error'),
		qr/violates check constraint "small".*UPDATE, relation "public.item", key \(50\)/s,
		'a check refuses an update');
	$alpha->safe_psql('postgres', 'UPDATE item SET n = 0 WHERE id = 50');
	$alpha->safe_psql(
		'postgres', q{SELECT mmrepl.skip('beta',
			(SELECT min(ticket) FROM mmrepl.sync_err_rec), 'test')});
	$alpha->wait_caught_up('beta');
	$alpha->safe_psql('postgres',
		q{INSERT INTO item VALUES (201, 'x', 1), (202, 'x', 1000), (203, 'x', 1)}
	);
	$alpha->poll_state('beta', 'blocked');
	like(
		$alpha->stat('beta', 'last_error'),
		qr/violates check constraint "small".*INSERT, relation "public.item", key \(202\)/s,
		'a check refuses an insert');
	$beta->safe_psql('postgres', 'ALTER TABLE item DROP CONSTRAINT small');
	$alpha->safe_psql('postgres', q{SELECT mmrepl.retry_now('beta')});
	$alpha->wait_caught_up('beta');

	$beta->safe_psql(
		'postgres', q{
		ALTER TABLE item REPLICA IDENTITY NOTHING;
		CREATE PUBLICATION items FOR TABLE item});
	$alpha->safe_psql('postgres', 'UPDATE item SET n = 1 WHERE id = 51');
	$alpha->poll_state('beta', 'blocked');
	like($alpha->stat('beta', 'last_error'),
		qr/does not have a replica identity and publishes updates/,
		'an update that a publication could not pass on is refused');
	$beta->safe_psql('postgres', 'DROP PUBLICATION items');
	$alpha->safe_psql('postgres', q{SELECT mmrepl.retry_now('beta')});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'item');
};

# What is known of a table is kept from batch to batch: whatever changes it is
# followed by the very next one.  The apply session must be the same all the time.
section 'changes to a table between two batches' => sub {
	my $session = q{SELECT pid FROM pg_stat_activity
		WHERE client_addr IS NOT NULL AND application_name ~ 'mmrepl'};

	$alpha->create_table_on_both($beta,
		'CREATE TABLE shape (id int PRIMARY KEY, v text)');
	$alpha->create_pair('shape', 'beta');
	$alpha->safe_psql('postgres',
		q{INSERT INTO shape SELECT i, 'a' FROM generate_series(1, 10) i});
	$alpha->wait_caught_up('beta');
	my $pid = $beta->safe_psql('postgres', $session);

	foreach my $case (
		[ 'an index', 'CREATE INDEX shape_v ON shape (v)' ],
		[ 'a column', 'ALTER TABLE shape ADD w int DEFAULT 7' ],
		[ 'a rewrite', 'ALTER TABLE shape ALTER w TYPE bigint' ],
		[ 'another table',
			'ALTER TABLE shape RENAME TO old;
			CREATE TABLE shape (LIKE old INCLUDING ALL);
			INSERT INTO shape SELECT * FROM old; DROP TABLE old' ],
		[ 'a trigger', q{
			CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS
				'BEGIN NEW.w := 8; RETURN NEW; END';
			CREATE TRIGGER stamp BEFORE UPDATE ON shape FOR EACH ROW
				EXECUTE FUNCTION stamp();
			ALTER TABLE shape ENABLE ALWAYS TRIGGER stamp} ],
		[ 'its removal', 'DROP TRIGGER stamp ON shape;
			ALTER TABLE shape DROP w' ])
	{
		my ($name, $ddl) = @$case;

		$beta->safe_psql('postgres', $ddl);
		$alpha->safe_psql('postgres',
			"UPDATE shape SET v = '$name' WHERE id = 3;
			 DELETE FROM shape WHERE id = 4;
			 INSERT INTO shape VALUES (4, '$name')");
		$alpha->wait_caught_up('beta');
		is( $beta->safe_psql(
				'postgres',
				"SELECT count(*) FROM shape WHERE v = '$name'"),
			2,
			"$name: the rows are there");
		is( $beta->safe_psql(
				'postgres',
				"SET enable_seqscan = off;
				 SELECT count(*) FROM shape WHERE v = '$name'"),
			2,
			"$name: and in the indexes");
		is($beta->safe_psql('postgres',
				'SELECT w FROM shape WHERE id = 3'), 8, 'the trigger has fired')
		  if $name eq 'a trigger';
	}
	is($beta->safe_psql('postgres', $session), $pid, 'in the same session');

	# An index that somebody builds while a batch is running is not forgotten.
	my $blocker = $beta->session;
	my $builder = $beta->session;

	$blocker->ok('BEGIN');
	$blocker->ok('SELECT 1 FROM item WHERE id = 70 FOR UPDATE');
	$alpha->safe_psql(
		'postgres', q{
		BEGIN;
		UPDATE shape SET v = 'before' WHERE id = 5;
		UPDATE item SET v = 'x' WHERE id = 70;
		COMMIT});
	await_blocked($blocker);
	$builder->start('CREATE INDEX CONCURRENTLY shape_id_v ON shape (id, v)');
	ok( $beta->poll_query_until(
			'postgres', q{SELECT count(*) > 0 FROM pg_class c
			JOIN pg_locks l ON NOT l.granted WHERE c.relname = 'shape_id_v'}),
		'the builder waits for apply');
	$blocker->ok('COMMIT');
	$builder->finish;
	$alpha->safe_psql('postgres',
		q{UPDATE shape SET v = 'after' WHERE id BETWEEN 5 AND 6});
	$alpha->wait_caught_up('beta');
	$beta->safe_psql('postgres', 'CREATE EXTENSION amcheck');
	is( $beta->safe_psql(
			'postgres', q{SELECT bt_index_check(i.indexrelid, true)
			FROM pg_index i WHERE i.indrelid = 'shape'::regclass}),
		"\n\n",
		'every row is in every index');
	is( $beta->safe_psql(
			'postgres', q{SELECT count(*) FROM pg_index
			WHERE indrelid = 'shape'::regclass AND indisvalid}),
		3,
		'of which there are three');
	$_->quit foreach $blocker, $builder;

	# Rights are asked for in each batch.
	$beta->safe_psql('postgres',
		'CREATE ROLE other; ALTER TABLE shape OWNER TO other');
	$alpha->safe_psql('postgres', q{UPDATE shape SET v = 'owner' WHERE id = 7});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'shape');
};

done_testing();
