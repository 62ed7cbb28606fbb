# What travels, what a row filter says and what the queue shows must not depend on
# the settings of the sessions at either end.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

# A locale whose money is not that of the C locale, for both servers; undef where none
# can be made.
sub german
{
	my $dir = PostgreSQL::Test::Utils::tempdir;

	return undef if system("localedef -i de_DE -f UTF-8 $dir/de_DE.UTF-8 >$dir/log 2>&1") != 0;
	$ENV{LOCPATH} = $dir;
	return 'de_DE.UTF-8';
}

my $german = german();
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

# Settings of every new session at beta, as of those in which changes are applied.
sub configure_beta
{
	my (%settings) = @_;

	there(join ';', map { "ALTER DATABASE postgres SET $_ = $settings{$_}" } keys %settings);
	$beta->terminate_peers;
	return;
}

sub reset_beta
{
	there('ALTER DATABASE postgres RESET ALL');
	$beta->terminate_peers;
	return;
}

# psql as somebody uses it whose settings are not the default ones.
my $strange = q{
	SET DateStyle = 'German';
	SET IntervalStyle = 'iso_8601';
	SET TimeZone = 'Asia/Kathmandu';
	SET extra_float_digits = -10;
	SET bytea_output = 'escape';
	SET array_nulls = off;
	SET xmloption = document;
	SET quote_all_identifiers = on;
	SET standard_conforming_strings = off;
	SET default_text_search_config = 'pg_catalog.english';
	SET search_path = pg_temp;
};
$strange .= "SET lc_monetary = '$german'; SET lc_numeric = '$german'; SET lc_time = '$german';" if $german;

###############################################################################

# Digests of long old values were made of texts that depended on TimeZone and
# quote_all_identifiers: rows that were the same were taken for others.
section 'digests of long values' => sub {
	$alpha->create_table_on_both(
		$beta, q{
		CREATE SCHEMA names;
		CREATE TABLE names.first_of_the_tables (id int);
		CREATE TABLE names.second_of_the_tables (id int);
		CREATE TYPE moment AS (at timestamptz, span interval, price money, raw bytea);
		CREATE TABLE digests (id int PRIMARY KEY, n int,
			at timestamptz[], during tstzrange[], whenever tstzmultirange, tables regclass[], types regtype[],
			whole moment[], prices money[], spans interval[], points point[])});
	$alpha->create_pair('digests', 'beta', q{mode => 'sync'});
	here(
		q{INSERT INTO digests SELECT g, 0,
			array_fill('2024-03-01 12:00:00.25+01'::timestamptz, ARRAY[20]),
			array_fill('[2024-03-01 12:00+01,2024-07-01 12:00+02)'::tstzrange, ARRAY[20]),
			(SELECT range_agg(tstzrange(t, t + '1 h')) FROM generate_series('2024-01-01'::timestamptz,
				'2024-12-01', '1 mon') t),
			array_fill('names.first_of_the_tables'::regclass, ARRAY[10]) || 'names.second_of_the_tables'::regclass,
			array_fill('timestamptz'::regtype, ARRAY[20]),
			array_fill(ROW('2024-03-01 12:00+01', '1 mon -2 days', 1234.5, '\x00ff')::moment, ARRAY[10]),
			array_fill(1234.56::money, ARRAY[40]),
			array_fill('1 mon -2 days 03:04'::interval, ARRAY[20]),
			array_fill(point(0.1, 1e300 / 3), ARRAY[20])
		  FROM generate_series(1, 4) g});
	configure_beta(TimeZone => q{'America/New_York'}, IntervalStyle => 'sql_standard');
	my $longer = join ', ', map { "$_ = $_ || $_\[1:1]" } qw(at during tables types whole prices spans points);

	foreach my $setting (split /;\s*/, $strange)
	{
		is($alpha->fails('postgres', "$setting; UPDATE public.digests SET $longer"), '', $setting =~ s/^\s+//r)
		  if $setting !~ /search_path/;
	}
	is($alpha->fails('postgres', "$strange UPDATE public.digests SET n = n + 1"),
		'', 'an UPDATE that leaves them alone');
	is($alpha->fails('postgres', "$strange UPDATE public.digests SET whenever = NULL, $longer WHERE id < 3"),
		'', 'an UPDATE that does not');
	is($alpha->fails('postgres', "$strange DELETE FROM public.digests WHERE id = 2"), '', 'a DELETE');
	here(q{SELECT mmrepl.alter_pair('digests', 'beta', conflict_resolution => 'keep_local')});
	here("$strange UPDATE public.digests SET n = 10, $longer");
	is(there('SELECT array_agg(DISTINCT n) FROM digests'), '{10}', 'keep_local skips nothing');
	reset_beta();
	$alpha->same_rows($beta, 'digests');

	# The two servers' texts are equal where the values are, and only there.
	there(q{SET session_replication_role = replica;
			UPDATE digests SET at[20] = at[20] + '1 us' WHERE id = 3;
			UPDATE digests SET prices[40] = prices[40] + '0.01'::money WHERE id = 4});
	here(q{SELECT mmrepl.alter_pair('digests', 'beta', conflict_resolution => 'apply_remote')});
	like($alpha->fails('postgres', "$strange DELETE FROM public.digests WHERE id = $_"),
		qr/ERROR:  40001: /, "row $_ is another one")
	  foreach (3, 4);
};

# What the text of a composite type depends on is known of its columns, which may be others later.
section 'a composite type with another column' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TYPE inner_part AS (a int); CREATE TYPE part_of AS (i inner_part[]);'
		  . 'CREATE TABLE composite (id int PRIMARY KEY, c part_of)');
	$alpha->create_pair('composite', 'beta', q{mode => 'sync'});
	my $writer = $alpha->session;

	$writer->ok(q{SET TimeZone = 'Asia/Kathmandu'});
	$writer->ok(q{INSERT INTO composite VALUES (1, ROW(ARRAY[ROW(1)::inner_part]))});
	$alpha->create_table_on_both($beta, 'ALTER TYPE inner_part ADD ATTRIBUTE at timestamptz[]');
	$writer->ok(
		qq{UPDATE composite SET c = ROW(ARRAY[ROW($_, array_fill('2024-03-01 12:00+00'::timestamptz,
			ARRAY[10]))::inner_part])}) foreach (1, 2);
	$alpha->same_rows($beta, 'composite');
	$writer->quit;
};

