#!/usr/bin/env bash
# One task for each GPU of a SLURM job; JAX finds the others by itself.
#
#     sbatch --nodes=2 --gpus-per-node=8 experiments/launch/slurm.sh python -m sol_jax.train --config ... --workdir /shared/runs/fl
#
# The workdir must be on storage that all nodes share.  SLURM sends SIGTERM two minutes before the time is over: all
# tasks save the same update and end, and the job goes back into the queue, where it goes on.
#SBATCH --job-name=sol_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [[ $# -eq 0 ]]; then
  echo "error: give the command to run, such as python -m sol_jax.train --config ... --workdir ..." >&2
  exit 2
fi

attempts=${ATTEMPTS:-20}
for ((attempt = 1; attempt <= attempts; attempt++)); do
  # Without --kill-on-bad-exit a task that died would leave the others waiting for its heartbeat.
  srun --kill-on-bad-exit=1 "$@" --distributed=on
  status=$?
  if [[ $status -eq 0 || $status -eq 2 ]]; then
    exit "$status"
  fi
  echo "attempt $attempt of $attempts ended with status $status" >&2
  [[ $attempt -lt $attempts ]] && sleep "${PAUSE:-10}"
done
exit 1
