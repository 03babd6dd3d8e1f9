"""What goes wrong with two gradients: the exceptions, and warnings that point at the user's own line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

NO_GRADIENT = (
    "Either no backward ran (a closure must return its loss or call backward; torch.autograd.grad leaves p.grad alone), or "
    "the optimizer was built on other parameters than the model's (build it after sharding), or gradient synchronization "
    "was off for the last micro-batch"
)
_INSIDE = tuple(str(Path(str(module)).parent) for module in (__file__, torch.__file__))


class GradientError(RuntimeError):
    """The gradients are not where a two-gradient step needs them; the message says what to change."""


class NonFiniteGradient(FloatingPointError):  # noqa: N818 - names what was found, like its base class
    """A gradient or loss is infinite or NaN and `on_nonfinite="raise"`; nothing was stepped."""


def warn(message: str) -> None:
    """Warn at the innermost line that belongs neither to this package nor to torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
