# One table with several targets in sync mode: they work at the same time, and
# either all of them have a change or nobody.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultProxy;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $alpha = MmreplCluster->create('alpha');
my $beta = MmreplCluster->create('beta', conf => "wal_level = replica\nmax_wal_senders = 1");
my @targets = ('one', 'two', 'three');

sub here { return $alpha->safe_psql('postgres', $_[0]) }

# The same query in every target; one answer if they agree.
sub everywhere
{
	my ($sql) = @_;
	my %answers = map { $beta->safe_psql($_, $sql) => 1 } @targets;
	return join(' / ', sort keys %answers);
}

my $ddl = q{CREATE TABLE many (id int PRIMARY KEY, v text);
	CREATE TABLE other (id int PRIMARY KEY, v text)};
here($ddl);
foreach my $target (@targets)
{
	$beta->install_extension($target);
	$beta->safe_psql($target, $ddl);
	$beta->safe_psql(
		$target, qq{
		CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \$\$
		BEGIN
			IF NEW.v = 'slow' THEN
				PERFORM pg_advisory_lock(1), pg_advisory_unlock(1);
			ELSIF NEW.v = 'endless' THEN
				PERFORM pg_sleep(10 * $MmreplCluster::timeout);
			ELSIF NEW.v = 'bad for ' || current_database() THEN
				RAISE EXCEPTION '% is bad', NEW.id;
			END IF;
			RETURN NEW;
		END\$\$;
		CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON many
		FOR EACH ROW EXECUTE FUNCTION slow();
		ALTER TABLE many ENABLE ALWAYS TRIGGER slow});
	$alpha->add_peer($beta, server => $target, peer_dbname => $target);
	$alpha->create_pair('many', $target, q{mode => 'sync'});
}
my $session = $alpha->session;
$session->ok(q{INSERT INTO many VALUES (0, 'first')});

section 'at the same time' => sub {
	$session->ok(qq{SET mmrepl.sync_timeout = '@{[10 * $MmreplCluster::timeout]}s';
		SET mmrepl.sync_lock_timeout = '@{[10 * $MmreplCluster::timeout]}s'});
	foreach my $sql (
		q{INSERT INTO many VALUES (1, 'slow')},
		q{BEGIN; SAVEPOINT s; UPDATE many SET v = 'slow' WHERE id = 0; COMMIT},
		q{SET mmrepl.sync_flush = 'commit'; INSERT INTO many VALUES (2, 'slow')})
	{
		my @holders = map { $beta->session($_) } @targets;

		$_->ok('SELECT pg_advisory_lock(1)') foreach @holders;
		$session->start($sql);
		foreach my $left (3, 2, 1)
		{
			$beta->poll_ok(
				"SELECT count(*) = $left FROM pg_stat_activity WHERE client_addr IS NOT NULL AND wait_event = 'advisory'",
				"$sql: $left of them work, at the same time");
			is( here('SELECT state FROM pg_stat_activity WHERE pid = ' . $session->pid),
				'active', '... and are waited for');
			(shift @holders)->quit;
		}
		my (undef, $err) = $session->finish;
		is($err, '', '... until they are done');
	}
	$session->ok('RESET ALL');
	is(everywhere('SELECT count(*) FROM many'), '3', 'all have it');
};

