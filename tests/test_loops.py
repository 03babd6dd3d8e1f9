"""A paired optimizer in people's loops: habits, slips, several optimizers, and what loggers read."""

import copy
import gc
import pickle
import warnings
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ogdopt import GradientError, PairedGradient, ProjectedGradient
from ogdopt.optimizer import LONE
from ogdopt.projection import RULES, interval, normalized, orthogonal, watch
from tests.gradients import norm
from tests.test_optimizer import gradients, toy, vector


def moved(model, step):
    before = vector(model)
    step()
    return vector(model) - before


# ---- options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_norm", -1.0, r"max_norm is -1.0; expected a positive number"),
        ("max_norm", float("nan"), r"max_norm is nan"),
        ("max_norm", "1", r"max_norm is '1'"),
        ("max_norm", [1.0, 2.0, 3.0], r"max_norm has 3 numbers, and there are 1 parameter groups"),
        ("metric", "optimiser", r"metric is 'optimiser'; expected 'euclidean' or 'optimizer'"),
        ("set_aside", "int4", r"set_aside is 'int4'"),
        ("scope", "layer", r"scope is 'layer'"),
        ("on_nonfinite", "ignore", r"on_nonfinite is 'ignore'"),
        ("measure_change", "yes", r"measure_change is 'yes'; expected False or True"),
        ("fused", 2, r"fused is 2"),
        ("rule", "ortogonal", r"rule is 'ortogonal'; did you mean 'orthogonal'\?"),
    ],
)
def test_an_option_is_checked_when_made_when_set_and_not_half_set(name, value, message):
    _, opt, winner, loser = toy()
    before = opt.options
    with pytest.raises(ValueError, match=message):
        setattr(opt, name, value)
    assert opt.options is before
    opt.step(winner, loser)
    given = {"rule": orthogonal} | {name: value}
    with pytest.raises(ValueError, match=message):
        PairedGradient(SGD([nn.Parameter(torch.ones(2))], lr=1.0), **given)


def test_options_that_exclude_each_other_are_refused_when_one_is_set():
    _, opt, _, _ = toy(metric="optimizer")
    for name, value in (("rule", normalized), ("set_aside", "recompute"), ("max_norm", [1.0])):
        with pytest.raises(ValueError, match="metric='optimizer'"):
            setattr(opt, name, value)
    _, opt, _, _ = toy(set_aside="recompute")
    with pytest.raises(ValueError, match="measure_change=True"):
        opt.measure_change = True


def test_options_that_are_set_hold_and_survive_copies_and_pickles():
    _, opt, _, _ = toy()
    opt.max_norm, opt.scope, opt.set_aside, opt.fused, opt.rule = 0.5, "group", torch.bfloat16, True, "normalized"
    for one in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert (one.max_norm, one.scope, one.set_aside, one.fused, one.rule) == (0.5, "group", torch.bfloat16, True, normalized)
        assert "rule=normalized, max_norm=0.5, scope='group', set_aside=torch.bfloat16, fused=True" in repr(one)


def test_a_rule_may_be_named():
    p = nn.Parameter(torch.ones(2))
    for name, rule in RULES.items():
        assert PairedGradient(SGD([p], lr=1.0), name).rule is rule
    with pytest.raises(TypeError, match=r"rule is a int; expected a function of ogdopt.projection, or the name of one"):
        PairedGradient(SGD([p], lr=1.0), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3}, r"unknown option lr=; lr is the base's: ProjectedGradient\(torch.optim.RMSprop"),
        ({"clip": 1.0}, r"unknown option clip=; did you mean max_norm=\?"),
        ({"max_grad_norm": 1.0}, r"did you mean max_norm=\?"),
        ({"mesure_change": True}, r"did you mean measure_change=\?"),
        ({"zzz": True}, r"it takes base, max_norm, scope"),
    ],
)
def test_a_mistyped_option_is_answered_with_the_one_that_was_meant(options, message):
    with pytest.raises(TypeError, match=message):
        ProjectedGradient(SGD([nn.Parameter(torch.ones(2))], lr=1.0), **options)


