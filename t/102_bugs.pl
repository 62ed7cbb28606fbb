# Bugs that were found once and must not come back, continued: what a role that may
# call apply() can do with batches of its own, transactions that go back to a
# savepoint, clocks.  Each part says what went wrong.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => "mmrepl.retry_max_delay = '1s'\nmmrepl.max_servers = 1");
my $encoding = 6; # UTF8
my $hour = 3600 * 1_000_000;

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
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->wait_caught_up('beta');
}

# A setting that is in force for all that begins from now on.
sub configure
{
	my ($node, $setting, $value) = @_;

	$node->append_conf('postgresql.conf', "$setting = '$value'");
	$node->reload;
	$node->poll_query_until('postgres', "SELECT current_setting('$setting') = '$value'")
	  or die "$setting was not set";
	return;
}

# A batch with one transaction of these records, as SQL; see include/mmrepl/batch.hpp.
sub apply
{
	my (%batch) = @_;
	my $segment = "\x01" . join('', @{ $batch{records} || [] });
	my $bytes = pack('NCN', 0x4D4D5231, 0, $encoding)
	  . ($batch{node} || 'n' x 16)
	  . pack('NQ>Q>Q>Q>N',
		1, $batch{clock} || 0, 0, $batch{ticket}, 0, 0)
	  . 'X'
	  . pack('Q>Q>CNN', $batch{ticket}, 1, 0, 1, length $segment)
	  . $segment;

	return sprintf q{SELECT mmrepl.apply('\x%s')}, unpack('H*', $bytes);
}

# The definition, as number 0, of a table in "public" whose key is the int "id".
sub definition
{
	my ($table) = @_;

	return pack('CC', 0, 0x0c) . pack('C/a*', $table) . pack('CC', 0, 1)
	  . pack('C', 2 | 0x40 | 0x80) . 'id' . pack('C', 23);
}

here(q{CREATE ROLE writer LOGIN; SELECT mmrepl.allow_apply('writer')});
$alpha->create_table_on_both($beta, 'CREATE TABLE item (id int PRIMARY KEY, v text)');
$alpha->create_pair('item', 'beta');
here(q{INSERT INTO item VALUES (1, 'start')});
synced();

###############################################################################

# A table was locked before it was asked whether the caller may write to it: who
# may call apply() could bring any table to a halt, by waiting for its lock.
section 'no lock without a right' => sub {
	here('CREATE TABLE secret (id int PRIMARY KEY)');
	my $holder = $alpha->session;
	my $caller = $alpha->session('postgres', '-U', 'writer');

	$caller->ok(q{SET lock_timeout = '5s'});
	$holder->ok('BEGIN');
	$holder->ok('LOCK TABLE secret IN SHARE MODE');
	foreach my $case ([ 'TRUNCATE', pack('C', 5 << 5) ],
		[ 'INSERT', pack('CCC', 1 << 5, 2, 7) ])
	{
		my (undef, $err) = $caller->run(
			apply(ticket => 10, records => [ definition('secret'), $case->[1] ]));

		like($err, qr/ERROR:\s+42501/, "$case->[0]: refused at once");
	}
	$holder->ok('ROLLBACK');
	here('GRANT INSERT ON secret TO writer');
	$caller->ok(
		apply(ticket => 10, records => [ definition('secret'), pack('CCC', 1 << 5, 2, 7) ]));
	is(here('SELECT id FROM secret'), '7', 'with the right the row is written');
	$_->quit foreach ($holder, $caller);
};

# Where a column's text depends on settings, search_path became just pg_catalog, and
# the caller's temporary tables came before those that a trigger's function meant.
section 'search_path of a trigger at the receiver' => sub {
	$alpha->create_table_on_both(
		$beta, q{
		CREATE TABLE plain (id int PRIMARY KEY, path text DEFAULT '-');
		CREATE TABLE with_array (id int PRIMARY KEY, a int[], path text);
	});
	there(
		q{CREATE FUNCTION note_path() RETURNS trigger LANGUAGE plpgsql AS $$
		  BEGIN
			  NEW.path := current_setting('search_path');
			  RETURN NEW;
		  END $$;});
	foreach my $table ('plain', 'with_array')
	{
		there(
			qq{CREATE TRIGGER note BEFORE INSERT ON $table FOR EACH ROW
			   EXECUTE FUNCTION note_path();
			   ALTER TABLE $table ENABLE ALWAYS TRIGGER note});
		$alpha->create_pair($table, 'beta');
	}
	here(q{INSERT INTO plain VALUES (1); INSERT INTO with_array VALUES (1, '{1}')});
	synced();
	is(there("SELECT path FROM $_"), 'pg_catalog, pg_temp', $_)
	  foreach ('plain', 'with_array');
};

