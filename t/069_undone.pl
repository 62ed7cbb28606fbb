# What comes late and had left a row as it was does not overwrite what the peer's
# writers have done since: they could not know of it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultProxy;
use MmreplCluster;
use Test::More;

my ($alpha, $beta) = MmreplCluster->new_pair(conf => "mmrepl.retry_max_delay = '200ms'\n");

my $proxy = FaultProxy->new(port => $beta->port);
my $in_doubt; # or queued

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

sub rows
{
	return $_[0]->safe_psql('postgres',
		q{SELECT string_agg(concat_ws(',', id, v, left(t, 1)), ' ' ORDER BY id) FROM acc});
}

# The statements as transactions that are queued, because the peer is not there.
sub queued
{
	$beta->close_to_peers;
	here($_) foreach @_;
	return;
}

# The statements as a transaction whose COMMIT does not get to the peer.
sub in_doubt
{
	my $session = $alpha->session;

	here(q{SELECT mmrepl.pause('beta')});
	$alpha->poll_state('beta', 'paused');
	$session->ok($_) foreach ('BEGIN', @_);
	$proxy->rule(action => 'reset', from => 'client', pattern => 'COMMIT', when => 'before', times => 1);
	$session->ok('COMMIT');
	$session->quit;
	$beta->poll_ok(
		q{SELECT count(*) = 0 FROM pg_locks JOIN pg_class ON oid = relation WHERE relnamespace = 'public'::regnamespace},
		'its locks at the peer are gone');
	return;
}

