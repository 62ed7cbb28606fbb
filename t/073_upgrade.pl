# pg_upgrade: what was queued before is delivered by the upgraded node, as the same
# node, and nothing arrives twice.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair;
my $next = MmreplCluster->new('next');
my $id = $alpha->safe_psql('postgres', 'SELECT mmrepl.node_id()');

sub upgrade
{
	my ($old, $new) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $programs = $old->config_data('--bindir');

	chdir $PostgreSQL::Test::Utils::tmp_check or die "chdir: $!";
	command_ok(
		[
			'pg_upgrade', '--old-datadir', $old->data_dir, '--new-datadir', $new->data_dir,
			'--old-bindir', $programs, '--new-bindir', $programs, '--socketdir', $new->host,
			'--old-port', $old->port, '--new-port', $new->port
		],
		'pg_upgrade');
	return;
}

section 'before' => sub {
	$alpha->create_table_on_both($beta, "CREATE TABLE $_ (id int PRIMARY KEY, v text)") foreach qw(queued direct);
	$alpha->create_pair_on_both($beta, 'queued');
	$alpha->create_pair('direct', 'beta', q{mode => 'sync'});
	$alpha->safe_psql('postgres', q{
		INSERT INTO queued SELECT g, 'before' FROM generate_series(1, 5) g;
		INSERT INTO direct VALUES (1, 'before')});
	$alpha->wait_caught_up('beta');
	$beta->close_to_peers;
	$alpha->safe_psql('postgres', q{
		UPDATE queued SET v = v || ', waited' WHERE id = 1;
		DELETE FROM queued WHERE id = 2;
		INSERT INTO queued VALUES (6, 'waited')});
	is($alpha->queued('beta'), '3', 'some changes wait');
};

section 'the upgrade' => sub {
	$next->init;
	$alpha->stop('fast');
	upgrade($alpha, $next);
	$beta->open_to_peers;
	$next->start;
};

section 'until it is adopted' => sub {
	$next->wait_for_log(qr/copy of another replication node.*?HINT:.*adopt_node\(moved => true\)/s);
	is($beta->safe_psql('postgres', 'SELECT count(*) FROM queued'), '5', 'nothing is delivered');
};

section 'afterwards' => sub {
	is($next->safe_psql('postgres', 'SELECT mmrepl.adopt_node(moved => true)'), $id, 'it is the same node');
	$next->wait_caught_up('beta');
	$next->same_rows($beta, $_) foreach qw(queued direct);
	$next->safe_psql('postgres', q{UPDATE queued SET v = 'after'; UPDATE direct SET v = 'after'});
	$next->wait_caught_up('beta');
	$next->same_rows($beta, $_) foreach qw(queued direct);
	is($next->state('beta'), 'streaming', 'the stream is well');

	# The other direction: the server beta knows has moved.
	$beta->safe_psql('postgres', q{ALTER SERVER alpha OPTIONS (SET port '} . $next->port . q{')});
	$beta->safe_psql('postgres', q{UPDATE queued SET v = 'back' WHERE id = 1});
	$beta->wait_caught_up('alpha');
	$next->same_rows($beta, 'queued');
};

$_->stop('fast') foreach $next, $beta;
done_testing();
