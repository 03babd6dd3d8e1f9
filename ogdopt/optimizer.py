"""Two gradients, one step: a torch optimizer around any other that mixes a winner's and a loser's gradient by a rule.

The loser's backward runs first, and its gradient waits by reference. The winner's follows, so the two graphs never coexist.
The Gram numbers of the two decide the coefficients. The mixture is formed in the winner's own memory and clipped by a norm
that those numbers already hold. Then the base optimizer gets it as `p.grad`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ogdopt import _after
from ogdopt._mixing import Mixing
from ogdopt._options import MaxNorm, Metric, Option, Options, refuse_unknown
from ogdopt._recompute import Recompute
from ogdopt._setup import Setup
from ogdopt._sides import Closure, Side, Sides
from ogdopt.errors import GradientError, NonFiniteGradient, warn
from ogdopt.memory import Memories, Memory
from ogdopt.projection import Rule, Scope, orthogonal
from ogdopt.report import StepReport
from ogdopt.stored import SetAside
from ogdopt.wrapper import Wrapper, hooked, one_base

PLAIN = (
    "step() found one gradient in p.grad and no winner and loser, so this was a plain step of the base: nothing was projected. "
    "Give both sides, either as step(winner, loser) with two closures, or by running the backward passes inside `with "
    "opt.winner():` and `with opt.loser():`. For a step that is meant to be plain, `with opt.winner():` alone says so"
)


LONE = 20
"""Steps with one closure, and never one with two sides, before they are taken for a mistake."""


class _Parts:
    """Everything that a paired optimizer holds; one object, so that a class that re-dresses it (Lightning does) shares it."""

    def __init__(self, base: Optimizer, options: Options) -> None:
        self.setup: Setup = Setup(base, options)
        self.sides: Sides = Sides(self.setup)
        self.mixing: Mixing = Mixing(self.setup, self.sides)
        self.skipped: int = 0
        self.lone_closures: int = 0
        if hasattr(base, "_optimizer_step_pre_hooks") or hasattr(base, "bases"):  # some never called Optimizer.__init__
            base.register_step_pre_hook(_after.Guard(self.sides))  # copies come here too: Optimizer.__getstate__ drops hooks


class PairedGradient(Wrapper):
    """Any torch optimizer, stepping on the mixture of two gradients that a rule chooses.

    - `base`: the optimizer that steps, or a list of optimizers under one projection and one clip, e.g. Muon for matrices and
      AdamW for the rest.
    - `rule`: maps Gram numbers to coefficients; a function of `ogdopt.projection`, or its name.
    - `max_norm`: L2 norm that the mixture is clipped to. None: no clipping. A sequence has one limit a parameter group.
    - `scope`: which tensors share coefficients. "global": all; "group": those of a parameter group; "tensor": none.
    - `metric`: which change keeps the rule's promise. "euclidean", the paper's: the gradient that the base gets. "optimizer":
      what the base makes of it, for RMSprop, Adam, AdamW, Adagrad and SGD, with momentum and weight decay (`ogdopt.metric`).
      That needs the orthogonal rule, and a few more passes over the gradients.
    - `set_aside`: how the loser's gradient waits. None: by reference. `torch.bfloat16` or "int8" (blocks of 256 with a scale):
      rounded. "cpu": in the host's memory. "recompute": not at all; the winner's closure then runs twice.
    - `measure_change`: the report says what the step did to both losses. It clones the parameters for that.
    - `fused`: products, mixture, clipping and the update of RMSprop, Adam, AdamW and SGD are two compiled passes over memory
      (`ogdopt.fused`), equal to the others within rounding. The first step compiles, a second in float32 on a CPU and longer
      elsewhere. What cannot be fused falls back to the unfused step and warns; `unfused` keeps the reason.
    - `on_nonfinite`: what an infinite or NaN gradient or loss does. "skip" leaves the step out, clears the gradients and counts
      it in `skipped_steps`. "raise" raises NonFiniteGradient.
    - `process_group`: the ranks that hold plain local shards (FSDP1). If each rank trains its own model, pass a group of one.
    - `model`: is asked for DDP's and FSDP1's no_sync() when a side closes, and names parameters in warnings. FSDP2 is asked
      without it.
    - `remember`: maps "loser", or a preserved name, to what is kept of its gradients from step to step (`ogdopt.memory`). The
      step respects that too: `{"loser": Remembered(0.95), "facts": Remembered(form="int8")}`.

    Under torch.distributed `step()` and `project()` are collectives, which every rank of the group calls. DTensor gradients are
    counted by their placements. Plain ones are copies that must agree. Every rank takes the same decision. step() raises
    GradientError on all of them for copies that differ, for shards that are copies, and for a side left empty.

    Parameter groups, state and checkpoints are the base's own. `state_dict()` is interchangeable with the bare base's. Options
    may be set later as attributes; each is checked as here.

    Raises TypeError for an unknown option, and for a base that is no optimizer, needs a closure (LBFGS) or needs sparse
    gradients. Raises ValueError for an option out of range.
    """

    rule: Option[Rule] = Option("Maps Gram numbers to the two coefficients.")
    max_norm: Option[MaxNorm] = Option("L2 norm that the mixture is clipped to.")
    scope: Option[Scope] = Option("Which tensors share coefficients.")
    metric: Option[Metric] = Option("Which change of the parameters keeps the promise.")
    set_aside: Option[SetAside] = Option("How the loser's gradient waits.")
    on_nonfinite: Option[Literal["skip", "raise"]] = Option("What happens when something is infinite or NaN.")
    measure_change: Option[bool] = Option("Whether the report says what the step did to both losses.")
    fused: Option[bool] = Option("Whether passes over memory are compiled.")
    process_group: Option[dist.ProcessGroup | None] = Option("The ranks that hold plain local shards.")
    model: Option[nn.Module | None] = Option("The module that is asked about no_sync() and for names.")
    remember: Option[Mapping[str, Memory]] = Option("What is remembered of earlier steps, by side.")

    def __init__(
        self,
        base: Optimizer | Sequence[Optimizer],
        rule: Rule | str,
        *,
        max_norm: MaxNorm = None,
        scope: Scope = "global",
        metric: Metric = "euclidean",
        set_aside: SetAside = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        measure_change: bool = False,
        fused: bool = False,
        process_group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
        remember: Mapping[str, Memory] | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(unknown, type(self))
        one = one_base(base)
        options = Options(
            rule,  # type: ignore[arg-type]  # a name becomes the rule
            max_norm=max_norm,
            scope=scope,
            metric=metric,
            set_aside=set_aside,
            on_nonfinite=on_nonfinite,
            measure_change=measure_change,
            fused=fused,
            process_group=process_group,
            model=model,
            remember=dict(remember or {}),
        )
        options.check(one)
        self._parts = _Parts(one, options)
        self._set_up()

    @property
    def base(self) -> Optimizer:
        """The optimizer that steps; where several do, one that has them in `bases`."""
        return self._parts.setup.base

    @property
    def options(self) -> Options:
        """All options; replaced as a whole when one of them is set."""
        return self._parts.setup.options

    @options.setter
    def options(self, value: Options) -> None:
        self._parts.setup.options = value

    # ---- the three verbs -------------------------------------------------------------------------------------------------

    def winner(self) -> AbstractContextManager[None]:
        """Context in which backward passes count as the winner's; any number of micro-batches, before or after the loser's.

        After it `p.grad` shows the winner's gradient until the next verb. Raises GradientError if parameters already hold a
        gradient from elsewhere, or if none appears inside.
        """
        return self._collect("winner")

    def loser(self) -> AbstractContextManager[None]:
        """Context in which backward passes count as the loser's. Left out, the winner's gradient is used as it is."""
        return self._collect("loser")

    def preserve(self, name: str = "preserve") -> AbstractContextManager[None]:
        """Context in which backward passes count as those of something whose loss the step must not raise.

        Several names are several promises, each kept to first order: the step is the nearest to the winner's gradient that
        respects the loser and all of them (`ogdopt.cone`). At most seven. `set_aside` is how these gradients wait, too.
        """
        if name in ("winner", "loser") or not name:
            raise ValueError(f"what is preserved is called {name!r}; expected a name of its own, such as 'facts'")
        self.options.check_kept()
        return self._collect(name)

    def _collect(self, side: Side) -> AbstractContextManager[None]:
        self._parts.setup.once("plain")  # who uses contexts knows the two ways
        return self._parts.sides.collect(side)

    def project(self, grad_scale: float = 1.0) -> StepReport:
        """Mix what the contexts collected into `p.grad`, neither clipped nor stepped.

        It does not wait for the device, except with `metric="optimizer"`, whose root decides how many passes it takes.

        A parameter with a gradient on one side only counts as zero on the other. `grad_scale` is the factor that a scaler
        put on both losses and takes off before the step (`scaler.get_scale()`); only `metric="optimizer"` needs to know it.
        Raises GradientError without a winner's gradient.
        """
        mixing = self._parts.mixing
        entries, report = mixing.gathered(grad_scale)
        mixing.mix(entries, report, clip=False, grad_scale=grad_scale)
        return report

    @hooked
    def step(  # type: ignore[override]
        self,
        winner: Closure | Sequence[Closure] | None = None,
        loser: Closure | None = None,
        *,
        preserve: Closure | Mapping[str, Closure] | None = None,
        closure: Closure | Sequence[Closure] | None = None,
    ) -> StepReport:
        """Mix the two gradients, clip, step the base, clear; the report says what happened.

        `step(winner, loser)` or `step((winner, loser))` runs the closures itself, the loser first. A closure returns a loss
        (backward is called for it), or runs backward itself. `step(winner)` alone is a plain clipped step. `step()` uses
        what the contexts or `project()` left, or plain `p.grad`, which then stays in place as with any optimizer. `closure` is
        torch's name for the first. `preserve` is one more closure, or several by name, of losses that the step must not raise.

        Raises GradientError if a closure leaves no gradient, TypeError for what is no closure, NonFiniteGradient if
        `on_nonfinite="raise"`.
        """
        first, second = _closures(winner, loser, closure)
        twice = self._run(first, second, _named(preserve))
        setup, sides, mixing = self._parts.setup, self._parts.sides, self._parts.mixing
        ours = sides.waiting or sides.mixture is not None
        entries = []
        if twice is not None:
            report = Recompute(mixing, twice).run()
        elif sides.waiting:
            entries, report = mixing.gathered()
        else:
            report = mixing.adopt()
        if not report.norm.isfinite():
            self._refuse(report)
            return report
        if entries:
            if mixing.step_fused(entries, report):
                sides.forget()
                return report
            mixing.mix(entries, report)
            entries.clear()  # so that the loser's gradient is free before the base steps
        _after.step_base(setup, sides.mixture, report)
        sides.forget()
        if ours:
            self.zero_grad()
        return report

    def _run(self, winner: Closure | None, loser: Closure | None, kept: Mapping[str, Closure]) -> Closure | None:
        """Run the closures; the winner's is given back where it must run twice."""
        sides, setup = self._parts.sides, self._parts.setup
        plain = not sides.waiting and sides.mixture is None and any(p.grad is not None for p in setup.parameters())
        if kept and winner is None:
            raise TypeError("step() got preserve= but no winner; expected step(winner, loser, preserve=...)")
        if kept:
            setup.options.check_kept()
        if winner is not None and (loser is not None or kept):
            setup.once("plain")
            if sides.waiting:
                raise GradientError(
                    "step() got closures while a context's gradient is waiting; use one way or the other in a step"
                )
            for side, run in (*([("loser", loser)] if loser is not None else []), *kept.items()):
                sides.run(side, run)
            if setup.options.set_aside == "recompute":
                return winner
            sides.run("winner", winner)
        elif winner is not None:
            # A schedule of objectives takes steps of one side, a trainer that knows nothing of two never another.
            self._parts.lone_closures += sides.run_alone(winner)
            plain = self._parts.lone_closures >= LONE
        # A learning rate of 0 is how torch's distributed checkpoints make a state to load into.
        if plain and any(group.get("lr", 1) != 0 for group in self.param_groups) and setup.once("plain"):
            warn(PLAIN)
        return None

    def _refuse(self, report: StepReport) -> None:
        parts = self._parts
        # What project() left counts too, if somebody changed it before step().
        for blocks in (report.blocks, parts.sides.measured):
            parts.sides.judge(blocks)
        report.skipped = True
        parts.skipped += 1
        parts.sides.abandon()
        if self.on_nonfinite == "raise":
            ww, wl, ll = report.gram
            raise NonFiniteGradient(
                f"a gradient or loss is not finite: |g_w|^2 = {ww}, <g_w, g_l> = {wl}, |g_l|^2 = {ll}, winner's loss "
                f"{report.winner_loss}, loser's loss {report.loser_loss}; nothing was stepped. Look for empty or overlong rows "
                'and overflowing activations, or use on_nonfinite="skip"'
            )

    # ---- what is its own besides the base's ------------------------------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """Steps left out so far because a gradient or loss was not finite; not part of `state_dict()`."""
        return self._parts.skipped

    @property
    def unfused(self) -> str:
        """Why `fused=True` was not followed, "" where it was (and before the first step)."""
        return self._parts.setup.unfused

    @property
    def counters(self) -> Counters:
        """`skipped_steps` as a part of a checkpoint: `dcp.save({"model": ..., "optim": ..., "ogdopt": opt.counters})`."""
        return Counters(self._parts)

    @property
    def memories(self) -> Memories:
        """What `remember` has gathered, as a part of a checkpoint: `dcp.save({..., "memories": opt.memories})`."""
        return Memories(self.options.remember, self._parts.setup.parameters)

    @property
    def report(self) -> StepReport | None:
        """The last step's (or projection's) report."""
        return self._parts.mixing.report

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; inside a context only that side's, else also those that wait."""
        self._parts.sides.zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "options": self.options, "skipped": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._parts = _Parts(state["base"], state["options"])
        self._parts.skipped = state["skipped"]
        self._set_up()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r}, {self.options!r})"


