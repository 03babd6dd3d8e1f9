"""One rank of many two-gradient runs: `two_gradients.py FOLDER` under torchrun writes one entry a case to FOLDER/RANK.json.

The entry is what a case returns, or the exception that it is there to provoke. Any other exception ends the rank with its
traceback. `train(one)` in a process without torch.distributed is what the ranks must agree with.
"""

import faulthandler
import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

from ogdopt import GradientError, ProjectedGradient
from ogdopt.memory import Remembered
from tests import limits

STEPS = 10
MAX_NORM = {"mistral": 2.0, "toy": 1.6, "block": 1.16}  # under some of the ten norms and over others
LEARNING_RATE = {"mistral": 1e-4, "toy": 1e-3, "block": 1e-3}
OPTIONS = {
    "metric": {"metric": "optimizer", "measure_change": True},
    "adam": {"base": torch.optim.Adam, "metric": "optimizer", "scope": "tensor", "measure_change": True},
    "bfloat16": {"set_aside": torch.bfloat16},
    "int8": {"set_aside": "int8"},
    "cpu": {"set_aside": "cpu"},
    "recompute": {"set_aside": "recompute"},
    "fused": {"fused": True},
    "preserve": {"kept": True},
    "preserve_int8": {"kept": True, "set_aside": "int8"},
    "remember": {"kept": True, "decay": 0.9},
}
"""Ways of stepping that are tried in several layouts."""


# ---- models and data: the same in one process and in many ----------------------------------------------------------------


class Toy(nn.Module):
    """Sizes that two ranks cannot share evenly, one that leaves a rank empty, and parameters of every kind."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 1)
        self.c.weight = self.b.weight  # tied
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.only_loser = nn.Linear(7, 7)

    def forward(self, x, loser=False):
        h = torch.tanh(self.a(x + self.frozen(x)))
        h = torch.tanh(self.c(torch.tanh(self.b(h))))
        return self.d(h + self.only_loser(h) if loser else h)


class Block(nn.Module):
    """A norm and an MLP, all of whose parameters tensor parallelism can place."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, loser=False):
        return self.down(torch.tanh(self.up(self.norm(x))))


def mistral():
    config = MistralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        attn_implementation="eager",
        initializer_range=0.2,
    )
    return MistralForCausalLM(config).float()


def build(kind):
    torch.manual_seed(0)
    return {"mistral": mistral, "toy": Toy, "block": Block}[kind]()


def data(kind, steps):
    """(winners, losers) of each step: token ids (8, 9) or inputs (8, ...), for one process or all ranks together."""
    g = torch.Generator().manual_seed(1)
    if kind == "mistral":
        return [torch.randint(32, (2, 8, 9), generator=g) for _ in range(steps)]
    return [torch.randn(2, 8, *((5,) if kind == "toy" else (6, 8)), generator=g) for _ in range(steps)]


def loss_of(kind, model, x, loser):
    if kind == "mistral":
        return model(input_ids=x, labels=x).loss
    out = model(x, loser=loser)
    return (out - (1.0 if loser else 2 * x[..., : out.shape[-1]])).square().mean()


def syncing(model, on):
    """Context of one micro-batch, whose gradients are reduced only if `on`."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
    elif not on and hasattr(model, "no_sync"):
        return model.no_sync()
    return nullcontext()


def vector(model):
    """All parameters, whole, in the order of the bare model."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in full])


ROUNDING = {"mistral": 2.0**-16, "toy": 2.0**-18, "block": 2.0**-18}
"""How far two float32 gradients of one tensor may be apart, of its root mean square.

Against float64 these models' are off by up to 102, 25 and 18 roundings (2^-24) of that, and each of two may be.
"""


