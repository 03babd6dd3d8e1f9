"""What a run would do, without doing it: no weights are loaded, and nothing is written that stays.

Settings, data and tokenizer are checked as a run checks them; all mistakes are told together at the end. What cannot be reached
from here (the hub, offline) is named as not checked, and the rest goes on: rows without a tokenizer are checked and counted,
and `model.architecture` stands for a model whose configuration is not at hand.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from rich.console import Console

from ogdopt_harness.common.run_folder import SUPERVISED, StudyFolder
from ogdopt_harness.common.tables import NONE, Table, size
from ogdopt_harness.config.located import located
from ogdopt_harness.config.schema import Config, DataConfig, StageConfig
from ogdopt_harness.data.examples import DataReport, Example, Kind, Part, load_preferences, load_sft, texts
from ogdopt_harness.data.preview import CLOSE, OPEN, groups, histogram, marked
from ogdopt_harness.data.rows import Problem, rows
from ogdopt_harness.data.world import make_world
from ogdopt_harness.evaluation.suite import local_tasks, official_tasks, quiet
from ogdopt_harness.modeling.build import architecture, check_positions, fitted
from ogdopt_harness.modeling.memory import (
    PARTS,
    SIZES,
    Load,
    Shape,
    copies,
    largest_moment,
    parts,
    precision_warning,
    shape_of,
    trained_parameters,
)
from ogdopt_harness.modeling.pretrained import read_config
from ogdopt_harness.modeling.tokenizer import load_tokenizer, train_tokenizer
from ogdopt_harness.pipeline.preflight import preflight
from ogdopt_harness.training.job import Plan
from ogdopt_harness.training.methods import METHODS, RunSpec
from ogdopt_harness.training.trainer import schedule

SHOWN = 2  # rows shown of each data set


def dry_run(config: Config, world_size: int, say: Callable[[str], None] = print) -> None:
    """Check a study and say what it would take on `world_size` processes. Raises ValueError with every mistake found."""
    transformers.utils.logging.set_verbosity_error()
    with TemporaryDirectory() as scratch:
        DryRun(config, world_size, say, Path(scratch)).run()


@dataclass
class Rows:
    """What is known of one data set: its examples, or only how many rows there are."""

    winners: int
    losers: int
    paired: bool
    examples: list[tuple[Example, ...]] = field(default_factory=list)
    """(chosen, rejected) of each pair, or one example each; none where there was no tokenizer."""

    def lengths(self) -> list[int]:
        """Tokens of every sequence, prompt and completion."""
        return [len(e.prompt_ids) + len(e.completion_ids) for group in self.examples for e in group]


class DryRun:
    """One pass over a study's settings."""

    def __init__(self, config: Config, world_size: int, say: Callable[[str], None], scratch: Path) -> None:
        self.given, self.world_size, self.say, self.scratch = config, world_size, say, scratch
        self.mistakes: list[str] = []
        self.unchecked: list[str] = []
        self.specs = preflight(config)
        self.config = located(config, str(scratch / "data"), config.study.seeds[0])
        self.tokenizer: Any = None
        self.outline: Any = None
        self.rows: dict[tuple[Kind, Part], Rows] = {}
        self.shape: Shape | None = None
        self.trained: dict[Kind, int] = {}

    def run(self) -> None:
        """All checks in turn."""
        self.overview()
        if self.config.world is not None:
            make_world(self.config.world, self.scratch / "data")
        with self.collecting("tokenizer, templates, lengths", "give a local folder with --model.tokenizer_name_or_path FOLDER"):
            self.tokenizer = self.get_tokenizer()
        if self.tokenizer is not None:
            with self.collecting("model, its weights and vocabulary", "give a local folder with --model.model_name_or_path"):
                self.outline = fitted(self.config.model, self.tokenizer)
        for kind, stage, data in self.sources():
            self.data(kind, stage, data)
        self.evaluation()
        self.schedule()
        with self.collecting("memory"):
            self.memory()
        self.files()
        if self.unchecked:
            self.title("Not checked (with a network it will be; HF_HUB_OFFLINE=1 spares the waiting)")
            for what in self.unchecked:
                self.say(f"- {what}")
        if self.mistakes:
            raise ValueError("\n".join(self.mistakes))
        self.say("\nnothing was written; without --dry_run the same command runs it")

    def title(self, text: str) -> None:
        self.say(f"\n{text}\n{'-' * len(text)}")

    @contextmanager
    def collecting(self, what: str, without: str = "") -> Iterator[None]:
        """Keep a mistake for the end; name what is out of reach, and what goes unchecked for it."""
        try:
            yield
        except ValueError as error:
            if out_of_reach(error):
                reason = str(error).partition(";")[0]
                self.unchecked.append(f"{what}: {reason}{'; ' + without if without else ''}")
                self.say(f"{what}: out of reach from here, not checked")
            elif str(error) not in self.mistakes:  # the same rows may be read twice, for the tokenizer and for themselves
                self.mistakes.append(str(error))

    # ---- what is to be run ------------------------------------------------------------------------------------------------

    def overview(self) -> None:
        config = self.given
        self.title("Study")
        start = config.model.model_name_or_path or f"a fresh {config.model.architecture.get('model_type')}"
        stage = "supervised stage, then " if config.sft.data.train else ""
        self.say(f"{config.study.name}: {stage}{', '.join(spec.name for spec in self.specs)}, from {start}")
        seeds = ", ".join(map(str, config.study.seeds))
        self.say(f"seeds {seeds}; device {config.device}; {self.world_size} process{'es' * (self.world_size > 1)}")
        for name, stage_config in self.stages():
            if warning := precision_warning(config.model, stage_config):
                self.say(f"warning, {name}: {warning}")

    def stages(self) -> list[tuple[Kind, StageConfig]]:
        """The stages that train, with their settings."""
        sft: list[tuple[Kind, StageConfig]] = [("sft", self.config.sft)] if self.config.sft.data.train else []
        return [*sft, ("preference", self.config.preference)]

    def sources(self) -> Iterator[tuple[Kind, StageConfig, DataConfig]]:
        """All rows that are trained on, with the stage whose settings hold for them."""
        yield "sft", self.config.sft, self.config.sft.data
        yield "preference", self.config.preference, self.config.preference.data
        if self.config.joint.data is not None:
            yield "joint", self.config.preference, self.config.joint.data

    # ---- data -------------------------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The study's tokenizer, loaded, or trained as the study would train it."""
        model = self.config.model
        if model.words is not None:
            return load_tokenizer(model.words, model.chat_template)
        found = (t for kind, _, data in self.sources() if data.train for t in texts(data, "train", kind))
        return train_tokenizer(found, model, self.scratch / "tokenizer")

    def data(self, kind: Kind, stage: StageConfig, data: DataConfig) -> None:
        """Check the rows of both parts, and show what of them is trained on and how long they are."""
        if kind != "sft" and not data.train:
            self.mistakes.append(f"{kind}.data.train is empty; expected JSONL files, folders or data sets of the hub")
        for part in ("train", "eval"):
            option = f"{kind}.data.{part}"
            if not getattr(data, part):
                continue
            self.title(option)
            with self.collecting("rows", f"give local files with --{option} FILE"):
                if self.tokenizer is None:
                    self.rows[kind, part] = self.untokenized(kind, part, data)
                else:
                    self.rows[kind, part] = self.tokenized(kind, part, data)
                    if part == "train":
                        self.show(self.rows[kind, part], stage.train_on_prompt)

    def tokenized(self, kind: Kind, part: Part, data: DataConfig) -> Rows:
        if kind != "preference":
            examples, report = load_sft(data, self.tokenizer, part, kind)
            self.say(report.summary())
            self.check_positions(report)
            return Rows(len(examples), 0, False, [(example,) for example in examples])
        found, report = load_preferences(data, self.tokenizer, part)
        self.say(report.summary())
        self.check_positions(report)
        return Rows(len(found.winners), len(found.losers), found.paired, groups(found))

    def check_positions(self, report: DataReport) -> None:
        """Whether the model reads rows of this length."""
        if self.outline is not None:
            check_positions(self.outline, report.longest, report.option)

    def untokenized(self, kind: Kind, part: Part, data: DataConfig) -> Rows:
        """The rows' form alone: what a tokenizer would add (lengths, templates, empty completions) is not known."""
        winners, losers, paired, problems, shown, sizes = 0, 0, False, 0, [], []
        for row in rows(data, part, kind):
            if isinstance(row, Problem):
                problems += 1
                if problems <= SHOWN:
                    shown.append(f"  {row}")
                continue
            paired |= len(row.answers) == 2
            winners += row.label is not False
            losers += len(row.answers) == 2 or row.label is False
            sizes.append(len(str(row.prompt or "")) + max(map(len, row.answers)))
        if problems and data.on_bad_row == "error":
            raise ValueError("\n".join([f"{kind}.data.{part}: {problems:,} rows cannot be used", *shown]))
        self.say(
            f"{kind}.data.{part}: {len(sizes):,} rows in a known form, {problems:,} left out; without a tokenizer their lengths"
        )
        self.say(f"in tokens are not known. Characters of a prompt and its longest answer:\n{histogram(sizes, 'characters')}")
        return Rows(winners, losers, paired)

    def show(self, found: Rows, on_prompt: bool) -> None:
        self.say(f"\nthe loss looks at what stands in {OPEN} {CLOSE}:")
        for group in found.examples[:SHOWN]:
            for name, example in zip(("chosen", "rejected") if len(group) == 2 else ("",), group, strict=True):
                self.say(f"  {name + ': ' if name else ''}{marked(self.tokenizer, example, on_prompt)}")
        self.say(f"\ntokens of a sequence:\n{histogram(found.lengths(), 'tokens')}")

    def evaluation(self) -> None:
        """Check the benchmarks' files."""
        evals = self.config.evals
        if not (evals.tasks or evals.lm_eval_tasks or evals.style):
            return
        self.title("Evaluation of every epoch")
        with self.collecting("benchmarks"):
            if found := local_tasks(evals):
                self.say(", ".join(f"{name} ({len(task.eval_docs):,} items)" for name, task in found.items()))
        with self.collecting("official benchmarks", "evals.lm_eval_data names a folder to read them from"), quiet():
            if evals.lm_eval_tasks:
                official_tasks(tuple(evals.lm_eval_tasks), evals.lm_eval_data)
                self.say(f"official tasks: {', '.join(evals.lm_eval_tasks)}")

    # ---- steps ------------------------------------------------------------------------------------------------------------

    def plan(self, kind: Kind, stage: StageConfig) -> Plan | None:
        """The steps of a stage, if its rows could be counted."""
        found = self.rows.get((kind, "train"))
        return found and Plan(found.winners, found.losers, found.paired, stage, stage.seed)

    def schedule(self) -> None:
        """Steps of an epoch, batches, and the learning rate on the way."""
        self.title("Steps")
        for kind, stage in self.stages():
            own = math.ceil(stage.train_batch_size / self.world_size)
            micro = min(own, stage.per_device_train_batch_size)
            self.say(
                f"{kind}: {stage.optimizer}, {stage.train_batch_size} examples a step, {own} a process in "
                f"{math.ceil(own / micro)} micro-batch(es) of at most {micro}; max_grad_norm {stage.max_grad_norm}"
            )
            if stage.train_batch_size < self.world_size:
                self.mistakes.append(
                    f"{kind}.train_batch_size is {stage.train_batch_size} on {self.world_size} processes; expected one example "
                    "or more for each: take a larger batch or fewer processes"
                )
            plan = self.plan(kind, stage)
            if plan is None:
                self.say(f"  steps unknown without the rows; {stage.num_train_epochs} epoch(s), {stage.lr_scheduler_type}")
                continue
            rows = self.rows[kind, "train"]
            known = "" if rows.examples else ", at most: rows that are too long are not known yet"
            warmup = stage.warmup(plan.steps)
            self.say(f"  {plan.steps_per_epoch:,} steps an epoch, {plan.steps:,} in all{known}")
            self.say(
                f"  {stage.lr_scheduler_type}, warm-up {warmup:,}; learning rate "
                + ", ".join(f"{rate:.3g} at step {step:,}" for step, rate in rates(stage, plan.steps))
            )
            if warmup >= plan.steps:
                self.say(f"  warning, {kind}: the warm-up takes {warmup:,} steps and the run ends after {plan.steps:,}")

    # ---- memory and files -------------------------------------------------------------------------------------------------

    def architecture(self) -> Any:
        """The model's architecture, from the recipe or from the model's own configuration file."""
        model = self.config.model
        if model.architecture:
            return architecture(model, None if self.tokenizer is None else len(self.tokenizer))
        if model.model_name_or_path is None:
            raise ValueError("model.architecture is empty and model.model_name_or_path null; give one of them")
        return read_config(model.model_name_or_path, "model.model_name_or_path")

    def memory(self) -> None:
        """A table of bytes by part: a column for the supervised stage and for each kind of method."""
        model, accelerator = self.config.model, self.config.device != "cpu"
        architecture = self.architecture()
        self.trained = {kind: trained_parameters(architecture, model.at_stage(kind)) for kind, _ in self.stages()}
        self.shape = shape_of(architecture)  # last: what follows goes by it
        columns: dict[str, dict[str, int]] = {}
        for kind, stage in self.stages():
            for name, two, together in [("sft", False, 1)] if kind == "sft" else kinds_of(self.specs):
                found = self.rows.get((kind, "train"))
                lengths = found.lengths() if found else []
                micro = min(stage.per_device_train_batch_size, math.ceil(stage.train_batch_size / self.world_size))
                tokens = max(lengths, default=stage.data.max_length)
                scored = min(micro * together * tokens, self.most_scored(kind, micro * together, stage.train_on_prompt))
                load = Load(two, micro * together, tokens, scored, self.world_size)
                title = SUPERVISED if kind == "sft" else name
                columns[title] = parts(self.shape, self.trained[kind], model, stage, load, accelerator)
        self.title("Memory of a process")
        self.say(
            f"{self.shape.parameters:,} parameters in {model.dtype}; trained are "
            + ", ".join(f"{count:,} ({kind})" for kind, count in self.trained.items())
            + f"; {self.world_size} process{'es' * (self.world_size > 1)}; the longest sequences of a micro-batch together"
        )
        names = [name for name in PARTS if any(name in column for column in columns.values())]
        body = [[name, *(size(column[name]) if name in column else NONE for column in columns.values())] for name in names]
        body.append(["at most together", *(size(largest_moment(column)) for column in columns.values())])
        Table("", ["part", *columns], body, strong=frozenset({len(names)})).show(Console())

    def most_scored(self, kind: Kind, sequences: int, on_prompt: bool) -> int:
        """Scored tokens of the longest completions that can meet in a micro-batch."""
        found = self.rows.get((kind, "train"))
        if not found or not found.examples:
            stage = self.config.sft if kind == "sft" else self.config.preference
            return sequences * stage.data.max_length
        scored = [len(e.completion_ids) + on_prompt * len(e.prompt_ids) for group in found.examples for e in group]
        return sum(sorted(scored, reverse=True)[:sequences])

    def files(self) -> None:
        """What would be written where, and whether there is room for it."""
        self.title("Files")
        config, home = self.given, self.given.study.directory
        number = SIZES[config.model.dtype]
        one = number * self.shape.parameters if self.shape else None
        total, largest = 0, 0
        folder = StudyFolder(home)
        for kind, stage in self.stages():
            state = number * self.trained[kind] * (1 + copies(stage)) if self.shape else None
            each = f" of {size(one)}" if one else ""
            for name in [SUPERVISED] if kind == "sft" else [spec.name for spec in self.specs]:
                kept = stage.num_train_epochs if stage.export == "all" else 1
                run = folder.seed("K").run(name)
                model = run.model(f"1 to {stage.num_train_epochs}" if kept > 1 else stage.num_train_epochs)
                self.say(
                    f"{run.path}/: {run.config.name}, {run.metrics.name}, {model.relative_to(run.path)}{each}, "
                    f"{run.checkpoints.name}/ (the last two{f', of {size(state)}' if state else ''}), {run.complete.name}"
                )
                if one is not None and state is not None:
                    total += len(config.study.seeds) * (one * kept + 2 * state)
                    largest = max(largest, state)
        files = [folder.config]
        files += [folder.page, folder.text, folder.results] if config.evals.tasks or config.evals.lm_eval_tasks else []
        self.say(f"{home}/: {', '.join(file.name for file in files)}")
        there = next(folder for folder in (home.resolve(), *home.resolve().parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        if self.shape:  # a third checkpoint lies next to the last two while it is written
            enough = "enough" if free > total + largest else "NOT ENOUGH"
            self.say(
                f"weights and states, {len(config.study.seeds)} seed(s): {size(total + largest)}; {size(free)} free, {enough}"
            )
        if home.exists():
            self.say(f"{home} is there already: a run in it goes on, or is refused where its settings differ")


# ---- pieces ---------------------------------------------------------------------------------------------------------------


def out_of_reach(error: BaseException | None) -> bool:
    """Whether an error comes from a network that is not there."""
    while error is not None:
        if isinstance(error, ConnectionError) or type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
            return True
        error = error.__cause__ or error.__context__
    return False


def rates(stage: StageConfig, steps: int) -> list[tuple[int, float]]:
    """(step, learning rate) at the first step, after the warm-up, in the middle and at the last, as runs have it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=stage.learning_rate)
    factor = schedule(stage, optimizer, steps).lr_lambdas[0]  # type: ignore[attr-defined]
    shown = sorted({1, min(stage.warmup(steps) + 1, steps), steps // 2 + 1, steps})
    return [(step, stage.learning_rate * factor(step - 1)) for step in shown]


def kinds_of(specs: Sequence[RunSpec]) -> list[tuple[str, bool, int]]:
    """(names, two gradients?, sequences scored together a row) of the methods that need the same memory."""
    found: dict[tuple[bool, int], list[str]] = {}
    for spec in specs:
        method = METHODS[spec.method]
        names = found.setdefault((method.two_gradients, 2 if method.pairwise else 1), [])
        if spec.method not in names:
            names.append(spec.method)
    return [(", ".join(names), two, together) for (two, together), names in found.items()]
