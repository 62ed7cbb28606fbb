# In sync mode an UPDATE or DELETE carries the old row: a peer that has another
# one refuses, and nothing is overwritten.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) =
  MmreplCluster->new_pair(allows_streaming => 1, conf => "mmrepl.retry_max_delay = '200ms'\n"
	  . "deadlock_timeout = '200ms'\n");
$beta->safe_psql('postgres',
	q{CREATE DATABASE latin ENCODING latin1 TEMPLATE template0});
$beta->install_extension('latin');
$alpha->add_peer($beta, server => 'latin', peer_dbname => 'latin');

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

# At the peer, unseen by everybody.
sub behind_its_back
{
	return there("SET mmrepl.capture = off; $_[0]");
}

section 'the row at the peer is another one' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE acc (id int PRIMARY KEY, owner text, amount numeric)');
	$alpha->create_pair('acc', 'beta', q{mode => 'sync'});
	here(q{INSERT INTO acc VALUES (1, 'Ada', 100), (2, 'Bob', 200)});
	behind_its_back('UPDATE acc SET amount = 90 WHERE id = 1');

	foreach my $sql (
		'UPDATE acc SET amount = amount + 1',
		q{UPDATE acc SET owner = 'Eve' WHERE id = 1},
		'UPDATE acc SET id = 3 WHERE id = 1',
		'DELETE FROM acc WHERE id = 1')
	{
		my $err = $alpha->fails('postgres', $sql);
		like($err, qr/ERROR:  40001: .*origin_differs/,
			"$sql: serialization failure");
		like($err, qr/DETAIL: .*\(id, owner, amount\) = \(1, Ada, 100\)/,
			'... with the row that was to be changed');
		like($err, qr/DETAIL: .*\(1, Ada, 90\)/,
			'... and the row at the peer');
		like($err, qr/HINT:  Retry the transaction/, '... to be retried');
		like($err, qr/CONTEXT: .*relation "public.acc".*server "beta"/s,
			'... in this table, at this server');
	}
	is(here('SELECT * FROM acc ORDER BY id'),
		"1|Ada|100\n2|Bob|200", 'nothing is changed here');
	is(there('SELECT * FROM acc ORDER BY id'),
		"1|Ada|90\n2|Bob|200", 'nothing is overwritten there');
	is(there(q{SELECT sum(amount) FROM acc}), '290', 'and the peer is intact');

	here(
		q{DO $$ BEGIN
			INSERT INTO acc VALUES (10, 'kept', 1);
			BEGIN
				UPDATE acc SET amount = 0 WHERE id = 1;
			EXCEPTION WHEN serialization_failure THEN
				INSERT INTO acc VALUES (11, 'caught', 1);
			END;
		END $$});
	is(there('SELECT string_agg(id::text, $$ $$ ORDER BY id) FROM acc'),
		'1 2 10 11', 'the refusal can be caught');

	here(
		q{BEGIN; SET LOCAL mmrepl.mode = 'async';
		  UPDATE acc SET amount = 101 WHERE id = 1; COMMIT});
	$alpha->wait_caught_up('beta');
	is(there('SELECT amount FROM acc WHERE id = 1'),
		'101', 'async mode overwrites, as the hint says');
	here('UPDATE acc SET amount = amount + 1');
	$alpha->same_rows($beta, 'acc', name => 'and sync mode goes on');
};

