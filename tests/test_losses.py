"""Losses: hand-derived values and gradients, masks, dtypes, saturation, and the errors."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ogdopt import losses
from ogdopt.losses import LOSSES, Completion, Pairs, dpo, kto, kto_unpaired, nll, sparse


def completion(logps, mask=None):
    logps = torch.as_tensor(logps, dtype=torch.float64)
    return Completion(logps, torch.ones_like(logps) if mask is None else torch.as_tensor(mask))


def pair(a, b, A=0.0, B=0.0):
    one = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
    return Pairs(completion([[a]]), completion([[b]]), one(A), one(B))


def test_masked_tokens_do_not_count_even_where_they_are_infinite():
    c = completion([[-1.0, -2.0, float("-inf")]], [[1, 1, 0]])
    assert c.logp.item() == -3.0 and c.length.item() == 2
    assert nll(c).item() == 3.0 and nll(c, "mean").item() == 1.5


def test_an_empty_completion_costs_nothing():
    c = completion([[-1.0]], [[0]])
    assert nll(c).item() == 0.0 and nll(c, "mean").item() == 0.0


def test_sums_are_float32_at_least():
    """A bfloat16 sum of 4096 log-probs of -1 would stop at -256."""
    c = Completion(torch.full((1, 4096), -1.0, dtype=torch.bfloat16), torch.ones(1, 4096))
    assert c.logp.item() == -4096.0


def test_dpo_by_hand():
    """beta = 0.5, a - A = 2, b - B = -1: the margin is 1.5 and the loss log(1 + e^-1.5)."""
    assert dpo(pair(-1.0, -4.0, -3.0, -3.0), beta=0.5).item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-12)


def softplus(x):
    return math.log1p(math.exp(x))


# a = -3 in 2 tokens and b = -5 in 4: a - A = 1, b - B = -2, d = 3, a/n_w = -1.5, b/n_l = -1.25.
BY_HAND = [
    ("dpo", dict(beta=0.5), softplus(-1.5)),
    ("cdpo", dict(beta=0.5, label_smoothing=0.25), softplus(-1.5) + 0.25 * 1.5),
    ("robust_dpo", dict(beta=0.5, label_smoothing=0.25), softplus(-1.5) - 0.5 * 1.5),
    ("r_dpo", dict(beta=0.5, alpha=0.25), softplus(-(1.5 - 0.5))),
    ("flex_dpo", dict(beta_chosen=0.5, beta_rejected=0.25), softplus(-(0.5 + 0.5))),
    ("sft_dpo", dict(beta=0.5, gamma=0.5), softplus(-1.5) + 1.5),
    ("sft_dpo", dict(beta=0.5, gamma=0.5, nll_reduction="mean"), softplus(-1.5) + 0.75),
    ("dpop", dict(beta=0.5, dpop_lambda=2.0), softplus(-1.5)),
    ("dpop", dict(beta=0.5, dpop_lambda=2.0, A=-2.0), softplus(-0.5 * (1 - 2))),
    ("ipo", dict(beta=0.5), (3 - 1) ** 2),
    ("ipo", dict(beta=0.25, average_log_prob=True), (0.5 + 0.5 - 2) ** 2),
    ("sppo", dict(beta=0.25), (1 - 2) ** 2 + (-2 + 2) ** 2),
    ("kto", dict(beta=0.5, z_ref=1.0), 0.5 + 1 / (1 + math.exp(1.5))),
    ("kto", dict(beta=0.5, z_ref=1.0, desirable_weight=2.0, undesirable_weight=3.0), 1 + 3 / (1 + math.exp(1.5))),
    ("kto", dict(beta=0.5), 1 / (1 + math.exp(0.5)) + 1 / (1 + math.exp(1.0))),  # the mean log-ratio is below 0
    ("kto", dict(beta=0.5, A=-9.0), 1 / (1 + math.exp(2.0)) + 1 / (1 + math.exp(2.0))),  # it is (6 - 2)/2
    ("simpo", dict(beta=2.0, simpo_gamma=0.5), softplus(0.5 + 0.5)),
    ("cpo", dict(beta=0.5), softplus(-1.0) + 3),
    ("cpo", dict(beta=0.5, cpo_alpha=2.0, nll_reduction="mean"), softplus(-1.0) + 3),
    ("bradley_terry", {}, softplus(-2.0)),
    ("rrhf", dict(nll_weight=0.5), 0.25 + 1.5),
    ("rrhf", dict(nll_reduction="mean"), 0.25 + 1.5),
    ("slic_hf", dict(delta=1.0), 0.3),
    ("slic_hf", dict(delta=5.0, nll_weight=0.5), 3 + 1.5),
    ("orpo", dict(beta=0.5), 1.5 + 0.5 * math.log1p((math.exp(1.5) - 1) / (math.exp(1.25) - 1))),
]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_values_by_hand(name, options, expected):
    one = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
    options = dict(options)
    chosen, rejected = completion([[-1.0, -2.0, -8.0]], [[1, 1, 0]]), completion([[-1.0, -1.0, -1.0, -2.0]])
    pairs = Pairs(chosen, rejected, one(options.pop("A", -4.0)), one(-3.0))
    assert LOSSES[name](pairs, **options).item() == pytest.approx(expected, abs=1e-12)


def test_every_loss_has_a_value_by_hand_and_a_closed_form():
    assert {name for name, _, _ in BY_HAND} == set(LOSSES) == set(CLOSED)


def sigmoid(x):
    return torch.sigmoid(torch.tensor(float(x), dtype=torch.float64)).item()


def closed_dpop(v):
    below = v.a < v.A
    s = 0.3 * sigmoid(-0.3 * (v.d - 2 * max(0.0, v.A - v.a)))
    return s * (1 + 2 * below), s


def closed_orpo(v):
    p, q = math.exp(v.a / v.n), math.exp(v.b / v.m)
    s = 0.3 * sigmoid(-(math.log(p / (1 - p)) - math.log(q / (1 - q))))
    return (1 + s / (1 - p)) / v.n, s / (1 - q) / v.m


def same(x):
    return x, x


# Hyper-parameters and (d_w, d_l) as a function of `Numbers`.
CLOSED = {
    "bradley_terry": ({}, lambda v: same(sigmoid(v.b - v.a))),
    "dpo": (dict(beta=0.3), lambda v: same(0.3 * sigmoid(-0.3 * v.d))),
    "cdpo": (dict(beta=0.3, label_smoothing=0.2), lambda v: same(0.3 * (sigmoid(-0.3 * v.d) - 0.2))),
    "robust_dpo": (dict(beta=0.3, label_smoothing=0.2), lambda v: same(0.3 * (sigmoid(-0.3 * v.d) + 0.2 / 0.6))),
    "r_dpo": (dict(beta=0.3, alpha=0.2), lambda v: same(0.3 * sigmoid(-0.3 * v.d - 0.2 * (v.n - v.m)))),
    "flex_dpo": (
        dict(beta_chosen=0.3, beta_rejected=0.1),
        lambda v: tuple(beta * sigmoid(-(0.3 * (v.a - v.A) - 0.1 * (v.b - v.B))) for beta in (0.3, 0.1)),
    ),
    "sft_dpo": (dict(beta=0.3, gamma=0.2), lambda v: (0.3 * sigmoid(-0.3 * v.d) + 0.2, 0.3 * sigmoid(-0.3 * v.d))),
    "dpop": (dict(beta=0.3, dpop_lambda=2.0), closed_dpop),
    "ipo": (dict(beta=0.3), lambda v: same(-2 * (v.d - 1 / 0.6))),
    "sppo": (dict(beta=0.3), lambda v: (1 / 0.3 - 2 * (v.a - v.A), 1 / 0.3 + 2 * (v.b - v.B))),
    "kto": (
        dict(beta=0.3, z_ref=0.7, desirable_weight=1.5, undesirable_weight=0.5),
        lambda v: tuple(
            weight * 0.3 * sigmoid(x) * sigmoid(-x)
            for weight, x in ((1.5, 0.3 * (v.a - v.A - 0.7)), (0.5, 0.3 * (0.7 - (v.b - v.B))))
        ),
    ),
    "simpo": (
        dict(beta=0.3, simpo_gamma=0.4),
        lambda v: tuple(0.3 / k * sigmoid(0.4 - 0.3 * v.a / v.n + 0.3 * v.b / v.m) for k in (v.n, v.m)),
    ),
    "cpo": (
        dict(beta=0.3, cpo_alpha=0.7),
        lambda v: (0.3 * sigmoid(-0.3 * (v.a - v.b)) + 0.7, 0.3 * sigmoid(-0.3 * (v.a - v.b))),
    ),
    "rrhf": (
        dict(nll_weight=0.7),
        lambda v: ((v.b / v.m > v.a / v.n) / v.n + 0.7, (v.b / v.m > v.a / v.n) / v.m),
    ),
    "slic_hf": (dict(delta=2.0, nll_weight=0.7), lambda v: ((v.a - v.b < 2) + 0.7, float(v.a - v.b < 2))),
    "orpo": (dict(beta=0.3), closed_orpo),
}


class Numbers:
    """Random log-probabilities of a pair under the policy and its reference, n = n_w and m = n_l tokens."""

    def __init__(self, a, b, A, B, n, m):
        self.a, self.b, self.A, self.B, self.n, self.m = a, b, A, B, n, m
        self.d = (a - A) - (b - B)


NUMBERS = st.builds(Numbers, *[st.floats(-30, -0.01)] * 4, *[st.integers(1, 6)] * 2)


def slopes(loss, pairs, **options):
    """(-dL/da, dL/db) by autograd in every token's log-probability: each token of a completion has the same slope."""
    tokens = [c.logps.clone().requires_grad_() for c in pairs[:2]]
    moved = pairs._replace(**{k: c._replace(logps=t) for k, c, t in zip(("chosen", "rejected"), pairs[:2], tokens)})
    grads = torch.autograd.grad(loss(moved, **options).sum(), tokens, allow_unused=True, materialize_grads=True)
    for c, g in zip(pairs[:2], grads):
        torch.testing.assert_close(g, torch.where(c.mask.bool(), g[:, :1], 0.0))
    return -grads[0][:, 0], grads[1][:, 0]


