"""Tensors are walked as their memory lies: any order of strides gives the same numbers and steps, in as few pieces."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt import ProjectedGradient, fused, native
from ogdopt.passes import CPU_CHUNK, chunks, flat, mix_, moved, products
from ogdopt.stored import Stored
from tests.gradients import inner

ORDERS = list(itertools.permutations(range(3)))


def laid_out(x, order):
    """A copy of the same numbers whose memory has the dimensions in that order, outermost first."""
    inverse = sorted(range(x.dim()), key=list(order).__getitem__)
    return x.permute(*order).contiguous().permute(*inverse)


def gradients(shape, one, other, seed=0):
    generator = torch.Generator().manual_seed(seed)
    l = torch.randn(shape, generator=generator)
    w = 0.6 * l + torch.randn(shape, generator=generator)
    return laid_out(w, one), laid_out(l, other)


@given(st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9)), st.sampled_from(ORDERS), st.sampled_from(ORDERS))
def test_both_passes_in_every_order(shape, one, other):
    w, l = gradients(shape, one, other)
    expected = [inner([w], [w]), inner([w], [l]), inner([l], [l])]
    assert products(w, l).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12 * (expected[0] * expected[2]) ** 0.5)
    for form in (None, torch.bfloat16, "int8", "cpu"):
        kept = l if form is None else Stored(l, form)
        whole = l if form is None else kept.restored()
        assert flat(whole, l) is not None and whole.shape == l.shape
        found = w.clone()
        mix_(found, kept, *(torch.tensor(c, dtype=torch.float64) for c in (0.5, -0.3)), cancels=False)
        torch.testing.assert_close(found, (0.5 * w.double() - 0.3 * whole.double()).float(), rtol=1e-6, atol=1e-6)
        assert products(w, kept)[1].item() == pytest.approx(inner([w], [whole]), rel=1e-9, abs=1e-9)
    assert moved(w, l, w, l)[0].item() == pytest.approx(inner([w - l], [w]), rel=1e-6, abs=1e-6)


LAYOUTS = {
    "contiguous": ((0, 1), (0, 1), (0, 1)),
    "all transposed": ((1, 0), (1, 0), (1, 0)),
    "gradients transposed": ((0, 1), (1, 0), (1, 0)),
    "loser transposed": ((0, 1), (0, 1), (1, 0)),
    "winner transposed": ((1, 0), (0, 1), (1, 0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["plain", "C++", "torch.compile", "bfloat16", "int8", "fused bfloat16", "own metric"])
def test_steps_do_not_depend_on_the_layout(monkeypatch, layout, way):
    options = {
        "C++": {"fused": True},
        "torch.compile": {"fused": True},
        "bfloat16": {"set_aside": torch.bfloat16},
        "int8": {"set_aside": "int8"},
        "fused bfloat16": {"fused": True, "set_aside": torch.bfloat16},
        "own metric": {"metric": "optimizer"},
    }.get(way, {})
    if way == "torch.compile":
        monkeypatch.setattr(native, "unfit", lambda columns, _: {*range(len(columns[0]))})
    ends = []
    for orders in (LAYOUTS["contiguous"], LAYOUTS[layout]):
        generator = torch.Generator().manual_seed(0)
        p, w, l = (laid_out(torch.randn(320, 64, generator=generator), order) for order in orders)
        p, l = torch.nn.Parameter(p), laid_out(0.5 * w + l, orders[2])
        opt = ProjectedGradient(torch.optim.SGD([p], lr=1e-2, momentum=0.9), max_norm=1.0, **options)
        for _ in range(3):
            for context, g in ((opt.loser, l), (opt.winner, w)):
                with context():
                    p.grad = g.clone()
            opt.step()
        assert opt.unfused == ""
        ends.append(p.detach().contiguous())
    # int8 blocks hold other elements where memory lies otherwise.
    assert (ends[0] - ends[1]).norm() <= (1e-3 if way == "int8" else 1e-6) * ends[0].norm()


@pytest.mark.parametrize("shape", [(200_000, 2), (2, 200_000), (512, 16, 3, 3), (3, 5, 70_000)])
def test_pieces_are_few_and_cover_everything_once(shape):
    """What a pass costs beside its numbers is pieces: about as many as chunks fit in, however memory lies."""
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    least = -(-x.numel() // CPU_CHUNK)
    for one, other in itertools.product(itertools.permutations(range(x.dim())), repeat=2):
        w, l = laid_out(x, one), laid_out(x, other)
        pieces = list(chunks(w, l))
        assert len(pieces) <= (least if one == other else 4 * least + 1)
        assert all(torch.equal(a, b) and a.numel() <= CPU_CHUNK for a, b in pieces)
        assert torch.equal(torch.cat([a.flatten() for a, _ in pieces]).sort().values, x.flatten())
    holes = torch.zeros(2 * x.numel())[::2].view(shape) if x.dim() == 2 else x
    assert sum(a.numel() for a, _ in chunks(holes, x)) == x.numel()


def test_flat_views_are_of_the_same_memory():
    x, y = gradients((4, 5, 6), (2, 0, 1), (2, 0, 1))
    one, other = flat(x, y)
    assert (
        one.data_ptr() == x.data_ptr()
        and one.is_contiguous()
        and torch.dot(one, other).item() == pytest.approx((x * y).sum().item(), rel=1e-4)
    )
    assert flat(x, y.contiguous()) is None and flat(torch.zeros(6)[::2]) is None and flat(torch.zeros(1).expand(3)) is None


def test_compiled_loops_take_transposed_tensors_as_they_are(monkeypatch):
    """No copy and no way around: the addresses that C++ gets are the tensors' own."""
    seen = []
    call = native._call
    monkeypatch.setattr(native, "_call", lambda name, columns, numbers: (seen.append(columns), call(name, columns, numbers)))
    w, l = torch.randn(7, 300).t(), torch.randn(7, 300).t()
    fused.rows([w], [l])
    assert [x.data_ptr() for (x,) in seen[0]] == [w.data_ptr(), w.data_ptr(), l.data_ptr()]


@pytest.mark.parametrize("shape", [(1, 1), (40,), (33, 65), (65, 33, 1), (70, 3, 3, 66), (2, 17, 1, 50), (0, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copies_in_tiles_are_those_of_torch(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    for order in itertools.permutations(range(len(shape))):
        x = laid_out(torch.randn(shape, generator=generator).to(dtype), order)
        parts = [x, x[..., : x.shape[-1] // 2], x[:1].expand(shape) if x.numel() else x, torch._neg_view(x)]
        for part in parts:
            found = native.contiguous(part)
            assert found.shape == part.shape and found.is_contiguous() and torch.equal(found, part)
