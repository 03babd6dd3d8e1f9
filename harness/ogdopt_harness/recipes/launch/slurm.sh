#!/usr/bin/env bash
# SLURM, from the repository's root: sbatch harness/ogdopt_harness/recipes/launch/slurm.sh --config RECIPE [--section.option value ...]
# Two minutes before the time is up the processes get SIGTERM, save and end; the same command goes on from there.
#SBATCH --job-name=ogdopt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
export HEAD NODES="$SLURM_NNODES" RUN="$SLURM_JOB_ID"
read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
srun --kill-on-bad-exit=1 harness/ogdopt_harness/recipes/launch/nodes.sh "$@"
