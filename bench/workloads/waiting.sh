# shellcheck shell=bash
#
# waiting: one row a transaction, 1, 4, 16 and 64 clients that wait for the other server

workload_title()
{
	echo 'single-row UPDATE, synchronous, 1, 4, 16 and 64 clients'
}

workload_systems()
{
	local name
	for name in "$@"; do
		case $name in
			none | none-again) echo "$name" ;;
			mmrepl) printf '%s\n' mmrepl-sync mmrepl-sync-applied mmrepl-async-applied mmrepl-async-flushed ;;
			native) printf '%s\n' native-sync native-sync-flush ;;
			*-sync | *-sync-* | *-async-*) echo "$name" ;;
		esac
	done
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
