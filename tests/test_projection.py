"""The rules' properties (SPEC 1.1, 1.2, 1.8, 1.11, 1.12, 4.8) as pure maths on the Gram numbers and on gradients."""

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ogdopt import PairedGradient, projection
from ogdopt.gram import Gram, gram
from ogdopt.projection import block_sizes, interval, mgda, normalized, orthogonal, pcgrad, upgrad, watch
from tests.gradients import EPS, inner, norm, pairs, parameters

RULES = {
    "orthogonal": orthogonal,
    "normalized": normalized,
    "pcgrad": pcgrad,
    "upgrad": upgrad,
    "mgda": mgda,
    "sum": projection.difference,
    "watch": watch,
    **{f"interval({t})": interval(t) for t in (0, 0.3, 0.5, 0.8)},
}
# Rules whose step is the same however the loser's loss is scaled.
SCALE_FREE = ["orthogonal", "normalized", "interval(0)", "interval(0.3)", "interval(0.5)", "interval(0.8)"]


def numbers(w, x):
    """Gram numbers of two plain vectors, shape ()."""
    return Gram(w @ w, w @ x, x @ x)


def step(rule, w, x):
    a, b = rule(numbers(w, x))
    return a * w + b * x


def flat(case):
    ws, ls, _, _ = case
    return torch.cat([w.flatten() for w in ws]).double(), torch.cat([x.flatten() for x in ls]).double()


def mixed(ws, ls, sizes=None):
    """u in float64, from the rule's coefficients block by block."""
    blocks = gram(ws, ls).pooled(sizes or [len(ws)])
    a, b = orthogonal(blocks)
    index = [i for i, n in enumerate(sizes or [len(ws)]) for _ in range(n)]
    return [a[i] * w.double() + b[i] * x.double() for i, w, x in zip(index, ws, ls)], blocks


@given(pairs(dtypes=(torch.float64,)))
def test_theorems_5_3_and_5_4(case):
    """<-u, g_w> = -|u|^2 <= 0 and <-u, g_l> = max(0, -wl) >= 0, to rounding."""
    ws, ls, dtype, _ = case
    u, blocks = mixed(ws, ls)
    wl = blocks.wl.sum().item()
    slack = 64 * EPS[dtype]
    assert inner(u, ws) == pytest.approx(inner(u, u), abs=slack * norm(ws) ** 2)
    assert -inner(u, ls) == pytest.approx(max(0.0, -wl), abs=slack * norm(ws) * norm(ls))


@given(pairs(kinds=("opposed", "conflicting", "zero loser"), dtypes=(torch.float64, torch.float32, torch.bfloat16)))
def test_conflict_leaves_the_winner_alone_bit_for_bit(case):
    ws, ls, _, _ = case
    assume(gram(ws, ls).wl.sum() <= 0)
    u, _ = mixed(ws, ls)
    assert all(torch.equal(x, w.double()) for x, w in zip(u, ws))


@given(pairs(kinds=("parallel",), dtypes=(torch.float64, torch.float32)))
def test_parallel_gradients_leave_nothing(case):
    ws, ls, _, _ = case
    u, _ = mixed(ws, ls)
    assert all((x == 0).all() for x in u)


@given(pairs(dtypes=(torch.float64,), scales=(-5, 5)))
def test_idempotent(case):
    ws, ls, dtype, _ = case
    u, _ = mixed(ws, ls)
    assume(norm(u) > 1e-6 * norm(ws))
    again, _ = mixed(u, ls)
    for x, y in zip(u, again):
        torch.testing.assert_close(x, y, rtol=0, atol=64 * EPS[dtype] * norm(ws) * max(1, norm(ws) / norm(u)))


