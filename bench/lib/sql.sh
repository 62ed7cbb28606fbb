# shellcheck shell=bash
#
# sql: talking to the two servers, a (the source) and b (the target)
#
# Needs the ports and PGUSER, PGPASSWORD in the environment; see servers.sh.

declare -A ports=([a]=${BENCH_PORT_A:-} [b]=${BENCH_PORT_B:-})

# query NODE SQL [DATABASE]: its result, bare; an error ends the step.
query()
{
	psql -XAtq -v ON_ERROR_STOP=1 -h 127.0.0.1 -p "${ports[$1]}" -d "${3:-bench}" -c "$2"
}

# wait_until NODE CONDITION [DATABASE]: asked every tenth of a second, for two minutes.
wait_until()
{
	local attempt
	for attempt in {1..1200}; do
		if [[ $(query "$1" "SELECT $2" "${3:-bench}") = t ]]; then
			return
		fi
		sleep 0.1
	done
	echo "after $((attempt / 10)) seconds this is not true at $1: $2" >&2
	return 1
}

# on_both SQL: at both servers at the same time.
on_both()
{
	local pid
	query a "$1" >/dev/null &
	pid=$!
	query b "$1" >/dev/null
	wait "$pid"
}

# conninfo NODE DATABASE: as libpq wants it.
conninfo()
{
	echo "host=127.0.0.1 port=${ports[$1]} dbname=$2 user=$PGUSER password=$PGPASSWORD"
}
