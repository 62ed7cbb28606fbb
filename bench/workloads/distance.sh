# shellcheck shell=bash disable=SC2034 # Used by step.
#
# distance: what a synchronous transaction waits for when the servers are far from each other, in round trips

layout=far
round_trip=10 # milliseconds

workload_title()
{
	echo "synchronous, one client, servers that are $round_trip ms of round trip apart: round trips a transaction waits for"
}

workload_systems()
{
	local name
	for name in "$@"; do
		case $name in
			mmrepl) printf '%s\n' mmrepl-sync mmrepl-sync-commit ;;
			native) echo native-sync-flush ;;
			mmrepl-sync* | native-sync*) echo "$name" ;;
		esac
	done
}

# statements N: a transaction of so many, each of one row.
statements()
{
	local number
	echo 'BEGIN;'
	for ((number = 1; number <= $1; number++)); do
		printf '\\set id random(1, 100000)\nUPDATE kv SET n = n + 1, mod_time = clock_timestamp() WHERE id = :id;\n'
	done
	echo 'COMMIT;'
}

# The system's connections go over a line of that many milliseconds from now on.
move_away()
{
	local line port
	exec {line}< <(exec "$BENCH_WORK/bench/lib/delay" "$1" "${ports[$(system_connects_to)]}")
	line_pid=$!
	read -r port <&"$line"
	system_route "$port"
	catch_up >/dev/null
}

kinds=(1 2 10 bulk)

# Milliseconds of a transaction of each kind.
measure_kinds()
{
	local kind script
	for kind in "${kinds[@]}"; do
		if [[ $kind = bulk ]]; then
			script='UPDATE kv SET n = n + 1, mod_time = clock_timestamp() WHERE id <= 10000;'
		else
			script=$(statements "$kind")
		fi
		calculate "1000 / $(write_load 1 "$script" -T 3)"
		echo
	done
}

workload_run()
{
	local line_pid number near far
	move_away 0
	near=$(measure_kinds)
	kill "$line_pid"
	move_away "$round_trip"
	far=$(measure_kinds)
	# Back, or the next round would not find the way.
	system_route "${ports[$(system_connects_to)]}"
	kill "$line_pid"
	mapfile -t near <<<"$near"
	mapfile -t far <<<"$far"
	for number in "${!kinds[@]}"; do
		metric "trips_${kinds[number]}" "$(calculate "(${far[number]} - ${near[number]}) / $round_trip")"
	done
	catch_up >/dev/null
	compare kv
}
