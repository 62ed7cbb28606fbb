# Values in TOAST that an update leaves alone are neither read nor sent, and stay
# at the receiver as they are.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair;

# Some 20 kB that cannot be compressed.
my $long = q{(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 640))};
my $table = 'CREATE TABLE doc (id int PRIMARY KEY, status text, title text, body text, notes text,'
  . ' n int DEFAULT 7)';

# The bytes that are sent for what the statements do, in one transaction, when it has arrived.
sub bytes_sent
{
	my ($sql) = @_;
	my $before = $alpha->stat('beta', 'bytes_sent');

	$alpha->safe_psql('postgres', "BEGIN; $sql; COMMIT");
	$alpha->wait_caught_up('beta');
	return $alpha->stat('beta', 'bytes_sent') - $before;
}

sub conflicts
{
	return $beta->safe_psql('postgres',
		'SELECT coalesce(sum(conflicts), 0) FROM mmrepl.progress');
}

$alpha->create_table_on_both($beta, $table);
foreach my $node ($alpha, $beta)
{
	$node->safe_psql('postgres', "ALTER TABLE doc ALTER $_ SET STORAGE EXTERNAL") foreach qw(body notes);
}
$alpha->create_pair('doc', 'beta');
cmp_ok(
	bytes_sent(
		"INSERT INTO doc SELECT i, 'new', 't', $long || i, $long || i FROM generate_series(1, 10) i"),
	'>', 400_000, 'an INSERT brings everything');
$alpha->same_rows($beta, 'doc');

###############################################################################

section 'what is left alone does not travel' => sub {
	cmp_ok(bytes_sent(q{UPDATE doc SET status = 'seen' WHERE id = 1}),
		'<', 1000, 'neither of two values');
	cmp_ok(bytes_sent(q{UPDATE doc SET status = status || '.'}), '<', 2000, 'of many rows');

	my $one = bytes_sent(qq{UPDATE doc SET body = $long WHERE id = 2});

	ok($one > 20_000 && $one < 30_000, "one of two, where the other one changed: $one bytes");
	$one = bytes_sent(qq{UPDATE doc SET notes = $long WHERE id = 3});
	ok($one > 20_000 && $one < 30_000, "... and the other way round: $one bytes");
	cmp_ok(bytes_sent(qq{UPDATE doc SET notes = $long, body = $long WHERE id = 4}),
		'>', 40_000, 'both, where both changed');
	cmp_ok(bytes_sent(q{UPDATE doc SET id = 105 WHERE id = 5}),
		'<', 1000, 'none, where the key changed');
	cmp_ok(bytes_sent(q{UPDATE doc SET body = NULL WHERE id = 6}),
		'<', 1000, 'a value that went, and one that stayed');
	cmp_ok(bytes_sent(q{UPDATE doc SET body = notes WHERE id = 6}),
		'>', 20_000, "another column's value is a new one");
	$alpha->same_rows($beta, 'doc');
	is(conflicts(), 0, 'without a conflict');
};

section 'in one batch with what made the row, and with other columns each time' => sub {
	$alpha->safe_psql('postgres', q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	$alpha->safe_psql('postgres', qq{
		BEGIN;
		INSERT INTO doc SELECT i, 'new', 't', $long || i, $long || i FROM generate_series(11, 14) i;
		UPDATE doc SET status = 'a' WHERE id > 10;
		UPDATE doc SET body = $long WHERE id = 12;
		UPDATE doc SET notes = $long WHERE id = 12;
		UPDATE doc SET status = 'b', n = n + 1 WHERE id > 10;
		SAVEPOINT s; UPDATE doc SET body = 'gone'; ROLLBACK TO s;
		DELETE FROM doc WHERE id = 13;
		COMMIT;
		UPDATE doc SET title = 'u'});
	is( $alpha->safe_psql('postgres', q{
			SELECT count(*) FROM mmrepl.sync_err_rec
			WHERE dst_query LIKE 'UPDATE%' AND dst_query LIKE '%title%' AND dst_query NOT LIKE '%body%'}),
		5 + 1 + 5 + 13, 'what waits names the columns that come');
	$alpha->safe_psql('postgres', q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'doc');
	is(conflicts(), 0, 'without a conflict');
};

# Nobody knows the row then.
section 'a row that is not there' => sub {
	$beta->safe_psql('postgres', 'DELETE FROM doc WHERE id IN (7, 8, 9)');
	$alpha->safe_psql('postgres', q{UPDATE doc SET status = 'late' WHERE id = 7});
	$alpha->safe_psql('postgres', qq{UPDATE doc SET status = 'late', body = $long, notes = $long WHERE id = 8});
	$alpha->wait_caught_up('beta');
	is($beta->safe_psql('postgres', 'SELECT id, status FROM doc WHERE id BETWEEN 7 AND 9'),
		'8|late', 'is made only where all of it came');
	is(conflicts(), 2, 'both are conflicts');
	$alpha->safe_psql('postgres', q{SELECT mmrepl.alter_pair('doc', 'beta', conflict_resolution => 'error')});
	$alpha->safe_psql('postgres', q{UPDATE doc SET status = 'later' WHERE id = 9});
	$alpha->poll_state('beta', 'blocked');
	is($alpha->stat('beta', 'last_error_sqlstate'), 'MM012', "... or an error, where that is the pair's rule");
	my $row = $alpha->safe_psql('postgres', 'SELECT quote_literal(body) FROM doc WHERE id = 9');
	$beta->safe_psql('postgres', "SET mmrepl.capture = off; INSERT INTO doc (id, body) VALUES (9, $row)");
	$alpha->safe_psql('postgres', q{SELECT mmrepl.retry_now('beta')});
	$alpha->wait_caught_up('beta');
	is( $beta->safe_psql('postgres', "SELECT status, body = $row FROM doc WHERE id = 9"),
		'later|t', 'the row that was repaired keeps what did not come');
};

section 'filters, lists of columns, and synchronous changes' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE part (LIKE doc INCLUDING ALL)');
	$alpha->create_pair('part', 'beta', q{columns => '{id, status, body}', row_filter => $$status <> 'draft'$$});
	$alpha->safe_psql('postgres',
		"INSERT INTO part SELECT i, 'draft', 't', $long, $long FROM generate_series(1, 3) i");
	cmp_ok(bytes_sent(q{UPDATE part SET status = 'out' WHERE id < 3}),
		'>', 40_000, 'a row that enters the filter comes whole');
	cmp_ok(bytes_sent(q{UPDATE part SET status = 'in' WHERE id = 1}), '<', 1000, '... and then does not');
	is(bytes_sent(qq{UPDATE part SET notes = $long WHERE id = 1}), 0, 'a column outside of the list is none');
	$alpha->safe_psql('postgres', q{BEGIN; SET LOCAL mmrepl.mode = 'sync'; UPDATE part SET status = 'now' WHERE id = 2; COMMIT});
	is( $beta->safe_psql('postgres', 'SELECT id, status, length(body) > 20000, notes FROM part ORDER BY id'),
		"1|in|t|\n2|now|t|", 'the receiver has what it should');
};

