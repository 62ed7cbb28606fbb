# Results.pm
#		The results of one or more runs, and the figures that are made of them.
#
#		Every figure of a system is a median over rounds.  A ratio is made within
#		a round, of what was measured one after the other, and then the median is
#		taken.  Rounds that are void or failed count for nothing but the remark.

package Results;

use strict;
use warnings;

use JSON::PP ();

# Results->read(@directories)
sub read
{
	my ($class, @directories) = @_;
	my $self = bless { machines => [], runs => {}, order => {}, bad => {} },
	  $class;

	foreach my $directory (@directories)
	{
		push @{ $self->{machines} },
		  JSON::PP->new->decode(_slurp("$directory/machine.json"));
		foreach my $line (split /\n/, _slurp("$directory/runs.jsonl"))
		{
			$self->_add($directory, JSON::PP->new->decode($line));
		}
	}
	return $self;
}

sub _slurp
{
	my ($file) = @_;

	open my $handle, '<:raw', $file or die "$file: $!\n";
	local $/ = undef;
	return scalar <$handle>;
}

sub _add
{
	my ($self, $directory, $run) = @_;
	my ($workload, $system) = @{$run}{ 'workload', 'system' };

	push @{ $self->{order}{$workload} }, $system
	  unless grep { $_ eq $system } @{ $self->{order}{$workload} || [] };
	if ($run->{failed} || defined $run->{equal} && !$run->{equal})
	{
		$self->{bad}{$workload}{$system}++;
		return;
	}
	$self->{runs}{$workload}{$system}{"$directory:$run->{round}"} = $run;
	return;
}

sub machines { return @{ $_[0]{machines} }; }

sub workloads { return sort keys %{ $_[0]{order} }; }

# The systems that were measured with the workload, in that order.
sub systems
{
	my ($self, $workload) = @_;
	return @{ $self->{order}{$workload} || [] };
}

# How many rounds were void or failed.
sub bad
{
	my ($self, $workload, $system) = @_;
	return $self->{bad}{$workload}{$system} || 0;
}

# The names of all figures of a workload.
sub metrics
{
	my ($self, $workload) = @_;
	my %seen;

	foreach my $runs (values %{ $self->{runs}{$workload} || {} })
	{
		$seen{$_} = 1 foreach map { keys %$_ } values %$runs;
	}
	delete @seen{ 'workload', 'system', 'round', 'equal' };
	return sort keys %seen;
}

# Were the tables compared, and equal each time?
sub compared
{
	my ($self, $workload, $system) = @_;
	my @runs = values %{ $self->{runs}{$workload}{$system} || {} };

	return @runs && !grep { !defined $_->{equal} } @runs;
}

# The values of a metric, sorted: of each round, or divided by what the other
# system had in the same round ('/'), or what it had taken off ('-').
sub values_of
{
	my ($self, $workload, $system, $metric, $operator, $other) = @_;
	my $runs = $self->{runs}{$workload}{$system} || {};
	my @values;

	foreach my $key (keys %$runs)
	{
		my $value = $runs->{$key}{$metric};
		if (defined $operator)
		{
			my $base = $self->{runs}{$workload}{$other}{$key};
			$base &&= $base->{$metric};
			next unless $base && defined $value;
			$value = $operator eq '/' ? $value / $base : $value - $base;
		}
		push @values, $value if defined $value;
	}
	@values = sort { $a <=> $b } @values;
	return @values;
}

# The median of sorted values.
sub median
{
	my (@values) = @_;
	return undef unless @values;
	my $middle = int(@values / 2);

	return @values % 2
	  ? $values[$middle]
	  : ($values[ $middle - 1 ] + $values[$middle]) / 2;
}

1;
