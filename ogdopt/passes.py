"""The two passes over gradients, chunk by chunk: inner products of two of them, and their mixture.

Products are summed in float64 over chunks that fit the cache, so that they are right to about 1e-15 at any size, where a
float32 dot of 20M elements is off by 1e-5 to 1e-3. No temporary grows with the model.

Tensors are walked as their memory lies, whatever the order of their strides. Two that lie in different orders are walked in
tiles. Small tensors of one shape are stacked and go through together, since a call costs more than their numbers do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ogdopt.distributed import local

CPU_CHUNK = 1 << 16  # two float64 scratch buffers of 512 KiB, and the metric's ten float32 ones, stay in the cache
GPU_CHUNK = 1 << 24  # fewer kernel launches; 128 MiB a buffer
SMALL = 1 << 14
"""Elements under which a tensor waits for others of its shape."""
SAFE = 1e30
"""Coefficients between its inverse and itself, and their quotients, are computed with in float32."""


def _rounds_once() -> bool:
    y = torch.full((67,), 1 + 2.0**-12, dtype=torch.float32, device="cpu")
    # The square is 1 + 2^-11 + 2^-24, whose last digit a float32 has not.
    return bool((torch.full_like(y, -1.0).add_(y, alpha=1 + 2.0**-12) > 2.0**-11).all())


ROUNDS_ONCE = _rounds_once()
"""Whether this processor, as torch uses it, multiplies and adds in one instruction, so that a product is not rounded first."""


# ---- how tensors lie in memory ----------------------------------------------------------------------------------------------


def order_of(x: Tensor) -> list[int]:
    """The dimensions of a tensor from the outermost in memory to the innermost."""
    strides = x.stride()
    return sorted(range(len(strides)), key=lambda d: -strides[d])


def flat(*tensors: Tensor) -> list[Tensor] | None:
    """One-dimensional views of equally shaped tensors, aligned and in memory order; None where they lie differently."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    order = order_of(tensors[0])
    turned = [t.permute(order) for t in tensors]
    return [t.view(-1) for t in turned] if all(t.is_contiguous() for t in turned) else None


