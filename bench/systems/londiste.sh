# shellcheck shell=bash
#
# londiste: Londiste 3 on PgQ, triggers that write to a queue, a ticker, and a worker for each node, at its defaults

system_available()
{
	command -v londiste >/dev/null && command -v pgqd >/dev/null &&
		[[ -e $("$PG_CONFIG" --sharedir)/extension/londiste.control ]]
}

system_version()
{
	sed -n "s/^default_version *= *'\(.*\)'/\1/p" "$("$PG_CONFIG" --sharedir)/extension/londiste.control"
}

# londiste_run NODE COMMAND...
londiste_run()
{
	londiste "$BENCH_WORK/londiste_$1.ini" "${@:2}" > "$BENCH_WORK/logs/londiste" 2>&1 ||
		{ cat "$BENCH_WORK/logs/londiste" >&2; return 1; }
}

# The settings name ports and password, which are the run's, and hold for all layouts.
write_settings()
{
	local node
	for node in a b; do
		cat > "$BENCH_WORK/londiste_$node.ini" <<-INI
			[londiste]
			job_name = bench_$node
			db = $(conninfo "$node" bench)
			queue_name = bench
			logfile = $BENCH_WORK/logs/londiste_$node
			pidfile = $BENCH_WORK/londiste_$node.pid
		INI
	done
	cat > "$BENCH_WORK/pgqd.ini" <<-INI
		[pgqd]
		base_connstr = host=127.0.0.1 port=${ports[a]} user=$PGUSER password=$PGPASSWORD
		initial_database = postgres
		database_list = bench
		logfile = $BENCH_WORK/logs/pgqd
		pidfile = $BENCH_WORK/pgqd.pid
	INI
	chmod 600 "$BENCH_WORK"/londiste_?.ini "$BENCH_WORK/pgqd.ini"
}

system_attach()
{
	local tables
	read -ra tables < <(layout_tables 1)
	write_settings
	londiste_run a create-root a "$(conninfo a bench)"
	londiste_run b create-leaf b "$(conninfo b bench)" --provider="$(conninfo a bench)"
	system_enter
	londiste_run a add-table "${tables[@]/#/public.}"
	londiste_run b add-table --expect-sync "${tables[@]/#/public.}"
	system_leave
}

system_enter()
{
	pgqd -q -d "$BENCH_WORK/pgqd.ini" >/dev/null 2>&1
	londiste_run a worker -d
	londiste_run b worker -d
}

# stop_daemon NAME: by its file, which it removes itself.
stop_daemon()
{
	local pid
	if [[ -s $BENCH_WORK/$1.pid ]]; then
		pid=$(< "$BENCH_WORK/$1.pid")
		kill "$pid" 2>/dev/null || true
		while kill -0 "$pid" 2>/dev/null; do
			sleep 0.05
		done
		rm -f "$BENCH_WORK/$1.pid"
	fi
}

system_leave()
{
	stop_daemon londiste_b
	stop_daemon londiste_a
	stop_daemon pgqd
}

# The leaf's worker fetches the changes.
system_pause()
{
	stop_daemon londiste_b
}

system_resume()
{
	londiste_run b worker -d
}
