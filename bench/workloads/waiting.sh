# shellcheck shell=bash
#
# waiting: one row a transaction, 1, 4, 16 and 64 clients that wait for the other server

workload_title()
{
	echo 'single-row UPDATE, synchronous, 1, 4, 16 and 64 clients'
}

workload_systems()
{
	systems_that_wait "mmrepl-sync mmrepl-sync-applied mmrepl-async-applied mmrepl-async-flushed" "$@"
}

workload_run()
{
	local clients
	for clients in 1 4 16 64; do
		metric "tps_$clients" "$(write_load "$clients" "$update_one")"
	done
	catch_up >/dev/null
	compare kv
}
