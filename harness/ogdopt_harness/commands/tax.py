"""TAX of any models against a reference: `ogdopt tax REFERENCE MODEL... [--config RECIPE] [--section.option value ...]`.

Each of them is a Hugging Face folder or hub id, which is evaluated; a run's directory, every evaluated epoch of which takes
part; or the file of an evaluation. The first is what the others are compared with, of a run its last epoch. By default the
paper's eight benchmarks are asked (`recipes/tax.yaml`). Under torchrun each process evaluates a share of every model's items.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ogdopt_harness.analysis.comparison import ASKED, plain
from ogdopt_harness.analysis.study_reader import Evaluation
from ogdopt_harness.analysis.tax import Tax, compare, difference, reduction, unanswered, verdict
from ogdopt_harness.commands.usage import Asked
from ogdopt_harness.common.device import device_name
from ogdopt_harness.common.files import write_json, write_text
from ogdopt_harness.common.ranks import Ranks, sharing
from ogdopt_harness.common.run_folder import RunFolder, short_name
from ogdopt_harness.common.sources import HUB_ID
from ogdopt_harness.common.tables import NONE, Table, interval, markdown_text, number, p_text, percent
from ogdopt_harness.config.located import located
from ogdopt_harness.config.schema import Config
from ogdopt_harness.evaluation.kept import fingerprint_of, settled
from ogdopt_harness.evaluation.suite import evaluate
from ogdopt_harness.pipeline.manifest import record


@dataclass(frozen=True)
class Subject:
    """One model that takes part: its name in tables, and its evaluation, or the model that has to be evaluated."""

    name: str
    evaluation: Path | None = None
    model: Path | None = None


def main(asked: Asked, reference: str, model: Sequence[str]) -> None:
    """Evaluate what has no evaluation yet, print the comparison, and write tax.md and tax.json into the study's directory."""
    config, named = asked.config, [reference, *model]
    with sharing() as ranks:
        directory = config.study.directory
        config = located(config, str(directory / "data"), 0)
        found = [subjects(word) for word in named]
        everyone = [found[0][-1], *(subject for group in found[1:] for subject in group)]
        if twice := {s.name for s in everyone if [other.name for other in everyone].count(s.name) > 1}:
            raise ValueError(f"tax: {', '.join(sorted(twice))} is named twice; expected different models")
        files = {subject.name: subject.evaluation or _evaluated(subject, config, directory, ranks) for subject in everyone}
        ranks.on_first(lambda: report(files, config, directory))


def report(files: Mapping[str, Path], config: Config, directory: Path) -> None:
    """Compare evaluations by name, the reference's first; write and print what was found."""
    comparison = Compared.of({name: Evaluation.read(file) for name, file in files.items()}, config)
    comparison.write(directory)
    comparison.show(directory)


def subjects(word: str) -> list[Subject]:
    """What a word on the command line stands for. Raises ValueError if it is none of these."""
    path = Path(word)
    if path.is_file():
        return [Subject(short_name(path), evaluation=path)]
    if evaluations := RunFolder(path).evaluations():
        return [Subject(f"{path.name}/epoch-{epoch}", evaluation=file) for epoch, file in evaluations.items()]
    if (path / "config.json").is_file():
        return [Subject(short_name(path), model=path)]
    if not path.exists() and HUB_ID.fullmatch(word) and "/" in word:
        return [Subject(word, model=path)]
    raise ValueError(
        f"tax: {word} is no Hugging Face folder (with config.json), no run with evals/epoch-<n>.json, no evaluation's file and "
        f"no hub id (looked in {Path.cwd()}); for a study name its runs: {word}/seed-0/ogd"
    )


def _evaluated(subject: Subject, config: Config, directory: Path, ranks: Ranks) -> Path:
    """The evaluation of a model, made now unless it is there and the model has not changed since."""
    assert subject.model is not None
    home = directory / re.sub(r"[^\w.-]+", "_", str(subject.model)).strip("_")
    output = RunFolder(home).evaluation(1)
    facts = {"name": subject.name, "kind": "evaluation", "method": "none", "model": str(subject.model)}
    ranks.on_first(lambda: record(home, {"evals": config.evals, "tokenizer": config.model.tokenizer_name_or_path}, facts))
    words = config.model.tokenizer_name_or_path
    tokenizer = Path(words) if words else None
    made = fingerprint_of(config.evals, subject.model, tokenizer)
    if not ranks.on_first(lambda: settled(output, made)):  # another machine may not see the first one's files
        if ranks.first:
            print(f"evaluating {subject.name}", flush=True)
        where: dict[str, Any] = {"run": subject.name, "epoch": 1, "seed_dir": None, "device": device_name(config.device)}
        evaluate(subject.model, config.evals, output, **where, progress=sys.stderr.isatty(), tokenizer=tokenizer, ranks=ranks)
    return output


