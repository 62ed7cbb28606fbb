# shellcheck shell=bash disable=SC2034 # Used by w1a.sh.
#
# w1c: ten rows a transaction, in one statement

source "$bench/workloads/w1a.sh"
update_one=$(update_rows 10)

workload_title()
{
	echo 'one UPDATE of 10 rows a transaction, 4 clients'
}
