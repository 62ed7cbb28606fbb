# shellcheck shell=bash
#
# w2: one large INSERT ... SELECT into an empty table

workload_title()
{
	echo "INSERT ... SELECT of $BENCH_ROWS rows in one statement"
}

workload_run()
{
	local insert='INSERT INTO kv_bulk SELECT * FROM kv' source target start
	query a 'TRUNCATE kv_bulk'
	catch_up >/dev/null
	on_both 'CHECKPOINT'
	if [[ $replicates = yes ]]; then
		read -r source target _ < <(catch_up --do "$insert")
		metric source_s "$source"
		metric target_s "$target"
	else
		start=$(now)
		query a "$insert"
		metric source_s "$(calculate "$(now) - $start")"
	fi
	metric rows "$BENCH_ROWS"
	compare kv_bulk
}
