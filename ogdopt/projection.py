"""Rules: pure functions from the Gram numbers of two gradients to the coefficients that mix them.

A rule gets a `Gram` whose entries are blocks: one for the whole model, or one a parameter group or tensor. It returns `(a, b)`
of the same shape. The step's gradient is `a g_w + b g_l`.

    orthogonal   (1, -max(0, wl)/ll)         OGD: the winner's gradient without the part that would also help the loser
    normalized   (1/|g_w|, -1/|g_l|)         the difference of the unit vectors
    interval(t)  between the two and beyond  every direction that raises winners and lowers losers
    difference ("sum"), mgda, pcgrad, upgrad the gradients of L_w and -L_l as two objectives of equal right
    gru          (max(0, wl)/ww, -1)         unlearning the loser without its part against the winner
    pcd(tau)     the winner first            and for the loser a share tau of the progress that it alone would make
    averaged(d)  `normalized`                by running means of the norms
    watch        (1, 0)                      the winner's gradient; measures and changes nothing

Orthogonal gradient descent, Definition 4.1: u = g_w - c g_l with c = max(0, <g_w, g_l>)/|g_l|^2 is the Euclidean
projection of g_w on the half-space {v : <v, g_l> <= 0}. Therefore, for the step -eta u and to first order,

    the winner's loss falls:           <-eta u, g_w> = -eta |u|^2 <= 0                  (theorem 5.3)
    the loser's loss does not fall:    <-eta u, g_l> = eta max(0, -wl) >= 0             (theorem 5.4)

Every rule returns NaN where the numbers are not finite, and leaves a zero gradient out (MGDA then stands still, as by its
definition). Where the gradients are parallel, all rules but sum and watch return (0, 0). What is left of their mixture there
is rounding noise, which an adaptive optimizer would blow up to full steps. The numbers hold for gradients of norms
from 1e-150 to 1e150, where their squares fit float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ogdopt.gram import Gram, ratio

Rule: TypeAlias = Callable[[Gram], tuple[Tensor, Tensor]]
Scope: TypeAlias = Literal["global", "group", "tensor"]
SCOPES = ("global", "group", "tensor")
__all__ = [
    "RULES",
    "SCOPES",
    "Rule",
    "Scope",
    "averaged",
    "block_sizes",
    "difference",
    "gru",
    "interval",
    "mgda",
    "normalized",
    "orthogonal",
    "pcd",
    "pcgrad",
    "scaled",
    "upgrad",
    "watch",
]


def orthogonal(gram: Gram) -> tuple[Tensor, Tensor]:
    """Orthogonal gradient descent (Definition 4.1): coefficients `(1, -max(0, wl)/ll)`, one pair a block.

    - `g_l = 0`: nothing to remove, (1, 0).
    - conflict, `wl <= 0`: (1, 0), the winner's gradient bit for bit.
    - parallel, `wl > 0` and 1 - cos^2 within rounding: (0, 0).

    >>> import torch
    >>> one = torch.ones((), dtype=torch.float64)
    >>> [x.item() for x in orthogonal(Gram(ww=2 * one, wl=one, ll=4 * one))]
    [1.0, -0.25]
    """
    return _unless_parallel(gram, torch.ones_like(gram.ww), -ratio(gram.wl.clamp(min=0), gram.ll))


def normalized(gram: Gram) -> tuple[Tensor, Tensor]:
    """Normalized preference optimization ("gradient entanglement", section 5.1): `(1/|g_w|, -1/|g_l|)`.

    The winner's likelihood rises and the loser's falls at every step, whatever the angle; parallel gradients give (0, 0).
    Reward calibration (RC, arXiv:2604.18239) weighs DPO's two gradients so that their sum has this direction.

    >>> import torch
    >>> one = torch.ones((), dtype=torch.float64)
    >>> [x.item() for x in normalized(Gram(ww=4 * one, wl=one, ll=16 * one))]
    [0.5, -0.25]
    """
    one = torch.ones_like(gram.ww)
    return _unless_parallel(gram, ratio(one, gram.ww.sqrt()), -ratio(one, gram.ll.sqrt()))


def interval(t: float) -> Rule:
    """The rule at place `t` of all directions that raise winners and lower losers, 0 <= t <= 1.

    With wl > 0, `r g_w - g_l` does both exactly for r in [wl/ww, ll/wl]; `t` runs through it geometrically.

    - t = 1 is OGD: the loser stays, and the winner rises most.
    - t = 1/2 has the direction of `normalized`.
    - t = 0 leaves the winner where it is, and lowers the loser.

    With cos+ = max(0, cosine) the coefficients are `(1, -|g_w|/|g_l| cos+^(2t-1))` from t = 1/2 on and
    `(cos+^(1-2t), -|g_w|/|g_l|)` below, which is continuous also where the gradients conflict.

    Raises ValueError for a `t` outside [0, 1].
    """
    if not 0 <= t <= 1:
        raise ValueError(f"interval({t}): expected a number from 0 (the winner stays) to 1 (the loser stays, OGD)")
    if t == 1:
        return orthogonal
    return _Interval(t)


@dataclass(frozen=True)
class _Interval:
    """A function that can be pickled."""

    t: float

    def __call__(self, gram: Gram) -> tuple[Tensor, Tensor]:
        kappa = gram.cosine.clamp(min=0) ** abs(2 * self.t - 1)
        lengths = ratio(gram.ww.sqrt(), gram.ll.sqrt())
        one = torch.ones_like(kappa)
        a, b = (one, kappa) if self.t >= 0.5 else (kappa, one)
        a = torch.where(gram.ll > 0, a, 1.0)
        return _unless_parallel(gram, a, -b * lengths)

    def __repr__(self) -> str:
        return f"interval({self.t})"


def scaled(rule: Rule, factor: Tensor | float) -> Rule:
    """The rule with both coefficients times `factor`.

    Normalized preference optimization steps by `kappa (G_w/|G_w| - G_l/|G_l|)` with the weight kappa of a loss.
    `diagnostics.weights` has kappa. For DPO it is beta sigmoid(-beta d) of a pair, or the mean over a batch.

    >>> import torch
    >>> one = torch.ones((), dtype=torch.float64)
    >>> [x.item() for x in scaled(normalized, 0.5)(Gram(ww=4 * one, wl=one, ll=16 * one))]
    [0.25, -0.125]
    """
    return _Scaled(rule, factor)


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A function that can be pickled."""

    rule: Rule
    factor: Tensor | float

    def __call__(self, gram: Gram) -> tuple[Tensor, Tensor]:
        a, b = self.rule(gram)
        return a * self.factor, b * self.factor

    def __repr__(self) -> str:
        return f"scaled({getattr(self.rule, '__name__', repr(self.rule))}, {self.factor})"


