# Fault points: the setting, its actions, and that a release build has nothing
# of it.  See include/mmrepl/fault.hpp.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use FaultPoints;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = MmreplCluster->create('alpha', conf => 'restart_after_crash = on');
my @points = fault_points($node);

section 'the points' => sub {
	my %seen;
	my @wrong = grep { $_->{name} !~ /^[a-z]+(-[a-z]+)+$/ || $seen{ $_->{name} }++ } @points;

	cmp_ok(scalar @points, '>', 50, 'there are points');
	is("@{[map { $_->{name} } @wrong]}", '', 'each has a name of its own');
};

section 'a release build has nothing of it' => sub {
	my $release = `"$ENV{PG_CONFIG}" --pkglibdir`;
	chomp $release;
	my $library = slurp_file("$release/mmrepl_bgw.so");

	cmp_ok(length $library, '>', 100000, 'that is the library');
	is( join(' ', grep { $library =~ /\b$_->{name}\b/ } @points),
		'', 'no name of a point is in it');
	unlike($library, qr/mmrepl.fault/, 'nor the setting');
};

section 'what is wrong is refused' => sub {
	my %wrong = (
		'x' => 'form',
		'x:error:1' => 'no such point',
		'commit-begin:stumble:1' => 'Actions are',
		'commit-begin:error:0' => 'from 1',
		'commit-begin:error:1x' => 'from 1',
		'commit-visible:error:1' => 'not legal',
		'commit-visible:fatal:1' => 'not legal');

	like($node->fails('postgres', "SET mmrepl.fault = '$_'"), qr/$wrong{$_}/, "'$_'")
	  foreach sort keys %wrong;
	$node->safe_psql('postgres', 'CREATE ROLE nobody');
	like(
		$node->fails('postgres', "SET ROLE nobody; SET mmrepl.fault = 'commit-begin:error:1'"),
		qr/permission denied/,
		'superusers only');
};

# Something to commit, with a peer that does not exist.
$node->safe_psql(
	'postgres', q{
	CREATE SERVER nowhere FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (host '127.0.0.1', port '1');
	CREATE USER MAPPING FOR CURRENT_USER SERVER nowhere;
	CREATE TABLE t (id int PRIMARY KEY);
	CREATE TRIGGER capture AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW
	  EXECUTE FUNCTION mmrepl.replicate('nowhere', 'public', 't', '', 'async')});

section 'error, the second time, once' => sub {
	my $set = "SET mmrepl.fault = 'commit-begin:error:2';";

	is($node->fails('postgres', "$set INSERT INTO t VALUES (1)"), '', 'the first one');
	like(
		$node->fails('postgres', "$set INSERT INTO t VALUES (2)"),
		qr/ERROR: +40001: fault point "commit-begin" was reached/,
		'the second one, in another session');
	is($node->fails('postgres', "$set INSERT INTO t VALUES ($_)"), '', 'and never again')
	  foreach 3, 4;
	like(fired($node, 'commit-begin:error:2'), qr/^\d+$/, 'there is a mark');
	forget_fault($node, 'commit-begin:error:2');
	is($node->fails('postgres', "$set INSERT INTO t VALUES (5)"), '', 'armed anew: the first one');
	isnt($node->fails('postgres', "$set INSERT INTO t VALUES (6)"), '', 'and the second one');
};

section 'fatal' => sub {
	like(
		$node->fails('postgres', "SET mmrepl.fault = 'commit-begin:fatal:1'; INSERT INTO t VALUES (7)"),
		qr/FATAL/, 'the session ends');
};

section 'wait, until it is released or canceled' => sub {
	my $session = $node->session;
	my $wait = 'commit-heads-written:wait:1';

	$session->ok("SET mmrepl.fault = '$wait'");
	$session->start('INSERT INTO t VALUES (10)');
	is(await_fault($node, $wait), $session->pid, 'the session waits');
	release_fault($node, $wait);
	my ($out, $err) = $session->finish;
	is($err, '', 'released');

	forget_fault($node, $wait);
	$session->start('INSERT INTO t VALUES (11)');
	await_fault($node, $wait);
	$node->safe_psql('postgres', "SELECT pg_cancel_backend(@{[$session->pid]})");
	($out, $err) = $session->finish;
	like($err, qr/canceling/, 'canceled');
	$session->quit;
};

section 'kill, where no error may be raised' => sub {
	arm_fault($node, 'commit-visible:kill:1');
	isnt($node->fails('postgres', 'INSERT INTO t VALUES (12)'), '', 'the session is gone');
	comes_back($node);
	# What answered was the server after its restart, not the one before it.
	is($node->safe_psql('postgres', 'SELECT count(*) FROM t WHERE id = 12'), '1', 'it was committed');
	is($node->fails('postgres', 'INSERT INTO t VALUES (13)'), '', 'it has fired once');
	disarm_faults($node);
};

section 'crash' => sub {
	arm_fault($node, 'commit-heads-written:crash:1');
	isnt($node->fails('postgres', 'INSERT INTO t VALUES (20)'), '', 'the session is gone');
	bring_back($node);
	disarm_faults($node);
	is($node->safe_psql('postgres', 'SELECT count(*) FROM t WHERE id = 20'), '0', 'nothing was committed');
	is($node->safe_psql('postgres', "SELECT string_agg(id::text, ' ' ORDER BY id) FROM t"),
		'1 3 4 5 10 12 13', 'exactly what was acknowledged, or committed, is there');
	is($node->queued('nowhere'), '7', 'and in the queue');
};

$node->stop('fast');
done_testing();
