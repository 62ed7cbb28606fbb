# shellcheck shell=bash disable=SC2034 # Used by step.
#
# none-again: the same once more, in clusters of its own: how far equal things differ here

replicates=no
