# Bugs that were found once and must not come back, continued: commands that reach a
# replicated table by a way that nobody had thought of.  Each part says what went wrong.

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

sub there
{
	return $beta->safe_psql('postgres', $_[0]);
}

sub both
{
	return $alpha->create_table_on_both($beta, $_[0]);
}

sub synced
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->wait_caught_up('beta');
}

# Passes if the SQL fails with that message.
sub refused
{
	my ($sql, $error, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return like($alpha->fails('postgres', $sql), $error, $name);
}

# What psql says about SQL that succeeds.
sub said
{
	my ($sql) = @_;
	my ($ret, undef, $err) = $alpha->psql('postgres', $sql);

	die "$sql: $err" if $ret != 0;
	return $err;
}

# A trigger made by hand.
sub trigger
{
	my ($name, $event, $level, $table) = @_;

	return qq{CREATE TRIGGER $name AFTER $event ON $table FOR EACH $level
		EXECUTE FUNCTION mmrepl.replicate('beta', 'public', '$table', 'app', 'async');};
}

###############################################################################

# TRUNCATE ... CASCADE came to a partition by a foreign key of its own: its rows stayed
# at the peer.
section 'TRUNCATE that comes to a partition by a foreign key' => sub {
	both(
		q{CREATE TABLE ref (id int PRIMARY KEY);
		  CREATE TABLE mid (id int PRIMARY KEY, r int REFERENCES ref);
		  CREATE TABLE pt (id int PRIMARY KEY, r int) PARTITION BY RANGE (id);
		  CREATE TABLE pt1 PARTITION OF pt FOR VALUES FROM (0) TO (100);
		  CREATE TABLE pt2 PARTITION OF pt FOR VALUES FROM (100) TO (200);
		  ALTER TABLE pt1 ADD FOREIGN KEY (r) REFERENCES mid});
	$alpha->create_pair('pt', 'beta');
	here('INSERT INTO ref VALUES (1); INSERT INTO mid VALUES (1, 1);
		INSERT INTO pt VALUES (1, 1), (100, NULL)');
	my $direct = qr/0A000: cannot truncate partition "pt1" of replicated table "pt"/;

	refused("TRUNCATE $_ CASCADE", $direct, "$_ with CASCADE") foreach ('mid', 'ref');
	refused('TRUNCATE pt1', $direct, 'by its own name');
	is(here('SELECT count(*) FROM pt'), '2', 'nothing is gone');
	here('TRUNCATE ref, pt CASCADE');
	synced();
	is(there('SELECT count(*) FROM pt'), '0', 'together with the replicated table it goes');
	here('INSERT INTO pt VALUES (2)');
	both('ALTER TABLE pt ADD FOREIGN KEY (r) REFERENCES mid');
	here('TRUNCATE ref CASCADE');
	synced();
	is(there('SELECT count(*) FROM pt'), '0', 'also where CASCADE comes to the replicated table');
};

# Below a partitioned table with triggers made by hand it was not refused.
section 'TRUNCATE of a partition below triggers made by hand' => sub {
	both(
		q{CREATE TABLE hand (id int PRIMARY KEY) PARTITION BY RANGE (id);
		  CREATE TABLE hand1 PARTITION OF hand FOR VALUES FROM (0) TO (100)});
	here(trigger('a_rows', 'INSERT OR UPDATE OR DELETE', 'ROW', 'hand'));
	here('TRUNCATE hand1'); # without a trigger for it TRUNCATE is nobody's business
	here(trigger('a_truncate', 'TRUNCATE', 'STATEMENT', 'hand'));
	here('INSERT INTO hand VALUES (1)');
	refused('TRUNCATE hand1', qr/0A000: cannot truncate partition "hand1" of replicated table "hand"/,
		'it is refused');
	here(q{SET application_name = 'app'; TRUNCATE hand1; INSERT INTO hand VALUES (1)});
	here('ALTER TABLE hand DISABLE TRIGGER a_truncate; TRUNCATE hand1');
	here('ALTER TABLE hand ENABLE TRIGGER a_truncate; TRUNCATE hand, hand1');
	synced();
	is(there('SELECT count(*) FROM hand'), '0', 'TRUNCATE of the table arrives');
};

# A TRUNCATE of a partition with a pair of its own was also sent to the peer of the
# table above it, for the whole table.
section 'TRUNCATE of a partition with a pair of its own' => sub {
	$alpha->add_peer($beta, server => 'second');
	both(
		q{CREATE TABLE two (id int PRIMARY KEY) PARTITION BY RANGE (id);
		  CREATE TABLE two1 PARTITION OF two FOR VALUES FROM (0) TO (100);
		  CREATE TABLE two2 PARTITION OF two FOR VALUES FROM (100) TO (200);
		  CREATE TABLE copy1 (id int PRIMARY KEY)});
	$alpha->create_pair('two', 'beta');
	$alpha->create_pair('two1', 'second', q{remote_table => 'copy1'});
	here('INSERT INTO two VALUES (1), (100)');
	refused('TRUNCATE two1', qr/0A000: cannot truncate partition "two1" of replicated table "two"/,
		'it is refused');
	synced();
	is(there('SELECT count(*) FROM two'), '2', 'nothing is gone');
	here('TRUNCATE two');
	synced();
	$alpha->wait_caught_up('second');
	is(there('SELECT (SELECT count(*) FROM two) + (SELECT count(*) FROM copy1)'),
		'0', 'TRUNCATE of the table arrives at both');
	$alpha->poll_ok("SELECT truncates = 1 FROM mmrepl.pg_stat_mmrepl_pairs
		WHERE local_table::text = 'two'", 'once');
};

# After DISABLE and ENABLE TRIGGER ALL a partition's trigger did not fire in sessions
# with session_replication_role = replica, and nothing warned.
section 'triggers of a partition are enabled again' => sub {
	both(
		q{CREATE TABLE en (id int PRIMARY KEY) PARTITION BY RANGE (id);
		  CREATE TABLE en1 PARTITION OF en FOR VALUES FROM (0) TO (100)});
	$alpha->create_pair('en', 'beta');
	like(
		said('ALTER TABLE en1 DISABLE TRIGGER ALL'),
		qr/WARNING:  changes of table "en1" are not all captured: trigger "!mmrepl_capture" is disabled/,
		'who disables them is warned');
	is(said('ALTER TABLE en1 ENABLE TRIGGER ALL'), '', 'who enables them is not');
	here(q{SET session_replication_role = replica; INSERT INTO en VALUES (1)});
	synced();
	$alpha->same_rows($beta, 'en');
};

# The key was looked for at the partition, which may have none of its own: a table that
# was accepted could not be written to.
section 'partitions without a key of their own' => sub {
	both(
		q{CREATE TABLE ident (v text, id int NOT NULL) PARTITION BY RANGE (id);
		  CREATE UNIQUE INDEX ident_key ON ident (id);
		  ALTER TABLE ident REPLICA IDENTITY USING INDEX ident_key;
		  CREATE TABLE ident1 (id int NOT NULL, gone int, v text);
		  ALTER TABLE ident1 DROP COLUMN gone;
		  ALTER TABLE ident ATTACH PARTITION ident1 FOR VALUES FROM (0) TO (100);
		  CREATE TABLE ident2 (LIKE ident, PRIMARY KEY (v, id));
		  ALTER TABLE ident ATTACH PARTITION ident2 FOR VALUES FROM (100) TO (200)});
	both(
		q{CREATE TABLE byhand (id int NOT NULL, v text) PARTITION BY RANGE (id);
		  CREATE UNIQUE INDEX byhand_key ON byhand (id);
		  ALTER TABLE byhand REPLICA IDENTITY USING INDEX byhand_key;
		  CREATE TABLE byhand0 PARTITION OF byhand FOR VALUES FROM (0) TO (1000)
			  PARTITION BY RANGE (id);
		  CREATE TABLE byhand1 PARTITION OF byhand0 FOR VALUES FROM (0) TO (100)});
	$alpha->create_pair('ident', 'beta');
	here(trigger('a_rows', 'INSERT OR UPDATE OR DELETE', 'ROW', 'byhand'));
	foreach my $table ('ident', 'byhand')
	{
		here("INSERT INTO $table (id, v) SELECT g, 'x' FROM generate_series(1, 9) g");
		here("INSERT INTO ident VALUES ('x', 101), ('x', 102)") if $table eq 'ident';
		synced();
		here("UPDATE $table SET v = 'y' WHERE id % 2 = 0; UPDATE $table SET id = 20 WHERE id = 3;
			DELETE FROM $table WHERE id = 5");
		synced();
		$alpha->same_rows($beta, $table);
	}
	is(there('SELECT sum(conflicts) FROM mmrepl.progress'), '0', 'without a conflict');
	here('ALTER TABLE byhand1 OWNER TO CURRENT_USER; INSERT INTO byhand VALUES (50)');
	refused('ALTER TABLE ident REPLICA IDENTITY FULL', qr/MM\d+: cannot replicate "ident"/,
		'what counts is the key of the table above');

	# A partition that comes with a unique constraint instead.
	both(
		q{CREATE TABLE pu (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
		  CREATE TABLE pu1 (id int NOT NULL UNIQUE, v text)});
	$alpha->create_pair('pu', 'beta');
	both('ALTER TABLE pu ATTACH PARTITION pu1 FOR VALUES FROM (0) TO (100)');
	here(q{INSERT INTO pu VALUES (1, 'a'), (2, 'a'); UPDATE pu SET v = 'b' WHERE id = 2;
		DELETE FROM pu WHERE id = 1});
	synced();
	$alpha->same_rows($beta, 'pu');
};

# Only ALTER TABLE, and DROP of the index, were refused when they took the key or a column
# of a pair; after others every write failed.
section 'what a pair needs is dropped by CASCADE' => sub {
	here(
		q{CREATE SCHEMA types; CREATE ROLE dropper;
		  CREATE DOMAIN types.key AS int;
		  CREATE TYPE row_type AS (id int, v text, n int); CREATE TYPE addr AS (city text, zip text);
		  CREATE FUNCTION twice(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1 * 2';
		  CREATE FUNCTION wanted(int) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT $1 > 0';
		  ALTER FUNCTION wanted(int) OWNER TO dropper;
		  CREATE DOMAIN owned AS int; ALTER DOMAIN owned OWNER TO dropper;
		  CREATE TABLE of_domain (id types.key PRIMARY KEY, v text);
		  CREATE TABLE of_type OF row_type (PRIMARY KEY (id));
		  CREATE TABLE computed (id int PRIMARY KEY, a int,
			  b int GENERATED ALWAYS AS (twice(a)) STORED);
		  CREATE TABLE filtered (id int PRIMARY KEY, v text);
		  CREATE TABLE inside (id int PRIMARY KEY, a addr);
		  CREATE TABLE of_owned (id owned PRIMARY KEY, v text);
		  CREATE OPERATOR CLASS own_ops FOR TYPE int USING btree AS OPERATOR 1 <, OPERATOR 2 <=,
			  OPERATOR 3 =, OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 btint4cmp(int, int);
		  CREATE TABLE of_class (id int NOT NULL); CREATE UNIQUE INDEX by_class ON of_class (id own_ops);
		  ALTER TABLE of_class REPLICA IDENTITY USING INDEX by_class;
		  CREATE TABLE untouched (id int PRIMARY KEY, v types.key)});
	there(
		q{CREATE SCHEMA types; CREATE DOMAIN types.key AS int; CREATE DOMAIN owned AS int;
		  CREATE TYPE addr AS (city text, zip text); CREATE TABLE inside (id int PRIMARY KEY, a addr);
		  CREATE TABLE of_domain (id types.key PRIMARY KEY, v text);
		  CREATE TABLE of_type (id int PRIMARY KEY, v text, n int);
		  CREATE TABLE computed (id int PRIMARY KEY, a int, b int);
		  CREATE TABLE filtered (id int PRIMARY KEY, v text);
		  CREATE TABLE of_owned (id owned PRIMARY KEY, v text);
		  CREATE TABLE of_class (id int PRIMARY KEY);
		  CREATE TABLE untouched (id int PRIMARY KEY, v types.key)});
	$alpha->create_pair($_, 'beta') foreach ('of_domain', 'of_owned', 'of_class', 'untouched');
	$alpha->create_pair('of_type', 'beta', q{row_filter => 'n IS NULL OR n <> 0'});
	$alpha->create_pair('inside', 'beta', q{row_filter => $$(a).city <> ''$$});
	$alpha->create_pair('computed', 'beta', q{columns => '{id,a,b}'});
	$alpha->create_pair('filtered', 'beta', q{row_filter => 'wanted(id)'});
	my $no_key = qr/MM\d+: cannot replicate "of_/;

	foreach my $case (
		[ 'DROP DOMAIN types.key CASCADE', $no_key ],
		[ 'DROP SCHEMA types CASCADE', $no_key ],
		[ 'ALTER TYPE row_type DROP ATTRIBUTE id CASCADE', $no_key ],
		[ 'ALTER TYPE row_type ALTER ATTRIBUTE n TYPE text CASCADE',
			qr/operator does not exist: text <> integer/ ],
		[ 'ALTER TYPE addr DROP ATTRIBUTE city', qr/column "city" not found in data type public.addr/ ],
		# How the filter is stored does not depend on this, but what it was searched for did.
		[ 'SET LOCAL quote_all_identifiers = on; ALTER TYPE addr DROP ATTRIBUTE city',
			qr/column "city" not found in data type public.addr/ ],
		[ 'SET LOCAL quote_all_identifiers = on; ALTER TYPE addr RENAME ATTRIBUTE city TO town',
			qr/column "city" not found in data type public.addr/ ],
		[ 'DROP OPERATOR CLASS own_ops USING btree CASCADE', $no_key ],
		[ 'DROP TYPE owned CASCADE', $no_key ],
		[ 'DROP FUNCTION twice CASCADE', qr/42703: column "b" of table "computed" does not exist/ ],
		[ 'ALTER FUNCTION wanted(int) OWNER TO CURRENT_USER; DROP OWNED BY dropper CASCADE', $no_key ],
		[ 'DROP DOMAIN owned CASCADE', $no_key ],
		[ 'ALTER DOMAIN owned OWNER TO CURRENT_USER; DROP OWNED BY dropper',
			qr/function public.wanted\(integer\) does not exist/ ],
	  )
	{
		my ($sql, $error) = @$case;

		$sql = "BEGIN; $sql; COMMIT" if $sql =~ /;/;
		refused($sql, $error, $sql);
	}

	# What does not matter may go, and nobody waits for the locks of replicated tables.
	here(q{CREATE DOMAIN other AS int; CREATE TABLE bystander (id int, v other)});
	my $holder = $alpha->session;

	$holder->ok('BEGIN; LOCK TABLE of_domain');
	here(q{SET lock_timeout = '5s'; DROP TABLE bystander CASCADE; CREATE TABLE bystander (id int);
		DROP TABLE bystander CASCADE});
	$holder->ok('ROLLBACK');
	$holder->quit;
	here('DROP DOMAIN other CASCADE; ALTER TYPE row_type DROP ATTRIBUTE v CASCADE;
		ALTER TYPE addr DROP ATTRIBUTE zip');
	here(q{INSERT INTO of_domain VALUES (1); INSERT INTO of_type VALUES (1);
		INSERT INTO computed (id, a) VALUES (1, 1); INSERT INTO filtered VALUES (1), (-1);
		INSERT INTO of_owned VALUES (1)});
	synced();
	$alpha->same_rows($beta, $_) foreach ('of_domain', 'computed', 'of_owned');
	is(there('SELECT id FROM filtered'), '1', 'the filter works on');
	here(q{SELECT mmrepl.drop_pair('of_owned', 'beta'); DROP DOMAIN owned CASCADE});
};

# A column of a typed table is renamed by way of its type: the map did not follow.
section 'a typed table is renamed a column of' => sub {
	both(
		q{CREATE TYPE renamed AS (id int, v text);
		  CREATE TABLE of_renamed OF renamed (PRIMARY KEY (id));
		  CREATE TABLE parts OF renamed (PRIMARY KEY (id)) PARTITION BY RANGE (id);
		  CREATE TABLE parts1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
		  CREATE TABLE parts2 PARTITION OF parts FOR VALUES FROM (100) TO (200)});
	$alpha->create_pair('of_renamed', 'beta', q{row_filter => $$v <> 'no'$$});
	$alpha->create_pair($_, 'beta') foreach ('parts1', 'parts2');
	my $said = said('ALTER TYPE renamed RENAME ATTRIBUTE v TO w CASCADE');

	is(scalar(() = $said =~ /NOTICE:  pair \d+ still replicates column "w" to column "v"/g),
		3, 'the pairs follow, and say so');
	here(q{INSERT INTO of_renamed VALUES (1, 'yes'), (2, 'no'); INSERT INTO parts VALUES (1, 'x'), (100, 'y')});
	synced();
	is(there('SELECT id, v FROM of_renamed'), '1|yes', 'the rows arrive');
	is(there('SELECT count(v) FROM parts'), '2', 'those of partitions, too');
	here('ALTER TYPE renamed RENAME ATTRIBUTE w TO v CASCADE');

	# Children of a foreign table follow as well.
	here(q{CREATE FOREIGN TABLE above (id int, v text) SERVER beta;
		CREATE TABLE child (PRIMARY KEY (id)) INHERITS (above)});
	there('CREATE TABLE child (id int PRIMARY KEY, v text)');
	$alpha->create_pair('child', 'beta', q{row_filter => 'id > 0'});
	like(said('ALTER FOREIGN TABLE above RENAME COLUMN v TO w'),
		qr/still replicates column "w" to column "v"/, 'a child of a foreign table');
	refused('ALTER FOREIGN TABLE above ALTER COLUMN id TYPE text',
		qr/operator does not exist: text > integer/, 'its filter is looked at');

	# What a filter names inside of a column does not follow.
	both('CREATE TABLE spot (x int); CREATE TABLE nested (id int PRIMARY KEY, s spot)');
	$alpha->create_pair('nested', 'beta', q{row_filter => '(s).x > 0'});
	my $inside = qr/column "x" not found in data type public.spot/;

	refused('ALTER TABLE spot RENAME x TO y', $inside, 'a column of the table that is its type');
	refused('ALTER TABLE spot DROP COLUMN x', $inside, 'the same, dropped');
	refused('ALTER TYPE addr RENAME ATTRIBUTE city TO town',
		qr/column "city" not found in data type public.addr/, 'an attribute of its type');
	is(here(q{SELECT count(*) FROM mmrepl.pairs WHERE column_map IS NOT NULL
		AND local_table::text ~ 'renamed|parts'}), '0', 'and back');
};

# DETACH PARTITION drops the clones of the partitioned table's triggers: what was written to
# a partition with a pair of its own was not captured any more.
section 'a partition with a pair of its own is detached' => sub {
	both(
		q{CREATE TABLE de (id int PRIMARY KEY) PARTITION BY RANGE (id);
		  CREATE TABLE de1 PARTITION OF de FOR VALUES FROM (0) TO (100);
		  CREATE TABLE de2 PARTITION OF de FOR VALUES FROM (100) TO (200) PARTITION BY RANGE (id);
		  CREATE TABLE de21 PARTITION OF de2 FOR VALUES FROM (100) TO (200);
		  CREATE TABLE own1 (id int PRIMARY KEY); CREATE TABLE own21 (id int PRIMARY KEY)});
	$alpha->create_pair('de', 'beta');
	$alpha->create_pair("de$_", 'second', "remote_table => 'own$_'") foreach ('1', '21');
	here('ALTER TABLE de DETACH PARTITION de1 CONCURRENTLY');
	here('ALTER TABLE de DETACH PARTITION de2');
	here('INSERT INTO de1 VALUES (1); INSERT INTO de2 VALUES (100)');
	synced();
	$alpha->wait_caught_up('second');
	is(there('SELECT (SELECT id FROM own1), (SELECT id FROM own21)'), '1|100', 'its pair goes on');
	is(there('SELECT count(*) FROM de'), '0', 'that of the table above has lost it');
	refused("DROP TRIGGER $_ ON de21", qr/cannot drop the trigger: pair \d+ of table "de21"/,
		"$_ is there")
	  foreach ('"!mmrepl_capture"', '"!mmrepl_truncate"');
};

# The error was one of PostgreSQL about a trigger that nobody had made.
section 'a table with a pair becomes a partition' => sub {
	both(
		q{CREATE TABLE at (id int PRIMARY KEY) PARTITION BY RANGE (id);
		  CREATE TABLE at1 (id int PRIMARY KEY);
		  CREATE TABLE at2 (id int PRIMARY KEY) PARTITION BY RANGE (id);
		  CREATE TABLE at21 PARTITION OF at2 FOR VALUES FROM (100) TO (200);
		  CREATE TABLE copy21 (id int PRIMARY KEY);
		  CREATE TABLE plain (id int PRIMARY KEY) PARTITION BY RANGE (id);
		  CREATE TABLE plain1 (id int PRIMARY KEY)});
	$alpha->create_pair($_, 'beta') foreach ('at', 'at1', 'at21', 'plain1');
	my $again = q{SELECT mmrepl.create_pair('at21', 'second', remote_table => 'copy21')};

	foreach my $case ([ 'at1', 'at1', '0) TO (100', '' ], [ 'at2', 'at21', '100) TO (200', $again ])
	{
		my ($table, $with_pair, $bounds, $then) = @$case;
		my $attach = "ALTER TABLE at ATTACH PARTITION $table FOR VALUES FROM ($bounds)";

		refused($attach, qr/cannot attach "$table".*"$with_pair" has a pair of its own.*HINT:.*drop_pair/s,
			"$table is refused");
		here("BEGIN; SELECT mmrepl.drop_pair('$with_pair', 'beta'); $attach; $then; COMMIT");
		there($attach);
	}
	here('INSERT INTO at VALUES (1), (100)');
	here('ALTER TABLE plain ATTACH PARTITION plain1 FOR VALUES FROM (0) TO (100)');
	both('TRUNCATE plain');
	here('INSERT INTO plain VALUES (1)');
	synced();
	$alpha->same_rows($beta, 'at');
	$alpha->wait_caught_up('second');
	is(there('SELECT id FROM copy21'), '100', 'a pair of the partition is captured by the clone');
	is(there('SELECT count(*) FROM plain1'), '1', 'nothing above it: the pair goes on');
	refused("SELECT mmrepl.create_pair('plain1', 'second', remote_table => '$_')",
		qr/42602: invalid remote_table: "\Q$_\E".*HINT:  Write remote_table => 'schema.table'/s,
		"remote_table => '$_'")
	  foreach ('', 'a.', 'a b');
};

# Row triggers fire in the order of their names, and one that changes the row again has its
# version captured before the first one, when it comes first.
section 'a trigger that sorts before ours' => sub {
	both('CREATE TABLE sorts (id int PRIMARY KEY, v text)');
	here(q{CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
		CREATE TRIGGER "!first" AFTER UPDATE ON sorts FOR EACH ROW EXECUTE FUNCTION nothing()});
	my $warning = qr/WARNING:  trigger "([^"]+)" of table "sorts" fires before changes are captured.*HINT/s;

	like(said(q{SELECT mmrepl.create_pair('sorts', 'beta')}), $warning, 'create_pair() warns');
	like(
		said(q{CREATE TRIGGER " second" AFTER INSERT ON sorts FOR EACH ROW EXECUTE FUNCTION nothing()}),
		$warning, 'CREATE TRIGGER warns');
	is( said(q{CREATE TRIGGER later AFTER INSERT ON sorts FOR EACH ROW EXECUTE FUNCTION nothing();
			CREATE TRIGGER "!before" BEFORE INSERT ON sorts FOR EACH ROW EXECUTE FUNCTION nothing();
			CREATE TRIGGER "!statement" AFTER INSERT ON sorts EXECUTE FUNCTION nothing()}),
		'', 'nothing to warn of');
	here('DROP TRIGGER "!first" ON sorts; DROP TRIGGER " second" ON sorts');
	like(said('ALTER TRIGGER later ON sorts RENAME TO "!again"'), $warning, 'ALTER TRIGGER warns');
	is(said('ALTER TRIGGER "!again" ON sorts RENAME TO later'), '', 'not when it is back');
	like(
		said('ALTER TRIGGER "!mmrepl_capture" ON sorts RENAME TO middle'),
		qr/trigger "later".*HINT:  ALTER TRIGGER middle ON public.sorts RENAME TO "!mmrepl_capture";/s,
		'so does a new name for ours');
};

done_testing();
