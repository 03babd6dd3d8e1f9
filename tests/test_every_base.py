"""One table over every optimizer class of torch.optim, torch_optimizer and schedulefree: what runs, what does not, and why."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ogdopt import ProjectedGradient

# module -> class -> options; a list where several sets of options are worth a row. The classes below are for all modules
# the complete list at the pinned versions: a class that is new there has to be given its place here.
RUNS = {
    "torch.optim": {
        "ASGD": {},
        "Adadelta": {},
        "Adafactor": {},
        "Adagrad": [{}, {"fused": True}],
        "Adam": [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}],
        "AdamW": [{}, {"foreach": True}, {"fused": True}],
        "Adamax": {},
        "Muon": {},
        "NAdam": {},
        "RAdam": {},
        "RMSprop": [{}, {"foreach": True}, {"momentum": 0.9, "centered": True}],
        "Rprop": {},
        "SGD": [{}, {"foreach": True, "momentum": 0.9}, {"fused": True}],
    },
    "torch_optimizer": {
        "A2GradExp": {},
        "A2GradInc": {},
        "A2GradUni": {},
        "AccSGD": {},
        "AdaBelief": {},
        "AdaBound": {},
        "AdaMod": {},
        "Adafactor": {"relative_step": False, "scale_parameter": False},  # by default it has no lr that could be scheduled
        "AdamP": {},
        "AggMo": {},
        "Apollo": {},
        "DiffGrad": {},
        "LARS": {},
        "Lamb": {},
        "MADGRAD": {},
        "NovoGrad": {},
        "PID": {},
        "QHAdam": {},
        "QHM": {},
        "RAdam": {},
        "Ranger": {},
        "RangerQH": {},
        "RangerVA": {},
        "SGDP": {},
        "SGDW": {},
        "SWATS": {},
        "Shampoo": {},
        "Yogi": {},
    },
    "schedulefree": {
        "AdamWScheduleFree": {},
        "AdamWScheduleFreePaper": {},
        "AdamWScheduleFreeReference": {},
        "RAdamScheduleFree": {},
        "SGDScheduleFree": {},
        "SGDScheduleFreeReference": {},
    },
}
# Refused when wrapped: class -> what the TypeError says.
REFUSED = {
    "torch.optim": {"LBFGS": "needs a closure", "SparseAdam": "sparse gradients"},
    "torch_optimizer": {},
    "schedulefree": dict.fromkeys(
        ["AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"], "needs a closure"
    ),
}
# Wrapped, but not usable: class -> (error, message, why). Each fails bare, in the same loop, in the same way.
BROKEN = {
    "torch.optim": {},
    "torch_optimizer": {
        "Adahessian": (RuntimeError, "does not have grad_fn", "differentiates the gradient's graph, which no step keeps"),
        "Lookahead": (
            AttributeError,
            "_optimizer_state_dict_pre_hooks",
            "has not called Optimizer.__init__, so cannot be saved",
        ),
    },
    "schedulefree": {},
}
MATRICES_ONLY = {"Muon"}


def rows(table):
    found = []
    for module, classes in table.items():
        for name, options in classes.items():
            for choice in options if isinstance(options, list) else [options]:
                words = "-".join(choice) if isinstance(choice, dict) else ""
                found.append(pytest.param(module, name, choice, id=f"{module}.{name}{'-' * bool(words)}{words}"))
    return found


every_running = pytest.mark.parametrize(("module", "name", "options"), rows(RUNS))


def classes(module):
    found = vars(pytest.importorskip(module)).items()
    return {n: c for n, c in found if isinstance(c, type) and issubclass(c, Optimizer) and c is not Optimizer}


def build(module, name, options=(), wrap=True):
    """A model with losses of two kinds of data, and the optimizer (bare or wrapped) under a schedule."""
    cls = classes(module).get(name)
    if cls is None:
        pytest.skip(f"this {module} has no {name}")
    torch.manual_seed(0)
    bias = name not in MATRICES_ONLY
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 4, bias=bias))
    if name == "Lookahead":
        base = cls(torch.optim.SGD(model.parameters(), lr=1e-2))
    else:
        base = cls(model.parameters(), **({"lr": 1e-2} | dict(options)))
    opt = ProjectedGradient(base) if wrap else base
    if module == "schedulefree":
        opt.train()
    data = [torch.randn(8, 5) for _ in range(2)]
    losses = [lambda x=x, t=t: nn.functional.cross_entropy(model(x), torch.full((8,), t)) for x, t in zip(data, (1, 2))]
    return model, opt, losses


def scheduled(opt):
    return LambdaLR(opt, lambda k: 1 / (1 + k))


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def saved(opt):
    """The bytes of a checkpoint."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    return file.getvalue()


@pytest.mark.parametrize("module", RUNS)
def test_the_table_is_complete(module):
    listed = [*RUNS[module], *REFUSED[module], *BROKEN[module]]
    assert not set(classes(module)) - set(listed) and len(set(listed)) == len(listed)
    assert len(set(classes(module)) & set(RUNS[module])) >= len(RUNS[module]) - 1  # older torch has no Muon


