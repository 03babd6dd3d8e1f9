"""Projection alone, and with clipping and the base's step behind it, against the memory traffic that it cannot do without.

    python -m benchmarks.projection --size 20M --rounds 9
    python -m benchmarks.projection --size 100M --rounds 5

Both gradients are given. The unit of the first table is one inner product and one addition over flat buffers of the same bytes:
five passes, which read both gradients twice and write one. `ogdopt` is a step of `ProjectedGradient` around a base that does
nothing; TorchJD and PCGrad are given the gradients of L_w and -L_l where their own backward functions leave them (PCGrad
projects twice, and its update is another). *Left* is the cosine of the result with the loser's gradient, in float64; *memory*
what the call needs over what was held before, in gradients, measured in a process of its own.

In the second table the bound also reads and writes the parameters and the optimizer's state once: 8 passes for RMSprop, 10 for
Adam and AdamW, 6 for SGD. Against it: torch's own way (foreach projection, clip_grad_norm_, foreach and, where torch has one,
fused step), projection, clipping and step written as one loop and compiled by torch.compile, this library around torch's
steps, and its `fused=True`. Clipping is active throughout.
Results go to benchmarks/results/projection_SIZE.json, or projection_cuda_SIZE.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common, peers
from benchmarks.common import Timed
from benchmarks.peers import Gradients, Way
from ogdopt import ProjectedGradient

BASES = ("RMSprop", "Adam", "AdamW", "SGD")
PASSES = {"RMSprop": (2, 0, 0), "Adam": (2, 1, 0), "AdamW": (2, 1, 0), "SGD": (1, 0, 1)}
"""Additions, scalings and squared norms over flat buffers that read and write as much as mixture and step together."""
LR = 1e-6


def alone(given: Gradients, rounds: int, device: str) -> dict[str, Any]:
    """Times and angles of every way to project."""
    found = peers.ways(given)
    there = {name: way.timed for name, way in found.items() if isinstance(way, Way)}
    bound = peers.bound(given)
    measured = common.interleaved(bound, {"bound": bound} | there, rounds, common.clock_of(device))
    results: dict[str, Any] = {"bound": measured["bound"]}
    for name, way in found.items():
        results[name] = way if isinstance(way, str) else measured[name]
        if isinstance(way, Way) and way.ogd:
            way.timed.seconds(common.clock_of(device))
            results[name]["left"] = common.cosine([p.grad for p in given.params], given.l)
    given.restore()
    return results


def memory(given: Gradients, device: str) -> dict[str, float]:
    """What each call needs over what was held before it, in gradients."""
    found = {}
    for name, way in peers.ways(given).items():
        if isinstance(way, Way):
            for _ in range(2):  # the first one warms up
                way.timed.before()
                found[name] = common.added(way.timed.run, device) / given.bytes
                way.timed.after()
    return found


# ---- with the base's step ----------------------------------------------------------------------------------------------


def floor(name: str, flat: dict[str, torch.Tensor]) -> Callable[[], None]:
    """As many passes over as many bytes as projection, clipping and a step of this base have to make."""
    w, l, p, v = flat["w"], flat["l"], flat["p"], flat["v"]
    additions, scalings, norms = PASSES[name]

    def run() -> None:
        torch.dot(w, l)
        for x, y in ((p, w), (v, l))[:additions]:
            x.add_(y, alpha=-1e-9)
        for x in (l,)[:scalings]:
            x.mul_(1.0)
        for x in (v,)[:norms]:
            torch.dot(x, x)

    return run


def steps(name: str, given: Gradients, device: str) -> dict[str, Timed | str]:
    """Every way to project, clip and step with one base, or why it is not here."""
    half = 0.5 * given.kept.norm().item()
    kind = getattr(torch.optim, name)
    fuses = name != "RMSprop"  # torch's RMSprop has no fused step

    def base(**how: bool) -> torch.optim.Optimizer:
        return kind(given.params, lr=LR, **how)

    def plain(**how: bool) -> Timed:
        made = base(**how)

        def run() -> None:
            peers.clipped(given, half)
            made.step()

        return Timed(run, given.restore, given.restore)

    def bare(**how: bool) -> Timed:
        made = base(**how)

        def before() -> None:
            given.restore()
            for p, w in zip(given.params, given.w):
                p.grad = w

        return Timed(made.step, before, given.restore)

    def ours(more: dict[str, bool], **how: bool) -> Timed:
        options: dict[str, Any] = dict(more)
        opt = ProjectedGradient(base(**how), max_norm=half, **options)

        def before() -> None:
            given.restore()
            peers.hand_over(opt, given)

        return Timed(opt.step, before, given.restore)

    found: dict[str, Timed | str] = {
        f"torch's {name} alone, foreach": bare(foreach=True),
        "foreach projection, clip_grad_norm_, foreach step": plain(foreach=True),
    }
    if fuses:
        found["foreach projection, clip_grad_norm_, torch's fused step"] = plain(fused=True)
    found["one loop under torch.compile"] = peers.compiled(given, name, half, LR)
    found["ogdopt, step tensor by tensor"] = ours({}, foreach=False)
    if fuses:
        found["ogdopt, torch's fused step"] = ours({}, fused=True)
    found["ogdopt, fused=True"] = common.unfused(device) or ours({"fused": True}, foreach=False)
    return found


def together(given: Gradients, name: str, rounds: int, device: str) -> dict[str, Any]:
    """Times of projection, clipping and step in one."""
    flat = given.flat | {"v": torch.zeros_like(given.kept)}
    bound = Timed(floor(name, flat), given.restore, given.restore)
    found = steps(name, given, device)
    there = {label: way for label, way in found.items() if isinstance(way, Timed)}
    measured = common.interleaved(bound, {"bound": bound} | there, rounds, common.clock_of(device))
    return {"bound": measured["bound"]} | {label: measured.get(label, way) for label, way in found.items()}


# ---- the command -------------------------------------------------------------------------------------------------------


def main(words: list[str]) -> None:
    """Measure, print both tables."""
    parser = common.parser(__doc__, "projection_SIZE")
    parser.add_argument("--size", choices=common.SIZES, default="20M")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bases", nargs="*", choices=BASES, default=list(BASES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--memory", action="store_true", help="memory of each call alone, in this process; prints JSON")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    given = Gradients(asked.size, asked.device)
    if asked.memory:
        print(json.dumps(memory(given, asked.device)))
        return
    results: dict[str, Any] = {"parameters": given.kept.numel(), "alone": alone(given, asked.rounds, asked.device)}
    one = ("--memory", "--size", asked.size, "--device", asked.device)
    needs = json.loads(common.child("projection.py", *one, environment=common.MEMORY).splitlines()[-1])
    for name, needed in needs.items():
        results["alone"][name]["memory"] = needed
    report_alone(results["alone"], asked.size)
    for name in asked.bases:
        results[name] = together(given, name, asked.rounds, asked.device)
        report_together(name, results[name], asked.size)
    path = asked.output.name.replace("SIZE", asked.size if asked.device == "cpu" else f"cuda_{asked.size}")
    common.record(asked.output.with_name(path), results)


def report_alone(results: dict[str, Any], size: str) -> None:
    """The first table."""
    rows = []
    for name, found in results.items():
        if isinstance(found, str):
            rows.append([name, found, "–", "–", "–"])
            continue
        left, needed = found.get("left"), found.get("memory")
        more = ["–" if left is None else f"{left:.1e}", "–" if needed is None else f"{needed:.2f}"]
        rows.append([name, common.times(found), f"{1e3 * found['seconds']:.1f} ms", *more])
    common.show(f"{size}: projection, both gradients given", ["", "to the bound", "time", "cos(u, g_l) left", "memory"], rows)


def report_together(name: str, results: dict[str, Any], size: str) -> None:
    """The second table, of one base."""
    rows = [
        [label, found, "–"] if isinstance(found, str) else [label, common.times(found), f"{1e3 * found['seconds']:.1f} ms"]
        for label, found in results.items()
    ]
    common.show(f"{size}: projection, clipping and a step of {name}", ["", "to the bound", "time"], rows)


if __name__ == "__main__":
    common.start(main, common.MEMORY if "--memory" in sys.argv else common.TIMING)
