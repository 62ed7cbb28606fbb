# Tables.pm
#		Which figures of a workload are shown, and how: tables in Markdown, goals,
#		and what plots are drawn from.

package Tables;

use strict;
use warnings;

use Results ();

# A column: its heading, the metric, and the form of it.  Forms: median; range;
# median_max: median and greatest; none, native, ...: the ratio to that system;
# none_range: the least and the greatest ratio; added: what none had taken off.
my @throughput = (
	[ 'TPS ÷ none\'s',   'tps',       'none' ],
	[ 'min–max',         'tps',       'none_range' ],
	[ 'TPS ÷ native\'s', 'tps',       'native' ],
	[ 'TPS',               'tps',       'median' ],
	[ 'catch-up, s (max)', 'catchup_s', 'median_max' ]);
my @catch_up = (
	[ 'rows/s',            'rows_per_s', 'median' ],
	[ 'rows/s ÷ native\'s', 'rows_per_s', 'native' ],
	[ 'transactions/s',    'tx_per_s',   'median' ],
	[ 'drain, s',          'drain_s',    'median' ],
	[ 'min–max',          'drain_s',    'range' ],
	[ 'load, s',           'load_s',     'median' ]);
my @latency = (
	[ 'p50, ms',         'p50_ms', 'median' ],
	[ 'p95',             'p95_ms', 'median' ],
	[ 'p99',             'p99_ms', 'median' ],
	[ 'max',             'max_ms', 'median' ],
	[ 'p50 ÷ native\'s', 'p50_ms', 'native' ],
	[ 'p99 ÷ native\'s', 'p99_ms', 'native' ],
	[ 'commits a run',   'transactions', 'median' ]);

my %columns = (
	w1a => \@throughput,
	w1b => \@throughput,
	w1c => \@throughput,
	w6 => \@throughput,
	w2 => [
		[ 'source s ÷ none\'s',  'source_s', 'none' ],
		[ 'min–max',             'source_s', 'none_range' ],
		[ 'source, s',           'source_s', 'median' ],
		[ 's until the target has all', 'target_s', 'median' ],
		[ 'min–max',             'target_s', 'range' ],
		[ '÷ native\'s',         'target_s', 'native' ],
	],
	w3a => \@catch_up,
	w3b => \@catch_up,
	w4 => \@latency,
	idle => \@latency,
	wal => [
		[ 'single-row UPDATE, bytes', 'update_bytes',      'median' ],
		[ 'added',                    'update_bytes',      'added' ],
		[ 'bulk INSERT, a row',       'bulk_insert_bytes', 'median' ],
		[ 'added',                    'bulk_insert_bytes', 'added' ],
		[ 'bulk UPDATE, a row',       'bulk_update_bytes', 'median' ],
		[ 'added',                    'bulk_update_bytes', 'added' ],
	],
);
$columns{blackhole} = [
	[ 'TPS ÷ none\'s, target answers', 'tps', 'none' ],
	[ 'TPS, target answers',           'tps',        'median' ],
	[ 'TPS, target silent',            'tps_silent', 'median' ],
	[ 'silent ÷ answers',              'gone_to_there', 'median' ],
	[ 'min–max',                       'gone_to_there', 'range' ],
	[ 'catch-up after it, s',          'catchup_s', 'median' ]];
foreach my $number (1 .. 3)
{
	push @{ $columns{targets} },
	  [ "$number: TPS ÷ none\'s", "tps_$number", 'none' ],
	  [ 'TPS',                    "tps_$number", 'median' ],
	  [ 'catch-up, s',            "catchup_s_$number", 'median' ];
}
foreach my $kind (map { ("${_}_1", "${_}_1000") } 'insert', 'update', 'delete')
{
	push @{ $columns{apply} }, [ $kind, $kind, 'median' ], [ '÷ none\'s', $kind, 'none' ];
}
foreach my $rows (1, 10, 100, 10000)
{
	push @{ $columns{w5} },
	  [ "$rows rows, ms",         "ms_$rows", 'median' ],
	  [ '÷ none\'s',              "ms_$rows", 'none' ],
	  [ '÷ native-sync\'s',       "ms_$rows", 'native-sync' ],
	  [ '÷ native-sync-flush\'s', "ms_$rows", 'native-sync-flush' ];
}

foreach my $clients (1, 4, 16, 64)
{
	push @{ $columns{waiting} },
	  [ $clients == 1 ? '1 client, TPS' : "$clients clients, TPS", "tps_$clients", 'median' ],
	  [ '÷ native-sync\'s',       "tps_$clients", 'native-sync' ],
	  [ '÷ native-sync-flush\'s', "tps_$clients", 'native-sync-flush' ];
}

