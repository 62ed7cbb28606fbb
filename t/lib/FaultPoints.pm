# FaultPoints.pm
#		Fault points of test builds, see include/mmrepl/fault.hpp.
#
# NOTES
#		A fault is named by its setting, 'point:action:nth'.  That it has fired
#		is a file in the node's data directory, which outlives a crash.

package FaultPoints;

use strict;
use warnings;

use IPC::Run;
use Exporter 'import';
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

our @EXPORT = qw(fault_points point_hits arm_fault disarm_faults fired firing await_fault
  release_fault forget_fault shut_down bring_back comes_back is_down until_true query);

# Names of the points on the way by which a queue is given up, and of resync(): they
# are the business of t/fault/311_give_up.pl, those of what is executed
# early, which a load comes by only now and then, that of 315_early.pl, all others that of 305_every_point.pl.
our $give_up = qr/^(?:give-up|resync)-/;
our $early = qr/^worker-early-/;

# Poll code until it returns true, and return that; false when it takes too long.
sub until_true
{
	my ($code) = @_;
	my $deadline = time() + $MmreplCluster::timeout;

	for (;;)
	{
		my $result = $code->();
		return $result if $result;
		return '' if time() > $deadline;
		usleep(20_000);
	}
}

# All points of the build: a list of { name, errors, hits }.
sub fault_points
{
	my ($node) = @_;

	my $rows = $node->safe_psql(
		'postgres', q{
		CREATE FUNCTION pg_temp.fault_points(OUT name text, OUT errors boolean, OUT hits bigint)
		RETURNS SETOF record LANGUAGE c AS '$libdir/mmrepl_bgw', 'mmrepl_fault_points';
		SELECT * FROM pg_temp.fault_points() ORDER BY 1});

	return map {
		my ($name, $errors, $hits) = split /\|/;
		{ name => $name, errors => $errors eq 't', hits => $hits }
	} split /\n/, $rows;
}

# How often a point was passed since the server's start.
sub point_hits
{
	my ($node, $name) = @_;

	return (map { $_->{hits} } grep { $_->{name} eq $name } fault_points($node))[0];
}

sub mark_of
{
	my ($node, $fault) = @_;

	return $node->data_dir . "/mmrepl_fault/$fault";
}

# Make this the node's setting, and tell everybody who is there to be told: a
# server that is down, or about to be, reads it when it starts.
sub set_fault
{
	my ($node, $fault) = @_;
	my $file = $node->data_dir . '/fault.conf';

	open(my $out, '>', $file) or die "$file: $!";
	print $out "mmrepl.fault = '$fault'\n";
	close($out);
	kill('HUP', $node->{_pid}) unless is_down($node);
	return;
}

# Set the fault for the whole node, in its configuration file, and tell everybody.
# It may have fired before.
sub arm_fault
{
	my ($node, $fault) = @_;
	my $conf = $node->data_dir . '/postgresql.conf';

	$node->append_conf('postgresql.conf', "include 'fault.conf'")
	  unless slurp_file($conf) =~ /fault\.conf/;
	forget_fault($node, $fault);
	set_fault($node, $fault);
	return;
}

# No fault any more, and those that wait go on.  The marks stay, so that a process
# which has not been told yet does not fire after all.
sub disarm_faults
{
	my ($node) = @_;

	set_fault($node, '');
	truncate($_, 0) || die "$_: $!" foreach glob(mark_of($node, '*'));
	return;
}

# Whether it has fired, or is about to: it will not fire once more.
sub firing
{
	my ($node, $fault) = @_;

	return -s mark_of($node, $fault);
}

# The process in which it has fired, or an empty string.  Who was to be killed is
# dead by then, and so, after a crash, is the postmaster.
sub fired
{
	my ($node, $fault) = @_;
	my $mark = mark_of($node, $fault);

	return '' unless -s $mark && slurp_file($mark) =~ /^(\d+)$/;
	my $pid = $1;
	return $fault =~ /:(kill|crash):/ && !is_gone($pid) ? '' : $pid;
}

sub await_fault
{
	my ($node, $fault) = @_;

	return until_true(sub { fired($node, $fault) });
}

# Let who waits go on.
sub release_fault
{
	my ($node, $fault) = @_;

	truncate(mark_of($node, $fault), 0) or die "$fault: $!";
	return;
}

# The fault may fire, whether it has before or not.
sub forget_fault
{
	my ($node, $fault) = @_;

	unlink mark_of($node, $fault);
	return;
}

# One line of psql's output, or undef when the server, or the statement, fails.
# Unlike $node->psql it writes to no pipe that a dead server has closed.
sub query
{
	my ($node, $sql) = @_;
	my ($out, $err) = ('', '');
	my $done = IPC::Run::run(
		[ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'), '-c', $sql ],
		'<', \undef, '>', \$out, '2>', \$err);

	chomp $out;
	return $done ? $out : undef;
}

# Whether the postmaster knows of every process that a fault has killed: then what
# answers after this is no server that is going to restart.
sub knows_its_dead
{
	my ($node) = @_;

	foreach my $mark (glob(mark_of($node, '*:kill:*')))
	{
		return 0 if slurp_file($mark) =~ /^(\d+)$/ && !is_gone($1);
	}
	return 1;
}

# Passes once the server answers: one that restarts itself is awaited, one that is
# down, or goes down only now, is started.
sub comes_back
{
	my ($node) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	until_true(sub { knows_its_dead($node) });
	my $back = until_true(
		sub {
			bring_back($node) if is_down($node);
			return query($node, 'SELECT 1');
		});

	return ok($back, $node->name . ' answers');
}

# Whether the postmaster is gone.
sub is_down
{
	my ($node) = @_;

	return !defined $node->{_pid} || is_gone($node->{_pid});
}

# Whether a process is gone.  The child of a postmaster is not before its parent has
# taken notice, others are when they are dead, whoever has inherited them.
sub is_gone
{
	my ($pid) = @_;

	return 1 unless kill(0, $pid);
	open(my $stat, '<', "/proc/$pid/stat") or return 0;
	my ($state, $parent) = (<$stat> // '') =~ /\) (\w) (\d+)/ or return 1;
	return 0 unless $state =~ /[ZX]/;
	open(my $comm, '<', "/proc/$parent/comm") or return 1;
	return (<$comm> // '') !~ /^postgres/;
}

# Stop a server that may be restarting itself after a crash.  A fast shutdown that
# comes just when it has recovered is never finished by PostgreSQL 15.
sub shut_down
{
	my ($node) = @_;
	local $ENV{PGCTLTIMEOUT} = 20;

	$node->stop('fast', fail_ok => 1) || $node->stop('immediate', fail_ok => 1);
	$node->{_pid} = undef;
	return;
}

# Start a server whose postmaster was killed.  Its children may still be ending.
sub bring_back
{
	my ($node) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	until_true(sub { is_down($node) }) or return fail($node->name . ' went down');
	$node->{_pid} = undef;
	my $up = until_true(
		sub {
			return IPC::Run::run(
				[
					'pg_ctl', '-w', '-s', '-D', $node->data_dir, '-l', $node->logfile,
					'-o', '--cluster-name=' . $node->name, 'start'
				],
				'>', '/dev/null', '2>', '/dev/null');
		});
	$node->_update_pid(1);
	return ok($up, $node->name . ' is up again');
}

1;
