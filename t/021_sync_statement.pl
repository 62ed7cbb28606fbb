# In sync mode the peer's refusal is the statement's error: whatever the peer has
# against a row, it says so before anything is committed here.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair;

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

sub refused
{
	my ($sql, $sqlstate, $message, $table, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $err = $alpha->fails('postgres', $sql);

	like($err, qr/ERROR:  $sqlstate: .*$message/s, "$name: $sqlstate");
	like($err, qr/CONTEXT: .*relation "public\.$table".*server "beta"/s,
		"$name: where it was") if $table;
	return $err;
}

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE parent (id int PRIMARY KEY, v text);
	CREATE TABLE child (id int PRIMARY KEY, parent int, code int, n int, v text)});
there(
	q{ALTER TABLE child ADD CONSTRAINT has_parent FOREIGN KEY (parent) REFERENCES parent,
	  ADD CONSTRAINT one_code UNIQUE (code), ADD CONSTRAINT positive CHECK (n > 0)});
$alpha->create_pair($_, 'beta', q{mode => 'sync'}) foreach ('parent', 'child');
here(q{INSERT INTO parent VALUES (1, 'one'), (2, 'two')});
here(q{INSERT INTO child VALUES (1, 1, 1, 1, 'one')});

section 'what the peer refuses' => sub {
	my $insert = 'INSERT INTO child (id, parent, code, n) VALUES';

	my $err = refused("$insert (2, 7, 2, 1)", '23503', 'has_parent', 'child',
		'a foreign key');
	like($err, qr/DETAIL:  Key \(parent\)=\(7\) is not present in table "parent"/,
		'... with its detail');
	like($err, qr/CONTEXT: .*server "beta"/s, '... and the server');
	refused('UPDATE child SET parent = 7', '23503', 'has_parent', 'child',
		'a foreign key, by an update');
	refused('DELETE FROM parent', '23503', 'has_parent', 'child',
		'a foreign key, from the other side');
	refused('UPDATE parent SET id = 7 WHERE id = 1',
		'23503', 'has_parent', 'child', 'and by an update');
	refused("$insert (2, 1, 1, 1)", '23505', 'one_code', 'child',
		'a unique constraint');
	refused("$insert (2, 1, 2, 0)", '23514', 'positive', 'child', 'a check');
	there('ALTER TABLE child ALTER v SET NOT NULL');
	refused("$insert (2, 1, 2, 1)", '23502', 'null value', 'child', 'not null');
	there('ALTER TABLE child ALTER v DROP NOT NULL');

	# Triggers that fire at a receiver refuse as well.
	there(
		q{CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			IF NEW.v = 'bad' THEN
				RAISE EXCEPTION 'this is bad' USING ERRCODE = 'XX123',
					DETAIL = 'very bad', HINT = 'be good';
			END IF;
			RETURN NEW;
		END$$;
		CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON child
		FOR EACH ROW EXECUTE FUNCTION refuse();
		ALTER TABLE child ENABLE ALWAYS TRIGGER refuse});
	$err = refused(q{UPDATE child SET v = 'bad'},
		'XX123', 'this is bad', 'child', 'a trigger');
	like($err, qr/DETAIL:  very bad\nHINT:  be good/, '... in its own words');
	refused("$insert (2, 7, 2, 1)", '23503', 'has_parent', 'child',
		'a foreign key besides a trigger: at commit');
	there('DROP TRIGGER refuse ON child');

	# What it is about can be asked for as with an error of this server.
	like(
		$alpha->fails(
			'postgres', q{DO $$ DECLARE t text; c text; BEGIN
				INSERT INTO child (id, parent, code, n) VALUES (2, 7, 2, 1);
			EXCEPTION WHEN foreign_key_violation THEN
				GET STACKED DIAGNOSTICS t = TABLE_NAME, c = CONSTRAINT_NAME;
				RAISE EXCEPTION 'it was % of %', c, t;
			END $$}),
		qr/ERROR:  P0001: it was has_parent of child/, 'the names of table and constraint');

	is(here('SELECT * FROM child'), '1|1|1|1|one', 'nothing is left of it here');
	$alpha->same_rows($beta, $_) foreach ('parent', 'child');
};

