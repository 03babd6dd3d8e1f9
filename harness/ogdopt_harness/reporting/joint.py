"""What joint runs reached: optimality gaps, distance from the ideal point, and what they cost against Sequential.

gap of an objective   its last measurement less its optimum of the same seed
ideal distance        sqrt(gap_DPO^2 + gap_SFT^2)
cost                  percent more than Sequential with the same lambda and seed (paper "joint SFT and DPO", (57) and (58))
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ogdopt_harness.analysis.study_reader import Run, SeedRuns, Study, read_study
from ogdopt_harness.common import keys
from ogdopt_harness.common.files import write_json, write_text
from ogdopt_harness.common.tables import Table, listing, markdown_text, number, spread
from ogdopt_harness.reporting.figures import Curve, Curves, Look, Panel, draw, looks

STREAMS = {keys.PREFERENCE: "f_DPO", keys.SFT: "f_SFT"}
BASELINE = "sequential"
TITLE = "Two objectives at once"
TIE = 0.02
"""Distances that differ by less than this share of the smaller are called equal."""


@dataclass(frozen=True, eq=False)
class End:
    """Where one joint run of one seed ended, and what its steps cost."""

    objectives: Mapping[str, float]
    gaps: Mapping[str, float]
    least: float
    """Least value of the preference objective on the way."""
    seconds: float | None
    cpu_seconds: float | None
    memory: float | None  # bytes, peak
    utilization: float | None  # percent, median over logged steps
    path: Curve
    """Gaps of the preference and of the supervised objective at every measurement."""

    @property
    def distance(self) -> float:
        """Distance from the ideal point."""
        return math.hypot(*self.gaps.values())


@dataclass(frozen=True, eq=False)
class JointRun:
    """One joint run over seeds."""

    run: Run
    ends: dict[int, End]

    @property
    def family(self) -> str:
        """The method, and how often it evaluates where it does: what a curve over lambda is one of."""
        every = "" if self.run.evaluate_every is None else f" k={self.run.evaluate_every}"
        return self.run.label.partition(" λ=")[0] + every

    def mean(self, of: Callable[[End], float]) -> float:
        """Mean over the seeds."""
        return statistics.fmean(map(of, self.ends.values()))


@dataclass(frozen=True, eq=False)
class Joint:
    """All joint runs of a study, by lambda and then as the study has them."""

    runs: list[JointRun]

    @property
    def lambdas(self) -> list[float]:
        """The weights of preference there are, rising."""
        return sorted({weight for found in self.runs if (weight := found.run.weight) is not None})

    @property
    def seeds(self) -> list[int]:
        """Seeds that have a joint run."""
        return sorted({seed for found in self.runs for seed in found.ends})

    def at(self, weight: float) -> list[JointRun]:
        """The runs with this weight."""
        return [found for found in self.runs if found.run.weight == weight]

    def baseline(self, of: JointRun) -> JointRun | None:
        """Sequential with the same weight."""
        return next((found for found in self.at(of.run.weight or 0.0) if found.run.method == BASELINE), None)

    def more(self, of: JointRun, what: Callable[[End], float | None]) -> list[float]:
        """Percent more than Sequential, one a seed that both have; empty where it was not measured."""
        base = self.baseline(of)
        both = [] if base is None else [(what(of.ends[s]), what(base.ends[s])) for s in of.ends if s in base.ends]
        return [100 * (x - y) / y for x, y in both if x is not None and y]

    def families(self) -> dict[str, list[JointRun]]:
        """Runs of one method (and one `evaluate_every`), by lambda."""
        found: dict[str, list[JointRun]] = {}
        for one in self.runs:
            found.setdefault(one.family, []).append(one)
        return found


def joint_runs(study: Study) -> Joint | None:
    """The study's joint runs that have an optimum to be compared with; None if there is none."""
    found = []
    for name, run in study.runs.items():
        ends = {
            seed.seed: end for seed in study.seeds if name in seed.runs and (end := _end(seed, seed.runs[name])) is not None
        }
        if ends:
            found.append(JointRun(run, ends))
    return Joint(sorted(found, key=lambda one: one.run.weight or 0.0)) if found else None


