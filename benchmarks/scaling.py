"""How a training step scales with the number of processes, and how much of it they wait for each other.

    python -m benchmarks.scaling --ranks 1,2,4 --steps 7

OGD steps of the harness's own loop (FSDP2, gloo, one thread a process) on a small Mistral. Strong: a batch of so many pairs in
all, whatever the number of processes; weak: so many pairs for each. Seconds are the median over steps of the slowest process,
CPU seconds those of all together. "Waiting" is the share of a step in which a process stands still in a collective, for its
bytes or for the others: the median over steps of the mean over processes. More processes than cores take turns, so their time
says what the loop costs and not what it gains. Results go to benchmarks/results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from benchmarks import common
from ogdopt_harness.common.ranks import Ranks, join, leave
from ogdopt_harness.config.schema import DataConfig, ModelConfig, StageConfig
from ogdopt_harness.data.examples import Example, Preferences
from ogdopt_harness.modeling.broadcast import outlined
from ogdopt_harness.modeling.build import architecture
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.progress import Signals, Speed
from ogdopt_harness.training.trainer import Trainer

PAIRS = 16
PROMPT, ANSWER = (16, 64), (32, 96)  # tokens, from and to
SHAPE = {
    "model_type": "mistral",
    "vocab_size": 2000,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def pairs(n: int) -> Preferences:
    """Pairs of random tokens, with lengths that differ as those of real ones do."""
    rng = random.Random(0)
    ids = lambda bounds: [rng.randrange(10, 2000) for _ in range(rng.randint(*bounds))]  # noqa: E731
    prompts = [ids(PROMPT) for _ in range(n)]
    return Preferences(*([Example(prompt, ids(ANSWER)) for prompt in prompts] for _ in range(2)), paired=True)


def trainer(batch: int, folder: Path, ranks: Ranks) -> Trainer:
    """The loop over batches of so many pairs."""
    config = ModelConfig(None, SHAPE)
    stage = StageConfig(DataConfig(), train_batch_size=batch, per_device_train_batch_size=PAIRS, learning_rate=1e-5, seed=0)
    job = Job(folder, "scaling", "ogd", stage, pairs(4 * batch), None)

    def load() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(architecture(config))

    cpu, tokenizer = torch.device("cpu"), SimpleNamespace(pad_token_id=0)
    return Trainer(job, prepare(outlined(load, ranks), config, cpu, 0, ranks), tokenizer, cpu, False, ranks=ranks)


class Waiting:
    """Seconds that this process has stood still in collectives: what it waits for, it waits for in these calls."""

    def __init__(self) -> None:
        self.seconds, self.inside = 0.0, False
        dist.Work.wait = self._timed(dist.Work.wait)
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_gather", "broadcast"):
            setattr(dist, name, self._timed(getattr(dist, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **named: Any) -> Any:
            if self.inside:  # a collective that waits for itself
                return call(*args, **named)
            start, self.inside = time.perf_counter(), True
            try:
                return call(*args, **named)
            finally:
                self.seconds, self.inside = self.seconds + time.perf_counter() - start, False

        return timed


def rank(folder: Path, steps: int) -> None:
    """One process of a launch: both kinds of scaling, every step's figures of all processes written by the first."""
    torch.set_num_threads(1)
    waiting = Waiting()
    ranks, _ = join("cpu")
    found: dict[str, list[list[tuple[float, ...]]]] = {}
    for kind, batch in (("strong", PAIRS), ("weak", PAIRS * ranks.size)):
        made, rows, speed, signals = trainer(batch, folder, ranks), [], Speed(), Signals(ranks, [])
        for step in range(steps + 1):
            ranks.wait()
            start, cpu, before = time.perf_counter(), time.process_time(), waiting.seconds
            taken = made.step(step)
            speed.lap()
            made.line(taken, signals, speed)  # as where every step is logged
            rows.append((time.perf_counter() - start, time.process_time() - cpu, waiting.seconds - before))
        found[kind] = ranks.gather(rows[1:])  # the first one warms up
    if ranks.first:
        (folder / "found.json").write_text(json.dumps(found))
    leave(ranks)
    os._exit(0)


def measured(n: int, steps: int) -> dict[str, dict[str, float]]:
    """Figures of `n` processes, by kind of scaling."""
    with tempfile.TemporaryDirectory() as folder:
        common.launched("scaling.py", n, "--rank", folder, "--steps", str(steps), limit=240, environment=common.ALONE)
        found = json.loads((Path(folder) / "found.json").read_text())
    results = {}
    for kind, processes in found.items():
        each = list(zip(*processes))  # step by step, the processes' (seconds, CPU seconds, waiting)
        results[kind] = {
            "seconds": statistics.median(max(s for s, _, _ in step) for step in each),
            "least": min(max(s for s, _, _ in step) for step in each),
            "most": max(max(s for s, _, _ in step) for step in each),
            "cpu_seconds": statistics.median(sum(c for _, c, _ in step) for step in each),
            "waiting": statistics.median(statistics.fmean(w / s for s, _, w in step) for step in each),
        }
    return results


def main(words: list[str]) -> None:
    """Measure every number of processes and print the table."""
    parser = common.parser(__doc__, "scaling")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.rank is not None:
        rank(asked.rank, asked.steps)
    cores = len(os.sched_getaffinity(0))
    counts = [int(n) for n in asked.ranks.split(",")]
    results = {n: measured(n, asked.steps) for n in counts}
    rows = []
    for kind in ("strong", "weak"):
        first = results[counts[0]][kind]
        for n in counts:
            x, one = results[n][kind], kind == "strong"
            x["efficiency"] = first["seconds"] / x["seconds"] * (counts[0] / n if one else 1)
            over = " (over its cores)" if n > cores else ""
            spread = f"{x['least']:.2f}-{x['most']:.2f}"
            figures = [
                f"{x['seconds']:.2f}",
                spread,
                f"{x['efficiency']:.0%}",
                f"{x['cpu_seconds']:.2f}",
                f"{x['waiting']:.0%}",
            ]
            rows.append([f"{kind}, {n}{over}", str(PAIRS if one else PAIRS * n), *figures])
    columns = ["scaling, processes", "pairs a step", "seconds a step", "range", "efficiency", "CPU seconds", "waiting"]
    caveat = f"gloo over the loopback of one machine with {cores} cores, one thread a process; no figure of a network or a GPU"
    common.show(f"OGD steps of the harness over processes; {caveat}", columns, rows)
    common.record(asked.output, results, caveat=caveat)


if __name__ == "__main__":
    common.start(main, common.ALONE)
