# Two-phase commit is interrupted at every change of its state, by an error, the
# end of the session, of the server, of the peer.  Each time both sides end equal,
# nothing is prepared and nothing in doubt, and what was acknowledged is there.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use FaultPoints;
use MmreplCluster;
use Test::More;

my $conf = <<'EOC';
mmrepl.two_phase = 'on'
mmrepl.sync_timeout = '3s'
mmrepl.recovery_interval = '1s'
autovacuum = off
restart_after_crash = on
EOC
my ($alpha, $beta) = MmreplCluster->new_pair(conf => $conf);
my $gamma = MmreplCluster->create('gamma', conf => $conf);
my %acknowledged;
my $id = 0;

$alpha->add_peer($gamma);
foreach my $peer ($beta, $gamma)
{
	my $name = $peer->name;
	$alpha->create_table_on_both($peer, "CREATE TABLE item_$name (id int PRIMARY KEY, v text)");
	$alpha->create_pair("item_$name", $name, q{mode => 'sync'});
}

# One transaction with a fault in its session, for both servers; the fault has fired.
sub run_transaction
{
	my ($fault) = @_;

	$id++;
	my $done = query(
		$alpha, qq{SET mmrepl.fault = '$fault';
		BEGIN;
		INSERT INTO item_beta VALUES ($id, 'a');
		SAVEPOINT s; UPDATE item_beta SET v = 'b' WHERE id = $id; RELEASE s;
		INSERT INTO item_gamma VALUES ($id, 'a');
		COMMIT;
		SELECT 'acknowledged'});
	$acknowledged{$id} = 1 if defined $done && $done eq 'acknowledged';
	return;
}

# Nothing is left over, and no human has helped.
sub settled
{
	foreach my $peer ($beta, $gamma)
	{
		my $name = $peer->name;
		my $settled = until_true(
			sub {
				(query($alpha, "SELECT mmrepl.wait_for_replay('$name', '5 s')") // '') eq 't'
				  && (query($alpha, 'SELECT count(*) FROM mmrepl.in_doubt') // '') eq '0'
				  && (query($peer, 'SELECT count(*) FROM pg_prepared_xacts') // '') eq '0';
			});
		ok($settled, "nothing is in doubt, nothing prepared at $name")
		  || diag(query($alpha, 'SELECT * FROM mmrepl.in_doubt'),
			query($peer, 'SELECT * FROM pg_prepared_xacts'));
		$alpha->same_rows($peer, "item_$name");
	}
	is( $alpha->fingerprint('item_beta'), $alpha->safe_psql('postgres',
			q{SELECT count(*), sum(hashtext((id, CASE v WHEN 'a' THEN 'b' ELSE v END)::text)) FROM item_gamma}),
		'all or nothing');
	is( $alpha->safe_psql(
			'postgres',
			'SELECT count(*) FROM item_beta WHERE id = ANY ($${'
			  . join(',', 0, keys %acknowledged)
			  . '}$$)'),
		scalar keys %acknowledged,
		'what was acknowledged is there');
	return;
}

###############################################################################

# The whole way, in the order in which it is gone.
my @faults = (
	'two-phase-prepare-sent:error:1', 'two-phase-prepare-sent:fatal:1',
	'two-phase-prepare-sent:crash:1', 'two-phase-prepared:error:1',
	'two-phase-prepared:fatal:1', 'two-phase-prepared:kill:1',
	'commit-heads-written:error:1', 'commit-heads-written:crash:1',
	'commit-visible:crash:1', 'commit-before-peers:kill:1',
	'two-phase-committing:crash:1', 'two-phase-committing:kill:2',
	'commit-after-peer:kill:1', 'commit-entries-settled:crash:1');

foreach my $fault (@faults)
{
	section $fault => sub {
		run_transaction($fault);
		ok(await_fault($alpha, $fault), 'it has fired');
		bring_back($alpha) if $fault =~ /:crash:/;
		comes_back($alpha) if $fault =~ /:kill:/;
		forget_fault($alpha, $fault);
		settled();
	};
}

# The same with the peer's death in that moment.
foreach my $fault ('two-phase-prepared:wait:1', 'commit-before-peers:wait:1', 'commit-after-peer:wait:1')
{
	section "the peer dies: $fault" => sub {
		my $session = $alpha->session;

		$id++;
		$session->ok("SET mmrepl.fault = '$fault'");
		$session->start("BEGIN; INSERT INTO item_beta VALUES ($id, 'b');"
			  . " INSERT INTO item_gamma VALUES ($id, 'a'); COMMIT");
		is(await_fault($alpha, $fault), $session->pid, 'it waits');
		$beta->stop('immediate');
		release_fault($alpha, $fault);
		my ($out, $err) = $session->finish;
		$acknowledged{$id} = 1 unless $err =~ /ERROR|FATAL/;
		$beta->start;
		forget_fault($alpha, $fault);
		settled();
		$session->quit;
	};
}

# The worker, while it cleans up.
foreach my $fault ('recovery-listed:error:1', 'recovery-listed:kill:1', 'recovery-ended-one:error:1')
{
	section $fault => sub {
		my $node = $alpha->safe_psql('postgres', 'SELECT mmrepl.node_id()');
		my $stream = $alpha->stat('beta', 'stream');
		my $xid = $alpha->safe_psql('postgres', 'BEGIN; SELECT pg_current_xact_id(); ROLLBACK');

		# An aborted transaction's id that outlives a crash.
		$alpha->safe_psql('postgres', "CREATE TABLE later_$xid ()");
		arm_fault($alpha, $fault);
		$beta->safe_psql('postgres',
			"BEGIN; LOCK TABLE item_beta; PREPARE TRANSACTION 'mmrepl_${node}_${stream}_$xid'");
		ok(await_fault($alpha, $fault), 'it has fired');
		comes_back($alpha) if $fault =~ /:kill:/;
		disarm_faults($alpha);
		settled();
	};
}

done_testing();
