"""The report's figures as SVG files, drawn without a display.

A run has one look (colour, marker) in all figures. Strengths of one method are shades of one colour, light (large beta) to dark
(small beta). The colours are Okabe and Ito's, which differ for any kind of colour vision. With several seeds every seed is a
thin line and their mean a thick one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure  # not pyplot: no display, no global state
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ogdopt_harness.analysis.study_reader import Run
from ogdopt_harness.common import keys

HUES = {"dpo": "#0072B2", "ogd": "#D55E00", "ogd_metric": "#CC79A7", "sft": "#009E73"}
JOINT_HUES = {"sequential": "#0072B2", "sequential_sft_first": "#56B4E9", "mix": "#E69F00", "mix_ogd": "#F0E442"}
JOINT_HUES |= {"alright": "#D55E00", "alright_ogd": "#CC79A7", "maxright": "#009E73", "maxright_ogd": "#000000"}
OTHER_HUES = ["#E69F00", "#56B4E9", "#000000", "#F0E442"]
MARKERS = "osD^vPX<>*hpd8"
PAPER: dict[Any, Any] = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.edgecolor": "#777777",
    "svg.hashsalt": "ogdopt",  # the same numbers give the same file
    "text.parse_math": False,  # labels come from files: a '$' is a dollar
}

Curve = tuple[np.ndarray, np.ndarray]  # x and y of one seed
Curves = Mapping[str, Sequence[Curve]]  # run name -> one curve a seed


Points = Mapping[str, Sequence[Sequence[Mapping[str, float | None]]]]  # run name -> seed -> epoch -> measurements
WAYS = {
    "direct": "Choices are compared right after the question in its chat template.",
    "cloze": "Choices complete a plain sentence, without the chat template.",
    "generate": "The model's own greedy reply must hold the answer: a moved style of reply does not count as forgetting.",
}


@dataclass(frozen=True)
class Look:
    """How a run is drawn, everywhere."""

    label: str
    color: tuple[float, float, float]
    marker: str


@dataclass(frozen=True)
class Drawing:
    """A figure that was written: its file, its title and what to look for in it."""

    file: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Panel:
    """What one figure shows: curves by run, in one or more axes above each other, and its words."""

    file: str
    title: str
    caption: str
    xlabel: str
    ylabels: list[str]
    curves: list[Curves]
    joined: bool = True  # draw lines, not points alone
    markers: bool = True  # at every point, not at the end alone
    floor: float | None = None  # TAX that two equally good models score, shaded up to 0
    zero: bool = False  # draw a line at 0
    level: Sequence[float] = field(default_factory=list)  # vertical lines: the matched level of each seed
    whole_x: bool = False  # x counts epochs
    log_x: bool = False
    star: tuple[float, float] | None = None  # the point to reach


def looks(runs: Mapping[str, Run]) -> dict[str, Look]:
    """One look for each run, from its method and beta, lambda or steps between evaluations."""
    spare = iter(OTHER_HUES * len(runs))
    known = HUES | JOINT_HUES
    hues = {method: known.get(method) or next(spare) for method in dict.fromkeys(run.method for run in runs.values())}

    def strength(run: Run) -> tuple[float, float, float]:
        return -(run.beta or 0), run.weight or 0, run.evaluate_every or 0

    found = {}
    for index, (name, run) in enumerate(runs.items()):
        family = sorted((other for other in runs.values() if other.method == run.method), key=strength)
        shade = family.index(run) / (len(family) - 1) if len(family) > 1 else 0.5
        found[name] = Look(run.label, _shaded(to_rgb(hues[run.method]), shade), MARKERS[index % len(MARKERS)])
    return found


def _shaded(color: tuple[float, float, float], shade: float) -> tuple[float, float, float]:
    """From half-way to white (0) over the colour itself (0.5) to half-way to black (1)."""
    end, amount = (1.0, 1 - 2 * shade) if shade < 0.5 else (0.0, 2 * shade - 1)
    red, green, blue = (c + 0.5 * amount * (end - c) for c in color)
    return red, green, blue


def draw(folder: Path, panels: Iterable[Panel], look: Mapping[str, Look], suffix: str = ".svg") -> list[Drawing]:
    """Write every panel that has something to show; returns them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings = []
    for panel in panels:
        if not any(len(x) for curves in panel.curves for seeds in curves.values() for x, _ in seeds):
            continue
        path = folder / f"{panel.file}{suffix}"
        with matplotlib.rc_context(PAPER):
            # without a date the file depends on the numbers alone
            _draw(panel, look).savefig(path, dpi=110, metadata={"Date": None} if suffix == ".svg" else None)
        drawings.append(Drawing(path, panel.title, panel.caption))
    return drawings


