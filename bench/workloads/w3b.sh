# shellcheck shell=bash
#
# w3b: catching up with transactions of 1000 rows

workload_title()
{
	echo "catch-up with $BENCH_ROWS rows in transactions of 1000"
}

workload_systems()
{
	replicating "$@"
}

workload_run()
{
	measure_drain 1000 "$((BENCH_ROWS / 1000))" "$(update_rows 1000)" 1
	compare kv
}
