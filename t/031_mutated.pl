# Whatever bytes come to apply(): batches of every kind of change and column, with
# bytes changed, cut off and repeated.  Each is applied or refused with an error that
# says why; none ends the server, and none is an internal error.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use Digest::SHA 'sha256';
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $seed = seed(7);
my $rounds = $ENV{MMREPL_ROUNDS} || 1500;
my $node = MmreplCluster->create('alpha');
my $public = 0x04;
my $same = 0x08;
my $checked = 0x10;

# LEB128
sub varint
{
	my ($value) = @_;
	my $bytes = '';

	for (; $value >= 0x80; $value >>= 7)
	{
		$bytes .= chr($value & 0x7f | 0x80);
	}
	return $bytes . chr($value);
}

sub sized { return defined $_[0] ? varint(1 + length $_[0]) . $_[0] : varint(0); }
sub old { return defined $_[0] ? varint(2 + length $_[0]) . $_[0] : varint(0); }
sub head { my ($code, $rel) = @_; return chr($code << 5 | $rel); }

# Columns are [name, type's oid, key, binary].
sub definition
{
	my ($number, $shape, $table, @columns) = @_;

	return head(0, $number) . chr($shape) . varint(length $table) . $table
	  . varint(1) . varint(scalar @columns)
	  . join('', map {
			chr(length($_->[0]) | ($_->[2] ? 0x40 : 0) | ($_->[3] ? 0x80 : 0))
			  . $_->[0] . varint($_->[1])
		} @columns);
}

sub transaction
{
	my ($ticket, $flags, @records) = @_;
	my $segment = "\x01" . join('', @records);

	return 'X' . pack('Q>Q>CNN', $ticket, $ticket, $flags, 1, length $segment) . $segment;
}

sub batch
{
	my ($flags, $last, @transactions) = @_;

	return pack('NCN', 0x4D4D5231, $flags, 6) . 'n' x 16
	  . pack('NQ>Q>Q>Q>N', 1, 0, 0, $last, 0, 0) . join('', @transactions);
}

