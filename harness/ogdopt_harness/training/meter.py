"""What training steps cost: wall-clock and CPU time, the most memory held meanwhile, how busy the accelerator was."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import TracebackType

import torch

from ogdopt_harness.common import keys

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """A context for every step: adds up what the steps in it cost, and nothing of what happens between them.

    Peak memory is what the accelerator's allocator held at most, or on a CPU what the process held resident (bytes): known only
    where Linux lets a process forget an earlier peak, and left out elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.totals = {keys.STEP_SECONDS: 0.0, keys.STEP_CPU_SECONDS: 0.0}
        self.peak = 0

    def __enter__(self) -> None:
        self.watched = self._forget()
        self._since = time.perf_counter(), time.process_time()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        wall, cpu = self._since
        self.totals[keys.STEP_SECONDS] += time.perf_counter() - wall
        self.totals[keys.STEP_CPU_SECONDS] += time.process_time() - cpu
        if self.watched:
            self.peak = max(self.peak, self._held())

    def added_to(self, before: dict[str, float]) -> dict[str, float]:
        """`before` with what has come since the last call: seconds added, and the larger peak."""
        found = {name: before.get(name, 0.0) + value for name, value in self.totals.items()}
        self.totals = dict.fromkeys(self.totals, 0.0)
        peak = max(before.get(keys.PEAK_MEMORY, 0), self.peak)
        return found | ({keys.PEAK_MEMORY: peak} if peak else {})

    def _forget(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            CLEAR.write_text("5")  # see proc(5)
        except OSError:
            return False
        return True

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])


def utilization(device: torch.device) -> dict[str, float]:
    """`gpu_utilization`, percent of the last moment in which the GPU was busy; empty without one, or without nvidia-ml-py."""
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return {}
    return {keys.GPU: float(torch.cuda.utilization(device))}