def of(v):
    one = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
    return Pairs(completion([[v.a / v.n] * v.n]), completion([[v.b / v.m] * v.m]), one(v.A), one(v.B))


@pytest.mark.parametrize("name", LOSSES)
@given(NUMBERS)
def test_slopes_are_the_closed_forms(name, v):
    """Table 2 of "gradient entanglement", and the further losses' own."""
    assume(min(abs(v.a - v.A), abs(v.a / v.n - v.b / v.m), abs(v.a - v.b - 2)) > 1e-9)  # no kink
    options, closed = CLOSED[name]
    d_w, d_l = slopes(LOSSES[name], of(v), **options)
    assert (d_w.item(), d_l.item()) == pytest.approx(closed(v), rel=1e-7, abs=1e-12)


@given(NUMBERS)
def test_averaged_ipo_has_the_slopes_of_table_2(v):
    t = -2 * ((v.a - v.A) / v.n - (v.b - v.B) / v.m - 1 / 0.6)
    d_w, d_l = slopes(LOSSES["ipo"], of(v), beta=0.3, average_log_prob=True)
    assert (d_w.item(), d_l.item()) == pytest.approx((t / v.n, t / v.m), rel=1e-9, abs=1e-12)


def random_pairs(B=16, dtype=torch.float32, seed=0):
    """Completions of 1 to 6 tokens in rows of 6."""
    g = torch.Generator().manual_seed(seed)
    side = lambda: Completion(  # noqa: E731
        (-3 * torch.rand(B, 6, generator=g)).to(dtype), torch.arange(6) < torch.randint(1, 7, (B, 1), generator=g)
    )
    return Pairs(side(), side(), -9 * torch.rand(B, generator=g), -9 * torch.rand(B, generator=g))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_the_table_with_its_defaults_is_finite_and_points_the_right_way(name, dtype):
    """Only the losses with a target can push a winner down or a loser up; all others never do."""
    pairs = random_pairs(dtype=dtype)
    values = LOSSES[name](pairs)
    assert values.shape == (16,) and values.isfinite().all()
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    d_w, d_l = slopes(LOSSES[name], pairs)
    assert d_w.isfinite().all() and d_l.isfinite().all() and d_w.max() > 0 and d_l.max() > 0
    if name not in ("cdpo", "ipo", "sppo"):
        assert d_w.min() >= 0 and d_l.min() >= 0