@pytest.mark.parametrize(("module", "name", "message"), rows(REFUSED))
def test_refused(module, name, message):
    with pytest.raises(TypeError, match=message):
        build(module, name)


@pytest.mark.parametrize(("module", "name", "reason"), rows(BROKEN))
def test_what_does_not_run_fails_bare_in_the_same_way(module, name, reason):
    error, message, _ = reason
    for wrap in (False, True):
        _, opt, (winner, _) = build(module, name, wrap=wrap)
        with pytest.raises(error, match=message):
            winner().backward()
            opt.step()
            opt.state_dict()


@every_running
def test_is_the_base_where_the_two_gradients_conflict(module, name, options):
    """Where the loser's gradient opposes the winner's, weights, schedule and checkpoint are the bare base's, bit for bit."""
    model, opt, (winner, _) = build(module, name, options)
    plain, base, (w, _) = build(module, name, options, wrap=False)
    ours, theirs = scheduled(opt), scheduled(base)
    for _ in range(4):
        opt.step(winner, lambda: -winner())
        base.zero_grad()
        w().backward()
        base.step()
        ours.step()
        theirs.step()
        assert opt.param_groups[0]["lr"] == base.param_groups[0]["lr"]
    assert torch.equal(vector(model), vector(plain)) and saved(opt) == saved(base)


@every_running
def test_steps_and_resumes_bitwise(module, name, options):
    model, opt, losses = build(module, name, options)
    before, schedule = vector(model), scheduled(opt)

    def run(opt, schedule, losses):
        for _ in range(3):
            opt.step(*losses)
            schedule.step()

    run(opt, schedule, losses)
    checkpoint = copy.deepcopy((model.state_dict(), opt.state_dict(), schedule.state_dict()))
    run(opt, schedule, losses)
    fresh, again, fresh_losses = build(module, name, options)
    resumed = scheduled(again)
    for part, state in zip((fresh, again, resumed), checkpoint):
        part.load_state_dict(state)
    run(again, resumed, fresh_losses)
    assert torch.equal(vector(fresh), vector(model)) and not torch.equal(vector(model), before)


def test_schedule_free_modes_are_the_bases():
    """train() and eval() move the weights between the two sets that the base keeps; stepping in eval mode is its own error."""
    model, opt, losses = build("schedulefree", "AdamWScheduleFree")
    plain, base, (w, _) = build("schedulefree", "AdamWScheduleFree", wrap=False)
    for _ in range(3):
        opt.step(losses[0])
        base.zero_grad()
        w().backward()
        base.step()
    training = vector(model)
    opt.eval()
    base.eval()
    assert torch.equal(vector(model), vector(plain)) and not torch.equal(vector(model), training)
    with pytest.raises(Exception, match="train mode"):
        opt.step(*losses)
    opt.zero_grad()
    opt.train()
    torch.testing.assert_close(vector(model), training)
    opt.step(*losses)


def test_bases_without_modes_have_none():
    """Trainers ask by hasattr before they call."""
    _, opt, _ = build("torch.optim", "AdamW")
    assert not hasattr(opt, "train") and not hasattr(opt, "eval")
    with pytest.raises(AttributeError, match=r"AdamW has no eval\(\).*model\.eval\(\)"):
        opt.eval()


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(4, 2, sparse=True)
    opt = ProjectedGradient(torch.optim.SGD(embedding.parameters(), lr=1.0))
    before = vector(embedding)
    losses = [lambda k=k: embedding(torch.tensor([k, 1])).square().sum() for k in (0, 1)]
    with pytest.raises(TypeError, match=r"sparse gradient of shape \(4, 2\).*sparse=False"):
        opt.step(*losses)
    losses[0]().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        opt.step()
    assert torch.equal(vector(embedding), before)


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_complex_parameters_are_pairs_of_reals(name):
    torch.manual_seed(0)
    start, target, other = torch.randn(3, 4, 2, dtype=torch.cfloat)
    moved = []
    for real in (False, True):
        p = nn.Parameter(torch.view_as_real(start).clone() if real else start.clone())
        opt = ProjectedGradient(getattr(torch.optim, name)([p], lr=0.1), max_norm=0.7)
        value = (lambda p=p: torch.view_as_complex(p)) if real else (lambda p=p: p)
        losses = [lambda t=t, value=value: (value() - t).abs().square().sum() for t in (target, other)]
        reports = [opt.step(*losses) for _ in range(4)]
        moved.append(p.detach() if real else torch.view_as_real(p.detach()))
    assert reports[0].cosine > 0 and reports[0].coefficients[1] < 0
    torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "NAdam"])
def test_capturable_bases(name):
    moved = []
    for options in ({}, {"capturable": True}):
        torch.manual_seed(0)
        model = nn.Linear(5, 4).cuda()
        opt = ProjectedGradient(getattr(torch.optim, name)(model.parameters(), lr=1e-2, **options), max_norm=1.0)
        x, y = torch.randn(2, 8, 5).cuda()
        for _ in range(3):
            opt.step(lambda m=model, x=x: m(x).square().mean(), lambda m=model, y=y: (m(y) - 1).square().mean())
        moved.append(vector(model))
    torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-6)
