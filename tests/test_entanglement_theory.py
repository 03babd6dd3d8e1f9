"""Theorem 1, corollary 2 and theorem 3 of "gradient entanglement" on the models that they are stated for (SPEC 4.4)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt.diagnostics import entanglement, predicted, token_products
from ogdopt.gram import gram
from ogdopt.losses import Completion, Pairs, dpo
from ogdopt.per_pair import add_pair
from ogdopt.projection import interval, normalized, orthogonal, scaled
from tests.gradients import inner

D = torch.float64


def last_layer(seed, V, d, steps):
    """A learnable head W, (V, d), on frozen hidden states h, (steps, d)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(V, d, dtype=D, generator=g).requires_grad_(), torch.randn(steps, d, dtype=D, generator=g)


def uniform_on(W, h, M):
    """W moved so that the policy at `h` is uniform on the first M tokens and negligible elsewhere."""
    target = torch.where(torch.arange(len(W)) < M, 0.0, -700.0).to(D)
    with torch.no_grad():
        W += torch.outer(target - W @ h, h) / (h @ h)
    return W


@pytest.mark.parametrize("M", [2, 3, 5, 13])
@pytest.mark.parametrize("seed", range(3))
def test_theorem_1(M, seed):
    """Single tokens, uniform policy on M of them: <G_w, G_l> = -|h|^2/M and |G|^2 = (M-1)/M |h|^2, so Condition 1 holds."""
    W, h = last_layer(seed, 16, 5, 1)
    logps = (uniform_on(W, h[0], M) @ h[0]).log_softmax(-1)[:2]
    found = token_products(logps, [W])
    size = (h[0] @ h[0]).item()
    expected = [[(M - 1) / M * size, -size / M], [-size / M, (M - 1) / M * size]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=D), rtol=1e-10, atol=1e-12)
    ws, ls = (torch.autograd.grad(x, W, retain_graph=True) for x in logps)
    assert entanglement(gram(ws, ls))["entanglement/case"] == 1.0


@pytest.mark.parametrize("M", [2, 5])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("length", [2, 6, 12])
def test_corollary_2(M, seed, length):
    """Answers that differ in the last token alone: the last tokens' product is -|h_L|^2/M, whatever stands before.

    For the whole answers Condition 1 holds iff |X| <= |h_L|^2 with X = <sum over the prefix, (e_w - e_l) h_L^T>.
    """
    W, h = last_layer(seed, 16, 20, length)
    prefix = torch.randint(16, (length - 1,), generator=torch.Generator().manual_seed(seed))
    W = uniform_on(W, h[-1], M)
    logps = (h @ W.T).log_softmax(-1)
    shared = logps[torch.arange(length - 1), prefix]
    found = token_products(torch.cat([shared, logps[-1, :2]]), [W])
    size = (h[-1] @ h[-1]).item()
    assert found[-2, -1].item() == pytest.approx(-size / M, rel=1e-9)
    (before,) = torch.autograd.grad(shared.sum(), W, retain_graph=True)
    X = ((before[0] - before[1]) @ h[-1]).item()
    ws, ls = (torch.autograd.grad(shared.sum() + logps[-1, k], W, retain_graph=True) for k in (0, 1))
    numbers = gram(ws, ls)
    assert (numbers.ww - numbers.wl).item() == pytest.approx(size + X, rel=1e-9)
    assert (numbers.ll - numbers.wl).item() == pytest.approx(size - X, rel=1e-9)
    assert (entanglement(numbers)["entanglement/case"] == 1.0) == (abs(X) <= size)


def test_corollary_2_can_fail_for_answers_with_a_prefix():
    """Long prefixes violate the sentence's condition in some draws, never the token's (SPEC 4.4)."""
    failed = 0
    for seed in range(60):
        W, h = last_layer(seed, 16, 20, 12)
        logps = (h @ uniform_on(W, h[-1], 2).T).log_softmax(-1)
        prefix = torch.randint(16, (11,), generator=torch.Generator().manual_seed(seed))
        shared = logps[torch.arange(11), prefix].sum()
        ws, ls = (torch.autograd.grad(shared + logps[-1, k], W, retain_graph=True) for k in (0, 1))
        failed += entanglement(gram(ws, ls))["entanglement/case"] != 1.0
    assert 0 < failed < 60


