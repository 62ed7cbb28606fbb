# How changes are written at the receiver: rows that somebody there has locked,
# changes or removes at the same moment, rows that one batch touches twice.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair;

# Keep what follows back until release(), so that it arrives as one batch.
sub hold
{
	$alpha->safe_psql('postgres', q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	return;
}

sub release
{
	$alpha->safe_psql('postgres', q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	return;
}

# Wait until apply() at beta waits for the session there.
sub await_blocked
{
	my ($session) = @_;

	ok( $beta->poll_query_until(
			'postgres',
			'SELECT count(*) > 0 FROM pg_stat_activity WHERE '
			  . $session->pid
			  . ' = ANY (pg_blocking_pids(pid))'),
		'apply waits for the session at the receiver');
	return;
}

sub conflicts
{
	return $beta->safe_psql('postgres',
		'SELECT coalesce(sum(conflicts), 0) FROM mmrepl.progress');
}

$alpha->create_table_on_both($beta,
	'CREATE TABLE item (id int PRIMARY KEY, v text, n int DEFAULT 0)');
$alpha->create_pair('item', 'beta');
$alpha->safe_psql('postgres',
	q{INSERT INTO item SELECT i, 'start' FROM generate_series(1, 100) i});
$alpha->wait_caught_up('beta');

###############################################################################

# A row that is only locked is found, and then waited for where it is written:
# what its owner has made of it meanwhile decides.
section 'a row that is locked, then changed, when it is to be written' => sub {
	foreach my $case (
		[ 1, q{UPDATE item SET v = 'beta' WHERE id = 1}, 'UPDATE', 0 ],
		[ 2, q{DELETE FROM item WHERE id = 2}, 'UPDATE', 1 ],
		[ 3, q{UPDATE item SET v = 'beta' WHERE id = 3}, 'DELETE', 0 ],
		[ 4, q{DELETE FROM item WHERE id = 4}, 'DELETE', 1 ],
		[ 5, q{SELECT 1}, 'UPDATE', 0 ])
	{
		my ($id, $there, $here, $more) = @$case;
		my $before = conflicts();
		my $session = $beta->session;

		$session->ok('BEGIN');
		$session->ok("SELECT 1 FROM item WHERE id = $id FOR UPDATE");
		$alpha->safe_psql('postgres', $here eq 'UPDATE'
			? "UPDATE item SET v = 'alpha' WHERE id = $id"
			: "DELETE FROM item WHERE id = $id");
		await_blocked($session);
		$session->ok($there);
		$session->ok('COMMIT');
		$session->quit;
		$alpha->wait_caught_up('beta');
		is( $beta->safe_psql(
				'postgres', "SELECT v FROM item WHERE id = $id"),
			$here eq 'UPDATE' ? 'alpha' : '',
			"$there, then the $here from alpha");
		is(conflicts() - $before, $more, "conflicts: $more");
	}
	$alpha->same_rows($beta, 'item');
};

# What the current command wrote it cannot write again.
section 'rows that a batch touches more than once' => sub {
	hold();
	$alpha->safe_psql(
		'postgres', q{
		UPDATE item SET n = n + 1 WHERE id BETWEEN 10 AND 20;
		UPDATE item SET n = n + 1 WHERE id BETWEEN 10 AND 20;
		BEGIN;
		UPDATE item SET n = n + 1 WHERE id BETWEEN 10 AND 20;
		UPDATE item SET n = n + 1 WHERE id BETWEEN 10 AND 20;
		UPDATE item SET id = id + 1000 WHERE id = 12;
		UPDATE item SET id = 12 WHERE id = 13;
		DELETE FROM item WHERE id = 14;
		INSERT INTO item VALUES (14, 'again'), (2000, 'new');
		UPDATE item SET v = 'newer' WHERE id = 2000;
		DELETE FROM item WHERE id = 2000;
		COMMIT;
		DELETE FROM item WHERE id = 15;
		INSERT INTO item VALUES (15, 'again');
		DELETE FROM item WHERE id = 15;
		INSERT INTO item VALUES (15, 'and again'), (2001, 'new');
		UPDATE item SET v = 'newer' WHERE id IN (15, 2001);
	});
	my $before = conflicts();

	release();
	$alpha->same_rows($beta, 'item');
	is(conflicts() - $before, 0, 'without a conflict');
};

# Index entries: of rows that stay on their page none is made.
section 'secondary indexes follow updates' => sub {
	$beta->safe_psql('postgres', 'CREATE INDEX item_v ON item (v)');
	$alpha->safe_psql('postgres',
		q{UPDATE item SET v = 'found ' || id WHERE id BETWEEN 30 AND 40});
	$alpha->wait_caught_up('beta');
	is( $beta->safe_psql(
			'postgres', q{
			SET enable_seqscan = off;
			SELECT count(*) FROM item WHERE v BETWEEN 'found' AND 'foune'}),
		11,
		'rows are found by what was updated');
};

# The table's own rules hold for what is written directly.
section 'checks and publications at the receiver' => sub {
	$beta->safe_psql('postgres',
		'ALTER TABLE item ADD CONSTRAINT small CHECK (n < 1000)');
	$alpha->safe_psql('postgres', 'UPDATE item SET n = 1000 WHERE id = 50');
	$alpha->poll_state('beta', 'blocked');
	like($alpha->stat('beta', 'last_error'),
		qr/violates check constraint "small"/, 'a check refuses the update');
	$beta->safe_psql('postgres', 'ALTER TABLE item DROP CONSTRAINT small');
	$alpha->safe_psql('postgres', q{SELECT mmrepl.retry_now('beta')});
	$alpha->wait_caught_up('beta');

	$beta->safe_psql(
		'postgres', q{
		ALTER TABLE item REPLICA IDENTITY NOTHING;
		CREATE PUBLICATION items FOR TABLE item});
	$alpha->safe_psql('postgres', 'UPDATE item SET n = 1 WHERE id = 51');
	$alpha->poll_state('beta', 'blocked');
	like($alpha->stat('beta', 'last_error'),
		qr/does not have a replica identity and publishes updates/,
		'an update that a publication could not pass on is refused');
	$beta->safe_psql('postgres', 'DROP PUBLICATION items');
	$alpha->safe_psql('postgres', q{SELECT mmrepl.retry_now('beta')});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'item');
};

done_testing();