class Leeway:
    """How far the parameters of one process may be off after each step where gradients are rounded otherwise.

    RMSprop and Adam move a parameter by s = lr m / (sqrt(v) + eps), with m and v averages of the gradient u and of its square
    (m is u for RMSprop). When u is off by d, s goes to another place on s(u), which is as steep as lr / eps at 0: in a first
    step, lr u / (|u| + eps) for Adam, a rounding becomes a step where u is near 0, and nothing bounds it but the largest step.
    What earlier gradients left in m and sqrt(v) is off by no more than their d.
    """

    def __init__(self, kind, model, opt):
        self.rounding, self.model, self.opt, self.old = ROUNDING[kind], model, opt, {}

    def taken(self, report):
        """One bound for each parameter of the model, flat, float64."""
        tensors, found = report.tensors, []
        weights = report.b.abs().expand(len(tensors.ll)).tolist()
        numbers = list(zip(tensors.ww.tolist(), tensors.ll.tolist(), weights))
        (group,) = self.opt.param_groups
        for p in self.model.parameters():
            bound = torch.zeros(p.shape, dtype=torch.float64)
            if p.requires_grad:
                ww, ll, b = numbers.pop(0)
                d = self.rounding * report.scale.item() * (ww**0.5 + b * ll**0.5) / p.numel() ** 0.5
                bound = self.one(group, p, d) if self.opt.state.get(p) else bound
            found.append(bound.flatten())
        return torch.cat(found)

    def one(self, group, p, d):
        """The bound of one parameter, in which this step's gradient is off by up to `d`."""
        state = {key: value.double().clone() for key, value in self.opt.state[p].items()}
        old, d_old = self.old.get(p, ({}, 0.0))
        self.old[p] = state, max(d, d_old)
        alpha, lr, eps = group.get("alpha"), group["lr"], group["eps"]
        b1, b2 = group["betas"] if alpha is None else (0.0, alpha)
        first, second = (1 - b ** state["step"] if alpha is None else 1.0 for b in (b1, b2))
        v = state["exp_avg_sq" if alpha is None else "square_avg"]
        v_old = old["exp_avg_sq" if alpha is None else "square_avg"] if old else torch.zeros_like(v)
        u = ((v - b2 * v_old) / (1 - b2)).clamp(min=0).sqrt()
        m_old = old.get("exp_avg", torch.zeros_like(v)) * (state["exp_avg"].sign() if alpha is None else 1.0)

        def s(x):
            return lr * (b1 * m_old + (1 - b1) * x) / first / (((b2 * v_old + (1 - b2) * x * x) / second).sqrt() + eps)

        root = (v / second).sqrt() + eps
        before = lr * d_old / root * (b1 + s(u).abs() / lr * (v_old / v.clamp(min=1e-300)).sqrt())
        return torch.maximum((s(u + d) - s(u)).abs(), (s(u - d) - s(u)).abs()) + before


def train(
    kind,
    model=None,
    mine=slice(None),
    micro=1,
    steps=STEPS,
    spoil=None,
    base=torch.optim.RMSprop,
    kept=False,
    decay=None,
    **options,
):
    """The numbers of every step and the parameters at the end, of ten RMSprop steps that sometimes clip."""
    model = build(kind) if model is None else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    options |= {} if decay is None else {"remember": {"loser": Remembered(decay), "kept": Remembered(decay)}}
    opt = ProjectedGradient(base(parameters, lr=LEARNING_RATE[kind], foreach=False), max_norm=MAX_NORM[kind], **options)
    numbers, slack, leeway = [], [], Leeway(kind, model, opt)
    for k, pair in enumerate(data(kind, steps)):

        def side(i, k=k, pair=pair):
            parts = pair[i][mine].chunk(micro)
            for j, part in enumerate(parts):
                with syncing(model, j == len(parts) - 1):
                    loss = loss_of(kind, model, part, bool(i)) / len(parts)
                    loss = loss if spoil is None else spoil(loss, k, i)
                    if micro > 1:
                        loss.backward()
            return loss if micro == 1 else loss.detach()

        other = data(kind, steps)[steps - 1 - k]
        r = opt.step(
            lambda: side(0), lambda: side(1), preserve={"kept": partial(side, 0, pair=other)} if kept and k % 3 < 2 else None
        )
        scalars = [] if r.skipped else [*r.gram, r.grad_norm]
        cosines = r.change_cosines or ()
        numbers.append({"skipped": r.skipped, "clipped": r.clipped, "scalars": scalars, "cosines": list(cosines)})
        if not dist.is_initialized():
            slack.append(leeway.taken(r))
            moved = float("nan") if r.change is None else r.change[2].sqrt().item()
            numbers[-1] |= {"moved": moved}
    whole = vector(model)
    return {
        "numbers": numbers,
        "parameters": whole.tolist(),
        "digest": hashlib.sha256(whole.numpy().tobytes()).hexdigest(),
        "skipped": opt.skipped_steps,
        "slack": slack,
    }


