"""Several gradients that one step must respect: the nearest vector that helps no loser and harms nothing that is kept.

With g_w the winner's gradient and g_1 .. g_K others, of sign -1 (losers: the step must not lower their loss) or +1 (kept: it
must not raise it), the step's gradient is

    u = argmin |u - g_w|^2   subject to   s_j <u, g_j> >= 0   for all j,

the Euclidean projection of g_w on a cone. For one loser it is orthogonal gradient descent (Definition 4.1). For one gradient
that is kept it is A-GEM, for several GEM. Projections in turn are something else: each may break what another one kept.

By duality u = g_w + sum_j c_j g_j with s_j c_j >= 0, so that inner products decide it: a quadratic program in K numbers. Every
set of constraints that can be active is tried at once, 2^K linear systems of K unknowns, and the feasible candidate nearest to
g_w is the solution. That is exact up to rounding, needs no iteration, and does not wait for the device.

To first order and for the step -eta u,

    the winner's loss falls:      <-eta u, g_w> = -eta |u|^2,    since u is orthogonal to u - g_w;
    what is kept does not rise:   <-eta u, g_k> <= 0;   losers' loss does not fall:  <-eta u, g_l> >= 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ogdopt.gram import ratio

MOST = 8
"""Gradients besides the winner's that can be asked for: 2^8 linear systems a block."""
DEPENDENT = 1e-14
"""sin^2 of the angle between a constraint and the others under which the numbers cannot tell it from them."""
LOOSE = 1e-6
"""By how much of |g_w| |g_j| a constraint may be missed where constraints depend on each other; beyond it has no solution."""


class Grams(NamedTuple):
    """Inner products of a winner's gradient and K others."""

    products: Tensor
    """(B, K + 1, K + 1) float64: <g_i, g_j> for each block, the winner first."""
    signs: tuple[int, ...]
    """(K): -1 for a loser, +1 for what is kept, 0 for a direction that the step must not take either way."""
    noise: Tensor | None = None
    """(B, K + 1) energy |e|^2 of the rounding of each gradient (`ogdopt.rounding`); None: 5e-13 of its own."""

    @property
    def norms(self) -> Tensor:
        """|g_i|, (B, K + 1)."""
        return self.products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """<g_i, g_j> / |g_i| |g_j|, (B, K + 1, K + 1); 0 where a gradient is 0."""
        norms = self.norms
        # Divided in turn: the product of two norms leaves the range long before they do.
        found = self.products / norms[:, :, None] / norms[:, None, :]
        return torch.where((norms[:, :, None] > 0) & (norms[:, None, :] > 0), found, 0.0)


def nearest(grams: Grams, progress: float | Sequence[float] = 0.0) -> Tensor:
    """Coefficients (B, K + 1) of the vector nearest to g_w that keeps every constraint; the first column is 1 or 0.

    With `progress` tau, one number or one for each, the constraints are s_j <u, g_j> >= tau |g_j| |g_w|. A gradient of 0 is
    no constraint. The coefficients are 0 where u is rounding noise, (1, 0, ..) where no vector keeps the constraints, which
    takes a positive tau, and NaN where a product is not finite.

    Directions of sign 0 are taken out of all others first, of which there may be any number.

    Raises ValueError for more than 8 gradients of a sign, and for a `progress` outside [0, 1].
    """
    fixed = [k for k, sign in enumerate(grams.signs, 1) if sign == 0]
    if fixed:
        return _within(grams, fixed, progress)
    count = len(grams.signs)
    if count > MOST:
        raise ValueError(f"{count} gradients are to be respected; expected at most {MOST}, so add some of them up to one")
    like = grams.products
    tau = torch.tensor([progress] * count if isinstance(progress, (int, float)) else list(progress), dtype=like.dtype)
    if len(tau) != count or not ((tau >= 0) & (tau <= 1)).all():
        raise ValueError(f"progress is {progress!r}; expected a number from 0 to 1, or one for each of {count} gradients")
    tau = tau.to(like.device, non_blocking=True)
    norms, cosines = grams.norms, grams.cosines
    signs = torch.tensor((1, *grams.signs), dtype=like.dtype).to(like.device, non_blocking=True)
    towards = cosines * signs[:, None] * signs  # of the unit vectors s_j g_j / |g_j|
    present = norms[:, 1:] > 0
    best, left = _solve(towards[:, 1:, 1:], towards[:, 1:, 0], tau * present, present)
    lengths = norms[:, :1] / norms[:, 1:]
    c = torch.where(present, best * signs[1:] * lengths, 0.0)
    whole = torch.cat([torch.ones_like(norms[:, :1]), c], 1)
    # What rounding leaves of u: the energies of the roundings add (`ogdopt.rounding`), in lengths of g_w.
    shares = 5e-13 * (norms > 0) if grams.noise is None else ratio(grams.noise, norms**2)
    weights = whole * torch.where(norms > 0, norms / norms[:, :1], 0.0)
    noisy = left <= (weights**2 * shares).sum(1)
    whole = torch.where(noisy[:, None], 0.0, whole)
    finite = like.flatten(1).isfinite().all(1, keepdim=True)
    return torch.where(finite, whole, torch.nan)


