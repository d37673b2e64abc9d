#!/bin/sh
# Run a command in its own network and process namespaces, isolated from any other Ray on this machine: two interfere
# with each other's State API, job agents and Ray Train. Needs Linux and root with the right to create namespaces.
# The shell remains the namespace's first process, to reap orphaned processes.
exec unshare -n -m -p -f --kill-child --mount-proc sh -c 'ip link set lo up && "$@"; exit $?' apart "$@"
