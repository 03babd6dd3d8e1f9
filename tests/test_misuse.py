"""Steps that would be silently wrong in one process: refused, with the remedy, and nothing of them left behind."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, RMSprop
from torch.testing._internal.distributed.fake_pg import FakeStore

from ogdopt import GradientError, PairedGradient, ProjectedGradient
from ogdopt.distributed import pending, same_memory
from ogdopt.projection import watch


def toy(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    xs = torch.randn(2, 6, 4)
    opt = ProjectedGradient(RMSprop(model.parameters(), lr=1e-2), **options)
    return model, opt, lambda: model(xs[0]).square().mean(), lambda: (model(xs[1]) - 1).square().mean()


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- gradients in one buffer (PITFALLS S4, S27) --------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("loser", "winner"), ("winner", "loser")])
def test_two_gradients_in_one_buffer_are_refused(order):
    """A captured backward writes both passes into the same memory: the projection of g on itself would be nothing."""
    model, opt, _, _ = toy()
    before = vector(model)
    buffers = [torch.zeros_like(p) for p in model.parameters()]

    def replay(value):
        for p, b in zip(model.parameters(), buffers):
            p.grad = b.fill_(value)

    with getattr(opt, order[0])():
        replay(1.0)
    remedy = r"gradients of 4 parameters over those of the other side.*clone p\.grad"
    with pytest.raises(GradientError, match=remedy), getattr(opt, order[1])():
        replay(2.0)
    assert torch.equal(vector(model), before) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("set_aside", [None, torch.bfloat16])
@pytest.mark.parametrize("order", [("loser", "winner"), ("winner", "loser")])
def test_one_buffer_for_two_bfloat16_gradients_is_refused(order, set_aside):
    """A gradient that is bfloat16 already is set aside as bfloat16 by reference."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    opt = ProjectedGradient(SGD([p], lr=1.0), set_aside=set_aside)
    buffer = torch.zeros_like(p)

    def replay(value):
        p.grad = buffer.fill_(value)

    with getattr(opt, order[0])():
        replay(1.0)
    with pytest.raises(GradientError, match="of 1 parameters over those of the other side"), getattr(opt, order[1])():
        replay(2.0)
    assert p.tolist() == [0.0] * 4


@pytest.mark.parametrize("set_aside", ["int8", "cpu"])
def test_one_buffer_will_do_where_the_loser_s_gradient_is_copied(set_aside):
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    opt = ProjectedGradient(SGD([p], lr=1.0), set_aside=set_aside)
    buffer = torch.zeros_like(p)
    for context, values in ((opt.loser, (1.0, 0.0)), (opt.winner, (1.0, 1.0))):
        with context():
            p.grad = buffer.copy_(torch.tensor(values))
    opt.step()
    assert p.tolist() == [0.0, -1.0]


