"""The loop: collect the gradients of a batch, combine, clip, step, one metrics line; resumable at every step.

One loop serves the supervised stage and every method. A step takes all micro-batches of one side, then all of the other, so
that two gradients never mix in one accumulator, and only one graph is alive at a time. Where a schedule has pairs and
supervised rows share a step, their weighted losses are one loss, and their gradients one gradient.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedModel, get_scheduler

from harness import checkpoints, probing
from harness.adapters import bare, without_dropout
from harness.config import SparseConfig, StageConfig
from harness.data import Example, Preferences, collate, mismatched, order
from harness.files import write_json
from harness.joint import STREAMS, Joint
from harness.measures import sums_of, unseen_mass
from harness.meter import Meter, utilization
from harness.methods import METHODS, Method
from harness.model import completion_logps, export, model_card
from harness.sparse import SparseTerm
from ogdopt import PairedGradient, StepReport
from ogdopt.diagnostics import Probe, entanglement, probe, weights
from ogdopt.gram import Gram
from ogdopt.losses import LOSSES, Completion, Pairs, dpo, kto_unpaired, nll
from ogdopt.objectives import MixedObjective, Objective, OneAtATime, SequentialObjective
from ogdopt.per_pair import add_pair
from ogdopt.projection import scaled
from ogdopt.three_d import ThreeD, Thresholds

EVAL_BETA = 0.1
"""Beta of the rewards and of the DPO loss that are measured on held-out pairs (paper, Figure 6)."""


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and its state is saved: an interrupt of what called it, not an error."""


@dataclass
class Job:
    """One training run: what to train, on what, how, and where its files go."""

    directory: Path
    name: str
    label: str
    method: str
    config: StageConfig
    data: Preferences
    held_out: Preferences | None
    """Pairs whose log-probabilities are followed; None: none."""
    beta: float | None = None
    seed: int = 0
    base: str = ""
    """What the model starts from, for the model card."""
    recipe: dict[str, Any] = field(default_factory=dict)
    validation: Sequence[Example] = ()
    """Held-out supervised examples whose loss is measured."""
    joint: Joint | None = None
    """The supervised stream of a method with a schedule."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """Where the 3D-properties warn, by names of `ogdopt.three_d.Thresholds`."""
    loss_args: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the method's loss beside beta."""
    sparse: SparseConfig = field(default_factory=SparseConfig)
    probe_steps: int | None = None
    """Look into every so many steps of a method of one gradient (`preference.probe_steps`)."""

    def __post_init__(self) -> None:
        if METHODS[self.method].schedule and not (self.joint and self.joint.supervised):
            raise ValueError(
                f"method {self.method!r} trains on supervised rows beside the pairs, and there are none; give sft.data.train, "
                "or choose sft, dpo, ogd or ogd_metric"
            )
        if METHODS[self.method].pairwise and not self.data.paired:
            raise ValueError(
                f"method {self.method!r} compares two answers to one prompt, but the preference rows are unpaired (prompt, "
                "completion, label); give pairs (prompt, chosen, rejected), or choose sft, ogd, ogd_metric or kto"
            )
        if METHODS[self.method].loss == "kto" and not (self.data.winners and self.data.losers):
            raise ValueError(
                f"method {self.method!r} needs preferred and rejected completions, and there are {len(self.data.winners)} and "
                f"{len(self.data.losers)}; give rows of both labels"
            )

    @property
    def plan(self) -> Plan:
        """Which rows make up which step."""
        losers = self.data.losers if "loser" in METHODS[self.method].sides else []
        return Plan(len(self.data.winners), len(losers), self.data.paired, self.config, self.seed)

    @property
    def streams(self) -> dict[str, Plan]:
        """Which rows make up which step of each stream of a joint run; none for other methods."""
        if self.joint is None:
            return {}
        config = dataclasses.replace(self.config, train_batch_size=self.joint.batch_size)
        return {"preference": self.plan, "sft": Plan(len(self.joint.supervised), 0, False, config, self.seed)}