@pytest.mark.parametrize(("name", "beyond"), [("cdpo", 22.0), ("ipo", 5.1), ("sppo", 1000.2)])
def test_losses_with_a_target_turn_around_behind_it(name, beyond):
    """The targets with the defaults: 10 log 9 = 21.97 in d, 5 in d, 500 in each of a - A and B - b."""
    for margin, sign in ((beyond, -1), (beyond - 0.4, 1)):
        half = margin / 2
        d_w, d_l = slopes(LOSSES[name], pair(-1000.0, -1000 - half, -1000 - half, -1000.0))
        assert (d_w.sign().item(), d_l.sign().item()) == (sign, sign)


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_flag_says_who_raises_without_one(name):
    pairs = random_pairs()
    for missing in ({"ref_chosen": None}, {"ref_rejected": None}, {"ref_chosen": None, "ref_rejected": None}):
        if LOSSES[name].reference:
            with pytest.raises(ValueError, match="ref_chosen or ref_rejected is None"):
                LOSSES[name](pairs._replace(**missing))
        else:
            assert torch.equal(LOSSES[name](pairs._replace(**missing)), LOSSES[name](pairs))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("a", "b"), [(0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4), (0.0, 0.0)])
def test_saturated_margins_stay_finite(name, a, b):
    pairs = Pairs(Completion(torch.tensor([[a]]), torch.ones(1, 1)), Completion(torch.tensor([[b]]), torch.ones(1, 1)))
    pairs = pairs._replace(ref_chosen=torch.zeros(1), ref_rejected=torch.zeros(1))
    assert LOSSES[name](pairs).isfinite().all()
    assert all(d.isfinite().all() for d in slopes(LOSSES[name], pairs))


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_a_saturated_dpo_is_a_hinge(margin):
    assert dpo(pair(margin, 0.0), beta=1.0).item() == pytest.approx(max(0.0, -margin))


