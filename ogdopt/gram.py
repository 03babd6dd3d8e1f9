"""The Gram numbers of two lists of gradients, from which everything in this package follows:

    ww = <g_w, g_w>,   wl = <g_w, g_l>,   ll = <g_l, g_l>.

They are right to about 1e-15 at any size and at gradients from 1e-150 to 1e150 (`ogdopt.passes`), on any number of ranks
(`ogdopt.distributed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ogdopt.distributed import fault_of, local, settled, shared, together
from ogdopt.passes import matrices
from ogdopt.passes import rows as products_of_all
from ogdopt.rounding import energies

Value: TypeAlias = Callable[[], "Tensor | Iterable[Tensor]"]
"""Returns a scalar with a graph, or the parts of it."""


AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-6}
"""How far copies of a gradient may be apart on ranks, relative to its products; 16-bit types: 1e-3."""


class Gram(NamedTuple):
    """The inner products of a winner's and a loser's gradient: float64 tensors of one shape, one entry a block."""

    ww: Tensor
    """<g_w, g_w>"""
    wl: Tensor
    """<g_w, g_l>"""
    ll: Tensor
    """<g_l, g_l>"""
    parallel: Tensor | float = 1e-12
    """1 - cos^2 under which gradients cannot be told from parallel ones, by the rounding of each (`ogdopt.rounding`)."""
    fault: Tensor | None = None
    """0, or which of `FAULTS` the ranks found, the same on all of them; the numbers are then NaN. None without other ranks."""
    ranks: Tensor | None = None
    """What each rank put in for `fault`, (ranks, 6): ww, wl, ll, winner's gradients, loser's gradients, tolerance."""
    parameters: tuple[Tensor, ...] | None = None
    """The parameter of each entry, where every entry is a tensor and it is known whose."""
    every: Tensor | None = None
    """All products of the winner's, the loser's and further gradients, (B, n, n); None without further ones."""
    noise: Tensor | None = None
    """The energies of their roundings, (B, n)."""

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
        if all(n == 1 for n in sizes):
            return self
        sizes = list(sizes)
        ww, wl, ll = (torch.stack([part.sum() for part in x.split(sizes)]) for x in self[:3])
        parallel = self.parallel
        if isinstance(parallel, Tensor):
            # By each tensor's share of the energy, which is the same of both gradients where they are parallel.
            block = torch.tensor(blocks_of(sizes), device="cpu").to(ww.device, non_blocking=True)
            weighted = parallel * (ratio(self.ww, ww[block]) + ratio(self.ll, ll[block])) / 2
            parallel = torch.stack([part.sum() for part in weighted.split(sizes)])
        every, noise = (
            None if x is None else torch.stack([part.sum(0) for part in x.split(sizes)]) for x in (self.every, self.noise)
        )
        return Gram(ww, wl, ll, parallel, self.fault, self.ranks, every=every, noise=noise)

    def cancels(self, a: Tensor, b: Tensor) -> bool:
        """Whether in some block less than a tenth of `a g_w` is left in `a g_w + b g_l`; asks the device."""
        kept, left = a * a * self.ww, a * (a * self.ww + 2 * b * self.wl) + b * (b * self.ll)
        return not all((left >= 0.01 * kept).tolist())

    def norm(self, a: Tensor, b: Tensor) -> Tensor:
        """L2 norm of `a g_w + b g_l` over all blocks, shape (), from the numbers alone."""
        return self.norms(a, b, [self.ww.numel()])[0]

    def norms(self, a: Tensor, b: Tensor, sizes: Sequence[int]) -> Tensor:
        """The same for groups of `sizes` consecutive entries: (len(sizes),)."""
        # a * a and b * b alone may leave the range of float64 where the two gradients differ in scale by 1e154.
        squares = a * (a * self.ww + 2 * b * self.wl) + b * (b * self.ll)
        return torch.stack([part.sum() for part in squares.flatten().split(list(sizes))]).clamp(min=0).sqrt()


def gram(
    winner: Sequence[Tensor | None],
    loser: Sequence[Tensor | None],
    process_group: dist.ProcessGroup | None = None,
    loss: Tensor | None = None,
    device: torch.device | None = None,
    expected: tuple[bool, bool] = (False, False),
    rows: Sequence[Tensor] | Tensor | None = None,
    further: Sequence[Sequence[Any]] = (),
) -> Gram:
    """Gram numbers of two lists of gradients, one entry a tensor: `ww`, `wl`, `ll` of shape (P,), float64.

    `winner[i]` and `loser[i]` belong to one parameter; None counts as zeros. Under torch.distributed one all-reduce of 5P
    numbers, and 6 for each rank, adds the ranks' numbers. Each tensor's are divided by how many ranks hold the same part of it.
    So shards (DTensors, or plain tensors with `process_group`) add up, and copies (replicated DTensors, plain tensors
    otherwise) are averaged. A `loss` that is not finite turns the first `ww` into NaN, so that a step is judged by its loss
    too, on every rank alike. The same message carries what `fault` finds: copies that differ, shards that are copies, and a
    side that is `expected` and has a gradient on no rank. `device` is where a rank that holds no gradient at all takes part.
    `rows` are `products` that were taken before; with a sequence of them the winner's list only says which gradients there are
    and how they lie. `further` are more lists of gradients, whose products with all others are in `every`.

    Raises ValueError for lists without a gradient where no other rank can have one, and for a DTensor mesh that is not the
    whole group.
    """
    present = [g for some in (winner, loser, *further) for g in some if g is not None]
    several = together(process_group)
    if not present and not several:
        raise ValueError("gram() found no gradient in either list; run backward before asking for inner products")
    if present:
        device = local(present[0]).device
    device = torch.device("cpu") if device is None else device
    more: list[Tensor] = []
    if further:
        every = matrices([winner, loser, *further], device)
        numbers = every[:, [0, 0, 1], [0, 1, 1]]
        more = [every.flatten(1), *(energies(gs, every[:, k, k])[:, None] for k, gs in enumerate(further, 2))]
    elif rows is None:
        numbers = products_of_all(winner, loser, device)
    else:
        numbers = rows.to(device) if isinstance(rows, Tensor) else torch.stack([row.to(device) for row in rows])
    gone = isinstance(rows, Sequence)  # measured one by one, and only their layout is left
    rounding = [energies(winner, numbers[:, 0], look=not gone), energies(loser, numbers[:, 2])]
    if loss is not None:
        numbers[0, 0] += 0.0 * loss.to(numbers)  # 0 * inf is NaN
    numbers = torch.cat([numbers, torch.stack(rounding, 1), *more], 1)
    if not several:
        return _gram(numbers, len(further))
    some = [next((g for g in gs if g is not None), None) for gs in zip(winner, loser, *further)]
    who = shared(some, process_group)
    copies = torch.tensor(who.copies, device="cpu")
    # What must agree between ranks (copies), or must not: shards, each weighed by its place, so that equal shards of two
    # tensors are no copies. Constants are sent without waiting for the device.
    weight = torch.arange(1, len(copies) + 1, device="cpu") if who.shards else copies == who.count
    tolerance = max((AGREEMENT.get(g.dtype.to_real(), 1e-3) for g in present), default=1e-6)
    about = [sum(g is not None for g in winner), sum(g is not None for g in loser), tolerance]
    about += [sum(g is not None for g in gs) for gs in further]
    marks = torch.tensor(about, dtype=torch.float64, device="cpu").to(numbers, non_blocking=True)
    weighed = weight.to(numbers, non_blocking=True) @ numbers
    squares = [weighed[5 + (k + 2) * (len(further) + 3)][None] for k in range(len(further))]  # the diagonal of `every`
    mine = torch.cat([weighed[:3], marks, *squares])
    table = mine.new_zeros(who.count, len(mine))
    table[dist.get_rank(process_group)] = mine
    numbers, table = who.reduce([numbers / copies.to(numbers, non_blocking=True)[:, None], table])
    fault = fault_of(table, who.shards, expected, len(further))
    return _gram(torch.where(fault > 0, torch.nan, numbers), len(further))._replace(fault=fault, ranks=table)


def _gram(numbers: Tensor, further: int = 0) -> Gram:
    """Gram numbers from rows of ww, wl, ll, the energies of both gradients' rounding, and the same of further gradients."""
    ww, wl, ll, of_winner, of_loser = numbers[:, :5].unbind(1)
    found = Gram(ww, wl, ll, ratio(of_winner, ww) + ratio(of_loser, ll))
    if not further:
        return found
    n = further + 2
    every, noise = numbers[:, 5:].split([n * n, further], 1)
    # The loss is in ww alone.
    every = torch.cat([ww[:, None], every[:, 1:]], 1).view(-1, n, n)
    return found._replace(every=every, noise=torch.cat([numbers[:, 3:5], noise], 1))


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


def blocks_of(sizes: Sequence[int]) -> list[int]:
    """The block of each tensor, where blocks are `sizes` consecutive tensors.

    >>> blocks_of([2, 1])
    [0, 0, 1]
    """
    return [k for k, n in enumerate(sizes) for _ in range(n)]


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 unless y > 0."""
    return torch.where(y > 0, x / y, 0.0)
