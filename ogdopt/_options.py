"""The options of a paired optimizer as one object that is valid whenever it exists."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast, overload

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ogdopt import metric as own_metric
from ogdopt import projection, stored
from ogdopt.errors import warn
from ogdopt.memory import Memory, Remembered, Subspace
from ogdopt.projection import Rule, Scope
from ogdopt.stored import SetAside
from ogdopt.wrapper import Several

Metric: TypeAlias = Literal["euclidean", "optimizer"]
MaxNorm: TypeAlias = "float | Sequence[float | None] | None"
T = TypeVar("T")

ELEMENTWISE = set("ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD".split())
"""Bases of torch.optim for which a shard of a tensor is stepped as a part of the whole one."""


@dataclass(frozen=True, eq=False)
class Options:
    """What `PairedGradient` documents. Raises ValueError or TypeError for a value that is out of range."""

    rule: Rule
    max_norm: MaxNorm = None
    scope: Scope = "global"
    metric: Metric = "euclidean"
    set_aside: SetAside = None
    on_nonfinite: Literal["skip", "raise"] = "skip"
    measure_change: bool = False
    fused: bool = False
    process_group: dist.ProcessGroup | None = None
    model: nn.Module | None = None
    remember: Mapping[str, Memory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", _rule(self.rule))
        object.__setattr__(self, "max_norm", _max_norm(self.max_norm))
        projection.block_sizes(self.scope, [])
        stored.check(self.set_aside)
        _one_of("on_nonfinite", self.on_nonfinite, ("skip", "raise"))
        _one_of("metric", self.metric, ("euclidean", "optimizer"))
        _one_of("measure_change", self.measure_change, (False, True))
        _one_of("fused", self.fused, (False, True))
        if self.measure_change and self.set_aside == "recompute":
            raise ValueError(
                "measure_change=True needs the loser's gradient after the step, and set_aside='recompute' does not keep it; "
                "use 'int8' or torch.bfloat16"
            )
        if self.metric == "optimizer":
            self._check_metric()
        self._check_memories()

    def _check_memories(self) -> None:
        for side, memory in self.remember.items():
            if not isinstance(memory, (Remembered, Subspace)):
                raise TypeError(f"remember[{side!r}] is a {type(memory).__name__}; expected a Remembered or a Subspace")
            if side in ("winner", "") or (side == "loser" and isinstance(memory, Subspace)):
                raise ValueError(
                    f"remember has {side!r}; expected 'loser' or the name of what is preserved (Subspace: any other)"
                )
        if self.remember:
            self.check_kept("remember=")

    def check_kept(self, asked: str = "preserve=") -> None:
        """Raise ValueError where these options cannot respect more than a winner and a loser."""
        if self.rule is not projection.orthogonal:
            raise ValueError(
                f"{asked} asks for the nearest step that respects several gradients, and the rule is {name(self.rule)}; "
                "expected projection.orthogonal (ProjectedGradient)"
            )
        if self.metric == "optimizer":
            raise ValueError(
                f"metric='optimizer' keeps its promise about a winner and a loser, for no base about what {asked} adds; use "
                "metric='euclidean', which for SGD without momentum and decay is the same"
            )
        if self.set_aside == "recompute":
            raise ValueError(
                f"set_aside='recompute' adds the winner's gradient to the loser's alone, and {asked} asks for more; use "
                "'int8' or torch.bfloat16"
            )

    def _check_metric(self) -> None:
        if self.rule is not projection.orthogonal:
            raise ValueError(f"metric='optimizer' projects, and the rule is {name(self.rule)}; expected projection.orthogonal")
        if self.set_aside == "recompute":
            raise ValueError(
                "metric='optimizer' needs both gradients at once, and set_aside='recompute' never has them; use 'int8'"
            )
        if isinstance(self.max_norm, tuple):
            raise ValueError(
                "metric='optimizer' solves for one step length, and max_norm has a limit for each parameter group; give one "
                "number, or choose metric='euclidean'"
            )

    def check(self, base: Optimizer) -> None:
        """Raise TypeError or ValueError where these options do not fit a base."""
        if self.metric == "optimizer":
            if isinstance(base, Several):
                raise ValueError(
                    f"metric='optimizer' solves for one optimizer's step, and there are {len(base.bases)}; choose "
                    "metric='euclidean'"
                )
            own_metric.check(base)
        self.limits(base)
        count = 1 if self.process_group is None else dist.get_world_size(self.process_group)
        kinds = [type(one) for one in (base.bases if isinstance(base, Several) else [base])]
        unknown = [k.__name__ for k in kinds if not (k.__module__.startswith("torch.optim") and k.__name__ in ELEMENTWISE)]
        if count > 1 and unknown:
            warn(
                f"process_group= says that parameters are local shards, and {unknown[0]} is not known to step element "
                "by element: one that takes norms or products of whole tensors (LAMB, Adafactor, Muon) steps otherwise on "
                "shards than on the whole. Use AdamW or RMSprop, or FSDP2, whose parameters know their shape"
            )

    def limits(self, base: Optimizer) -> tuple[float | None, ...] | None:
        """The limit of each parameter group; None where there is one for all, or none."""
        if not isinstance(self.max_norm, tuple):
            return None
        if len(self.max_norm) != len(base.param_groups):
            raise ValueError(
                f"max_norm has {len(self.max_norm)} numbers, and there are {len(base.param_groups)} parameter groups; expected "
                "one for each (None: not clipped), or one number for all together"
            )
        return self.max_norm

    def __repr__(self) -> str:
        shown = [f"rule={name(self.rule)}", f"max_norm={self.max_norm}", f"scope={self.scope!r}"]
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in ("metric", "set_aside", "on_nonfinite", "measure_change", "fused") and value != one.default:
                shown.append(f"{one.name}={value!r}")
        shown += [f"remember={sorted(self.remember)}"] if self.remember else []
        return ", ".join(shown)


class Option(Generic[T]):
    """An attribute of a paired optimizer that reads one of its options, and replaces it by a checked one."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Option[T]: ...
    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> Option[T] | T:
        """The value; on the class, this object."""
        return self if instance is None else cast(T, getattr(instance.options, self.name))

    def __set__(self, instance: Any, value: T) -> None:
        options = instance.options
        if value is not getattr(options, self.name):
            changed = replace(options, **{self.name: value})
            changed.check(instance.base)
            instance.options = changed


