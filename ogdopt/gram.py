"""The two passes over gradients: inner products of two lists of them, and their mixture.

For gradients `g_w` and `g_l` everything in this package follows from three numbers, the Gram numbers

    ww = <g_w, g_w>,   wl = <g_w, g_l>,   ll = <g_l, g_l>.

They are summed in float64 over chunks that fit the cache, so that they are right to about 1e-15 at any size and at
gradients from 1e-150 to 1e150, where a float32 dot of 20M elements is off by 1e-5 to 1e-3. No temporary grows with the
model. This is the only file that knows about DTensors, meshes and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.tensor import DTensor
else:  # a torch built without torch.distributed has no DTensor to recognise

    class DTensor:
        """Stands for a type that nothing is an instance of."""


Value: TypeAlias = Callable[[], "Tensor | Iterable[Tensor]"]
"""Returns a scalar with a graph, or the parts of it."""

CPU_CHUNK = 1 << 16  # two float64 scratch buffers of 512 KiB, and the metric's ten float32 ones, stay in the cache
GPU_CHUNK = 1 << 24  # fewer kernel launches; 128 MiB a buffer

# 1 - cos^2 under which two gradients are the same direction up to the rounding of their type.
PARALLEL = {torch.float64: 1e-12, torch.float32: 1e-12, torch.bfloat16: 1e-6, torch.float16: 1e-6}


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
}
"""What ranks find out together about their gradients, and the remedy."""


class Gram(NamedTuple):
    """The inner products of a winner's and a loser's gradient: float64 tensors of one shape, one entry a block."""

    ww: Tensor
    """<g_w, g_w>"""
    wl: Tensor
    """<g_w, g_l>"""
    ll: Tensor
    """<g_l, g_l>"""
    parallel: Tensor | float = 1e-12
    """1 - cos^2 under which gradients of this precision cannot be told from parallel ones."""
    fault: Tensor | None = None
    """0, or which of `FAULTS` the ranks found, the same on all of them; the numbers are then NaN. None without other ranks."""
    ranks: Tensor | None = None
    """What each rank put in for `fault`, (ranks, 6): ww, wl, ll, winner's gradients, loser's gradients, `parallel`."""

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
        return Gram(ww, wl, ll, *self[3:])

    def cancels(self, a: Tensor, b: Tensor) -> bool:
        """Whether in some block less than a tenth of `a g_w` is left in `a g_w + b g_l`; asks the device."""
        kept, left = a * a * self.ww, a * (a * self.ww + 2 * b * self.wl) + b * (b * self.ll)
        return not all((left >= 0.01 * kept).tolist())

    def norm(self, a: Tensor, b: Tensor) -> Tensor:
        """L2 norm of `a g_w + b g_l` over all blocks, shape (), from the numbers alone."""
        # a * a and b * b alone may leave the range of float64 where the two gradients differ in scale by 1e154.
        return (a * (a * self.ww + 2 * b * self.wl) + b * (b * self.ll)).sum().clamp(min=0).sqrt()


def gram(
    winner: Sequence[Tensor | None],
    loser: Sequence[Tensor | None],
    process_group: dist.ProcessGroup | None = None,
    loss: Tensor | None = None,
    device: torch.device | None = None,
    expected: tuple[bool, bool] = (False, False),
    rows: Sequence[Tensor] | Tensor | None = None,
) -> Gram:
    """Gram numbers of two lists of gradients, one entry a tensor: `ww`, `wl`, `ll` of shape (P,), float64.

    `winner[i]` and `loser[i]` belong to one parameter; None counts as zeros. Under torch.distributed the ranks' numbers
    are added by one all-reduce of 3P numbers and 6 for each rank, each tensor's divided by how many ranks hold the same
    part of it: shards (DTensors, or plain tensors with `process_group`) add up, copies (replicated DTensors, plain tensors
    otherwise) are averaged. A `loss` that is not finite turns the first `ww` into NaN, so that a step is judged by its loss
    too, on every rank alike. The same message carries what `fault` tells: copies that differ, shards that are copies, and a
    side that is `expected` and has a gradient on no rank. `device` is where a rank that holds no gradient at all takes part.
    `rows` are `products` that were taken before; the lists then only say which gradients there are and how they lie.

    Raises ValueError for lists without a gradient where no other rank can have one, and for a DTensor mesh that is not the
    whole group.
    """
    present = [g for pair in zip(winner, loser) for g in pair if g is not None]
    together = _together(process_group)
    if not present and not together:
        raise ValueError("gram() found no gradient in either list; run backward before asking for inner products")
    device = local(present[0]).device if present else device
    rows = [products(w, l) for w, l in zip(winner, loser)] if rows is None else rows
    numbers = rows.to(device) if isinstance(rows, Tensor) else torch.stack([row.to(device) for row in rows])
    parallel = max((PARALLEL.get(g.dtype.to_real(), 1e-6) for g in present), default=1e-12)
    if loss is not None:
        numbers[0, 0] += 0.0 * loss.to(numbers)  # 0 * inf is NaN
    if not together:
        ww, wl, ll = numbers.unbind(1)
        return Gram(ww, wl, ll, parallel)
    who = shared([w if w is not None else l for w, l in zip(winner, loser)], process_group)
    copies = torch.tensor(who.copies)
    # What must agree between ranks (copies), or must not: shards, each weighed by its place, so that equal shards of two
    # tensors are no copies. Constants are sent without waiting for the device.
    weight = torch.arange(1, len(copies) + 1) if who.shards else copies == who.count
    marks = torch.tensor([sum(g is not None for g in winner), sum(g is not None for g in loser), parallel], dtype=torch.float64)
    mine = torch.cat([weight.to(numbers, non_blocking=True) @ numbers, marks.to(numbers, non_blocking=True)])
    table = mine.new_zeros(who.count, len(mine))
    table[dist.get_rank(process_group)] = mine
    numbers, table = who.reduce([numbers / copies.to(numbers, non_blocking=True)[:, None], table])
    fault = _fault(table, who.shards, expected)
    ww, wl, ll = torch.where(fault > 0, torch.nan, numbers).unbind(1)
    return Gram(ww, wl, ll, table[:, 5].amax(), fault, table)


def gradients(closure: Value, parameters: Sequence[Tensor]) -> tuple[float, list[Tensor | None]]:
    """The value of a closure and its gradient in each parameter, taken through p.grad, which is then None.

    The closure returns a scalar with a graph, or parts of it, one a micro-batch.
    """
    for p in parameters:
        p.grad = None
    values = []
    with torch.enable_grad():
        for part in parts(closure()):
            part.backward()
            values.append(part.detach().double().item())
    taken = [None if p.grad is None else settled(p.grad, p) for p in parameters]
    for p in parameters:
        p.grad = None
    return math.fsum(values), taken


def parts(value: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """The parts of a sum that is given as a whole or in parts."""
    return [value] if isinstance(value, Tensor) else value


def mix_(winner: Tensor, loser: Tensor | None, a: Tensor, b: Tensor, cancels: bool = True) -> None:
    """`winner <- a winner + b loser` in place; `a` and `b` are float64 scalars of shape ().

    What is left of <u, g_l> is the rounding of single elements and not that of the coefficient: the sum is formed in float64
    chunk by chunk and rounded once. Where the two are known not to cancel (`cancels=False`), so that a rounding of the winner
    is one of the sum too, float32 on a CPU is summed as a (winner + b/a loser), with b/a in two parts: a third of the time.
    """
    w = local(winner)
    if loser is None:
        w.mul_(a.to(w.device))
        return
    l = local(loser)
    if not cancels and w.device.type == "cpu" and isinstance(l, Tensor) and _mix_float32(w, l, *torch.stack([a, b]).tolist()):
        return
    for x, y in chunks(w, l):
        z = x.to(torch.float64, copy=True)
        z.mul_(a.to(z.device)).addcmul_(y.to(z), b.to(z.device))
        x.copy_(z)


def _mix_float32(w: Tensor, l: Tensor, a: float, b: float) -> bool:
    """`mix_` without float64; False, and nothing is done, where that does not apply."""
    if (a, b) == (1.0, 0.0):
        return True
    plain = w.dtype == l.dtype == torch.float32 and w.is_contiguous() and l.is_contiguous()
    if not plain or a == 0 or not abs(b) < 1e30 * abs(a):
        return False
    ratio = b / a
    digits, exponent = math.frexp(ratio)
    first = math.ldexp(round(256 * digits), exponent - 8)  # its products with elements are not rounded where the rest begins
    for x, y in zip(w.view(-1).split(2 * CPU_CHUNK), l.view(-1).split(2 * CPU_CHUNK)):
        x.add_(y, alpha=first).add_(y, alpha=ratio - first)
        if a != 1:
            x.mul_(a)
    return True


def blocks_of(sizes: Sequence[int]) -> list[int]:
    """The block of each tensor, where blocks are `sizes` consecutive tensors.

    >>> blocks_of([2, 1])
    [0, 0, 1]
    """
    return [k for k, n in enumerate(sizes) for _ in range(n)]


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 unless y > 0."""
    return torch.where(y > 0, x / y, 0.0)


