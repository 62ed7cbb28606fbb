# shellcheck shell=bash disable=SC2034 # Used by step.
#
# mmrepl-sync-applied-commit: the same, and changes are sent at once and answered for at the commit

source "$bench/systems/mmrepl.sh"
stage=mmrepl

system_session()
{
	echo '-c mmrepl.mode=sync -c mmrepl.sync_commit=applied -c mmrepl.sync_flush=commit'
}
