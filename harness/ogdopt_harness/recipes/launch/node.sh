#!/usr/bin/env bash
# One machine, all of its GPUs; when a process dies, all start again from the last checkpoint, up to three times.
#     bash "$(ogdopt recipes node.sh)" --config RECIPE [--section.option value ...]
# On CPUs: PROCESSES=2 bash "$(ogdopt recipes node.sh)" --device cpu ...
# On SIGTERM the processes save and end with 0; they have GRACE seconds, and the launcher itself ends with 1.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-110}"
exec torchrun --nproc-per-node "${PROCESSES:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint localhost:0 -m ogdopt_harness run "$@"
