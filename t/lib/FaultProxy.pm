# FaultProxy.pm
#		A TCP proxy that knows where a PostgreSQL message begins and ends, and
#		what to do to it.
#
# NOTES
#		The proxy is a child process with one loop around select().  The test
#		speaks with it over a socket pair, one request and one answer at a
#		time; when that is closed, because the test has ended in whatever way,
#		the proxy ends too.  It keeps none of the test's other files open.

=pod

=head1 NAME

FaultProxy - a faulty network between two PostgreSQL nodes

=head1 SYNOPSIS

  use FaultProxy;

  my $proxy = FaultProxy->new(port => $beta->port);
  $alpha->safe_psql('postgres', sprintf
	q{ALTER SERVER beta OPTIONS (SET port '%d')}, $proxy->port);

  # The connection is reset when the third Parse message is on its way.
  my $rule = $proxy->rule(action => 'reset', from => 'client', type => 'P', nth => 3);
  $proxy->wait_for($rule) or die;

  # The COMMIT arrives, its answer does not.
  $proxy->rule(action => 'hold', type => 'Q', pattern => '^COMMIT', when => 'after');

  $proxy->hold;                 # everything stands still
  $proxy->release;              # and goes on
  $proxy->new_connections('black hole');

  $proxy->reset_counters;
  ...
  is($proxy->round_trips, 2, 'one for the statement, one for the end');

=head1 WHAT IT SEES

Each direction is cut into messages.  C<from> is C<client> or C<server>.  The
C<type> is the message's type byte, except for what has none: C<startup>,
C<ssl>, C<gss>, C<cancel> (from the client) and C<answer> (the server's one byte
to ssl and gss).  When the server agrees to encryption, what follows is not
understood any more and goes through as C<raw>.

A I<round trip> is a message from the server that follows messages of the
client: the number of times that the client's turn ended and the server's came.

=head1 METHODS

=over

=cut

package FaultProxy;

use strict;
use warnings;

use Errno qw(EINTR);
use Fcntl qw(F_SETFD);
use File::Basename qw(dirname);
use IO::Socket::INET;
use POSIX ();
use Socket
  qw(AF_UNIX PF_UNSPEC SO_RCVBUF SOCK_STREAM SOL_SOCKET);
use Storable ();

use constant {
	AHEAD => 32 * 1024,    # bytes of a direction that are read ahead
	AHEAD_SLOW => 2048,    # the same of one that is throttled
	LOOK => 16 * 1024,     # bytes of a message that patterns see
	LOOK_SLOW => 1024,     # bytes that are waited for without patterns
	TICK => 0.02,          # seconds: how finely a throttled direction moves
};

our $timeout =
  defined $ENV{PG_TEST_TIMEOUT_DEFAULT} && $ENV{PG_TEST_TIMEOUT_DEFAULT} > 0
  ? $ENV{PG_TEST_TIMEOUT_DEFAULT}
  : 180;

=pod

=item FaultProxy->new(port => $port, %params)

Starts a proxy on 127.0.0.1 for the server at that port.  C<host> is the
server's address; C<buffer> makes the kernel's receive buffers that small, so
that a held or throttled direction is felt by the sender soon.

=cut

sub new
{
	my ($class, %params) = @_;
	my $self = bless { children => 0 }, $class;
	my $listen = _listen(0, $params{buffer});

	socketpair(my $ours, my $theirs, AF_UNIX, SOCK_STREAM, PF_UNSPEC)
	  or die "socketpair: $!";
	$self->{port} = $listen->sockport;
	$self->{owner} = $$;
	$self->{pid} = fork();
	die "fork: $!" unless defined $self->{pid};
	if ($self->{pid} == 0)
	{
		# A perl of its own has none of the test's files, handlers and END blocks.
		foreach my $handle ($listen, $theirs)
		{
			fcntl($handle, F_SETFD, 0) or POSIX::_exit(1);
		}
		exec($^X, '-I', dirname(__FILE__), '-MFaultProxy', '-e',
			'FaultProxy::Loop::serve(@ARGV)',
			fileno $listen, fileno $theirs, %params)
		  or POSIX::_exit(1);
	}
	close $theirs;
	close $listen;
	$self->{control} = $ours;
	return $self;
}