section 'all or none' => sub {
	foreach my $target (@targets)
	{
		my ($out, $err) =
		  $session->run("INSERT INTO many VALUES (10, 'bad for $target')");
		like($err, qr/ERROR:  P0001: .*10 is bad.*server "$target"/s,
			"$target refuses");
	}
	is(everywhere('SELECT count(*) FROM many'), '3', '... and none has it');

	# Caught, all of them are back at the same point.
	$session->ok(
		q{DO $$
		DECLARE target text;
		BEGIN
			INSERT INTO many VALUES (20, 'kept');
			FOREACH target IN ARRAY '{one,two,three}'::text[] LOOP
				BEGIN
					UPDATE many SET v = 'gone' WHERE id = 20;
					INSERT INTO many VALUES (21, 'bad for ' || target);
				EXCEPTION WHEN raise_exception THEN
					UPDATE many SET v = v || ' ' || target WHERE id = 20;
				END;
			END LOOP;
		END$$});
	is(everywhere('SELECT id, v FROM many WHERE id >= 20'),
		'20|kept one two three', 'caught: the transaction goes on everywhere');
	is(here('SELECT v FROM many WHERE id >= 20'), 'kept one two three', 'and here');

	# Refused was what was captured outside of the block that is undone for it; the statement
	# has more for all of them.
	here(q{
		CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			UPDATE many SET v = 'swallowed' WHERE id = 0;
		EXCEPTION WHEN raise_exception THEN
			RETURN NULL;
		END $$;
		CREATE TRIGGER swallow AFTER INSERT ON many FOR EACH ROW WHEN (NEW.id = 22) EXECUTE FUNCTION swallow()});
	$session->ok('BEGIN; SAVEPOINT s');
	my (undef, $err) = $session->run(q{INSERT INTO many VALUES (22, 'bad for one'), (23, 'more')});
	like($err, qr/ERROR:  P0001: .*22 is bad.*server "one"/s, 'caught too far inside, it is said again');
	unlike($err, qr/25P02/, '... and nothing else');
	$session->ok(q{ROLLBACK TO s; INSERT INTO many VALUES (24, 'kept'); COMMIT; DELETE FROM many WHERE id = 24});
	is(everywhere('SELECT count(*) FROM many WHERE id IN (22, 23, 24)'), '0', '... until the savepoint repairs it');
	here('DROP TRIGGER swallow ON many');
};

section 'sync, async and other tables' => sub {
	$alpha->create_pair('other', 'one');
	$alpha->create_pair('other', 'two', q{mode => 'sync'});
	$session->ok(
		q{BEGIN; INSERT INTO other VALUES (1, 'kept');
		INSERT INTO many VALUES (30, 'kept');
		INSERT INTO other VALUES (2, 'kept'); COMMIT});
	is($beta->safe_psql('two', 'SELECT count(*) FROM other'),
		'2', 'sync: at once');
	$alpha->wait_caught_up('one');
	is($beta->safe_psql('one', 'SELECT count(*) FROM other'),
		'2', 'async, beside a sync pair for the same server');
	is($beta->safe_psql('three', 'SELECT count(*) FROM other'), '0', 'no pair');

	here(q{SELECT mmrepl.alter_pair('many', 'three', mode => 'async')});
	my ($out, $err) =
	  $session->run(q{INSERT INTO many VALUES (31, 'bad for two')});
	like($err, qr/ERROR:  P0001/, 'one of two refuses');
	$session->ok(q{INSERT INTO many VALUES (32, 'kept')});
	$alpha->wait_caught_up('three');
	is(everywhere('SELECT string_agg(id::text, $$ $$ ORDER BY id) FROM many WHERE id > 30'),
		'32', 'the third, which is asynchronous, gets nothing of it either');
	here(q{SELECT mmrepl.alter_pair('many', 'three', mode => 'sync')});
};

section 'cancelled while all of them work' => sub {
	$session->ok(qq{SET mmrepl.sync_timeout = '@{[10 * $MmreplCluster::timeout]}s'});
	$session->start(q{INSERT INTO many VALUES (40, 'endless')});
	$beta->poll_ok(
		q{SELECT count(*) = 3 FROM pg_stat_activity
		  WHERE client_addr IS NOT NULL AND wait_event = 'PgSleep'},
		'three peers are busy');
	here('SELECT pg_cancel_backend(' . $session->pid . ')');
	my ($out, $err, $took) = $session->finish;

	like($err, qr/ERROR:  57014/, 'cancelled');
	$session->ok('RESET mmrepl.sync_timeout');
	$beta->poll_ok(
		q{SELECT count(*) = 0 FROM pg_stat_activity
		  WHERE client_addr IS NOT NULL AND state LIKE 'idle in transaction%'
		  OR wait_event = 'PgSleep'},
		'nothing is left open or busy there');
	is(everywhere('SELECT count(*) FROM many WHERE id = 40'), '0', 'none has it');
	$session->ok(q{INSERT INTO many VALUES (41, 'kept')});
	is(everywhere('SELECT v FROM many WHERE id = 41'), 'kept', 'and it goes on');
};

