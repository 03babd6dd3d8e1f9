"""`set_aside="recompute"`: the winner's pass runs twice, so that its gradient and the loser's never wait together.

The first pass measures each tensor's gradient as it appears and drops it; the second adds it onto the loser's, which is by
then multiplied by b/a. Where each tensor is a block of its own, all is known at once, and the first pass mixes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ogdopt._mixing import Mixing
from ogdopt._sides import Closure, Mixture, raise_one_graph
from ogdopt.distributed import settled
from ogdopt.errors import NO_GRADIENT, GradientError
from ogdopt.gram import gram
from ogdopt.metric import Entry
from ogdopt.passes import mix_, mix_all, products
from ogdopt.report import StepReport


class Recompute:
    """One step of two passes over the winner's closure."""

    def __init__(self, mixing: Mixing, closure: Closure) -> None:
        self.mixing, self.setup, self.sides = mixing, mixing.setup, mixing.sides
        self.closure = closure
        self.parameters = self.setup.parameters()
        self.losers: dict[Tensor, Tensor] = self.sides.loser or {}
        self.rows: dict[Tensor, Tensor] = {}
        self.once = self.setup.options.scope == "tensor" and not (dist.is_available() and dist.is_initialized())
        self.returned = False
        """Whether the closure returns its loss instead of calling backward."""

    def run(self) -> StepReport:
        """Leave the clipped mixture in p.grad; on an error nothing is left."""
        sides, hooks = self.sides, self._hooks()
        try:
            generators = _generators(self.parameters[0].device)
            before = [read() for read, _ in generators]
            loss = self._first_pass(hooks)
            report = self._decide()
            sides.forget()
            if report.norm.isfinite():
                for (_, write), state in zip(generators, before):
                    write(state)
                again = self._second_pass(report, loss)
                self._check(loss, again)
        except BaseException as error:
            sides.abandon()
            raise_one_graph("winner", error)
            raise
        finally:
            for hook in hooks:
                hook.remove()
        sides.active = None
        if report.norm.isfinite():
            sides.mixture = Mixture([], report, 1.0, torch.ones_like(report.norm))
        self.mixing.report = report
        return report

    def _hooks(self) -> list[Any]:
        hooks = self.sides.on_gradients(self._measure)
        if len(hooks) < sum(p.requires_grad for p in self.parameters):
            for hook in hooks:
                hook.remove()
            self.sides.abandon()
            raise GradientError(
                "set_aside='recompute' reads each gradient when its backward is done, and under DDP or FSDP1 it is not yet "
                "averaged then; shard the model with fully_shard (FSDP2), or use 'int8' or torch.bfloat16"
            )
        return hooks

    @torch.no_grad()
    def _measure(self, p: Tensor) -> None:
        """Keep the numbers of a gradient that has just been computed, or mix it where they are enough."""
        if p in self.rows:
            raise GradientError(
                "set_aside='recompute' measures the winner's gradient while it is computed, and a parameter got a second "
                "part of it: run one backward pass a side (under FSDP2 also several, with set_requires_gradient_sync on "
                "in the last alone), or use 'int8'"
            )
        assert p.grad is not None
        g = settled(p.grad, p)
        if self.once:
            self._mix(p, g, self.losers.pop(p, None))
        else:
            self.rows[p], p.grad = products(g, self.losers.get(p)), None

    def _mix(self, p: Tensor, g: Tensor, l: Tensor | None) -> None:
        blocks = gram([g], [l])
        self.rows[p] = torch.cat(blocks[:3])
        a, b = self.setup.options.rule(blocks)
        mix_(g, l, a[0], b[0])
        p.grad = g

    def _first_pass(self, hooks: list[Any]) -> Any:
        """Run the closure; every gradient is measured and dropped (or mixed)."""
        self.sides.active = "winner"
        with torch.enable_grad():
            loss = self.closure()
            self.returned = not self.rows and isinstance(loss, Tensor) and loss.requires_grad
            if self.returned:
                loss.backward()  # type: ignore[union-attr]
        for p in self.parameters:
            if p.grad is not None and p not in self.rows:
                self._measure(p)
        for hook in hooks:
            hook.remove()
        if not self.rows:
            raise GradientError(f"the winner's pass left no gradient on any of the {len(self.parameters)}. {NO_GRADIENT}")
        for p in list(self.losers) if self.once else []:
            self._mix(p, torch.zeros_like(p), self.losers.pop(p))
        self.sides.keep_loss("winner", loss)
        return loss

    @torch.no_grad()
    def _decide(self) -> StepReport:
        """The rule's coefficients for the numbers of the first pass."""
        entries = [Entry({}, p, p.detach() if p in self.rows else None, self.losers.get(p)) for p in self.parameters]
        rows = [self.rows[p] if p in self.rows else products(None, self.losers.get(p)) for p in self.parameters]
        return self.mixing.measure(entries, True, rows=rows)

    def _second_pass(self, report: StepReport, loss: Any) -> Any:
        """Add the winner's gradient onto the loser's share, clip, and give back the loss of this pass."""
        again, alone, factors = loss, {}, self.setup.clips(report)
        if not self.once:
            factors = factors * self.setup.coefficients(report)[0]
            self.sides.active = "winner"
            alone = self._onto(report)
            with torch.enable_grad():
                again = self.closure()
                if self.returned and isinstance(again, Tensor):
                    again.backward()
        with torch.no_grad():
            there = [k for k, p in enumerate(self.parameters) if p.grad is not None]
            gs = [p.grad for p in self.parameters if p.grad is not None]
            mix_all(gs, [None] * len(gs), factors[there], factors[there])
        for p, g in alone.items():
            p.grad = g
        return again

    @torch.no_grad()
    def _onto(self, report: StepReport) -> dict[Tensor, Tensor]:
        """Put b/a g_l into p.grad, for a second pass to add g_w; where a = 0 give b g_l back instead."""
        alone = {}
        a, b = self.setup.coefficients(report)
        clips = self.setup.clips(report)
        for k, p in enumerate(self.parameters):
            l = self.losers.pop(p, None)
            if l is None:
                continue
            factor = torch.where(a[k] != 0, b[k] / a[k], b[k] * clips[k])
            mix_(l, None, factor, factor)
            if a[k] != 0:
                p.grad = l
            else:
                alone[p] = l
        return alone

    def _check(self, loss: Any, again: Any) -> None:
        """Raise GradientError where the two passes were not of the same loss."""
        first, second = (None if x is None else float(x.detach().sum() if isinstance(x, Tensor) else x) for x in (loss, again))
        if first is not None and second is not None and not abs(second - first) <= 1e-2 * abs(first) + 1e-6:
            raise GradientError(
                f"the winner's closure gave loss {first:.6g}, and {second:.6g} when it ran again for "
                "set_aside='recompute': it must do the same both times, so take the batch outside of it"
            )


def _generators(device: torch.device) -> list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """(read, write) of the random states that a closure may draw from."""
    found = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        found.append((module.get_rng_state, module.set_rng_state))
    return found
