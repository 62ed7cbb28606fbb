# shellcheck shell=bash disable=SC2034 # Used by step.
#
# native-sync: logical replication with synchronous_commit = remote_apply; the subscriber does not flush before it answers

source "$bench/systems/native.sh"
stage=native
subscriber_commit=off

system_enter()
{
	query b "ALTER SUBSCRIPTION target_1 SET (synchronous_commit = '$subscriber_commit')"
	query a "ALTER SYSTEM SET synchronous_standby_names = 'target_1'"
	query a 'SELECT pg_reload_conf()' >/dev/null
	wait_until a "sync_state = 'sync' AND state = 'streaming' FROM pg_stat_replication"
}

system_leave()
{
	query a 'ALTER SYSTEM RESET synchronous_standby_names'
	query b 'ALTER SUBSCRIPTION target_1 SET (synchronous_commit = off)'
}

system_session()
{
	echo '-c synchronous_commit=remote_apply'
}
