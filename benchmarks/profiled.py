"""Where the time of a step goes: torch.profiler over steps of a miniature and of a 100M model.

    python -m benchmarks.profiled --sizes miniature 100M

A step of ProjectedGradient around RMSprop with clipping, on one thread, the third of three. First the parts that the profiler's
marks enclose: both forward passes, both backward passes, and the optimizer's step, the base's own apart where it has one. Then
the operators that took most time themselves. With `--trace FOLDER` the whole is written there for a viewer (chrome://tracing).
Results go to benchmarks/results/profile.json.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import common
from ogdopt import ProjectedGradient

SHAPES = {"tiny": (1, 16), "miniature": (32, 48), "20M": (4, 128), "100M": (4, 128)}
"""Sequences and tokens a side."""
FORWARD, BACKWARD, STEP = "forward", "backward", "optimizer"


def steps(size: str, fused: bool) -> Callable[[], Any]:
    """A step whose parts are marked."""
    model = common.mistral(size)
    winner, loser = common.sides(model, *SHAPES[size])
    base = torch.optim.RMSprop(model.parameters(), lr=1e-6, foreach=False)
    options: dict[str, Any] = {"fused": True} if fused else {}
    opt = ProjectedGradient(base, max_norm=1.0, **options)

    def side(loss: Callable[[], Any]) -> None:
        with record_function(FORWARD):
            value = loss()
        with record_function(BACKWARD):
            value.backward()

    def run() -> None:
        with opt.loser():
            side(loser)
        with opt.winner():
            side(winner)
        with record_function(STEP):
            opt.step()

    return run


def measure(size: str, rows: int, fused: bool, trace: Path | None) -> dict[str, Any]:
    """Microseconds of parts and of the operators that took most."""
    run = steps(size, fused)
    for _ in range(common.WARM):
        run()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    if trace is not None:
        trace.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(trace / f"{size}.json"))
    events = {e.key: e for e in seen.key_averages()}
    base = sum(e.cpu_time_total for key, e in events.items() if key.startswith("Optimizer.step#RMSprop"))
    parts = {name: events[name].cpu_time_total for name in (FORWARD, BACKWARD, STEP)}
    if base:  # which a fused step does not call
        del parts[STEP]
        parts |= {"projection and clipping": events[STEP].cpu_time_total - base, "base step": base}
    marks = {FORWARD, BACKWARD, STEP} | {key for key in events if key.startswith("Optimizer.")}
    own = sorted((e for key, e in events.items() if key not in marks), key=lambda e: -e.self_cpu_time_total)[:rows]
    return {
        "parts": {name: time / 1e6 for name, time in parts.items()},
        "operators": {e.key: {"seconds": e.self_cpu_time_total / 1e6, "calls": e.count} for e in own},
        "all operators": sum(e.self_cpu_time_total for e in events.values()) / 1e6,
    }


def main(words: list[str]) -> None:
    """Profile and print the tables."""
    parser = common.parser(__doc__, "profile")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["miniature", "100M"])
    parser.add_argument("--rows", type=int, default=12, help="operators shown")
    parser.add_argument("--fused", action="store_true", help="with ProjectedGradient(fused=True)")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="also write the trace of each size there")
    asked = parser.parse_args(words)
    if asked.fused and (why := common.unfused()):
        parser.error(f"--fused would not be fused: {why}")
    torch.set_num_threads(1)
    results = {}
    for size in asked.sizes:
        results[size] = found = measure(size, asked.rows, asked.fused, asked.trace)
        whole = sum(found["parts"].values())
        table = [[name, f"{1e3 * t:,.1f} ms", f"{t / whole:.1%}", ""] for name, t in found["parts"].items()]
        table += [["", "", "", ""]]
        for name, row in found["operators"].items():
            table.append([name, f"{1e3 * row['seconds']:,.1f} ms", f"{row['seconds'] / whole:.1%}", f"{row['calls']:,}"])
        sequences, tokens = SHAPES[size]
        common.show(f"{size}: a step on {sequences} x {tokens} tokens a side", ["", "time", "share", "calls"], table)
    common.record(asked.output, results)


if __name__ == "__main__":
    common.start(main)
