# Bugs that were found once and must not come back, continued: where what a user
# types, or is told, was not what the documentation promises.  Each part says
# what went wrong.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair;

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

sub refused
{
	return $alpha->fails('postgres', $_[0]);
}

sub synced
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->wait_caught_up('beta');
}

# What the pair's row in the statistics says of captured changes.
sub counts
{
	my ($pair) = @_;

	return here("SELECT inserts, updates, deletes, truncates FROM mmrepl.pg_stat_mmrepl_pairs WHERE pair_id = $pair");
}

###############################################################################

# What a savepoint had taken back was counted, what was committed after PREPARE
# TRANSACTION was not.
section 'the counters of a pair' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE counted (id int PRIMARY KEY, v text)');
	$alpha->create_table_on_both($beta, 'CREATE TABLE beside (id int PRIMARY KEY)');
	my $pair = $alpha->create_pair('counted', 'beta');
	my $beside = $alpha->create_pair('beside', 'beta');

	foreach my $mode ('async', 'sync')
	{
		here(
			qq{SELECT mmrepl.stat_reset();
			   SET mmrepl.mode = '$mode';
			   TRUNCATE counted;
			   BEGIN;
			   INSERT INTO counted VALUES (1), (2);
			   SAVEPOINT a;
			   INSERT INTO counted VALUES (3);
			   SAVEPOINT b;
			   UPDATE counted SET v = 'kept';
			   INSERT INTO beside VALUES (1);
			   RELEASE b;
			   SAVEPOINT c;
			   DELETE FROM counted;
			   TRUNCATE counted;
			   INSERT INTO beside VALUES (2);
			   ROLLBACK TO c;
			   DELETE FROM counted WHERE id = 1;
			   RELEASE a;
			   SAVEPOINT d;
			   DELETE FROM beside;
			   ROLLBACK TO d;
			   COMMIT;
			   BEGIN;
			   INSERT INTO counted VALUES (9);
			   ROLLBACK});
		is(counts($pair), '3|3|1|1', "$mode: what was committed");
		is(counts($beside), '1|0|0|0', "$mode: of each pair");
		here('SET mmrepl.mode = async; DELETE FROM beside');
		synced();
		$alpha->same_rows($beta, 'counted');
	}
	here(
		q{SELECT mmrepl.stat_reset();
		  DO $$BEGIN
			FOR i IN 11 .. 30 LOOP
				BEGIN
					INSERT INTO counted VALUES (i);
					IF i % 2 = 0 THEN
						RAISE EXCEPTION 'no';
					END IF;
				EXCEPTION WHEN raise_exception THEN
				END;
			END LOOP;
		  END$$});
	is(counts($pair), '10|0|0|0', 'in exception blocks');
	here(
		q{SELECT mmrepl.stat_reset();
		  BEGIN;
		  INSERT INTO counted VALUES (50);
		  PREPARE TRANSACTION 'counted';
		  COMMIT PREPARED 'counted'});
	is(counts($pair), '1|0|0|0', 'prepared');
	synced();
};

# The WARNING of deal_sync_err_rec() said what the peer had refused, but not
# which transaction and table, and not which peer.
section 'where it failed, says deal_sync_err_rec()' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE odd (id int PRIMARY KEY)');
	$alpha->create_pair('odd', 'beta');
	here(q{SELECT mmrepl.pause('beta')});
	$beta->safe_psql('postgres', 'ALTER TABLE odd ADD CONSTRAINT odd_one CHECK (id % 2 = 1)');
	here('INSERT INTO odd VALUES (2)');

	my ($ret, $out, $err) = $alpha->psql('postgres',
		"\\set SHOW_CONTEXT always\n\\set VERBOSITY verbose\nSELECT mmrepl.deal_sync_err_rec(1)");
	my $ticket = here('SELECT ticket FROM mmrepl.sync_err_rec');

	is($out, 'f', 'it failed');
	like($err, qr/WARNING:  23514: .*"odd_one"/, 'as the peer says');
	like($err, qr/CONTEXT:  .*ticket $ticket .*relation "public\.odd"/, 'the transaction and the table');
	like($err, qr/server "beta"/, 'the server');
	here(qq{SELECT mmrepl.skip('beta', $ticket, 'even'); SELECT mmrepl.resume('beta')});
	synced();
};

