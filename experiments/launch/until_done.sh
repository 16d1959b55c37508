#!/usr/bin/env bash
# Starts a training again until it is done: for machines that are taken away and given back.
#
#     experiments/launch/until_done.sh python -m sol_jax.train --config configs/sol_j_fl.py:cpu --workdir runs/fl
#
# A run that was killed goes on where its last checkpoint was; one that SIGTERM stopped has saved its last update. A
# mistake in the command or its files (status 2) is not tried again. ATTEMPTS (20) and PAUSE (10 seconds) can be set.
set -uo pipefail

if [[ $# -eq 0 ]]; then
  echo "error: give the command to run, such as python -m sol_jax.train --config ... --workdir ..." >&2
  exit 2
fi

attempts=${ATTEMPTS:-20}
stopping=0
child=0
# SIGTERM to this script is for the run; nothing is started after it.
trap 'stopping=1; [[ $child -ne 0 ]] && kill -TERM "$child" 2>/dev/null' TERM INT

for ((attempt = 1; attempt <= attempts; attempt++)); do
  "$@" &
  child=$!
  wait "$child"
  status=$?
  # A trapped signal interrupts the first wait; the second has the status of the run.
  if [[ $stopping -eq 1 ]]; then
    wait "$child"
    exit $?
  fi
  if [[ $status -eq 0 || $status -eq 2 ]]; then
    exit "$status"
  fi
  echo "attempt $attempt of $attempts ended with status $status" >&2
  [[ $attempt -lt $attempts ]] && sleep "${PAUSE:-10}"
done
exit 1
