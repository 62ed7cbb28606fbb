# Bugs that were found once and must not come back, continued: databases that
# are dropped, copied, dumped, or promoted.  Each part says what went wrong.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(allows_streaming => 1);
my $started = $alpha->safe_psql('postgres', 'SELECT pg_postmaster_start_time()');

# A database on each node, with the extension and a server from here to there.
sub make_databases
{
	my ($name, $ddl) = @_;

	foreach my $node ($alpha, $beta)
	{
		$node->install_extension($name);
		$node->safe_psql($name, $ddl);
	}
	$alpha->add_peer($beta, dbname => $name, peer_dbname => $name);
	return;
}

sub drop_databases
{
	my ($name) = @_;

	$alpha->safe_psql('postgres', "DROP DATABASE $name");
	$beta->poll_query_until('postgres',
		"SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = '$name'");
	$beta->safe_psql('postgres', "DROP DATABASE $name");
	return;
}

my $item = 'CREATE TABLE item (id int PRIMARY KEY, v text)';

###############################################################################

# DROP DATABASE ended the workers of the database before it was known whether
# the role may drop it; without that they stood in the way of its owner.  And a
# copy delivered the original's queue under the original's name.
section 'DROP DATABASE and CREATE DATABASE ... TEMPLATE' => sub {
	my $pid = q{SELECT pid FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'};

	make_databases('app', $item);
	$alpha->safe_psql(
		'postgres', q{
		CREATE ROLE stranger LOGIN CREATEDB;
		CREATE ROLE landlord LOGIN CREATEDB;
		ALTER DATABASE app OWNER TO landlord;
	});
	$alpha->create_pair('item', 'beta', undef, 'app');
	$alpha->safe_psql('app', q{INSERT INTO item VALUES (1, 'original')});
	$alpha->wait_caught_up('beta', 'app');
	$alpha->poll_state('beta', 'streaming', 'app');

	my $worker = $alpha->safe_psql('app', $pid);
	foreach my $command (
		'DROP DATABASE app',
		'DROP DATABASE app WITH (FORCE)',
		'ALTER DATABASE app RENAME TO mine',
		'CREATE DATABASE mine TEMPLATE app')
	{
		like(
			$alpha->fails(
				'postgres', $command, extra_params => [ '-U', 'stranger' ]),
			qr/ERROR:\s+42501/,
			"not the owner: $command is refused");
	}
	$alpha->safe_psql('app', q{INSERT INTO item VALUES (2, 'original')});
	$alpha->wait_caught_up('beta', 'app');
	is($alpha->safe_psql('app', $pid), $worker, 'the worker has not noticed');

	# What the peer had confirmed to the original is in the copy, and says
	# nothing of the node that the copy becomes.
	$alpha->poll_ok('SELECT bool_and(acked > 0) FROM mmrepl.stream',
		'what the peer has confirmed is written down', 'app');
	$alpha->safe_psql('postgres', 'CREATE DATABASE copy TEMPLATE app',
		extra_params => [ '-U', 'landlord' ]);
	pass('the owner copies it while its worker runs');
	$alpha->safe_psql('app', q{INSERT INTO item VALUES (3, 'original')});
	$alpha->wait_caught_up('beta', 'app');
	$alpha->poll_state('beta', 'streaming', 'app');

	$alpha->safe_psql('copy', q{INSERT INTO item VALUES (4, 'too early')});
	$alpha->poll_ok(
		q{SELECT state = 'retrying' AND last_error_sqlstate = 'MM013'
		  AND last_error ~ 'is a copy' AND last_error ~ 'adopt_node'
		  FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'},
		'the copy says that it is one', 'copy')
	  || diag($alpha->describe('beta', 'copy'));
	is( $beta->safe_psql('app', 'SELECT count(*) FROM item WHERE id = 4'),
		'0', 'and delivers nothing');
	my $node = $alpha->safe_psql('copy', 'SELECT mmrepl.node_id()');
	$alpha->safe_psql('copy', 'SELECT mmrepl.adopt_node()');
	isnt($alpha->safe_psql('copy', 'SELECT mmrepl.node_id()'),
		$node, 'adopt_node() makes it another node');
	$alpha->safe_psql('copy', q{INSERT INTO item VALUES (5, 'copy')});
	$alpha->wait_caught_up('beta', 'copy');
	$alpha->poll_state('beta', 'streaming', 'copy');
	$alpha->safe_psql('app', q{INSERT INTO item VALUES (6, 'original')});
	$alpha->wait_caught_up('beta', 'app');
	is( $beta->safe_psql(
			'app', q{SELECT string_agg(id || v, ' ' ORDER BY id) FROM item}),
		'1original 2original 3original 5copy 6original',
		'then both deliver');

	foreach my $name ('copy', 'app')
	{
		isnt($alpha->safe_psql($name, $pid), '', "$name: a worker is running");
		my ($ret, $out, $err) = $alpha->psql(
			'postgres', "DROP DATABASE $name",
			extra_params => [ '-U', 'landlord' ]);
		is("$ret$err", '0', "$name: its owner drops it");
	}
	$beta->poll_query_until('postgres',
		q{SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = 'app'});
	$beta->safe_psql('postgres', 'DROP DATABASE app');
};

# The slots in shared memory of the extension that was dropped were taken for
# those of the new one, whose streams have the same ids.
section 'the extension is dropped and made again' => sub {
	make_databases('again', $item);
	foreach my $round (1 .. 3)
	{
		$alpha->create_pair('item', 'beta', undef, 'again');
		$alpha->safe_psql('again', "INSERT INTO item VALUES ($round, 'again')");
		is( $alpha->safe_psql(
				'again', "SELECT mmrepl.wait_for_replay('beta', '$MmreplCluster::timeout s')"),
			't',
			"$round: it replicates");
		is($alpha->stat('beta', 'stream', 'again'),
			'1', 'the stream has the same id');
		is( $beta->safe_psql('again', 'SELECT count(*) FROM item'),
			$round, 'the row is there');
		last if $round == 3;
		$alpha->safe_psql('again', 'DROP EXTENSION mmrepl_bgw CASCADE');
		$alpha->safe_psql('again', 'DROP SCHEMA mmrepl') if $round == 2;
		$alpha->install_extension('again');
		$alpha->add_peer($beta, dbname => 'again', peer_dbname => 'again');
	}
	drop_databases('again');
};

# The triggers came back before what the pair needs, and each was refused, or
# the pair was dropped as one that has no key.
section 'a plain dump and restore' => sub {
	make_databases(
		'dump', q{
		CREATE TABLE part (id int, region text, v text, PRIMARY KEY (id, region))
		  PARTITION BY LIST (region);
		CREATE TABLE part_eu PARTITION OF part FOR VALUES IN ('eu');
		CREATE TABLE part_us PARTITION OF part FOR VALUES IN ('us');
		CREATE TABLE uniq (id int NOT NULL, code text NOT NULL, v text UNIQUE,
						   CONSTRAINT a_code UNIQUE (code));
		CREATE UNIQUE INDEX uniq_id ON uniq (id);
		ALTER TABLE uniq REPLICA IDENTITY USING INDEX uniq_id;
		CREATE TABLE filtered (id int PRIMARY KEY, v text);
	});
	$alpha->create_pair('part', 'beta', undef, 'dump');
	$alpha->create_pair('uniq', 'beta', undef, 'dump');
	$alpha->create_pair('filtered', 'beta', q{row_filter => $$v <> 'here'$$},
		'dump');
	$alpha->safe_psql(
		'dump', q{
		INSERT INTO part VALUES (1, 'eu', 'a'), (2, 'us', 'b');
		INSERT INTO uniq VALUES (1, 'c1', 'a'), (2, 'c2', 'b');
		INSERT INTO filtered VALUES (1, 'here'), (2, 'there');
	});
	$alpha->wait_caught_up('beta', 'dump');

	my $file = $alpha->basedir . '/dump.sql';
	my $pairs = q{SELECT local_table, server, remote_table, mode, row_filter, enabled
				  FROM mmrepl.pairs ORDER BY pair_id};
	my $triggers = q{SELECT tgrelid::regclass::text, tgname, tgenabled FROM pg_trigger
					 WHERE tgname LIKE 'mmrepl%' ORDER BY 1, 2};
	$alpha->command_ok(
		[ 'pg_dump', '-f', $file, '-d', $alpha->connstr('dump') ],
		'pg_dump');
	$alpha->safe_psql('postgres', 'CREATE DATABASE restored');
	my ($ret, $out, $err) = $alpha->psql('restored', slurp_file($file),
		extra_params => [ '-v', 'ON_ERROR_STOP=1' ]);
	is($ret, 0, 'it is restored') or diag($err);
	unlike($err, qr/ERROR|WARNING/, 'without a complaint');
	foreach my $table ('part', 'uniq', 'filtered')
	{
		is( $alpha->fingerprint($table, 'restored'),
			$alpha->fingerprint($table, 'dump'),
			"$table: the rows are there");
	}
	is( $alpha->safe_psql('restored', $pairs),
		$alpha->safe_psql('dump', $pairs), 'the pairs are there');
	is($alpha->safe_psql('restored', 'SELECT count(*) FROM mmrepl.pairs'),
		'3', 'all three');
	is( $alpha->safe_psql('restored', $triggers),
		$alpha->safe_psql('dump', $triggers),
		'the triggers are there');
	is( $alpha->safe_psql(
			'restored',
			join(' UNION ALL ', map { "SELECT * FROM mmrepl.queue_$_" } (0 .. 2))),
		'',
		'nothing was captured');
	isnt(
		$alpha->safe_psql('restored', 'SELECT mmrepl.node_id()'),
		$alpha->safe_psql('dump', 'SELECT mmrepl.node_id()'),
		'it is a node of its own');

	$alpha->safe_psql(
		'restored', q{
		INSERT INTO part VALUES (3, 'us', 'restored');
		INSERT INTO uniq VALUES (3, 'c3', 'restored');
		UPDATE filtered SET v = 'restored' WHERE id = 2;
	});
	$alpha->wait_caught_up('beta', 'restored');
	is( $beta->safe_psql(
			'dump', q{SELECT (SELECT count(*) FROM part WHERE v = 'restored')
			+ (SELECT count(*) FROM uniq WHERE v = 'restored')
			+ (SELECT count(*) FROM filtered WHERE v = 'restored')}),
		'3',
		'and it replicates');
	like(
		$alpha->fails(
			'restored', 'ALTER TABLE filtered DROP CONSTRAINT filtered_pkey'),
		qr/ERROR/,
		'the key is protected as before');
	$alpha->safe_psql('postgres', 'DROP DATABASE restored');
	drop_databases('dump');
};

# Triggers fire in the order of their names: one before ours that changed the row
# again had its version captured first, and the peer ended with the older one.
section 'a trigger changes the row that fired it' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE again (id int PRIMARY KEY, v int, w int,
			parent int REFERENCES again ON UPDATE CASCADE)');
	$alpha->create_pair('again', 'beta');
	$alpha->safe_psql(
		'postgres', q{
		CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS
			'BEGIN UPDATE again SET w = NEW.v WHERE id = NEW.id; RETURN NULL; END';
		CREATE TRIGGER "A first" AFTER INSERT OR UPDATE OF v ON again
			FOR EACH ROW EXECUTE FUNCTION follow();
		INSERT INTO again VALUES (1, 1, 0, 1), (2, 2, 0, 1);
		UPDATE again SET v = v + 10;
		UPDATE again SET id = 3 WHERE id = 1});
	$alpha->wait_caught_up('beta');
	is($alpha->safe_psql('postgres', 'SELECT * FROM again ORDER BY id'),
		"2|12|12|3\n3|11|11|3", 'what the triggers made of it');
	$alpha->same_rows($beta, 'again');
};

# On a standby these wrote to shared memory that nobody reads, or waited for a
# worker that does not exist; after promotion nobody looked at the old queue.
section 'a standby is promoted' => sub {
	$alpha->create_table_on_both($beta, $item);
	$alpha->create_pair('item', 'beta');
	$alpha->safe_psql('postgres', q{INSERT INTO item VALUES (1, 'before')});
	$alpha->wait_caught_up('beta');

	# The tests' own pg_hba.conf does not speak of replication.
	$alpha->append_conf('pg_hba.conf', 'local replication all trust');
	$alpha->reload;
	$alpha->backup('base');
	my $gamma = MmreplCluster->new('gamma');
	$gamma->init_from_backup($alpha, 'base', has_streaming => 1);
	$gamma->start;

	$alpha->safe_psql('postgres', q{SELECT mmrepl.pause('beta')});
	$alpha->safe_psql('postgres', "INSERT INTO item VALUES ($_, 'queued')")
	  foreach (2 .. 6);
	$alpha->safe_psql(
		'postgres',
		q{BEGIN; UPDATE item SET v = 'queued' WHERE id = 1;
		   DELETE FROM item WHERE id = 2; COMMIT});
	$alpha->wait_for_catchup($gamma);

	foreach my $call ('wait_for_replay', 'retry_now', 'pause', 'resume')
	{
		like(
			$gamma->fails('postgres', "SELECT mmrepl.$call('beta')"),
			qr/ERROR:\s+25006/,
			"$call is refused on a standby");
	}
	my ($ret, $out, $err) =
	  $gamma->psql('postgres', 'SELECT mmrepl.deal_sync_err_rec(10)');
	is("$ret $out", '0 f', 'deal_sync_err_rec returns false');
	like($err, qr/NOTICE:\s+this is a standby/, 'with a notice');
	# A standby knows of deliveries what the primary has written down.
	$gamma->poll_ok(q{SELECT count(*) = 7 FROM mmrepl.sync_err_rec},
		'the queue can be seen');
	is( $gamma->safe_psql('postgres',
			q{SELECT count(*) FROM pg_stat_activity WHERE backend_type ~ 'mmrepl.*worker'}
		),
		'0',
		'no worker runs there');

	my $node = $alpha->safe_psql('postgres', 'SELECT mmrepl.node_id()');
	is($alpha->safe_psql('postgres', 'SELECT pg_postmaster_start_time()'),
		$started, 'the server was never restarted');
	$alpha->stop('fast');
	$gamma->promote;
	$gamma->poll_query_until('postgres', 'SELECT NOT pg_is_in_recovery()');
	$gamma->poll_state('beta', 'paused');
	is($gamma->safe_psql('postgres', 'SELECT mmrepl.node_id()'),
		$node, 'promoted it is the same node');
	is($gamma->queued('beta'), '7', 'with its queue');
	$gamma->safe_psql('postgres', q{INSERT INTO item VALUES (7, 'promoted')});
	is($beta->safe_psql('postgres', 'SELECT count(*) FROM item'),
		'1', 'still paused');
	$gamma->safe_psql('postgres', q{SELECT mmrepl.resume('beta')});
	$gamma->wait_caught_up('beta');
	$gamma->poll_state('beta', 'streaming');
	$gamma->same_rows($beta, 'item', name => 'nothing is lost');
	is($gamma->queued('beta'), '0', 'the queue is empty');
	$gamma->poll_ok(
		q{SELECT queue_transactions = 0 AND queue_changes = 0 AND queue_bytes = 0
		  FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'},
		'and is counted as such');
	$gamma->safe_psql('postgres', q{INSERT INTO item VALUES (8, 'later')});
	$gamma->wait_caught_up('beta');
	$gamma->same_rows($beta, 'item');
	ok(!$gamma->log_contains(qr/PANIC|TRAP:|terminated by signal/),
		'no crash in the log');
	$gamma->stop('fast');
};

foreach my $node ($alpha, $beta)
{
	ok( !$node->log_contains(qr/PANIC|TRAP:|terminated by signal/),
		$node->name . ': no crash in the log');
}

$beta->stop('fast');

done_testing();
