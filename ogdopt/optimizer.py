"""Two gradients, one step: a torch optimizer around any other that mixes a winner's and a loser's gradient by a rule.

The loser's backward runs first and its gradient waits by reference; the winner's follows, so the two graphs never
coexist; the Gram numbers of the two decide the coefficients; the mixture is formed in the winner's own memory, clipped by
a norm that those numbers already hold, and handed to the base optimizer as `p.grad`.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ogdopt.gram import FAULTS, DTensor, Gram, elsewhere, gram, mix_, pending, same_memory, settled
from ogdopt.projection import Rule, Scope, block_sizes, orthogonal
from ogdopt.report import StepReport

Closure: TypeAlias = Callable[[], "Tensor | float | None"]
Side: TypeAlias = Literal["winner", "loser"]


NO_GRADIENT = (
    "Either no backward ran (a closure must return its loss or call backward; torch.autograd.grad leaves p.grad alone), or "
    "the optimizer was built on other parameters than the model's (build it after sharding), or gradient synchronization "
    "was off for the last micro-batch"
)


class GradientError(RuntimeError):
    """The gradients are not where a two-gradient step needs them; the message says what to change."""


class NonFiniteGradient(FloatingPointError):  # noqa: N818 - names what was found, like its base class
    """A gradient or loss is infinite or NaN and `on_nonfinite="raise"`; nothing was stepped."""


class PairedGradient(Optimizer):
    """Any torch optimizer, stepping on the mixture of two gradients that a rule chooses.

    `base` is the optimizer that steps, and `rule` maps Gram numbers to coefficients (`ogdopt.projection`). The mixture is
    clipped to an L2 norm of `max_norm` (None: not at all), after mixing. `scope` says which tensors share coefficients:
    all ("global"), those of a parameter group ("group"), or none ("tensor"). `on_nonfinite` says what happens when a
    gradient or loss is infinite or NaN: "skip" leaves the step out, clears the gradients and counts it in `skipped_steps`;
    "raise" raises NonFiniteGradient. `process_group` is for gradients that are plain local shards (FSDP1), and for ranks that
    train models of their own (a group of one). `model`, if given, is looked into when a side closes, for gradients that are
    not synchronized yet (DDP, FSDP1, FSDP2).

    Under torch.distributed `step()` and `project()` are collectives: every rank of the group calls them, DTensor gradients
    are counted by their placements, and plain ones are copies that must agree. Every rank takes the same decision; step()
    raises GradientError on all of them for copies that differ, for shards that are copies, and for a side left empty.

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
        on_nonfinite: Literal["skip", "raise"] = "skip",
        process_group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
    ) -> None:
        # Optimizer.__init__ is not called: groups, state and defaults are the base's, read through properties, so that
        # nothing can come apart when a checkpoint or a trainer replaces them.
        _check_base(base)
        block_sizes(scope, [])
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}; expected a positive number, or None for no clipping")
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f"on_nonfinite is {on_nonfinite!r}; expected 'skip' or 'raise'")
        self.base = base
        self.rule = rule
        self.max_norm = max_norm
        self.scope: Scope = scope
        self.on_nonfinite = on_nonfinite
        self.process_group = process_group
        self.model = model
        self._set_up()

    def _set_up(self) -> None:
        self._optimizer_step_pre_hooks: OrderedDict = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict = OrderedDict()
        self._patch_step_function()
        # The only mutable state, so that a class that re-dresses this object (Lightning does) still shares it.
        self._box: dict[str, Any] = {"skipped": 0, "report": None, "measured": None, "running": False}
        self._forget()
        self.base.register_step_pre_hook(_guard(self._box))  # copies come here too: Optimizer.__getstate__ drops hooks

    # ---- the three verbs -------------------------------------------------------------------------------------------------

    @contextmanager
    def _collect(self, side: Side) -> Iterator[None]:
        box = self._box
        if box["active"]:
            raise GradientError(f"{side}() was entered inside {box['active']}(); close the one before opening the other")
        self._refuse_foreign()
        waiting = box[side] or {}
        for p, g in waiting.items():
            p.grad = g
        box["active"] = side
        try:
            yield
            taken = self._take(side)
            self._refuse_aliases(taken, box["loser" if side == "winner" else "winner"] or {})
            box[side] = taken
        except BaseException:
            self._forget()
            self.zero_grad()
            raise
        box["active"] = None

    def winner(self) -> Any:
        """Context in which backward passes count as the winner's; any number of micro-batches, before or after the loser's.

        Raises GradientError if parameters already hold a gradient from elsewhere, or if none appears inside.
        """
        return self._collect("winner")

    def loser(self) -> Any:
        """Context in which backward passes count as the loser's. Left out, the winner's gradient is used as it is."""
        return self._collect("loser")

    def project(self) -> StepReport:
        """Mix what the contexts collected into `p.grad`, neither clipped nor stepped; does not wait for the device.

        A parameter with a gradient on one side only counts as zero on the other. Raises GradientError without a winner's
        gradient.
        """
        return self._mix(clip=False)

    def step(self, closure: Closure | Sequence[Closure] | None = None, loser: Closure | None = None) -> StepReport:  # type: ignore[override]
        """Mix the two gradients, clip, step the base, clear; the report says what happened.

        `step(winner, loser)` or `step((winner, loser))` runs the closures itself, the loser first. A closure returns a loss
        (backward is called for it), or runs backward itself. `step(winner)` alone is a plain clipped step. `step()` uses
        what the contexts or `project()` left, or plain `p.grad`, which then stays in place as with any optimizer.

        Raises GradientError if a closure leaves no gradient, NonFiniteGradient if `on_nonfinite="raise"`.
        """
        winner, loser = _two(closure, loser)
        box = self._box
        if winner is not None and (box["winner"] is not None or box["loser"] is not None):
            raise GradientError("step() got closures while a context's gradient is waiting; use one way or the other in a step")
        if loser is not None:
            self._run("loser", loser)
        if winner is not None:
            self._run("winner" if loser is not None else None, winner)
        collected = box["winner"] is not None or box["loser"] is not None or box["active"]
        ours = collected or box["mixed"]
        report = self._mix(clip=True) if collected else self._adopt()
        if not report.norm.isfinite():
            self._refuse(report)
            return report
        self.base.step()
        self._forget()
        if ours:
            self.zero_grad()
        return report

    # ---- what holds the verbs together -----------------------------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        """Parameters, each once, in the groups' order; read afresh, since trainers swap them."""
        return list(dict.fromkeys(p for group in self.param_groups for p in group["params"]))

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

    def _evaluate(self, closure: Closure) -> Tensor | float | None:
        """Call a closure, and backward on what it returns unless it has left gradients itself."""
        loss = closure()
        opened_contexts = self._box["active"] is None and self._box["winner"] is not None
        untouched = not opened_contexts and all(p.grad is None for p in self._parameters())
        if untouched and isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
        return loss

    def _refuse_foreign(self) -> None:
        """Drop a mixture that a scaler chose not to step on; refuse gradients that this object did not put there."""
        if self._box["mixed"]:
            self._judge(self._box["measured"])
            self._forget()
            self.zero_grad()
        held = sum(p.grad is not None for p in self._parameters())
        if held:
            raise GradientError(
                f"{held} parameters already hold a gradient; it would be added to this side's. Call zero_grad() first, or run "
                "that backward pass inside `with opt.winner():` or `with opt.loser():`"
            )

    def _take(self, side: Side) -> dict[Tensor, Tensor]:
        """Move every p.grad aside, by reference where nobody else writes to it."""
        shared = dist.is_available() and dist.is_initialized()
        taken = {}
        for p in self._parameters():
            if p.grad is not None:
                g = settled(p.grad, p)
                # Under DDP a plain gradient may be a view of the bucket that the next backward overwrites.
                taken[p] = g.clone() if shared and not isinstance(g, DTensor) else g
                p.grad = None
        waits = pending(self.model) if self.model is not None else None
        if waits:
            raise GradientError(
                f"the {side}'s pass ended with gradients that are not synchronized: {waits}. Switch synchronization on before "
                "the last micro-batch of each side; what waits now would be added to the other side's gradient"
            )
        parameters = self._parameters()
        if not taken and not elsewhere(parameters, self.process_group):  # else the ranks find out together, in gram()
            raise GradientError(
                f"the {side}'s pass left no gradient on any of the {len(parameters)} parameters of this optimizer. "
                f"{NO_GRADIENT}"
            )
        return taken

    def _refuse_aliases(self, taken: dict[Tensor, Tensor], other: dict[Tensor, Tensor]) -> None:
        shared = sum(p in other and same_memory(g, other[p]) for p, g in taken.items())
        if shared:
            raise GradientError(
                f"the winner's and the loser's gradients of {shared} parameters share memory, so that the second overwrote the "
                "first (a reused buffer: a captured graph, or a hook that assigns p.grad). Assign p.grad a copy in each pass"
            )

    def _mix(self, clip: bool) -> StepReport:
        box = self._box
        if box["active"]:
            raise GradientError(f"project() or step() was called inside {box['active']}(); close that context first")
        if box["winner"] is None:
            raise GradientError("there is no winner's gradient to project; run its backward inside `with opt.winner():` first")
        parameters = self._parameters()
        ws = [box["winner"].get(p) for p in parameters]
        ls = [(box["loser"] or {}).get(p) for p in parameters]
        report = self._measure(ws, ls, paired=box["loser"] is not None)
        scale = report.scale if clip else torch.ones_like(report.norm)
        per_tensor = [i for i, n in enumerate(self._block_sizes()) for _ in range(n)]
        a, b = report.a * scale, report.b * scale
        for p, w, l, i in zip(parameters, ws, ls, per_tensor):
            if w is not None:
                mix_(w, l, a[i], b[i])
                p.grad = w
            elif l is not None:
                mix_(l, None, b[i], b[i])
                p.grad = l
        self._forget()
        box["mixed"] = True
        box["report"] = report
        return report

    def _adopt(self) -> StepReport:
        """Take what is in p.grad as it is (a projected gradient, unscaled or not, or a plain one), and clip it."""
        box = self._box
        for p in self._parameters():
            if p.grad is not None:
                p.grad = settled(p.grad, p)
        gradients = [p.grad for p in self._parameters()]
        if all(g is None for g in gradients) and not elsewhere(self._parameters(), self.process_group):
            empty = torch.zeros(1, dtype=torch.float64)
            report = StepReport(Gram(empty, empty, empty), empty + 1, empty, {}, self.max_norm)
        else:
            report = self._measure(gradients, [None] * len(gradients), paired=False)
            if self.max_norm is not None:
                for g in gradients:
                    if g is not None:
                        mix_(g, None, report.scale, report.scale)
        if box["mixed"]:  # the numbers of project() say what the two gradients were; the norm is the present one
            report, report.norm = box["report"], report.norm
        box["report"] = report
        return report

    def _measure(self, ws: list[Tensor | None], ls: list[Tensor | None], paired: bool) -> StepReport:
        losses = list(self._box["losses"].values())
        loss = torch.stack([x.to(losses[0]) for x in losses]).sum() if losses else None
        expected = (self._box["winner"] is not None, self._box["loser"] is not None)
        device = self._parameters()[0].device
        blocks = gram(ws, ls, self.process_group, loss, device, expected).pooled(self._block_sizes())
        self._box["measured"] = blocks
        # Without a loser there is nothing to weigh against, whatever the rule.
        a, b = self.rule(blocks) if paired else (torch.ones_like(blocks.ww), torch.zeros_like(blocks.ww))
        return StepReport(blocks, a, b, dict(self._box["losses"]), self.max_norm)

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
        self._box.update(winner=None, loser=None, losses={}, active=None, mixed=False)

    # ---- a torch optimizer like any other: everything is the base's ------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """Steps left out so far because a gradient or loss was not finite; not part of `state_dict()`."""
        return self._box["skipped"]

    @property
    def report(self) -> StepReport | None:
        """The last step's (or projection's) report."""
        return self._box["report"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's parameter groups."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base's state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's defaults."""
        return self.base.defaults

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's state dict, and nothing else."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Load a checkpoint of this optimizer or of the bare base."""
        self.base.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the base."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; inside a context only that side's, else also those that wait."""
        self.base.zero_grad(set_to_none=set_to_none)
        if not self._box["active"]:
            self._forget()

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Forwarded to the base, whose `state_dict` runs."""
        return self.base.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Forwarded to the base, whose `state_dict` runs."""
        return self.base.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Forwarded to the base, whose `load_state_dict` runs."""
        return self.base.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Forwarded to the base, whose `load_state_dict` runs."""
        return self.base.register_load_state_dict_post_hook(hook, prepend)

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "rule", "max_norm", "scope", "on_nonfinite", "process_group", "model")
        return {name: getattr(self, name) for name in names} | {"skipped": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped = state.pop("skipped")
        self.__dict__.update(state)
        self._set_up()
        self._box["skipped"] = skipped

    def __repr__(self) -> str:
        options = f"rule={getattr(self.rule, '__name__', self.rule)}, max_norm={self.max_norm}, scope={self.scope!r}"
        return f"{type(self).__name__}({self.base!r}, {options})"


class ProjectedGradient(PairedGradient):
    """Orthogonal gradient descent around any torch optimizer: the winner's likelihood goes up, the loser's does not.

    Takes `base` and the options of `PairedGradient`; the rule is `projection.orthogonal` (Definition 4.1). The guarantees
    of theorems 5.3 and 5.4 are for the direction that is handed to the base; a base that rescales it element by element
    (RMSprop, Adam) or adds momentum or weight decay keeps them only approximately.

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
        on_nonfinite: Literal["skip", "raise"] = "skip",
        process_group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
    ) -> None:
        options: dict[str, Any] = {"max_norm": max_norm, "scope": scope, "on_nonfinite": on_nonfinite}
        super().__init__(base, orthogonal, process_group=process_group, model=model, **options)


def _guard(box: dict[str, Any]) -> Callable[..., None]:
    """A hook of the base that refuses a step while a side's backward passes are being collected."""

    def refuse(*_: Any) -> None:
        if box["active"] or box["running"]:
            raise GradientError(
                f"the base stepped inside {box['active'] or 'a closure'}, on one side's gradient. Closures and contexts run "
                "forward and backward only; step() comes after them"
            )

    return refuse


def _check_base(base: Any) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}; expected a torch.optim.Optimizer, e.g. RMSprop(model.parameters())")
    if isinstance(base, PairedGradient):
        raise TypeError(f"base is already a {type(base).__name__}; wrap the innermost optimizer once")
    if isinstance(base, torch.optim.SparseAdam):
        raise TypeError("SparseAdam needs sparse gradients, whose inner products are not defined here; use Adam")
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(base).__name__}.step needs a closure, which it would call again and so step on the unprojected gradient; "
            "choose an optimizer whose step() works without one"
        )


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
