# MmreplCluster.pm
#		PostgreSQL::Test::Cluster for nodes that replicate with mmrepl_bgw.
#
# NOTES
#		Peers reach a node over TCP (127.0.0.1), the tests themselves over the
#		unix-domain socket.  That is why close_to_peers() can shut a node for
#		its peers without shutting out the test, and why peer_sessions() needs
#		no application_name to know them.
#
#		Nothing here sleeps: what has to be waited for is polled, or waited for
#		by mmrepl.wait_for_replay().

=pod

=head1 NAME

MmreplCluster - a PostgreSQL::Test::Cluster with mmrepl_bgw loaded

=head1 SYNOPSIS

  use FindBin;
  use lib "$FindBin::RealBin/lib";
  use MmreplCluster;

  my ($alpha, $beta) = MmreplCluster->new_pair;
  $alpha->create_table_on_both($beta, 'CREATE TABLE t (id int PRIMARY KEY)');
  $alpha->create_pair('t', 'beta', q{mode => 'sync'});
  $alpha->safe_psql('postgres', 'INSERT INTO t VALUES (1)');
  $alpha->wait_caught_up('beta');
  $alpha->same_rows($beta, 't');

=cut

package MmreplCluster;

use strict;
use warnings;

use parent 'PostgreSQL::Test::Cluster';

use Exporter 'import';
use PostgreSQL::Test::Utils ();
use Test::More;
use Time::HiRes ();

our @EXPORT = qw(section insist seed);
our $timeout = $PostgreSQL::Test::Utils::timeout_default;

=pod

=head1 FUNCTIONS

=over

=item section($name, $code)

A subtest that fails, rather than ends the file, when its code dies: one broken
feature does not hide the state of the others.  Exported.

=back

=cut

sub section
{
	my ($name, $code) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return subtest $name => sub {
		eval { $code->(); 1 } or fail("ran to its end: $@");
		done_testing();
	};
}

=pod

=over

=item insist($code)

Runs the code again until it does not die: what talks to a server that is
crashing or starting may fail, and psql with it.  Dies with the last error when
that takes too long.  Exported.

=back

=cut

sub insist
{
	my ($code) = @_;
	my $deadline = time + $timeout;

	until (eval { $code->(); 1 })
	{
		die $@ if time > $deadline;
		Time::HiRes::usleep(100_000);
	}
	return;
}

=pod

=over

=item seed($default)

Seeds rand() and returns the seed: the default, so that a test is the same each
time, or MMREPL_SEED, which may also be C<random>.  Prints it.  Exported.

=back

=cut

sub seed
{
	my ($default) = @_;
	my $seed = $ENV{MMREPL_SEED} || $default;

	$seed = int(rand(1 << 30)) if $seed eq 'random';
	diag("seed $seed; MMREPL_SEED=... takes another one, or a random one");
	srand($seed);
	return $seed;
}

=pod

=head1 NODES

=over

=item $node->init(%params)

As in the parent class.  The database is UTF8 with the C locale, the library
is preloaded, the node listens on 127.0.0.1 besides its socket, and statements
are not logged (pass log_statement in C<conf> to have them back).  C<conf> is
appended last.

=cut

sub init
{
	my ($self, %params) = @_;
	my $conf = delete $params{conf};

	$params{extra} =
	  [ '--encoding=UTF8', '--locale=C', @{ $params{extra} || [] } ];
	$self->SUPER::init(%params);

	$self->append_conf('postgresql.conf', <<"EOC");
shared_preload_libraries = 'mmrepl_bgw'
listen_addresses = '127.0.0.1'
max_connections = 50
max_worker_processes = 24
max_prepared_transactions = 10
log_min_messages = debug1
log_statement = none
mmrepl.retry_max_delay = '1s'
EOC
	$self->append_conf('postgresql.conf', $conf) if defined $conf;
	$self->set_hba(peers => 'trust', reload => 0);
	return;
}

=pod

=item MmreplCluster->create($name, %params)

A started node with the extension in C<dbname> (default postgres).

=cut

sub create
{
	my ($class, $name, %params) = @_;
	my $dbname = delete $params{dbname} || 'postgres';
	my $self = $class->new($name);

	$self->init(%params);
	$self->start;
	$self->install_extension($dbname);
	return $self;
}

=pod

=item $node->install_extension($dbname)

Creates the database if there is none, and the extension in it.

=cut

sub install_extension
{
	my ($self, $dbname) = @_;

	$self->safe_psql('postgres', qq{CREATE DATABASE "$dbname"})
	  if $self->safe_psql('postgres',
		"SELECT count(*) FROM pg_database WHERE datname = '$dbname'") == 0;
	$self->safe_psql($dbname, 'CREATE EXTENSION mmrepl_bgw');
	return;
}

