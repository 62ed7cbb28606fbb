# Whose rights are used, and what is shown to whom: bugs that were found once and
# must not come back.  Each part says what went wrong.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair;
my $superuser = $alpha->safe_psql('postgres', 'SELECT current_user');
my $peer_user = $beta->safe_psql('postgres', 'SELECT current_user');

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

# The same as a role.
sub as
{
	my ($role, $sql) = @_;

	return $alpha->safe_psql('postgres', $sql, extra_params => [ '-U', $role ]);
}

sub refused
{
	my ($sql, $role) = @_;

	return $alpha->fails('postgres', $sql, extra_params => [ '-U', $role || $superuser ]);
}

sub synced
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->wait_caught_up('beta');
}

# An ordinary role that may make pairs, with a schema that nobody else may use.
sub make_owner
{
	my ($role) = @_;

	here(
		qq{CREATE ROLE $role LOGIN;
		   CREATE SCHEMA $role AUTHORIZATION $role;
		   GRANT USAGE ON FOREIGN SERVER beta TO $role;
		   CREATE USER MAPPING FOR $role SERVER beta OPTIONS (user '$peer_user', password_required 'false')});
	return;
}

# A table on both nodes; here it belongs to the role.
sub make_table
{
	my ($table, $owner) = @_;

	$alpha->create_table_on_both($beta, "CREATE TABLE $table (id int PRIMARY KEY, v text)");
	here("ALTER TABLE $table OWNER TO $owner");
	return;
}

make_owner('app');
here('CREATE ROLE writer LOGIN; CREATE ROLE neighbour LOGIN; CREATE SCHEMA neighbour AUTHORIZATION neighbour');

###############################################################################

