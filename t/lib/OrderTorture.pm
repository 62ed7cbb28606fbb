# OrderTorture.pm
#		Many clients hammer a few rows at the source; what the peer shows meanwhile
#		and what it has seen afterwards must be right.
#
# NOTES
#		Every transaction writes its row of "tx" last.  At the peer one session
#		applies at a time, so its history is a sequence of whole transactions, and
#		each ends with that row: a transaction that arrives in pieces, mixed with
#		another, or with a piece missing does not look like the one at the source.

package OrderTorture;

use strict;
use warnings;

use History;
use IPC::Run;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $schema = q{
	CREATE TABLE hot (id int PRIMARY KEY, n int NOT NULL, token text);
	CREATE TABLE mirror (id int PRIMARY KEY REFERENCES hot, token text);
	CREATE TABLE child (id bigint PRIMARY KEY, hot int NOT NULL REFERENCES hot,
						token text);
	CREATE TABLE flip (id int PRIMARY KEY, token text);
	CREATE TABLE flop (id int PRIMARY KEY REFERENCES flip, token text);
	CREATE TABLE place (id int PRIMARY KEY, token text);
	CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL, token text);
	CREATE TABLE tx (id bigint PRIMARY KEY, token text);
};
my @tables = qw(hot mirror child flip flop place account tx);

# What the clients call.  Each function writes some rows; the caller adds the
# row of tx.  A failed subtransaction stands in every second one.
my $functions = q{
	CREATE SEQUENCE child_id;
	CREATE SEQUENCE tx_id;
	CREATE PROCEDURE end_tx(t text) LANGUAGE sql
		AS $$INSERT INTO tx VALUES (nextval('tx_id'), t)$$;

	CREATE FUNCTION touch(i int, t text) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		UPDATE hot SET token = t WHERE id = i;
		UPDATE mirror SET token = t WHERE id = i;
	END $$;

	CREATE FUNCTION undone(i int) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		BEGIN
			UPDATE mirror SET token = 'undone' WHERE id = i;
			INSERT INTO child VALUES (nextval('child_id'), i, 'undone');
			BEGIN
				UPDATE hot SET n = n + 1, token = 'undone' WHERE id = i;
				INSERT INTO mirror VALUES (i, 'twice');
			EXCEPTION WHEN unique_violation THEN
				UPDATE hot SET token = 'undone as well' WHERE id = i;
			END;
			PERFORM 1 / 0;
		EXCEPTION WHEN division_by_zero THEN
			NULL;
		END;
	END $$;

	-- n of a hot row is the number of its children
	CREATE FUNCTION breed(i int, t text) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		UPDATE hot SET n = n + 2, token = t WHERE id = i;
		UPDATE mirror SET token = t WHERE id = i;
		INSERT INTO child SELECT nextval('child_id'), i, t FROM generate_series(1, 2);
	END $$;
	CREATE FUNCTION cull(i int, t text) RETURNS void LANGUAGE plpgsql AS $$
	DECLARE
		gone int;
	BEGIN
		PERFORM 1 FROM hot WHERE id = i FOR UPDATE;
		DELETE FROM child WHERE id IN
			(SELECT id FROM child WHERE hot = i ORDER BY id LIMIT 3);
		GET DIAGNOSTICS gone = ROW_COUNT;
		UPDATE hot SET n = n - gone, token = t WHERE id = i;
		UPDATE mirror SET token = t WHERE id = i;
	END $$;

	-- deleted, inserted again, or both in one transaction
	CREATE FUNCTION flipflop(i int, t text) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM pg_advisory_xact_lock(i);
		DELETE FROM flop WHERE id = i;
		IF FOUND THEN
			DELETE FROM flip WHERE id = i;
			IF random() < 0.5 THEN
				RETURN;
			END IF;
		END IF;
		INSERT INTO flip VALUES (i, t);
		INSERT INTO flop VALUES (i, t);
	END $$;

	-- the key itself goes to and fro
	CREATE FUNCTION move(i int, t text) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM pg_advisory_xact_lock(100 + i);
		UPDATE place SET token = t,
			id = CASE WHEN id > 100 THEN id - 100 ELSE id + 100 END
		WHERE id IN (i, i + 100);
	END $$;

	CREATE FUNCTION pay(a int, b int, amount int, t text) RETURNS void
	LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM 1 FROM account WHERE id IN (a, b) ORDER BY id FOR UPDATE;
		UPDATE account SET balance = balance - amount, token = t WHERE id = a;
		UPDATE account SET balance = balance + amount, token = t WHERE id = b;
	END $$;

	-- an SQLSTATE after which pgbench goes on with its next transaction
	CREATE FUNCTION fail() RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		RAISE EXCEPTION 'on purpose' USING ERRCODE = 'serialization_failure';
	END $$;
};

