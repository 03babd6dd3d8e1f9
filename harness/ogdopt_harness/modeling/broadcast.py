"""A model that one process loads for all: the others start from its outline, and get their shards of its values.

outlined    load()  ->  the model in the first process, modules whose tensors have no storage in the others
emptied     before FSDP2 shards it: the first process's values are set aside, and all have an outline
filled      after that: shards get storage, and values tensor by tensor; no process but the first ever holds them all
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ogdopt_harness.common.ranks import Ranks

M = TypeVar("M", bound=nn.Module)


def outlined(load: Callable[[], M], ranks: Ranks) -> M:
    """What `load` returns, in the first process alone; the others get its outline, whose tensors have no storage.

    What is done to both until they are sharded has to be the same.
    """
    loaded: list[M] = []

    def work() -> M:
        loaded.append(load())
        return deepcopy(loaded[0], {id(t): _hollow(t) for t in chain(loaded[0].parameters(), loaded[0].buffers())})

    if ranks.size == 1:
        return load()
    outline = ranks.on_first(work)
    return loaded[0] if ranks.first else outline


def emptied(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state dict, buffers) of a model, which afterwards has no storage; what was tied stays so."""
    values = model.state_dict(), dict(model.named_buffers())
    hollow: dict[int, Tensor] = {}
    for module in model.modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            held.update({name: hollow.setdefault(id(t), _hollow(t)) for name, t in held.items() if t is not None})
    return values


def filled(model: nn.Module, values: tuple[dict[str, Any], dict[str, Tensor]], device: torch.device) -> None:
    """Storage for this process's shards, and the first process's values in it."""
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, values[0], options=options)
    for name, buffer in model.named_buffers():  # those that a state dict leaves out too
        if name in values[1]:
            buffer.copy_(values[1][name])
        dist.broadcast(buffer, 0)


def _hollow(tensor: Tensor) -> Tensor:
    """A tensor or parameter like this one, without storage."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
