# What the triggers of the 2013 article got wrong: remote work that survived a
# local ROLLBACK, two masters waiting for each other for ever, an order by
# local wall-clock time, table names replaced as regular expressions, an UPDATE
# sent as DELETE and INSERT, and connections that stayed dead.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my ($alpha, $beta) = MmreplCluster->new_pair;

# No transaction of alpha's is left open at beta.
sub nothing_left_open
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $beta->poll_ok(
		q{
		SELECT count(*) = 0 FROM pg_stat_activity
		WHERE client_addr IS NOT NULL AND state LIKE 'idle in transaction%'},
		$name);
}

my $retryable = qr/ERROR:\s+(?:40P01|40001|55P03): /;

# Waits for the two statements that both sessions have started and checks that
# it ended well: at least one of them with an error that invites a retry, none
# with another error, neither too late, and the tables equal.
sub settle
{
	my ($name, $here, $there) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my ($out_here, $err_here, $took_here) = $here->finish;
	my ($out_there, $err_there, $took_there) = $there->finish;
	my $errors = () = "$err_here\n$err_there" =~ /$retryable/g;

	cmp_ok($errors, '>=', 1, "$name: one of the two gets a retryable error")
	  or diag("alpha: $err_here\nbeta: $err_there");
	is( join('', grep { $_ ne '' && $_ !~ $retryable } $err_here, $err_there),
		'',
		"$name: and no other error");
	cmp_ok($took_here, '<', 15, "$name: alpha's wait is bounded");
	cmp_ok($took_there, '<', 15, "$name: beta's wait is bounded");

	foreach my $session ($here, $there)
	{
		$session->run('ROLLBACK');
	}
	$alpha->wait_caught_up('beta');
	$beta->wait_caught_up('alpha');
	$alpha->same_rows($beta, 'account', name => "$name: rows are equal");
	return;
}

section 'a local ROLLBACK leaves nothing at the peer' => sub {
	foreach my $mode ('sync', 'async')
	{
		my $table = "undo_$mode";

		$alpha->create_table_on_both($beta,
			"CREATE TABLE $table (id int PRIMARY KEY, v text)");
		$alpha->create_pair($table, 'beta', "mode => '$mode'");
		$alpha->safe_psql('postgres',
			"INSERT INTO $table SELECT g, 'kept' FROM generate_series(1, 3) g"
		);

		$alpha->safe_psql(
			'postgres', qq{
		BEGIN;
		INSERT INTO $table VALUES (10, 'gone');
		UPDATE $table SET v = 'gone' WHERE id = 1;
		DELETE FROM $table WHERE id = 2;
		ROLLBACK;});
		$alpha->safe_psql('postgres', qq{BEGIN; TRUNCATE $table; ROLLBACK;});
		$alpha->wait_caught_up('beta');
		is( $beta->safe_psql('postgres', "SELECT * FROM $table ORDER BY id"),
			"1|kept\n2|kept\n3|kept",
			"$mode: ROLLBACK leaves nothing at the peer");

		$alpha->safe_psql(
			'postgres', qq{
		BEGIN;
		INSERT INTO $table VALUES (20, 'kept');
		SAVEPOINT one;
		INSERT INTO $table VALUES (21, 'gone');
		UPDATE $table SET v = 'gone' WHERE id IN (3, 20);
		SAVEPOINT two;
		DELETE FROM $table;
		ROLLBACK TO one;
		INSERT INTO $table VALUES (22, 'kept');
		RELEASE one;
		COMMIT;});
		$alpha->wait_caught_up('beta');
		is( $beta->safe_psql('postgres', "SELECT * FROM $table ORDER BY id"),
			"1|kept\n2|kept\n3|kept\n20|kept\n22|kept",
			"$mode: ROLLBACK TO SAVEPOINT");

		$alpha->safe_psql(
			'postgres', qq{
		DO \$\$
		BEGIN
			INSERT INTO $table VALUES (30, 'kept');
			BEGIN
				INSERT INTO $table VALUES (31, 'gone');
				UPDATE $table SET v = 'gone' WHERE id = 30;
				PERFORM 1 / 0;
			EXCEPTION WHEN division_by_zero THEN
				INSERT INTO $table VALUES (32, 'kept');
			END;
			BEGIN
				INSERT INTO $table VALUES (33, 'gone'), (1, 'duplicate');
			EXCEPTION WHEN unique_violation THEN
				NULL;
			END;
		END\$\$;});
		$alpha->wait_caught_up('beta');
		is( $beta->safe_psql(
				'postgres', "SELECT * FROM $table WHERE id >= 30 ORDER BY id"
			),
			"30|kept\n32|kept",
			"$mode: exception block of plpgsql");
		$alpha->same_rows($beta, $table);

		# An error at the end of the transaction, and a session that just goes.
		my $session = $alpha->session;
		$session->ok('BEGIN');
		$session->ok("INSERT INTO $table VALUES (40, 'gone')");
		$alpha->terminate($session->pid);
		$alpha->safe_psql('postgres',
			"INSERT INTO $table VALUES (41, 'kept')");
		$alpha->wait_caught_up('beta');
		is( $beta->safe_psql(
				'postgres', "SELECT * FROM $table WHERE id >= 40"),
			'41|kept',
			"$mode: a terminated session leaves nothing at the peer");
		eval { $session->quit };
	}
	nothing_left_open('no rolled back transaction stays open at the peer');
};

