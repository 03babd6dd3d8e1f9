"""metric="optimizer": the parameter change itself raises winners and does not help losers, for every supported base."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from ogdopt import GradientError, PairedGradient, ProjectedGradient
from ogdopt import metric as own_metric
from ogdopt.projection import normalized

BASES = {
    "SGD": (SGD, {"lr": 0.1}),
    "SGD momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "SGD dampening, decay": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "SGD nesterov, decay": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "RMSprop": (RMSprop, {"lr": 0.01}),
    "RMSprop short memory": (RMSprop, {"lr": 0.01, "alpha": 0.5, "eps": 1e-3}),
    "RMSprop decay": (RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop centered": (RMSprop, {"lr": 0.01, "centered": True}),
    "RMSprop momentum": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "RMSprop all": (RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    "Adam": (Adam, {"lr": 0.01}),
    "Adam without momentum": (Adam, {"lr": 0.01, "betas": (0.0, 0.99)}),
    "Adam amsgrad, decay": (Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.5}),
    "Adagrad": (Adagrad, {"lr": 0.1}),
    "Adagrad decays": (Adagrad, {"lr": 0.1, "weight_decay": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
}
BREAKING = set(BASES) - {"SGD"}
"""Bases whose change, with the euclidean metric, is seen to break a promise."""


def problem(seed, shapes=((5, 4), (7,)), dtype=torch.float64):
    """Parameters, and a source of correlated gradients whose sizes differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    ps = [nn.Parameter(normal(s)) for s in shapes]
    sizes = [torch.exp(2 * normal(s)) for s in shapes]

    def gradients():
        w = [normal(s) * size for s, size in zip(shapes, sizes)]
        return w, [0.7 * x + 0.7 * normal(s) * size for x, s, size in zip(w, shapes, sizes)]

    return ps, gradients


def give(opt, ps, w, l):
    for context, gs in ((opt.loser, l), (opt.winner, w)):
        with context():
            for p, g in zip(ps, gs):
                p.grad = None if g is None else g.clone()


def take_step(opt, ps, gradients):
    """One step on fresh gradients: (<delta, g_w>, <delta, g_l>), each over the product of the norms."""
    w, l = gradients()
    before = [p.detach().clone() for p in ps]
    give(opt, ps, w, l)
    report = opt.step()
    delta, w, l = (torch.cat([x.flatten() for x in xs]) for xs in ([p.detach() - q for p, q in zip(ps, before)], w, l))
    size = delta.norm().clamp(min=1e-300)
    return report, (delta @ w / size / w.norm()).item(), (delta @ l / size / l.norm()).item()


@pytest.mark.parametrize("name", BASES)
@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 6),
    max_norm=st.sampled_from([None, 0.5]),
    scope=st.sampled_from(["global", "group", "tensor"]),
)
def test_the_change_keeps_theorems_5_3_and_5_4(name, seed, steps, max_norm, scope):
    kind, options = BASES[name]
    ps, gradients = problem(seed)
    groups = [{"params": ps[:1]}, {"params": ps[1:], "lr": 3 * options["lr"]}]
    opt = ProjectedGradient(kind(groups, **options), metric="optimizer", max_norm=max_norm, scope=scope)
    for _ in range(steps):
        _, winner, loser = take_step(opt, ps, gradients)
        assert winner < 0
        assert loser >= -1e-8


SPECIAL = {
    "zero": lambda w, l: [0 * x for x in l],
    "zero in one tensor": lambda w, l: [0 * l[0], l[1]],
    "missing in one tensor": lambda w, l: [None, l[1]],
    "opposed": lambda w, l: [-0.3 * x for x in w],
    "opposed in one tensor": lambda w, l: [-0.3 * w[0], l[1]],
    "tiny": lambda w, l: [1e-20 * x for x in l],
    "tiny and opposed": lambda w, l: [-1e-20 * x for x in w],
    "tiny in one tensor": lambda w, l: [1e-20 * l[0], l[1]],
    "huge": lambda w, l: [1e20 * x for x in l],
}
"""Losers' gradients that leave only the winners' constraint, or nearly so."""


