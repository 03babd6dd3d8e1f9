"""Parallel gradients are recognised by the rounding that each really has, tensor by tensor; different ones stay different."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ogdopt import ProjectedGradient, rounding
from ogdopt.gram import gram
from ogdopt.stored import Stored
from tests.gradients import reference

FORMS = [None, "cpu", "recompute", torch.bfloat16, "int8"]


def problem(dtype, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    x = torch.randn(32, 8, dtype=dtype)
    return model, lambda: nn.functional.cross_entropy(model(x), torch.full((32,), 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1.1])
@pytest.mark.parametrize("fused", [False, True])
def test_a_tie_takes_no_step(form, dtype, factor, fused):
    """Chosen equals rejected, or is a multiple of it: RMSprop would make a full step of the rounding that is left."""
    model, loss = problem(dtype)
    opt = ProjectedGradient(torch.optim.RMSprop(model.parameters(), lr=1e-3), set_aside=form, fused=fused)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        report = opt.step(loss, lambda: factor * loss())
        assert report.parallel and report.coefficients == (0.0, 0.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("form", [None, torch.bfloat16, "int8"])
def test_a_tie_of_micro_batches_takes_no_step(form):
    """A loser that is packed after every micro-batch is rounded as often."""
    model, loss = problem(torch.float32)
    opt = ProjectedGradient(torch.optim.RMSprop(model.parameters(), lr=1e-3), set_aside=form)
    for context in (opt.loser, opt.winner):
        with context():
            for _ in range(4):
                (loss() / 4).backward()
    assert opt.step().parallel


def apart(sine2, n=40_000, dtype=torch.float32, seed=0):
    """A pair with 1 - cos^2 of so much."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    y -= (x @ y) / (x @ x) * x
    y *= x.norm() / y.norm()
    return ((1 - sine2) ** 0.5 * x + sine2**0.5 * y).to(dtype), x.to(dtype)


def projected(w, l, form=None):
    p = nn.Parameter(torch.zeros_like(w))
    opt = ProjectedGradient(torch.optim.SGD([p], lr=1.0), set_aside=form)
    for context, g in ((opt.loser, l), (opt.winner, w)):
        with context():
            p.grad = g.clone()
    return opt.project(), p.grad


@pytest.mark.parametrize(
    ("dtype", "form", "sine2"),
    [
        (torch.float64, None, 1e-11),
        (torch.float32, None, 1e-11),
        (torch.float32, torch.bfloat16, 1e-4),
        (torch.float32, "int8", 1e-4),
        (torch.bfloat16, None, 1e-3),
        (torch.bfloat16, "int8", 1e-3),
        (torch.float16, None, 1e-5),
    ],
)
def test_different_gradients_are_projected(dtype, form, sine2):
    w, l = apart(sine2, dtype=dtype)
    report, u = projected(w, l, form)
    assert not report.parallel
    kept = l if form is None else Stored(l, form).restored()
    (expected,) = reference([w], [kept])
    assert (u - expected).norm() <= 0.2 * expected.norm()


@given(st.sampled_from([torch.bfloat16, "int8", "cpu"]), st.integers(0, 1000), st.floats(0.0, 6.0), st.integers(-20, 20))
def test_setting_aside_never_turns_parallel_gradients_further_than_is_allowed_for(form, seed, spread, exponent):
    """Whatever the distribution of a block's elements: alike, or over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(700, generator=generator) * torch.exp(spread * torch.randn(700, generator=generator)) * 10.0**exponent
    numbers = gram([w], [Stored(0.3 * w, form)])
    assert numbers.same_direction


@given(st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 1000), st.floats(0.0, 3.0))
def test_one_rounding_to_a_type_stays_within_its_bound(dtype, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(300, generator=generator, dtype=torch.float64) * torch.exp(
        spread * torch.randn(300, generator=generator, dtype=torch.float64)
    )
    g = g.clamp(-6e4, 6e4)
    error, once = g.to(dtype).double() - g, rounding.of_type(dtype, roundings=1)
    assert error @ error <= once.relative * (g @ g) + once.each * len(g)


def test_an_imprecise_tensor_judges_no_other():
    """scope="tensor": the bfloat16 block is a tie up to its rounding, the float32 one is not."""
    (rough, its), (fine, other) = apart(1e-5, dtype=torch.bfloat16), apart(1e-8)
    numbers = gram([rough, fine], [its, other])
    assert numbers.same_direction.tolist() == [True, False]
    assert numbers.parallel[0] > 1e-4 and numbers.parallel[1] < 2e-12


def test_an_imprecise_tensor_counts_by_its_share_of_the_energy():
    (rough, its), (fine, other) = apart(1e-5, dtype=torch.bfloat16), apart(1e-8)
    small = gram([1e-4 * rough, fine], [1e-4 * its, other]).pooled([2])
    large = gram([1e4 * rough, fine], [1e4 * its, other]).pooled([2])
    none = gram([torch.zeros_like(rough), fine], [torch.zeros_like(rough), other]).pooled([2])
    assert not small.same_direction and large.same_direction and not none.same_direction
    assert none.parallel == pytest.approx(1e-12, rel=1e-3)


def test_bfloat16_in_float32_is_seen():
    """Autocast, and reductions in bfloat16, leave float32 gradients with eight digits."""
    model = nn.Linear(256, 256, bias=False)
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    found = []
    for factor in (1.0, 1.1):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = factor * model(x).tanh().square().mean()
        loss.backward()
        found.append(model.weight.grad)
    assert found[0].dtype == torch.float32
    numbers = gram([found[0]], [found[1]])
    assert numbers.same_direction and numbers.parallel == pytest.approx(32 * 2.0**-16, rel=1e-6)
    assert gram([Stored(found[0], "cpu")], [found[1]]).parallel == pytest.approx(32 * 2.0**-16, rel=1e-6)
    half = torch.randn(256, 256).half().float()
    assert gram([half], [half / 3]).parallel == pytest.approx(16 * 2.0**-22, rel=1e-6)


def test_few_whole_numbers_are_not_taken_for_bfloat16():
    w, l = torch.tensor([64.0, 1.0, 0.0]), torch.tensor([64.0, 0.0, 0.0])
    assert not gram([w], [l]).same_direction
    sparse_w, sparse_l = torch.zeros(1 << 16), torch.zeros(1 << 16)
    sparse_w[:3], sparse_l[:3] = w, l
    assert not gram([sparse_w], [sparse_l]).same_direction


def test_subnormal_gradients_are_compared_by_the_digits_they_have():
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-43
    assert gram([w], [torch.randn(1000) * 0 + 1.0]).parallel < 1
    assert gram([w], [0.37 * w]).same_direction
