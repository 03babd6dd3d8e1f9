"""How the batch of a step becomes gradients: side by side, pair by pair, stream by stream.

A step takes all micro-batches of one side, then all of the other, so that two gradients never mix in one accumulator, and only
one graph is alive at a time. Where a schedule has pairs and supervised rows share a step, their weighted losses are one loss,
and their gradients one gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ogdopt import PairedGradient
from ogdopt.diagnostics import Probe, probe, weights
from ogdopt.gram import Gram
from ogdopt.losses import LOSSES, Completion, Pairs, kto_unpaired, nll
from ogdopt.objectives import MaxGapObjective, MixedObjective, Objective, OneAtATime
from ogdopt.per_pair import add_pair
from ogdopt.projection import scaled
from ogdopt_harness.common import keys
from ogdopt_harness.data.examples import Example
from ogdopt_harness.modeling.adapters import without_dropout
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.scoring import EVAL_BETA, Scorer, dpo_of, pairs_of, rewards_of
from ogdopt_harness.training.step_record import StepRecord


class GradientSource:
    """Puts a batch's gradients into the optimizer, which a job's method and settings make. A scorer runs the model."""

    def __init__(self, job: Job, scorer: Scorer) -> None:
        self.job, self.scorer = job, scorer
        self.model, self.device, self.ranks, self.sparse = scorer.model, scorer.device, scorer.ranks, scorer.sparse
        self.method = scorer.method
        self.trained: nn.Module = nn.ModuleList([self.model, self.sparse.significance]) if self.sparse else self.model
        """What checkpoints hold."""
        self.optimizer = self._optimizer()
        self.probing = False
        """Whether the present step is looked into."""
        self.streams = job.streams
        self.steps_of = dict.fromkeys(self.streams, 0)
        """Steps that each stream of a joint run has had."""
        self.objective: Objective | None = None
        """Says at each step of a joint run whose turn it is."""
        if job.joint is not None and self.method.schedule is not None:
            self.objective = job.joint.objective(self.method, job.plan.steps, job.seed)

    def _optimizer(self) -> PairedGradient:
        """The configured optimizer under the method's rule; raises ValueError where torch or the library refuses it."""
        method, config = self.method, self.job.config
        options = {"foreach": False} | config.optimizer_args  # the foreach step makes a temporary of the model's size
        try:
            groups: list[dict[str, Any]] = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
            if self.sparse is not None:
                groups.append(
                    {"params": list(self.sparse.significance.parameters()), "lr": self.job.preference.sparse.learning_rate}
                )
            base = getattr(torch.optim, config.optimizer)(groups, lr=config.learning_rate, **options)
            return PairedGradient(
                base,
                method.rule,
                max_norm=config.max_grad_norm,
                metric=method.metric,
                set_aside=torch.bfloat16 if config.set_aside == "bfloat16" else config.set_aside,
                fused=config.fused,
                model=self.trained,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"method {self.job.method!r} cannot use optimizer {config.optimizer} with optimizer_args "
                f"{config.optimizer_args}: {error}"
            ) from error

    def collect(self, step: int, winners: list[int], losers: list[int], record: StepRecord) -> None:
        """The gradients of a step's rows, into the optimizer; what the step logs of them, into the record."""
        self.probing = self._probes(step)
        if self.objective is not None:
            record.known = self._collect_scheduled(self.objective, record)
        elif self.method.per_pair:
            record.each = self._collect_each_pair(winners, record)
        elif self.method.loss == "kto":
            self._collect(self._kto_losses(winners, losers, record), record)
        elif self.method.loss != "nll":
            self._collect(self._pair_losses(winners, record), record)
        else:
            logps = self._collect_sides(winners, losers, record)
            if self.method.weight is not None:
                whole = {side: self.ranks.sum(values) for side, values in logps.items()}
                weight = self._weight(winners, whole, record, share=1 / self.ranks.size)
                self.optimizer.rule = scaled(self.method.rule, weight)

    def state_dict(self) -> dict[str, Any]:
        """Where a schedule of objectives stands, in what JSON keeps; empty without one."""
        return {} if self.objective is None else {"objective": self.objective.state_dict(), "taken": dict(self.steps_of)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a schedule stood."""
        if self.objective is not None:
            self.objective.load_state_dict(state["objective"])
            self.steps_of = dict(state["taken"])

    def watched(self, winners: list[int], losers: list[int]) -> AbstractContextManager[Probe | None]:
        """A context for the optimizer's step: what it does to the mean log-probabilities of its batch, if this is watched."""
        return self._probe(winners, losers) if self.probing else nullcontext()

    def _collect_sides(
        self, winners: list[int], losers: list[int], record: StepRecord, weight: float = 1.0
    ) -> dict[str, Tensor]:
        """Each side's gradient, one side after the other; returns their log-probabilities, (N,) each."""
        rows = {"winner": (self.job.data.winners, winners), "loser": (self.job.data.losers, losers)}
        return {
            side: self._collect_side(side, [rows[side][0][i] for i in rows[side][1]], record, weight)
            for side in self.method.sides
        }

    def _collect_side(self, side: str, examples: list[Example], record: StepRecord, weight: float = 1.0) -> Tensor:
        """All micro-batches of one side: the gradient of `weight` times the mean negative log-likelihood.

        Returns the log-probabilities of this process's examples in their places, (N,), and zeros.
        """
        name, n = {"winner": "chosen", "loser": "rejected"}[side], len(examples)
        found = torch.zeros(n, device=self.device)
        with getattr(self.optimizer, side)():
            for micro in self.scorer.micro_batches(examples, record):
                completion = self.scorer.score([examples[i] for i in micro.rows])
                loss = weight * nll(completion, self.job.config.loss_reduction).sum() / n * micro.counts
                (self.ranks.size * loss).backward()
                if micro.counts:
                    found[micro.rows] = completion.logp.detach()
                record.add(**{keys.logps(name): completion.logp.sum() / n * micro.counts})
                if side == "winner":
                    record.add(**{keys.LOSS: loss})
        return found

    def _collect_each_pair(self, indices: list[int], record: StepRecord) -> list[Gram]:
        """The mean over pairs of each one's own mixture; returns their Gram numbers.

        Several processes share the memory of it, not the work: each runs every pair, and has its share in the sums.
        """
        data, found, share = self.job.data, [], 1 / len(indices)
        told = share / self.ranks.size

        def loss(side: str, i: int, seen: dict[str, Tensor]) -> Tensor:
            row = (data.winners if side == "winner" else data.losers)[i]
            completion = self.scorer.score([row])
            value = nll(completion, self.job.config.loss_reduction).sum()
            seen[side] = completion.logp.detach()
            name = {"winner": "chosen", "loser": "rejected"}[side]
            if self.ranks.first:
                tokens = len(row.prompt_ids) + len(row.completion_ids)
                record.tokens, record.slots = record.tokens + tokens, record.slots + tokens
            record.add(**{keys.logps(name): seen[side].sum() * told})
            if side == "winner":
                record.add(**{keys.LOSS: value * told})
            return value

        with self.optimizer.winner():
            for i in indices:
                seen: dict[str, Tensor] = {}
                winner, loser = (partial(loss, side, i, seen) for side in ("winner", "loser"))
                rule = lambda gram, i=i, seen=seen: scaled(  # noqa: E731
                    self.method.rule, self._weight([i], seen, record, told)
                )(gram)
                found.append(add_pair(self.model.parameters(), winner, loser, rule, share))
        return found

    def _weight(self, indices: list[int], logps: dict[str, Tensor], record: StepRecord, share: float = 1.0) -> Tensor:
        """The mean weight that a loss gives to pairs with these log-probabilities, shape ()."""
        assert self.method.weight is not None
        A, B = self.scorer.references(indices)
        d_w, _ = weights(LOSSES[self.method.weight], pairs_of(logps["winner"], logps["loser"], A, B), beta=self.job.beta)
        record.add(**{keys.WEIGHT: share * d_w.mean()})
        return d_w.mean().double()

    def _collect_scheduled(self, objective: Objective, record: StepRecord) -> dict[str, float]:
        """All micro-batches of the streams whose step this is; returns what the schedule goes by.

        Both streams' next rows are fixed before the choice, and a stream that has no step keeps them for its next one.
        """
        rows = {name: self.streams[name].rows(self.steps_of[name])[0] for name in objective.active}
        known: dict[str, float] = {}
        if isinstance(objective, MixedObjective):
            weights = objective.weights
            objective({name: partial(self._collect_stream, name, rows[name], record, weights[name]) for name in rows})
            used = list(rows)
        else:
            assert isinstance(objective, OneAtATime)
            seen: list[str] = []

            def evaluate(name: str) -> Tensor:
                seen.append(name)
                return self.ranks.size * torch.stack(list(self._losses(name, rows[name], StepRecord()))).sum()

            name = objective.choose({name: partial(evaluate, name) for name in rows})
            if isinstance(objective, MaxGapObjective):  # which takes the mean over processes
                known = {keys.objective(n): objective.losses[n] for n in seen if n != name}
            known |= {keys.gap(n): gap for n, gap in objective.gaps.items()}
            known[keys.PREFERENCE_STEP] = float(name == keys.PREFERENCE)
            objective.observe(name, self.ranks.size * self._collect_stream(name, rows[name], record))
            used = [name]
        for name in used:
            self.steps_of[name] += 1
        return known | {keys.epochs_of(name): n / self.streams[name].steps_per_epoch for name, n in self.steps_of.items()}

    def _collect_stream(self, name: str, indices: list[int], record: StepRecord, weight: float = 1.0) -> Tensor:
        """The gradient of one stream's batch; returns this process's share of its objective, whatever the gradient is of."""
        if name == keys.PREFERENCE and self.method.loss == "nll":
            logps = {side: self.ranks.sum(x) for side, x in self._collect_sides(indices, indices, record, weight).items()}
            A, B = self.scorer.references(indices)
            beta = self.job.beta or EVAL_BETA
            loss = dpo_of(logps["winner"], logps["loser"], A, B, beta).mean() / self.ranks.size
        else:
            loss = self._collect(self._losses(name, indices, record), record, weight)
        record.add(**{keys.objective(name): loss})
        return loss

    def _losses(self, name: str, indices: list[int], record: StepRecord) -> Iterator[Tensor]:
        return (self._pair_losses if name == keys.PREFERENCE else self._supervised_losses)(indices, record)

    def _collect(self, losses: Iterable[Tensor], record: StepRecord, weight: float = 1.0) -> Tensor:
        """The gradient of `weight` times the sum of micro-batches' losses, added to the chosen's; returns the sum.

        Gradients are averaged over the processes, and the batch's loss is the sum of theirs: hence the factor.
        """
        found = []
        with self.optimizer.winner():
            for loss in losses:
                (self.ranks.size * weight * loss).backward()
                found.append(loss.detach())
                record.add(**{keys.LOSS: weight * loss})
        return torch.stack(found).sum()

    def _supervised_losses(self, indices: list[int], record: StepRecord) -> Iterator[Tensor]:
        """Each micro-batch's share of the mean negative log-likelihood of supervised rows."""
        assert self.job.joint is not None
        examples = [self.job.joint.supervised[i] for i in indices]
        for micro in self.scorer.micro_batches(examples, record):
            completion = self.scorer.score([examples[i] for i in micro.rows])
            yield nll(completion, self.job.config.loss_reduction).sum() / len(indices) * micro.counts

    def _kto_losses(self, winners: list[int], losers: list[int], record: StepRecord) -> Iterator[Tensor]:
        """Each micro-batch's share of the KTO loss: both sides' means, of pairs or not, with one divergence."""
        data, beta = self.job.data, self.job.beta or EVAL_BETA
        places = [*winners, *(len(data.winners) + i for i in losers)]
        policy = self.scorer.logps([self.scorer.mismatched[k] for k in places])[0]
        z_ref = (policy - self.scorer.reference["train_mismatched"][places]).mean().clamp(min=0).item()
        record.add(**{keys.KL: torch.tensor(z_ref / self.ranks.size, device=self.device)})
        for name, rows, indices in (("chosen", data.winners, winners), ("rejected", data.losers, losers)):
            examples = [rows[i] for i in indices]
            for micro in self.scorer.micro_batches(examples, record):
                completion = self.scorer.score([examples[i] for i in micro.rows])
                ref = self.scorer.reference[f"train_{name}"][[indices[i] for i in micro.rows]].to(self.device)
                wanted = torch.full((len(micro.rows),), name == "chosen", device=self.device)
                losses = kto_unpaired(completion, ref, wanted, beta=beta, z_ref=z_ref, **self.job.loss_args)
                share = len(micro.rows) / len(indices) * micro.counts
                if self.probing:
                    side = lambda pairs, wanted=wanted, ref=ref, name=name: kto_unpaired(  # noqa: E731
                        getattr(pairs, name), ref, wanted, beta=beta, z_ref=z_ref, **self.job.loss_args
                    )
                    d = weights(side, Pairs(completion, completion))[name == "rejected"]
                    record.add(**{keys.weight(name): d.mean() * share})
                rewards = beta * (completion.logp - ref).mean()
                record.add(**{keys.logps(name): completion.logp.mean() * share, keys.reward(name): rewards * share})
                yield losses.sum() / len(indices) * micro.counts

    def _pair_losses(self, indices: list[int], record: StepRecord) -> Iterator[Tensor]:
        """Each micro-batch's share of the mean preference loss."""
        data, beta = self.job.data, self.job.beta
        options = self.job.loss_args | ({} if beta is None else {"beta": beta})
        longer = [max(data.winners[i], data.losers[i], key=lambda e: len(e.completion_ids)) for i in indices]
        for micro in self.scorer.micro_batches(longer, record, answers=2):
            rows, states = [indices[i] for i in micro.rows], [] if self.sparse else None
            both = self.scorer.score([data.winners[i] for i in rows] + [data.losers[i] for i in rows], states=states)
            n = len(rows)
            chosen, rejected = Completion(both.logps[:n], both.mask[:n]), Completion(both.logps[n:], both.mask[n:])
            pairs = Pairs(chosen, rejected)
            if self.method.reference:
                pairs = Pairs(chosen, rejected, *self.scorer.references(rows))
            share = n / len(indices) * micro.counts
            record.add(
                **{keys.logps(keys.CHOSEN): chosen.logp.mean() * share, keys.logps(keys.REJECTED): rejected.logp.mean() * share}
            )
            if self.method.reference and beta is not None:
                ratios = pairs.log_ratios()
                record.add(**{k: v * share for k, v in rewards_of(ratios[0], ratios[1], beta).items()})
            if self.sparse is not None and states is not None:
                losses, on = self.sparse.losses(chosen, rejected, states[0], rows, **options)
                record.add(**{name: value * share for name, value in on.items()})
            else:
                entry = LOSSES["dpo" if self.method.schedule else self.method.loss]
                losses = entry(pairs, **options)
                if self.probing:
                    found = zip(keys.SIDES, weights(entry, pairs, **options))
                    record.add(**{keys.weight(side): d.mean() * share for side, d in found})
            yield losses.sum() / len(indices) * micro.counts

    def _probes(self, step: int) -> bool:
        every, method = self.job.preference.probe_steps, self.method
        both = self.job.data.paired or method.loss == "kto"
        return bool(every and step % every == 0 and both) and not (method.two_gradients or method.per_pair or method.schedule)

    @contextmanager
    def _probe(self, winners: list[int], losers: list[int]) -> Iterator[Probe]:
        """Watch what the step does to the mean log-probabilities of its batch."""
        size = self.ranks.size

        def mean(rows: list[Example], indices: list[int]) -> Iterator[Tensor]:
            examples = [rows[i] for i in indices]
            with without_dropout(self.model):
                for micro in self.scorer.micro_batches(examples, StepRecord()):
                    logps = self.scorer.score([examples[i] for i in micro.rows]).logp
                    yield size * logps.sum() / len(indices) * micro.counts  # processes' gradients are averaged

        data = self.job.data
        sides = partial(mean, data.winners, winners), partial(mean, data.losers, losers)
        with probe(self.trained.parameters(), *sides) as seen:
            yield seen
        self.scorer.reshard()
        seen.realised = tuple((self.ranks.sum(torch.tensor(seen.realised, device=self.device)) / size).tolist())