@pytest.mark.parametrize("logp", [-1e-3, -1e-6, -1e-12, 0.0])
def test_orpo_keeps_pushing_a_rejected_answer_that_is_all_but_certain(logp):
    """The slope is beta sigmoid(-o) / (1 - p_l) with sigmoid(-o) = 1, at 0 that of the next number below."""
    _, d_l = slopes(LOSSES["orpo"], pair(-20.0, logp), beta=0.1)
    assert d_l.item() == pytest.approx(0.1 / -math.expm1(min(logp, -(2.0**-52))), rel=1e-6)


IDENTITIES = [
    ("cdpo", dict(label_smoothing=0.0)),
    ("robust_dpo", dict(label_smoothing=0.0)),
    ("r_dpo", dict(alpha=0.0)),
    ("sft_dpo", dict(gamma=0.0)),
    ("dpop", dict(dpop_lambda=0.0)),
]


@pytest.mark.parametrize(("name", "options"), IDENTITIES)
def test_losses_that_become_dpo(name, options):
    pairs = random_pairs(dtype=torch.float64)
    torch.testing.assert_close(LOSSES[name](pairs, beta=0.3, **options), dpo(pairs, beta=0.3))


def test_flex_dpo_with_equal_betas_is_dpo():
    pairs = random_pairs(dtype=torch.float64)
    torch.testing.assert_close(LOSSES["flex_dpo"](pairs, beta_chosen=0.3, beta_rejected=0.3), dpo(pairs, beta=0.3))


def test_cpo_without_its_likelihood_term_is_dpo_against_a_reference_of_zero():
    pairs = random_pairs(dtype=torch.float64)
    zero = pairs._replace(ref_chosen=torch.zeros(16), ref_rejected=torch.zeros(16))
    torch.testing.assert_close(LOSSES["cpo"](pairs, beta=0.3, cpo_alpha=0.0), dpo(zero, beta=0.3))


def test_simpo_of_one_token_is_cpo_with_a_shifted_margin():
    torch.testing.assert_close(
        LOSSES["simpo"](pair(-1.0, -4.0), beta=0.5, simpo_gamma=0.5), LOSSES["cpo"](pair(-1.0, -3.0), beta=0.5, cpo_alpha=0.0)
    )


