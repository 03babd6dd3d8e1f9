"""What every part of a paired optimizer shares: the base, the options, and what has been told once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ogdopt import fused as fused_forms
from ogdopt._options import Options
from ogdopt.errors import warn
from ogdopt.gram import blocks_of
from ogdopt.projection import block_sizes
from ogdopt.report import StepReport


class Setup:
    """The base and the options of a paired optimizer, and how its parameters fall into blocks."""

    def __init__(self, base: Optimizer, options: Options) -> None:
        self.base = base
        self.options = options
        self.unfused: str = ""
        self._uncompiled = False
        self._told: set[str] = set()

    def parameters(self) -> list[Tensor]:
        """Parameters, each once, in the groups' order; read afresh, since trainers swap them."""
        return list({id(p): p for group in self.base.param_groups for p in group["params"]}.values())

    def group_sizes(self) -> list[int]:
        """Tensors of each parameter group that no earlier group has."""
        seen: set[int] = set()
        sizes = []
        for group in self.base.param_groups:
            fresh = {id(p) for p in group["params"]} - seen
            sizes.append(len(fresh))
            seen |= fresh
        return sizes

    def block_sizes(self) -> list[int]:
        """Tensors in each block of the scope, for parameters in the order of `parameters`."""
        return block_sizes(self.options.scope, self.group_sizes())

    def coefficients(self, report: StepReport) -> tuple[Tensor, Tensor]:
        """The rule's (a, b) for each tensor, (P,) float64."""
        places = blocks_of(self.block_sizes())
        return report.a[places], report.b[places]

    def further(self, report: StepReport) -> Tensor:
        """The coefficients of what is preserved for each tensor, (P, K) float64."""
        assert report.joint is not None
        return report.joint.coefficients[blocks_of(self.block_sizes())][:, 2:]

    def clips(self, report: StepReport) -> Tensor:
        """What clipping multiplies each tensor by, (P,) float64."""
        scale, sizes = report.scale, self.group_sizes()
        return scale[blocks_of(sizes)] if scale.ndim else scale.expand(sum(sizes))

    def once(self, topic: str) -> bool:
        """Whether a topic comes up for the first time."""
        fresh = topic not in self._told
        self._told.add(topic)
        return fresh

    def name_of(self, parameters: list[Tensor]) -> list[str]:
        """Parameters as messages call them: by name where one is known, else by shape."""
        named = [pair for g in self.base.param_groups for pair in zip(g.get("param_names", []), g["params"])]
        named += [] if self.options.model is None else list(self.options.model.named_parameters())
        names = {p: name for name, p in named}
        return [names.get(p, f"shape {tuple(p.shape)}") for p in parameters]

    # ---- compiled forms --------------------------------------------------------------------------------------------------

    def compiled(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What a fused form returns; None without `fused`, and where it cannot be compiled, which is told once."""
        if not self.options.fused or self._uncompiled:
            return None
        try:
            return work(*arguments)
        except fused_forms.Unavailable as error:
            self._uncompiled = True
            self.tell_unfused(str(error))
            return None

    def tell_unfused(self, why: str) -> None:
        """Keep the reason why `fused=True` is not followed, and warn where it is a new one."""
        if self.unfused != why:
            self.unfused = why
            warn(f"fused=True: {why}; the step is taken without, with the same result")