foreach my $kind (1, 2, 10, 'bulk')
{
	push @{ $columns{distance} },
	  [
		$kind eq 'bulk' ? '1 statement, 10000 rows' : "$kind statement" . ($kind > 1 ? 's' : ''),
		"trips_$kind", 'median'
	  ];
}

# What is drawn: what the axis says, the form, and the metrics with what is
# written below their bars.
my %plots = (
	w2 => [ 'time at the source ÷ none\'s', 'none', [ 'source_s', '' ] ],
	w3a => [ 'transactions a second', 'median', [ 'tx_per_s', '' ] ],
	w3b => [ 'rows a second', 'median', [ 'rows_per_s', '' ] ],
	w5 => [
		'time of a transaction ÷ none\'s', 'none',
		map { [ "ms_$_", $_ == 1 ? '1 row' : "$_ rows" ] } (1, 10, 100, 10000)
	],
	wal => [
		'bytes of WAL', 'median',
		[ 'update_bytes',      'UPDATE of a row' ],
		[ 'bulk_insert_bytes', 'a row of a bulk INSERT' ],
		[ 'bulk_update_bytes', 'a row of a bulk UPDATE' ]
	],
	targets => [
		'TPS ÷ none\'s', 'none',
		[ 'tps_1', '1 target' ], map { [ "tps_$_", "$_ targets" ] } (2, 3)
	],
	apply => [
		'rows a second', 'median',
		map { [ $_, $_ =~ s/_(\d+)/, $1/r ] }
		  ('insert_1', 'update_1', 'delete_1', 'insert_1000', 'update_1000', 'delete_1000')
	],
	(map { $_ => [ 'latency, ms', 'median', map { [ "${_}_ms", $_ ] } ('p50', 'p95', 'p99') ] }
		  ('w4', 'idle')),
	(map { $_ => [ 'TPS ÷ none\'s', 'none', [ 'tps', '' ] ] } ('w1a', 'w1b', 'w1c', 'w6')));

# What is aimed at: workload, system, metric, form, bound.  A bound that is
# negative is one from above.
my @goals = (
	[ 'w1a', 'mmrepl', 'tps',        'native', 1.15 ],
	[ 'w1a', 'mmrepl', 'tps',        'none',   0.85 ],
	[ 'w1b', 'mmrepl', 'tps',        'native', 1 ],
	[ 'w1c', 'mmrepl', 'tps',        'native', 1.15 ],
	[ 'wal', 'mmrepl', 'update_bytes',      'added', -250 ],
	[ 'wal', 'mmrepl', 'bulk_insert_bytes', 'added', -160 ],
	[ 'wal', 'mmrepl', 'bulk_update_bytes', 'added', -160 ],
	[ 'w2',  'mmrepl', 'source_s',   'none',   -1.7 ],
	[ 'w2',  'mmrepl', 'target_s',   'native', -1 ],
	[ 'w3a', 'mmrepl', 'tx_per_s',   'native', 2.5 ],
	[ 'w3b', 'mmrepl', 'rows_per_s', 'native', 1.4 ],
	[ 'w4',  'mmrepl', 'p50_ms',     'native', -0.6 ],
	[ 'w4',  'mmrepl', 'p99_ms',     'native', -1 ],
	[ 'idle', 'mmrepl', 'p50_ms',    'median', -1 ],
	[ 'idle', 'mmrepl', 'p99_ms',    'median', -5 ],
	(
		map {
			my $rows = $_;
			[ 'w5', 'mmrepl-sync',         "ms_$rows", 'native-sync-flush', -1 ],
			[ 'w5', 'mmrepl-sync-applied', "ms_$rows", 'native-sync',       -1 ],
			[ 'w5', 'mmrepl-sync',         "ms_$rows", 'native-sync',       -1 ],
			[ 'w5', 'mmrepl-async-applied', "ms_$rows", 'native-sync',       -1 ],
			[ 'w5', 'mmrepl-async-flushed', "ms_$rows", 'native-sync-flush', -1 ],
		} (1, 10, 100, 10000)),
	[ 'distance', 'mmrepl-sync', 'trips_bulk', 'median', -10 ],
	[ 'w6', 'mmrepl', 'tps',       'native', 1 ],
	[ 'w6', 'mmrepl', 'catchup_s', 'native', -1 ],
	[ 'backlog', 'mmrepl', 'last_to_first', 'median', 0.9 ],
	[ 'blackhole', 'mmrepl', 'gone_to_there', 'median', 0.97 ]);