def _within(grams: Grams, fixed: list[int], progress: float | Sequence[float]) -> Tensor:
    """`nearest` among the vectors orthogonal to the gradients at the places `fixed`."""
    rest = [0, *(k for k, sign in enumerate(grams.signs, 1) if sign)]
    norms, cosines = grams.norms, grams.cosines
    # Of unit vectors; directions that depend on others add nothing.
    inverse = torch.linalg.pinv(cosines[:, fixed][:, :, fixed], rtol=1e-12, hermitian=True)
    along = inverse @ cosines[:, fixed][:, :, rest]  # (B, E, R)
    left = cosines[:, rest][:, :, rest] - cosines[:, rest][:, :, fixed] @ along
    lengths = norms[:, rest]
    noise = None if grams.noise is None else grams.noise[:, rest]
    if noise is None:
        noise = 5e-13 * lengths**2
    signs = tuple(sign for sign in grams.signs if sign)
    inner = nearest(Grams(left * lengths[:, :, None] * lengths[:, None], signs, noise), progress)
    taken = -(along @ (inner * lengths)[..., None])[..., 0]
    whole = torch.zeros_like(norms)
    whole[:, rest] = inner
    whole[:, fixed] = torch.where(norms[:, fixed] > 0, taken / norms[:, fixed], 0.0)
    return torch.where(inner.isnan().any(1, keepdim=True), torch.nan, whole)


def _solve(C: Tensor, q: Tensor, tau: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers (B, K) and |u|^2 (B) of min |u - w|^2 with <u, a_j> >= tau_j; unit vectors, <a_i, a_j> = C, <w, a_j> = q."""
    blocks, count = q.shape
    if count == 0:
        return q, torch.ones(blocks, dtype=q.dtype, device=q.device)
    masks = torch.arange(2**count, device=q.device)[:, None] >> torch.arange(count, device=q.device)
    active = (masks & 1).to(q.dtype)  # (S, K), none first
    mu, solved = _candidates(C, (tau - q)[:, None] * active, active)
    reached = q[:, None] + (C[:, None] @ mu[..., None])[..., 0]
    missed = torch.where((active > 0) | ~present[:, None], 0.0, tau[:, None] - reached)
    violated = torch.maximum(missed, -mu).amax(-1)
    slack = 16 * torch.finfo(q.dtype).eps * (1 + mu.abs().sum(-1))
    distance = (mu * (C[:, None] @ mu[..., None])[..., 0]).sum(-1)
    # The nearest that keeps all constraints; where rounding leaves none (two that are one but for rounding), the one that is
    # closest to keeping them.
    cost = torch.where(violated <= slack, distance.clamp(max=2), 4 + violated)
    cost = torch.where(solved, cost, torch.inf)
    least, best = cost.min(1)
    mu = mu.gather(1, best[:, None, None].expand(-1, 1, count))[:, 0].clamp(min=0)
    mu = torch.where((least < 4 + LOOSE)[:, None], mu, 0.0)
    left = 1 + 2 * (mu * q).sum(1) + (mu * (C @ mu[..., None])[..., 0]).sum(1)
    return mu, left.clamp(min=0)


def _candidates(C: Tensor, wanted: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers (B, S, K) with which every active constraint is met exactly, and whether there are such (B, S)."""
    one = torch.eye(active.shape[1], dtype=C.dtype, device=C.device)
    systems = C[:, None] * (active[:, :, None] * active[:, None, :]) + one * (1 - active)[:, :, None]
    factor, failed = torch.linalg.cholesky_ex(systems)
    solved = (failed == 0) & (factor.diagonal(dim1=-2, dim2=-1).amin(-1) ** 2 > DEPENDENT)
    mu = torch.cholesky_solve(wanted[..., None], factor)
    mu = mu + torch.cholesky_solve(wanted[..., None] - systems @ mu, factor)  # refined: constraints may be nearly parallel
    return torch.where(solved[..., None], mu[..., 0] * active, 0.0), solved


def priority(grams: Grams, tau: float | Sequence[float] = 0.02) -> Tensor:
    """Priority-Constrained Descent with normalized gradients: every other objective gets a share `tau` of its own progress.

    The nearest vector with s_j <u, g_j> >= tau |g_j| |g_w|, scaled to the length of g_w; 0 where it is noise. The paper
    divides each gradient by a running mean of its norm; this is its form for a decay of 0 ("Not All Objectives Are Born Equal",
    arXiv:2606.29521, equation of PCD). With tau = 0 it has the direction of `nearest`.
    """
    c = nearest(grams, tau)
    norms = grams.norms
    weights = c * norms  # of unit vectors
    length = (weights[:, None] @ grams.cosines @ weights[:, :, None])[:, 0, 0].clamp(min=0).sqrt()
    return c * torch.where(length > 0, norms[:, 0] / length, 0.0)[:, None]