@pytest.mark.parametrize("name", BASES)
@given(
    special=st.sampled_from(sorted(SPECIAL)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
    before=st.integers(0, 4),
    scope=st.sampled_from(["global", "group", "tensor"]),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_momentum_against_a_step_and_a_loser_without_a_say(name, special, dtype, seed, before, scope, size):
    """Steps of one kind, then the winner turns round and the loser is special: realised, not only to be expected."""
    kind, options = BASES[name]
    ps, gradients = problem(seed, dtype=dtype)
    with torch.no_grad():
        for p in ps:
            p.mul_(1e-2)
    groups = [{"params": ps[:1]}, {"params": ps[1:], "lr": 3 * options["lr"]}]
    opt = ProjectedGradient(kind(groups, **options), metric="optimizer", scope=scope)
    w, l = gradients()
    w, l = [size * x for x in w], [size * x for x in l]
    for _ in range(before):
        give(opt, ps, [-x for x in w], [-x for x in l])
        opt.step()
    old = [p.detach().clone() for p in ps]
    l = SPECIAL[special](w, l)
    give(opt, ps, w, l)
    report = opt.step()
    assert not report.skipped
    eps = torch.finfo(dtype).eps
    for gs, sign, slack in ((w, 1, 0.0), (l, -1, 1e-6 if dtype == torch.float32 else 1e-8)):
        moves = [(p.detach().double() - q.double(), q.double(), g.double()) for p, q, g in zip(ps, old, gs) if g is not None]
        change = sum((d * g).sum().item() for d, _, g in moves)
        lengths = [sum(x.square().sum().item() for x in xs) ** 0.5 for xs in zip(*moves)]
        rounding = eps * sum(((d.abs() + q.abs()) * g.abs()).sum().item() for d, q, g in moves)
        assert sign * change <= slack * lengths[0] * lengths[2] + 4 * rounding
    if dtype == torch.float64:
        assert sum((d * g.double()).sum().item() for d, g in zip([p.detach() - q for p, q in zip(ps, old)], w)) < 0


@pytest.mark.parametrize("name", BASES)
def test_single_precision_keeps_them_to_its_rounding(name):
    kind, options = BASES[name]
    ps, gradients = problem(3, shapes=((40, 30), (50,)), dtype=torch.float32)
    opt = ProjectedGradient(kind(ps, **options), metric="optimizer")
    for _ in range(8):
        _, winner, loser = take_step(opt, ps, gradients)
        assert winner < 0 and loser >= -1e-5


@pytest.mark.parametrize("name", sorted(BREAKING))
def test_the_euclidean_metric_breaks_the_promise(name):
    """The same gradients without the repair: the change helps losers, or costs winners."""
    kind, options = BASES[name]
    ps, gradients = problem(0)
    opt = ProjectedGradient(kind(ps, **options))
    results = [take_step(opt, ps, gradients)[1:] for _ in range(20)]
    assert any(winner >= 0 or loser < -1e-3 for winner, loser in results)


@pytest.mark.parametrize(("metric", "kept"), [("euclidean", False), ("optimizer", True)])
def test_the_documented_counter_example(metric, kept):
    """RMSprop's second step helps the loser: g_w = (1, -2), g_l = (-1, -3), so that u = (1.5, -.5) is orthogonal to g_l.

    The first step, on g_w = (-1, 1) and g_l = (2, 3), left the second moment at .01 u^2, and the change
    that RMSprop makes of u, (-7.9, 5.5) times lr, has product -8.5 lr with g_l: the loser's loss falls.
    """
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = ProjectedGradient(RMSprop([p], lr=1.0), metric=metric, measure_change=True)
    for w, l in COUNTER_EXAMPLE:
        give(opt, [p], [torch.tensor(w, dtype=torch.float64)], [torch.tensor(l, dtype=torch.float64)])
        report = opt.step()
    winner, loser = report.loss_changes
    assert winner < 0
    if kept:
        assert loser >= -1e-8
    else:
        assert (winner, loser) == (pytest.approx(-18.879294476), pytest.approx(-8.4664081071))


COUNTER_EXAMPLE = [((-1.0, 1.0), (2.0, 3.0)), ((1.0, -2.0), (-1.0, -3.0))]
"""(g_w, g_l) of the two steps"""


def test_the_root_is_the_bases_own_step_on_a_projected_gradient():
    """Without momentum nothing but the coefficient differs: the change is stock RMSprop's on g_w - c g_l."""
    ps, gradients = problem(1)
    other, _ = problem(1)
    opt = ProjectedGradient(RMSprop(ps, lr=0.01), metric="optimizer", max_norm=2.0)
    bare = RMSprop(other, lr=0.01)
    for _ in range(5):
        w, l = gradients()
        give(opt, ps, w, l)
        report = opt.step()
        if report.inexact:
            return
        c = -report.coefficients[1]
        s = min(1.0, 2.0 / report.grad_norm)
        for q, x, y in zip(other, w, l):
            q.grad = s * (x - c * y)
        bare.step()
        for p, q in zip(ps, other):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    assert report.passes > 1


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD momentum", "RMSprop momentum"])
def test_the_moments_stay_the_bases_own(name):
    kind, options = BASES[name]
    ps, gradients = problem(2)
    opt = ProjectedGradient(kind(ps, **options), metric="optimizer")
    for _ in range(4):
        w, l = gradients()
        give(opt, ps, w, l)
        shadow = [nn.Parameter(p.detach().clone()) for p in ps]
        bare = kind(shadow, **options)
        bare.load_state_dict(opt.state_dict())
        opt.project()
        for p, q in zip(ps, shadow):
            q.grad = p.grad.clone()
        opt.step()
        bare.step()
    ours, theirs = opt.state_dict()["state"], bare.state_dict()["state"]
    for index in theirs:
        for key, value in theirs[index].items():
            torch.testing.assert_close(ours[index][key], value)


def test_plain_sgd_has_the_euclidean_metric():
    ps, gradients = problem(4)
    others, again = problem(4)
    ours, plain = ProjectedGradient(SGD(ps, lr=0.1), metric="optimizer"), ProjectedGradient(SGD(others, lr=0.1))
    for _ in range(3):
        take_step(ours, ps, gradients)
        take_step(plain, others, again)
    for p, q in zip(ps, others):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def test_a_warm_up_that_begins_at_zero_projects_too():
    """With lr = 0 nothing moves, but the moments take in a gradient: the one that the same step with a rate would get."""
    taken = []
    for lr in (0.0, 0.01):
        ps, gradients = problem(9)
        opt = ProjectedGradient(Adam(ps, lr=lr), metric="optimizer")
        take_step(opt, ps, gradients)
        taken.append(torch.cat([opt.state[p]["exp_avg"].flatten() for p in ps]))
    torch.testing.assert_close(taken[0], taken[1], rtol=1e-6, atol=1e-9)


def test_conflicting_gradients_leave_the_base_alone():
    ps, gradients = problem(5)
    others, _ = problem(5)
    opt, bare = ProjectedGradient(RMSprop(ps, lr=0.01), metric="optimizer"), RMSprop(others, lr=0.01)
    for _ in range(3):
        w, _ = gradients()
        give(opt, ps, w, [-x for x in w])
        assert opt.step().coefficients == (1.0, 0.0)
        for q, x in zip(others, w):
            q.grad = x
        bare.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, others))


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW"])
def test_parallel_gradients_move_neither(name):
    kind, options = BASES[name]
    ps, gradients = problem(6)
    opt = ProjectedGradient(kind(ps, **options), metric="optimizer", measure_change=True)
    take_step(opt, ps, gradients)
    w, _ = gradients()
    give(opt, ps, w, [2 * x for x in w])
    report = opt.step()
    size = sum((x * x).sum() for x in w).sqrt().item()
    assert report.parallel and all(abs(change) <= 1e-9 * size for change in report.loss_changes)