def test_ipo_is_smallest_at_its_margin():
    at = pair(-3.0, -5.0, -4.0, -3.0)  # d = 3 = 1/(2 beta)
    assert LOSSES["ipo"](at, beta=1 / 6).item() == pytest.approx(0.0, abs=1e-24)
    assert [abs(d.item()) for d in slopes(LOSSES["ipo"], at, beta=1 / 6)] == pytest.approx([0.0, 0.0], abs=1e-12)


@given(NUMBERS, st.floats(0.0, 0.45))
def test_robust_dpo_is_unbiased_and_cdpo_is_the_expected_loss_of_flipped_labels(v, rate):
    kept = of(v)
    flipped = Pairs(kept.rejected, kept.chosen, kept.ref_rejected, kept.ref_chosen)
    mean = lambda loss, **options: ((1 - rate) * loss(kept, **options) + rate * loss(flipped, **options)).item()  # noqa: E731
    assert mean(LOSSES["robust_dpo"], label_smoothing=rate) == pytest.approx(dpo(kept).item(), rel=1e-9, abs=1e-9)
    assert LOSSES["cdpo"](kept, label_smoothing=rate).item() == pytest.approx(mean(dpo), rel=1e-12)


@pytest.mark.parametrize("name", ["cdpo", "robust_dpo"])
@pytest.mark.parametrize("rate", [-0.1, 0.5, float("nan")])
def test_rates_of_flipped_labels_are_checked(name, rate):
    with pytest.raises(ValueError, match=r"label_smoothing is .*; expected the rate of flipped labels, 0 <= rate < 0\.5"):
        LOSSES[name](random_pairs(), label_smoothing=rate)


def test_kto_of_pairs_is_kto_of_both_completions():
    pairs = random_pairs(dtype=torch.float64)
    options = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, z_ref=torch.tensor(0.7))
    both = Completion(*(torch.cat(x) for x in zip(pairs.chosen, pairs.rejected)))
    parts = kto_unpaired(both, torch.cat(pairs[2:]), torch.arange(32) < 16, **options)
    torch.testing.assert_close(parts[:16] + parts[16:], kto(pairs, **options))


def test_unpaired_kto_estimates_the_divergence_without_gradient():
    """Log-ratios 3 and 1: z = 2, so the winner is at sigmoid(-1) and the loser, below z, as well; clamped at 0 if below."""
    logps = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    ref, desirable = torch.tensor([-4.0, -2.0]), torch.tensor([True, False])
    values = kto_unpaired(Completion(logps, torch.ones(2, 1)), ref, desirable, beta=1.0)
    assert values.tolist() == pytest.approx([sigmoid(-1)] * 2, abs=1e-12)
    (grad,) = torch.autograd.grad(values.sum(), logps)
    assert grad.flatten().tolist() == pytest.approx([-sigmoid(1) * sigmoid(-1), sigmoid(1) * sigmoid(-1)], abs=1e-12)
    low = kto_unpaired(Completion(logps, torch.ones(2, 1)), torch.tensor([3.0, 2.0]), desirable, beta=1.0)
    assert low.tolist() == pytest.approx([sigmoid(4), sigmoid(-3)], abs=1e-12)
    z_ref = torch.tensor(2.0, requires_grad=True)
    assert not kto(pair(-1.0, -2.0), z_ref=z_ref).requires_grad
    assert not kto_unpaired(completion([[-1.0]]), ref[:1], desirable[:1], z_ref=z_ref).requires_grad


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'token'; expected 'sum' or 'mean'"):
        losses.nll(completion([[0.0]]), "token")


def with_tokens(seed=0, B=3, T=5):
    """Pairs, the reference's view of the same tokens, and a significance of each token, all with float64 tokens."""
    g = torch.Generator().manual_seed(seed)
    masks = [torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g) for _ in range(2)]
    tokens = [-3 * torch.rand(2, B, T, dtype=torch.float64, generator=g) for _ in range(2)]
    ours, theirs = (Pairs(*(Completion(x, m) for x, m in zip(t, masks))) for t in tokens)
    w = torch.randn(2, B, T, dtype=torch.float64, generator=g)
    return ours, theirs, (w[0], w[1])