def _end(seed: SeedRuns, run: Run) -> End | None:
    measured = {name: run.series(keys.measured(keys.objective(name)))[1] for name in STREAMS}
    if run.weight is None or seed.optima is None or not all(measured.values()):
        return None
    last = {name: values[-1] for name, values in measured.items()}
    busy = run.series(keys.GPU)[1]
    wall, cpu, memory = (run.complete.get(key) for key in (keys.STEP_SECONDS, keys.STEP_CPU_SECONDS, keys.PEAK_MEMORY))
    gaps = {name: value - seed.optima[name] for name, value in last.items()}
    x, y = (np.array(values) - seed.optima[name] for name, values in measured.items())
    return End(last, gaps, min(measured["preference"]), wall, cpu, memory, statistics.median(busy) if busy else None, (x, y))


def gap_table(joint: Joint) -> Table:
    """One row a run: gaps, distance, and cost against Sequential."""
    rows = []
    for one in joint.runs:
        ends = list(one.ends.values())
        cells = [spread([end.gaps[name] for end in ends], 3) for name in STREAMS]
        costs = [
            spread(joint.more(one, what), 0, sign=True, unit="%")
            for what in (lambda e: e.seconds, lambda e: e.cpu_seconds, lambda e: e.memory, lambda e: e.utilization)
        ]
        rows.append([one.run.label, *cells, spread([end.distance for end in ends], 3), *costs])
    columns = ["method", *(f"gap of {name}" for name in STREAMS.values()), "ideal distance"]
    note = (
        "Gap: the objective at the end of a run, on the same training rows for all, less its optimum, which was found by "
        "optimizing it alone (below 0: the run went below that estimate). Ideal distance: from the point where both are 0. "
        "The rest is what the steps cost more than Sequential's with the same λ, in the same study: wall-clock time, CPU time, "
        "peak memory, GPU utilization (none without a GPU). λ is the weight of the preference; k: steps between evaluations. "
        "All take as many steps, and Mix takes a batch of both objectives at each: twice the rows." + _seeds(joint)
    )
    return Table(TITLE, [*columns, "time", "CPU time", "memory", "GPU use"], rows, note)


def _seeds(joint: Joint) -> str:
    several = max(len(one.ends) for one in joint.runs) > 1
    return " Means over seeds, in brackets the lowest and highest seed." if several else ""


def sentences(joint: Joint) -> Iterator[str]:
    """What the gaps say: who comes nearest to the ideal point, what Sequential forgets, what projecting and evaluating do."""
    yield from _nearest(joint)
    yield from _forgotten(joint)
    yield from _projected(joint)
    yield from _evaluated(joint)


def _nearest(joint: Joint) -> Iterator[str]:
    parts = []
    for weight in joint.lambdas:
        (best, *others) = sorted(joint.at(weight), key=lambda one: one.mean(lambda end: end.distance))
        least = best.mean(lambda end: end.distance)
        alike = [one.family for one in others if one.mean(lambda end: end.distance) <= (1 + TIE) * least]
        tied = f", as near as {listing(alike)}" if alike else ""
        parts.append(f"{best.family} at λ={weight:g} ({number(least, 3)}{tied})")
    yield f"Two objectives: nearest to the ideal point came {listing(parts)}."


def _forgotten(joint: Joint) -> Iterator[str]:
    runs = [one for one in joint.runs if one.run.method == BASELINE]
    ends = [end for one in runs for end in one.ends.values()]
    if not ends:
        return
    forgot = sum(end.objectives["preference"] > end.least + TIE for end in ends)
    before, after = (statistics.fmean(x) for x in zip(*((end.least, end.objectives["preference"]) for end in ends)))
    yield (
        f"Sequential lost preference in its supervised phase in {forgot} of {len(ends)} runs: f_DPO from "
        f"{number(before, 3)} at its least to {number(after, 3)} at the end, on average."
    )


