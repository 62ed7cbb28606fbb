# A backlog that is read in many pieces (the test build reads 20 transactions at a
# time and surveys single blocks): in order, each transaction once, whatever was
# prepared, committed late, skipped, or sent in vain in between.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => "mmrepl.rotate_size = '64kB'\nmmrepl.batch_transactions = 50\n"
	  . "mmrepl.retry_min_delay = '10ms'");

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

# Every version of a counter is kept at the peer, in the order of arrival.
$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE counter (id int PRIMARY KEY, n int);
	CREATE TABLE plain (id int PRIMARY KEY, v text);
});
there(
	q{
	CREATE TABLE arrival (at bigserial, id int, n int);
	CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO public.arrival (id, n) VALUES (new.id, new.n);
		RETURN new;
	END $$;
	CREATE TRIGGER note AFTER UPDATE ON counter FOR EACH ROW EXECUTE FUNCTION note();
	ALTER TABLE counter ENABLE ALWAYS TRIGGER note;
});
$alpha->create_pair('counter', 'beta');
$alpha->create_pair('plain', 'beta');
here(
	q{INSERT INTO counter SELECT g, 0 FROM generate_series(1, 5) g;
	   CREATE PROCEDURE load(count int) LANGUAGE plpgsql AS $$
	   BEGIN
		   FOR i IN 1 .. count LOOP
			   UPDATE counter SET n = n + 1 WHERE id = 1 + i % 5;
			   COMMIT;
		   END LOOP;
	   END $$});
synced();

sub load
{
	my ($sessions, $each) = @_;
	my @sessions = map { $alpha->session } (1 .. $sessions);

	$_->start("CALL load($each)") foreach (@sessions);
	foreach my $session (@sessions)
	{
		my (undef, $err) = $session->finish;
		die $err if $err ne '';
		$session->quit;
	}
	return;
}

sub all_there
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	synced();
	is( there(
			q{SELECT count(*) FROM (SELECT n, lag(n, 1, 0) OVER (PARTITION BY id ORDER BY at) AS last
			  FROM arrival) a WHERE n <> last + 1}),
		'0',
		"$name: each version once, in order");
	return $alpha->same_rows($beta, $_, name => "$name: $_") foreach ('counter', 'plain');
}

section 'a backlog of several writers' => sub {
	here(q{SELECT mmrepl.pause('beta')});
	load(4, 300);
	is($alpha->queued('beta'), '1200', 'is shown whole');
	here(q{SELECT mmrepl.resume('beta')});
	all_there('drained');
};

section 'lost connections on the way' => sub {
	here(q{SELECT mmrepl.pause('beta')});
	load(4, 300);
	here(q{SELECT mmrepl.resume('beta')});
	foreach my $blow (1 .. 5)
	{
		$beta->terminate_peers;
		load(2, 20);
	}
	all_there('interrupted');
};

section 'late and skipped transactions in between' => sub {
	here(q{BEGIN; INSERT INTO plain VALUES (1, 'early'); PREPARE TRANSACTION 'early'});
	here(q{SELECT mmrepl.pause('beta')});
	load(2, 200);
	here(q{BEGIN; INSERT INTO plain VALUES (2, 'middle'); PREPARE TRANSACTION 'middle'});
	here(q{INSERT INTO plain VALUES (100, 'skipped')});
	my $ticket = here(
		q{SELECT ticket FROM mmrepl.sync_err_rec WHERE dst_query ~ 'skipped'});
	load(2, 200);
	here(q{COMMIT PREPARED 'middle'});
	here(q{UPDATE plain SET v = v || ' and changed' WHERE id = 2});
	here("SELECT mmrepl.skip('beta', $ticket, 'not wanted')");
	here(q{DELETE FROM plain WHERE id = 100});

	# This one becomes visible while the survey is used up.
	my $writer = $alpha->session;
	$writer->start('CALL load(200)');
	here(q{SELECT mmrepl.resume('beta')});
	here(q{COMMIT PREPARED 'early'});
	here(q{UPDATE plain SET v = v || ' and changed' WHERE id = 1});
	my (undef, $err) = $writer->finish;
	is($err, '', 'a writer goes on meanwhile');
	$writer->quit;
	all_there('late');
	is( there(q{SELECT string_agg(v, ', ' ORDER BY id) FROM plain}),
		'early and changed, middle and changed',
		'what is late comes before what depends on it');
	$alpha->poll_ok(
		q{SELECT queue_transactions = 0 FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'},
		'nothing is left');
};

ok(!$alpha->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
	'no crash in the log of the source');
$alpha->stop('fast');
$beta->stop('fast');

done_testing();
