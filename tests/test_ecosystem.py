"""A citizen of the ecosystem: scalers, trainers, adapters, compilers and checkpoints treat it as any other optimizer."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import SGD, Adam, AdamW, RMSprop

from ogdopt import GradientError, PairedGradient, ProjectedGradient
from ogdopt.projection import interval
from tests import limits
from tests.gradients import inner, reference
from tests.workers import checkpoints

BASES = {
    "RMSprop": lambda ps: RMSprop(ps, lr=1e-2),
    "AdamW foreach": lambda ps: AdamW(ps, lr=1e-2, foreach=True),
    "Adam fused": lambda ps: Adam(ps, lr=1e-2, fused=True),
    "SGD momentum": lambda ps: SGD(ps, lr=1e-1, momentum=0.9),
}


def toy(base="RMSprop", **options):
    """A two-layer net, an optimizer, and one winner's and loser's loss of the data of step k."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = torch.randn(6, 2, 5, 6)
    opt = ProjectedGradient(BASES[base](model.parameters()), **options)

    def loss(k, side, forward=model):
        return nn.functional.cross_entropy(forward(data[k, side]), torch.full((5,), 1 + side))

    return model, opt, loss


def plain_run(base, steps, **options):
    """Where the closures take the weights: what every other way of training must reach."""
    model, opt, loss = toy(base, **options)
    for k in steps:
        opt.step(lambda k=k: loss(k, 0), lambda k=k: loss(k, 1))
    return vector(model)


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- gradient scalers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [None, "winner", "loser"])
@pytest.mark.parametrize("clip", ["max_norm", "by hand"])
@pytest.mark.parametrize("base", BASES)
def test_grad_scaler(base, clip, overflow):
    """Scaled backwards, project, scaler.step: the unscaled step, clipped after unscaling, or the scaler's own skip."""
    model, opt, loss = toy(base, max_norm=0.1 if clip == "max_norm" else None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for k in range(4):
        for side, name in ((1, "loser"), (0, "winner")):
            with getattr(opt, name)():
                factor = 1e37 if k == 1 and name == overflow else 1.0  # finite, until it is scaled
                scaler.scale(loss(k, side) * factor).backward()
        opt.project()
        if clip == "by hand":
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        before = vector(model)
        scaler.step(opt)
        scaler.update()
        assert torch.equal(vector(model), before) == (k == 1 and overflow is not None)
    expected = plain_run(base, [0, 2, 3] if overflow else [0, 1, 2, 3], max_norm=0.1)
    torch.testing.assert_close(vector(model), expected, rtol=1e-4, atol=1e-6)
    assert scaler.get_scale() == (2.0**11 if overflow else 2.0**12) and opt.skipped_steps == 0  # the scaler counts its own


def test_scalers_see_no_fused_base():
    """A scaler that finds the base's flag on the wrapper hangs its scale there, where the base never looks (PITFALLS S13)."""
    _, opt, _ = toy("Adam fused")
    assert opt.base._step_supports_amp_scaling and not hasattr(opt, "_step_supports_amp_scaling")


# ---- trainers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    def make(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("base", ["RMSprop", "AdamW foreach"])
def test_accelerate_steps_on_closures(accelerator, base):
    model, bare, loss = toy(base, max_norm=0.1)
    model, opt = accelerator().prepare(model, bare)
    for k in range(4):
        opt.step((lambda k=k: loss(k, 0, model), lambda k=k: loss(k, 1, model)))
        assert not opt.step_was_skipped
    assert torch.equal(vector(model), plain_run(base, range(4), max_norm=0.1)) and opt.optimizer is bare


def test_accelerate_accumulates_and_clips(accelerator):
    """Micro-batches of both sides inside accumulate(); steps without synchronization do nothing; clip_grad_norm_ in between."""
    model, bare, loss = toy()
    accelerator = accelerator(gradient_accumulation_steps=2)
    model, opt = accelerator.prepare(model, bare)
    for k in range(4):
        before = vector(model)
        with accelerator.accumulate(model):
            for side, name in ((1, "loser"), (0, "winner")):
                with getattr(bare, name)():
                    accelerator.backward(loss(k, side, model))
            if accelerator.sync_gradients:
                bare.project()
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
        assert torch.equal(vector(model), before) == (k % 2 == 0)
    other, plain, micro = toy(max_norm=0.1)
    for k in (0, 2):
        plain.step(*(lambda k=k, side=side: (micro(k, side) + micro(k + 1, side)) / 2 for side in (0, 1)))
    torch.testing.assert_close(vector(model), vector(other), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["closures", "contexts", "project", "plain"])
def test_lightning_manual_optimization(way):
    """self.optimizers() re-classes itself around ours, and hands each step() a closure that does nothing (PITFALLS S18)."""
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    net, ours, loss = toy(max_norm=0.1)
    reports = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [ours], [torch.optim.lr_scheduler.LambdaLR(ours, lambda k: 1 / (1 + k))]

        def training_step(self, batch, k):
            opt = self.optimizers()
            assert isinstance(opt, ProjectedGradient) and opt is not ours
            if way == "closures":
                reports.append(opt.step(lambda: loss(k, 0), loser=lambda: loss(k, 1)))
            elif way == "plain":
                self.manual_backward(loss(k, 0))
                reports.append(opt.step())
                opt.zero_grad()
            else:
                with opt.loser():
                    self.manual_backward(loss(k, 1))
                with opt.winner():
                    self.manual_backward(loss(k, 0))
                if way == "project":
                    opt.project()
                reports.append(opt.step())
            self.lr_schedulers().step()

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_steps=4, accelerator="cpu", **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(range(6), num_workers=0))
    other, plain, plain_loss = toy(max_norm=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda k: 1 / (1 + k))
    for k in range(4):
        sides = [lambda k=k, side=side: plain_loss(k, side) for side in (0, 1)]
        plain.step(*sides[: 1 if way == "plain" else 2])
        schedule.step()
    torch.testing.assert_close(vector(net), vector(other), rtol=1e-6, atol=1e-8)
    assert (
        trainer.global_step == 4
        and ours.report is reports[-1]
        and reports[-1].grad_norm == pytest.approx(plain.report.grad_norm, rel=1e-4)
    )