# What waits for one of several peers is waited for as long as for a single one.
section 'the fence' => sub {
	my $other = $beta->session('one');

	$beta->safe_psql('one', q{INSERT INTO other VALUES (50, 'locked')});
	here(q{SET mmrepl.mode = 'async'; SET mmrepl.capture = off; INSERT INTO other VALUES (50, 'locked')});
	$other->ok('BEGIN; SELECT * FROM other WHERE id = 50 FOR UPDATE');
	here(q{SET mmrepl.mode = 'async'; UPDATE other SET v = 'waits' WHERE id = 50});
	$beta->poll_ok(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock'},
		'delivery to one of them waits');
	$session->ok(q{SET mmrepl.sync_timeout = '4s'});
	$session->start(q{INSERT INTO many VALUES (50, 'behind it')});
	my (undef, $err, $took) = $session->finish;
	like($err, qr/ERROR:\s+MM008: .*still queued/, 'who comes behind it waits in vain');
	cmp_ok($took, '<', 7.8, '... once');
	is(everywhere('SELECT count(*) FROM many WHERE id = 50'), '0', '... and none has it');
	$other->ok('ROLLBACK');
	$other->quit;
	$session->ok('RESET mmrepl.sync_timeout');
	$alpha->wait_caught_up('one');
	$session->ok(q{INSERT INTO many VALUES (50, 'behind it')});
	is(everywhere('SELECT count(*) FROM many WHERE id = 50'), '1', 'afterwards all have it');

	# What the fence said to a statement for several peers was believed by the next one.
	here('CREATE TABLE solo (id int PRIMARY KEY)');
	$beta->safe_psql('one', 'CREATE TABLE solo (id int PRIMARY KEY)');
	$alpha->create_pair('solo', 'one');
	$other = $beta->session('one');
	$session->ok(q{BEGIN; INSERT INTO many VALUES (51, 'to all')});
	$other->ok('BEGIN; SELECT * FROM other WHERE id = 50 FOR UPDATE');
	here(q{SET mmrepl.mode = 'async'; UPDATE other SET v = 'waits again' WHERE id = 50});
	$session->ok(q{SET LOCAL mmrepl.sync_timeout = '1s'});
	$session->start('INSERT INTO solo VALUES (1)');
	(undef, $err) = $session->finish;
	like($err, qr/ERROR:\s+MM008: .*still queued/, 'the next statement, to one of them, does not overtake either');
	$session->ok('ROLLBACK');
	$other->ok('ROLLBACK');
	$other->quit;
	$alpha->wait_caught_up('one');
};

# Each of them waits for a standby there; told one after the other, they would begin with it so.
section 'COMMIT at the same time' => sub {
	my $probe = $beta->session;
	my $round = 0;
	my $until = time() + $MmreplCluster::timeout;
	my $waits = 'SELECT wait_event = $$SyncRep$$ FROM pg_stat_activity WHERE pid = ' . $probe->pid;
	my $commits = q{FROM pg_stat_activity WHERE client_addr IS NOT NULL AND query = 'COMMIT' AND wait_event = 'SyncRep'};

	$beta->safe_psql('postgres', q{ALTER SYSTEM SET synchronous_standby_names = 'nobody'});
	$beta->reload;
	do
	{
		$probe->finish if $round++ > 0;
		$probe->start("SELECT pg_logical_emit_message(true, 'round', '$round')");
		$beta->poll_query_until('postgres',
			"SELECT query LIKE '%''$round''%' AND state = 'idle' OR ($waits) FROM pg_stat_activity WHERE pid = " . $probe->pid);
	} until time() > $until || $beta->safe_psql('postgres', $waits) eq 't';
	$session->start(q{INSERT INTO many VALUES (55, 'kept')});
	$beta->poll_ok("SELECT count(*) = 3 $commits", 'they commit');
	is($beta->safe_psql('postgres', "SELECT max(query_start) - min(query_start) < '4 s' $commits"), 't', '... having been told at once');
	$beta->safe_psql('postgres', 'ALTER SYSTEM RESET synchronous_standby_names');
	$beta->reload;
	$_->finish foreach $session, $probe;
	$probe->quit;
	$alpha->wait_caught_up($_) foreach @targets;
	is(everywhere('SELECT v FROM many WHERE id = 55'), 'kept', 'all have it');
};

