# shellcheck shell=bash
#
# w5: synchronous, one client, transactions of 1, 10, 100 and 10000 rows

workload_title()
{
	echo 'synchronous, one client, one UPDATE of 1, 10, 100, 10000 rows a transaction'
}

workload_systems()
{
	local name
	for name in "$@"; do
		case $name in
			none) printf '%s\n' none two-trips two-trips-flush ;;
			two-trips*) echo "$name" ;;
			*) systems_that_wait "mmrepl-sync mmrepl-sync-commit mmrepl-sync-applied mmrepl-sync-applied-commit \
				mmrepl-async-applied mmrepl-async-flushed" "$name" ;;
		esac
	done
}

# one_client SCRIPT: its milliseconds a transaction.
one_client()
{
	calculate "1000 / $(write_load 1 "$1" -T "$((BENCH_SECONDS > 6 ? BENCH_SECONDS / 3 : 2))")"
}

# in_two_trips SCRIPT: its statement and BEGIN sent together, COMMIT when both are answered.
in_two_trips()
{
	sed -e '/^UPDATE/i \\\startpipeline\nBEGIN;' -e '/^UPDATE/a \\\endpipeline\nCOMMIT;' <<<"$1"
}

workload_run()
{
	local rows script ms trips
	for rows in 1 10 100 10000; do
		script=$(update_rows "$rows")
		ms=$(one_client "$script")
		if [[ -n $trips_commit ]]; then
			trips=$(load_node=b session_options="-c synchronous_commit=$trips_commit" one_client "$(in_two_trips "$script")")
			ms=$(calculate "$ms + $trips")
		fi
		metric "ms_$rows" "$ms"
	done
	catch_up >/dev/null
	compare kv
}