# With array_nulls = off at the receiver a NULL in an array became the text "NULL", or
# was refused.
section 'NULL in an array' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE nulls (id int PRIMARY KEY, a int[], b text[])');
	$alpha->create_pair('nulls', 'beta');
	foreach my $node ($alpha, $beta)
	{
		$node->append_conf('postgresql.conf', "datestyle = 'german'\nextra_float_digits = -5");
		configure($node, 'array_nulls', 'off');
	}
	here(q{SET array_nulls = on; INSERT INTO nulls VALUES (1, '{1,NULL}', '{a,NULL,"NULL"}')});
	synced();
	is(there(q{SELECT a[2] IS NULL AND b[2] IS NULL AND b[3] = 'NULL' FROM nulls}),
		't', 'it arrives as what it is');
	foreach my $node ($alpha, $beta)
	{
		$node->append_conf('postgresql.conf', "datestyle = 'ISO'\nextra_float_digits = 1");
		configure($node, 'array_nulls', 'on');
	}
};

# The message of a lost race for a key was made of memory that was given back.
section 'the context of a lost race' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE race (id int PRIMARY KEY, u int UNIQUE, v text)');
	there(
		q{CREATE FUNCTION slow(v text) RETURNS boolean LANGUAGE plpgsql AS $$
		  BEGIN
			  IF v = 'slow' THEN
				  PERFORM pg_advisory_lock(1);
				  PERFORM pg_advisory_unlock(1);
			  END IF;
			  RETURN true;
		  END $$;
		  ALTER TABLE race ADD CHECK (slow(v))});
	$alpha->create_pair('race', 'beta');
	my $session = $beta->session;

	$session->ok('SELECT pg_advisory_lock(1)');
	here(q{INSERT INTO race VALUES (5, 5, 'slow')});
	ok( $beta->poll_query_until(
			'postgres',
			'SELECT count(*) > 0 FROM pg_stat_activity WHERE '
			  . $session->pid
			  . ' = ANY (pg_blocking_pids(pid))'),
		'the key was not there');
	$session->ok(q{INSERT INTO race VALUES (5, 6, 'there')});
	$session->ok('SELECT pg_advisory_unlock(1)');
	$session->quit;
	synced();
	is(there('SELECT id, u, v FROM race'), '5|5|slow', 'it is tried again');
	like(
		slurp_file($beta->logfile),
		qr/due to a concurrent insert of its key.*?CONTEXT:  applying ticket \d+ \(INSERT, relation "public.race", key \(5\)\) from node/s,
		'the error says which row it was');
};

