# shellcheck shell=bash disable=SC2034 # Used by step.
#
# two-trips-flush: the same, and the second trip waits for the target's flush

source "$bench/systems/two-trips.sh"
trips_commit=on
