# shellcheck shell=bash
#
# blackhole: what writers pay when the target does not answer any more, though its connections stand

workload_title()
{
	echo 'single-row UPDATE, 4 clients, with a target that answers and with one that has fallen silent'
}

# half_run: a run of half the length; prints transactions a second.
half_run()
{
	on_both 'CHECKPOINT'
	write_load 4 "$update_one" -T "$(((BENCH_SECONDS + 1) / 2))"
}

workload_run()
{
	local there gone
	there=$(half_run)
	if [[ $replicates = no ]]; then
		metric tps "$(calculate "($there + $(half_run)) / 2")"
		return
	fi
	catch_up >/dev/null
	gone=$(silent_run)
	catch_up >/dev/null
	gone=$(calculate "($gone + $(silent_run)) / 2")
	measure_catch_up "$(now)"
	there=$(calculate "($there + $(half_run)) / 2")
	catch_up >/dev/null
	metric tps "$there"
	metric tps_silent "$gone"
	metric gone_to_there "$(calculate "$gone / $there")"
	compare kv
}

# The target's checkpoint is made before it falls silent.
silent_run()
{
	local tps
	on_both 'CHECKPOINT'
	signal_target STOP
	tps=$(write_load 4 "$update_one" -T "$(((BENCH_SECONDS + 1) / 2))")
	signal_target CONT
	echo "$tps"
}
