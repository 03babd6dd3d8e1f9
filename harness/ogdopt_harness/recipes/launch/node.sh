#!/usr/bin/env bash
# One machine, all of its GPUs; restarts everything from the last checkpoint up to three times when a process dies:
#     harness/ogdopt_harness/recipes/launch/node.sh --config RECIPE [--section.option value ...]
# On CPUs: PROCESSES=2 harness/ogdopt_harness/recipes/launch/node.sh --device cpu ...
# On SIGTERM the processes save and end with 0; they have GRACE seconds, and the launcher itself ends with 1.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-110}"
exec torchrun --nproc-per-node "${PROCESSES:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint localhost:0 -m ogdopt_harness "$@"
