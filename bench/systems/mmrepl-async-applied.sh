# shellcheck shell=bash disable=SC2034 # Used by step.
#
# mmrepl-async-applied: asynchronous pairs, and COMMIT returns when the other server has applied it

source "$bench/systems/mmrepl.sh"
stage=mmrepl

system_session()
{
	echo '-c mmrepl.async_commit=applied'
}
