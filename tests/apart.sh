#!/bin/sh
# Run a command with network and processes of its own, so that its Ray does not meet any other Ray of this machine:
# two disturb each other's State API, job agents and Ray Train. Needs Linux and a root that may make namespaces.
# The shell stays as the namespace's first process: it reaps processes whose parents have ended.
exec unshare -n -m -p -f --kill-child --mount-proc sh -c 'ip link set lo up && "$@"; exit $?' apart "$@"