section 'the row at the peer is missing, or there already' => sub {
	behind_its_back('DELETE FROM acc WHERE id = 2');
	foreach my $sql ('UPDATE acc SET amount = 0 WHERE id = 2',
		'DELETE FROM acc WHERE id = 2')
	{
		my $err = $alpha->fails('postgres', $sql);
		like($err, qr/ERROR:  40001: .*_missing/, "$sql: refused");
		like($err, qr/\(2, Bob, 201\)\. There is no such row/, '... with the row');
	}
	behind_its_back(q{INSERT INTO acc VALUES (5, 'there', 1)});
	like(
		$alpha->fails('postgres', q{INSERT INTO acc VALUES (5, 'here', 2)}),
		qr/ERROR:  23505: .*DETAIL:  Key \(id\)=\(5\) already exists/s,
		'INSERT of a key that is there: unique violation');
	is(there('SELECT owner FROM acc WHERE id = 5'),
		'there', 'nothing is overwritten');

	# A copy is there to replace what the peer has.
	$alpha->create_table_on_both($beta, 'CREATE TABLE copied (id int PRIMARY KEY, v text)');
	here(q{INSERT INTO copied VALUES (1, 'here')});
	there(q{INSERT INTO copied VALUES (1, 'there')});
	$alpha->create_pair('copied', 'beta', q{mode => 'sync', copy_data => true});
	$alpha->same_rows($beta, 'copied', name => 'copy_data overwrites');

	# keep_local says that the peer's row is right.
	here(q{SELECT mmrepl.alter_pair('acc', 'beta',
			conflict_resolution => 'keep_local')});
	here(q{INSERT INTO acc VALUES (5, 'here', 2)});
	here('UPDATE acc SET amount = 0 WHERE id = 5');
	here('DELETE FROM acc WHERE id = 2');
	is(there('SELECT * FROM acc WHERE id IN (2, 5)'),
		'5|there|1', 'keep_local: skipped at the peer');
};