section 'two masters in sync mode that want the same rows' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE account (id int PRIMARY KEY, owner text, amount int)');
	$alpha->create_pair_on_both($beta, 'account', q{mode => 'sync'});
	$alpha->safe_psql('postgres',
		q{INSERT INTO account SELECT g, 'nobody', 0 FROM generate_series(1, 5) g}
	);
	$alpha->same_rows($beta, 'account',
		name => 'account is the same on both masters');

	my $here = $alpha->session;
	my $there = $beta->session;
	foreach my $session ($here, $there)
	{
		# Should the extension fail to end it, statement_timeout ends the test.
		$session->ok(q{SET statement_timeout = '20s'});
	}

	# The same row, both changed locally before either knows of the other: what is
	# done in a subtransaction is held back until COMMIT then.
	foreach my $session ($here, $there)
	{
		$session->ok(q{BEGIN; SET LOCAL mmrepl.sync_flush = 'commit'; SAVEPOINT held});
	}
	$here->ok(q{UPDATE account SET owner = 'alpha', amount = 1 WHERE id = 1});
	$there->ok(q{UPDATE account SET owner = 'beta', amount = 2 WHERE id = 1});
	$here->start('COMMIT');
	$there->start('COMMIT');
	settle('same row', $here, $there);
	is( $alpha->safe_psql(
			'postgres',
			q{SELECT owner || amount IN ('nobody0', 'alpha1', 'beta2')
		  FROM account WHERE id = 1}),
		't',
		'same row: it holds one of the two values whole');

	# Opposite order, the statement being sent at its end: every one of the two
	# waits for a lock on its own node, where no cycle can be seen.
	$here->ok('BEGIN');
	$there->ok('BEGIN');
	$here->ok(q{UPDATE account SET owner = 'alpha' WHERE id = 2});
	$there->ok(q{UPDATE account SET owner = 'beta' WHERE id = 3});
	$here->start(q{UPDATE account SET owner = 'alpha' WHERE id = 3});
	$there->start(q{UPDATE account SET owner = 'beta' WHERE id = 2});
	settle('opposite order', $here, $there);

	# The same row without a cycle: the second one waits and then goes on.
	$here->ok('BEGIN');
	$here->ok(q{UPDATE account SET amount = amount + 1 WHERE id = 4});
	$there->start(q{UPDATE account SET amount = amount + 1 WHERE id = 4});
	$beta->poll_ok(
		'SELECT count(*) > 0 FROM pg_stat_activity WHERE pid = '
		  . $there->pid
		  . q{ AND wait_event_type = 'Lock'},
		'no cycle: the second master waits for the first');
	$here->ok('COMMIT');
	my ($out, $err, $took) = $there->finish;
	is($err, '', 'no cycle: and goes on after its commit');
	is( $alpha->safe_psql(
			'postgres', 'SELECT amount FROM account WHERE id = 4'),
		'2',
		'no cycle: both increments count');
	$alpha->same_rows($beta, 'account', name => 'no cycle: rows are equal');

	# A cancel is obeyed while the statement waits for a lock at the peer.
	my $blocker = $beta->session;
	$blocker->ok('BEGIN');
	$blocker->ok('SELECT * FROM account WHERE id = 5 FOR UPDATE');
	$here->ok(q{SET mmrepl.sync_timeout = '50s'});
	$here->ok(q{SET mmrepl.sync_lock_timeout = '50s'});
	$here->start(q{UPDATE account SET amount = 99 WHERE id = 5});
	$beta->poll_ok(
		q{SELECT count(*) > 0 FROM pg_stat_activity
	  WHERE client_addr IS NOT NULL AND wait_event_type = 'Lock'},
		'cancel: the statement waits at the peer');
	my $before = Time::HiRes::time();
	$alpha->safe_psql('postgres',
		'SELECT pg_cancel_backend(' . $here->pid . ')');
	($out, $err) = $here->finish;
	$took = Time::HiRes::time() - $before;
	like($err, qr/ERROR:\s+57014: /, 'cancel: the statement is cancelled');
	cmp_ok($took, '<', 3, 'cancel: at once');
	$beta->poll_ok(
		q{SELECT count(*) = 0 FROM pg_stat_activity
	  WHERE client_addr IS NOT NULL AND wait_event_type = 'Lock'},
		'cancel: nothing waits at the peer any more');
	$blocker->ok('COMMIT');
	nothing_left_open('cancel: no transaction stays open at the peer');
	$alpha->same_rows($beta, 'account', name => 'cancel: rows are equal');
	is( $alpha->safe_psql(
			'postgres', 'SELECT amount FROM account WHERE id = 5'),
		'0',
		'cancel: the update is undone');

	# A lock at the peer that is never released ends the wait by its own timeout.
	$blocker->ok('BEGIN');
	$blocker->ok('SELECT * FROM account WHERE id = 5 FOR UPDATE');
	$here->ok(q{SET mmrepl.sync_lock_timeout = '1s'});
	$here->ok(q{RESET mmrepl.sync_timeout});
	$here->start(q{UPDATE account SET amount = 98 WHERE id = 5});
	($out, $err, $took) = $here->finish;
	like($err, $retryable, 'sync_lock_timeout: a retryable error');
	cmp_ok($took, '<', 9, 'sync_lock_timeout: is obeyed');
	$blocker->ok('ROLLBACK');
	$here->ok('UPDATE account SET amount = 97 WHERE id = 5');
	is( $beta->safe_psql(
			'postgres', 'SELECT amount FROM account WHERE id = 5'),
		'97',
		'sync_lock_timeout: the retry succeeds');
	$_->quit foreach ($blocker, $here, $there);
};

