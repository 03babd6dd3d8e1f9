"""What a study's outcomes say: TAX of every run and epoch, the best epochs, the comparison at matched preference learning.

Runs are compared twice. First each is taken at its best epoch (the paper's Table 1). But a model that learned less preference
also forgets less. So they are compared at matched preference learning too: at the highest level L that every run of a seed
reaches at some epoch. Each run counts at the first epoch that reaches L.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ogdopt_harness.analysis.study_reader import Evaluation, Run, SeedRuns, Study
from ogdopt_harness.analysis.tax import Interval, Reduction, Tax, combine, compare, difference, reduction, unanswered
from ogdopt_harness.common import keys
from ogdopt_harness.common.tables import interval, listing, number

WAYS = ("direct", "cloze", "generate")
ASKED = {
    "direct": "asked directly",
    "cloze": "asked by cloze",
    "generate": "asked to answer freely",
    "acc": "asked directly, scored by plain accuracy",
}
WINS, STYLE, ACCURACY = "judged win rate", "style rate", "held-out preference accuracy"  # by precedence
EPSILON = 1e-9
HELPS = -1e-5  # a cosine below it helps the rejected; what rounds the parameters to float32 stays above
Epochs = Mapping[str, Mapping[int, int]]  # run -> seed -> epoch


@dataclass(frozen=True, eq=False)
class Point:
    """One run of one seed after one epoch. Changes are against step 0, in nats a token."""

    epoch: int
    style: float | None
    style_n: int
    accuracy: float | None  # held-out preference accuracy
    chosen_change: float | None
    rejected_change: float | None
    tax: dict[str, Tax]
    seconds: float | None  # the evaluation took
    margin: float | None = None  # held-out reward margin
    win_rate: Interval | None = None  # of a judge, where every epoch was judged

    def skill(self, criterion: str | None) -> float | None:
        """Preference learning by the study's criterion."""
        wins = None if self.win_rate is None else self.win_rate.value
        return {WINS: wins, STYLE: self.style, ACCURACY: self.accuracy, None: None}[criterion]


@dataclass(frozen=True, eq=False)
class Contrast:
    """TAX of one run minus another's, in points: mean over seeds with its interval, and each seed's value."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]
    reduction: Reduction | None

    @property
    def clear(self) -> bool:
        """More than noise: 0 lies outside the interval, and every seed has the same sign."""
        return (min(self.seeds) > 0 and self.low > 0) or (max(self.seeds) < 0 and self.high < 0)

    def __str__(self) -> str:
        seeds = f"; seeds {', '.join(number(v, sign=True) for v in self.seeds)}" if len(self.seeds) > 1 else ""
        return f"{number(self.value, sign=True)} points {interval(self.low, self.high)}{seeds}"


@dataclass(frozen=True)
class Promise:
    """How often the steps of one run of one seed did what OGD promises: the chosen's loss falls, the rejected's does not.

    Judged by the cosines of the parameter change with the two gradients; a step that moved nothing has none.
    """

    steps: int  # that have the cosines
    chosen_missed: float  # share of them whose change did not lower the chosen's loss
    rejected_helped: float  # share of them whose change lowered the rejected's loss
    worst_chosen: float  # largest cosine with the chosen's gradient
    worst_rejected: float  # smallest cosine with the rejected's gradient
    passes: float | None  # mean of the further passes over the gradients; None: the method takes none


def promise_of(run: Run) -> Promise | None:
    """None where the run did not log what its steps did."""
    chosen, rejected = (run.series(keys.update_cosine(side))[1] for side in keys.SIDES)
    if not chosen or not rejected:
        return None
    passes = run.series(keys.PASSES)[1]
    return Promise(
        len(rejected),
        sum(c >= 0 for c in chosen) / len(chosen),
        sum(c < HELPS for c in rejected) / len(rejected),
        max(chosen),
        min(rejected),
        sum(passes) / len(passes) if passes else None,
    )


@dataclass(frozen=True, eq=False)
class Comparison:
    """All runs, seeds and epochs of a study, measured."""

    study: Study
    references: dict[int, Evaluation]
    points: dict[str, dict[int, dict[int, Point]]]  # run -> seed -> epoch
    ways: list[str]
    criterion: str | None  # what preference learning is measured by; None: nothing measured it
    levels: dict[int, float]
    best: dict[str, dict[int, int]]
    matched: dict[str, dict[int, int]]
    warnings: list[str]

    def label(self, name: str) -> str:
        """The run's name for readers."""
        return self.study.runs[name].label

    def at(self, name: str, epochs: Epochs, seeds: Iterable[int] | None = None) -> list[Point]:
        """The run's points at the chosen epochs, one a seed."""
        wanted = set(epochs[name] if seeds is None else seeds)
        return [self.points[name][seed][epoch] for seed, epoch in epochs[name].items() if seed in wanted]

    def tax(self, name: str, epochs: Epochs, way: str, seeds: Iterable[int] | None = None) -> Tax | None:
        """TAX at the chosen epochs, over seeds; None where it was not measured in this way."""
        taxes = [point.tax[way] for point in self.at(name, epochs, seeds) if way in point.tax]
        return combine(taxes) if taxes else None

    def contrast(self, a: str, b: str, way: str, epochs: Epochs | None = None) -> Contrast | None:
        """TAX of run a minus run b over the seeds that have both, by default at matched preference learning."""
        epochs = epochs or self.matched
        common = [s for s in epochs[a] if s in epochs[b] and all(way in self.points[r][s][epochs[r][s]].tax for r in (a, b))]
        ours, theirs = self.tax(a, epochs, way, common), self.tax(b, epochs, way, common)
        if ours is None or theirs is None:
            return None
        seeds = tuple(x - y for x, y in zip(ours.seeds, theirs.seeds))
        return Contrast(*difference(ours, theirs), seeds, reduction(ours, theirs))

    def promises(self, name: str) -> list[Promise]:
        """How the run's steps kept OGD's promise, one a seed that logged it."""
        runs = [seed.runs[name] for seed in self.study.seeds if name in seed.runs]
        return [promise for run in runs if (promise := promise_of(run)) is not None]

    @property
    def shared_seeds(self) -> list[int]:
        """Seeds in which every run is finished."""
        return [seed for seed in self.references if all(seed in seeds for seeds in self.points.values())]

    def ranking(self, way: str) -> list[tuple[str, Tax]]:
        """Runs by TAX at matched preference learning, least forgetting first, over the seeds in which all are finished."""
        taxes = [(name, self.tax(name, self.matched, way, self.shared_seeds or None)) for name in self.matched]
        return sorted(((name, t) for name, t in taxes if t is not None), key=lambda item: -item[1].value)


