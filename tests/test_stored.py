"""How the loser's gradient waits: what each form costs in bytes and in angle, and that every way of stepping agrees."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, RMSprop

from ogdopt import GradientError, ProjectedGradient
from ogdopt import stored as stored_module
from ogdopt.gram import gram
from ogdopt.passes import CPU_CHUNK, mix_, products
from ogdopt.stored import BLOCK, Stored
from tests.gradients import inner, norm, reference
from tests.test_optimizer import gradients, toy, vector

FORMS = [None, torch.bfloat16, "int8", "cpu", "recompute"]
PACKED = [torch.bfloat16, "int8", "cpu"]
ROUNDING = {None: 0.0, "cpu": 0.0, "recompute": 0.0, torch.bfloat16: 2.0**-7, "int8": 1 / 127}
"""Twice the largest error of an element, relative to the element (bfloat16) or the largest of its block (int8)."""


@given(st.integers(1, 2000), st.integers(-15, 15), st.integers(0, 100), st.sampled_from(PACKED))
def test_what_is_read_back_is_within_the_rounding(n, exponent, seed, form):
    g = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    stored = Stored(g, form)
    back = torch.cat([piece.float() for piece in stored.pieces(BLOCK)])
    scale = g.abs() if form == torch.bfloat16 else g.abs().max()
    assert torch.all((back - g).abs() <= 0.51 * ROUNDING[form] * scale + 1e-37)
    assert torch.equal(stored.restored(), back)


@pytest.mark.parametrize(("form", "per_element"), [(torch.bfloat16, 2), ("int8", 1 + 4 / BLOCK), ("cpu", 4)])
def test_bytes(form, per_element):
    g = torch.randn(3 * CPU_CHUNK + 1)
    stored = Stored(g, form)
    assert stored.nbytes == pytest.approx(per_element * g.numel(), rel=2e-3)
    assert torch.equal(torch.cat(list(stored.pieces(CPU_CHUNK))).float(), stored.restored())


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stays_so(form, bad):
    g = torch.ones(700)
    g[300] = bad
    assert not Stored(g, form).restored()[300].isfinite()


@pytest.mark.parametrize("form", PACKED)
def test_zeros_empty_and_transposed_tensors(form):
    assert torch.equal(Stored(torch.zeros(5), form).restored(), torch.zeros(5))
    assert Stored(torch.zeros(0, 3), form).restored().shape == (0, 3)
    g, w = torch.randn(20, 30).t(), torch.randn(20, 30).t()
    stored = Stored(g, form)
    assert gram([w], [stored]).wl == pytest.approx(inner([w], [stored.restored()]), rel=1e-9)


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_the_result_is_orthogonal_to_what_is_stored_and_nearly_to_what_was(form, share):
    """Both products are taken with the stored copy; the rounding itself is 100 times larger than the angle it leaves."""
    torch.manual_seed(0)
    g_l = [torch.randn(400, 500), torch.randn(3000)]
    g_w = [share * x + (1 - share) * torch.randn_like(x) for x in g_l]
    ps = [nn.Parameter(torch.zeros_like(g)) for g in g_l]
    opt = ProjectedGradient(SGD(ps, lr=1.0), set_aside=form)
    for context, gs in ((opt.loser, g_l), (opt.winner, g_w)):
        with context():
            sum((p * g).sum() for p, g in zip(ps, gs)).backward()
    opt.project()
    u = [p.grad for p in ps]
    kept = [Stored(g, form).restored() for g in g_l]
    assert abs(inner(u, kept)) <= 1e-7 * norm(u) * norm(kept)
    error = norm([x - y for x, y in zip(kept, g_l)]) / norm(g_l)
    # What u keeps of the rounding e is c e, so that <u, g_l> = <u, e> is about c |e|^2, and the rest is chance.
    left = error**2 * norm(g_w) / norm(u) + 4 * error / 203_000**0.5
    assert abs(inner(u, g_l)) <= (1.2 * left + 1e-7) * norm(u) * norm(g_l)
    exact = reference(g_w, g_l)
    assert norm([x - y for x, y in zip(u, exact)]) <= 2 * error * norm(g_w) + 1e-6 * norm(g_w)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [SGD, RMSprop, Adam])
def test_every_form_takes_nearly_the_same_steps(form, base):
    model, _, winner, loser = toy()
    other, _, w, x = toy()
    opt = ProjectedGradient(base(model.parameters(), lr=1e-2), max_norm=0.5, set_aside=form)
    plain = ProjectedGradient(base(other.parameters(), lr=1e-2), max_norm=0.5)
    for _ in range(4):
        report, expected = opt.step(winner, loser), plain.step(w, x)
        assert report.grad_norm == pytest.approx(expected.grad_norm, rel=0.2 * ROUNDING[form] + 1e-6)
        assert report.winner_loss == pytest.approx(expected.winner_loss, rel=0.02 if ROUNDING[form] else 1e-6)
        assert all(p.grad is None for p in model.parameters())
    if not ROUNDING[form]:
        torch.testing.assert_close(vector(model), vector(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", PACKED)
def test_micro_batches_contexts_and_zero_grad_with_packed_losers(form):
    model, _, winner, loser = toy()
    opt = ProjectedGradient(SGD(model.parameters(), lr=1.0), set_aside=form)
    w, x = gradients(model, winner), gradients(model, loser)
    for _ in range(2):
        with opt.loser():
            (loser() / 2).backward()
    with opt.winner():
        opt.zero_grad()
        winner().backward()
    opt.project()
    for p, u in zip(model.parameters(), reference(w, x)):
        assert norm([p.grad.double() - u]) <= 4 * ROUNDING[form] * norm(w) + 1e-5 * norm(w)
    opt.step()
    with opt.loser():
        loser().backward()
        opt.zero_grad()
        loser().backward()
    with opt.winner():
        winner().backward()
    assert opt.project().gram.ll == pytest.approx(inner(*[gradients(model, loser)] * 2), rel=0.05)


def test_packing_happens_inside_the_losers_backward():
    """At the end of the loser's pass no gradient in full size is left, and each was packed before the next one came."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    opt = ProjectedGradient(SGD(model.parameters(), lr=1.0), set_aside="int8")
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: alive.append(sum(q.grad is not None for q in model.parameters())))
    with opt.loser():
        model(torch.randn(3, 64)).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
    assert max(alive) <= 2  # of twelve: this hook runs before the one that packs