def _projected(joint: Joint) -> Iterator[str]:
    """OGD on the pairs against the same schedule with DPO on them."""
    for name, label in (("mix", "Mix"), ("alright", "ALRIGHT"), ("maxright", "MAXRIGHT")):
        pairs = [
            (plain.ends[seed], ogd.ends[seed])
            for ogd in joint.runs
            if ogd.run.method == f"{name}_ogd"
            for plain in joint.at(ogd.run.weight or 0.0)
            if plain.run.method == name and plain.run.evaluate_every == ogd.run.evaluate_every
            for seed in ogd.ends
            if seed in plain.ends
        ]
        if pairs:
            nearer = sum(ogd.distance < plain.distance for plain, ogd in pairs)
            gaps = ", ".join(
                f"{shown} {number(statistics.fmean(p.gaps[k] for p, _ in pairs), 3)} → "
                f"{number(statistics.fmean(o.gaps[k] for _, o in pairs), 3)}"
                for k, shown in STREAMS.items()
            )
            runs = f"{nearer} of {len(pairs)} runs"
            yield f"With OGD instead of DPO on the pairs {label} is nearer in {runs} (mean gaps: {gaps})."


def _evaluated(joint: Joint) -> Iterator[str]:
    for name, runs in _swept(joint).items():
        first, cells = runs[0], []
        for one in runs:
            both = [(one.ends[s].cpu_seconds, first.ends[s].cpu_seconds) for s in one.ends if s in first.ends]
            times = [x / y for x, y in both if x and y]
            cost = f" for {number(statistics.median(times))}x of its CPU time" if times and one is not first else ""
            cells.append(f"k={one.run.evaluate_every} {number(one.mean(lambda end: end.distance), 3)}{cost}")
        yield f"{name}, ideal distance by steps between evaluations: {listing(cells)}."


def write_gaps(directory: str | Path, suffix: str = ".svg") -> Joint | None:
    """Write gaps.md, gaps.json and figures/ of a study whose models were not evaluated; None without joint runs.

    Raises ValueError like `read_study`.
    """
    study = read_study(directory, evaluated=False)
    joint = joint_runs(study)
    if joint is None:
        return None
    drawings = draw(study.folder.figures, *drawn(joint), suffix)
    table = gap_table(joint).without_empty_columns()
    parts = [f"# {markdown_text(study.directory.name)}: {TITLE[0].lower()}{TITLE[1:]}"]
    parts.append("\n".join(f"- {markdown_text(sentence)}" for sentence in sentences(joint)))
    parts += ["\n".join(f"- left out: {markdown_text(line)}" for line in study.incomplete), table.markdown(), table.note]
    for drawing in drawings:
        parts += [f"## {drawing.title}", f"![{drawing.title}](figures/{drawing.file.name})", drawing.caption]
    write_text(study.folder.gaps, "\n\n".join(filter(None, parts)) + "\n")
    write_json(study.folder.gaps.with_suffix(".json"), numbers(joint))
    return joint


def numbers(joint: Joint) -> dict[str, dict[str, list[float | None]]]:
    """Every run's numbers, one a seed, for results.json."""
    found = {}
    for one in joint.runs:
        ends = list(one.ends.values())
        values = {f"gap_{name}": [end.gaps[name] for end in ends] for name in STREAMS}
        values |= {name: [end.objectives[name] for end in ends] for name in STREAMS}
        costs = ("distance", "seconds", "cpu_seconds", "memory", "utilization")
        found[one.run.name] = {"seeds": list(one.ends), **values, **{key: [getattr(end, key) for end in ends] for key in costs}}
    return found