# PostgreSQL's parser has no hint for most errors, so neither had a filter that
# does not compile.
section 'the hint for a filter' => sub {
	here('CREATE TABLE filtered (id int PRIMARY KEY, v text)');
	foreach my $filter ('id >', 'nothing = 1', 'id + 1', 'id = $1', 'true); SELECT (1', 'no_such(id)',
		'id = v', 'nowhere.f(id)', q{id = ''x''})
	{
		like(refused(qq{SELECT mmrepl.create_pair('filtered', 'beta', row_filter => '$filter')}),
			qr/^HINT:  \w/m, $filter);
	}
};

# A function that a filter calls could be dropped, renamed or made volatile: from
# then on every write to the table failed, in new sessions only.
section 'what a filter needs stays' => sub {
	$beta->safe_psql('postgres', 'CREATE TABLE filtered (id int PRIMARY KEY, v text)');
	here(
		q{CREATE SCHEMA tools;
		  CREATE FUNCTION tools.wanted(int) RETURNS bool IMMUTABLE LANGUAGE sql AS 'SELECT $1 > 0';
		  CREATE FUNCTION tools.other(int) RETURNS bool IMMUTABLE LANGUAGE sql AS 'SELECT $1 > 0'});
	$alpha->create_pair('filtered', 'beta', q{row_filter => 'tools.wanted(id)'});
	foreach my $ddl (
		'DROP FUNCTION tools.wanted(int)',
		'DROP FUNCTION tools.wanted(int) CASCADE',
		'DROP SCHEMA tools CASCADE',
		'ALTER FUNCTION tools.wanted(int) RENAME TO unwanted',
		'ALTER FUNCTION tools.wanted(int) SET SCHEMA public',
		'ALTER FUNCTION tools.wanted(int) VOLATILE',
		q{CREATE OR REPLACE FUNCTION tools.wanted(int) RETURNS bool VOLATILE LANGUAGE sql AS 'SELECT true'},
		'ALTER SCHEMA tools RENAME TO toys')
	{
		like(refused($ddl), qr/ERROR:  .*^HINT:  .*^CONTEXT:  row_filter of table "filtered"/ms, $ddl);
	}
	here('DROP FUNCTION tools.other(int)');

	# Who has the table for himself keeps nobody from making functions that it does not need.
	my $owner = $alpha->session;
	$owner->ok('BEGIN; LOCK TABLE filtered');
	here(q{SET lock_timeout = '10s'; CREATE FUNCTION tools.third() RETURNS int LANGUAGE sql AS 'SELECT 3'});
	here(q{CREATE TABLE tools.alone (id int); CREATE INDEX alone_id ON tools.alone (id)});
	here(q{SET lock_timeout = '10s'; DROP INDEX tools.alone_id});
	$owner->ok('ROLLBACK');
	here('INSERT INTO filtered VALUES (1), (-1)');
	synced();
	is($beta->safe_psql('postgres', 'SELECT array_agg(id) FROM filtered'), '{1}', 'and is obeyed');

	here(q{SELECT mmrepl.alter_pair('filtered', 'beta', row_filter => '')});
	here('DROP SCHEMA tools CASCADE');
};

# DROP INDEX took the key of a table that is identified by an index, and with it
# every later write.
section 'the key stays' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE indexed (id int NOT NULL, v text); CREATE UNIQUE INDEX by_id ON indexed (id);'
		. 'CREATE INDEX by_v ON indexed (v); ALTER TABLE indexed REPLICA IDENTITY USING INDEX by_id');
	$alpha->create_pair('indexed', 'beta');
	like(refused('DROP INDEX by_id'), qr/MM002: cannot replicate "indexed".*has no key/s, 'an index that is the key');
	like(refused('DROP INDEX by_v, by_id'), qr/MM002/, 'one of several');
	here('DROP INDEX by_v; INSERT INTO indexed VALUES (1)');
	synced();
	$alpha->same_rows($beta, 'indexed');
	here(q{SELECT mmrepl.drop_pair('indexed', 'beta'); DROP INDEX by_id});
};

