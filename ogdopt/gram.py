"""The two passes over gradients: inner products of two lists of them, and their mixture.

For gradients `g_w` and `g_l` everything in this package follows from three numbers, the Gram numbers

    ww = <g_w, g_w>,   wl = <g_w, g_l>,   ll = <g_l, g_l>.

They are summed in float64 over chunks that fit the cache, so that they are right to about 1e-15 at any size and at
gradients from 1e-150 to 1e150, where a float32 dot of 20M elements is off by 1e-5 to 1e-3. No temporary grows with the
model. This is the only file that knows about DTensors, meshes and ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.tensor import DTensor
else:  # a torch built without torch.distributed has no DTensor to recognise

    class DTensor:
        """Stands for a type that nothing is an instance of."""


CPU_CHUNK = 1 << 18  # two float64 scratch buffers of 2 MiB stay in the cache
GPU_CHUNK = 1 << 24  # fewer kernel launches; 128 MiB a buffer

# 1 - cos^2 under which two gradients are the same direction up to the rounding of their type (SPEC 1.2).
PARALLEL = {torch.float64: 1e-12, torch.float32: 1e-12, torch.bfloat16: 1e-6, torch.float16: 1e-6}


class Gram(NamedTuple):
    """The inner products of a winner's and a loser's gradient: float64 tensors of one shape, one entry a block."""

    ww: Tensor
    """<g_w, g_w>"""
    wl: Tensor
    """<g_w, g_l>"""
    ll: Tensor
    """<g_l, g_l>"""
    parallel: float = 1e-12
    """1 - cos^2 under which gradients of this precision cannot be told from parallel ones."""

    @property
    def cosine(self) -> Tensor:
        """Cosine of the angle between the gradients; 0 where one of them is 0."""
        return torch.where((self.ww > 0) & (self.ll > 0), self.wl / self.ww.sqrt() / self.ll.sqrt(), 0.0).clamp(-1, 1)

    @property
    def same_direction(self) -> Tensor:
        """Whether the gradients are parallel (not opposed) up to the rounding of their type."""
        # Written without ww * ll, which over- or underflows long before the numbers themselves do.
        return (self.wl > 0) & (1 - (self.wl / self.ww.sqrt() / self.ll.sqrt()) ** 2 <= self.parallel)

    def pooled(self, sizes: Sequence[int]) -> Gram:
        """The numbers of blocks of `sizes` consecutive tensors each, added in a fixed order."""
        ww, wl, ll = (torch.stack([part.sum() for part in x.split(list(sizes))]) for x in self[:3])
        return Gram(ww, wl, ll, self.parallel)

    def norm(self, a: Tensor, b: Tensor) -> Tensor:
        """L2 norm of `a g_w + b g_l` over all blocks, shape (), from the numbers alone (SPEC 1.12)."""
        # a * a and b * b alone may leave the range of float64 where the two gradients differ in scale by 1e154.
        return (a * (a * self.ww + 2 * b * self.wl) + b * (b * self.ll)).sum().clamp(min=0).sqrt()


def gram(
    winner: Sequence[Tensor | None],
    loser: Sequence[Tensor | None],
    process_group: dist.ProcessGroup | None = None,
    loss: Tensor | None = None,
) -> Gram:
    """Gram numbers of two lists of gradients, one entry a tensor: `ww`, `wl`, `ll` of shape (P,), float64.

    `winner[i]` and `loser[i]` belong to one parameter; None counts as zeros. Sharded gradients (DTensors, or plain local
    shards with `process_group`) are summed over ranks by one all-reduce of 3P numbers; replicated ones count once. A `loss`
    that is not finite turns the first `ww` into NaN, so that a step is judged by its loss too, on every rank alike.

    Raises ValueError for an empty list, for sparse gradients, and for a DTensor mesh that is not the whole world.
    """
    present = [g for pair in zip(winner, loser) for g in pair if g is not None]
    if not present:
        raise ValueError("gram() found no gradient in either list; run backward before asking for inner products")
    device = local(present[0]).device
    rows = [_products(w, l).to(device) for w, l in zip(winner, loser)]
    numbers = torch.stack(rows)
    if loss is not None and _judged_alike(present, process_group):
        numbers[0, 0] += 0.0 * loss.to(numbers)  # 0 * inf is NaN
    numbers = _reduce(numbers, present, process_group)
    parallel = max(PARALLEL.get(g.dtype.to_real() if g.is_complex() else g.dtype, 1e-6) for g in present)
    ww, wl, ll = numbers.unbind(1)
    return Gram(ww, wl, ll, parallel)


def mix_(winner: Tensor, loser: Tensor | None, a: Tensor, b: Tensor) -> None:
    """`winner <- a winner + b loser` in place; `a` and `b` are float64 scalars of shape ().

    The sum is formed in float64 chunk by chunk and rounded once, so that what is left of <u, g_l> is the rounding of
    single elements and not that of the coefficient.
    """
    if loser is None:
        target = local(winner)
        target.mul_(a.to(target.device))
        return
    for w, l in _chunks(local(winner), local(loser)):
        x = w.to(torch.float64, copy=True)
        x.mul_(a.to(x.device)).addcmul_(l.to(torch.float64), b.to(x.device))
        w.copy_(x)


def local(g: Tensor) -> Tensor:
    """The part of a gradient that this rank holds, as a plain real tensor that shares its memory."""
    if isinstance(g, DTensor):
        g = g.to_local()
    return torch.view_as_real(g) if g.is_complex() else g


def settled(g: Tensor, parameter: Tensor) -> Tensor:
    """The gradient itself, or, where it is a pending sum over ranks (a Partial DTensor), that sum in the parameter's layout.

    Raises TypeError for a sparse gradient.
    """
    if g.layout != torch.strided:
        raise TypeError(
            f"found a sparse gradient of shape {tuple(g.shape)}; inner products of uncoalesced sparse gradients are wrong, "
            "so build the embedding with sparse=False"
        )
    if isinstance(g, DTensor) and any(p.is_partial() for p in g.placements):
        return g.redistribute(placements=parameter.placements if isinstance(parameter, DTensor) else None)
    return g


def _products(w: Tensor | None, l: Tensor | None) -> Tensor:
    """(ww, wl, ll) of one tensor's local part, zero on ranks that hold a copy which another rank counts."""
    some = w if w is not None else l
    if some is None:
        return torch.zeros(3, dtype=torch.float64)
    part = local(some)
    total = torch.zeros(3, dtype=torch.float64, device=part.device)
    if not _owned(some):
        return total
    if w is None or l is None:
        square = sum((torch.dot(x, x) for (x,) in _scratch(part)), total.new_zeros(()))
        total[0 if l is None else 2] = square
        return total
    for x, y in _scratch(part, local(l)):
        total += torch.stack([torch.dot(x, x), torch.dot(x, y), torch.dot(y, y)])
    return total


