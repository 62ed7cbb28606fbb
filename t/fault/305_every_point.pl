# Every fault point, with every action that is legal there, on both nodes: the
# load goes on, the servers come back, and nothing is lost, doubled or left
# behind.  The points are asked from the library: a new one is in this test.
# Those of a queue that is given up, and of resync(), have another load and other
# things to hold: t/fault/311_give_up.pl; so have those of what is executed early: t/fault/315_early.pl.
#
# `make check` takes some, with actions and nodes that a seed chooses;
# MMREPL_LONG takes all of them.  MMREPL_SEED makes other choices,
# MMREPL_FAULTS takes those that match (a pattern over node:point:action:nth).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use CrashLoad;
use FaultPoints;
use List::Util qw(shuffle);
use MmreplCluster;
use Test::More;
use Time::HiRes qw(time);

seed($ENV{MMREPL_LONG} ? 'random' : 2013);

my $load = CrashLoad->new;
my @nodes = $load->nodes;
my @points =
  grep { $_->{name} !~ $FaultPoints::give_up && $_->{name} !~ $FaultPoints::early } fault_points($nodes[0]);

# ---- the cases ----

sub faults_at
{
	my ($point) = @_;
	my @actions = $point->{errors} ? qw(error fatal kill crash) : qw(kill crash);

	return map { "$point->{name}:$_:1" } @actions;
}

my $wanted = $ENV{MMREPL_FAULTS} // '.';
my @cases = ([], []);
foreach my $side (0, 1)
{
	my $name = $nodes[$side]->name;
	my @faults = shuffle(grep { "$name:$_" =~ /$wanted/ } map { faults_at($_) } @points);

	$#faults = 19 if @faults > 20 && !$ENV{MMREPL_LONG} && !$ENV{MMREPL_FAULTS};
	$cases[$side] = \@faults;
}

# ---- one round: a fault on each node ----

# Servers that went down are started; those that restart themselves are awaited.
sub revive
{
	comes_back($_) foreach @nodes;
	return;
}

# The faults that have not fired yet, as sides.
sub unfired
{
	my @faults = @_;

	return grep { defined $faults[$_] && !fired($nodes[$_], $faults[$_]) } 0, 1;
}

sub round
{
	my @faults = @_;
	my $name = join(' ', map { defined $faults[$_] ? $nodes[$_]->name . ":$faults[$_]" : () } 0, 1);
	my $started = time();

	foreach my $side (0, 1)
	{
		arm_fault($nodes[$side], $faults[$side]) if defined $faults[$side];
	}
	foreach my $try (1 .. 4)
	{
		$load->run;
		revive();
		$load->tidy;
		my @left = unfired(@faults) or last;
		next if $try == 1;

		# Some points are passed only when there is something to recover, or
		# after a start.
		foreach (@left)
		{
			$load->fail_two_phases($_);
			$load->break_two_phases($_);
		}
		revive();
		@left = unfired(@faults) or last;
		shut_down($nodes[$_]) foreach @left;
		bring_back($nodes[$_]) foreach @left;
	}
	my @missed = map { $nodes[$_]->name . ":$faults[$_]" } unfired(@faults);
	is("@missed", '', "reached: $name");
	disarm_faults($_) foreach @nodes;
	revive();
	$load->tidy;
	$load->check("after $name")
	  or diag(map { "$load->{last_output}->[$_]\n" } 0, 1);
	note sprintf('%.1f s', time() - $started);
	return;
}

# ---- every point is on the load's way ----

my %hits;

# Counters begin anew when a server does.
sub note_hits
{
	foreach my $node (@nodes)
	{
		$hits{ $_->{name} } += $_->{hits} foreach fault_points($node);
	}
	return;
}

$load->run foreach 1, 2;
$load->check('the load without faults');
note_hits();

# A session has one fault at a time: what it meets only behind another one is
# shown to be met, and gets no round.
my %before = %hits;
$load->fail_two_phases($_) foreach 0, 1;
$load->check('two phases that fail');
note_hits();
my %behind = map { $_ => 1 } grep { !$before{$_} && $hits{$_} } keys %hits;
note 'behind another fault: ', join(' ', sort keys %behind);
foreach my $side (0, 1)
{
	$load->break_two_phases($side);
	revive();
}
$load->run;
$load->check('the load after restarts');
note_hits();
is( join(' ', grep { !$hits{$_} } map { $_->{name} } @points),
	'', 'the load has come by every point');

# ---- the rounds ----

foreach my $side (0, 1)
{
	@{ $cases[$side] } = grep { !$behind{ (split /:/)[0] } } @{ $cases[$side] };
}
my $begun = time();
my $rounds = 0;
while (@{ $cases[0] } || @{ $cases[1] })
{
	round(shift @{ $cases[0] }, shift @{ $cases[1] });
	$rounds++;
}
note sprintf('%d rounds in %.0f s', $rounds, time() - $begun);

# ---- in the end ----

# Markers are swept as long as something happens.
$load->run foreach 1 .. 3;
$load->check('the load after all faults');
foreach my $node (@nodes)
{
	cmp_ok(query($node, 'SELECT count(*) FROM mmrepl.marker'), '<', 30, $node->name . ' sweeps its markers');
}
$_->stop('fast') foreach @nodes;

done_testing();
