"""Who shares a gradient: DTensors, meshes, ranks, and what they find out together. The only file that knows of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.tensor import DTensor
else:  # a torch built without torch.distributed has no DTensor to recognise

    class DTensor:
        """Stands for a type that nothing is an instance of."""


FAULTS = {
    1: "the winner's pass left no gradient on any rank",
    2: "the loser's pass left no gradient on any rank",
    3: "the ranks hold different gradients of parameters that each of them holds whole, so their models would drift apart. "
    "Either gradients were not averaged (DDP inside no_sync(), or with both losses' forwards before the first backward: "
    "give each side its own forward and backward, with synchronization on in its last micro-batch), or some parameters were "
    "left out of fully_shard (apply it to the root module too) or of DDP, or these are FSDP1's shards (pass "
    "process_group=dist.group.WORLD), or every rank trains a model of its own (pass "
    "process_group=dist.new_subgroups(group_size=1)[0])",
    4: "process_group= says that each rank holds a shard of its own, but the ranks hold equal gradients: these are whole "
    "copies (DDP, FSDP1 with NO_SHARD), which would be counted once a rank. Leave process_group= out",
    5: "a pass over what is to be preserved left no gradient on any rank",
}
"""What ranks find out together about their gradients, and the remedy."""


def local(g: Tensor) -> Tensor:
    """The part of a gradient that this rank holds, as a plain real tensor that shares its memory (or as it is stored)."""
    if not isinstance(g, Tensor):
        return g
    if isinstance(g, DTensor):
        g = g.to_local()
    return torch.view_as_real(g) if g.is_complex() else g


def settled(g: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in its parameter's layout: itself, or, where it is a pending sum over ranks (Partial), that sum.

    Raises TypeError for a sparse gradient.
    """
    if g.layout != torch.strided:
        raise TypeError(
            f"found a sparse gradient of shape {tuple(g.shape)}; inner products of uncoalesced sparse gradients are wrong, "
            "so build the embedding with sparse=False"
        )
    if isinstance(g, DTensor) and isinstance(parameter, DTensor) and g.placements != parameter.placements:
        return g.redistribute(placements=parameter.placements)
    return g