sub _listen
{
	my ($port, $buffer) = @_;
	my $socket = IO::Socket::INET->new(
		LocalAddr => '127.0.0.1',
		LocalPort => $port,
		Listen => 128,
		ReuseAddr => 1,
		Proto => 'tcp') or die "could not listen on port $port: $!";

	$socket->setsockopt(SOL_SOCKET, SO_RCVBUF, $buffer) if $buffer;
	$socket->blocking(0);
	return $socket;
}

# One request, one answer.
sub _ask
{
	my ($self, $command, @arguments) = @_;

	_put($self->{control}, [ $command, @arguments ]);
	my $answer = _get($self->{control});
	die "the proxy is gone\n" unless defined $answer;
	die "FaultProxy: $answer->{error}" if defined $answer->{error};
	return $answer->{value};
}

sub _put
{
	my ($handle, $value) = @_;
	my $bytes = Storable::nfreeze($value);

	$bytes = pack('N', length $bytes) . $bytes;
	while (length $bytes)
	{
		my $written = syswrite $handle, $bytes;
		next if !defined $written && $! == EINTR;
		die "control socket: $!" unless defined $written;
		substr($bytes, 0, $written, '');
	}
	return;
}

sub _get
{
	my ($handle) = @_;
	my $read = sub {
		my ($want) = @_;
		my $bytes = '';
		while (length $bytes < $want)
		{
			my $n = sysread $handle, $bytes, $want - length $bytes,
			  length $bytes;
			next if !defined $n && $! == EINTR;
			return unless $n;
		}
		return $bytes;
	};
	my $head = $read->(4);

	return unless defined $head;
	my $body = $read->(unpack 'N', $head);
	return defined $body ? Storable::thaw($body) : undef;
}

=pod

=item $proxy->port

Where clients connect to.

=item $proxy->stop

Closes everything and ends the proxy; also done when the object goes away.

=cut

sub port
{
	my ($self) = @_;
	return $self->{port};
}

sub stop
{
	my ($self) = @_;

	return unless $self->{control} && $self->{owner} == $$;
	close delete $self->{control};
	waitpid $self->{pid}, 0;
	return;
}

sub DESTROY
{
	my ($self) = @_;
	local ($?, $!, $@);
	$self->stop;
	return;
}

=pod

=item $proxy->new_connections($mode)

What becomes of those who connect from now on: C<pass>; C<black hole>: they are
accepted, and nothing is read or said; C<refuse>: nobody listens.

=cut

sub new_connections
{
	my ($self, $mode) = @_;
	return $self->_ask('new_connections', $mode);
}

=pod

=item $proxy->hold(%which), $proxy->kill(%which), $proxy->reset(%which), $proxy->half_open(%which), $proxy->delay($ms, %which), $proxy->throttle($bytes, %which)

Act on the connections that are there.

C<hold>: nothing is read or forwarded any more, from either side or from the
one that C<from> names, until release().  Ends of connections are not forwarded
either.  C<kill> closes both sides, C<reset> does it with an RST, C<half_open>
closes the server's side and leaves the client in the belief that all is well
(or the other way round with C<< side => 'client' >>).  C<delay> lets every
message wait for so many milliseconds, C<throttle> forwards so many bytes a
second; 0 takes either back.

C<only> and C<except> choose connections by a list of ids.  C<future =E<gt> 1>
makes hold, delay and throttle apply to later connections as well.

=cut

foreach my $action (qw(hold kill reset half_open))
{
	no strict 'refs';
	*{$action} = sub {
		my ($self, %which) = @_;
		return $self->_ask('act', { %which, action => $action });
	};
}

foreach my $action (qw(delay throttle))
{
	no strict 'refs';
	*{$action} = sub {
		my ($self, $amount, %which) = @_;
		return $self->_ask('act',
			{ %which, action => $action, amount => $amount });
	};
}

=pod

=item $proxy->release(%which)

Takes holds back; what was held arrives.

=cut

sub release
{
	my ($self, %which) = @_;
	return $self->_ask('act', { %which, action => 'release' });
}

=pod

=item $proxy->rule(%rule)

Lays down what is to happen to a message, and returns the rule's number.

  action    hold, kill, reset, half_open, delay, throttle, or count: do nothing
  from      client or server; default: either
  type      the message's type; default: any
  pattern   a regular expression that the message's bytes match
  nth       the how-manieth such message of all that connection (default 1)
  when      before (default) or after the message is forwarded
  amount    of delay or throttle
  hold      what hold stops: both (default), client or server
  side      of half_open
  times     how often the rule acts (default 1, 0: always)
  only, except    connections by id

