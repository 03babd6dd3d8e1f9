"""Reading a study's directory: which runs are finished, what they logged, what their models answered.

Where what lies says `ogdopt_harness.common.run_folder`. The last evaluation of the supervised stage is the reference. A run
without `complete.json`, or with an epoch that was not evaluated, is named in `Study.incomplete` and left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ogdopt_harness.common.files import DamagedError, read_json
from ogdopt_harness.common.keys import EPOCH, EPOCHS, STEP
from ogdopt_harness.common.run_folder import RunFolder, SeedFolder, StudyFolder

LAST = ("ogd", "ogd_metric")  # methods after all others, as in the paper's table


@dataclass(frozen=True, eq=False)
class Answers:
    """One task asked in one way: `outcomes[j]` says whether item j was answered correctly."""

    outcomes: np.ndarray  # (n,) bool
    doc_hashes: tuple[str, ...]  # (n,) which question item j was
    chance: float = 0.0
    strata: np.ndarray | None = None  # (n,) e.g. MMLU's subjects
    margins: np.ndarray | None = None  # (n,) log-prob of the right choice minus the best other, nats
    metric: str = ""  # lm-eval's name of what makes an item right

    @property
    def accuracy(self) -> float:
        """Share of items answered correctly."""
        return float(self.outcomes.mean())


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluated model: `tasks[name][way]` are its answers; the other fields are shown in reports."""

    file: str
    tasks: dict[str, dict[str, Answers]]
    families: dict[str, str] = field(default_factory=dict)
    style: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    model: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """Read `evals/epoch-<n>.json`. Raises ValueError where the file is not one, or an outcome is not 0 or 1."""
        try:
            raw = read_json(Path(path))
            tasks = {
                task: {way: _answers(answers, f"{path}: task {task!r} ({way})") for way, answers in found["ways"].items()}
                for task, found in raw["tasks"].items()
            }
            if any("acc" in found["ways"].get("direct", {}) for found in raw["tasks"].values()):
                for task, found in raw["tasks"].items():
                    tasks[task] |= _plainly(tasks[task], found["ways"], f"{path}: task {task!r} (acc)")
        except (DamagedError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a readable evaluation ({error!r}); expected the file that the evaluation stage writes: "
                "delete it and evaluate this model again"
            ) from error
        families = {task: str(found.get("family") or "") for task, found in raw["tasks"].items()}
        settings, versions = (raw.get(key) or {} for key in ("settings", "versions"))
        model = str(raw.get("model") or "")
        return cls(str(path), tasks, families, raw.get("style"), settings, raw.get("seconds"), model, versions)

    @property
    def ways(self) -> list[str]:
        """The ways in which at least one task was asked, in the order of the file."""
        return list(dict.fromkeys(way for ways in self.tasks.values() for way in ways))


def _plainly(ways: dict[str, Answers], raw: dict[str, Any], where: str) -> dict[str, Answers]:
    """The way "acc": official tasks by plain accuracy, also where their customary metric is another (acc_norm)."""
    if "direct" not in ways:
        return {}
    direct = raw["direct"]
    return {
        "acc": _answers({**direct, "outcomes": direct["acc"], "metric": "acc"}, where) if "acc" in direct else ways["direct"]
    }


