"""The rows of a step become micro-batches: sorted by length, cut by a budget of tokens, dealt to the processes.

Processes that share a model must run it equally often, whatever rows they have. So every one gets as many micro-batches as the
others; one that is left without a row in the last gets the shortest one, to run and not to count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Micro(NamedTuple):
    """Positions of the rows that go through the model together; `counts`: whether they are a part of the batch."""

    rows: list[int]
    counts: bool


def deal(lengths: Sequence[int], most: int, budget: int | None = None, rank: int = 0, size: int = 1) -> list[Micro]:
    """This process's micro-batches of a batch whose rows have these lengths, in tokens; the longest rows come first.

    A micro-batch has at most `most` rows and, with a `budget`, at most that many tokens, padding included, or else one row.
    Each row is in one micro-batch of one process.

    >>> deal([3, 9, 5, 4], most=2)
    [Micro(rows=[1, 2], counts=True), Micro(rows=[3, 0], counts=True)]
    >>> deal([3, 9, 5], most=2, budget=10, rank=1, size=2)
    [Micro(rows=[2], counts=True), Micro(rows=[0], counts=False)]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found, start = [], 0
    while start < len(order):
        each = most if budget is None else max(1, min(most, budget // lengths[order[start]]))
        mine = order[start : start + size * each][rank::size]
        found.append(Micro(mine or [order[-1]], bool(mine)))
        start += size * each
    return found


def slots(lengths: Sequence[int], micro: Micro) -> int:
    """Token positions that a micro-batch takes, padding included."""
    return len(micro.rows) * max(lengths[i] for i in micro.rows)