def measure(study: Study, samples: int = 10_000, confidence: float = 0.95) -> Comparison:
    """Compute every TAX and choose the epochs. Raises ValueError where models answered different questions."""
    references: dict[int, Evaluation] = {}
    points: dict[str, dict[int, dict[int, Point]]] = {name: {} for name in study.runs}
    warnings: list[str] = []
    for seed in study.seeds:
        references[seed.seed] = Evaluation.read(seed.reference)
        where = f"seed {seed.seed}: " if len(study.seeds) > 1 else ""
        found, said = _measure_seed(seed, references[seed.seed], samples, confidence)
        warnings += [where + warning for warning in said]
        for name, curve in found.items():
            points[name][seed.seed] = curve
    every = [p for seeds in points.values() for curve in seeds.values() for p in curve.values()]
    criterion = next((c for c in (WINS, STYLE, ACCURACY) if all(p.skill(c) is not None for p in every)), None)
    best = {name: {seed: _best_epoch(curve, criterion) for seed, curve in seeds.items()} for name, seeds in points.items()}
    levels = _levels(points, criterion)
    matched = {
        name: {seed: _first_epoch(curve, criterion, levels.get(seed)) for seed, curve in seeds.items()}
        for name, seeds in points.items()
    }
    asked = {way for p in every for way in p.tax}
    ways = [*(w for w in WAYS if w in asked), *sorted(asked - set(WAYS))]
    return Comparison(study, references, points, ways, criterion, levels, best, matched, warnings)


def _measure_seed(
    seed: SeedRuns, reference: Evaluation, samples: int, confidence: float
) -> tuple[dict[str, dict[int, Point]], list[str]]:
    models = {
        f"{name}/{epoch}": Evaluation.read(path) for name, run in seed.runs.items() for epoch, path in run.evaluations.items()
    }
    warnings = [
        f"{name} was evaluated with other settings than the supervised model: {model.settings} against {reference.settings}"
        for name, model in models.items()
        if model.settings != reference.settings
    ]
    judges = {(str(j.get("judge")), str(j.get("baseline"))) for run in seed.runs.values() for j in run.judged.values()}
    if len(judges) > 1:
        said = listing([f"{judge} against {baseline}" for judge, baseline in sorted(judges)])
        warnings.append(f"win rates are of several judges or baselines ({said}), so they cannot be compared")
    taxes: dict[str, dict[str, Tax]] = {}
    for way in reference.ways:
        skip = unanswered(reference, way)
        if any(way in ways and task not in skip for task, ways in reference.tasks.items()):
            # another generator a seed: averages over seeds need independent draws
            taxes[way] = compare(reference, models, way, samples, confidence, seed.seed, skip)
            warnings += next(iter(taxes[way].values())).warnings
        else:
            warnings.append(f"no TAX {ASKED.get(way, way)}: the supervised model answers no item of {listing(skip)}")
        warnings += [f"the supervised model answers no item of {task!r} ({way}), so its ratio is undefined" for task in skip]
    curves = {
        name: {
            epoch: _point(
                run, epoch, models[f"{name}/{epoch}"], {way: found[f"{name}/{epoch}"] for way, found in taxes.items()}
            )
            for epoch in run.evaluations
        }
        for name, run in seed.runs.items()
    }
    return curves, warnings