# A trigger made by hand and a pair could send the same changes to the same table:
# each arrived twice, and in sync mode no INSERT succeeded.
section 'one way from a table to its target' => sub {
	my $trigger = q{CREATE TRIGGER tg AFTER INSERT OR UPDATE OR DELETE ON twice FOR EACH ROW
		EXECUTE FUNCTION mmrepl.replicate('beta', 'public', '%s', 'nobody', 'sync')};

	$alpha->create_table_on_both($beta, "CREATE TABLE $_ (id int PRIMARY KEY)") foreach ('twice', 'elsewhere');
	here(sprintf $trigger, 'twice');

	my $error = refused(q{SELECT mmrepl.create_pair('twice', 'beta')});

	like($error, qr/MM004: table "twice" is already replicated to server "beta"/, 'no pair beside the trigger');
	my ($hint) = $error =~ /^HINT:  (.*)$/m;
	here($hint);
	$alpha->create_pair('twice', 'beta');
	like(refused(sprintf $trigger, 'twice'), qr/MM004/, 'no trigger beside the pair');
	here(sprintf $trigger, 'elsewhere');
	here('INSERT INTO twice VALUES (1)');
	synced();
	$alpha->same_rows($beta, 'twice');
	$alpha->same_rows($beta, 'twice', peer_table => 'elsewhere', name => 'another target');
};

# "SELECT mmrepl.allow_apply(the user of the user mapping)" is no command.
section 'hints can be pasted' => sub {
	my $port = $beta->port;

	$beta->safe_psql('postgres', q{CREATE ROLE "O'Hara" LOGIN; GRANT ALL ON twice TO "O'Hara"});
	here(
		qq{CREATE SERVER hara FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (host '127.0.0.1', port '$port', dbname 'postgres');
		   CREATE USER MAPPING FOR CURRENT_USER SERVER hara OPTIONS (user 'O''Hara')});
	my $error = refused(q{SELECT mmrepl.create_pair('twice', 'hara')});
	my ($hint) = $error =~ /^HINT:  At the peer of server "hara": (SELECT .*;)$/m;

	ok($hint, 'a right is missing at the peer') or diag($error);
	$beta->safe_psql('postgres', $hint);
	here(q{SELECT mmrepl.create_pair('twice', 'hara'); SELECT mmrepl.drop_pair('twice', 'hara')});
};

# A peer that asked for no password, or did not let the role into the database, was
# called one that "cannot be reached": the pair was made, and never worked.
section 'a peer that does not let us in' => sub {
	my $port = $beta->port;

	$beta->safe_psql('postgres', $_)
	  foreach ('CREATE ROLE guest LOGIN', 'CREATE DATABASE closed', 'REVOKE CONNECT ON DATABASE closed FROM PUBLIC');
	here(
		qq{CREATE ROLE guest LOGIN;
		   CREATE TABLE visit (id int PRIMARY KEY);
		   ALTER TABLE visit OWNER TO guest;
		   GRANT USAGE ON FOREIGN SERVER beta TO guest;
		   CREATE USER MAPPING FOR guest SERVER beta OPTIONS (user 'guest', password 'unasked');
		   CREATE SERVER closed FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (host '127.0.0.1', port '$port', dbname 'closed');
		   CREATE USER MAPPING FOR CURRENT_USER SERVER closed OPTIONS (user 'guest')});
	like(refused(q{SET ROLE guest; SELECT mmrepl.create_pair('visit', 'beta')}),
		qr/ERROR:  2F003: .*^DETAIL:  .*^HINT:  .*password_required/ms, 'it asks for no password');
	like(refused(q{SELECT mmrepl.create_pair('visit', 'closed')}), qr/ERROR:  42501: .*"closed"/, 'no right to connect');
	is(here(q{SELECT count(*) FROM mmrepl.pairs WHERE local_table = 'visit'::regclass}), '0', 'no pair was made');
};

done_testing();
