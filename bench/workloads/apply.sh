# shellcheck shell=bash
#
# apply: how fast changes of each kind are applied, beside how fast one session executes the same statements at the target

workload_title()
{
	echo 'rows/s of catching up, by kind of change; none: one local session at the target'
}

# The statements take their keys from a sequence, so that each transaction has its own.
insert_rows()
{
	echo "INSERT INTO kv_bulk SELECT g, 1, repeat('x', 100), 0, now()
		FROM (SELECT nextval('kv_next') * $1 AS first OFFSET 0) s, generate_series(first, first + $1 - 1) g;"
}

delete_rows()
{
	echo "WITH s AS MATERIALIZED (SELECT nextval('kv_next') * $1 AS first)
		DELETE FROM kv_bulk WHERE id BETWEEN (SELECT first FROM s) AND (SELECT first FROM s) + $1 - 1;"
}

# rate_of NAME ROWS TRANSACTIONS SCRIPT
rate_of()
{
	local start session_options='-c synchronous_commit=off' load_node=b
	on_both "SELECT setval('kv_next', 1, false)"
	if [[ $replicates = yes ]]; then
		load_node=a
		drain "$3" "$4" 1
		metric "$1" "$(calculate "$2 * $3 / $drain_time")"
	else
		metric "$1" "$(calculate "$2 * $(write_load 1 "$4" -t "$3")")"
	fi
}

workload_run()
{
	local many=$((BENCH_ROWS / 2 / 1000)) single=$((BENCH_ROWS / 10))
	query "$([[ $replicates = yes ]] && echo a || echo b)" 'TRUNCATE kv_bulk'
	catch_up >/dev/null
	rate_of insert_1000 1000 "$many" "$(insert_rows 1000)"
	compare kv_bulk
	rate_of update_1000 1000 "$many" "$(update_rows 1000)"
	rate_of delete_1000 1000 "$many" "$(delete_rows 1000)"
	rate_of insert_1 1 "$single" "$(insert_rows 1)"
	rate_of update_1 1 "$single" "$update_one"
	rate_of delete_1 1 "$single" "$(delete_rows 1)"
	compare kv kv_bulk
}