def _point(run: Run, epoch: int, model: Evaluation, tax: dict[str, Tax]) -> Point:
    def change(key: str) -> float | None:
        now, start = run.at_epoch(key, epoch), run.at_epoch(key, 0)
        return None if now is None or start is None else now - start

    style = model.style or {}
    return Point(
        epoch,
        style.get("chosen_rate"),
        int(style.get("n") or 0),
        run.at_epoch(keys.measured(keys.ACCURACIES), epoch),
        change(keys.measured(keys.logps_mean(keys.CHOSEN))),
        change(keys.measured(keys.logps_mean(keys.REJECTED))),
        tax,
        model.seconds,
        run.at_epoch(keys.measured(keys.MARGINS), epoch),
        Interval(**wins) if (wins := run.judged.get(epoch, {}).get("win_rate")) else None,
    )


def _best_epoch(curve: Mapping[int, Point], criterion: str | None) -> int:
    """Most preference learning, then the higher preference accuracy, then the earlier epoch; the last epoch if unmeasured."""
    if criterion is None:
        return max(curve)
    return max(curve.values(), key=lambda p: (p.skill(criterion), p.accuracy if p.accuracy is not None else 0, -p.epoch)).epoch


def _levels(points: Mapping[str, Mapping[int, Mapping[int, Point]]], criterion: str | None) -> dict[int, float]:
    """For each seed the highest preference learning that all of its runs reach at some epoch."""
    tops: dict[int, list[float]] = {}
    for seeds in points.values():
        for seed, curve in seeds.items():
            tops.setdefault(seed, []).append(max((p.skill(criterion) or 0.0) for p in curve.values()))
    return {} if criterion is None else {seed: min(values) for seed, values in sorted(tops.items())}


def _first_epoch(curve: Mapping[int, Point], criterion: str | None, level: float | None) -> int:
    if level is None:
        return max(curve)
    return min(epoch for epoch, p in curve.items() if (p.skill(criterion) or 0.0) >= level - EPSILON)


def results_of(found: Comparison) -> dict[str, Any]:
    """All numbers of the comparison as plain data that JSON can hold (NaN becomes null), for results.json."""

    def chosen(name: str, epochs: Epochs) -> dict[str, Any]:
        points = found.at(name, epochs)
        keys = ("epoch", "style", "accuracy", "margin", "chosen_change", "rejected_change")
        taxes = {way: found.tax(name, epochs, way) for way in found.ways}
        return {"seeds": list(epochs[name]), **{key: [getattr(p, key) for p in points] for key in keys}, "tax": taxes}

    runs = {
        name: {
            "label": run.label,
            "method": run.method,
            "beta": run.beta,
            "best": chosen(name, found.best),
            "matched": chosen(name, found.matched),
            "tax_minus_at_matched": {o: found.contrast(name, o, w) for w in found.ways[:1] for o in found.points if o != name},
            "promise": found.promises(name),
            "epochs": found.points[name],
        }
        for name, run in found.study.runs.items()
    }
    supervised = {
        seed: {
            "file": reference.file,
            "style": (reference.style or {}).get("chosen_rate"),
            "accuracy": {task: {way: a.accuracy for way, a in ways.items()} for task, ways in reference.tasks.items()},
        }
        for seed, reference in found.references.items()
    }
    return {
        "study": found.study.directory.name,
        "warnings": found.warnings,
        "incomplete": found.study.incomplete,
        "criterion": found.criterion,
        "levels": plain(found.levels),
        "supervised": plain(supervised),
        "runs": plain(runs),
    }


def plain(value: Any) -> Any:
    """Dataclasses, named tuples and arrays of numbers as JSON's types; bootstrap draws are left out."""
    if (as_dict := getattr(value, "_asdict", None)) is not None:
        value = as_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
