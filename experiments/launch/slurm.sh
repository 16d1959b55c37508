#!/usr/bin/env bash
# One task for each GPU of a SLURM job; JAX finds the others by itself.
#
#     sbatch --nodes=2 experiments/launch/slurm.sh python -m sol_jax.train --config ... --workdir /shared/runs/fl
#
# The workdir must be on storage that all nodes share. Nodes with other than eight GPUs need --gpus-per-node=N and
# --ntasks-per-node=N. SLURM tells this script two minutes before the time is over: all tasks save the same update and
# end, and the job goes back into the queue, where it goes on.
#SBATCH --job-name=sol_jax
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [[ $# -eq 0 ]]; then
  echo "error: give the command to run, such as python -m sol_jax.train --config ... --workdir ..." >&2
  exit 2
fi

attempts=${ATTEMPTS:-20}
stopping=0
# Not SIGTERM, which comes with scancel too: a job that is cancelled is not to be queued again.
trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

for ((attempt = 1; attempt <= attempts; attempt++)); do
  # Each task must see all GPUs of its node, of which JAX takes that of its number: SLURM would bind it to one.
  # Without --kill-on-bad-exit a task that died would leave the others waiting for its heartbeat.
  srun --gpu-bind=none --kill-on-bad-exit=1 "$@" --distributed=on &
  wait "$!"
  status=$?
  # A trapped signal interrupts the wait; the second has the status of the tasks.
  if [[ $stopping -eq 1 ]]; then
    wait "$!"
    status=$?
    [[ $status -eq 0 ]] && exec scontrol requeue "$SLURM_JOB_ID"
  fi
  if [[ $status -eq 0 || $status -eq 2 || $stopping -eq 1 ]]; then
    exit "$status"
  fi
  echo "attempt $attempt of $attempts ended with status $status" >&2
  [[ $attempt -lt $attempts ]] && sleep "${PAUSE:-10}"
done
exit 1
