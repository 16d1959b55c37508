#!/usr/bin/env bash
# Runs a command on every host of a Cloud TPU slice, again until it is done.
#
#     experiments/launch/tpu_vm.sh NAME ZONE python -m sol_jax.train --config ... --workdir gs://BUCKET/runs/fl
#
# The slice must have the code and an environment in ~/sol_jax (docs/pods.md).  PROJECT can be set.  A slice that was taken
# away makes ssh fail; make it anew and start this again: the run goes on where its last checkpoint was.
set -uo pipefail

if [[ $# -lt 3 ]]; then
  echo "error: give the slice's name, its zone and the command to run" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
printf -v command '%q ' "$@"

attempts=${ATTEMPTS:-20}
for ((attempt = 1; attempt <= attempts; attempt++)); do
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" ${PROJECT:+--project="$PROJECT"} --worker=all \
    --command="cd ~/sol_jax && source .venv/bin/activate && $command--distributed=on"
  status=$?
  if [[ $status -eq 0 || $status -eq 2 ]]; then
    exit "$status"
  fi
  echo "attempt $attempt of $attempts ended with status $status" >&2
  [[ $attempt -lt $attempts ]] && sleep "${PAUSE:-10}"
done
exit 1