def _draw(panel: Panel, look: Mapping[str, Look]) -> Figure:
    count = len(panel.curves)
    shown = [name for name in look if any(len(x) for curves in panel.curves for x, _ in curves.get(name, ()))]
    legend_rows = -(-len(shown) // 3)
    size = (6.4, 1.0 + 0.27 * legend_rows + (3.5 if count == 1 else 2.5 * count))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)
    for ax, curves, ylabel in zip(axes[:, 0], panel.curves, panel.ylabels):
        _background(ax, panel)
        for name in shown:
            _run_curves(ax, [curve for curve in curves.get(name, ()) if len(curve[0])], look[name], panel)
        ax.set_ylabel(ylabel)
        ax.margins(0.04)
    axes[-1, 0].set_xlabel(panel.xlabel)
    if panel.log_x:
        axes[-1, 0].set_xscale("log")
        axes[-1, 0].xaxis.set_major_formatter("{x:g}")  # the default one writes mathematics, which PAPER leaves unread
    else:
        axes[-1, 0].xaxis.set_major_locator(MaxNLocator(6, integer=panel.whole_x))
    handles = [
        Line2D([], [], color=look[name].color, lw=2.2 if panel.joined else 0, marker=look[name].marker, ms=7) for name in shown
    ]
    figure.legend(
        handles, [look[name].label for name in shown], loc="outside lower center", ncols=3, frameon=False, fontsize=11
    )
    return figure


def _background(ax: Axes, panel: Panel) -> None:
    if panel.floor is not None:
        ax.axhspan(panel.floor, 0, color="#bbbbbb", alpha=0.35, lw=0)
    if panel.floor is not None or panel.zero:
        ax.axhline(0, color="#777777", lw=1)
    for level in panel.level:
        ax.axvline(level, color="#777777", lw=1, ls=":")
    if panel.star is not None:
        ax.plot(*panel.star, "*", color="#E69F00", ms=16, mec="black", clip_on=False, zorder=5)


def _run_curves(ax: Axes, seeds: Sequence[Curve], look: Look, panel: Panel) -> None:
    if not panel.joined:
        for x, y in seeds:
            ax.plot(x, y, ls="", marker=look.marker, color=look.color, ms=7, alpha=0.85, mec="white", mew=0.6)
        return
    mean = _mean_curve(seeds)
    for x, y in seeds:
        ax.plot(x, y, color=look.color, lw=0.8 if mean is not None else 1.6, alpha=0.45 if mean is not None else 1)
    if mean is not None:
        every = None if panel.markers else [len(mean[0]) - 1]
        ax.plot(*mean, color=look.color, lw=2.2, marker=look.marker, markevery=every, ms=7, mec="white", mew=0.6)