class LearnableLogits:
    """Theorem 3's model: logits theta, (L, V), of a pair that has a prefix, one token that differs at m, and the same suffix.

    The rejected answer's suffix sees the same logits plus a fixed `offset` on the suffix's token: below 0, this one is likelier
    behind the chosen token and all others are less likely there, which is the theorem's assumption.
    """

    def __init__(self, seed, V=6, m=2, suffix=4, offset=-0.7):
        g = torch.Generator().manual_seed(seed)
        self.m, self.L = m, m + 1 + suffix
        self.theta = torch.randn(self.L, V, dtype=D, generator=g).requires_grad_()
        self.chosen = torch.randint(V, (self.L,), generator=g)
        self.rejected = self.chosen.clone()
        self.rejected[m] = (self.chosen[m] + 1) % V
        self.off = torch.zeros(self.L, V, dtype=D)
        self.off[torch.arange(m + 1, self.L), self.chosen[m + 1 :]] = offset

    def logps(self):
        rows = torch.arange(self.L)
        return self.theta.log_softmax(-1)[rows, self.chosen], (self.theta + self.off).log_softmax(-1)[rows, self.rejected]

    def probabilities(self):
        return self.theta.detach().softmax(-1), (self.theta + self.off).detach().softmax(-1)

    def changes(self):
        """First-order change of each token of the chosen answer in a DPO step, over step size and weight."""
        a, b = self.logps()
        products = token_products(torch.cat([a, b]), [self.theta])
        return products[: self.L, : self.L].sum(1) - products[: self.L, self.L :].sum(1)


@given(st.integers(0, 10_000), st.integers(0, 4), st.integers(0, 5))
def test_theorem_3(seed, m, suffix):
    """Formulas 12, 13 and 14: nothing moves before the token that differs, it rises itself, and all behind it fall."""
    model = LearnableLogits(seed, m=m, suffix=suffix)
    s_w, s_l = model.probabilities()
    found = model.changes()
    assert found[:m].abs().max().item() <= 1e-12 if m else True
    at = 1 - s_w[m, model.chosen[m]] + s_l[m, model.rejected[m]]
    assert found[m].item() == pytest.approx(at.item(), abs=1e-12) and at >= 0
    for i in range(m + 1, model.L):
        j = model.chosen[i]
        assert s_w[i, j] >= s_l[i, j]
        others = torch.arange(len(s_w[i])) != j
        change = (1 - s_w[i, j]) * (s_l[i, j] - s_w[i, j]) - (s_w[i] * (s_l[i] - s_w[i]))[others].sum()
        assert found[i].item() == pytest.approx(change.item(), abs=1e-12) and change <= 0


def test_theorem_3_in_a_step_of_dpo():
    """The token's changes in a step that is really taken, with the weight beta sigmoid(-beta d)."""
    model, lr, beta = LearnableLogits(3), 1e-6, 0.3
    whole = lambda logps: Completion(logps[None], torch.ones(1, model.L))  # noqa: E731
    a, b = model.logps()
    zero = torch.zeros(1, dtype=D)
    loss = dpo(Pairs(whole(a), whole(b), zero - 2, zero), beta=beta).sum()
    weight = beta * torch.sigmoid(-beta * (a.sum() - b.sum() + 2)).item()
    expected = model.changes()
    (slope,) = torch.autograd.grad(loss, model.theta)
    with torch.no_grad():
        model.theta -= lr * slope
    moved = (model.logps()[0] - a).detach() / (lr * weight)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


def test_the_longer_the_suffix_the_less_the_chosen_answer_gains():
    """Theorem 3 summed: each further token of a suffix takes away, until the chosen answer falls (SPEC 4.4)."""
    totals = LearnableLogits(0, m=0, suffix=80).changes().cumsum(0)
    assert (totals.diff() < 0).all() and totals[0] > 0 > totals[-1]


