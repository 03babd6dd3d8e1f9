"""What one two-gradient step did, read lazily so that watching costs no wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ogdopt.cone import Grams
from ogdopt.gram import Gram, ratio


class Totals(NamedTuple):
    """Gram numbers of the whole model as floats."""

    ww: float
    wl: float
    ll: float


class Joint(NamedTuple):
    """How a step respected several gradients."""

    names: tuple[str, ...]
    """Of the gradients besides the winner's: the loser, then what is preserved."""
    coefficients: Tensor
    """(B, K + 1), the winner's first."""
    grams: Grams
    """The products that decided."""

    def norms(self, sizes: Sequence[int]) -> Tensor:
        """L2 norm of the mixture in groups of `sizes` consecutive blocks."""
        # Of unit vectors, since products of coefficients leave the range where gradients differ in scale by 1e154.
        weights = self.coefficients * self.grams.norms
        squares = (weights[:, None] @ self.grams.cosines @ weights[:, :, None])[:, 0, 0]
        return torch.stack([part.sum() for part in squares.split(list(sizes))]).clamp(min=0).sqrt()

    def cosine(self, name: str) -> Tensor:
        """Cosine of the winner's gradient and a named one over all blocks, shape ()."""
        k = self.names.index(name) + 1
        whole = Grams(self.grams.products.sum(0, keepdim=True), self.grams.signs)
        return whole.cosines[0, 0, k]