@pytest.mark.parametrize("mistake", ["backward", "loss", "opens a context"])
def test_a_closure_on_top_of_waiting_gradients_is_a_mistake_unless_it_does_nothing(mistake):
    model, opt, loss = toy()

    def closure():
        if mistake == "backward":
            loss(1, 0).backward()
        elif mistake == "opens a context":
            with opt.winner():
                loss(1, 0).backward()
        return loss(1, 0) if mistake == "loss" else None

    before = vector(model)
    with opt.winner():
        loss(0, 0).backward()
    with pytest.raises(GradientError, match="one way or the other"):
        opt.step(closure)
    assert torch.equal(vector(model), before)
    opt.zero_grad()
    opt.step(lambda: loss(0, 0), lambda: loss(0, 1))


def test_only_what_is_dropped_is_reported_as_parallel():
    """interval(0) gives a conflicting winner no weight of its own, yet takes a step."""
    p = nn.Parameter(torch.zeros(2))
    opt = PairedGradient(SGD([p], lr=1.0), interval(0))
    report = opt.step(lambda: p @ torch.tensor([1.0, 0.0]), lambda: p @ torch.tensor([-1.0, 1.0]))
    assert report.coefficients[0] == 0 and not report.parallel and p.any()


# ---- adapters ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", ["trainable", "all"])
def test_lora_moves_the_adapters_alone(listed):
    """Projection, guarantee and step live in the adapters' space, whether or not frozen weights are in the groups."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def build():
        torch.manual_seed(0)
        small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
        model = transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=20, head_dim=8, **small))
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
        ids = torch.randint(20, (2, 2, 3, 6))
        return model, lambda k, side: model(input_ids=ids[k % 2, side], labels=ids[k % 2, side]).loss

    model, loss = build()
    adapters = [p for p in model.parameters() if p.requires_grad]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = ProjectedGradient(AdamW(adapters if listed == "trainable" else model.parameters(), lr=1e-2))
    twin, twin_loss = build()
    twins = [p for p in twin.parameters() if p.requires_grad]
    bare = AdamW(twins, lr=1e-2)
    for k in range(4):
        with opt.loser():
            loss(k, 1).backward()
        with opt.winner():
            loss(k, 0).backward()
        opt.project()
        u = [p.grad.clone() for p in adapters]
        opt.step()
        w, x = (torch.autograd.grad(twin_loss(k, side), twins) for side in (0, 1))
        for p, g in zip(twins, reference(w, x)):
            p.grad = g.float()
        bare.step()
        norms = inner(w, w) ** 0.5 * inner(x, x) ** 0.5
        assert inner(u, w) > 0 and inner(u, x) <= 1e-6 * norms and inner(w, x) != 0
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert torch.equal(p, before[name]) != p.requires_grad, name


# ---- compilers -----------------------------------------------------------------------------------------------------------

INDUCTOR = "inductor" if shutil.which("g++") else "aot_eager"


@pytest.mark.parametrize("order", ["loser first", "winner first", "interleaved"])
def test_compiled_model(order):
    """Gradients that wait by reference while the same compiled backward runs again stay what they were (PITFALLS S27)."""
    torch.compiler.reset()
    model, opt, loss = toy()
    compiled = torch.compile(model, backend=INDUCTOR)
    orders = {"loser first": [1, 0], "winner first": [0, 1], "interleaved": [1, 0, 1, 0]}
    for k in range(3):
        for side in orders[order]:
            with (opt.winner, opt.loser)[side]():
                loss(k, side, compiled).backward()
        opt.step()
    times = 2 if order == "interleaved" else 1
    other, plain, plain_loss = toy()
    for k in range(3):
        plain.step(*(lambda k=k, side=side: times * plain_loss(k, side) for side in (0, 1)))
    torch.testing.assert_close(vector(model), vector(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [torch.bfloat16, "int8", "recompute"])
def test_compiled_model_sets_gradients_aside(form):
    torch.compiler.reset()
    model, opt, loss = toy(set_aside=form)
    other, plain, plain_loss = toy(set_aside=form)
    compiled = torch.compile(model, backend="aot_eager")
    for k in range(3):
        opt.step(*(lambda k=k, side=side: loss(k, side, compiled) for side in (0, 1)))
        plain.step(*(lambda k=k, side=side: plain_loss(k, side) for side in (0, 1)))
    torch.testing.assert_close(vector(model), vector(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clone", [False, True])
def test_gradients_that_a_replayed_graph_writes_to_one_place_are_refused(clone):
    """A CUDA graph's backward fills the same memory at every replay: two equal gradients would project to nothing."""
    p, place = nn.Parameter(torch.zeros(2)), torch.empty(2)
    opt = ProjectedGradient(SGD([p], lr=1.0))

    def replay(*values):
        p.grad = place.copy_(torch.tensor(values))
        p.grad = p.grad.clone() if clone else p.grad

    if clone:
        opt.step(lambda: replay(1.0, 1.0), lambda: replay(2.0, 0.0))
        assert p.tolist() == [0, -1]
    else:
        with pytest.raises(GradientError, match=r"1 parameters over those of the other side.*without CUDA graphs"):
            opt.step(lambda: replay(1.0, 1.0), lambda: replay(2.0, 0.0))
        assert p.tolist() == [0, 0] and p.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["RMSprop", "AdamW foreach"])
