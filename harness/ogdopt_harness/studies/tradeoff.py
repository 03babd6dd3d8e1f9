"""Preference tuning and supervised fine-tuning on a problem small enough to draw: one after the other, or taking turns.

Both objectives are logistic losses of a softmax policy over two outputs, `f(theta) = log(1 + exp(-z (theta - origin)))`. `z` is
the difference of the two outputs' features, times beta. `origin` is the reference policy's parameter for preference tuning, and
0 for supervised fine-tuning. Neither minimum conflicts with itself; together they do. After the toy illustration (figure 2) and
theorems 3.3 and 4.1 of the paper "joint SFT and DPO". The instances are constructed: the paper's features are not published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ogdopt import AlternatingObjective, MaxGapObjective, SequentialObjective
from ogdopt.objectives import OneAtATime
from ogdopt_harness.analysis.claims import Claim, Findings, Picture
from ogdopt_harness.common.tables import Table, number, spread, tiny

COLORS = {"Sequential": "#0072B2", "ALRIGHT": "#D55E00", "MAXRIGHT": "#009E73"}
DPO, SFT = "preference", "sft"
Results = dict[str, Any]


@dataclass(frozen=True)
class Logistic:
    """The loss `log(1 + exp(-z (theta - origin)))` of parameters theta, (d,)."""

    z: np.ndarray
    origin: np.ndarray

    def loss(self, theta: np.ndarray) -> np.ndarray:
        """Nats, (...), of parameters (..., d)."""
        return np.logaddexp(0.0, (self.origin - theta) @ self.z)

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """(d,), of parameters (d,)."""
        return -self.z / (1.0 + math.exp(min(float(self.z @ (theta - self.origin)), 700.0)))


Losses = Mapping[str, Logistic]


def descend(
    losses: Losses,
    objective: OneAtATime,
    start: np.ndarray,
    steps: int,
    rate: float,
    decay: float = 0.0,
    enough: float = 0.0,
) -> np.ndarray:
    """Gradient descent in which every step belongs to one objective; the path, (steps taken + 1, d).

    `decay` times the parameters is added to the gradient; the descent ends before a step whose objective's loss is `enough`.
    """
    path = np.empty((steps + 1, len(start)))
    path[0] = theta = start.astype(float)
    closures = {name: lambda f=losses[name]: float(f.loss(theta)) for name in objective.weights}
    for t in range(steps):
        name = objective.choose(closures)
        loss = closures[name]()
        if loss <= enough:
            return path[: t + 1]
        objective.observe(name, loss)
        theta = theta - rate * (losses[name].gradient(theta) + decay * theta)
        path[t + 1] = theta
    return path


# ---- figure 2: two parameters --------------------------------------------------------------------------------------------

START = np.array([5.0, -9.9])
RATE, DECAY, ENOUGH = 0.01, 1e-3, 0.05
OPTIMA = {DPO: 0.0, SFT: 0.0}
HALVES = {DPO: 0.5, SFT: 0.5}


def plane(reference_steps: int = 1000) -> dict[str, Logistic]:
    """Preference tuning on features (1, 1) against (.5, .5), fine-tuning on (.5, .5) against (1, .5), in two dimensions.

    The reference is what `reference_steps` of descent on the chosen response make of the common start.
    """
    z = np.array([0.5, 0.5])
    chosen = {SFT: Logistic(z, np.zeros(2))}
    reference = descend(chosen, SequentialObjective({SFT: reference_steps}), START, reference_steps, RATE, DECAY)[-1]
    return {DPO: Logistic(z, reference), SFT: Logistic(np.array([-0.5, 0.0]), np.zeros(2))}


def trajectories(losses: Losses, steps: int = 20_000, seed: int = 0) -> dict[str, np.ndarray]:
    """The paths of the three schedules from the common start, in the parameters' space: (steps + 1, 2) each.

    A phase of Sequential is half of the steps, or ends where its own loss is small enough.
    """
    first = descend(losses, SequentialObjective({DPO: steps // 2}), START, steps // 2, RATE, DECAY, ENOUGH)
    second = descend(losses, SequentialObjective({SFT: steps // 2}), first[-1], steps // 2, RATE, DECAY, ENOUGH)
    return {
        "Sequential": np.concatenate([first, second[1:]]),
        "ALRIGHT": descend(losses, AlternatingObjective(HALVES, seed=seed), START, steps, RATE, DECAY),
        "MAXRIGHT": descend(losses, MaxGapObjective(HALVES, optima=OPTIMA), START, steps, RATE, DECAY),
    }


def summary(losses: Losses, path: np.ndarray) -> dict[str, float]:
    """Where a path ends: both losses, their distance from the ideal point (0, 0), and how much of a detour it was."""
    ends = {name: float(f.loss(path[-1])) for name, f in losses.items()}
    length = float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())
    net = float(np.linalg.norm(path[-1] - path[0]))
    return ends | {"distance": math.hypot(*ends.values()), "steps": len(path) - 1, "detour": length / net}


def plane_table(ends: Mapping[str, Mapping[str, float]], distances: Sequence[float]) -> Table:
    """The end of every schedule."""
    rows = [
        [name, f"{end['steps']:,}", *(number(end[key], 3) for key in (DPO, SFT, "distance")), number(end["detour"], 2)]
        for name, end in ends.items()
    ]
    closer = sum(ends["MAXRIGHT"]["distance"] < x for x in distances)
    note = (
        "Distance: from the ideal point, where both losses are 0. Detour: length of the path, with every turn between the two "
        f"objectives, over the distance between its ends. ALRIGHT over {len(distances)} seeds ends {number(min(distances), 3)} "
        f"to {number(max(distances), 3)} away; MAXRIGHT is closer than {closer} of these on this instance, which another one "
        "may turn round."
    )
    return Table(
        "Two parameters: where each schedule ends", ["schedule", "steps", "f_DPO", "f_SFT", "distance", "detour"], rows, note
    )


def draw_plane(losses: Losses, paths: Mapping[str, np.ndarray]) -> Figure:
    """Top: the paths over the contours of the mean loss. Bottom: the same paths by their two losses."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    axes = figure.subplots(2, len(paths), sharex="row", sharey="row")
    points = np.concatenate(list(paths.values()))
    low, high = points.min(0), points.max(0)
    low, high = low - 0.12 * (high - low), high + 0.12 * (high - low)
    grid = np.stack(np.meshgrid(*(np.linspace(a, b, 120) for a, b in zip(low, high))), -1)
    mean = sum(0.5 * f.loss(grid) for f in losses.values())
    for column, (name, path) in enumerate(paths.items()):
        top, bottom = axes[0, column], axes[1, column]
        top.contour(grid[..., 0], grid[..., 1], mean, levels=14, colors="#bbbbbb", linewidths=0.8)
        _trace(top, path, COLORS[name])
        top.set_title(name)
        top.set_xlabel("θ₁")
        _trace(bottom, np.stack([f.loss(path) for f in losses.values()], -1), COLORS[name])
        bottom.plot(0, 0, "*", color="#E69F00", ms=16, mec="black", clip_on=False, zorder=5, label="ideal point")
        bottom.set_xlabel("f_DPO")
    axes[0, 0].set_ylabel("θ₂")
    axes[1, 0].set_ylabel("f_SFT")
    axes[1, 0].legend(frameon=False, fontsize=11, loc="upper right")
    return figure


