# shellcheck shell=bash disable=SC2034 # Used by measure.sh.
#
# w1b: the same without waiting for the disk: what it costs in processor time

source "$bench/workloads/w1a.sh"
session_options='-c synchronous_commit=off'

workload_title()
{
	echo 'single-row UPDATE by random key, 4 clients, synchronous_commit = off'
}
