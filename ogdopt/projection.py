"""Rules: pure functions from the Gram numbers of two gradients to the coefficients that mix them.

A rule gets a `Gram` whose entries are blocks (one for the whole model, or one a parameter group or tensor) and returns
`(a, b)` of the same shape: the step's gradient is `a g_w + b g_l`.

    ogd:     (1, -max(0, wl)/ll)     the winner's gradient without the part that would also help the loser
    watch:   (1, 0)                  the winner's gradient; measures and changes nothing

Orthogonal gradient descent, Definition 4.1: u = g_w - c g_l with c = max(0, <g_w, g_l>)/|g_l|^2 is the Euclidean
projection of g_w on the half-space {v : <v, g_l> <= 0}. Therefore, for the step -eta u and to first order,

    the winner's loss falls:           <-eta u, g_w> = -eta |u|^2 <= 0                  (theorem 5.3)
    the loser's loss does not fall:    <-eta u, g_l> = eta max(0, -wl) >= 0             (theorem 5.4)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ogdopt.gram import Gram

Rule: TypeAlias = Callable[[Gram], tuple[Tensor, Tensor]]
Scope: TypeAlias = Literal["global", "group", "tensor"]
SCOPES = ("global", "group", "tensor")


def ogd(gram: Gram) -> tuple[Tensor, Tensor]:
    """Orthogonal gradient descent (Definition 4.1): coefficients `(1, -max(0, wl)/ll)`, one pair a block.

    - `g_l = 0`: nothing to remove, (1, 0).
    - conflict, `wl <= 0`: (1, 0), the winner's gradient bit for bit.
    - parallel, `wl > 0` and 1 - cos^2 within rounding: (0, 0), since what is left of g_w would be rounding noise that
      an adaptive optimizer blows up to full steps.
    - non-finite numbers: NaN.

    >>> import torch
    >>> one = torch.ones((), dtype=torch.float64)
    >>> [x.item() for x in ogd(Gram(ww=2 * one, wl=one, ll=4 * one))]
    [1.0, -0.25]
    """
    ww, wl, ll = gram.ww, gram.wl, gram.ll
    c = torch.where(ll > 0, wl.clamp(min=0) / ll, 0.0)
    # Written without ww * ll, which over- or underflows long before the numbers themselves do.
    sine2 = 1 - (wl / ww.sqrt() / ll.sqrt()) ** 2
    parallel = (wl > 0) & (sine2 <= gram.parallel)
    a = torch.where(parallel, 0.0, torch.ones_like(ww))
    b = torch.where(parallel, 0.0, -c)
    finite = (ww + wl + ll).isfinite()
    return torch.where(finite, a, torch.nan), torch.where(finite, b, torch.nan)


def watch(gram: Gram) -> tuple[Tensor, Tensor]:
    """Coefficients (1, 0): the winner's gradient goes on unchanged, and only the numbers are kept.

    >>> import torch
    >>> one = torch.ones((), dtype=torch.float64)
    >>> [x.item() for x in watch(Gram(ww=2 * one, wl=one, ll=4 * one))]
    [1.0, 0.0]
    """
    finite = torch.where((gram.ww + gram.wl + gram.ll).isfinite(), 0.0, torch.nan)
    return 1.0 + finite, finite


def block_sizes(scope: Scope, group_sizes: Sequence[int]) -> list[int]:
    """How many consecutive tensors form a block of the projection, for parameter groups of `group_sizes` tensors.

    "global" is the paper; "group" and "tensor" project block by block, which keeps both theorems (the sums of what holds
    in each block) at the price of a shorter descent on the winner's loss.

    Raises ValueError for an unknown scope.

    >>> block_sizes("global", [2, 3]), block_sizes("group", [2, 3]), block_sizes("tensor", [2, 3])
    ([5], [2, 3], [1, 1, 1, 1, 1])
    """
    if scope == "global":
        return [sum(group_sizes)]
    if scope == "group":
        return [n for n in group_sizes if n]
    if scope == "tensor":
        return [1] * sum(group_sizes)
    raise ValueError(f"scope is {scope!r}; expected one of {', '.join(map(repr, SCOPES))}")
