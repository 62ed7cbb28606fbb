# Registered pairs: create_pair, alter_pair, drop_pair and every option, one
# and several targets, one and several masters.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair;

# A third target: another database of beta's server.
$beta->install_extension('gamma');
$alpha->add_peer($beta, server => 'gamma', peer_dbname => 'gamma');

# Everything in one word: the rows of a query, joined.
sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

sub there
{
	return $beta->safe_psql('postgres', $_[0]);
}

sub on_gamma
{
	return $beta->safe_psql('gamma', $_[0]);
}

sub synced
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->wait_caught_up('beta');
}

###############################################################################

section 'names, arguments and columns are those of the contract' => sub {
	my %columns = (
		'pairs' =>
		  'pair_id local_table server remote_table mode columns column_map'
		  . ' row_filter conflict_resolution on_unreachable enabled',
		'sync_err_rec' =>
		  'id nsp_name table_name dst_server dst_query create_time ticket'
		  . ' xid op state',
		'pg_stat_mmrepl' =>
		  'server state pid queue_transactions queue_changes queue_bytes'
		  . ' oldest_queued_at replay_lag last_ticket confirmed_ticket'
		  . ' transactions_applied changes_applied bytes_sent batches retries'
		  . ' consecutive_failures next_retry_at last_error'
		  . ' last_error_sqlstate last_error_at conflicts sync_transactions'
		  . ' sync_failures stats_reset',
		'pg_stat_mmrepl_pairs' =>
		  'pair_id server local_table inserts updates deletes truncates'
		  . ' conflicts');
	foreach my $view (sort keys %columns)
	{
		like(
			here(
				qq{SELECT string_agg(attname, ' ' ORDER BY attnum)
				   FROM pg_attribute
				   WHERE attrelid = 'mmrepl.$view'::regclass AND attnum > 0}
			),
			qr/^$columns{$view}(?: |$)/,
			"columns of $view");
	}
	is( here(
			q{SELECT count(*) FROM pg_class WHERE oid = 'mmrepl.progress'::regclass}
		),
		'1',
		'mmrepl.progress exists');

	is( here(
			q{SELECT string_agg(name, ' ' ORDER BY name)
			  FROM unnest(string_to_array(
				'max_servers ring_size batch_size batch_transactions retry_min_delay'
				|| ' retry_max_delay connect_timeout sync_timeout sync_lock_timeout'
				|| ' sync_flush sync_commit async_commit early_apply two_phase mode max_queue_size log_conflicts capture',
				' ')) wanted(name)
			  WHERE NOT EXISTS (SELECT FROM pg_settings s
								WHERE s.name = 'mmrepl.' || wanted.name)}
		),
		'',
		'every setting exists');
	is( here(
			q{SELECT string_agg(name || ' = ' || current_setting('mmrepl.' || name), ', ')
			  FROM unnest('{ring_size,retry_min_delay,sync_timeout}'::text[]) name}
		),
		'ring_size = 4MB, retry_min_delay = 100ms, sync_timeout = 10s',
		'and has its default');

	my %arguments = (
		'create_pair' => 'local_table regclass, server name,'
		  . ' remote_table text DEFAULT NULL::text,'
		  . q{ mode text DEFAULT 'async'::text,}
		  . ' columns name[] DEFAULT NULL::name[],'
		  . ' column_map jsonb DEFAULT NULL::jsonb,'
		  . ' row_filter text DEFAULT NULL::text,'
		  . q{ conflict_resolution text DEFAULT 'apply_remote'::text,}
		  . q{ on_unreachable text DEFAULT 'error'::text,}
		  . ' copy_data boolean DEFAULT false',
		'alter_pair' => 'local_table regclass, server name',
		'drop_pair' => 'local_table regclass, server name',
		'deal_sync_err_rec' => 'i_limit integer',
		'wait_for_replay' =>
		  q{server name, timeout interval DEFAULT '00:01:00'::interval},
		'pause' => 'server name',
		'resume' => 'server name',
		'retry_now' => 'server name',
		'skip' => 'server name, ticket bigint, reason text',
		'stat_reset' => 'server name DEFAULT NULL::name',
		'apply' => 'batch bytea');
	my %result = (
		'create_pair' => 'integer',
		'alter_pair' => 'void',
		'drop_pair' => 'void',
		'deal_sync_err_rec' => 'boolean',
		'wait_for_replay' => 'boolean',
		'skip' => 'bigint',
		'apply' => 'bigint');
	foreach my $function (sort keys %arguments)
	{
		my $found = here(
			qq{SELECT replace(pg_get_function_arguments(oid), '"', '')
			   FROM pg_proc WHERE oid = 'mmrepl.$function'::regproc});
		like(
			$found,
			qr/^\Q$arguments{$function}\E(?:,|$)/,
			"arguments of $function");
		is( here(
				qq{SELECT prorettype::regtype FROM pg_proc
				   WHERE oid = 'mmrepl.$function'::regproc}),
			$result{$function},
			"result of $function") if $result{$function};
	}
};

