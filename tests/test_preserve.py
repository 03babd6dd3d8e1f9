"""`preserve=`: what a step must not raise, in every way of calling it, waiting and measuring."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, RMSprop

from ogdopt import GradientError, PairedGradient, ProjectedGradient
from ogdopt.cone import Grams, nearest
from ogdopt.projection import normalized
from tests.test_optimizer import gradients, toy, vector


def flat(model, loss):
    return torch.cat([g.double().flatten() for g in gradients(model, loss)])


def world(seed=0, base=SGD, lr=1.0, **options):
    """A net, an optimizer, winner and loser, and two more losses on other data."""
    model, _, winner, loser = toy(seed)
    generator = torch.Generator().manual_seed(seed + 100)
    data = [(torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)) for _ in range(2)]
    kept = [lambda d=d: nn.functional.cross_entropy(model(d[0]), d[1]) for d in data]
    return model, ProjectedGradient(base(model.parameters(), lr=lr), **options), winner, loser, kept


def expected(model, losses, signs):
    g = torch.stack([flat(model, loss) for loss in losses])
    c = nearest(Grams((g @ g.T)[None], signs))[0]
    return c @ g, g, c


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("way", ["closures", "contexts", "winner first", "one of two"])
def test_the_step_is_the_nearest_that_respects_all(seed, way):
    model, opt, winner, loser, kept = world(seed)
    names = {"facts": kept[0], "style": kept[1]} if way != "one of two" else {"preserve": kept[0]}
    u, g, c = expected(model, [winner, loser, *names.values()], (-1, *[1] * len(names)))
    before = vector(model).double()
    if way in ("closures", "one of two"):
        report = opt.step(winner, loser, preserve=names if way == "closures" else kept[0])
    else:
        sides = [(opt.loser, loser), (opt.winner, winner)] + [(lambda n=n: opt.preserve(n), f) for n, f in names.items()]
        for context, loss in sides if way == "contexts" else sides[::-1]:
            with context():
                loss().backward()
        report = opt.step()
    moved = before - vector(model).double()
    torch.testing.assert_close(moved, u, rtol=1e-4, atol=1e-6)
    norms = g.norm(dim=1)
    assert (g[1] @ moved) / norms[1] <= 1e-6 and ((g[2:] @ moved) / norms[2:] >= -1e-6).all()
    assert report.joint is not None and set(report.joint.names) == {"loser", *names}
    assert report.coefficients == pytest.approx((c[0].item(), c[1].item()), rel=1e-5, abs=1e-7)
    assert report.grad_norm == pytest.approx(u.norm().item(), rel=1e-5)
    found = report.to_dict()
    for k, name in enumerate(report.joint.names[1:], 2):
        at = [*["winner", "loser"], *names].index(name)
        assert found[f"ogd/coefficient/{name}"] == pytest.approx(c[at].item(), rel=1e-4, abs=1e-7), k
        assert found[f"ogd/cosine/{name}"] == pytest.approx((g[0] @ g[at] / norms[0] / norms[at]).item(), abs=1e-6)


def test_without_a_loser_it_is_a_gem():
    """One reference gradient: g - <g, r>/<r, r> r where they conflict (Chaudhry et al. 2019, equation 11)."""
    for seed in range(6):
        model, opt, winner, _, kept = world(seed)
        w, r = flat(model, winner), flat(model, kept[0])
        u = w - min(0.0, (w @ r).item()) / (r @ r) * r
        before = vector(model).double()
        opt.step(winner, preserve=kept[0])
        torch.testing.assert_close(before - vector(model).double(), u, rtol=1e-4, atol=1e-6)


def test_with_nothing_to_preserve_the_step_is_the_same_bit_for_bit():
    one, opt, winner, loser, _ = world()
    two, other, winner2, loser2, _ = world()
    opt.step(winner, loser)
    other.step(winner2, loser2, preserve={})
    assert torch.equal(vector(one), vector(two))


@pytest.mark.parametrize("set_aside", [torch.bfloat16, "int8", "cpu"])
def test_gradients_may_wait_in_fewer_bytes(set_aside):
    """The step is nearly the same, and exactly orthogonal to what is stored; ten steps of training go as without."""
    model, opt, winner, loser, kept = world(3)
    rounded, other, winner2, loser2, kept2 = world(3, set_aside=set_aside)
    for _ in range(3):
        opt.step(winner, loser, preserve=kept[0])
        other.step(winner2, loser2, preserve=kept2[0])
    tolerance = {torch.bfloat16: 2e-2, "int8": 3e-2, "cpu": 1e-6}[set_aside]
    assert (vector(model) - vector(rounded)).norm() <= tolerance * vector(model).norm()


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_blocks_are_respected_each_for_itself(scope):
    model, opt, winner, loser, kept = world(1, scope=scope)
    gs = [gradients(model, f) for f in (winner, loser, kept[0])]
    before = [p.detach().clone().double() for p in model.parameters()]
    opt.step(winner, loser, preserve=kept[0])
    total = torch.zeros(2, dtype=torch.float64)
    for p, b, w, x, k in zip(model.parameters(), before, *gs):
        moved = (b - p.detach().double()).flatten()
        if scope == "tensor":
            g = torch.stack([t.double().flatten() for t in (w, x, k)])
            u = nearest(Grams((g @ g.T)[None], (-1, 1)))[0] @ g
            torch.testing.assert_close(moved, u, rtol=1e-4, atol=1e-6)
        total += torch.stack([x.double().flatten() @ moved, k.double().flatten() @ moved])
    assert total[0] <= 1e-6 and total[1] >= -1e-6


@pytest.mark.parametrize("max_norm", [1e-3, (1e-3, None)])
def test_the_mixture_is_clipped_like_any_other(max_norm):
    model, _, winner, loser, kept = world(1)
    a, b, c, d = model.parameters()
    groups = [{"params": [a, b]}, {"params": [c, d]}] if isinstance(max_norm, tuple) else [a, b, c, d]
    u, _, _ = expected(model, [winner, loser, kept[0]], (-1, 1))
    opt = ProjectedGradient(SGD(groups, lr=1.0), max_norm=max_norm)
    before = vector(model).double()
    report = opt.step(winner, loser, preserve=kept[0])
    moved = before - vector(model).double()
    first = a.numel() + b.numel()
    size = u.norm() if not isinstance(max_norm, tuple) else u[:first].norm()
    wanted = u * 1e-3 / size
    if isinstance(max_norm, tuple):
        wanted[first:] = u[first:]
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-6)
    assert report.clipped


@pytest.mark.parametrize("base", [SGD, RMSprop, Adam])
def test_what_a_step_did_to_every_named_loss_is_measured(base):
    model, opt, winner, loser, kept = world(2, base=base, lr=1e-3, measure_change=True)
    g = [flat(model, f) for f in (winner, loser, *kept)]
    before = vector(model).double()
    report = opt.step(winner, loser, preserve={"a": kept[0], "b": kept[1]})
    delta = vector(model).double() - before
    assert report.loss_changes == pytest.approx(((delta @ g[0]).item(), (delta @ g[1]).item()), rel=2e-3, abs=1e-8)
    for name, x in zip("ab", g[2:]):
        assert report.changes[name].item() == pytest.approx((delta @ x).item(), rel=2e-3, abs=1e-8)


@given(
    st.integers(0, 10**6),
    st.integers(0, 4),
    st.integers(-30, 30),
    st.sampled_from(["free", "zero", "missing", "parallel", "opposed"]),
)
def test_any_number_and_kind_of_gradients(seed, count, power, kind):
    """Given as they are, in two tensors; the step keeps every promise relative to its gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (5,)]
    gs = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(count + 2)]
    if count:
        gs[-1] = {
            "free": gs[-1],
            "zero": [0 * x for x in gs[-1]],
            "missing": [gs[-1][0], None],
            "parallel": [2 * x for x in gs[0]],
            "opposed": [-x for x in gs[0]],
        }[kind]
    gs[1] = [x * 10.0**power for x in gs[1]]
    ps = [nn.Parameter(torch.zeros(s)) for s in shapes]
    opt = ProjectedGradient(SGD(ps, lr=1.0))
    for k, some in enumerate(gs):
        with opt.winner() if k == 0 else opt.loser() if k == 1 else opt.preserve(f"{k}"):
            for p, x in zip(ps, some):
                p.grad = None if x is None else x.clone()
    opt.step()
    u = torch.cat([-p.detach().double().flatten() for p in ps])
    whole = [torch.cat([(torch.zeros(s) if x is None else x).double().flatten() for x, s in zip(some, shapes)]) for some in gs]
    assert u.isfinite().all() and u.norm() <= whole[0].norm() * (1 + 1e-6)
    for k, x in enumerate(whole[1:]):
        along = u @ x / max(x.norm().item(), 1e-300) / whole[0].norm()
        assert along <= 1e-6 if k == 0 else along >= -1e-6
    assert u @ whole[0] >= -1e-6 * whole[0].norm() ** 2


