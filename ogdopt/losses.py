"""Preference losses: pure functions of the token log-probabilities of (chosen, rejected) completions.

Notation: `a = log pi(y_w|x)`, `b = log pi(y_l|x)`, `A`, `B` the same under the reference policy; sums over the completion's
tokens. Every loss in `LOSSES` maps a `Pairs` of B pairs to a float tensor of shape (B,), one number a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Completion(NamedTuple):
    """Log-probabilities of completions' tokens and which of them count, both (B, T)."""

    logps: Tensor
    """log pi(y_t | x, y_<t), nats; anything finite where the mask is False."""
    mask: Tensor
    """True (or 1) at the completion's tokens."""

    @property
    def length(self) -> Tensor:
        """Tokens of each completion, (B,)."""
        return self.mask.sum(-1)

    @property
    def logp(self) -> Tensor:
        """Sum over the completion's tokens, (B,), nats, in float32 at least."""
        logps = self.logps if self.logps.dtype == torch.float64 else self.logps.float()
        return torch.where(self.mask.bool(), logps, 0.0).sum(-1)


class Pairs(NamedTuple):
    """A batch of preference pairs, and what the reference policy makes of them where a loss needs it."""

    chosen: Completion
    rejected: Completion
    ref_chosen: Tensor | None = None
    """A: log-probability of the chosen completion under the reference, (B,), nats."""
    ref_rejected: Tensor | None = None
    """B: the same of the rejected completion, (B,)."""

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """(a - A, b - B), each (B,). Raises ValueError without reference log-probabilities."""
        if self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError(
                "this loss compares with a reference policy, but ref_chosen or ref_rejected is None; "
                "compute the reference model's log-probabilities of both completions and pass them in Pairs"
            )
        return self.chosen.logp - self.ref_chosen, self.rejected.logp - self.ref_rejected


@dataclass(frozen=True)
class Entry:
    """A loss in the table: the function and what it needs."""

    function: Callable[..., Tensor]
    reference: bool
    """Whether it needs `ref_chosen` and `ref_rejected`."""

    def __call__(self, pairs: Pairs, **hyperparameters: float) -> Tensor:
        """One number a pair, (B,)."""
        return self.function(pairs, **hyperparameters)


def nll(completion: Completion, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Negative log-likelihood of each completion, (B,): the sum, or the mean, over its tokens.

    With "sum" the batch mean is the paper's L(y) = -mean log pi(y|x), for which corollary 5.5 is exact. "mean" weighs
    sequences regardless of length. A completion without tokens costs 0.

    >>> import torch
    >>> c = Completion(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[1, 1, 0]]))
    >>> nll(c).item(), nll(c, "mean").item()
    (3.0, 1.5)
    """
    if reduction == "sum":
        return -completion.logp
    if reduction == "mean":
        return -completion.logp / completion.length.clamp(min=1)
    raise ValueError(f"reduction is {reduction!r}; expected 'sum' or 'mean'")


def dpo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Direct preference optimization, -log sigmoid(beta ((a - A) - (b - B))), (B,). Rafailov et al. 2023, eq. 7.

    Raises ValueError without reference log-probabilities.

    >>> import torch
    >>> c = Completion(torch.tensor([[-1.0]]), torch.tensor([[1]]))
    >>> round(dpo(Pairs(c, c, torch.tensor([-1.0]), torch.tensor([-1.0]))).item(), 4)
    0.6931
    """
    chosen, rejected = pairs.log_ratios()
    return -logsigmoid(beta * (chosen - rejected))


LOSSES: dict[str, Entry] = {
    "dpo": Entry(dpo, reference=True),
}