section 'the rights of the role that comes in' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE guarded (id int PRIMARY KEY, v text)');
	$alpha->create_pair('guarded', 'beta', q{mode => 'sync'});
	there(q{CREATE ROLE carrier LOGIN; SELECT mmrepl.allow_apply('carrier');
		GRANT ALL ON guarded, parent, child TO carrier});
	here(q{ALTER USER MAPPING FOR CURRENT_USER SERVER beta OPTIONS (SET user 'carrier')});
	my $session = $alpha->session;

	$session->ok(q{INSERT INTO guarded VALUES (1, 'before')});
	there(q{ALTER TABLE guarded ENABLE ROW LEVEL SECURITY;
		CREATE POLICY mine ON guarded USING (v <> 'not mine')});

	# As with logical replication: no policy is evaluated, whatever it would say.
	foreach my $sql (
		q{INSERT INTO guarded VALUES (2, 'not mine')},
		q{INSERT INTO guarded VALUES (2, 'mine')},
		q{UPDATE guarded SET v = 'mine'},
		'DELETE FROM guarded', 'TRUNCATE guarded')
	{
		my (undef, $err) = $session->run($sql);
		like(
			$err,
			qr/ERROR:  42501: role "carrier" cannot replicate into "guarded", which has row-level security/,
			"$sql: row-level security");
		like($err, qr/HINT: .*BYPASSRLS/, '... what to do');
		like($err, qr/CONTEXT: .*server "beta"/s, '... at the server');
		like($err, qr/relation "public\.guarded"/, '... and the table')
		  if $sql !~ /TRUNCATE/;
	}
	is(here('SELECT * FROM guarded'), '1|before', 'nothing of it is left here');
	is(there('SELECT * FROM guarded'), '1|before', 'nor there');
	$session->ok(
		q{DO $$ BEGIN
			INSERT INTO child VALUES (90, 1, 90, 1, 'kept');
			BEGIN
				INSERT INTO guarded VALUES (2, 'not mine');
			EXCEPTION WHEN insufficient_privilege THEN
				INSERT INTO child VALUES (91, 1, 91, 1, 'caught');
			END;
		END $$});
	is(there('SELECT count(*) FROM child WHERE id IN (90, 91)'), '2', 'it can be caught');

	# The same session, and its connection, once the role may.
	there('ALTER ROLE carrier BYPASSRLS');
	$session->ok(q{UPDATE guarded SET v = 'not mine'});
	there('ALTER ROLE carrier NOBYPASSRLS');
	my (undef, $err) = $session->run('DELETE FROM guarded');
	like($err, qr/ERROR:  42501: /, 'a right that is taken away holds at once');
	there('ALTER TABLE guarded DISABLE ROW LEVEL SECURITY; REVOKE DELETE ON guarded FROM carrier');
	(undef, $err) = $session->run('DELETE FROM guarded');
	like($err, qr/ERROR:  42501: permission denied for table guarded/, '... as does a table right');
	like($err, qr/CONTEXT: .*relation "public\.guarded".*server "beta"/s, '... said in the same way');
	$session->quit;
	here(q{DELETE FROM child WHERE id >= 90});
	$alpha->same_rows($beta, $_) foreach ('guarded', 'child');
	here('ALTER USER MAPPING FOR CURRENT_USER SERVER beta OPTIONS (SET user '
		  . "'" . there('SELECT current_user') . "')");
};