section 'sessions in different time zones' => sub {
	$alpha->create_table_on_both(
		$beta, q{
	CREATE TYPE mood AS ENUM ('good', 'bad');
	CREATE TYPE moment AS (at timestamptz, plain timestamp, day date,
						   span interval, f float8, b bytea, m mood);
	CREATE TABLE zone (id int PRIMARY KEY, v int, at timestamptz,
					   plain timestamp, day date, span interval, f float8,
					   whole moment);
});
	$alpha->create_pair('zone', 'beta');
	$alpha->safe_psql('postgres', q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');

	my @zones = (
		[ 'Asia/Shanghai', 'German', 'iso_8601' ],
		[ 'America/New_York', 'SQL, MDY', 'sql_standard' ],
		[ 'Pacific/Kiritimati', 'Postgres, DMY', 'postgres_verbose' ]);
	my @sessions;
	foreach my $zone (@zones)
	{
		my $session = $alpha->session;
		$session->ok("SET TimeZone = '$zone->[0]'");
		$session->ok("SET DateStyle = '$zone->[1]'");
		$session->ok("SET IntervalStyle = '$zone->[2]'");
		$session->ok('SET extra_float_digits = -10');
		$session->ok(q{SET bytea_output = 'escape'});
		push @sessions, $session;
	}

	# The far east writes first: by wall clock its rows are the youngest.
	$sessions[0]->ok(
		q{INSERT INTO zone VALUES (1, 1, '2013-03-04 05:06:07.123456+01',
	  '2013-03-04 05:06:07', '2013-03-04', '1 mon -2 days 03:04:05.6', 0.1)});
	foreach my $v (2 .. 7)
	{
		$sessions[ $v % 3 ]->ok("UPDATE zone SET v = $v WHERE id = 1");
	}
	$sessions[1]->ok('DELETE FROM zone WHERE id = 1');
	$sessions[0]->ok(
		q{INSERT INTO zone VALUES (1, 8, timestamptz '2013-03-10 12:00+00',
	  timestamp '2013-04-03 02:01', date '2013-05-04', '-1 year 2 mons', 1e-7)}
	);
	$sessions[2]->ok('UPDATE zone SET v = 9 WHERE id = 1');
	$sessions[1]->ok(
		q{INSERT INTO zone SELECT 2, 1, at, plain, day, span, f / 3 FROM zone}
	);

	# A value of many parts, of types that the session's settings change, and
	# in each session.
	foreach my $n (0 .. 2)
	{
		$sessions[$n]->ok(
			qq{UPDATE zone SET whole = ROW(at, plain, day,
				 '1 year 2 mons -3 days 04:05:06', f / 7, '\\x00ff', 'bad')
			   WHERE id = 2});
		$sessions[$n]->ok(
			qq{INSERT INTO zone SELECT 10 + $n, 0, at, plain, day, span, f, whole
			   FROM zone WHERE id = 2});
	}

	foreach my $order ('id', 'create_time, id', 'ticket, id')
	{
		is( $alpha->safe_psql(
				'postgres', qq{
			SELECT string_agg(left(op, 1), '' ORDER BY $order)
			FROM (SELECT id, create_time, ticket,
						 split_part(ltrim(dst_query), ' ', 1) AS op
				  FROM mmrepl.sync_err_rec) q}),
			'IUUUUUUDIUIUIUIUI',
			"time zones: order by $order is the order of the commits");
	}
	$alpha->safe_psql('postgres', q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	is($beta->safe_psql('postgres', 'SELECT v FROM zone WHERE id = 1'),
		'9', 'time zones: the last write stands at the peer');
	$alpha->same_rows($beta, 'zone', name => 'time zones: values are equal');
	is( $beta->safe_psql(
			'postgres',
			q{SELECT at = '2013-03-10 12:00+00', plain = '2013-04-03 02:01',
				 day = '2013-05-04', span = '-10 mons' FROM zone WHERE id = 1}
		),
		't|t|t|t',
		'time zones: and not turned round');
	$_->quit foreach @sessions;
};

section 'quoted names and names of the same letters' => sub {
	$alpha->create_table_on_both(
		$beta, q{
	CREATE SCHEMA "Sales";
	CREATE SCHEMA "se.lect""";
	CREATE TABLE public."Order"
	  ("Id" int, "select" text, "Mixed ""Case""" text, "a.b" int,
	   PRIMARY KEY ("select", "Id"));
	CREATE TABLE "Sales"."Order" (LIKE public."Order" INCLUDING ALL);
	CREATE TABLE "se.lect"""."into" (LIKE public."Order" INCLUDING ALL);
	CREATE TABLE public."order" (LIKE public."Order" INCLUDING ALL);
	CREATE TABLE public."O(1)*.|$" (LIKE public."Order" INCLUDING ALL);
	CREATE TABLE public."éééééééééééééééééééééééééééééééx"
	  (LIKE public."Order" INCLUDING ALL);
});
	my @tables = (
		'public."Order"', '"Sales"."Order"',
		'"se.lect"""."into"', 'public."order"',
		'public."O(1)*.|$"', 'public."éééééééééééééééééééééééééééééééx"');
	foreach my $mode ('async', 'sync')
	{
		my $n = 0;
		foreach my $table (@tables)
		{
			$n++;
			if ($mode eq 'async')
			{
				$alpha->create_pair($table, 'beta');
			}
			else
			{
				$alpha->safe_psql('postgres',
					qq{SELECT mmrepl.alter_pair('$table', 'beta', mode => 'sync')}
				);
			}
			$alpha->safe_psql(
				'postgres', qq{
			INSERT INTO $table VALUES ($n, 'Order', '$mode', $n), ($n, '', '', $n);
			UPDATE $table SET "select" = '"Sales"."Order"', "a.b" = "a.b" + 1
			WHERE "Id" = $n AND "select" = 'Order';
			DELETE FROM $table WHERE "Id" = $n AND "select" = '';
		});
		}
		$alpha->wait_caught_up('beta');
		$alpha->same_rows($beta, $_, name => "$mode: $_") foreach @tables;
		is( $beta->safe_psql(
				'postgres',
				join(' UNION ALL ',
					map { qq{SELECT count(*)::int, max("Id") FROM $_} }
					  @tables)
				  . ' ORDER BY 2'),
			join("\n", map { "1|$_" } (1 .. @tables)),
			"$mode: every table got its own row");
		$alpha->safe_psql('postgres',
			join(';', map { "TRUNCATE $_" } @tables));
		$alpha->wait_caught_up('beta');
	}

	# To another name in another schema.
	$beta->safe_psql(
		'postgres', q{
	CREATE SCHEMA "Archive";
	CREATE TABLE "Archive"."Order" (LIKE public."Order" INCLUDING ALL)});
	$alpha->safe_psql('postgres',
		q{CREATE TABLE named (LIKE public."Order" INCLUDING ALL)});
	$alpha->create_pair('named', 'beta',
		q{remote_table => '"Archive"."Order"'});
	$alpha->safe_psql('postgres',
		q{INSERT INTO named VALUES (1, 'named', '', 1)});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows(
		$beta, 'named',
		peer_table => '"Archive"."Order"',
		name => 'a quoted remote_table');
};

section 'an UPDATE does not cascade to children at the peer' => sub {
	$alpha->create_table_on_both(
		$beta, q{
	CREATE TABLE parent (id int PRIMARY KEY, info text);
	CREATE TABLE child (id int PRIMARY KEY, parent int NOT NULL
	  REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE);
});
	$beta->safe_psql(
		'postgres', q{
	CREATE TABLE only_here (id int PRIMARY KEY, parent int NOT NULL
	  REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE)});
	$alpha->create_pair('parent', 'beta');
	$alpha->create_pair('child', 'beta');
	foreach my $mode ('async', 'sync')
	{
		$alpha->safe_psql('postgres',
			"SELECT mmrepl.alter_pair('$_', 'beta', mode => '$mode')")
		  foreach ('parent', 'child');
		$alpha->safe_psql(
			'postgres', q{
		INSERT INTO parent VALUES (1, 'one'), (2, 'two');
		INSERT INTO child VALUES (11, 1), (12, 1), (21, 2)});
		$alpha->wait_caught_up('beta');
		$beta->safe_psql('postgres', 'INSERT INTO only_here VALUES (1, 1)');

		$alpha->safe_psql('postgres',
			q{UPDATE parent SET info = 'changed' WHERE id = 1});
		$alpha->wait_caught_up('beta');
		is( $beta->safe_psql(
				'postgres', 'SELECT info FROM parent WHERE id = 1'),
			'changed',
			"$mode: the parent is updated at the peer");
		is($beta->safe_psql('postgres', 'SELECT count(*) FROM child'),
			'3', "$mode: and its children are still there");
		is($beta->safe_psql('postgres', 'SELECT count(*) FROM only_here'),
			'1', "$mode: those that exist only there, too");

		# The key changes: the children follow.
		$alpha->safe_psql('postgres',
			q{UPDATE parent SET id = 10 WHERE id = 1});
		$alpha->wait_caught_up('beta');
		$alpha->same_rows($beta, 'parent',
			name => "$mode: parent's key changed");
		$alpha->same_rows($beta, 'child',
			name => "$mode: its children followed");
		is( $beta->safe_psql(
				'postgres',
				'SELECT count(*) FROM child JOIN parent ON parent.id = child.parent'
			),
			'3',
			"$mode: no child at the peer lost its parent");
		is( $beta->safe_psql('postgres', 'SELECT count(*) FROM only_here'),
			'1',
			"$mode: a child that exists only at the peer is not deleted");

		# A real DELETE is one, on both sides.
		$beta->safe_psql('postgres', 'DELETE FROM only_here');
		$alpha->safe_psql('postgres', q{DELETE FROM parent});
		$alpha->wait_caught_up('beta');
		is( $beta->safe_psql(
				'postgres',
				'SELECT (SELECT count(*) FROM parent) + (SELECT count(*) FROM child)'
			),
			'0',
			"$mode: a DELETE that cascades at the source arrives whole");
	}
};

section 'a cached connection that died' => sub {
	my $session = $alpha->session;
	my %known = map { $_ => 1 } $beta->peer_sessions;
	$session->ok(q{INSERT INTO undo_sync VALUES (100, 'kept')});
	my @cached = grep { !$known{$_} } $beta->peer_sessions;
	is(scalar @cached, 1, 'a sync session keeps one connection to the peer');
	foreach my $id (101 .. 103)
	{
		%known =
		  map { $_ => 1 } grep { $_ ne $cached[0] } $beta->peer_sessions;
		$beta->terminate(@cached);
		my ($out, $err) =
		  $session->run("INSERT INTO undo_sync VALUES ($id, 'kept')");
		is($err, '',
				"row $id: the next transaction finds the connection dead"
			  . ' and works on a new one');
		is( $beta->safe_psql(
				'postgres', "SELECT count(*) FROM undo_sync WHERE id = $id"),
			'1',
			"row $id: is at the peer at once");
		@cached = grep { !$known{$_} } $beta->peer_sessions;
		is(scalar @cached, 1, "row $id: there is one connection again");
	}

	# In the middle of a transaction nothing can save it, but it must say so, and
	# leave nothing.
	$session->ok('BEGIN');
	$session->ok(q{INSERT INTO undo_sync VALUES (110, 'gone')});
	$beta->terminate(@cached);
	my ($out, $err) =
	  $session->run(q{INSERT INTO undo_sync VALUES (111, 'gone')});
	my ($out2, $err2) = $session->run('COMMIT');
	like(
		$err . $err2,
		qr/ERROR:\s+(?:08\w{3}|57P\d\d|40001|MM\w{3}): /,
		'a connection lost in the middle of a transaction is an error');
	is( $alpha->safe_psql(
			'postgres', q{SELECT count(*) FROM undo_sync WHERE v = 'gone'}),
		'0',
		'... nothing of it is committed here');
	is( $beta->safe_psql(
			'postgres', q{SELECT count(*) FROM undo_sync WHERE v = 'gone'}),
		'0',
		'... or there');
	$session->ok(q{INSERT INTO undo_sync VALUES (112, 'kept')});
	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, 'undo_sync',
		name => 'and the session goes on afterwards');
	$session->quit;
};

is($alpha->queued('beta'), '0', 'nothing is left queued at alpha');
is($beta->queued('alpha'), '0', 'nothing is left queued at beta');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