def pcgrad(gram: Gram) -> tuple[Tensor, Tensor]:
    """PCGrad on the gradients of L_w and -L_l: the sum of both, each without its part against the other.

    `(1 + max(0, wl)/ww, -1 - max(0, wl)/ll)`. Not OGD, which gives the second objective no weight of its own.
    """
    shared = gram.wl.clamp(min=0)
    return _unless_parallel(gram, 1 + ratio(shared, gram.ww), -1 - ratio(shared, gram.ll))


def upgrad(gram: Gram) -> tuple[Tensor, Tensor]:
    """UPGrad with equal preferences on L_w and -L_l: the mean of both gradients, each projected on their dual cone.

    For two objectives it is half of `pcgrad`. With preference (1, 0) it would be OGD.
    """
    a, b = pcgrad(gram)
    return a / 2, b / 2


def mgda(gram: Gram) -> tuple[Tensor, Tensor]:
    """MGDA on L_w and -L_l: the shortest vector `gamma g_w - (1 - gamma) g_l`, 0 <= gamma <= 1."""
    # The longer gradient has the smaller weight. That one is computed and the other is what it leaves of 1: the other way
    # round the small weight would be rounding noise of 1, and times the long gradient as large as the whole step.
    small = ratio(torch.minimum(gram.ww, gram.ll) + gram.wl, gram.ww + 2 * gram.wl + gram.ll).clamp(0, 1)
    longer = gram.ww > gram.ll
    return _unless_parallel(gram, torch.where(longer, small, 1 - small), -torch.where(longer, 1 - small, small))


def gru(gram: Gram) -> tuple[Tensor, Tensor]:
    """Gradient rectified unlearning: the ascent on L_l without its part against L_w, `(max(0, wl)/ww, -1)`.

    The winner's loss stays or falls, the loser's rises; it has the direction of `interval(0)` where gradients agree. A running
    mean of retained gradients, which the paper also uses, is `ogdopt.memory.Remembered` (GRU, arXiv:2503.09117).
    """
    return _unless_parallel(gram, ratio(gram.wl.clamp(min=0), gram.ww), -torch.ones_like(gram.wl))