# What their updates leave alone need not have been captured.
section 'triggers made by hand bring everything' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE hand (id int PRIMARY KEY, status text, body text)');
	$alpha->safe_psql('postgres', q{CREATE TRIGGER "!hand" AFTER UPDATE ON hand FOR EACH ROW
		EXECUTE FUNCTION mmrepl.replicate('beta', 'public', 'hand', 'loader', 'async')});
	$alpha->safe_psql('postgres', "INSERT INTO hand SELECT 1, 'new', $long");
	$alpha->safe_psql('postgres', q{UPDATE hand SET status = 'seen'});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'hand', name => 'a row whose INSERT was no event');
	$alpha->safe_psql('postgres', "SET application_name = 'loader'; UPDATE hand SET body = $long");
	$alpha->safe_psql('postgres', q{UPDATE hand SET status = 'loaded'});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'hand', name => 'a value that came from an application that is left out');
};

# They could keep the table from being kept open, or fail.
section 'the receiver does without defaults of what does not come' => sub {
	$beta->safe_psql('postgres', q{
		CREATE FUNCTION no_default() RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RAISE 'no default'; END $$;
		ALTER TABLE doc ALTER body SET DEFAULT no_default()});
	cmp_ok(bytes_sent(q{UPDATE doc SET status = 'any' WHERE id = 1}), '<', 1000, 'little is sent');
	is($beta->safe_psql('postgres', 'SELECT status FROM doc WHERE id = 1'), 'any', '... and arrives');
	$beta->safe_psql('postgres', 'ALTER TABLE doc ALTER body DROP DEFAULT');
};

section 'a partitioned receiver' => sub {
	$alpha->safe_psql('postgres', 'CREATE TABLE moved (id int, region text, body text, PRIMARY KEY (id, region))');
	$beta->safe_psql('postgres', q{
		CREATE TABLE moved (id int, region text, body text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
		CREATE TABLE moved_n PARTITION OF moved FOR VALUES IN ('north');
		CREATE TABLE moved_s (body text, region text NOT NULL, id int NOT NULL);
		ALTER TABLE moved ATTACH PARTITION moved_s FOR VALUES IN ('south')});
	$alpha->create_pair('moved', 'beta');
	$alpha->safe_psql('postgres', "INSERT INTO moved SELECT 1, 'north', $long");
	cmp_ok(bytes_sent(q{UPDATE moved SET region = 'south'}), '<', 1000, 'little is sent');
	$alpha->same_rows($beta, 'moved');
	is($beta->safe_psql('postgres', 'SELECT count(*) FROM moved_s WHERE length(body) > 20000'),
		1, 'the row takes its value along when it moves');
};

# More sets of columns than a session tells from each other: with another one all is sent.
section 'ten long values' => sub {
	my @columns = map { "c$_" } 1 .. 10;

	$alpha->create_table_on_both($beta,
		'CREATE TABLE wide (id int PRIMARY KEY, ' . join(', ', map { "$_ text" } @columns) . ')');
	$alpha->create_pair('wide', 'beta');
	$alpha->safe_psql('postgres', 'INSERT INTO wide SELECT 1, ' . join(', ', ($long) x 10));
	cmp_ok(bytes_sent(join('; ', map { "UPDATE wide SET $_ = 'short'" } @columns[0 .. 7])),
		'<', 5000, 'eight sets');
	$alpha->same_rows($beta, 'wide');
	$alpha->safe_psql('postgres', "UPDATE wide SET $_ = $long") foreach @columns;
	my $bytes = bytes_sent(join('; ', map { "UPDATE wide SET $_ = 'short'" } @columns));
	ok($bytes > 20_000 && $bytes < 30_000, "the ninth brings its one long value: $bytes bytes");
	$alpha->same_rows($beta, 'wide');
};

done_testing();