def test_cuda_graphs_are_right_or_refused(base):
    """Under reduce-overhead a step either equals the eager one or raises; never a silently wrong gradient (PITFALLS S27)."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, data = nn.Linear(64, 64).cuda(), torch.randn(6, 2, 32, 64).cuda()
    twin = nn.Linear(64, 64).cuda()
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(model, mode="reduce-overhead")
    ours, theirs = (ProjectedGradient(BASES[base](m.parameters())) for m in (model, twin))
    try:
        for x, y in data:
            ours.step(lambda x=x: compiled(x).square().mean(), lambda y=y: (compiled(y) - 1).square().mean())
    except RuntimeError as error:
        assert "overwritten" in str(error) or "over those of the other side" in str(error)
        return
    for x, y in data:
        theirs.step(lambda x=x: twin(x).square().mean(), lambda y=y: (twin(y) - 1).square().mean())
    torch.testing.assert_close(vector(model), vector(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["RMSprop", "AdamW foreach"])
def test_compiled_base_step(base):
    """Bit for bit what the compiled base does alone with the projected gradient, and what the eager one does, to rounding."""
    torch.compiler.reset()
    model, opt, loss = toy(base)
    other, driven, other_loss = toy(base)
    for wrapper in (opt, driven):
        wrapper.base.step = torch.compile(wrapper.base.step, backend="aot_eager")
    for k in range(4):
        opt.step(lambda k=k: loss(k, 0), lambda k=k: loss(k, 1))
        for side, name in ((1, "loser"), (0, "winner")):
            with getattr(driven, name)():
                other_loss(k, side).backward()
        driven.project()
        driven.base.step()
        driven.zero_grad()
    assert torch.equal(vector(model), vector(other))
    # Compiled Adam computes its bias correction in float32; a millionth is a ten-thousandth of a step.
    torch.testing.assert_close(vector(model), plain_run(base, range(4)), rtol=1e-5, atol=1e-6)


# ---- torch.distributed.checkpoint ----------------------------------------------------------------------------------------


def equal(a, b):
    """Bitwise equality of nested dictionaries of tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("base", ["RMSprop", "AdamW foreach", "SGD momentum"])