# The sessions there are ended all at the same time.
section 'given up while none of six answers' => sub {
	my $proxy = FaultProxy->new(port => $beta->port);
	my $port = $proxy->port;

	foreach my $target ('four', 'five', 'six')
	{
		$beta->install_extension($target);
		$beta->safe_psql($target, $ddl);
		$alpha->add_peer($beta, server => $target, peer_dbname => $target);
		$alpha->create_pair('many', $target, q{mode => 'sync'});
	}
	foreach my $target (@targets, 'four', 'five', 'six')
	{
		here("ALTER SERVER $target OPTIONS (SET port '$port')");
		$alpha->poll_state($target, 'streaming');
	}
	my $watch = $alpha->session;
	my $id = 60;

	# What happens to one session, and how long that takes.
	my $give_up = sub {
		my ($how) = @_;
		my $sleep = $how eq 'a statement after others' ? '; SELECT pg_sleep(60)' : '';
		my %worker = map { $_->{id} => 1 } $proxy->connections;
		my $one = $alpha->session;

		$id++;
		$one->ok("INSERT INTO many VALUES ($id, 'warm')");
		my @mine = grep { !$worker{$_} } map { $_->{id} } $proxy->connections;
		$one->ok("BEGIN; UPDATE many SET v = 'changed' WHERE id = $id") if $how !~ /^a statement(?:, timeout)?$/;
		$one->ok(q{SET mmrepl.sync_timeout = '1500ms'}) if $how =~ /timeout/;
		$proxy->hold(only => \@mine);
		# Each attempt to end a session takes as long as it may.
		$proxy->new_connections('black hole');
		my $start = Time::HiRes::time();
		$one->start($how eq 'COMMIT' || $how eq 'ROLLBACK' ? $how
			: $sleep ? 'SELECT pg_sleep(60)' : "UPDATE many SET v = 'held' WHERE id = $id");
		if ($how !~ /ROLLBACK|timeout/)
		{
			$alpha->poll_ok(
				q{SELECT state = 'active' AND wait_event_type IN ('Extension', 'Timeout')
				  FROM pg_stat_activity WHERE pid = } . $one->pid,
				"$how: the session waits");
			$start = Time::HiRes::time();
			$watch->ok('SELECT pg_cancel_backend(' . $one->pid . ')');
		}
		my (undef, $err) = $one->finish;
		my $took = Time::HiRes::time() - $start;
		like($err, $how eq 'ROLLBACK' ? qr/^$/ : $how =~ /timeout/ ? qr/MM008/ : qr/57014/, "$how: it is told");
		$one->quit;
		$proxy->new_connections('pass');
		$proxy->kill(only => \@mine);
		return $took;
	};
	foreach my $how ('a statement', 'COMMIT', 'a statement after others', 'ROLLBACK', 'a statement, timeout')
	{
		# One after the other takes 2.5 s and more, each time; together it does so only on a
		# machine that is busy just then.
		my $bound = $how =~ /timeout/ ? 3.5 : 2;
		my $took = $give_up->($how);

		for (my $try = 1; $try < 5 && $took >= $bound; $try++)
		{
			note "$how: $took s, tried again";
			$took = $give_up->($how);
		}
		cmp_ok($took, '<', $bound, "$how: answered within a second, or in time: $took");
	}
	$watch->quit;
	$alpha->wait_caught_up($_) foreach (@targets, 'four', 'five', 'six');
	my $all = 'SELECT count(*), string_agg(v, $$ $$ ORDER BY id) FROM many WHERE id > 60';
	is(everywhere($all), here($all), 'all have what was committed');
	like(here($all), qr/^@{[$id - 60]}\|/, '... and that is not nothing');
};

$session->quit;
done_testing();
