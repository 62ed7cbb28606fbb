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
# database: it failed where the role had no right on what somebody's filter calls, or
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

	my $ddl =
	  q{CREATE TYPE neighbour.color AS ENUM ('red'); ALTER TYPE neighbour.color RENAME TO colour;
		CREATE FUNCTION neighbour.f(neighbour.colour) RETURNS int LANGUAGE sql AS 'SELECT 1';
		CREATE CAST (neighbour.colour AS int) WITH FUNCTION neighbour.f(neighbour.colour);
		ALTER TYPE neighbour.colour SET SCHEMA neighbour;
		CREATE DOMAIN neighbour.o AS int; DROP DOMAIN neighbour.o;
		DROP TYPE neighbour.colour CASCADE};
	my $locker = $alpha->session;

	as('neighbour', $ddl);
	$locker->ok('BEGIN; LOCK TABLE sorted, guarded');
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

done_testing();
