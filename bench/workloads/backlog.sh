# shellcheck shell=bash
#
# backlog: does catching up slow down with the size of the backlog?  Transactions of 10 rows.

workload_title()
{
	echo "rows/s of catching up with backlogs of $(backlogs)"
}

workload_systems()
{
	replicating "$@"
}

backlogs()
{
	local sizes="$((BENCH_ROWS / 10)) $BENCH_ROWS"
	if [[ $BENCH_LARGE = 1 ]]; then
		sizes+=" $((BENCH_ROWS * 10))"
	fi
	echo "$sizes"
}

workload_run()
{
	local size rate first=''
	for size in $(backlogs); do
		drain "$((size / 10))" "$(update_rows 10)" 2
		rate=$(calculate "$size / $drain_time")
		metric "rows_per_s_$size" "$rate"
		metric "drain_s_$size" "$drain_time"
		first=${first:-$rate}
		compare kv
	done
	metric last_to_first "$(calculate "$rate / $first")"
}
