"""Which loss now: schedules for two or more named objectives, such as preference tuning and supervised fine-tuning.

    weights w, one an objective, that sum to one; optima f* (paper "joint SFT and DPO", with w = (lambda, 1 - lambda))

    MixedObjective         minimizes  sum_i w_i f_i                 (6)       every objective at every step
    AlternatingObjective   steps on   f_i,  i ~ w                   (12, 13)  ALRIGHT: in expectation the mixed gradient (11)
    MaxGapObjective        steps on   f_i,  i = argmax w_i (f_i - f*_i)  (16, 17)  MAXRIGHT: the objective furthest from done
    SequentialObjective    steps on   f_1, then f_2                 (7, 8)    forgets the first

Calling one with a closure for every objective runs those that the step needs, and returns the loss to backpropagate. What is
alternated is never multiplied by its weight, since that would count the weight twice. The last three choose one objective a
step. `choose` gives the choice without a loss:

    if objective.choose() == "preference":
        opt.step(winner, loser)
    else:
        opt.step(sft)
    objective.observe(...)      # only MaxGapObjective needs to know the loss

Several ranks choose alike, because the choice depends only on what they share: the step, the seed and losses averaged
over ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Closures = Mapping[str, Callable[[], Tensor]]
Numbers = Mapping[str, Callable[[], Tensor | float]]


class Objective:
    """Named objectives, their weights and the number of steps taken: what the schedules share.

    `weights` are not negative and sum to one. Names are kept in alphabetical order, which is the order in which losses run
    and ties are broken; the order in which they were given changes nothing. An objective of weight zero is never run, and
    its closure may be left out.
    """

    chosen: str | tuple[str, ...] | None = None
    """The objective of the last step; None before the first. All that have a weight, for `MixedObjective`."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights or not all(isinstance(name, str) for name in weights):
            raise ValueError(f"weights is {weights!r}; expected at least one objective, {{name: weight}}")
        bad = {name: w for name, w in weights.items() if not 0 <= w < math.inf}
        if bad:
            raise ValueError(f"weights {bad} are out of range; expected numbers from 0 to 1")
        total = math.fsum(weights.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"weights {dict(weights)} sum to {total:g}; expected 1: divide each by {total:g}")
        self.weights: dict[str, float] = {name: float(weights[name]) for name in sorted(weights)}
        self.step: int = 0
        """Steps taken."""

    def __call__(self, closures: Closures) -> Tensor:
        """Run the closures that this step needs and return the loss to backpropagate, shape ().

        Raises ValueError for a closure that is missing or unknown, and for a loss that is not a tensor of shape ().
        """
        raise NotImplementedError

    @property
    def active(self) -> list[str]:
        """The objectives that have a weight."""
        return [name for name, weight in self.weights.items() if weight > 0]

    @property
    def gaps(self) -> dict[str, float]:
        """The weighted gaps that the next choice goes by; empty for every schedule but `MaxGapObjective`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, in plain numbers and strings that JSON keeps; the same on every rank.

        Settings (weights, seed, optima) are the constructor's and not part of it: a schedule with the same settings that
        loads it goes on bit for bit.
        """
        return {"schedule": type(self).__name__, "names": list(self.weights), "step": self.step, "chosen": self.chosen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken. Raises ValueError for one of another schedule or other objectives."""
        mine = self.state_dict()
        absent = mine.keys() - state_dict.keys()
        if absent:
            raise ValueError(f"the state lacks {sorted(absent)}; expected what state_dict() of {mine['schedule']} returned")
        for key in ("schedule", "names"):
            if state_dict[key] != mine[key]:
                raise ValueError(f"the state's {key} is {state_dict[key]!r}, this objective's {mine[key]!r}; expected the same")
        self.step = int(state_dict["step"])
        chosen = state_dict["chosen"]
        self.chosen = tuple(chosen) if isinstance(chosen, list) else chosen  # JSON has no tuples

    def _took(self, chosen: str | tuple[str, ...]) -> None:
        self.step += 1
        self.chosen = chosen

    def _check(self, closures: Numbers) -> None:
        missing, unknown = [n for n in self.active if n not in closures], [n for n in closures if n not in self.weights]
        if missing or unknown:
            raise ValueError(
                f"closures are given for {sorted(closures)}, {missing} missing and {unknown} unknown; "
                f"expected one for each of {self.active}"
            )


class MixedObjective(Objective):
    """The weighted sum of all objectives, `sum_i w_i f_i` (paper "joint SFT and DPO", equation (6)).

    Every graph is alive until the backward, so that memory and time are those of all objectives together.

    >>> objective = MixedObjective({"preference": 0.75, "sft": 0.25})
    >>> objective({"preference": lambda: torch.tensor(4.0), "sft": lambda: torch.tensor(8.0)}).item()
    5.0
    """

    def __call__(self, closures: Closures) -> Tensor:
        """Run every closure that has a weight and return the weighted sum, shape ()."""
        self._check(closures)
        terms = [self.weights[name] * _loss(name, closures[name]()) for name in self.active]
        self._took(tuple(self.active))
        return sum(terms[1:], start=terms[0])


class OneAtATime(Objective):
    """A schedule whose every step belongs to one objective: `choose` says to which, `observe` gets its loss."""

    chosen: str | None = None

    def __call__(self, closures: Closures) -> Tensor:
        """Choose, run the chosen closure with its graph, observe its loss and return it as it is, shape ()."""
        self._check(closures)
        name = self.choose(closures)
        loss = _loss(name, closures[name]())
        self.observe(name, loss)
        return loss

    def choose(self, closures: Numbers | None = None) -> str:
        """The objective that this step belongs to; counts the step.

        `closures` matter to `MaxGapObjective` alone, which evaluates them: each returns its loss, a tensor of shape () or a
        float. An exception in one of them leaves everything as it was.
        """
        if closures is not None:
            self._check(closures)
        chosen = self._next(closures)
        self._took(chosen)
        return chosen

    def observe(self, name: str, loss: Tensor | float) -> None:
        """Hear the loss of an objective, shape (). Changes nothing but in `MaxGapObjective`.

        Raises ValueError for an objective without a weight.
        """
        if name not in self.active:
            raise ValueError(f"a loss of {name!r} was observed; expected one of {self.active}")

    def _next(self, closures: Numbers | None) -> str:
        raise NotImplementedError


class AlternatingObjective(OneAtATime):
    """ALRIGHT: each step belongs to one objective, drawn with its weight (paper "joint SFT and DPO", algorithm 2).

    The expected gradient is that of `MixedObjective` (equation (11)), at the price of one objective a step. The draw is a
    hash of the seed and the step. So all ranks with the same seed, and a resumed run, agree on it without a message.
    Raises ValueError for a seed that is no integer.

    >>> objective = AlternatingObjective({"preference": 0.7, "sft": 0.3}, seed=0)
    >>> [objective.choose() for _ in range(5)]
    ['preference', 'preference', 'preference', 'sft', 'preference']
    """

    def __init__(self, weights: Mapping[str, float], *, seed: int = 0) -> None:
        super().__init__(weights)
        if not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}; expected an integer, the same on every rank")
        self.seed = seed

    def _next(self, closures: Numbers | None) -> str:
        digest = hashlib.blake2b(f"{self.seed} {self.step}".encode(), digest_size=8).digest()
        at = (int.from_bytes(digest, "big") >> 11) / 2**53 * math.fsum(self.weights.values())  # uniform in [0, 1)
        names = self.active
        for name in names[:-1]:
            at -= self.weights[name]
            if at < 0:
                return name
        return names[-1]


class SequentialObjective(OneAtATime):
    """One objective after the other, `phases = {name: steps}` in the order given (paper "joint SFT and DPO", algorithm 1).

    After the last phase its objective goes on. Here the order of names is the schedule, and `weights` are each phase's share
    of the steps. Raises ValueError for steps that are no whole numbers from 0 on, or are all 0.

    >>> objective = SequentialObjective({"sft": 1, "preference": 2})
    >>> [objective.choose() for _ in range(4)]
    ['sft', 'preference', 'preference', 'preference']
    """

    def __init__(self, phases: Mapping[str, int]) -> None:
        if not all(isinstance(steps, int) and steps >= 0 for steps in phases.values()) or not any(phases.values()):
            raise ValueError(f"phases is {phases!r}; expected {{name: steps}} with whole numbers from 0 on, not all of them 0")
        total = sum(phases.values())
        super().__init__({name: steps / total for name, steps in phases.items()})
        self.phases: dict[str, int] = dict(phases)

    def _next(self, closures: Numbers | None) -> str:
        last, end = "", 0
        for name, steps in self.phases.items():
            if steps:
                last, end = name, end + steps
                if self.step < end:
                    break
        return last


class _Message(NamedTuple):
    """Losses on their way to their mean over ranks."""

    names: Sequence[str]
    numbers: Tensor
    work: Any


class MaxGapObjective(OneAtATime):
    """MAXRIGHT: each step belongs to the objective with the largest weighted gap `w_i (f_i - f*_i)`.

    Paper "joint SFT and DPO", equations (16)-(19), algorithm 3 and appendix C. At step 0 and every `evaluate_every` steps all
    objectives that have a weight are evaluated without a graph, in the mode that the model is in. Then the one with the largest
    gap is run with a graph. In between the last known gaps decide, of which each step renews its own. `evaluate_every=1` is
    algorithm 3; with None or -1 only the first step evaluates. Equal gaps: the first name in alphabetical order. That one's
    closure runs twice in a step that evaluates: draw its batch outside of it, so that both see the same.

    `optima` are the least values f* that the losses can reach, or estimates of them; None takes 0 for all, which is right for
    losses that can reach it. An estimate above the loss makes a negative gap, which is compared like any other.

    A loss that is not finite keeps the objective's last known gap; ValueError where there is none, at the first evaluation.

    Under torch.distributed the losses are averaged over the ranks of `process_group` (None: all of them), with equal weight.
    That takes one message of one number a step, and one more at evaluations. So every rank must take part in every step.

    Raises ValueError for optima that are missing, unknown or not finite, and for `evaluate_every` below 1.

    >>> objective = MaxGapObjective({"preference": 0.5, "sft": 0.5}, optima={"preference": 0.2, "sft": 1.3})
    >>> objective({"preference": lambda: torch.tensor(1.0), "sft": lambda: torch.tensor(1.5)}).item()
    1.0
    >>> objective.chosen, {name: round(gap, 2) for name, gap in objective.gaps.items()}
    ('preference', {'preference': 0.4, 'sft': 0.1})
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        optima: Mapping[str, float] | None = None,
        evaluate_every: int | None = 1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(weights)
        optima = dict.fromkeys(weights, 0.0) if optima is None else optima
        missing, unknown = [n for n in self.active if n not in optima], [n for n in optima if n not in self.weights]
        if missing or unknown:
            raise ValueError(
                f"optima are given for {sorted(optima)}, {missing} missing and {unknown} unknown; expected the least loss of "
                f"each of {self.active} (0.0 where it is not known), or optima=None for 0 everywhere"
            )
        bad = {name: value for name, value in optima.items() if not math.isfinite(value)}
        if bad:
            raise ValueError(f"optima {bad} are not finite; expected the least loss that each objective can reach")
        if not (evaluate_every in (None, -1) or (isinstance(evaluate_every, int) and evaluate_every >= 1)):
            raise ValueError(f"evaluate_every is {evaluate_every!r}; expected 1 or more steps, or None for never again")
        self.optima: dict[str, float] = {name: float(optima[name]) for name in self.active}
        self.evaluate_every: int | None = None if evaluate_every == -1 else evaluate_every
        self.process_group = process_group
        self._losses: dict[str, float] = {}
        self._message: _Message | None = None
        self._device: torch.device | None = None

    @property
    def losses(self) -> dict[str, float]:
        """The last known finite loss of each objective, averaged over ranks. Reading it waits for the device."""
        if self._message is not None:
            self._losses |= _received(self._message)
            self._message = None
        return dict(self._losses)

    @property
    def gaps(self) -> dict[str, float]:
        """The weighted gaps that the next choice goes by, `w_i (f_i - f*_i)`. Reading them waits for the device."""
        return {name: self.weights[name] * (loss - self.optima[name]) for name, loss in sorted(self.losses.items())}

    def observe(self, name: str, loss: Tensor | float) -> None:
        """Renew what is known of an objective by its loss at this step, shape (), on every rank (equation (19)).

        Of several calls before the next choice the last one counts, so that micro-batches are to be averaged first. The
        mean over ranks is on its way when this returns, and waited for when it is read. Raises ValueError for an objective
        without a weight and for a loss that is not one number.
        """
        super().observe(name, loss)
        self._losses = self.losses
        self._message = self._sent([name], [_number(name, loss)])

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, with the last known losses. Plain numbers and strings; the same on every rank."""
        return super().state_dict() | {"losses": self.losses}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken. Raises ValueError for one of another schedule or other objectives."""
        super().load_state_dict(state_dict)
        self._losses, self._message = {n: float(x) for n, x in state_dict["losses"].items() if n in self.optima}, None

    def _next(self, closures: Numbers | None) -> str:
        known = self.losses
        if len(known) < len(self.optima) or (self.evaluate_every and self.step % self.evaluate_every == 0):
            if closures is None:
                raise ValueError(
                    f"step {self.step} evaluates all objectives; expected choose({{name: closure}}) with a closure for each "
                    f"of {self.active}"
                )
            with torch.no_grad():
                found = [_number(name, closures[name]()) for name in self.optima]
            known |= _received(self._sent(list(self.optima), found))
            unknown = [name for name in self.optima if name not in known]
            if unknown:
                raise ValueError(f"the first losses of {unknown} are not finite on some rank; expected finite numbers")
            self._losses = known
        gaps = self.gaps
        return max(gaps, key=gaps.__getitem__)

    def _sent(self, names: Sequence[str], losses: Sequence[Tensor]) -> _Message:
        # Numbers that were never on a device (a report's floats) go where the last tensor was: NCCL sends from there alone.
        self._device = next((x.device for x in losses if x.device.type != "cpu"), self._device)
        numbers = torch.stack([x.to(self._device or x.device, torch.float64) for x in losses])
        if not (dist.is_available() and dist.is_initialized()):
            return _Message(names, numbers, None)
        numbers /= dist.get_world_size(self.process_group)
        return _Message(names, numbers, dist.all_reduce(numbers, group=self.process_group, async_op=True))


def _received(message: _Message) -> dict[str, float]:
    """The finite ones of the losses."""
    if message.work is not None:
        message.work.wait()
    return {name: x for name, x in zip(message.names, message.numbers.tolist()) if math.isfinite(x)}


def _number(name: str, loss: Tensor | float) -> Tensor:
    if isinstance(loss, float):
        return torch.tensor(loss, dtype=torch.float64, device="cpu")
    number: Any = _loss(name, loss).detach()
    return number.full_tensor() if hasattr(number, "full_tensor") else number  # a DTensor, under tensor parallelism


def _loss(name: str, loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.shape != ():
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"the loss of {name!r} is {found}; expected a tensor of shape (), such as the mean over the batch")
    return loss