my $rows = q{
	INSERT INTO hot SELECT g, 0, 'start' FROM generate_series(1, 4) g;
	INSERT INTO mirror SELECT g, 'start' FROM generate_series(1, 4) g;
	INSERT INTO place SELECT g, 'start' FROM generate_series(1, 10) g;
	INSERT INTO account SELECT g, 1000, 'start' FROM generate_series(1, 50) g;
};

# STABLE: every query in it sees the snapshot of the statement that calls it.
my $check = q{
	CREATE FUNCTION check_snapshot() RETURNS int STABLE LANGUAGE plpgsql AS $$
	DECLARE
		bad text;
	BEGIN
		SELECT string_agg(hot.id || ': ' || hot.token || ' and ' || mirror.token, ', ')
		INTO bad FROM hot FULL JOIN mirror USING (id)
		WHERE hot.token IS DISTINCT FROM mirror.token;
		IF bad IS NOT NULL THEN
			RAISE EXCEPTION 'violated: half a transaction is seen: %', bad;
		END IF;
		SELECT string_agg(id || ': ' || n || ' and ' || there, ', ') INTO bad
		FROM (SELECT hot.id, n, (SELECT count(*) FROM child WHERE child.hot = hot.id) AS there
			  FROM hot) counted WHERE n <> there;
		IF bad IS NOT NULL THEN
			RAISE EXCEPTION 'violated: children are not as many as counted: %', bad;
		END IF;
		SELECT string_agg(id::text, ', ') INTO bad FROM flip FULL JOIN flop USING (id)
		WHERE flip.token IS DISTINCT FROM flop.token;
		IF bad IS NOT NULL THEN
			RAISE EXCEPTION 'violated: one of two rows was deleted or inserted: %', bad;
		END IF;
		SELECT count(*) || ' of ' || count(DISTINCT id % 100) INTO bad FROM place;
		IF bad <> '10 of 10' THEN
			RAISE EXCEPTION 'violated: rows that moved: %', bad;
		END IF;
		SELECT sum(balance) INTO bad FROM account;
		IF bad <> '50000' THEN
			RAISE EXCEPTION 'violated: the accounts hold %', bad;
		END IF;
		RETURN 1;
	END $$;
};