@given(pairs(dtypes=(torch.float64,), scales=(-5, 5)), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_invariant_to_the_losers_scale_and_linear_in_the_winners(case, k, m):
    ws, ls, dtype, _ = case
    u, _ = mixed(ws, ls)
    v, _ = mixed([k * w for w in ws], [m * x for x in ls])
    for x, y in zip(u, v):
        torch.testing.assert_close(k * x, y, rtol=0, atol=256 * EPS[dtype] * k * norm(ws))


@given(pairs(dtypes=(torch.float64,)))
def test_norm_from_the_numbers_alone(case):
    ws, ls, _, _ = case
    u, blocks = mixed(ws, ls)
    a, b = orthogonal(blocks)
    assert blocks.norm(a, b).item() == pytest.approx(norm(u), abs=1e-7 * norm(ws))


@pytest.mark.parametrize("exponent", range(0, 11))
def test_near_parallel_norm(exponent):
    """SPEC 1.12: the relative error of |u| stays near 4 eps/sin^2 in float64, where float32 numbers would be useless."""
    torch.manual_seed(exponent)
    loser = torch.randn(20_000, dtype=torch.float64)
    other = torch.randn(20_000, dtype=torch.float64)
    other -= (other @ loser) / (loser @ loser) * loser
    sine = 10.0 ** (-exponent / 2)
    winner = loser + sine * other
    blocks = gram([winner], [loser]).pooled([1])
    a, b = orthogonal(blocks)
    assert blocks.norm(a, b).item() == pytest.approx(sine * other.norm().item(), rel=1e-14 / sine**2 + 1e-12)


@given(pairs(dtypes=(torch.float64,), scales=(-3, 3)))
def test_finer_blocks_help_the_winner_less_and_the_loser_less(case):
    """SPEC 1.11: from coarse to fine blocks <u, g_w> does not rise and <-u, g_l> does not fall; both theorems hold."""
    ws, ls, _, _ = case
    coarse, _ = mixed(ws, ls)
    fine, _ = mixed(ws, ls, [1] * len(ws))
    slack = 1e-10 * norm(ws)
    assert inner(fine, ws) <= inner(coarse, ws) + slack * norm(ws)
    assert -inner(fine, ls) >= -inner(coarse, ls) - slack * norm(ls)
    assert inner(fine, ws) >= -slack * norm(ws) and -inner(fine, ls) >= -slack * norm(ls)


def test_finest_blocks_are_a_sign_mask():
    torch.manual_seed(0)
    ws, ls = [list(torch.randn(20, dtype=torch.float64)) for _ in range(2)]
    u, _ = mixed(ws, ls, [1] * 20)
    for x, w, y in zip(u, ws, ls):
        assert x == (w if w * y <= 0 else 0)


# ---- the other rules -----------------------------------------------------------------------------------------------------


def upgrad_of_torchjd(preference):
    pytest.importorskip("quadprog")
    pytest.importorskip("qpsolvers")
    from torchjd.aggregation import UPGrad
    from torchjd.linalg import QuadprogProjector

    exact = QuadprogProjector(norm_eps=0.0, reg_eps=0.0)
    return UPGrad(preference and torch.tensor(preference, dtype=torch.float64), exact)


TORCHJD = {
    "orthogonal": lambda jd: upgrad_of_torchjd([1.0, 0.0]),
    "upgrad": lambda jd: upgrad_of_torchjd(None),
    "pcgrad": lambda jd: jd.PCGrad(),
    "mgda": lambda jd: jd.MGDA(epsilon=1e-12),
    "sum": lambda jd: jd.Sum(),
}


@pytest.mark.parametrize("name", TORCHJD)
def test_torchjd_agrees(name):
    """Its aggregators see the Jacobian of L_w and -L_l. Its UPGrad solves a quadratic program that must not be singular."""
    theirs = TORCHJD[name](pytest.importorskip("torchjd.aggregation"))
    seen = set()

    @given(pairs(dtypes=(torch.float64,), scales=(-2, 2)))
    def agrees(case):
        w, x = flat(case)
        if name in ("orthogonal", "upgrad"):
            assume(norm([w]) > 0 and norm([x]) > 0 and 1 - numbers(w, x).cosine ** 2 > 1e-7)
        seen.add(case[3])
        got, want = step(RULES[name], w, x), theirs(torch.stack([w, -x]))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * (norm([w]) + norm([x])))

    agrees()
    assert {"random", "orthogonal", "conflicting"} <= seen


def test_pcgrad_is_not_ogd():
    """Winner (1, 0), loser (1, 1): OGD steps along (1/2, -1/2), PCGrad, which also serves the loser, along (1/2, -3/2)."""
    w, x = torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double()
    assert step(orthogonal, w, x).tolist() == [0.5, -0.5] and step(pcgrad, w, x).tolist() == [0.5, -1.5]
    assert step(upgrad, w, x).tolist() == [0.25, -0.75]


@given(pairs(dtypes=(torch.float64,)), st.floats(0, 1))
def test_interval_raises_winners_and_lowers_losers(case, t):
    """<-u, g_w> <= 0 <= <-u, g_l>, also where the two conflict; with room on both sides inside the interval."""
    w, x = flat(case)
    u = step(interval(t), w, x)
    wide = norm([w]) * max(norm([u]), norm([w]))
    assert inner([u], [w]) >= -1e-12 * wide and inner([u], [x]) <= 1e-12 * wide / (norm([w]) or 1) * norm([x])
    cosine = numbers(w, x).cosine.item()
    if 0.02 < t < 0.98 and 0.05 < cosine < 0.95:
        assert inner([u], [w]) > 1e-6 * norm([w]) ** 2 and inner([u], [x]) < -1e-6 * norm([w]) * norm([x])