def test_steps_that_are_not_finite_are_skipped():
    model, opt, winner, loser, kept = world()
    before = vector(model)
    assert opt.step(winner, loser, preserve=lambda: kept[0]() * float("nan")).skipped
    assert torch.equal(vector(model), before) and opt.skipped_steps == 1
    assert not opt.step(winner, loser, preserve=kept[0]).skipped


def test_fused_steps_fall_back_and_say_so():
    one, opt, winner, loser, kept = world(fused=True)
    two, other, winner2, loser2, kept2 = world()
    with pytest.warns(UserWarning, match="what is preserved or remembered takes part"):
        opt.step(winner, loser, preserve=kept[0])
    other.step(winner2, loser2, preserve=kept2[0])
    torch.testing.assert_close(vector(one), vector(two))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"metric": "optimizer"}, "for no base about what preserve= adds"), ({"set_aside": "recompute"}, "use 'int8'")],
)
def test_options_that_cannot_preserve_are_refused_by_name(options, message):
    _, opt, winner, loser, kept = world(**options)
    with pytest.raises(ValueError, match=message):
        opt.step(winner, loser, preserve=kept[0])
    with pytest.raises(ValueError, match=message):
        opt.preserve("facts")


def test_slips_are_named():
    model, opt, winner, loser, kept = world()
    for slip, error, message in (
        ({"preserve": kept[0]()}, TypeError, "got a Tensor to preserve as 'preserve'"),
        ({"preserve": {"loser": kept[0]}}, ValueError, "expected a name of its own"),
        ({"preserve": {str(k): kept[0] for k in range(8)}}, ValueError, "9 gradients are to be respected; expected at most 8"),
    ):
        with pytest.raises(error, match=message):
            opt.step(winner, loser, **slip)
        opt.zero_grad()
    with pytest.raises(TypeError, match="no winner"):
        opt.step(preserve=kept[0])
    with pytest.raises(ValueError, match="a name of its own"):
        opt.preserve("winner")
    with pytest.raises(GradientError, match="facts's pass left no gradient"), opt.preserve("facts"):
        pass
    with pytest.raises(ValueError, match=r"the rule is normalized; expected projection.orthogonal"):
        PairedGradient(SGD(model.parameters(), lr=1.0), normalized).step(winner, loser, preserve=kept[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(winner, loser, preserve=kept[0])