def _trace(ax: Axes, path: np.ndarray, color: str) -> None:
    thin = path[:: max(1, len(path) // 2000)]
    ax.plot(*thin.T, color=color, lw=1.8)
    ax.plot(*path[0], "o", color="white", mec="black", ms=8, label="start")
    ax.plot(*path[-1], "s", color=color, mec="black", ms=8, label="end")


# ---- theorems 3.3 and 4.1: one parameter ---------------------------------------------------------------------------------

LINE = {
    DPO: Logistic(np.array([-1.0]), np.array([-5.0])),  # log(1 + exp(theta + 5))
    SFT: Logistic(np.array([1.0]), np.array([0.0])),  # log(1 + exp(-theta))
}
LINE_START = np.array([-5.0])
LAMBDAS = (0.1, 0.5, 0.9)
HALF_STEPS = (50, 150, 500, 1500, 5000, 15_000)


def mixed(theta: np.ndarray, weight: float) -> np.ndarray:
    """f_Mix of parameters (..., 1), with `weight` on preference tuning (equation (6))."""
    return weight * LINE[DPO].loss(theta) + (1 - weight) * LINE[SFT].loss(theta)


def best(weight: float) -> np.ndarray:
    """The parameter of least f_Mix, (1,): where its increasing derivative is 0."""
    low, high = np.array([-50.0]), np.array([50.0])
    for _ in range(200):
        middle = (low + high) / 2
        slope = weight * LINE[DPO].gradient(middle) + (1 - weight) * LINE[SFT].gradient(middle)
        low, high = (low, middle) if slope > 0 else (middle, high)
    return low


def bound(weight: float, steps: int, rate: float) -> float:
    """Theorem 4.1: what the expected gap of ALRIGHT stays under after `steps` steps of size rate/sqrt(steps).

    `(|theta_1 - theta*|^2 + rate^2 M^2 (2 + ln T)) / (2 rate sqrt(T))`, where both gradients are shorter than M = 1.
    """
    far = float(((LINE_START - best(weight)) ** 2).sum())
    return (far + rate**2 * (2 + math.log(steps))) / (2 * rate * math.sqrt(steps))


def gaps(
    half_steps: Sequence[int] = HALF_STEPS, seeds: Sequence[int] = range(5), rates: tuple[float, float] = (0.5, 2.0)
) -> list[Results]:
    """G_Mix(theta_T) = f_Mix(theta_T) - min f_Mix of both schedules, for every weight and number of steps.

    Sequential takes `half_steps` of size rates[0] on either objective, ALRIGHT as many in all of size rates[1]/sqrt(T).
    """
    found = []
    for half in half_steps:
        steps = 2 * half
        after = descend(LINE, SequentialObjective({DPO: half, SFT: half}), LINE_START, steps, rates[0])[-1]
        for weight in LAMBDAS:
            least = float(mixed(best(weight), weight))
            weights = {DPO: weight, SFT: 1 - weight}
            ends = [
                descend(LINE, AlternatingObjective(weights, seed=seed), LINE_START, steps, rates[1] / math.sqrt(steps))[-1]
                for seed in seeds
            ]
            found.append(
                {
                    "weight": weight,
                    "steps": steps,
                    "sequential": float(mixed(after, weight)) - least,
                    "alternating": [float(mixed(end, weight)) - least for end in ends],
                    "bound": bound(weight, steps, rates[1]),
                }
            )
    return found


def gap_table(found: Sequence[Results]) -> Table:
    """The gaps of both schedules by the number of steps."""
    columns = ["schedule", *(f"T={steps:,}" for steps in dict.fromkeys(cell["steps"] for cell in found))]
    rows = []
    for name, key in (("Sequential", "sequential"), ("ALRIGHT", "alternating")):
        for weight in LAMBDAS:
            values = [float(np.mean(cell[key])) for cell in found if cell["weight"] == weight]
            rows.append([f"{name} λ={weight:g}", *map(tiny, values)])
    worst = max(np.mean(cell["alternating"]) / cell["bound"] for cell in found)
    note = (
        "λ is the weight of preference tuning. Sequential tunes preferences, then fine-tunes, for half of the steps each: its "
        "gap grows, since the second phase forgets the first (theorem 3.3). That of ALRIGHT (mean of "
        f"{len(found[0]['alternating'])} seeds) falls; the bound of theorem 4.1 is kept everywhere (at most {worst:.3f} of it)."
    )
    return Table("One parameter: gap of the mixed objective after T steps", columns, rows, note)


def draw_gaps(found: Sequence[Results]) -> Figure:
    """The gaps of both schedules by the number of steps, and the bound of theorem 4.1."""
    figure = Figure(figsize=(6.8, 5.2), layout="constrained")
    ax = figure.subplots()
    for weight, style in zip(LAMBDAS, (":", "-", "--")):
        cells = [cell for cell in found if cell["weight"] == weight]
        steps = [cell["steps"] for cell in cells]
        sequential = [c["sequential"] for c in cells]
        ax.plot(steps, sequential, style, color=COLORS["Sequential"], marker="o", label=f"Sequential λ={weight:g}")
        means = [np.mean(c["alternating"]) for c in cells]
        ax.plot(steps, means, style, color=COLORS["ALRIGHT"], marker="s", label=f"ALRIGHT λ={weight:g}")
    cells = [cell for cell in found if cell["weight"] == 0.5]
    ax.plot([c["steps"] for c in cells], [c["bound"] for c in cells], color="#777777", lw=1, label="bound λ=0.5")
    ax.set(xscale="log", yscale="log", xlabel="steps", ylabel="G_Mix (nats)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")  # the default one writes mathematics, which PAPER leaves unread
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    return figure


# ---- figure 4: evaluating seldom, with noise ---------------------------------------------------------------------------------

NOISY = {"dimensions": 8, "pairs": 64, "cosine": -0.6, "noise": 0.4, "batch": 4, "steps": 4000, "measured": 1500}
EVALUATE_EVERY = (1, 10, 100, 1000)
NOISY_RATES = (0.5, 0.05)


def noisy(every: int, rate: float, seed: int) -> dict[str, float]:
    """MAXRIGHT on batches of two conflicting sets of pairs: where it stays, how much it swings, whose its steps are.

    A pair's loss is `log(1 + exp(-z theta))`, z around one mean direction for each objective. Returned are the mean ideal
    distance over the last steps, the standard deviation of f_DPO over them, and the share of supervised steps.
    """
    rng = np.random.default_rng(seed)
    u, w = np.linalg.qr(rng.normal(size=(NOISY["dimensions"], 2)))[0].T
    v = NOISY["cosine"] * u + math.sqrt(1 - NOISY["cosine"] ** 2) * w
    pairs = {name: mean + NOISY["noise"] * rng.normal(size=(NOISY["pairs"], len(u))) for name, mean in ((DPO, u), (SFT, v))}
    rows = rng.integers(NOISY["pairs"], size=(NOISY["steps"], 2, NOISY["batch"]))
    objective = MaxGapObjective(HALVES, optima=OPTIMA, evaluate_every=every)
    theta, shares, path = -3 * u, 0, []
    for t in range(NOISY["steps"]):
        batches = {name: pairs[name][rows[t, i]] for i, name in enumerate((DPO, SFT))}
        closures = {name: partial(mean_loss, z, theta) for name, z in batches.items()}
        name = objective.choose(closures)
        objective.observe(name, closures[name]())
        z = batches[name]
        theta = theta + rate * (z / (1 + np.exp(z @ theta))[:, None]).mean(0)
        shares += name == SFT
        if t >= NOISY["steps"] - NOISY["measured"]:
            path.append([mean_loss(z, theta) for z in pairs.values()])
    losses = np.array(path)
    distance = float(np.linalg.norm(losses, axis=1).mean())
    return {"distance": distance, "swing": float(losses[:, 0].std()), "sft_share": shares / NOISY["steps"]}


def mean_loss(z: np.ndarray, theta: np.ndarray) -> float:
    """Mean of `log(1 + exp(-z theta))` over pairs z, (N, d)."""
    return float(np.logaddexp(0.0, -z @ theta).mean())


def evaluations(seeds: Sequence[int]) -> list[Results]:
    """`noisy` for every number of steps between evaluations and both step sizes, on the same seeds."""
    return [
        {"every": every, "rate": rate, "runs": [noisy(every, rate, seed) for seed in seeds]}
        for rate in NOISY_RATES
        for every in EVALUATE_EVERY
        if rate == NOISY_RATES[0] or every in (EVALUATE_EVERY[0], EVALUATE_EVERY[-1])
    ]


def evaluation_table(found: Sequence[Results]) -> Table:
    """Distance, swing and shares by steps between evaluations."""
    rows = []
    for cell in found:
        columns = {key: [run[key] for run in cell["runs"]] for key in ("distance", "swing", "sft_share")}
        rows.append([f"k={cell['every']}, step size {cell['rate']:g}", *(spread(values, 3) for values in columns.values())])
    note = (
        "MAXRIGHT on noisy batches; means over the seeds, in brackets the lowest and highest. k: steps between evaluations of "
        "both losses. Distance: mean over the last steps. Swing: standard deviation of f_DPO over them. Share: of supervised "
        "steps. Look for seldom evaluations that swing and stay away with large steps, and for how little it "
        "matters with small ones."
    )
    return Table(
        "Noisy batches: how often both losses are evaluated", ["MAXRIGHT", "distance", "swing", "SFT share"], rows, note
    )


def evaluation_claims(found: Sequence[Results]) -> list[Claim]:
    """What figure 4 shows of large steps between evaluations."""
    often, *_, seldom = (cell["runs"] for cell in found if cell["rate"] == NOISY_RATES[0])
    farther = [b["distance"] / a["distance"] for a, b in zip(often, seldom)]
    swings = [b["swing"] / a["swing"] for a, b in zip(often, seldom)]
    more = [b["sft_share"] - a["sft_share"] for a, b in zip(often, seldom)]
    words = f"k = {EVALUATE_EVERY[-1]} against {EVALUATE_EVERY[0]}, large steps"
    return [
        Claim(f"Evaluating seldom ends farther from the ideal point ({words}): ratio of distances", "farther (figure 4)",
              farther, [x > 1 for x in farther]),
        Claim(f"Evaluating seldom makes the losses swing ({words}): ratio of swings", "oscillates (figure 4)",
              swings, [x > 1 for x in swings]),
        Claim(f"Evaluating seldom takes more supervised steps ({words}): difference of shares", "excess SFT updates (figure 4)",
              more, [x > 0 for x in more]),
    ]  # fmt: skip


# ---- the study -----------------------------------------------------------------------------------------------------------


SEEDS = (0, 1, 2, 3, 4)


def study(seeds: Sequence[int] = SEEDS) -> Findings:
    """All three toys; Sequential and MAXRIGHT toss no coins, so a seed is one of ALRIGHT's.

    Args:
        seeds: Seeds of ALRIGHT's coin, and of the noisy batches.
    """
    losses = plane()
    paths = trajectories(losses, seed=seeds[0])
    ends = {name: summary(losses, path) for name, path in paths.items()}
    others = [
        descend(losses, AlternatingObjective(HALVES, seed=seed), START, len(paths["ALRIGHT"]) - 1, RATE, DECAY)
        for seed in seeds[1:]
    ]
    distances = [ends["ALRIGHT"]["distance"], *(summary(losses, path)["distance"] for path in others)]
    found = gaps(seeds=seeds)
    evaluated = evaluations(seeds)
    places = {"start": START.tolist(), "reference": losses[DPO].origin.tolist()}
    settings = places | {"rate": RATE, "decay": DECAY, "enough": ENOUGH}
    return Findings(
        seeds,
        [*plane_claims(ends, distances), *gap_claims(found), *evaluation_claims(evaluated)],
        [plane_table(ends, distances), gap_table(found), evaluation_table(evaluated)],
        [
            Picture(
                "trajectories",
                "Look for paths that reach the star: only those of ALRIGHT and MAXRIGHT come near it.",
                draw_plane(losses, paths),
            ),
            Picture("gaps", "Look for lines that rise (Sequential) and fall (ALRIGHT).", draw_gaps(found)),
        ],
        ["Constructed instances: the features of the paper are not published."],
        {
            "plane": {"settings": settings, "ends": ends, "alternating_distances": distances},
            "line": found,
            "noisy": {"settings": NOISY, "cells": evaluated},
        },
    )


def plane_claims(ends: Mapping[str, Mapping[str, float]], distances: Sequence[float]) -> list[Claim]:
    """What figure 2 shows, of the distances from the ideal point."""
    far, near = ends["Sequential"]["distance"], ends["MAXRIGHT"]["distance"]
    return [
        Claim("ALRIGHT ends nearer to the ideal point than Sequential: ratio of distances", "far nearer (figure 2)",
              [far / x for x in distances], [x < far for x in distances]),
        Claim("MAXRIGHT ends nearer than ALRIGHT: ratio of distances", "more direct, and nearer (figure 2)",
              [x / near for x in distances], [near < x for x in distances]),
    ]  # fmt: skip


def gap_claims(found: Sequence[Results]) -> list[Claim]:
    """Theorems 3.3 and 4.1, over all weights."""
    count = len(found[0]["alternating"])
    cells = [[c for c in found if c["weight"] == weight] for weight in LAMBDAS]
    pairs = [(of_weight[0], of_weight[-1]) for of_weight in cells]
    grown = min(b["sequential"] / a["sequential"] for a, b in pairs)
    fallen = [max(b["alternating"][k] / a["alternating"][k] for a, b in pairs) for k in range(count)]
    shares = [max(c["alternating"][k] / c["bound"] for c in found) for k in range(count)]
    steps = f"T = {pairs[0][0]['steps']:,} to {pairs[0][1]['steps']:,}"
    return [
        Claim(f"Sequential's gap grows, {steps}: least ratio over the weights", "does not vanish (theorem 3.3)",
              [grown] * count, [grown > 1] * count),
        Claim(f"ALRIGHT's gap falls, {steps}: largest ratio over the weights", "falls as ln T / sqrt(T) (theorem 4.1)",
              fallen, [x < 1 for x in fallen]),
        Claim("ALRIGHT's gap stays under its bound: largest share of it", "at most 1, in expectation (theorem 4.1)",
              shares, [x <= 1 for x in shares]),
    ]  # fmt: skip
