"""What is remembered of earlier gradients: running means and subspaces, as constraints and in checkpoints."""

import copy
import pickle

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from ogdopt import ProjectedGradient
from ogdopt.cone import Grams, nearest
from ogdopt.memory import Remembered, Subspace
from tests.test_optimizer import vector
from tests.test_preserve import flat, world


def test_a_mean_of_losers_is_respected_beside_the_batchs_own():
    """Against a mean kept by hand, over six steps on changing batches."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    opt = ProjectedGradient(SGD(model.parameters(), lr=0.1), remember={"loser": Remembered(0.8)})
    mean, bound = None, 0
    for k in range(6):
        data = [(torch.randn(4, 5), torch.randint(3, (4,))) for _ in range(2)]
        winner, loser = (lambda d=d: nn.functional.cross_entropy(model(d[0]), d[1]) for d in data)
        g = [flat(model, winner), flat(model, loser), *([] if mean is None else [mean])]
        c = nearest(Grams((torch.stack(g) @ torch.stack(g).T)[None], (-1,) * (len(g) - 1)))[0]
        before = vector(model).double()
        report = opt.step(winner, loser)
        torch.testing.assert_close(before - vector(model).double(), 0.1 * (c @ torch.stack(g)), rtol=1e-3, atol=1e-6)
        assert (report.joint is None) == (k == 0)
        bound += k > 0 and c[2].item() < 0
        mean = g[1] if mean is None else 0.8 * mean + 0.2 * g[1]
    assert bound  # the mean took part


def test_what_is_kept_may_be_asked_for_every_third_step():
    _, opt, winner, loser, kept = world(4, lr=0.05, remember={"facts": Remembered(0.5)})
    for k in range(7):
        asked = {"preserve": {"facts": kept[0]}} if k % 3 == 0 else {}
        report = opt.step(winner, loser, **asked)
        names = () if report.joint is None else report.joint.names
        wanted = ["loser"] * bool(k) + ["facts"] * (bool(k) and not k % 3) + ["facts remembered"] * bool(k)
        assert list(names) == wanted if k else names in ((), ("loser", "facts"))
    assert opt.options.remember["facts"].steps == 3


def changing(form):
    """A net after six steps on changing batches, with a mean of losers that takes part in them."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    opt = ProjectedGradient(SGD(model.parameters(), lr=0.1), remember={"loser": Remembered(0.8, form)})
    for _ in range(6):
        data = [(torch.randn(4, 5), torch.randint(3, (4,))) for _ in range(2)]
        opt.step(*(lambda d=d: nn.functional.cross_entropy(model(d[0]), d[1]) for d in data))
    return vector(model)


@pytest.mark.parametrize("form", [torch.bfloat16, "int8"])
def test_a_mean_may_wait_rounded(form):
    exact, rounded = changing(None), changing(form)
    assert 0 < (exact - rounded).norm() < 1e-2 * exact.norm()


def test_a_step_that_is_not_finite_is_not_remembered():
    _, opt, winner, loser, _ = world(remember={"loser": Remembered()})
    opt.step(winner, loser)
    assert opt.step(winner, lambda: loser() * float("inf")).skipped
    assert opt.options.remember["loser"].steps == 1
    assert not opt.step(winner, loser).skipped


@pytest.mark.parametrize("form", [None, torch.bfloat16, "int8"])
@pytest.mark.parametrize("way", ["dict", "pickle", "deepcopy", "distributed"])
def test_a_resumed_run_goes_on_remembering(way, form, tmp_path):
    def fresh():
        return world(4, lr=0.05, remember={"loser": Remembered(0.9, form), "preserve": Remembered(0.8, form)})

    model, opt, winner, loser, kept = fresh()
    for _ in range(3):
        opt.step(winner, loser, preserve=kept[0])
    other, again, winner2, loser2, kept2 = fresh()
    other.load_state_dict(model.state_dict())
    if way == "dict":
        again.memories.load_state_dict(copy.deepcopy(opt.memories.state_dict()))
    elif way == "distributed":
        dcp.save({"memories": opt.memories}, checkpoint_id=tmp_path)
        dcp.load({"memories": again.memories}, checkpoint_id=tmp_path)
    else:
        twin = pickle.loads(pickle.dumps(opt)) if way == "pickle" else copy.deepcopy(opt)
        again.remember = twin.remember
    for _ in range(2):
        opt.step(winner, loser, preserve=kept[0])
        again.step(winner2, loser2, preserve=kept2[0])
    if form is None or way in ("pickle", "deepcopy"):
        assert torch.equal(vector(model), vector(other))
    else:  # what was rounded is rounded once more
        torch.testing.assert_close(vector(model), vector(other), rtol=1e-5, atol=1e-6)


