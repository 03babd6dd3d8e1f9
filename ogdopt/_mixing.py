"""Two gradients that wait, and the one that the base steps on: numbers, rule, mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ogdopt import _after
from ogdopt import fused as fused_forms
from ogdopt import metric as own_metric
from ogdopt._setup import Setup
from ogdopt._sides import Mixture, Sides
from ogdopt.cone import Grams, nearest
from ogdopt.distributed import elsewhere, settled, shared
from ogdopt.errors import GradientError, warn
from ogdopt.gram import Gram, blocks_of, gram
from ogdopt.metric import Entry
from ogdopt.passes import mix_all, mix_many_
from ogdopt.report import Joint, StepReport


class Mixing:
    """From what the contexts collected to `p.grad`, or, fused, to the step itself."""

    def __init__(self, setup: Setup, sides: Sides) -> None:
        self.setup = setup
        self.sides = sides
        self.report: StepReport | None = None

    @torch.no_grad()
    def gathered(self, grad_scale: float = 1.0) -> tuple[list[Entry], StepReport]:
        """What the contexts left, and what the rule makes of it; nothing is written."""
        sides = self.sides
        sides.hide()
        if sides.active:
            raise GradientError(f"project() or step() was called inside {sides.active}(); close that context first")
        if sides.winner is None:
            raise GradientError("there is no winner's gradient to project; run its backward inside `with opt.winner():` first")
        if self.setup.options.set_aside == "recompute" and (sides.loser is not None or sides.kept):
            raise GradientError(
                "set_aside='recompute' runs the winner's pass twice, so it needs step(winner, loser) with two closures; with "
                "contexts use 'int8' or torch.bfloat16"
            )
        groups = {p: group for group in reversed(self.setup.base.param_groups) for p in group["params"]}
        losers = sides.loser or {}
        parameters = self.setup.parameters()
        others = [[side.get(p) for p in parameters] for side in sides.kept.values()]
        others += [some for memory in self.setup.options.remember.values() for some in memory.lists(len(parameters))]
        rows = zip(*others) if others else [()] * len(parameters)
        entries = [Entry(groups[p], p, sides.winner.get(p), losers.get(p), row) for p, row in zip(parameters, rows)]
        self.report = report = self.measure(entries, sides.loser is not None or bool(others), grad_scale)
        return entries, report

    def measure(
        self, entries: list[Entry], paired: bool, grad_scale: float = 1.0, rows: Sequence[Tensor] | None = None
    ) -> StepReport:
        """The numbers of two gradients, over all ranks, and the rule's coefficients."""
        setup, sides, options = self.setup, self.sides, self.setup.options
        losses = list(sides.losses.values())
        loss = torch.stack([x.to(losses[0]) for x in losses]).sum() if losses else None
        ws, ls = [entry.w for entry in entries], [entry.l for entry in entries]
        if paired and options.process_group is None and setup.once("idle"):
            idle = [e.p for e in entries if e.p.requires_grad and e.w is None and e.l is None]
            self._warn_of_idle(idle)
        expected = (sides.winner is not None, sides.loser is not None)
        further = list(zip(*(entry.others for entry in entries)))
        rows = setup.compiled(fused_forms.rows, ws, ls) if rows is None and paired and not further else rows
        tensors = gram(ws, ls, options.process_group, loss, entries[0].p.device, expected, rows, further)
        tensors = tensors._replace(parameters=tuple(entry.p for entry in entries))
        sides.measured = blocks = tensors.pooled(setup.block_sizes())
        if further:
            return self._respecting(tensors, blocks)
        # Without a loser there is nothing to weigh against, whatever the rule.
        a, b = options.rule(blocks) if paired else (torch.ones_like(blocks.ww), torch.zeros_like(blocks.ww))
        report = self._report(tensors, blocks, a, b)
        if paired and options.metric == "optimizer" and report.norm.isfinite():
            report = self._in_own_metric(entries, tensors, report, grad_scale)
        return report

    def _respecting(self, tensors: Gram, blocks: Gram) -> StepReport:
        """The report of the nearest step that respects the loser and all that is preserved."""
        named = [("loser", -1), *((name, 1) for name in self.sides.kept)]
        for name, memory in self.setup.options.remember.items():
            sign = (-1 if name == "loser" else 1) if memory.sign is None else memory.sign
            count = len(memory.lists(0))
            named += [(f"{name} remembered" if count == 1 else f"{name} {k}", sign) for k in range(count)]
        names, signs = zip(*named)
        assert blocks.every is not None and tensors.every is not None
        grams = Grams(blocks.every, signs, blocks.noise)
        c = nearest(grams)
        report = self._report(tensors, blocks, c[:, 0], c[:, 1])
        report.joint = Joint(names, c, grams)
        report.norm = report.joint.norms([len(c)])[0]
        sizes = self.setup.group_sizes()
        if report.group_norms is not None:
            whole = c[blocks_of(self.setup.block_sizes())]
            report.group_norms = Joint(names, whole, grams._replace(products=tensors.every)).norms(sizes)
        return report

    def _report(self, tensors: Gram, blocks: Gram, a: Tensor, b: Tensor) -> StepReport:
        setup = self.setup
        report = StepReport(blocks, a, b, dict(self.sides.losses), setup.options.max_norm)
        report.tensors = tensors
        if setup.options.limits(setup.base) is not None:
            report.group_norms = tensors.norms(*setup.coefficients(report), setup.group_sizes())
        return report

    def _in_own_metric(self, entries: list[Entry], tensors: Gram, report: StepReport, grad_scale: float) -> StepReport:
        """The report with the coefficients of `metric="optimizer"`."""
        blocks, a, max_norm = report.blocks, report.a, self.setup.options.max_norm
        assert not isinstance(max_norm, Sequence)

        def scale(c: Tensor) -> float:
            norm = blocks.norm(a, -c.to(a)).item() / grad_scale
            return (1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))) / grad_scale

        ranks = shared([entry.p for entry in entries], self.setup.options.process_group)
        root = own_metric.coefficients(self.setup.base, entries, self.setup.block_sizes(), blocks, scale, ranks)
        solved = self._report(tensors, blocks, a, a * -root.c.to(a))
        solved.passes, solved.inexact = root.passes, not root.exact
        return solved

    def _warn_of_idle(self, idle: list[Tensor]) -> None:
        """Warn about trainable parameters that neither loss uses."""
        if idle:
            shown = self.setup.name_of(idle[:5])
            warn(
                f"{len(idle)} trainable parameters got a gradient from neither loss: {', '.join(shown)}"
                f"{', ...' if len(idle) > 5 else ''}. The base keeps no state for them, and a distributed checkpoint of it "
                "may not load for want of that; freeze them (requires_grad_(False)) or leave them out of the optimizer"
            )

    @torch.no_grad()
    def mix(self, entries: list[Entry], report: StepReport, clip: bool = True, grad_scale: float = 1.0) -> None:
        """Put the mixture into p.grad."""
        setup, sides = self.setup, self.sides
        a, b = setup.coefficients(report)
        clips = setup.clips(report) if clip else torch.ones_like(a)
        a, b = a * clips, b * clips
        alone = [e if e.w is not None or _nothing(e) else e._replace(w=torch.zeros_like(e.p)) for e in entries]
        present = [(k, e) for k, e in enumerate(alone) if e.w is not None]
        places = [k for k, _ in present]
        if report.joint is not None:
            self._mix_jointly(present, a, b, setup.further(report) * clips[:, None])
        elif not setup.compiled(fused_forms.mix, [e.w for _, e in present], [e.l for _, e in present], a[places], b[places]):
            cancels = a.device.type != "cpu" or report.blocks.cancels(report.a, report.b)
            mix_all([e.w for _, e in present if e.w is not None], [e.l for _, e in present], a[places], b[places], cancels)
        for _, e in present:
            e.p.grad = e.w
        if setup.options.remember and bool(report.norm.isfinite()):
            for name, memory in setup.options.remember.items():
                side = sides.loser if name == "loser" else sides.kept.get(name)
                if side is not None:
                    memory.update(setup.parameters(), side)
        again = setup.options.measure_change or setup.options.metric == "optimizer"
        again = again and (sides.loser is not None or report.joint is not None)
        measured = sides.measured
        sides.forget()
        sides.measured = measured
        sides.mixture = Mixture([*entries] if again else [], report, grad_scale, torch.ones_like(report.norm))

    def _mix_jointly(self, present: list[tuple[int, Entry]], a: Tensor, b: Tensor, c: Tensor) -> None:
        whole = torch.cat([a[:, None], b[:, None], c], 1)
        for k, e in present:
            assert e.w is not None
            mix_many_(e.w, [e.l, *e.others], whole[k])

    @torch.no_grad()
    def step_fused(self, entries: list[Entry], report: StepReport) -> bool:
        """Mix and step the base in one pass, p.grad left empty; False where that cannot be."""
        setup, options = self.setup, self.setup.options
        if not options.fused:
            return False
        why = fused_forms.refused(setup.base) or _after.foreign_hooks(setup.base)
        if options.metric == "optimizer":
            why = "metric='optimizer' needs the gradient that the base gets, which a fused step does not write"
        if report.joint is not None or options.remember:
            why = "what is preserved or remembered takes part in the mixture, which has no fused form"
        if why:
            setup.tell_unfused(why)
            return False
        clips = setup.clips(report)
        a, b = (x * clips for x in setup.coefficients(report))
        watched = options.measure_change and self.sides.loser is not None
        before = _after.copies(entries) if watched else []
        if not setup.compiled(fused_forms.step, setup.base, entries, a, b):
            return False
        setup.base._opt_called = True  # type: ignore[attr-defined]  # schedulers of the base ask for it
        if watched:
            report.change = _after.change_of(entries, before, options.process_group).sum(0)
        return True

    @torch.no_grad()
    def adopt(self) -> StepReport:
        """Take what is in p.grad as it is (a projected gradient, unscaled or not, or a plain one), and clip it."""
        parameters = self.setup.parameters()
        for p in parameters:
            if p.grad is not None:
                p.grad = settled(p.grad, p)
        entries = [Entry({}, p, p.grad, None) for p in parameters]
        if all(entry.w is None for entry in entries) and not elsewhere(parameters, self.setup.options.process_group):
            empty = torch.zeros(1, dtype=torch.float64, device="cpu")
            report = StepReport(Gram(empty, empty, empty), empty + 1, empty, {}, None)
        else:
            report = self.measure(entries, paired=False)
            if self.setup.options.max_norm is not None:
                there = [k for k, entry in enumerate(entries) if entry.w is not None]
                factors = self.setup.clips(report)[there]
                mix_all([entry.w for entry in entries if entry.w is not None], [None] * len(there), factors, factors)
        mixture = self.sides.mixture
        if mixture is not None:  # the numbers of project() say what the two gradients were; the norm is the present one
            mixture.factor = (report.norm / mixture.report.norm).nan_to_num(1.0)
            present, report = report, mixture.report
            report.norm, report.group_norms = present.norm, present.group_norms
        self.report = report
        return report


def _nothing(entry: Entry) -> bool:
    """Whether no side but the winner's has a gradient of a parameter."""
    return entry.l is None and all(g is None for g in entry.others)
