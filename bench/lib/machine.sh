# shellcheck shell=bash
#
# machine: what the figures were measured on

# json_string TEXT
json_string()
{
	local text=${1//\\/\\\\}
	text=${text//\"/\\\"}
	echo "\"${text//$'\n'/ }\""
}

# describe_machine SYSTEM...: an object.
describe_machine()
{
	local system versions='' version
	for system in "$@"; do
		version=$(load_system "$system"; system_version)
		versions+="${versions:+, }\"$system\": $(json_string "$version")"
	done
	# shellcheck source=/dev/null
	cat <<-JSON
		{"date": "$(date -u +%Y-%m-%dT%H:%M:%SZ)",
		 "commit": $(json_string "${BENCH_COMMIT:-unknown}"),
		 "postgresql": $(json_string "$(postgres --version)"),
		 "distribution": $(json_string "$(source /etc/os-release && echo "$PRETTY_NAME")"),
		 "kernel": $(json_string "$(uname -sr)"),
		 "cpu": $(json_string "$(sed -n 's/^model name[[:space:]]*: //p; T; q' /proc/cpuinfo)"),
		 "cpus": $(nproc),
		 "memory_mb": $(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo),
		 "load_before": $(cut -d ' ' -f 1 /proc/loadavg),
		 "runs": $BENCH_RUNS, "seconds": $BENCH_SECONDS, "rows": $BENCH_ROWS,
		 "systems": {$versions}}
	JSON
}
