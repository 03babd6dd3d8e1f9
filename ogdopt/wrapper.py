"""A torch optimizer around another: groups, state, checkpoints and hooks are the base's own.

Nothing is copied and nothing is shared by reference: all is read through properties, so that the two cannot come apart when
a checkpoint or a trainer replaces a group or the state.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Wrapper(Optimizer):
    """Everything of a torch optimizer but its `step`, delegated to `base`; `Optimizer.__init__` is never called."""

    base: Optimizer

    def _set_up(self) -> None:
        self._optimizer_step_pre_hooks: OrderedDict = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict = OrderedDict()
        self._patch_step_function()

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


def check_base(base: Any) -> None:
    """Raise TypeError for a base that is no optimizer, that is wrapped already, or that needs a closure to step."""
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}; expected a torch.optim.Optimizer, e.g. RMSprop(model.parameters())")
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
