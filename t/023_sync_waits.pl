# Where a synchronous statement waits besides its own conversation with the peer
# (that is t/048): for a connection, at the greeting, at the fence, between two
# phases.  Whoever cancels, terminates or has a timeout is answered within a second,
# and nothing is left on either side.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use FaultProxy;
use MmreplCluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $soon = 1 + 1;    # s: a busy machine takes its own share
my $bound = 2;       # s: sync_timeout, and connect_timeout

my ($alpha, $beta) = MmreplCluster->new_pair(
	conf => qq{
max_prepared_transactions = 5
mmrepl.retry_min_delay = '20ms'
mmrepl.retry_max_delay = '200ms'
mmrepl.recovery_interval = '1s'
mmrepl.sync_timeout = '${bound}s'
mmrepl.connect_timeout = '${bound}s'
});
my $proxy = FaultProxy->new(port => $beta->port);
my $port = $proxy->port;

sub here { return $alpha->safe_psql('postgres', $_[0]) }
sub there { return $beta->safe_psql('postgres', $_[0]) }

$alpha->create_table_on_both($beta,
	q{CREATE TABLE item (id int PRIMARY KEY, v text); CREATE TABLE queued (id int PRIMARY KEY, v text)});
here("ALTER SERVER beta OPTIONS (SET port '$port')");
$alpha->create_pair('item', 'beta', q{mode => 'sync'});
$alpha->create_pair('queued', 'beta');
here(q{INSERT INTO queued VALUES (1, 'one')});
$alpha->wait_caught_up('beta');
my $last_id = 0;
my $holder = $beta->session;

# Where it waits: what has to be done for that before, and how it is undone; whether
# the session has a connection already; what is expected of the transaction.
my @places = (
	{
		name => 'the connection',
		before => sub { $proxy->new_connections('black hole') },
		after => sub { $proxy->new_connections('pass') },
	},
	{
		name => 'the set-up of a connection',
		rule => { type => 'Q', pattern => 'SET search_path', when => 'after' },
	},
	{
		name => 'the greeting',
		rule => { pattern => 'mmrepl.hello', when => 'before' },
	},
	{
		name => 'the fence',
		warm => 1,
		before => sub {
			$holder->ok('BEGIN; SELECT * FROM queued FOR UPDATE');
			here('UPDATE queued SET v = v');
			$beta->poll_ok(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock'},
				'delivery waits');
		},
		after => sub { $holder->ok('ROLLBACK') },
	},
	{
		name => 'PREPARE TRANSACTION',
		warm => 1,
		two_phase => 1,
		rule => { type => 'Q', pattern => '^Q....PREPARE', when => 'after' },
	},
	{
		name => 'COMMIT PREPARED',
		warm => 1,
		two_phase => 1,
		committed => 1,
		rule => { type => 'Q', pattern => '^Q....COMMIT PREPARED', when => 'before' },
	});
my @ways = ('pg_cancel_backend', 'pg_terminate_backend', 'statement_timeout', 'sync_timeout');

foreach my $place (@places)
{
	foreach my $way (@ways)
	{
		# The server switches statement_timeout off when COMMIT begins.
		next if $place->{two_phase} && $way eq 'statement_timeout';

		section "$place->{name}, $way" => sub {
			$alpha->poll_state('beta', 'streaming');
			my %before = map { $_->{id} => 1 } $proxy->connections;
			my $session = $alpha->session;

			$session->ok(q{SET mmrepl.two_phase = 'on'}) if $place->{two_phase};
			$session->ok('INSERT INTO item VALUES (' . ++$last_id . q{, 'warm')}) if $place->{warm};
			my @mine = grep { !$before{$_} } map { $_->{id} } $proxy->connections;
			my $id = ++$last_id;
			my $rule;

			$place->{before}->() if $place->{before};
			$rule = $proxy->rule(
				%{ $place->{rule} },
				from => 'client', action => 'hold',
				$place->{warm} ? (only => \@mine) : (except => [ keys %before ]))
			  if $place->{rule};
			$session->ok(q{SET statement_timeout = '500ms'}) if $way eq 'statement_timeout';
			$session->start("INSERT INTO item VALUES ($id, 'waits')");
			if ($rule) { ok($proxy->wait_for($rule), 'it is held') }
			else
			{
				$alpha->poll_ok(
					q{SELECT count(*) = 1 FROM pg_stat_activity WHERE state = 'active' AND wait_event IS NOT NULL AND pid = }
					  . $session->pid, 'it waits');
			}
			my $start = Time::HiRes::time();
			here("SELECT $way(" . $session->pid . ')') if $way =~ /^pg_/;
			my $err = '';
			if ($way eq 'pg_terminate_backend')
			{
				$alpha->poll_ok('SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = ' . $session->pid,
					'the session ends');
			}
			else
			{
				(undef, $err) = $session->finish;
			}
			cmp_ok(Time::HiRes::time() - $start, '<', $soon + ($way eq 'sync_timeout' ? $bound : 0),
				'the wait ends soon');
			like($err, $place->{committed} ? qr/WARNING:\s+57014/ : qr/ERROR:\s+57014/, 'and says why')
			  if $way eq 'pg_cancel_backend' || $way eq 'statement_timeout';
			like($err, qr/ERROR:\s+(?:MM008|08001)/, 'and says why') if $way eq 'sync_timeout' && !$place->{committed};
			$place->{after}->() if $place->{after};
			my @now = grep { !$before{$_} } map { $_->{id} } $proxy->connections;
			$proxy->kill(only => \@now) if @now && $rule;
			$proxy->clear;
			if ($way ne 'pg_terminate_backend')
			{
				$session->ok('RESET statement_timeout');
				$session->ok('INSERT INTO item VALUES (' . ++$last_id . q{, 'next')});
				$session->quit;
			}
			$alpha->wait_caught_up('beta');
			$beta->poll_ok('SELECT count(*) = 0 FROM pg_prepared_xacts', 'nothing is prepared there');
			is(here("SELECT count(*) FROM item WHERE id = $id"), $place->{committed} ? 1 : 0,
				$place->{committed} ? 'it is committed' : 'it is rolled back');
			$alpha->same_rows($beta, $_) foreach ('item', 'queued');
		};
	}
}

# The error said in which state the stream had been when the wait began.
section 'the state that a wait in vain is told of' => sub {
	my $session = $alpha->session;

	$holder->ok('BEGIN; SELECT * FROM queued FOR UPDATE');
	here('UPDATE queued SET v = v');
	$beta->poll_ok(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock'}, 'delivery waits');
	$session->start('INSERT INTO item VALUES (' . ++$last_id . q{, 'in vain')});
	$alpha->poll_ok(
		q{SELECT count(*) = 1 FROM pg_stat_activity WHERE state = 'active' AND wait_event IS NOT NULL AND pid = }
		  . $session->pid, 'it waits');
	here(q{SELECT mmrepl.pause('beta')});

	my (undef, $err) = $session->finish;

	like($err, qr/ERROR:\s+MM008: .*still queued\nDETAIL:  The stream is "paused"/, 'is the one that it is in now');
	$holder->ok('ROLLBACK');
	here(q{SELECT mmrepl.resume('beta')});
	$alpha->wait_caught_up('beta');
	$session->quit;
};

$holder->quit;
foreach my $node ($alpha, $beta)
{
	ok(!$node->log_contains(qr/PANIC|TRAP:|was terminated by signal/),
		'no crash in the log of ' . $node->name);
	$node->stop('fast');
}

done_testing();
