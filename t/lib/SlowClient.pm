# SlowClient.pm
#		A client that does not read what the server says until it is asked to: then
#		the server's session waits for it as soon as the socket takes no more.

=pod

=head1 NAME

SlowClient - a client that keeps a session waiting in the middle of its output

=head1 SYNOPSIS

  my $client = SlowClient->new($node);
  $client->ok('BEGIN');
  $client->start($client->filler . '; COMMIT');   # whatever COMMIT says does not go out
  ... $client->is_stuck ...
  my ($text) = $client->finish;

=cut

package SlowClient;

use strict;
use warnings;

use IO::Socket::UNIX;
use PostgreSQL::Test::Utils ();
use Time::HiRes ();

=pod

=head1 METHODS

=over

=item SlowClient->new($node)

Connects through the node's Unix-domain socket.

=cut

sub new
{
	my ($class, $node, $dbname) = @_;
	my $path = $node->host . '/.s.PGSQL.' . $node->port;
	my $socket = IO::Socket::UNIX->new(Peer => $path) or die "$path: $!";
	my $self = bless { node => $node, socket => $socket, watch => $node->session }, $class;
	my $user = $ENV{PGUSER} || getpwuid($>);

	$self->write_out(pack 'N Z* Z* Z* Z* x', 196608, 'user', $user, 'database', $dbname || 'postgres');
	foreach my $message ($self->answer)
	{
		my ($type, $body) = @$message;
		die "no connection: $body" if $type eq 'E';
		($self->{pid}) = unpack 'N', $body if $type eq 'K';
	}
	return $self;
}

sub write_out
{
	my ($self, $body, $type) = @_;
	my $message = ($type // '') . pack('N', 4 + length $body) . $body;

	syswrite($self->{socket}, $message) == length $message or die "cannot send: $!";
	return;
}

sub read_in
{
	my ($self, $length) = @_;
	my $data = '';

	while (length $data < $length)
	{
		sysread($self->{socket}, $data, $length - length $data, length $data)
		  or die 'the server has closed the connection';
	}
	return $data;
}

# All messages up to the one that says that the server is ready.
sub answer
{
	my ($self) = @_;
	my @messages;

	do
	{
		my ($type, $length) = unpack 'a N', $self->read_in(5);
		push @messages, [ $type, $self->read_in($length - 4) ];
	} while ($messages[-1]->[0] !~ /[EZ]/ || ($messages[-1]->[0] eq 'E' && $self->{pid}));
	return @messages;
}

=pod

=item $client->start($sql), $client->finish

The first sends, the second reads: it returns the text of the notices and errors,
and the last command's tag.

=cut

sub start
{
	my ($self, $sql) = @_;
	$self->write_out("$sql\0", 'Q');
	$self->{sql} = $sql;
	return;
}

sub finish
{
	my ($self) = @_;
	my ($text, $tag) = ('', '');

	foreach my $message ($self->answer)
	{
		my ($type, $body) = @$message;
		$text .= join(' ', split /\0/, $body) . "\n" if $type =~ /[EN]/;
		($tag) = unpack 'Z*', $body if $type eq 'C';
	}
	return ($text, $tag);
}

=pod

=item $client->ok($sql)

Both; dies if there is an error or a notice.

=cut

sub ok
{
	my ($self, $sql) = @_;
	$self->start($sql);
	my ($text) = $self->finish;
	die "$sql: $text" if $text ne '';
	return;
}

=pod

=item $client->is_stuck

Waits until the session waits for the client to read, or for its next command;
returns whether it is the former.

=cut

sub is_stuck
{
	my ($self) = @_;
	my $until = time() + $PostgreSQL::Test::Utils::timeout_default;

	while (time() < $until)
	{
		my ($event, $state, $sql) = split /\|/, $self->{watch}->ok(
			'SELECT wait_event, state, query FROM pg_stat_activity WHERE pid = ' . $self->{pid}), 3;
		next if $sql ne $self->{sql}; # it has not begun
		return 1 if $event eq 'ClientWrite';
		return 0 if $event eq 'ClientRead' && $state ne 'active';
	}
	continue
	{
		Time::HiRes::usleep(5_000);
	}
	die 'the session does not wait for its client';
}

=pod

=item $client->filler

A query whose result leaves the socket full, and the server's buffer (8 kB, from
which it writes when that is full) neither full nor empty.  Found by trying.

=back

=cut

sub filler
{
	my ($self) = @_;
	my ($buffer, $fits, $sticks) = (8192, 0, 1024);

	# In the server's buffers: result that just fits into the socket.
	while ($sticks - $fits > 1)
	{
		my $middle = int(($fits + $sticks) / 2);

		$self->start(result($middle * $buffer - 128));
		if ($self->is_stuck) { $sticks = $middle }
		else { $fits = $middle }
		$self->finish;
	}
	return result($fits * $buffer + $buffer / 2);
}

# A query whose result takes about so many bytes on the wire, in rows that are small
# enough to go through the server's buffer.
sub result
{
	my ($bytes) = @_;
	return sprintf q{SELECT repeat('x', 100) FROM generate_series(1, %d)}, $bytes / 111;
}

sub pid { return $_[0]->{pid} }

sub quit
{
	my ($self) = @_;
	$self->{watch}->quit;
	close $self->{socket};
	return;
}

1;
