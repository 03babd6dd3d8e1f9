"""Who takes each row of tensors of a fused pass: C++ as they lie, torch.compile in blocks, or neither.

What the loops need to know of a tensor is asked by column. Ten thousand small tensors are asked at every step, since type,
strides, device and storage of a parameter may change in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ogdopt import native
from ogdopt.distributed import local
from ogdopt.passes import order_of
from ogdopt.stored import Stored

WIDTH = 64
"""Elements that sizes are counted in where there is nothing to add up."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def whole(written: Sequence[int], *tensors: Any) -> list[Any] | None:
    """The local parts of tensors as plain ones that lie in memory in one order, None kept.

    What is only read and lies otherwise is copied. None where a tensor waits in int8 or in another memory, or where one that is
    `written`, by place, cannot be had in the order of the first.
    """
    found: list[Any] = []
    flat = True
    for x in tensors:
        if x is not None:
            if type(x) is not Tensor:
                x = x.whole if isinstance(x, Stored) else local(x).detach()
                if x is None:
                    return None
            flat = flat and x.is_contiguous()
        found.append(x)
    if flat:
        return found
    there = [i for i, x in enumerate(found) if x is not None]
    order = order_of(found[there[0]])
    for i in there:
        turned = found[i].permute(order)
        if not turned.is_contiguous():
            if i in written:
                return None
            turned = native.contiguous(turned)
        found[i] = turned.view(-1)
    return found


class Divided(NamedTuple):
    """Rows of tensors by who takes them."""

    direct: list[int]
    """The places of those that C++ takes."""
    columns: list[list[Any]]
    """And these themselves, by column."""
    bundles: list[list[Any] | None]
    """Blocks for torch.compile by place, None where there are none."""
    rest: list[int]
    """The places that neither takes."""
    wholes: dict[int, list[Any] | None]
    """What `whole` made of those that C++ did not take as they were."""


def divided(width: int, written: Sequence[int], columns: Sequence[Sequence[Any]]) -> Divided:
    """Who takes which row of columns (parameters, g_w, g_l, *states), or (g_w, g_l). Raises Unavailable."""
    loser = min(2, len(columns) - 1)
    given = [[*xs] for xs in columns]
    given[loser] = [x.values if type(x) is Stored and x.straight else x for x in given[loser]]
    wrong = native.unfit(given, loser)
    wholes = {i: whole(written, *_row(columns, i)) for i in sorted(wrong)}
    for i, row in wholes.items():
        if row is not None and native.fits(*row):
            wrong.remove(i)
            for xs, x in zip(given, row):
                xs[i] = x
    count = len(given[0])
    direct = [i for i in range(count) if i not in wrong] if wrong else [*range(count)]
    if direct:
        native.library()
    bundles: list[list[Any] | None] = [None] * count
    for i in wrong:
        row = wholes[i]
        bundles[i] = None if row is None else _blocks(width, row)
    rest = [i for i in sorted(wrong) if bundles[i] is None]
    return Divided(direct, [[xs[i] for i in direct] for xs in given] if wrong else given, bundles, rest, wholes)


def _row(columns: Sequence[Sequence[Any]], i: int) -> list[Any]:
    """One row, without the states that it has not."""
    return [xs[i] for k, xs in enumerate(columns) if k < 3 or xs[i] is not None]


def _blocks(width: int, whole: Sequence[Any]) -> list[Any] | None:
    """Tensors of one size as (rows, width), None kept; None where one has no such view."""
    for x in whole:
        if x is None:
            continue
        if x.numel() % width or x.numel() < 2 * width or x.dtype not in DTYPES or not native.plain(x):
            return None
    return [None if x is None else x.view(-1, width) for x in whole]


def with_winner(bundle: Sequence[Any]) -> list[Any]:
    """A bundle whose parameter has a gradient of the winner's, if of zeros."""
    p, w, *rest = bundle
    return [p, torch.zeros_like(p) if w is None else w, *rest]
