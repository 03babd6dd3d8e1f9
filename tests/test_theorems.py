"""Theorems 5.3, 5.4 and corollary 5.5 on steps that are really taken (SPEC 1.8): quadratics and a two-layer language model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from ogdopt import ProjectedGradient
from ogdopt.losses import Completion, Pairs, dpo, nll

SLOPE = 1e-6  # step size of the finite-difference checks, float64


class TwoLayerLM(nn.Module):
    """Embedding of the previous token, one hidden layer, softmax: two layers over 7 tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7)
        self.double()

    def forward(self, tokens):
        """Completion of tokens[:, 1:], all of them counting."""
        logits = self.head(torch.tanh(self.hidden(self.embed(tokens[:, :-1]))))
        logps = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return Completion(logps, torch.ones_like(logps))


def language_model(seed, batch):
    torch.manual_seed(seed)
    model = TwoLayerLM()
    tokens = torch.randint(7, (2, batch, 5))
    losses = [lambda x=x: nll(model(x)).mean() for x in tokens]
    return model, tokens, losses


def quadratics(seed):
    torch.manual_seed(seed)
    model = nn.ParameterList([torch.randn(5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)])
    targets = [[torch.randn_like(p) for p in model] for _ in range(2)]
    losses = [lambda t=t: sum(((p - x) ** 2).sum() for p, x in zip(model, t)) for t in targets]
    return model, None, losses


def values(losses):
    with torch.no_grad():
        return [loss().item() for loss in losses]


@given(st.integers(0, 10_000), st.sampled_from(["quadratics", "language model"]))
def test_winner_falls_and_loser_does_not(seed, kind):
    model, _, losses = quadratics(seed) if kind == "quadratics" else language_model(seed, 4)
    opt = ProjectedGradient(SGD(model.parameters(), lr=SLOPE))
    before = values(losses)
    report = opt.step(*losses)
    after = values(losses)
    winner, loser = ((y - x) / SLOPE for x, y in zip(before, after))
    u2 = report.grad_norm**2
    assert winner == pytest.approx(-u2, rel=1e-3, abs=1e-4) and winner < 0  # theorem 5.3: slope -|u|^2
    assert loser == pytest.approx(max(0.0, -report.gram.wl), rel=1e-3, abs=1e-3 * (1 + u2))  # theorem 5.4: slope max(0, -wl)


@pytest.mark.parametrize("eta", [1e-3, 1e-4, 1e-5])
def test_slopes_are_reached_as_the_step_shrinks(eta):
    """The error of the first-order statement is O(eta)."""
    model, _, losses = language_model(3, 4)
    opt = ProjectedGradient(SGD(model.parameters(), lr=eta))
    before = values(losses)
    report = opt.step(*losses)
    slope = (values(losses)[0] - before[0]) / eta
    assert abs(slope + report.grad_norm**2) < 300 * eta * report.grad_norm**2


def dpo_slope(model, pairs_of, beta=0.1):
    """d/d eta of the mean DPO loss along one OGD step, by autograd at the start."""
    params = list(model.parameters())
    loss = dpo(pairs_of(), beta=beta).mean()
    gradient = torch.autograd.grad(loss, params)
    chosen, rejected = pairs_of()[:2]
    w = torch.autograd.grad(nll(chosen).mean(), params)
    x = torch.autograd.grad(nll(rejected).mean(), params)
    opt = ProjectedGradient(SGD(params, lr=1.0))
    with opt.loser():
        for p, g in zip(params, x):
            p.grad = g.clone()
    with opt.winner():
        for p, g in zip(params, w):
            p.grad = g.clone()
    opt.project()
    return -sum((p.grad * g).sum() for p, g in zip(params, gradient)).item()


@given(st.integers(0, 10_000), st.sampled_from(["one pair", "at the reference"]))
def test_corollary_5_5_for_one_pair_or_at_the_reference(seed, where):
    model, tokens, _ = language_model(seed, 1 if where == "one pair" else 5)
    with torch.no_grad():
        reference = [model(x).logp for x in tokens]
        if where == "one pair":
            reference = [r + 3 * torch.randn_like(r) for r in reference]

    def pairs_of():
        return Pairs(model(tokens[0]), model(tokens[1]), *reference)

    assert dpo_slope(model, pairs_of) <= 1e-12


def test_corollary_5_5_fails_for_a_batch_with_unequal_weights():
    """The documented counter-example: two pairs whose DPO weights differ; the OGD step raises their mean DPO loss.

    Margins are +40 and -40, so DPO's weight is all on pair 2. Descending L_w moves theta along (1, 1) and the two losers'
    gradients nearly cancel, (0, -6) and (0, 5), so nothing is removed; but pair 2 alone gains 2 on its chosen and 5 on its
    rejected answer, and its margin shrinks by 3.
    """
    theta = nn.ParameterList([torch.zeros(2, dtype=torch.float64)])
    G_w = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    G_l = torch.tensor([[0.0, -6.0], [0.0, 5.0]], dtype=torch.float64)
    reference = torch.tensor([-40.0, 40.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def pairs_of():
        one = torch.ones(2, 1)
        return Pairs(Completion((G_w @ theta[0])[:, None], one), Completion((G_l @ theta[0])[:, None], one), *reference)

    assert dpo_slope(theta, pairs_of, beta=1.0) > 0.5