@dataclass(frozen=True)
class Plan:
    """The rows of every step, as a pure function of the step's number: a resumed run has nothing else to remember."""

    winners: int
    losers: int
    paired: bool
    config: StageConfig
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; unpaired sides of different size: the larger one's, and the smaller starts over."""
        return math.ceil(max(self.winners, self.losers) / self.config.train_batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.steps_per_epoch * self.config.num_train_epochs
        return min(total, self.config.max_steps) if self.config.max_steps > 0 else total

    def rows(self, step: int) -> tuple[list[int], list[int]]:
        """Indices of the winners and of the losers of a step (0, 1, ...)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        winners = self._slice(self.winners, epoch, position, 0)
        if self.paired:
            return winners, winners
        return winners, self._slice(self.losers, epoch, position, 1) if self.losers else []

    def _slice(self, n: int, epoch: int, position: int, side: int) -> list[int]:
        size = self.config.train_batch_size
        lap, position = divmod(position, math.ceil(n / size))
        seed = self.seed if not side else self.seed + 1_000_003  # unpaired losers are shuffled on their own
        return order(n, seed, epoch + 100_000 * lap)[position * size : (position + 1) * size]


def train(
    job: Job,
    model: PreTrainedModel,
    tokenizer: Any,
    device: torch.device,
    bf16: bool = False,
    reference: Callable[[], PreTrainedModel] | None = None,
) -> None:
    """Run a job to its end, or continue it: metrics.jsonl, checkpoint/, model/epoch-n and, last, complete.json.

    `reference` loads the reference model where that is not `model` itself; only its log-probabilities are kept. Raises Stopped
    after saving when the process is asked to stop (Ctrl-C, SIGTERM).
    """
    Trainer(job, model, tokenizer, device, bf16, reference).run()


class Trainer:
    """The state of one training run while it lasts."""

    def __init__(
        self,
        job: Job,
        model: PreTrainedModel,
        tokenizer: Any,
        device: torch.device,
        bf16: bool,
        reference: Callable[[], PreTrainedModel] | None = None,
    ) -> None:
        self.job, self.model, self.tokenizer, self.device = job, model, tokenizer, device
        self.load_reference = reference
        self.method: Method = METHODS[job.method]
        self.plan = job.plan
        self.autocast = torch.autocast(device.type, torch.bfloat16) if bf16 and device.type != "cpu" else nullcontext()
        config = job.config
        self.mismatched = mismatched(job.data) if self.method.loss == "kto" else []
        self.sparse: SparseTerm | None = None
        if self.method.loss == "sparse":
            self.sparse = SparseTerm(job.sparse, job.data, bare(model).config.hidden_size, config.train_on_prompt, device)
        self.trained: nn.Module = nn.ModuleList([model, self.sparse.significance]) if self.sparse else model
        """What checkpoints hold."""
        self.optimizer = self._optimizer()
        self.scheduler = schedule(config, self.optimizer, self.plan.steps)
        self.metrics = job.directory / "metrics.jsonl"
        self.probing = False
        """Whether the present step is looked into."""
        self.tensors: Gram | None = None
        """What the last step's two gradients were, tensor by tensor, where there were two."""
        self.reference: dict[str, Tensor] = {}
        self.objective: Objective | None = None
        if job.joint is not None and self.method.schedule is not None:
            self.objective = job.joint.objective(self.method, self.plan.steps, job.seed)
        self.streams = job.streams
        self.watch = ThreeD(Thresholds(**job.thresholds))
        self.taken = dict.fromkeys(self.streams, 0)
        """Steps that each stream of a joint run has had."""

    def run(self) -> None:
        """Train from the last checkpoint, or from the start."""
        job, plan = self.job, self.plan
        job.directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(job.seed)
        self.reference = self._reference()
        if self.sparse is not None:
            self.sparse.reference = self.reference["train_tokens"]
        progress = checkpoints.restore(job.directory / "checkpoint", self.trained, self.optimizer, self.scheduler)
        if progress is None:
            progress = checkpoints.Progress()
            self._truncate_metrics(0)
            self._log({"step": 0, "epoch": 0.0} | self._measure())
        else:
            self._truncate_metrics(progress.metrics_bytes)
            for row in self.metrics.read_text(encoding="utf-8").splitlines():
                self.watch.read(json.loads(row))
            if self.objective is not None:
                self.objective.load_state_dict(progress.schedule["objective"])
                self.taken = dict(progress.schedule["taken"])
        meter = Meter(self.device)
        bar = tqdm(total=plan.steps, initial=progress.step, desc=job.label, unit="step", leave=False, dynamic_ncols=True)
        with bar, stop_signals() as asked:
            mark = time.perf_counter()
            while progress.step < plan.steps and not progress.enough:
                with meter:
                    line = self._step(progress.step)
                progress.step += 1
                mark, progress.seconds = time.perf_counter(), progress.seconds + time.perf_counter() - mark
                bar.update()
                bar.set_postfix({"loss": f"{line['loss']:.3f}"}, refresh=False)
                epoch_ends = progress.step % plan.steps_per_epoch == 0 or progress.step == plan.steps
                if epoch_ends or progress.step % self._eval_steps() == 0:
                    line |= self._measure() | self._layers()
                    progress.enough = self._enough(line)
                    epoch_ends = epoch_ends or bool(progress.enough)
                if epoch_ends or progress.step % job.config.logging_steps == 0 or self._measured(line):
                    self._log({"step": progress.step, "epoch": progress.step / plan.steps_per_epoch} | line)
                ended = progress.step == plan.steps or bool(progress.enough)
                if ended or (epoch_ends and job.config.export == "all"):
                    self._export(math.ceil(progress.step / plan.steps_per_epoch), line)
                due = job.config.save_steps and progress.step % job.config.save_steps == 0
                if epoch_ends or due or asked:
                    progress.costs = meter.added_to(progress.costs)
                    self._save(progress)
                if asked:
                    raise Stopped(f"{job.directory} is saved at step {progress.step} of {plan.steps}")
        done = {"steps": progress.step, "epochs": math.ceil(progress.step / plan.steps_per_epoch)}
        done |= {"seconds": progress.seconds, "skipped_steps": self.optimizer.skipped_steps} | progress.costs
        done |= {"warnings": self.watch.warnings}
        write_json(job.directory / "complete.json", done | ({"stopped": progress.enough} if progress.enough else {}))

    def _enough(self, line: dict[str, float]) -> str:
        """Why this run may end before its last step; "" where it may not. One after the other always runs to its end."""
        joint = self.job.joint
        if joint is None or self.method.schedule is SequentialObjective:
            return ""
        return joint.enough({name: line[f"eval_objective/{name}"] for name in STREAMS})

    @staticmethod
    def _measured(line: dict[str, float]) -> bool:
        return any(name.startswith("eval_") for name in line)

    def _optimizer(self) -> PairedGradient:
        """The configured optimizer under the method's rule; raises ValueError where torch or the library refuses it."""
        method, config = self.method, self.job.config
        options = {"foreach": False} | config.optimizer_args  # the foreach step makes a temporary of the model's size
        try:
            groups: list[dict[str, Any]] = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
            if self.sparse is not None:
                groups.append({"params": list(self.sparse.significance.parameters()), "lr": self.job.sparse.learning_rate})
            base = getattr(torch.optim, config.optimizer)(groups, lr=config.learning_rate, **options)
            return PairedGradient(
                base,
                method.rule,
                max_norm=config.max_grad_norm,
                metric=method.metric,
                measure_change=method.two_gradients,
                model=self.trained,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"method {self.job.method!r} cannot use optimizer {config.optimizer} with optimizer_args "
                f"{config.optimizer_args}: {error}"
            ) from error

    # ---- one step ---------------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> dict[str, float]:
        began = time.perf_counter()
        winners, losers = self.plan.rows(step)
        sums: dict[str, Tensor] = {}
        known: dict[str, float] = {}
        each: list[Gram] = []
        self.probing = self._probes(step)
        if self.objective is not None:
            known = self._collect_scheduled(self.objective, sums)
        elif self.method.per_pair:
            each = self._collect_each_pair(winners, sums)
        elif self.method.loss == "kto":
            self._collect(self._kto_losses(winners, losers, sums), sums)
        elif self.method.loss != "nll":
            self._collect(self._pair_losses(winners, sums), sums)
        else:
            logps = self._collect_sides(winners, losers, sums)
            if self.method.weight is not None:
                self.optimizer.rule = scaled(self.method.rule, self._weight(winners, logps, sums))
        learning_rate = float(self.scheduler.get_last_lr()[0])
        with self._probe(winners, losers) if self.probing else nullcontext() as seen:
            report: StepReport = self.optimizer.step()
        self.scheduler.step()
        line = self._line(sums, report, learning_rate, time.perf_counter() - began) | known
        return line | self._entanglement(line, report, seen, each)

    def _collect_sides(
        self, winners: list[int], losers: list[int], sums: dict[str, Tensor], weight: float = 1.0
    ) -> dict[str, Tensor]:
        """Each side's gradient, one side after the other; returns their log-probabilities, (N,) each."""
        rows = {"winner": (self.job.data.winners, winners), "loser": (self.job.data.losers, losers)}
        return {
            side: self._collect_side(side, [rows[side][0][i] for i in rows[side][1]], sums, weight)
            for side in self.method.sides
        }

    def _collect_side(self, side: str, examples: list[Example], sums: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        """All micro-batches of one side: the gradient of `weight` times the mean negative log-likelihood.

        Returns the log-probabilities, (N,).
        """
        name = {"winner": "chosen", "loser": "rejected"}[side]
        found = []
        with getattr(self.optimizer, side)():
            for micro in chunks(examples, self.job.config.per_device_train_batch_size):
                completion = self._score(micro)
                loss = weight * nll(completion, self.job.config.loss_reduction).sum() / len(examples)
                loss.backward()
                found.append(completion.logp.detach())
                _add(sums, **{f"logps/{name}": completion.logp.mean() * len(micro) / len(examples)})
                _add(sums, tokens=completion.length.sum())
                if side == "winner":
                    _add(sums, loss=loss)
        return torch.cat(found)

    def _collect_each_pair(self, indices: list[int], sums: dict[str, Tensor]) -> list[Gram]:
        """The mean over pairs of each one's own mixture; returns their Gram numbers."""
        data, found = self.job.data, []

        def loss(side: str, i: int, seen: dict[str, Tensor]) -> Tensor:
            completion = self._score([(data.winners if side == "winner" else data.losers)[i]])
            value = nll(completion, self.job.config.loss_reduction).sum()
            seen[side] = completion.logp.detach()
            name = {"winner": "chosen", "loser": "rejected"}[side]
            _add(sums, tokens=completion.length.sum(), **{f"logps/{name}": seen[side].sum() / len(indices)})
            if side == "winner":
                _add(sums, loss=value / len(indices))
            return value

        with self.optimizer.winner():
            for i in indices:
                seen: dict[str, Tensor] = {}
                winner, loser = (partial(loss, side, i, seen) for side in ("winner", "loser"))
                rule = lambda gram, i=i, seen=seen: scaled(  # noqa: E731
                    self.method.rule, self._weight([i], seen, sums, 1 / len(indices))
                )(gram)
                found.append(add_pair(self.model.parameters(), winner, loser, rule, 1 / len(indices)))
        return found

    def _weight(self, indices: list[int], logps: dict[str, Tensor], sums: dict[str, Tensor], share: float = 1.0) -> Tensor:
        """The mean weight that a loss gives to pairs with these log-probabilities, shape ()."""
        assert self.method.weight is not None
        A, B = self._references(indices)
        d_w, _ = weights(LOSSES[self.method.weight], pairs_of(logps["winner"], logps["loser"], A, B), beta=self.job.beta)
        _add(sums, **{"npo/weight": share * d_w.mean()})
        return d_w.mean().double()

    def _collect_scheduled(self, objective: Objective, sums: dict[str, Tensor]) -> dict[str, float]:
        """All micro-batches of the streams whose step this is; returns what the schedule goes by.

        Both streams' next rows are fixed before the choice, and a stream that has no step keeps them for its next one.
        """
        rows = {name: self.streams[name].rows(self.taken[name])[0] for name in objective.active}
        known: dict[str, float] = {}
        if isinstance(objective, MixedObjective):
            weights = objective.weights
            objective({name: partial(self._collect_stream, name, rows[name], sums, weights[name]) for name in rows})
            used = list(rows)
        else:
            assert isinstance(objective, OneAtATime)
            seen: dict[str, Tensor] = {}

            def evaluate(name: str) -> Tensor:
                seen[name] = torch.stack(list(self._losses(name, rows[name], {}))).sum()
                return seen[name]

            name = objective.choose({name: partial(evaluate, name) for name in rows})
            known = {f"objective/{n}": float(loss) for n, loss in seen.items() if n != name}
            known |= {f"objective/gap_{n}": gap for n, gap in objective.gaps.items()}
            known["objective/chosen"] = float(name == "preference")
            objective.observe(name, self._collect_stream(name, rows[name], sums))
            used = [name]
        for name in used:
            self.taken[name] += 1
        return known | {f"epoch/{name}": n / self.streams[name].steps_per_epoch for name, n in self.taken.items()}

    def _collect_stream(self, name: str, indices: list[int], sums: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        """The gradient of one stream's batch; returns its objective, whatever loss the gradient is of."""
        if name == "preference" and self.method.loss == "nll":
            logps = self._collect_sides(indices, indices, sums, weight)
            A, B = self._references(indices)
            loss = dpo_of(logps["winner"], logps["loser"], A, B, self.job.beta or EVAL_BETA).mean()
        else:
            loss = self._collect(self._losses(name, indices, sums), sums, weight)
        _add(sums, **{f"objective/{name}": loss})
        return loss

    def _references(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities of the chosen and of the rejected answers of these pairs, (N,) each."""
        A, B = (self.reference[f"train_{side}"][indices].to(self.device) for side in ("chosen", "rejected"))
        return A, B

    def _losses(self, name: str, indices: list[int], sums: dict[str, Tensor]) -> Iterator[Tensor]:
        return (self._pair_losses if name == "preference" else self._supervised_losses)(indices, sums)

    def _collect(self, losses: Iterable[Tensor], sums: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        """The gradient of `weight` times the sum of micro-batches' losses, added to the winner's; returns the sum."""
        found = []
        with self.optimizer.winner():
            for loss in losses:
                (weight * loss).backward()
                found.append(loss.detach())
                _add(sums, loss=weight * loss)
        return torch.stack(found).sum()

    def _supervised_losses(self, indices: list[int], sums: dict[str, Tensor]) -> Iterator[Tensor]:
        """Each micro-batch's share of the mean negative log-likelihood of supervised rows."""
        assert self.job.joint is not None
        for micro in chunks(indices, self.job.config.per_device_train_batch_size):
            completion = self._score([self.job.joint.supervised[i] for i in micro])
            _add(sums, tokens=completion.length.sum())
            yield nll(completion, self.job.config.loss_reduction).sum() / len(indices)

    def _kto_losses(self, winners: list[int], losers: list[int], sums: dict[str, Tensor]) -> Iterator[Tensor]:
        """Each micro-batch's share of the KTO loss: the winners' mean and the losers', of pairs or not, with one divergence."""
        data, beta = self.job.data, self.job.beta
        places = [*winners, *(len(data.winners) + i for i in losers)]
        policy = self._logps([self.mismatched[k] for k in places])[0]
        z_ref = (policy - self.reference["train_mismatched"][places]).mean().clamp(min=0).item()
        _add(sums, kl=torch.tensor(z_ref))
        for name, rows, indices in (("chosen", data.winners, winners), ("rejected", data.losers, losers)):
            for micro in chunks(indices, self.job.config.per_device_train_batch_size):
                completion = self._score([rows[i] for i in micro])
                ref = self.reference[f"train_{name}"][micro].to(self.device)
                wanted = torch.full((len(micro),), name == "chosen", device=self.device)
                losses = kto_unpaired(completion, ref, wanted, beta=beta or EVAL_BETA, z_ref=z_ref, **self.job.loss_args)
                if self.probing:
                    side = lambda pairs, wanted=wanted, ref=ref, name=name: kto_unpaired(  # noqa: E731
                        getattr(pairs, name), ref, wanted, beta=beta or EVAL_BETA, z_ref=z_ref, **self.job.loss_args
                    )
                    d = weights(side, Pairs(completion, completion))[name == "rejected"]
                    _add(sums, **{f"entanglement/weight_{name}": d.mean() * len(micro) / len(indices)})
                share = len(micro) / len(indices)
                rewards = (beta or EVAL_BETA) * (completion.logp - ref).mean()
                _add(sums, **{f"logps/{name}": completion.logp.mean() * share, f"rewards/{name}": rewards * share})
                _add(sums, tokens=completion.length.sum())
                yield losses.sum() / len(indices)

    def _pair_losses(self, indices: list[int], sums: dict[str, Tensor]) -> Iterator[Tensor]:
        """Each micro-batch's share of the mean preference loss."""
        data, beta = self.job.data, self.job.beta
        options = self.job.loss_args | ({} if beta is None else {"beta": beta})
        for micro in chunks(indices, self.job.config.per_device_train_batch_size):
            n, states = len(micro), [] if self.sparse else None
            both = self._score([data.winners[i] for i in micro] + [data.losers[i] for i in micro], states=states)
            chosen, rejected = Completion(both.logps[:n], both.mask[:n]), Completion(both.logps[n:], both.mask[n:])
            pairs = Pairs(chosen, rejected)
            if self.method.reference:
                pairs = Pairs(chosen, rejected, *self._references(micro))
            share = n / len(indices)
            _add(sums, tokens=both.length.sum())
            _add(sums, **{"logps/chosen": chosen.logp.mean() * share, "logps/rejected": rejected.logp.mean() * share})
            if self.method.reference and beta is not None:
                ratios = pairs.log_ratios()
                _add(sums, **{k: v * share for k, v in rewards_of(ratios[0], ratios[1], beta).items()})
            if self.sparse is not None and states is not None:
                losses, on = self.sparse.losses(chosen, rejected, states[0], micro, **options)
                _add(sums, **{name: value * share for name, value in on.items()})
            else:
                entry = LOSSES["dpo" if self.method.schedule else self.method.loss]
                losses = entry(pairs, **options)
                if self.probing:
                    found = zip(("chosen", "rejected"), weights(entry, pairs, **options))
                    _add(sums, **{f"entanglement/weight_{side}": d.mean() * share for side, d in found})
            yield losses.sum() / len(indices)

    def _score(
        self, examples: Sequence[Example], on_prompt: bool | None = None, states: list[Tensor] | None = None
    ) -> Completion:
        on_prompt = self.job.config.train_on_prompt if on_prompt is None else on_prompt
        batch = collate(examples, self.tokenizer.pad_token_id, on_prompt).to(self.device)
        with self.autocast:
            return completion_logps(self.model, batch.input_ids, batch.attention_mask, batch.loss_mask, states)

    def _line(self, sums: dict[str, Tensor], report: StepReport, learning_rate: float, seconds: float) -> dict[str, float]:
        line = {name: float(value) for name, value in sums.items()}
        tokens = line.pop("tokens")
        line |= {"learning_rate": learning_rate, "grad_norm": report.grad_norm, "tokens_per_second": tokens / seconds}
        line |= utilization(self.device)
        if report.skipped:
            line["skipped"] = 1.0
        if self.method.two_gradients and "logps/rejected" in line:  # not in a supervised step of a schedule
            coefficient = report.coefficients
            assert isinstance(coefficient, tuple)
            line |= {
                "ogd/cosine": report.cosine,
                "ogd/coefficient": -coefficient[1],
                "ogd/projected_fraction": report.projected_fraction,
                "ogd/norm_chosen": report.gram.ww**0.5,
                "ogd/norm_rejected": report.gram.ll**0.5,
                "ogd/parallel": float(report.parallel),
            }
            if self.method.metric == "optimizer":
                line["ogd/passes"] = float(report.passes)
            # A skipped step, one of learning rate 0 or one between parallel gradients moves nothing and has no direction.
            if report.change_cosines is not None and report.change_cosines != (0.0, 0.0):
                line["ogd/update_cosine_chosen"], line["ogd/update_cosine_rejected"] = report.change_cosines
        return line

    # ---- what the two gradients say ---------------------------------------------------------------------------------------

    def _probes(self, step: int) -> bool:
        every, method = self.job.probe_steps, self.method
        both = self.job.data.paired or method.loss == "kto"
        return bool(every and step % every == 0 and both) and not (method.two_gradients or method.per_pair or method.schedule)

    def _probe(self, winners: list[int], losers: list[int]) -> AbstractContextManager[Probe]:
        """Watch what the step does to the mean log-probabilities of its batch."""

        def mean(rows: list[Example], indices: list[int]) -> Iterator[Tensor]:
            with without_dropout(self.model):
                for micro in chunks(indices, self.job.config.per_device_train_batch_size):
                    yield self._score([rows[i] for i in micro]).logp.sum() / len(indices)

        data = self.job.data
        return probe(self.trained.parameters(), partial(mean, data.winners, winners), partial(mean, data.losers, losers))

    def _entanglement(
        self, line: dict[str, float], report: StepReport, seen: Probe | None, each: list[Gram]
    ) -> dict[str, float]:
        self.tensors = report.tensors if self.method.two_gradients and "logps/rejected" in line else None
        if self.tensors is not None:
            return entanglement(self.tensors)  # with the weights of DPO, whatever the rule makes of the two
        if each:
            return probing.over_pairs(each)
        if seen is None:
            return {}
        self.tensors = seen.gram
        names = [f"entanglement/weight_{side}" for side in ("chosen", "rejected")]
        d_w, d_l = (1.0, 0.0) if self.method.loss == "nll" else (line.get(name, math.nan) for name in names)
        found = entanglement(seen.gram, d_w, d_l)
        if math.isnan(d_w):  # the sparse loss weighs tokens, not answers
            found = {k: v for k, v in found.items() if "condition" not in k and "case" not in k}
        return found | seen.metrics | self._layers()

    def _layers(self) -> dict[str, float]:
        return {} if self.tensors is None else probing.layers(self.tensors, probing.names(self.trained))

    # ---- what is measured on held-out rows --------------------------------------------------------------------------------

    def _scores(self, examples: Sequence[Example], on_prompt: bool = False) -> list[Completion]:
        """The scored tokens of the examples in micro-batches, on the CPU, without gradients."""
        self.model.eval()  # adapters may have dropout
        with torch.no_grad():
            micros = chunks(examples, max(64, self.job.config.per_device_train_batch_size))
            found = [Completion(*(x.cpu() for x in self._score(micro, on_prompt))) for micro in micros]
        self.model.train()
        return found

    def _logps(self, examples: Sequence[Example], on_prompt: bool = False) -> tuple[Tensor, Tensor]:
        """(sums over scored tokens, numbers of these) of the examples, each (N,), on the CPU, without gradients."""
        return sums_of(self._scores(examples, on_prompt))

    def _token_logps(self, examples: Sequence[Example]) -> Tensor:
        """Log-probabilities of all tokens that training scores, example after example, on the CPU, without gradients."""
        found = []
        with torch.no_grad(), without_dropout(self.model):
            for micro in chunks(examples, max(64, self.job.config.per_device_train_batch_size)):
                completion = self._score(micro)
                found.append(completion.logps[completion.mask.bool()].cpu())
        return torch.cat(found)

    def _reference(self) -> dict[str, Tensor]:
        """Log-probabilities of the starting model, computed once and kept beside the run."""
        file = self.job.directory / "reference.safetensors"
        if file.is_file():
            return load_file(file)
        with self._as_reference():
            found = self._reference_logps()
        if found:
            temporary = file.with_suffix(".tmp")
            save_file(found, temporary)
            os.replace(temporary, file)
        return found

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Score with the reference model, if that is another one than the model to be trained."""
        if self.load_reference is None:
            yield
            return
        trained = self.model
        self.model = self.load_reference()
        try:
            yield
        finally:
            self.model = trained

    def _reference_logps(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.method.reference:
            found["train_chosen"] = self._logps(self.job.data.winners)[0]
            found["train_rejected"] = self._logps(self.job.data.losers)[0]
        if self.method.loss == "kto":
            found["train_mismatched"] = self._logps(self.mismatched)[0]
        if self.sparse is not None:
            found["train_tokens"] = self._token_logps([*self.job.data.winners, *self.job.data.losers])
        if self.job.held_out is not None:
            found["eval_chosen"] = self._logps(self.job.held_out.winners)[0]
            found["eval_rejected"] = self._logps(self.job.held_out.losers)[0]
        return found

    def _measure(self) -> dict[str, float]:
        """TRL's names with the prefix eval_: log-probabilities of held-out answers, and rewards against step 0."""
        line: dict[str, float] = {}
        if self.job.validation:
            total, tokens = self._logps(self.job.validation)
            line["eval_loss"] = -(total.sum() / tokens.sum()).item()
        line |= self._objectives()
        held_out = self.job.held_out
        if held_out is None:
            return line
        scores = [self._scores(side) for side in (held_out.winners, held_out.losers)]
        (a, n_w), (b, n_l) = map(sums_of, scores)
        line |= {"eval_logps/chosen": a.mean().item(), "eval_logps/rejected": b.mean().item()}
        line |= {"eval_logps_mean/chosen": (a / n_w).mean().item(), "eval_logps_mean/rejected": (b / n_l).mean().item()}
        A, B = self.reference["eval_chosen"], self.reference["eval_rejected"]
        if held_out.paired:
            line |= {f"eval_{name}": v.item() for name, v in rewards_of(a - A, b - B, EVAL_BETA).items()}
            line["eval_dpo_loss"] = dpo_of(a, b, A, B, EVAL_BETA).mean().item()
            if (mass := unseen_mass(held_out, *scores)) is not None:
                line["eval_unseen_mass"] = mass
        return line

    def _objectives(self) -> dict[str, float]:
        """Both objectives of a joint run, on the same rows of either stream's training data at every measurement."""
        joint = self.job.joint
        if joint is None:
            return {}
        data, config = self.job.data, self.job.config
        some = order(len(data.winners), 0, 0)[: joint.objective_rows]
        a, b = (self._logps([side[i] for i in some])[0] for side in (data.winners, data.losers))
        A, B = (self.reference[f"train_{side}"][some] for side in ("chosen", "rejected"))
        rows = [joint.supervised[i] for i in order(len(joint.supervised), 0, 0)[: joint.objective_rows]]
        total, tokens = self._logps(rows, on_prompt=config.train_on_prompt)
        losses = -total if config.loss_reduction == "sum" else -total / tokens
        f_dpo = dpo_of(a, b, A, B, self.job.beta or EVAL_BETA).mean()
        return {"eval_objective/preference": f_dpo.item(), "eval_objective/sft": losses.mean().item()}

    # ---- files ------------------------------------------------------------------------------------------------------------

    def _eval_steps(self) -> int:
        return self.job.config.eval_steps or max(1, self.plan.steps_per_epoch // 10)

    def _log(self, line: dict[str, float]) -> None:
        known = set(self.watch.warnings)
        line = line | self.watch.read(line)
        for kind in set(self.watch.warnings) - known:
            tqdm.write(f"{self.job.label}, {self.watch.warnings[kind]}")
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _truncate_metrics(self, size: int) -> None:
        """Forget the lines behind the checkpoint: those steps are taken again."""
        with self.metrics.open("ab") as file:
            file.truncate(size)

    def _save(self, progress: checkpoints.Progress) -> None:
        progress.metrics_bytes = self.metrics.stat().st_size
        if self.objective is not None:
            progress.schedule = {"objective": self.objective.state_dict(), "taken": dict(self.taken)}
        checkpoints.save(self.job.directory / "checkpoint", progress, self.trained, self.optimizer, self.scheduler)

    def _export(self, epoch: int, line: dict[str, float]) -> None:
        figures = {k: v for k, v in line.items() if k.startswith("eval_")}
        card = model_card(f"{self.job.label}, epoch {epoch}", self.job.base, self.job.recipe, figures)
        export(self.model, self.tokenizer, self.job.directory / "model" / f"epoch-{epoch}", card)


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


def dpo_of(a: Tensor, b: Tensor, A: Tensor, B: Tensor, beta: float) -> Tensor:
    """The DPO loss of pairs, (N,), from log-probabilities of their answers, (N,) each; A and B are the reference's."""
    return dpo(pairs_of(a, b, A, B), beta=beta)


def pairs_of(a: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Pairs:
    """Pairs of which the answers' log-probabilities, (N,) each, are all that is known."""
    one = torch.ones(len(a), 1, device=a.device)
    return Pairs(Completion(a[:, None], one), Completion(b[:, None], one), A, B)


def rewards_of(chosen: Tensor, rejected: Tensor, beta: float) -> dict[str, Tensor]:
    """TRL's reward metrics from log-ratios (a - A, b - B), each (B,): batch means of shape ()."""
    return {
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "rewards/margins": beta * (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
    }


def chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    """Consecutive parts of at most `size` items."""
    return (items[i : i + size] for i in range(0, len(items), size))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM asks the loop to stop after its step; a second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals can be handled in the main thread alone; elsewhere its handlers stay
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _add(sums: dict[str, Tensor], **values: Tensor) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
