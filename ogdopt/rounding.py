"""How much of a gradient is rounding, so that gradients are called parallel by the precision that was really applied to them.

Two losses that are multiples of each other (a tie: chosen equals rejected) have parallel gradients. Rounding turns them apart.
Let g be a gradient and e its rounding, with |e|^2 <= r |g|^2. Parallel w and l become w + e_w and l + e_l, and what is left
across their common direction is at most e_w/|w| - e_l/|l|. The two roundings are independent, so their energies add:

    1 - cos^2 = sin^2 <= r_w + r_l.

Several tensors make one vector. Its r is the sum of the tensors' energies |e|^2 over |g|^2, so an imprecise tensor counts by
its share and judges no other. What r is:

    a type          A rounding to unit roundoff u (half the distance of 1 and the next number) has |e| <= u |g|, element by
                    element, so one has r <= u^2. A backward pass rounds after each layer. `CHAIN` = 16 such roundings cover
                    what transformers of 2 to 24 layers leave in bfloat16 (1 to 7, for losses in a ratio of 1.1 and 0.37).
                    float32 rounds inside of long sums too: 5e-13 (measured 2e-13).
    subnormals      Under a type's normal range the error is half its smallest number, per element, whatever the element.
    setting aside   One rounding to bfloat16 more; for int8 the energy that packing lost, which is measured.
    16-bit values   Autocast and reductions in a 16-bit type leave float32 gradients whose low bits are zero. A sample of the
                    elements of large tensors shows it. Adding micro-batches up hides it again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ogdopt.distributed import local
from ogdopt.passes import SMALL, flat

CHAIN = 16
"""Roundings of a 16-bit type that a backward pass amounts to."""
SINGLE = 5e-13
"""Share of the energy that rounding is in a gradient of float32 or float64: more than a few of float64's Gram numbers."""
SAMPLE = 256
"""Elements that are looked at of a large tensor."""
EVIDENCE = 16
"""Elements of these that must not be zero."""


class Rounding(NamedTuple):
    """The energy |e|^2 of the rounding of a gradient g."""

    relative: Tensor | float
    """Share of |g|^2."""
    each: float
    """What every element adds to that."""
    lost: Tensor | float = 0.0
    """What was measured besides these."""

    def plus(self, other: Rounding) -> Rounding:
        """Both, one after the other; what was measured may have been lost twice in one direction (equal micro-batches)."""
        lost = (self.lost**0.5 + other.lost**0.5) ** 2
        return Rounding(self.relative + other.relative, self.each + other.each, lost)


@functools.cache
def of_type(dtype: torch.dtype, roundings: int = CHAIN) -> Rounding:
    """Rounding to a type, so many times.

    >>> of_type(torch.bfloat16, 1).relative == 2.0**-16, of_type(torch.float32).relative
    (True, 5e-13)
    """
    about = torch.finfo(dtype.to_real())
    relative: float = SINGLE if about.bits > 16 else roundings * (about.eps / 2) ** 2
    return Rounding(relative, roundings * (about.smallest_normal * about.eps / 2) ** 2)


def rounded_to(before: Rounding, dtype: torch.dtype) -> Rounding:
    """A gradient's rounding after one more, to a type."""
    if isinstance(before.relative, Tensor) or isinstance(before.lost, Tensor):
        return before.plus(of_type(dtype, roundings=1))
    return _rounded_to(before, dtype)


@functools.cache
def _rounded_to(before: Rounding, dtype: torch.dtype) -> Rounding:
    """Numbers alone, which small tensors share by the thousand."""
    return before.plus(of_type(dtype, roundings=1))


def of(g: Any) -> Rounding:
    """The rounding of a gradient as it is, or as it is stored."""
    if not isinstance(g, Tensor):
        return g.rounding
    sample = _sample(g)
    found = of_type(g.dtype)
    return found if sample is None else found.plus(Rounding(_hidden(sample[None])[0], 0.0))


def energies(gs: Sequence[Any], squares: Tensor, look: bool = True) -> Tensor:
    """|e|^2 of every gradient of which `squares` are the |g|^2, (P,); 0 where there is none.

    With `look` the elements of large ones are sampled; without, the tensors only show the type.
    """
    if {*map(type, gs)} == {Tensor} and len({g.dtype for g in gs}) == 1 and all(g.numel() < SMALL for g in gs):
        found = of_type(gs[0].dtype)
        sizes = torch.tensor([g.numel() for g in gs], dtype=torch.float64, device="cpu").to(squares.device, non_blocking=True)
        return torch.where(squares > 0, float(found.relative) * squares + found.each * sizes, 0.0)
    known = [0.0] * len(gs), [0.0] * len(gs), [0.0] * len(gs)
    later: list[tuple[int, int, Tensor]] = []
    samples: dict[int, Tensor] = {}
    for i, g in enumerate(gs):
        if isinstance(g, Tensor):
            found = of_type(g.dtype)
            known[0][i] = float(found.relative)
            known[1][i] = found.each * (g if type(g) is Tensor else local(g)).numel()
            sample = _sample(g) if look and g.numel() >= SMALL else None
            if sample is not None:
                samples[i] = sample
        elif g is not None:
            found = g.rounding
            for k, x in enumerate((found.relative, found.each * g.numel(), found.lost)):
                if isinstance(x, Tensor):
                    later.append((k, i, x))
                else:
                    known[k][i] = x
    table = torch.tensor(known, dtype=torch.float64, device="cpu").to(squares.device, non_blocking=True)
    for k, i, x in later:
        table[k, i] = x.to(table)
    if samples:
        places = torch.tensor([*samples], device="cpu").to(squares.device, non_blocking=True)
        table[0, places] += _hidden(torch.stack([x.to(squares.device) for x in samples.values()])).to(table)
    return torch.where(squares > 0, table[0] * squares + table[1] + table[2], 0.0)


def _sample(g: Tensor) -> Tensor | None:
    """Some elements of a large float32 gradient; None of others."""
    if g.dtype != torch.float32 or g.numel() < SMALL:
        return None
    part = local(g)
    lying = flat(part)
    if lying is None or part.numel() < SMALL:
        return None
    step = (part.numel() // SAMPLE - 1) | 1  # odd, so that it does not keep to one column
    return lying[0][: SAMPLE * step : step]


def _hidden(samples: Tensor) -> Tensor:
    """The share of energy that a 16-bit type has left in float32 tensors of which these are samples, (n, SAMPLE)."""
    bits = samples.view(torch.int32)
    enough = (samples != 0).sum(1) >= EVIDENCE
    found = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
    for low, dtype in ((0x1FFF, torch.float16), (0xFFFF, torch.bfloat16)):
        found = torch.where(enough & (bits & low == 0).all(1), of_type(dtype).relative, found)
    return found