=pod

=item MmreplCluster->new_pair(%params)

Two nodes, alpha and beta, with the extension, a server named after the other
node, and the superuser's mapping for it, in both directions.  C<conf> goes to
both nodes.

=cut

sub new_pair
{
	my ($class, %params) = @_;
	my ($alpha, $beta) =
	  map { $class->create($_, %params) } ('alpha', 'beta');

	$alpha->add_peer($beta);
	$beta->add_peer($alpha);
	return ($alpha, $beta);
}

=pod

=item $node->add_peer($peer, %params)

CREATE SERVER and CREATE USER MAPPING.  C<server> is the server's name (default
the peer's), C<dbname> where it is created, C<peer_dbname> the peer's database,
C<role> the local role of the mapping, C<options> more options of the server.

=cut

sub add_peer
{
	my ($self, $peer, %params) = @_;
	my $server = $params{server} || $peer->name;
	my $dbname = $params{dbname} || 'postgres';
	my $peer_dbname = $params{peer_dbname} || 'postgres';
	my $role = $params{role} || 'CURRENT_USER';
	my $more = $params{options} ? ", $params{options}" : '';
	my $port = $peer->port;
	my $user = $peer->safe_psql('postgres', 'SELECT current_user');

	$self->safe_psql(
		$dbname, qq{
		CREATE SERVER "$server" FOREIGN DATA WRAPPER mmrepl_fdw
		  OPTIONS (host '127.0.0.1', port '$port',
				   dbname '$peer_dbname'$more);
		CREATE USER MAPPING FOR $role SERVER "$server"
		  OPTIONS (user '$user');
	});
	return;
}

=pod

=item $node->create_table_on_both($peer, $ddl, $dbname)

Runs the same DDL on both nodes.

=cut

sub create_table_on_both
{
	my ($self, $peer, $ddl, $dbname) = @_;

	$_->safe_psql($dbname || 'postgres', $ddl) foreach ($self, $peer);
	return;
}

=pod

=item $node->create_pair($table, $server, $options, $dbname)

SELECT mmrepl.create_pair() with C<$options> in named notation.  Returns the
pair's id.

=cut

sub create_pair
{
	my ($self, $table, $server, $options, $dbname) = @_;
	my $more = defined $options ? ", $options" : '';

	return $self->safe_psql($dbname || 'postgres',
		"SELECT mmrepl.create_pair('$table', '$server'$more)");
}

=pod

=item $node->create_pair_on_both($peer, $table, $options)

The same pair on both nodes, which makes the table multi-master.

=cut

sub create_pair_on_both
{
	my ($self, $peer, $table, $options) = @_;

	$self->create_pair($table, $peer->name, $options);
	$peer->create_pair($table, $self->name, $options);
	return;
}

=pod

=back

=head1 WHO MAY CONNECT

=over

=item $node->set_hba(peers => $method, closed => $dbname)

Writes pg_hba.conf: the socket is open to everybody, TCP asks for C<$method>.
C<closed> names databases (comma-separated, or C<all>) that reject every peer.
Returns after the postmaster has read the file.

=cut

sub set_hba
{
	my ($self, %params) = @_;
	my $hba = $self->data_dir . '/pg_hba.conf';
	my $method = $params{peers} || $self->{mmrepl_hba_method} || 'trust';
	my $before;

	$self->{mmrepl_hba_method} = $method;
	$before = $self->safe_psql('postgres', 'SELECT clock_timestamp()')
	  if $params{reload};

	unlink $hba;
	$self->append_conf('pg_hba.conf', 'local all all trust');
	$self->append_conf('pg_hba.conf',
		"host $params{closed} all 127.0.0.1/32 reject")
	  if $params{closed};
	$self->append_conf('pg_hba.conf', "host all all 127.0.0.1/32 $method");
	return unless $params{reload};

	# A new session inherits the load time of the postmaster that forked it,
	# so it tells whether the next connection meets the new file.
	$self->reload;
	$self->poll_query_until('postgres',
		"SELECT pg_conf_load_time() > '$before'")
	  or die 'pg_hba.conf was not reloaded';
	return;
}

=pod

=item $node->close_to_peers($dbname)

Rejects new peers (of all databases if none is given) and breaks the
connections of those that are there.

=cut

sub close_to_peers
{
	my ($self, $dbname) = @_;

	$self->set_hba(closed => $dbname || 'all', reload => 1);
	$self->terminate_peers($dbname);
	return;
}

sub open_to_peers
{
	my ($self) = @_;

	$self->set_hba(reload => 1);
	return;
}

=pod

=item $node->peer_down($mode), $node->peer_up

Stops and starts the whole node.

=cut

