# shellcheck shell=bash
#
# idle: how soon a client at the target sees a commit, when nothing else happens

workload_title()
{
	echo 'from the acknowledged commit to the first query at the target that shows it, idle system'
}

workload_systems()
{
	replicating "$@"
}

workload_run()
{
	local p50 p95 p99 max count
	read -r p50 p95 p99 max count < <("$bench/lib/probe" "$((BENCH_SECONDS * 50))" 0.02 "${ports[a]}" "${ports[b]}")
	metric p50_ms "$p50"
	metric p95_ms "$p95"
	metric p99_ms "$p99"
	metric max_ms "$max"
	metric transactions "$count"
	catch_up >/dev/null
	compare kv
}
