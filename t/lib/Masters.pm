# Masters.pm
#		Two masters in sync mode under fire: nodes that are killed, connections that
#		are cut, COMMITs and answers that are lost; and what holds afterwards, whatever
#		the clients did.
#
# NOTES
#		All writers are replicated synchronously, and none goes on without the peer
#		(on_unreachable = 'error').  So what comes late meets rows that it does not
#		expect only where it changes nothing: no replay asks for the pair's rule, and
#		none is refused.

package Masters;

use strict;
use warnings;

use FaultProxy;
use MmreplCluster;
use Test::More;
use Time::HiRes ();

# Two nodes, each with a fault proxy before it; @conf are more lines of both nodes'
# configurations.
sub start
{
	my (@conf) = @_;
	my ($alpha, $beta) = MmreplCluster->new_pair(
		conf => join("\n",
			'max_connections = 120',
			'restart_after_crash = on',
			'deadlock_timeout = 100ms',
			q{mmrepl.retry_min_delay = '20ms'},
			q{mmrepl.retry_max_delay = '200ms'},
			'max_prepared_transactions = 60',
			q{mmrepl.recovery_interval = '1s'},
			q{mmrepl.sync_timeout = '5s'},
			@conf));

	$_->{proxy} = FaultProxy->new(port => $_->port) foreach ($alpha, $beta);
	foreach ([ $alpha, $beta ], [ $beta, $alpha ])
	{
		my ($node, $peer) = @$_;

		$node->{peer} = $peer;
		$node->safe_psql('postgres',
			sprintf(q{ALTER SERVER %s OPTIONS (SET port '%d')},
				$peer->name, $peer->{proxy}->port));
	}
	return ($alpha, $beta);
}

# One blow; what it stops is brought back by heal().
sub strike
{
	my ($one, $faults) = @_;
	my $fault = $faults->[ rand @$faults ];

	if ($fault eq 'immediate')
	{
		$one->stop('immediate');
	}
	elsif ($fault eq 'fast')
	{
		$one->stop('fast');
	}
	elsif ($fault eq 'kill')
	{
		my ($ret, $pid) = $one->psql(
			'postgres', q{SELECT pid FROM pg_stat_activity
						  WHERE backend_type = 'client backend'
						  AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1});
		kill 'KILL', $pid if $ret == 0 && $pid =~ /^\d+$/;
	}
	elsif ($fault eq 'cut')
	{
		# the sessions of the other node's writers, in whatever they are doing
		$one->psql('postgres',
			q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			  WHERE client_addr IS NOT NULL});
	}
	elsif ($fault eq 'close')
	{
		$one->{closed} = 1;
		$one->close_to_peers;
		Time::HiRes::sleep(rand(0.5));
	}
	elsif ($fault eq 'reset')
	{
		$one->{proxy}->reset;
	}
	elsif ($fault eq 'lost answer' || $fault eq 'lost commit')
	{
		# of the next few COMMITs, one a connection
		$one->{proxy}->rule(
			action => 'reset',
			from => 'client',
			pattern => 'COMMIT',
			when => $fault eq 'lost answer' ? 'after' : 'before',
			times => 4);
		Time::HiRes::sleep(0.3);
	}
	elsif ($fault eq 'stall')
	{
		$one->{proxy}->hold;
		Time::HiRes::sleep(rand(1));
		$one->{proxy}->release;
	}
	elsif ($fault eq 'black hole')
	{
		$one->{proxy}->new_connections('black hole');
		$one->{proxy}->reset;
		Time::HiRes::sleep(rand(1));
	}
	elsif ($fault eq 'late')
	{
		# COMMITs are lost, and what they left in doubt comes after a while
		$one->{peer}->psql('postgres', sprintf q{SELECT mmrepl.pause('%s')}, $one->name);
		$one->{peer}->{paused} = 1;
		$one->{proxy}->rule(
			action => 'reset',
			from => 'client',
			pattern => 'COMMIT',
			when => 'before',
			times => 4);
		Time::HiRes::sleep(0.2 + rand(0.3));
	}
	else
	{
		die "unknown fault $fault";
	}
	return $fault;
}

