#!/usr/bin/env bash
# Run the tests that a marker expression selects: tests/streams.sh EXPRESSION [FILE ...]
# Tests that start Ray mostly wait for its processes, the rest computes: the two run in parallel, the rest with the
# niceness 15 that Ray gives its own processes (they would starve alongside others of niceness 0). FILEs are a second
# group of Ray tests, for where the system can keep two clusters apart: on one host they disturb each other.
# pytest-xdist is not used: each of its processes would start a Ray of its own, and import torch and Ray again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
select=$1 group=("${@:2}")
pytest=(.venv/bin/python -m pytest --durations=15)
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$logs"' EXIT
code=0 apart=()
tests/apart.sh true 2>/dev/null && apart=(tests/apart.sh)
[ ${#apart[@]} = 0 ] && group=()

nice -n 15 "${pytest[@]}" -m "($select) and not ray" >"$logs/rest" 2>&1 & rest=$!
if [ ${#group[@]} != 0 ]; then
  "${apart[@]}" "${pytest[@]}" -m "($select) and ray" "${group[@]}" >"$logs/group" 2>&1 & second=$!
fi
"${apart[@]}" "${pytest[@]}" -m "($select) and ray" "${group[@]/#/--ignore=}" 2>&1 | tee "$logs/ray" || code=1
if [ ${#group[@]} != 0 ]; then
  wait "$second" || code=1
  cat "$logs/group"
fi
wait "$rest" || code=1
cat "$logs/rest"
# The outcome of each process in the last lines, wherever a log is cut.
tail -qn 1 "$logs"/*
exit $code
