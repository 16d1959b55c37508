#!/usr/bin/env bash
# A job on a GKE cluster with XPK, which starts the command on every host of every slice and again after preemptions.
#
#     experiments/launch/xpk.sh CLUSTER v5litepod-16 IMAGE python -m sol_jax.train --config ... --workdir gs://BUCKET/runs/fl
#
# SLICES (1), RESTARTS (20) and JOB (sol-jax) can be set.  IMAGE holds the code with its packages.
set -uo pipefail

if [[ $# -lt 4 ]]; then
  echo "error: give the cluster, the kind of TPU, the image and the command to run" >&2
  exit 2
fi
cluster=$1 kind=$2 image=$3
shift 3
printf -v command '%q ' "$@"
exec xpk workload create --cluster="$cluster" --tpu-type="$kind" --num-slices="${SLICES:-1}" \
  --workload="${JOB:-sol-jax}" --max-restarts="${RESTARTS:-20}" --docker-image="$image" \
  --command="$command--distributed=on"