def test_recompute_holds_no_second_buffer():
    """While the winner's gradient is measured and added, at most one tensor has both gradients in full."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    opt = ProjectedGradient(SGD(model.parameters(), lr=1.0), set_aside="recompute")
    x, y, passes, alive = torch.randn(3, 64), torch.randn(3, 64), [], []

    def winner():
        passes.append(None)
        if len(passes) == 1:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(
                    lambda p: alive.append(sum(q.grad is not None for q in model.parameters())) if len(passes) == 1 else None
                )
        return model(x).square().mean()

    opt.step(winner, lambda: model(y).square().mean())
    assert len(passes) == 2 and len(alive) == 12 and max(alive) <= 1


def test_tensor_by_tensor_recompute_needs_neither_a_second_buffer_nor_a_second_pass():
    """Blocks of one tensor are mixed inside the winner's backward, in the loser's place."""
    results = []
    for form in ("recompute", None):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
        only_loser = nn.Parameter(torch.ones(2))
        x, y, passes = torch.randn(3, 32), torch.randn(3, 32), []
        base = SGD([*model.parameters(), only_loser], lr=1.0)
        opt = ProjectedGradient(base, max_norm=0.01, scope="tensor", set_aside=form)

        def winner(model=model, x=x, passes=passes):
            passes.append(None)
            return model(x).square().mean()

        for _ in range(3):
            report = opt.step(winner, lambda model=model, y=y, p=only_loser: model(y).square().mean() + p.sum())
        results.append((vector(model), report.grad_norm, report.coefficients))
        assert len(passes) == 3 and report.clipped
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-8)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    assert results[0][2] == [pytest.approx(pair, rel=1e-6) for pair in results[1][2]]


def test_recompute_replays_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    twin = copy.deepcopy(model)
    x, y = torch.randn(2, 8, 6)
    results = []
    for net, form in ((model, "recompute"), (twin, None)):
        opt = ProjectedGradient(SGD(net.parameters(), lr=0.1), set_aside=form)
        torch.manual_seed(1)
        for _ in range(3):
            opt.step(lambda net=net: net(x).square().mean(), lambda net=net: net(y).square().mean())
        results.append((vector(net), torch.rand(1)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-7)
    assert torch.equal(results[0][1], results[1][1])  # and what is drawn afterwards is the same


def test_recompute_with_closures_that_run_backward_themselves():
    model, _, winner, loser = toy()
    other, plain, w, x = toy(max_norm=0.5)
    opt = ProjectedGradient(RMSprop(model.parameters(), lr=1e-2), max_norm=0.5, set_aside="recompute")
    for _ in range(3):
        opt.step(lambda: winner().backward(), lambda: loser().backward())
        plain.step(w, x)
    torch.testing.assert_close(vector(model), vector(other), rtol=1e-5, atol=1e-6)


def test_recompute_says_what_it_cannot_do():
    model, _, winner, loser = toy()
    opt = ProjectedGradient(SGD(model.parameters(), lr=0.1), set_aside="recompute")
    before = vector(model)
    with opt.loser():
        loser().backward()
    with opt.winner():
        winner().backward()
    with pytest.raises(GradientError, match=r"needs step\(winner, loser\) with two closures"):
        opt.step()
    opt.zero_grad()

    def twice():
        winner().backward()
        winner().backward()

    with pytest.raises(GradientError, match="one backward pass a side"):
        opt.step(twice, loser)
    batches = iter(torch.randn(2, 10, 6) * torch.tensor([1.0, 50.0])[:, None, None])
    with pytest.raises(GradientError, match="take the batch outside"):
        opt.step(lambda: model(next(batches)).square().mean(), loser)
    with pytest.raises(GradientError, match="left no gradient"):
        opt.step(lambda: None, loser)
    assert torch.equal(vector(model), before)
    opt.step(winner, loser)
    opt.step(winner)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["winner", "loser"])
def test_nothing_is_stepped_on_a_non_finite_gradient(form, side):
    model, _, winner, loser = toy()
    opt = ProjectedGradient(RMSprop(model.parameters(), lr=1e-2), set_aside=form)
    before = vector(model)
    losses = {"winner": winner, "loser": loser}
    losses[side] = lambda good=losses[side]: good() * float("inf")
    assert opt.step(losses["winner"], losses["loser"]).skipped
    assert torch.equal(vector(model), before) and all(p.grad is None for p in model.parameters())
    assert not opt.step(winner, loser).skipped


@pytest.mark.parametrize("form", FORMS)
def test_losses_on_one_parameter_each(form):
    shared, only_w, only_l = (nn.Parameter(torch.ones(2)) for _ in range(3))
    opt = ProjectedGradient(SGD([shared, only_w, only_l], lr=1.0), set_aside=form)
    opt.step(lambda: 2 * shared.sum() + only_w.sum(), lambda: shared.sum() + only_l.sum())
    assert shared.tolist() == [0, 0] and only_w.tolist() == [0, 0] and only_l.tolist() == [2, 2]  # c = 4/4


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="measure_change=True needs the loser's gradient after the step"):
        ProjectedGradient(SGD([nn.Parameter(torch.zeros(2))]), set_aside="recompute", measure_change=True)


def test_an_unknown_form():
    with pytest.raises(ValueError, match=r"set_aside is 'int4'; expected None \(by reference\), torch.bfloat16, 'int8'"):
        ProjectedGradient(SGD([nn.Parameter(torch.zeros(2))]), set_aside="int4")


# ---- the host's memory, where the gradient is an accelerator's ---------------------------------------------------------------


def test_what_waits_in_the_host_s_memory_is_worked_on_where_the_gradient_is():
    """'meta' stands for the accelerator: an operation that got tensors of two devices would raise."""
    w, l = torch.empty(1000, 256, device="meta"), torch.zeros(1000, 256)
    stored = Stored(l, "cpu")
    stored.device = w.device  # as made from the accelerator's own gradient
    assert all(piece.device == w.device for piece in stored.pieces(CPU_CHUNK))
    assert products(w, stored).device == w.device and products(None, stored).device == w.device
    mix_(w, stored, *torch.ones(2, dtype=torch.float64, device="meta"))
    assert stored.restored().device == w.device and stored.whole is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_s_copy_is_read_behind_the_event_that_tells_of_its_arrival(monkeypatch, dtype):
    """A stand-in for an accelerator with a stream: the copy is recorded, waited for, and read in its own type."""
    log = []

    class Event:
        def record(self):
            log.append("record")

        def wait(self):
            log.append("wait")

    class Copies(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                log.append(("copy", args[0].dtype == args[1].dtype))
            return func(*args, **(kwargs or {}))

    empty = torch.empty
    pinned = []
    monkeypatch.setattr(stored_module, "_accelerator", lambda: "cpu")
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setattr(
        torch, "empty", lambda *args, pin_memory=False, **options: (pinned.append(pin_memory), empty(*args, **options))[1]
    )
    with Copies():
        kept = Stored(torch.ones(5, dtype=dtype), "cpu")
        assert log == [("copy", True), "record"] and pinned == [True]
        pieces = list(kept.pieces(3))
    assert log[2] == "wait" and all(entry == ("copy", True) for entry in log[3:])
    assert all(piece.dtype == dtype for piece in pieces)


def test_memory_is_pinned_for_an_accelerator_alone():
    """A machine without one has nothing to pin for, and a gradient on the CPU is copied at once."""
    kept = Stored(torch.ones(5), "cpu")
    assert not kept.values.is_pinned() and kept._copied is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_with_the_host_s_memory_on_a_real_device(dtype):
    ends = []
    for form in (None, "cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 2048), nn.Tanh(), nn.Linear(2048, 512)).to("cuda", dtype)
        x, y = torch.randn(2, 64, 512, device="cuda", dtype=dtype)
        opt = ProjectedGradient(SGD(model.parameters(), lr=1e-2), max_norm=1.0, set_aside=form)
        for _ in range(5):
            opt.step(lambda m=model, x=x: m(x).square().mean(), lambda m=model, y=y: m(y).square().mean())
        ends.append(vector(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)
