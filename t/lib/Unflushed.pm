# Unflushed.pm
#		What a peer shows, has not flushed, and loses in a crash.
#
# NOTES
#		$ledger is a table "account" (id, n) with a table "written" that keeps, at the
#		peer, each value that n was given there, in order.

package Unflushed;

use strict;
use warnings;

use Exporter 'import';
use FaultPoints;
use MmreplCluster;
use Test::More;

our @EXPORT = qw($ledger stop_flushing lose_unflushed warm_session judge_ledger);

our $ledger = q{
	CREATE TABLE account (id int PRIMARY KEY, n int NOT NULL);
	CREATE TABLE written (id int, n int);
	CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
	$$BEGIN INSERT INTO public.written VALUES (NEW.id, NEW.n); RETURN NULL; END$$;
	CREATE TRIGGER note AFTER INSERT OR UPDATE ON account FOR EACH ROW EXECUTE FUNCTION note();
	ALTER TABLE account ENABLE ALWAYS TRIGGER note;
};

# From now on nothing is flushed there but what somebody waits for.  Returns the WAL
# writer's process id, which lose_unflushed() asks for.
sub stop_flushing
{
	my ($node) = @_;
	my $writer = query($node, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'");

	query($node, 'CHECKPOINT');
	kill('STOP', $writer);
	return $writer;
}

# The server is down, and what was not flushed there is lost.
sub lose_unflushed
{
	my ($node, $writer) = @_;

	kill('KILL', $node->{_pid});
	until_true(sub { is_down($node) });
	kill('KILL', $writer);
	return;
}

# A session whose connection to the peer is there, and older than what follows; the
# statement is what it is made for.
sub warm_session
{
	my ($node, $server, $statement, $commit) = @_;
	my $session = $node->session;

	$session->ok(q{SET mmrepl.sync_commit = '} . ($commit || 'applied') . q{'});
	$session->ok($statement);
	$node->wait_caught_up($server);
	return $session;
}

# Passes when the peer has everything, once, and nothing is left open.
sub judge_ledger
{
	my ($node, $peer, $name, @tables) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$node->wait_caught_up($peer->name);
	$node->same_rows($peer, $_, name => "$name: $_ is equal") foreach @tables;
	is($peer->safe_psql('postgres', 'SELECT sum(conflicts) FROM mmrepl.progress'), '0', '... without a conflict');
	is( $peer->safe_psql('postgres', q{
			SELECT count(*) FROM (SELECT FROM written WHERE n > 0 GROUP BY id, n HAVING count(*) > 1) twice}),
		'0', '... each change is there once');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM mmrepl.in_doubt'), '0', '... nothing is in doubt');
	is($node->queued($peer->name), '0', '... and nothing is queued');
	return;
}

1;
