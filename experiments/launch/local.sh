#!/usr/bin/env bash
# Several processes on this machine, as a pod would run them: to try a command before paying for one.
#
#     experiments/launch/local.sh 2 python -m sol_jax.train --config configs/sol_j_fl.py:cpu --workdir runs/fl
#
# PORT (29500) and ATTEMPTS (20) can be set.  If one process ends without having finished, the others are ended and all
# start again; a mistake (status 2) is not tried again.  SIGTERM is passed on: all save and stop.
set -uo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "error: give the number of processes and the command, such as 2 python -m sol_jax.train --config ..." >&2
  exit 2
fi
count=$1
shift
attempts=${ATTEMPTS:-20}
children=()
stopping=0
trap 'stopping=1; kill -TERM "${children[@]}" 2>/dev/null' TERM INT

for ((attempt = 1; attempt <= attempts; attempt++)); do
  children=()
  for ((process = 0; process < count; process++)); do
    "$@" --coordinator="127.0.0.1:${PORT:-29500}" --num_processes="$count" --process_id="$process" &
    children+=($!)
  done
  worst=0
  for child in "${children[@]}"; do
    wait "$child"
    status=$?
    # A trapped signal interrupts the wait; the second has the status of the process.
    if [[ $stopping -eq 1 ]]; then
      wait "$child"
      status=$?
    fi
    # One that has failed takes the others along: they notice it themselves, but later.
    if [[ $status -ne 0 && $worst -eq 0 ]]; then
      worst=$status
      sleep 5
      kill -KILL "${children[@]}" 2>/dev/null
    fi
  done
  if [[ $worst -eq 0 || $worst -eq 2 || $stopping -eq 1 ]]; then
    exit "$worst"
  fi
  echo "attempt $attempt of $attempts ended with status $worst" >&2
  [[ $attempt -lt $attempts ]] && sleep "${PAUSE:-10}"
done
exit 1
