# shellcheck shell=bash
#
# servers: the throw-away servers of a run
#
# A stage is a pair of clusters, a and b, that belong to one system and one layout of tables; it is copied from a template, so
# that all systems begin with the same data.  Only one stage runs at a time, on the run's two ports: what a system does when
# it is idle does not disturb the others.
#
# In BENCH_WORK: stages/<system>-<layout>/{a,b}, templates/<layout>, logs/, and access, which is sourced for ports and password.

stage_directory()
{
	echo "$BENCH_WORK/stages/$stage-$layout"
}

# A port that nobody listens on, below those that systems give to clients.
free_port()
{
	local port
	while port=$((20000 + RANDOM % 12000)); do
		if ! (: < "/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
			echo "$port"
			return
		fi
	done
}

# Once a run.  Over TCP one needs the password; the socket's directory is closed to others.
make_access()
{
	local port_a port_b password
	port_a=$(free_port)
	port_b=$port_a
	while [[ $port_b = "$port_a" ]]; do
		port_b=$(free_port)
	done
	password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
	mkdir -p "$BENCH_WORK/logs"
	mkdir -m 700 "$BENCH_WORK/socket" "$BENCH_WORK/stages" "$BENCH_WORK/templates"
	(
		umask 077
		cat > "$BENCH_WORK/access" <<-ACCESS
			export BENCH_PORT_A=$port_a BENCH_PORT_B=$port_b PGUSER=bench PGPASSWORD=$password
		ACCESS
	)
}

# The settings of all servers; the system's own follow.
common_settings()
{
	cat <<-CONF
		listen_addresses = '127.0.0.1'
		unix_socket_directories = '$BENCH_WORK/socket'
		shared_buffers = 512MB
		max_wal_size = 4GB
		track_commit_timestamp = on
	CONF
}

# start_server NODE DIRECTORY [OPTION OF POSTGRES]
start_server()
{
	local log=$BENCH_WORK/logs/$1
	if ! pg_ctl start -s -w -t 300 -D "$2" -l "$log" -o "-p ${ports[$1]} ${3:-}" >/dev/null; then
		tail -n 20 "$log" >&2
		return 1
	fi
}

stop_server()
{
	if [[ -e $1/postmaster.pid ]]; then
		pg_ctl stop -s -w -t 300 -m fast -D "$1" || pg_ctl stop -s -w -m immediate -D "$1"
	fi
}

# The template of a layout: a cluster with the tables, filled.
make_template()
{
	local directory=$BENCH_WORK/templates/$layout
	rm -rf "$directory"
	initdb -D "$directory" -U "$PGUSER" -A password --pwfile=<(echo "$PGPASSWORD") -E UTF8 --locale=C --no-sync \
		> "$BENCH_WORK/logs/initdb" 2>&1 || { cat "$BENCH_WORK/logs/initdb" >&2; return 1; }
	common_settings >> "$directory/postgresql.conf"
	# Old WAL is not kept for reuse: it would be copied with the rest.
	start_server a "$directory" '-c wal_recycle=off'
	query a 'CREATE DATABASE bench' postgres
	layout_fill
	query a 'VACUUM (ANALYZE)'
	layout_copies
	stop_server "$directory"
	: > "$directory/made"
}

# Two copies of the template, and the system between them.
make_stage()
{
	local directory node
	directory=$(stage_directory)
	[[ -e $BENCH_WORK/templates/$layout/made ]] || make_template
	# An attempt that failed may have left something.
	rm -rf "$directory"
	mkdir -p "$directory"
	for node in a b; do
		cp -a --reflink=auto "$BENCH_WORK/templates/$layout" "$directory/$node"
		system_settings "$node" >> "$directory/$node/postgresql.conf"
	done
	start_server a "$directory/a"
	start_server b "$directory/b"
	system_attach
	: > "$directory/made"
}

# start_stage: made if need be, running, caught up, in memory, vacuumed and checkpointed.
start_stage()
{
	local directory
	directory=$(stage_directory)
	if [[ ! -e $directory/made ]]; then
		make_stage
	else
		start_server a "$directory/a"
		start_server b "$directory/b"
	fi
	system_enter
	on_both "SELECT pg_prewarm(oid) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i')"
	on_both 'VACUUM'
	catch_up >/dev/null
	on_both 'CHECKPOINT'
}

# signal_target SIGNAL: to all processes of the server b.  Stopped, it is a black hole: the system's part of TCP goes on
# accepting connections and data, and nobody answers.
signal_target()
{
	local main
	main=$(head -n 1 "$(stage_directory)/b/postmaster.pid")
	# The first one first, so that there are no new ones.
	kill -s "$1" "$main"
	pkill -"$1" -P "$main" || true
}

# Whatever state it is in.
stop_stage()
{
	local directory node
	directory=$(stage_directory)
	if [[ -e $directory/b/postmaster.pid ]]; then
		signal_target CONT || true
	fi
	system_leave || true
	for node in a b; do
		stop_server "$directory/$node" || true
	done
}
