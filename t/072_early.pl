# What commits alone is executed at the peer meanwhile, and committed there behind it.
# With fault points, and deterministic: t/fault/315_early.pl.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

# Only the writer waits for a standby that never comes: his COMMIT is flushed, and not
# visible, until he is told not to wait.
my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => q{
autovacuum = off
wal_level = replica
max_wal_senders = 2
});
$alpha->append_conf('postgresql.conf', "synchronous_standby_names = 'nobody'\nsynchronous_commit = local");
$alpha->restart;
my $writer = $alpha->session;

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }
sub row { return there("SELECT n FROM item WHERE id = $_[0]") }
sub executed { return there('SELECT last_value FROM executed') }

$writer->ok('SET synchronous_commit = on');
$alpha->create_table_on_both($beta, q{
	CREATE TABLE item (id int PRIMARY KEY, n int);
	INSERT INTO item SELECT g, 0 FROM generate_series(1, 20) g});
there(q{
	CREATE SEQUENCE executed;
	CREATE FUNCTION count_it() RETURNS trigger LANGUAGE plpgsql AS
	$$ BEGIN PERFORM nextval('public.executed'); RETURN NULL; END $$;
	CREATE TRIGGER counting AFTER UPDATE ON item FOR EACH ROW EXECUTE FUNCTION count_it();
	ALTER TABLE item ENABLE ALWAYS TRIGGER counting});
$alpha->create_pair('item', 'beta');
here('UPDATE item SET n = n WHERE id = 1');
$alpha->wait_caught_up('beta');

sub commit_slowly
{
	my ($sql) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$writer->start($sql);
	$alpha->poll_ok(q{SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')}, 'it commits');
	return;
}

sub commits
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	here('SELECT pg_cancel_backend(' . $writer->pid . ')');
	like(($writer->finish)[1], qr/WARNING:.*canceling wait for synchronous replication/, 'it is committed');
	$alpha->wait_caught_up('beta');
	return;
}

section 'it takes long to commit here' => sub {
	my $before = executed();

	commit_slowly('UPDATE item SET n = 1 WHERE id = 2');
	$beta->poll_ok("SELECT last_value > $before FROM executed", 'it has been executed at the peer');
	is(row(2), '0', '... and is not committed there');
	$beta->poll_ok(q{SELECT NOT EXISTS (SELECT FROM pg_locks WHERE relation = 'item'::regclass AND mode = 'RowExclusiveLock')},
		'it is rolled back');
	is(row(2), '0', '... and not there');
	is($alpha->state('beta'), 'streaming', 'nothing has failed');
	is(here('SELECT n FROM item WHERE id = 2'), '0', 'it is not visible here');
	commits();
	is(row(2), '1', 'it is there');
	is(executed(), $before + 2, 'it has been executed once more');
	is($alpha->stat('beta', 'retries'), '0', 'nothing was tried again');

	commit_slowly('UPDATE item SET n = 1 WHERE id = 3');
	is(executed(), $before + 2, 'then nothing is executed early for a while') foreach 1 .. 5;
	commits();
};

section 'switched off' => sub {
	my $before;

	here('ALTER SYSTEM SET mmrepl.early_apply = off');
	eval { $writer->quit };
	$alpha->restart;
	$writer = $alpha->session;
	$writer->ok('SET synchronous_commit = on');
	here('UPDATE item SET n = 1 WHERE id = 5');
	$alpha->wait_caught_up('beta');
	$before = executed();
	commit_slowly('UPDATE item SET n = 1 WHERE id = 6');
	is(executed(), $before, 'nothing is executed early') foreach 1 .. 5;
	commits();
	here('ALTER SYSTEM RESET mmrepl.early_apply');
	$writer->quit;
	$alpha->restart;
};

section 'many that come alone, and aborts among them' => sub {
	my $session = $alpha->session;
	here('UPDATE item SET n = n WHERE id = 4');
	$alpha->wait_caught_up('beta');

	$session->ok(q{SET mmrepl.async_commit = 'applied'});
	foreach my $n (1 .. 50)
	{
		my $end = $n % 5 ? 'COMMIT' : 'ROLLBACK';

		$session->ok("BEGIN; UPDATE item SET n = n + 1 WHERE id = 4; $end");
		is(row(4), here('SELECT n FROM item WHERE id = 4'), "the same is there after $n") if $n % 10 == 0;
	}
	is(row(4), '40', 'all that has committed is there, once');
	$session->quit;
};

$alpha->same_rows($beta, 'item', name => 'equal in the end');
$_->stop('fast') foreach $alpha, $beta;
done_testing();