def moved(p: Tensor, before: Tensor, u: Tensor | None, l: Tensor | None) -> Tensor:
    """(<delta, u>, <delta, l>, <delta, delta>) for the change from `before` (a local part) to the parameter as it is now.

    Float64, on the parameter's device.
    """
    here = local(p)
    total = torch.zeros(3, dtype=torch.float64, device=here.device)
    for k, g in enumerate((u, l, None)):
        for new, old, *rest in chunks(here, before, *([] if g is None else [local(g)])):
            delta = new.double() - old
            if rest or k == 2:
                total[k] += (delta * (rest[0].to(delta) if rest else delta)).sum()
    return total


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
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False  # one is packed, which copied it
    address = local(one).data_ptr()
    return address != 0 and address == local(other).data_ptr()


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


def products(w: Tensor | None, l: Tensor | None) -> Tensor:
    """(ww, wl, ll) of one tensor's local part."""
    some = w if w is not None else l
    if some is None:
        return torch.zeros(3, dtype=torch.float64)
    part = local(some)
    total = torch.zeros(3, dtype=torch.float64, device=part.device)
    if w is None or l is None:
        square = sum((torch.dot(x, x) for (x,) in _scratch(part)), total.new_zeros(()))
        total[0 if l is None else 2] = square
        return total
    for x, y in _scratch(part, local(l)):
        total += torch.stack([torch.dot(x, x), torch.dot(x, y), torch.dot(y, y)])
    return total


