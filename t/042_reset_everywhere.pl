# The connection is reset at every message that it carries, from the first one
# of connecting to the last one of a delivery, one after the other.  Each time
# everything arrives, once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultProxy;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => q{
mmrepl.retry_min_delay = '10ms'
mmrepl.retry_max_delay = '50ms'
});
my $proxy = FaultProxy->new(port => $beta->port);
my $port = $proxy->port;

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE queued (id int PRIMARY KEY, v text);
	CREATE TABLE direct (id int PRIMARY KEY, v text);
});

# How often each row was written at the peer.
$beta->safe_psql(
	'postgres', q{
	CREATE TABLE public.seen (id int);
	CREATE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS
	  $$BEGIN INSERT INTO public.seen VALUES (NEW.id); RETURN NEW; END$$;
	CREATE TRIGGER see AFTER INSERT OR UPDATE ON queued FOR EACH ROW EXECUTE FUNCTION public.see();
	ALTER TABLE queued ENABLE REPLICA TRIGGER see;
});
here("ALTER SERVER beta OPTIONS (SET port '$port')");
$alpha->create_pair('queued', 'beta');
$alpha->create_pair('direct', 'beta', q{mode => 'sync'});
$alpha->poll_state('beta', 'streaming');

my $most = 400;    # messages: many more than there are

section 'a delivery' => sub {
	my $n = 0;
	my $acted = 1;

	while ($acted && $n < $most)
	{
		$n++;
		$proxy->kill;
		my $rule = $proxy->rule(action => 'reset', nth => $n);
		here("INSERT INTO queued VALUES ($n, 'message $n')");
		my $arrived = here(
			"SELECT mmrepl.wait_for_replay('beta', '$MmreplCluster::timeout s')");
		if ($arrived ne 't')
		{
			fail("reset at message $n: everything arrives");
			diag($alpha->describe('beta'));
			return;
		}
		$acted = $proxy->wait_for($rule, 0.001);
		$proxy->clear;
	}
	cmp_ok($n, '>', 20, "there are $n messages");
	cmp_ok($n, '<', $most, 'and an end of them');
	$alpha->same_rows($beta, 'queued');
	is( $beta->safe_psql('postgres',
			'SELECT count(*) = count(DISTINCT id), count(*) FROM public.seen'),
		"t|$n",
		'each row has arrived once');
};

section 'a synchronous transaction' => sub {
	my ($n, $acted, $failed) = (0, 1, 0);

	while ($acted && $n < $most)
	{
		$n++;

		# The worker has its connection; the session makes one of its own.
		$alpha->poll_query_until('postgres',
			q{SELECT state = 'streaming' FROM mmrepl.pg_stat_mmrepl}) or die;
		my @others = map { $_->{id} } $proxy->connections;
		my $rule =
		  $proxy->rule(action => 'reset', nth => $n, except => \@others);
		my ($ret, $out, $err) = $alpha->psql('postgres',
			"INSERT INTO direct VALUES ($n, 'message $n')");
		$acted = $proxy->wait_for($rule, 0.001);
		$proxy->clear;

		if ($ret != 0)
		{
			$failed++;
			like($err, qr/beta/, "message $n: the error names the server")
			  if $err !~ /beta/;
		}
		here("SELECT mmrepl.wait_for_replay('beta', '$MmreplCluster::timeout s')");
		my $sql = "SELECT count(*) FROM direct WHERE id = $n";
		my ($kept, $arrived) =
		  (here($sql), $beta->safe_psql('postgres', $sql));
		is("$kept|$arrived", $ret == 0 ? '1|1' : '0|0',
			"message $n: both or neither")
		  if "$kept|$arrived" ne ($ret == 0 ? '1|1' : '0|0');
	}
	cmp_ok($n, '>', 20, "there are $n messages");
	cmp_ok($n, '<', $most, 'and an end of them');
	cmp_ok($failed, '>', 10, "$failed statements failed");
	$alpha->same_rows($beta, 'direct');
};

is($alpha->queued('beta'), '0', 'nothing is left queued');
ok(!$alpha->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
	'no crash in the log of the source');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