def test_sparse_with_all_tokens_on_is_dpo_and_with_all_off_is_nothing():
    ours, theirs, (w, _) = with_tokens()
    reference = dict(ref_chosen=theirs.chosen.logp, ref_rejected=theirs.rejected.logp)
    on, off = ((torch.full_like(w, x),) * 2 for x in (9.0, -9.0))
    torch.testing.assert_close(sparse(ours, theirs, on, beta=0.3, l1=0.0), dpo(ours._replace(**reference), beta=0.3))
    assert sparse(ours, theirs, off, l1=0.0).tolist() == pytest.approx([math.log(2)] * 3)


def test_sparse_by_hand():
    """Steepness 2: on(0.5 log 3) = 3/4 and on(-0.5 log 3) = 1/4; the chosen's log-ratios are 1 and 2, the rejected's -4; the
    margin is 3/4 + 2/4 + 3 = 4.25 and |w| adds up to 3 * 0.5 log 3; the masked token counts in neither."""
    x = math.log(3) / 2
    ours = Pairs(completion([[-1.0, -1.0, -8.0]], [[1, 1, 0]]), completion([[-5.0]]))
    theirs = Pairs(completion([[-2.0, -3.0, 0.0]], [[1, 1, 0]]), completion([[-1.0]]))
    w = (torch.tensor([[x, -x, 9.0]], dtype=torch.float64), torch.tensor([[x]], dtype=torch.float64))
    found = sparse(ours, theirs, w, beta=0.5, steepness=2.0, l1=0.1)
    assert found.item() == pytest.approx(softplus(-0.5 * 4.25) + 0.1 * 3 * x)


def test_sparse_on_the_tokens_that_differ_is_dpo_on_these():
    """Shared tokens with equal log-ratios contribute nothing either way."""
    ours, theirs, _ = with_tokens(B=1)
    mask = torch.ones(1, 5)
    ours = Pairs(*(c._replace(mask=mask) for c in ours[:2]))
    theirs = Pairs(*(c._replace(mask=mask) for c in theirs[:2]))
    for made in (ours, theirs):
        made.rejected.logps[:, :3] = made.chosen.logps[:, :3]
    some = torch.tensor([[-9.0, -9.0, -9.0, 9.0, 9.0]], dtype=torch.float64)
    every = torch.full_like(some, 9.0)
    torch.testing.assert_close(sparse(ours, theirs, (some, some), l1=0.0), sparse(ours, theirs, (every, every), l1=0.0))


def test_sparse_prunes_what_both_answers_share():
    """Descent on the significances: the L1 term takes the shared prefix to 0 and leaves the token that tells the answers apart.

    The prefix has one significance in both, being a function of what stands before.
    """
    ratios = torch.tensor([[[0.3, 0.2, 1.0]], [[0.3, 0.2, -1.0]]], dtype=torch.float64)
    zero = Completion(torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3))
    ours, theirs = Pairs(*(Completion(x, torch.ones(1, 3)) for x in ratios)), Pairs(zero, zero)
    prefix, last = (torch.full(shape, 0.5, dtype=torch.float64, requires_grad=True) for shape in ((1, 2), (2, 1, 1)))
    optimizer = torch.optim.Adam([prefix, last], lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        w = tuple(torch.cat([prefix, x], 1) for x in last)
        sparse(ours, theirs, w, beta=1.0, l1=0.02).sum().backward()
        optimizer.step()
    assert last[0] > 0.2 and prefix.abs().max() < 0.05


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_sparse_stays_finite(scale):
    one = torch.ones(1, 1)
    ours = Pairs(Completion(torch.full((1, 1), scale), one), Completion(torch.zeros(1, 1), one))
    theirs = Pairs(*(Completion(torch.zeros(1, 1, dtype=torch.bfloat16), one) for _ in range(2)))
    w = torch.ones(1, 1, requires_grad=True)
    found = sparse(ours, theirs, (w, w))
    assert found.isfinite().all() and found.dtype == torch.float32
    assert torch.autograd.grad(found.sum(), w)[0].isfinite().all()
