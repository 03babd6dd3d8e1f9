"""How a loser's gradient waits for the winner's: by reference, or packed into fewer bytes tensor by tensor.

Both inner products and the mixture are taken with what is stored, so that the result is exactly orthogonal to the stored
gradient; the rounding is nearly independent of it, which leaves an angle to the true one that is 100 to 1000 times smaller
than the rounding itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ogdopt.distributed import local
from ogdopt.passes import chunk_size

SetAside: TypeAlias = "torch.dtype | Literal['int8', 'cpu', 'recompute'] | None"
FORMS = (None, torch.bfloat16, "int8", "cpu", "recompute")
BLOCK = 256
"""Elements that share a scale in int8: 4 bytes of scale for 256 of values."""


class Stored:
    """The local part of one gradient in another form, read back chunk by chunk in order; its layout is the gradient's."""

    def __init__(self, g: Tensor, form: SetAside) -> None:
        self.form = form
        self.device_mesh: Any = getattr(g, "device_mesh", None)
        self.placements: Any = getattr(g, "placements", None)
        part = local(g)
        self.shape: torch.Size = part.shape
        self.dtype: torch.dtype = part.dtype
        self.device: torch.device = part.device
        self.values: Tensor
        self.scales: Tensor | None = None
        flat = part.reshape(-1)
        if form == "int8":
            blocks = -(-flat.numel() // BLOCK)
            self.values = torch.empty(blocks * BLOCK, dtype=torch.int8, device=self.device)
            self.scales = torch.empty(blocks, dtype=torch.float32, device=self.device)
            size = chunk_size(self.device)
            for i, piece in enumerate(flat.split(size)):
                self._quantize(i * size, piece)
        elif form == "cpu":
            pinned = self.device.type != "cpu"  # else the copy would wait for the device
            self.values = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=pinned).copy_(flat, non_blocking=pinned)
        else:
            assert isinstance(form, torch.dtype)
            self.values = flat.to(form)

    def _quantize(self, start: int, piece: Tensor) -> None:
        assert self.scales is not None
        if piece.numel() % BLOCK:
            piece = torch.nn.functional.pad(piece, (0, -piece.numel() % BLOCK))
        rows = piece.view(-1, BLOCK).float()
        scale = rows.abs().amax(1) / 127  # infinite or NaN where a value is, and then so is what is read back
        first = start // BLOCK
        self.scales[first : first + len(rows)] = scale
        whole = (rows * torch.where(scale > 0, 1 / scale, 0.0)[:, None]).round_()
        self.values[start : start + piece.numel()].view(-1, BLOCK).copy_(whole)

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes that wait."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def pieces(self, size: int) -> Iterator[Tensor]:
        """Flat chunks of `size` elements (the last one shorter), in a floating type, wherever they are kept."""
        for start in range(0, self.numel(), size):
            stop = min(start + size, self.numel())
            if self.scales is None:
                yield self.values[start:stop]
            else:
                scales = self.scales[start // BLOCK : -(-stop // BLOCK), None]
                rows = self.values[start : start + scales.numel() * BLOCK].view(-1, BLOCK)
                yield rows.float().mul_(scales).view(-1)[: stop - start]

    def restored(self) -> Tensor:
        """The local part as a plain tensor of its own type and shape."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        size = chunk_size(self.device)
        for target, piece in zip(out.view(-1).split(size), self.pieces(size)):
            target.copy_(piece)
        return out


def check(form: Any) -> None:
    """Raise ValueError for an unknown way of setting a gradient aside."""
    if form not in FORMS:
        raise ValueError(f"set_aside is {form!r}; expected None (by reference), torch.bfloat16, 'int8', 'cpu' or 'recompute'")