def test_a_class_in_the_place_of_an_optimizer_is_named():
    with pytest.raises(TypeError, match=r"base is the class Adam; expected an object"):
        ProjectedGradient(Adam)  # type: ignore[arg-type]


# ---- limits by group -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scope": "tensor"}, {"set_aside": "recompute"}, {"fused": True}])
def test_each_group_is_clipped_by_its_own_limit(options):
    """Against the unclipped step, group by group; None leaves a group alone."""
    free, _, w, x = toy()
    ours, _, w2, x2 = toy()
    limits = (1e-2, None, 1e3)

    def groups(model):
        a, b, c, d = model.parameters()
        return [{"params": [a]}, {"params": [b, c]}, {"params": [d]}]

    plain = ProjectedGradient(SGD(groups(free), lr=1.0), **options)
    opt = ProjectedGradient(SGD(groups(ours), lr=1.0), max_norm=limits, **options)
    starts = [p.detach().clone() for p in free.parameters()]
    plain.step(w, x)
    report = opt.step(w2, x2)
    changes = [[p.detach() - s for p, s in zip(m.parameters(), starts)] for m in (free, ours)]
    for picked, limit in zip(([0], [1, 2], [3]), limits):
        length = norm([changes[0][i] for i in picked])
        factor = 1.0 if limit is None else min(1.0, limit / (length + 1e-6))
        for i in picked:
            torch.testing.assert_close(changes[1][i], factor * changes[0][i], rtol=1e-5, atol=1e-7)
    assert report.clipped


def test_a_plain_step_and_a_projected_one_by_hand_are_clipped_by_group_too():
    for by_hand in (False, True):
        model, _, w, x = toy()
        a, b, c, d = model.parameters()
        opt = ProjectedGradient(SGD([{"params": [a, b]}, {"params": [c, d]}], lr=1.0), max_norm=[1e-3, None])
        start = [p.detach().clone() for p in (a, b, c, d)]
        if by_hand:
            with opt.loser():
                x().backward()
            with opt.winner():
                w().backward()
            opt.project()
        else:
            with opt.winner():
                w().backward()
        opt.step()
        assert norm([p.detach() - s for p, s in zip((a, b), start)]) == pytest.approx(1e-3, rel=1e-2)
        assert norm([p.detach() - s for p, s in zip((c, d), start[2:])]) > 1e-2


# ---- what an optimizer takes ---------------------------------------------------------------------------------------------


def test_state_groups_and_defaults_can_be_assigned_as_on_any_optimizer():
    model, opt, winner, loser = toy()
    opt.step(winner, loser)
    opt.state = defaultdict(dict)
    assert opt.base.state == {} and opt.state is opt.base.state
    opt.param_groups = [{**opt.param_groups[0], "lr": 0.25}]
    assert opt.base.param_groups[0]["lr"] == 0.25
    opt.defaults = {**opt.defaults, "lr": 0.25}
    assert opt.base.defaults["lr"] == 0.25
    opt.step(winner, loser)
    assert set(opt.base.state) == set(model.parameters())


def test_zeros_that_zero_grad_left_are_no_gradient():
    model, opt, winner, loser = toy()
    reference, other, winner2, loser2 = toy()
    winner().backward()
    model.zero_grad(set_to_none=False)
    opt.step(winner, loser)
    other.step(winner2, loser2)
    assert torch.equal(vector(model), vector(reference))
    winner().backward()
    with pytest.raises(GradientError, match=r"already hold a gradient.*ProjectedGradient\(\[muon, adamw\]\)"):
        opt.step(winner, loser)