sub peer_down
{
	my ($self, $mode) = @_;

	$self->stop($mode || 'fast');
	return;
}

sub peer_up
{
	my ($self) = @_;

	$self->start;
	return;
}

=pod

=item $node->peer_sessions($dbname)

The process ids of the sessions that came over TCP, as a list.

=cut

sub peer_sessions
{
	my ($self, $dbname) = @_;
	my $where = $dbname ? "AND datname = '$dbname'" : '';

	return split /\n/, $self->safe_psql(
		'postgres', qq{
		SELECT pid FROM pg_stat_activity
		WHERE client_addr IS NOT NULL $where ORDER BY backend_start
	});
}

=pod

=item $node->terminate_peers($dbname), $node->terminate(@pids)

Terminates sessions and returns when they are gone.

=cut

sub terminate_peers
{
	my ($self, $dbname) = @_;

	return $self->terminate($self->peer_sessions($dbname));
}

sub terminate
{
	my ($self, @pids) = @_;
	my $pids = join(',', @pids);

	return 0 unless @pids;
	$self->safe_psql('postgres',
		"SELECT pg_terminate_backend(p) FROM unnest('{$pids}'::int[]) p");
	$self->poll_query_until('postgres',
		"SELECT count(*) = 0 FROM pg_stat_activity WHERE pid IN ($pids)")
	  or die "sessions $pids did not end";
	return scalar @pids;
}

=pod

=back

=head1 REPLICATION

=over

=item $node->wait_caught_up($server, $dbname)

Passes (as a test) once everything committed here before is committed at the
server's peer.

=cut

sub wait_caught_up
{
	my ($self, $server, $dbname) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my ($ret, $out, $err) = $self->psql($dbname || 'postgres',
		"SELECT mmrepl.wait_for_replay('$server', '$timeout s')");
	my $done = $ret == 0 && $out eq 't';

	ok($done, $self->name . " has caught up with $server")
	  or diag("got: $out\nstderr: $err\n", $self->describe($server, $dbname));
	return $done;
}

=pod

=item $node->stat($server, $column, $dbname), $node->state($server, $dbname)

One column of mmrepl.pg_stat_mmrepl.

=cut

sub stat
{
	my ($self, $server, $column, $dbname) = @_;

	return $self->safe_psql(
		$dbname || 'postgres',
		"SELECT $column FROM mmrepl.pg_stat_mmrepl WHERE server = '$server'");
}

sub state
{
	my ($self, $server, $dbname) = @_;

	return $self->stat($server, 'state', $dbname);
}

=pod

=item $node->poll_state($server, $state, $dbname)

Passes (as a test) once the server's stream is in that state.

=cut

sub poll_state
{
	my ($self, $server, $state, $dbname) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok(
		$self->poll_query_until(
			$dbname || 'postgres',
			"SELECT state FROM mmrepl.pg_stat_mmrepl WHERE server = '$server'",
			$state),
		$self->name . " to $server: state is $state"
	) || diag($self->describe($server, $dbname));
}

=pod

=item $node->poll_ok($query, $name, $dbname)

Passes (as a test) once the query returns true.

=cut

sub poll_ok
{
	my ($self, $query, $name, $dbname) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok($self->poll_query_until($dbname || 'postgres', $query), $name);
}

=pod

=item $node->make_load($table), $node->load_until($server, $condition, $most)

The first makes a procedure C<load(count)>: so many transactions, each of which
inserts one row of about 100 bytes, with ids from 1000, into a table (id int, v
text).  The second calls it for 100 of them at a time, at the C<$most> so many
times, until a condition over the server's row in pg_stat_mmrepl holds; returns
whether it does.

=cut

sub make_load
{
	my ($self, $table) = @_;

	$self->safe_psql(
		'postgres', qq{
		CREATE SEQUENCE ids START 1000;
		CREATE PROCEDURE load(count int) LANGUAGE plpgsql AS \$\$
		BEGIN
			FOR i IN 1 .. count LOOP
				INSERT INTO $table VALUES (nextval('ids'), repeat('v', 60));
				COMMIT;
			END LOOP;
		END \$\$});
	return;
}

sub load_until
{
	my ($self, $server, $condition, $most) = @_;

	foreach (1 .. $most)
	{
		$self->safe_psql('postgres', 'CALL load(100)');
		return 1
		  if $self->safe_psql('postgres',
			"SELECT $condition FROM mmrepl.pg_stat_mmrepl WHERE server = '$server'") eq 't';
	}
	return 0;
}

=pod

=item $node->queued($server, $dbname)

The number of changes in mmrepl.sync_err_rec for that server.

=cut

