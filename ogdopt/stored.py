"""How a loser's gradient waits for the winner's: by reference, or packed into fewer bytes tensor by tensor.

Both inner products and the mixture use what is stored, so that the result is exactly orthogonal to the stored gradient. The
rounding is nearly independent of it. So the angle to the true gradient is 100 to 1000 times smaller than the rounding itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ogdopt.distributed import local
from ogdopt.passes import chunk_size, order_of
from ogdopt.rounding import Rounding, of, rounded_to

SetAside: TypeAlias = "torch.dtype | Literal['int8', 'cpu', 'recompute'] | None"
FORMS = (None, torch.bfloat16, "int8", "cpu", "recompute")
BLOCK = 256
"""Elements that share a scale in int8: 4 bytes of scale for 256 of values."""
STEPS = 127
"""Steps of int8 from 0 to the largest value of a block."""


class Stored:
    """The local part of one gradient in another form, read back chunk by chunk in memory order; its layout is the gradient's.

    `before` is the form in which a part of the gradient waited until now: its rounding is in it already.
    """

    def __init__(self, g: Tensor, form: SetAside, before: Stored | None = None) -> None:
        self.form = form
        self.device_mesh: Any = getattr(g, "device_mesh", None)
        self.placements: Any = getattr(g, "placements", None)
        part = local(g).detach()
        self.shape: torch.Size = part.shape
        self.dtype: torch.dtype = part.dtype
        self.device: torch.device = part.device
        contiguous = part.is_contiguous()
        self.order: list[int] = [*range(part.dim())] if contiguous else order_of(part)
        """The dimensions from the outermost of `values` to the innermost."""
        self.straight: bool = contiguous and isinstance(form, torch.dtype) and not part.is_complex()
        """Whether `values` are numbers, one after the other as those of a contiguous tensor of this shape."""
        self.values: Tensor
        self.largest: Tensor | None = None
        """Of int8, what the largest step of each block stands for."""
        self.rounding: Rounding = of(part) if before is None else before.rounding
        """What of the energy of this gradient is rounding, that of its own type included."""
        self._copied: Any = None
        flat = (part if contiguous else part.permute(self.order)).reshape(-1)
        if form == "int8":
            self._quantize(flat)
        elif form == "cpu":
            self._offload(flat)
        else:
            assert isinstance(form, torch.dtype)
            self.values = flat.to(form)
            self.rounding = rounded_to(self.rounding, form)

    def _quantize(self, flat: Tensor) -> None:
        """int8 in blocks; the energy of the rounding is measured, since it depends on how the block is distributed."""
        blocks = -(-flat.numel() // BLOCK)
        kind = torch.promote_types(flat.dtype, torch.float32)
        self.values = torch.empty(blocks * BLOCK, dtype=torch.int8, device=self.device)
        self.largest = torch.empty(blocks, dtype=kind, device=self.device)
        lost = torch.zeros((), dtype=torch.float64, device=self.device)
        size = chunk_size(self.device)
        for i, piece in enumerate(flat.split(size)):
            if piece.numel() % BLOCK:
                piece = torch.nn.functional.pad(piece, (0, -piece.numel() % BLOCK))
            rows = piece.view(-1, BLOCK).to(kind)
            top = rows.abs().amax(1)  # infinite or NaN where a value is, and then so is what is read back
            # Divided by the largest and not multiplied by an inverse, which leaves the type's range where that is subnormal.
            steps = (rows / torch.where(top > 0, top, 1.0)[:, None]).mul_(STEPS)
            whole = steps.round()
            error = (steps - whole).square_().sum(1).double()
            lost += (error * (top.double() / STEPS).square()).nan_to_num(0.0).sum()
            first = i * size // BLOCK
            self.largest[first : first + len(rows)] = top
            self.values[i * size : i * size + piece.numel()].view(-1, BLOCK).copy_(whole)
        self.rounding = self.rounding.plus(Rounding(0.0, 0.0, lost))

    def _offload(self, flat: Tensor) -> None:
        """A copy in the host's memory, without waiting for an accelerator, which then says when it has arrived."""
        pinned = self.device.type == _accelerator()
        self.values = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=pinned)
        self.values.copy_(flat, non_blocking=pinned)
        if pinned:
            self._copied = torch.get_device_module(self.device).Event()
            self._copied.record()

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes that wait."""
        return self.values.nbytes + (0 if self.largest is None else self.largest.nbytes)

    @property
    def whole(self) -> Tensor | None:
        """The values as a tensor of the gradient's shape and strides, no copy; None in int8 and in another memory."""
        if self.largest is not None or self.values.device != self.device:
            return None
        return self._shaped(self.values)

    def _shaped(self, flat: Tensor) -> Tensor:
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return flat.view([self.shape[d] for d in self.order]).permute(inverse)

    def pieces(self, size: int) -> Iterator[Tensor]:
        """Flat chunks of `size` elements (the last one shorter), in a floating type, on the gradient's device."""
        if self._copied is not None:
            self._copied.wait()  # the reading stream, which may be another than the one that copied
        for start in range(0, self.numel(), size):
            stop = min(start + size, self.numel())
            if self.largest is not None:
                tops = self.largest[start // BLOCK : -(-stop // BLOCK), None]
                rows = self.values[start : start + tops.numel() * BLOCK].view(-1, BLOCK)
                yield rows.to(tops.dtype).mul_(1 / STEPS).mul_(tops).view(-1)[: stop - start]
            else:
                # Moved as it is and converted there: a conversion on the host would read before the copy has arrived.
                yield self.values[start:stop].to(self.device, non_blocking=True)

    def restored(self) -> Tensor:
        """The local part as a plain tensor of its own type, shape and strides."""
        out = torch.empty(self.numel(), dtype=self.dtype, device=self.device)
        size = chunk_size(self.device)
        for target, piece in zip(out.split(size), self.pieces(size)):
            target.copy_(piece)
        return self._shaped(out)


def _accelerator() -> str:
    """The type of device that pinned memory is for; "" without one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "" if found is None else found.type


def check(form: Any) -> None:
    """Raise ValueError for an unknown way of setting a gradient aside."""
    if form not in FORMS:
        raise ValueError(f"set_aside is {form!r}; expected None (by reference), torch.bfloat16, 'int8', 'cpu' or 'recompute'")
