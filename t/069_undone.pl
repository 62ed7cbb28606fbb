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
	$beta->poll_ok(q{SELECT count(*) = 0 FROM pg_locks WHERE relation = 'acc'::regclass},
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

sub all_of_them
{
	my $round = sub { return map { "UPDATE acc SET id = $_[$_] WHERE id = $_[$_ - 1]" } (1 .. $#_) };
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
	$alpha->create_table_on_both($beta, 'DROP TABLE IF EXISTS acc CASCADE');
	$alpha->create_table_on_both($beta, $ddl{ $kind->[0] } || $ddl{plain});
	there(q{
		CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
		CREATE TRIGGER nothing BEFORE INSERT OR UPDATE ON acc FOR EACH ROW EXECUTE FUNCTION nothing();
		ALTER TABLE acc ENABLE ALWAYS TRIGGER nothing})
	  if $kind->[0] eq 'with a trigger';
	here(sprintf q{ALTER SERVER beta OPTIONS (SET port '%d')}, $in_doubt ? $proxy->port : $beta->port);
	$alpha->create_pair('acc', 'beta', q{mode => 'sync', on_unreachable => 'queue'});
	$beta->create_pair('acc', 'alpha', q{mode => 'sync'});
	all_of_them();
	truncate_waits() if $in_doubt;
}

done_testing();
