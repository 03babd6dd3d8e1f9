"""The base's step, and what is done about the change that it made: repaired, or measured."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ogdopt import metric as own_metric
from ogdopt._setup import Setup
from ogdopt._sides import Mixture, Sides
from ogdopt.distributed import local, shared
from ogdopt.errors import GradientError
from ogdopt.gram import blocks_of
from ogdopt.metric import Entry
from ogdopt.passes import moved
from ogdopt.report import StepReport


def step_base(setup: Setup, mixture: Mixture | None, report: StepReport) -> None:
    """Step the base, and repair or measure the change that it made."""
    if mixture is None or not mixture.entries:
        setup.base.step()
        return
    options = setup.options
    repair = options.metric == "optimizer"
    # p.grad is rounded to its type, and so is its norm, which project() knew before that.
    rounding = max([1e-3, *(torch.finfo(entry.p.dtype).eps for entry in mixture.entries)])
    if repair and abs(mixture.factor.item() * mixture.grad_scale - 1) > rounding:
        raise GradientError(
            f"the gradient was rescaled by {mixture.factor.item():.6g} between project() and step(), and "
            "metric='optimizer' had solved for the step as it was: pass a scaler's factor as "
            "project(grad_scale=scaler.get_scale()), and clip by max_norm= instead of afterwards"
        )
    entries = [entry._replace(w=entry.p.grad) for entry in mixture.entries]
    before = copies(entries) if options.measure_change else []
    setup.base.step()
    if repair and (report.inexact or own_metric.drifts(setup.base)):
        scale = report.scale * mixture.factor
        driven = mixture.factor.item() if report.inexact else None
        ranks = shared([entry.p for entry in entries], options.process_group)
        a, b = report.a * scale, report.b * scale
        own_metric.correct(setup.base, entries, setup.block_sizes(), a, b, ranks, driven)
    if options.measure_change:
        clips = setup.clips(report) * mixture.factor
        a, b = (x * clips for x in setup.coefficients(report))
        du, dl, dd = change_of(entries, before, options.process_group).to(a).unbind(1)
        along = report.blocks.wl / report.blocks.ll
        places = blocks_of(setup.block_sizes())
        du = du - _kept_part(setup, entries, before, report, clips)
        parallel = torch.where(report.blocks.same_direction[places], along[places] * dl, torch.nan)
        report.change = torch.stack([torch.where(a != 0, (du - b * dl) / a, parallel).sum(), dl.sum(), dd.sum()])


def _kept_part(setup: Setup, entries: list[Entry], before: list[Tensor], report: StepReport, clips: Tensor) -> Tensor:
    """What gradients that are preserved put into <delta, u>, (P,); their own <delta, g> go into the report."""
    total = torch.zeros_like(clips)
    if report.joint is None:
        return total
    further = setup.further(report) * clips[:, None]
    for k, name in enumerate(report.joint.names[1:]):
        those = [entry._replace(w=None, l=entry.others[k]) for entry in entries]
        dk = change_of(those, before, setup.options.process_group).to(clips)[:, 1]
        report.changes[name] = dk.sum()
        total += further[:, k] * dk
    return total


def copies(entries: list[Entry]) -> list[Tensor]:
    """The parameters as they are now, each rank's part."""
    return [local(entry.p.detach()).clone() for entry in entries]


def change_of(entries: list[Entry], before: list[Tensor], process_group: dist.ProcessGroup | None) -> Tensor:
    """(<delta, w>, <delta, l>, <delta, delta>) of each tensor's change from `before`, over all ranks: (P, 3)."""
    numbers = [moved(entry.p.detach(), x, entry.w, entry.l) for entry, x in zip(entries, before)]
    ranks = shared([entry.p for entry in entries], process_group)
    return ranks.pooled(numbers, [1] * len(entries))


class Guard:
    """A hook of the base that refuses a step while a side's backward passes are being collected."""

    def __init__(self, sides: Sides) -> None:
        self._sides = weakref.ref(sides)  # the base may outlive the optimizer around it

    def __call__(self, *_: Any) -> None:
        """Raise GradientError inside a context or closure."""
        sides = self._sides()
        if sides is not None and (sides.active or sides.running):
            raise GradientError(
                f"the base stepped inside {sides.active or 'a closure'}, on one side's gradient. Closures and contexts run "
                "forward and backward only; step() comes after them"
            )


def foreign_hooks(base: Optimizer) -> str:
    """Why a fused step would miss hooks of the base, which see each step and its p.grad; "" where there are none."""
    hooks = [h for h in getattr(base, "_optimizer_step_pre_hooks", {}).values() if not isinstance(h, Guard)]
    hooks += getattr(base, "_optimizer_step_post_hooks", {}).values()
    if hooks:
        return "the base has step hooks, which a fused step would not call"
    module = importlib.import_module("torch.optim.optimizer")  # whose name torch.optim gives away again
    everywhere = [getattr(module, f"_global_optimizer_{when}_hooks", {}) for when in ("pre", "post")]
    return "step hooks are registered for all optimizers, which a fused step would not call" if any(everywhere) else ""
