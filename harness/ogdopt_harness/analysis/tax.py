"""TAX: how much of each benchmark's accuracy a preference-tuned model has lost, and how sure that is.

    TAX  = 100/|T| · Σ_i min(0, q_i/p_i − 1)      in [−100, 0] percent
    SIGN = 100/|T| · Σ_i (q_i/p_i − 1)            its companion that does not hide gains

p_i and q_i are the accuracies of the reference (SFT) model and of the tuned model on the same items of task i.
min(0, ·) turns every unlucky item into a loss and no lucky one into a gain, so two equally good models score below 0. That is
why TAX is never read alone, but with its sign-flip null and with the *basic* bootstrap interval. That interval corrects most of
this bias; near 0 the percentile interval hardly ever holds the truth. Resampling items within a task, with one draw for all
models, is a multinomial over the patterns of outcomes. So 10,000 draws take well under a second.

Still the intervals are approximate near 0. In simulations of 4-8 tasks with 128 items and 1-3 seeds, nominal 95% intervals held
a truth of 0 in 95-98% of the cases, and one of -2 in 82-92%. Equally good models differed "clearly" in 2-7%. All of this is the
error of sampling items; that of training again needs several seeds (`combine`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from ogdopt_harness.analysis.study_reader import Evaluation
from ogdopt_harness.common.tables import interval, number, p_text

BLOCK = 4_000_000  # numbers held at once while resampling, about 32 MB


class Interval(NamedTuple):
    """An estimate with its basic bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class TaskChange:
    """What became of one task: accuracies p (reference) and q, items lost (right, then wrong) and gained."""

    n: int
    p: float
    q: float
    lost: int
    gained: int
    chance: float
    ratio_se: float  # standard error of q/p, delta method


@dataclass(frozen=True, eq=False)
class Tax:
    """TAX of one model against the reference, in percent; `null_mean` is what equally good models would score."""

    value: float
    low: float
    high: float
    null_mean: float
    p_value: float
    signed: float
    signed_se: float
    tasks: dict[str, TaskChange]
    warnings: tuple[str, ...]
    seeds: tuple[float, ...]  # TAX of each seed; one element unless combined
    confidence: float
    draws: np.ndarray = field(repr=False)  # (samples,) bootstrap TAX
    null_draws: np.ndarray = field(repr=False)  # (samples,) sign-flip TAX
    drawn_with: tuple[Any, ...] = field(repr=False)  # equal where the draws are joint

    @property
    def detectable(self) -> bool:
        """Whether two equally good models would rarely score this low (p < 1 − confidence)."""
        return self.p_value < 1 - self.confidence

    @property
    def clearly_below_null(self) -> bool:
        """Whether the whole interval lies below the null's mean and p <= 0.01: only then are ratios to it meaningful."""
        return self.p_value <= 0.01 and self.high < self.null_mean


class Reduction(NamedTuple):
    """1 − TAX_A/TAX_B with its interval; `ceiling` is what a model that forgot nothing would score on average."""

    value: float
    low: float
    high: float
    ceiling: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """A proportion with Wilson's score interval, which is sound near 0 and 1 and for small n."""
    z, rate = NormalDist().inv_cdf((1 + confidence) / 2), successes / n
    middle, half = rate + z**2 / (2 * n), z * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
    return Interval(rate, max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n)))


def tax(p: Sequence[float] | np.ndarray, q: Sequence[float] | np.ndarray) -> float:
    """TAX in percent from the accuracies p (reference, all positive) and q of the same tasks."""
    return float(100 * np.minimum(0.0, np.asarray(q, dtype=float) / np.asarray(p, dtype=float) - 1).mean())


def unanswered(reference: Evaluation, way: str = "direct") -> list[str]:
    """Tasks on which the reference is never right, so that TAX is undefined: give them to `compare(skip=...)`."""
    return [name for name, ways in reference.tasks.items() if way in ways and not ways[way].outcomes.any()]


