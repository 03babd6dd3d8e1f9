"""What a step costs where tensors are many and small (LoRA on every layer, experts): calls and not numbers.

    python -m benchmarks.many_tensors --rounds 9

The unit is `clip_grad_norm_` and the step of the same base, foreach, on the winner's gradients. What is timed of this library
is both contexts around gradients that are there already, and the step: taking, inner products, mixture, clipping and the
base's update. Each case runs right behind its unit. Results go to benchmarks/results/many_tensors.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Timed
from ogdopt import ProjectedGradient

CASES = {"10,000 x (8,)": (10_000, (8,)), "1,000 x (64, 64)": (1_000, (64, 64))}
TINY = {"20 x (8,)": (20, (8,))}
BASES = ("AdamW", "RMSprop")
WAYS: dict[str, dict[str, Any]] = {
    "ogdopt": {},
    "ogdopt, fused=True": {"fused": True},
    'ogdopt, scope="tensor"': {"scope": "tensor"},
    "ogdopt, bfloat16 set aside": {"set_aside": torch.bfloat16},
}


class Many:
    """Parameters of one shape, and two gradients."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
        self.w = [torch.randn(shape) for _ in range(count)]
        self.l = [torch.randn(shape) + w for w in self.w]

    def copies(self, gs: list[Tensor]) -> list[Tensor]:
        """Gradients as a backward pass would leave them: anybody's to change."""
        return [g.clone() for g in gs]


def unit(given: Many, base: torch.optim.Optimizer) -> Timed:
    """Clipping and the base's step on one gradient."""

    def before() -> None:
        for p, g in zip(given.params, given.copies(given.w)):
            p.grad = g

    def run() -> None:
        nn.utils.clip_grad_norm_(given.params, 1.0)
        base.step()

    return Timed(run, before, base.zero_grad)


def ours(given: Many, base: torch.optim.Optimizer, options: dict[str, Any]) -> Timed:
    """Both contexts and the step, gradients given."""
    opt = ProjectedGradient(base, max_norm=1.0, **options)
    ready: list[list[Tensor]] = []

    def before() -> None:
        ready[:] = [given.copies(given.l), given.copies(given.w)]

    def run() -> None:
        for context, gs in ((opt.loser, ready[0]), (opt.winner, ready[1])):
            with context():
                for p, g in zip(given.params, gs):
                    p.grad = g
        opt.step()

    return Timed(run, before, opt.zero_grad)


def measured(count: int, shape: tuple[int, ...], kind: str, rounds: int) -> dict[str, Any]:
    """Times of every way over those of the unit."""
    given = Many(count, shape)

    def base() -> torch.optim.Optimizer:
        return getattr(torch.optim, kind)(given.params, lr=1e-6, foreach=True)

    ways = {name: ours(given, base(), options) for name, options in WAYS.items()}
    clock: Callable[[], float] = common.clock_of("cpu")
    found = common.interleaved(unit(given, base()), ways, rounds, clock)
    return {name: entry | {"microseconds a tensor": 1e6 * entry["seconds"] / count} for name, entry in found.items()}


def report(results: dict[str, Any]) -> None:
    """One table, a row a way."""
    rows = [
        [case, kind, name, common.times(entry), f"{entry['microseconds a tensor']:.0f}"]
        for case, bases in results.items()
        for kind, entries in bases.items()
        for name, entry in entries.items()
    ]
    columns = ["", "base", "", "over clipping and step", "microseconds a tensor"]
    common.show("many small tensors: a step, both gradients given", columns, rows)


def main(words: list[str]) -> None:
    """Measure, print the table."""
    parser = common.parser(__doc__, "many_tensors")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bases", nargs="*", choices=BASES, default=list(BASES))
    parser.add_argument("--tiny", action="store_true", help="a few tensors: does it work?")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    cases = TINY if asked.tiny else CASES
    results = {
        case: {kind: measured(count, shape, kind, asked.rounds) for kind in asked.bases}
        for case, (count, shape) in cases.items()
    }
    report(results)
    common.record(asked.output, results)


if __name__ == "__main__":
    common.start(main)