@dataclass(frozen=True, eq=False)
class Compared:
    """Models against a reference, in every way in which the reference was asked."""

    reference: str
    evaluations: dict[str, Evaluation]
    taxes: dict[str, dict[str, Tax]]  # way -> model -> TAX
    warnings: list[str]
    confidence: float

    @classmethod
    def of(cls, evaluations: dict[str, Evaluation], config: Config) -> Compared:
        """From the evaluations, the reference's first. Raises ValueError where the models answered different questions."""
        (name, reference), *others = evaluations.items()
        warnings = [
            f"{other} was evaluated with other settings than {name}: {key} is {model.settings.get(key)!r}, not {value!r}"
            for other, model in others
            for key, value in reference.settings.items()
            if model.settings.get(key) != value and key != "truncated_prompts"
        ]
        taxes: dict[str, dict[str, Tax]] = {}
        samples, confidence = config.report.samples, config.report.confidence
        for way in reference.ways:
            skip = unanswered(reference, way)
            if all(task in skip for task, ways in reference.tasks.items() if way in ways):
                warnings.append(f"no TAX {ASKED.get(way, way)}: {name} answers no item of {', '.join(skip)}")
                continue
            taxes[way] = compare(reference, dict(others), way, samples, confidence, skip=skip)
            warnings += next(iter(taxes[way].values())).warnings
        return cls(name, evaluations, taxes, list(dict.fromkeys(warnings)), confidence)

    def sentences(self) -> Iterator[str]:
        """What the numbers say, also where that is: nothing."""
        for way, taxes in self.taxes.items():
            lead = "" if way == next(iter(self.taxes)) else f"{ASKED.get(way, way).capitalize()}: "
            yield from (lead + verdict(name, t) for name, t in taxes.items())

    def tables(self) -> Iterator[Table]:
        """TAX, what became of each task, and the models against the first of them, for each way of asking."""
        for way, taxes in self.taxes.items():
            title = f"TAX, {ASKED.get(way, way)}, against {self.reference}"
            rows = [
                [
                    name,
                    number(t.value, 4, unit="%"),
                    interval(t.low, t.high),
                    number(t.null_mean, unit="%"),
                    p_text(t.p_value),
                    f"{number(t.signed, sign=True, unit='%')} ± {number(t.signed_se)}",
                    "forgot" if t.detectable else "in the noise",
                ]
                for name, t in taxes.items()
            ]
            level = percent(self.confidence, 0)
            columns = ["model", "TAX", f"{level} interval", "null mean", "p", "signed change", "so it"]
            note = (
                "Mean relative loss of accuracy, gains counting nothing; 0 is nothing forgotten. Basic bootstrap interval over "
                "test items, one draw for all models. Null mean: what two equally good models score. Signed change: gains "
                "count too, ± standard error."
            )
            yield Table(title, columns, rows, note)
            yield self._tasks(way, taxes)
            if len(taxes) > 1:
                yield self._between(way, taxes)

    def _tasks(self, way: str, taxes: dict[str, Tax]) -> Table:
        rows = []
        for task, change in next(iter(taxes.values())).tasks.items():
            theirs = [t.tasks[task] for t in taxes.values()]
            cells = [f"{percent(c.q, 2)} (−{c.lost} +{c.gained})" for c in theirs]
            metric = self.evaluations[self.reference].tasks[task][way].metric or NONE
            rows.append([task, metric, str(change.n), percent(change.chance, 0), percent(change.p, 2), *cells])
        columns = ["benchmark", "metric", "n", "chance", self.reference, *taxes]
        note = "Accuracies; in brackets the items lost and gained against the reference."
        return Table(f"Per benchmark, {ASKED.get(way, way)}", columns, rows, note)

    def _between(self, way: str, taxes: dict[str, Tax]) -> Table:
        (first, base), *others = taxes.items()
        rows = []
        for name, t in others:
            gap, share = difference(t, base), reduction(t, base)
            ratio = [NONE, NONE]
            if share is not None:
                inside = f"{percent(share.value, 2)} {interval(100 * share.low, 100 * share.high, 1)}"
                ratio = [inside, percent(share.ceiling)]
            said = ("forgot less" if gap.value > 0 else "forgot more") if gap.excludes_zero else "noise"
            rows.append([name, f"{number(gap.value, sign=True)} {interval(gap.low, gap.high)}", said, *ratio])
        columns = ["model", f"TAX minus {first}'s, points", "", f"1 − TAX / {first}'s", "if nothing were forgotten"]
        note = (
            f"From joint draws. The ratio is left out unless {first}'s TAX is clearly below its own null: a ratio to noise "
            "says nothing. Last column: the ratio that a model which forgot nothing would show on average."
        )
        return Table(f"Against {first}, {ASKED.get(way, way)}", columns, rows, note)

    def write(self, directory: Path) -> None:
        """tax.md and tax.json, numbers and all."""
        sentences = [*self.sentences(), *(f"Warning: {warning}" for warning in self.warnings)]
        parts = [f"# TAX against {markdown_text(self.reference)}", "\n".join(f"- {markdown_text(s)}" for s in sentences)]
        for table in self.tables():
            parts += [f"## {markdown_text(table.title)}", table.markdown(), markdown_text(table.note)]
        write_text(directory / "tax.md", "\n\n".join(parts) + "\n")
        models = {
            name: {"file": e.file, "model": e.model, "versions": e.versions, "settings": e.settings}
            for name, e in self.evaluations.items()
        }
        found = {"reference": self.reference, "models": models, "warnings": self.warnings, "tax": plain(self.taxes)}
        write_json(directory / "tax.json", {**found, "confidence": self.confidence})

    def show(self, directory: Path) -> None:
        """The same on the terminal."""
        console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "160")))
        for table in self.tables():
            table.show(console)
        for sentence in self.sentences():
            console.print(Text(f"• {sentence}"))
        for warning in self.warnings:
            console.print(Text(f"! {warning}"))
        console.print(Text(f"Written: {directory / 'tax.md'}, {directory / 'tax.json'}", style="bold"), soft_wrap=True)
