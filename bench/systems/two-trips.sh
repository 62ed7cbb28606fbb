# shellcheck shell=bash disable=SC2034 # Used by step.
#
# two-trips: no replication, and then the same statement at the target, in the two round trips that a peer which may refuse needs.
# Between two servers nothing that asks first can be faster than their sum.

replicates=no
stage=none
trips_commit=off