# Every change must pass: the peer's row is the same, whatever it looks like.
section 'no false alarm' => sub {
	my $ddl = q{
		CREATE TYPE mood AS ENUM ('sad', 'happy');
		CREATE TYPE pair AS (a int, b text);
		CREATE DOMAIN short AS varchar(200);
		CREATE TABLE wide (id int, tenant text, n numeric(10, 2), f float8,
		  t text, c char(300), v varchar(400), d short, j json, jb jsonb,
		  ts timestamptz, iv interval, a int[], ta text[], r int4range,
		  i inet, b bytea, bits bit(7), m mood, p pair, x xml, mo money,
		  u uuid, tm timetz, loose numeric, gen int GENERATED ALWAYS AS (id * 2) STORED,
		  PRIMARY KEY (tenant, id))};
	$alpha->create_table_on_both($beta, $ddl);
	$alpha->create_pair('wide', 'beta', q{mode => 'sync'});
	my $row = sub {
		my ($n) = @_;
		return qq{1.5 * $n, 0.1 + $n, repeat('ä$n', 40 * $n), 'c$n',
			repeat('v$n', $n), 'd$n', '{"a": $n}', '{"b": [$n, 1.0]}',
			now() + '$n s', '1 mon $n days 3:04', array[$n, 2], array['x,$n', NULL],
			int4range($n, 10), '10.0.0.$n/24', '\\xdead0$n', ${n}::bit(7),
			'happy', row($n, 'b "$n')::pair, '<a>$n</a>', '12.$n', gen_random_uuid(),
			'04:05:06+0$n', 1.0 || repeat('0', $n)};
	};
	my $columns = 'n, f, t, c, v, d, j, jb, ts, iv, a, ta, r, i, b, bits, m, p,'
	  . ' x, mo, u, tm, loose';
	my $casted = sub {
		my $values = $row->($_[0]);
		$values =~ s/1\.0 \|\| (repeat\('0', \d+\))/(1.0 || $1)::numeric/;
		return $values;
	};
	here("INSERT INTO wide (id, tenant, $columns) SELECT g, 'one', "
		  . $casted->(1) . ' FROM generate_series(1, 3) g');
	here(q{INSERT INTO wide (id, tenant) VALUES (4, 'nulls')});
	foreach my $settings (
		q{SET datestyle = 'German'; SET extra_float_digits = 0;
		  SET timezone = 'Asia/Kathmandu'; SET bytea_output = 'escape';
		  SET intervalstyle = 'iso_8601'},
		'SET datestyle = DEFAULT')
	{
		foreach my $n (2, 3, 9)
		{
			here("$settings; UPDATE wide SET ($columns) = ROW("
				  . $casted->($n) . ')');
			here("$settings; UPDATE wide SET t = t || '!' WHERE id < 3");
		}
	}
	here(q{UPDATE wide SET id = id + 10, tenant = upper(tenant)});
	here(q{UPDATE wide SET t = NULL, j = NULL, p = NULL WHERE id > 12});
	$alpha->same_rows($beta, 'wide');
	here(q{DELETE FROM wide WHERE id < 14});
	here(q{DELETE FROM wide});
	is(there('SELECT count(*) FROM wide'), '0', 'every type');

	# Values in TOAST: changed, unchanged, and seen to differ.
	$alpha->create_table_on_both($beta,
		'CREATE TABLE fat (id int PRIMARY KEY, n int, a text, b bytea);'
		  . 'ALTER TABLE fat ALTER a SET STORAGE EXTERNAL');
	$alpha->create_pair('fat', 'beta', q{mode => 'sync'});
	here(
		q{INSERT INTO fat SELECT g, 0, repeat(md5(g::text), 1000),
			decode(repeat(md5(g::text), 2000), 'hex') FROM generate_series(1, 3) g}
	);
	here('UPDATE fat SET n = n + 1');
	here(q{UPDATE fat SET a = a || 'x'});
	here(q{UPDATE fat SET b = b || '\x00', a = 'short' WHERE id = 1});
	here(q{UPDATE fat SET a = repeat('long', 5000) WHERE id = 1});
	$alpha->same_rows($beta, 'fat');
	behind_its_back(
		q{UPDATE fat SET a = overlay(a placing '!' from 30000) WHERE id = 2});
	foreach my $sql (
		'UPDATE fat SET n = 0 WHERE id = 2',
		q{UPDATE fat SET a = '' WHERE id = 2},
		'DELETE FROM fat WHERE id = 2')
	{
		like($alpha->fails('postgres', $sql),
			qr/ERROR:  40001: /, "$sql: one byte of many differs");
	}
	here('DELETE FROM fat WHERE id <> 2');
	is(there('SELECT count(*) FROM fat'), '1', 'long values');

	# Columns that do not travel, other names, filters, partitions.
	here('CREATE TABLE part (id int PRIMARY KEY, a text, b text, secret text)');
	there(
		q{CREATE TABLE part (other text DEFAULT 'mine', bb text, aa text, id int
			PRIMARY KEY) PARTITION BY RANGE (id);
		CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (10);
		CREATE TABLE part_2 (id int NOT NULL, aa text, gone int, bb text, other text);
		ALTER TABLE part_2 DROP gone;
		ALTER TABLE part ATTACH PARTITION part_2 FOR VALUES FROM (10) TO (100)}
	);
	$alpha->create_pair(
		'part', 'beta',
		q{mode => 'sync', columns => '{id, a, b}',
		  column_map => '{"a": "aa", "b": "bb"}', row_filter => $$b <> 'hidden'$$});
	here(q{INSERT INTO part VALUES (1, 'a', 'b', 's'), (11, 'a', 'b', 's'),
			(2, 'a', 'hidden', 's')});
	behind_its_back(q{UPDATE part SET other = 'changed there'});
	here(q{UPDATE part SET a = a || '1', secret = 't'});
	here(q{UPDATE part SET secret = 'u'});
	here(q{UPDATE part SET b = 'b', secret = '' WHERE id = 2});
	here(q{UPDATE part SET id = id + 12 WHERE id = 1});
	here(q{UPDATE part SET id = 12 WHERE id = 2});
	here(q{UPDATE part SET b = 'hidden' WHERE id = 12});
	here(q{DELETE FROM part WHERE id > 12});
	is(there('SELECT id, aa, bb, other FROM part ORDER BY id'),
		"11|a1|b|changed there", 'filter, subset, other names, partitions');
};