def test_one_buffer_for_two_micro_batches_of_the_loser_is_refused():
    """The second pass would be added to itself."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    opt = ProjectedGradient(SGD([p], lr=1.0), set_aside=torch.bfloat16)
    buffer = torch.zeros_like(p)
    with pytest.raises(GradientError, match="over those of an earlier backward pass of it"), opt.loser():
        for direction in ((1.0, 0.0), (0.0, 1.0)):
            p.grad = buffer.zero_()
            (p * torch.tensor(direction, dtype=torch.bfloat16)).sum().backward()


def test_gradients_side_by_side_in_one_buffer_are_fine():
    p = nn.Parameter(torch.zeros(2))
    opt = ProjectedGradient(SGD([p], lr=1.0))
    flat = torch.tensor([1.0, 1.0, 1.0, 0.0])
    with opt.loser():
        p.grad = flat[2:]
    with opt.winner():
        p.grad = flat[:2]
    opt.step()
    assert p.tolist() == [0.0, -1.0]


def test_empty_gradients_share_no_memory():
    assert not same_memory(torch.empty(0), torch.empty(0))


# ---- a step in the middle of one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["winner", "loser", "lone closure", "winner context", "loser context"])
def test_a_base_that_steps_on_one_sides_gradient_is_refused(way):
    model, opt, winner, loser = toy()
    before = vector(model)

    def stepping(loss):
        loss().backward()
        opt.base.step()

    where = way.split()[0]
    with pytest.raises(GradientError, match=r"the base stepped inside .*step\(\) comes after them"):
        if way == "lone closure":
            opt.step(lambda: stepping(winner))
        elif way.endswith("context"):
            with getattr(opt, where)():
                stepping(winner)
        elif way == "winner":
            opt.step(lambda: stepping(winner), loser)
        else:
            opt.step(winner, lambda: stepping(loser))
    assert torch.equal(vector(model), before)
    opt.zero_grad()
    opt.step(winner, loser)  # and the guard is down again
    opt.base.step()


@pytest.mark.parametrize("way", ["side", "lone closure"])
def test_a_closure_that_steps_the_wrapper_is_refused(way):
    model, opt, winner, loser = toy()
    before = vector(model)

    def closure():
        winner().backward()
        opt.step()

    with pytest.raises(GradientError, match=r"inside winner\(\); close that context|stepped inside a closure"):
        opt.step(closure, loser) if way == "side" else opt.step(closure)
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x])
def test_the_guard_is_one_hook_and_survives_copies(clone):
    model, opt, _, _ = toy()
    _, twin = clone((model, opt))
    again = clone(twin)
    for one in (opt, twin, again):
        assert len(one.base._optimizer_step_pre_hooks) == 1
        with pytest.raises(GradientError, match="stepped inside winner"), one.winner():
            one.base.step()


def test_two_wrappers_of_one_base_guard_their_own_sides():
    _, opt, winner, loser = toy()
    other = PairedGradient(opt.base, watch)
    opt.step(winner, loser)
    other.step(winner, loser)
    with pytest.raises(GradientError, match="stepped inside loser"), other.loser():
        opt.base.step()


def test_the_guard_keeps_no_wrapper_alive():
    _, opt, _, _ = toy()
    base, gone = opt.base, weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None and base is not None


# ---- gradients that never reach p.grad (PITFALLS S23, S3) ----------------------------------------------------------------


def test_autograd_grad_is_named():
    model, opt, winner, loser = toy()

    def closure():
        torch.autograd.grad(winner(), list(model.parameters()))

    with pytest.raises(GradientError, match=r"the winner's pass left no gradient.*torch\.autograd\.grad leaves p\.grad alone"):
        opt.step(closure, loser)


# ---- model= --------------------------------------------------------------------------------------------------------------


def test_a_plain_model_has_nothing_pending_and_changes_no_step():
    model, opt, winner, loser = toy()
    other, watched, w, x = toy()
    watched = ProjectedGradient(watched.base, model=other)
    for _ in range(3):
        opt.step(winner, loser)
        watched.step(w, x)
    assert pending([], other) is None and torch.equal(vector(model), vector(other))


def test_no_sync_is_seen_until_it_ends():
    """What DDP sets inside no_sync(), on a model of one process; the real ones run in test_distributed.py."""
    model, opt, winner, loser = toy()
    opt = ProjectedGradient(opt.base, model=nn.ModuleDict({"net": model}))
    model.require_backward_grad_sync = False
    with pytest.raises(
        GradientError, match=r"the loser's pass ended.*Sequential 'net' is inside no_sync\(\).*last micro-batch"
    ):
        opt.step(winner, loser)
    model.require_backward_grad_sync = True
    opt.step(winner, loser)


def test_copies_carry_the_model():
    model, opt, _, _ = toy()
    opt = ProjectedGradient(opt.base, model=model)
    twin_model, twin = copy.deepcopy((model, opt))
    assert twin.model is twin_model


# ---- shards of bases that are not elementwise (PITFALLS S20) -------------------------------------------------------------


@pytest.mark.parametrize(("base", "warned"), [(torch.optim.AdamW, False), (torch.optim.Adafactor, True)])
def test_shards_of_a_base_that_is_not_elementwise_are_warned_of(base, warned, recwarn):
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        ProjectedGradient(base([nn.Parameter(torch.zeros(4))]), process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    told = [str(w.message) for w in recwarn if "element by element" in str(w.message)]
    assert len(told) == warned and all("Adafactor is not known" in text for text in told)
