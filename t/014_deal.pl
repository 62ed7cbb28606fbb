# Several sessions in deal_sync_err_rec() and the worker, all at once, over one
# stream: one ordering lock, so that never two of them deliver at the same time;
# and each of them gets his turn.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(conf => "mmrepl.batch_transactions = 20");
my $dealers = 3;

sub here { return $alpha->safe_psql('postgres', $_[0]); }
sub there { return $beta->safe_psql('postgres', $_[0]); }

$alpha->create_table_on_both($beta, 'CREATE TABLE item (id int PRIMARY KEY, n int NOT NULL)');
$alpha->create_pair('item', 'beta');
here('INSERT INTO item SELECT g, 0 FROM generate_series(1, 5) g');
$alpha->wait_caught_up('beta');

# The peer writes down, for every version, who applied it, and who else was about
# to apply something at that moment: who waits for the stream's row is that, too.
there(
	q{
	CREATE TABLE arrival (at bigserial, id int, n int, pid int, others int);
	CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO public.arrival (id, n, pid, others)
		SELECT new.id, new.n, pg_backend_pid(), count(*) FROM pg_stat_activity
		WHERE state = 'active' AND query LIKE '%mmrepl.apply(%' AND pid <> pg_backend_pid()
		  AND application_name LIKE 'mmrepl%';
		PERFORM pg_stat_clear_snapshot();
		RETURN new;
	END $$;
	CREATE TRIGGER note AFTER UPDATE ON item FOR EACH ROW EXECUTE FUNCTION note();
	ALTER TABLE item ENABLE ALWAYS TRIGGER note});

my $rounds = 6;
my $each = 400;

foreach my $round (1 .. $rounds)
{
	my @dealers = map { $alpha->session } (1 .. $dealers);
	my $writer = $alpha->session;

	$writer->start(qq{
		DO \$\$ BEGIN
			FOR i IN 1 .. $each LOOP
				UPDATE item SET n = n + 1 WHERE id = 1 + i % 5; COMMIT;
			END LOOP;
		END \$\$});
	# Each call is a transaction of its own, so that it gives the stream back.
	$_->start(
		q{
		DO $$ BEGIN
			FOR i IN 1 .. 15 LOOP
				PERFORM mmrepl.deal_sync_err_rec(10); COMMIT;
			END LOOP;
		END $$}) foreach @dealers;
	foreach my $session ($writer, @dealers)
	{
		my (undef, $err) = $session->finish;

		is($err, '', "round $round: nobody failed");
		$session->quit;
	}
	$alpha->wait_caught_up('beta');
}

is(there('SELECT count(*) FROM arrival'), $rounds * $each, 'every version came, once');
is( there(
		q{SELECT count(*) FROM (SELECT n - lag(n) OVER (PARTITION BY id ORDER BY at) AS step FROM arrival) s
		   WHERE step <> 1}),
	'0', 'and in order');
is(there('SELECT count(*) FROM arrival WHERE others > 0'), '0', 'nobody delivered beside another one');

# The worker's session at the peer is the one that stays; the others are just ending.
my $worker = q{SELECT string_agg(DISTINCT pid::text, ' ') FROM arrival WHERE pid IN
	(SELECT pid FROM pg_stat_activity)};
$beta->poll_ok("SELECT ($worker) ~ '^[0-9]+\$'", 'the worker had its turn');
$worker = there($worker);
cmp_ok(there("SELECT count(DISTINCT pid) FROM arrival WHERE pid <> $worker"),
	'>=', $dealers, 'and so had the sessions');
$alpha->same_rows($beta, 'item');

done_testing();
