# shellcheck shell=bash disable=SC2034 # Used by step.
#
# mmrepl: mmrepl_bgw with asynchronous pairs, at its defaults

targets_max=3

system_version()
{
	echo "mmrepl_bgw ${BENCH_COMMIT:-}"
}

system_settings()
{
	echo "shared_preload_libraries = 'mmrepl_bgw'"
}

system_attach()
{
	local number database table
	query a 'CREATE EXTENSION mmrepl_bgw'
	for ((number = 1; number <= $(layout_targets); number++)); do
		database=$(target_database "$number")
		query b 'CREATE EXTENSION mmrepl_bgw' "$database"
		query a "
			CREATE SERVER target_$number FOREIGN DATA WRAPPER mmrepl_fdw
				OPTIONS (host '127.0.0.1', port '${ports[b]}', dbname '$database');
			CREATE USER MAPPING FOR CURRENT_USER SERVER target_$number OPTIONS (user '$PGUSER', password '$PGPASSWORD')"
		for table in $(layout_tables "$number"); do
			query a "SELECT mmrepl.create_pair('$table', 'target_$number')" >/dev/null
		done
	done
}

# The worker reads the queue's tables after a start; it is to be at the shared memory again.
system_enter()
{
	wait_until a "bool_and(state = 'streaming') FROM mmrepl.pg_stat_mmrepl"
}

system_pause()
{
	query a "SELECT mmrepl.pause('target_1')" >/dev/null
	wait_until a "state = 'paused' FROM mmrepl.pg_stat_mmrepl"
}

system_resume()
{
	query a "SELECT mmrepl.resume('target_1')" >/dev/null
}

system_route()
{
	query a "ALTER SERVER target_1 OPTIONS (SET port '$1')"
}
