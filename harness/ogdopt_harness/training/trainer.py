"""The loop: collect -> combine -> clip -> step -> one metrics line; resumable at every step.

One loop serves the supervised stage and every method, in one process or many.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, get_scheduler

from ogdopt import StepReport
from ogdopt.diagnostics import Probe, entanglement
from ogdopt.gram import Gram
from ogdopt.objectives import Objective, SequentialObjective
from ogdopt.projection import scaled
from ogdopt.three_d import ThreeD, Thresholds
from ogdopt_harness.common import keys
from ogdopt_harness.common.files import DamagedError, digest
from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.common.run_folder import RunFolder
from ogdopt_harness.config.schema import StageConfig
from ogdopt_harness.modeling.export import export, model_card
from ogdopt_harness.training import checkpoints, probing
from ogdopt_harness.training.exports import check_export
from ogdopt_harness.training.gradients import Collector
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.meter import Meter, utilization
from ogdopt_harness.training.progress import Bar, Signals, Speed, Stopped, Taken, stop_signals
from ogdopt_harness.training.skipped import Skipped
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


class Trainer(Collector):
    """The state of one training run while it lasts."""

    kind: Any = AutoModelForCausalLM
    """What loads its exported folders."""

    def __init__(self, job: Job, *scorer: Any, **named: Any) -> None:
        super().__init__(job, *scorer, **named)
        self.plan = job.plan
        self.scheduler = schedule(job.config, self.optimizer, self.plan.steps)
        self.folder = RunFolder(job.directory)
        self.tensors: Gram | None = None
        """What the last step's two gradients were, tensor by tensor, where there were two."""
        self.objective: Objective | None = None
        if job.joint is not None and self.method.schedule is not None:
            self.objective = job.joint.objective(self.method, self.plan.steps, job.seed)
        self.watch = ThreeD(Thresholds(**job.thresholds))
        run = "/".join(job.directory.parts[-2:])
        names = job.report_to if self.ranks.first else ()
        self.trackers = Trackers(names, job.project, run, job.directory, {"method": job.method} | job.recipe)

    def run(self) -> None:
        """Train from the last checkpoint, or from the start."""
        job, plan = self.job, self.plan
        job.directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(job.seed + 1_000_003 * self.ranks.rank)
        self.reference = self._reference()
        if self.sparse is not None:
            self.sparse.reference = self.reference["train_tokens"]
        progress = self._restored()
        if self._exports(progress) and not self.ranks.tell(self._exported(progress).is_dir):
            lines = self.ranks.tell(lambda: self.folder.metrics.read_text(encoding="utf-8").splitlines())
            self._export(progress, json.loads(lines[-1]))  # the run was stopped between its checkpoint and its model
        meter, speed = Meter(self.device), Speed()
        before = progress.skipped
        skipped = Skipped(job.config.max_skipped_steps, before, progress.step)
        bar = Bar(job.label, plan.steps, progress.step, self.ranks.first)
        with closing(self.trackers), bar, stop_signals() as asked:
            signals = Signals(self.ranks, asked)
            while progress.step < plan.steps and not progress.enough:
                with meter:
                    taken = self._step(progress.step)
                progress.step += 1
                progress.seconds += speed.lap()
                epoch_ends, measured = self._epoch_ends(progress.step), self._measures(progress.step)
                line: dict[str, float] = {}
                if measured or progress.step % job.config.logging_steps == 0:
                    line, stop = self._line(taken, signals, speed)
                    bar.show(progress.step, line)
                else:
                    stop = signals.look()
                    bar.advance(progress.step)
                if measured:
                    line |= self._measure() | self._layers()
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
        progress = checkpoints.restore(self.folder.checkpoints, self.trained, self.optimizer, self.scheduler, self.ranks)
        if progress is None:
            progress = checkpoints.Progress()
            self._truncate_metrics(0)
            self._log({keys.STEP: 0, keys.EPOCH: 0.0} | self._measure())
        else:
            self.ranks.on_first(lambda: self._check_metrics(progress))
            self._truncate_metrics(progress.metrics_bytes)
            for row in self.ranks.on_first(lambda: self.folder.metrics.read_text(encoding="utf-8").splitlines()):
                self.watch.read(json.loads(row))
            if self.objective is not None:
                self.objective.load_state_dict(progress.schedule["objective"])
                self.taken = dict(progress.schedule["taken"])
        return progress

    def _enough(self, line: dict[str, float]) -> str:
        """Why this run may end before its last step; "" where it may not. One after the other always runs to its end."""
        joint = self.job.joint
        if joint is None or self.method.schedule is SequentialObjective:
            return ""
        return joint.enough({name: line[keys.measured(keys.objective(name))] for name in keys.STREAMS})

    # ---- one step ---------------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> Taken:
        winners, losers = self.plan.rows(step)
        taken = Taken()
        self.probing = self._probes(step)
        if self.objective is not None:
            taken.known = self._collect_scheduled(self.objective, taken)
        elif self.method.per_pair:
            taken.each = self._collect_each_pair(winners, taken)
        elif self.method.loss == "kto":
            self._collect(self._kto_losses(winners, losers, taken), taken)
        elif self.method.loss != "nll":
            self._collect(self._pair_losses(winners, taken), taken)
        else:
            logps = self._collect_sides(winners, losers, taken)
            if self.method.weight is not None:
                whole = {side: self.ranks.sum(values) for side, values in logps.items()}
                self.optimizer.rule = scaled(self.method.rule, self._weight(winners, whole, taken, share=1 / self.ranks.size))
        taken.learning_rate = float(self.scheduler.get_last_lr()[0])
        every = self.job.config.update_cosine_steps
        due = (step + 1) % every == 0 if every else self._measures(step + 1)
        self.optimizer.measure_change = self.method.two_gradients and due
        with self._probe(winners, losers) if self.probing else nullcontext() as taken.seen:
            taken.report = self.optimizer.step()
        self.scheduler.step()
        return taken

    def _line(self, taken: Taken, signals: Signals, speed: Speed) -> tuple[dict[str, float], int]:
        """The figures of a step, and the signal that asked a process to stop (0: none), in one message between processes."""
        report = taken.report
        assert report is not None
        line, news = taken.total(self.ranks, self.device, *signals.news())
        tokens, positions = line.pop("tokens"), line.pop("slots")
        line |= {keys.LEARNING_RATE: taken.learning_rate, keys.GRAD_NORM: report.grad_norm}
        line |= {keys.SPEED: tokens / speed.seconds_a_step(), keys.PADDING: 1 - tokens / positions}
        line |= utilization(self.device)
        if report.skipped:
            line[keys.SKIPPED] = 1.0
        if self.method.two_gradients and keys.logps(keys.REJECTED) in line:  # not in a supervised step of a schedule
            coefficient = report.coefficients
            assert isinstance(coefficient, tuple)
            line |= {
                keys.COSINE: report.cosine,
                keys.COEFFICIENT: -coefficient[1],
                keys.PROJECTED: report.projected_fraction,
                keys.norm(keys.CHOSEN): report.gram.ww**0.5,
                keys.norm(keys.REJECTED): report.gram.ll**0.5,
                keys.PARALLEL: float(report.parallel),
            }
            if self.method.metric == "optimizer":
                line[keys.PASSES] = float(report.passes)
            # A skipped step, one of learning rate 0 or one between parallel gradients moves nothing and has no direction.
            if report.change_cosines is not None and report.change_cosines != (0.0, 0.0):
                line |= {keys.update_cosine(side): x for side, x in zip(keys.SIDES, report.change_cosines)}
        line |= taken.known
        return line | self._entanglement(line, report, taken.seen, taken.each), signals.heard(news)

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
        if self.objective is not None:
            progress.schedule = {"objective": self.objective.state_dict(), "taken": dict(self.taken)}
        checkpoints.save(self.folder.checkpoints, progress, self.trained, self.optimizer, self.scheduler, self.ranks)

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
        export(self.model, self.tokenizer, folder, card, self.ranks)
        check_export(self, folder)

    def _entanglement(
        self, line: dict[str, float], report: StepReport, seen: Probe | None, each: list[Gram]
    ) -> dict[str, float]:
        self.tensors = report.tensors if self.method.two_gradients and keys.logps(keys.REJECTED) in line else None
        if self.tensors is not None:
            return entanglement(self.tensors)  # with the weights of DPO, whatever the rule makes of the two
        if each:
            return probing.over_pairs(each)
        if seen is None:
            return {}
        self.tensors = seen.gram
        names = [keys.weight(side) for side in keys.SIDES]
        d_w, d_l = (1.0, 0.0) if self.method.loss == "nll" else (line.get(name, math.nan) for name in names)
        found = entanglement(seen.gram, d_w, d_l)
        if math.isnan(d_w):  # the sparse loss weighs tokens, not answers
            found = {k: v for k, v in found.items() if not k.startswith((keys.CONDITION, keys.CASE))}
        return found | seen.metrics | self._layers()

    def _layers(self) -> dict[str, float]:
        return {} if self.tensors is None else probing.layers(self.tensors, self.trained)


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
