# Life around replication: databases, servers, roles and extensions come, go and
# change their names, processes are short, the clock steps back.  Each has a clear
# effect, nothing is lost, and what can go on goes on by itself.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) =
  MmreplCluster->new_pair(conf => "mmrepl.ring_size = '64kB'");
my $item = 'CREATE TABLE item (id int PRIMARY KEY, v text)';

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

sub there
{
	return $beta->safe_psql('postgres', $_[0]);
}

sub synced
{
	my ($server) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->wait_caught_up($server || 'beta');
}

sub stat_ok
{
	my ($condition, $name, $server, $dbname) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$server ||= 'beta';
	return $alpha->poll_ok(
		"SELECT $condition FROM mmrepl.pg_stat_mmrepl WHERE server = '$server'",
		$name, $dbname) || diag($alpha->describe($server, $dbname));
}

$alpha->create_table_on_both($beta, $item);
$alpha->create_pair('item', 'beta');
here(q{INSERT INTO item SELECT g, 'start' FROM generate_series(1, 100) g});
synced();

###############################################################################

# What a node whose clock is an hour ahead has written: afterwards this node's
# own clock is an hour behind its tickets, as after a step back.
section 'the clock steps back an hour' => sub {
	my $ahead = q{(extract(epoch FROM clock_timestamp()) * 1e6)::bigint + 3600000000};

	$alpha->safe_psql(
		'postgres', qq{
		SELECT mmrepl.apply('\\x4d4d523100'::bytea
		  || int4send(pg_char_to_encoding('UTF8')) || uuid_send(gen_random_uuid())
		  || int4send(1) || int8send($ahead) || int8send(0) || int8send(0)
		  || int8send(0) || int4send(0))});
	here("UPDATE item SET v = 'ahead' WHERE id = $_") foreach (1 .. 5);
	synced();
	my $ticket = $alpha->stat('beta', 'last_ticket');
	is( here(
			qq{SELECT $ticket > ($ahead) - 600000000 FROM mmrepl.pg_stat_mmrepl}),
		't',
		'tickets go on from the later time');
	stat_ok(q{replay_lag >= '0' AND confirmed_ticket >= last_ticket},
		'nothing waits, and no lag is negative');
	$alpha->poll_ok("SELECT min(confirmed) >= $ticket FROM mmrepl.stream",
		'the position is written down');

	# The clock in shared memory is lost; the queue and the positions have it.
	$beta->peer_down('fast');
	here(q{UPDATE item SET v = 'queued' WHERE id = 6});
	$ticket = here('SELECT max(ticket) FROM mmrepl.sync_err_rec');
	$alpha->stop('immediate');
	$alpha->start;
	here(q{UPDATE item SET v = v || ' after' WHERE id = 6});
	is( here(
			qq{SELECT count(*), bool_and(ticket >= $ticket) FROM mmrepl.sync_err_rec}
		),
		'2|t',
		'after a crash tickets are still later');
	$beta->peer_up;
	synced();
	is(there('SELECT v FROM item WHERE id = 6'), 'queued after', 'the order is kept');
	$alpha->same_rows($beta, 'item');

	# Once all is delivered only the positions know.
	$ticket = $alpha->stat('beta', 'last_ticket');
	$alpha->poll_ok("SELECT min(confirmed) >= $ticket FROM mmrepl.stream",
		'the position is written down');
	$alpha->restart;
	here(q{UPDATE item SET v = 'restarted' WHERE id = 7});
	cmp_ok($alpha->stat('beta', 'last_ticket'), '>', $ticket, 'after a restart, too');
	synced();
	$alpha->same_rows($beta, 'item');
};

section 'several databases and servers at once, rings of 64 kB and 64 MB' => sub {
	foreach my $name ('one', 'two')
	{
		foreach my $node ($alpha, $beta)
		{
			$node->install_extension($name);
			$node->safe_psql($name, "$item; CREATE TABLE copy (id int PRIMARY KEY, v text)");
		}
		$alpha->add_peer($beta, dbname => $name, peer_dbname => $name);
		$alpha->create_pair('item', 'beta', undef, $name);
	}
	# Another way out of the first: into the second, on the same server.
	$alpha->add_peer($alpha, server => 'sister', dbname => 'one', peer_dbname => 'two');
	$alpha->create_pair('item', 'sister', q{remote_table => 'public.copy'}, 'one');

	foreach my $ring ('64kB', '64MB')
	{
		if ($ring ne '64kB')
		{
			$alpha->append_conf('postgresql.conf', "mmrepl.ring_size = '$ring'");
			$alpha->restart;
		}
		is(here('SHOW mmrepl.ring_size'), $ring, "ring_size = $ring");
		my %load;
		foreach my $name ('one', 'two')
		{
			$load{$name} = $alpha->session($name);
			# Some fit into the smallest ring, some do not.
			$load{$name}->start(
				qq{DO \$\$ BEGIN FOR i IN 1 .. 400 LOOP
					INSERT INTO item VALUES (i, repeat(i::text, CASE WHEN i % 20 = 0 THEN 30000 ELSE 20 END))
					  ON CONFLICT (id) DO UPDATE SET v = excluded.v || '$ring';
					COMMIT; END LOOP; END \$\$});
		}
		foreach my $name (sort keys %load)
		{
			my (undef, $err) = $load{$name}->finish;
			is($err, '', "$name: the load ends well");
			$load{$name}->quit;
			$alpha->wait_caught_up('beta', $name);
			$alpha->same_rows($beta, 'item', dbname => $name, peer_dbname => $name,
				name => "$name: the same rows");
		}
		$alpha->wait_caught_up('sister', 'one');
		$alpha->same_rows($alpha, 'item', dbname => 'one', peer_table => 'copy',
			peer_dbname => 'two', name => 'one and two: the same rows');
		$alpha->poll_state('beta', 'streaming', 'one');
	}
	is($alpha->safe_psql('two', 'SELECT count(*) FROM mmrepl.pg_stat_mmrepl'),
		'1', 'each database knows its own');
};

