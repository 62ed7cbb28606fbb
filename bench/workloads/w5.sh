# shellcheck shell=bash
#
# w5: synchronous, one client, transactions of 1, 10, 100 and 10000 rows

workload_title()
{
	echo 'synchronous, one client, one UPDATE of 1, 10, 100, 10000 rows a transaction'
}

workload_systems()
{
	systems_that_wait "mmrepl-sync mmrepl-sync-commit mmrepl-sync-applied mmrepl-sync-applied-commit \
		mmrepl-async-applied mmrepl-async-flushed" "$@"
}

workload_run()
{
	local rows tps
	for rows in 1 10 100 10000; do
		tps=$(write_load 1 "$(update_rows "$rows")" -T "$((BENCH_SECONDS > 6 ? BENCH_SECONDS / 3 : 2))")
		metric "ms_$rows" "$(calculate "1000 / $tps")"
	done
	catch_up >/dev/null
	compare kv
}