def chunk_size(device: torch.device) -> int:
    """Elements that are worked on at a time."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def chunks(*tensors: Any) -> Iterator[tuple[Tensor, ...]]:
    """Aligned pieces of equally shaped tensors, as views of at most a chunk; no copy, whatever the strides.

    A tensor that is stored otherwise comes in pieces of its own.
    """
    first = tensors[0]
    size = chunk_size(first.device)
    if first.numel() == 0:
        return
    kept = next((t for t in tensors if not isinstance(t, Tensor)), None)
    order = order_of(first) if kept is None else kept.order
    turned = [t.permute(order) if isinstance(t, Tensor) else t for t in tensors]
    if all(not isinstance(t, Tensor) or t.is_contiguous() for t in turned):
        yield from zip(*(t.view(-1).split(size) if isinstance(t, Tensor) else t.pieces(size) for t in turned))
    elif kept is not None:
        yield from chunks(*(t if isinstance(t, Tensor) else t.restored() for t in tensors))
    else:
        yield from _tiles(turned, size)


def _tiles(tensors: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Aligned blocks that are as wide in every direction, so that each tensor is read in runs of its own memory."""
    shape = tensors[0].shape
    tile = list(shape)
    while math.prod(tile) > size:
        widest = tile.index(max(tile))
        tile[widest] = -(-tile[widest] // 2)
    for corner in itertools.product(*(range(0, n, step) for n, step in zip(shape, tile))):
        block = tuple(slice(start, start + step) for start, step in zip(corner, tile))
        yield tuple(t[block] for t in tensors)


def _scratch(*tensors: Any) -> Iterator[tuple[Tensor, ...]]:
    """Float64 copies of aligned chunks, flat, in buffers that are used again, all on the first tensor's device."""
    buffers: list[Tensor] = []
    device = tensors[0].device
    for parts in chunks(*tensors):
        if not buffers or buffers[0].numel() < parts[0].numel():
            buffers = [torch.empty(p.numel(), dtype=torch.float64, device=device) for p in parts]
        yield tuple(buffer[: p.numel()].view(p.shape).copy_(p).view(-1) for buffer, p in zip(buffers, parts))


# ---- inner products ---------------------------------------------------------------------------------------------------------


def products(w: Any, l: Any) -> Tensor:
    """(ww, wl, ll) of one tensor's local part, float64, on its device."""
    some = w if w is not None else l
    if some is None:
        return torch.zeros(3, dtype=torch.float64, device="cpu")
    part = local(some)
    total = torch.zeros(3, dtype=torch.float64, device=part.device)
    if w is None or l is None:
        square = sum((torch.dot(x, x) for (x,) in _scratch(part)), total.new_zeros(()))
        total[0 if l is None else 2] = square
        return total
    for x, y in _scratch(part, local(l)):
        total += torch.stack([torch.dot(x, x), torch.dot(x, y), torch.dot(y, y)])
    return total


def rows(ws: Sequence[Any], ls: Sequence[Any], device: torch.device) -> Tensor:
    """`products` of every pair, (P, 3), on `device`."""
    stacks, rest = _stacks(ws, ls)
    found = [products(ws[i], ls[i]).to(device)[None] for i in rest]
    places = list(rest)
    for some in stacks:
        x, y = (None if gs[some[0]] is None else _stack(gs, some) for gs in (ws, ls))
        found.append(_products_of_rows(x, y).to(device))
        places += some
    numbers = torch.cat(found)
    return torch.empty_like(numbers).index_copy_(0, torch.tensor(places, device="cpu").to(device), numbers)


def matrices(lists: Sequence[Sequence[Any]], device: torch.device) -> Tensor:
    """All inner products of n lists of gradients, tensor by tensor: (P, n, n) float64 on `device`; None counts as zeros."""
    count = len(lists)
    found = []
    for gs in zip(*lists):
        places = [i for i, g in enumerate(gs) if g is not None]
        total = torch.zeros(count, count, dtype=torch.float64, device=device)
        if places:
            rows = [local(gs[i]) for i in places]
            part = torch.zeros(len(places), len(places), dtype=torch.float64, device=rows[0].device)
            for pieces in _scratch(*rows):
                x = torch.stack(pieces)
                part += x @ x.T
            where = torch.tensor(places, device="cpu").to(device, non_blocking=True)
            total[where[:, None], where] = part.to(device)
        found.append(total)
    return torch.stack(found)


def _products_of_rows(x: Tensor | None, y: Tensor | None) -> Tensor:
    some = x if x is not None else y
    assert some is not None
    zero = some.new_zeros(len(some))
    return torch.stack(
        [
            zero if x is None else (x * x).sum(1),
            zero if x is None or y is None else (x * y).sum(1),
            zero if y is None else (y * y).sum(1),
        ],
        1,
    )


def _stack(gs: Sequence[Any], places: Sequence[int]) -> Tensor:
    """Some tensors of one shape as float64 rows, what is stored in a few digits included."""
    some = [gs[i] for i in places]
    if type(some[0]) is not Tensor:
        return torch.stack([x.values for x in some]).double()
    return torch.stack(some).reshape(len(places), -1).double()  # no view of channels_last


def _stacks(ws: Sequence[Any], ls: Sequence[Any]) -> tuple[list[list[int]], list[int]]:
    """The places of pairs that are small plain tensors of one kind, at most a chunk together; and those of all others."""
    kinds: dict[Any, list[int]] = {}
    rest = []
    for i, (w, l) in enumerate(zip(ws, ls)):
        some = w if w is not None else l
        # DTensors, complex numbers and what is stored in blocks or elsewhere go one by one.
        one, other = _kind(w), _kind(l)
        if one is not None and other is not None and some is not None and 0 < some.numel() < SMALL:
            kinds.setdefault((some.shape, some.device, one, other), []).append(i)
        else:
            rest.append(i)
    stacks = []
    for (shape, device, *_), places in kinds.items():
        if len(places) == 1:
            rest += places
            continue
        together = max(1, chunk_size(device) // max(1, shape.numel()))
        stacks += [places[k : k + together] for k in range(0, len(places), together)]
    return stacks, rest


def _kind(g: Any) -> Any:
    """What tensors that are stacked have in common, besides their shape; None where they are not stacked."""
    if g is None:
        return ()
    if type(g) is Tensor:
        return None if g.is_complex() else g.dtype
    return (g.values.dtype,) if getattr(g, "straight", False) else None


# ---- the mixture ------------------------------------------------------------------------------------------------------------


def mix_(winner: Tensor, loser: Any, a: Tensor, b: Tensor, cancels: bool = True) -> None:
    """`winner <- a winner + b loser` in place; `a` and `b` are float64 scalars of shape ().

    What is left of <u, g_l> is the rounding of single elements and not that of the coefficient: the sum is formed in float64
    chunk by chunk and rounded once. Where the two are known not to cancel (`cancels=False`), so that a rounding of the winner
    is one of the sum too, float32 on a CPU is summed as a (winner + b/a loser), with b/a in two parts: a third of the time.
    A processor that rounds products before it adds them would leave their rounding where single elements cancel: not there.
    """
    _mix(winner, loser, a, b, _known(torch.stack([a, b])), cancels)


def mix_all(ws: Sequence[Tensor], ls: Sequence[Any], a: Tensor, b: Tensor, cancels: bool = True) -> None:
    """`mix_` of every pair, with the entries of `a` and `b`, (P,)."""
    known = _known(torch.stack([a, b], 1)) or [None] * len(ws)
    stacks, rest = _stacks(ws, ls)
    for i in rest:
        _mix(ws[i], ls[i], a[i], b[i], known[i], cancels)
    for some in stacks:
        if all(_stays(known[i], ls[i]) for i in some):
            continue
        first = ws[some[0]]
        picked = torch.tensor(some, device="cpu").to(a.device, non_blocking=True)
        z = _stack(ws, some).mul_(a[picked].to(first.device)[:, None])
        if ls[some[0]] is not None:
            z.addcmul_(_stack(ls, some), b[picked].to(first.device)[:, None])
        parts = list(z.to(first.dtype).view(len(some), *first.shape))
        torch._foreach_copy_([ws[i] for i in some], parts)  # pyright: ignore[reportPrivateImportUsage]


def mix_many_(winner: Tensor, others: Sequence[Any], coefficients: Tensor) -> None:
    """`winner <- c_0 winner + sum_j c_j others_j` in place, in float64 chunk by chunk, rounded once; None counts as zeros."""
    there = [k for k, g in enumerate(others) if g is not None]
    c = coefficients.to(local(winner).device)
    for x, *ys in chunks(local(winner), *(local(others[k]) for k in there)):
        z = x.to(torch.float64, copy=True).mul_(c[0])
        for k, y in zip(there, ys):
            z.addcmul_(y.to(z), c[k + 1])
        x.copy_(z)


def _known(coefficients: Tensor) -> Any:
    """Coefficients as numbers where that waits for no device."""
    return coefficients.tolist() if coefficients.device.type == "cpu" else None


def _stays(known: Any, l: Any) -> bool:
    """Whether the mixture is the winner's gradient, bit for bit."""
    return known is not None and known[0] == 1 and (l is None or known[1] == 0)


def _mix(winner: Tensor, loser: Any, a: Tensor, b: Tensor, known: Any, cancels: bool) -> None:
    w = local(winner)
    l = None if loser is None else local(loser)
    if _stays(known, l) or (w.device.type == "cpu" and known is not None and _mix_quickly(w, l, known[0], known[1], cancels)):
        return
    for x, *y in chunks(w) if l is None else chunks(w, l):
        z = x.to(torch.float64, copy=True).mul_(a.to(x.device))
        if y:
            z.addcmul_(y[0].to(z), b.to(z.device))
        x.copy_(z)


def _mix_quickly(w: Tensor, l: Any, a: float, b: float, cancels: bool) -> bool:
    """`mix_` on a CPU without float64; False, and nothing is done, where that does not apply."""
    safe = a == 0 or 1 / SAFE <= abs(a) <= SAFE
    if l is None:
        if safe:
            w.mul_(a)
        return safe
    if cancels or not safe or a == 0 or not ROUNDS_ONCE or not isinstance(l, Tensor):
        return False
    if w.dtype != torch.float32 or l.dtype != torch.float32:
        return False
    pair = flat(w, l)
    if pair is None or not (b == 0 or 1 / SAFE <= abs(b / a) <= SAFE):
        return False
    ratio = b / a
    digits, exponent = math.frexp(ratio)
    first = math.ldexp(round(256 * digits), exponent - 8)  # its products with elements are not rounded where the rest begins
    for x, y in zip(*(t.split(2 * CPU_CHUNK) for t in pair)):
        x.add_(y, alpha=first).add_(y, alpha=ratio - first)
        if a != 1:
            x.mul_(a)
    return True


# ---- what a step changed ----------------------------------------------------------------------------------------------------


def moved(p: Tensor, before: Tensor, u: Tensor | None, l: Any) -> Tensor:
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