@pytest.mark.filterwarnings("ignore:step.. found one gradient")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_torchs_own_closure_with_zero_grad_inside_works(set_to_none):
    """Three steps as the bare base takes them, each running its closure once; after a plain step too."""
    one, opt, winner, _ = toy()
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad(set_to_none)
        loss = winner()
        loss.backward()
        return loss

    winner().backward()
    opt.step()
    for _ in range(3):
        opt.step(closure)
    assert calls == 3
    reference, _, wanted, _ = toy()
    base = RMSprop(reference.parameters(), lr=1e-2)
    for _ in range(4):
        base.zero_grad()
        wanted().backward()
        base.step()
    torch.testing.assert_close(vector(one), vector(reference))


@pytest.mark.filterwarnings("ignore:step.. found one gradient")
def test_a_closure_that_returns_a_loss_beside_a_stale_gradient_is_refused():
    _, opt, winner, _ = toy()
    winner().backward()
    with pytest.raises(GradientError, match="already hold a gradient"):
        opt.step(winner)


def test_a_closure_may_follow_a_projection_that_a_scaler_did_not_step_on():
    model, opt, winner, loser = toy()
    with opt.loser():
        loser().backward()
    with opt.winner():
        winner().backward()
    opt.project()
    wanted = gradients(model, winner)
    opt.step(winner)  # the mixture is dropped, not added to
    torch.testing.assert_close(opt.report.norm.item(), norm(wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ["loser first", "winner first"])
def test_clipping_by_hand_between_contexts_and_step_works_and_is_told_once(order):
    model, _, winner, loser = toy()
    opt = ProjectedGradient(SGD(model.parameters(), lr=1.0))

    def collect():
        sides = [(opt.loser, loser), (opt.winner, winner)]
        for context, loss in sides if order == "loser first" else sides[::-1]:
            with context():
                loss().backward()

    collect()
    seen = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert seen.item() == pytest.approx(norm(gradients(model, winner)), rel=1e-6)  # what a trainer logs is no 0
    with pytest.warns(UserWarning, match=r"call project\(\) first") as told:
        change = moved(model, opt.step)
    assert told[0].filename == __file__
    assert 0 < change.norm().item() < 1.001e-3
    collect()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moved(model, opt.step).norm().item() < 1.001e-3


def test_gradients_that_are_only_looked_at_between_contexts_and_step_change_nothing():
    one, opt, winner, loser = toy()
    two, other, winner2, loser2 = toy()
    with opt.loser():
        loser().backward()
    with opt.winner():
        winner().backward()
    torch.nn.utils.get_total_norm([p.grad for p in one.parameters() if p.grad is not None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    other.step(winner2, loser2)
    assert torch.equal(vector(one), vector(two))


def test_gradients_cleared_between_the_contexts_are_cleared_on_both_sides():
    """model.zero_grad() leaves no stale side for the next batch."""
    model, opt, winner, loser = toy()
    with opt.loser():
        loser().backward()
    with opt.winner():
        winner().backward()
    model.zero_grad()
    reference, other, winner2, loser2 = toy()
    for o, w, x in ((opt, winner, loser), (other, winner2, loser2)):
        with o.winner():
            w().backward()
        with o.loser():
            x().backward()
        o.step()
    assert torch.equal(vector(model), vector(reference))


# ---- plain training that was meant to be projected -----------------------------------------------------------------------


def test_a_projector_that_never_sees_two_sides_says_so_once():
    _, opt, winner, _ = toy()
    winner().backward()
    with pytest.warns(UserWarning, match=r"plain step of the base.*step\(winner, loser\).*with opt.winner\(\)") as told:
        opt.step()
    assert told[0].filename == __file__ and len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_a_trainer_that_gives_one_closure_for_ever_is_told_too():
    _, opt, winner, _ = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(LONE - 1):
            opt.step(winner)
    with pytest.warns(UserWarning, match="plain step of the base"):
        opt.step(winner)


@pytest.mark.parametrize("way", ["two closures", "contexts", "winner's context alone", "schedule", "lr 0", "nothing"])
def test_who_gives_two_sides_or_means_one_hears_nothing(way):
    _, opt, winner, loser = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if way == "two closures":
            opt.step(winner, loser)
        elif way == "contexts":
            with opt.loser():
                loser().backward()
            with opt.winner():
                winner().backward()
            opt.step()
        elif way == "winner's context alone":
            with opt.winner():
                winner().backward()
            opt.step()
        elif way == "schedule":
            for k in range(2 * LONE):
                opt.step(winner, *([loser] if k % LONE == 1 else []))
        elif way == "lr 0":  # how torch's distributed checkpoints make a state
            opt.param_groups[0]["lr"] = 0.0
            winner().backward()
            opt.step()
        else:
            opt.step()


# ---- several optimizers --------------------------------------------------------------------------------------------------


def bases_of(model):
    """Muon for matrices and AdamW for the rest."""
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) is flat] for flat in (True, False))
    return [Muon(matrices, lr=1e-2), AdamW(rest, lr=1e-2)]