class StepReport:
    """What one step did. Numbers stay on the device until they are read, and reading one waits for the device."""

    def __init__(
        self,
        blocks: Gram,
        a: Tensor,
        b: Tensor,
        losses: dict[str, Tensor],
        max_norm: float | Sequence[float | None] | None,
    ) -> None:
        self.blocks = blocks
        """Gram numbers, one entry a block of the scope (float64 tensors)."""
        self.a: Tensor = a
        self.b: Tensor = b
        self.losses = losses
        self.max_norm = max_norm
        self.norm: Tensor = blocks.norm(a, b)
        self.group_norms: Tensor | None = None
        """L2 norm of the mixture in each parameter group, where `max_norm` has a limit for each."""
        self.tensors = blocks
        """Gram numbers of each tensor, with its parameter, for `diagnostics.by_layer`."""
        self.joint: Joint | None = None
        """Names, coefficients and products where something is preserved; `coefficients` has the winner's and loser's alone."""
        self.changes: dict[str, Tensor] = {}
        """<delta, g> for what is preserved, by name, with `measure_change=True`; at most 0 to first order under plain SGD."""
        self.passes = 0
        """Further passes over the gradients that `metric="optimizer"` took."""
        self.inexact = False
        self.change: Tensor | None = None
        self.skipped = False
        """Whether the step was left out because a gradient or loss was not finite."""

    @property
    def scale(self) -> Tensor:
        """The factor that clipping multiplies the gradient by, shape (); one for each group where each has a limit."""
        if self.max_norm is None:
            return torch.ones_like(self.norm)
        if not isinstance(self.max_norm, Sequence):
            return (self.max_norm / (self.norm + 1e-6)).clamp(max=1.0)
        norms = self.norm.expand(len(self.max_norm)) if self.group_norms is None else self.group_norms
        limits = [torch.inf if limit is None else limit for limit in self.max_norm]
        return (norms.new_tensor(limits) / (norms + 1e-6)).clamp(max=1.0)

    @property
    def winner_loss(self) -> float | None:
        """The loss that the winner's closure returned; None if it returned none. Several micro-batches add up."""
        return self.losses["winner"].item() if "winner" in self.losses else None

    @property
    def loser_loss(self) -> float | None:
        """The loss that the loser's closure returned; None if it returned none."""
        return self.losses["loser"].item() if "loser" in self.losses else None

    @property
    def gram(self) -> Totals:
        """ww, wl, ll of the whole model."""
        return Totals(*(x.sum().item() for x in self.blocks[:3]))

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two gradients; 0.0 where one of them is zero or missing."""
        return self._whole.cosine.item()

    @property
    def coefficients(self) -> tuple[float, float] | list[tuple[float, float]]:
        """(a, b) of `a g_w + b g_l` before clipping; a list with one pair a block unless the scope is "global"."""
        pairs = list(zip(self.a.tolist(), self.b.tolist()))
        return pairs[0] if len(pairs) == 1 else pairs

    @property
    def grad_norm(self) -> float:
        """L2 norm of the mixed gradient before clipping."""
        return self.norm.item()

    @property
    def projected_fraction(self) -> float:
        """|a g_w + b g_l| / |g_w|: 1.0 where nothing was removed, 0.0 where all was (or g_w is zero)."""
        ww = self.blocks.ww.sum().item()
        return self.norm.item() / ww**0.5 if ww > 0 else 0.0

    @property
    def loss_changes(self) -> tuple[float, float] | None:
        """(<delta, g_w>, <delta, g_l>) of the parameter change: what the step did to both losses to first order.

        None unless the optimizer has `measure_change=True` and the step had a loser.
        """
        return None if self.change is None else (self.change[0].item(), self.change[1].item())

    @property
    def change_cosines(self) -> tuple[float, float] | None:
        """Cosines of the parameter change with g_w and g_l: below 0 the winner's loss falls; below 0 the loser's does too.

        None like `loss_changes`; 0.0 where the change or the gradient is zero.
        """
        if self.change is None:
            return None
        ww, _, ll = self.gram
        dw, dl, dd = self.change.tolist()
        return tuple(x / (dd * n) ** 0.5 if dd * n > 0 else 0.0 for x, n in ((dw, ww), (dl, ll)))  # type: ignore[return-value]

    @property
    def parallel(self) -> bool:
        """Whether some block's winner gradient was dropped for being parallel to the loser's."""
        return bool(self._dropped.any())

    @property
    def _dropped(self) -> Tensor:
        return (self.a == 0) & (self.b == 0) & (self.blocks.ww > 0)

    @property
    def _whole(self) -> Gram:
        return self.blocks.pooled([len(self.blocks.ww)])

    @property
    def clipped(self) -> bool:
        """Whether the norm was over `max_norm`."""
        if isinstance(self.max_norm, Sequence):
            return bool((self.scale < 1).any())
        return self.max_norm is not None and self.norm.item() > self.max_norm

    def to_dict(self) -> dict[str, float]:
        """The figures as floats, under the names that the harness logs; one wait for the device.

        `ogd/coefficient` is -b, and there where one pair of coefficients was used; losses are there where closures returned
        them, and `ogd/update_cosine_*` where the change was measured.
        """
        figures: dict[str, Tensor] = {"grad_norm": self.norm, "ogd/cosine": self._whole.cosine[0]}
        if len(self.b) == 1:
            figures["ogd/coefficient"] = -self.b[0]
        ww, ll = self.blocks.ww.sum(), self.blocks.ll.sum()
        figures["ogd/projected_fraction"] = ratio(self.norm, ww.sqrt())
        figures |= {"ogd/norm_chosen": ww.sqrt(), "ogd/norm_rejected": ll.sqrt(), "ogd/parallel": self._dropped.any()}
        for side, loss in (("chosen", self.losses.get("winner")), ("rejected", self.losses.get("loser"))):
            if loss is not None:
                figures[f"loss/{side}"] = loss
        if self.change is not None:
            dw, dl, dd = self.change
            figures["ogd/update_cosine_chosen"] = ratio(dw, dd.sqrt() * ww.sqrt())
            figures["ogd/update_cosine_rejected"] = ratio(dl, dd.sqrt() * ll.sqrt())
        for k, name in enumerate(self.joint.names[1:] if self.joint is not None else (), 2):
            assert self.joint is not None
            figures[f"ogd/cosine/{name}"] = self.joint.cosine(name)
            if len(self.b) == 1:
                figures[f"ogd/coefficient/{name}"] = self.joint.coefficients[0, k]
            if name in self.losses:
                figures[f"loss/{name}"] = self.losses[name]
        values = torch.stack([x.detach().to(self.norm) for x in figures.values()]).tolist()
        found = dict(zip(figures, values)) | {"skipped": float(self.skipped)}
        return found | ({"ogd/passes": float(self.passes)} if self.passes else {})

    def __repr__(self) -> str:
        losses = "".join(f"{k}_loss={v.item():.6g}, " for k, v in self.losses.items())
        return (
            f"StepReport({losses}cosine={self.cosine:.4f}, coefficients={self.coefficients}, grad_norm={self.grad_norm:.6g}, "
            f"clipped={self.clipped}, skipped={self.skipped})"
        )
