# Random transactions full of savepoints, rollbacks to them, errors, caught
# errors, spilled changes and changes of the mode, on sync and async pairs: what
# is at the peer is what was committed here, version by version.
#
# MMREPL_SEED is another seed; MMREPL_LONG makes it more than ten times as long.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use History;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $batches = $ENV{MMREPL_LONG} ? 80 : 6;
my @tables = qw(direct queued late);
my @stack;    # names of the savepoints that are there, unless something failed

seed(2013);

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => join("\n",
		q{mmrepl.buffer_memory = '64kB'},
		q{mmrepl.batch_size = '64kB'},
		q{mmrepl.ring_size = '128kB'}));

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE direct (id int PRIMARY KEY, token text, filler text);
	CREATE TABLE queued (id int PRIMARY KEY, token text, filler text);
	CREATE TABLE late (id int PRIMARY KEY, token text, filler text,
					   rank int UNIQUE DEFERRABLE INITIALLY DEFERRED);
});
$alpha->create_pair('direct', 'beta', q{mode => 'sync'});
$alpha->create_pair('queued', 'beta');
$alpha->create_pair('late', 'beta', q{mode => 'sync'});
History::install($_, @tables) foreach ($alpha, $beta);

sub pick
{
	return $_[ rand @_ ];
}

sub change
{
	my ($token) = @_;
	my $table = pick(@tables);
	my $id = 1 + int(rand(12));
	my $draw = rand();

	return "DELETE FROM $table WHERE id = $id;" if $draw < 0.15;
	return "UPDATE $table SET token = '$token' WHERE id = $id;" if $draw < 0.35;
	return "UPDATE $table SET id = id + 12, token = '$token' WHERE id = $id;"
	  if $draw < 0.40;
	return
	  "DELETE FROM $table WHERE id BETWEEN 13 AND 24; UPDATE $table SET token = '$token' WHERE id > 6;"
	  if $draw < 0.45;
	return "INSERT INTO $table (id, token) VALUES ($id, '$token');"    # may fail
	  if $draw < 0.50;
	return "INSERT INTO $table (id, token, filler) SELECT 1000 + g, '$token',"
	  . " repeat('z', 500) FROM generate_series(1, 300) g"
	  . ' ON CONFLICT (id) DO UPDATE SET token = excluded.token;'
	  if $draw < 0.52;
	return "DELETE FROM $table WHERE id > 900;" if $draw < 0.60;
	return 'UPDATE late SET rank = coalesce(rank, 1) % 3 WHERE id < 3;'    # may fail, at commit
	  if $draw < 0.62;
	return "INSERT INTO $table (id, token) VALUES ($id, '$token')"
	  . ' ON CONFLICT (id) DO UPDATE SET token = excluded.token;';
}

sub block
{
	my ($token) = @_;
	my $body = join ' ', map { change($token) } (1 .. 1 + int(rand(3)));
	my $inner = join ' ', map { change($token) } (1 .. 1 + int(rand(2)));
	my $fail = rand() < 0.5 ? 'PERFORM 1 / 0;' : '';

	return
	  "DO \$\$BEGIN FOR i IN 1 .. 2 LOOP BEGIN $body BEGIN $inner $fail"
	  . ' EXCEPTION WHEN OTHERS THEN NULL; END;'
	  . (rand() < 0.3 ? ' PERFORM 1 / 0;' : '')
	  . ' EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END$$;';
}

# One statement, or one step up or down in the stack of savepoints.  A name may
# be used twice; ROLLBACK TO is also what repairs an error.
sub step
{
	my ($token) = @_;
	my $draw = rand();

	if ($draw < 0.20)
	{
		push @stack, pick('a', 'b', 'c');
		return "SAVEPOINT $stack[-1];";
	}
	if ($draw < 0.40 && @stack)
	{
		my $name = pick(@stack);

		pop @stack until $stack[-1] eq $name;
		return "ROLLBACK TO $name;" if $draw < 0.32;
		pop @stack;
		return "RELEASE $name;";
	}
	return 'SELECT 1 / 0; ' . (@stack ? "ROLLBACK TO $stack[-1];" : '')
	  if $draw < 0.43;
	return 'SET LOCAL mmrepl.mode = ' . pick('sync', 'async', 'pair') . ';'
	  if $draw < 0.46;
	return 'SET LOCAL mmrepl.sync_flush = ' . pick('statement', 'commit') . ';'
	  if $draw < 0.48;
	return block($token) if $draw < 0.58;
	return change($token);
}

# The last word: what failed on the way and was not repaired is rolled back.
sub transaction
{
	my ($number) = @_;

	@stack = ();
	my $steps = join "\n", map { step("t$number") } (1 .. 2 + int(rand(14)));
	my $repair = @stack && rand() < 0.5 ? "ROLLBACK TO $stack[0];\n" : '';

	return "BEGIN;\n$steps\n$repair"
	  . (rand() < 0.9 ? 'COMMIT;' : 'ROLLBACK;')
	  . "\nROLLBACK;";
}

my ($number, $commits) = (0, 0);
foreach my $batch (1 .. $batches)
{
	my $script = join "\n", map { transaction(++$number) } (1 .. 40);
	my ($ret, $out, $err) = $alpha->psql(
		'postgres', $script,
		on_error_stop => 0,
		extra_params => [ '-v', 'VERBOSITY=verbose' ],
		timeout => 2 * $MmreplCluster::timeout);

	# What a user may meet: his own mistakes, and what is too late for sync.
	my %strange;
	while ($err =~ /ERROR:\s+(\w{5}): (.*)/g)
	{
		$strange{"$1 $2"}++
		  unless $1 =~ /^(?:0A000|22012|25P02|23505|3B001)$/;
	}
	is(join("\n", sort keys %strange), '', "batch $batch: no surprises");
	$alpha->wait_caught_up('beta');
	History::same($alpha, $beta,
		"batch $batch: every row had the same versions in the same order")
	  && $alpha->same_rows($beta, 'direct')
	  && $alpha->same_rows($beta, 'queued')
	  && $alpha->same_rows($beta, 'late')
	  or last;
	$commits += $alpha->safe_psql('postgres',
		'SELECT count(DISTINCT xid) FROM history');
	History::forget($alpha, $beta);
}
cmp_ok($commits, '>', 4 * $batches, "$commits transactions committed");
is( $beta->safe_psql(
		'postgres', 'SELECT sum(conflicts) FROM mmrepl.progress'),
	'0',
	'no change met a row that it did not expect');
$beta->poll_ok(
	q{SELECT count(*) = 0 FROM pg_stat_activity WHERE state ~ 'in transaction'},
	'nothing is left open at the peer');

foreach my $node ($alpha, $beta)
{
	ok(!$node->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
		'no crash in the log of ' . $node->name);
	$node->stop('fast');
}

done_testing();
