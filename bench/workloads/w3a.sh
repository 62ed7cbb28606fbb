# shellcheck shell=bash
#
# w3a: catching up with single-row transactions

workload_title()
{
	echo "catch-up with $((BENCH_ROWS / 5)) single-row transactions"
}

workload_systems()
{
	replicating "$@"
}

workload_run()
{
	measure_drain 1 "$((BENCH_ROWS / 5))" "$update_one" 4
	compare kv
}
