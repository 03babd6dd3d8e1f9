"""A torch optimizer around another, or around several: groups, state, checkpoints and hooks are the bases' own.

Nothing is copied and nothing is shared by reference: all is read through properties. So the two cannot come apart when a
checkpoint or a trainer replaces a group or the state.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

F = TypeVar("F", bound=Callable[..., Any])


def hooked(step: F) -> F:
    """A `step` that calls the step hooks of its own object.

    Global hooks (`register_optimizer_step_post_hook`) are left to the base, so that they see one step as one.
    """

    @functools.wraps(step)
    def wrapped(self: Wrapper, *args: Any, **kwargs: Any) -> Any:
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
            for before in list(self._optimizer_step_pre_hooks.values()):
                changed = before(self, args, kwargs)
                if changed is not None:
                    args, kwargs = changed
            result = step(self, *args, **kwargs)
            for after in list(self._optimizer_step_post_hooks.values()):
                after(self, args, kwargs)
            return result

    wrapped.hooked = True  # type: ignore[attr-defined]  # torch then leaves it as it is
    return wrapped  # type: ignore[return-value]


class Wrapper(Optimizer):
    """Everything of a torch optimizer but its `step`, delegated to `base`; `Optimizer.__init__` is never called."""

    @property
    def base(self) -> Optimizer:
        """The optimizer that steps."""
        raise NotImplementedError

    def _set_up(self) -> None:
        self._optimizer_step_pre_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's parameter groups; assigning replaces them there."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base's state; assigning replaces it there."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's defaults; assigning replaces them there."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's state dict, and nothing else."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Load a checkpoint of this optimizer or of the bare base."""
        self.base.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the base."""
        self.base.add_param_group(param_group)

    @property
    def train(self) -> Callable[[], None]:
        """The base's `train()`, where it has one (schedule-free ones need it before training); trainers ask by hasattr."""
        return self._mode("train")

    @property
    def eval(self) -> Callable[[], None]:
        """The base's `eval()`, where it has one (schedule-free ones need it before evaluating and saving)."""
        return self._mode("eval")

    def _mode(self, name: str) -> Callable[[], None]:
        if not hasattr(self.base, name):
            raise AttributeError(
                f"{type(self.base).__name__} has no {name}(), so neither has the {type(self).__name__} around it; only "
                f"optimizers that keep two sets of weights (schedule-free) have modes. Did you mean model.{name}()?"
            )
        return getattr(self.base, name)

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