class Counters:
    """What a `PairedGradient` has counted, in the two methods that checkpoint writers look for.

    It is no part of the optimizer's state dict, which stays the bare base's.
    """

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts

    def state_dict(self) -> dict[str, int]:
        """The numbers by name."""
        return {"skipped_steps": self._parts.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting from the numbers of a checkpoint."""
        self._parts.skipped = int(state_dict["skipped_steps"])


class ProjectedGradient(PairedGradient):
    """Orthogonal gradient descent around any torch optimizer: the winner's likelihood goes up, the loser's does not.

    Takes `base` and the options of `PairedGradient`; the rule is `projection.orthogonal` (Definition 4.1). The guarantees of
    theorems 5.3 and 5.4 are for the direction that the base gets. A base that rescales it element by element (RMSprop, Adam),
    or adds momentum or weight decay, keeps them only approximately. `metric="optimizer"` keeps them for the change itself.

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
        base: Optimizer | Sequence[Optimizer],
        *,
        max_norm: MaxNorm = None,
        scope: Scope = "global",
        metric: Metric = "euclidean",
        set_aside: SetAside = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        measure_change: bool = False,
        fused: bool = False,
        process_group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
        remember: Mapping[str, Memory] | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(unknown, type(self))
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
            remember=remember,
        )