def chunk_size(device: torch.device) -> int:
    """Elements that are worked on at a time."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def _scratch(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Float64 copies of aligned chunks, flat, in buffers that are used again."""
    buffers: list[Tensor] = []
    for parts in chunks(*tensors):
        if not buffers or buffers[0].numel() < parts[0].numel():
            buffers = [torch.empty(p.numel(), dtype=torch.float64, device=p.device) for p in parts]
        yield tuple(buffer[: p.numel()].view(p.shape).copy_(p).view(-1) for buffer, p in zip(buffers, parts))


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Aligned pieces of equally shaped tensors, as views of at most a chunk; no copy, whatever the strides."""
    first = tensors[0]
    size = chunk_size(first.device)
    if first.numel() == 0:
        return
    if all(not isinstance(t, Tensor) or t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(size) if isinstance(t, Tensor) else t.pieces(size) for t in tensors))
    elif not all(isinstance(t, Tensor) for t in tensors):
        yield from chunks(*(t if isinstance(t, Tensor) else t.restored() for t in tensors))
    elif first.numel() <= size:
        yield tensors
    else:
        for rows in zip(*(t.unbind(0) for t in tensors)):
            yield from chunks(*rows)


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
    if not _together(process_group):
        return Ranks([1] * len(tensors), 1, False, lambda parts: parts)
    meshes = [x.device_mesh for x in tensors if _is_laid_out(x)]
    count = dist.get_world_size(process_group)
    shards = process_group is not None and not meshes
    copies = [1 if shards else _copies(x, count) for x in tensors]
    return Ranks(copies, count, shards, lambda parts: _reduce(parts, meshes, process_group))


def _together(process_group: dist.ProcessGroup | None) -> bool:
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


def _fault(table: Tensor, shards: bool, expected: tuple[bool, bool]) -> Tensor:
    """Which of FAULTS what the ranks put in amounts to, shape (); numbers that are not finite are another matter."""
    low, high = table.amin(0), table.amax(0)
    spread, (ww, _, ll) = high - low, high[:3]
    if shards:
        wrong = (spread[:3] == 0).all() & (ww + ll > 0) if len(table) > 1 else high.new_zeros((), dtype=torch.bool)
    else:
        scale = torch.stack([ww, ww.sqrt() * ll.sqrt(), ll])
        wrong = (spread[:3] > high[5].sqrt() * scale).any()  # rounding: 1e-6, and 1e-3 for 16-bit gradients
    fault = torch.where(wrong & table[:, :3].isfinite().all(), 4.0 if shards else 3.0, 0.0)
    for code, side in ((2, 1), (1, 0)):
        if expected[side]:
            fault = torch.where(high[3 + side] == 0, float(code), fault)
    return fault