# ---- layouts -------------------------------------------------------------------------------------------------------------


def share():
    return slice(dist.get_rank(), None, dist.get_world_size())


def sharded(kind, mesh=None, **options):
    """FSDP2 on some of the submodules and on the root."""
    model = build(kind)
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers if kind == "mistral" else [model.a, model.d]:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def ddp(kind="mistral", **options):
    return DistributedDataParallel(build(kind), **options)


def fsdp1(kind="mistral", strategy="FULL_SHARD", **options):
    options |= {"device_id": torch.device("cpu"), "sharding_strategy": ShardingStrategy[strategy]}
    return FullyShardedDataParallel(build(kind), **options)


def tensor_parallel_mistral():
    """The MLPs are DTensors; attention, norms and embeddings stay plain copies beside them."""
    model = build("mistral")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        parallelize_module(layer.mlp, mesh, plan)
    return model


def tensor_parallel_block(mesh=None):
    """A norm whose gradient is Partial, a bias whose gradient is Replicate, and sharded matrices."""
    model = build("block")
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        "": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def world():
    return {"process_group": dist.group.WORLD}


def way(layout, option, **more):
    return train("mistral", layout(), share(), **OPTIONS[option], **more)


# ---- what the cases look at ----------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts collectives by name, and reads of a device number by the host."""

    def __init__(self):
        super().__init__()
        self.collectives, self.reads = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what a DTensor does underneath is seen, instead of the operation on it
        name = func.name().split("::")[-1].split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional") and "wait" not in name and "wrap" not in name:
            self.collectives[name] += 1
        self.reads += name == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def count(kind, model, mine, **options):
    """Collectives and host reads of a step's own: those of a step minus those of its two plain backward passes."""
    base = torch.optim.RMSprop(model.parameters(), foreach=False)
    opt = ProjectedGradient(base, max_norm=MAX_NORM[kind], **options)
    pairs = data(kind, 3)
    sides = [lambda x, i=i: loss_of(kind, model, x[mine], bool(i)) for i in (0, 1)]
    opt.step(lambda: sides[0](pairs[0][0]), lambda: sides[1](pairs[0][1]))  # lazy set-up of the layouts
    with Watch() as plain:
        for i in (1, 0):
            sides[i](pairs[1][i]).backward()
            opt.zero_grad()
    with Watch() as ours:
        opt.step(lambda: sides[0](pairs[2][0]), lambda: sides[1](pairs[2][1]))
    with Watch() as lazy:
        with opt.loser():
            sides[1](pairs[2][1]).backward()
        with opt.winner():
            sides[0](pairs[2][0]).backward()
        opt.project()
    own = ours.collectives.copy()
    own.subtract(plain.collectives)
    return {
        "own": {k: v for k, v in own.items() if v},
        "plain": dict(plain.collectives),
        "reads": [ours.reads - plain.reads, lazy.reads - plain.reads],
    }


def against_gathered(kind, model, mine, **options):
    """Largest differences, relative to |g_w|, from a projection of the gathered gradients in float64."""
    opt = ProjectedGradient(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0), **options)
    pair, sides = data(kind, 1)[0], []
    for i in (0, 1):
        loss_of(kind, model, pair[i][mine], bool(i)).backward()
        gs = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters() if p.requires_grad]
        sides.append(torch.cat([g.double().flatten() for g in gs]))
        opt.zero_grad()
    for i, context in ((1, opt.loser), (0, opt.winner)):
        with context():
            loss_of(kind, model, pair[i][mine], bool(i)).backward()
    report = opt.project()
    got = torch.cat([p.grad.full_tensor().double().flatten() for p in model.parameters() if p.requires_grad])
    w, x = sides
    expected = w - (w @ x).clamp(min=0) / (x @ x) * x
    numbers = torch.tensor(report.gram, dtype=torch.float64)
    truth, scale = torch.stack([w @ w, w @ x, x @ x]), torch.stack([w @ w, w.norm() * x.norm(), x @ x])
    return {
        "gradient": ((got - expected).abs().max() / w.norm()).item(),
        "scalars": ((numbers - truth).abs() / scale).max().item(),
        "dtype": str({p.grad.dtype for p in model.parameters() if p.requires_grad}),
    }


