# shellcheck shell=bash disable=SC2034 # Used by step.
#
# native: PostgreSQL's logical replication, at its defaults

targets_max=3

system_version()
{
	postgres --version | sed 's/^.*) //; s/ (.*//'
}

system_settings()
{
	if [[ $1 = a ]]; then
		echo 'wal_level = logical'
	else
		# A worker is started at most once in this time.  The pauses are the workloads': it shall not pay for them.
		echo 'wal_retrieve_retry_interval = 50ms'
	fi
}

system_attach()
{
	local number tables
	for ((number = 1; number <= $(layout_targets); number++)); do
		tables=$(layout_tables "$number")
		query a "CREATE PUBLICATION target_$number FOR TABLE ${tables// /, }"
		query b "CREATE SUBSCRIPTION target_$number CONNECTION '$(conninfo a bench)' PUBLICATION target_$number
			WITH (copy_data = false)" "$(target_database "$number")"
	done
}

system_enter()
{
	wait_until a "count(*) = $(layout_targets) FROM pg_stat_replication WHERE state = 'streaming'"
}

system_pause()
{
	query b 'ALTER SUBSCRIPTION target_1 DISABLE'
	wait_until a 'NOT EXISTS (SELECT FROM pg_stat_replication)'
}

system_resume()
{
	query b 'ALTER SUBSCRIPTION target_1 ENABLE'
}

# It is the target that connects.
system_connects_to()
{
	echo a
}

system_route()
{
	query b "ALTER SUBSCRIPTION target_1 CONNECTION '$(ports[a]=$1 && conninfo a bench)'"
}
