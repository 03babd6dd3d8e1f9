#!/usr/bin/env bash
# One machine, all of its GPUs; restarts everything from the last checkpoint up to three times when a process dies:
#     harness/recipes/launch/node.sh --config RECIPE [--section.option value ...]
# On CPUs: PROCESSES=2 harness/recipes/launch/node.sh --device cpu ...
set -euo pipefail
exec torchrun --nproc-per-node "${PROCESSES:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint localhost:0 harness/run.py "$@"
