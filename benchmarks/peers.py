"""Ways to project one gradient out of another: this library's, the plain loops that people write, and the peers' own.

Each is given two gradients and leaves the combined one in `p.grad`; what is not installed is named.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Timed, absent, architecture, unfused
from ogdopt import ProjectedGradient
from ogdopt_harness.modeling.build import meta_model


class Gradients:
    """Parameters of a model's shape and two gradients with cosine 0.6, each in one buffer that its tensors are views of."""

    def __init__(self, size: str, device: str = "cpu") -> None:
        shapes = [p.shape for p in meta_model(architecture(size)).parameters()]
        n = sum(shape.numel() for shape in shapes)
        generator = torch.Generator(device).manual_seed(0)
        self.flat = {name: torch.empty(n, device=device) for name in ("p", "w", "l")}
        for buffer, deviation in zip(self.flat.values(), (0.02, 1e-3, 1e-3)):
            buffer.normal_(0, deviation, generator=generator)
        self.flat["w"].mul_(0.8).add_(self.flat["l"], alpha=0.6)
        self.kept = self.flat["w"].clone()
        parts = {
            name: [x.view(shape) for x, shape in zip(buffer.split([s.numel() for s in shapes]), shapes)]
            for name, buffer in self.flat.items()
        }
        self.params = [nn.Parameter(x) for x in parts["p"]]
        self.w, self.l = parts["w"], parts["l"]

    @property
    def bytes(self) -> int:
        """Bytes of one gradient."""
        return self.kept.nbytes

    def restore(self) -> None:
        """The winner's gradient as it was, and nothing in p.grad."""
        self.flat["w"].copy_(self.kept)
        for p in self.params:
            p.grad = None


@dataclass(frozen=True)
class Way:
    """How one of them is run: made ready and run as `Timed` says, and whether what it leaves is the OGD gradient."""

    timed: Timed
    ogd: bool = True


def bound(given: Gradients) -> Timed:
    """One inner product and one axpy over flat buffers: five passes, less than which no projection can do."""
    w, l = given.flat["w"], given.flat["l"]

    def run() -> None:
        torch.dot(w, l)
        w.add_(l, alpha=-0.6)

    return Timed(run, given.restore)


# ---- this library ------------------------------------------------------------------------------------------------------


class Keeps(torch.optim.Optimizer):
    """A base that changes nothing and keeps what it was given, so that a step is projection and clipping alone."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})
        self.seen: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep the gradients."""
        self.seen = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]


def hand_over(opt: ProjectedGradient, given: Gradients) -> None:
    """Both gradients, as if two backward passes had left them."""
    with opt.loser():
        for p, g in zip(given.params, given.l):
            p.grad = g
    with opt.winner():
        for p, g in zip(given.params, given.w):
            p.grad = g


def ours(given: Gradients, max_norm: float | None, fused: bool = False) -> Way:
    """A step around a base that does nothing."""
    base = Keeps(given.params)
    opt = ProjectedGradient(base, max_norm=max_norm, fused=fused)
    warnings.filterwarnings("ignore", "fused=True: Keeps has no fused form")  # its two passes are compiled all the same

    def before() -> None:
        given.restore()
        hand_over(opt, given)

    def run() -> None:
        opt.step()

    def after() -> None:
        for p, g in zip(given.params, base.seen):
            p.grad = g
        base.seen = []

    return Way(Timed(run, before, after))


# ---- plain loops -------------------------------------------------------------------------------------------------------


def textbook(given: Gradients) -> None:
    """As papers' code writes it: (a * b).sum() and a - c b."""
    wl = sum((w * l).sum() for w, l in zip(given.w, given.l))
    ll = sum((l * l).sum() for l in given.l)
    c = torch.clamp(wl / ll, min=0)  # type: ignore[arg-type]
    for p, w, l in zip(given.params, given.w, given.l):
        p.grad = w - c * l


def loop(given: Gradients) -> None:
    """torch.dot and an addition in place, tensor by tensor."""
    pairs = [(w.view(-1), l.view(-1)) for w, l in zip(given.w, given.l)]
    wl = torch.stack([torch.dot(w, l) for w, l in pairs]).sum()
    ll = torch.stack([torch.dot(l, l) for _, l in pairs]).sum()
    c = max(0.0, (wl / ll).item())
    for p, w, l in zip(given.params, given.w, given.l):
        p.grad = w.add_(l, alpha=-c)


def foreach(given: Gradients) -> None:
    """torch's foreach functions, without a temporary of the model's size."""
    wl = torch.stack([torch.dot(w.view(-1), l.view(-1)) for w, l in zip(given.w, given.l)]).sum()
    ll = torch.stack(list(torch._foreach_norm(given.l))).square().sum()
    torch._foreach_add_(given.w, given.l, alpha=-max(0.0, (wl / ll).item()))
    for p, w in zip(given.params, given.w):
        p.grad = w


def clipped(given: Gradients, max_norm: float) -> None:
    """The foreach projection and torch's clipping behind it."""
    foreach(given)
    nn.utils.clip_grad_norm_(given.params, max_norm, foreach=True)


# ---- one compiled loop -------------------------------------------------------------------------------------------------


