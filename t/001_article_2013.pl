# The walk through of the 2013 article, with mmrepl.replicate in the place of
# its f_sync_test: one server, databases "local" and "remote", one table on
# each side, replicated in both directions by triggers that the owners of the
# tables made by hand, first in sync and then in async mode, through an outage
# and the repair of it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $app = 'aaa_bbb_digoal';
my $node = MmreplCluster->new('article');
$node->init;
$node->start;

# Everything an owner does is done by the ordinary role of that side.
sub loc
{
	my ($sql, %params) = @_;
	return $node->safe_psql(
		'local', $sql,
		extra_params => [ '-U', 'local' ],
		%params);
}

sub rmt
{
	my ($sql, %params) = @_;
	return $node->safe_psql(
		'remote', $sql,
		extra_params => [ '-U', 'remote' ],
		%params);
}

# The whole table, readable in a failure.
sub loc_rows
{
	return loc('SELECT * FROM loc_test ORDER BY pk1, pk2 COLLATE "C"');
}

sub rmt_rows
{
	return rmt('SELECT * FROM rmt_test ORDER BY pk1, pk2 COLLATE "C"');
}

sub wait_both
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$node->wait_caught_up('dst', 'local');
	$node->wait_caught_up('dst', 'remote');
	return;
}

# The article's comparison.
sub same_hash
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $node->same_rows(
		$node, 'local.loc_test',
		dbname => 'local',
		peer_table => 'remote.rmt_test',
		peer_dbname => 'remote',
		name => $name);
}

