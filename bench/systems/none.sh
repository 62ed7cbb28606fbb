# shellcheck shell=bash disable=SC2034 # Used by step.
#
# none: no replication; what the others are compared with

replicates=no