# A filter was parsed, simplified and evaluated with the rights, and under the
# search_path, of whoever wrote to the table or issued DDL.  A table's owner became
# superuser that way; and writers needed rights on the owner's functions.
section 'a filter runs as the owner of its pair' => sub {
	make_table('guarded', 'app');
	as('app',
		q{CREATE TABLE app.ran (what text, who name, path text, restricted bool);
		  CREATE FUNCTION app.note(what text) RETURNS void LANGUAGE plpgsql AS $$
		  DECLARE
			restricted bool := false;
		  BEGIN
			BEGIN
				CREATE TEMP TABLE made_by_filter ();
				DROP TABLE made_by_filter;
			EXCEPTION WHEN insufficient_privilege THEN
				restricted := true;
			END;
			INSERT INTO app.ran VALUES (what, current_user, current_setting('search_path'), restricted);
		  END $$;
		  CREATE FUNCTION app.wanted(id int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS $$
		  BEGIN
			PERFORM app.note('row');
			RETURN id / (id - 13) < 1000;
		  END $$;
		  CREATE FUNCTION app.simplified() RETURNS bool IMMUTABLE LANGUAGE plpgsql AS $$
		  BEGIN
			PERFORM app.note('plan');
			RETURN true;
		  END $$;
		  CREATE DOMAIN app.literal AS text CHECK (app.simplified());
		  GRANT INSERT, UPDATE ON guarded TO writer;
		  SELECT mmrepl.create_pair('guarded', 'beta',
			row_filter => $$app.wanted(id) AND app.simplified() AND v <> ALL ('{secret}'::app.literal[])$$)});

	# What ran since the last call; each in a session that has not planned it yet.
	my $ran = sub {
		my $found = here('SELECT DISTINCT what, who, path, restricted FROM app.ran ORDER BY 1');
		here('DELETE FROM app.ran');
		return $found;
	};
	my $rows = "plan|app|pg_catalog, pg_temp|t\nrow|app|pg_catalog, pg_temp|t";

	$ran->();
	here(q{INSERT INTO guarded VALUES (1, 'superuser')});
	is($ran->(), $rows, 'a superuser writes');
	is( as('writer',
			q{SET search_path = public;
			  INSERT INTO public.guarded VALUES (2, 'writer'), (3, 'writer');
			  UPDATE public.guarded SET v = 'again';
			  SELECT current_user, current_setting('search_path')}),
		'writer|public', 'a writer, who stays who he is');
	is($ran->(), $rows, 'a writer without rights on anything in it');
	as('app', q{INSERT INTO guarded VALUES (4, 'owner')});
	is($ran->(), $rows, 'the owner');

	my $writer = $alpha->session('postgres', '-U', 'writer');
	my ($out, $err) = $writer->run(q{BEGIN; SAVEPOINT s; INSERT INTO guarded VALUES (13, 'thirteen')});
	like($err, qr/22012: division by zero/, 'an error in a filter');
	is($writer->ok(q{ROLLBACK TO s; SELECT current_user; SHOW is_superuser; SHOW search_path}),
		"writer\noff\n\"\$user\", public", 'leaves the writer who he is');
	$writer->ok('COMMIT');
	$writer->quit;
	$ran->();

	here(q{SELECT mmrepl.alter_pair('guarded', 'beta', copy_data => true)});
	is($ran->(), $rows, 'a copy');
	here(q{SELECT mmrepl.resync('beta', force => true)});
	is($ran->(), $rows, 'a resync');
	here(q{ALTER TABLE guarded ADD COLUMN later int; ALTER TABLE guarded RENAME COLUMN later TO sooner;
		   ALTER TABLE guarded RENAME COLUMN sooner TO later; ALTER TABLE guarded DROP COLUMN later;
		   CREATE FUNCTION app.wanted() RETURNS int LANGUAGE sql AS 'SELECT 1';
		   DROP FUNCTION app.wanted()});
	is($ran->(), 'plan|app|pg_catalog, pg_temp|t', 'DDL of a superuser');
	synced();
	is($beta->safe_psql('postgres', 'SELECT array_agg(id ORDER BY id) FROM guarded'), '{1,2,3,4}', 'all has arrived');
};

# Built-in functions call those of the elements: a filter that compares arrays ran code as
# whoever wrote.
section 'what belongs to a type runs as the owner, too' => sub {
	make_table('compared', 'app');
	as('app',
		q{CREATE TYPE app.part AS (a int);
		  CREATE FUNCTION app.compare(app.part, app.part) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
		  BEGIN
			  IF current_user <> 'app' THEN RAISE 'called as %', current_user; END IF;
			  RETURN ($1).a - ($2).a;
		  END $$;
		  CREATE FUNCTION app.equal(app.part, app.part) RETURNS boolean IMMUTABLE LANGUAGE plpgsql
			  AS 'BEGIN RETURN app.compare($1, $2) = 0; END';
		  CREATE OPERATOR app.= (LEFTARG = app.part, RIGHTARG = app.part, FUNCTION = app.equal);
		  ALTER TABLE compared ADD parts app.part[]});
	here(
		q{CREATE OPERATOR CLASS app.part_ops DEFAULT FOR TYPE app.part USING btree AS
			  OPERATOR 3 app.=, FUNCTION 1 app.compare(app.part, app.part)});
	as('app',
		q{SELECT mmrepl.create_pair('compared', 'beta', columns => '{id}', row_filter => $$parts <> '{(1)}'$$)});
	here(q{INSERT INTO compared VALUES (1, '', '{(1)}'), (2, '', '{(2)}')});
	synced();
	is($beta->safe_psql('postgres', 'SELECT array_agg(id) FROM compared'), '{2}', 'and says what it did');
};

# A filter that wrote to its table was evaluated while it was evaluated, in the same
# memory.
section 'a filter that writes to its table' => sub {
	make_table('nested', 'app');
	as('app',
		q{CREATE FUNCTION app.more(id int) RETURNS void LANGUAGE sql AS
			'INSERT INTO public.nested VALUES (id + 1, repeat(id::text, 100))';
		  CREATE FUNCTION app.makes_more(id int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS $$
		  BEGIN
			IF id < 5 THEN
				PERFORM app.more(id);
			END IF;
			RETURN true;
		  END $$;
		  SELECT mmrepl.create_pair('nested', 'beta', row_filter => $$v || v <> 'x' AND app.makes_more(id)$$)});
	like(refused(q{INSERT INTO nested VALUES (1, 'one')}),
		qr/55006: row_filter of table "nested" has written to a table that it filters\nHINT:  /, 'is refused');
	here(q{INSERT INTO nested VALUES (5, 'five')});
	synced();
	is($beta->safe_psql('postgres', 'SELECT array_agg(id) FROM nested'), '{5}', 'when it does');
	here(q{SELECT mmrepl.drop_pair('nested', 'beta')});
};

# The owner of a table could give a filter to a pair of somebody else's, which
# would run with that one's rights.
section 'who gives a pair its filter' => sub {
	make_table('lent', 'app');
	$alpha->create_pair('lent', 'beta', q{row_filter => 'id > 0'});
	like(refused(q{SELECT mmrepl.alter_pair('lent', 'beta', row_filter => 'app.wanted(id)')}, 'app'),
		qr/ERROR:  42501: must be owner of pair \d+ to give it a row filter\nDETAIL:  .*\nHINT:  /,
		'not who owns the table only');
	is(here(q{SELECT row_filter FROM mmrepl.pairs WHERE local_table = 'lent'::regclass}), '(id > 0)', 'it is as it was');
	as('app', q{SELECT mmrepl.alter_pair('lent', 'beta', row_filter => '')});
	is(here(q{SELECT row_filter IS NULL FROM mmrepl.pairs WHERE local_table = 'lent'::regclass}),
		't', 'who may do without it');
	here(q{SELECT mmrepl.drop_pair('lent', 'beta')});
};

# Every DROP and rename of a type, a function or the like read every filter of the
# database, and every DROP INDEX every key that is an index: it failed where the role had no right on what somebody's filter calls, or
# that one's pair had lost it, and waited for whoever had locked the table.
section 'the DDL of others' => sub {
	here(
		q{CREATE SCHEMA tools;
		  CREATE TYPE tools.kind AS ENUM ('good', 'bad');
		  CREATE FUNCTION tools.kind_of(text) RETURNS tools.kind IMMUTABLE LANGUAGE sql
			AS $$SELECT CASE WHEN $1 = 'bad' THEN 'bad' ELSE 'good' END::tools.kind$$;
		  GRANT USAGE ON SCHEMA tools TO app});
	make_table('sorted', 'app');
	as('app', q{SELECT mmrepl.create_pair('sorted', 'beta', row_filter => $$tools.kind_of(v) = 'good'$$)});

	$alpha->create_table_on_both($beta,
		'CREATE TABLE keyed (id int NOT NULL); CREATE UNIQUE INDEX by_id ON keyed (id);'
		. 'ALTER TABLE keyed REPLICA IDENTITY USING INDEX by_id');
	$alpha->create_pair('keyed', 'beta');

	my $ddl =
	  q{CREATE TABLE neighbour.plain (id int); CREATE INDEX plain_id ON neighbour.plain (id);
		DROP INDEX neighbour.plain_id; DROP TABLE neighbour.plain;
		CREATE TYPE neighbour.color AS ENUM ('red'); ALTER TYPE neighbour.color RENAME TO colour;
		CREATE FUNCTION neighbour.f(neighbour.colour) RETURNS int LANGUAGE sql AS 'SELECT 1';
		CREATE CAST (neighbour.colour AS int) WITH FUNCTION neighbour.f(neighbour.colour);
		ALTER TYPE neighbour.colour SET SCHEMA neighbour;
		CREATE DOMAIN neighbour.o AS int; DROP DOMAIN neighbour.o;
		DROP TYPE neighbour.colour CASCADE};
	my $locker = $alpha->session;

	as('neighbour', $ddl);
	$locker->ok('BEGIN; LOCK TABLE sorted, guarded, keyed');
	as('neighbour', "SET lock_timeout = '10s'; $ddl");
	pass('do not wait for who has locked the table');
	$locker->ok('ROLLBACK');
	$locker->quit;

	foreach my $needed (
		q{ALTER TYPE tools.kind RENAME VALUE 'good' TO 'fine'},
		'ALTER TYPE tools.kind RENAME TO sort',
		'DROP TYPE tools.kind CASCADE',
		'DROP SCHEMA tools CASCADE')
	{
		like(refused($needed), qr/ERROR:  .*^HINT:  .*^CONTEXT:  row_filter of table "sorted"\npair \d+/ms, $needed);
	}
	here('ALTER FUNCTION tools.kind_of(text) OWNER TO neighbour; ALTER TYPE tools.kind OWNER TO neighbour');
	like(refused('DROP OWNED BY neighbour CASCADE'), qr/^CONTEXT:  row_filter of table "sorted"/m, 'DROP OWNED');

	here('REVOKE USAGE ON SCHEMA tools FROM app');
	as('neighbour', $ddl);
	like(refused(q{INSERT INTO sorted VALUES (1, 'x')}),
		qr/42501: permission denied for schema tools.*^HINT:  .*row_filter.*^CONTEXT:  row_filter of table "sorted"/ms,
		'a right that the owner has lost is missed by writers');
	here('GRANT USAGE ON SCHEMA tools TO app');
	as('app', q{INSERT INTO sorted VALUES (1, 'x'), (2, 'bad')});
	synced();
	is($beta->safe_psql('postgres', 'SELECT array_agg(id) FROM sorted'), '{1}', 'and is obeyed');
};

# The functions below the statistics of pairs showed everybody everybody's counters.
section 'the counters of a pair' => sub {
	make_owner('other');
	make_table('counted', 'other');
	my $pair = as('other', q{SELECT mmrepl.create_pair('counted', 'beta')});
	my $pairs = "SELECT count(*), sum(inserts) FROM mmrepl.stat_pairs() WHERE pair_id = $pair";
	my $conflicts = q{SELECT sum(conflicts) FROM mmrepl.stat_conflicts() WHERE local_table = 'counted'::regclass};

	# A conflict here, with what comes from beta.
	$beta->create_pair('counted', 'alpha');
	as('other', q{INSERT INTO counted VALUES (1, 'here'), (2, 'here')});
	synced();
	$beta->safe_psql('postgres', q{SET mmrepl.capture = off; DELETE FROM counted WHERE id = 1});
	$beta->safe_psql('postgres', q{INSERT INTO counted VALUES (1, 'there')});
	$beta->wait_caught_up('alpha');

	here('CREATE ROLE monitor LOGIN IN ROLE pg_monitor');
	foreach my $role ('other', 'monitor', $superuser)
	{
		is(as($role, $pairs), '1|2', "$role sees the pair's");
		is(as($role, $conflicts), '1', "$role sees the table's conflicts");
		is(as($role, "SELECT inserts, conflicts FROM mmrepl.pg_stat_mmrepl_pairs WHERE pair_id = $pair"),
			'2|1', "$role: as the view has it");
	}
	foreach my $role ('app', 'writer')
	{
		is(as($role, $pairs), '0|', "$role does not");
		is(as($role, $conflicts), '', "$role does not see conflicts");
	}
	is(as('app', 'SELECT count(*) FROM mmrepl.stat_pairs() s JOIN mmrepl.pairs p USING (pair_id)
				  WHERE p.local_table = \'guarded\'::regclass'), '1', 'app sees its own');
};

# Whoever owns a database could not dump it when a superuser had created the
# extension: permission denied for table pair.
section 'the owner of a database dumps it' => sub {
	here(q{CREATE ROLE keeper LOGIN; CREATE ROLE stranger LOGIN});
	$_->safe_psql('postgres', 'CREATE DATABASE kept') foreach ($alpha, $beta);
	$_->install_extension('kept') foreach ($alpha, $beta);
	here('ALTER DATABASE kept OWNER TO keeper');
	$alpha->add_peer($beta, dbname => 'kept', peer_dbname => 'kept', role => 'keeper');
	$alpha->safe_psql('kept',
		q{GRANT USAGE ON FOREIGN SERVER beta TO keeper;
		  ALTER USER MAPPING FOR keeper SERVER beta OPTIONS (ADD password_required 'false')});

	my $tables =
	  q{CREATE TABLE parted (id int, region text, v text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
		CREATE TABLE parted_eu PARTITION OF parted FOR VALUES IN ('eu');
		CREATE TABLE identified (id int NOT NULL, code text NOT NULL UNIQUE);
		CREATE UNIQUE INDEX by_id ON identified (id);
		ALTER TABLE identified REPLICA IDENTITY USING INDEX by_id};
	my $keeper = sub {
		return $alpha->safe_psql('kept', $_[0], extra_params => [ '-U', 'keeper' ]);
	};
	my $file = $alpha->basedir . '/kept.sql';

	$beta->safe_psql('kept', $tables);
	$keeper->(
		qq{$tables;
		   SELECT mmrepl.create_pair('parted', 'beta');
		   SELECT mmrepl.create_pair('identified', 'beta', row_filter => \$\$code <> 'secret'\$\$);
		   INSERT INTO parted VALUES (1, 'eu', 'a');
		   INSERT INTO identified VALUES (1, 'a')});
	$alpha->wait_caught_up('beta', 'kept');
	$alpha->command_ok([ 'pg_dump', '-U', 'keeper', '-f', $file, '-d', $alpha->connstr('kept') ], 'pg_dump');
	$alpha->command_fails([ 'pg_dump', '-U', 'stranger', '-f', "$file.no", '-d', $alpha->connstr('kept') ],
		'not so anybody else');

	# Restored, it waits for the first write; then it has a worker.
	here('CREATE DATABASE restored');
	my ($ret, $out, $err) = $alpha->psql('restored', slurp_file($file), extra_params => [ '-v', 'ON_ERROR_STOP=1' ]);
	is($ret, 0, 'it is restored') or diag($err);
	unlike($err, qr/ERROR|WARNING/, 'without a complaint');
	my $pairs = 'SELECT pair_id, local_table, server, row_filter, enabled, owner FROM mmrepl.pairs ORDER BY 1';
	is($alpha->safe_psql('restored', $pairs), $keeper->($pairs), 'the pairs are as they were');
	is($alpha->safe_psql('restored', 'SELECT state, stream, pid FROM mmrepl.pg_stat_mmrepl'),
		'starting||', 'nothing was captured for them yet');
	is($alpha->safe_psql('restored', q{SELECT mmrepl.wait_for_replay('beta')}), 't', 'nothing waits');
	$alpha->safe_psql('restored',
		q{INSERT INTO parted VALUES (2, 'eu', 'restored');
		  INSERT INTO identified VALUES (2, 'restored'), (3, 'secret')});
	$alpha->wait_caught_up('beta', 'restored');
	$alpha->poll_state('beta', 'streaming', 'restored');
	is($beta->safe_psql('kept', q{SELECT (SELECT array_agg(id ORDER BY id) FROM parted),
								  (SELECT array_agg(id ORDER BY id) FROM identified)}),
		'{1,2}|{1,2}', 'and it replicates');
};

# Members of pg_monitor, who may see statistics, saw in last_error the rows that the
# peer had refused.
section 'what the peer says of a row' => sub {
	make_table('refused', 'other');
	as('other', q{SELECT mmrepl.create_pair('refused', 'beta')});
	$beta->safe_psql('postgres', q{ALTER TABLE refused ADD CONSTRAINT no_secrets CHECK (v <> 'confidential')});
	as('other', q{INSERT INTO refused VALUES (1, 'confidential')});
	$alpha->poll_ok(q{SELECT state = 'blocked' FROM mmrepl.pg_stat_mmrepl WHERE owner = 'other'::regrole}, 'it is blocked');

	my $said = q{SELECT last_error FROM mmrepl.pg_stat_mmrepl WHERE owner = 'other'::regrole};

	like(as('other', $said), qr/"no_secrets"\nDETAIL:.*confidential/, 'the owner sees the row');
	like(here($said), qr/"no_secrets"\nDETAIL:.*confidential/, 'so does a superuser');
	like(as('monitor', $said), qr/^new row .*"no_secrets"$/, 'pg_monitor sees what is wrong');
	is(as('app', $said), '', 'others see nothing');
	here(q{SELECT mmrepl.skip('beta', blocked_ticket, 'refused') FROM mmrepl.pg_stat_mmrepl WHERE blocked_ticket IS NOT NULL});
	synced();
};

# In sync mode a writer without the right to read a table was shown its rows, here and
# at the peer, when the peer refused a change.
section 'what a writer is told of rows that he may not read' => sub {
	make_table('private', 'other');
	as('other', q{SELECT mmrepl.create_pair('private', 'beta', mode => 'sync');
				  GRANT INSERT, UPDATE ON private TO writer;
				  GRANT SELECT, UPDATE ON private TO neighbour;
				  INSERT INTO private VALUES (1, 'mine')});
	$beta->safe_psql('postgres', q{UPDATE private SET v = 'theirs'; ALTER TABLE private ADD CONSTRAINT short CHECK (v <> 'long')});

	my $update = q{UPDATE private SET v = 'new'};

	like(refused($update, 'other'), qr/ERROR:  40001: .*theirs/s, 'the owner sees the rows');
	like(refused($update, 'neighbour'), qr/ERROR:  40001: .*theirs/s, 'so does who may read them');
	my $told = refused($update, 'writer');
	like($told, qr/ERROR:  40001: .*^CONTEXT:  .*server "beta"/ms, 'who may not is told what is wrong');
	unlike($told, qr/theirs|mine/, 'and does not see them');
	like(refused(q{INSERT INTO private VALUES (2, 'long')}, 'writer'), qr/ERROR:  23514: .*"short"(?!.*DETAIL)/s, 'a violated check');

	here('ALTER TABLE private ENABLE ROW LEVEL SECURITY; CREATE POLICY own ON private FOR ALL TO neighbour USING (true)');
	unlike(refused($update, 'neighbour'), qr/theirs/, 'nor who sees some of them only');
};

# Never wrong, but without a test: what the owner of a table has put into it at the
# receiver runs as he, though a superuser's mapping brings the changes.
section 'the code of a table at the receiver' => sub {
	$beta->safe_psql('postgres',
		q{CREATE ROLE host LOGIN; CREATE SCHEMA host AUTHORIZATION host; GRANT CREATE ON SCHEMA public TO host});
	$beta->safe_psql('postgres',
		q{CREATE TABLE host.ran (what text, who name);
		  CREATE FUNCTION host.note(what text) RETURNS bool LANGUAGE plpgsql AS $$
		  BEGIN
			INSERT INTO host.ran VALUES (what, current_user);
			RETURN true;
		  END $$;
		  CREATE FUNCTION host.folded(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
		  BEGIN
			PERFORM host.note('index');
			RETURN lower($1);
		  END $$;
		  CREATE FUNCTION host.fires() RETURNS trigger LANGUAGE plpgsql AS $$
		  BEGIN
			PERFORM host.note('trigger');
			RETURN NEW;
		  END $$;
		  CREATE DOMAIN host.word AS text CHECK (host.note('domain'));
		  CREATE TABLE public.guest (id int PRIMARY KEY, v text, w host.word DEFAULT 'w', CHECK (host.note('check')));
		  CREATE INDEX guest_v ON public.guest (host.folded(v));
		  CREATE TRIGGER fires BEFORE INSERT OR UPDATE ON public.guest FOR EACH ROW EXECUTE FUNCTION host.fires();
		  ALTER TABLE public.guest ENABLE ALWAYS TRIGGER fires}, extra_params => [ '-U', 'host' ]);
	here('CREATE TABLE guest (id int PRIMARY KEY, v text)');
	$alpha->create_pair('guest', 'beta');
	foreach my $mode ('async', 'sync')
	{
		$beta->safe_psql('postgres', 'TRUNCATE host.ran');
		here(qq{SET mmrepl.mode = '$mode'; INSERT INTO guest SELECT g, '$mode' FROM generate_series(1, 5) g;
				UPDATE guest SET v = 'new'; DELETE FROM guest});
		synced();
		is($beta->safe_psql('postgres', 'SELECT what, string_agg(DISTINCT who, $$ $$) FROM host.ran GROUP BY 1 ORDER BY 1'),
			"check|host\ndomain|host\nindex|host\ntrigger|host", "$mode: runs as its owner");
	}

	# Deferred, it would run with nobody's restriction at the end of the transaction.
	$beta->safe_psql('postgres',
		q{CREATE CONSTRAINT TRIGGER later AFTER INSERT ON guest DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION host.fires();
		  ALTER TABLE guest ENABLE ALWAYS TRIGGER later}, extra_params => [ '-U', 'host' ]);
	like(refused(q{SET mmrepl.mode = 'sync'; INSERT INTO guest VALUES (9, 'deferred')}),
		qr/42501: cannot fire deferred trigger within security-restricted operation/, 'nor at the end of the transaction');
};

# Anybody could keep the queue's tables from being emptied, with a transaction that
# had looked at a queue of which it sees nothing.
section 'who holds the queue' => sub {
	my $locks = q{SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid()
				  AND relation IN (SELECT oid FROM pg_class WHERE relname ~ '^queue_[012]$')};
	my $look = "BEGIN; SELECT count(*) FROM mmrepl.sync_err_rec; $locks; COMMIT";

	is(as('writer', $look), "0\n0", 'not who has nothing in it');
	is(as('other', $look), "0\n3", 'but who sees what it holds');
};

# When the owner of a pair was dropped: "invalid role OID", or nothing at all until
# somebody looked at the stream.
section 'the owner of a pair goes' => sub {
	make_owner('leaver');
	make_table('abandoned', 'leaver');
	my $pair = as('leaver', q{SELECT mmrepl.create_pair('abandoned', 'beta')});

	my $say = sub {
		my ($sql) = @_;
		my ($ret, $out, $err) = $alpha->psql('postgres', $sql);
		return $err;
	};
	my $drop = qr/SELECT mmrepl\.drop_pair\('public\.abandoned', 'beta'\);/;

	like(refused('DROP ROLE leaver'), qr/ERROR:  2BP01: .*user mapping for leaver on server beta/s, 'the role is needed');
	like($say->('ALTER TABLE abandoned OWNER TO app'),
		qr/NOTICE:  pair $pair of table "abandoned" still belongs to role "leaver"\nDETAIL:  .*\nHINT:  .*$drop/, 'ALTER TABLE OWNER');
	like($say->('BEGIN; DROP USER MAPPING FOR leaver SERVER beta; ROLLBACK'),
		qr/WARNING:  pair $pair of table "abandoned" has no user mapping .*\nDETAIL:  .*\nHINT:  CREATE USER MAPPING FOR leaver SERVER beta .* $drop/,
		'DROP USER MAPPING');
	like($say->('DROP OWNED BY leaver'), qr/WARNING:  pair $pair of table "abandoned" has no user mapping/, 'DROP OWNED');
	here('DROP ROLE leaver');

	my $oid = here(qq{SELECT owner::oid FROM mmrepl.pairs WHERE pair_id = $pair});
	my $gone = qr/does not exist any more\nDETAIL:  The role with OID $oid was dropped\.\nHINT:  /;

	like(refused(q{SELECT mmrepl.alter_pair('abandoned', 'beta', mode => 'sync')}), qr/42704: the owner of pair $pair $gone$drop/, 'alter_pair()');
	like(refused(q{SELECT mmrepl.drop_pair('abandoned', 'beta')}, 'writer'), qr/HINT:  Let role "app" do it/, 'drop_pair() of a stranger');
	like(refused(q{SET mmrepl.mode = 'sync'; INSERT INTO "abandoned" VALUES (2, 'sync')}),
		qr/42704: the owner of pairs to server "beta" ${gone}SELECT/, 'a write in sync mode');
	here(q{INSERT INTO "abandoned" VALUES (3, 'queued')});
	$alpha->poll_ok(qq{SELECT state = 'retrying' AND last_error ~ 'does not exist any more' FROM mmrepl.pg_stat_mmrepl WHERE owner::oid = $oid},
		'the stream says so');

	my ($hint) = here(qq{SELECT last_error FROM mmrepl.pg_stat_mmrepl WHERE owner::oid = $oid}) =~ /^HINT:  (SELECT .*?;)/m;

	here($hint);
	is(here(qq{SELECT count(*) FROM mmrepl.pairs WHERE pair_id = $pair}), '0', 'the hint can be pasted');
	here(qq{SELECT mmrepl.skip('beta', ticket, 'its owner is gone') FROM mmrepl.sync_err_rec});
};

done_testing();
