# shellcheck shell=bash
#
# measure: what workloads are written with
#
# A workload calls metric for each of its figures; step writes them down as one line of runs.jsonl.

metrics=()

# metric NAME VALUE: a number, or true or false.
metric()
{
	metrics+=("\"$1\": $2")
	printf '    %-22s %s\n' "$1" "$2"
}

now()
{
	echo "$EPOCHREALTIME"
}

# calculate EXPRESSION: with fractions.
calculate()
{
	awk "BEGIN { printf \"%.6g\", $1 }" </dev/null
}

# write_load CLIENTS SCRIPT [PGBENCH OPTION...]: run the script with pgbench at the source; prints transactions a second.  The
# length is BENCH_SECONDS unless the options say otherwise.  Settings of the session are taken from session_options; load_node
# may name the target instead.
write_load()
{
	local clients=$1 script=$2 log=$BENCH_WORK/logs/pgbench rate length=(-T "$BENCH_SECONDS")
	shift 2
	case " $* " in
		*" -t "* | *" -T "*) length=() ;;
	esac
	printf '%s\n' "$script" > "$BENCH_WORK/script"
	PGOPTIONS="${session_options:-} $(system_session)" pgbench -h 127.0.0.1 -p "${ports[${load_node:-a}]}" -n -M prepared \
		-c "$clients" -j "$((clients < 2 ? 1 : 2))" "${length[@]}" "$@" -D rows="$BENCH_ROWS" -f "$BENCH_WORK/script" bench \
		> "$log" 2>&1 || { cat "$log" >&2; return 1; }
	rate=$(sed -nE 's/^tps = ([0-9.]+) .*/\1/p' "$log")
	if [[ -z $rate ]] || ! grep -q '^number of failed transactions: 0 ' "$log"; then
		cat "$log" >&2
		return 1
	fi
	echo "$rate"
}

# The statement of most workloads: one row, by its key.
update_one='\set id random(1, :rows)
UPDATE kv SET n = n + 1, mod_time = clock_timestamp() WHERE id = :id;'

# update_rows N: one statement, N rows whose keys follow each other.  Ranges that overlap are equal: no deadlocks.
update_rows()
{
	cat <<-SQL
		\\set first random(0, :rows / $1 - 1) * $1 + 1
		UPDATE kv SET n = n + 1, mod_time = clock_timestamp() WHERE id BETWEEN :first AND :first + $1 - 1;
	SQL
}

# catch_up [CATCH-UP OPTION...]: see lib/catch-up; a system that does not replicate has nothing to wait for.
catch_up()
{
	local number targets=()
	if [[ $replicates = no ]]; then
		return
	fi
	for ((number = 1; number <= $(layout_targets); number++)); do
		targets+=("${ports[b]}:$(target_database "$number")")
	done
	"$BENCH_WORK/bench/lib/catch-up" "$@" "${ports[a]}" "${targets[@]}"
}

# measure_catch_up SINCE: how long after that moment the target had everything.
measure_catch_up()
{
	local there
	if [[ $replicates = yes ]]; then
		read -r _ there _ < <(catch_up --since "$1") || return 1
		metric catchup_s "$there"
	fi
}

# digest NODE TABLE [DATABASE]: equal for equal contents.
digest()
{
	query "$1" "SELECT count(*), bit_xor(hash_record_extended(t, 0)) FROM $2 t" "${3:-bench}"
}

# compare TABLE...: at the source and at each target that has it.  If they differ, the run is void.
compare()
{
	local table number database there here equal=true
	if [[ $replicates = no ]]; then
		return
	fi
	for table in "$@"; do
		digest a "$table" > "$BENCH_WORK/digest" &
		here=$!
		for ((number = 1; number <= $(layout_targets); number++)); do
			if [[ " $(layout_tables "$number") " = *" $table "* ]]; then
				database=$(target_database "$number")
				there=$(digest b "$table" "$database")
				wait "$here"
				if [[ $there != "$(< "$BENCH_WORK/digest")" ]]; then
					echo "VOID: $table differs: $(< "$BENCH_WORK/digest") at the source, $there in $database" >&2
					equal=false
				fi
			fi
		done
	done
	metric equal "$equal"
}

# wal_position: of the source, in bytes.
wal_position()
{
	query a "SELECT pg_current_wal_insert_lsn() - '0/0'"
}

# drain TRANSACTIONS SCRIPT CLIENTS: let that many transactions queue up while nothing is delivered, then measure how long it
# takes until they are all at the target.  Sets load_time and drain_time, in seconds.
drain()
{
	local transactions=$1 script=$2 clients=$3 start session_options='-c synchronous_commit=off'
	system_pause
	start=$(now)
	write_load "$clients" "$script" -t "$((transactions / clients))" >/dev/null
	load_time=$(calculate "$(now) - $start")
	on_both 'CHECKPOINT'
	start=$(now)
	system_resume
	read -r _ drain_time _ < <(catch_up --since "$start")
}

# measure_drain ROWS TRANSACTIONS SCRIPT CLIENTS: the same as figures; each transaction has ROWS rows.
measure_drain()
{
	drain "${@:2}"
	metric load_s "$load_time"
	metric drain_s "$drain_time"
	metric tx_per_s "$(calculate "$2 / $drain_time")"
	metric rows_per_s "$(calculate "$1 * $2 / $drain_time")"
}