$node->safe_psql(
	'postgres', q{
	CREATE TABLE wide (id int PRIMARY KEY, b bool, s smallint, l bigint, t text, v varchar(5),
		y bytea, n numeric, u uuid, ts timestamptz, d date, a int[], j jsonb, f float8, i interval,
		g int GENERATED ALWAYS AS (id + 1) STORED, extra text DEFAULT 'extra');
	CREATE TABLE gone (x int, id int PRIMARY KEY, v text);
	ALTER TABLE gone DROP COLUMN x;
	CREATE TABLE part (id int, r int, v text, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
	CREATE TABLE part_1 PARTITION OF part FOR VALUES IN (1);
	CREATE TABLE part_2 (v text, r int NOT NULL, id int NOT NULL);
	ALTER TABLE part ATTACH PARTITION part_2 FOR VALUES IN (2);
	INSERT INTO wide (id, t) SELECT g, 'here' FROM generate_series(1, 5) g;
	INSERT INTO gone SELECT g, 'here' FROM generate_series(1, 5) g;
	INSERT INTO gone VALUES (6, repeat('d', 200));
	INSERT INTO part SELECT g, g % 2 + 1, 'here' FROM generate_series(1, 5) g;

	-- Changes some bytes; what is refused is counted by its code.  Nothing stays.
	CREATE TABLE outcome (code text PRIMARY KEY, message text, batch bytea, n int);
	CREATE PROCEDURE mutate(batch bytea, rounds int) LANGUAGE plpgsql AS $$
	DECLARE
		bytes bytea;
		at int;
		what text;
		code text;
		values int[] := '{0, 1, 2, 127, 128, 255}';
	BEGIN
		FOR round IN 1 .. rounds LOOP
			bytes := batch;
			FOR i IN 1 .. (CASE WHEN round = 1 THEN 0 ELSE 1 + floor(random() * 3) END) LOOP
				EXIT WHEN length(bytes) = 0;
				at := floor(random() * length(bytes));
				CASE floor(random() * 8)
				WHEN 0 THEN bytes := substring(bytes FOR greatest(at, 1));
				WHEN 1 THEN bytes := substring(bytes FOR at) || substring(bytes FROM at + 2);
				WHEN 2 THEN bytes := substring(bytes FOR at) || substring(bytes FROM greatest(at - 8, 1));
				WHEN 3 THEN bytes := set_byte(bytes, at, values[1 + floor(random() * 6)]);
				WHEN 4 THEN bytes := set_byte(bytes, at, (get_byte(bytes, at) + 1) % 256);
				ELSE bytes := set_byte(bytes, at, floor(random() * 256)::int);
				END CASE;
			END LOOP;
			BEGIN
				PERFORM mmrepl.apply(bytes);
				RAISE EXCEPTION USING ERRCODE = 'RG000', MESSAGE = 'accepted';
			EXCEPTION WHEN OTHERS THEN
				code := SQLSTATE;
				what := SQLERRM;
			END;
			INSERT INTO outcome VALUES (code, what, bytes, 1)
			  ON CONFLICT ON CONSTRAINT outcome_pkey DO UPDATE SET n = outcome.n + 1;
			IF round % 100 = 0 THEN
				COMMIT;
			END IF;
		END LOOP;
	END $$;
});

my $wide = sub {
	my ($number, $shape) = @_;
	return definition(
		$number, $shape | $public | $same, 'wide',
		[ 'id', 23, 1, 1 ], [ 'b', 16, 0, 1 ], [ 's', 21, 0, 1 ], [ 'l', 20, 0, 1 ],
		[ 't', 25, 0, 1 ], [ 'v', 1043, 0, 1 ], [ 'y', 17, 0, 1 ], [ 'n', 1700, 0, 1 ],
		[ 'u', 2950, 0, 1 ], [ 'ts', 1184, 0, 1 ], [ 'd', 1082, 0, 1 ], [ 'a', 1007, 0, 0 ],
		[ 'j', 3802, 0, 0 ], [ 'f', 701, 0, 1 ], [ 'i', 1186, 0, 1 ]);
};
my $row = sub {
	my ($id) = @_;
	return join '', map { sized($_) } (
		chr($id), "\1", "\x01\x02", "\xff", 'text', 'abc', "\0\1", pack('n*', 1, 0, 0, 0, 7),
		'u' x 16, "\x00\x01\x02", "\x10", '{1,2}', '{"a": 1}', pack('Q>', 0), pack('Q>NN', 1, 2, 3));
};
my $gone = definition(1, $public | $same, 'gone', [ 'id', 23, 1, 1 ], [ 'v', 25, 0, 1 ]);
my $part = definition(2, $public | $same | 1, 'part',
	[ 'id', 23, 1, 1 ], [ 'r', 23, 1, 1 ], [ 'v', 25, 0, 0 ]);
my $ids = sub { join '', map { sized(chr $_) } @_; };
my %batches = (
	'one of each' => batch(
		0, 20,
		transaction(
			10, 0, $wide->(0, 0), head(1, 0) . $row->(9), head(2, 0) . $row->(2), $gone,
			head(1, 1) . $ids->(8) . sized('new'), head(2, 1) . $ids->(1) . sized('other'),
			head(4, 1) . $ids->(2), $part),
		transaction(
			20, 1, $part, head(1, 2) . $ids->(7, 1) . sized('p'),
			head(3, 2) . $ids->(3, 2, 3, 1) . sized('moved'), head(4, 2) . $ids->(1, 2))),
	'many inserts' => batch(
		0, 20,
		transaction(20, 0, $gone, map { head(1, 1) . $ids->($_ % 20) . sized("v$_") } 1 .. 30)),
	'with old rows' => batch(
		1, 0,
		transaction(
			30, 0,
			$wide->(0, $checked),
			head(2, 0) . $row->(1) . "\xfe\x7f" . "\0" x 3 . old('here') . "\0" x 10,
			definition(1, $public | $same | $checked, 'gone', [ 'id', 23, 1, 1 ], [ 'v', 25, 0, 1 ]),
			head(4, 1) . $ids->(2) . old('here'),
			head(4, 1) . $ids->(6) . varint(1) . varint(200) . substr(sha256('d' x 200), 0, 16))),
	'part of a large one' => batch(
		6, 0, transaction(40, 2, $gone, head(1, 1) . $ids->(8) . sized('new'))),
	'truncate' => batch(
		0, 50, transaction(50, 0, $gone, head(5, 1), $part, head(5, 2), head(1, 1) . $ids->(1) . sized('x'))),
);

foreach my $name (sort keys %batches)
{
	my $hex = unpack('H*', $batches{$name});

	$node->safe_psql(
		'postgres', qq{
		SET log_min_messages = panic;
		SET lock_timeout = '10s';
		TRUNCATE outcome;
		SELECT setseed(@{[ ($seed % 1000) / 1000 ]});
		CALL mutate('\\x$hex', $rounds)});
	my $outcomes = $node->safe_psql('postgres',
		'SELECT code, n, message FROM outcome ORDER BY n DESC');

	note("$name:\n$outcomes");
	is( $node->safe_psql(
			'postgres',
			q{SELECT code, message, batch FROM outcome WHERE code ~ '^(XX|55P03|57|58|53)'}),
		'', "$name: no internal error");
	cmp_ok(
		$node->safe_psql('postgres', q{SELECT sum(n) FROM outcome WHERE code = 'MM010'}),
		'>', $rounds / 10, 'what is malformed is called so');
	is( $node->safe_psql('postgres',
			q{SELECT code FROM outcome WHERE batch = '\x} . $hex . q{'}),
		'RG000', 'what is not changed is taken');
}

done_testing();