def both(**options):
    model, _, winner, loser = toy()
    return model, ProjectedGradient(bases_of(model), **options), winner, loser


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.05}, {"set_aside": "int8"}, {"set_aside": "recompute"}])
def test_several_optimizers_share_one_projection_and_one_clip(options):
    model, opt, winner, loser = both(**options)
    reference, _, w2, x2 = toy()
    got = opt.step(winner, loser)
    whole = ProjectedGradient(
        SGD(reference.parameters(), lr=1.0), set_aside="int8" if options.get("set_aside") == "int8" else None
    )
    with whole.loser():
        x2().backward()
    with whole.winner():
        w2().backward()
    want = whole.project()
    assert got.coefficients == pytest.approx(want.coefficients, rel=1e-3)
    assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-3)
    # Each base gets the share of the one projected and clipped gradient that is its own.
    torch.nn.utils.clip_grad_norm_(reference.parameters(), opt.max_norm or torch.inf)
    for base in bases_of(reference):
        base.step()
    torch.testing.assert_close(vector(model), vector(reference), rtol=1e-3, atol=5e-5)


def test_several_optimizers_keep_their_own_checkpoints_schedulers_and_groups():
    model, opt, winner, loser = both()
    muon, adamw = opt.base.bases
    schedulers = [LambdaLR(muon, lambda k: 0.5**k), LambdaLR(adamw, lambda k: 0.1**k)]
    for _ in range(2):
        opt.step(winner, loser)
        for scheduler in schedulers:
            scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.25e-2, 0.01e-2])
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    parts = copy.deepcopy([muon.state_dict(), adamw.state_dict()])
    assert len(saved["state"]) == 4 and sorted(i for g in saved["param_groups"] for i in g["params"]) == [0, 1, 2, 3]
    opt.step(winner, loser)
    wanted = vector(model)
    for whole in (True, False):
        other, again, winner2, loser2 = both()
        other.load_state_dict(weights)
        if whole:
            again.load_state_dict(saved)
        else:
            for base, part in zip(again.base.bases, parts):
                base.load_state_dict(part)
        again.step(winner2, loser2)
        assert torch.equal(vector(other), wanted)


def test_the_state_of_several_optimizers_is_one_mapping():
    model, opt, winner, loser = both()
    opt.step(winner, loser)
    assert len(opt.state) == 4 and set(opt.state) == set(model.parameters())
    bias = next(p for p in model.parameters() if p.ndim == 1)
    assert "exp_avg" in opt.state[bias] and opt.state.get(torch.ones(1)) is None
    opt.state = defaultdict(dict)
    assert all(not base.state for base in opt.base.bases)
    for p in model.parameters():
        assert p not in opt.state and opt.state.get(p) is None
    opt.step(winner, loser)
    assert len(opt.state) == 4