class Several(Optimizer):
    """Several optimizers, each with parameters of its own, that step as one; `Optimizer.__init__` is never called.

    Groups are those of all in turn, and so is a state dict, with parameters numbered through. The state dict, the schedulers
    and the groups of each of `bases` stay its own. Raises ValueError for a parameter that two of them have.
    """

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self.bases: tuple[Optimizer, ...] = tuple(bases)
        seen: set[Tensor] = set()
        for base in self.bases:
            mine = {p for group in base.param_groups for p in group["params"]}
            if mine & seen:
                raise ValueError(
                    f"{len(mine & seen)} parameters of {type(base).__name__} belong to another of the optimizers too, and "
                    "would be stepped twice; give each its own"
                )
            seen |= mine

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all, in turn; a list of the same length may be assigned."""
        return [group for base in self.bases for group in base.param_groups]

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        for base, part in zip(self.bases, self._dealt(value)):
            base.param_groups = part

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of all, as one mapping that reads and writes theirs; a mapping may be assigned."""
        return _States(self.bases)

    @state.setter
    def state(self, value: Any) -> None:
        for base in self.bases:
            mine = {p for group in base.param_groups for p in group["params"]}
            kept = value.copy()  # of its own class: a defaultdict stays one
            for key in [key for key in kept if key not in mine]:
                del kept[key]
            base.state = kept

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the first."""
        return self.bases[0].defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        raise AttributeError(
            f"each of the {len(self.bases)} optimizers has defaults of its own; set those of one of opt.base.bases"
        )

    def _dealt(self, groups: Sequence[Any]) -> list[list[Any]]:
        """Groups of all as those of each."""
        counts = [len(base.param_groups) for base in self.bases]
        if len(groups) != sum(counts):
            raise ValueError(
                f"got {len(groups)} parameter groups; expected {sum(counts)}, as many as the optimizers have together"
            )
        rest = list(groups)
        return [[rest.pop(0) for _ in range(n)] for n in counts]

    def _offsets(self) -> list[int]:
        """The number of the first parameter of each."""
        counts = [sum(len(group["params"]) for group in base.param_groups) for base in self.bases]
        return [sum(counts[:i]) for i in range(len(counts))]

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """One state dict in torch's form; what else an optimizer puts into its own is in `others`, by its place."""
        merged: dict[str, Any] = {"state": {}, "param_groups": []}
        for i, (base, offset) in enumerate(zip(self.bases, self._offsets())):
            part = dict(base.state_dict())
            for key, value in part.pop("state").items():
                merged["state"][key + offset if isinstance(key, int) else key] = value
            for group in part.pop("param_groups"):
                merged["param_groups"].append({**group, "params": [n + offset for n in group["params"]]})
            if part:
                merged.setdefault("others", {})[i] = part
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Load a state dict of the same optimizers in the same order; raises ValueError for another number of groups."""
        dealt = self._dealt(state_dict["param_groups"])
        for i, (base, groups, offset) in enumerate(zip(self.bases, dealt, self._offsets())):
            groups = [{**group, "params": [n - offset for n in group["params"]]} for group in groups]
            mine = {n for group in groups for n in group["params"]}
            part = {key - offset: value for key, value in state_dict["state"].items() if key - offset in mine}
            base.load_state_dict({"state": part, "param_groups": groups, **state_dict.get("others", {}).get(i, {})})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused with ValueError: which of them should step it?"""
        raise ValueError(
            f"there are {len(self.bases)} optimizers; add the group to the one that should step it: opt.base.bases[i]"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all."""
        for base in self.bases:
            base.zero_grad(set_to_none=set_to_none)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step each."""
        for base in self.bases:
            base.step()

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Register the hook on each."""
        for base in self.bases:
            if hasattr(base, "_optimizer_step_pre_hooks"):
                base.register_step_pre_hook(hook)

    def _modes(self, name: str) -> Callable[[], None]:
        switches = [getattr(base, name) for base in self.bases if hasattr(base, name)]
        if not switches:
            raise AttributeError(f"none of {', '.join(type(base).__name__ for base in self.bases)} has {name}()")

        def switch() -> None:
            for one in switches:
                one()

        return switch

    @property
    def train(self) -> Callable[[], None]:
        """`train()` of those that have one."""
        return self._modes("train")

    @property
    def eval(self) -> Callable[[], None]:
        """`eval()` of those that have one."""
        return self._modes("eval")

    def __getstate__(self) -> dict[str, Any]:
        return {"bases": self.bases}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["bases"])

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self.bases))}]"


class _States(MutableMapping[Any, Any]):
    """The states of several optimizers as one; a parameter's is kept by the optimizer that steps it."""

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self.bases = bases
        self.owner = {p: base for base in bases for group in base.param_groups for p in group["params"]}

    def __getitem__(self, key: Any) -> Any:
        if key not in self:  # a defaultdict would make what is asked for
            raise KeyError(key)
        return self.owner[key].state[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.owner[key].state[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.owner[key].state[key]

    def __contains__(self, key: object) -> bool:
        return key in self.owner and key in self.owner[key].state

    def __iter__(self) -> Iterator[Any]:
        return (key for base in self.bases for key in base.state)

    def __len__(self) -> int:
        return sum(len(base.state) for base in self.bases)


def one_base(base: Any) -> Optimizer:
    """The base that a user gave, checked; a list of optimizers becomes one that steps them all.

    Raises TypeError for what is no optimizer, is wrapped already, or needs a closure or sparse gradients to step.
    """
    if isinstance(base, (list, tuple)) and base and isinstance(base[0], Optimizer):
        for one in base:
            check_base(one)
        return base[0] if len(base) == 1 else Several(base)
    check_base(base)
    return cast(Optimizer, base)


def check_base(base: Any) -> None:
    """Raise TypeError for a base that is no optimizer, that is wrapped already, or that needs a closure to step."""
    if isinstance(base, type):
        raise TypeError(f"base is the class {base.__name__}; expected an object: {base.__name__}(model.parameters(), lr=1e-6)")
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"base is a {type(base).__name__}; expected a torch.optim.Optimizer, e.g. RMSprop(model.parameters()), or a list "
            "of optimizers"
        )
    if isinstance(base, Wrapper):
        raise TypeError(f"base is already a {type(base).__name__}; wrap the innermost optimizer once")
    if isinstance(base, torch.optim.SparseAdam):
        raise TypeError("SparseAdam needs sparse gradients, whose inner products are not defined here; use Adam")
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(base).__name__}.step needs a closure, which it would call again and so step on the unprojected gradient; "
            "choose an optimizer whose step() works without one"
        )
