#!/usr/bin/env bash
# SLURM, two machines of eight GPUs, from an environment in which `ogdopt` is installed.
#     sbatch "$(ogdopt recipes slurm.sh)" --config RECIPE [--section.option value ...]
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
nodes="$(python -m ogdopt_harness recipes nodes.sh)" # SLURM runs a copy of this file, which has no neighbours
srun --kill-on-bad-exit=1 bash "$nodes" "$@"
