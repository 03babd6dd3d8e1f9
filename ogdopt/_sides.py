"""The two gradients of a step while they are collected: the contexts, the closures, and what is refused there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ogdopt._setup import Setup
from ogdopt.distributed import FAULTS, DTensor, elsewhere, local, pending, same_memory, settled
from ogdopt.errors import NO_GRADIENT, GradientError, warn
from ogdopt.gram import Gram
from ogdopt.metric import Entry
from ogdopt.passes import mix_
from ogdopt.report import StepReport
from ogdopt.stored import Stored

Closure: TypeAlias = Callable[[], "Tensor | float | None"]
Side: TypeAlias = str
"""winner, loser, or the name of what is preserved."""

ONE_GRAPH = (
    "the {side}'s backward pass ran through a graph that the other side's had freed: both losses hang on one forward pass. "
    "Give each side a forward pass of its own, which also needs less memory, or keep the graph: call "
    "backward(retain_graph=True) for the side that comes first, inside its context"
)
CHANGED = (
    "p.grad was changed between the contexts and step(), where it shows the winner's gradient before it is projected: clipping "
    "there scales that one alone. Use max_norm=, or call project() first, which leaves the projected gradient in p.grad"
)


APART = (
    "two paired optimizers collect the same backward passes, and each projects its own parameters alone. For one projection "
    "over all of them give the bases to one: ProjectedGradient([muon, adamw])"
)


@dataclass
class Mixture:
    """What `p.grad` was made of, for what is still to do once it has been stepped on."""

    entries: list[Entry]
    """The gradients, where they are needed again; else empty, so that they are free before the base steps."""
    report: StepReport
    grad_scale: float
    factor: Tensor
    """What others multiplied `p.grad` by between project() and step()."""


class Sides:
    """What waits of a winner and a loser, and the mixture that project() left."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.running: bool = False
        _ALL.add(self)
        self.forget()

    def forget(self) -> None:
        """Let go of everything that waits; `p.grad` is left as it is."""
        self.winner: dict[Tensor, Tensor] | None = None
        self.loser: dict[Tensor, Any] | None = None
        self.kept: dict[str, dict[Tensor, Any]] = {}
        self.losses: dict[str, Tensor] = {}
        self.active: Side | None = None
        self.mixture: Mixture | None = None
        self.measured: Gram | None = None
        self._packed: dict[Tensor, Any] = {}
        self._shown: list[int] = []

    def abandon(self) -> None:
        """Let go of everything that waits, and clear `p.grad`."""
        self.forget()
        self.setup.base.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; inside a context only that side's, else also those that wait."""
        self.setup.base.zero_grad(set_to_none=set_to_none)
        self._packed.clear()
        if not self.active:
            self.forget()

    @property
    def waiting(self) -> bool:
        """Whether a side has been collected, or is being so."""
        return bool(self.active or self._all())

    def _all(self) -> dict[str, dict[Tensor, Any]]:
        """The gradients of every side that has been collected."""
        pair = {"winner": self.winner, "loser": self.loser}
        return {side: found for side, found in pair.items() if found is not None} | self.kept

    # ---- contexts --------------------------------------------------------------------------------------------------------

    @contextmanager
    def collect(self, side: Side) -> Iterator[None]:
        """Context in which backward passes count as one side's."""
        if self.active:
            raise GradientError(f"{side}() was entered inside {self.active}(); close the one before opening the other")
        self.clear_foreign()
        held = self._all().get(side, {})
        packing = side != "winner" and self.setup.options.set_aside not in (None, "recompute")
        self._packed = dict(held) if packing else {}
        for p, g in held.items():
            p.grad = None if packing else g
        self.active = side
        if any(other.active for other in _ALL if other is not self) and self.setup.once("apart"):
            warn(APART)
        hooks = self.on_gradients(self._pack) if packing else []
        try:
            yield
            taken = self._take(side, packing)
            for other, theirs in self._all().items():
                if other != side:
                    self._refuse_aliases(side, taken, theirs)
        except BaseException as error:
            self.abandon()
            raise_one_graph(side, error)
            raise
        finally:
            for hook in hooks:
                hook.remove()
            self._packed = {}
        if side == "winner":
            self.winner = taken
        elif side == "loser":
            self.loser = taken
        else:
            self.kept[side] = taken
        self.active = None
        if not self.running:
            self._show()

    def _show(self) -> None:
        """Let `p.grad` show the winner's gradient until the next verb, for trainers that clip or log it there."""
        # FSDP1 writes what it finds in p.grad back into its flat parameter.
        if self.winner is not None and self.setup.options.process_group is None:
            for p, g in self.winner.items():
                p.grad = g
            self._shown = [_version(g) for g in self.winner.values()]

    def hide(self) -> None:
        """Take the winner's gradient out of `p.grad` again, as others left it there."""
        shown, self._shown = self._shown, []
        if not shown or self.winner is None:
            return
        found = [p.grad for p in self.winner]
        if all(g is None for g in found):  # model.zero_grad()
            self.forget()
            return
        for p in self.winner:
            p.grad = None
        kept = list(self.winner.values())
        changed = any(g is not old or _version(g) != version for g, old, version in zip(found, kept, shown))
        if any(g is not old for g, old in zip(found, kept)):
            self.winner = {p: g for p, g in zip(self.winner, found) if g is not None}
        if changed and self.setup.once("changed"):
            warn(CHANGED)

    def clear_foreign(self) -> None:
        """Drop a mixture that a scaler chose not to step on, and zeros; refuse gradients that came from elsewhere."""
        if self.mixture is not None:
            self.judge(self.measured)
            self.abandon()
        self.hide()
        held = [p for p in self.setup.parameters() if p.grad is not None]
        if held and _all_zero(held):  # zero_grad(set_to_none=False)
            for p in held:
                p.grad = None
        elif held:
            raise GradientError(
                f"{len(held)} parameters already hold a gradient; it would be added to this side's. Call zero_grad() first, or "
                "run that backward pass inside `with opt.winner():` or `with opt.loser():`. Several optimizers of one model go "
                "under one projection: ProjectedGradient([muon, adamw])"
            )

    def on_gradients(self, hook: Callable[[Tensor], None]) -> list[Any]:
        """Call `hook(p)` whenever a backward pass has written p.grad, where it is then the gradient over all ranks."""
        shared = dist.is_available() and dist.is_initialized()
        final = [p for p in self.setup.parameters() if p.requires_grad and (isinstance(p, DTensor) or not shared)]
        return [p.register_post_accumulate_grad_hook(hook) for p in final]

    def _pack(self, p: Tensor) -> None:
        """Move p.grad into its stored form, added to what is there."""
        assert p.grad is not None
        packed, g = self._packed, settled(p.grad, p)
        if p in packed:
            self._refuse_aliases(self.active or "loser", {p: g}, packed, "an earlier backward pass of it")
            one = torch.ones((), dtype=torch.float64, device=local(g).device)
            mix_(g, packed[p], one, one)
        packed[p] = Stored(g, self.setup.options.set_aside, packed.get(p))
        p.grad = None

    def _take(self, side: Side, packing: bool = False) -> dict[Tensor, Any]:
        """Move every p.grad aside, by reference where nobody else writes to it."""
        shared = dist.is_available() and dist.is_initialized()
        parameters = self.setup.parameters()
        taken: dict[Tensor, Any] = self._packed
        for p in parameters:
            g = p.grad
            if g is None:
                continue
            if packing:
                self._pack(p)
                continue
            g = settled(g, p)
            # Under DDP a plain gradient may be a view of the bucket that the next backward overwrites.
            taken[p] = g.clone() if shared and not isinstance(g, DTensor) else g
            p.grad = None
        waits = pending(parameters, self.setup.options.model)
        if waits:
            raise GradientError(
                f"the {side}'s pass ended with gradients that are not synchronized: {waits}. Switch synchronization on before "
                "the last micro-batch of each side; what waits now would be added to the other side's gradient"
            )
        if not taken and not elsewhere(parameters, self.setup.options.process_group):  # else ranks find out together, in gram()
            raise GradientError(
                f"the {side}'s pass left no gradient on any of the {len(parameters)} parameters of this optimizer. "
                f"{NO_GRADIENT}"
            )
        return taken

    def _refuse_aliases(
        self, side: Side, taken: dict[Tensor, Any], other: dict[Tensor, Any], whose: str = "the other side"
    ) -> None:
        theirs = [(g, other.get(p)) for p, g in taken.items()]
        shared = sum(g is not None and same_memory(mine, g) for mine, g in theirs)
        if shared:
            raise GradientError(
                f"the {side}'s pass wrote the gradients of {shared} parameters over those of {whose}: the two share "
                "memory. CUDA graphs do so (torch.compile's reduce-overhead and max-autotune modes), and hooks that keep "
                "gradient buffers: compile without CUDA graphs, or clone p.grad at the end of each side's context"
            )

    # ---- closures --------------------------------------------------------------------------------------------------------

    def run(self, side: Side, closure: Closure) -> None:
        """Run one of two closures."""
        self.running = True
        try:
            with torch.enable_grad(), self.collect(side):
                loss = closure()
                if not self._packed and all(p.grad is None for p in self.setup.parameters()):
                    backward(side, loss)
        finally:
            self.running = False
        self.keep_loss(side, loss)

    def run_alone(self, closure: Closure) -> bool:
        """Run a lone closure, which may open contexts itself; False if it did nothing, as Lightning's manual mode has it."""
        waiting, mixture, left = self.waiting, self.mixture, bool(self._gradients())
        if mixture is not None:  # a new backward pass must not be added to it
            held = [(p, p.grad) for p in self.setup.parameters() if p.grad is not None]
            for p, _ in held:
                p.grad = None
        before = self._gradients()
        self.running = True
        try:
            with torch.enable_grad():
                loss = closure()
                untouched = self._untouched(before)
                if loss is None and untouched and left:
                    if mixture is not None:
                        for p, g in held:
                            p.grad = g
                    return False
                if waiting:
                    raise GradientError(
                        "step() got closures while a context's gradient is waiting; use one way or the other in a step"
                    )
                if mixture is not None and self.mixture is mixture:
                    self.forget()
                if self.winner is None:
                    self._finish_alone(loss, bool(before) and untouched)
        except BaseException as error:
            raise_one_graph("winner", error)
            raise
        finally:
            self.running = False
        self.keep_loss("winner", loss)
        return True

    def _finish_alone(self, loss: Any, stale: bool) -> None:
        """Take what a lone closure left in `p.grad`, after the backward pass that it may have left out."""
        if stale:
            self.clear_foreign()
        if all(p.grad is None for p in self.setup.parameters()):
            backward("winner", loss)
        self.winner = self._take("winner")

    def keep_loss(self, side: Side, loss: Any) -> None:
        """Keep the number that a closure returned for the report."""
        if isinstance(loss, (Tensor, float, int)):
            self.losses[side] = (loss if isinstance(loss, Tensor) else torch.tensor(loss, device="cpu")).detach().sum()

    def _gradients(self) -> list[tuple[Any, int]]:
        """Every gradient that is there, with its version; held on to, so that no later one takes its address."""
        waiting = [g for side in self._all().values() for g in side.values()]
        present = [p.grad for p in self.setup.parameters() if p.grad is not None]
        return [(g, _version(g)) for g in (*waiting, *present)]

    def _untouched(self, before: list[tuple[Any, int]]) -> bool:
        """Whether the gradients are those of a moment before."""
        now = self._gradients()
        return len(now) == len(before) and all(x is y and m == n for (x, m), (y, n) in zip(now, before))

    # ---- what ranks found ------------------------------------------------------------------------------------------------

    def judge(self, blocks: Gram | None) -> None:
        """Raise what the ranks found wrong with their gradients, on each of them."""
        code = int(blocks.fault) if blocks is not None and blocks.fault is not None else 0
        if code and blocks is not None and blocks.ranks is not None:
            self.abandon()
            numbers = [tuple(f"{x:.6g}" for x in row) for row in blocks.ranks[:4, :3].tolist()]
            why = NO_GRADIENT if code in (1, 2, 5) else f"The first ranks' |g_w|^2, <g_w, g_l>, |g_l|^2: {numbers}"
            raise GradientError(f"{FAULTS[code]}. {why}")


_ALL: weakref.WeakSet[Sides] = weakref.WeakSet()


def backward(side: Side, loss: Any) -> None:
    """Call backward on what a closure returned, where it has left no gradient itself."""
    if isinstance(loss, Tensor):
        if loss.requires_grad:
            loss.backward()
    elif isinstance(loss, Mapping) or hasattr(loss, "loss"):
        raise TypeError(
            f"the {side}'s closure returned a {type(loss).__name__} and ran no backward; expected the loss itself: return "
            "outputs.loss, or call outputs.loss.backward() in the closure"
        )


def raise_one_graph(side: Side, error: BaseException) -> None:
    """Raise GradientError for torch's complaint about a graph that is gone."""
    if isinstance(error, RuntimeError) and "through the graph a second time" in str(error):
        raise GradientError(ONE_GRAPH.format(side=side)) from error


def _version(g: Any) -> int:
    """How often a gradient was written; torch does not count what is written to a DTensor in place."""
    return g._version if type(g) is Tensor else getattr(g, "_version", 0)


def _all_zero(parameters: list[Tensor]) -> bool:
    """Whether every gradient is zero; asks the device once for each of them at most."""
    return all(p.grad is not None and not local(p.grad).any() for p in parameters)