def test_tokens_that_differ_need_not_conflict():
    """The product at the token that differs is -s_w - s_l + sum s^2: positive where a third token is nearly certain, though its
    own change is still upwards (the caution of SPEC 4.4)."""
    theta = torch.tensor([0.01, 0.01, 0.98], dtype=D).log().requires_grad_()
    found = token_products(theta.log_softmax(-1)[:2], [theta])
    assert found[0, 1].item() == pytest.approx(-0.02 + 0.0001 * 2 + 0.98**2)
    assert found[0, 0] > found[0, 1] > 0


ONE = torch.ones((), dtype=D)


def pair_of(seed):
    """One pair's closures on shared parameters, and their gradients."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.nn.Parameter(torch.randn(6, dtype=D, generator=g))
    mix = torch.randn(2, 6, dtype=D, generator=g) + torch.ones(6, dtype=D)
    losses = [lambda row=row: (row * theta).sum() + (theta**2).sum() / 9 for row in mix]
    return theta, losses, [torch.autograd.grad(f(), theta)[0] for f in losses]


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_the_interval_of_ratios_is_where_both_conditions_hold(seed, t):
    """SPEC 4.8: for wl > 0 both hold exactly for d_w/d_l in [wl/ww, ll/wl]; OGD is the upper end, NPO the geometric mean."""
    _, _, (w, l) = pair_of(seed)
    numbers = gram([w], [l])
    ww, wl, ll = (x.item() for x in numbers[:3])
    if wl <= 1e-6 * (ww * ll) ** 0.5 or 1 - wl * wl / (ww * ll) < 1e-6:
        return
    low, high = wl / ww, ll / wl
    inside, outside = low * (high / low) ** (0.01 + 0.98 * t), [low * 0.99, high * 1.01]
    assert entanglement(numbers, inside, 1.0)["entanglement/case"] == 1.0
    assert [entanglement(numbers, r, 1.0)["entanglement/case"] for r in outside] == [2.0, 3.0]
    for rule, ratio in ((orthogonal, high), (normalized, (low * high) ** 0.5), (interval(t), low * (high / low) ** t)):
        a, b = (x.item() for x in rule(numbers))
        assert a / -b == pytest.approx(ratio, rel=1e-9)


@given(st.integers(0, 10_000))
def test_normalized_steps_keep_both_conditions_for_every_pair(seed):
    """Per pair, each with a weight of its own: the chosen rises and the rejected falls."""
    theta, losses, (w, l) = pair_of(seed)
    theta.grad = torch.full_like(theta, 0.5)
    numbers = add_pair([theta], *losses, scaled(normalized, 0.25), share=0.5)
    u = 0.125 * (w / w.norm() - l / l.norm())
    torch.testing.assert_close(theta.grad, u + 0.5)
    assert inner([u], [w]) >= 0 >= inner([u], [l])
    da, db = predicted(numbers, 1 / w.norm().item(), 1 / l.norm().item())
    assert (da, -db) == pytest.approx((inner([u], [w]) * 8, inner([u], [l]) * -8), rel=1e-6, abs=1e-9)


def test_pairs_are_mixed_one_by_one_and_not_their_mean():
    """Two pairs: the sum of each one's own mixture, which the mixture of the sums is not."""
    g = torch.Generator().manual_seed(0)
    theta, rest = torch.nn.Parameter(torch.randn(4, dtype=D, generator=g)), torch.randn(2, 2, 4, dtype=D, generator=g)
    unused = torch.nn.Parameter(torch.zeros(2, dtype=D))
    for k in range(2):
        add_pair([theta, unused], lambda k=k: rest[k, 0] @ theta, lambda k=k: rest[k, 1] @ theta, normalized, 0.5)
    each = [w / w.norm() - l / l.norm() for w, l in rest]
    torch.testing.assert_close(theta.grad, (each[0] + each[1]) / 2)
    assert unused.grad is None
    w, l = rest.mean(0)
    assert not torch.allclose(theta.grad, w / w.norm() - l / l.norm(), atol=1e-3)


def test_a_parameter_of_the_loser_alone():
    theta, other = (torch.nn.Parameter(torch.tensor([x], dtype=D)) for x in (3.0, 2.0))
    add_pair([theta, other], lambda: theta.sum(), lambda: (other**2).sum(), normalized)
    assert (theta.grad.item(), other.grad.item()) == pytest.approx((1.0, -1.0))