def _mean_curve(seeds: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean of x and of y, point by point; None where the seeds have different numbers of points."""
    if len({len(x) for x, _ in seeds}) != 1:
        return None
    return np.mean([x for x, _ in seeds], axis=0), np.mean([y for _, y in seeds], axis=0)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean, with shorter windows at the ends."""
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation (ties share their mean rank); None where it is undefined."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def study_panels(
    runs: Mapping[str, Sequence[Run]], points: Points, floors: Mapping[str, float], levels: Sequence[float], skill: str
) -> Iterator[Panel]:
    """The figures of a study.

    - `runs`: one run a seed.
    - `points`: for each run and seed its measurements by epoch (`epoch`, `skill`, `chosen_change`, `tax/<way>`).
    - `floors`: the mean TAX of equally good models, by way.
    - `levels`: the matched preference learning of each seed.
    - `skill`: what preference learning is measured by, in words.
    """
    dpo = [p for name, seeds in points.items() if runs[name][0].method == "dpo" for seed in seeds for p in seed]
    pairs = [(p["chosen_change"], p["tax/direct"]) for p in dpo if None not in (p.get("chosen_change"), p.get("tax/direct"))]
    rho = spearman(*zip(*pairs)) if pairs else None
    measured = f"Over the {len(pairs)} points of DPO, Spearman's ρ is {rho:.2f}. " if rho is not None else ""
    yield Panel(
        "figure2_tax_against_likelihood",
        "Figure 2: TAX against the likelihood of the chosen answers",
        f"One point a run, seed and epoch. {measured}Look for points that fall to the lower left: where the model pushes "
        "down even the answers it should prefer, it forgets more (ρ near 1).",
        "change of log-prob of chosen (nats a token)",
        ["TAX (%)"],
        [_measured(points, "chosen_change", "tax/direct")],
        joined=False,
        floor=floors.get("direct"),
    )
    for way, asked in (
        ("direct", "asked as in the paper"),
        ("cloze", "asked by cloze"),
        ("generate", "asked to answer freely"),
    ):
        yield Panel(
            f"figure3_tax_by_epoch_{way}",
            f"Figure 3: TAX by epoch, {asked}",
            f"{WAYS[way]} Look for the curve that stays nearest to 0 at every epoch. The grey band is what two equally good "
            "models score on average.",
            ylabels=["TAX (%)"],
            curves=[_measured(points, "epoch", f"tax/{way}")],
            floor=floors.get(way),
            xlabel="epoch",
            whole_x=True,
        )
    yield Panel(
        "tradeoff_tax_against_preference",
        "What the preference costs: TAX against preference learning",
        f"Each curve runs through the epochs of one run; {skill} grows to the right. Look for the curve nearest to the upper "
        "right corner: preference learned, nothing forgotten. Dotted: the level that every run reaches, where the table "
        '"At matched preference learning" compares (one line a seed).',
        skill,
        ["TAX (%)"],
        [_measured(points, "skill", "tax/direct")],
        floor=floors.get("direct"),
        level=levels,
    )
    step = "optimizer step"
    mean = any(run.series(keys.measured(keys.logps_mean(keys.REJECTED)))[0] for seeds in runs.values() for run in seeds)
    logp = keys.logps_mean if mean else keys.logps
    unit = "nats a token" if mean else "nats an answer"
    yield Panel(
        "figure4_logps_chosen",
        "Figure 4: log-likelihood of the chosen answers",
        "On held-out pairs. Look for curves that rise or stay (the preferred answers become likelier) and for curves that "
        "fall although these are the answers to learn: likelihood displacement.",
        ylabels=[f"log-prob of chosen\n({unit})"],
        curves=[logged(runs, keys.measured(logp(keys.CHOSEN)))],
        xlabel=step,
        markers=False,
    )
    yield Panel(
        "figure5_logps_rejected",
        "Figure 5: log-likelihood of the rejected answers",
        "On the same pairs. Look for an OGD curve that is flat or falls slowly: it only refuses to raise this. A steep fall "
        "together with a falling Figure 4 is probability that leaves for answers nobody asked for.",
        ylabels=[f"log-prob of rejected\n({unit})"],
        curves=[logged(runs, keys.measured(logp(keys.REJECTED)))],
        xlabel=step,
        markers=False,
    )
    yield Panel(
        "figure6_dpo_loss",
        "Figure 6: the DPO loss along every run",
        "Held-out DPO loss at β = 0.1 against the model that all runs start from (ln 2 = 0.69 there), also for runs that do "
        "not train on it. Look for a falling OGD curve: it improves the DPO objective without a reference model.",
        ylabels=["DPO loss (β = 0.1)"],
        curves=[logged(runs, keys.EVAL_DPO_LOSS)],
        xlabel=step,
        markers=False,
    )
    yield Panel(
        "projection",
        "The projection at work",
        "Top: cosine between the two gradients. Bottom: the length that the projection leaves of the chosen's gradient, as "
        "a share (1: nothing removed). Running means over 2% of the steps. Look for a cosine well above 0 (the two answers "
        "pull on the same weights: there is a conflict to remove); near 0, OGD is training on chosen alone.",
        ylabels=["cosine", "share left"],
        curves=[logged(runs, keys.COSINE, _calm), logged(runs, keys.PROJECTED, _calm)],
        xlabel=step,
        markers=False,
    )
    yield Panel(
        "update_against_rejected",
        "What the step does to the rejected",
        "Cosine between the change of the parameters and the rejected's gradient, every logged step. Look for points below 0: "
        "there the optimizer made a change that makes the rejected likelier, what OGD promises not to do.",
        ylabels=["cosine(change, rejected's gradient)"],
        curves=[logged(runs, keys.update_cosine(keys.REJECTED))],
        xlabel=step,
        markers=False,
        zero=True,
    )
    yield Panel(
        "conflict_by_layer",
        "Where the two gradients meet",
        "Cosine between the chosen's and the rejected's gradient in each layer, mean over the steps at which it was logged "
        "(`preference.probe_steps` for methods of one gradient). Look for layers near 1: there both answers pull on the same "
        "weights, and a loss that separates them moves both log-likelihoods alike.",
        ylabels=["cosine"],
        curves=[layers(runs)],
        xlabel="layer",
        zero=True,
    )


def _measured(points: Points, x: str, y: str) -> Curves:
    def curve(seed: Sequence[Mapping[str, float | None]]) -> Curve:
        both = [(a, b) for p in seed if (a := p.get(x)) is not None and (b := p.get(y)) is not None]
        return np.array([a for a, _ in both]), np.array([b for _, b in both])

    return {name: [curve(seed) for seed in seeds] for name, seeds in points.items()}


def layers(runs: Mapping[str, Sequence[Run]]) -> Curves:
    """Mean logged cosine of the two gradients by the number of the layer."""

    def curve(run: Run) -> Curve:
        found: dict[int, list[float]] = {}
        for row in run.metrics:
            for key, value in row.items():
                if key.startswith(keys.LAYER) and (layer := key.removeprefix(keys.LAYER)).isdecimal():
                    found.setdefault(int(layer), []).append(value)
        order = sorted(found)
        return np.array(order), np.array([np.mean(found[layer]) for layer in order])

    return {name: [curve(run) for run in seeds] for name, seeds in runs.items()}


def _calm(values: np.ndarray) -> np.ndarray:
    return smooth(values, max(1, len(values) // 50))


def logged(runs: Mapping[str, Sequence[Run]], key: str, change: Callable[[np.ndarray], np.ndarray] | None = None) -> Curves:
    """Curves of one logged quantity by step, `change` applied to each seed's values."""
    curves: dict[str, list[Curve]] = {}
    for name, seeds in runs.items():
        series = [tuple(map(np.asarray, run.series(key))) for run in seeds]
        curves[name] = [(steps, change(values) if change and len(values) else values) for steps, values in series]
    return curves
