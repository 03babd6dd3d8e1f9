"""A sample of the random search for wrong steps (`python -m benchmarks.search` tries 20,000), and that it finds faults."""

import pytest
import torch

from benchmarks import search
from ogdopt import ProjectedGradient, _mixing


def test_no_step_of_a_sample_is_wrong():
    ends = search.search(400, seed=1)
    assert ends["right"] == 400 and not ends["wrong"]


@pytest.fixture
def spoilt(monkeypatch):
    """Every mixture with its coefficients multiplied."""

    def spoil(of_winner, of_loser):
        mix = _mixing.mix_all
        monkeypatch.setattr(_mixing, "mix_all", lambda ws, ls, a, b, *rest: mix(ws, ls, of_winner * a, of_loser * b, *rest))

    return spoil


@pytest.mark.parametrize("factors", [(1.0, 1.001), (1.0, 0.0), (torch.inf, 1.0)], ids=["a thousandth", "plain", "not finite"])
def test_the_search_sees_a_wrong_mixture(spoilt, factors):
    spoilt(*factors)
    assert search.search(60, seed=1, shown=0)["wrong"] > 3


def test_small_gradients_in_channels_last_are_mixed():
    """Two of one shape, whose passes are one call."""
    ps = [torch.nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)) for _ in range(2)]
    opt = ProjectedGradient(torch.optim.SGD(ps, lr=1.0))
    sides = [[torch.randn(p.shape).to(memory_format=torch.channels_last) for p in ps] for _ in range(2)]
    opt.step(*(lambda gs=gs: sum((p * g).sum() for p, g in zip(ps, gs)) for gs in sides))
    assert search_reference(*sides) == pytest.approx(
        -torch.stack([p.detach().double() for p in ps]).flatten().numpy(), abs=1e-6
    )


def search_reference(ws, ls):
    w, l = (torch.stack(gs).double().flatten() for gs in (ws, ls))
    return (w - (w @ l).clamp(min=0) / (l @ l) * l).numpy()


@pytest.mark.parametrize("base", [torch.optim.RMSprop, torch.optim.Adam])
def test_a_fused_second_moment_has_the_range_of_the_base_s_own(base):
    """Of 1e20 the square leaves float32, and (1 - alpha) times it does not."""
    steps = []
    for fused in (False, True):
        p = torch.nn.Parameter(torch.zeros(2048))
        opt = ProjectedGradient(base([p], lr=0.01), fused=fused)
        for sign in (1.0, 1.0, -1.0):
            g = torch.full_like(p, sign * 3e19)
            opt.step(lambda p=p, g=g: (p * g).sum(), lambda p=p, g=g: -(p * g).sum())
        steps.append(p.detach())
    assert steps[0].abs().min() > 1e-3
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-7)
