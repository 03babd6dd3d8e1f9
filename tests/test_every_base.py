"""One table over every torch.optim class: identity with the base where nothing conflicts, projection, resume."""

import copy

import pytest
import torch
from torch import nn

from ogdopt import ProjectedGradient

REFUSED = {"LBFGS": "needs a closure", "SparseAdam": "sparse gradients"}
MATRICES_ONLY = {"Muon"}
BASES = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
)
ACCEPTED = [name for name in BASES if name not in REFUSED]


def build(name, wrap=True):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6, bias=name not in MATRICES_ONLY), nn.Tanh(), nn.Linear(6, 4, bias=name not in MATRICES_ONLY)
    )
    base = getattr(torch.optim, name)(model.parameters(), lr=1e-2)
    data = [torch.randn(8, 5) for _ in range(2)]
    losses = [lambda x=x, t=t: nn.functional.cross_entropy(model(x), torch.full((8,), t)) for x, t in zip(data, (1, 2))]
    return model, ProjectedGradient(base) if wrap else base, losses


def run(opt, losses, steps):
    for _ in range(steps):
        opt.step(*losses)


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_table_is_complete():
    assert set(REFUSED) <= set(BASES) and len(ACCEPTED) >= 13


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(TypeError, match=REFUSED[name]):
        build(name)


@pytest.mark.parametrize("name", ACCEPTED)
def test_is_the_base_where_nothing_conflicts(name):
    """A loser whose gradient opposes the winner's leaves the base's own trajectory, bit for bit."""
    model, opt, (winner, _) = build(name)
    plain, base, (w, _) = build(name, wrap=False)
    for _ in range(4):
        opt.step(winner, lambda: -winner())
        base.zero_grad()
        w().backward()
        base.step()
    assert torch.equal(vector(model), vector(plain))


@pytest.mark.parametrize("name", ACCEPTED)
def test_steps_and_resumes_bitwise(name):
    model, opt, losses = build(name)
    before = vector(model)
    run(opt, losses, 3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    run(opt, losses, 3)
    fresh, again, w = build(name)
    fresh.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    run(again, w, 3)
    assert torch.equal(vector(fresh), vector(model)) and not torch.equal(vector(model), before)
