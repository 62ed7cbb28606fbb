# shellcheck shell=bash disable=SC2034 # Used by step.
#
# mmrepl-sync-applied: synchronous pairs whose commit does not wait for the other server's flush

source "$bench/systems/mmrepl.sh"
stage=mmrepl

system_session()
{
	echo '-c mmrepl.mode=sync -c mmrepl.sync_commit=applied'
}