# Whatever clock a batch bore was followed: one call brought all later tickets out of
# the range that peers take.
section 'a clock far ahead' => sub {
	my $now = 'extract(epoch FROM clock_timestamp()) * 1000000';
	my $last = sub {
		my ($id) = @_;
		here("INSERT INTO item VALUES ($id, 'clock')");
		synced();
		return here(
			"SELECT (last_ticket - $now) / 60000000 FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'"
		);
	};
	my $clock = sub {
		my ($clock) = @_;
		$alpha->safe_psql(
			'postgres',
			apply(ticket => 11, clock => $clock),
			extra_params => [ '-U', 'writer' ]);
		return;
	};
	my $time = sub { return here("SELECT ($now)::bigint") + $_[0]; };

	$clock->($_) foreach ($time->(24 * 365 * $hour), 2**62, $time->(3 * $hour));
	cmp_ok($last->(10), '<', 1, 'it is not followed');
	ok($alpha->log_contains(qr/clock of node [0-9a-f-]+ is .* ahead/),
		'and the log says so');
	$clock->($time->($hour / 2));
	cmp_ok($last->(11), '>', 20, 'half an hour is');

	# The same by way of the watermark that a peer tells.
	my $watermark = there('SELECT watermark FROM mmrepl.progress');
	there('UPDATE mmrepl.progress SET watermark = 4611686018427387904');
	$beta->terminate_peers;
	here(q{INSERT INTO item VALUES (12, 'not lost')});
	$alpha->poll_ok(
		q{SELECT state = 'retrying' AND last_error_sqlstate = 'MM014'
		  AND last_error ~ 'far ahead'
		  FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'},
		'a watermark of another time stops the stream')
	  || diag($alpha->describe('beta'));
	there("UPDATE mmrepl.progress SET watermark = $watermark");
	here(q{SELECT mmrepl.retry_now('beta')});
	synced();
	$alpha->same_rows($beta, 'item');
	cmp_ok($last->(13), '<', 60, 'the clock has not followed that either');
};

# A part of a transaction that would have exceeded the limit gave the stream up
# although it was rolled back.
section 'too large, but rolled back to a savepoint' => sub {
	configure($alpha, 'mmrepl.max_queue_size', '128kB');
	here(q{SELECT mmrepl.pause('beta')});
	my $too_much = q{INSERT INTO item SELECT g, repeat('x', 100)
		FROM generate_series(10001, 15000) g};

	foreach my $case (
		[ 'a savepoint', "SAVEPOINT s; $too_much; ROLLBACK TO s" ],
		[ 'one within', "SAVEPOINT s; SAVEPOINT t; $too_much; RELEASE t; ROLLBACK TO s" ],
		[ 'within a released one', "SAVEPOINT s; SAVEPOINT t; $too_much; ROLLBACK TO t; RELEASE s" ],
	  )
	{
		my ($name, $part) = @$case;

		here(
			qq{SET mmrepl.buffer_memory = '64kB';
			   BEGIN;
			   INSERT INTO item VALUES (20, 'before $name');
			   $part;
			   INSERT INTO item VALUES (21, 'after $name');
			   COMMIT});
		is( here(q{SELECT resync_since FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'}),
			'', "$name: the stream is not given up");
		is(here('SELECT count(*) FROM mmrepl.sync_err_rec'),
			'2', 'what is left of the transaction is queued');
		here(q{SELECT mmrepl.resume('beta')});
		synced();
		$alpha->same_rows($beta, 'item');
		here('DELETE FROM item WHERE id IN (20, 21)');
		synced();
		here(q{SELECT mmrepl.pause('beta')});
	}

	# What is not rolled back still counts.
	here(
		qq{SET mmrepl.buffer_memory = '64kB';
		   BEGIN; SAVEPOINT s; $too_much; RELEASE s; SAVEPOINT t;
		   INSERT INTO item VALUES (22); ROLLBACK TO t; COMMIT});
	isnt(here(q{SELECT resync_since FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'}),
		'', 'what is kept gives the stream up');
};

# After a resync() that was rolled back the transaction went on as if it were its
# copy: it was queued for a stream for which nothing is, and no limit held for it.
section 'resync() that is rolled back to a savepoint' => sub {
	my $heads = q{SELECT count(*) FROM (TABLE mmrepl.queue_0 UNION ALL TABLE mmrepl.queue_1
		UNION ALL TABLE mmrepl.queue_2) q WHERE flags & 1 = 1 AND flags & 32 = 0};
	my $before = here($heads);

	here(q{BEGIN; SAVEPOINT s; SELECT mmrepl.resync('beta'); ROLLBACK TO s;
		   INSERT INTO item VALUES (30, 'not queued'); COMMIT});
	here(q{BEGIN; SAVEPOINT r; SAVEPOINT s; SELECT mmrepl.resync('beta'); RELEASE s; ROLLBACK TO r;
		   INSERT INTO item VALUES (31, 'not queued'); COMMIT});
	cmp_ok(here($heads), '<=', $before, 'nothing is queued');
	here(q{BEGIN; SAVEPOINT r; SELECT mmrepl.resync('beta'); ROLLBACK TO r;
		   SAVEPOINT s; SELECT mmrepl.resync('beta', truncate => true);
		   RELEASE s; SAVEPOINT t; INSERT INTO item VALUES (32, 'lost'); ROLLBACK TO t;
		   INSERT INTO item VALUES (33, 'queued'); COMMIT});
	here(q{SELECT mmrepl.resume('beta')});
	synced();
	$alpha->same_rows($beta, 'item');
	is(there('SELECT count(*) FROM item WHERE id IN (30, 31, 33)'),
		'3', 'one that is not has its copy made');
};

# A server beyond max_servers was given up for what waited for others, and had been
# delivered to them; and who looked at that kept locks on all queue tables.
section 'the limit for a server beyond max_servers' => sub {
	configure($alpha, 'mmrepl.max_queue_size', '0');
	$alpha->create_table_on_both($beta, 'CREATE TABLE other (id int PRIMARY KEY, v text)');
	$alpha->add_peer($beta, server => 'second');
	$alpha->create_pair('other', 'second');
	here(q{INSERT INTO item SELECT g, repeat('x', 100) FROM generate_series(20001, 30000) g});
	synced();
	my $on_disk = q{SELECT sum(pg_relation_size(oid)) FROM pg_class
		WHERE relnamespace = 'mmrepl'::regnamespace AND relname ~ '^queue_[0-9]$'};
	my $given_up = q{SELECT resync_since IS NOT NULL FROM mmrepl.stream
		WHERE server_name = 'second'};

	cmp_ok(here($on_disk), '>', 512 * 1024, 'much is on the disk');
	configure($alpha, 'mmrepl.max_queue_size', '512kB');
	here(q{INSERT INTO other VALUES (1)});
	is(here($given_up), 'f', 'it is not of this stream');

	my $session = $alpha->session;
	$session->ok(q{SET mmrepl.buffer_memory = '64kB'; INSERT INTO other VALUES (2)});
	$session->ok('BEGIN');
	$session->ok(q{INSERT INTO other SELECT g, repeat('x', 100) FROM generate_series(1001, 2000) g});
	is( $session->ok(
			q{SELECT count(DISTINCT relation) FROM pg_locks WHERE pid = pg_backend_pid()
			  AND relation::regclass::text ~ '^mmrepl.queue_[0-9]$'}),
		'1', 'only the table that is written to is locked');
	$session->ok('COMMIT');
	is(here($given_up), 'f', 'there is room');
	$session->ok(q{INSERT INTO other SELECT g, repeat('x', 100) FROM generate_series(2001, 4000) g});
	is(here($given_up), 'f', 'still');
	$session->ok(q{INSERT INTO other SELECT g, repeat('x', 100) FROM generate_series(4001, 7000) g});
	is(here($given_up), 't', 'what waits for the stream itself counts');
	$session->quit;
};

# Transactions that were prepared come late, with an old ticket, and move no watermark.  What
# followed them was sent at once, and applied though they had failed.
section 'what follows a late transaction waits for it' => sub {
	$alpha->create_table_on_both($beta,
		'CREATE TABLE late (id int PRIMARY KEY, v text)');
	$alpha->create_pair('late', 'beta');
	here(q{INSERT INTO late VALUES (1, 'start')});
	synced();
	configure($alpha, 'mmrepl.batch_transactions', '1');
	here(q{BEGIN; INSERT INTO late VALUES (2, 'late'); UPDATE late SET v = 'late' WHERE id = 1;
		PREPARE TRANSACTION 'late'});
	here(q{INSERT INTO late VALUES (3, 'earlier there')});
	synced();
	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	here(q{COMMIT PREPARED 'late'});
	here(q{UPDATE late SET v = 'last' WHERE id = 2});
	my $conflicts = there('SELECT coalesce(sum(conflicts), 0) FROM mmrepl.progress');
	my $holder = $beta->session;

	$holder->ok('BEGIN; SELECT 1 FROM late WHERE id = 1 FOR UPDATE');
	here(q{SELECT mmrepl.resume('beta')});
	my $blocked = 'FROM pg_stat_activity WHERE ' . $holder->pid . ' = ANY (pg_blocking_pids(pid))';
	$beta->poll_ok("SELECT count(*) = 1 $blocked", 'the late one waits for a lock');
	my $before = $alpha->stat('beta', 'retries');
	there("SELECT pg_cancel_backend(pid) $blocked");
	ok( $alpha->poll_query_until('postgres',
			"SELECT retries > $before FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'"),
		'and is cancelled');
	is(there('SELECT count(*) FROM late WHERE id = 2'), '0', 'what follows it is not there');
	$holder->ok('COMMIT');
	$holder->quit;
	synced();
	$alpha->same_rows($beta, 'late');
	is(there('SELECT coalesce(sum(conflicts), 0) FROM mmrepl.progress'), $conflicts, 'without a conflict');
	configure($alpha, 'mmrepl.batch_transactions', '2000');
};

# Of a transaction of more than 4 GB no more than that was counted: the view showed too
# little, and the limit let more wait than it says.  (The row stands for such a one.)
section 'more than 4 GB wait' => sub {
	configure($alpha, 'mmrepl.max_queue_size', '0');
	here(q{SELECT mmrepl.pause('beta')});
	here(
		q{INSERT INTO mmrepl.queue_0 (ticket, xid, stream, flags, changes, payload)
		  SELECT last_ticket + 1, pg_current_xact_id()::text::bigint, stream, 3, 7,
				 '\x00000000000000000000000000000001' || int8send(6000000000)
			FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'});
	$alpha->restart;
	$alpha->poll_ok(
		q{SELECT queue_bytes >= 6000000000
		  FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'}, 'all of it is counted')
	  || diag($alpha->describe('beta'));
};

done_testing();
