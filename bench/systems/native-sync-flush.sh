# shellcheck shell=bash disable=SC2034 # Used by step.
#
# native-sync-flush: the same with synchronous_commit = on at the subscriber: what is confirmed is durable there

source "$bench/systems/native-sync.sh"
subscriber_commit=on
