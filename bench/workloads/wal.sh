# shellcheck shell=bash
#
# wal: what a change adds to the source's WAL

workload_title()
{
	echo 'WAL at the source: bytes a single-row UPDATE transaction, bytes a row in bulk'
}

# wal_of COMMAND...: the bytes that were written meanwhile.
wal_of()
{
	local before
	before=$(wal_position)
	"$@" >/dev/null
	echo "$(($(wal_position) - before))"
}

# An old snapshot at the source: nothing is pruned, which else happens when a page is visited, more often in one system than
# in another, and would be counted.
hold_snapshot()
{
	exec {snapshot}> >(exec psql -XAtq -h 127.0.0.1 -p "${ports[a]}" -d bench >/dev/null)
	echo 'BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1;' >&"$snapshot"
	wait_until a "count(*) = 1 FROM pg_stat_activity WHERE state = 'idle in transaction' AND backend_xmin IS NOT NULL"
}

workload_run()
{
	local snapshot
	local count=20000 script='\set id random(1, 1000)
UPDATE kv SET n = n + 1, mod_time = clock_timestamp() WHERE id = :id;' session_options='-c synchronous_commit=off'
	# The pages are in the WAL as a whole once after a checkpoint: before what is measured.
	write_load 1 "$script" -t "$count" >/dev/null
	hold_snapshot
	metric update_bytes "$(calculate "$(wal_of write_load 1 "$script" -t "$count") / $count")"
	exec {snapshot}>&-
	query a 'TRUNCATE kv_bulk'
	catch_up >/dev/null
	metric bulk_insert_bytes "$(calculate "$(wal_of query a 'INSERT INTO kv_bulk SELECT * FROM kv') / $BENCH_ROWS")"
	# No row finds room in its own page, whatever ran before: heap-only updates in one system and others in another would
	# differ by more than what is measured.
	catch_up >/dev/null
	query a 'VACUUM kv_bulk'
	metric bulk_update_bytes "$(calculate "$(wal_of query a 'UPDATE kv_bulk SET n = n + 1 WHERE id <= 20000') / 20000")"
	catch_up >/dev/null
	compare kv kv_bulk
}