# What changed while a session looked at the table for the first time was missed by it.
section 'a composite type that gets a column meanwhile' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TYPE growing AS (a int); CREATE TABLE grown (id int PRIMARY KEY, c growing)');
	here(q{CREATE FUNCTION hold() RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
		BEGIN
			PERFORM pg_advisory_xact_lock_shared(104);
			PERFORM count(*) FROM public.grown; -- sees what was committed meanwhile
			RETURN 0;
		END $$});
	$alpha->create_pair('grown', 'beta', q{row_filter => 'id > hold()'});
	my ($holder, $writer) = ($alpha->session, $alpha->session);

	$holder->ok('SELECT pg_advisory_lock(104)');
	$writer->ok(q{SET DateStyle = 'SQL, DMY'});
	$writer->start('INSERT INTO grown VALUES (1, ROW(1))');
	$alpha->poll_ok(
		q{SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)},
		'the session is looking');
	$alpha->create_table_on_both($beta, 'ALTER TYPE growing ADD ATTRIBUTE d date');
	$holder->ok('SELECT pg_advisory_unlock(104)');
	$writer->finish;
	$writer->ok(q{INSERT INTO grown VALUES (2, ROW(2, '2024-01-02'))});
	synced();
	is($beta->safe_psql('postgres', 'SELECT (c).d FROM grown WHERE id = 2'), '2024-01-02', 'its date');
	$_->quit foreach ($holder, $writer);
};

# Money in arrays and in composite types is text, as which "1,234.50" is 1.23 to a German.
section 'money' => sub {
	plan(skip_all => 'no other locale can be made') if !$german;
	$alpha->create_table_on_both($beta,
		'CREATE TYPE price AS (amount money);'
		  . 'CREATE TABLE money (id int PRIMARY KEY, a money[], c price, m money)');
	foreach my $mode ('async', 'sync')
	{
		$mode eq 'async'
		  ? $alpha->create_pair('money', 'beta')
		  : here(q{SELECT mmrepl.alter_pair('money', 'beta', mode => 'sync')});
		foreach my $locales ([ $german, 'C' ], [ 'C', $german ])
		{
			my ($from, $to) = @$locales;

			configure_beta(lc_monetary => "'$to'");
			here(
				qq{SET lc_monetary = '$from';
				   INSERT INTO money SELECT count(*), ARRAY[1234.5, -0.07]::money[], ROW(1234567.89::money)::price, 1234.5 FROM money;
				   UPDATE money SET a = a || 3.25::money, m = m + 1.5::money});
			synced();
			is(there(q{SET lc_monetary = 'C'; SELECT array_agg(t::text ORDER BY id) FROM money t}),
				here(q{SET lc_monetary = 'C'; SELECT array_agg(t::text ORDER BY id) FROM money t}),
				"$mode: from $from to $to");
		}
	}
	reset_beta();
};

