"""The loop: collect -> combine -> clip -> step -> one metrics line; resumable at every step.

One loop serves the supervised stage and every method, in one process or many.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedModel, get_scheduler

from ogdopt import StepReport
from ogdopt.diagnostics import by_layer, entanglement
from ogdopt.gram import Gram
from ogdopt.objectives import SequentialObjective
from ogdopt.three_d import ThreeD, Thresholds
from ogdopt_harness.common import keys
from ogdopt_harness.common.files import DamagedError, digest
from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.common.run_folder import RunFolder
from ogdopt_harness.config.schema import StageConfig
from ogdopt_harness.modeling.export import export, model_card
from ogdopt_harness.training import checkpoints
from ogdopt_harness.training.exports import check_export
from ogdopt_harness.training.gradients import GradientSource
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.meter import Meter, utilization
from ogdopt_harness.training.progress import Bar, Signals, Speed, Stopped, stop_signals
from ogdopt_harness.training.scoring import Scorer
from ogdopt_harness.training.skipped import Skipped
from ogdopt_harness.training.step_record import StepRecord
from ogdopt_harness.training.trackers import Trackers


def train(
    job: Job,
    model: PreTrainedModel,
    tokenizer: Any,
    device: torch.device,
    bf16: bool = False,
    reference: Callable[[], PreTrainedModel] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Run a job to its end, or continue it: metrics.jsonl, checkpoint/, model/epoch-n and, last, complete.json.

    `reference` loads the reference model where that is not `model` itself; only its log-probabilities are kept. Raises Stopped
    after saving when the process is asked to stop (Ctrl-C, SIGTERM).
    """
    Trainer(job, model, tokenizer, device, bf16, reference, ranks).run()


