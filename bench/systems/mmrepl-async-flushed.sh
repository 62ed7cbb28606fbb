# shellcheck shell=bash disable=SC2034 # Used by step.
#
# mmrepl-async-flushed: asynchronous pairs, and COMMIT returns when the other server has flushed it

source "$bench/systems/mmrepl.sh"
stage=mmrepl

system_session()
{
	echo '-c mmrepl.async_commit=flushed'
}
