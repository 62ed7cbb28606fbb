# shellcheck shell=bash
#
# w4: latency from commit to commit, read from both servers' WAL

workload_title()
{
	echo 'latency from commit to commit at 200 transactions/s, one client'
}

workload_systems()
{
	replicating "$@"
}

relation_path()
{
	query "$1" "SELECT coalesce(nullif(c.reltablespace, 0), d.dattablespace) || '/' || d.oid || '/' || pg_relation_filenode(c.oid)
		FROM pg_class c, pg_database d WHERE c.oid = 'kv'::regclass AND d.datname = current_database()"
}

# dump_wal NODE START: from there to where it is flushed.
dump_wal()
{
	pg_waldump -p "$(stage_directory)/$1/pg_wal" -s "$2" -e "$(query "$1" 'SELECT pg_current_wal_flush_lsn()')" \
		> "$BENCH_WORK/wal_$1"
}

workload_run()
{
	local start_a start_b p50 p95 p99 max count
	start_a=$(query a 'SELECT pg_current_wal_insert_lsn()')
	start_b=$(query b 'SELECT pg_current_wal_insert_lsn()')
	write_load 1 "$update_one" -R 200 -T "$((BENCH_SECONDS * 2))" >/dev/null
	catch_up >/dev/null

	# A commit that waits for the disk, for those that did not.  (A checkpoint would take the WAL away.)
	on_both "SELECT pg_logical_emit_message(true, 'bench', '')"
	dump_wal a "$start_a"
	dump_wal b "$start_b"
	read -r p50 p95 p99 max count < <("$bench/lib/commit-latency" "$BENCH_WORK/wal_a" "$(relation_path a)" \
		"$BENCH_WORK/wal_b" "$(relation_path b)")
	rm -f "$BENCH_WORK/wal_a" "$BENCH_WORK/wal_b"
	metric p50_ms "$p50"
	metric p95_ms "$p95"
	metric p99_ms "$p99"
	metric max_ms "$max"
	metric transactions "$count"
	compare kv
}
