"""ProjectedGradient and PairedGradient: what a step does, in every way of calling it, and what it refuses."""

import copy
import pickle

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, RMSprop

from ogdopt import GradientError, NonFiniteGradient, PairedGradient, ProjectedGradient
from ogdopt.projection import orthogonal, watch
from tests.gradients import EPS, inner, norm, pairs, parameters, reference


def toy(seed=0, **options):
    """A two-layer net, two losses on different data, and an optimizer around RMSprop."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = torch.randn(10, 6), torch.randint(3, (10,)), torch.randn(4, 6), torch.randint(3, (4,))
    opt = ProjectedGradient(RMSprop(model.parameters(), lr=1e-2), **options)

    def winner():
        return nn.functional.cross_entropy(model(data[0]), data[1])

    def loser():
        return nn.functional.cross_entropy(model(data[2]), data[3])

    return model, opt, winner, loser


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(model, loss):
    return [g.detach().clone() for g in torch.autograd.grad(loss(), list(model.parameters()))]


# ---- the step ------------------------------------------------------------------------------------------------------------


THREE = [[torch.tensor(x) for x in xs] for xs in ((0.5684, -1.0845, -1.3986), (0.1541, -0.0293, -0.2179))]
"""g_w and g_l of which the first element cancels to a fifth, where a product that is rounded before it is added shows."""


@given(pairs())
@example((*THREE, torch.float32, "random"))
def test_equals_the_float64_reference(case):
    """One SGD step of size 1 moves by the reference gradient, for every family, type and scale."""
    ws, ls, dtype, _ = case
    ps = parameters(ws)
    opt = ProjectedGradient(SGD(ps, lr=1.0))
    with opt.winner():
        for p, g in zip(ps, ws):
            (p * g).sum().backward()
    with opt.loser():
        for p, g in zip(ps, ls):
            (p * g).sum().backward()
    opt.step()
    for p, u in zip(ps, reference(ws, ls)):
        torch.testing.assert_close(-p.detach().double(), u, rtol=2 * EPS[dtype], atol=64 * EPS[torch.float64] * norm(ws))


@given(pairs(scales=(-3, 3)), st.floats(1e-3, 1e3))
def test_the_clip_bounds_the_norm_and_keeps_the_direction(case, max_norm):
    ws, ls, dtype, _ = case
    ps, free = parameters(ws), parameters(ws)
    for parts, bound in ((ps, max_norm), (free, None)):
        opt = ProjectedGradient(SGD(parts, lr=1.0), max_norm=bound)
        opt.step(*(lambda gs=gs, parts=parts: sum((p * g).sum() for p, g in zip(parts, gs)) for gs in (ws, ls)))
    moved, unclipped = [p.detach() for p in ps], [p.detach() for p in free]
    assume(norm(unclipped) > 1e-2 * norm(ws))
    expected = min(1.0, max_norm / (norm(unclipped) + 1e-6))
    for x, y in zip(moved, unclipped):
        torch.testing.assert_close(x.double(), expected * y.double(), rtol=4 * EPS[dtype], atol=4 * EPS[dtype] * norm(ws))
    assert norm(moved) <= max_norm * (1 + 4 * EPS[dtype] + 1e-9)


@given(pairs(dtypes=(torch.float32, torch.bfloat16)))
def test_what_reaches_the_base_does_not_help_the_loser(case):
    """Theorem 5.4 on the stored gradient: up to its own rounding, <u, g_l> <= 0 (SPEC 1.12: 1e-3 in bfloat16)."""
    ws, ls, dtype, _ = case
    ps = parameters(ws)
    opt = ProjectedGradient(SGD(ps, lr=1.0))
    with opt.loser():
        for p, g in zip(ps, ls):
            p.grad = g.clone()
    with opt.winner():
        for p, g in zip(ps, ws):
            p.grad = g.clone()
    opt.project()
    u = [p.grad for p in ps]
    assert inner(u, ls) <= 4 * EPS[dtype] * norm(ws) * norm(ls) + 1e-300


@pytest.mark.parametrize(
    "way", ["closures", "sequence", "contexts", "loser last", "backward inside", "project first", "lone closure"]
)
def test_every_way_of_calling_it_is_the_same_step(way):
    model, opt, winner, loser = toy(max_norm=0.5)
    expected_model, expected_opt, w, x = toy(max_norm=0.5)
    for _ in range(3):
        expected_opt.step(w, x)
        if way == "closures":
            opt.step(winner, loser)
        elif way == "sequence":
            opt.step((winner, loser))
        elif way == "contexts":
            with opt.loser():
                loser().backward()
            with opt.winner():
                winner().backward()
            opt.step()
        elif way == "loser last":
            with opt.winner():
                winner().backward()
            with opt.loser():
                loser().backward()
            opt.step()
        elif way == "backward inside":
            opt.step(lambda: winner().backward(), lambda: loser().backward())
        elif way == "project first":
            with opt.loser():
                loser().backward()
            with opt.winner():
                winner().backward()
            opt.project()
            opt.step()
        else:

            def both():
                opt.zero_grad()
                with opt.winner():
                    loss = winner()
                    loss.backward()
                with opt.loser():
                    loser().backward()
                return loss

            opt.step(both)
    torch.testing.assert_close(vector(model), vector(expected_model), rtol=1e-6, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_micro_batches_of_both_sides_project_once():
    """Interleaved micro-batches add up per side; projecting each alone would give another direction (PITFALLS S11)."""
    model, opt, _, _ = toy()
    xs, ys = torch.randn(4, 3, 6), torch.randint(3, (4, 3))
    w = gradients(model, lambda: sum(nn.functional.cross_entropy(model(xs[i]), ys[i]) for i in (0, 1)) / 2)
    x = gradients(model, lambda: sum(nn.functional.cross_entropy(model(xs[i]), ys[i]) for i in (2, 3)) / 2)
    for side, i in (("winner", 0), ("loser", 2), ("winner", 1), ("loser", 3)):
        with getattr(opt, side)():
            (nn.functional.cross_entropy(model(xs[i]), ys[i]) / 2).backward()
    opt.project()
    for p, u in zip(model.parameters(), reference(w, x)):
        torch.testing.assert_close(p.grad.double(), u, rtol=1e-4, atol=1e-6)


def test_projection_comes_before_the_clip():
    """[1, 1] against [3, 0] with max_norm 0.5: project-then-clip is [0, 0.5]; clip-then-project would be [0, 0.354]."""
    p = nn.Parameter(torch.zeros(2))
    opt = ProjectedGradient(SGD([p], lr=1.0), max_norm=0.5)
    report = opt.step(lambda: p @ torch.tensor([1.0, 1.0]), lambda: p @ torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(p.detach(), torch.tensor([0.0, -0.5]), rtol=1e-5, atol=1e-8)
    assert report.clipped and report.grad_norm == pytest.approx(1.0) and report.projected_fraction == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("max_norm", [1e-3, 0.1, 100.0])
def test_clip_equals_torchs(max_norm):
    model, opt, winner, loser = toy(max_norm=max_norm)
    other, unclipped, w, x = toy()
    opt.step(winner, loser)
    with unclipped.winner():
        w().backward()
    with unclipped.loser():
        x().backward()
    unclipped.project()
    torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm)
    unclipped.base.step()
    torch.testing.assert_close(vector(model), vector(other), rtol=1e-6, atol=1e-8)


def test_without_a_loser_it_is_the_base_bit_for_bit():
    model, opt, winner, _ = toy()
    plain, other, w, _ = toy()
    for _ in range(5):
        opt.step(winner)
        other.base.zero_grad()
        w().backward()
        other.base.step()
    assert torch.equal(vector(model), vector(plain))


@pytest.mark.parametrize(("share", "same"), [(-1.0, True), (-0.1, True), (0.1, False), (1.0, False)])
def test_it_is_the_base_bit_for_bit_exactly_where_the_two_conflict(share, same):
    """A loser along -g_w, 0.1 g_w and so on, with something of its own: <g_w, g_l> has the sign of its share of g_w."""
    model, opt, winner, loser = toy()
    plain, other, w, _ = toy()
    own = gradients(model, loser)
    gw = gradients(model, winner)
    across = [x - inner(own, gw) / inner(gw, gw) * g for x, g in zip(own, gw)]
    with opt.loser():
        for p, g, x in zip(model.parameters(), gw, across):
            p.grad = share * g + x
    with opt.winner():
        winner().backward()
    report = opt.step()
    w().backward()
    other.base.step()
    assert (report.gram.wl <= 0) == same == torch.equal(vector(model), vector(plain))


def test_plain_backward_and_step_leave_gradients_like_any_optimizer():
    model, opt, winner, _ = toy()
    winner().backward()
    opt.step()
    assert all(p.grad is not None for p in model.parameters())


def test_losses_on_one_parameter_each():
    """None counts as zeros: a loser-only parameter gets -c g_l, a parameter that neither touches stays None."""
    shared, only_w, only_l, unused = (nn.Parameter(torch.ones(2)) for _ in range(4))
    opt = ProjectedGradient(SGD([shared, only_w, only_l, unused], lr=1.0))
    with opt.winner():
        (2 * shared.sum() + only_w.sum()).backward()
    with opt.loser():
        (shared.sum() + only_l.sum()).backward()
    opt.project()
    c = 4 / 4  # <g_w, g_l> = 2 * 2, |g_l|^2 = 4
    assert torch.equal(shared.grad, torch.full((2,), 2 - c)) and torch.equal(only_w.grad, torch.ones(2))
    assert torch.equal(only_l.grad, torch.full((2,), -c)) and unused.grad is None


def test_trainable_parameters_that_neither_loss_uses_are_named_once(recwarn):
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1), "frozen": nn.Linear(2, 1).requires_grad_(False)})
    opt = ProjectedGradient(SGD(model.named_parameters(), lr=0.1))
    x = torch.ones(1, 2)
    for _ in range(2):
        opt.step(lambda: model["used"](x).sum(), lambda: -model["used"](x).sum())
    told = [str(w.message) for w in recwarn]
    assert len(told) == 1 and "2 trainable parameters got a gradient from neither loss: idle.weight, idle.bias. " in told[0]


def test_tied_parameters_count_once():
    p = nn.Parameter(torch.ones(3))
    model = nn.ModuleDict({"a": nn.ParameterList([p]), "b": nn.ParameterList([p])})
    opt = ProjectedGradient(SGD(model.parameters(), lr=1.0))
    report = opt.step(lambda: 2 * p.sum(), lambda: p.sum())
    assert report.gram.ww == 12 and report.gram.wl == 6


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_scopes(scope):
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.zeros(3)) for _ in range(4)]
    ws, ls = [torch.randn(3) for _ in ps], [torch.randn(3) for _ in ps]
    opt = ProjectedGradient(SGD([{"params": ps[:1]}, {"params": ps[1:]}], lr=1.0), scope=scope)
    report = opt.step(lambda: sum((p * g).sum() for p, g in zip(ps, ws)), lambda: sum((p * g).sum() for p, g in zip(ps, ls)))
    cuts = {"global": [4], "group": [1, 3], "tensor": [1, 1, 1, 1]}[scope]
    start = 0
    for n in cuts:
        for p, u in zip(ps[start : start + n], reference(ws[start : start + n], ls[start : start + n])):
            torch.testing.assert_close(-p.detach().double(), u, rtol=1e-6, atol=1e-6)
        start += n
    assert isinstance(report.coefficients, tuple) if scope == "global" else len(report.coefficients) == len(cuts)


def test_watch_measures_and_changes_nothing():
    model, opt, winner, loser = toy()
    plain, other, w, _ = toy()
    watched = PairedGradient(opt.base, watch)
    report = watched.step(winner, loser)
    other.step(w)
    assert torch.equal(vector(model), vector(plain)) and -1 < report.cosine < 1 and report.gram.ll > 0


# ---- the report ----------------------------------------------------------------------------------------------------------


def test_report_says_what_happened():
    model, opt, winner, loser = toy()
    w, x = gradients(model, winner), gradients(model, loser)
    expected_w, expected_l = winner().item(), loser().item()
    report = opt.step(winner, loser)
    assert (report.winner_loss, report.loser_loss) == (pytest.approx(expected_w), pytest.approx(expected_l))
    assert report.gram.ww == pytest.approx(inner(w, w)) and report.gram.wl == pytest.approx(inner(w, x))
    assert report.cosine == pytest.approx(inner(w, x) / (norm(w) * norm(x)))
    assert report.coefficients == (1.0, pytest.approx(-max(0, inner(w, x)) / inner(x, x)))
    assert report.grad_norm == pytest.approx(norm(reference(w, x)))
    assert not report.skipped and not report.clipped and not report.parallel and opt.report is report
    assert "cosine=" in repr(report) and repr(opt).startswith("ProjectedGradient(RMSprop (")


def test_parallel_gradients_are_reported_and_move_nothing():
    p = nn.Parameter(torch.zeros(3))
    opt = ProjectedGradient(RMSprop([p], lr=1.0))
    report = opt.step(lambda: 2 * p.sum(), lambda: p.sum())
    assert report.parallel and p.tolist() == [0, 0, 0] and report.projected_fraction == 0


# ---- what is not finite --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["winner", "loser"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_stepped_on_a_non_finite_gradient(side, bad):
    model, opt, winner, loser = toy(max_norm=1.0)
    opt.step(winner, loser)
    before, state = vector(model), copy.deepcopy(opt.state_dict())
    losses = {"winner": winner, "loser": loser}
    losses[side] = lambda good=losses[side]: good() * bad
    report = opt.step(losses["winner"], losses["loser"])
    assert report.skipped and opt.skipped_steps == 1 and torch.equal(vector(model), before)
    for key, value in opt.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state["state"][key][k])) for k, v in value.items())
    assert all(p.grad is None for p in model.parameters())
    assert not opt.step(winner, loser).skipped


def test_a_non_finite_loss_with_finite_gradients_is_skipped_too():
    """cross_entropy over no token is NaN with zero gradients (PITFALLS 2.6)."""
    model, opt, winner, _ = toy()
    empty = lambda: nn.functional.cross_entropy(model(torch.randn(2, 6)), torch.tensor([-100, -100]))  # noqa: E731
    before = vector(model)
    assert opt.step(winner, empty).skipped and torch.equal(vector(model), before)


def test_raise_names_the_numbers_and_steps_nothing():
    model, opt, winner, loser = toy(on_nonfinite="raise")
    before = vector(model)
    with pytest.raises(NonFiniteGradient, match=r"\|g_w\|\^2 = nan.*nothing was stepped"):
        opt.step(lambda: winner() * float("nan"), loser)
    assert torch.equal(vector(model), before) and opt.skipped_steps == 1
    opt.step(winner, loser)


def test_zero_gradients_are_harmless():
    """Checkpoint loaders step once on zeros to make state; a 0/0 coefficient would turn the weights into NaN."""
    model, opt, _, _ = toy(max_norm=1.0)
    before = vector(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    opt.zero_grad()
    opt.step(lambda: 0 * vector_loss(model), lambda: 0 * vector_loss(model))
    assert torch.equal(vector(model), before)


def vector_loss(model):
    return sum(p.sum() for p in model.parameters())


# ---- misuse --------------------------------------------------------------------------------------------------------------


def test_gradients_from_elsewhere_are_refused():
    _, opt, winner, loser = toy()
    winner().backward()
    with pytest.raises(GradientError, match=r"4 parameters already hold a gradient.*zero_grad\(\)"):
        opt.step(winner, loser)
    opt.zero_grad()
    opt.step(winner, loser)


def test_zero_grad_inside_a_closure_clears_that_side_alone():
    model, opt, winner, loser = toy()
    other, plain, w, x = toy()

    def zeroing(loss):
        def closure():
            opt.zero_grad()
            return loss()

        return closure

    opt.step(zeroing(winner), zeroing(loser))
    plain.step(w, x)
    assert torch.equal(vector(model), vector(other))


@pytest.mark.parametrize("side", ["winner", "loser"])
def test_a_closure_without_gradient(side):
    _, opt, winner, loser = toy()
    closures = {"winner": winner, "loser": loser}
    closures[side] = lambda: None
    with pytest.raises(GradientError, match=f"the {side}'s pass left no gradient on any of the 4 parameters"):
        opt.step(closures["winner"], closures["loser"])
    opt.step(winner, loser)


def test_an_optimizer_of_other_parameters():
    model, _, winner, loser = toy()
    stale = ProjectedGradient(SGD(copy.deepcopy(model).parameters(), lr=1.0))
    with pytest.raises(GradientError, match="built on other parameters"):
        stale.step(winner, loser)


def test_an_exception_in_a_closure_leaves_no_half_state():
    model, opt, winner, loser = toy()
    other, plain, w, x = toy()

    def broken():
        winner().backward()
        raise KeyError("bad batch")

    with pytest.raises(KeyError, match="bad batch"):
        opt.step(broken, loser)
    assert all(p.grad is None for p in model.parameters())
    opt.step(winner, loser)
    plain.step(w, x)
    assert torch.equal(vector(model), vector(other))


def test_contexts_do_not_nest_and_are_closed_before_the_step():
    _, opt, winner, loser = toy()
    with pytest.raises(GradientError, match=r"loser\(\) was entered inside winner\(\)"), opt.winner(), opt.loser():
        pass
    with pytest.raises(GradientError, match=r"inside winner\(\); close that context"), opt.winner():
        winner().backward()
        opt.project()
    with pytest.raises(GradientError, match=r"inside winner\(\); close that context"), opt.winner():
        winner().backward()
        opt.step()
    with opt.loser():
        loser().backward()
    for verb in (opt.project, opt.step):
        with pytest.raises(GradientError, match="no winner's gradient"):
            verb()
    with pytest.raises(GradientError, match="one way or the other"):
        opt.step(winner, loser)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: ProjectedGradient([p]), "base is a list; expected a torch.optim.Optimizer"),  # type: ignore[arg-type]
        (lambda p: ProjectedGradient(ProjectedGradient(SGD([p]))), "already a ProjectedGradient"),
        (lambda p: ProjectedGradient(torch.optim.LBFGS([p])), "LBFGS.step needs a closure"),
        (lambda p: ProjectedGradient(torch.optim.SparseAdam([p])), "sparse gradients"),
        (lambda p: ProjectedGradient(SGD([p]), max_norm=0.0), "max_norm is 0.0; expected a positive number"),
        (lambda p: ProjectedGradient(SGD([p]), scope="layer"), "scope is 'layer'"),
        (lambda p: ProjectedGradient(SGD([p]), on_nonfinite="ignore"), "on_nonfinite is 'ignore'"),
        (lambda p: ProjectedGradient(SGD([p])).step(None, lambda: None), "loser but no winner"),
        (lambda p: ProjectedGradient(SGD([p])).step((lambda: None,)), "sequence of 1 closures"),
    ],
)
def test_wrong_arguments_say_what_was_expected(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(nn.Parameter(torch.zeros(2)))


# ---- a torch optimizer like any other ------------------------------------------------------------------------------------


def test_the_base_never_gets_a_closure():
    _, opt, winner, loser = toy()
    calls = []
    step = opt.base.step
    opt.base.step = lambda *args, **kwargs: calls.append((args, kwargs)) or step()
    opt.step(winner, loser)
    opt.step(winner)
    opt.step()
    assert calls == [((), {})] * 3


def test_checkpoints_are_the_bases_own_and_resume_bitwise():
    def run(steps, opt, winner, loser):
        for _ in range(steps):
            opt.step(winner, loser)

    model, opt, winner, loser = toy(max_norm=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 / (1 + k))
    for _ in range(4):
        opt.step(winner, loser)
        scheduler.step()
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), scheduler.state_dict()))
    for _ in range(4):
        opt.step(winner, loser)
        scheduler.step()

    fresh, again, w, x = toy(seed=0, max_norm=0.1)
    resumed = torch.optim.lr_scheduler.LambdaLR(again, lambda k: 1 / (1 + k))
    fresh.load_state_dict(saved[0])
    again.load_state_dict(state_dict=saved[1])
    resumed.load_state_dict(saved[2])
    for _ in range(4):
        again.step(w, x)
        resumed.step()
    assert torch.equal(vector(fresh), vector(model))
    bare = RMSprop(fresh.parameters(), lr=1.0)
    bare.load_state_dict(opt.state_dict())
    assert bare.state_dict()["param_groups"] == opt.state_dict()["param_groups"] and bare.param_groups[0]["lr"] < 1e-2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_base_options_and_state(clone):
    model, opt, winner, loser = toy(max_norm=0.3)
    opt.step(winner, loser)
    twin_model, twin = clone((model, opt))
    assert isinstance(twin, ProjectedGradient) and twin.max_norm == 0.3 and twin.rule is orthogonal
    ours, theirs = [list(m.parameters()) for m in (model, twin_model)]
    for p, q in zip(ours, theirs):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    opt.step()
    twin.step()
    assert torch.equal(vector(model), vector(twin_model)) and theirs[0] is twin.param_groups[0]["params"][0]


def test_param_groups_added_and_swapped_later_are_used():
    p, q, r = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    opt = ProjectedGradient(SGD([p], lr=1.0))
    opt.add_param_group({"params": [q], "lr": 0.5})
    opt.param_groups[0]["params"] = [r]
    opt.step(lambda: r.sum() + q.sum(), lambda: (r * torch.tensor([1.0, -1.0])).sum())
    assert r.tolist() == [-1, -1] and q.tolist() == [-0.5, -0.5] and p.tolist() == [0, 0]


def test_hooks_run_where_they_should():
    _, opt, winner, loser = toy()
    seen = []
    opt.register_step_pre_hook(lambda *a: seen.append("pre"))
    opt.register_step_post_hook(lambda *a: seen.append("post"))
    opt.base.register_step_pre_hook(lambda o, *a: seen.append(all(p.grad is not None for p in opt.param_groups[0]["params"])))
    opt.register_state_dict_post_hook(lambda o, d: seen.append("saved"))
    opt.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append("loading"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    opt.step(winner, loser)
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", True, "post", "saving", "saved", "loading", "loaded"]


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.5**k),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_the_bases_learning_rate(name, recwarn):
    _, opt, winner, loser = toy()
    _, other, _, _ = toy()
    ours, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](other.base)
    for k in range(5):
        opt.step(winner, loser)
        other.base.step()
        for s in (ours, theirs):
            s.step(1.0) if name == "ReduceLROnPlateau" else s.step()
        assert opt.base.param_groups[0]["lr"] == other.base.param_groups[0]["lr"], k
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]
