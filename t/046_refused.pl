# A transaction that the peer refuses, for every reason there is: it is found,
# the stream stands there and nowhere else, the operator sees everything, and
# goes on by repairing or by skipping.  What may pass by itself is tried again.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => q{
mmrepl.retry_min_delay = '20ms'
mmrepl.retry_max_delay = '100ms'
});
my $last_id = 0;

sub here
{
	return $alpha->safe_psql('postgres', $_[0]);
}

sub there
{
	return $beta->safe_psql('postgres', $_[0]);
}

sub stat_ok
{
	my ($condition, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $alpha->poll_ok(
		"SELECT $condition FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta'",
		$name) || diag($alpha->describe('beta'));
}

# Queue, while the stream is held: good ones, the one given, and good ones again.
# All go out as one group.
sub queue_around
{
	my ($sql) = @_;

	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	my $before = $last_id + 1;
	here('INSERT INTO item VALUES (' . ++$last_id . q{, 'before', 1)})
	  foreach (1 .. 5);
	here($sql);
	here('INSERT INTO item VALUES (' . ++$last_id . q{, 'after', 1)})
	  foreach (1 .. 5);
	here(q{SELECT mmrepl.resume('beta')});
	return ($before .. $last_id);
}

sub arrived
{
	my (@ids) = @_;
	return there('SELECT count(*) FROM item WHERE id IN ('
		  . join(', ', @ids) . ')');
}

$alpha->create_table_on_both(
	$beta, q{
	CREATE TABLE item (id int PRIMARY KEY, v text, n int);
	CREATE TABLE odd (id int PRIMARY KEY, v text, n bigint);
});
$alpha->create_pair($_, 'beta') foreach ('item', 'odd');

# What breaks it, what repairs it, and how it is told.
my %refusals = (
	'a constraint' => [
		q{ALTER TABLE odd ADD CONSTRAINT short CHECK (length(v) < 3)},
		q{ALTER TABLE odd DROP CONSTRAINT short},
		'23514',
		qr/"short".*DETAIL:\s+Failing row.*CONTEXT:.*ticket \d+.*INSERT.*odd/s
	],
	'another unique key' => [
		q{ALTER TABLE odd ADD UNIQUE (n); INSERT INTO odd VALUES (-1, 'x', 7)},
		q{DELETE FROM odd WHERE id = -1},
		'23505',
		qr/odd_n_key.*DETAIL:.*\(n\)=\(7\)/s
	],
	'a missing table' => [
		q{ALTER TABLE odd RENAME TO gone}, q{ALTER TABLE gone RENAME TO odd},
		'42P01', qr/odd/
	],
	'a missing column' => [
		q{ALTER TABLE odd RENAME v TO w}, q{ALTER TABLE odd RENAME w TO v},
		'42703', qr/column "v".*odd/s
	],
	'a value out of range' => [
		q{ALTER TABLE odd ALTER n TYPE smallint USING 1},
		q{ALTER TABLE odd ALTER n TYPE bigint},
		'22003',
		qr/out of range/
	],
	'an impossible value' => [
		q{ALTER TABLE odd ALTER v TYPE date USING NULL},
		q{ALTER TABLE odd ALTER v TYPE text},
		'22007',
		qr/invalid input syntax for type date: "text"/
	],
	'a trigger' => [
		q{CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
		  $$BEGIN RAISE 'not on my watch' USING ERRCODE = 'P0001', DETAIL = 'told so', HINT = 'ask'; END$$;
		  CREATE TRIGGER refuse BEFORE INSERT ON odd FOR EACH ROW EXECUTE FUNCTION refuse();
		  ALTER TABLE odd ENABLE ALWAYS TRIGGER refuse},
		q{DROP TRIGGER refuse ON odd; DROP FUNCTION refuse()},
		'P0001',
		qr/not on my watch.*DETAIL:\s+told so.*HINT:\s+ask.*CONTEXT:.*refuse\(\)/s
	],
	'a missing right' => [
		q{REVOKE INSERT ON odd FROM carrier}, q{GRANT INSERT ON odd TO carrier},
		'42501', qr/permission denied.*odd/s
	]);

there(
	q{CREATE ROLE carrier LOGIN; SELECT mmrepl.allow_apply('carrier');
	  GRANT ALL ON item, odd TO carrier});
here(q{ALTER USER MAPPING FOR CURRENT_USER SERVER beta OPTIONS (SET user 'carrier')});

foreach my $name (sort keys %refusals)
{
	my ($break, $repair, $sqlstate, $error) = @{ $refusals{$name} };

	section $name => sub {
		my $id = $last_id + 1000;

		there($break);
		my @ids = queue_around(
			qq{BEGIN; UPDATE item SET n = n + 1 WHERE id = 1;
			   INSERT INTO odd VALUES ($id, 'text', CASE '$sqlstate' WHEN '22003' THEN 100000 ELSE 7 END);
			   COMMIT});

		# The transaction writes to both tables; its own rows are the blocked ones.
		stat_ok(
			"state = 'blocked' AND last_error_sqlstate = '$sqlstate' AND blocked_ticket IS NOT NULL",
			"blocked by $sqlstate");
		like($alpha->stat('beta', 'last_error'), $error, 'the error is whole');
		is(arrived(@ids), 5, 'what was before it is there, nothing after');
		is( here(
				q{SELECT string_agg(table_name || ' ' || op, ', ' ORDER BY id),
				  count(DISTINCT ticket), min(ticket) = (SELECT blocked_ticket
					FROM mmrepl.pg_stat_mmrepl WHERE server = 'beta')
				  FROM mmrepl.sync_err_rec WHERE state = 'blocked'}),
			'item UPDATE, odd INSERT|1|t',
			'the queue shows the culprit, whole');
		is( here(
				q{SELECT count(*) FROM mmrepl.sync_err_rec WHERE state = 'queued'}),
			'5', 'and what waits behind it');

		there($repair);
		here(q{SELECT mmrepl.retry_now('beta')});
		$alpha->wait_caught_up('beta');
		stat_ok(
			q{state = 'streaming' AND consecutive_failures = 0 AND blocked_ticket IS NULL},
			'repaired, it goes on');
		is(arrived(@ids), 10, 'nothing is missing');
		$alpha->same_rows($beta, $_) foreach ('item', 'odd');
		here('DELETE FROM odd');
		$alpha->wait_caught_up('beta');
	};
}