section 'create_pair, the view and the triggers' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE plain (id int PRIMARY KEY, v text)');
	my $id = $alpha->create_pair('plain', 'beta');
	like($id, qr/^\d+$/, 'create_pair returns the id of the pair');
	is( here(
			qq{SELECT local_table::text, server, mode, columns, column_map,
					  row_filter, conflict_resolution, on_unreachable, enabled
			   FROM mmrepl.pairs WHERE pair_id = $id}),
		'plain|beta|async||||apply_remote|error|t',
		'the view shows the defaults');
	like(here("SELECT remote_table FROM mmrepl.pairs WHERE pair_id = $id"),
		qr/^public\.plain$/, 'and the local name as the remote one');

	like(here("\\t off\n\\d plain"),
		qr/Triggers.*mmrepl/s, '\d shows the triggers');
	my ($dump) = run_command(
		[
			'pg_dump', '--schema-only',
			'-t', 'plain',
			'-d', $alpha->connstr('postgres')
		]);
	like(
		$dump,
		qr/CREATE TRIGGER .* ON public\.plain .*mmrepl\.\w+\(/,
		'pg_dump writes them');

	here(
		q{INSERT INTO plain VALUES (1, 'a'), (2, 'b'), (3, 'c');
		   UPDATE plain SET v = 'B' WHERE id = 2;
		   DELETE FROM plain WHERE id = 3});
	synced();
	is(there('SELECT * FROM plain ORDER BY id'), "1|a\n2|B", 'rows arrive');
	$alpha->poll_ok(
		qq{SELECT (inserts, updates, deletes, truncates) = (3, 1, 1, 0)
		   FROM mmrepl.pg_stat_mmrepl_pairs WHERE pair_id = $id},
		'the counters of the pair');
	here('TRUNCATE plain');
	synced();
	is(there('SELECT count(*) FROM plain'), '0', 'TRUNCATE arrives');
	$alpha->poll_ok(
		qq{SELECT truncates = 1
		   FROM mmrepl.pg_stat_mmrepl_pairs WHERE pair_id = $id},
		'and is counted');
	$alpha->poll_ok(
		q{SELECT transactions_applied >= 4 AND changes_applied >= 6
			 AND bytes_sent > 0 AND batches > 0 AND queue_transactions = 0
			 AND confirmed_ticket = last_ticket AND pid IS NOT NULL
		  FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'},
		'the counters of the server');
	here(q{SELECT mmrepl.stat_reset('beta')});
	$alpha->poll_ok(
		q{SELECT transactions_applied = 0 AND changes_applied = 0
			 AND stats_reset > now() - interval '5 min'
		  FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'},
		'stat_reset');

	# An ordinary writer needs no mapping and no right on the server.
	here(q{CREATE ROLE writer LOGIN; GRANT INSERT ON plain TO writer});
	$alpha->safe_psql(
		'postgres',
		q{INSERT INTO plain VALUES (10, 'by writer')},
		extra_params => [ '-U', 'writer' ]);
	here(q{SELECT mmrepl.alter_pair('plain', 'beta', mode => 'sync')});
	$alpha->safe_psql(
		'postgres',
		q{INSERT INTO plain VALUES (11, 'by writer')},
		extra_params => [ '-U', 'writer' ]);
	synced();
	$alpha->same_rows($beta, 'plain', name => q{an ordinary writer's rows});
	ok( $alpha->fails(
			'postgres',
			q{SELECT mmrepl.apply('\x00')},
			extra_params => [ '-U', 'writer' ]) =~ /42501/,
		'mmrepl.apply() is not for everybody');

	here(q{SELECT mmrepl.drop_pair('plain', 'beta')});
	is(here(q{SELECT count(*) FROM mmrepl.pairs}),
		'0', 'drop_pair: the view is empty');
	unlike(here("\\t off\n\\d plain"),
		qr/mmrepl/, 'and the triggers are gone');
	here(q{INSERT INTO plain VALUES (20, 'not replicated')});
	is(here('SELECT count(*) FROM mmrepl.sync_err_rec'),
		'0', 'a later write is not captured');
	is(there('SELECT count(*) FROM plain WHERE id = 20'),
		'0', 'and does not arrive');
};

section 'columns and column_map' => sub {
	here(
		q{CREATE TABLE person
		   (secret text, id int, a text, b text, extra int,
			PRIMARY KEY (id))});
	there(
		q{CREATE TABLE people
			(bb text, a text, key_id int PRIMARY KEY,
			 note text DEFAULT 'default', secret text)});
	$alpha->create_pair(
		'person', 'beta',
		q{remote_table => 'public.people', columns => '{id,a,b}',
		  column_map => '{"id": "key_id", "b": "bb"}'});
	is( here(
			q{SELECT columns, column_map, remote_table FROM mmrepl.pairs
			   WHERE local_table = 'person'::regclass}),
		'{id,a,b}|{"b": "bb", "id": "key_id"}|public.people',
		'the view shows them');
	here(
		q{INSERT INTO person VALUES ('s1', 1, 'a1', 'b1', 1),
									 ('s2', 2, 'a2', NULL, 2)});
	synced();
	is( there('SELECT key_id, a, bb, note, secret FROM people ORDER BY 1'),
		"1|a1|b1|default|\n2|a2||default|",
		'only the columns of the pair are written');
	there(q{UPDATE people SET note = 'mine', secret = 'mine'});
	here(
		q{UPDATE person SET b = 'b' || id, secret = 'changed';
		   UPDATE person SET id = id + 10 WHERE id = 2});
	synced();
	is( there('SELECT key_id, a, bb, note, secret FROM people ORDER BY 1'),
		"1|a1|b1|mine|mine\n12|a2|b2|mine|mine",
		'an update leaves the others alone, a key update too');

	# A column outside the pair is nobody's business.
	my $ticket = $alpha->stat('beta', 'last_ticket');
	here(q{UPDATE person SET secret = 'again', extra = 5});
	is($alpha->queued('beta'),
		'0', 'an update of columns outside the pair queues nothing');
	here('DELETE FROM person WHERE id = 1');
	synced();
	is(there('SELECT key_id FROM people'), '12', 'DELETE');
	here('TRUNCATE person');
	synced();
	is(there('SELECT count(*) FROM people'), '0', 'TRUNCATE');

	here(
		q{SELECT mmrepl.alter_pair('person', 'beta',
		   columns => '{id,a,b,secret}')});
	here(q{INSERT INTO person VALUES ('s3', 3, 'a3', 'b3', 3)});
	synced();
	is(there('SELECT key_id, bb, secret FROM people'),
		'3|b3|s3', 'alter_pair adds a column');
};

section 'row_filter' => sub {
	$alpha->create_table_on_both(
		$beta, q{
		CREATE TABLE city (id int PRIMARY KEY, region text, active bool,
						   n int DEFAULT 0)});
	$alpha->create_pair('city', 'beta',
		q{row_filter => $$region = 'eu' AND active$$});
	my $arrived = sub {
		synced();
		return there(
			q{SELECT coalesce(string_agg(id || ':' || n, ' '
			ORDER BY id), '') FROM city});
	};

	here(
		q{INSERT INTO city VALUES (1, 'eu', true), (2, 'us', true),
			 (3, 'eu', false), (4, 'eu', NULL), (5, 'eu', true)});
	is($arrived->(), '1:0 5:0', 'INSERT: only rows inside the filter');
	here('UPDATE city SET n = n + 1');
	is($arrived->(), '1:1 5:1', 'UPDATE inside and outside the filter');
	here(q{UPDATE city SET region = 'us' WHERE id = 1});
	is($arrived->(), '5:1', 'UPDATE leaving the filter becomes DELETE');
	here(q{UPDATE city SET active = true WHERE id IN (3, 4)});
	is($arrived->(), '3:1 4:1 5:1',
		'UPDATE entering the filter becomes INSERT');
	here(q{UPDATE city SET active = NULL WHERE id = 4});
	is($arrived->(), '3:1 5:1', 'a filter that is NULL is not true');
	here(q{UPDATE city SET id = 50, n = 7 WHERE id = 5});
	is($arrived->(), '3:1 50:7', 'key update inside');
	here(q{UPDATE city SET id = 10, region = 'eu' WHERE id = 1});
	is($arrived->(), '3:1 10:1 50:7', 'key update entering');
	here(q{UPDATE city SET id = 30, region = 'us' WHERE id = 3});
	is($arrived->(), '10:1 50:7', 'key update leaving deletes the old key');
	there(q{INSERT INTO city VALUES (2, 'there', true, 99)});
	here('DELETE FROM city WHERE id IN (2, 10)');
	is($arrived->(), '2:99 50:7',
		'DELETE inside arrives, DELETE outside does not');
	here(
		q{BEGIN; UPDATE city SET region = 'us' WHERE id = 50;
		   UPDATE city SET n = 8 WHERE id = 50;
		   UPDATE city SET region = 'eu' WHERE id = 50; COMMIT});
	is($arrived->(), '2:99 50:8', 'out and in again in one transaction');

	here(
		q{SELECT mmrepl.alter_pair('city', 'beta',
		   row_filter => $$region = 'us'$$)});
	here(q{INSERT INTO city VALUES (60, 'us', true), (61, 'eu', true)});
	is($arrived->(), '2:99 50:8 60:0', 'alter_pair changes the filter');
	is( here(
			q{SELECT row_filter ~ 'us', mode FROM mmrepl.pairs
			   WHERE local_table = 'city'::regclass}),
		't|async',
		'and the view shows it');
};

section 'several targets' => sub {
	my $ddl = 'CREATE TABLE spread (id int PRIMARY KEY, v text, w text)';
	$alpha->create_table_on_both($beta, $ddl);
	on_gamma($ddl);
	$alpha->create_pair('spread', 'beta');
	$alpha->create_pair('spread', 'gamma',
		q{columns => '{id,w}', row_filter => 'id % 2 = 0'});
	is( here(
			q{SELECT count(*), count(DISTINCT pair_id) FROM mmrepl.pairs
			   WHERE local_table = 'spread'::regclass}),
		'2|2',
		'two pairs share a table');
	here(
		q{INSERT INTO spread SELECT g, 'v' || g, 'w' || g
		   FROM generate_series(1, 10) g;
		   UPDATE spread SET v = 'changed' WHERE id < 3;
		   UPDATE spread SET w = 'changed' WHERE id BETWEEN 3 AND 4;
		   DELETE FROM spread WHERE id > 8});
	synced();
	$alpha->wait_caught_up('gamma');
	$alpha->same_rows($beta, 'spread', name => 'all of it at beta');
	is( on_gamma('SELECT * FROM spread ORDER BY id'),
		"2||w2\n4||changed\n6||w6\n8||w8",
		'a part of it at gamma');

	# One target that stands still does not hold up the other.
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here(q{INSERT INTO spread VALUES (100, 'v', 'w')});
	$alpha->wait_caught_up('gamma');
	is(on_gamma('SELECT w FROM spread WHERE id = 100'), 'w', 'gamma goes on');
	is(there('SELECT count(*) FROM spread WHERE id = 100'),
		'0', 'while beta is paused');
	is($alpha->queued('beta'), '1', 'what beta lacks is queued for beta');
	is($alpha->queued('gamma'), '0', 'and nothing for gamma');
	here(q{SELECT mmrepl.resume('beta')});
	synced();
	$alpha->same_rows($beta, 'spread', name => 'then beta has it, too');

	# Sync to both: both or none.
	here(qq{SELECT mmrepl.alter_pair('spread', '$_', mode => 'sync')})
	  foreach ('beta', 'gamma');
	here(q{INSERT INTO spread VALUES (200, 'v', 'w')});
	is( there('SELECT count(*) FROM spread WHERE id = 200')
		  . on_gamma('SELECT count(*) FROM spread WHERE id = 200'),
		'11',
		'sync to both targets');
	on_gamma(q{ALTER TABLE spread ADD CHECK (w <> 'bad')});
	like(
		$alpha->fails(
			'postgres', q{INSERT INTO spread VALUES (202, 'v', 'bad')}),
		qr/ERROR:\s+23514: /,
		q{a refusal of one target is the statement's error});
	is( here('SELECT count(*) FROM spread WHERE id = 202')
		  . there('SELECT count(*) FROM spread WHERE id = 202')
		  . on_gamma('SELECT count(*) FROM spread WHERE id = 202'),
		'000',
		'and no one keeps the row');

	here(q{SELECT mmrepl.drop_pair('spread', 'gamma')});
	here(q{INSERT INTO spread VALUES (300, 'v', 'w')});
	is( there('SELECT count(*) FROM spread WHERE id = 300')
		  . on_gamma('SELECT count(*) FROM spread WHERE id = 300'),
		'10',
		'drop_pair of one target leaves the other');
};

section 'composite keys and key updates' => sub {
	$alpha->create_table_on_both(
		$beta, q{
		CREATE TABLE compound (a text, v int, b int, c date,
							   PRIMARY KEY (c, a, b))});
	$alpha->create_pair('compound', 'beta');
	here(
		q{INSERT INTO compound
		   SELECT 'k' || g % 3, g, g, date '2020-01-01' + g
		   FROM generate_series(1, 30) g});
	here(q{UPDATE compound SET v = -v WHERE a = 'k1'});
	here(q{UPDATE compound SET b = b + 100 WHERE a = 'k2'});
	here(
		q{UPDATE compound SET a = 'moved', b = -b, c = c - 1000, v = 0
		   WHERE b < 10});
	here(q{DELETE FROM compound WHERE b % 5 = 0});
	synced();
	$alpha->same_rows($beta, 'compound');

	# Every key takes the place of its neighbour, in the order that works.
	here(
		q{DELETE FROM compound;
		   INSERT INTO compound SELECT 'x', g, g, '2020-01-01'
		   FROM generate_series(10, 1, -1) g;
		   UPDATE compound SET b = b + 1});
	synced();
	$alpha->same_rows($beta, 'compound', name => 'every key moved by one');
	is(there('SELECT min(b), max(b), sum(b - v) FROM compound'),
		'2|11|10', 'and every row is the one it should be');
};

section 'dropped, added and reordered columns' => sub {
	here(
		q{CREATE TABLE shape (gone1 text, id int PRIMARY KEY, gone2 int,
							   v text, w int);
		   ALTER TABLE shape DROP COLUMN gone1, DROP COLUMN gone2});
	there(
		q{CREATE TABLE shape (w int, x1 int, v text, id int PRIMARY KEY);
			ALTER TABLE shape DROP COLUMN x1});
	$alpha->create_pair('shape', 'beta');
	$beta->create_pair('shape', 'alpha');
	my $same = sub {
		my ($name) = @_;
		local $Test::Builder::Level = $Test::Builder::Level + 1;
		my $query = 'SELECT id, v, w FROM shape ORDER BY id';
		synced();
		$beta->wait_caught_up('alpha');
		return is(there($query), here($query), $name);
	};
	here(q{INSERT INTO shape (id, v, w) VALUES (1, 'one', 1), (2, 'two', 2)});
	there(q{INSERT INTO shape (id, v, w) VALUES (3, 'three', 3)});
	$same->('columns go by name');
	here(
		q{UPDATE shape SET v = 'zwei' WHERE id = 2;
		   DELETE FROM shape WHERE id = 1});
	there(q{UPDATE shape SET w = 33, id = 30 WHERE id = 3});
	$same->('updates and deletes, too');

	# The shape changes under the pair, peer first.
	there('ALTER TABLE shape ADD COLUMN added text');
	here(q{ALTER TABLE shape ADD COLUMN added text});
	here(q{INSERT INTO shape VALUES (4, 'four', 4, 'new')});
	synced();
	is(there('SELECT added FROM shape WHERE id = 4'),
		'new', 'an added column is replicated');
	here('ALTER TABLE shape DROP COLUMN added');
	there('ALTER TABLE shape DROP COLUMN added');
	here(q{INSERT INTO shape VALUES (5, 'five', 5)});
	$same->('a dropped column is not missed');
};

section 'many masters, no loops' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE both_ways (id int PRIMARY KEY, v text)');
	$alpha->create_pair_on_both($beta, 'both_ways');
	my $sent = $beta->stat('alpha', 'changes_applied');
	here(
		q{INSERT INTO both_ways SELECT g, 'alpha'
		   FROM generate_series(1, 100) g});
	synced();
	$beta->wait_caught_up('alpha');
	is($beta->stat('alpha', 'changes_applied'),
		$sent, 'what beta applied it does not send back');
	is($beta->queued('alpha'), '0', 'or queue');

	foreach my $round (1 .. 10)
	{
		here(qq{UPDATE both_ways SET v = v || ' a$round' WHERE id = $round});
		synced();
		there(
			qq{UPDATE both_ways SET v = v || ' b$round' WHERE id = $round;
				 INSERT INTO both_ways VALUES (1000 + $round, 'beta');
				 DELETE FROM both_ways WHERE id = 50 + $round});
		$beta->wait_caught_up('alpha');
	}
	$alpha->same_rows($beta, 'both_ways');
	is( here('SELECT v FROM both_ways WHERE id = 10'),
		'alpha a10 b10',
		'the writes of both are there');
	is($alpha->queued('beta') + $beta->queued('alpha'),
		0, 'nothing goes round');

	# The real loop prevention is not the application_name.
	$alpha->safe_psql('postgres',
		q{SET application_name = 'mmrepl'; INSERT INTO both_ways VALUES (2000, 'named')}
	);
	synced();
	is(there('SELECT v FROM both_ways WHERE id = 2000'),
		'named', 'a session of any name is captured');

	# A user's trigger at the peer sees what it is told to see.
	there(
		q{
		CREATE TABLE seen (id int);
		CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
		$$BEGIN INSERT INTO public.seen VALUES (NEW.id); RETURN NULL; END$$;
		CREATE TRIGGER ordinary AFTER INSERT ON both_ways
		  FOR EACH ROW EXECUTE FUNCTION see();});
	here(q{INSERT INTO both_ways VALUES (2001, 'x')});
	synced();
	is(there('SELECT count(*) FROM seen'),
		'0', 'an ordinary trigger does not fire on applied rows');
	there('ALTER TABLE both_ways ENABLE ALWAYS TRIGGER ordinary');
	here(q{INSERT INTO both_ways VALUES (2002, 'x')});
	synced();
	is(there('SELECT string_agg(id::text, \' \') FROM seen'),
		'2002', 'one that is ENABLE ALWAYS does');
	there('DROP TRIGGER ordinary ON both_ways');

	# Loads in replica role are captured all the same.
	here(
		q{SET session_replication_role = replica;
		   INSERT INTO both_ways VALUES (2003, 'replica role')});
	synced();
	$alpha->same_rows($beta, 'both_ways', name => 'replica role is captured');
};

section 'TRUNCATE of several tables' => sub {
	$alpha->create_table_on_both(
		$beta, q{
		CREATE TABLE tree (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY);
		CREATE TABLE leaf (id int PRIMARY KEY, tree int REFERENCES tree)});
	$alpha->create_pair_on_both($beta, $_) foreach ('tree', 'leaf');
	foreach my $truncate (
		'TRUNCATE tree, leaf',
		'TRUNCATE tree CASCADE',
		'TRUNCATE leaf, tree RESTART IDENTITY',
		'DELETE FROM leaf; TRUNCATE tree, leaf')
	{
		here(
			q{INSERT INTO tree VALUES (1), (2);
			   INSERT INTO leaf VALUES (1, 1), (2, 2)});
		synced();
		is( there(
				'SELECT count(*) FROM leaf JOIN tree ON leaf.tree = tree.id'),
			'2',
			"before $truncate");
		here("BEGIN; $truncate; INSERT INTO tree VALUES (7); COMMIT");
		synced();
		is(there('SELECT (SELECT count(*) FROM leaf), max(id) FROM tree'),
			'0|7', "$truncate, and an insert after it");
		here('DELETE FROM tree');
	}
};

section 'copy_data' => sub {
	$alpha->create_table_on_both(
		$beta, q{
		CREATE TABLE stock (id int PRIMARY KEY, v text, w bytea)});
	here(
		q{INSERT INTO stock
		   SELECT g, 'row ' || g, decode(md5(g::text), 'hex')
		   FROM generate_series(1, 5000) g});
	$alpha->create_pair('stock', 'beta', 'copy_data => true');
	here(
		q{UPDATE stock SET v = 'after' WHERE id <= 10;
		   DELETE FROM stock WHERE id > 4990;
		   INSERT INTO stock VALUES (6000, 'new', NULL)});
	synced();
	$alpha->same_rows($beta, 'stock',
		name => 'rows from before and after create_pair');

	here(
		q{CREATE TABLE stock_part (id int PRIMARY KEY, v text, w text);
		   INSERT INTO stock_part
		   SELECT g, 'v' || g, 'w' || g FROM generate_series(1, 100) g});
	there('CREATE TABLE stock_part (i int PRIMARY KEY, v text)');
	$alpha->create_pair(
		'stock_part', 'beta',
		q{copy_data => true, columns => '{id,v}',
		  column_map => '{"id": "i"}', row_filter => 'id > 90'});
	synced();
	is(there('SELECT count(*), min(i), max(v) FROM stock_part'),
		'10|91|v99', 'a copy obeys columns, column_map and row_filter');

	$alpha->create_table_on_both($beta,
		'CREATE TABLE no_copy (id int PRIMARY KEY)');
	here('INSERT INTO no_copy VALUES (1)');
	$alpha->create_pair('no_copy', 'beta');
	here('INSERT INTO no_copy VALUES (2)');
	synced();
	is(there('SELECT * FROM no_copy'), '2', 'no copy without copy_data');
};

section 'a key from REPLICA IDENTITY USING INDEX' => sub {
	my $ddl = q{
		CREATE TABLE by_index (v text, code text NOT NULL, n int NOT NULL);
		CREATE UNIQUE INDEX by_index_key ON by_index (n, code);
		ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_key;};
	$alpha->create_table_on_both($beta, $ddl);
	$alpha->create_pair('by_index', 'beta');
	here(
		q{INSERT INTO by_index SELECT 'v', 'c' || g, g
		   FROM generate_series(1, 20) g;
		   UPDATE by_index SET v = 'changed' WHERE n < 5;
		   UPDATE by_index SET code = 'moved' WHERE n > 15;
		   DELETE FROM by_index WHERE n = 10});
	synced();
	$alpha->same_rows($beta, 'by_index');
	is( there(
			q{SELECT count(*) FILTER (WHERE v = 'changed'),
					   count(*) FILTER (WHERE code = 'moved') FROM by_index}
		),
		'4|5',
		'updates found their rows');
};

section 'the mode of a pair and of a transaction' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE moded (id int PRIMARY KEY, v text)');
	$alpha->create_pair('moded', 'beta');
	my $sync_transactions = sub {
		return $alpha->stat('beta', 'sync_transactions');
	};

	# Paused, nothing async can arrive: what is there came in sync mode.
	my $before = $sync_transactions->();
	here(q{INSERT INTO moded VALUES (1, 'async')});
	synced();
	is($sync_transactions->(), $before, 'async: no sync transaction');
	here(q{SELECT mmrepl.alter_pair('moded', 'beta', mode => 'sync')});
	is( here(
			q{SELECT mode FROM mmrepl.pairs
			  WHERE local_table = 'moded'::regclass}),
		'sync',
		'alter_pair shows in the view');
	here(q{INSERT INTO moded VALUES (2, 'sync')});
	is(there('SELECT count(*) FROM moded WHERE id = 2'),
		'1', 'alter_pair to sync: at the peer at once');
	$alpha->poll_ok(
		"SELECT sync_transactions > $before FROM mmrepl.pg_stat_mmrepl"
		  . q{ WHERE server = 'beta'},
		'and counted as a sync transaction');

	here(q{SELECT mmrepl.alter_pair('moded', 'beta', mode => 'async')});
	synced();
	$before = $sync_transactions->();
	here(
		q{BEGIN; SET LOCAL mmrepl.mode = 'sync';
		   INSERT INTO moded VALUES (3, 'set local'); COMMIT});
	is(there('SELECT count(*) FROM moded WHERE id = 3'),
		'1', 'SET LOCAL mmrepl.mode = sync: at the peer at once');
	$alpha->poll_ok(
		"SELECT sync_transactions > $before FROM mmrepl.pg_stat_mmrepl"
		  . q{ WHERE server = 'beta'},
		'and counted as a sync transaction');
	$before = $sync_transactions->();
	here(q{INSERT INTO moded VALUES (4, 'async again')});
	synced();
	is($sync_transactions->(), $before,
		'the next transaction is async again');

	here(
		q{SELECT mmrepl.alter_pair('moded', 'beta', mode => 'sync');
		   SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here(
		q{BEGIN; SET LOCAL mmrepl.mode = 'async';
		   INSERT INTO moded VALUES (5, 'set local'); COMMIT});
	is($alpha->queued('beta'),
		'1', 'SET LOCAL mmrepl.mode = async: queued, not sent');
	is(there('SELECT count(*) FROM moded WHERE id = 5'),
		'0', 'and not at the peer');
	here(q{SELECT mmrepl.resume('beta')});
	synced();

	# Behind something queued a sync write does not overtake.
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here(
		q{BEGIN; SET LOCAL mmrepl.mode = 'async';
		   UPDATE moded SET v = 'first' WHERE id = 5; COMMIT});
	my $err = $alpha->fails(
		'postgres',
		q{SET mmrepl.sync_timeout = '1s';
		  UPDATE moded SET v = 'second' WHERE id = 5});
	like(
		$err,
		qr/ERROR:\s+\w{5}: /,
		'a sync write fails behind a queue that stands still');
	is(there('SELECT v FROM moded WHERE id = 5'),
		'set local', 'it did not overtake');
	is(here('SELECT v FROM moded WHERE id = 5'),
		'first', 'and is not committed');

	# From resume() on it waits for the queue, even if the worker comes late.
	my $session = $alpha->session;
	my $worker = $alpha->stat('beta', 'pid');
	kill 'STOP', $worker;
	eval {
		here(q{SELECT mmrepl.resume('beta')});
		is($alpha->state('beta'), 'starting', 'resumed, the stream is not shown as paused');
		$session->start(q{UPDATE moded SET v = 'third' WHERE id = 5});
		$alpha->poll_ok(
			q{SELECT wait_event_type = 'Extension' OR state = 'idle' FROM pg_stat_activity
			  WHERE pid = } . $session->pid,
			'a sync write after resume() waits, or is done');
		is(there('SELECT v FROM moded WHERE id = 5'), 'set local', 'it does not overtake');
	};
	my $error = $@;
	kill 'CONT', $worker;
	die $error if $error;
	(undef, $err) = $session->finish;
	is($err, '', 'and is not refused');
	$session->quit;
	is(there('SELECT v FROM moded WHERE id = 5'),
		'third', 'it waits for the queue and follows it');
	synced();
	$alpha->same_rows($beta, 'moded');
};

section 'conflict_resolution' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE clash (id int PRIMARY KEY, v text)');
	my $offset = -s $beta->logfile;
	$alpha->create_pair_on_both($beta, 'clash');

	# A write at beta that alpha does not hear of.
	my $aside = sub {
		there("SET mmrepl.capture = off; $_[0]");
	};
	$aside->(q{INSERT INTO clash VALUES (1, 'beta')});
	here(
		q{INSERT INTO clash VALUES (1, 'alpha'), (2, 'alpha'), (3, 'alpha')});
	synced();
	is(there('SELECT v FROM clash WHERE id = 1'),
		'alpha', 'apply_remote: INSERT of an existing key updates');
	$beta->wait_for_log(qr/insert_exists/, $offset);
	ok(1, 'apply_remote: insert_exists is logged');
	$aside->('DELETE FROM clash WHERE id IN (2, 3)');
	here(
		q{UPDATE clash SET v = 'updated' WHERE id = 2;
		   DELETE FROM clash WHERE id = 3});
	synced();
	is(there('SELECT * FROM clash ORDER BY id'),
		"1|alpha\n2|updated",
		'apply_remote: UPDATE of a missing row inserts');
	$beta->wait_for_log(qr/update_missing/, $offset);
	$beta->wait_for_log(qr/delete_missing/, $offset);
	ok(1, 'apply_remote: update_missing and delete_missing are logged');
	$beta->poll_ok(
		q{SELECT conflicts = 3 FROM mmrepl.pg_stat_mmrepl_pairs
		  WHERE local_table = 'clash'::regclass},
		'conflicts are counted where they were met, by pair');
	$beta->poll_ok(
		q{SELECT conflicts >= 3 FROM mmrepl.pg_stat_mmrepl
		  WHERE server = 'alpha'},
		'and by server');

	here(
		q{SELECT mmrepl.alter_pair('clash', 'beta',
		   conflict_resolution => 'keep_local')});
	$aside->(q{INSERT INTO clash VALUES (10, 'beta'), (11, 'beta')});
	here(
		q{INSERT INTO clash VALUES (10, 'alpha');
		   INSERT INTO clash VALUES (12, 'alpha')});
	synced();
	is(there('SELECT v FROM clash WHERE id IN (10, 12) ORDER BY id'),
		"beta\nalpha", 'keep_local: INSERT of an existing key is skipped');
	$aside->('DELETE FROM clash WHERE id IN (2, 12)');
	here(
		q{UPDATE clash SET v = 'again' WHERE id = 2;
		   DELETE FROM clash WHERE id = 12});
	synced();
	is(there('SELECT count(*) FROM clash WHERE id IN (2, 12)'),
		'0', 'keep_local: UPDATE of a missing row is skipped');

	here(
		q{SELECT mmrepl.alter_pair('clash', 'beta',
		   conflict_resolution => 'error')});
	$aside->(q{INSERT INTO clash VALUES (20, 'beta')});
	here(q{INSERT INTO clash VALUES (20, 'alpha')});
	$alpha->poll_state('beta', 'blocked');
	here(q{INSERT INTO clash VALUES (21, 'alpha')});
	is(there('SELECT v FROM clash WHERE id IN (20, 21)'),
		'beta', 'error: the stream stands');
	$aside->('DELETE FROM clash WHERE id = 20');
	here(q{SELECT mmrepl.retry_now('beta')});
	synced();
	is(there('SELECT v FROM clash WHERE id IN (20, 21)'),
		"alpha\nalpha", 'error: repaired and retried, it goes on');
	$alpha->poll_state('beta', 'streaming');
};

section 'partitioned tables' => sub {
	$alpha->create_table_on_both(
		$beta, q{
		CREATE TABLE part (id int, k int, v text, PRIMARY KEY (id, k))
		  PARTITION BY LIST (k);
		CREATE TABLE part1 PARTITION OF part FOR VALUES IN (1);
		CREATE TABLE part2 (v text, k int NOT NULL, id int NOT NULL);
		ALTER TABLE part ATTACH PARTITION part2 FOR VALUES IN (2);
	});
	$alpha->create_pair('part', 'beta');
	here(
		q{INSERT INTO part SELECT g, g % 2 + 1, 'v' || g
		   FROM generate_series(1, 20) g;
		   INSERT INTO part1 VALUES (100, 1, 'direct');
		   UPDATE part SET v = 'changed' WHERE id < 5;
		   UPDATE part SET k = 2, v = 'moved' WHERE id = 100;
		   DELETE FROM part WHERE id > 15 AND id < 100});
	synced();
	$alpha->same_rows($beta, 'part');
	$alpha->same_rows($beta, 'part2', name => 'routed to its partition');
	$alpha->create_table_on_both($beta,
		'CREATE TABLE part3 PARTITION OF part FOR VALUES IN (3)');
	here(q{INSERT INTO part VALUES (200, 3, 'new partition')});
	synced();
	$alpha->same_rows($beta, 'part', name => 'a partition added later');
	here('TRUNCATE part');
	synced();
	is(there('SELECT count(*) FROM part'), '0', 'TRUNCATE of the root');
};

section 'a pair goes with its table' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE doomed (id int PRIMARY KEY)');
	my $id = $alpha->create_pair('doomed', 'beta');
	here('INSERT INTO doomed VALUES (1)');
	synced();
	here('DROP TABLE doomed');
	is(here("SELECT count(*) FROM mmrepl.pairs WHERE pair_id = $id"),
		'0', 'DROP TABLE takes its pair along');
	here(q{INSERT INTO moded VALUES (1000, 'goes on')});
	synced();
	$alpha->same_rows($beta, 'moded', name => 'the others go on');

	# Renamed, it is still the same table, and still goes to the same one.
	here('ALTER TABLE moded RENAME TO renamed');
	here(q{INSERT INTO renamed VALUES (1001, 'renamed')});
	synced();
	is(there('SELECT v FROM moded WHERE id = 1001'),
		'renamed', 'ALTER TABLE RENAME does not break a pair');
};

is($alpha->queued('beta'), '0', 'nothing is left queued at alpha');
is($beta->queued('alpha'), '0', 'nothing is left queued at beta');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