# Every setting at once, at either end, in both modes.
section 'values of all kinds' => sub {
	my %columns = (
		ts => [ 'timestamp', q{'2024-02-01 03:04:05.678901'} ],
		at => [ 'timestamptz', q{'2024-02-01 03:04:05.678901+01'} ],
		tz => [ 'timetz', q{'03:04:05.6+05:45'} ],
		d => [ 'date', q{'0099-02-01 BC'} ],
		span => [ 'interval', q{'-1 year -2 mons +3 days -04:05:06.789'} ],
		r => [ 'float4', '0.1' ],
		f => [ 'float8', '1e300::float8 / 3' ],
		n => [ 'numeric', q{'-1234567.8900'} ],
		m => [ 'money', '-1234567.89' ],
		b => [ 'bytea', q{'\x5c00ff27'} ],
		t => [ 'text', q{$q$\'NULL, {"a"} ä$q$} ],
		x => [ 'xml', q{'text<a/>'::xml} ],
		j => [ 'jsonb', q{'{"a": [1.50, null]}'} ],
		w => [ 'tsvector', q{'runs run'} ],
		p => [ 'point', 'point(1.0 / 3, -0.1)' ],
		c => [ 'circle', q{'<(0.1,0.2),0.3>'} ],
		path => [ 'path', q{'((0.1,0.2),(0.3,0.4))'} ],
		k => [ 'regclass', q{'names.first_of_the_tables'} ],
		ty => [ 'regtype', q{'moment'} ],
		pr => [ 'regprocedure', q{'pg_catalog.abs(int)'} ],
		rl => [ 'regrole', 'current_user::regrole' ],
		v => [ 'bit varying', q{B'1010'} ],
		o => [ 'moment', q{ROW('2024-03-01 12:00+01', '1 mon -2 days', 1234.5, '\x00ff')} ],
	);
	my @names = sort keys %columns;
	my @arrays = map { "${_}_a" } @names;
	my $columns = join ', ', @names, @arrays;
	my $type = sub { $columns{ $_[0] }[0] };
	my $values = join ', ', map({ "($columns{$_}[1])::" . $type->($_) } @names),
	  map { "ARRAY[($columns{$_}[1])::" . $type->($_) . ', NULL]::' . $type->($_) . '[]' } @names;
	my $seen = 'SELECT kinds::text FROM kinds ORDER BY id';

	$alpha->create_table_on_both($beta, 'CREATE TABLE kinds (id int PRIMARY KEY, '
		  . join(', ', map({ "$_ " . $type->($_) } @names), map { "${_}_a " . $type->($_) . '[]' } @names) . ')');
	$alpha->create_pair('kinds', 'beta');
	here("INSERT INTO kinds (id, $columns) SELECT g, $values FROM generate_series(1, 2) g");
	synced();
	foreach my $mode ('async', 'sync')
	{
		my $further = $mode eq 'async' ? 10 : 1000;
		my %other = $strange =~ /SET (\w+) = ([^;]*);/g;

		delete $other{search_path};
		configure_beta(%other) if $mode eq 'async';
		here("$strange SET mmrepl.mode = '$mode'; UPDATE public.kinds SET id = id + $further;"
			  . ' UPDATE public.kinds SET ' . join(', ', map { "$_ = $_ || $_" } @arrays) . ' WHERE id % 2 = 0;'
			  . ' UPDATE public.kinds SET (' . join(', ', @arrays) . ') = ROW('
			  . join(', ', map { "array_fill($_, ARRAY[20])" } @names) . ') WHERE id % 2 = 1;'
			  . " INSERT INTO public.kinds SELECT id - $further, $columns FROM public.kinds;"
			  . ' DELETE FROM public.kinds WHERE id < 2');
		synced();
	}
	reset_beta();
	is(there($seen), here($seen), 'all arrive as they were');
};

# A fragment is no document.
section 'xml' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE fragments (id int PRIMARY KEY, x xml, a xml[])');
	$alpha->create_pair('fragments', 'beta');
	configure_beta(xmloption => 'document');
	here(q{SET xmloption = content;
		   INSERT INTO fragments VALUES (1, 'one<two/>three', ARRAY['a<b/>'::xml]), (2, '<doc/>', '{<doc/>,NULL}')});
	synced();
	is(there(q{SET xmloption = content; SELECT x, a FROM fragments WHERE id = 1}),
		'one<two/>three|{a<b/>}', 'it arrives where a document is expected');
	reset_beta();
};

# Settings under which texts were read held for the rest of the batch: triggers, defaults
# and checks saw them, or those of the server, according to the columns of other tables.
section 'code of users has its own settings' => sub {
	my @settings = ('DateStyle', 'TimeZone', 'IntervalStyle', 'extra_float_digits', 'bytea_output');
	my $seen = join q{ || '/' || }, map { "current_setting('$_')" } @settings;

	configure_beta(DateStyle => q{'SQL, DMY'}, TimeZone => q{'America/New_York'},
		IntervalStyle => 'iso_8601', extra_float_digits => -3, bytea_output => 'escape');
	$alpha->create_table_on_both($beta, 'CREATE TABLE many_texts (id int PRIMARY KEY,'
		  . ' at timestamptz[], spans interval[], f float8[], raw bytea[], p money[])');
	here('ALTER TABLE many_texts ADD seen text; ALTER TABLE many_texts ADD by_default text');
	there(
		qq{ALTER TABLE many_texts ADD seen text;
		   ALTER TABLE many_texts ADD by_default text DEFAULT $seen;
		   CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS \$\$
		   BEGIN
			   NEW.seen := $seen;
			   RETURN NEW;
		   END\$\$;
		   CREATE TRIGGER see BEFORE INSERT OR UPDATE ON many_texts FOR EACH ROW EXECUTE FUNCTION see();
		   ALTER TABLE many_texts ENABLE ALWAYS TRIGGER see});
	$alpha->create_pair('many_texts', 'beta', q{columns => '{id,at,spans,f,raw,p}'});
	here(q{INSERT INTO many_texts (id, at, spans, f, raw, p)
		   VALUES (1, '{2024-03-01}', '{1 mon}', '{0.1}', '{"\\\\x00"}', '{1.5}')});
	synced();
	my $expected = there("SELECT $seen");

	is(there('SELECT seen FROM many_texts'), $expected, 'a trigger');
	is(there('SELECT by_default FROM many_texts'), $expected, 'a default');
	here(q{SET mmrepl.mode = 'sync'; UPDATE many_texts SET id = 2, at = at || at});
	is(there('SELECT seen FROM many_texts WHERE id = 2'), $expected, 'a trigger, in sync mode');
	reset_beta();
};

# dst_query had dates as the session reads them that looks at the view, which is not the
# one in which it is run.
section 'dst_query' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE shown (id int PRIMARY KEY, day date, at timestamptz,'
		  . ' plain timestamp, span interval, f float8, raw bytea, t text, p point)');
	$alpha->create_pair('shown', 'beta');
	here(q{SELECT mmrepl.pause('beta');
		   INSERT INTO shown VALUES (1, '2024-02-01', '2024-02-01 12:00+01', '2024-02-01 12:00', '1 mon -2 days 3:04',
			0.1::float8 + 0.2, '\x005c27ff', 'C:\''s "new"', point(1.0 / 3, 0.1));
		   UPDATE shown SET day = '2024-03-02', at = '2024-07-02 12:00+00' WHERE id = 1});
	my $queries = $alpha->safe_psql('postgres',
		"$strange SELECT pg_catalog.string_agg(dst_query, ';' ORDER BY id) FROM mmrepl.sync_err_rec");

	foreach my $settings ('', 'SET standard_conforming_strings = off;', q{SET DateStyle = 'SQL, DMY';})
	{
		is(there(qq{$settings SET TimeZone = 'America/New_York'; BEGIN; $queries;
					SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO'; SELECT shown::text FROM shown; ROLLBACK}),
			here(q{SET TimeZone = 'UTC'; SELECT shown::text FROM shown}), "it is the change, by hand: $settings");
	}
	my $ticket = here('SELECT DISTINCT ticket FROM mmrepl.sync_err_rec ORDER BY 1 LIMIT 1');

	$alpha->safe_psql('postgres', "$strange SELECT mmrepl.skip('beta', $ticket, 'to be kept')");
	is(here('SELECT queries[1] FROM mmrepl.skipped'), (split /;/, $queries)[0], 'mmrepl.skipped keeps the same');
	here(q{SELECT mmrepl.resume('beta')});
	synced();
};

# It was refused by tables with columns GENERATED ALWAYS AS IDENTITY, as was TRUNCATE by a
# partitioned one.
section 'dst_query of identity columns and partitions' => sub {
	my $identity = 'int GENERATED ALWAYS AS IDENTITY';

	$alpha->create_table_on_both(
		$beta, qq{
		CREATE TABLE numbered (id $identity PRIMARY KEY, v text);
		CREATE TABLE beside (id uuid PRIMARY KEY, seq $identity, v text);
		CREATE TABLE tenants (tenant text, id $identity, v text, PRIMARY KEY (tenant, id));
		CREATE TABLE by_default (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v text);
		CREATE TABLE renamed (id int PRIMARY KEY, seq $identity);
		CREATE TABLE byhand (id $identity PRIMARY KEY, v text);
		CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id);
		CREATE TABLE part PARTITION OF parts DEFAULT});
	$beta->safe_psql('postgres', 'ALTER TABLE renamed RENAME seq TO number');
	my @tables = qw(numbered beside tenants by_default renamed parts);
	$alpha->create_pair($_, 'beta', $_ eq 'renamed' ? q{column_map => '{"seq": "number"}'} : undef)
	  foreach @tables;
	here(
		q{CREATE TRIGGER tg AFTER INSERT OR UPDATE OR DELETE ON byhand FOR EACH ROW
			EXECUTE FUNCTION mmrepl.replicate('beta', 'public', 'byhand', 'nobody', 'async');
		  INSERT INTO parts VALUES (7)});
	synced();
	here(
		q{SELECT mmrepl.pause('beta');
		  INSERT INTO numbered (v) VALUES ('a'), ('b'), ('c');
		  UPDATE numbered SET v = 'd' WHERE id = 1;
		  UPDATE numbered SET id = DEFAULT WHERE id = 2;
		  DELETE FROM numbered WHERE id = 3;
		  INSERT INTO beside (id, v) VALUES ('00000000-0000-0000-0000-000000000001', 'a');
		  UPDATE beside SET v = 'b';
		  INSERT INTO tenants (tenant, v) VALUES ('x', 'a');
		  UPDATE tenants SET tenant = 'y', v = 'b';
		  INSERT INTO by_default (v) VALUES ('a');
		  UPDATE by_default SET id = 10, v = 'b';
		  INSERT INTO renamed (id) VALUES (1);
		  UPDATE renamed SET id = 2;
		  INSERT INTO byhand (v) VALUES ('a');
		  TRUNCATE parts;
		  INSERT INTO parts VALUES (1)});
	my $queries = here(
		q{SELECT string_agg(dst_query, ';' ORDER BY id) FROM mmrepl.sync_err_rec
		  WHERE NOT (op = 'UPDATE' AND dst_query LIKE '%id = ''4''%')});
	my @shown = split /
/, there(
		"BEGIN; $queries;"
		  . join('', map { "SELECT '$_', array_agg(${_}::text ORDER BY id) FROM $_;" } @tables, 'byhand')
		  . 'ROLLBACK');

	is(shift @shown, 'numbered|{"(1,d)","(2,b)"}', 'numbered');
	foreach my $table (@tables[ 1 .. $#tables ], 'byhand')
	{
		is(shift @shown, here("SELECT '$table', array_agg(${table}::text ORDER BY id) FROM $table"), $table);
	}
	like(here(q{SELECT dst_query FROM mmrepl.sync_err_rec WHERE op = 'UPDATE' AND dst_query LIKE '%id = ''4''%'}),
		qr/UPDATE public.numbered SET id = '4', v = 'b' WHERE id = '2'/, 'what no statement can do is not hidden');
	unlike($queries, qr/by_default[^;]*OVERRIDING/, 'where it is not needed it is not there');
	here('ALTER TABLE numbered RENAME TO counted');
	is(there("BEGIN;" . here(q{SELECT string_agg(dst_query, ';' ORDER BY id) FROM mmrepl.sync_err_rec
				WHERE op = 'INSERT' AND dst_query ~ 'numbered'}) . '; SELECT count(*) FROM numbered; ROLLBACK'),
		'3', 'a table that has another name meanwhile');
	here('DROP TABLE counted');
	like(here(q{SELECT dst_query FROM mmrepl.sync_err_rec ORDER BY id LIMIT 1}),
		qr/^INSERT INTO public.numbered\(id,v\) VALUES/, 'a table that is gone');
	here(q{SELECT mmrepl.resume('beta')});
	synced();
	is(there('SELECT array_agg(n::text ORDER BY id) FROM numbered n'), '{"(1,d)","(4,b)"}', 'and it is applied');
	$alpha->same_rows($beta, $_) foreach ('beside', 'tenants', 'by_default', 'renamed', 'parts', 'byhand');
};

# A filter was read and evaluated under the settings of whoever wrote: the same row
# passed or not.
section 'a filter means one thing' => sub {
	my $row = q{'2024-03-01 23:30+00', '2024-02-01', 'C:\new', 1234.5, '1 mon', 'running', '02/01/2024'};
	my %filters = (
		'the day of an instant' => q{(at AT TIME ZONE 'UTC')::date = at::date AND at::date = '2024-03-01'},
		'the hour' => q{extract(hour FROM at) = 23},
		'a date' => q{day = '01.02.2024'},
		'a date, in text' => q{written::date = '01.02.2024'},
		'a date, as text' => q{day::text = '2024-02-01'},
		'an instant' => q{at > '01.03.2024 22:00' AND at < '02.03.2024'},
		'a backslash' => q{path = 'C:\new'},
		'a span' => q{span::text = '1 mon'},
		'money' => q{price = '1234.50'},
		'money, as text' => q{price::text = '$1,234.50'},
		'a number, with a group separator' => q{to_char(1234.5, '9G999D9') = ' 1,234.5'},
		'a month' => q{to_char(day, 'TMMonth') = 'February'},
		'words' => q{to_tsvector(word) @@ 'running'::tsquery},
		'a name' => q{'names.first_of_the_tables'::regclass::text = 'names.' || 'first_of_the_tables'},
	);

	there('CREATE TABLE wanted (id int PRIMARY KEY)');
	here('CREATE TABLE wanted (id int PRIMARY KEY, at timestamptz, day date, path text, price money,'
		  . ' span interval, word text, written text)');
	foreach my $name (sort keys %filters)
	{
		my $id = here('SELECT count(*) FROM wanted');
		my ($plain, $other) = ($id + 1, $id + 2);

		# Its author reads dates as they are read where he lives.
		here(qq{SET DateStyle = 'German'; SET TimeZone = 'UTC';
				SELECT mmrepl.create_pair('wanted', 'beta', columns => '{id}', row_filter => \$\$$filters{$name}\$\$)});
		here("INSERT INTO wanted (id, at, day, path, price, span, word, written) VALUES ($plain, $row)");
		$alpha->safe_psql('postgres', "SET search_path = public; $strange"
			  . "INSERT INTO public.wanted (id, at, day, path, price, span, word, written)"
			  . " SELECT $other, at, day, path, price, span, word, written FROM public.wanted WHERE id = $plain");
		synced();
		is(there("SELECT array_agg(id ORDER BY id) FROM wanted WHERE id > $id"), "{$plain,$other}", $name);
		here(q{SELECT mmrepl.drop_pair('wanted', 'beta')});
	}
};

# What a function said was kept by the sessions that had written before it was replaced.
section 'a filter whose function is replaced' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE judged (id int PRIMARY KEY)');
	here(q{CREATE FUNCTION judge(int) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT $1 > 0'});
	$alpha->create_pair('judged', 'beta', q{row_filter => 'judge(id)'});
	my $writer = $alpha->session;

	$writer->ok('INSERT INTO judged VALUES (1), (-1)');
	here(q{CREATE OR REPLACE FUNCTION judge(int) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT $1 < 0'});
	$writer->ok('INSERT INTO judged VALUES (2), (-2)');
	$writer->quit;
	synced();
	is(there('SELECT array_agg(id ORDER BY id) FROM judged'), '{-2,1}', 'the new one is asked from then on');
};

done_testing();