class Trainer:
    """One training run while it lasts: a scorer, a source of gradients, the loop, its log and its files."""

    scorer_type = Scorer

    def __init__(
        self,
        job: Job,
        model: PreTrainedModel,
        tokenizer: Any,
        device: torch.device,
        bf16: bool = False,
        reference: Callable[[], PreTrainedModel] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.job, self.device, self.ranks = job, device, ranks
        self.scorer = self.scorer_type(job, model, tokenizer, device, bf16, reference, ranks)
        self.source = GradientSource(job, self.scorer)
        self.method, self.optimizer = self.scorer.method, self.source.optimizer
        self.plan = job.plan
        self.scheduler = schedule(job.config, self.optimizer, self.plan.steps)
        self.folder = RunFolder(job.directory)
        self.tensors: Gram | None = None
        """What the last step's two gradients were, tensor by tensor, where there were two."""
        self.watch = ThreeD(Thresholds(**job.preference.warn_at))
        run = "/".join(job.directory.parts[-2:])
        names = job.report_to if self.ranks.first else ()
        self.trackers = Trackers(names, job.project, run, job.directory, {"method": job.method} | job.recipe)

    def run(self) -> None:
        """Train from the last checkpoint, or from the start."""
        job, plan = self.job, self.plan
        job.directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(job.seed + 1_000_003 * self.ranks.rank)
        self.scorer.load_reference()
        progress = self._restored()
        if self._exports(progress) and not self.ranks.on_first(self._exported(progress).is_dir):
            lines = self.ranks.on_first(lambda: self.folder.metrics.read_text(encoding="utf-8").splitlines())
            self._export(progress, json.loads(lines[-1]))  # the run was stopped between its checkpoint and its model
        meter, speed = Meter(self.device), Speed()
        before = progress.skipped
        skipped = Skipped(job.config.max_skipped_steps, before, progress.step)
        bar = Bar(job.label, plan.steps, progress.step, self.ranks.first)
        with closing(self.trackers), bar, stop_signals() as asked:
            signals = Signals(self.ranks, asked)
            while progress.step < plan.steps and not progress.enough:
                with meter:
                    record = self.step(progress.step)
                progress.step += 1
                progress.seconds += speed.lap()
                epoch_ends, measured = self._epoch_ends(progress.step), self._measures(progress.step)
                line: dict[str, float] = {}
                if measured or progress.step % job.config.logging_steps == 0:
                    line, stop = self.line(record, signals, speed)
                    bar.show(progress.step, line)
                else:
                    stop = signals.look()
                    bar.advance(progress.step)
                if measured:
                    line |= self.scorer.measure() | self._layers()
                    progress.enough = self._enough(line)
                    epoch_ends = epoch_ends or bool(progress.enough)
                if line:
                    progress.skipped = before + self.optimizer.skipped_steps
                    skipped.look(progress.step, progress.skipped)
                    self._log({keys.STEP: progress.step, keys.EPOCH: progress.step / plan.steps_per_epoch} | line)
                due = job.config.save_steps and progress.step % job.config.save_steps == 0
                if epoch_ends or due or stop:
                    progress.costs = meter.added_to(progress.costs)
                    self._save(progress)
                if self._exports(progress):
                    self._export(progress, line)
                if stop:
                    raise Stopped(f"{job.directory} is saved at step {progress.step} of {plan.steps}", stop)
        progress.skipped = before + self.optimizer.skipped_steps
        skipped.look(progress.step, progress.skipped)
        if (said := skipped.end(job.label)) and self.ranks.first:
            tqdm.write(f"warning: {said}")
        done = {keys.STEPS: progress.step, keys.EPOCHS: math.ceil(progress.step / plan.steps_per_epoch)}
        done |= {keys.SECONDS: progress.seconds, keys.SKIPPED_STEPS: progress.skipped} | progress.costs
        done |= {keys.WARNINGS: self.watch.warnings} | ({keys.STOPPED: progress.enough} if progress.enough else {})
        self.ranks.on_first(lambda: self.folder.finish(done))

    def _restored(self) -> checkpoints.Progress:
        """Where the run stands: at its last checkpoint, everything restored, or at its start, measured once."""
        progress = checkpoints.restore(self.folder.checkpoints, self.source.trained, self.optimizer, self.scheduler, self.ranks)
        if progress is None:
            progress = checkpoints.Progress()
            self._truncate_metrics(0)
            self._log({keys.STEP: 0, keys.EPOCH: 0.0} | self.scorer.measure())
        else:
            self.ranks.on_first(lambda: self._check_metrics(progress))
            self._truncate_metrics(progress.metrics_bytes)
            for row in self.ranks.on_first(lambda: self.folder.metrics.read_text(encoding="utf-8").splitlines()):
                self.watch.read(json.loads(row))
            self.source.load_state_dict(progress.schedule)
        return progress

    def _enough(self, line: dict[str, float]) -> str:
        """Why this run may end before its last step; "" where it may not. One after the other always runs to its end."""
        joint = self.job.joint
        if joint is None or self.method.schedule is SequentialObjective:
            return ""
        return joint.enough({name: line[keys.measured(keys.objective(name))] for name in keys.STREAMS})

    # ---- one step ---------------------------------------------------------------------------------------------------------

    def step(self, step: int) -> StepRecord:
        """Collect a step's gradients, and let the optimizer step."""
        winners, losers = self.plan.rows(step)
        record = StepRecord()
        self.source.collect(step, winners, losers, record)
        record.learning_rate = float(self.scheduler.get_last_lr()[0])
        every = self.job.config.update_cosine_steps
        due = (step + 1) % every == 0 if every else self._measures(step + 1)
        self.optimizer.measure_change = self.method.two_gradients and due
        with self.source.watched(winners, losers) as record.seen:
            record.report = self.optimizer.step()
        self.scheduler.step()
        return record

    def line(self, record: StepRecord, signals: Signals, speed: Speed) -> tuple[dict[str, float], int]:
        """The figures of a step, and the signal that asked a process to stop (0: none), in one message between processes."""
        report = record.report
        assert report is not None
        line, news = record.total(self.ranks, self.device, *signals.news())
        tokens, positions = line.pop("tokens"), line.pop("slots")
        line |= {keys.LEARNING_RATE: record.learning_rate}
        line |= {keys.SPEED: tokens / speed.seconds_a_step(), keys.PADDING: 1 - tokens / positions}
        two = self.method.two_gradients and keys.logps(keys.REJECTED) in line  # not in a supervised step of a schedule
        line |= utilization(self.device) | self._reported(report, two) | record.known
        self.tensors = report.tensors if two else record.seen.gram if record.seen is not None else None
        return line | self._entanglement(line, record, two), signals.heard(news)

    def _reported(self, report: StepReport, two: bool) -> dict[str, float]:
        """What the optimizer says of a step, in one wait for the device; of its two gradients, if it had `two`."""
        found = report.to_dict()
        skipped = {keys.SKIPPED: 1.0} if found.pop(keys.SKIPPED) else {}
        if not two:
            return {keys.GRAD_NORM: found[keys.GRAD_NORM]} | skipped
        if self.method.metric == "optimizer":
            found.setdefault(keys.PASSES, 0.0)
        cosines = [keys.update_cosine(side) for side in keys.SIDES]
        # A skipped step, one of learning rate 0 or one between parallel gradients moves nothing and has no direction.
        if not any(found.get(name, 0.0) for name in cosines):
            found = {name: value for name, value in found.items() if name not in cosines}
        return found | skipped

    # ---- files ------------------------------------------------------------------------------------------------------------

    def _epoch_ends(self, step: int) -> bool:
        return step % self.plan.steps_per_epoch == 0 or step == self.plan.steps

    def _measures(self, step: int) -> bool:
        """Whether held-out rows are measured after this step."""
        every = self.job.config.eval_steps or max(1, self.plan.steps_per_epoch // 10)
        return self._epoch_ends(step) or step % every == 0

    def _log(self, line: dict[str, float]) -> None:
        known = set(self.watch.warnings)
        line = line | self.watch.read(line)
        for kind in set(self.watch.warnings) - known:
            if self.ranks.first:
                tqdm.write(f"{self.job.label}, {self.watch.warnings[kind]}")
        if self.ranks.first:
            with self.folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.trackers.log(line)

    def _check_metrics(self, progress: checkpoints.Progress) -> None:
        """Raises DamagedError where the logged lines of a checkpoint are not there any more."""
        file, size = self.folder.metrics, progress.metrics_bytes
        if not file.is_file() or file.stat().st_size < size or digest(file, size) != progress.metrics_sha256:
            raise DamagedError(
                f"{file} does not hold the {size:,} bytes that were logged up to step {progress.step}; bring it back, or "
                f"delete {self.folder.path} and give the same command again"
            )

    def _truncate_metrics(self, size: int) -> None:
        """Drop the lines after the checkpoint: those steps are taken again."""
        if self.ranks.first:
            with self.folder.metrics.open("ab") as file:
                file.truncate(size)

    def _save(self, progress: checkpoints.Progress) -> None:
        if self.ranks.first:
            progress.metrics_bytes, progress.metrics_sha256 = self.folder.metrics.stat().st_size, digest(self.folder.metrics)
        progress.schedule = self.source.state_dict()
        checkpoints.save(self.folder.checkpoints, progress, self.source.trained, self.optimizer, self.scheduler, self.ranks)

    def _exports(self, progress: checkpoints.Progress) -> bool:
        """Whether the model is exported where the run stands now."""
        if progress.step == self.plan.steps or progress.enough:
            return progress.step > 0
        return self.job.config.export == "all" and progress.step > 0 and progress.step % self.plan.steps_per_epoch == 0

    def _exported(self, progress: checkpoints.Progress) -> Path:
        return self.folder.model(math.ceil(progress.step / self.plan.steps_per_epoch))

    def _export(self, progress: checkpoints.Progress, line: dict[str, float]) -> None:
        folder = self._exported(progress)
        figures = {k: v for k, v in line.items() if k.startswith(keys.EVAL)}
        card = model_card(f"{self.job.label}, {folder.name.replace('-', ' ')}", self.job.base, self.job.recipe, figures)
        export(self.scorer.model, self.scorer.tokenizer, folder, card, self.ranks)
        check_export(self.scorer, folder)

    def _entanglement(self, line: dict[str, float], record: StepRecord, two: bool) -> dict[str, float]:
        """What the step's two gradients say of both log-probabilities, where they are known."""
        if two:
            assert self.tensors is not None
            return entanglement(self.tensors)  # with the weights of DPO, whatever the rule makes of the two
        if record.each:
            return over_pairs(record.each)
        if record.seen is None:
            return {}
        d_w, d_l = (1.0, 0.0) if self.method.loss == "nll" else (line.get(keys.weight(side), math.nan) for side in keys.SIDES)
        found = entanglement(record.seen.gram, d_w, d_l)
        if math.isnan(d_w):  # the sparse loss weighs tokens, not answers
            found = {k: v for k, v in found.items() if not k.startswith((keys.CONDITION, keys.CASE))}
        return found | record.seen.metrics | self._layers()

    def _layers(self) -> dict[str, float]:
        return {} if self.tensors is None else layers(self.tensors, self.source.trained)


def schedule(config: StageConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The learning rate of a run of so many steps. Raises ValueError for arguments that its schedule does not take."""
    try:
        return get_scheduler(
            config.lr_scheduler_type, optimizer, config.warmup(steps), steps, dict(config.lr_scheduler_kwargs) or None
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs is {config.lr_scheduler_kwargs} for lr_scheduler_type {config.lr_scheduler_type}: {error}"
        ) from error


def layers(tensors: Gram, model: nn.Module) -> dict[str, float]:
    """`entanglement/layer/<layer>`: the cosine of the two gradients in each layer."""
    return {f"{keys.LAYER}{layer}": cosine for layer, cosine in by_layer(tensors, model).items()}


def over_pairs(numbers: Sequence[Gram]) -> dict[str, float]:
    """The mean over pairs of what each pair's two gradients say (of conditions: their share), and the most frequent case."""
    each = [entanglement(gram) for gram in numbers]
    names = dict.fromkeys(name for found in each for name in found)  # not every pair has all of them
    mean = {name: statistics.fmean(found[name] for found in each if name in found) for name in names}
    return mean | {keys.CASE: statistics.mode(found[keys.CASE] for found in each)}
