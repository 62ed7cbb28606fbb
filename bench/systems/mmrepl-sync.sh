# shellcheck shell=bash disable=SC2034 # Used by step.
#
# mmrepl-sync: the same pairs, made synchronous by the writing session

source "$bench/systems/mmrepl.sh"
stage=mmrepl

system_session()
{
	echo '-c mmrepl.mode=sync'
}