With several connections each counts its own messages.

=cut

sub rule
{
	my ($self, %rule) = @_;
	return $self->_ask('rule', \%rule);
}

=pod

=item $proxy->wait_for($rule, $seconds)

Waits until the rule has acted, and returns the id of the connection, or false
when the time (by default the test's) is over.

=item $proxy->hits($rule)

How many messages have matched it, up to and beyond its C<nth>.

=item $proxy->clear

Forgets all rules; what they have done stays.

=cut

sub wait_for
{
	my ($self, $rule, $seconds) = @_;
	return $self->_ask('wait_for', $rule, $seconds || $timeout);
}

sub hits
{
	my ($self, $rule) = @_;
	return $self->_ask('hits', $rule);
}

sub clear
{
	my ($self) = @_;
	return $self->_ask('clear');
}

=pod

=item $proxy->connections

A list of hashes, oldest first: C<id>, C<user>, C<database>, C<backend_pid> (of
the server's session, once known), C<client> and C<server> (messages since the
counters were reset), C<round_trips>, C<trace> (the messages' types since then,
as C<E<gt>P> from the client and C<E<lt>Z> from the server), C<held>.

=item $proxy->reset_counters

=item $proxy->round_trips(%which), $proxy->messages(%which)

The sums over the connections since the counters were reset, including those
that are closed by now.

=cut

sub connections
{
	my ($self) = @_;
	return @{ $self->_ask('connections') };
}

sub reset_counters
{
	my ($self) = @_;
	return $self->_ask('reset_counters');
}

sub _sum
{
	my ($self, $what, %which) = @_;
	my $sum = 0;

	foreach my $connection (@{ $self->_ask('connections', 'all') })
	{
		next unless FaultProxy::Loop::meant(\%which, $connection->{id});
		$sum += $connection->{$_} foreach @$what;
	}
	return $sum;
}

sub round_trips
{
	my ($self, %which) = @_;
	return $self->_sum(['round_trips'], %which);
}

sub messages
{
	my ($self, %which) = @_;
	return $self->_sum([ 'client', 'server' ], %which);
}

=pod

=back

=cut

###############################################################################
# The child's side.

package FaultProxy::Loop;

use strict;
use warnings;

use Errno qw(EAGAIN EINTR EWOULDBLOCK);
use IO::Handle;
use List::Util qw(any max min);
use Socket
  qw(IPPROTO_TCP SO_LINGER SO_RCVBUF SOL_SOCKET TCP_NODELAY inet_aton pack_sockaddr_in);
use Time::HiRes qw(time);

my %other = (client => 'server', server => 'client');

# Codes that stand where a startup message has its protocol version.
my %special = (80877102 => 'cancel', 80877103 => 'ssl', 80877104 => 'gss');

# The whole life of the proxy's process.
sub serve
{
	my ($listen, $control, %params) = @_;
	my @sockets = (
		IO::Socket::INET->new_from_fd($listen, 'r+'),
		IO::Handle->new_from_fd($control, 'r+'));

	open STDIN, '<', '/dev/null' or die "/dev/null: $!";
	open STDOUT, '>', '/dev/null' or die "/dev/null: $!";
	$SIG{PIPE} = 'IGNORE';
	$SIG{$_} = 'DEFAULT' foreach (qw(ALRM INT TERM HUP));
	eval { FaultProxy::Loop->new(@sockets, %params)->run; 1 }
	  or print STDERR "# FaultProxy: $@";
	return;
}

sub new
{
	my ($class, $listen, $control, %params) = @_;

	return bless {
		listen => $listen,
		control => $control,
		port => $listen->sockport,
		buffer => $params{buffer},
		target => pack_sockaddr_in(
			$params{port}, inet_aton($params{host} || '127.0.0.1')),
		mode => 'pass',
		future => {},
		last_id => 0,
		open => {},
		all => [],
		rules => [],
		waiters => [],
	}, $class;
}

# Whether a choice of connections includes this one.
sub meant
{
	my ($which, $id) = @_;

	return 0 if $which->{only} && !any { $_ == $id } @{ $which->{only} };
	return 0 if $which->{except} && any { $_ == $id } @{ $which->{except} };
	return 1;
}

sub run
{
	my ($self) = @_;

	for (;;)
	{
		my ($read, $write) = ('', '');
		my $due = $self->interests(\$read, \$write);
		my $now = time;
		my $wait = defined $due ? max(0, $due - $now) : undef;

		if (select($read, $write, undef, $wait) < 0)
		{
			next if $! == EINTR;
			die "select: $!";
		}
		return if vec($read, fileno $self->{control}, 1) && !$self->obey;
		$self->admit if $self->{listen} && vec($read, fileno $self->{listen}, 1);
		foreach my $connection (values %{ $self->{open} })
		{
			foreach my $from ('client', 'server')
			{
				my $socket = $connection->{socket}{$from} or next;
				$self->take($connection, $from)
				  if vec($read, fileno $socket, 1);
			}
			$self->move($connection, $_) foreach ('client', 'server');
		}
		$self->expire;
	}
	return;
}

# What to wait for; returns when something is due by itself.
sub interests
{
	my ($self, $read, $write) = @_;
	my @due = map { $_->{until} } @{ $self->{waiters} };

	vec($$read, fileno $self->{control}, 1) = 1;
	vec($$read, fileno $self->{listen}, 1) = 1 if $self->{listen};
	foreach my $connection (values %{ $self->{open} })
	{
		foreach my $from ('client', 'server')
		{
			my $way = $connection->{way}{$from};
			my $source = $connection->{socket}{$from};
			my $sink = $connection->{socket}{ $other{$from} };

			next if $way->{held};
			vec($$read, fileno $source, 1) = 1
			  if $source
			  && !$way->{ended}
			  && length($way->{in}) + $way->{out_bytes} < $self->ahead($way);
			next unless $sink && @{ $way->{out} };
			my $when = max($way->{out}[0][0], $way->{next_write});
			if   ($when > time) { push @due, $when }
			else                { vec($$write, fileno $sink, 1) = 1 }
		}
	}
	return @due ? min(@due) : undef;
}

# How much of a direction may be read ahead: what is throttled fills up behind us.
sub ahead
{
	my ($self, $way) = @_;
	return $way->{rate} > 0 && $self->look < FaultProxy::AHEAD_SLOW
	  ? FaultProxy::AHEAD_SLOW
	  : FaultProxy::AHEAD;
}

# How much of a message has to be there before it is judged.
sub look
{
	my ($self) = @_;
	return (any { $_->{active} && $_->{regexp} } @{ $self->{rules} })
	  ? FaultProxy::LOOK
	  : FaultProxy::LOOK_SLOW;
}

# ---- requests ----

# Answer one request of the test; false when the test is gone.
sub obey
{
	my ($self) = @_;
	my $request = FaultProxy::_get($self->{control}) or return 0;
	my ($command, @arguments) = @$request;
	my $method = "on_$command";
	my $value = eval { $self->$method(@arguments) };
	my $error = $@;

	return 1 if !$error && $command eq 'wait_for';    # answered when it is time
	$self->answer($error ? { error => $error } : { value => $value });
	return 1;
}

sub answer
{
	my ($self, $answer) = @_;
	FaultProxy::_put($self->{control}, $answer);
	return;
}

sub on_new_connections
{
	my ($self, $mode) = @_;

	die "unknown mode \"$mode\"\n"
	  unless $mode =~ /^(?:pass|black hole|refuse)$/;
	if ($mode eq 'refuse')
	{
		close delete $self->{listen} if $self->{listen};
	}
	elsif (!$self->{listen})
	{
		$self->{listen} =
		  FaultProxy::_listen($self->{port}, $self->{buffer});
	}
	$self->{mode} = $mode;
	return;
}

sub on_act
{
	my ($self, $what) = @_;
	my $acted = 0;

	die "unknown direction\n"
	  if $what->{from} && !$other{ $what->{from} };
	foreach my $connection (sort { $a->{id} <=> $b->{id} }
		values %{ $self->{open} })
	{
		next unless meant($what, $connection->{id});
		$self->act($connection,
			{ %$what, hold => $what->{from} || 'both' });
		$acted++;
	}
	$self->{future}{ $what->{action} } =
	  { %$what, hold => $what->{from} || 'both' }
	  if $what->{future};
	delete $self->{future}{hold} if $what->{action} eq 'release';
	return $acted;
}

sub on_rule
{
	my ($self, $rule) = @_;

	foreach my $key (keys %$rule)
	{
		die "unknown part of a rule: $key\n"
		  unless $key =~
		  /^(?:action|from|type|pattern|nth|when|amount|hold|side|times|only|except)$/;
	}
	die "unknown action\n"
	  unless $rule->{action} =~
	  /^(?:hold|kill|reset|half_open|delay|throttle|count)$/;
	my $number = @{ $self->{rules} };
	push @{ $self->{rules} },
	  {
		nth => 1,
		when => 'before',
		hold => 'both',
		times => 1,
		%$rule,
		regexp => defined $rule->{pattern} ? qr/$rule->{pattern}/s : undef,
		number => $number,
		seen => {},
		hits => 0,
		acted => 0,
		active => 1,
	  };
	return $number;
}

sub on_clear
{
	my ($self) = @_;
	$_->{active} = 0 foreach @{ $self->{rules} };
	return;
}

sub on_hits
{
	my ($self, $number) = @_;
	return $self->{rules}[$number]{hits};
}

sub on_wait_for
{
	my ($self, $number, $seconds) = @_;

	die "no such rule\n" unless $self->{rules}[$number];
	push @{ $self->{waiters} },
	  { rule => $self->{rules}[$number], until => time + $seconds };
	return;
}

# Answer those who wait for a rule that has acted, or have waited long enough.
sub expire
{
	my ($self) = @_;
	my @left;

	foreach my $waiter (@{ $self->{waiters} })
	{
		if ($waiter->{rule}{acted})
		{
			$self->answer({ value => $waiter->{rule}{by} });
		}
		elsif ($waiter->{until} <= time)
		{
			$self->answer({ value => 0 });
		}
		else
		{
			push @left, $waiter;
		}
	}
	$self->{waiters} = \@left;
	return;
}

sub on_connections
{
	my ($self, $all) = @_;

	return [
		map {
			my $connection = $_;
			+{
				(   map { $_ => $connection->{$_} }
					  qw(id user database backend_pid client server round_trips)
				),
				trace => join(' ', @{ $connection->{trace} }),
				held =>
				  (grep { $connection->{way}{$_}{held} } keys %other) ? 1 : 0,
			}
		  }
		  grep { $all || $self->{open}{ $_->{id} } } @{ $self->{all} }
	];
}

sub on_reset_counters
{
	my ($self) = @_;

	@{ $self->{all} } = grep { $self->{open}{ $_->{id} } } @{ $self->{all} };
	foreach my $connection (@{ $self->{all} })
	{
		@$connection{qw(client server round_trips asked)} = (0, 0, 0, 0);
		$connection->{trace} = [];
	}
	return;
}

# ---- connections ----

sub admit
{
	my ($self) = @_;

	while (my $client = $self->{listen}->accept)
	{
		my $id = ++$self->{last_id};
		my $connection = {
			id => $id,
			socket => { client => $client },
			way => { map { $_ => new_way() } keys %other },
			state => 'startup',
			client => 0,
			server => 0,
			round_trips => 0,
			asked => 0,
			trace => [],
		};

		push @{ $self->{all} }, $connection;
		$self->{open}{$id} = $connection;
		$client->blocking(0);
		$client->setsockopt(IPPROTO_TCP, TCP_NODELAY, 1);
		if ($self->{mode} eq 'black hole')
		{
			$_->{held} = 1 foreach values %{ $connection->{way} };
			next;
		}
		$self->reach_server($connection) or next;
		foreach my $future (values %{ $self->{future} })
		{
			$self->act($connection, $future) if meant($future, $id);
		}
	}
	return;
}

# One direction of a connection.
sub new_way
{
	return {
		in => '',          # read and not yet understood
		out => [],         # [when it may go, bytes]
		out_bytes => 0,
		through => 0,      # bytes of a message that has begun
		ended => 0,        # the source has closed its side
		held => 0,
		delay => 0,
		rate => 0,
		next_write => 0,
	};
}

# Connect to the server; who cannot be reached refuses the client.
sub reach_server
{
	my ($self, $connection) = @_;
	my $server = IO::Socket::INET->new(Proto => 'tcp');

	$server->setsockopt(SOL_SOCKET, SO_RCVBUF, $self->{buffer})
	  if $self->{buffer};
	if (!connect($server, $self->{target}))
	{
		$self->finish($connection, 1);
		return 0;
	}
	$server->blocking(0);
	$server->setsockopt(IPPROTO_TCP, TCP_NODELAY, 1);
	$connection->{socket}{server} = $server;
	return 1;
}

# Close both sides.
sub finish
{
	my ($self, $connection, $with_reset) = @_;

	$self->close_side($connection, $_, $with_reset) foreach keys %other;
	delete $self->{open}{ $connection->{id} };
	return;
}

sub close_side
{
	my ($self, $connection, $side, $with_reset) = @_;
	my $socket = delete $connection->{socket}{$side} or return;

	$socket->setsockopt(SOL_SOCKET, SO_LINGER, pack('ii', 1, 0))
	  if $with_reset;
	close $socket;
	return;
}

sub act
{
	my ($self, $connection, $what) = @_;
	my $action = $what->{action};
	my $side = $what->{side} || 'server';
	my @ways =
	  map { $connection->{way}{$_} }
	  grep { ($what->{hold} || 'both') eq 'both' || $what->{hold} eq $_ }
	  keys %other;

	if    ($action eq 'hold')     { $_->{held} = 1 foreach @ways }
	elsif ($action eq 'release')  { $_->{held} = 0 foreach @ways }
	elsif ($action eq 'kill')     { $self->finish($connection, 0) }
	elsif ($action eq 'reset')    { $self->finish($connection, 1) }
	elsif ($action eq 'delay')    { $_->{delay} = $what->{amount} / 1000 foreach @ways }
	elsif ($action eq 'throttle') { $_->{rate} = $what->{amount} foreach @ways }
	elsif ($action eq 'half_open')
	{
		$_->{held} = 1 foreach values %{ $connection->{way} };
		$self->close_side($connection, $side, 0);
	}
	return;
}

# ---- bytes ----

# Read what has come from one side and cut it into messages.
sub take
{
	my ($self, $connection, $from) = @_;
	my $way = $connection->{way}{$from};
	my $n = sysread $connection->{socket}{$from}, $way->{in},
	  $self->ahead($way), length $way->{in};

	return if !defined $n && ($! == EAGAIN || $! == EWOULDBLOCK || $! == EINTR);
	$way->{ended} = 1 unless $n;
	return;
}

# Forward one direction as far as it goes.
sub move
{
	my ($self, $connection, $from) = @_;
	my $way = $connection->{way}{$from};

	while (1)
	{
		my $open = $self->{open}{ $connection->{id} };
		return if !$open || $way->{held};
		$self->write_out($connection, $from);
		last unless $self->advance($connection, $from);
	}
	if (   $way->{ended}
		&& !$way->{held}
		&& !@{ $way->{out} }
		&& $self->{open}{ $connection->{id} })
	{
		# Half a connection is of no use to this protocol.
		$self->finish($connection, 0);
	}
	return;
}

# Understand one more message, or a piece of one; false when that needs more bytes.
sub advance
{
	my ($self, $connection, $from) = @_;
	my $way = $connection->{way}{$from};
	my ($type, $length);

	if ($way->{through} > 0)
	{
		return 0 unless length $way->{in};
		my $piece = substr $way->{in}, 0, $way->{through}, '';
		$way->{through} -= length $piece;
		enqueue($way, $piece);
		return 1;
	}
	return 0 unless length $way->{in};
	($type, $length) = head($connection, $from);
	return 0 unless defined $type;

	# What rules look at has to be there, or as much of it as they look at.
	my $need = min($length, $self->look);
	return 0 if length $way->{in} < $need && !$way->{ended};
	my $message = substr $way->{in}, 0, $length;
	return 0 if $self->judge($connection, $from, $type, $message, 'before');
	substr $way->{in}, 0, length $message, '';
	$way->{through} = $length - length $message;
	enqueue($way, $message);
	count($connection, $from, $type, $message);
	$self->write_out($connection, $from);
	$self->judge($connection, $from, $type, $message, 'after');
	return 1;
}

# Type and length of the message that begins the buffer; nothing: not there yet.
sub head
{
	my ($connection, $from) = @_;
	my $in = $connection->{way}{$from}{in};

	return ('raw', length $in) if $connection->{state} eq 'raw';
	if ($from eq 'server' && $connection->{state} eq 'answer')
	{
		return ('answer', 1);
	}
	if ($from eq 'client' && $connection->{state} =~ /^(?:startup|answer)$/)
	{
		return if length $in < 8;
		my ($length, $code) = unpack 'NN', $in;
		return ($special{$code} || 'startup', $length);
	}
	return if length $in < 5;
	my ($type, $length) = unpack 'aN', $in;
	return ($type, $length + 1);
}

# A message goes its way: what it tells about the connection, and the counters.
sub count
{
	my ($connection, $from, $type, $message) = @_;

	$connection->{$from}++;
	push @{ $connection->{trace} }, ($from eq 'client' ? '>' : '<') . $type
	  if @{ $connection->{trace} } < 10000;
	if ($from eq 'client')
	{
		$connection->{asked} = 1;
	}
	elsif ($connection->{asked})
	{
		$connection->{asked} = 0;
		$connection->{round_trips}++;
	}

	if ($type eq 'startup')
	{
		my %parameters = unpack '(Z* Z*)*', substr($message, 8, -1);
		$connection->{user} = $parameters{user};
		$connection->{database} = $parameters{database};
		$connection->{state} = 'messages';
	}
	elsif ($type eq 'ssl' || $type eq 'gss')
	{
		$connection->{state} = 'answer';
	}
	elsif ($type eq 'cancel')
	{
		$connection->{state} = 'raw';
	}
	elsif ($type eq 'answer')
	{
		$connection->{state} = $message eq 'N' ? 'startup' : 'raw';
	}
	elsif ($type eq 'K' && $from eq 'server')
	{
		$connection->{backend_pid} = unpack 'x5N', $message;
	}
	return;
}

# Apply the rules to a message; true when it cannot go on now.
sub judge
{
	my ($self, $connection, $from, $type, $message, $when) = @_;
	my $id = $connection->{id};

	foreach my $rule (@{ $self->{rules} })
	{
		next unless $rule->{active} && $rule->{when} eq $when;
		next if $rule->{from} && $rule->{from} ne $from;
		next if defined $rule->{type} && $rule->{type} ne $type;
		next unless meant($rule, $id);
		next if $rule->{regexp} && $message !~ $rule->{regexp};
		next
		  if $when eq 'before'
		  && ($rule->{judged}{$id} || '') eq position($connection, $from);

		$rule->{judged}{$id} = position($connection, $from);
		$rule->{hits}++;
		next if ++$rule->{seen}{$id} < $rule->{nth};
		$rule->{acted}++;
		$rule->{by} = $id;
		$rule->{active} = 0
		  if $rule->{times} > 0 && $rule->{acted} >= $rule->{times};
		$self->act($connection, $rule);
		return 1
		  if !$self->{open}{$id} || $connection->{way}{$from}{held};
	}
	return 0;
}

# Which message of a direction is next: a held one is judged once.
sub position
{
	my ($connection, $from) = @_;
	my $way = $connection->{way}{$from};
	return "$from " . ($way->{passed} || 0);
}

sub enqueue
{
	my ($way, $bytes) = @_;

	push @{ $way->{out} }, [ $way->{delay} ? time + $way->{delay} : 0, $bytes ];
	$way->{out_bytes} += length $bytes;
	$way->{passed}++;
	return;
}

# Write what may go to the other side.
sub write_out
{
	my ($self, $connection, $from) = @_;
	my $way = $connection->{way}{$from};
	my $sink = $connection->{socket}{ $other{$from} } or return;

	while (@{ $way->{out} } && $way->{out}[0][0] <= time)
	{
		my $limit = length $way->{out}[0][1];

		if ($way->{rate} > 0)
		{
			return if $way->{next_write} > time;
			$limit = min($limit, max(1, int($way->{rate} * FaultProxy::TICK)));
		}
		my $n = syswrite $sink, $way->{out}[0][1], $limit;
		return
		  if !defined $n
		  && ($! == EAGAIN || $! == EWOULDBLOCK || $! == EINTR);
		if (!defined $n)
		{
			$self->finish($connection, 0);
			return;
		}
		substr $way->{out}[0][1], 0, $n, '';
		$way->{out_bytes} -= $n;
		shift @{ $way->{out} } unless length $way->{out}[0][1];
		$way->{next_write} = time + $n / $way->{rate} if $way->{rate} > 0;
	}
	return;
}

1;