sub heal
{
	my ($node) = @_;

	$node->{proxy}->clear;
	$node->{proxy}->new_connections('pass');
	$node->start unless defined $node->{_pid};
	insist(
		sub {
			$node->safe_psql('postgres', 'SELECT true');
			$node->open_to_peers if $node->{closed};
			$node->{closed} = 0;
			$node->safe_psql('postgres', sprintf q{SELECT mmrepl.resume('%s')}, $node->{peer}->name)
			  if $node->{paused};
			$node->{paused} = 0;
		});
	return;
}

# A transaction that the peer refuses, as text; an empty string if there is none.
sub refused
{
	my ($node) = @_;
	my ($ret, $out) = $node->psql('postgres',
		'SELECT last_error FROM mmrepl.pg_stat_mmrepl WHERE blocked_ticket IS NOT NULL');

	return $ret == 0 ? $out : '';
}

# For so many seconds one of the nodes is struck, and all are healed; $rest is the longest
# time, in seconds, until the next blow.
sub storm
{
	my ($seconds, $faults, $rest, @nodes) = @_;
	my $until = Time::HiRes::time() + $seconds;
	my %blows;

	while (Time::HiRes::time() < $until)
	{
		my $one = $nodes[ rand @nodes ];

		Time::HiRes::sleep($rest * (0.3 + rand(0.7)));
		# A server that is just starting anew does not let it happen.
		eval { $blows{ strike($one, $faults) }++; 1 } or note "blow: $@";
		Time::HiRes::sleep(rand(0.3));
		foreach my $node ($one, $one->{peer})
		{
			heal($node);
			$node->{refused} ||= refused($node);
		}
	}
	note 'blows: ' . join(', ', map { "$_ $blows{$_}" } sort keys %blows);
	return;
}

# The clients are gone: everything comes to its end.
sub settle
{
	my (@nodes) = @_;

	heal($_) foreach (@nodes);
	foreach my $node (@nodes)
	{
		$node->{refused} ||= refused($node);
		is($node->{refused}, '', 'no transaction of ' . $node->name . ' was refused');
		$node->safe_psql('postgres', sprintf q{SELECT mmrepl.retry_now('%s')}, $node->{peer}->name);
	}
	foreach my $node (@nodes)
	{
		$node->wait_caught_up($node->{peer}->name);
		$node->poll_ok(
			q{SELECT NOT EXISTS (SELECT FROM mmrepl.in_doubt)
			  AND NOT EXISTS (SELECT FROM pg_prepared_xacts)},
			'nothing is in doubt or prepared on ' . $node->name);
	}
	return;
}

# What was acknowledged to these clients, by its tokens; says what they met with.
sub acked
{
	my (@reports) = @_;
	my (%acked, %errors);

	foreach my $report (@reports)
	{
		$acked{$_} = 1 foreach @{ $report->{acked} };
		$errors{ substr $_, 0, 5 } += $report->{errors}->{$_}
		  foreach keys %{ $report->{errors} };
	}
	note scalar(keys %acked) . ' transactions; errors: '
	  . join(', ', map { "$_ $errors{$_}" } sort keys %errors);
	return %acked;
}

# The nodes agree about the tables, and no rule had to decide.
sub judge
{
	my ($alpha, $beta, @tables) = @_;

	$alpha->same_rows($beta, $_) foreach (@tables);
	foreach my $node ($alpha, $beta)
	{
		is( $node->safe_psql('postgres',
				'SELECT coalesce(sum(conflicts), 0) FROM mmrepl.progress'),
			'0',
			$node->name . ': no replay was in conflict');
	}
	return;
}

sub end
{
	my (@nodes) = @_;

	foreach my $node (@nodes)
	{
		ok(!$node->log_contains(qr/PANIC|TRAP:/),
			'no crash of its own in the log of ' . $node->name);
		$node->stop('fast');
	}
	return;
}

1;
