"""Families of gradient pairs, and a ten-line float64 reference, for the property tests."""

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = ("random", "parallel", "nearly parallel", "orthogonal", "opposed", "conflicting", "zero winner", "zero loser")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-9}


def reference(ws: list[Tensor], ls: list[Tensor], max_norm: float | None = None) -> list[Tensor]:
    """Definition 4.1 in float64 on one flat vector, then the clip."""
    w, x = torch.cat([g.double().flatten() for g in ws]), torch.cat([g.double().flatten() for g in ls])
    ww, wl, ll = w @ w, w @ x, x @ x
    c = wl.clamp(min=0) / ll if ll > 0 else 0.0
    u = w - c * x
    if wl > 0 and 1 - wl * wl / (ww * ll) <= (32 * 2.0**-16 if ws[0].dtype == torch.bfloat16 else 1e-12):
        u = torch.zeros_like(u)
    if max_norm is not None:
        u = u * min(1.0, max_norm / (u.norm().item() + 1e-6))
    return [part.view(g.shape) for part, g in zip(u.split([g.numel() for g in ws]), ws)]


@st.composite
def pairs(draw, kinds=KINDS, dtypes=DTYPES, scales=(-15, 15)):
    """(winner's gradients, loser's gradients, dtype, kind): lists of up to four tensors of odd shapes."""
    shapes = draw(st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=4))
    kind, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = sum(torch.Size(s).numel() for s in shapes)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    w = {
        "random": y,
        "parallel": 2 * x,
        "nearly parallel": x + 1e-3 * y,
        "orthogonal": y - (x @ y) / (x @ x) * x,
        "opposed": -x,
        "conflicting": y - 2 * (x @ y).abs() / (x @ x) * x,
        "zero winner": 0 * x,
        "zero loser": y,
    }[kind]
    x = 0 * x if kind == "zero loser" else x
    w, x = w * 10.0 ** draw(st.integers(*scales)), x * 10.0 ** draw(st.integers(*scales))
    cut = [torch.Size(s).numel() for s in shapes]
    parts = [[p.view(s).to(dtype).clone() for p, s in zip(v.split(cut), shapes)] for v in (w, x)]
    return parts[0], parts[1], dtype, kind


def parameters(gradients: list[Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]


def inner(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b)))


def norm(a: list[Tensor]) -> float:
    return inner(a, a) ** 0.5
