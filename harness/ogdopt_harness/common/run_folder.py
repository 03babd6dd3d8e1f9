"""Where everything of a study lies: the one place that knows the names of files and folders, for writers and for readers.

    <study>/                      config.yaml, report.html, report.md, results.json, gaps.md, gaps.json, figures/
    <study>/seed-<k>/             data/, tokenizer/, data_files.json, data_report.json, lock
    <study>/seed-<k>/<run>/       config.yaml, metrics.jsonl, reference.safetensors, checkpoint/, model/epoch-<n>/,
                                  evals/epoch-<n>.json, answers/epoch-<n>/, complete.json (written last)
    <study>/seed-<k>/optima/      a run for each objective, optima.json

Reading raises ValueError, with the file's name, for a file that is not what it should be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ogdopt_harness.common.files import DamagedError, digest, read_json, read_saved, read_yaml, sealed, write_json, write_yaml
from ogdopt_harness.common.keys import EPOCHS, STEP, STEPS

METRICS = "metrics"
"""Of `complete.json`: bytes and sha256 of metrics.jsonl."""
NUMBERED = re.compile(r"(?:seed|epoch)-(\d+)")
SUPERVISED = "supervised"
"""The run that all methods start from."""
GENERIC = ("model", "evals", "answers")
"""Folders that every run has."""


@dataclass(frozen=True)
class Folder:
    """A folder that says in `config.yaml` what it was made with."""

    path: Path

    @property
    def name(self) -> str:
        """Its own name, without the folders above."""
        return self.path.name

    @property
    def config(self) -> Path:
        """Settings, versions, machine, commit and command; written before anything else."""
        return self.path / "config.yaml"

    def settings(self) -> dict[str, Any]:
        """What `config` holds; empty where it is not there."""
        return read_yaml(self.config)

    def write_settings(self, value: dict[str, Any]) -> None:
        """Write `config`."""
        write_yaml(self.config, value)


@dataclass(frozen=True)
class RunFolder(Folder):
    """One training run, its models, and what was asked of them."""

    @property
    def metrics(self) -> Path:
        """One JSON object a line: what was logged at a step."""
        return self.path / "metrics.jsonl"

    @property
    def reference(self) -> Path:
        """Log-probabilities of the starting model."""
        return self.path / "reference.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The last states that training goes on from."""
        return self.path / "checkpoint"

    @property
    def complete(self) -> Path:
        """How training ended; written last."""
        return self.path / "complete.json"

    def model(self, epoch: int | str) -> Path:
        """The exported model of an epoch, a Hugging Face folder."""
        return self.path / "model" / f"epoch-{epoch}"

    def evaluation(self, epoch: int | str) -> Path:
        """What an epoch's model answered to the benchmarks."""
        return self.path / "evals" / f"epoch-{epoch}.json"

    def answers(self, epoch: int) -> AnswersFolder:
        """An epoch's answers to prompts, and what a judge found."""
        return AnswersFolder(self.path / "answers" / f"epoch-{epoch}")

    def models(self) -> list[int]:
        """Epochs whose model was exported."""
        return sorted(_numbered(self.path / "model"))

    def evaluations(self) -> dict[int, Path]:
        """The evaluations there are, by epoch."""
        return _numbered(self.path / "evals", ".json")

    def judged(self) -> dict[int, dict[str, Any]]:
        """What judges found, by epoch."""
        folders = {epoch: AnswersFolder(path) for epoch, path in _numbered(self.path / "answers").items()}
        return {epoch: read_json(folder.judged) for epoch, folder in folders.items() if folder.judged.exists()}

    @property
    def finished(self) -> bool:
        """Whether training has ended."""
        return self.complete.is_file()

    def ending(self) -> dict[str, Any]:
        """What `complete` holds; empty where training has not ended."""
        return read_json(self.complete, {EPOCHS: int, STEPS: int}) if self.finished else {}

    def finish(self, ending: dict[str, Any]) -> None:
        """Write `complete`, with size and hash of the metrics that belong to it."""
        logged = {METRICS: [self.metrics.stat().st_size, digest(self.metrics)]} if self.metrics.exists() else {}
        write_json(self.complete, sealed(ending | logged))

    def check(self) -> None:
        """Raises DamagedError where a finished run's metrics are not those that it ended with."""
        if (kept := self.ending().get(METRICS)) is None:
            return
        remedy = f"bring it back, or delete {self.path} and give the same command again"
        if not self.metrics.is_file():
            raise DamagedError(f"{self.metrics} is missing, and the run has ended; {remedy}")
        if [self.metrics.stat().st_size, digest(self.metrics)] != kept:
            raise DamagedError(
                f"{self.metrics} has been changed since the run ended ({self.metrics.stat().st_size:,} bytes, expected "
                f"{kept[0]:,}, or another content); {remedy}"
            )

    def lines(self) -> list[dict[str, float]]:
        """The logged lines, merged by step (a resumed run may log a step twice: the later line counts)."""
        self.check()
        steps: dict[float, dict[str, float]] = {}
        lines = read_saved(self.metrics).splitlines() if self.metrics.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                steps.setdefault(float(row[STEP]), {}).update(row)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{self.metrics}, line {number}: expected a JSON object with {STEP!r}, found {line[:60]!r}; remove the line"
                ) from error
        return [steps[step] for step in sorted(steps)]


