"""Both ends of the range: a step is the same at gradients from 1e-30 to 1e30 on either side, on every path that takes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt import PairedGradient, ProjectedGradient, fused, native, projection
from ogdopt.passes import SAFE, mix_, mix_all
from ogdopt.stored import Stored
from tests.gradients import inner, norm, reference

SHAPES = [(64, 64), (3,), (5, 7), (), (3,)]
"""One that compiled loops take, and small ones, two of which are stacked."""
PATHS = {
    "plain": {},
    "C++": {"fused": True},
    "torch.compile": {"fused": True},
    "set aside in bfloat16": {"set_aside": torch.bfloat16},
    "set aside in int8": {"set_aside": "int8"},
    "set aside in the host's memory": {"set_aside": "cpu"},
    "fused, set aside in bfloat16": {"set_aside": torch.bfloat16, "fused": True},
}
EXPONENTS = st.sampled_from([-30, -29, -15, -1, 0, 3, 14, 29, 30])


def sides(winner, loser, dtype=torch.float32, seed=0, cosine=0.7):
    """Gradients whose largest elements are about 10 to those powers."""
    generator = torch.Generator().manual_seed(seed)
    ls = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    ws = [cosine * l + (1 - cosine**2) ** 0.5 * torch.randn(l.shape, generator=generator, dtype=torch.float64) for l in ls]
    return [(w * 10.0**winner / 5).to(dtype) for w in ws], [(l * 10.0**loser / 5).to(dtype) for l in ls]


def given_to(opt, ws, ls):
    ps = opt.param_groups[0]["params"]
    for context, gs in ((opt.loser, ls), (opt.winner, ws)):
        with context():
            for p, g in zip(ps, gs):
                p.grad = g.clone()


def wrapped(ws, options, rule=projection.orthogonal, **more):
    ps = [torch.nn.Parameter(torch.zeros_like(w)) for w in ws]
    return ps, PairedGradient(torch.optim.SGD(ps, lr=1.0), rule, **options, **more)


@pytest.fixture
def loops(monkeypatch):
    return lambda path: (
        monkeypatch.setattr(native, "unfit", lambda columns, _: {*range(len(columns[0]))}) if path == "torch.compile" else None
    )


@pytest.mark.parametrize("path", PATHS)
@given(winner=EXPONENTS, loser=EXPONENTS, seed=st.integers(0, 3))
def test_the_projection_is_right_wherever_the_gradients_lie(loops, path, winner, loser, seed):
    loops(path)
    ws, ls = sides(winner, loser, seed=seed)
    form = PATHS[path].get("set_aside")
    kept = ls if form is None else [Stored(l, form).restored() for l in ls]
    expected = reference(ws, kept)
    for way in ("project", "step"):
        ps, opt = wrapped(ws, PATHS[path])
        given_to(opt, ws, ls)
        if way == "project":
            opt.project()
            found = [p.grad for p in ps]
        else:
            assert not opt.step().skipped
            found = [-p.detach() for p in ps]
        assert all(u.isfinite().all() for u in found)
        assert norm([x - u for x, u in zip(found, expected)]) <= 1e-6 * norm(ws)
        assert abs(inner(found, kept)) <= 1e-6 * norm(found) * norm(kept)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("exponent", [-30, -10, 10, 30])
def test_the_step_does_not_depend_on_how_the_losers_loss_is_scaled(loops, path, exponent):
    loops(path)
    ws, ls = sides(0, 0)
    found = []
    for scale in (1.0, 10.0**exponent):
        ps, opt = wrapped(ws, PATHS[path], max_norm=0.5)
        given_to(opt, ws, [l * scale for l in ls])
        opt.step()
        found.append(torch.cat([p.detach().flatten() for p in ps]))
    # int8 and bfloat16 round the scaled gradient anew.
    tolerance = {None: 1e-6, "cpu": 1e-6, torch.bfloat16: 2**-8, "int8": 2**-6}[PATHS[path].get("set_aside")]
    assert (found[0] - found[1]).norm() <= tolerance * found[0].norm()


RULES = [projection.normalized, projection.interval(0.0), projection.interval(0.4), projection.pcgrad, projection.mgda]


@pytest.mark.parametrize("rule", RULES, ids=["normalized", "interval 0", "interval 0.4", "pcgrad", "mgda"])
@pytest.mark.parametrize("path", ["plain", "C++", "torch.compile"])
@given(winner=EXPONENTS, loser=EXPONENTS, cosine=st.sampled_from([-0.5, 0.0, 0.7]))
def test_every_rule_at_both_ends(loops, path, rule, winner, loser, cosine):
    """Their two coefficients lie up to 1e120 apart; where only one gradient is left in the type, that one is right."""
    loops(path)
    ws, ls = sides(winner, loser, cosine=cosine)
    ps, opt = wrapped(ws, PATHS[path], rule)
    given_to(opt, ws, ls)
    report = opt.project()
    a, b = report.coefficients
    expected = [a * w.double() + b * l.double() for w, l in zip(ws, ls)]
    scale = abs(a) * norm(ws) + abs(b) * norm(ls)
    if scale > 1e35:  # no float32 any more
        return
    assert norm([p.grad - u for p, u in zip(ps, expected)]) <= 1e-6 * scale + 1e-43


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("path", ["plain", "torch.compile", "set aside in bfloat16", "set aside in int8"])
def test_other_types(loops, path, dtype):
    """What a type cannot hold is no fault of the step: half precision ends at 6e-8 and 65,504."""
    loops(path)
    ends = (-2, 0, 4) if dtype == torch.float16 else (-30, 0, 30)
    for winner in ends:
        for loser in ends:
            ws, ls = sides(winner, loser, dtype)
            form = PATHS[path].get("set_aside")
            kept = ls if form is None else [Stored(l, form).restored() for l in ls]
            ps, opt = wrapped(ws, PATHS[path] if dtype != torch.float64 else PATHS[path] | {"fused": False})
            given_to(opt, ws, ls)
            opt.project()
            found, eps = [p.grad for p in ps], torch.finfo(dtype).eps
            assert norm([x - u for x, u in zip(found, reference(ws, kept))]) <= 2 * eps * norm(ws)


@pytest.mark.parametrize("path", PATHS)
def test_subnormal_gradients(loops, path):
    """Under 1.2e-38 float32 has fewer digits; the step is still the winner's without the loser's, to what is left of them."""
    loops(path)
    ws, ls = sides(-38, 0)
    for w, l in ((ws, ls), ([x.clone() for x in ls], ws)):
        form = PATHS[path].get("set_aside")
        kept = l if form is None else [Stored(x, form).restored() for x in l]
        ps, opt = wrapped(w, PATHS[path])
        given_to(opt, w, l)
        opt.project()
        found = [p.grad for p in ps]
        assert norm([x - u for x, u in zip(found, reference(w, kept))]) <= 1e-6 * norm(w) + 1e-43


@pytest.mark.parametrize(("a", "b"), [(1.0, 3e38), (1.0, -1e45), (1.0, 1e-45), (1e-80, 1.0), (1e60, -1e30), (0.0, 1e50)])
def test_a_mixture_with_coefficients_that_float32_does_not_hold(a, b):
    w, l = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 4.0, -0.5])
    scale = max(abs(a), abs(b))
    w, l = (w / abs(a) if abs(a) > SAFE else w), (l / scale if abs(b) > SAFE else l)
    expected = a * w.double() + b * l.double()
    one, other = (torch.tensor([c, c], dtype=torch.float64) for c in (a, b))
    alone, together = w.clone(), [w.clone(), w.clone()]
    mix_(alone, l, one[0], other[0], cancels=False)
    mix_all(together, [l, l], one, other)
    compiled = [w.clone()]
    fused.mix(compiled, [l], one[:1], other[:1])
    formula = fused.mixed(w, l, fused._coefficients(one, other)[0])
    for found in (alone, *together, *compiled, formula):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-43)


def test_a_winner_alone_is_scaled_by_what_float32_does_not_hold():
    w, a = torch.full((3,), 1e-30), torch.tensor(1e45, dtype=torch.float64)
    mix_(w, None, a, a)
    torch.testing.assert_close(w, torch.full((3,), 1e15))


def test_a_certain_loser_leaves_numbers_in_the_weights():
    """Its softmax leaves 1e-36: the fused step is the plain one, and nothing is skipped."""
    ws, ls = sides(4, -36)
    results = []
    for options in ({}, {"fused": True}):
        ps = [torch.nn.Parameter(torch.zeros_like(w)) for w in ws]
        opt = ProjectedGradient(torch.optim.AdamW(ps, lr=1e-3), max_norm=1.0, **options)
        for _ in range(3):
            given_to(opt, ws, ls)
            opt.step()
        assert opt.skipped_steps == 0
        results.append(torch.cat([p.detach().flatten() for p in ps]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)
