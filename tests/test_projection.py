"""The rule's properties (SPEC 1.1, 1.2, 1.8, 1.11, 1.12) as pure maths on the Gram numbers and on gradients."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ogdopt.gram import Gram, gram
from ogdopt.projection import block_sizes, orthogonal, watch
from tests.gradients import EPS, inner, norm, pairs


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("rule", [orthogonal, watch])
def test_non_finite_numbers_give_non_finite_coefficients(rule, where, bad):
    numbers = [torch.ones(1, dtype=torch.float64) for _ in range(3)]
    numbers[where] = numbers[where] * bad
    a, b = rule(Gram(*numbers))
    assert a.isnan().all() and b.isnan().all()


def test_watch_changes_nothing():
    a, b = watch(gram([torch.randn(4)], [torch.randn(4)]))
    assert a == 1 and b == 0


def test_unknown_scope():
    with pytest.raises(ValueError, match=r"'layer'; expected one of 'global', 'group', 'tensor'"):
        block_sizes("layer", [1])