def drawn(joint: Joint) -> tuple[list[Panel], dict[str, Look]]:
    """The figures of a study's joint runs, and how their curves look: a method's curve over lambda, one of a lambda over k."""
    families, swept = joint.families(), _swept(joint)
    first = {name: runs[len(runs) // 2].run for name, runs in (families | swept).items()}
    look = {name: dataclasses.replace(found, label=name) for name, found in looks(first).items()}
    return [*_over_lambda(joint, families), *_over_k(joint, swept)], look


def _over_lambda(joint: Joint, families: Mapping[str, Sequence[JointRun]]) -> Iterator[Panel]:
    def ends(x: Callable[[JointRun, End], float], y: Callable[[JointRun, End], float]) -> Curves:
        return {
            name: [
                _curve((x(one, one.ends[seed]), y(one, one.ends[seed])) for one in runs if seed in one.ends)
                for seed in joint.seeds
            ]
            for name, runs in families.items()
        }

    yield Panel(
        "joint_pareto",
        "Both objectives at the end, by λ",
        "Each curve is one method from small λ (the supervised objective counts) to large (the preference does). The star is "
        "the ideal point, where both have their optimum. Look for the curve nearest to it, and for how far a curve spreads "
        "along the front: that is what λ controls.",
        "gap of f_DPO",
        ["gap of f_SFT"],
        [ends(lambda _, end: end.gaps["preference"], lambda _, end: end.gaps["sft"])],
        star=(0.0, 0.0),
    )
    middle = min(joint.lambdas, key=lambda weight: abs(weight - 0.5))
    yield Panel(
        "joint_paths",
        f"The way there, λ={middle:g}",
        "Every measurement of both gaps, from the common start. Look for paths that go straight to the star, for Sequential's "
        "two legs, and for how much of its first leg the second takes back.",
        "gap of f_DPO",
        ["gap of f_SFT"],
        [{one.family: [end.path for end in one.ends.values()] for one in joint.at(middle)}],
        star=(0.0, 0.0),
        markers=False,
    )
    if len(joint.lambdas) < 2:
        return
    measures: dict[str, Callable[[JointRun, End], float]] = {
        "gap of f_DPO": lambda _, end: end.gaps["preference"],
        "gap of f_SFT": lambda _, end: end.gaps["sft"],
        "ideal distance": lambda _, end: end.distance,
    }
    yield Panel(
        "joint_by_lambda",
        "Gaps and ideal distance by λ",
        "The paper's figures 3 (preference first) and 7 (SFT first). Look for a method whose distance is small at every λ, and "
        "for Sequential paying for whatever came first.",
        "λ, weight of the preference",
        list(measures),
        [ends(lambda one, _: one.run.weight or 0.0, of) for of in measures.values()],
    )


def _over_k(joint: Joint, swept: Mapping[str, Sequence[JointRun]]) -> Iterator[Panel]:
    def curves(of: Callable[[End], float | None], relative: bool = False) -> Curves:
        found: dict[str, list[Curve]] = {}
        for name, runs in swept.items():
            for seed in joint.seeds:
                points = [(one.run.evaluate_every, of(one.ends[seed])) for one in runs if seed in one.ends]
                x, y = _curve((float(k), value) for k, value in points if k is not None and value is not None)
                found.setdefault(name, []).append((x, y / y[0] if relative and len(y) else y))
        return found

    if swept:
        yield Panel(
            "joint_by_evaluation",
            "MAXRIGHT by steps between evaluations",
            "The paper's figure 4. Look for a distance that grows when both objectives are evaluated seldom, and for what "
            "evaluating often costs.",
            "k, steps between evaluations",
            ["ideal distance", "CPU time / that\nof the smallest k"],
            [curves(lambda end: end.distance), curves(lambda end: end.cpu_seconds, relative=True)],
            log_x=True,
        )


def _swept(joint: Joint) -> dict[str, list[JointRun]]:
    """Runs that differ in `evaluate_every` alone, by their label without it; only where there are several."""
    found: dict[str, list[JointRun]] = {}
    for one in joint.runs:
        if (one.run.evaluate_every or 0) > 0:
            found.setdefault(one.run.label.partition(" k=")[0], []).append(one)
    return {name: runs for name, runs in found.items() if len(runs) > 1}


def _curve(points: Iterable[tuple[float, float]]) -> Curve:
    found = list(points)
    return np.array([x for x, _ in found], dtype=float), np.array([y for _, y in found], dtype=float)