# Transactions, and how often each of them is chosen.
my $start = q{
\set i random(1, 4)
\set j random(1, 4)
\set a random(1, 50)
\set b random(1, 50)
\set r random(1, 1000000000)
\set lax random(0, 1)
BEGIN;
\if :lax
SET LOCAL synchronous_commit = off;
\endif
};
my @scripts = (
	[ 4, q{SELECT touch(:i, 't:client_id.:r');} ],
	[ 3, q{SELECT breed(:i, 't:client_id.:r');} ],
	[ 3, q{SELECT cull(:i, 't:client_id.:r');} ],
	[ 4, q{SELECT flipflop(:i, 't:client_id.:r');} ],
	[ 2, q{SELECT move(:i, 't:client_id.:r');} ],
	[ 6, q{SELECT pay(:a, :b, :i * 7, 't:client_id.:r');} ],
	[
		3, q{SELECT pay(:a, :b, :i * 7, 't:client_id.:r');
SAVEPOINT one;
SELECT pay(:b, :a, :i, 'undone');
SAVEPOINT two;
SELECT touch(:i, 'undone');
ROLLBACK TO one;
SELECT flipflop(:j, 't:client_id.:r');
RELEASE one;
SELECT undone(:i);
SELECT touch(:i, 't:client_id.:r');}
	],
	[
		1, q{SELECT touch(:i, 't:client_id.:r');
SELECT touch(:j, 't:client_id.:r');}
	],
	[
		1, q{SELECT breed(:i, 'never');
SELECT pay(:a, :b, 1, 'never');
ROLLBACK;
BEGIN;
SELECT pay(:a, :b, 2, 't:client_id.:r');}
	],
	[
		1, q{SELECT undone(:i);
SELECT flipflop(:i, 'never');
SELECT fail();}
	]);

