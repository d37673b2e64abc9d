#!/bin/sh
# Runs a command with a network and processes of its own, so that a Ray in it and any other of this machine do not meet:
# two disturb each other's State API, job agents and Ray Train. Needs Linux and a root that may make namespaces.
# The shell stays, as the first process of its kind: it takes leave of processes whose parents have ended.
exec unshare -n -m -p -f --kill-child --mount-proc sh -c 'ip link set lo up && "$@"; exit $?' apart "$@"
