# shellcheck shell=bash
#
# slony: Slony-I, triggers that write to log tables and a daemon for each node, at its defaults

system_available()
{
	command -v slon >/dev/null && command -v slonik >/dev/null &&
		compgen -G "$("$PG_CONFIG" --pkglibdir)/slony1_funcs*.so" >/dev/null
}

system_version()
{
	slonik -v | sed 's/.* //'
}

# slonik_run: the commands of standard input, with what all of them need before.
slonik_run()
{
	{
		cat <<-SLONIK
			cluster name = bench;
			node 1 admin conninfo = '$(conninfo a bench)';
			node 2 admin conninfo = '$(conninfo b bench)';
		SLONIK
		cat
	} | slonik > "$BENCH_WORK/logs/slonik" 2>&1 || { cat "$BENCH_WORK/logs/slonik" >&2; return 1; }
}

system_attach()
{
	local table number=0
	slonik_run <<-SLONIK
		init cluster (id = 1, comment = 'a');
		store node (id = 2, comment = 'b', event node = 1);
		store path (server = 1, client = 2, conninfo = '$(conninfo a bench)');
		store path (server = 2, client = 1, conninfo = '$(conninfo b bench)');
		create set (id = 1, origin = 1, comment = 'tables');
		$(for table in $(layout_tables 1); do
			number=$((number + 1))
			echo "set add table (set id = 1, origin = 1, id = $number, fully qualified name = 'public.$table');"
		done)
	SLONIK
	start_daemons 1 2
	slonik_run <<-SLONIK
		subscribe set (id = 1, provider = 1, receiver = 2, forward = no, omit copy = yes);
	SLONIK
	wait_until b "EXISTS (SELECT FROM _bench.sl_subscribe WHERE sub_active)"
	stop_daemons 1 2
}

# start_daemons NUMBER...: 1 belongs to a, 2 to b.
start_daemons()
{
	local number nodes=(- a b)
	for number in "$@"; do
		slon -p "$BENCH_WORK/slon_$number.pid" bench "$(conninfo "${nodes[number]}" bench)" \
			> "$BENCH_WORK/logs/slon_$number" 2>&1 &
	done
}

# A daemon is two processes; the watching one passes the signal on, and goes when the other has gone.
stop_daemons()
{
	local number pid
	for number in "$@"; do
		if [[ -s $BENCH_WORK/slon_$number.pid ]]; then
			pid=$(< "$BENCH_WORK/slon_$number.pid")
			kill "$pid" 2>/dev/null || true
			while kill -0 "$pid" 2>/dev/null; do
				sleep 0.05
			done
			rm -f "$BENCH_WORK/slon_$number.pid"
		fi
	done
}

system_enter()
{
	start_daemons 1 2
}

system_leave()
{
	stop_daemons 1 2
}

# The receiver's daemon fetches the changes.
system_pause()
{
	stop_daemons 2
}

system_resume()
{
	start_daemons 2
}
