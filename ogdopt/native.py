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
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
FUNCTIONS = ("products", "mix", "rmsprop", "adam", "sgd")
PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""Types whose memory is what it says; any other subclass of Tensor is looked into first."""
SINGLES, HALVES = {torch.float32}, {torch.float32, torch.bfloat16}
NUMBERS = 14
"""Of a row: `fused.mixed`'s c, and the update's h, filled up."""


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
    built.count.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p]
    built.count.restype = None
    built.turn.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    built.turn.restype = None
    return built


def plain(x: Tensor) -> bool:
    """Whether the elements lie in memory one after the other as they are read, which compiled loops take for granted."""
    return x.is_contiguous() and not x.is_neg()


def fits(*bundle: Any) -> bool:
    """Whether (g_w, g_l) or (parameter, g_w, g_l, *states) are flat float32 tensors of one size in this process, or None.

    The loser's gradient may be bfloat16.
    """
    return not unfit([[x] for x in bundle], min(2, len(bundle) - 1))


def unfit(columns: Sequence[Sequence[Any]], loser: int) -> set[int]:
    """The places of rows that are not, and cannot be given to the functions here. Column `loser` may be bfloat16.

    What holds for all is asked by column, since ten thousand tensors are asked at every step.
    """
    wrong: set[int] = set()
    for k, xs in enumerate(columns):
        if not _fit(xs, k == loser):
            wrong.update(i for i, x in enumerate(xs) if not _fit([x], k == loser))
    sizes = [[-1 if not isinstance(x, Tensor) else x.numel() for x in xs] for xs in columns]
    if any(some != sizes[0] for some in sizes):
        wrong.update(i for i, row in enumerate(zip(*sizes)) if len({n for n in row if n >= 0}) > 1)
    return wrong


def _fit(xs: Sequence[Any], half: bool) -> bool:
    """Whether all are plain tensors that lie flat in this process's memory, in float32 or, with `half`, bfloat16; or None."""
    kinds = {*map(type, xs)}
    if type(None) in kinds:
        xs = [x for x in xs if x is not None]
        kinds.discard(type(None))
    return (
        kinds <= PLAIN
        and {x.dtype for x in xs} <= (HALVES if half else SINGLES)
        and all([x.is_cpu for x in xs])
        and all(map(Tensor.is_contiguous, xs))
        and not any(map(Tensor.is_neg, xs))
    )


def products(ws: Sequence[Tensor], ls: Sequence[Tensor]) -> Tensor:
    """ww, wl, ll of every g_w and g_l that fit, (P, 3) float64. Raises Unavailable."""
    found = torch.zeros(len(ws), 3, dtype=torch.float64, device="cpu")
    _call("products", [ws, ws, ls], found)
    return found


def step(name: str, columns: Sequence[Sequence[Any]], *tables: Tensor) -> None:
    """The update of that name on columns (parameters, g_w, g_l, *states) that fit, by their rows of `fused`'s two tables.

    "mix" writes the mixture into the parameters' place, and g_w may be that. One gradient of a row may be None. Raises
    Unavailable.
    """
    given = torch.cat(tables, 1).cpu()
    numbers = torch.nn.functional.pad(given, (0, NUMBERS - given.shape[1]))
    ps, ws, ls, *states = columns
    # What stands in the place of a gradient that is not there is not looked at, or taken times 0.
    missing = [[i for i, g in enumerate(gs) if g is None] for gs in (ws, ls)]
    if missing[0]:
        numbers[missing[0], 0] = 0
        ws = [p if w is None else w for p, w in zip(ps, ws)]
    if missing[1]:
        numbers[missing[1], 1:4] = 0
        ls = [w if l is None else l for w, l in zip(ws, ls)]
    _call(name, [ps, ws, ls, *states], numbers)
    torch.autograd.graph.increment_version(ps)


def _call(name: str, columns: Sequence[Sequence[Tensor]], numbers: Tensor) -> None:
    """Columns are parameters, g_w, g_l and up to two states: native.cpp's Row once their addresses are in."""
    first, _, loser, *_ = columns
    table = torch.zeros(len(first), 7, dtype=torch.int64, device="cpu")
    for k, xs in enumerate(columns):
        table[:, k] = _whole_numbers([0 if x is None else x.data_ptr() for x in xs])
    table[:, 5] = _whole_numbers(map(Tensor.numel, first))
    table[:, 6] = _whole_numbers([x.dtype is torch.bfloat16 for x in loser])
    getattr(library(), name)(len(first), table.data_ptr(), torch.get_num_threads(), numbers.data_ptr())


def contiguous(x: Tensor) -> Tensor:
    """`x.contiguous()`; in tiles where torch would jump through memory number by number. Raises Unavailable."""
    kinds = {torch.float32: 0, torch.bfloat16: 1}
    if x.is_contiguous() or x.dtype not in kinds or not x.is_cpu or x.is_neg() or x.numel() == 0:
        return x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    sizes, strides = _together(x)
    places = (sizes.buffer_info()[0], strides.buffer_info()[0])
    library().turn(x.data_ptr(), out.data_ptr(), kinds[x.dtype], len(sizes), *places)
    return out


def _together(x: Tensor) -> tuple[array[int], array[int]]:
    """Sizes and strides with neighbouring dimensions that lie as one taken for one, and those of size 1 left out."""
    sizes, strides = array("q", [1]), array("q", [1])
    for n, stride in zip(x.shape, x.stride()):
        if n == 1:
            continue
        if strides[-1] == n * stride and sizes[-1] > 1:
            sizes[-1], strides[-1] = sizes[-1] * n, stride
        else:
            sizes.append(n)
            strides.append(stride)
    return sizes, strides


def count(counters: Sequence[Tensor], by: int) -> Tensor | None:
    """Numbers of steps (0-dimensional, float32, in this process) with so many more, which is also written; (P,) float64.

    None, and nothing is done, for others. Raises Unavailable.
    """
    if not counters or not _fit(counters, half=False) or {1} != {*map(Tensor.numel, counters)}:
        return None
    table = _whole_numbers(map(Tensor.data_ptr, counters))
    found = torch.empty(len(counters), dtype=torch.float64, device="cpu")
    library().count(len(counters), table.data_ptr(), by, found.data_ptr())
    if by:
        torch.autograd.graph.increment_version(counters)
    return found


def _whole_numbers(xs: Iterable[int]) -> Tensor:
    """An array at a time: torch.tensor of a list looks at each element several times."""
    return torch.frombuffer(array("q", xs), dtype=torch.int64)