section 'caught' => sub {
	here(
		q{DO $$
		DECLARE caught text := '';
		BEGIN
			INSERT INTO child VALUES (10, 1, 10, 1, 'before');
			FOR i IN 1 .. 3 LOOP
				BEGIN
					UPDATE child SET v = 'gone' WHERE id = 10;
					INSERT INTO child VALUES (10 + i, 5 + i, 10 + i, 1, 'gone');
				EXCEPTION WHEN foreign_key_violation THEN
					caught := caught || i;
					INSERT INTO child VALUES (20 + i, 1, 20 + i, 1, caught);
				END;
			END LOOP;
		END$$});
	is(there('SELECT id, v FROM child WHERE id > 1 ORDER BY id'),
		"10|before\n21|1\n22|12\n23|123",
		'in plpgsql: the peer is back at the same point');
	$alpha->psql(
		'postgres', q{
		BEGIN;
		INSERT INTO child VALUES (30, 1, 30, 1, 'kept');
		SAVEPOINT s;
		INSERT INTO child VALUES (31, 9, 31, 1, 'gone');
		ROLLBACK TO s;
		INSERT INTO child VALUES (32, 2, 32, 1, 'kept');
		RELEASE s;
		COMMIT}, on_error_stop => 0);
	is(there('SELECT id FROM child WHERE id >= 30 ORDER BY id'),
		"30\n32", 'by a savepoint');

	# What is refused was captured outside of the block that is undone for it.
	here(q{
		CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			UPDATE child SET v = 'swallowed' WHERE id = 30;
		EXCEPTION WHEN unique_violation THEN
			RETURN NULL;
		END $$;
		CREATE TRIGGER swallow AFTER INSERT ON child FOR EACH ROW EXECUTE FUNCTION swallow()});
	(undef, undef, my $err) = $alpha->psql(
		'postgres', q{
		BEGIN;
		UPDATE child SET v = 'kept' WHERE id = 10;
		SAVEPOINT s;
		INSERT INTO child VALUES (40, 1, 30, 1, 'refused');
		ROLLBACK TO s;
		UPDATE child SET v = 'kept, too' WHERE id = 10;
		COMMIT}, on_error_stop => 0, extra_params => [ '-v', 'VERBOSITY=verbose' ]);
	like($err, qr/ERROR:\s+23505: .*one_code/, 'the statement is refused with the reason');
	unlike($err, qr/25P02/, '... and nothing else');
	is(there('SELECT v FROM child WHERE id = 10'), 'kept, too', 'the savepoint repairs it');
	here('DROP TRIGGER swallow ON child');
	$alpha->same_rows($beta, 'child');
};

section 'a statement is checked at its end, a transaction at its own' => sub {
	$alpha->create_table_on_both(
		$beta, q{
		CREATE TABLE tree (id int PRIMARY KEY, up int REFERENCES tree
		  ON DELETE CASCADE, rank int UNIQUE DEFERRABLE, pad text);
		CREATE TABLE late (id int PRIMARY KEY, up int REFERENCES tree
		  DEFERRABLE INITIALLY DEFERRED)});
	there('ALTER TABLE tree DROP CONSTRAINT tree_up_fkey,'
		  . ' ADD FOREIGN KEY (up) REFERENCES tree');
	$alpha->create_pair($_, 'beta', q{mode => 'sync'}) foreach ('tree', 'late');
	here(q{INSERT INTO tree VALUES (3, 2, 3), (2, 1, 2), (1, NULL, 1)});
	here(q{UPDATE tree SET rank = 4 - rank});
	$alpha->same_rows($beta, 'tree', name => 'rows that need each other');
	here('DELETE FROM tree WHERE id = 1');
	is(there('SELECT count(*) FROM tree'), '0', 'a cascade arrives');

	# More than one batch.
	here(
		q{INSERT INTO tree SELECT g, nullif(g + 1, 3001), g, repeat('x', 2000)
		  FROM generate_series(1, 3000) g});
	$alpha->same_rows($beta, 'tree', name => 'a statement in several batches');
	$alpha->fails('postgres', 'DELETE FROM tree');
	here('DELETE FROM tree');
	is(there('SELECT count(*) FROM tree'), '0', '... and its removal');
	there('INSERT INTO tree VALUES (1)');
	like(
		$alpha->fails(
			'postgres',
			q{INSERT INTO tree SELECT g, 5000 - g, g, repeat('x', 2000)
			  FROM generate_series(10, 3000) g}),
		qr/ERROR:  /,
		'... that is refused');
	there('DELETE FROM tree');

	here(
		q{BEGIN; INSERT INTO late VALUES (1, 10); INSERT INTO tree VALUES (10);
		  COMMIT});
	$alpha->same_rows($beta, 'late', name => 'deferred: in any order');
	there('SET session_replication_role = replica; DELETE FROM tree');
	my ($ret, $out, $err) = $alpha->psql(
		'postgres', q{
		BEGIN;
		INSERT INTO late VALUES (2, 10);
		SELECT 'executed';
		COMMIT}, on_error_stop => 0);
	like($out, qr/executed/, 'deferred: the statement passes');
	like($err, qr/late_up_fkey/, '... and the commit is refused');
	is(here('SELECT count(*) FROM late'), '1', '... here as well');
};