def pcd(tau: float = 0.02) -> Rule:
    """Priority-Constrained Descent with L_w first and -L_l second, each by its present norm (arXiv:2606.29521).

    The vector nearest to g_w that gives the loser's ascent a share `tau` of the progress of a step of its own, scaled to the
    length of g_w. With tau = 0 it has the direction of OGD; for more gradients `cone.priority` is the same.

    Raises ValueError for a `tau` outside [0, 1].
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"pcd({tau}): expected a number from 0 (OGD) to 1")
    return _Priority(tau)


@dataclass(frozen=True)
class _Priority:
    """A function that can be pickled."""

    tau: float

    def __call__(self, gram: Gram) -> tuple[Tensor, Tensor]:
        cosine = gram.cosine
        there = (gram.ll > 0) & (gram.ww > 0)
        mu = torch.where(there, (self.tau + cosine).clamp(min=0), 0.0)
        # |u|^2 of unit vectors, as what is left across g_l and what remains along it: 1 - cos^2 + (mu - cos)^2.
        length = ((1 - cosine) * (1 + cosine) + (mu - cosine) ** 2).sqrt()
        a = ratio(torch.ones_like(mu), length)
        return _unless_parallel(gram, a, -a * mu * ratio(gram.ww.sqrt(), gram.ll.sqrt()))

    def __repr__(self) -> str:
        return f"pcd({self.tau})"


def averaged(decay: float = 0.98) -> Rule:
    """`normalized` by running means of the logarithms of both norms, `(1/N_w, -1/N_l)`, as RC has them (arXiv:2604.18239).

    The object remembers, block by block; give each optimizer its own. Its memory is in no checkpoint: after a resume the first
    step's norms are taken as they are. A `decay` of 0 is `normalized`. Zero gradients are left out and not remembered.

    Raises ValueError for a `decay` outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"averaged({decay}): expected a number from 0 to below 1")
    return _Averaged(decay)


@dataclass
class _Averaged:
    """A function that remembers, and can be pickled."""

    decay: float
    logs: Tensor | None = None
    """(2, K) means of the logarithms; NaN where nothing was seen yet."""

    def __call__(self, gram: Gram) -> tuple[Tensor, Tensor]:
        squares = torch.stack([gram.ww, gram.ll])
        fresh = squares.log() / 2
        old = torch.full_like(fresh, torch.nan) if self.logs is None or self.logs.shape != fresh.shape else self.logs.to(fresh)
        mean = torch.where(old.isnan(), fresh, self.decay * old + (1 - self.decay) * fresh)
        seen = fresh.isfinite()
        finite = (gram.ww + gram.wl + gram.ll).isfinite()  # a step that is left out is not remembered
        self.logs = torch.where(seen & finite, mean, old)
        a, b = torch.where(seen, torch.exp(-mean), 0.0)
        return _unless_parallel(gram, a, -b)

    def __repr__(self) -> str:
        return f"averaged({self.decay})"


def difference(gram: Gram) -> tuple[Tensor, Tensor]:
    """The rule "sum": the plain sum of the gradients of L_w and -L_l, (1, -1), gradient ascent on losers."""
    one = torch.ones_like(gram.ww)
    return _checked(gram, one, -one)


def watch(gram: Gram) -> tuple[Tensor, Tensor]:
    """Coefficients (1, 0): the winner's gradient goes on unchanged, and only the numbers are kept.

    >>> import torch
    >>> one = torch.ones((), dtype=torch.float64)
    >>> [x.item() for x in watch(Gram(ww=2 * one, wl=one, ll=4 * one))]
    [1.0, 0.0]
    """
    return _checked(gram, torch.ones_like(gram.ww), torch.zeros_like(gram.ww))


def _unless_parallel(gram: Gram, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), and (0, 0) where the gradients are parallel, so that their mixture is rounding noise."""
    return _checked(gram, torch.where(gram.same_direction, 0.0, a), torch.where(gram.same_direction, 0.0, b))


def _checked(gram: Gram, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    finite = (gram.ww + gram.wl + gram.ll).isfinite()
    return torch.where(finite, a, torch.nan), torch.where(finite, b, torch.nan)


def block_sizes(scope: Scope, group_sizes: Sequence[int]) -> list[int]:
    """How many consecutive tensors form a block of the projection, for parameter groups of `group_sizes` tensors.

    "global" is the paper. "group" and "tensor" project block by block. That keeps both theorems, since they hold in each block,
    at the price of a shorter descent on the winner's loss.

    Raises ValueError for an unknown scope.

    >>> block_sizes("global", [2, 3]), block_sizes("group", [2, 3]), block_sizes("tensor", [2, 3])
    ([5], [2, 3], [1, 1, 1, 1, 1])
    """
    total = sum(group_sizes)
    if scope == "global":
        return [total]
    if scope == "group":
        return [n for n in group_sizes if n]
    if scope == "tensor":
        return [1] * total
    raise ValueError(f"scope is {scope!r}; expected one of {', '.join(map(repr, SCOPES))}")


RULES: dict[str, Rule] = {
    "orthogonal": orthogonal,
    "normalized": normalized,
    "sum": difference,
    "mgda": mgda,
    "pcgrad": pcgrad,
    "upgrad": upgrad,
    "gru": gru,
    "watch": watch,
}
"""Rules by the names that `PairedGradient(base, "orthogonal")` takes."""
