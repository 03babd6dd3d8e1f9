"""Two gradients, one step: a torch optimizer around any other that mixes a winner's and a loser's gradient by a rule.

The loser's backward runs first and its gradient waits by reference; the winner's follows, so the two graphs never
coexist; the Gram numbers of the two decide the coefficients; the mixture is formed in the winner's own memory, clipped by
a norm that those numbers already hold, and handed to the base optimizer as `p.grad`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ogdopt import fused as fused_forms
from ogdopt import metric as own_metric
from ogdopt import stored
from ogdopt.distributed import FAULTS, DTensor, elsewhere, local, pending, same_memory, settled, shared
from ogdopt.gram import Gram, gram
from ogdopt.metric import Entry
from ogdopt.passes import mix_, moved, products
from ogdopt.projection import Rule, Scope, block_sizes, orthogonal
from ogdopt.report import StepReport
from ogdopt.stored import SetAside, Stored
from ogdopt.wrapper import Wrapper, check_base

Closure: TypeAlias = Callable[[], "Tensor | float | None"]
Side: TypeAlias = Literal["winner", "loser"]
Metric: TypeAlias = Literal["euclidean", "optimizer"]


ELEMENTWISE = {
    getattr(torch.optim, name) for name in "ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD".split()
}
"""Bases for which a shard of a tensor is stepped as a part of the whole one."""
NO_GRADIENT = (
    "Either no backward ran (a closure must return its loss or call backward; torch.autograd.grad leaves p.grad alone), or "
    "the optimizer was built on other parameters than the model's (build it after sharding), or gradient synchronization "
    "was off for the last micro-batch"
)


class GradientError(RuntimeError):
    """The gradients are not where a two-gradient step needs them; the message says what to change."""


class NonFiniteGradient(FloatingPointError):  # noqa: N818 - names what was found, like its base class
    """A gradient or loss is infinite or NaN and `on_nonfinite="raise"`; nothing was stepped."""


@dataclass
class Mixture:
    """What `p.grad` was made of, for what is still to do once it has been stepped on."""

    entries: list[Entry]
    """The gradients, where they are needed again; else empty, so that they are free before the base steps."""
    report: StepReport
    grad_scale: float
    factor: Tensor
    """What others multiplied `p.grad` by between project() and step()."""


class PairedGradient(Wrapper):
    """Any torch optimizer, stepping on the mixture of two gradients that a rule chooses.

    `base` is the optimizer that steps, and `rule` maps Gram numbers to coefficients (`ogdopt.projection`). The mixture is
    clipped to an L2 norm of `max_norm` (None: not at all), after mixing. `scope` says which tensors share coefficients:
    all ("global"), those of a parameter group ("group"), or none ("tensor").

    `metric` says which change of the parameters keeps the rule's promise: "euclidean", the paper's, is about the gradient
    that the base gets; "optimizer" about what the base makes of it, for RMSprop, Adam, AdamW, Adagrad and SGD with momentum
    and weight decay (`ogdopt.metric`), at the price of a few more passes over the gradients. It needs the orthogonal rule.

    `set_aside` says how the loser's gradient waits: None by reference, `torch.bfloat16` or "int8" (blocks of 256 with a
    scale) rounded, "cpu" in the host's memory, or "recompute": not at all, at the price of a second pass of the winner's
    closure. With `measure_change` the report says what the step did to both losses (it clones the parameters for it).

    With `fused` the inner products, the mixture with its clipping and, for RMSprop, Adam, AdamW and SGD, the base's update are
    two compiled passes over memory (`ogdopt.fused`), equal to the others within rounding. The first step takes a second to
    compile in float32 on a CPU, longer elsewhere. What cannot be fused is done as without, after a warning that says why;
    `unfused` keeps the reason.

    `on_nonfinite` says what happens when a gradient or loss is infinite or NaN: "skip" leaves the step out, clears the
    gradients and counts it in `skipped_steps`; "raise" raises NonFiniteGradient.

    Under torch.distributed `step()` and `project()` are collectives: every rank of the group calls them, DTensor gradients
    are counted by their placements, and plain ones are copies that must agree. Every rank takes the same decision; step()
    raises GradientError on all of them for copies that differ, for shards that are copies, and for a side left empty.
    `process_group` is for gradients that are plain local shards (FSDP1), and for ranks that train models of their own (a
    group of one). `model`, if given, is looked into when a side closes, for DDP's and FSDP1's no_sync() (FSDP2 is asked
    without it), and names parameters in warnings.

    Parameter groups, state and checkpoints are the base's own: `state_dict()` is interchangeable with the bare base's.

    Raises TypeError for a base that is no optimizer, that cannot step without a closure (LBFGS) or needs sparse gradients,
    and ValueError for an option out of range.
    """

    def __init__(
        self,
        base: Optimizer,
        rule: Rule,
        *,
        max_norm: float | None = None,
        scope: Scope = "global",
        metric: Metric = "euclidean",
        set_aside: SetAside = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        measure_change: bool = False,
        fused: bool = False,
        process_group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
    ) -> None:
        check_base(base)
        block_sizes(scope, [])
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}; expected a positive number, or None for no clipping")
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f"on_nonfinite is {on_nonfinite!r}; expected 'skip' or 'raise'")
        if metric not in ("euclidean", "optimizer"):
            raise ValueError(f"metric is {metric!r}; expected 'euclidean' or 'optimizer'")
        stored.check(set_aside)
        if measure_change and set_aside == "recompute":
            raise ValueError(
                "measure_change=True needs the loser's gradient after the step, and set_aside='recompute' does not keep it; "
                "use 'int8' or torch.bfloat16"
            )
        if metric == "optimizer":
            own_metric.check(base)
            if rule is not orthogonal:
                raise ValueError(f"metric='optimizer' projects, and the rule is {_name(rule)}; expected projection.orthogonal")
            if set_aside == "recompute":
                raise ValueError(
                    "metric='optimizer' needs both gradients at once, and set_aside='recompute' never has them; use 'int8'"
                )
        if process_group is not None and dist.get_world_size(process_group) > 1 and type(base) not in ELEMENTWISE:
            warnings.warn(
                f"process_group= says that parameters are local shards, and {type(base).__name__} is not known to step element "
                "by element: one that takes norms or products of whole tensors (LAMB, Adafactor, Muon) steps otherwise on "
                "shards than on the whole. Use AdamW or RMSprop, or FSDP2, whose parameters know their shape",
                stacklevel=2,
            )
        self.base = base
        self.rule = rule
        self.max_norm = max_norm
        self.scope: Scope = scope
        self.metric: Metric = metric
        self.set_aside: SetAside = set_aside
        self.measure_change = measure_change
        self.fused = fused
        self.on_nonfinite = on_nonfinite
        self.process_group = process_group
        self.model = model
        self._set_up()

    def _set_up(self) -> None:
        super()._set_up()
        # The only mutable state, so that a class that re-dresses this object (Lightning does) still shares it.
        self._box: dict[str, Any] = {"skipped": 0, "report": None, "measured": None, "running": False, "told": False}
        self._box["unfused"], self._box["uncompiled"] = "", False
        self._forget()
        if hasattr(self.base, "_optimizer_step_pre_hooks"):  # some wrappers never called Optimizer.__init__
            self.base.register_step_pre_hook(_guard(self._box))  # copies come here too: Optimizer.__getstate__ drops hooks

    # ---- the three verbs -------------------------------------------------------------------------------------------------

    @contextmanager
    def _collect(self, side: Side) -> Iterator[None]:
        box = self._box
        if box["active"]:
            raise GradientError(f"{side}() was entered inside {box['active']}(); close the one before opening the other")
        self._refuse_foreign()
        packing = side == "loser" and self.set_aside not in (None, "recompute")
        box["packed"] = dict(box[side] or {}) if packing else {}
        for p, g in (box[side] or {}).items():
            p.grad = None if packing else g
        box["active"] = side
        hooks = self._on_gradients(self._pack) if packing else []
        try:
            yield
            taken = self._take(side, packing)
            self._refuse_aliases(side, taken, box["loser" if side == "winner" else "winner"] or {})
            box[side] = taken
        except BaseException:
            self._forget()
            self.zero_grad()
            raise
        finally:
            for hook in hooks:
                hook.remove()
            box["packed"] = {}
        box["active"] = None

    def winner(self) -> Any:
        """Context in which backward passes count as the winner's; any number of micro-batches, before or after the loser's.

        Raises GradientError if parameters already hold a gradient from elsewhere, or if none appears inside.
        """
        return self._collect("winner")

    def loser(self) -> Any:
        """Context in which backward passes count as the loser's. Left out, the winner's gradient is used as it is."""
        return self._collect("loser")

    def project(self, grad_scale: float = 1.0) -> StepReport:
        """Mix what the contexts collected into `p.grad`, neither clipped nor stepped.

        It does not wait for the device, except with `metric="optimizer"`, whose root decides how many passes it takes.

        A parameter with a gradient on one side only counts as zero on the other. `grad_scale` is the factor that a scaler
        put on both losses and takes off before the step (`scaler.get_scale()`); only `metric="optimizer"` needs to know it.
        Raises GradientError without a winner's gradient.
        """
        entries, report = self._gathered(grad_scale)
        self._mix(entries, report, torch.ones_like(report.norm), grad_scale)
        return report

    def step(self, closure: Closure | Sequence[Closure] | None = None, loser: Closure | None = None) -> StepReport:  # type: ignore[override]
        """Mix the two gradients, clip, step the base, clear; the report says what happened.

        `step(winner, loser)` or `step((winner, loser))` runs the closures itself, the loser first. A closure returns a loss
        (backward is called for it), or runs backward itself. `step(winner)` alone is a plain clipped step. `step()` uses
        what the contexts or `project()` left, or plain `p.grad`, which then stays in place as with any optimizer.

        Raises GradientError if a closure leaves no gradient, NonFiniteGradient if `on_nonfinite="raise"`.
        """
        winner, loser = _two(closure, loser)
        box = self._box
        if winner is not None and loser is None and self._did_nothing(winner):
            winner = None
        if winner is not None and (box["winner"] is not None or box["loser"] is not None):
            raise GradientError("step() got closures while a context's gradient is waiting; use one way or the other in a step")
        if loser is not None:
            self._run("loser", loser)
        twice = winner if loser is not None and self.set_aside == "recompute" else None
        if winner is not None and twice is None:
            self._run("winner" if loser is not None else None, winner)
        collected = box["winner"] is not None or box["loser"] is not None or box["active"]
        ours = collected or box["mixture"] is not None
        entries: list[Entry] = []
        if collected and not twice:
            entries, report = self._gathered()
        else:
            report = self._recompute(twice) if twice else self._adopt()
        if not report.norm.isfinite():
            self._refuse(report)
            return report
        if entries:
            if self._step_fused(entries, report):
                self._forget()
                return report
            self._mix(entries, report, report.scale)
            entries.clear()  # so that the loser's gradient is free before the base steps
        self._step_base(report)
        self._forget()
        if ours:
            self.zero_grad()
        return report

    # ---- what holds the verbs together -----------------------------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        """Parameters, each once, in the groups' order; read afresh, since trainers swap them."""
        return list(dict.fromkeys(p for group in self.param_groups for p in group["params"]))

    def _blocks(self) -> list[int]:
        """The block of each parameter, in the order of `_parameters`."""
        return [k for k, n in enumerate(self._block_sizes()) for _ in range(n)]

    def _block_sizes(self) -> list[int]:
        """Tensors in each block of the scope, for parameters in the order of `_parameters`."""
        seen: set[Tensor] = set()
        sizes = []
        for group in self.param_groups:
            fresh = set(group["params"]) - seen
            sizes.append(len(fresh))
            seen |= fresh
        return block_sizes(self.scope, sizes)

    def _run(self, side: Side | None, closure: Closure) -> None:
        """Run a closure for one side; a lone closure (None) may also open the contexts itself."""
        self._box["running"] = True
        try:
            with torch.enable_grad():
                if side is None:
                    self._refuse_foreign()
                    loss = self._evaluate(closure)
                    if self._box["winner"] is None:
                        self._box["winner"] = self._take("winner")
                else:
                    with self._collect(side):
                        loss = self._evaluate(closure)
        finally:
            self._box["running"] = False
        if isinstance(loss, (Tensor, float, int)):
            self._box["losses"][side or "winner"] = torch.as_tensor(loss).detach().sum()

    def _did_nothing(self, closure: Closure) -> bool:
        """Whether a lone closure, called while gradients are there already, left them all alone and returned no loss.

        Lightning's manual mode hands such a closure to every `step()`. Any other is a mistake there, and `step` says so.
        """

        def gradients() -> list[tuple[Tensor, int]]:
            waiting = [g for side in ("winner", "loser") for g in (self._box[side] or {}).values()]
            return [(g, g._version) for g in waiting + [p.grad for p in self._parameters()] if g is not None]

        before = gradients()
        if not before or closure() is not None:
            return False
        after = gradients()
        return len(after) == len(before) and all(x is y and m == n for (x, m), (y, n) in zip(before, after))

    def _evaluate(self, closure: Closure) -> Tensor | float | None:
        """Call a closure, and backward on what it returns unless it has left gradients itself."""
        loss = closure()
        opened_contexts = self._box["active"] is None and self._box["winner"] is not None
        untouched = not opened_contexts and not self._box["packed"] and all(p.grad is None for p in self._parameters())
        if untouched and isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
        return loss

    def _refuse_foreign(self) -> None:
        """Drop a mixture that a scaler chose not to step on; refuse gradients that this object did not put there."""
        if self._box["mixture"] is not None:
            self._judge(self._box["measured"])
            self._forget()
            self.zero_grad()
        held = sum(p.grad is not None for p in self._parameters())
        if held:
            raise GradientError(
                f"{held} parameters already hold a gradient; it would be added to this side's. Call zero_grad() first, or run "
                "that backward pass inside `with opt.winner():` or `with opt.loser():`"
            )

    def _on_gradients(self, hook: Callable[[Tensor], None]) -> list[Any]:
        """Call `hook(p)` whenever a backward pass has written p.grad, where it is then the gradient over all ranks."""
        shared = dist.is_available() and dist.is_initialized()
        final = [p for p in self._parameters() if p.requires_grad and (isinstance(p, DTensor) or not shared)]
        return [p.register_post_accumulate_grad_hook(hook) for p in final]

    def _pack(self, p: Tensor) -> None:
        """Move p.grad into its stored form, added to what is there."""
        assert p.grad is not None
        packed, g = self._box["packed"], settled(p.grad, p)
        if p in packed:
            one = torch.ones((), dtype=torch.float64)
            mix_(g, packed[p], one, one)
        packed[p] = Stored(g, self.set_aside)
        p.grad = None

    def _take(self, side: Side, packing: bool = False) -> dict[Tensor, Any]:
        """Move every p.grad aside, by reference where nobody else writes to it."""
        shared = dist.is_available() and dist.is_initialized()
        taken = self._box["packed"]
        for p in self._parameters():
            if p.grad is not None and packing:
                self._pack(p)
            elif p.grad is not None:
                g = settled(p.grad, p)
                # Under DDP a plain gradient may be a view of the bucket that the next backward overwrites.
                taken[p] = g.clone() if shared and not isinstance(g, DTensor) else g
                p.grad = None
        parameters = self._parameters()
        waits = pending(parameters, self.model)
        if waits:
            raise GradientError(
                f"the {side}'s pass ended with gradients that are not synchronized: {waits}. Switch synchronization on before "
                "the last micro-batch of each side; what waits now would be added to the other side's gradient"
            )
        if not taken and not elsewhere(parameters, self.process_group):  # else the ranks find out together, in gram()
            raise GradientError(
                f"the {side}'s pass left no gradient on any of the {len(parameters)} parameters of this optimizer. "
                f"{NO_GRADIENT}"
            )
        return taken

    def _refuse_aliases(self, side: Side, taken: dict[Tensor, Any], other: dict[Tensor, Any]) -> None:
        shared = sum(p in other and same_memory(g, other[p]) for p, g in taken.items())
        if shared:
            raise GradientError(
                f"the {side}'s pass wrote the gradients of {shared} parameters over those of the other side: the two share "
                "memory. CUDA graphs do so (torch.compile's reduce-overhead and max-autotune modes), and hooks that keep "
                "gradient buffers: compile without CUDA graphs, or clone p.grad at the end of each side's context"
            )

    def _recompute(self, closure: Closure) -> StepReport:
        """Measure the winner's gradient tensor by tensor without keeping it, then run its pass again onto the loser's.

        Where each tensor is a block of its own and no other rank has a part of it, all is known when its gradient is there:
        it is mixed inside the first pass, and there is no second.
        """
        box, parameters, rows = self._box, self._parameters(), {}
        losers: dict[Tensor, Tensor] = box["loser"]
        once = self.scope == "tensor" and not (dist.is_available() and dist.is_initialized())

        @torch.no_grad()
        def mix(p: Tensor, g: Tensor, l: Tensor | None) -> None:
            blocks = gram([g], [l])
            rows[p] = torch.cat(blocks[:3])
            a, b = self.rule(blocks)
            mix_(g, l, a[0], b[0])
            p.grad = g

        def measure(p: Tensor) -> None:
            if p in rows:
                raise GradientError(
                    "set_aside='recompute' measures the winner's gradient while it is computed, and a parameter got a second "
                    "part of it: run one backward pass a side (under FSDP2 also several, with set_requires_gradient_sync on "
                    "in the last alone), or use 'int8'"
                )
            assert p.grad is not None
            g = settled(p.grad, p)
            if once:
                mix(p, g, losers.pop(p, None))
            else:
                rows[p], p.grad = products(g, losers.get(p)), None

        hooks = self._on_gradients(measure)
        if len(hooks) < sum(p.requires_grad for p in parameters):
            raise GradientError(
                "set_aside='recompute' reads each gradient when its backward is done, and under DDP or FSDP1 it is not yet "
                "averaged then; shard the model with fully_shard (FSDP2), or use 'int8' or torch.bfloat16"
            )
        generators = _generators(parameters[0].device)
        before = [get() for get, _ in generators]
        box["active"] = "winner"
        try:
            with torch.enable_grad():
                loss = closure()
                returned = not rows and isinstance(loss, Tensor) and loss.requires_grad
                if returned:
                    loss.backward()  # type: ignore[union-attr]
            for p in parameters:
                if p.grad is not None and p not in rows:
                    measure(p)
            for hook in hooks:
                hook.remove()
            if not rows:
                raise GradientError(f"the winner's pass left no gradient on any of the {len(parameters)}. {NO_GRADIENT}")
            for p in list(losers) if once else []:
                mix(p, torch.zeros_like(p), losers.pop(p))
            if isinstance(loss, (Tensor, float, int)):
                box["losses"]["winner"] = torch.as_tensor(loss).detach().sum()
            entries = [Entry({}, p, p if p in rows else None, losers.get(p)) for p in parameters]
            report = self._measure(entries, True, rows=[rows.get(p, products(None, losers.get(p))) for p in parameters])
            self._forget()
            if not report.norm.isfinite():
                return report
            again, alone, factor = loss, {}, torch.ones_like(report.a)
            if not once:
                box["active"] = "winner"
                alone, factor = self._onto(report, losers), report.a
                for (_, put), state in zip(generators, before):
                    put(state)
                with torch.enable_grad():
                    again = closure()
                    if returned and isinstance(again, Tensor):
                        again.backward()
            factor = factor * report.scale
            for k, p in zip(self._blocks(), parameters):
                if p.grad is not None:
                    mix_(p.grad, None, factor[k], factor[k])
            for p, g in alone.items():
                p.grad = g
            first, second = (None if x is None else float(torch.as_tensor(x).detach().sum()) for x in (loss, again))
            if first is not None and second is not None and not abs(second - first) <= 1e-2 * abs(first) + 1e-6:
                raise GradientError(
                    f"the winner's closure gave loss {first:.6g}, and {second:.6g} when it ran again for "
                    "set_aside='recompute': it must do the same both times, so take the batch outside of it"
                )
        except BaseException:
            self._forget()
            self.zero_grad()
            raise
        finally:
            for hook in hooks:
                hook.remove()
        box.update(active=None, mixture=Mixture([], report, 1.0, torch.ones_like(report.norm)), report=report)
        return report

    @torch.no_grad()
    def _onto(self, report: StepReport, losers: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Put b/a g_l into p.grad, for a second pass to add g_w; where a = 0 give b g_l back instead."""
        alone = {}
        a, b = report.a, report.b
        for k, p in zip(self._blocks(), self._parameters()):
            l = losers.pop(p, None)
            if l is None:
                continue
            factor = torch.where(a[k] != 0, b[k] / a[k], b[k] * report.scale)
            mix_(l, None, factor, factor)
            if a[k] != 0:
                p.grad = l
            else:
                alone[p] = l
        return alone

    @torch.no_grad()
    def _gathered(self, grad_scale: float = 1.0) -> tuple[list[Entry], StepReport]:
        """What the contexts left, and what the rule makes of it; nothing is written."""
        box = self._box
        if box["active"]:
            raise GradientError(f"project() or step() was called inside {box['active']}(); close that context first")
        if box["winner"] is None:
            raise GradientError("there is no winner's gradient to project; run its backward inside `with opt.winner():` first")
        if self.set_aside == "recompute" and box["loser"] is not None:
            raise GradientError(
                "set_aside='recompute' runs the winner's pass twice, so it needs step(winner, loser) with two closures; with "
                "contexts use 'int8' or torch.bfloat16"
            )
        groups = {p: group for group in reversed(self.param_groups) for p in group["params"]}
        losers = box["loser"] or {}
        entries = [Entry(groups[p], p, box["winner"].get(p), losers.get(p)) for p in self._parameters()]
        box["report"] = report = self._measure(entries, box["loser"] is not None, grad_scale)
        return entries, report

    @torch.no_grad()
    def _mix(self, entries: list[Entry], report: StepReport, scale: Tensor, grad_scale: float = 1.0) -> None:
        """Put the mixture, times `scale`, into p.grad."""
        a, b = report.a * scale, report.b * scale
        blocks = self._blocks()
        alone = [e if e.w is not None or e.l is None else e._replace(w=torch.zeros_like(e.p)) for e in entries]
        present = [(k, e) for k, e in zip(blocks, alone) if e.w is not None]
        places = [k for k, _ in present]
        if not self._compiled(fused_forms.mix, [e.w for _, e in present], [e.l for _, e in present], a[places], b[places]):
            cancels = a.device.type != "cpu" or report.blocks.cancels(report.a, report.b)
            for k, (_, _, w, l) in present:
                assert w is not None
                mix_(w, l, a[k], b[k], cancels)
        for _, e in present:
            e.p.grad = e.w
        again = self._box["loser"] is not None and (self.measure_change or self.metric == "optimizer")
        self._forget()
        self._box["mixture"] = Mixture([*entries] if again else [], report, grad_scale, torch.ones_like(report.norm))

    @torch.no_grad()
    def _step_fused(self, entries: list[Entry], report: StepReport) -> bool:
        """Mix and step the base in one pass, p.grad left empty; False where that cannot be."""
        if not self.fused:
            return False
        why = fused_forms.refused(self.base)
        if len(self.base._optimizer_step_pre_hooks) > 1 or self.base._optimizer_step_post_hooks:
            why = "the base has step hooks, which a fused step would not call"
        if self.metric == "optimizer":
            why = "metric='optimizer' needs the gradient that the base gets, which a fused step does not write"
        if why:
            self._tell_unfused(why)
            return False
        blocks = self._blocks()
        a, b = (report.a * report.scale)[blocks], (report.b * report.scale)[blocks]
        measured = self.measure_change and self._box["loser"] is not None
        before = [local(entry.p.detach()).clone() for entry in entries] if measured else []
        if not self._compiled(fused_forms.step, self.base, entries, a, b):
            return False
        self.base._opt_called = True  # type: ignore[attr-defined]  # schedulers of the base ask for it
        if measured:
            numbers = [moved(entry.p.detach(), x, entry.w, entry.l) for entry, x in zip(entries, before)]
            ranks = shared([entry.p for entry in entries], self.process_group)
            report.change = ranks.pooled(numbers, self._block_sizes()).to(a).sum(0)
        return True

    def _compiled(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What a fused form returns; None without `fused`, and where it cannot be compiled, which is told once."""
        if not self.fused or self._box["uncompiled"]:
            return None
        try:
            return work(*arguments)
        except fused_forms.Unavailable as error:
            self._box["uncompiled"] = True
            self._tell_unfused(str(error))
            return None

    def _tell_unfused(self, why: str) -> None:
        if self._box["unfused"] != why:
            self._box["unfused"] = why
            warnings.warn(f"fused=True: {why}; the step is taken without, with the same result", stacklevel=4)

    def _adopt(self) -> StepReport:
        """Take what is in p.grad as it is (a projected gradient, unscaled or not, or a plain one), and clip it."""
        box = self._box
        for p in self._parameters():
            if p.grad is not None:
                p.grad = settled(p.grad, p)
        entries = [Entry({}, p, p.grad, None) for p in self._parameters()]
        if all(entry.w is None for entry in entries) and not elsewhere(self._parameters(), self.process_group):
            empty = torch.zeros(1, dtype=torch.float64)
            report = StepReport(Gram(empty, empty, empty), empty + 1, empty, {}, self.max_norm)
        else:
            report = self._measure(entries, paired=False)
            if self.max_norm is not None:
                for entry in entries:
                    if entry.w is not None:
                        mix_(entry.w, None, report.scale, report.scale)
        mixture = box["mixture"]
        if mixture is not None:  # the numbers of project() say what the two gradients were; the norm is the present one
            mixture.factor = (report.norm / mixture.report.norm).nan_to_num(1.0)
            report, report.norm = mixture.report, report.norm
        box["report"] = report
        return report

    def _step_base(self, report: StepReport) -> None:
        """Step the base, and repair or measure the change that it made."""
        mixture: Mixture | None = self._box["mixture"]
        if mixture is None or not mixture.entries:
            self.base.step()
            return
        repair = self.metric == "optimizer"
        if repair and abs(mixture.factor.item() * mixture.grad_scale - 1) > 1e-3:
            raise GradientError(
                f"the gradient was rescaled by {mixture.factor.item():.6g} between project() and step(), and "
                "metric='optimizer' had solved for the step as it was: pass a scaler's factor as "
                "project(grad_scale=scaler.get_scale()), and clip by max_norm= instead of afterwards"
            )
        entries = [entry._replace(w=entry.p.grad) for entry in mixture.entries]
        ranks = shared([entry.p for entry in entries], self.process_group)
        before = [local(entry.p.detach()).clone() for entry in entries] if self.measure_change else []
        self.base.step()
        scale = report.scale * mixture.factor
        a, b, sizes = report.a * scale, report.b * scale, self._block_sizes()
        if repair and (report.inexact or own_metric.drifts(self.base)):
            driven = mixture.factor.item() if report.inexact else None
            own_metric.correct(self.base, entries, sizes, a, b, ranks, driven)
        if self.measure_change:
            numbers = [moved(entry.p.detach(), x, entry.w, entry.l) for entry, x in zip(entries, before)]
            du, dl, dd = ranks.pooled(numbers, sizes).to(a).unbind(1)
            parallel_wl = report.blocks.wl / report.blocks.ll * dl
            dw = torch.where(a != 0, (du - b * dl) / a, torch.where(report.blocks.same_direction, parallel_wl, torch.nan))
            report.change = torch.stack([dw.sum(), dl.sum(), dd.sum()])

    def _measure(
        self, entries: list[Entry], paired: bool, grad_scale: float = 1.0, rows: Sequence[Tensor] | None = None
    ) -> StepReport:
        losses = list(self._box["losses"].values())
        loss = torch.stack([x.to(losses[0]) for x in losses]).sum() if losses else None
        ws, ls = [entry.w for entry in entries], [entry.l for entry in entries]
        if paired and not self._box["told"] and self.process_group is None:
            self._box["told"] = True
            self._tell([e.p for e in entries if e.p.requires_grad and e.w is None and e.l is None])
        sizes = self._block_sizes()
        expected = (self._box["winner"] is not None, self._box["loser"] is not None)
        rows = self._compiled(fused_forms.rows, ws, ls) if rows is None and paired else rows
        tensors = gram(ws, ls, self.process_group, loss, entries[0].p.device, expected, rows)
        blocks = tensors.pooled(sizes)
        self._box["measured"] = blocks
        # Without a loser there is nothing to weigh against, whatever the rule.
        a, b = self.rule(blocks) if paired else (torch.ones_like(blocks.ww), torch.zeros_like(blocks.ww))
        report = StepReport(blocks, a, b, dict(self._box["losses"]), self.max_norm)
        if paired and self.metric == "optimizer" and report.norm.isfinite():

            def scale(c: Tensor) -> float:
                norm = blocks.norm(a, -c.to(a)).item() / grad_scale
                return (1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))) / grad_scale

            ranks = shared([entry.p for entry in entries], self.process_group)
            root = own_metric.coefficients(self.base, entries, sizes, blocks, scale, ranks)
            report = StepReport(blocks, a, a * -root.c.to(a), report.losses, self.max_norm)
            report.passes, report.inexact = root.passes, not root.exact
        report.tensors = tensors
        return report

    def _tell(self, idle: list[Tensor]) -> None:
        """Warn about trainable parameters that neither loss uses, once."""
        if idle:
            named = [pair for g in self.param_groups for pair in zip(g.get("param_names", []), g["params"])]
            named += [] if self.model is None else list(self.model.named_parameters())
            names = {p: name for name, p in named}
            shown = [names.get(p, f"shape {tuple(p.shape)}") for p in idle]
            warnings.warn(
                f"{len(idle)} trainable parameters got a gradient from neither loss: {', '.join(shown[:5])}"
                f"{', ...' if len(shown) > 5 else ''}. The base keeps no state for them, and a distributed checkpoint of it "
                "may not load for want of that; freeze them (requires_grad_(False)) or leave them out of the optimizer",
                stacklevel=4,
            )

    def _judge(self, blocks: Gram) -> None:
        """Raise what the ranks found wrong with their gradients, on each of them."""
        code = int(blocks.fault) if blocks.fault is not None else 0
        if code and blocks.ranks is not None:
            self._forget()
            self.zero_grad()
            numbers = [tuple(f"{x:.6g}" for x in row) for row in blocks.ranks[:4, :3].tolist()]
            why = NO_GRADIENT if code in (1, 2) else f"The first ranks' |g_w|^2, <g_w, g_l>, |g_l|^2: {numbers}"
            raise GradientError(f"{FAULTS[code]}. {why}")

    def _refuse(self, report: StepReport) -> None:
        self._judge(report.blocks)
        self._judge(self._box["measured"])  # of what project() left, if somebody changed it before step()
        report.skipped = True
        self._box["skipped"] += 1
        self._forget()
        self.zero_grad()
        if self.on_nonfinite == "raise":
            ww, wl, ll = report.gram
            raise NonFiniteGradient(
                f"a gradient or loss is not finite: |g_w|^2 = {ww}, <g_w, g_l> = {wl}, |g_l|^2 = {ll}, winner's loss "
                f"{report.winner_loss}, loser's loss {report.loser_loss}; nothing was stepped. Look for empty or overlong rows "
                'and overflowing activations, or use on_nonfinite="skip"'
            )

    def _forget(self) -> None:
        self._box.update(winner=None, loser=None, losses={}, active=None, mixture=None, packed={})

    # ---- what is its own beside the base's -------------------------------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """Steps left out so far because a gradient or loss was not finite; not part of `state_dict()`."""
        return self._box["skipped"]

    @property
    def unfused(self) -> str:
        """Why `fused=True` was not followed, "" where it was (and before the first step)."""
        return self._box["unfused"]

    @property
    def counters(self) -> Counters:
        """`skipped_steps` as a part of a checkpoint: `dcp.save({"model": ..., "optim": ..., "ogdopt": opt.counters})`."""
        return Counters(self._box)

    @property
    def report(self) -> StepReport | None:
        """The last step's (or projection's) report."""
        return self._box["report"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; inside a context only that side's, else also those that wait."""
        self.base.zero_grad(set_to_none=set_to_none)
        self._box["packed"].clear()
        if not self._box["active"]:
            self._forget()

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "rule", "max_norm", "scope", "metric", "set_aside", "on_nonfinite", "measure_change")
        names += ("fused", "process_group", "model")
        return {name: getattr(self, name) for name in names} | {"skipped": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped = state.pop("skipped")
        self.__dict__.update(state)
        self._set_up()
        self._box["skipped"] = skipped

    def __repr__(self) -> str:
        options = f"rule={_name(self.rule)}, max_norm={self.max_norm}, scope={self.scope!r}"
        options += "" if self.metric == "euclidean" else f", metric={self.metric!r}"
        options += "" if self.set_aside is None else f", set_aside={self.set_aside!r}"
        options += ", fused=True" if self.fused else ""
        return f"{type(self).__name__}({self.base!r}, {options})"


class Counters:
    """What a `PairedGradient` has counted, in the two methods that checkpoint writers look for.

    It is no part of the optimizer's state dict, which stays the bare base's.
    """

    def __init__(self, box: dict[str, Any]) -> None:
        self._box = box

    def state_dict(self) -> dict[str, int]:
        """The numbers by name."""
        return {"skipped_steps": self._box["skipped"]}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting from the numbers of a checkpoint."""
        self._box["skipped"] = int(state_dict["skipped_steps"])


class ProjectedGradient(PairedGradient):
    """Orthogonal gradient descent around any torch optimizer: the winner's likelihood goes up, the loser's does not.

    Takes `base` and the options of `PairedGradient`; the rule is `projection.orthogonal` (Definition 4.1). The guarantees
    of theorems 5.3 and 5.4 are for the direction that is handed to the base; a base that rescales it element by element
    (RMSprop, Adam) or adds momentum or weight decay keeps them only approximately, unless `metric="optimizer"`.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> opt = ProjectedGradient(torch.optim.SGD([theta], lr=0.1))
    >>> report = opt.step(lambda: theta[0] + theta[1], lambda: theta[0])
    >>> theta.tolist()  # moved along the second axis alone: the first would also have helped the loser
    [1.0, 0.8999999761581421]
    >>> report.coefficients
    (1.0, -1.0)
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        max_norm: float | None = None,
        scope: Scope = "global",
        metric: Metric = "euclidean",
        set_aside: SetAside = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        measure_change: bool = False,
        fused: bool = False,
        process_group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(
            base,
            orthogonal,
            max_norm=max_norm,
            scope=scope,
            metric=metric,
            set_aside=set_aside,
            on_nonfinite=on_nonfinite,
            measure_change=measure_change,
            fused=fused,
            process_group=process_group,
            model=model,
        )


def _guard(box: dict[str, Any]) -> Callable[..., None]:
    """A hook of the base that refuses a step while a side's backward passes are being collected."""

    def refuse(*_: Any) -> None:
        if box["active"] or box["running"]:
            raise GradientError(
                f"the base stepped inside {box['active'] or 'a closure'}, on one side's gradient. Closures and contexts run "
                "forward and backward only; step() comes after them"
            )

    return refuse


def _generators(device: torch.device) -> list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """(read, write) of the random states that a closure may draw from."""
    found = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        found.append((module.get_rng_state, module.set_rng_state))
    return found


def _name(rule: Any) -> str:
    return getattr(rule, "__name__", repr(rule))


def _two(closure: Closure | Sequence[Closure] | None, loser: Closure | None) -> tuple[Closure | None, Closure | None]:
    if isinstance(closure, Sequence):
        if loser is not None or len(closure) != 2:
            raise TypeError(
                f"step() got a sequence of {len(closure)} closures; expected step((winner, loser)) and nothing else"
            )
        return closure[0], closure[1]
    if loser is not None and closure is None:
        raise TypeError("step() got a loser but no winner; expected step(winner, loser)")
    return closure, loser