sub queued
{
	my ($self, $server, $dbname) = @_;

	return $self->safe_psql(
		$dbname || 'postgres',
		"SELECT count(*) FROM mmrepl.sync_err_rec WHERE dst_server = '$server'"
	);
}

=pod

=item $node->describe($server, $dbname)

What an operator would look at, as text for diag().

=cut

sub describe
{
	my ($self, $server, $dbname) = @_;
	my ($ret, $out, $err) = $self->psql(
		$dbname || 'postgres', qq{
		\\x on
		\\t off
		SELECT * FROM mmrepl.pg_stat_mmrepl WHERE server = '$server';
		SELECT * FROM mmrepl.sync_err_rec WHERE dst_server = '$server'
		ORDER BY id LIMIT 5;
	}, on_error_stop => 0);

	return "$out\n$err";
}

=pod

=item $node->fingerprint($table, $dbname)

Row count and sum of row hashes, the 2013 article's comparison.

=cut

sub fingerprint
{
	my ($self, $table, $dbname) = @_;

	return $self->safe_psql($dbname || 'postgres',
		"SELECT count(*), sum(hashtext(t.*::text)) FROM $table t");
}

=pod

=item $node->same_rows($peer, $table, %params)

Passes (as a test) if the table has the same rows on both nodes.
C<peer_table>, C<dbname>, C<peer_dbname> and C<name> differ from the default
where given.

=cut

sub same_rows
{
	my ($self, $peer, $table, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $peer_table = $params{peer_table} || $table;

	return is(
		$peer->fingerprint($peer_table, $params{peer_dbname}),
		$self->fingerprint($table, $params{dbname}),
		$params{name} || "$table is the same on both sides");
}

=pod

=item $node->fails($dbname, $sql, %params)

Runs SQL that is expected to fail.  Returns psql's stderr with the SQLSTATE in
it, or an empty string when the SQL succeeded.

=cut

sub fails
{
	my ($self, $dbname, $sql, %params) = @_;
	my @extra =
	  ('-v', 'VERBOSITY=verbose', @{ delete $params{extra_params} || [] });
	my ($ret, $out, $err) =
	  $self->psql($dbname, $sql, extra_params => \@extra, %params);

	return $ret == 0 ? '' : $err;
}

=pod

=item $node->session($dbname, @psql_options)

A session that stays open; see below.

=back

=cut

sub session
{
	my ($self, $dbname, @options) = @_;
	my $psql = $self->background_psql(
		$dbname || 'postgres',
		on_error_stop => 0,
		extra_params => [ '-v', 'VERBOSITY=verbose', @options ]);

	$psql->set_query_timer_restart;
	return MmreplCluster::Session->new($psql);
}

=pod

=head1 SESSIONS

A thin layer over PostgreSQL::Test::BackgroundPsql that keeps the error text of
one statement apart from that of the next.

=over

=item $session->run($sql)

Returns (stdout, stderr).

=item $session->ok($sql)

Dies if the statement fails; returns stdout.

=item $session->start($sql)

Sends the statement without waiting for its end.

=item $session->finish

Waits for the statement that start() sent; returns (stdout, stderr, seconds
since start()).

=item $session->pid, $session->quit

=back

=cut

package MmreplCluster::Session;

sub new
{
	my ($class, $psql) = @_;
	my $self = bless { psql => $psql }, $class;

	$self->{pid} = $self->ok('SELECT pg_backend_pid()');
	return $self;
}

sub run
{
	my ($self, $sql) = @_;

	$self->{psql}->{stderr} = '';
	my $out = $self->{psql}->query($sql);
	my $err = $self->{psql}->{stderr};
	$self->{psql}->{stderr} = '';
	return ($out, $err);
}

sub ok
{
	my ($self, $sql) = @_;
	my ($out, $err) = $self->run($sql);

	die "statement failed: $sql\n$err"
	  if $err =~ /^(?:psql:[^\n]*)?(?:ERROR|FATAL|PANIC):/m;
	return $out;
}

sub start
{
	my ($self, $sql) = @_;

	$self->{psql}->{stderr} = '';
	$self->{started} = Time::HiRes::time();
	$self->{early} =
	  $self->{psql}
	  ->query_until(qr/statement sent/, "\\echo statement sent\n$sql;\n");
	$self->{early} =~ s/^statement sent\r?\n?//;
	return;
}

sub finish
{
	my ($self) = @_;
	my $out = $self->{early} . $self->{psql}->query('');
	my $err = $self->{psql}->{stderr};

	$self->{psql}->{stderr} = '';
	$self->{early} = '';
	return ($out, $err, Time::HiRes::time() - $self->{started});
}

sub pid
{
	my ($self) = @_;

	return $self->{pid};
}

sub quit
{
	my ($self) = @_;

	return $self->{psql}->quit;
}

1;