def compare(
    reference: Evaluation,
    models: Mapping[str, Evaluation],
    way: str = "direct",
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    skip: Iterable[str] = (),
) -> dict[str, Tax]:
    """TAX of each model over the reference's tasks asked in this `way`, all models resampled together.

    Items are drawn within their task and stratum. A draw in which the reference has no right answer left on a task
    counts as no change there. Give different studies different seeds, or `combine` would average correlated draws.
    Raises ValueError for tasks that are missing, were asked other questions, or where the reference is never right.
    """
    skip = set(skip)
    tasks = [name for name, ways in reference.tasks.items() if way in ways and name not in skip]
    if not tasks:
        raise ValueError(f"{reference.file}: no task was asked in the way {way!r}; expected at least one for TAX")
    rng = np.random.default_rng(seed)
    names = list(models)
    draws, null_draws = np.zeros((samples, len(names))), np.zeros((samples, len(names)))
    changes: dict[str, dict[str, TaskChange]] = {name: {} for name in names}
    unable = unanswered(reference, way)
    warnings = [
        f"task {name!r} ({way}) was left out of TAX" + (", since the reference answers no item of it" if name in unable else "")
        for name in reference.tasks
        if name in skip
    ]
    for task in tasks:
        answers = reference.tasks[task][way]
        warnings += _check_reference(reference, task, way)
        outcomes = np.stack([answers.outcomes, *(_paired(reference, models[name], task, way) for name in names)], axis=1)
        strata = np.zeros(len(outcomes), dtype=int) if answers.strata is None else answers.strata
        accuracies = _resampled_accuracies(outcomes, strata, samples, rng)
        draws += _relative_loss(accuracies[:, :1], accuracies[:, 1:])
        null_draws += _null_loss(outcomes, samples, rng)
        for column, name in enumerate(names, start=1):
            changes[name][task] = _task_change(outcomes[:, 0], outcomes[:, column], strata, answers.chance)
    scale = 100 / len(tasks)
    drawn_with = (reference.file, way, samples, seed, tuple(tasks))
    return {
        name: _summary(changes[name], scale * draws[:, k], scale * null_draws[:, k], tuple(warnings), confidence, drawn_with)
        for k, name in enumerate(names)
    }


def _check_reference(reference: Evaluation, task: str, way: str) -> list[str]:
    answers = reference.tasks[task][way]
    p, chance = answers.accuracy, answers.chance
    if p == 0:
        raise ValueError(
            f"{reference.file}: the reference answers no item of task {task!r} ({way}), so its relative change 0/0 is "
            "undefined; leave the task out by name (skip), or take a reference model or metric that can do it"
        )
    margin = 2 * (p * (1 - p) / len(answers.outcomes)) ** 0.5
    if p - chance >= margin:
        return []
    return [
        f"task {task!r} ({way}): the reference's accuracy {p:.3f} is within two standard errors ({margin:.3f}) of chance "
        f"({chance:.3f}); its relative change measures noise"
    ]


def _paired(reference: Evaluation, model: Evaluation, task: str, way: str) -> np.ndarray:
    ours, theirs = reference.tasks[task][way], model.tasks.get(task, {}).get(way)
    if theirs is None:
        raise ValueError(
            f"task {task!r} ({way}) is in {reference.file} but not in {model.file}; evaluate both on the same tasks"
        )
    if ours.doc_hashes != theirs.doc_hashes:
        raise ValueError(
            f"task {task!r} ({way}): {reference.file} (n = {len(ours.outcomes)}) and {model.file} (n = {len(theirs.outcomes)}) "
            "hold different questions (doc_hashes differ), so outcomes cannot be paired; evaluate both models on the same data"
        )
    return theirs.outcomes