def refused(run, kinds=(GradientError,)):
    """The exception that a misuse must end in."""
    try:
        got = run()
    except kinds as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"error": None, "text": f"nothing was raised; got {str(got)[:300]}"}


def optimizer(model, /, lr=1e-2, **options):
    return ProjectedGradient(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr), **options)


def closures(kind, model, mine):
    pair = data(kind, 1)[0]
    return [lambda i=i: loss_of(kind, model, pair[i][mine], bool(i)) for i in (0, 1)]


def step(kind, model, mine, **options):
    """One step's report."""
    return optimizer(model, **options).step(*closures(kind, model, mine))


# ---- misuse --------------------------------------------------------------------------------------------------------------


def deferred(model, watched, whole):
    """FSDP2 synchronization off for the whole of the loser's side (S1), or for its last micro-batch alone."""
    opt = optimizer(model, model=model if watched else None)
    winner, loser = closures("toy", model, share())

    def late():
        if not whole:
            loser().backward()
        model.set_requires_gradient_sync(False)
        loser().backward()

    return opt.step(winner, late)


def without_all_reduce(model, watched):
    """HSDP's all-reduce off during the loser's side (S2)."""
    opt = optimizer(model, model=model if watched else None)
    winner, loser = closures("toy", model, share())

    def late():
        model.set_requires_all_reduce(False)
        return loser()

    return opt.step(winner, late)


