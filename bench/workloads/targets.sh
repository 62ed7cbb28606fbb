# shellcheck shell=bash
#
# targets: one table replicated to one, two and three databases

layout=fan

workload_title()
{
	echo 'single-row UPDATE, 4 clients, with one, two and three targets'
}

workload_systems()
{
	local name
	for name in "$@"; do
		load_system "$name"
		if [[ $replicates = no || $targets_max -ge 3 ]]; then
			echo "$name"
		fi
	done
}

workload_run()
{
	local number there tables=()
	for number in 1 2 3; do
		on_both 'CHECKPOINT'
		metric "tps_$number" "$(write_load 4 "\\set id random(1, 100000)
UPDATE kv_$number SET n = n + 1, mod_time = clock_timestamp() WHERE id = :id;")"
		if [[ $replicates = yes ]]; then
			read -r _ there _ < <(catch_up --since "$(now)")
			metric "catchup_s_$number" "$there"
		fi
		tables+=("kv_$number")
	done
	compare "${tables[@]}"
}
