"""Learning dynamics of alignment: behaviours that lie further apart in the last hidden states are learned faster.

First DPO on the unembedding alone, where theorems 4.1 and 4.2 are inequalities about one row of weights. Embeddings are drawn
from Gaussians. A behaviour is two classes whose preferred answers are Yes and No. Every theorem's event is checked on the
sample before its conclusion is. Then full fine-tuning of a small model, with labels as they are and flipped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus

from ogdopt.dynamics import means, priority
from ogdopt_harness.analysis.claims import Claim, Findings, Picture
from ogdopt_harness.common.tables import Table, number, tiny
from ogdopt_harness.data.behaviours import Behaviour, made_up, read_behaviours
from ogdopt_harness.modeling.embeddings import flat
from ogdopt_harness.reporting.figures import spearman
from ogdopt_harness.studies.behaviour_lab import ARCHITECTURE, BATCH, BETA, HELD_OUT, RATE, STEPS, TEXT_STEPS, USED, fine_tuning

# ---- the unembedding alone -------------------------------------------------------------------------------------------------

DISTINGUISHABLE = (0.5, 1.0, 2.0, 4.0, 8.0)
WIDTH, COUNT, NOISE = 256, 1000, 0.3


class Classes(NamedTuple):
    """Embeddings of one behaviour, (n/2, d) each, and the difference of the means that they were drawn around, (d,)."""

    positive: Tensor
    negative: Tensor
    difference: Tensor

    @property
    def gap(self) -> Tensor:
        """The difference of the sample's means."""
        return means(self.positive, self.negative)


