#!/usr/bin/env bash
# Several machines that share the folder of the run. Start it on each of them, with the first one's name.
#     HEAD=machine-1 NODES=2 bash "$(ogdopt recipes nodes.sh)" --config RECIPE [--section.option value ...]
# On SIGTERM the processes save and end with 0; they have GRACE seconds, and the launchers themselves end with 1.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-110}"
exec torchrun --nnodes "${NODES:-2}" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the name of the first machine}:${PORT:-29400}" --rdzv-id "${RUN:-ogdopt}" \
    -m ogdopt_harness run "$@"