section 'a database, a server and a table change their names' => sub {
	# With a backlog, so that something could get lost.
	$beta->peer_down('fast');
	$alpha->safe_psql('one', q{UPDATE item SET v = 'before' WHERE id <= 10});
	$alpha->safe_psql('postgres', 'ALTER DATABASE one RENAME TO uno');
	$alpha->safe_psql('uno', q{UPDATE item SET v = v || ' renamed' WHERE id <= 10});
	my $stream = $alpha->stat('beta', 'stream', 'uno');
	$alpha->safe_psql(
		'uno', q{
		ALTER SERVER beta RENAME TO gamma;
		UPDATE item SET v = v || ' twice' WHERE id <= 10;
		ALTER TABLE item RENAME TO thing;
		UPDATE thing SET v = v || ' thrice' WHERE id <= 10});
	$beta->peer_up;
	$alpha->wait_caught_up('gamma', 'uno');
	is($alpha->stat('gamma', 'stream', 'uno'), $stream, 'it is the same stream');
	is( $beta->safe_psql('one', 'SELECT DISTINCT v FROM item WHERE id <= 10'),
		'before renamed twice thrice', 'nothing is lost');
	$alpha->safe_psql('uno', 'DROP TABLE thing');
	is($alpha->safe_psql('uno', 'SELECT count(*) FROM mmrepl.pairs'),
		'0', 'the pairs go with their table');
};

# The session of a worker is in the way of DROP DATABASE, as any other's.
section 'the database at the receiving end is dropped' => sub {
	my $now = $alpha->stat('beta', 'last_ticket', 'two');
	$alpha->poll_ok("SELECT min(acked) >= $now FROM mmrepl.stream",
		'what beta has confirmed is written down', 'two');
	my ($ret, undef, $err) =
	  $beta->psql('postgres', 'DROP DATABASE two WITH (FORCE)');
	is("$ret$err", '0', 'WITH (FORCE) it goes');
	$alpha->safe_psql('two', q{INSERT INTO item VALUES (1001, 'no database')});
	stat_ok(q{state = 'retrying' AND last_error_sqlstate = '3D000' AND last_error ~ 'two'},
		'the source says so', 'beta', 'two');
	$beta->safe_psql('postgres', 'CREATE DATABASE two');
	stat_ok(q{state = 'retrying' AND last_error_sqlstate = 'MM006'},
		'then, that the extension is missing', 'beta', 'two');
	$beta->safe_psql('two', "CREATE EXTENSION mmrepl_bgw; $item");
	stat_ok(q{state = 'retrying' AND last_error_sqlstate = 'MM014'},
		'then, that it has lost what it had', 'beta', 'two');
	$alpha->safe_psql('two', q{SELECT mmrepl.resync('beta', force => true)});
	$alpha->wait_caught_up('beta', 'two');
	$alpha->same_rows($beta, 'item', dbname => 'two', peer_dbname => 'two',
		name => 'resync() brings it back');
};

section 'the extension is updated under running workers' => sub {
	my $directory = `pg_config --sharedir` =~ s/\s+$//r . '/extension';
	my $script = "$directory/mmrepl_bgw--1.0--1.0.0test.sql";

  SKIP:
	{
		skip 'the extension is installed where the test may not write', 1
		  unless -w $directory;
		append_to_file(
			$script, q{
			ALTER TABLE mmrepl.skipped ADD COLUMN comment text;
			CREATE FUNCTION mmrepl.answer() RETURNS int LANGUAGE sql AS 'SELECT 42';
		});
		my $load = $alpha->session;
		$load->start(
			q{DO $$ BEGIN FOR i IN 1 .. 300 LOOP
				UPDATE item SET v = 'update ' || i WHERE id = i % 50 + 1;
				COMMIT; END LOOP; END $$});
		here(q{ALTER EXTENSION mmrepl_bgw UPDATE TO '1.0.0test'});
		my (undef, $err) = $load->finish;
		is($err, '', 'writers do not notice');
		$load->quit;
		is(here('SELECT mmrepl.answer()'), '42', 'the extension is a newer one');
		synced();
		there(q{ALTER EXTENSION mmrepl_bgw UPDATE TO '1.0.0test'});
		here(q{UPDATE item SET v = 'updated' WHERE id = 1});
		synced();
		$alpha->same_rows($beta, 'item');
		$alpha->poll_state('beta', 'streaming');
		unlink $script;
	}
};

