"""Several constraints at once: the projection on a cone against its optimality conditions, a QP library and TorchJD."""

import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt.cone import Grams, nearest, priority
from ogdopt.gram import Gram
from ogdopt.projection import orthogonal


def grams(vectors, signs):
    """Of vectors (n, d), the winner first, as one block."""
    return Grams((vectors @ vectors.T)[None], tuple(signs))


KINDS = ("free", "free", "zero", "as the winner", "against it", "as another", "against another", "near")


@st.composite
def cases(draw, most=8, scales=(-30, 30), kinds=KINDS):
    """(winner and others (K + 1, d) float64, signs): independent, dependent, parallel, opposed and zero ones, any scale."""
    count = draw(st.integers(1, most))
    size = draw(st.sampled_from([2, 3, 5, 12, 40]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    vectors = torch.randn(count + 1, size, generator=generator, dtype=torch.float64)
    for k in range(1, count + 1):
        kind = draw(st.sampled_from(kinds))
        other = vectors[draw(st.integers(0, k - 1))]
        free = vectors[k].clone()
        vectors[k] = {
            "free": free,
            "zero": 0 * free,
            "as the winner": 2 * vectors[0],
            "against it": -vectors[0],
            "as another": 0.5 * other,
            "against another": -other,
            "near": other + 1e-4 * free,
        }[kind]
    vectors *= torch.tensor([10.0 ** draw(st.integers(*scales)) for _ in range(count + 1)], dtype=torch.float64)[:, None]
    return vectors, [draw(st.sampled_from([-1, 1])) for _ in range(count)]


def unit(v):
    n = v.norm()
    return v / n if n > 0 else v


@given(cases())
def test_the_solution_keeps_every_constraint_and_is_the_nearest(case):
    """The Karush-Kuhn-Tucker conditions, each relative to the vectors that it is about."""
    vectors, signs = case
    c = nearest(grams(vectors, signs))[0]
    w = unit(vectors[0])
    others = torch.stack([s * unit(v) for s, v in zip(signs, vectors[1:])])
    if c[0] == 0:
        assert (c == 0).all()
        mu = None
    else:
        assert c[0] == 1
        mu = torch.tensor(
            [s * x * v.norm() / vectors[0].norm() for s, x, v in zip(signs, c[1:], vectors[1:])], dtype=torch.float64
        )
        assert (mu >= 0).all()  # dual feasible
        u = w + mu @ others
        slack = 1e-13 * (1 + mu.sum().item()) + (1e-6 if mu.max() > 1e5 else 0.0)
        reached = others @ u
        assert (reached >= -slack).all()  # primal feasible
        assert ((mu * reached).abs() <= 2 * slack * (1 + mu)).all()  # complementary
        assert u @ w == pytest.approx((u @ u).item(), abs=slack * (1 + mu.sum().item()))  # the winner's loss falls by |u|^2
    reference = quadratic(w, others)
    ours = torch.zeros_like(w) if mu is None else w + mu @ others
    assert (ours - w).norm() <= (reference - w).norm() + 1e-6
    assert (ours - reference).norm() < 2e-5


def quadratic(w, others):
    """The same by a quadratic programming library, in the variables themselves."""
    import qpsolvers

    n = len(w)
    found = qpsolvers.solve_qp(
        numpy.eye(n), -w.numpy(), -others.numpy(), numpy.zeros(len(others)), solver="quadprog", initvals=numpy.zeros(n)
    )
    return torch.zeros_like(w) if found is None else torch.from_numpy(found)


@given(cases(kinds=("free", "as the winner", "zero")))
def test_torchjds_projection_on_the_dual_cone_says_the_same(case):
    """DualProj with preference (1, 0, ...) over the winner's gradient and the constraints."""
    from torchjd.aggregation import DualProj
    from torchjd.linalg import QuadprogProjector

    vectors, signs = case
    rows = torch.stack([unit(vectors[0]), *[s * unit(v) for s, v in zip(signs, vectors[1:])]])
    projector = QuadprogProjector(reg_eps=1e-10)  # by default 1e-4
    theirs = DualProj(torch.eye(len(rows), dtype=torch.float64)[0], projector)(rows)
    c = nearest(grams(rows, [1] * len(signs)))[0]
    assert (c @ rows - theirs).norm() < 1e-3


@given(cases(most=1))
def test_one_loser_is_orthogonal_gradient_descent(case):
    vectors, _ = case
    g = vectors @ vectors.T
    (a,), (b,) = orthogonal(Gram(g[0, 0][None], g[0, 1][None], g[1, 1][None]))
    c = nearest(grams(vectors, [-1]))[0]
    assert c.tolist() == pytest.approx([a.item(), b.item()], rel=1e-9, abs=0)


@given(cases(kinds=("free", "as another")), st.sampled_from([0.0, 0.02, 0.3]))
def test_priority_constrained_descent_is_that_of_torchjd(case, tau):
    from torchjd.aggregation import PCD

    vectors, signs = case
    rows = torch.stack([unit(vectors[0]), *[s * unit(v) for s, v in zip(signs, vectors[1:])]])
    theirs = PCD(tau=tau, beta=0.0, eps=0.0)(rows)
    c = priority(grams(rows, [1] * len(signs)), tau)[0]
    direct = nearest(grams(rows, [1] * len(signs)), tau)[0]
    if 1e-3 < (direct @ rows).norm() < 1e3:  # else both divide noise
        assert (c @ rows - theirs).norm() < 1e-5
        assert ((rows[1:] @ (direct @ rows)) >= tau - 1e-9).all() or (direct[1:] == 0).all()


def test_projections_in_turn_break_what_the_joint_one_keeps():
    """Three half-spaces in the plane and in space: PCGrad's way ends outside of the first, in either order."""
    w = torch.tensor([1.0, 0.2, 0.1], dtype=torch.float64)
    kept = torch.tensor([[-1.0, 1.5, 0.0], [-0.2, -1.0, 0.4]], dtype=torch.float64)
    for order in ((0, 1), (1, 0)):
        u = w.clone()
        for k in order:
            inner = u @ kept[k]
            if inner < 0:
                u = u - inner / (kept[k] @ kept[k]) * kept[k]
        assert (kept @ u).min() < -0.05
    c = nearest(grams(torch.cat([w[None], kept]), [1, 1]))[0]
    u = c @ torch.cat([w[None], kept])
    assert (kept @ u >= -1e-15).all() and u @ w > 0


@given(cases(), st.lists(st.integers(-60, 60), min_size=9, max_size=9))
def test_the_direction_does_not_depend_on_how_gradients_are_scaled(case, powers):
    vectors, signs = case
    c = nearest(grams(vectors, signs))[0]
    factors = torch.tensor([2.0**k for k in powers[: len(vectors)]], dtype=torch.float64)
    d = nearest(grams(vectors * factors[:, None], signs))[0]
    assert (c[0] == 0) == (d[0] == 0)
    scaled = d * factors / factors[0]
    torch.testing.assert_close(
        scaled * vectors.norm(dim=1), c * vectors.norm(dim=1), rtol=1e-6, atol=1e-6 * vectors[0].norm().item()
    )


def test_blocks_are_solved_each_for_itself():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, 4, 7, generator=generator, dtype=torch.float64)
    together = nearest(Grams(vectors @ vectors.mT, (-1, 1, 1)))
    for v, c in zip(vectors, together):
        torch.testing.assert_close(nearest(grams(v, (-1, 1, 1)))[0], c, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan_in_its_block_alone(value):
    g = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    g[1, 0, 2] = value
    c = nearest(Grams(g, (-1, 1)))
    assert c[0].tolist() == [1.0, 0.0, 0.0] and c[1].isnan().all()


def test_a_winner_along_a_loser_stands_still():
    v = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    assert nearest(grams(v, (-1, 1)))[0].tolist() == [0.0, 0.0, 0.0]  # <u, g_l> <= 0 leaves nothing of g_w in this half-plane


@pytest.mark.parametrize(
    ("others", "progress", "message"),
    [
        (9, 0.0, "9 gradients are to be respected; expected at most 8"),
        (2, 1.5, "progress is 1.5"),
        (2, [0.1], "one for each of 2"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(others, progress, message):
    g = torch.eye(others + 1, dtype=torch.float64)[None]
    with pytest.raises(ValueError, match=message):
        nearest(Grams(g, (1,) * others), progress)