sub write_scripts
{
	my ($node) = @_;
	my @options;

	foreach my $number (0 .. $#scripts)
	{
		my ($weight, $body) = @{ $scripts[$number] };
		my $file = $node->basedir . "/torture$number.sql";

		# The text before a colon is not part of a variable's name.
		$body =~ s/'t:client_id\.:r'/'t' || :client_id || '.' || :r/g;
		append_to_file($file,
			"$start$body\nCALL end_tx('t' || :client_id || '.' || :r);\nEND;\n");
		push @options, '-f', "$file\@$weight";
	}
	return @options;
}

sub start_pgbench
{
	my ($node, $seconds, @options) = @_;
	my $run = { out => '', err => '' };

	$run->{harness} = IPC::Run::start(
		[
			'pgbench', '-n', '-T', $seconds, @options,
			$node->connstr('postgres')
		],
		'<', \undef, '>', \$run->{out}, '2>', \$run->{err},
		IPC::Run::timeout($seconds + 2 * $MmreplCluster::timeout));
	return $run;
}

sub is_running
{
	my ($run) = @_;

	$run->{harness}->pump_nb if $run->{harness}->pumpable;
	return $run->{harness}->pumpable;
}

# One by one the processes between the two nodes are terminated.
sub molest
{
	my ($source, $peer, $load, $pause) = @_;
	my $blows = 0;

	while (is_running($load))
	{
		my ($node, $victim) =
		  $blows % 2
		  ? ($source, 'SELECT pid FROM mmrepl.pg_stat_mmrepl')
		  : (
			$peer, q{SELECT pid FROM pg_stat_activity WHERE client_addr IS NOT NULL
					ORDER BY random() LIMIT 1});
		$node->safe_psql('postgres',
			"SELECT pg_terminate_backend(pid) FROM ($victim) v WHERE pid IS NOT NULL"
		) and $blows++;
		my $until = Time::HiRes::time() + $pause;
		Time::HiRes::usleep(50_000)
		  while is_running($load) && Time::HiRes::time() < $until;
	}
	return $blows;
}

# The peer's history is a sequence of the source's transactions.
sub whole_transactions
{
	my ($source, $peer) = @_;
	my ($writes) = History::transactions($source);
	my (undef, $arrived) = History::transactions($peer);
	my %sent;
	my ($bad, $whole) = (0, 0);
	my @piece;

	foreach my $transaction (values %$writes)
	{
		my $last = $transaction->[-1];

		next if $last =~ /^\w+ \d+ [ID] start$/;
		$sent{$last} = join("\n", @$transaction);
	}
	foreach my $write (map { $_->[1] } @$arrived)
	{
		push @piece, $write;
		next unless $write =~ /^tx /;
		if (join("\n", @piece) eq (delete $sent{$write} // ''))
		{
			$whole++;
		}
		elsif ($bad++ < 3)
		{
			diag("not as it was sent:\n" . join("\n", @piece));
		}
		@piece = ();
	}
	is($bad, 0, "$whole transactions arrived, each as it was");
	is(scalar(@piece), 0, 'the last one is complete');
	is(scalar(keys %sent), 0, 'and none is missing')
	  or diag((values %sent)[0]);
	return $arrived;
}

# No row arrives before the one that it references, nor goes after it.
sub references_hold
{
	my ($arrived) = @_;
	my (%there, $violated);

	foreach my $write (map { $_->[1] } @$arrived)
	{
		my ($table, $key, $op) = split / /, $write;

		next unless $table =~ /^fl[io]p$/;
		$violated //= $write
		  if $table eq 'flop' && $op eq 'I' && !$there{"flip $key"}
		  || $table eq 'flip' && $op eq 'D' && $there{"flop $key"};
		$there{"$table $key"} = $op ne 'D';
	}
	is($violated, undef, 'foreign keys held after every single write');
	return;
}

# run(seconds => how long, clients => how many)
sub run
{
	my (%params) = @_;
	my $seconds = $params{seconds};
	my ($alpha, $beta) = MmreplCluster->new_pair(
		conf => join("\n",
			'max_connections = 100',
			'deadlock_timeout = 20ms',
			q{mmrepl.ring_size = '256kB'},
			q{mmrepl.rotate_size = '1MB'}));

	$alpha->create_table_on_both($beta, $schema);
	$alpha->safe_psql('postgres', $functions);
	$beta->safe_psql('postgres', $check);
	$alpha->create_pair($_, 'beta') foreach @tables;
	$alpha->safe_psql('postgres', $rows);
	$alpha->wait_caught_up('beta');

	# A table without triggers is applied in another way than one with them.
	History::install($_, grep { !/^(?:child|account)$/ } @tables)
	  foreach ($alpha, $beta);

	my $check_script = $beta->basedir . '/check.sql';
	append_to_file($check_script, "SELECT check_snapshot();\n");
	my $load = start_pgbench($alpha, $seconds, '-c', $params{clients}, '-j', '2',
		write_scripts($alpha));
	my $readers = start_pgbench($beta, $seconds, '-c', '2', '-R', '60', '-f',
		$check_script);
	my $blows = molest($alpha, $beta, $load, $seconds / 8);

	ok($load->{harness}->finish, 'the load ended well') or diag($load->{err});
	my ($done) =
	  $load->{out} =~ /number of transactions actually processed: (\d+)/;
	note "$done transactions; $blows times a worker or receiver was terminated";
	cmp_ok($done, '>', 20 * $seconds, 'there was a load');
	cmp_ok($blows, '>=', 4, 'workers and receivers were terminated');
	ok($readers->{harness}->finish, 'the readers ended well');
	unlike($readers->{err}, qr/violated/,
		'the peer showed every transaction whole, in every snapshot');
	my ($reads) =
	  $readers->{out} =~ /number of transactions actually processed: (\d+)/;
	cmp_ok($reads, '>', 5 * $seconds, "which were $reads");

	$alpha->wait_caught_up('beta');
	$alpha->same_rows($beta, $_) foreach @tables;
	is($beta->safe_psql('postgres', 'SELECT check_snapshot()'),
		'1', 'what they hold is consistent');
	History::same($alpha, $beta,
		'every row had the same versions in the same order');
	references_hold(whole_transactions($alpha, $beta));
	is( $beta->safe_psql(
			'postgres', 'SELECT sum(conflicts) FROM mmrepl.progress'),
		'0',
		'no change met a row that it did not expect');
	is( $alpha->safe_psql(
			'postgres',
			q{SELECT count(*) FROM history WHERE token ~ 'never|undone|twice'}),
		'0',
		'what was rolled back has not been written');
	foreach my $node ($alpha, $beta)
	{
		ok(!$node->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
			'no crash in the log of ' . $node->name);
		$node->stop('fast');
	}
	return;
}

1;
