"""Rules that are applied to each preference pair by itself, instead of to the gradients of a batch.

The gradients of a batch's mean log-probabilities can be mixed so that both promises hold for the mean. Where they are to hold
for each pair, as in the theory of normalized preference optimization, each pair has two gradients and coefficients of its own:

    with opt.winner():
        for k in range(n):
            add_pair(parameters, lambda: nll(chosen[k]), lambda: nll(rejected[k]), scaled(normalized, weight[k]), 1 / n)
    opt.step()
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ogdopt.gram import Gram, Value, gradients, gram
from ogdopt.passes import mix_
from ogdopt.projection import Rule


def add_pair(parameters: Iterable[Tensor], winner: Value, loser: Value, rule: Rule, share: float = 1.0) -> Gram:
    """Add `share` times the mixture of one pair's two gradients to what parameters hold in p.grad; its Gram numbers, (1,).

    The closures return the losses of the pair's winner and loser, each a scalar with a graph. Three gradients are kept
    meanwhile: this pair's two, and what the pairs before it have added up to. Under torch.distributed every rank gives the same
    pair: sharding spares memory, and no work. Raises RuntimeError, after one small message, where they give different ones,
    whose gradients would be averaged before they are mixed.
    """
    parameters = [p for p in parameters if p.requires_grad]
    held = [p.grad for p in parameters]
    (b_loss, ls), (a_loss, ws) = (gradients(closure, parameters) for closure in (loser, winner))
    _same_pair(torch.tensor([a_loss, b_loss], dtype=torch.float64, device=parameters[0].device))
    numbers = gram(ws, ls).pooled([len(parameters)])
    one = torch.ones((), dtype=torch.float64, device="cpu")
    a, b = (share * x[0] for x in rule(numbers))
    with torch.no_grad():
        for p, w, l, before in zip(parameters, ws, ls, held):
            if w is None and l is not None:
                w = torch.zeros_like(p)
            if w is not None:
                mix_(w, l, a, b)
                if before is not None:
                    mix_(before, w, one, one)
            p.grad = w if before is None else before
    return numbers


def _same_pair(losses: Tensor) -> None:
    """Raises RuntimeError where the ranks' losses, (2,), differ by more than rounding."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    highest = torch.cat([losses, -losses])
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    high, low = highest[:2], -highest[2:]
    if ((high - low) > 1e-3 * (1 + high.abs())).any():  # not where a loss is not finite, which the step judges
        raise RuntimeError(
            f"the ranks' losses of a pair lie between {low.tolist()} and {high.tolist()}, so they have different pairs, whose "
            "gradients would be averaged before they are mixed; give every rank the same pair, or mix the gradients of the "
            "whole batch"
        )