def _resampled_accuracies(outcomes: np.ndarray, strata: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Accuracies (samples, models) of draws with replacement within each stratum of outcomes (items, models)."""
    total = np.zeros((samples, outcomes.shape[1]))
    for stratum in np.unique(strata):
        rows = outcomes[strata == stratum]
        patterns, counts = np.unique(rows, axis=0, return_counts=True)
        block = max(1, BLOCK // len(patterns))
        for start in range(0, samples, block):
            size = min(block, samples - start)
            total[start : start + size] += rng.multinomial(len(rows), counts / len(rows), size=size) @ patterns.astype(float)
    return total / len(outcomes)


def _relative_loss(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """min(0, q/p − 1), and 0 where p is 0."""
    return np.minimum(0.0, np.divide(q, p, out=np.ones_like(q), where=p > 0) - 1)


def _null_loss(outcomes: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Losses (samples, models) on one task after swapping, with probability 1/2, each item on which the two models differ."""
    n = len(outcomes)
    reference, models = outcomes[:, :1], outcomes[:, 1:]
    both, differing = (reference & models).sum(axis=0), (reference != models).sum(axis=0)
    swapped = rng.binomial(differing, 0.5, size=(samples, models.shape[1]))
    return _relative_loss((both + swapped) / n, (both + differing - swapped) / n)


def _task_change(a: np.ndarray, b: np.ndarray, strata: np.ndarray, chance: float) -> TaskChange:
    n, p, q = len(a), float(a.mean()), float(b.mean())
    influence = (b - q / p * a) / p  # of each item on q/p
    variance = sum(influence[strata == s].var() * (strata == s).sum() for s in np.unique(strata)) / n**2
    return TaskChange(n, p, q, int((a & ~b).sum()), int((b & ~a).sum()), chance, float(variance) ** 0.5)


def _summary(
    tasks: dict[str, TaskChange],
    draws: np.ndarray,
    null_draws: np.ndarray,
    warnings: tuple[str, ...],
    confidence: float,
    drawn_with: tuple[Any, ...],
) -> Tax:
    p, q = np.array([t.p for t in tasks.values()]), np.array([t.q for t in tasks.values()])
    value = tax(p, q)
    return Tax(
        value=value,
        **_uncertainty(value, draws, null_draws, confidence),
        signed=float(100 * (q / p - 1).mean()),
        signed_se=100 / len(tasks) * sum(t.ratio_se**2 for t in tasks.values()) ** 0.5,
        tasks=tasks,
        warnings=warnings,
        seeds=(value,),
        confidence=confidence,
        draws=draws,
        null_draws=null_draws,
        drawn_with=drawn_with,
    )


def _basic(value: float, draws: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(2 * value - high), float(2 * value - low))


def _uncertainty(value: float, draws: np.ndarray, null_draws: np.ndarray, confidence: float) -> dict[str, float]:
    """Null and interval of a TAX: the basic interval inside [−100, 0], which may lie wholly above a TAX near 0.

    It reaches up to 0 wherever the sign-flip test cannot tell the model from an equally good one: the bias that the basic
    interval corrects is only part of TAX's bias at 0, and the mean of several seeds keeps all of the rest.
    """
    interval = _basic(value, draws, confidence)
    p_value = (1 + int((null_draws <= value + 1e-9).sum())) / (1 + len(null_draws))
    return {
        "low": min(0.0, max(-100.0, interval.low)),
        "high": 0.0 if p_value >= 1 - confidence else min(0.0, interval.high),
        "null_mean": float(null_draws.mean()),
        "p_value": p_value,
    }


def combine(taxes: Sequence[Tax]) -> Tax:
    """The mean over seeds, with the interval and null of that mean for item sampling; `seeds` holds the single values.

    Task accuracies are averaged, their counts are added.
    """
    if not taxes:
        raise ValueError("combine() of no TAX values; expected one a seed")
    if len(taxes) == 1:
        return taxes[0]
    draws = np.mean([t.draws for t in taxes], axis=0)
    null_draws = np.mean([t.null_draws for t in taxes], axis=0)
    value = float(np.mean([t.value for t in taxes]))
    names = list(dict.fromkeys(name for t in taxes for name in t.tasks))
    return Tax(
        value=value,
        **_uncertainty(value, draws, null_draws, taxes[0].confidence),
        signed=float(np.mean([t.signed for t in taxes])),
        signed_se=float(np.sqrt(sum(t.signed_se**2 for t in taxes)) / len(taxes)),
        tasks={name: _mean_change([t.tasks[name] for t in taxes if name in t.tasks]) for name in names},
        warnings=tuple(dict.fromkeys(w for t in taxes for w in t.warnings)),
        seeds=tuple(t.value for t in taxes),
        confidence=taxes[0].confidence,
        draws=draws,
        null_draws=null_draws,
        drawn_with=tuple(t.drawn_with for t in taxes),
    )


def _mean_change(changes: Sequence[TaskChange]) -> TaskChange:
    def mean(name: str) -> float:
        return float(np.mean([getattr(change, name) for change in changes]))

    def total(name: str) -> int:
        return sum(getattr(change, name) for change in changes)

    ratio_se = sum(change.ratio_se**2 for change in changes) ** 0.5 / len(changes)
    return TaskChange(total("n"), mean("p"), mean("q"), total("lost"), total("gained"), mean("chance"), ratio_se)


def difference(a: Tax, b: Tax) -> Interval:
    """TAX_A − TAX_B in points (positive: A forgot less), from joint draws. Raises ValueError where they are not joint."""
    _check_joint(a, b)
    return _basic(a.value - b.value, a.draws - b.draws, a.confidence)


def reduction(a: Tax, b: Tax) -> Reduction | None:
    """1 − TAX_A/TAX_B, or None unless TAX_B is clearly below its own null: a ratio to noise says nothing."""
    _check_joint(a, b)
    if not b.clearly_below_null or not b.draws.all():
        return None
    value, low, high = _basic(1 - a.value / b.value, 1 - a.draws / b.draws, a.confidence)
    return Reduction(value, min(1.0, low), min(1.0, high), 1 - a.null_mean / b.value)


def verdict(name: str, t: Tax) -> str:
    """What one TAX says, in a sentence: also that it lies inside the noise floor, where a model that forgot nothing lies."""
    scored = f"{name} has a TAX of {number(t.value, unit='%')} {interval(t.low, t.high)}"
    null = f"two equally good models score {number(t.null_mean, unit='%')} on average ({p_text(t.p_value)})"
    if not t.detectable:
        return f"{scored}, inside the noise floor: {null}. No forgetting was detected, and no ratio to it means anything."
    return f"{scored}: it forgot more than chance explains, for {null}."


def _check_joint(a: Tax, b: Tax) -> None:
    if a.drawn_with != b.drawn_with:
        raise ValueError(
            f"these TAX values come from different comparisons ({a.drawn_with} and {b.drawn_with}); give both models to one "
            "compare() call (for several seeds: combine the same seeds in the same order)"
        )
