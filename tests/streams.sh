#!/usr/bin/env bash
# Run the tests that a marker expression selects: tests/streams.sh EXPRESSION [FILE ...]
# Tests that start Ray mostly wait for its processes, the others compute: the two groups run in parallel, the others at
# niceness 15, as Ray's own processes have (which would starve next to niceness 0). FILEs are a second group of Ray
# tests, run in parallel where the system can isolate two clusters (apart.sh): on one host they interfere. Without FILEs
# the other tests are divided instead.
# pytest-xdist is not used: each of its processes would start its own Ray, and import torch and Ray again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
select=$1 group=("${@:2}")
pytest=(.venv/bin/python -m pytest --durations=15)
half=() # of the tests that do not start Ray, by time
[ $# = 1 ] && half=(tests/images tests/inference tests/ingest tests/network tests/security)
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$logs"' EXIT
code=0 apart=()
tests/apart.sh true 2>/dev/null && apart=(tests/apart.sh)
[ ${#apart[@]} = 0 ] && group=()

rest=()
if [ ${#half[@]} != 0 ]; then
  nice -n 15 "${pytest[@]}" -m "($select) and not ray" "${half[@]}" >"$logs/rest-half" 2>&1 & rest+=($!)
fi
nice -n 15 "${pytest[@]}" -m "($select) and not ray" "${half[@]/#/--ignore=}" >"$logs/rest" 2>&1 & rest+=($!)
if [ ${#group[@]} != 0 ]; then
  "${apart[@]}" "${pytest[@]}" -m "($select) and ray" "${group[@]}" >"$logs/group" 2>&1 & second=$!
fi
"${apart[@]}" "${pytest[@]}" -m "($select) and ray" "${group[@]/#/--ignore=}" 2>&1 | tee "$logs/ray" || code=1
if [ ${#group[@]} != 0 ]; then
  wait "$second" || code=1
  cat "$logs/group"
fi
for process in "${rest[@]}"; do
  wait "$process" || code=1
done
cat "$logs"/rest*
# Repeat the outcome of each process at the end, in case a log is truncated.
tail -qn 1 "$logs"/*
exit $code