def test_several_optimizers_pickle_copy_and_hook_like_one():
    model, opt, winner, loser = both()
    opt.step(winner, loser)
    again = pickle.loads(pickle.dumps(opt))
    assert [type(base) for base in again.base.bases] == [Muon, AdamW] and len(again.state) == 4
    assert "Muon" in repr(opt) and "AdamW" in repr(opt)
    with opt.winner():
        winner().backward()
        for base in opt.base.bases:
            with pytest.raises(GradientError, match="the base stepped inside winner"):
                base.step()
    opt.step()
    del model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p, q: ProjectedGradient([SGD([p]), SGD([p, q])]), ValueError, "1 parameters of SGD belong to another"),
        (lambda p, q: ProjectedGradient([SGD([p]), "adam"]), TypeError, "base is a str"),
        (lambda p, q: ProjectedGradient([SGD([p]), Adam([q])], metric="optimizer"), ValueError, "there are 2; choose"),
        (lambda p, q: ProjectedGradient([SGD([p]), Adam([q])]).add_param_group({"params": []}), ValueError, "2 optimizers"),
        (lambda p, q: setattr(ProjectedGradient([SGD([p]), Adam([q])]), "param_groups", []), ValueError, "got 0 parameter gr"),
        (lambda p, q: setattr(ProjectedGradient([SGD([p]), Adam([q])]), "defaults", {}), AttributeError, "of its own"),
    ],
)
def test_what_several_optimizers_cannot_do_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make(nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)))


def test_two_optimizers_that_each_project_by_themselves_are_told_of_the_other_way():
    model, _, winner, loser = toy()
    one, two = (ProjectedGradient(base) for base in bases_of(model))
    with pytest.warns(UserWarning, match=r"give the bases to one: ProjectedGradient\(\[muon, adamw\]\)") as told:
        with one.loser(), two.loser():
            loser().backward()
        with one.winner(), two.winner():
            winner().backward()
    assert len(told) == 1
    assert one.step().coefficients != two.step().coefficients


def test_one_optimizer_in_a_list_is_that_one():
    base = SGD([nn.Parameter(torch.ones(2))])
    assert ProjectedGradient([base]).base is base


def test_several_optimizers_are_not_stepped_fused_and_say_so():
    model, opt, winner, loser = both(fused=True)
    reference, plain, w2, x2 = both()
    with pytest.warns(UserWarning, match="several optimizers have no fused form"):
        opt.step(winner, loser)
    plain.step(w2, x2)
    torch.testing.assert_close(vector(model), vector(reference), rtol=1e-4, atol=2e-5)


# ---- hooks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore:fused=True")
def test_a_global_hook_sees_a_step_once_and_with_its_gradient(fused):
    model, opt, winner, loser = toy()
    opt.fused = fused
    seen = []
    before = register_optimizer_step_pre_hook(lambda o, *_: seen.append((type(o), next(model.parameters()).grad is not None)))
    after = register_optimizer_step_post_hook(lambda o, *_: seen.append((type(o), True)))
    try:
        for _ in range(2):
            opt.step(winner, loser)
    finally:
        before.remove()
        after.remove()
    assert seen == [(RMSprop, True)] * 4


def test_own_hooks_see_each_step_once():
    _, opt, winner, loser = toy()
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    opt.step(winner, loser)
    opt.step(winner=winner, loser=loser)
    assert seen == ["before", "after"] * 2


def test_copies_do_not_stop_the_original_from_being_fused():
    _, opt, winner, loser = toy()
    opt.fused = True
    for _ in range(2):
        opt.step(winner, loser)
    assert opt.unfused == ""
    other = copy.copy(opt)
    opt.step(winner, loser)
    assert opt.unfused == other.unfused == ""


def test_a_report_holds_no_graph():
    _, opt, winner, _ = toy(max_norm=0.1)
    with opt.winner():
        winner().backward()
    opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        winner().backward(create_graph=True)
        report = opt.step()
    assert not report.norm.requires_grad and not report.blocks.ww.requires_grad
    opt.zero_grad()
    gc.collect()