def _answers(raw: dict[str, Any], where: str) -> Answers:
    outcomes = np.asarray(raw["outcomes"], dtype=float)
    if outcomes.ndim != 1 or not len(outcomes) or not np.isin(outcomes, (0.0, 1.0)).all():
        raise ValueError(f"{where}: expected a list of outcomes 0 or 1, one an item; TAX pairs right and wrong answers")
    strata, margins = raw.get("strata"), raw.get("margins")
    for name, values in (("doc_hashes", raw["doc_hashes"]), ("strata", strata), ("margins", margins)):
        if values is not None and len(values) != len(outcomes):
            raise ValueError(f"{where}: {len(outcomes)} outcomes but {len(values)} {name}; expected as many")
    return Answers(
        outcomes.astype(bool),
        tuple(raw["doc_hashes"]),
        float(raw.get("chance") or 0.0),
        None if strata is None else np.asarray(strata),
        None if margins is None else np.asarray(margins, dtype=float),
        str(raw.get("metric") or ""),
    )


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run of one seed: what it is, what it logged (one dictionary a step), its evaluations by epoch."""

    name: str
    label: str
    method: str
    beta: float | None
    metrics: list[dict[str, float]]
    evaluations: dict[int, Path]
    complete: dict[str, Any]
    weight: float | None = None
    """Lambda of a joint run: the weight of the preference objective."""
    evaluate_every: int | None = None
    """Steps between a joint run's evaluations of both objectives, where it has such."""
    judged: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What `ogdopt judge` found, by epoch: answers/epoch-<n>/judge.json."""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one logged quantity; empty lists where it was not logged."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row[STEP] for row in rows], [row[key] for row in rows]

    def at_epoch(self, key: str, epoch: float) -> float | None:
        """The value of a held-out measurement at an epoch's end; None where none was taken within 2% of an epoch of it."""
        rows = [row for row in self.metrics if row.get(key) is not None and row.get(EPOCH) is not None]
        nearest = min(rows, key=lambda row: abs(row[EPOCH] - epoch), default=None)
        return nearest[key] if nearest is not None and abs(nearest[EPOCH] - epoch) <= 0.02 else None


@dataclass(frozen=True, eq=False)
class SeedRuns:
    """One repetition of the study: the supervised model's evaluation and the finished preference runs."""

    seed: int
    reference: Path  # the folder of the supervised stage, where nothing was evaluated
    supervised: dict[str, Any]  # its complete.json; empty without supervised training
    runs: dict[str, Run]
    optima: dict[str, float] | None = None  # least value of each objective of the joint runs
    rewards: dict[str, Run] = field(default_factory=dict)  # reward models, which are measured on held-out pairs alone


@dataclass(frozen=True, eq=False)
class Study:
    """All that a report needs from a study's directory."""

    directory: Path
    config: dict[str, Any]
    seeds: list[SeedRuns]
    incomplete: list[str]

    @property
    def folder(self) -> StudyFolder:
        """Where its files lie."""
        return StudyFolder(self.directory)

    @property
    def runs(self) -> dict[str, Run]:
        """One run of each name, by method (OGD last, as in the paper's table) and falling beta."""
        found = {name: run for seed in self.seeds for name, run in seed.runs.items()}
        methods = list(dict.fromkeys(run.method for run in found.values()))

        def order(run: Run) -> tuple:
            last = LAST.index(run.method) if run.method in LAST else -1
            return last, methods.index(run.method), run.weight or 0, run.evaluate_every or 0, -(run.beta or 0), run.name

        return {run.name: run for run in sorted(found.values(), key=order)}


def read_study(directory: str | Path, evaluated: bool = True) -> Study:
    """Read `runs/<study>`, runs that are finished and (unless `evaluated` is False) whose models were evaluated.

    Raises ValueError where there is nothing to report on, or a file is not what it should be.
    """
    home = StudyFolder(Path(directory))
    folders = home.seeds()
    if not folders:
        raise ValueError(f"{directory} holds no seed-<k> folder; expected the directory of a study that `ogdopt run` has made")
    incomplete: list[str] = []
    config = home.settings()
    settings = config.get("config") or config
    needed = (settings.get("evals") or {}).get("epochs", "all") if evaluated else "none"
    read = [_read_seed(folder, incomplete, settings, needed) for folder in folders]
    seeds = [seed for seed in read if seed is not None]
    incomplete += _never_started(config, seeds, incomplete)
    if not any(seed.runs for seed in seeds):
        raise ValueError(
            f"{directory} holds no finished run ({'; '.join(incomplete) or 'no runs at all'}); finish the study first"
        )
    return Study(home.path, config, [seed for seed in seeds if seed.runs], incomplete)