def elsewhere(parameters: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> bool:
    """Whether other ranks may hold gradients where this one holds none: with shards, and where nothing is left for it."""
    if process_group is not None:
        return True
    return dist.is_available() and dist.is_initialized() and not any(p.numel() for p in parameters)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two gradients start at one address: something wrote the second over the first."""
    # What is set aside in the type that it has already is not copied.
    return 0 != _address(one) == _address(other)


def _address(x: Any) -> int:
    return (x if type(x) is Tensor else local(x) if isinstance(x, Tensor) else x.values).data_ptr()


def pending(parameters: Sequence[Tensor], model: nn.Module | None) -> str | None:
    """What keeps gradients of the last backward from being complete in p.grad, in words; None if nothing is seen.

    Without a model only what FSDP2 holds for these parameters is looked at.
    """
    ours = set(parameters)
    for name, module in _sharded_modules() if model is None else model.named_modules():
        name = type(module).__name__ + (f" {name!r}" if name else "")
        # DDP and FSDP1 say themselves that they are inside no_sync().
        if not getattr(module, "require_backward_grad_sync", True) or not getattr(module, "_sync_gradients", True):
            return f"{name} is inside no_sync()"
        # FSDP2 has no public way to ask what waits unreduced; a torch without these attributes is not looked into.
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            shards = getattr(group, "fsdp_params", ())
            if model is None and not any(getattr(p, "sharded_param", None) in ours for p in shards):
                continue
            if getattr(group, "_partial_reduce_output", None) is not None:
                return f"{name} holds gradients that wait for their all-reduce (set_requires_all_reduce(False))"
            for p in shards:
                whole = getattr(p, "_unsharded_param", None)
                if getattr(p, "unsharded_accumulated_grad", None) is not None or getattr(whole, "grad", None) is not None:
                    return f"{name} holds gradients that wait for their reduction (set_requires_gradient_sync(False))"
    return None


def _sharded_modules() -> list[tuple[str, nn.Module]]:
    """Every module that FSDP2 has sharded in this process; none where torch keeps no such list."""
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError:
        return []
    return [("", module) for module in list(_module_state_mapping)]


def _is_laid_out(g: Any) -> bool:
    """Whether a gradient, as it is or stored, is a DTensor."""
    return isinstance(g, DTensor) or (not isinstance(g, Tensor) and getattr(g, "device_mesh", None) is not None)


def _copies(g: Any, ranks: int) -> int:
    """How many of the ranks hold the same part of a gradient; a plain tensor is a copy on each."""
    if not _is_laid_out(g):
        return ranks
    mesh = g.device_mesh
    if mesh.size() != ranks:
        raise ValueError(
            f"a gradient lives on a mesh of {mesh.size()} ranks, but {ranks} ranks take part in the reduction; "
            "expected one mesh that covers them all, so pass the mesh's group as process_group="
        )
    return math.prod(mesh.size(i) for i, p in enumerate(g.placements) if p.is_replicate())


class Ranks(NamedTuple):
    """Who shares a list of tensors."""

    copies: list[int]
    """How many ranks hold the same part, for each tensor."""
    count: int
    """How many ranks there are."""
    shards: bool
    """Whether plain tensors are each rank's own part."""
    reduce: Callable[[list[Tensor]], list[Tensor]]
    """Adds numbers over ranks, by one all-reduce, or returns them where there are no others."""

    def pooled(self, rows: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Each tensor's numbers, (m,), added up in blocks of `sizes` consecutive tensors and over ranks: (K, m)."""
        shares = [row / n for row, n in zip(rows, self.copies)]
        return self.reduce([torch.stack([part.sum(0) for part in torch.stack(shares).split(list(sizes))])])[0]


def shared(tensors: Sequence[Any], process_group: dist.ProcessGroup | None) -> Ranks:
    """Who shares parameters or gradients that are laid out like these; raises ValueError like `gram`."""
    if not together(process_group):
        return Ranks([1] * len(tensors), 1, False, lambda parts: parts)
    meshes = [x.device_mesh for x in tensors if _is_laid_out(x)]
    count = dist.get_world_size(process_group)
    shards = process_group is not None and not meshes
    copies = [1 if shards else _copies(x, count) for x in tensors]
    return Ranks(copies, count, shards, lambda parts: _reduce(parts, meshes, process_group))


def together(process_group: dist.ProcessGroup | None) -> bool:
    """Whether there may be other ranks."""
    return process_group is not None or (dist.is_available() and dist.is_initialized())


def _reduce(parts: list[Tensor], meshes: Sequence[Any], process_group: dist.ProcessGroup | None) -> list[Tensor]:
    """The parts summed over ranks, by one all-reduce on a device that the group can talk from."""
    home = parts[0].device
    if meshes:
        away = meshes[0].device_type  # gradients that are offloaded to the CPU meet where their mesh is
    else:
        able = [pair.split(":")[0] for pair in dist.get_backend_config(process_group).split(",")]
        away = home.type if home.type in able else able[0]
    message = torch.cat([x.flatten() for x in parts])
    message = message if message.device.type == away else message.to(away)
    dist.all_reduce(message, group=process_group)
    pieces = message.to(home).split([x.numel() for x in parts])
    return [piece.view_as(x) for piece, x in zip(pieces, parts)]


def fault_of(table: Tensor, shards: bool, expected: tuple[bool, bool], further: int = 0) -> Tensor:
    """Which of FAULTS what the ranks put in amounts to, shape (); numbers that are not finite are another matter."""
    low, high = table.amin(0), table.amax(0)
    spread, (ww, _, ll) = high - low, high[:3]
    if shards:
        wrong = (spread[:3] == 0).all() & (ww + ll > 0) if len(table) > 1 else high.new_zeros((), dtype=torch.bool)
    else:
        scale = torch.stack([ww, ww.sqrt() * ll.sqrt(), ll])
        wrong = (spread[:3] > high[5] * scale).any()
        if further:
            squares = slice(6 + further, None)
            wrong = wrong | (spread[squares] > high[5] * high[squares]).any()
    fault = torch.where(wrong & table[:, :3].isfinite().all(), 4.0 if shards else 3.0, 0.0)
    for code, side in ((2, 1), (1, 0)):
        if expected[side]:
            fault = torch.where(high[3 + side] == 0, float(code), fault)
    return torch.where((high[6 : 6 + further] == 0).any(), 5.0, fault) if further else fault