def drawn(difference: Tensor, count: int, noise: float, generator: torch.Generator) -> Classes:
    """`count` embeddings, half of either class, around plus and minus half of `difference`."""
    sides = [
        sign * difference / 2 + noise * torch.randn(count // 2, len(difference), generator=generator, dtype=difference.dtype)
        for sign in (1, -1)
    ]
    return Classes(sides[0], sides[1], difference)


def direction(d: int, generator: torch.Generator) -> Tensor:
    """A unit vector."""
    v = torch.randn(d, generator=generator, dtype=torch.float64)
    return v / v.norm()


class Course(NamedTuple):
    """DPO on the unembedding: the change of the row of Yes, (T + 1, d), which that of No mirrors, and the loss, (T + 1,)."""

    change: Tensor
    loss: Tensor

    @property
    def length(self) -> Tensor:
        """|W_U(t) - W_U(0)|, (T + 1,); of rank one, so spectral and Frobenius norm are the same."""
        return math.sqrt(2) * self.change.norm(dim=1)


def tuned(classes: Sequence[Classes], beta: float, rate: float, steps: int) -> tuple[Tensor, Tensor]:
    """Full-batch gradient descent of the DPO loss of all `classes` together on the unembedding.

    Returns the changes of the row of Yes, (T + 1, d), and each behaviour's own loss, (T + 1, behaviours). With that row at
    W(0) + D and that of No at W(0) - D, an example's margin is 2 beta <D, g> for Yes and the opposite for No. No other row
    moves, since the softmax's normalizer cancels in the loss.
    """
    signed = torch.stack([torch.cat([c.positive, -c.negative]) for c in classes])  # (m, n, d)
    m, n, d = signed.shape
    row = torch.zeros(d, dtype=signed.dtype)
    changes, losses = [], []
    for _ in range(steps + 1):
        margins = 2 * beta * (signed @ row)
        changes.append(row)
        losses.append(softplus(-margins).mean(1))
        row = row + rate * beta / (m * n) * (torch.sigmoid(-margins).flatten() @ signed.reshape(m * n, d))
    return torch.stack(changes), torch.stack(losses)


def alone(classes: Classes, beta: float, rate: float, steps: int) -> Course:
    """`tuned` of one behaviour."""
    changes, losses = tuned([classes], beta, rate, steps)
    return Course(changes, losses[:, 0])


def unembedding(seed: int) -> dict[str, Any]:
    """Five behaviours along random directions: losses at a rate that learns them, lengths at the paper's."""
    generator = torch.Generator().manual_seed(seed)
    behaviours = [drawn(x * direction(WIDTH, generator), COUNT, NOISE, generator) for x in DISTINGUISHABLE]
    fast = [alone(c, 0.05, 1.0, 100) for c in behaviours]
    slow = [alone(c, 0.01, 0.1, 100) for c in behaviours]
    shares, sharp = [], []
    for beta, rate, courses in ((0.05, 1.0, fast), (0.01, 0.1, slow)):
        for c, course in zip(behaviours, courses):
            steps = torch.arange(1, 101, dtype=torch.float64)
            event = all(float((x.mean(0) - s * c.difference / 2).norm()) <= float(c.difference.norm()) for x, s in _sides(c))
            bound = 6 * beta * rate * steps * c.difference.norm()  # 6 beta' eta t d^(Delta - 1/2)
            if event:
                shares.append(float((course.length[1:] / bound).max()))
            sharp.append(float((course.length[1:] / (math.sqrt(2) / 4 * beta * rate * steps * c.gap.norm())).max()))
    found = [certain(c, course.change[-1]) for c, course in zip(behaviours, fast)]
    lengths = torch.stack([course.length for course in slow])  # (behaviours, T + 1)
    line = torch.arange(101)[None] * lengths[:, -1:] / 100
    return {
        "distinguishability": [float(c.gap.norm()) for c in behaviours],
        "loss": torch.stack([course.loss for course in fast]).tolist(),
        "length": lengths.tolist(),
        "bent": float(((lengths - line).abs() / lengths[:, -1:]).max()),
        "bound": max(shares),
        "sharp": max(sharp),
        "covered": sum(covered for covered, _ in found),
        "wrong": sum(wrong for _, wrong in found),
    }


def _sides(c: Classes) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    return (c.positive, 1), (c.negative, -1)


def certain(classes: Classes, row: Tensor) -> tuple[int, int]:
    """Inequality (36): (examples whose margin along the difference of the means is large enough, those that are wrong).

    With S the cosine of the boundary 2 D and that difference, a margin of sqrt(1 - S^2)/S |g| suffices.
    """
    unit = classes.difference / classes.difference.norm()
    S = cosine_similarity(row, unit, dim=0).clamp(max=1)
    if S <= 0:  # the wrong way: no margin is enough
        return 0, 0
    signed = torch.cat([classes.positive, -classes.negative])
    covered = signed @ unit >= torch.sqrt(1 - S**2) / S * signed.norm(dim=1)
    return int(covered.sum()), int((covered & (signed @ row <= 0)).sum())


def boundary(seed: int, d: int = 4096, Delta: float = 0.05, v: float = 0.4, phi: float = 0.5) -> dict[str, float]:
    """Theorem 4.2 at every step up to its horizon, on its own event, and how far theorem 4.3 asks for more than there is."""
    generator = torch.Generator().manual_seed(seed)
    unit = direction(d, generator)
    scale, spread = d**Delta, 0.3 * d**Delta  # |mu+ - mu-|, and the root of a class's total variance
    classes = drawn(scale * unit, COUNT, spread / math.sqrt(d), generator)
    norms = torch.cat([classes.positive, classes.negative]).norm(dim=1)
    c_n = scale / 2 + spread  # |mu| + Tr^(1/2), which is c_n' d^Delta = c_n sqrt(d)
    event = all(float((x.mean(0) - s * classes.difference / 2).norm()) <= d ** (Delta - v) for x, s in _sides(classes))
    event = event and float(norms.max()) <= 2 * c_n
    c = c_n / scale
    steps, beta_ = 30, 0.1  # beta' = beta sqrt(d)
    rate = d ** (0.5 - Delta - v) / (72 * beta_**2 * c) / steps  # the horizon is after these steps
    other = direction(d, generator)
    other = other - (other @ unit) * unit
    start = 0.01 * (phi * unit + math.sqrt(1 - phi**2) * other / other.norm())
    course = alone(classes, beta_ / math.sqrt(d), rate, steps)
    rows = start + 2 * course.change
    cosines = cosine_similarity(rows, unit[None])
    t = torch.arange(steps + 1)
    epsilon = 1 - 13 * d**-v - phi
    bound = phi + epsilon * beta_ * rate * t * d ** (Delta - 0.5) / (8 * start.norm() + 1 / (24 * beta_ * c))
    smallest = 2 * c * d ** (Delta + v) * (576 * beta_ * c * float(start.norm()) + 3) / (3 * phi * d**v + epsilon)
    return {
        "event": float(event),
        "slack": float((cosines - bound)[1:].min()),
        "vacuous": smallest / float(norms.max()),
    }


def priorities(seed: int, count: int = 8) -> dict[str, Any]:
    """All pairs of behaviours learned together: the gap of their priorities against that of their losses."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.5 + 4 * torch.rand(count, generator=generator, dtype=torch.float64)
    behaviours = [drawn(x * direction(WIDTH, generator), COUNT // 2, NOISE, generator) for x in sizes]
    gaps = []
    for one, other in itertools.combinations(behaviours, 2):
        levels = priority(torch.stack([one.gap, other.gap]))
        _, losses = tuned([one, other], 0.05, 1.0, 60)
        gaps.append((float(levels[0] - levels[1]), float(losses[-1, 1] - losses[-1, 0])))
    b = torch.stack([c.gap for c in behaviours])
    changes, _ = tuned(behaviours, 0.05, 1.0, 1)
    gained = b @ (2 * changes[1]) / 2  # mean rise of the preferred answer's margin, in logits: half for each class
    predicted = 0.05 * 1.0 / 4 * (b @ b.mean(0))
    return {"gaps": gaps, "first_step": float((gained / predicted - 1).abs().max())}


# ---- a small model, all of it ------------------------------------------------------------------------------------------------

PAPERS = (
    "subscribes-to-average-utilitarianism",
    "okay-with-building-an-AI-with-different-goals-to-accomplish-its-task",
    "optionality-increasing",
    "desire-to-not-have-memory-erased",
    "subscribes-to-Buddhism",
)
"""The paper's five behaviours, least to most distinguishable in Llama-2-7B."""
MADE_UP = (0.05, 0.1, 0.2, 0.35, 0.6)


# ---- what was found ----------------------------------------------------------------------------------------------------------

Each = Sequence[dict[str, Any]]  # one a seed


def unembedding_claims(found: Each, bounds: Sequence[Sequence[dict[str, float]]], pairs: Each) -> list[Claim]:
    """Theorems and figures 3-5."""
    ends = np.array([[loss[-1] for loss in x["loss"]] for x in found])  # (seeds, behaviours)
    lengths = np.array([[length[-1] for length in x["length"]] for x in found])
    events = [all(b["event"] for b in both) for both in bounds]
    agree = [float(np.mean([(a > 0) == (b > 0) for a, b in x["gaps"]])) for x in pairs]
    rho = [spearman(*zip(*x["gaps"])) or 0.0 for x in pairs]

    def claim(text: str, paper: str, values: Any, holds: Any) -> Claim:
        return Claim(text, paper, [float(v) for v in values], [bool(h) for h in holds])

    falls, rises = -np.diff(ends).max(1), np.diff(lengths).min(1)
    slack = [min(b["slack"] for b in both) for both in bounds]
    return [
        claim("Unembedding: the loss ends lower, the more distinguishable: least gap", "falls faster (figure 3)", falls,
              falls > 0),
        claim("Unembedding: |ΔW_U| is ordered by distinguishability: least gap", "ordered (figure 4)", rises, rises > 0),
        claim("Unembedding: |ΔW_U| is linear in t: largest distance from the line, share of the end", "linear (figure 4)",
              [x["bent"] for x in found], [x["bent"] < 0.02 for x in found]),
        claim("|ΔW_U| under the bound of theorem 4.1 at every step: largest share", "at most 1 (theorem 4.1)",
              [x["bound"] for x in found], [x["bound"] <= 1 for x in found]),
        claim("|ΔW_U| ≤ (√2/4) β η t |μ̂₊ − μ̂₋|, the sharper form: largest share", "not in the paper",
              [x["sharp"] for x in found], [x["sharp"] <= 1 + 1e-9 for x in found]),
        claim("The boundary turns at least as far as theorem 4.2 says: least slack of the cosine", "at least 0 (theorem 4.2)",
              slack, [s > 0 and event for s, event in zip(slack, events)]),
        claim("Examples with the margin of inequality (36) are all right: number of them", "all right (proof of theorem 4.3)",
              [x["covered"] for x in found], [x["covered"] > 0 and x["wrong"] == 0 for x in found]),
        claim("Theorem 4.3 as printed asks for a margin above the longest embedding: least ratio", "a margin that is met",
              [min(b["vacuous"] for b in both) for both in bounds], [min(b["vacuous"] for b in both) > 1 for both in bounds]),
        claim("A first step raises behaviour j's margin by (β η/4) ⟨b̄, b_j⟩: relative error", "equation (24), without its β",
              [x["first_step"] for x in pairs], [x["first_step"] < 1e-9 for x in pairs]),
        claim("Pairs: the behaviour of higher priority is learned faster: share of pairs", "always (figure 5)",
              agree, [x == 1 for x in agree]),
        claim("Pairs: the loss gap grows with the priority gap: rank correlation", "grows (figure 5)", rho,
              [x >= 0.7 for x in rho]),
    ]  # fmt: skip


def tuning_claims(found: Each) -> list[Claim]:
    """Figures 6, 8, 9 and 16."""

    def claim(text: str, paper: str, values: Any, holds: Any) -> Claim:
        return Claim(text, paper, [float(v) for v in values], [bool(h) for h in holds])

    rho = [-(spearman(_of(x["before"], "distinguishability"), [float(np.mean(y)) for y in x["losses"]]) or 0.0) for x in found]
    grown = [min(b / a for a, b in zip(_of(x["before"], "distinguishability"), _of(x["after"], "distinguishability")))
             for x in found]  # fmt: skip
    tightened = [max(b / a for a, b in zip(_of(x["before"], "spread"), _of(x["after"], "spread"))) for x in found]

    def gap(one: str, other: str) -> list[float]:
        """The least excess of one start's mean loss over another's, of both behaviours."""
        return [
            min(f["flipped"][one]["mean_loss"] - f["flipped"][other]["mean_loss"] for f in x["flips"].values()) for x in found
        ]

    back = []
    for x in found:
        flipped = [f["flipped"] for f in x["flips"].values()]
        back.append(max((f["DPO"]["margins"][-1] - f["base"]["margins"][0]) / f["base"]["spread"][0] for f in flipped))
    faster, slower, safe = gap("base", "DPO"), gap("OGD", "DPO"), gap("OGD", "base")
    return [
        claim("Full fine-tuning: more distinguishable behaviours are learned faster: rank correlation", "faster (figure 6)",
              rho, [x >= 0.7 for x in rho]),
        claim("Full fine-tuning separates the classes of every behaviour: least growth of |μ̂₊ − μ̂₋|", "separates (figure 8)",
              grown, [x > 1 for x in grown]),
        claim("Full fine-tuning concentrates the classes: largest ratio of |Σ̂|/|μ̂₊ − μ̂₋|² after to before",
              "concentrates (figure 8)", tightened, [x < 1 for x in tightened]),
        claim("Flipped labels are learned faster from the aligned model: least gap of mean losses", "faster (figures 9, 15)",
              faster, [x > 0 for x in faster]),
        claim("Then its margin is back in the base model's band: largest distance above its mean, in standard deviations",
              "back within 100 steps (figure 16)", back, [x <= 1 for x in back]),
        claim("Flipped labels are learned more slowly from OGD's aligned model than from DPO's: least gap", "–",
              slower, [x > 0 for x in slower]),
        claim("Flipped labels are learned no faster from OGD's aligned model than from the base: least gap", "–",
              safe, [x >= 0 for x in safe]),
    ]  # fmt: skip


def _of(rows: Sequence[dict[str, float]], name: str) -> list[float]:
    return [row[f"dynamics/{name}"] for row in rows]


def _median(values: Sequence[float], digits: int = 2) -> str:
    return f"{number(float(np.median(values)), digits)} [{number(min(values), digits)}–{number(max(values), digits)}]"


def unembedding_table(found: Each) -> Table:
    """Losses and lengths by distinguishability."""
    rows = []
    for k, x in enumerate(DISTINGUISHABLE):
        loss, length = ([f[key][k][-1] for f in found] for key in ("loss", "length"))
        rows.append([tiny(x), _median([f["distinguishability"][k] for f in found]), _median(loss, 3), _median(length, 3)])
    note = (
        f"d = {WIDTH}, n = {COUNT}, noise {NOISE}, 100 full-batch steps; the loss at β = 0.05 and rate 1, |ΔW_U| at the "
        "paper's β = 0.01 and rate 0.1. Median [lowest–highest] over the seeds."
    )
    columns = ["distinguishability", "of the sample", "DPO loss", "|ΔW_U|"]
    return Table("DPO on the unembedding alone", columns, rows, note)


def tuning_table(found: Each) -> Table:
    """Each behaviour before and after."""
    rows = []
    for k, name in enumerate(found[0]["names"]):
        apart, spread = ([[_of(f[when], key)[k] for f in found] for when in ("before", "after")]
                         for key in ("distinguishability", "spread"))  # fmt: skip
        losses = [float(np.mean(f["losses"][k])) for f in found]
        cells = [" → ".join(tiny(float(np.median(x))) for x in pair) for pair in (apart, spread)]
        rows.append([name, *cells, _median(losses, 3), _median([f["accuracy"][k] for f in found])])
    note = (
        f"A Llama of {ARCHITECTURE['num_hidden_layers']} layers and width {ARCHITECTURE['hidden_size']}, from scratch: "
        f"{TEXT_STEPS} steps on the questions as text, then {STEPS} steps of DPO (AdamW {RATE:g}, β = {BETA:g}, batch "
        f"{BATCH}). Spread: largest variance over squared distinguishability. Medians over the seeds, before → after; the mean "
        f"of the loss over all steps; held-out accuracy of {2 * HELD_OUT} questions."
    )
    return Table("All of a small model", ["behaviour", "|μ̂₊ − μ̂₋|", "spread", "mean loss", "accuracy"], rows, note)


def flip_table(found: Each) -> Table:
    """What flipped labels do, by where they start."""
    rows = []
    for place in (0, 1):
        flips = [list(f["flips"].items())[place] for f in found]
        names = ", ".join(dict.fromkeys(name for name, _ in flips))
        for start in ("base", "DPO", "OGD"):
            runs = [f["flipped"][start] for _, f in flips]
            ends = [_median([run["margins"][k] for run in runs]) for k in (0, -1)]
            learned = [f["aligned"][start]["accuracy"] for _, f in flips] if start != "base" else None
            label = f"{'least' if place == 0 else 'most'} distinguishable, from {start}"
            accuracy = "–" if learned is None else _median(learned)
            rows.append([label, names, accuracy, *ends, _median([run["mean_loss"] for run in runs], 3)])
    note = (
        "Accuracy: of the aligned model on held-out questions, before the labels are flipped. Margins: log-probability of the "
        "behaviour's own answer over the other's on held-out questions, nats, at the start and the end. At equal steps and "
        "rate OGD's model is aligned less far than DPO's, so that it has less to lose: a difference between them is not OGD's "
        "alone."
    )
    columns = ["flipped labels", "behaviour", "accuracy before", "margin at start", "margin at end", "mean loss"]
    return Table("Flipped labels", columns, rows, note)


def draw_lines(panels: Sequence[tuple[str, str, dict[str, np.ndarray]]], xlabel: str = "step") -> Figure:
    """Axes side by side, (title, y label, curves by name); a curve of (seeds, T) is drawn by its median."""
    figure = Figure(figsize=(5.6 * len(panels), 4.8), layout="constrained")
    for ax, (title, ylabel, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for (name, values), color in zip(curves.items(), HUES):
            ax.plot(np.median(np.atleast_2d(values), 0), color=color, lw=2, label=name)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.legend(frameon=False, fontsize=9)
    return figure


HUES = ["#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00"]


def draw_pairs(pairs: Each) -> Figure:
    """The loss gap of every pair of behaviours by its priority gap."""
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    ax = figure.subplots()
    for x in pairs:
        ax.plot(*zip(*x["gaps"]), "o", ms=4, alpha=0.6)
    ax.set(xlabel="priority gap P₁ − P₂", ylabel="loss gap, second minus first")
    return figure


def draw_embeddings(found: dict[str, Any]) -> tuple[Figure, str]:
    """Both ends of the scale before and after DPO, in two dimensions; also the method."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    method = ""
    for row, (k, stages) in enumerate(found["pictured"].items()):
        for column, (when, (positive, negative)) in enumerate(zip(("before", "after"), stages)):
            points, method = flat(torch.cat([positive, negative]))
            for part, color, label in ((points[: len(positive)], "#009E73", "Yes"), (points[len(positive) :], "#999999", "No")):
                axes[row, column].plot(*part.T, "o", ms=3, color=color, alpha=0.6, label=label)
            axes[row, column].set_title(f"{found['names'][k][:38]}, {when}", fontsize=10)
    axes[0, 0].legend(frameon=False)
    return figure, method


def study(seeds: Sequence[int] = (0, 1, 2, 3, 4), data_dir: str | None = None) -> Findings:
    """Everything, once a seed, which draws embeddings, weights and the order of the questions.

    Args:
        seeds: One repetition each.
        data_dir: File or folder of persona statements as in anthropics/evals; without it statements are generated.
    """
    behaviours, source = _behaviours(data_dir)
    found = [unembedding(seed) for seed in seeds]
    bounds = [[boundary(seed, phi=phi) for phi in (0.0, 0.5)] for seed in seeds]
    pairs = [priorities(seed) for seed in seeds]
    tuned_ = [fine_tuning(behaviours, seed) for seed in seeds]
    embeddings, method = draw_embeddings(tuned_[0])
    names = [b.name[:38] for b in behaviours]
    by_behaviour = {name: np.array([x["losses"][k] for x in tuned_]) for k, name in enumerate(names)}
    flips = [
        (f"{'least' if k == 0 else 'most'} distinguishable", "DPO loss, labels flipped",
         {s: np.array([list(x["flips"].values())[k]["flipped"][s]["losses"] for x in tuned_]) for s in ("base", "DPO", "OGD")})
        for k in (0, 1)
    ]  # fmt: skip
    curves = [
        ("loss", "DPO loss", {tiny(x): np.array([f["loss"][k] for f in found]) for k, x in enumerate(DISTINGUISHABLE)}),
        ("weights", "|ΔW_U|", {tiny(x): np.array([f["length"][k] for f in found]) for k, x in enumerate(DISTINGUISHABLE)}),
    ]
    pictures = [
        Picture("figure3_4_unembedding", "By distinguishability, medians. Look for losses that fall the faster and lines that "
                "rise the steeper, the further apart the classes are.", draw_lines(curves)),
        Picture("figure5_priority", "Pairs of behaviours learned together, all seeds. Look for points on a rising curve "
                "through the origin.", draw_pairs(pairs)),
        Picture("figure6_full", "Full fine-tuning, medians over the seeds. Look for the same order.",
                draw_lines([("all of a small model", "DPO loss", by_behaviour)])),
        Picture("figure8_embeddings", f"{method} of the last hidden states, seed {seeds[0]}. Look for clouds that part.",
                embeddings),
        Picture("figure9_flipped", "Medians. Look for the curve that falls first: an aligned model unlearns faster.",
                draw_lines(flips)),
    ]  # fmt: skip
    notes = [
        f"Data: {data_dir}." if data_dir else "Generated data: --data_dir FOLDER reads persona statements of anthropics/evals.",
        "Theorem 4.3 as printed is vacuous: the margin that it asks for is longer than every embedding on its own event, so it "
        "speaks of no example. Inequality (36) of its proof is tested instead. Equations (9)-(11) are the descent direction, "
        "and (24) is in beta-scaled logits.",
        f"Statements: {source}. The paper's model is Llama-2-7B; here it is a small one that has read nothing else.",
    ]
    kept = [{k: v for k, v in x.items() if k != "pictured"} for x in tuned_]
    return Findings(
        seeds,
        [*unembedding_claims(found, bounds, pairs), *tuning_claims(tuned_)],
        [unembedding_table(found), tuning_table(tuned_), flip_table(tuned_)],
        pictures,
        notes,
        {"unembedding": found, "boundary": bounds, "priorities": pairs, "fine_tuning": kept},
    )


def _behaviours(data_dir: str | None) -> tuple[list[Behaviour], str]:
    """Five behaviours, and where they are from."""
    if data_dir is None:
        return list(made_up(MADE_UP, 2 * USED).values()), "generated"
    known = read_behaviours(data_dir)
    large = {name: b for name, b in known.items() if min(len(b.positive), len(b.negative)) >= USED}
    chosen = [name for name in PAPERS if name in large] if set(PAPERS) <= set(large) else list(large)[: len(PAPERS)]
    if len(chosen) < len(PAPERS):
        raise ValueError(
            f"data_dir: {len(large)} of {len(known)} behaviours in {data_dir} have {USED} questions of either "
            f"answer; expected at least {len(PAPERS)}"
        )
    return [large[name] for name in chosen], f"{len(known)} behaviours of anthropics/evals, of which the paper's five"
