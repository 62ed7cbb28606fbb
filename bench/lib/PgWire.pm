# PgWire.pm
#		A connection to a PostgreSQL server, in Perl without any module that Perl
#		does not bring: what the measuring programs need to time single queries.
#
#		Speaks the simple query protocol over TCP to 127.0.0.1, with cleartext
#		passwords (PGPASSWORD), as the servers of a run want it.  Every error of
#		the server and of the network dies with a message.

package PgWire;

use strict;
use warnings;

use IO::Socket::INET ();
use Socket qw(IPPROTO_TCP TCP_NODELAY);

# PgWire->connect($port, $dbname): a session as the user PGUSER.
sub connect
{
	my ($class, $port, $dbname) = @_;
	my $socket = IO::Socket::INET->new(
		PeerAddr => '127.0.0.1',
		PeerPort => $port,
		Proto => 'tcp') or die "cannot connect to port $port: $@\n";

	setsockopt($socket, IPPROTO_TCP, TCP_NODELAY, 1)
	  or die "setsockopt: $!\n";
	binmode $socket;
	my $self = bless { socket => $socket, buffer => '' }, $class;
	my $parameters = join("\0",
		user => $ENV{PGUSER},
		database => $dbname,
		application_name => 'bench') . "\0\0";
	$self->_write(pack('NN', length($parameters) + 8, 196608) . $parameters);
	$self->_until_ready;
	return $self;
}

# $session->query($sql): its rows, each a reference to an array of texts.
sub query
{
	my ($self, $sql) = @_;

	$self->_write('Q' . pack('N', length($sql) + 5) . "$sql\0");
	return $self->_until_ready;
}

sub _write
{
	my ($self, $bytes) = @_;

	while (length $bytes)
	{
		my $written = syswrite $self->{socket}, $bytes;
		die "the connection is gone: $!\n" unless $written;
		substr $bytes, 0, $written, '';
	}
	return;
}

# The next message: its type and its body.
sub _message
{
	my ($self) = @_;

	while (1)
	{
		if (length $self->{buffer} >= 5)
		{
			my ($type, $length) = unpack 'aN', $self->{buffer};
			if (length $self->{buffer} > $length)
			{
				my $body = substr $self->{buffer}, 5, $length - 4;
				substr $self->{buffer}, 0, $length + 1, '';
				return ($type, $body);
			}
		}
		sysread($self->{socket}, $self->{buffer}, 65536, length $self->{buffer})
		  or die "the server has closed the connection\n";
	}
}

sub _until_ready
{
	my ($self) = @_;
	my (@rows, $error);

	while (1)
	{
		my ($type, $body) = $self->_message;
		if ($type eq 'D')
		{
			push @rows, _row($body);
		}
		elsif ($type eq 'E')
		{
			my %field = map { /^(.)(.*)/s } split /\0/, $body;
			$error = "$field{S} $field{C}: $field{M}\n";
			die $error if $field{S} =~ /FATAL|PANIC/;
		}
		elsif ($type eq 'R')
		{
			$self->_authenticate(unpack 'N', $body);
		}
		elsif ($type eq 'Z')
		{
			die $error if defined $error;
			return \@rows;
		}
	}
}

sub _authenticate
{
	my ($self, $how) = @_;

	return if $how == 0;
	die "the server asks for authentication $how\n" if $how != 3;
	my $password = $ENV{PGPASSWORD} . "\0";
	$self->_write('p' . pack('N', length($password) + 4) . $password);
	return;
}

sub _row
{
	my ($body) = @_;
	my ($count, $at) = (unpack('n', $body), 2);
	my @values;

	foreach (1 .. $count)
	{
		my $length = unpack 'l>', substr $body, $at, 4;
		push @values, $length < 0 ? undef : substr $body, $at + 4, $length;
		$at += 4 + ($length < 0 ? 0 : $length);
	}
	return \@values;
}

1;
