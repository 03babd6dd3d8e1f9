"""The two passes over gradients, chunk by chunk: inner products of two of them, and their mixture.

Products are summed in float64 over chunks that fit the cache, so that they are right to about 1e-15 at any size, where a
float32 dot of 20M elements is off by 1e-5 to 1e-3. No temporary grows with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ogdopt.distributed import local

CPU_CHUNK = 1 << 16  # two float64 scratch buffers of 512 KiB, and the metric's ten float32 ones, stay in the cache


GPU_CHUNK = 1 << 24  # fewer kernel launches; 128 MiB a buffer


def _rounds_once() -> bool:
    y = torch.full((67,), 1 + 2.0**-12, device="cpu")  # its square is 1 + 2^-11 + 2^-24, whose last digit a float32 has not
    return bool((torch.full((67,), -1.0, device="cpu").add_(y, alpha=1 + 2.0**-12) > 2.0**-11).all())


ROUNDS_ONCE = _rounds_once()
"""Whether this processor, as torch uses it, multiplies and adds in one instruction, so that a product is not rounded first."""


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


def mix_(winner: Tensor, loser: Tensor | None, a: Tensor, b: Tensor, cancels: bool = True) -> None:
    """`winner <- a winner + b loser` in place; `a` and `b` are float64 scalars of shape ().

    What is left of <u, g_l> is the rounding of single elements and not that of the coefficient: the sum is formed in float64
    chunk by chunk and rounded once. Where the two are known not to cancel (`cancels=False`), so that a rounding of the winner
    is one of the sum too, float32 on a CPU is summed as a (winner + b/a loser), with b/a in two parts: a third of the time.
    A processor that rounds products before it adds them would leave their rounding where single elements cancel: not there.
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
    if not plain or not ROUNDS_ONCE or a == 0 or not abs(b) < 1e30 * abs(a):
        return False
    ratio = b / a
    digits, exponent = math.frexp(ratio)
    first = math.ldexp(round(256 * digits), exponent - 8)  # its products with elements are not rounded where the rest begins
    for x, y in zip(w.view(-1).split(2 * CPU_CHUNK), l.view(-1).split(2 * CPU_CHUNK)):
        x.add_(y, alpha=first).add_(y, alpha=ratio - first)
        if a != 1:
            x.mul_(a)
    return True


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
