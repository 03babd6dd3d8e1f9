"""Inner products: exact at every size, scale, type and layout; the mixture; nothing of the model's size is allocated."""

import pytest
import torch
from hypothesis import given

from ogdopt.distributed import settled
from ogdopt.gram import Gram, gram
from ogdopt.passes import CPU_CHUNK, mix_
from tests.gradients import inner, pairs


@given(pairs(scales=(-100, 30), dtypes=(torch.float64,)))
def test_numbers_equal_float64_products(case):
    ws, ls, _, _ = case
    numbers = gram(ws, ls)
    expected = [inner(ws, ws), inner(ws, ls), inner(ls, ls)]
    bound = (inner(ws, ws) * inner(ls, ls)) ** 0.5
    for got, want, scale in zip((x.sum().item() for x in numbers[:3]), expected, (expected[0], bound, expected[2])):
        assert got == pytest.approx(want, abs=1e-12 * scale)


def test_per_tensor_numbers_and_none():
    w, x = torch.randn(3, 4), torch.randn(3, 4)
    numbers = gram([w, None, w, None], [x, x, None, None])
    assert numbers.ww[1] == numbers.wl[1] == numbers.wl[2] == numbers.ll[2] == 0
    assert numbers.ww[2] == numbers.ww[0] > 0 and numbers.ll[1] == numbers.ll[0]
    assert all(v[3] == 0 for v in numbers[:3])
    assert numbers.ww.dtype == torch.float64 and numbers.ww.shape == (4,)


def test_underflow_and_overflow_of_float32_squares():
    """A float32 sum of (1e-23)^2 is 0 and one of (1e20)^2 is inf (SPEC 1.2, PITFALLS 2.6)."""
    for scale in (1e-23, 1e20):
        g = torch.full((1000,), scale)
        assert gram([g], [g]).ww.item() == pytest.approx(1000 * float(g[0]) ** 2, rel=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "large transposed", "scalar", "empty"])
def test_any_strides(layout):
    torch.manual_seed(0)
    w, x = {
        "transposed": lambda: (torch.randn(30, 20).T, torch.randn(20, 30)),
        "strided": lambda: (torch.randn(64)[::2], torch.randn(96)[::3]),
        "expanded": lambda: (torch.randn(20, 1).expand(20, 5), torch.randn(20, 5)),
        "large transposed": lambda: (torch.randn(3, CPU_CHUNK).T, torch.randn(CPU_CHUNK, 3)),
        "scalar": lambda: (torch.randn(()), torch.randn(())),
        "empty": lambda: (torch.randn(0, 3), torch.randn(0, 3)),
    }[layout]()
    assert gram([w], [x]).wl.item() == pytest.approx(inner([w], [x]), rel=1e-12)
    target, expected = w.clone(memory_format=torch.preserve_format), 2.0 * w.double() - 0.5 * x.double()
    mix_(target, x, torch.tensor(2.0, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64))
    torch.testing.assert_close(target.double(), expected, rtol=1e-7, atol=1e-7)


def test_complex_gradients_count_as_pairs_of_reals():
    w, x = torch.randn(5, 3, dtype=torch.complex64), torch.randn(5, 3, dtype=torch.complex64)
    numbers = gram([w], [x])
    real = gram([torch.view_as_real(w)], [torch.view_as_real(x)])
    assert torch.equal(numbers.wl, real.wl) and torch.equal(numbers.ww, real.ww)
    assert numbers.wl.item() == pytest.approx((w.conj() * x).real.sum().item(), rel=1e-5)


@pytest.mark.parametrize("cancels", [True, False])
def test_mixture_reaches_below_the_rounding_of_the_coefficient(cancels):
    """At 20M float32 elements a float32 dot leaves an angle of 1e-5 to 1e-4; here it is under 1e-7, at a high cosine too."""
    torch.manual_seed(0)
    loser = torch.randn(20_000_000)
    for noise, a in ((1.0, 1.0), (0.03, 1.0), (1.0, 0.3)):
        winner = loser + noise * torch.randn(20_000_000)
        numbers = gram([winner], [loser])
        mix_(winner, loser, torch.tensor(a, dtype=torch.float64), -a * (numbers.wl / numbers.ll)[0], cancels)
        left = gram([winner], [loser])
        assert abs(left.cosine.item()) < 1e-7


def test_no_temporary_of_the_models_size(monkeypatch):
    """Peak of all tensors made inside both passes stays within a few chunks, for 24M elements."""
    torch.manual_seed(0)
    w, x = torch.randn(24_000_000), torch.randn(24_000_000)
    made = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                made.append(out.untyped_storage().nbytes())
            return out

    with Count():
        gram([w], [x])
        mix_(w, x, torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    own = [n for n in made if n not in (w.untyped_storage().nbytes(), x.untyped_storage().nbytes())]
    assert own and max(own) <= CPU_CHUNK * 8


def test_cosine_of_zero_gradients_is_zero():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert Gram(zero, zero, one).cosine == 0 and Gram(one, zero, zero).cosine == 0
    assert Gram(one, one, one).cosine == 1


def test_pooling_adds_consecutive_blocks():
    x = torch.arange(5, dtype=torch.float64)
    assert Gram(x, x, x).pooled([2, 3]).ww.tolist() == [1.0, 9.0]


def test_nothing_to_multiply_is_an_error():
    with pytest.raises(ValueError, match="no gradient in either list"):
        gram([None], [None])


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        settled(embedding.weight.grad, embedding.weight)