def _named(preserve: Closure | Mapping[str, Closure] | None) -> dict[str, Closure]:
    """What is preserved, by name; raises TypeError for what is no closure."""
    if preserve is None:
        return {}
    named = dict(preserve) if isinstance(preserve, Mapping) else {"preserve": preserve}
    for name, given in named.items():
        if not callable(given):
            raise TypeError(
                f"step() got a {type(given).__name__} to preserve as {name!r}; expected a function that computes a loss"
            )
        if name in ("winner", "loser", ""):
            raise ValueError(f"what is preserved is called {name!r}; expected a name of its own, such as 'facts'")
    return named


def _closures(
    winner: Closure | Sequence[Closure] | None, loser: Closure | None, closure: Closure | Sequence[Closure] | None
) -> tuple[Closure | None, Closure | None]:
    """(winner, loser) from all ways of giving them; raises TypeError for what is none."""
    if closure is not None:
        if winner is not None:
            raise TypeError("step() got closure= and a winner; closure is torch's name for the same, so give one of them")
        winner = closure
    if isinstance(winner, Sequence):
        if loser is not None or len(winner) != 2:
            raise TypeError(f"step() got a sequence of {len(winner)} closures; expected step((winner, loser)) and nothing else")
        winner, loser = winner
    if loser is not None and winner is None:
        raise TypeError("step() got a loser but no winner; expected step(winner, loser)")
    for side, given in (("winner", winner), ("loser", loser)):
        if given is not None and not callable(given):
            what = "a loss" if isinstance(given, (torch.Tensor, float, int)) else f"a {type(given).__name__}"
            raise TypeError(
                f"step() got {what} as the {side}; expected a function that computes it, so that each side has a forward pass "
                "of its own: step(lambda: loss_of(chosen), lambda: loss_of(rejected)), without calling them"
            )
    return winner, loser