# ---- calling it wrongly --------------------------------------------------------------------------------------------------


class Output:
    """Stands for a transformers ModelOutput."""

    def __init__(self, loss):
        self.loss = loss


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o, w, x: o.step(w(), x()), TypeError, "got a loss as the winner; expected a function"),
        (lambda o, w, x: o.step(w, x()), TypeError, "got a loss as the loser; expected a function"),
        (lambda o, w, x: o.step(w, "loser"), TypeError, "got a str as the loser"),
        (lambda o, w, x: o.step(w, x, closure=w), TypeError, "closure is torch's name"),
        (lambda o, w, x: o.step(lambda: Output(w()), x), TypeError, "winner's closure returned a Output.*outputs.loss"),
        (lambda o, w, x: o.step(w, lambda: {"loss": x()}), TypeError, "loser's closure returned a dict"),
    ],
)
def test_a_slip_in_step_is_named(call, error, message):
    _, opt, winner, loser = toy()
    with pytest.raises(error, match=message):
        call(opt, winner, loser)
    opt.zero_grad()
    assert not opt.step(winner=winner, loser=loser).skipped  # nothing half-done is left
    assert not opt.step(closure=(winner, loser)).skipped


@pytest.mark.parametrize("way", ["closures", "contexts", "recompute"])
def test_two_losses_of_one_forward_pass_are_named(way):
    """TRL's concatenated style: the loser's backward frees the graph that the winner's needs."""
    model, opt, _, _ = toy(set_aside="recompute" if way == "recompute" else None)
    out = model(torch.randn(4, 6)).tanh().pow(2).mean(1)
    winner, loser = out[:2].sum(), out[2:].sum()
    with pytest.raises(GradientError, match=r"both losses hang on one forward pass.*retain_graph=True"):
        if way == "contexts":
            with opt.loser():
                loser.backward()
            with opt.winner():
                winner.backward()
        else:
            opt.step(lambda: winner, lambda: loser)
    out = model(torch.randn(4, 6)).tanh().pow(2).mean(1)
    with opt.loser():
        out[2:].sum().backward(retain_graph=True)
    with opt.winner():
        out[:2].sum().backward()
    opt.set_aside = None
    assert opt.step().gram.ll > 0


# ---- what loggers read ---------------------------------------------------------------------------------------------------


def test_a_report_becomes_floats_under_the_names_that_loggers_take():
    _, opt, winner, loser = toy(max_norm=1.0, measure_change=True)
    opt.step(winner, loser)
    report = opt.step(winner, loser)
    found = report.to_dict()
    assert all(type(value) is float for value in found.values())
    assert found["grad_norm"] == report.grad_norm and found["ogd/cosine"] == pytest.approx(report.cosine)
    assert found["ogd/coefficient"] == -report.coefficients[1]
    assert found["ogd/projected_fraction"] == pytest.approx(report.projected_fraction)
    assert found["ogd/norm_chosen"] == pytest.approx(report.gram.ww**0.5) and found["ogd/parallel"] == 0.0
    assert found["loss/chosen"] == pytest.approx(report.winner_loss) and found["skipped"] == 0.0
    cosines = (found["ogd/update_cosine_chosen"], found["ogd/update_cosine_rejected"])
    assert cosines == pytest.approx(report.change_cosines)
    assert "ogd/passes" not in found
    _, opt, winner, loser = toy(scope="tensor", metric="optimizer")
    found = opt.step(winner, loser).to_dict()
    assert "ogd/coefficient" not in found and found["ogd/passes"] >= 1


def test_a_rule_of_another_kind_works_in_all_of_this():
    _, opt, winner, loser = toy()
    other = PairedGradient(opt.base, interval(0.25))
    assert other.step(winner, loser).to_dict()["ogd/coefficient"] > 0
    assert PairedGradient(opt.base, watch).step(winner, loser).coefficients == (1.0, 0.0)