section 'the owner of pairs goes' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE owned (id int PRIMARY KEY, v text)');
	here(
		q{CREATE ROLE leaver LOGIN;
		   CREATE ROLE heir LOGIN;
		   ALTER TABLE owned OWNER TO leaver;
		   GRANT USAGE ON FOREIGN SERVER beta TO leaver;
		   CREATE USER MAPPING FOR leaver SERVER beta
			 OPTIONS (user '} . there('SELECT current_user') . q{', password_required 'false')});
	$alpha->safe_psql('postgres', q{SELECT mmrepl.create_pair('owned', 'beta')},
		extra_params => [ '-U', 'leaver' ]);
	here(q{INSERT INTO owned VALUES (1, 'leaver')});
	synced(); # not just there: what the worker has not heard of would be queued for ever below
	is(there('SELECT count(*) FROM owned'), '1', 'the pair replicates');

	like($alpha->fails('postgres', 'DROP ROLE leaver'),
		qr/ERROR:\s+2BP01/, 'the role cannot be dropped just so');
	here('REASSIGN OWNED BY leaver TO heir; DROP OWNED BY leaver; DROP ROLE leaver');
	here(q{INSERT INTO owned VALUES (2, 'nobody')});
	# It may have failed for other reasons on the way.
	$alpha->poll_ok(
		q{SELECT state = 'retrying' AND (last_error ~ 'user mapping' OR last_error ~ 'role')
		  FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta' AND owner::text ~ '^[0-9]+$'},
		'without its mapping the stream stops, and says why')
	  || diag(here('SELECT * FROM mmrepl.pg_stat_mmrepl'));
	is(here(q{SELECT count(*) FROM mmrepl.sync_err_rec}), '1', 'changes wait');
	is( $alpha->safe_psql('postgres', q{SELECT mmrepl.drop_pair('owned', 'beta')},
			extra_params => [ '-U', 'heir' ]), '',
		'the heir of the table drops the pair');
	here(q{INSERT INTO owned VALUES (3, 'free')});
	is(here(q{SELECT count(*) FROM mmrepl.sync_err_rec}), '1', 'nothing more is captured');
	here(q{UPDATE item SET v = 'others' WHERE id = 1});
	$beta->poll_ok(q{SELECT v = 'others' FROM item WHERE id = 1}, 'others do not notice');
};

section 'background workers are short' => sub {
	here('DROP SERVER IF EXISTS sister CASCADE');
	$alpha->safe_psql('postgres', 'DROP DATABASE uno');
	$alpha->safe_psql('postgres', 'DROP DATABASE two');
	foreach my $name ('s1', 's2', 's3')
	{
		$alpha->create_table_on_both($beta, "CREATE TABLE $name (id int PRIMARY KEY, v text)");
		$alpha->add_peer($beta, server => $name);
		$alpha->create_pair($name, $name);
		here("INSERT INTO $name VALUES (1, 'before')");
		synced($name);
	}
	# The server's own launcher of logical replication and ours leave three.
	$alpha->append_conf('postgresql.conf', 'max_worker_processes = 5');
	$alpha->restart;
	here("INSERT INTO $_ VALUES (2, 'short')") foreach ('s1', 's2', 's3');
	$alpha->poll_ok(
		q{SELECT count(*) > 0 FROM mmrepl.pg_stat_mmrepl
		  WHERE pid IS NULL AND state = 'starting' AND last_error_sqlstate = '53400'
		  AND last_error ~ 'max_worker_processes'},
		'a stream without a process says so')
	  || diag(here('SELECT * FROM mmrepl.pg_stat_mmrepl'));
	ok($alpha->log_contains(qr/no background worker slot is free/), 'the log, too');

	# Streams that are done make room.
	my @waiting = split /\n/, here(
		q{SELECT server FROM mmrepl.pg_stat_mmrepl WHERE pid IS NULL AND server ~ '^s'});
	my %waits = map { $_ => 1 } @waiting;
	foreach my $server (grep { !$waits{$_} } ('s1', 's2', 's3'))
	{
		synced($server);
		here("DROP SERVER $server CASCADE");
	}
	here('DROP SERVER beta CASCADE');
	foreach my $server (@waiting)
	{
		synced($server);
		stat_ok(q{state = 'streaming' AND pid IS NOT NULL}, "$server has a worker", $server);
		$alpha->same_rows($beta, $server);
	}
};

foreach my $node ($alpha, $beta)
{
	ok( !$node->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
		$node->name . ': no crash in the log');
}
$alpha->stop('fast');
$beta->stop('fast');

done_testing();