@given(pairs(dtypes=(torch.float64,)))
def test_the_places_of_the_interval(case):
    """t = 1 is OGD, t = 1/2 the normalized difference in the winner's length, t = 0 leaves the winner where it is."""
    w, x = flat(case)
    assert interval(1) is orthogonal
    assume(norm([w]) > 0 and norm([x]) > 0)
    torch.testing.assert_close(
        step(interval(0.5), w, x), norm([w]) * step(normalized, w, x), rtol=1e-12, atol=1e-14 * norm([w])
    )
    if inner(w, x) > 0:
        assert inner([step(interval(0), w, x)], [w]) == pytest.approx(0, abs=1e-13 * norm([w]) ** 2)
        almost = step(interval(1 - 1e-12), w, x)
        torch.testing.assert_close(almost, step(orthogonal, w, x), rtol=1e-9, atol=1e-9 * norm([w]))


@pytest.mark.parametrize("t", [0, 0.1, 0.4, 0.5, 0.6, 0.9, 1])
def test_interval_is_continuous_where_conflict_begins(t):
    w = torch.tensor([1.0, 0.0]).double()
    below, above = (step(interval(t), w, torch.tensor([e, 2.0]).double()) for e in (-1e-100, 1e-100))
    torch.testing.assert_close(below, above, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [-0.01, 1.01, float("nan"), float("inf")])
def test_refused_places(t):
    with pytest.raises(ValueError, match="expected a number from 0"):
        interval(t)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("sum", "watch")])
@given(case=pairs(kinds=("parallel",), dtypes=(torch.float64,)))
def test_parallel_gradients_leave_no_rounding_noise(name, case):
    assert not step(RULES[name], *flat(case)).any()


@pytest.mark.parametrize("name", RULES)
def test_zero_gradients_are_left_out(name):
    """Nothing but the other side's gradient, or nothing at all, comes out; MGDA stands still, as it is stationary there."""
    g, zero = torch.tensor([3.0, -4.0]).double(), torch.zeros(2).double()
    alone, loser_alone, none = (step(RULES[name], *case) for case in ((g, zero), (zero, g), (zero, zero)))
    length = {"normalized": 1 / 5, "mgda": 0.0, "upgrad": 1 / 2, "interval(0)": 1.0}.get(name, 1.0)
    assert alone.tolist() == pytest.approx((length * g).tolist())
    assert loser_alone.tolist() == pytest.approx((-length * g * (name in ("normalized", "pcgrad", "upgrad", "sum"))).tolist())
    assert none.tolist() == [0, 0]


# ---- scales --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALE_FREE)
@given(case=pairs(dtypes=(torch.float64,), scales=(-3, 3)), scale=st.floats(1e-6, 1e6))
def test_the_step_does_not_depend_on_the_losers_loss_scale(name, case, scale):
    w, x = flat(case)
    assume(name == "orthogonal" or abs(numbers(w, x).cosine) > 1e-6)  # else the power of a cosine that is rounding noise
    expected = step(RULES[name], w, x)
    torch.testing.assert_close(step(RULES[name], w, scale * x), expected, rtol=1e-11, atol=1e-11 * max(1, norm([w])))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", [*SCALE_FREE, "sum", "pcgrad", "mgda"])
def test_of_all_rules_only_those_are_free_of_the_losers_loss_scale(name, scale):
    """The same through a float32 optimizer step: the weights move alike, or, with the other rules, do not."""
    moved = []
    for factor in (1.0, scale):
        (p,) = parameters([torch.zeros(3)])
        opt = PairedGradient(torch.optim.SGD([p], lr=1.0), RULES[name])
        x = torch.tensor([1.0, 0.5, 2.0])
        opt.step(lambda p=p: p @ torch.tensor([1.0, 2.0, -1.0]), lambda p=p, x=x, factor=factor: factor * (p @ x))
        moved.append(p.detach())
    assert torch.allclose(*moved, rtol=1e-6, atol=1e-6) == (name in SCALE_FREE)


@pytest.mark.parametrize("exponents", [(150, -150), (-150, 150), (150, 150), (-150, -150), (0, -150), (0, 150)])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_the_ends_of_the_range(name, exponents):
    """Gradients of 1e-150 against 1e150: the same direction as at scale one, and its norm from the numbers alone."""
    torch.manual_seed(0)
    w, x = torch.randn(2, 5, dtype=torch.float64)
    x = x if w @ x > 0 else -x
    k, m = (10.0**e for e in exponents)
    a, b = RULES[name](numbers(w, x))
    c, d = RULES[name](numbers(k * w, m * x))
    factor = 1.0 if name == "normalized" else k
    torch.testing.assert_close((c * (k * w) + d * (m * x)) / factor, a * w + b * x, rtol=1e-9, atol=1e-12)
    scaled, plain = numbers(k * w, m * x).norm(c, d), numbers(w, x).norm(a, b)
    assert scaled.item() / factor == pytest.approx(plain.item(), rel=1e-9)


