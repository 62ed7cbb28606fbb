# shellcheck shell=bash
#
# pglogical: logical replication as an extension, at its defaults

targets_max=3

system_available()
{
	[[ -e $("$PG_CONFIG" --sharedir)/extension/pglogical.control ]]
}

system_version()
{
	sed -n "s/^default_version *= *'\(.*\)'/\1/p" "$("$PG_CONFIG" --sharedir)/extension/pglogical.control"
}

system_settings()
{
	echo "shared_preload_libraries = 'pglogical'"
	if [[ $1 = a ]]; then
		echo 'wal_level = logical'
		# Newer minor releases have a list of the plugins that may be used.
		if [[ $(postgres --describe-config) = *$'\n'output_plugin_libraries* ]]; then
			echo "output_plugin_libraries = 'pgoutput, test_decoding, pglogical_output'"
		fi
	else
		# As for native.
		echo 'wal_retrieve_retry_interval = 50ms'
	fi
}

system_attach()
{
	local number database table
	query a "CREATE EXTENSION pglogical; SELECT pglogical.create_node('a', '$(conninfo a bench)')" >/dev/null
	for ((number = 1; number <= $(layout_targets); number++)); do
		database=$(target_database "$number")
		query a "SELECT pglogical.create_replication_set('target_$number')" >/dev/null
		for table in $(layout_tables "$number"); do
			query a "SELECT pglogical.replication_set_add_table('target_$number', '$table')" >/dev/null
		done
		query b "CREATE EXTENSION pglogical; SELECT pglogical.create_node('b_$number', '$(conninfo b "$database")')" \
			"$database" >/dev/null
		query b "SELECT pglogical.create_subscription('target_$number', '$(conninfo a bench)',
			replication_sets := '{target_$number}', synchronize_structure := false, synchronize_data := false)" \
			"$database" >/dev/null
	done
}

system_enter()
{
	wait_until a "count(*) = $(layout_targets) FROM pg_stat_replication WHERE state = 'streaming'"
}

system_pause()
{
	query b "SELECT pglogical.alter_subscription_disable('target_1', immediate := true)" >/dev/null
	wait_until a 'NOT EXISTS (SELECT FROM pg_stat_replication)'
}

system_resume()
{
	query b "SELECT pglogical.alter_subscription_enable('target_1', immediate := true)" >/dev/null
}
