"""The numerical tests once more, as other machines compute: `make test-portable`, or python -m tests.portable [pytest's words].

torch chooses its CPU kernels by the instruction set that ATEN_CPU_CAPABILITY names, within what the processor has. "default"
has no vectors and rounds every product before it is added. Vectors of other widths, and other numbers of threads, add up in
another order. A plan that this processor cannot follow is named and skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import limits

ROOT = Path(__file__).parent.parent
FILES = ["optimizer", "gram", "projection", "theorems", "metric", "stored", "fused", "every_base", "diagnostics", "losses"]
FILES += ["entanglement_theory", "distributed"]
RANKS = "not test_distributed or take_the_steps_of_one or every_way_of_stepping or gathered_gradients"
PLANS = [
    ("default", 1, RANKS),
    ("avx2", 3, "not test_distributed and not torch.compile"),
]
"""(instruction set, threads, which of the tests): ranks and compiled loops take minutes, and are looked at once."""


def offered(capability: str) -> str:
    """The instruction set that torch really uses when asked for this one."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=limits.PROCESS)
    return done.stdout.strip()


def run(capability: str, threads: int, which: str, words: list[str]) -> int:
    """pytest's exit code under one plan."""
    # Compiled loops are kept by torch under keys that do not name the instruction set: each needs a folder of its own.
    cache = Path(tempfile.gettempdir(), f"ogdopt-{os.getuid()}-inductor-{capability}")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "TEST_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    files = [f"tests/test_{name}.py" for name in FILES]
    return subprocess.run([sys.executable, "-m", "pytest", "-k", which, *files, *words], cwd=ROOT, env=environment).returncode


def main(words: list[str]) -> int:
    """Run all plans; 1 if one of them fails."""
    failed = False
    for capability, threads, which in PLANS:
        found, began = offered(capability), time.monotonic()
        if found.lower() != capability:
            print(f"skipped: {capability}, for which torch uses {found} on this processor", flush=True)
            continue
        print(f"{capability}, {threads} thread{'s' * (threads > 1)}: tests where {which}", flush=True)
        failed |= run(capability, threads, which, words) != 0
        print(f"{capability}: {time.monotonic() - began:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
