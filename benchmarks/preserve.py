"""What it costs to preserve something: CPU time and peak memory of a step with a kept gradient, over one with two sides.

    python -m benchmarks.preserve --size 5M --rounds 3

A small Mistral, RMSprop, clipping. Winner, loser and what is kept are of the same size. The kept gradient is computed in every
step, every fourth or every sixteenth; in between a running mean of it stands for it. Each way takes `--cycle` steps right after
as many two-sided ones, and the median of these paired ratios counts. Memory is the peak that a step adds to what was resident,
in units of one gradient, each way in a process of its own. Results go to benchmarks/results/preserve_SIZE.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Timed
from ogdopt import ProjectedGradient
from ogdopt.memory import Remembered

MAX_NORM, LR = 1.0, 1e-6
WAYS: dict[str, tuple[int | None, Any, Any]] = {
    "winner and loser": (None, None, None),
    "kept, every step": (1, None, None),
    "kept, every step, int8": (1, "int8", None),
    "kept, every 4th step, mean in int8": (4, "int8", "int8"),
    "kept, every 16th step, mean in int8": (16, "int8", "int8"),
}
"""How often the kept gradient is computed, how gradients wait, and how its mean does."""


def stepper(model: Any, sides: tuple[Any, Any, Any], every: int | None, set_aside: Any, form: Any) -> Callable[[], Any]:
    """One step after another, the kept gradient in every so-manieth."""
    winner, loser, kept = sides
    memory = {"kept": Remembered(0.9, form)} if every is not None and every > 1 else {}
    base = torch.optim.RMSprop(model.parameters(), lr=LR, foreach=False)
    opt = ProjectedGradient(base, max_norm=MAX_NORM, set_aside=set_aside, remember=memory)
    done = 0

    def run() -> None:
        nonlocal done
        asked = {"kept": kept} if every is not None and done % every == 0 else None
        opt.step(winner, loser, preserve=asked)
        done += 1

    return run


def world(size: str, sequences: int, tokens: int) -> tuple[Any, tuple[Any, Any, Any]]:
    """A model, and closures of a winner, a loser and something kept."""
    model = common.mistral(size)
    winner, loser = common.sides(model, sequences, tokens)
    kept, _ = common.sides(model, sequences, tokens)
    return model, (winner, loser, kept)


def times(size: str, sequences: int, tokens: int, cycle: int, rounds: int) -> dict[str, Any]:
    """Paired ratios of `cycle` steps."""
    model, sides = world(size, sequences, tokens)

    def many(step: Callable[[], Any]) -> Timed:
        return Timed(lambda: [step() for _ in range(cycle)])

    ways = {name: many(stepper(model, sides, *options)) for name, options in WAYS.items()}
    return common.interleaved(ways["winner and loser"], ways, rounds, common.clock_of("cpu"))


def peak(name: str, size: str, sequences: int, tokens: int) -> dict[str, float]:
    """What a step adds to the resident memory, in gradients, once optimizer state and means are there."""
    model, sides = world(size, sequences, tokens)
    step = stepper(model, sides, *WAYS[name])
    for _ in range(2):
        step()
    unit = sum(p.numel() * 4 for p in model.parameters())
    return {"peak": common.added(lambda: [step() for _ in range(16)]) / unit}


def main(words: list[str]) -> None:
    """Measure and print the table."""
    parser = common.parser(__doc__, "preserve_SIZE")
    parser.add_argument("--size", choices=common.SIZES, default="5M")
    parser.add_argument("--sequences", type=int, default=4, help="of each side")
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence")
    parser.add_argument("--cycle", type=int, default=16, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="measure the memory of this one alone")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    shape = asked.size, asked.sequences, asked.tokens
    if asked.way:
        print(json.dumps(peak(asked.way, *shape)))
        return
    results = times(*shape, asked.cycle, asked.rounds)
    for name in WAYS:
        one = ["--size", asked.size, "--sequences", str(asked.sequences), "--tokens", str(asked.tokens), "--way", name]
        said = common.child("preserve.py", *one, environment=common.MEMORY)
        results[name] |= json.loads(said.splitlines()[-1])
    rows = [[name, common.times(found), f"{found['peak']:.2f}"] for name, found in results.items()]
    common.show(f"{asked.size}: a step that preserves something", ["", "to two sides", "peak in gradients"], rows)
    common.record(asked.output.with_name(asked.output.name.replace("SIZE", asked.size)), results)


if __name__ == "__main__":
    common.start(main)