@given(st.integers(-12, 12), st.floats(-0.99, 0.99))
def test_mgda_keeps_the_small_weight_exact(exponent, cosine):
    """1 - gamma formed by subtraction loses everything once one gradient is 1e8 times the other."""
    ww, ll = 1.0, 10.0 ** (2 * exponent)
    wl = cosine * ll**0.5
    a, b = mgda(Gram(*(torch.tensor(v, dtype=torch.float64) for v in (ww, wl, ll))))
    exact_w, exact_wl, exact_l = (Fraction(v) for v in (ww, wl, ll))
    whole = exact_w + 2 * exact_wl + exact_l
    gamma = min(max((exact_l + exact_wl) / whole, Fraction(0)), Fraction(1))
    assert a.item() == pytest.approx(float(gamma), rel=1e-9, abs=0)
    assert -b.item() == pytest.approx(float(1 - gamma), rel=1e-9, abs=0)


# ---- what is not finite, and the scopes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("name", RULES)
def test_non_finite_numbers_give_non_finite_coefficients(name, where, bad):
    numbers = [torch.ones(1, dtype=torch.float64) for _ in range(3)]
    numbers[where] = numbers[where] * bad
    a, b = RULES[name](Gram(*numbers))
    assert a.isnan().all() and b.isnan().all()


def test_watch_changes_nothing():
    a, b = watch(gram([torch.randn(4)], [torch.randn(4)]))
    assert a == 1 and b == 0


def test_unknown_scope():
    with pytest.raises(ValueError, match=r"'layer'; expected one of 'global', 'group', 'tensor'"):
        block_sizes("layer", [1])


# ---- rules of others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_unlearning_is_rectified_against_the_winner(seed):
    """GRU by its definition: the ascent on L_l, and where it would raise L_w its projection on what does not."""
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    ascent = -x
    along = ascent @ w
    wanted = ascent - torch.minimum(along, torch.zeros(())) / (w @ w) * w
    torch.testing.assert_close(step(projection.gru, w, x), wanted)
    if w @ x > 0:
        torch.testing.assert_close(
            torch.nn.functional.normalize(wanted, dim=0),
            torch.nn.functional.normalize(step(projection.interval(0.0), w, x), dim=0),
        )


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_priority_constrained_descent_is_that_of_torchjd(tau, seed):
    from torchjd.aggregation import PCD

    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(2, 9, generator=generator, dtype=torch.float64) * torch.tensor([[3.0], [0.2]], dtype=torch.float64)
    theirs = PCD(tau=tau, beta=0.0, eps=0.0)(torch.stack([w, -x]))
    torch.testing.assert_close(step(projection.pcd(tau), w, x), theirs, rtol=1e-8, atol=1e-9)


def test_norms_may_be_averaged_over_steps():
    """By hand: log N <- .9 log N + .1 log |g|."""
    rule, logs = projection.averaged(0.9), None
    generator = torch.Generator().manual_seed(0)
    for k in range(5):
        w, x = torch.randn(2, 9, generator=generator, dtype=torch.float64) * 10.0**k
        norms = torch.stack([w.norm(), x.norm()]).log()
        logs = norms if logs is None else 0.9 * logs + 0.1 * norms
        torch.testing.assert_close(step(rule, w, x), w / logs[0].exp() - x / logs[1].exp())
    torch.testing.assert_close(step(projection.averaged(0.0), w, x), step(normalized, w, x))


def test_averaged_norms_forget_nothing_for_a_zero_or_a_nan():
    one = torch.ones(1, dtype=torch.float64)
    rule = projection.averaged(0.5)
    rule(Gram(one, 0 * one, 4 * one))
    assert [x.item() for x in rule(Gram(one, 0 * one, 0 * one))] == [1.0, 0.0]
    assert rule(Gram(one * torch.nan, one, one))[0].isnan().all()
    assert [x.item() for x in rule(Gram(one, 0 * one, 4 * one))] == pytest.approx([1.0, -0.5])


@pytest.mark.parametrize("make", [lambda: projection.pcd(1.5), lambda: projection.averaged(1.0)])
def test_parameters_of_rules_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="expected a number from 0"):
        make()