def refuse_unknown(given: dict[str, Any], owner: type) -> None:
    """Raise TypeError for keyword arguments that no option has, naming what was probably meant."""
    if not given:
        return
    known = [parameter for parameter in inspect.signature(owner.__init__).parameters if parameter not in ("self", "unknown")]
    slip = next(iter(given))
    if slip in ("lr", "momentum", "weight_decay", "betas", "eps", "alpha"):
        hint = f"{slip} is the base's: {owner.__name__}(torch.optim.RMSprop(model.parameters(), {slip}=...))"
    elif "clip" in slip or slip in ("max_grad_norm", "grad_clip"):
        hint = "did you mean max_norm=?"
    else:
        near = difflib.get_close_matches(slip, known, 1)
        hint = f"did you mean {near[0]}=?" if near else f"it takes {', '.join(known)}"
    raise TypeError(f"{owner.__name__}() got an unknown option {slip}=; {hint}")


def name(rule: Any) -> str:
    """How a rule is called in messages."""
    return getattr(rule, "__name__", repr(rule))


def _one_of(option: str, value: Any, choices: Sequence[Any]) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise ValueError(f"{option} is {value!r}; expected {' or '.join(map(repr, choices))}")


def _rule(rule: Any) -> Rule:
    if isinstance(rule, str):
        if rule not in projection.RULES:
            near = difflib.get_close_matches(rule, projection.RULES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(projection.RULES)}, or a function"
            raise ValueError(f"rule is {rule!r}; {hint}")
        return projection.RULES[rule]
    if not callable(rule):
        raise TypeError(
            f"rule is a {type(rule).__name__}; expected a function of ogdopt.projection, or the name of one: "
            f"{', '.join(projection.RULES)}"
        )
    return cast(Rule, rule)


def _max_norm(value: Any) -> Any:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    for number in value if several else [value]:
        if number is not None and not (isinstance(number, (int, float)) and number > 0):
            raise ValueError(f"max_norm is {value!r}; expected a positive number, or None for no clipping")
    return tuple(value) if several else value
