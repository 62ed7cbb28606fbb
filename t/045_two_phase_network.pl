# The network between two phases: how often it is crossed, and what becomes of a
# transaction when it fails at a message.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultProxy;
use MmreplCluster;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(conf => <<'EOC');
mmrepl.two_phase = 'on'
mmrepl.sync_timeout = '1s'
mmrepl.recovery_interval = '1s'
EOC
my $proxy = FaultProxy->new(port => $beta->port);
my $id = 0;

$alpha->safe_psql('postgres', "ALTER SERVER beta OPTIONS (SET port '@{[$proxy->port]}')");
$alpha->create_table_on_both($beta, 'CREATE TABLE item (id int PRIMARY KEY, v text)');
$alpha->create_pair('item', 'beta', q{mode => 'sync'});

sub settled
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$alpha->wait_caught_up('beta');
	$beta->poll_ok('SELECT count(*) = 0 FROM pg_prepared_xacts', 'nothing is prepared there')
	  || diag($beta->safe_psql('postgres', 'SELECT * FROM pg_prepared_xacts'));
	$alpha->poll_ok('SELECT count(*) = 0 FROM mmrepl.in_doubt', 'nothing is in doubt')
	  || diag($alpha->safe_psql('postgres', 'SELECT * FROM mmrepl.in_doubt'));
	$alpha->same_rows($beta, 'item');
	return;
}

section 'round trips' => sub {
	$alpha->safe_psql('postgres', q{INSERT INTO item VALUES (0, 'the worker is there')});
	$alpha->poll_state('beta', 'streaming');
	my @others = map { $_->{id} } $proxy->connections;
	my $session = $alpha->session;
	$session->ok(q{INSERT INTO item VALUES (-1, 'the connection is there')});
	$proxy->reset_counters;
	$session->ok(q{INSERT INTO item VALUES (-2, 'counted')});
	is($proxy->round_trips(except => \@others),
		3, 'one for the statement, one for PREPARE, one for COMMIT PREPARED');
	$session->quit;
	settled();
};

# What the network does at which message, and whether the transaction is committed.
my %outcome = ('PREPARE TRANSACTION' => 0, 'COMMIT PREPARED' => 1);

foreach my $message ('PREPARE TRANSACTION', 'COMMIT PREPARED')
{
	foreach my $way ([ 'reset', 'before' ], [ 'reset', 'after' ], [ 'half_open', 'after' ],
		[ 'hold', 'before' ])
	{
		my ($action, $when) = @$way;

		section "$message: $action $when it arrives" => sub {
			my $rule = $proxy->rule(action => $action, when => $when, from => 'client',
				type => 'Q', pattern => $message, times => 1);
			$id++;
			my $err = $alpha->fails('postgres',
				"INSERT INTO item VALUES ($id, 'one'), (-1000 - $id, 'two')");
			ok($proxy->wait_for($rule), 'the network failed');
			if ($outcome{$message})
			{
				is($err, '', 'it is committed here');
			}
			else
			{
				like($err, qr/ERROR:\s+(?:08|57P|MM008)/, 'it fails here');
			}
			$proxy->clear;
			$proxy->release if $action eq 'hold';
			settled();
			is($beta->safe_psql('postgres', "SELECT count(*) FROM item WHERE id IN ($id, -1000 - $id)"),
				2 * $outcome{$message}, 'and so it is there');
		};
	}
}

# The worker's own connection fails while it cleans up.
section 'the network fails in recovery' => sub {
	my $node = $alpha->safe_psql('postgres', 'SELECT mmrepl.node_id()');
	my $xid = $alpha->safe_psql('postgres', 'BEGIN; SELECT pg_current_xact_id(); ROLLBACK');
	my $stream = $alpha->stat('beta', 'stream');
	my $rule = $proxy->rule(action => 'reset', when => 'before', from => 'client', type => 'Q',
		pattern => 'ROLLBACK PREPARED', times => 1);
	$beta->safe_psql('postgres',
		"BEGIN; LOCK TABLE item; PREPARE TRANSACTION 'mmrepl_${node}_${stream}_$xid'");
	ok($proxy->wait_for($rule), 'the network failed');
	settled();
};

done_testing();