def _descend(kind: str, p: Tensor, g: Tensor, states: list[Tensor], lr: float, t: Tensor) -> None:
    """torch.optim's formulas at their defaults."""
    if kind == "RMSprop":
        states[0].mul_(0.99).addcmul_(g, g, value=0.01)
        p.sub_(lr * g / (states[0].sqrt() + 1e-8))
    elif kind == "SGD":
        p.sub_(lr * g)
    else:
        if kind == "AdamW":
            p.mul_(1 - lr * 0.01)
        m, v = states
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        p.sub_(lr / (1 - 0.9**t) * m / (v.sqrt() / (1 - 0.999**t).sqrt() + 1e-8))


def compiled(given: Gradients, kind: str, max_norm: float, lr: float) -> Timed:
    """Projection, clipping and a step of a base in one function under torch.compile: the strongest loop to write at home."""
    count = {"SGD": 0, "RMSprop": 1}.get(kind, 2)
    parameters = [p.detach() for p in given.params]
    states = [[torch.zeros_like(p) for _ in range(count)] for p in parameters]
    t = torch.zeros((), device=given.kept.device)

    @torch.compile
    def whole(ps: list[Tensor], ws: list[Tensor], ls: list[Tensor], kept: list[list[Tensor]], t: Tensor) -> None:
        wl = torch.stack([(w * l).sum() for w, l in zip(ws, ls)]).sum()
        ll = torch.stack([(l * l).sum() for l in ls]).sum()
        ww = torch.stack([(w * w).sum() for w in ws]).sum()
        c = (wl / ll).clamp(min=0)
        scale = (max_norm / ((ww - 2 * c * wl + c * c * ll).sqrt() + 1e-6)).clamp(max=1.0)
        for p, w, l, state in zip(ps, ws, ls, kept):
            _descend(kind, p, (w - c * l) * scale, state, lr, t)

    def run() -> None:
        with torch.no_grad():
            t.add_(1)
            whole(parameters, given.w, given.l, states, t)

    return Timed(run, given.restore, given.restore)


# ---- peers -------------------------------------------------------------------------------------------------------------


class Given:
    """Stands for a loss whose backward pass costs nothing: it leaves gradients that are there already."""

    def __init__(self, params: list[nn.Parameter], gradients: list[Tensor]) -> None:
        self.params, self.gradients = params, gradients

    def backward(self, retain_graph: bool = False) -> None:
        """Put the gradients into p.grad."""
        for p, g in zip(self.params, self.gradients):
            p.grad = g


def torchjd(given: Gradients, aggregator: Any, thrifty: bool) -> Timed:
    """`jac_to_grad` of TorchJD on the gradients of L_w and -L_l, which its own backward function would have put there."""
    from torchjd.autojac import jac_to_grad

    def before() -> None:
        given.restore()
        for p, w, l in zip(given.params, given.w, given.l):
            p.jac = torch.stack([w, -l])  # type: ignore[attr-defined]

    options = {"optimize_gramian_computation": True} if thrifty else {}
    return Timed(lambda: jac_to_grad(given.params, aggregator, **options), before)


def pytorch_optimizer(given: Gradients) -> Timed:
    """`pc_backward` of pytorch_optimizer's PCGrad, on L_w and -L_l."""
    from pytorch_optimizer import PCGrad

    random.seed(0)
    opt = PCGrad(torch.optim.SGD(given.params, lr=1e-3), reduction="sum")
    negative: list[Tensor] = []

    def before() -> None:
        given.restore()
        negative.extend(-l for l in given.l)

    objectives: Any = [Given(given.params, given.w), Given(given.params, negative)]
    return Timed(lambda: opt.pc_backward(objectives), before, negative.clear)


def ways(given: Gradients) -> dict[str, Way | str]:
    """All of them by name, or why one is not here. PCGrad projects twice, so that twice the bound is its own floor."""
    half = 0.5 * given.kept.norm().item()

    def plain(run: Callable[[Gradients], None]) -> Way:
        return Way(Timed(lambda: run(given), given.restore))

    found: dict[str, Way | str] = {
        "ogdopt": ours(given, None),
        "ogdopt, clipped": ours(given, half),
        "ogdopt, fused=True": unfused(given.kept.device.type) or ours(given, None, fused=True),
        "ogdopt, fused=True, clipped": unfused(given.kept.device.type) or ours(given, half, fused=True),
        "loop, (a * b).sum() and a - c b": plain(textbook),
        "loop, torch.dot and add_": plain(loop),
        "foreach": plain(foreach),
        "foreach, then clip_grad_norm_": plain(lambda given: clipped(given, half)),
    }
    names = ["UPGrad((1, 0))", "UPGrad((1, 0)), optimize_gramian_computation", "PCGrad, optimize_gramian_computation"]
    if (why := absent("torchjd")) is None:
        from torchjd.aggregation import PCGrad, UPGrad

        for name in names:
            made = PCGrad() if "PCGrad" in name else UPGrad(torch.tensor([1.0, 0.0], device=given.kept.device))
            found[f"TorchJD {name}"] = Way(torchjd(given, made, "optimize" in name), ogd="UPGrad" in name)
    else:
        found |= {f"TorchJD {name}": why for name in names}
    found["pytorch_optimizer PCGrad"] = absent("pytorch_optimizer") or Way(pytorch_optimizer(given), ogd=False)
    return found