section 'another encoding' => sub {
	here('CREATE TABLE enc (id int PRIMARY KEY, t text, v varchar(1000), e text[])');
	$beta->safe_psql('latin',
		'CREATE TABLE enc (id int PRIMARY KEY, t text, v varchar(1000), e text[])');
	$alpha->create_pair('enc', 'latin', q{mode => 'sync'});
	here(q{INSERT INTO enc SELECT g, repeat('ä', 10 * g), repeat('ö', 100 * g),
			array_fill('ü'::text, array[50 * g]) FROM generate_series(1, 3) g});
	here(q{UPDATE enc SET t = t || 'ß'});
	here(q{UPDATE enc SET t = t || 'ß', v = v || 'é', e = e || 'è'::text});
	here(q{DELETE FROM enc WHERE id = 2});
	is($beta->safe_psql('latin', 'SELECT sum(length(t) + length(v)) FROM enc'),
		here('SELECT sum(length(t) + length(v)) FROM enc'),
		'rows are compared in the sender\'s encoding');
	$beta->safe_psql('latin', q{UPDATE enc SET v = v || 'x' WHERE id = 3});
	like($alpha->fails('postgres', 'DELETE FROM enc'),
		qr/ERROR:  40001: /, 'a row that differs');
};

section 'async changes do not grow' => sub {
	here(q{CREATE TABLE lean (id int PRIMARY KEY, v text)});
	there(q{CREATE TABLE lean (id int PRIMARY KEY, v text)});
	$alpha->create_pair('lean', 'beta');
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	my $bytes = sub {
		here($_[0]);
		return here(
			q{SELECT sum(octet_length(payload)) FROM (SELECT * FROM mmrepl.queue_0
			UNION ALL SELECT * FROM mmrepl.queue_1 UNION ALL SELECT * FROM mmrepl.queue_2) q
			WHERE ticket = (SELECT max(ticket) FROM mmrepl.sync_err_rec)});
	};
	my $insert = $bytes->(q{INSERT INTO lean VALUES (1, 'some value')});
	my $update = $bytes->(q{UPDATE lean SET v = 'some other'});
	my $delete = $bytes->(q{DELETE FROM lean});
	is($update, $insert, 'an update: the new row');
	is($insert - $delete, 1 + length('some value'), 'a delete: the key');
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
};

# Commits at alpha a transaction that is executed at beta, whose session there
# is gone when it is to be committed there; $code runs before the replay can.
sub in_doubt
{
	my ($sql, $code) = @_;

	$alpha->append_conf('postgresql.conf', q{synchronous_standby_names = 'nobody'});
	$alpha->reload;
	my $session = $alpha->session;

	$session->ok('SET synchronous_commit = on');
	$alpha->poll_query_until('postgres', q{SHOW synchronous_standby_names},
		'nobody') or die;
	# It is the checkpointer that lets commits wait; it reads the file when it likes.
	my $activity = 'FROM pg_stat_activity WHERE pid = ' . $session->pid;
	my $waits = "SELECT wait_event = 'SyncRep' $activity";
	foreach my $attempt (1 .. 100)
	{
		$session->start("SELECT pg_logical_emit_message(true, 'x', 'x')");
		$alpha->poll_query_until('postgres',
			"SELECT wait_event IN ('SyncRep', 'ClientRead') $activity")
		  or die;
		my $waited = here($waits);

		here('SELECT pg_cancel_backend(' . $session->pid . ')')
		  if $waited eq 't';
		$session->finish;
		last if $waited eq 't';
	}
	$session->start($sql);
	$alpha->poll_query_until('postgres', $waits)
	  or die 'the session does not wait in its commit';
	here(q{SET synchronous_commit = local; SELECT mmrepl.pause('beta')});
	$beta->terminate_peers;
	$code->();
	$alpha->append_conf('postgresql.conf', q{synchronous_standby_names = ''});
	$alpha->reload;
	my ($out, $err) = $session->finish;

	is($err, '', "in doubt: $sql");
	$session->quit;
	return;
}