def stale():
    model = build("toy")
    opt = optimizer(model)
    for layer in (model.a, model.d, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return opt.step(*closures("toy", model, share()))


def crossed(model):
    """Both forwards before the first backward: DDP averages one of the two gradients (S5)."""
    opt = optimizer(model)
    losses = [f() for f in closures("mistral", model, share())]
    with opt.loser():
        losses[1].backward()
    with opt.winner():
        losses[0].backward()
    return opt.step()


def unsynchronized(model, watched, then="step"):
    """DDP or FSDP1 with the winner inside no_sync (S6); after project() the verdict waits for the next call."""
    opt = optimizer(model, model=model if watched else None)
    winner, loser = closures("mistral", model, share())
    with opt.loser():
        loser().backward()
    with model.no_sync(), opt.winner():
        winner().backward()
    if then != "step":
        opt.project()
    if then == "scaler":  # which finds NaN and leaves step() out
        return opt.step(winner, loser)
    return opt.step()


def functional():
    """torch.autograd.grad under FSDP2 leaves p.grad alone, and returns nothing either (S23)."""
    model = sharded("toy")
    opt = optimizer(model)
    winner, loser = closures("toy", model, share())

    def closure():
        torch.autograd.grad(winner(), list(model.parameters())[:2], allow_unused=True)

    return opt.step(closure, loser)


def half_sharded():
    """fully_shard on two layers and not on the root: the rest stays plain, and nobody averages it."""
    model = build("toy")
    for layer in (model.a, model.d):
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return step("toy", model, share())


def slice_of_a_mesh(shape):
    """A mesh that is one dimension of two: what happens along the other cannot be seen."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b"))
    return step("toy", sharded("toy", mesh["b"]), share())


def separate(**options):
    """Every rank trains a model of its own on data of its own."""
    model = build("toy")
    report = step("toy", model, share(), **options)
    return {"ll": report.gram.ll, "alone": alone("toy", share())}


def alone(kind, mine, name=""):
    """<g_l, g_l> of a bare model over the parameters whose name ends so."""
    model = build(kind)
    closures(kind, model, mine)[1]().backward()
    gs = [p.grad for n, p in model.named_parameters() if p.grad is not None and n.endswith(name)]
    return sum(g.double().square().sum().item() for g in gs)


def elementless(**options):
    """FSDP1 whose rank 1 owns no element of what the optimizer holds: it takes part all the same."""
    model = fsdp1("toy", use_orig_params=True)
    held = [p for n, p in model.named_parameters() if n.endswith("a.weight")]
    opt = ProjectedGradient(torch.optim.SGD(held, lr=0.0), **options)
    winner, loser = closures("toy", model, share())
    report = opt.step(winner, loser)
    found = {"ll": report.gram.ll, "alone": alone("toy", slice(None), "a.weight"), "held": held[0].numel()}
    loser().backward()
    return found | {"plain": opt.step().grad_norm ** 2}


def turned(model, mine, share_of_winner, **options):
    """(<delta, g_w>, <delta, g_l>) of a step with momentum against it, and a loser that is so much of the winner."""
    base = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    opt = ProjectedGradient(base, metric="optimizer", measure_change=True, **options)
    for sign in (-1.0, -1.0, -1.0, 0.1):
        winner, _ = closures("mistral", model, mine)
        report = opt.step(lambda s=sign, f=winner: s * f(), lambda s=sign, f=winner: share_of_winner * s * f())
    return report.loss_changes


def barren(**options):
    """FSDP1 with a loser that reaches no parameter: every rank hears of it, and of which side."""
    model = fsdp1("toy", use_orig_params=True)
    opt = optimizer(model, **options)
    return opt.step(closures("toy", model, share())[0], lambda: None)


def uneven_batches():
    """Six sequences on rank 0 and two on rank 1, weighed by the global number of tokens (S22)."""
    model = build("mistral")
    mine = slice(0, 6) if dist.get_rank() == 0 else slice(6, 8)
    weight = {0: 6, 1: 2}[dist.get_rank()] * dist.get_world_size() / 8
    return train("mistral", DistributedDataParallel(model), mine, spoil=lambda loss, k, i: loss * weight)


def spoiled(kind, layout, what, side, **options):
    """Step 1 of 3 sees something that is not finite on the last rank alone (S26)."""
    last = dist.get_rank() == dist.get_world_size() - 1

    def spoil(loss, k, i):
        if k != 1 or i != side or not last:
            return loss
        if what == "loss":  # the value is not finite, the gradient is
            return loss + torch.tensor(float("nan"))
        return loss * float(what)

    return train(kind, layout(), share(), steps=3, spoil=spoil, **options)


def spoiled_here(kind, model, mine, pick, value):
    """The last rank alone holds a gradient, whole or its shard, that is not finite (S26)."""
    opt = optimizer(model)
    winner, loser = closures(kind, model, mine)
    before = vector(model)

    def closure():
        winner().backward()
        if dist.get_rank() == dist.get_world_size() - 1:
            g = pick(model).grad
            (g.to_local() if isinstance(g, DTensor) else g).fill_(value)

    report = opt.step(closure, loser)
    return {"skipped": report.skipped, "still": torch.equal(vector(model), before)}


def halves(parameters, **options):
    """Two optimizers that share the parameters between them."""
    return [torch.optim.RMSprop(parameters[i::2], **options) for i in (0, 1)]


def clipped_by_hand(kind, model, mine):
    """clip_grad_norm_ between the contexts and step(): how far the model moved, what the clip saw, what was told."""
    opt = optimizer(model, lr=1.0)
    winner, loser = closures(kind, model, mine)
    before = vector(model)
    for context, closure in ((opt.loser, loser), (opt.winner, winner)):
        with context():
            closure().backward()
    seen = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    seen = seen.full_tensor() if isinstance(seen, DTensor) else seen
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        opt.step()
    return {
        "moved": (vector(model) - before).norm().item(),
        "seen": seen.item(),
        "told": sum("call project() first" in str(w.message) for w in told),
    }


def stepped_inside():
    model = sharded("toy")
    opt = optimizer(model)
    winner, loser = closures("toy", model, share())

    def closure():
        loser().backward()
        opt.base.step()

    return opt.step(winner, closure)


# ---- the table -----------------------------------------------------------------------------------------------------------


def pairs():
    """Cases of two ranks: those that return something, and those that must be refused."""
    single = dist.new_subgroups(group_size=1)[0]
    whole = slice(None)
    views, unused = {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}
    offload = CPUOffloadPolicy(pin_memory=False)
    layouts = {
        "fsdp2": lambda: train("mistral", sharded("mistral"), share()),
        "fsdp2_offload": lambda: train("mistral", sharded("mistral", offload_policy=offload), share()),
        "fsdp2_accumulate": lambda: train("mistral", sharded("mistral"), share(), micro=2),
        "fsdp2_uneven": lambda: train("toy", sharded("toy"), share()),
        "ddp": lambda: train("mistral", ddp(), share()),
        "ddp_views": lambda: train("mistral", ddp(**views), share()),
        "ddp_accumulate": lambda: train("mistral", ddp(**views), share(), micro=2),
        "ddp_static": lambda: train("mistral", ddp(static_graph=True), share()),
        "ddp_unused": lambda: train("toy", ddp("toy", **unused), share()),
        "ddp_uneven_batches": uneven_batches,
        "fsdp1_flat": lambda: train("mistral", fsdp1(), share(), **world()),
        "fsdp1_params": lambda: train("mistral", fsdp1(use_orig_params=True), share(), **world()),
        "fsdp1_accumulate": lambda: train("mistral", fsdp1(use_orig_params=True), share(), micro=2, **world()),
        "fsdp1_no_shard": lambda: train("mistral", fsdp1(strategy="NO_SHARD", use_orig_params=True), share()),
        "fsdp2_several": lambda: train("mistral", sharded("mistral"), share(), base=halves),
        "ddp_several": lambda: train("mistral", ddp(), share(), base=halves),
        "tp_mixed": lambda: train("mistral", tensor_parallel_mistral(), whole),
        "tp_sequence": lambda: train("block", tensor_parallel_block(), whole),
    }
    shapes = {
        "fsdp2": (lambda: sharded("mistral"), {}),
        "ddp": (ddp, {}),
        "fsdp1": (lambda: fsdp1(use_orig_params=True), world()),
    }
    ways = {
        f"{name}_{option}": partial(way, layout, option, **more)
        for name, (layout, more) in shapes.items()
        for option in OPTIONS
        if option != "recompute" or name == "fsdp2"
    }
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    numbers = {
        "gathered_fsdp2": lambda: against_gathered("mistral", sharded("mistral"), share()),
        "gathered_bf16": lambda: against_gathered("mistral", sharded("mistral", mp_policy=policy), share()),
        "gathered_bf16_reduce": lambda: against_gathered("mistral", sharded("mistral", mp_policy=half), share()),
        "gathered_tp_sequence": lambda: against_gathered("block", tensor_parallel_block(), whole),
    }
    numbers |= {
        "by_hand_fsdp2": lambda: clipped_by_hand("mistral", sharded("mistral"), share()),
        "by_hand_ddp": lambda: clipped_by_hand("mistral", ddp(gradient_as_bucket_view=True), share()),
    }
    counts = {
        "count_fsdp2": lambda: count("mistral", sharded("mistral"), share()),
        "count_ddp": lambda: count("mistral", ddp(), share()),
        "count_fsdp1": lambda: count("mistral", fsdp1(use_orig_params=True), share(), **world()),
        "count_tp_mixed": lambda: count("mistral", tensor_parallel_mistral(), whole),
        "count_tp_sequence": lambda: count("block", tensor_parallel_block(), whole),
    }
    spoils = {
        f"spoiled_{name}_{what}_{side}": partial(spoiled, kind, layout, what, side, **options)
        for name, kind, layout, options in (
            ("fsdp2", "toy", lambda: sharded("toy"), {}),
            ("ddp", "mistral", ddp, {}),
            ("fsdp1", "toy", lambda: fsdp1("toy", use_orig_params=True), world()),
        )
        for what in ("nan", "inf", "loss")
        for side in (0, 1)
    }
    misuse = {
        "S1_whole_side": lambda: deferred(sharded("toy"), False, True),
        "S1_whole_side_model": lambda: deferred(sharded("toy"), True, True),
        "S1_last_micro_batch": lambda: deferred(sharded("toy"), False, False),
        "S1_last_micro_batch_model": lambda: deferred(sharded("toy"), True, False),
        "S3_stale": stale,
        "S5_crossed": lambda: crossed(ddp()),
        "S6_ddp": lambda: unsynchronized(ddp(), False),
        "S6_ddp_project": lambda: unsynchronized(ddp(), False, "project"),
        "S6_ddp_scaler": lambda: unsynchronized(ddp(), False, "scaler"),
        "S6_ddp_model": lambda: unsynchronized(ddp(), True),
        "S6_fsdp1_model": lambda: unsynchronized(fsdp1(use_orig_params=True), True),
        "S23_functional": functional,
        "fsdp1_without_group": lambda: step("mistral", fsdp1(use_orig_params=True), share()),
        "fsdp1_elementless_without_group": elementless,
        "fsdp1_no_loser": lambda: barren(**world()),
        "S8_ddp_with_group": lambda: step("mistral", ddp(), share(), **world()),
        "S8_no_shard_with_group": lambda: step("mistral", fsdp1(strategy="NO_SHARD"), share(), **world()),
        "half_sharded": half_sharded,
        "separate_models": separate,
        "mesh_slice": lambda: slice_of_a_mesh((2, 1)),
        "stepped_inside": stepped_inside,
        "ddp_recompute": lambda: way(ddp, "recompute"),
    }
    others = {
        "separate_models_alone": lambda: separate(process_group=single),
        "fsdp1_elementless": lambda: elementless(**world()),
        "turned_fsdp2_zero": lambda: turned(sharded("mistral"), share(), 0.0),
        "turned_fsdp2_opposed": lambda: turned(sharded("mistral"), share(), -1.0),
        "turned_ddp_zero": lambda: turned(ddp(), share(), 0.0, scope="tensor"),
        "turned_fsdp1_tiny": lambda: turned(fsdp1(), share(), -1e-20, **world()),
        "spoiled_here_fsdp2": lambda: spoiled_here("toy", sharded("toy"), share(), lambda m: m.b.weight, torch.inf),
        "spoiled_here_ddp": lambda: spoiled_here("toy", ddp("toy", **unused), share(), lambda m: m.module.b.bias, torch.nan),
        "spoiled_here_tp": lambda: spoiled_here("block", tensor_parallel_block(), whole, lambda m: m.down.bias, torch.nan),
    }
    return layouts | ways | numbers | counts | spoils | others, misuse


def quads():
    """Cases of four ranks, two by two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def both():
        """Tensor parallel blocks, sharded over the other dimension of the mesh."""
        return fully_shard(tensor_parallel_block(mesh["tp"]), mesh=mesh["dp"])

    halves = slice(mesh.get_local_rank("dp"), None, 2)
    return {
        "hsdp": lambda: train("mistral", sharded("mistral", mesh), share()),
        "hsdp_accumulate": lambda: train("mistral", sharded("mistral", mesh), share(), micro=2),
        "hsdp_uneven": lambda: train("toy", sharded("toy", mesh), share()),
        "fsdp_tp": lambda: train("block", both(), halves),
        **{f"hsdp_{option}": partial(way, lambda: sharded("mistral", mesh), option) for option in OPTIONS},
        "gathered_hsdp": lambda: against_gathered("mistral", sharded("mistral", mesh), share()),
        "count_hsdp": lambda: count("mistral", sharded("mistral", mesh), share()),
        "count_fsdp_tp": lambda: count("block", both(), halves),
    }, {
        "S2_all_reduce": lambda: without_all_reduce(sharded("toy", mesh), False),
        "S2_all_reduce_model": lambda: without_all_reduce(sharded("toy", mesh), True),
        "mesh_slice": lambda: slice_of_a_mesh((2, 2)),
    }


def main(folder):
    faulthandler.dump_traceback_later(limits.RANK, exit=True)  # a rank that hangs says where
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=limits.COLLECTIVE)
    rank = dist.get_rank()
    cases, misuse = pairs() if dist.get_world_size() == 2 else quads()
    wanted = os.environ.get("CASES", "").split()  # for looking into one by hand
    results = {}
    for name, case in (cases | misuse).items():
        if wanted and name not in wanted:
            continue
        print(f"rank {rank}: {name}", file=sys.stderr, flush=True)
        results[name] = refused(case, (GradientError, ValueError)) if name in misuse else case()
        dist.barrier()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()  # a rank that leaves early takes the connections of the other with it
    os._exit(0)  # tearing DDP down while the interpreter exits hangs now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
