"""How the parts of a step grow: with parameters, sequence length, micro-batches and ranks; and where each of them dominates.

    python -m benchmarks.growth

Parts: forward and backward of winners and losers; the inner products (Gram); the mixture; the base's step (RMSprop). CPU time
of one thread, the median of some rounds, float32. With 1, 2 and 4 ranks the model is shared by FSDP2 over gloo and a batch of
four sequences a side dealt out; *collectives* are FSDP2's gathers and reductions, *own all-reduce* is the one message of this
library. These two are wall-clock, waiting for others included, and so say as much about the cores as about the ranks; the other
parts are a rank's CPU time, in which forward and backward hold the copying that sharding needs.

An exponent is the slope of log time against log size. Results go to benchmarks/results/growth.json, the figure beside it.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import common
from benchmarks.peers import Gradients
from ogdopt import ProjectedGradient
from ogdopt.gram import gram
from ogdopt.passes import mix_
from ogdopt.projection import orthogonal

PARTS = ("forward and backward", "Gram", "mixture", "base step")
COLLECTIVES = ("collectives", "own all-reduce")
AXES = {
    "parameters": "parameters",
    "tokens": "tokens of a sequence",
    "micro-batches": "micro-batches of a side",
    "ranks": "ranks",
}
LIMIT = 120.0
"""Seconds that ranks may take."""
Point = dict[str, float]


def median(run: Callable[[], Any], rounds: int, before: Callable[[], Any] = lambda: None) -> float:
    """Median CPU seconds; one more run warms up."""
    timed = common.Timed(run, before)
    return statistics.median([timed.seconds(time.process_time) for _ in range(rounds + 1)][1:])


def passes(size: str, rounds: int) -> Point:
    """The parts that go over the parameters, whatever the tokens."""
    given = Gradients(size)
    blocks = gram(given.w, given.l).pooled([len(given.w)])
    a, b = orthogonal(blocks)
    base = torch.optim.RMSprop(given.params, lr=1e-6, foreach=False)

    def mixture() -> None:
        for w, l in zip(given.w, given.l):
            mix_(w, l, a[0], b[0], cancels=False)  # as a step does

    found = {"Gram": median(lambda: gram(given.w, given.l), rounds), "mixture": median(mixture, rounds, given.restore)}
    for p, w in zip(given.params, given.w):
        p.grad = w
    return found | {"base step": median(base.step, rounds)}


def both(model: Any, tokens: int, micro: int = 1) -> Callable[[], None]:
    """Forward and backward of both sides, in so many micro-batches of one sequence each; gradients are dropped."""
    losses = common.sides(model, 1, tokens)

    def run() -> None:
        for loss in losses:
            for _ in range(micro):
                loss().backward()
            model.zero_grad()

    return run


def curves(sizes: Sequence[str], tokens: Sequence[int], micros: Sequence[int], rounds: int) -> dict[str, list[Point]]:
    """The parts along each axis; one sequence a side, of the least number of tokens, where another axis is walked."""
    found: dict[str, list[Point]] = {"parameters": [], "tokens": [], "micro-batches": []}
    middle = sizes[min(1, len(sizes) - 1)]
    for size in sizes:
        rest = passes(size, rounds)  # before the model, so that both are never there together
        model = common.mistral(size, max_position_embeddings=max(*tokens, 512))
        count = sum(p.numel() for p in model.parameters())
        found["parameters"].append({"x": count, "forward and backward": median(both(model, tokens[0]), rounds)} | rest)
        if size == middle:
            for n in tokens:
                found["tokens"].append({"x": n, "forward and backward": median(both(model, n), rounds)} | rest)
            for n in micros:
                whole = median(both(model, tokens[0], n), max(1, rounds // n))
                found["micro-batches"].append({"x": n, "forward and backward": whole} | rest)
        del model
    return found


# ---- ranks -------------------------------------------------------------------------------------------------------------


def ranks(counts: Sequence[int], size: str, tokens: int, rounds: int) -> list[Point]:
    """The parts on so many processes, each as the first of them saw it."""
    found = []
    for count in counts:
        words = ["--worker", "--sizes", size, "--tokens", str(tokens), "--rounds", str(rounds)]
        said = common.launched("growth.py", count, *words, limit=LIMIT)
        line = next(line for line in reversed(said.splitlines()) if line.startswith("{"))  # gloo may say something behind it
        found.append({"x": count} | json.loads(line))
    return found


def worker(size: str, tokens: int, rounds: int) -> Point:
    """One rank: a step of a sharded model, part by part. All ranks together take four sequences a side."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.profiler import ProfilerActivity, profile

    dist.init_process_group("gloo")
    count = dist.get_world_size()
    model = common.mistral(size)
    mesh = init_device_mesh("cpu", (count,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.manual_seed(dist.get_rank())
    winner, loser = common.sides(model, 4 // count, tokens)
    base = torch.optim.RMSprop(model.parameters(), lr=1e-6, foreach=False)
    ProjectedGradient(base, max_norm=1.0).step(winner, loser)  # makes the base's state
    message = torch.zeros(3 * len(list(model.parameters())) + 6 * count, dtype=torch.float64)
    found: dict[str, list[float]] = {name: [] for name in (*PARTS, *COLLECTIVES)}
    for _ in range(rounds):
        gradients = []
        since = time.process_time()
        for loss in (loser, winner):
            loss().backward()
            gradients.append([p.grad for p in model.parameters()])
            base.zero_grad()
        found["forward and backward"].append(time.process_time() - since)
        with profile(activities=[ProfilerActivity.CPU]) as seen:  # once more, since watching takes time
            for loss in (loser, winner):
                loss().backward()
        base.zero_grad()
        found["collectives"].append(sum(e.cpu_time_total for e in seen.key_averages() if e.key.startswith("gloo:")) / 1e6)
        l, w = gradients
        dist.barrier()
        marks = [time.process_time()]
        a, b = orthogonal(gram(w, l).pooled([len(w)]))
        marks.append(time.process_time())
        for p, x, y in zip(model.parameters(), w, l):
            mix_(x, y, a[0], b[0])
            p.grad = x
        marks.append(time.process_time())
        base.step()
        base.zero_grad()
        marks.append(time.process_time())
        for name, old, new in zip(PARTS[1:], marks, marks[1:]):
            found[name].append(new - old)
        dist.barrier()
        since = time.perf_counter()
        dist.all_reduce(message)
        found["own all-reduce"].append(time.perf_counter() - since if count > 1 else 0.0)
    dist.destroy_process_group()
    return {name: statistics.median(times) for name, times in found.items()}


# ---- what it says ------------------------------------------------------------------------------------------------------


def exponents(points: Sequence[Point]) -> dict[str, float]:
    """The slope of log time against log size for each part; one rank has no collectives."""
    found = {}
    for name in (name for name in points[0] if name != "x"):
        xy = np.log([[point["x"], point[name]] for point in points if point[name] > 0])
        if len(xy) > 1:
            found[name] = float(np.polyfit(xy[:, 0], xy[:, 1], 1)[0])
    return found


def crossings(found: dict[str, list[Point]], tokens: int) -> dict[str, float]:
    """Tokens a side from which forward and backward take longer than what goes over the parameters, by size of the model.

    And from which projection (Gram and mixture) is less than 2% and 0.5% of a step; and the ranks from which collectives take
    longer than a rank's own work.
    """
    result: dict[str, float] = {}
    for point in found["parameters"]:
        token = point["forward and backward"] / tokens
        projection = point["Gram"] + point["mixture"]
        rest = projection + point["base step"]
        name = f"{point['x'] / 1e6:.0f}M"
        result[f"{name}: longer than Gram and mixture"] = projection / token
        result[f"{name}: longer than these and the base step"] = rest / token
        for share in (0.02, 0.005):
            result[f"{name}: projection under {share:.1%}"] = max(0.0, projection / share - rest) / token
    over = [p["x"] for p in found["ranks"] if p["collectives"] > sum(p[part] for part in PARTS)]
    return result | ({"ranks: collectives longer than the rest": over[0]} if over else {})


def captions(limits: dict[str, float]) -> dict[str, str]:
    """What the figure says over a panel about where a part dominates."""
    most = ": longer than these and the base step"
    tokens = [f"{n:,.0f} ({name.removesuffix(most)})" for name, n in limits.items() if name.endswith(most)]
    found = {"parameters": f"forward and backward are most from {', '.join(tokens)} tokens a side"}
    count = limits.get("ranks: collectives longer than the rest")
    return found | ({"ranks": f"collectives are most from {count:.0f} ranks"} if count else {})


def draw(found: dict[str, list[Point]], slopes: dict[str, dict[str, float]], limits: dict[str, float], path: Path) -> None:
    """One figure, a panel an axis."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    from ogdopt_harness.reporting.figures import PAPER

    hues = dict(zip((*PARTS, *COLLECTIVES), ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000"), strict=True))
    with matplotlib.rc_context(PAPER | {"text.parse_math": True}):  # powers of ten; no label comes from a file
        figure = Figure(figsize=(12, 10), layout="constrained")
        for axes, (name, label) in zip(figure.subplots(2, 2).flat, AXES.items(), strict=True):
            points = found[name]
            for part, marker in zip((part for part in hues if part in points[0]), itertools.cycle("osD^vP")):
                text = f"{part}, exponent {slopes[name][part]:.2f}" if part in slopes.get(name, {}) else part
                xy = [(p["x"], p[part]) for p in points if p[part] > 0]  # one rank has no collectives
                axes.plot(*zip(*xy), f"{marker}-", color=hues[part], label=text)
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds a step")
            axes.set_title(captions(limits).get(name, ""), fontsize=10)
            if name != "parameters":
                axes.set_xticks([p["x"] for p in points])
                axes.xaxis.set_major_formatter(ScalarFormatter())
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main(words: list[str]) -> None:
    """Measure, fit, draw."""
    parser = common.parser(__doc__, "growth")
    parser.add_argument("--sizes", nargs="+", choices=common.SIZES, default=["5M", "20M", "100M", "400M"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--micros", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], choices=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help="be one of the ranks that a launcher started; prints JSON")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    if asked.worker:
        found = worker(asked.sizes[0], asked.tokens[0], asked.rounds)
        if os.environ["RANK"] == "0":  # lines of several may run into one another
            print(json.dumps(found), flush=True)
        return
    found = curves(asked.sizes, asked.tokens, asked.micros, asked.rounds)
    found["ranks"] = ranks(asked.ranks, asked.sizes[0], asked.tokens[0], asked.rounds)
    slopes = {name: exponents(points) for name, points in found.items() if len(points) > 1}
    # What goes over the parameters does not change with tokens and micro-batches, and is drawn as it is.
    slopes |= {name: {PARTS[0]: slopes[name][PARTS[0]]} for name in ("tokens", "micro-batches") if name in slopes}
    for name, points in found.items():
        title = ", ".join(f"{part} {slope:.2f}" for part, slope in slopes.get(name, {}).items())
        rows = [[f"{p['x']:,.0f}", *(f"{1e3 * p[part]:,.1f} ms" for part in p if part != "x")] for p in points]
        common.show(f"exponents: {title}", [AXES[name], *(part for part in points[0] if part != "x")], rows)
    limits = crossings(found, asked.tokens[0])
    common.show("from where", ["", "tokens a side, or ranks"], [[name, f"{n:,.0f}"] for name, n in limits.items()])
    draw(found, slopes, limits, asked.output.with_suffix(".svg"))
    common.record(asked.output, found, exponents=slopes, dominates=limits)


if __name__ == "__main__":
    common.start(main)