def test_before_the_first_step_a_checkpoint_has_the_same_keys():
    _, opt, winner, loser, _ = world(remember={"loser": Remembered()})
    before = opt.memories.state_dict()["loser"].keys()
    opt.step(winner, loser)
    assert opt.memories.state_dict()["loser"].keys() == before
    with pytest.raises(ValueError, match=r"remembers \['facts'\]; expected \['loser'\]"):
        opt.memories.load_state_dict({"facts": {}})


# ---- subspaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, torch.bfloat16, "int8"])
def test_a_step_leaves_a_subspace_alone(form):
    """OGPSA: no step has a part along the gradients of the reference examples, whatever winner and loser are."""
    model, _, winner, loser, kept = world(4)
    space = Subspace(model.parameters(), [*kept, lambda: 2 * kept[0]()], form=form)
    assert space.rank == 2  # the third depends on the first
    reference = [flat(model, f) for f in kept]
    opt = ProjectedGradient(SGD(model.parameters(), lr=1.0), remember={"reference": space})
    before = vector(model).double()
    w, x = flat(model, winner), flat(model, loser)
    report = opt.step(winner, loser)
    moved = before - vector(model).double()
    limit = {None: 1e-5, torch.bfloat16: 2e-3, "int8": 1e-2}[form]
    for g in reference:
        assert abs(moved @ g) <= limit * g.norm() * w.norm()
    assert moved @ x <= 1e-6 and moved @ w > 0
    assert report.joint is not None and report.joint.names == ("loser", "reference 0", "reference 1")
    opt.step(winner, loser)
    assert space.rank == 2


def test_the_directions_that_hold_most_are_kept():
    model, _, _, _, kept = world(4)
    space = Subspace(model.parameters(), [lambda: 100 * kept[0](), kept[1]], rank=1)
    (direction,) = space.lists(4)
    d = torch.cat([g.double().flatten() for g in direction])
    g = flat(model, kept[0])
    assert d.norm() == pytest.approx(1.0, abs=1e-6) and abs(d @ g) / g.norm() > 0.999


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3))
def test_directions_are_taken_out_exactly(seed, fixed, rest):
    """Against a quadratic program with equations."""
    import qpsolvers

    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(1 + fixed + rest, 12, generator=generator, dtype=torch.float64)
    signs = (0,) * fixed + (1,) * rest
    u = nearest(Grams((g @ g.T)[None], signs))[0] @ g
    wanted = qpsolvers.solve_qp(
        numpy.eye(12),
        -g[0].numpy(),
        -g[1 + fixed :].numpy() if rest else None,
        numpy.zeros(rest) if rest else None,
        g[1 : 1 + fixed].numpy(),
        numpy.zeros(fixed),
        solver="quadprog",
    )
    torch.testing.assert_close(u, torch.from_numpy(wanted), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Remembered(1.0), ValueError, "decay is 1.0"),
        (lambda: Remembered(form="cpu"), ValueError, "form is 'cpu'"),
        (lambda: Subspace([], []), ValueError, "at least one loss"),
        (lambda: world(remember={"winner": Remembered()}), ValueError, "remember has 'winner'"),
        (lambda: world(remember={"loser": 0.9}), TypeError, r"remember\['loser'\] is a float"),
        (lambda: world(remember={"loser": Remembered()}, metric="optimizer"), ValueError, "what remember= adds"),
    ],
)
def test_what_cannot_be_remembered_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