@given(seed=st.integers(0, 100_000))
def test_the_correction_is_the_projection_on_both_constraints(seed):
    """KKT of the nearest point: feasible, multipliers not negative, each zero unless its constraint is met with equality."""
    torch.manual_seed(seed)
    n = 6
    P, r, g_w, g_l = torch.rand(n).double() + 0.1, *torch.randn(3, n).double()
    a, b = torch.rand(2).double() + 0.1
    u, own = a * g_w - b * g_l, 0.3

    def dot(x, y):
        return (P * x * y).sum()

    products = torch.stack([dot(u, u), dot(u, g_l), dot(g_l, g_l), r @ u, r @ g_l])
    p, q = (x[0] for x in own_metric._multipliers(products[None], a[None], -b[None], own))
    delta = own * a * (dot(g_w, g_w) - dot(g_w, g_l).clamp(min=0) ** 2 / dot(g_l, g_l))
    moved = r + P * (p * u - q * g_l)
    winner, loser = moved @ g_w - delta, moved @ g_l
    assert winner >= -1e-9 and loser <= 1e-9
    multiplier_w, multiplier_l = p * a, q + p * b  # the same move in terms of g_w and g_l
    assert multiplier_w >= -1e-9 and multiplier_l >= -1e-9
    assert abs(multiplier_w * winner) < 1e-9 and abs(multiplier_l * loser) < 1e-9