sub queue_is_empty
{
	my ($dbname, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $node->poll_ok('SELECT count(*) = 0 FROM mmrepl.sync_err_rec',
		$name, $dbname);
}

###############################################################################
# Set-up, in the article's order.
###############################################################################

$node->safe_psql(
	'postgres', q{
	CREATE ROLE local LOGIN ENCRYPTED PASSWORD 'LOCAL321';
	CREATE ROLE remote LOGIN ENCRYPTED PASSWORD 'REMOTE321';
	CREATE ROLE stranger LOGIN;
	CREATE DATABASE local OWNER local;
	CREATE DATABASE remote OWNER remote;
});
$node->set_hba(peers => 'scram-sha-256', reload => 1);
$node->install_extension($_) foreach ('local', 'remote');

loc('CREATE SCHEMA local');
rmt('CREATE SCHEMA remote');

my $columns = 'pk1 int, pk2 text, info text, crt_time timestamp(0), '
  . 'mod_time timestamp(0), PRIMARY KEY (pk1, pk2)';
loc("CREATE TABLE loc_test ($columns)");
rmt("CREATE TABLE rmt_test ($columns)");

my %other = (local => 'remote', remote => 'local');
my $port = $node->port;
foreach my $dbname ('local', 'remote')
{
	my $peer = $other{$dbname};
	my $password = uc($peer) . '321';
	$node->safe_psql(
		$dbname, qq{
		REVOKE ALL ON pg_user_mappings FROM PUBLIC;
		CREATE FOREIGN DATA WRAPPER postgresql
		  VALIDATOR postgresql_fdw_validator;
		CREATE SERVER dst FOREIGN DATA WRAPPER postgresql
		  OPTIONS (hostaddr '127.0.0.1', port '$port', dbname '$peer',
				   options '-c tcp_keepalives_idle=60s -c tcp_keepalives_interval=10 -c tcp_keepalives_count=6 -c application_name=$app');
		GRANT USAGE ON FOREIGN SERVER dst TO $dbname;
		CREATE USER MAPPING FOR $dbname SERVER dst
		  OPTIONS (user '$peer', password '$password');
		SELECT mmrepl.allow_apply('$dbname');
	});
}

sub create_triggers
{
	my ($prefix, $mode) = @_;
	loc(qq{
		CREATE TRIGGER ${prefix}1 AFTER DELETE OR UPDATE OR INSERT
		  ON loc_test FOR EACH ROW EXECUTE FUNCTION
		  mmrepl.replicate('dst', 'remote', 'rmt_test', '$app', '$mode');
		CREATE TRIGGER ${prefix}2 AFTER TRUNCATE
		  ON loc_test FOR EACH STATEMENT EXECUTE FUNCTION
		  mmrepl.replicate('dst', 'remote', 'rmt_test', '$app', '$mode');
	});
	rmt(qq{
		CREATE TRIGGER ${prefix}1 AFTER DELETE OR UPDATE OR INSERT
		  ON rmt_test FOR EACH ROW EXECUTE FUNCTION
		  mmrepl.replicate('dst', 'local', 'loc_test', '$app', '$mode');
		CREATE TRIGGER ${prefix}2 AFTER TRUNCATE
		  ON rmt_test FOR EACH STATEMENT EXECUTE FUNCTION
		  mmrepl.replicate('dst', 'local', 'loc_test', '$app', '$mode');
	});
	return;
}

###############################################################################
# Sync mode: what is committed on one side stands on the other at once.
###############################################################################

create_triggers('tg', 'sync');

loc(q{INSERT INTO loc_test SELECT generate_series(1,10),'abc',now(),now()});
is(rmt('SELECT count(*), min(pk1), max(pk1) FROM rmt_test'),
	'10|1|10', 'sync: rows of a multi-row insert stand at the peer at once');
is(rmt_rows(), loc_rows(), 'sync: and they are the same rows');

rmt(q{INSERT INTO rmt_test SELECT generate_series(11,12),'abc',now(),now()});
is(loc('SELECT count(*) FROM loc_test WHERE pk1 IN (11, 12)'),
	'2', 'sync: the other direction');
is(rmt_rows(), loc_rows(), 'sync: same rows after inserts on both sides');

loc(q{UPDATE loc_test SET pk2 = 'new' WHERE pk1 = 1});
is(rmt('SELECT pk2 FROM rmt_test WHERE pk1 = 1'),
	'new', 'sync: a key column updated at local');
rmt(q{UPDATE rmt_test SET pk2 = 'rmt' WHERE pk1 = 2});
is(loc('SELECT pk2 FROM loc_test WHERE pk1 = 2'),
	'rmt', 'sync: a key column updated at remote');
loc(q{UPDATE loc_test SET info = 'touched', mod_time = now() WHERE pk1 = 3});
is(rmt_rows(), loc_rows(), 'sync: a column outside the key updated');

loc('DELETE FROM loc_test WHERE pk1 < 9');
is(rmt(q{SELECT string_agg(pk1::text, ' ' ORDER BY pk1) FROM rmt_test}),
	'9 10 11 12', 'sync: deletes from local');
rmt('DELETE FROM rmt_test WHERE pk1 >= 11');
is(loc(q{SELECT string_agg(pk1::text, ' ' ORDER BY pk1) FROM loc_test}),
	'9 10', 'sync: deletes from remote');

# What the peer refuses is refused here, and neither side keeps it.
like(
	$node->fails(
		'local',
		q{INSERT INTO loc_test VALUES (9, 'abc', 'again', now(), now())},
		extra_params => [ '-U', 'local' ]),
	qr/ERROR:\s+23505: .*"loc_test_pkey"/,
	'sync: a duplicate key is refused by the local index');
loc(q{INSERT INTO loc_test VALUES (20, 'apart', 'local only', now(), now())},
	connstr => "port=$port host="
	  . $node->host
	  . " dbname=local application_name=$app");
rmt(q{INSERT INTO rmt_test VALUES (21, 'apart', 'remote only', now(), now())},
	connstr => "port=$port host="
	  . $node->host
	  . " dbname=remote application_name=$app");
is( loc(q{SELECT string_agg(pk1::text, ' ' ORDER BY pk1) FROM loc_test}),
	'9 10 20',
	'a session whose application_name is the fourth argument writes here');
is(rmt(q{SELECT string_agg(pk1::text, ' ' ORDER BY pk1) FROM rmt_test}),
	'9 10 21', '... and is not captured');

# The peer has no such row: what stands on one side only goes there only.
my (undef, undef, $refusal) = $node->psql(
	'local',
	'DELETE FROM loc_test WHERE pk1 = 20',
	extra_params => [ '-U', 'local' ]);
like($refusal, qr/could not serialize replicated change: conflict=delete_missing/,
	'sync: a delete of a row that the peer does not have is refused');
loc('DELETE FROM loc_test WHERE pk1 = 20',
	connstr => "port=$port host="
	  . $node->host
	  . " dbname=local application_name=$app");
rmt('DELETE FROM rmt_test WHERE pk1 = 21',
	connstr => "port=$port host="
	  . $node->host
	  . " dbname=remote application_name=$app");

loc('TRUNCATE TABLE loc_test');
is(rmt('SELECT count(*) FROM rmt_test'),
	'0', 'sync: TRUNCATE at local empties remote');
loc(q{INSERT INTO loc_test VALUES (1, 'abc', 'digoal', now(), now())});
rmt('TRUNCATE TABLE rmt_test');
is(loc('SELECT count(*) FROM loc_test'),
	'0', 'sync: TRUNCATE at remote empties local');

queue_is_empty('local', 'sync: nothing is left queued at local');
queue_is_empty('remote', 'sync: nothing is left queued at remote');

# With the peer away, sync mode refuses the write and keeps nothing of it.
$node->close_to_peers('remote');
my $before = Time::HiRes::time();
like(
	$node->fails(
		'local',
		q{INSERT INTO loc_test VALUES (5, 'abc', 'digoal', now(), now())},
		extra_params => [ '-U', 'local' ]),
	qr/ERROR:\s+(?:08\w{3}|28000|57P\d\d|MM\w{3}): /,
	'sync: with the peer closed the statement fails');
cmp_ok(Time::HiRes::time() - $before, '<', 15, '... within a bounded time');
is(loc('SELECT count(*) FROM loc_test'), '0', '... and leaves no row');
is($node->queued('dst', 'local'), '0', '... and nothing in the queue');
is(rmt('SELECT count(*) FROM rmt_test'), '0', '... nor at the peer');
$node->open_to_peers;
$node->safe_psql('local', q{SELECT mmrepl.retry_now('dst')});
$node->poll_state('dst', 'streaming', 'local');
loc(q{INSERT INTO loc_test VALUES (5, 'abc', 'digoal', now(), now())});
is(rmt_rows(), loc_rows(), 'sync: works again when the peer is open again');
loc('TRUNCATE TABLE loc_test');
is(rmt('SELECT count(*) FROM rmt_test'), '0', 'both sides are empty');

###############################################################################
# Async mode, with the sync triggers disabled as in the article.
###############################################################################

create_triggers('atg', 'async');
loc("ALTER TABLE loc_test DISABLE TRIGGER tg$_") foreach (1, 2);
rmt("ALTER TABLE rmt_test DISABLE TRIGGER tg$_") foreach (1, 2);

loc(q{INSERT INTO loc_test VALUES (9, 'abc', 'digoal', now(), now())});
$node->wait_caught_up('dst', 'local');
is(rmt('SELECT pk2, info FROM rmt_test WHERE pk1 = 9'),
	'abc|digoal', 'async: inserted at local');
rmt(q{INSERT INTO rmt_test VALUES (10, 'abc', 'digoal', now(), now())});
$node->wait_caught_up('dst', 'remote');
is(loc('SELECT pk2, info FROM loc_test WHERE pk1 = 10'),
	'abc|digoal', 'async: inserted at remote');
is(rmt_rows(), loc_rows(), 'async: same rows');

# The 2013 options string, application_name included, reaches the peer.
is( $node->safe_psql(
		'postgres', q{
		SELECT string_agg(DISTINCT application_name, ' ')
		FROM pg_stat_activity WHERE client_addr IS NOT NULL}),
	$app,
	'the options of the server decide the application_name at the peer');

# A duplicate key is an error at once, and leaves no trace in the queue.
like(
	$node->fails(
		'remote',
		q{INSERT INTO rmt_test VALUES (9, 'abc', 'digoal', now(), now())},
		extra_params => [ '-U', 'remote' ]),
	qr/ERROR:\s+23505: duplicate key value violates unique constraint "rmt_test_pkey"/,
	'async: a duplicate key is refused at once');
is($node->queued('dst', 'remote'),
	'0', '... and leaves no trace in the queue');

rmt(q{UPDATE rmt_test SET pk2 = 'new' WHERE pk1 = 10});
$node->wait_caught_up('dst', 'remote');
is(loc('SELECT pk2 FROM loc_test WHERE pk1 = 10'),
	'new', 'async: a key column updated at remote');
loc(q{UPDATE loc_test SET pk2 = 'new_loc' WHERE pk1 = 10});
$node->wait_caught_up('dst', 'local');
is(rmt('SELECT pk2 FROM rmt_test WHERE pk1 = 10'),
	'new_loc', 'async: a key column updated at local');
is(rmt_rows(), loc_rows(), 'async: same rows after the updates');

loc(q{INSERT INTO loc_test SELECT generate_series(100,120),'many',now(),now()}
);
loc('DELETE FROM loc_test WHERE pk1 BETWEEN 100 AND 110');
$node->wait_caught_up('dst', 'local');
rmt('DELETE FROM rmt_test WHERE pk1 BETWEEN 111 AND 119');
$node->wait_caught_up('dst', 'remote');
is(loc(q{SELECT string_agg(pk1::text, ' ' ORDER BY pk1) FROM loc_test}),
	'9 10 120', 'async: deletes from both sides');
same_hash('async: same rows after the deletes');

loc('TRUNCATE TABLE loc_test');
$node->wait_caught_up('dst', 'local');
is(rmt('SELECT count(*) FROM rmt_test'),
	'0', 'async: TRUNCATE at local empties remote');
rmt(q{INSERT INTO rmt_test VALUES (1, 'abc', 'digoal', now(), now())});
rmt('TRUNCATE TABLE rmt_test');
$node->wait_caught_up('dst', 'remote');
is(loc('SELECT count(*) FROM loc_test'),
	'0', 'async: insert and TRUNCATE at remote leave local empty');
loc(q{INSERT INTO loc_test VALUES (9, 'abc', 'digoal', now(), now())});
rmt(q{INSERT INTO rmt_test VALUES (10, 'new_loc', 'digoal', now(), now())});
wait_both();

###############################################################################
# The peer is closed by pg_hba.conf.
###############################################################################

cmp_ok(scalar $node->peer_sessions('remote'),
	'>=', 1, 'local has a session at the peer');
$node->close_to_peers('remote');

loc(q{INSERT INTO loc_test VALUES (11, 'abc', 'it''s \ "digoal"', '2013-03-13 09:31:20', '2013-03-13 09:31:20')}
);
is(loc('SELECT pk2 FROM loc_test WHERE pk1 = 11'),
	'abc', 'peer closed: the local write succeeds');
is(rmt('SELECT count(*) FROM rmt_test WHERE pk1 = 11'),
	'0', '... and has not reached the peer');
is( loc('SELECT nsp_name, table_name, dst_server FROM mmrepl.sync_err_rec'),
	'local|loc_test|dst',
	'... its SQL stands in sync_err_rec, where the owner sees it');
my $query = loc('SELECT dst_query FROM mmrepl.sync_err_rec');
like(
	$query,
	qr/^\s*INSERT INTO remote\.rmt_test\b/,
	'dst_query names the remote schema and table');
unlike($query, qr/loc_test/, '... and not the local table');
like(
	$query,
	qr/'it''s \\ "digoal"'|E'it''s \\\\ "digoal"'/,
	'... and quotes its values');
like($query, qr/'2013-03-13 09:31:20'/, '... in ISO date style');
is( loc('SELECT create_time > now() - interval \'5 min\' FROM mmrepl.sync_err_rec'
	),
	't',
	'create_time is when it was written');
my ($ret, $out, $err, $took) = $node->psql(
	'local',
	'SELECT count(*) FROM mmrepl.sync_err_rec',
	extra_params => [ '-U', 'stranger' ]);
ok($ret != 0 || $out eq '0', 'somebody else does not see queued data');

loc(q{INSERT INTO loc_test VALUES (12, 'abc', 'digoal', now(), now())});
is(loc('SELECT count(*) FROM mmrepl.sync_err_rec'),
	'2', 'a second write queues behind the first');
like(loc('SELECT dst_query FROM mmrepl.sync_err_rec ORDER BY id LIMIT 1'),
	qr/11/, '... in the order of the writes');
$node->poll_state('dst', 'retrying', 'local');

# The other direction does not care.
rmt(q{UPDATE rmt_test SET info = 'from remote' WHERE pk1 = 9});
$node->wait_caught_up('dst', 'remote');
is(loc('SELECT info FROM loc_test WHERE pk1 = 9'),
	'from remote', 'the way back stays open');

###############################################################################
# The peer is open again; the queue is drained by hand in a transaction.
###############################################################################

# Only deal_sync_err_rec() shall drain, so the worker is stopped before it can
# meet an open peer.
$node->safe_psql('local', q{SELECT mmrepl.pause('dst')});
$node->poll_state('dst', 'paused', 'local');
$node->open_to_peers;

my $dealer = $node->session('local', '-U', 'local');
$dealer->ok('BEGIN');
is($dealer->ok('SELECT * FROM mmrepl.deal_sync_err_rec(10)'),
	't', 'deal_sync_err_rec: nothing was wrong');
is(rmt('SELECT count(*) FROM rmt_test WHERE pk1 IN (11, 12)'),
	'2', '... the queued rows stand at the peer');

# Row 13 is written while the dealer's transaction is open: it queues.
my $writer = $node->session('local', '-U', 'local');
$writer->start(
	q{INSERT INTO loc_test VALUES (13, 'abc', 'digoal', now(), now())});
($out, $err, $took) = $writer->finish;
is($err, '', 'a write while the queue is being drained succeeds');
cmp_ok($took, '<', 5, '... and does not wait for the dealer');

# The worker runs again, yet must not overtake the dealer.
$node->safe_psql('local', q{SELECT mmrepl.resume('dst')});
is( $node->safe_psql(
		'local', q{SELECT mmrepl.wait_for_replay('dst', '1500 ms')}),
	'f',
	'while the dealer holds the stream nothing else is replayed');
is(rmt('SELECT count(*) FROM rmt_test WHERE pk1 = 13'),
	'0', '... row 13 is not at the peer');
is( loc(q{SELECT count(*) FROM mmrepl.sync_err_rec WHERE dst_query ~ '\m13\M.*abc'}
	),
	'1',
	'... it stands in sync_err_rec');

$dealer->ok('COMMIT');
$node->wait_caught_up('dst', 'local');
is(rmt('SELECT count(*) FROM rmt_test WHERE pk1 = 13'),
	'1', 'after COMMIT the worker finishes the rest by itself');
is( rmt(q{
		SELECT (SELECT xmin::text::bigint FROM rmt_test WHERE pk1 = 13)
			 > max(xmin::text::bigint) FROM rmt_test WHERE pk1 IN (11, 12)}),
	't',
	'... after the rows that were queued before it');
queue_is_empty('local', 'the queue is empty');
is(loc('SELECT mmrepl.deal_sync_err_rec(10)'),
	't', 'an empty queue is nothing wrong');

loc(q{INSERT INTO loc_test VALUES (14, 'abc', 'digoal', now(), now())});
$node->wait_caught_up('dst', 'local');
is(rmt('SELECT count(*) FROM rmt_test WHERE pk1 = 14'),
	'1', 'then replication is as before');
is(rmt_rows(), loc_rows(), 'same rows after the outage');

# Without a transaction around it, at most so many changes in whole
# transactions, and at least one.
$node->safe_psql('local', q{SELECT mmrepl.pause('dst')});
$node->poll_state('dst', 'paused', 'local');
loc(q{INSERT INTO loc_test SELECT generate_series(30,32),'three',now(),now()}
);
loc(q{INSERT INTO loc_test VALUES (33, 'one', 'digoal', now(), now())});
is($node->queued('dst', 'local'), '4', 'paused: four changes are queued');
is(loc('SELECT mmrepl.deal_sync_err_rec(1)'), 't', 'deal_sync_err_rec(1)');
is( rmt(q{SELECT string_agg(pk1::text, ' ' ORDER BY pk1) FROM rmt_test WHERE pk1 >= 30}
	),
	'30 31 32',
	'... takes the whole of the oldest transaction, and no more');
is($node->queued('dst', 'local'), '1', '... and leaves the rest queued');
$node->safe_psql('local', q{SELECT mmrepl.resume('dst')});
$node->wait_caught_up('dst', 'local');

###############################################################################
# Values that quoting gets wrong, in keys and in data, both ways, both modes.
###############################################################################

my @values = (
	q{$Q$}, q{$Q'$}, q{$'Q$}, q{$Q$'$}, q{$Q$'Q$}, q{$$}, q{'}, q{''}, q{"},
	q{\\}, q{\\\\}, q{\\'}, q{a\\tb\\n}, "tab\tnew\nline", '', ' ',
	'%s %d %n',
	'$1', '{"a":[1,"b"]}', '(a,"b",)', 'NULL', 'null',
	'; DROP TABLE rmt_test; --',
	'/* */', "Dobr\xc3\xbd den",
	"\xe8\xa1\xa8\xe7\xba\xa7\xe5\xa4\x8d\xe5\x88\xb6",
	"\xf0\x9f\x90\x98");

# NULL stands in data only, a key has none.
sub value_list
{
	my ($first) = @_;
	my @rows;
	my $n = $first;
	foreach my $value (@values, undef)
	{
		my $quoted = defined $value ? $value : '';
		$quoted =~ s/'/''/g;
		$quoted = "'$quoted'";
		my $data = defined $value ? $quoted : 'NULL';
		$quoted = q{'of null'} unless defined $value;
		push @rows, "($n, $quoted, $data, now(), NULL)";
		$n++;
	}
	return join(', ', @rows);
}

sub run_values
{
	my ($what) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $count = @values + 1;

	loc('INSERT INTO loc_test VALUES ' . value_list(1000));
	rmt('INSERT INTO rmt_test VALUES ' . value_list(2000));
	wait_both() if $what eq 'async';
	is(rmt_rows(), loc_rows(), "$what: special values inserted");
	is( rmt('SELECT count(*) FROM rmt_test WHERE pk1 BETWEEN 1000 AND 1999'),
		$count, "$what: all of them arrived");
	loc(q{UPDATE loc_test SET info = pk2 || info WHERE pk1 BETWEEN 2000 AND 2999}
	);
	wait_both() if $what eq 'async';
	rmt(q{UPDATE rmt_test SET pk2 = pk2 || '$Q$''' || pk1 WHERE pk1 BETWEEN 1000 AND 1999}
	);
	wait_both() if $what eq 'async';
	is(rmt_rows(), loc_rows(), "$what: special values updated");
	same_hash("$what: hashes agree on special values");
	loc(q{DELETE FROM loc_test WHERE pk1 BETWEEN 1000 AND 1999});
	wait_both() if $what eq 'async';
	rmt(q{DELETE FROM rmt_test WHERE pk1 BETWEEN 2000 AND 2999});
	wait_both() if $what eq 'async';
	is(loc('SELECT count(*) FROM loc_test WHERE pk1 >= 1000'),
		'0', "$what: special values deleted at local");
	is(rmt('SELECT count(*) FROM rmt_test WHERE pk1 >= 1000'),
		'0', "$what: special values deleted at remote");
	return;
}

run_values('async');

loc("ALTER TABLE loc_test DISABLE TRIGGER atg$_, ENABLE TRIGGER tg$_")
  foreach (1, 2);
rmt("ALTER TABLE rmt_test DISABLE TRIGGER atg$_, ENABLE TRIGGER tg$_")
  foreach (1, 2);
run_values('sync');
loc("ALTER TABLE loc_test ENABLE TRIGGER atg$_, DISABLE TRIGGER tg$_")
  foreach (1, 2);
rmt("ALTER TABLE rmt_test ENABLE TRIGGER atg$_, DISABLE TRIGGER tg$_")
  foreach (1, 2);

# The text in dst_query is the change: run as it stands at the peer, and then
# rolled back, it makes the same table there.
$node->safe_psql('local', q{SELECT mmrepl.pause('dst')});
$node->poll_state('dst', 'paused', 'local');
loc('INSERT INTO loc_test VALUES ' . value_list(3000));
loc(q{UPDATE loc_test SET info = NULL, pk2 = pk2 || '\''$Q$' WHERE pk1 BETWEEN 3000 AND 3010}
);
loc('DELETE FROM loc_test WHERE pk1 BETWEEN 3011 AND 3015');
my $script = $node->safe_psql('local',
	q{SELECT string_agg(dst_query, E';\n' ORDER BY id) FROM mmrepl.sync_err_rec}
);
my $by_hand = $node->safe_psql(
	'remote', qq{
	BEGIN;
	SET LOCAL application_name = '$app';
	$script;
	SELECT 'result', count(*), sum(hashtext(t.*::text))
	FROM remote.rmt_test t;
	ROLLBACK;});
is( (split /\n/, $by_hand)[-1],
	'result|' . $node->fingerprint('local.loc_test', 'local'),
	'dst_query, run by hand at the peer, is the change');
is(rmt('SELECT count(*) FROM rmt_test WHERE pk1 >= 3000'),
	'0', '... which was rolled back');
$node->safe_psql('local', q{SELECT mmrepl.resume('dst')});
wait_both();

###############################################################################
# The article's last word.
###############################################################################

is( rmt('SELECT sum(hashtext(t.*::text)) FROM rmt_test t'),
	loc('SELECT sum(hashtext(t.*::text)) FROM loc_test t'),
	'sum(hashtext(t.*::text)) is equal on both sides');
is(rmt_rows(), loc_rows(), '... and so are the rows');
queue_is_empty('local', 'nothing is left queued at local');
queue_is_empty('remote', 'nothing is left queued at remote');

$dealer->quit;
$writer->quit;
$node->stop('fast');

done_testing();