section 'in doubt' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE doubt (id int PRIMARY KEY, v int)');
	$alpha->create_pair_on_both($beta, 'doubt', q{mode => 'sync'});
	here('INSERT INTO doubt SELECT g, 0 FROM generate_series(1, 4) g');

	# Its locks at beta are gone; beta's own writer meets the new row here.
	in_doubt(
		'UPDATE doubt SET v = 1 WHERE id = 1',
		sub {
			is(there('SELECT v FROM doubt WHERE id = 1'),
				'0', 'the lock at the peer is gone with its session');
		});
	my $err =
	  $beta->fails('postgres', 'UPDATE doubt SET v = 2 WHERE id = 1');
	like($err, qr/ERROR:  40001: .*\(1, 0\).*\(1, 1\)/s,
		'the peer cannot overwrite what it has not seen');
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'doubt', name => 'completed');
	there('UPDATE doubt SET v = v + 1 WHERE id = 1');
	is(here('SELECT v FROM doubt WHERE id = 1'), '2', 'the retry goes through');

	# An update that changed nothing cannot be missed by the peer's writers: what
	# they have done since was overwritten when it came.
	in_doubt('UPDATE doubt SET v = v WHERE id = 1', sub { });
	there('UPDATE doubt SET v = v + 1 WHERE id = 1');
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	is(there('SELECT v FROM doubt WHERE id = 1'), '3', 'what changed nothing overwrites nothing');
	$alpha->same_rows($beta, 'doubt', name => 'equal after that');

	# Somebody writes there who does not replicate: the pair's rule decides, for
	# there is no writer any more who could be told.
	my $conflicts = there('SELECT sum(conflicts) FROM mmrepl.progress');
	in_doubt('UPDATE doubt SET v = 5 WHERE id = 2',
		sub { behind_its_back('UPDATE doubt SET v = 7 WHERE id = 2') });
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	is(there('SELECT v FROM doubt WHERE id = 2'), '5', 'apply_remote: overwritten');
	is(there('SELECT sum(conflicts) FROM mmrepl.progress'),
		$conflicts + 1, '... and counted');
	like(slurp_file($beta->logfile),
		qr/conflict detected on relation "public.doubt": conflict=update_origin_differs/,
		'... and logged');

	here(q{SELECT mmrepl.alter_pair('doubt', 'beta',
			conflict_resolution => 'keep_local')});
	in_doubt('DELETE FROM doubt WHERE id = 3',
		sub { behind_its_back('UPDATE doubt SET v = 7 WHERE id = 3') });
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	is(there('SELECT v FROM doubt WHERE id = 3'), '7', 'keep_local: kept');

	here(q{SELECT mmrepl.alter_pair('doubt', 'beta',
			conflict_resolution => 'error')});
	in_doubt('UPDATE doubt SET v = 5 WHERE id = 4',
		sub { behind_its_back('UPDATE doubt SET v = 7 WHERE id = 4') });
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->poll_state('beta', 'blocked');
	is($alpha->stat('beta', 'last_error_sqlstate'),
		'MM012', 'error: the stream is blocked');
	behind_its_back('UPDATE doubt SET v = 0 WHERE id = 4');
	here(q{SELECT mmrepl.retry_now('beta')});
	$alpha->wait_caught_up('beta');
	is(there('SELECT v FROM doubt WHERE id = 4'),
		'5', '... until the row is repaired');
};

section 'two masters count the same rows' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE count (id int PRIMARY KEY, n int)');
	$alpha->create_pair_on_both($beta, 'count', q{mode => 'sync'});
	here('INSERT INTO count SELECT g, 0 FROM generate_series(1, 5) g');
	my $script = PostgreSQL::Test::Utils::tempdir() . '/count.sql';
	append_to_file($script,
		"\\set id random(1, 5)\nUPDATE count SET n = n + 1 WHERE id = :id;\n");
	my @bench = map {
		my ($node, $out) = ($_, '');
		my $harness = IPC::Run::start(
			[
				'pgbench', '-n', '-h', $node->host, '-p', $node->port,
				'-c', '3', '-t', '40', '--max-tries=1000', '-f', $script, 'postgres'
			],
			'>', \$out, '2>', \$out);
		{ harness => $harness, out => \$out };
	} ($alpha, $beta);
	foreach my $bench (@bench)
	{
		ok($bench->{harness}->finish, 'all transactions got through, with retries')
		  or diag(${ $bench->{out} });
	}
	$alpha->wait_caught_up('beta');
	$beta->wait_caught_up('alpha');
	$alpha->same_rows($beta, 'count');
	is(here('SELECT sum(n) FROM count'), '240', 'no update is lost');
};

done_testing();