# $late is done at alpha while beta does not get it; then $writer at beta, who meets
# at alpha the row that he has; both nodes have $expected when it came.
sub late
{
	my ($name, $late, $writer, $expected, $n_conflicts) = @_;
	my $conflicts = 'SELECT coalesce(sum(conflicts), 0) FROM mmrepl.progress';

	section $name => sub {
		$_->safe_psql('postgres', 'SET mmrepl.capture = off; TRUNCATE acc;'
			  . q{INSERT INTO acc VALUES (1, 0, 'a'), (2, 0, repeat('b', 1000)), (3, 0, NULL)})
		  foreach ($alpha, $beta);
		my $before = there($conflicts);

		$in_doubt ? in_doubt(@$late) : queued(@$late);
		there($_) foreach @$writer;
		cmp_ok($alpha->stat('beta', 'queue_changes'), '>', 0, 'it is late');
		$beta->open_to_peers;
		here(q{SELECT mmrepl.resume('beta'), mmrepl.retry_now('beta')});
		$alpha->wait_caught_up('beta');
		is(rows($beta), $expected, 'what was written since is there');
		is(rows($alpha), $expected, '... at both');
		is(there($conflicts) - $before, $n_conflicts // 0, 'conflicts are counted');
	};
	return;
}

my $long = 'b' x 1000;
my $round = sub { return map { "UPDATE acc SET id = $_[$_] WHERE id = $_[$_ - 1]" } (1 .. $#_) };

sub all_of_them
{
	my $off = 'SET mmrepl.capture = off';

	late('an update without a change',
		['UPDATE acc SET v = v WHERE id = 1'],
		['UPDATE acc SET v = 5 WHERE id = 1'], '1,5,a 2,0,b 3,0');
	late('there and back',
		['UPDATE acc SET v = v - 3', 'UPDATE acc SET v = v + 3'],
		['UPDATE acc SET v = 5 WHERE id > 1'], '1,0,a 2,5,b 3,5');
	late('there and back, every column',
		[
			'UPDATE acc SET v = 1, t = NULL WHERE id < 3',
			qq{UPDATE acc SET v = 0, t = CASE id WHEN 1 THEN 'a' ELSE '$long' END WHERE id < 3}
		],
		['UPDATE acc SET v = 5 WHERE id <> 3'], '1,5,a 2,5,b 3,0');

	# The second change would find the row that it expects.
	late('what was written is what was there in between',
		['UPDATE acc SET v = 1', 'UPDATE acc SET v = 0'],
		['UPDATE acc SET v = 1 WHERE id = 1'], '1,1,a 2,0,b 3,0');
	late('inserted and deleted',
		[
			q{INSERT INTO acc VALUES (7, 7, 'x')}, 'UPDATE acc SET v = 8 WHERE id = 7',
			'DELETE FROM acc WHERE id = 7'
		],
		[q{INSERT INTO acc VALUES (7, 9, 'y')}], '1,0,a 2,0,b 3,0 7,9,y');
	late('inserted and deleted, and the same row',
		[q{INSERT INTO acc VALUES (7, 7, 'x')}, 'DELETE FROM acc WHERE id = 7'],
		[q{INSERT INTO acc VALUES (7, 7, 'x')}], '1,0,a 2,0,b 3,0 7,7,x');
	late('inserted and deleted, beside another change',
		[
			q{INSERT INTO acc VALUES (7, 7, 'x'), (8, 8, 'x')}, 'UPDATE acc SET v = 6 WHERE id = 3',
			'DELETE FROM acc WHERE id = 7'
		],
		[q{INSERT INTO acc VALUES (7, 9, 'y')}],
		'1,0,a 2,0,b 3,6 7,9,y 8,8,x');
	late('deleted and inserted again',
		['DELETE FROM acc WHERE id = 1', q{INSERT INTO acc VALUES (1, 0, 'a')}],
		['UPDATE acc SET v = 5 WHERE id = 1'], '1,5,a 2,0,b 3,0');
	late('deleted and inserted again, and deleted',
		[
			'DELETE FROM acc WHERE id < 3', q{INSERT INTO acc SELECT 1, 0, 'a'},
			qq{INSERT INTO acc VALUES (2, 0, '$long')}
		],
		['DELETE FROM acc WHERE id < 3'], '3,0');
	late('updated there and back, and deleted',
		['UPDATE acc SET v = 1 WHERE id = 1', 'UPDATE acc SET v = 0 WHERE id = 1'],
		['DELETE FROM acc WHERE id = 1'], '2,0,b 3,0');
	late('the key goes round',
		[ $round->(1, 21, 22, 23, 24, 1) ],
		['UPDATE acc SET v = 5 WHERE id = 1'], '1,5,a 2,0,b 3,0');

	# Again and again, and several times by the writer.
	late('more than once',
		[
			('UPDATE acc SET v = 1 WHERE id = 1', 'UPDATE acc SET v = 0 WHERE id = 1') x 2,
			'UPDATE acc SET v = v'
		],
		['UPDATE acc SET v = 1 WHERE id < 3'], '1,1,a 2,1,b 3,0');
	late('the writer goes on',
		[ 'UPDATE acc SET v = 1 WHERE id = 1', 'UPDATE acc SET v = 0 WHERE id = 1' ],
		[ map { "UPDATE acc SET v = $_ WHERE id = 1" } (5, 0, 6) ], '1,6,a 2,0,b 3,0');

	# These are not undone: the pair's rule decides about what is different.
	late('half of it stays',
		['UPDATE acc SET v = 1 WHERE id < 3', 'UPDATE acc SET v = 0 WHERE id = 1'],
		[ 'UPDATE acc SET v = 5 WHERE id = 1', "$off; UPDATE acc SET v = 9 WHERE id = 2" ],
		'1,5,a 2,1,b 3,0', 1);
	late('a TRUNCATE stands between',
		[ 'DELETE FROM acc WHERE id = 1', 'TRUNCATE acc', q{INSERT INTO acc VALUES (1, 0, 'a')} ],
		["$off; UPDATE acc SET v = 9 WHERE id = 1"], '1,0,a', 1);
	late('the key goes elsewhere',
		[ $round->(1, 21), 'DELETE FROM acc WHERE id = 21' ],
		["$off; UPDATE acc SET v = 9 WHERE id = 1"],
		'2,0,b 3,0', 1);
	return;
}

# It brings no old row by which somebody could see that the peer has more.
sub truncate_waits
{
	section 'TRUNCATE while a transaction is in doubt' => sub {
		in_doubt(q{INSERT INTO acc VALUES (7, 7, 'x')});
		my $err = $beta->fails('postgres', 'TRUNCATE acc');

		like($err, qr/ERROR:  40001: could not serialize replicated TRUNCATE of relation "public.acc"/,
			'refused where it would be missed');
		like($err, qr/HINT:  Retry/, '... to be retried');
		isnt(rows($beta), '', 'nothing is gone');
		here(q{SELECT mmrepl.resume('beta'), mmrepl.retry_now('beta')});
		$alpha->wait_caught_up('beta');
		there('TRUNCATE acc');
		is(rows($_), '', 'then it is done on ' . $_->name) foreach ($alpha, $beta);
	};
	return;
}

# A change of the key has two rows. One of them is as it was in the end, the other is not.
sub half_of_a_change
{
	late('inserted, and goes elsewhere',
		[ q{INSERT INTO acc VALUES (7, 7, 'x')}, $round->(7, 28) ],
		[q{INSERT INTO acc VALUES (7, 9, 'y')}], '1,0,a 2,0,b 3,0 7,9,y 28,7,x');
	late('goes elsewhere, and is inserted again',
		[ $round->(1, 21), q{INSERT INTO acc VALUES (1, 0, 'a')} ],
		['UPDATE acc SET v = 5 WHERE id = 1'], '1,5,a 2,0,b 3,0 21,0,a');
	late('goes elsewhere, and is inserted again, where there is none any more',
		[ $round->(2, 21), qq{INSERT INTO acc VALUES (2, 0, '$long')} ],
		['DELETE FROM acc WHERE id = 2'], '1,0,a 3,0 21,0,b');

	# Where it comes along there is a row now, which would be a unique violation.
	late('on its way through',
		[ $round->(1, 21, 22) ],
		[q{INSERT INTO acc VALUES (21, 9, 'y')}], '2,0,b 3,0 21,9,y 22,0,a');
	late('on its way round',
		[ $round->(1, 21, 1) ],
		[q{INSERT INTO acc VALUES (21, 9, 'y')}], '1,0,a 2,0,b 3,0 21,9,y');
	late('goes elsewhere, changed, and is deleted',
		[ 'UPDATE acc SET id = 21, v = 4 WHERE id = 2', 'DELETE FROM acc WHERE id = 21' ],
		[q{INSERT INTO acc VALUES (21, 9, 'y')}], '1,0,a 3,0 21,9,y');
	late('two change places',
		[ $round->(1, 0), $round->(2, 1), $round->(0, 2) ],
		[q{INSERT INTO acc VALUES (0, 9, 'y')}],
		'0,9,y 1,0,b 2,0,a 3,0');
	late('another table is truncated',
		[ 'UPDATE acc SET v = 1', 'TRUNCATE other', 'UPDATE acc SET v = 0' ],
		['UPDATE acc SET v = 5 WHERE id = 1'], '1,5,a 2,0,b 3,0');
	return;
}

my %ddl = (
	plain => 'CREATE TABLE acc (id int PRIMARY KEY, v int, t text)',
	partitioned => q{
		CREATE TABLE acc (id int PRIMARY KEY, v int, t text) PARTITION BY RANGE (id);
		CREATE TABLE acc_1 PARTITION OF acc FOR VALUES FROM (0) TO (20);
		CREATE TABLE acc_2 PARTITION OF acc FOR VALUES FROM (20) TO (99)});

foreach my $kind ([ 'plain', 0 ], [ 'plain', 1 ], [ 'with a trigger', 1 ], [ 'partitioned', 1 ])
{
	$in_doubt = $kind->[1];
	note "a $kind->[0] table; " . ($in_doubt ? 'in doubt' : 'queued');
	$alpha->create_table_on_both($beta, 'DROP TABLE IF EXISTS acc, other CASCADE');
	$alpha->create_table_on_both($beta, $ddl{ $kind->[0] } || $ddl{plain});
	$alpha->create_table_on_both($beta, 'CREATE TABLE other (id int PRIMARY KEY)');
	there(q{
		CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
		CREATE TRIGGER nothing BEFORE INSERT OR UPDATE ON acc FOR EACH ROW EXECUTE FUNCTION nothing();
		ALTER TABLE acc ENABLE ALWAYS TRIGGER nothing})
	  if $kind->[0] eq 'with a trigger';
	here(sprintf q{ALTER SERVER beta OPTIONS (SET port '%d')}, $in_doubt ? $proxy->port : $beta->port);
	$alpha->create_pair('acc', 'beta', q{mode => 'sync', on_unreachable => 'queue'});
	$beta->create_pair('acc', 'alpha', q{mode => 'sync'});
	$alpha->create_pair('other', 'beta', q{mode => 'sync', on_unreachable => 'queue'});
	all_of_them();
	truncate_waits() if $in_doubt;
	half_of_a_change() if $in_doubt;
}

# Who finds his row by a key that is equal finds one that is not as it was.
section 'a key that is another one and equal' => sub {
	$alpha->create_table_on_both($beta, 'CREATE TABLE num (id numeric PRIMARY KEY, v int)');
	$alpha->create_pair('num', 'beta', q{mode => 'sync', on_unreachable => 'queue'});
	$beta->create_pair('num', 'alpha', q{mode => 'sync'});
	here('INSERT INTO num VALUES (1.0, 0), (2.0, 0)');
	in_doubt('UPDATE num SET id = 1.00 WHERE id = 1', 'UPDATE num SET id = 2.00 WHERE id = 2');
	foreach my $sql ('UPDATE num SET v = 5 WHERE id = 1', 'DELETE FROM num WHERE id = 2')
	{
		like(
			$beta->fails('postgres', $sql),
			qr/ERROR:  40001: .*was changed: \(id, v\) = \((\d)\.0, 0\)\. The row at the peer: .*\(\g1\.00, 0\)/s,
			"$sql is refused");
	}
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	there($_) foreach ('UPDATE num SET v = 5 WHERE id = 1', 'DELETE FROM num WHERE id = 2');
	is($_->safe_psql('postgres', 'SELECT * FROM num'), '1.00|5', 'later it is not')
	  foreach ($alpha, $beta);
};

# What one of them brings back says nothing about the other's columns.
section 'two tables that share one at the peer' => sub {
	here(q{CREATE TABLE left_half (id int PRIMARY KEY, v int); INSERT INTO left_half VALUES (1, 0);
		CREATE TABLE right_half (id int PRIMARY KEY, t text); INSERT INTO right_half VALUES (1, 'a')});
	there(q{CREATE TABLE whole (id int PRIMARY KEY, v int, t text); INSERT INTO whole VALUES (1, 0, 'a')});
	$alpha->create_pair($_, 'beta',
		q{mode => 'sync', on_unreachable => 'queue', remote_table => 'whole'})
	  foreach ('left_half', 'right_half');
	$beta->create_pair('whole', 'alpha',
		q{mode => 'sync', columns => '{id,v}', remote_table => 'left_half'});
	in_doubt(
		'UPDATE left_half SET v = 1',
		q{UPDATE right_half SET t = 'c'},
		'UPDATE left_half SET v = 0');
	there('UPDATE whole SET v = 5');
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	is(there('SELECT * FROM whole'), '1|5|c', 'both changes are there');
	is(here('SELECT v FROM left_half'), '5', '... and here');
};

done_testing();