section 'when changes travel' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE flush (id int PRIMARY KEY, v text)');
	$alpha->create_pair('flush', 'beta', q{mode => 'sync'});
	my $session = $alpha->session;
	my $busy = q{SELECT count(*) FROM pg_stat_activity
		WHERE client_addr IS NOT NULL AND state = 'idle in transaction'};

	$session->ok(q{SET mmrepl.sync_flush = 'commit'; BEGIN});
	$session->ok(q{INSERT INTO flush VALUES (1, 'kept')});
	$session->ok(q{SAVEPOINT a; INSERT INTO flush VALUES (2, 'gone')});
	$session->ok(q{ROLLBACK TO a; INSERT INTO flush VALUES (3, 'kept')});
	$session->ok(q{SAVEPOINT b; UPDATE flush SET v = 'new' WHERE id = 1; RELEASE b});
	$beta->poll_ok(
		q{SELECT count(*) = 1 FROM pg_stat_activity
		  WHERE client_addr IS NOT NULL AND state = 'idle in transaction'},
		'sync_flush = commit: the peer has what no savepoint may undo');
	$session->ok('COMMIT');
	is(there('SELECT string_agg(id || v, $$ $$ ORDER BY id) FROM flush'),
		'1new 3kept', '... and has everything at the commit');
	there(q{INSERT INTO flush VALUES (4, 'there')});
	$session->ok(q{BEGIN});
	$session->ok(q{INSERT INTO flush VALUES (4, 'here')});
	my ($out, $err) = $session->run('COMMIT');
	like($err, qr/ERROR:  23505/, '... where it may refuse');
	is(here('SELECT count(*) FROM flush'), '2', '... the whole transaction');
	there(q{DELETE FROM flush WHERE id = 4});

	# One transaction has a mode of its own.
	$session->ok(q{SET mmrepl.sync_flush = 'statement'; SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	$session->ok(q{BEGIN; SET LOCAL mmrepl.mode = 'async';
		INSERT INTO flush VALUES (5, 'queued'); COMMIT});
	is(there('SELECT count(*) FROM flush WHERE id = 5'),
		'0', 'mode async: a sync pair is queued');
	($out, $err) = $session->run(q{INSERT INTO flush VALUES (6, 'overtakes')});
	like($err, qr/ERROR:  MM008.*still queued/,
		'... and not overtaken while that waits');
	$session->ok(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	here(q{SELECT mmrepl.alter_pair('flush', 'beta', mode => 'async')});
	$session->ok(q{BEGIN; SET LOCAL mmrepl.mode = 'sync';
		UPDATE flush SET v = 'lifted' WHERE id = 5});
	is(there($busy), '1', 'mode sync: an async pair is executed at once');
	$session->ok('COMMIT');
	is(there('SELECT v FROM flush WHERE id = 5'), 'lifted', '... and committed');
	$session->quit;
};

done_testing();