section 'skip' => sub {
	there(q{ALTER TABLE odd ADD CONSTRAINT short CHECK (length(v) < 3)});
	my @ids = queue_around(
		q{BEGIN; INSERT INTO odd VALUES (1, 'O''Brien', 1);
		   UPDATE item SET n = -1 WHERE id = 1; COMMIT});
	stat_ok(q{state = 'blocked'}, 'blocked');
	my $ticket = $alpha->stat('beta', 'blocked_ticket');

	foreach my $reason (q{''}, q{E' \t\n'}, 'NULL')
	{
		my $err = $alpha->fails('postgres',
			"SELECT mmrepl.skip('beta', $ticket, $reason)");
		like($err, qr/22023.*reason/s, "a reason of $reason is none");
		like($err, qr/HINT:.*mmrepl\.skip/s, 'and the hint says what to do');
	}
	is(here(q{SELECT count(*) FROM mmrepl.skipped}), '0', 'nothing was dropped');
	stat_ok(q{state = 'blocked'}, 'still blocked');

	is(here("SELECT mmrepl.skip('beta', $ticket, 'too long for beta')"),
		'2', 'skip returns the number of changes');
	$alpha->wait_caught_up('beta');
	is(arrived(@ids), 10, 'the others arrive');
	is( here(
			q{SELECT server, ticket, changes, reason, skipped_by = current_user,
				skipped_at > now() - interval '10 min' FROM mmrepl.skipped}),
		"beta|$ticket|2|too long for beta|t|t",
		'it is on the record');
	my $queries = here(q{SELECT queries::text FROM mmrepl.skipped});
	like($queries, qr/INSERT INTO public\.odd.*O''Brien.*UPDATE public\.item/s,
		'with its changes, as SQL that can be run');
	there('ALTER TABLE odd DROP CONSTRAINT short');
	there($_)
	  foreach split /\n/,
	  here(q{SELECT unnest(queries) FROM mmrepl.skipped});
	$alpha->same_rows($beta, $_, name => "$_: repaired by hand")
	  foreach ('item', 'odd');
};

# A trigger at the peer raises one SQLSTATE after the other: those that may pass
# by themselves are tried again until they have passed, and block nothing.
section 'SQLSTATE by SQLSTATE' => sub {
	my %class = (
		retrying => [
			qw(40001 40P01 55P03 57014 57P01 57P02 57P03 57P05 53000 53100 53200 53300 53400
			  08000 08003 08006 58000 58030 55006 25006 40000 40003)
		],
		blocked => [
			qw(22000 22001 22012 22P02 23000 23502 23503 23505 23514 23P01
			  42501 42804 42883 42P01 P0001 P0002 XX000 0A000 2BP01 21000 44000)
		]);

	there(
		q{CREATE TABLE public.raised (sqlstate text);
		  INSERT INTO public.raised VALUES ('00000');
		  CREATE FUNCTION public.raise_it() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
		  $$DECLARE s text := (SELECT sqlstate FROM public.raised);
			BEGIN
				IF s <> '00000' THEN RAISE 'raised %', s USING ERRCODE = s; END IF;
				RETURN NEW;
			END$$;
		  CREATE TRIGGER raise_it BEFORE UPDATE ON odd FOR EACH ROW EXECUTE FUNCTION public.raise_it();
		  ALTER TABLE odd ENABLE REPLICA TRIGGER raise_it});
	foreach my $state (sort keys %class)
	{
		foreach my $sqlstate (@{ $class{$state} })
		{
			there("UPDATE public.raised SET sqlstate = '$sqlstate'");
			here('UPDATE odd SET n = n + 1 WHERE id = 1');
			stat_ok(
				"state = '$state' AND last_error_sqlstate = '$sqlstate' AND last_error ~ 'raised $sqlstate'",
				"$sqlstate: $state");
			there(q{UPDATE public.raised SET sqlstate = '00000'});
			here(q{SELECT mmrepl.retry_now('beta')}) if $state eq 'blocked';
			$alpha->poll_query_until('postgres',
				q{SELECT mmrepl.wait_for_replay('beta', '10 s')});
		}
	}
	$alpha->same_rows($beta, 'odd', name => 'nothing is lost or done twice');
	stat_ok(q{state = 'streaming'}, 'all is well again');
};

is($alpha->queued('beta'), '0', 'nothing is left queued');
ok(!$alpha->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
	'no crash in the log of the source');

$alpha->stop('fast');
$beta->stop('fast');

done_testing();
