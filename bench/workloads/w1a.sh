# shellcheck shell=bash
#
# w1a: one row a transaction, four clients, synchronous_commit on

workload_title()
{
	echo 'single-row UPDATE by random key, 4 clients'
}

workload_run()
{
	local tps
	tps=$(write_load 4 "$update_one")
	metric tps "$tps"
	measure_catch_up "$(now)"
	compare kv
}
