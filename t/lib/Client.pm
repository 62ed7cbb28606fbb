# Client.pm
#		A client in a process of its own: it runs one transaction after the other,
#		connects again when the server has gone, and reports which transactions
#		were acknowledged.
#
# NOTES
#		psql does the talking.  A transaction counts as acknowledged when the
#		command tag of its COMMIT has arrived: ROLLBACK, which answers the COMMIT
#		of a failed transaction, does not.

=pod

=head1 NAME

Client - a process that runs transactions and survives its server

=head1 SYNOPSIS

  my $client = Client->start($node, sub { my ($number) = @_; return ($token, $sql) });
  ...
  my $report = $client->finish;
  # $report->{acked}, {tried}, {errors}, {said}

=cut

package Client;

use strict;
use warnings;

use IPC::Open2 ();
use POSIX ();
use PostgreSQL::Test::Utils ();
use Time::HiRes ();

my $clients = 0;

=pod

=head1 METHODS

=over

=item Client->start($node, $next, %params)

Starts the client.  C<$next> is called in the child, with the number of the
transaction and what became of the one before: a reference to a hash with
C<acked> and C<state>, the SQLSTATE of its last error or an empty string.  It
returns a token, which has no white space in it, and SQL that begins and ends a
transaction.  C<seed> seeds the child's rand(), C<pause> is
the number of seconds between transactions.

=cut

sub start
{
	my ($class, $node, $next, %params) = @_;
	my $self = bless {
		stop => $node->basedir . "/client$clients.stop",
		report => $node->basedir . "/client$clients.report",
	}, $class;

	$clients++;
	unlink $self->{stop};
	$self->{pid} = fork;
	die "fork: $!" unless defined $self->{pid};
	return $self if $self->{pid};

	# The child leaves without the parent's END blocks, which stop the servers.
	eval {
		srand($params{seed}) if defined $params{seed};
		$self->work($node, $next, $params{pause} || 0);
		1;
	} or PostgreSQL::Test::Utils::append_to_file($self->{report}, "died $@\n");
	POSIX::_exit(0);
}

sub stopped
{
	my ($self) = @_;

	return -e $self->{stop} || getppid() == 1;
}

# In the child: until told to stop.
sub work
{
	my ($self, $node, $next, $pause) = @_;
	my $number = 0;
	my $last = { acked => 0, state => '' };
	my $port = $node->port;
	my $host = $node->host;

	open my $report, '>', $self->{report} or die "$self->{report}: $!";
	$SIG{PIPE} = 'IGNORE';
	until ($self->stopped)
	{
		my $pid = IPC::Open2::open2(my $out, my $in,
			"exec psql -XAt -h '$host' -p $port -d postgres"
			  . ' -v VERBOSITY=verbose -v ON_ERROR_STOP=0 2>&1');
		my $connected = 1;

		while ($connected && !$self->stopped)
		{
			my ($token, $sql) = $next->(++$number, $last);

			print $report "try $token\n";
			print $in "$sql\n\\echo end $token\n";
			$in->flush;
			$last = answer($out, $token, $report);
			$connected = $last->{connected};

			# Clients that fail again at once take the processor from the servers.
			Time::HiRes::sleep($last->{state} ? 0.02 + rand(0.05) : $pause);
		}
		close $in;
		close $out;
		waitpid $pid, 0;
		Time::HiRes::sleep(0.03) unless $connected;
	}
	close $report;
	return;
}

# Read the answers to one transaction.
sub answer
{
	my ($out, $token, $report) = @_;
	my %last = (acked => 0, state => '', connected => 0);

	while (my $line = <$out>)
	{
		if ($line eq "end $token\n")
		{
			$last{connected} = 1;
			last;
		}
		if ($line =~ /^COMMIT(?: PREPARED)?\n/)
		{
			print $report "ack $token\n";
			$last{acked} = 1;
		}
		elsif ($line =~ /(?:ERROR|FATAL|PANIC):\s+(\w{5}): (.*)/)
		{
			print $report "error $1 $2\n";
			$last{state} = $1 unless $1 eq '25P02';
		}
		elsif ($line =~ /(?:NOTICE|HINT):\s+(.*)/)
		{
			print $report "said $1\n";
		}
	}
	return \%last;
}

=pod

=item $client->finish

Lets the transaction end that is under way, and returns what became of all:
C<acked> and C<tried>, references to arrays of tokens, and C<errors> and C<said>,
references to hashes from SQLSTATE and message, or from the text of a NOTICE or
HINT, to their number.

=back

=cut

sub finish
{
	my ($self) = @_;
	my %report = (acked => [], tried => [], errors => {}, said => {});

	PostgreSQL::Test::Utils::append_to_file($self->{stop}, '');
	my $deadline = time + 2 * $PostgreSQL::Test::Utils::timeout_default;
	while (waitpid($self->{pid}, POSIX::WNOHANG()) == 0)
	{
		if (time > $deadline)
		{
			kill 'KILL', $self->{pid};
			waitpid $self->{pid}, 0;
			die 'a client did not come to its end';
		}
		Time::HiRes::sleep(0.02);
	}
	unlink $self->{stop};
	foreach my $line (
		split /\n/, PostgreSQL::Test::Utils::slurp_file($self->{report}))
	{
		my ($what, $text) = split / /, $line, 2;

		push @{ $report{acked} }, $text if $what eq 'ack';
		push @{ $report{tried} }, $text if $what eq 'try';
		$report{errors}->{$text}++ if $what eq 'error';
		$report{said}->{$text}++ if $what eq 'said';
		die "a client died: $text" if $what eq 'died';
	}
	return \%report;
}

1;
