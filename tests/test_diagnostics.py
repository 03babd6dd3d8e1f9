"""Entanglement: Condition 1 and 2 are the signs of the first-order changes, and the fourth case cannot happen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt.diagnostics import entanglement, weights
from ogdopt.gram import gram
from ogdopt.losses import LOSSES, Completion, Pairs
from tests.gradients import inner, norm, pairs


@given(pairs(kinds=("random", "nearly parallel", "conflicting"), dtypes=(torch.float64,), scales=(-3, 3)), st.floats(0.05, 20))
def test_conditions_are_the_signs_of_the_predicted_changes(case, ratio):
    """Delta a = eta (d_w ww - d_l wl) and Delta b = eta (d_w wl - d_l ll) with d_w/d_l = ratio (SPEC 4.3)."""
    ws, ls, _, _ = case
    report = entanglement(gram(ws, ls), ratio)
    ww, wl, ll = inner(ws, ws), inner(ws, ls), inner(ls, ls)
    slack = 1e-12 * (ww + ll)
    if abs(ratio * ww - wl) > slack:
        assert report["entanglement/condition_chosen"] == float(ratio * ww - wl >= 0)
    if abs(ratio * wl - ll) > slack:
        assert report["entanglement/condition_rejected"] == float(ratio * wl - ll <= 0)
    assert report["entanglement/condition_chosen"] or report["entanglement/condition_rejected"]
    assert report["entanglement/inner_product"] == pytest.approx(wl, abs=1e-9 * (ww * ll) ** 0.5)
    assert report["entanglement/norm_chosen"] == pytest.approx(norm(ws))


@pytest.mark.parametrize(("ww", "ll", "case"), [(3.0, 3.0, 1.0), (1.0, 9.0, 2.0), (9.0, 1.0, 3.0)])
def test_cases_of_table_1(ww, ll, case):
    numbers = gram([torch.tensor([ww**0.5])], [torch.tensor([ll**0.5])])._replace(wl=torch.tensor([2.0]))
    assert entanglement(numbers)["entanglement/case"] == case


def test_zero_gradients_have_cosine_zero():
    assert entanglement(gram([torch.zeros(3)], [torch.ones(3)]))["entanglement/cosine"] == 0.0


def test_the_ratio_must_be_positive():
    with pytest.raises(ValueError, match="weight_ratio is 0"):
        entanglement(gram([torch.ones(1)], [torch.ones(1)]), 0)


def scored(logits, B=4):
    """Pairs whose tokens' log-probabilities are made of `logits`, (2 B, 5, 7); the chosen have up to 5 tokens, the others 4."""
    g = torch.Generator().manual_seed(1)
    logps = logits.log_softmax(-1)[..., 0]
    masks = [torch.arange(5) < torch.randint(1, n, (B, 1), generator=g) for n in (6, 5)]
    reference = [logps.detach()[i * B : (i + 1) * B].sum(-1) + torch.randn(B, generator=g) for i in range(2)]
    return Pairs(Completion(logps[:B], masks[0]), Completion(logps[B:], masks[1]), *reference)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_loss_is_made_of_its_weights(name):
    """dL/dtheta = -(d_w G_w - d_l G_l), summed over the pairs."""
    theta = torch.randn(8, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made = scored(theta)
    d_w, d_l = weights(LOSSES[name], made)
    assert d_w.shape == d_l.shape == (4,) and not d_w.requires_grad and theta.grad is None
    moves = (d_w * made.chosen.logp - d_l * made.rejected.logp).sum()
    (expected,) = torch.autograd.grad(moves, theta, retain_graph=True)
    (found,) = torch.autograd.grad(LOSSES[name](made).sum(), theta)
    torch.testing.assert_close(found, -expected)


@pytest.mark.parametrize("name", ["dpo", "simpo", "cpo", "dpop", "flex_dpo"])
@pytest.mark.parametrize("seed", range(4))
def test_entanglement_of_a_loss_at_hand_predicts_where_its_step_leads(name, seed):
    """Shared logits: a small step of descent on one pair's loss raises or lowers a and b as the conditions say."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.rand(2, 5, 7, 7, dtype=torch.float64, generator=g) / 2 + torch.eye(7)
    theta = torch.randn(7, dtype=torch.float64, generator=g).requires_grad_()
    made = lambda x: scored(mix @ x, B=1)  # noqa: E731
    before = made(theta)
    ws, ls = (torch.autograd.grad(c.logp.sum(), theta, retain_graph=True) for c in before[:2])
    d_w, d_l = weights(LOSSES[name], before)
    found = entanglement(gram(list(ws), list(ls)), (d_w / d_l).item())
    (slope,) = torch.autograd.grad(LOSSES[name](before).sum(), theta)
    after = made(theta.detach() - 1e-6 * slope / slope.norm())
    assert found["entanglement/condition_chosen"] == float((after.chosen.logp > before.chosen.logp).item())
    assert found["entanglement/condition_rejected"] == float((after.rejected.logp < before.rejected.logp).item())


@torch.no_grad()
def test_weights_ignore_masked_tokens_and_need_no_graph():
    logps = torch.tensor([[-1.0, -2.0, float("-inf")], [-3.0, -3.0, -3.0]])
    made = Completion(logps, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    d_w, d_l = weights(LOSSES["simpo"], Pairs(made, made), beta=2.0, simpo_gamma=0.0)
    assert d_w.tolist() == d_l.tolist() == [0.5, 0.0]


def test_weights_need_one_number_a_pair():
    made = Completion(-torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"the loss has shape \(\); expected one number a pair, \(3,\)"):
        weights(lambda pairs: LOSSES["cpo"](pairs).mean(), Pairs(made, made))