def test_checkpoint_equals_the_bare_bases_and_resumes_bitwise(base, flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt, loss = toy(base, max_norm=0.1)
    bad = lambda: loss(0, 0) * float("nan")  # noqa: E731
    for k, winner in enumerate([lambda: loss(0, 0), bad, lambda: loss(2, 0)]):
        opt.step(winner, lambda k=k: loss(k, 1))
    weights, states = get_state_dict(model, opt, options=options)
    assert equal(states, get_optimizer_state_dict(model, opt.base, options=options)) and opt.skipped_steps == 1
    dcp.save({"model": weights, "optim": states, "ogdopt": opt.counters}, checkpoint_id=tmp_path, no_dist=True)
    opt.step(lambda: loss(4, 0), lambda: loss(4, 1))

    fresh, again, fresh_loss = toy(base, max_norm=0.1)
    # Asking a fresh optimizer for its state makes the loader step once on zero gradients.
    before = vector(fresh)
    weights, states = get_state_dict(fresh, again, options=options)
    assert torch.equal(vector(fresh), before) and again.skipped_steps == 0 and all(p.grad is None for p in fresh.parameters())
    counters = again.counters
    dcp.load({"model": weights, "optim": states, "ogdopt": counters}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(fresh, again, model_state_dict=weights, optim_state_dict=states, options=options)
    assert again.skipped_steps == 1
    again.step(lambda: fresh_loss(4, 0), lambda: fresh_loss(4, 1))
    assert torch.equal(vector(fresh), vector(model)) and equal(again.state_dict()["state"], opt.state_dict()["state"])


def test_the_bare_base_reads_the_wrappers_checkpoint_and_the_other_way_round():
    model, opt, loss = toy()
    opt.step(lambda: loss(0, 0), lambda: loss(0, 1))
    saved = get_optimizer_state_dict(model, opt)
    for wrap in (False, True):
        fresh, again, _ = toy()
        target = again if wrap else again.base
        set_optimizer_state_dict(fresh, target, get_optimizer_state_dict(model, opt.base) if wrap else saved)
        assert equal(get_optimizer_state_dict(fresh, target), saved)


@pytest.mark.parametrize("base", BASES)
def test_the_loaders_step_on_zeros_is_harmless(base):
    """It makes state by stepping on zero gradients: 0/0 there, or counting it, would spoil a run before it begins."""
    model, opt, _ = toy(base, max_norm=0.1, on_nonfinite="raise")
    bare_model, bare, _ = toy(base)
    for wrapper in (opt, bare):
        wrapper.param_groups[0]["weight_decay"] = 0.5
    before = vector(model)
    states = get_optimizer_state_dict(model, opt)
    assert torch.equal(vector(model), before) and opt.skipped_steps == 0 and opt.param_groups[0]["lr"] > 0
    assert len(states["state"]) == 4 and equal(states, get_optimizer_state_dict(bare_model, bare.base))
    assert all(torch.as_tensor(v).isfinite().all() for s in opt.state.values() for v in s.values())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """One process writes a checkpoint; two ranks go on from it, and write one of the same steps."""
    folder = tmp_path_factory.mktemp("ranks")
    straight, opt = checkpoints.build()
    checkpoints.steps(straight, opt, [0, 1])
    checkpoints.save(straight, opt, folder / "by_one")
    checkpoints.steps(straight, opt, [2, 3])
    root = Path(__file__).parent.parent
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [*starter, checkpoints.__file__, str(folder)]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=limits.PROCESS, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, checkpoints.vector(straight)


def test_two_ranks_go_on_from_the_checkpoint_of_one(two_ranks):
    folder, expected = two_ranks
    for rank in range(2):
        result = json.loads((folder / f"{rank}.json").read_text())
        torch.testing.assert_close(torch.tensor(result["weights"]), expected, rtol=1e-4, atol=2e-6)
        assert result["bare_equals_wrapped"] and result["skipped"] == [1, 1, 1]


@pytest.mark.parametrize("wrap", [True, False])
def test_one_goes_on_from_the_checkpoint_of_two_ranks(two_ranks, wrap):
    folder, expected = two_ranks
    model, opt = checkpoints.build()
    checkpoints.load(model, opt if wrap else opt.base, folder / "by_two", opt.counters)
    assert opt.skipped_steps == 1
    checkpoints.steps(model, opt, [2, 3])
    torch.testing.assert_close(checkpoints.vector(model), expected, rtol=1e-4, atol=2e-6)