def test_a_scaler_says_its_factor_or_is_refused():
    ps, gradients = problem(7)
    others, _ = problem(7)
    scaled = ProjectedGradient(Adam(ps, lr=0.01), metric="optimizer", max_norm=1.0)
    plain = ProjectedGradient(Adam(others, lr=0.01), metric="optimizer", max_norm=1.0)
    for _ in range(3):
        w, l = gradients()
        give(scaled, ps, [1024 * x for x in w], [1024 * x for x in l])
        scaled.project(grad_scale=1024.0)
        for p in ps:
            p.grad /= 1024
        scaled.step()
        give(plain, others, w, l)
        plain.step()
    for p, q in zip(ps, others):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    give(scaled, ps, w, l)
    scaled.project()
    for p in ps:
        p.grad /= 1024
    with pytest.raises(GradientError, match=r"rescaled by 0.00097656. .*project\(grad_scale=scaler.get_scale\(\)\)"):
        scaled.step()


def test_the_rounding_of_bfloat16_is_no_rescaling():
    """p.grad of few elements may be 0.3% longer or shorter than what it was rounded from."""
    for seed in range(40):
        ps, gradients = problem(seed, shapes=((3,), ()), dtype=torch.bfloat16)
        opt = ProjectedGradient(SGD(ps, lr=1.0), metric="optimizer", max_norm=1e-3)
        give(opt, ps, *gradients())
        opt.project()
        assert not opt.step().skipped


def test_what_it_cannot_do_is_refused_with_the_names_of_what_it_can():
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="RMSprop, Adam, AdamW, Adagrad, SGD; found Adamax"):
        ProjectedGradient(torch.optim.Adamax([p]), metric="optimizer")
    with pytest.raises(ValueError, match="maximize=True"):
        ProjectedGradient(Adam([p], maximize=True), metric="optimizer")
    with pytest.raises(ValueError, match=r"the rule is normalized; expected projection\.orthogonal"):
        PairedGradient(Adam([p]), normalized, metric="optimizer")
    with pytest.raises(ValueError, match="metric is 'adam'"):
        ProjectedGradient(Adam([p]), metric="adam")
    with pytest.raises(ValueError, match="needs both gradients at once"):
        ProjectedGradient(Adam([p]), metric="optimizer", set_aside="recompute")


def test_a_non_finite_gradient_is_skipped_before_anything_is_solved():
    ps, gradients = problem(8)
    opt = ProjectedGradient(Adam(ps, lr=0.01), metric="optimizer")
    take_step(opt, ps, gradients)
    before = [p.detach().clone() for p in ps]
    w, l = gradients()
    l[0][0, 0] = torch.nan
    give(opt, ps, w, l)
    assert opt.step().skipped and all(torch.equal(p, q) for p, q in zip(ps, before))


@pytest.mark.parametrize("name", ["RMSprop", "Adam"])
def test_bfloat16_parameters_keep_them_to_their_rounding(name):
    """One step from zero, where the rounding of the parameter is the relative one of the change."""
    kind, options = BASES[name]
    ps, gradients = problem(3, shapes=((40, 30), (50,)), dtype=torch.bfloat16)
    for p in ps:
        p.data.zero_()
    opt = ProjectedGradient(kind(ps, **options), metric="optimizer")
    report, winner, loser = take_step(opt, ps, gradients)
    assert not report.skipped and winner < 0 and loser >= -5e-3