def _read_seed(folder: SeedFolder, incomplete: list[str], config: dict[str, Any], needed: str) -> SeedRuns | None:
    runs, rewards = _read_runs(folder, incomplete, needed)
    supervised = folder.supervised
    evaluations, ending = supervised.evaluations(), supervised.ending()
    interrupted = not ending and supervised.metrics.exists()
    last = int(ending.get(EPOCHS) or 0)
    if needed == "none" or (evaluations and not interrupted and max(evaluations) >= last):
        found = read_json(folder.optima) if folder.optima.exists() else None
        optima = (config.get("joint") or {}).get("optima") or found
        reference = evaluations[max(evaluations)] if evaluations else supervised.path
        return SeedRuns(folder.number, reference, ending, runs, optima, rewards)
    missing = supervised.complete.name if interrupted else supervised.evaluation(last or "<n>").name
    if runs:
        raise ValueError(
            f"{supervised.path} has no {missing} for the supervised model that {', '.join(runs)} started from, and TAX "
            "compares with it; run the supervised stage and its evaluation again"
        )
    incomplete.append(f"{folder.name}/{supervised.name}: {missing} is missing, so nothing of this seed can be compared")
    return None


def _read_runs(folder: SeedFolder, incomplete: list[str], needed: str) -> tuple[dict[str, Run], dict[str, Run]]:
    """A seed's finished runs by name: of policies, and of reward models. Others are named in `incomplete`."""
    runs: dict[str, Run] = {}
    rewards: dict[str, Run] = {}
    for run in folder.runs():
        reward = (run.settings().get("run") or {}).get("kind") == "reward"
        reason = _unfinished(run, "none" if reward else needed)
        if reason is None:
            (rewards if reward else runs)[run.name] = _read_run(run)
        else:
            incomplete.append(f"{folder.name}/{run.name}: {reason}")
    return runs, rewards


def _never_started(config: dict[str, Any], seeds: list[SeedRuns], incomplete: list[str]) -> list[str]:
    """Runs that other seeds have, and seeds that the configuration asks for, without even a folder."""
    named = {line.partition(":")[0] for line in incomplete}
    missing = [
        f"seed-{seed.seed}/{name}" for seed in seeds for name in sorted({n for s in seeds for n in s.runs} - set(seed.runs))
    ]
    asked = ((config.get("config") or config).get("study") or {}).get("seeds") or []
    begun = {seed.seed for seed in seeds} | {int(name[5:].partition("/")[0]) for name in named}
    missing += [f"seed-{seed}" for seed in asked if seed not in begun]
    return [f"{name}: not started" for name in missing if name not in named]


def _unfinished(run: RunFolder, needed: str) -> str | None:
    """Why a run cannot be reported, or None; `needed` are the epochs that have to be evaluated: all, last or none."""
    if not run.config.exists():
        return f"no {run.config.name}, it never started"
    if not run.finished:
        return f"no {run.complete.name}, training was not finished"
    if needed == "none":
        return None
    epochs = {*run.models(), *range(1, int(run.ending().get(EPOCHS) or 0) + 1)}
    missing = sorted({max(epochs, default=1)} if needed == "last" else epochs)
    missing = [epoch for epoch in missing if epoch not in run.evaluations()]
    if missing or not epochs:
        return f"epoch {', '.join(map(str, missing)) or '1'} is not evaluated"
    return None


def _read_run(run: RunFolder) -> Run:
    what = run.settings().get("run") or {}
    if "method" not in what:
        raise ValueError(f"{run.config} does not say which method ran (run.method); expected the file written before step 0")
    beta = what.get("beta")
    return Run(
        run.name,
        str(what.get("label") or what.get("name") or run.name),
        str(what["method"]),
        None if beta is None else float(beta),
        run.lines(),
        {epoch: file for epoch, file in run.evaluations().items() if epoch > 0},
        run.ending(),
        weight=what.get("lambda"),
        evaluate_every=what.get("evaluate_every"),
        judged=run.judged(),
    )