@dataclass(frozen=True)
class AnswersFolder(Folder):
    """A model's answers to the prompts of a benchmark."""

    @property
    def answers(self) -> Path:
        """One answer a line."""
        return self.path / "answers.jsonl"

    @property
    def judged(self) -> Path:
        """What a judge found."""
        return self.path / "judge.json"


@dataclass(frozen=True)
class SeedFolder(Folder):
    """One repetition of a study."""

    @property
    def number(self) -> int:
        """The seed."""
        return number_of(self.path)

    @property
    def lock(self) -> Path:
        """Who runs here."""
        return self.path / "lock"

    @property
    def data(self) -> Path:
        """The files of a world that is made here."""
        return self.path / "data"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all models, where the study has its own."""
        return self.path / "tokenizer"

    @property
    def data_files(self) -> Path:
        """Sizes and hashes of the data that the study was begun with."""
        return self.path / "data_files.json"

    @property
    def data_report(self) -> Path:
        """How many rows were used, and why others were not."""
        return self.path / "data_report.json"

    @property
    def supervised(self) -> RunFolder:
        """The run that all methods start from."""
        return self.run(SUPERVISED)

    def run(self, name: str) -> RunFolder:
        """The run of one method."""
        return RunFolder(self.path / name)

    def optimum(self, objective: str) -> RunFolder:
        """The run that minimizes one objective alone."""
        return RunFolder(self.optima.parent / objective)

    @property
    def optima(self) -> Path:
        """The least value of each objective of joint runs."""
        return self.path / "optima" / "optima.json"

    def runs(self) -> Iterator[RunFolder]:
        """The methods' runs, finished or not, by name."""
        others = {self.data, self.tokenizer, self.supervised.path, self.optima.parent}
        for path in sorted(self.path.iterdir()):
            if path.is_dir() and path not in others:
                yield RunFolder(path)


@dataclass(frozen=True)
class StudyFolder(Folder):
    """A study: its repetitions, and what was made of them all."""

    def seed(self, number: int | str) -> SeedFolder:
        """One repetition."""
        return SeedFolder(self.path / f"seed-{number}")

    def seeds(self) -> list[SeedFolder]:
        """The repetitions that were begun, by seed."""
        folders = [path for path in self.path.glob("seed-*") if path.is_dir() and NUMBERED.fullmatch(path.name)]
        return [SeedFolder(path) for path in sorted(folders, key=number_of)]

    @property
    def page(self) -> Path:
        """The report for a browser."""
        return self.path / "report.html"

    @property
    def text(self) -> Path:
        """The report as Markdown."""
        return self.path / "report.md"

    @property
    def results(self) -> Path:
        """The report's numbers."""
        return self.path / "results.json"

    @property
    def figures(self) -> Path:
        """The report's figures."""
        return self.path / "figures"

    @property
    def gaps(self) -> Path:
        """Gaps of joint runs, where no benchmark was asked for; the numbers are beside it, in JSON."""
        return self.path / "gaps.md"


def partial(evaluation: Path, digest: str) -> Path:
    """The answers that an interrupted evaluation of a model with these settings has so far."""
    return evaluation.with_name(f"{evaluation.stem}.partial-{digest}.jsonl")


def answers_of(path: Path) -> AnswersFolder:
    """The folder that a path means: itself, or the one that an answers' file lies in."""
    return AnswersFolder(path if path.is_dir() else path.parent)


def short_name(path: Path) -> str:
    """A model's or an evaluation's name in tables: its last folders, without those that every run has.

    >>> short_name(Path("runs/mine/seed-0/ogd/model/epoch-3")), short_name(Path("models/sft-v0.3"))
    ('ogd/epoch-3', 'sft-v0.3')
    """
    words: Sequence[str] = Path(str(path).removesuffix(".json")).parts
    parts = [part for part in words if part not in (*GENERIC, "/", "..")]
    return "/".join(parts[-2:] if NUMBERED.fullmatch(parts[-1]) else parts[-1:]) if parts else str(path)


def number_of(path: Path) -> int:
    """The number in seed-<k>, epoch-<n> or epoch-<n>.json."""
    return int(path.name.removesuffix(".json").rpartition("-")[2])


def _numbered(folder: Path, ending: str = "") -> dict[int, Path]:
    """epoch-<n> in a folder, with an ending, by n."""
    paths = (path for path in folder.glob(f"epoch-*{ending}") if NUMBERED.fullmatch(path.name.removesuffix(".json")))
    return {number_of(path): path for path in sorted(paths, key=number_of)}