# The values behind a column, sorted.
sub sorted_values
{
	my ($results, $workload, $system, $metric, $form) = @_;
	my @how =
	    $form =~ /^(?:median|range|median_max)$/ ? ()
	  : $form eq 'added'                         ? ('-', 'none')
	  :   ('/', $form =~ s/_range$//r);

	return if @how && $how[1] eq $system;
	return $results->values_of($workload, $system, $metric, @how);
}

# A number as it is shown: three digits that say something.
sub number
{
	my ($value) = @_;
	return sprintf '%.0f', $value if abs($value) >= 100;
	return sprintf '%.1f', $value if abs($value) >= 10;
	return sprintf '%.2f', $value if abs($value) >= 0.1 || $value == 0;
	return sprintf '%.2g', $value;
}

sub cell
{
	my ($results, $workload, $system, $metric, $form) = @_;
	my @values =
	  sorted_values($results, $workload, $system, $metric, $form);

	return '–' unless @values;
	return number($values[0]) . '–' . number($values[-1])
	  if $form =~ /range$/;
	my $median = number(Results::median(@values));
	return $form eq 'median_max'
	  ? "$median (" . number($values[-1]) . ')'
	  : $median;
}

# The columns of a workload, of those that have no others: all its metrics.
sub columns_of
{
	my ($results, $workload) = @_;

	return @{ $columns{$workload} } if $columns{$workload};
	return map { ([ $_, $_, 'median' ], [ 'min–max', $_, 'range' ]) }
	  $results->metrics($workload);
}

sub markdown_row
{
	return '| ' . join(' | ', @_) . " |\n";
}

# The table of a workload.  Columns in which nothing would stand are left out.
sub table
{
	my ($results, $workload) = @_;
	my @systems = $results->systems($workload);
	my @columns;

	foreach my $column (columns_of($results, $workload))
	{
		my (undef, @what) = @$column;
		push @columns, $column
		  if grep { sorted_values($results, $workload, $_, @what) } @systems;
	}
	my $text = markdown_row('system', (map { $_->[0] } @columns), 'A = B');
	$text .= markdown_row(('---') x (@columns + 2));
	foreach my $system (@systems)
	{
		my $bad = $results->bad($workload, $system);
		my $equal =
		    $bad ? "**$bad void or failed**"
		  : $results->compared($workload, $system) ? 'yes'
		  :                                          '–';
		my @cells = map {
			my (undef, @what) = @$_;
			cell($results, $workload, $system, @what)
		} @columns;
		$text .= markdown_row($system, @cells, $equal);
	}
	return $text;
}

# The goals whose figures were measured, as a table.
sub goals
{
	my ($results) = @_;
	my $text = markdown_row('workload', 'figure', 'goal', 'measured', 'min–max', 'met');

	$text .= markdown_row(('---') x 6);
	foreach my $goal (@goals)
	{
		my ($workload, $system, $metric, $form, $bound) = @$goal;
		my @values =
		  sorted_values($results, $workload, $system, $metric, $form);
		next unless @values;
		my $value = Results::median(@values);
		my $met = $bound < 0 ? $value <= -$bound : $value >= $bound;
		$text .= markdown_row(
			$workload,
			($system eq 'mmrepl' ? '' : "$system: ") . $metric . ($form eq 'median' ? '' : $form eq 'added' ? ' added' : " ÷ $form\'s"),
			($bound < 0 ? '≤ ' : '≥ ') . abs $bound,
			number($value),
			number($values[0]) . '–' . number($values[-1]),
			$met ? 'yes' : '**no**');
	}
	return $text;
}

# What a plot of the workload shows, or nothing if there is none of it: the text
# of its axis, and for each group of bars its label and the bars: system, median,
# least and greatest.
sub plot
{
	my ($results, $workload) = @_;
	my ($axis, $form, @metrics) = @{ $plots{$workload} || return };
	my @systems =
	  grep { sorted_values($results, $workload, $_, $metrics[0][0], $form) }
	  $results->systems($workload);
	my @groups;

	foreach my $metric (@metrics)
	{
		my @bars = map {
			my @values = sorted_values($results, $workload, $_, $metric->[0], $form);
			[ $_, Results::median(@values) // 0, $values[0] // 0, $values[-1] // 0 ]
		} @systems;
		push @groups, [ $metric->[1], @bars ];
	}
	return @systems ? ($axis, @groups) : ();
}

1;
