# shellcheck shell=bash
#
# w6: pgbench's TPC-B, four tables

workload_title()
{
	echo 'pgbench TPC-B, scale 10, 4 clients, four tables'
}

workload_run()
{
	local tps
	tps=$(write_load 4 "$(pgbench --show-script=tpcb-like 2>&1 | sed '/^--/d')" -s 10)
	metric tps "$tps"
	measure_catch_up "$(now)"
	compare pgbench_accounts pgbench_branches pgbench_tellers pgbench_history
}
