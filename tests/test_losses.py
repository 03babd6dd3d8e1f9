"""Losses: hand-derived values and gradients, masks, dtypes, saturation, and the errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt import losses
from ogdopt.losses import LOSSES, Completion, Pairs, dpo, nll


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


@given(*[st.floats(-50, 0) for _ in range(4)], st.floats(0.01, 1.0))
def test_dpo_gradients_are_equal_and_opposite(a, b, A, B, beta):
    """d/da = -beta sigmoid(-beta d) = -d/db (SPEC 3.1)."""
    x, y = (torch.tensor([[v]], dtype=torch.float64, requires_grad=True) for v in (a, b))
    reference = [torch.tensor([v], dtype=torch.float64) for v in (A, B)]
    one = torch.ones(1, 1)
    dpo(Pairs(Completion(x, one), Completion(y, one), *reference), beta=beta).backward()
    d = (a - A) - (b - B)
    assert x.grad.item() == pytest.approx(-beta * torch.sigmoid(torch.tensor(-beta * d, dtype=torch.float64)).item(), abs=1e-12)
    assert y.grad.item() == -x.grad.item()


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_saturated_margins_stay_finite(margin):
    x = torch.tensor([[margin]], requires_grad=True)
    loss = dpo(Pairs(Completion(x, torch.ones(1, 1)), completion([[0.0]]), torch.zeros(1), torch.zeros(1)), beta=1.0)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite() and loss.item() == pytest.approx(max(0.0, -margin))


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_has_one_number_a_pair(name):
    B = 3
    c = Completion(-torch.rand(B, 5), torch.ones(B, 5))
    pairs = Pairs(c, Completion(-torch.rand(B, 4), torch.ones(B, 4)), -torch.rand(B), -torch.rand(B))
    assert LOSSES[name](pairs, beta=0.1).shape == (B,)
    if LOSSES[name].reference:
        with pytest.raises(ValueError, match="ref_chosen or ref_rejected is None"):
            LOSSES[name](pairs._replace(ref_chosen=None))


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'token'; expected 'sum' or 'mean'"):
        losses.nll(completion([[0.0]]), "token")