def _scratch(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Float64 copies of aligned chunks, flat, in buffers that are used again."""
    buffers: list[Tensor] = []
    for parts in _chunks(*tensors):
        if not buffers or buffers[0].numel() < parts[0].numel():
            buffers = [torch.empty(p.numel(), dtype=torch.float64, device=p.device) for p in parts]
        yield tuple(buffer[: p.numel()].view(p.shape).copy_(p).view(-1) for buffer, p in zip(buffers, parts))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Aligned pieces of equally shaped tensors, as views of at most a chunk; no copy, whatever the strides."""
    first = tensors[0]
    size = GPU_CHUNK if first.is_cuda else CPU_CHUNK
    if first.numel() == 0:
        return
    if all(t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(size) for t in tensors))
    elif first.numel() <= size:
        yield tensors
    else:
        for rows in zip(*(t.unbind(0) for t in tensors)):
            yield from _chunks(*rows)


def _owned(g: Tensor) -> bool:
    """Whether this rank counts its part: of several copies only the one at coordinate 0 is counted."""
    if not isinstance(g, DTensor):
        return True
    coordinate = g.device_mesh.get_coordinate()
    return coordinate is not None and all(c == 0 for c, p in zip(coordinate, g.placements) if p.is_replicate())


def _judged_alike(present: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> bool:
    """Whether all ranks will see one rank's loss: there is a reduction, or there are no other ranks."""
    reduced = process_group is not None or any(isinstance(g, DTensor) for g in present)
    return reduced or not (dist.is_available() and dist.is_initialized())


def _reduce(numbers: Tensor, present: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> Tensor:
    """Sum over ranks what is sharded: one all-reduce, or none when nothing is."""
    sharded = [g for g in present if isinstance(g, DTensor)]
    if not sharded and process_group is None:
        return numbers
    ranks = dist.get_world_size(process_group)
    for g in sharded:
        if g.device_mesh.size() != ranks:
            raise ValueError(
                f"a gradient lives on a mesh of {g.device_mesh.size()} ranks, but {ranks} ranks take part in the reduction; "
                "expected one mesh that covers them all, so pass the mesh's group as process_group="
            )
    if sharded and len(sharded) != len(present):
        raise ValueError(
            "some gradients are DTensors and some are plain tensors; expected one kind, so shard every parameter "
            "(fully_shard on the root module) or none"
        )
    dist.all_reduce(numbers, group=process_group)
    return numbers
