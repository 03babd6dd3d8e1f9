"""Runs of the entanglement study: what losses, rules and styles of answers do to both log-likelihoods of one small model."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ogdopt import PairedGradient
from ogdopt.diagnostics import cosines, entanglement, predicted, probe, token_products, weights
from ogdopt.gram import gram
from ogdopt.losses import LOSSES, Completion, Pairs, dpo
from ogdopt.per_pair import add_pair
from ogdopt.projection import Rule, normalized, scaled
from ogdopt_harness.analysis.tax import tax
from ogdopt_harness.common import keys
from ogdopt_harness.config.schema import SparseConfig
from ogdopt_harness.data.examples import Example, Preferences, collate
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.studies.sentiment_lab import HELD_OUT, PREFERENCES, STYLES, WIDTH, Sentiment, accuracy, score, tuned
from ogdopt_harness.training.methods import METHODS
from ogdopt_harness.training.sparse import SparseTerm

BETA = 0.1
BATCH, STEPS, WALK = 32, 24, 10
"""Pairs in a batch, and batches of a run of the first part and of the others; each pair is seen once."""
MEASURED = 6
"""Steps between two looks at held-out pairs."""
RATE = 3e-4
"""Of AdamW, in the first part."""
LENGTH = 0.01
"""L2 length of every change of the parameters in the other parts, which makes losses of any scale comparable."""
PROBED = 8
"""Held-out pairs whose own gradients are compared, at the start and at the end."""
LOSS_STYLE = "long suffix"
SMALL = {"ipo": {"average_log_prob": True}, "sppo": {"beta": BETA}, "simpo": {"beta": BETA}, "dpop": {"beta": BETA}}
"""Where the runs of the paper (its C.3) differ from the defaults of `ogdopt.losses`."""


CASES = {(True, False): 1.0, (False, False): 2.0, (True, True): 3.0, (False, True): 4.0}
"""Table 1, by whether the chosen and the rejected rise."""


@dataclass
class Course:
    """What became of one run."""

    changes: list[tuple[float, float]] = field(default_factory=list)
    """Of the mean held-out log-probability of chosen and rejected answers, nats, from (0, 0) at the start."""
    per_token: bool = False
    batches: list[tuple[float, float]] = field(default_factory=list)
    """What each step did to both of its own batch, nats."""
    told: list[bool] = field(default_factory=list)
    """Whether the conditions had both directions of a batch right, by step."""
    cases: list[tuple[float, float]] = field(default_factory=list)
    """Table 1's case as predicted and as observed, by step."""
    forgotten: float = 0.0
    """TAX, in percent."""


