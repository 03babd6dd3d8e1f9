"""The passes of `ogdopt.fused` over float32 tensors on a CPU in C++, as fast as memory: one call for all, whatever their sizes.

Products are summed in float32 over blocks of 1,024 and in float64 beyond, in an order that does not depend on the number of
threads. Memory is asked for ahead of its use, which compilers do not do by themselves. The loser's gradient may be bfloat16, as
it is set aside. The compiler runs once a process, for about a second.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
FUNCTIONS = ("products", "mix", "rmsprop", "adam", "sgd")
NUMBERS = 14
"""Of a row: `fused.mixed`'s c, and the update's h, filled up."""
NONE = (0,) * 5
"""Addresses of a row without tensors."""


class Unavailable(RuntimeError):  # noqa: N818 - names what is the matter
    """Why something cannot be compiled here."""


@functools.cache
def library() -> Any:
    """The functions, built at the first call of a process by $CXX, c++, g++ or clang++. Raises Unavailable."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise Unavailable("there is no C++ compiler here (looked for $CXX, c++, g++ and clang++)")
    with tempfile.TemporaryDirectory(prefix="ogdopt", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "loops.so")
        try:
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(path)]
            subprocess.run(command, text=True, check=True, capture_output=True, timeout=120)
            built = ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError) as error:
            told = getattr(error, "stderr", None) or str(error)
            reason = next((line for line in str(told).splitlines() if "error" in line), str(told)).strip()
            raise Unavailable(f"the C++ compiler {compiler} fails here ({reason})") from error
    for name in FUNCTIONS:
        getattr(built, name).argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        getattr(built, name).restype = None
    return built


def plain(x: Tensor) -> bool:
    """Whether the elements lie in memory one after the other as they are read, which compiled loops take for granted."""
    return x.is_contiguous() and not x.is_neg()


def fits(*bundle: Any) -> bool:
    """Whether (g_w, g_l) or (parameter, g_w, g_l, *states) are flat float32 tensors of this process's memory, or None.

    The loser's gradient may be bfloat16.
    """
    l = bundle[min(2, len(bundle) - 1)]
    for x in bundle:
        if x is None:
            continue
        if type(x) is not Tensor or not x.is_cpu or not plain(x):
            return False
        if x.dtype is not torch.float32 and not (x is l and x.dtype is torch.bfloat16):
            return False
    return True


def products(pairs: Sequence[Sequence[Tensor]]) -> Tensor:
    """ww, wl, ll of every pair (g_w, g_l) that `fits`, (P, 3) float64. Raises Unavailable."""
    found = torch.zeros(len(pairs), 3, dtype=torch.float64, device="cpu")
    _call("products", [(w, w, l) for w, l in pairs], found)
    return found


def step(name: str, bundles: Sequence[Sequence[Any]], *tables: Tensor) -> None:
    """The update of that name on bundles (parameter, g_w, g_l, *states) that fit, by their rows of `fused`'s two tables.

    "mix" writes the mixture into the parameter's place, and g_w may be that. One gradient may be None. Raises Unavailable.
    """
    given = torch.cat(tables, 1).cpu()
    numbers = torch.nn.functional.pad(given, (0, NUMBERS - given.shape[1]))
    # What stands in the place of a gradient that is not there is not looked at, or taken times 0.
    numbers[[i for i, (_, w, *_) in enumerate(bundles) if w is None], 0] = 0
    numbers[[i for i, (_, _, l, *_) in enumerate(bundles) if l is None], 1:4] = 0
    rows = [[p, p if w is None else w, w if l is None else l, *states] for p, w, l, *states in bundles]
    _call(name, rows, numbers)
    torch.autograd.graph.increment_version([row[0] for row in rows])


def _call(name: str, rows: Sequence[Sequence[Any]], numbers: Tensor) -> None:
    """Rows are a parameter, g_w, g_l and up to two states: native.cpp's Row once their addresses are in."""
    table: list[int] = []  # one flat list: ten thousand short ones would have the garbage collector look at everything
    for row in rows:
        for x in row:
            table.append(x.data_ptr())
        table += (*NONE[len(row) :], row[0].numel(), row[2].dtype is torch.bfloat16)
    given = torch.tensor(table, dtype=torch.int64, device="cpu")
    getattr(library(), name)(len(rows), given.data_ptr(), torch.get_num_threads(), numbers.data_ptr())
