# shellcheck shell=bash
#
# system: what a file in systems/ may define, and what holds where it does not
#
#   replicates            yes or no
#   stage                 whose clusters are used; forms of one system may share them
#   targets_max           how many databases it can bring one table to
#   system_available      can it be measured on this machine?
#   system_version        in a few words
#   system_settings NODE  lines of postgresql.conf
#   system_attach         both servers run and have the same tables: from now on a's changes go to b.  For each target,
#                         layout_tables has the tables.  Everything that survives a restart of the servers.
#   system_enter          both servers have been started: start daemons, change settings
#   system_leave          they are going to be stopped; may be called in any state
#   system_session        options of a writing session, as in PGOPTIONS
#   system_pause, system_resume   nothing is delivered in between
#   system_connects_to    the node that its connections lead to
#   system_route PORT     let them lead to this port instead
#   trips_commit          not replication but its least cost: what is written at a is written at b afterwards, in two trips,
#                         with this synchronous_commit; for w5

# load_system NAME
load_system()
{
	system=$1
	replicates=yes
	stage=$1
	targets_max=1
	system_available() { true; }
	system_version() { true; }
	system_settings() { true; }
	system_attach() { true; }
	system_enter() { true; }
	system_leave() { true; }
	system_session() { true; }
	system_connects_to() { echo b; }
	trips_commit=
	# shellcheck source=/dev/null
	source "$bench/systems/$1.sh"
}

# systems_that_wait OURS NAME...: for workloads whose transactions wait for the other server; of the names, mmrepl stands for
# those of OURS, a list in one word, and native for both of native replication's.
systems_that_wait()
{
	local ours=$1 name
	shift
	for name in "$@"; do
		case $name in
			none | none-again) echo "$name" ;;
			mmrepl) tr -s ' \t' '\n' <<<"$ours" ;;
			native) printf '%s\n' native-sync native-sync-flush ;;
			*-sync | *-sync-* | *-async-*) echo "$name" ;;
		esac
	done
}

# load_workload NAME: a file in workloads/ defines workload_title, workload_run and, where the defaults do not hold, the layout
# and which systems can do it: workload_systems prints those that are to be measured for the ones in its arguments.
load_workload()
{
	layout=main
	workload_systems() { printf '%s\n' "$@"; }
	# shellcheck source=/dev/null
	source "$bench/workloads/$1.sh"
}

# replicating SYSTEM...: the arguments without those that do not replicate.
replicating()
{
	local name
	for name in "$@"; do
		load_system "$name"
		if [[ $replicates = yes ]]; then
			echo "$name"
		fi
	done
}