class Runs:
    """All runs of one seed."""

    def __init__(self, base: PreTrainedModel, data: Sentiment, seed: int) -> None:
        self.base, self.data, self.seed = base, data, seed
        self.starts = {style: tuned(base, data, style, seed) for style in STYLES}
        order = torch.randperm(len(PREFERENCES), generator=torch.Generator().manual_seed(seed)).tolist()
        self.batches = [[PREFERENCES[i] for i in order[k * BATCH : (k + 1) * BATCH]] for k in range(STEPS)]
        self.held_out = HELD_OUT[:64]
        self.references = {style: self._references(style) for style in STYLES}

    def _references(self, style: str) -> dict[int, tuple[Tensor, Tensor]]:
        """Log-probabilities of each row's chosen and rejected answer at the style's start."""
        rows = [row for batch in self.batches for row in batch]
        with torch.no_grad():
            A, B = (score(self.starts[style], side).logp for side in self.sides(style, rows))
        return {row: (A[k], B[k]) for k, row in enumerate(rows)}

    def sides(self, style: str, rows: Sequence[int]) -> tuple[list[Example], list[Example]]:
        """Chosen and rejected answers."""
        chosen, rejected = ([self.data.answer(row, style, flipped) for row in rows] for flipped in (False, True))
        return chosen, rejected

    def values(self, model: PreTrainedModel, style: str, mean: bool = False) -> np.ndarray:
        """Mean log-probability of held-out chosen and rejected answers, or of their tokens."""
        with torch.no_grad():
            scored = [score(model, side) for side in self.sides(style, self.held_out)]
        return np.array([(c.mean_logp if mean else c.logp).mean().item() for c in scored])

    def tuned_by_dpo(self, style: str) -> tuple[Course, list[float], PreTrainedModel]:
        """DPO with AdamW from the style's start; cosines of held-out pairs at the start and at the end."""
        model, found = copy.deepcopy(self.starts[style]), Course([(0.0, 0.0)])
        start, angles = self.values(model, style), [self.angle(model, style)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        for k, rows in enumerate(self.batches, 1):
            optimizer.zero_grad()
            dpo(self.pairs(model, style, rows), beta=BETA).mean().backward()
            optimizer.step()
            if k % MEASURED == 0:
                found.changes.append(tuple(self.values(model, style) - start))
        return found, [*angles, self.angle(model, style)], model

    def pairs(self, model: PreTrainedModel, style: str, rows: Sequence[int]) -> Pairs:
        """A batch of pairs with their reference."""
        A, B = (torch.stack([self.references[style][row][k] for row in rows]) for k in (0, 1))
        chosen, rejected = (score(model, side) for side in self.sides(style, rows))
        return Pairs(chosen, rejected, A, B)

    def angle(self, model: PreTrainedModel, style: str) -> float:
        """Mean cosine of the two gradients of single held-out pairs."""
        found, parameters = [], list(model.parameters())
        for pair in zip(*self.sides(style, self.held_out[:PROBED])):
            ws, ls = (torch.autograd.grad(score(model, [side]).logp.sum(), parameters) for side in pair)
            found.append(entanglement(gram(ws, ls))[keys.ENTANGLED])
        return statistics.fmean(found)

    def tokens(self, style: str) -> np.ndarray:
        """Cosines of the gradients of a held-out pair's tokens, chosen by rejected, at the style's start; mean over pairs."""
        model, found = self.starts[style], []
        for chosen, rejected in zip(*self.sides(style, self.held_out[:PROBED])):
            both = score(model, [chosen, rejected])
            angles = cosines(token_products(both.logps[both.mask], model.parameters()))
            n = len(chosen.completion_ids)
            found.append(angles[:n, n:].numpy())
        return np.mean(found, 0)

    def of_loss(self, name: str) -> Course:
        """Steps of equal length along a loss's gradient, each one watched."""
        options = SMALL.get(name, {"beta": BETA} if METHODS.get(name, METHODS["dpo"]).beta else {})
        mean = name in ("simpo", "ipo")

        def gradient(model: PreTrainedModel, pairs: Pairs, rows: Sequence[int]) -> tuple[float, float]:
            LOSSES[name](pairs, **options).mean().backward()
            d_w, d_l = (d.mean().item() for d in weights(LOSSES[name], pairs, **options))
            return d_w, d_l

        return self.walk(gradient, watched=True, mean=mean)

    def of_rule(self, rule: Rule) -> Course:
        """Steps of equal length along a rule's mixture of a batch's two gradients."""

        def gradient(model: PreTrainedModel, pairs: Pairs, rows: Sequence[int]) -> None:
            optimizer = PairedGradient(torch.optim.SGD(model.parameters(), lr=1.0), rule)
            for side, completion in ((optimizer.loser, pairs.rejected), (optimizer.winner, pairs.chosen)):
                with side():
                    (-completion.logp.mean()).backward()
            optimizer.project()

        return self.walk(gradient)

    def of_pairs(self) -> Course:
        """Normalized preference optimization of each pair, with DPO's weights, on the first eight pairs of each batch."""

        def gradient(model: PreTrainedModel, pairs: Pairs, rows: Sequence[int]) -> None:
            kappas = weights(dpo, pairs, beta=BETA)[0]
            for kappa, *pair in zip(kappas.tolist()[:8], *self.sides(LOSS_STYLE, rows)):
                winner, loser = (lambda x=x: -score(model, [x]).logp.sum() for x in pair)
                add_pair(model.parameters(), winner, loser, scaled(normalized, kappa), 1 / 8)

        return self.walk(gradient)

    def of_sparse(self) -> Course:
        """Sparse preference optimization; Adam learns the significance, which hidden states predict, together with it."""
        start = self.starts[LOSS_STYLE]
        sides = self.sides(LOSS_STYLE, PREFERENCES)
        rows = Preferences(sides[0], sides[1], paired=True)
        term = SparseTerm(SparseConfig(), rows, WIDTH, False, torch.device("cpu"))
        with torch.no_grad():
            known = [score(start, side) for side in sides]
        term.reference = torch.cat([completion.logps[completion.mask] for completion in known])
        learner = torch.optim.Adam(term.significance.parameters(), lr=2e-2)

        def gradient(model: PreTrainedModel, pairs: Pairs, rows: Sequence[int]) -> None:
            chosen, rejected = self.sides(LOSS_STYLE, rows)
            states: list[Tensor] = []
            both = completion_logps(model, *collate([*chosen, *rejected], 0), states)
            n = len(rows)
            parts = Completion(both.logps[:n], both.mask[:n]), Completion(both.logps[n:], both.mask[n:])
            learner.zero_grad()
            places = [row - PREFERENCES.start for row in rows]
            term.losses(*parts, states[0], places, beta=BETA)[0].mean().backward()
            learner.step()

        return self.walk(gradient)

    def walk(
        self, gradient: Callable[[PreTrainedModel, Pairs, Sequence[int]], Any], watched: bool = False, mean: bool = False
    ) -> Course:
        """Steps of length LENGTH against the gradient that `gradient` leaves in p.grad, from the start of one style."""
        start = self.starts[LOSS_STYLE]
        model, found = copy.deepcopy(start), Course([(0.0, 0.0)], per_token=mean)
        before = self.values(model, LOSS_STYLE, mean)
        parameters = list(model.parameters())
        for rows in self.batches[:WALK]:
            model.zero_grad()
            given = gradient(model, self.pairs(model, LOSS_STYLE, rows), rows)
            grads = [p.grad for p in parameters if p.grad is not None]
            norm = torch.stack([g.norm() for g in grads]).norm()

            @torch.no_grad()
            def step(norm: Tensor = norm) -> None:
                for p in parameters:
                    if p.grad is not None and norm > 0:
                        p.sub_(p.grad, alpha=LENGTH / norm.item())

            sides = self.sides(LOSS_STYLE, rows)
            if watched:
                chosen, rejected = (partial(mean_logp, model, side) for side in sides)
                with probe(parameters, chosen, rejected) as seen:
                    step()
                found.batches.append(seen.realised)
                signs = [(x > 0, y > 0) for x, y in (predicted(seen.gram, *given), seen.realised)]
                found.told.append(signs[0] == signs[1])
                found.cases.append((entanglement(seen.gram, *given)[keys.CASE], CASES[signs[1]]))
            else:
                with torch.no_grad():
                    was = [mean_logp(model, side).item() for side in sides]
                    step()
                    a, b = (mean_logp(model, side).item() - x for side, x in zip(sides, was))
                found.batches.append((a, b))
        found.changes.append(tuple(self.values(model, LOSS_STYLE, mean) - before))
        found.forgotten = tax(self.known(start), self.known(model))
        return found

    def known(self, model: PreTrainedModel) -> list[float]:
        """Accuracies on what was pretrained besides."""
        return [accuracy(model, [task(row) for row in HELD_OUT]) for task in (self.data.first_word, self.data.loud)]


def mean_logp(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Mean log-probability of answers, nats, shape ()."""
    return score(model, examples).logp.mean()
