"""Is there a step that is wrong, not finite, or silently plain? A random search against an oracle in float64.

    python -m benchmarks.search --examples 20000 --seed 0

Every example draws type, layouts, sizes from 1e-30 to 1e30, missing and zero gradients, how the two are related, how the
loser's waits, scope, clip, fused or not, metric, base, and the way of calling. It takes one to three steps. The oracle is
Definition 4.1 on flat float64 vectors. For `metric="optimizer"` it is the two theorems on the change that came, and for a
fused step the change that the base makes of the same by itself. A tensor in int8 is looked up as it was stored, which has to be
within half a step of what it was. The counts go to the terminal, each finding with its example.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ogdopt import ProjectedGradient
from ogdopt.stored import Stored

BASES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1.0},
    "SGD momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "SGD nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"lr": 0.01},
    "RMSprop momentum": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.01},
    "Adam decay": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.01},
} | {name: {"lr": 0.01} for name in "ASGD Adadelta Adamax NAdam RAdam Rprop".split()}
KNOWN = ("SGD", "RMSprop", "Adam", "AdamW", "Adagrad")
"""Bases whose metric is known."""
KINDS = ("random",) * 4 + ("parallel", "opposed", "near", "orthogonal", "zero winner", "zero loser", "conflict")
SHAPES = ((), (1,), (7,), (3, 5), (300,), (16, 20), (2, 3, 4, 5), (0,), (40, 30))
LAYOUTS = ("plain", "plain", "transposed", "strided", "channels_last")
COARSE = 1e-3
"""sin^2 under which gradients with a 16-bit or int8 part may be taken for parallel; 1e-10 else."""


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another order of memory."""
    if layout == "transposed" and x.ndim == 2:
        return x.t().contiguous().t()
    if layout == "channels_last" and x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    if layout == "strided" and x.ndim == 1:
        return torch.stack([x, x], 1)[:, 0]
    return x


def draw(rng: random.Random) -> dict[str, Any]:
    """The settings of one example."""
    base = rng.choice([*BASES])
    fused = rng.random() < 0.3
    metric = "optimizer" if base.split()[0] in KNOWN and not fused and rng.random() < 0.3 else "euclidean"
    forms = [None, None, torch.bfloat16, "int8", "cpu", *([] if metric == "optimizer" else ["recompute"])]
    return {
        "base": base,
        "fused": fused,
        "metric": metric,
        "dtype": torch.float32 if fused else rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
        "set_aside": rng.choice(forms),
        "scope": rng.choice(["global", "global", "group", "tensor"]),
        "max_norm": rng.choice([None, None, 10.0 ** rng.uniform(-3, 3)]),
        "way": rng.choice(["contexts", "closures", "project"]),
        "kind": rng.choice(KINDS),
        "sizes": (rng.choice([0, rng.uniform(-30, 30)]), rng.choice([0, rng.uniform(-30, 30)])),
        "shapes": [(rng.choice(SHAPES), rng.choice(LAYOUTS), rng.choice(LAYOUTS)) for _ in range(rng.randint(1, 4))],
        "missing": [rng.choice(["", "", "", "", "winner", "loser", "zero loser"]) for _ in range(4)],
        "steps": rng.randint(1, 3),
        "seed": rng.getrandbits(32),
    }


def related(kind: str, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """g_w and g_l of n elements, float64, whose sizes are about 1."""
    x, y = torch.randn(2, max(n, 1), generator=g, dtype=torch.float64)
    across = y - (x @ y) / (x @ x) * x
    w = {
        "parallel": 2 * x,
        "opposed": -x,
        "near": x + 0.3 * y,
        "orthogonal": across,
        "zero winner": 0 * x,
        "conflict": y - 2 * (x @ y).abs() / (x @ x) * x,
    }.get(kind, y)
    return w[:n], (0 * x if kind == "zero loser" else x)[:n]


class Example:
    """One drawn example: parameters, gradients, and the steps that are taken."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.g = torch.Generator().manual_seed(settings["seed"])
        dtype = settings["dtype"]
        self.ps = []
        for shape, layout, _ in settings["shapes"]:
            p = 1e-2 * torch.randn(shape, generator=self.g, dtype=torch.float64)
            self.ps.append(nn.Parameter(laid_out(p.to(dtype), layout)))
        half = (len(self.ps) + 1) // 2
        groups = [{"params": part} for part in (self.ps[:half], self.ps[half:]) if part]
        self.groups = [len(group["params"]) for group in groups]
        base = getattr(torch.optim, settings["base"].split()[0])(groups, **BASES[settings["base"]])
        names = ("max_norm", "scope", "metric", "set_aside", "fused")
        self.opt = ProjectedGradient(base, **{name: settings[name] for name in names})
        self.seen: list[Tensor | None] = []
        n = sum(p.numel() for p in self.ps)
        self.steady = torch.ones(n, dtype=torch.bool)  # elements of a fused step whose gradients were never mere rounding
        self.moved = torch.zeros(n, dtype=torch.float64)  # by how much the unfused steps moved each at most
        self.halfway: list[Tensor] = []
        if not settings["fused"]:
            base.register_step_pre_hook(lambda *_: self.see())
            base.register_step_post_hook(lambda *_: self.stop_halfway())

    def see(self) -> None:
        """Keep what the base is about to step on."""
        self.seen = [None if p.grad is None else p.grad.detach().clone() for p in self.ps]

    def stop_halfway(self) -> None:
        """Keep the parameters as the base leaves them, which `metric="optimizer"` may repair."""
        self.halfway = [p.detach().double().flatten().clone() for p in self.ps]

    def gradients(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """g_w and g_l as tensors of the parameters' type; None where one is missing."""
        counts = [p.numel() for p in self.ps]
        sides = related(self.settings["kind"], sum(counts), self.g)
        found: list[list[Tensor | None]] = []
        for side, x, exponent in zip(("winner", "loser"), sides, self.settings["sizes"]):
            parts: list[Tensor | None] = []
            for p, part, (_, _, layout), gone in zip(
                self.ps, (x * 10.0**exponent).split(counts), self.settings["shapes"], self.settings["missing"]
            ):
                part = 0 * part if gone == f"zero {side}" else part
                parts.append(None if gone == side else laid_out(part.view(p.shape).to(p.dtype), layout))
            if all(part is None for part in parts):
                parts[0] = torch.zeros_like(self.ps[0])
            found.append(parts)
        return found[0], found[1]

    def step(self, ws: list[Tensor | None], ls: list[Tensor | None]) -> Any:
        """One step of the optimizer, in the way that was drawn."""
        if self.by_closures:
            return self.opt.step(*(lambda gs=gs: self.loss(gs) for gs in (ws, ls)))
        for context, gs in ((self.opt.loser, ls), (self.opt.winner, ws)):
            with context():
                for p, g in zip(self.ps, gs):
                    p.grad = None if g is None else g.clone()
        if self.settings["way"] == "project":
            self.opt.project()
        return self.opt.step()

    @property
    def by_closures(self) -> bool:
        """Whether autograd makes the gradients, which then lie as the parameters do."""
        return self.settings["way"] == "closures" or self.settings["set_aside"] == "recompute"

    def as_given(self, gs: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients in the layout in which the optimizer gets them, which decides about blocks of int8."""
        if not self.by_closures:
            return gs
        return [None if g is None else torch.empty_like(p).detach().copy_(g) for p, g in zip(self.ps, gs)]

    def loss(self, gs: list[Tensor | None]) -> Tensor:
        """A loss that has these gradients; 0 at these parameters, so that it stays in every type's range."""
        return sum((((p - p.detach()) * g).sum() for p, g in zip(self.ps, gs) if g is not None), torch.zeros(()))


def flat(gs: list[Tensor | None], ps: list[nn.Parameter]) -> list[Tensor]:
    """Float64 vectors, zeros where there is nothing."""
    return [torch.zeros(p.numel(), dtype=torch.float64) if g is None else g.double().flatten() for g, p in zip(gs, ps)]


def waited(l: Tensor | None, form: Any) -> Tensor | None:
    """The loser's gradient as it is stored; raises AssertionError where that is too far off."""
    if l is None or form not in (torch.bfloat16, "int8"):
        return l
    wide = l.float() if l.dtype == torch.bfloat16 else l
    kept = l.to(torch.bfloat16) if form == torch.bfloat16 else Stored(wide, form).restored()
    if l.numel():
        error, top = (kept.double() - l.double()).abs().max().item(), l.double().abs().max().item()
        assert error <= top / 254 * (1 + 1e-3) + 1e-44, "a stored gradient is further off than its rounding"
    return kept


def check(example: Example) -> str:
    """Take the steps; "" or what was wrong."""
    settings = example.settings
    twin = Example({**settings, "fused": False}) if settings["fused"] else None
    for k in range(settings["steps"]):
        ws, ls = example.gradients()
        before = [p.detach().double().flatten().clone() for p in example.ps]
        report = example.step(ws, ls)
        kept = [waited(l, settings["set_aside"]) for l in example.as_given(ls)]
        w, l = flat(ws, example.ps), flat(kept, example.ps)
        if report.skipped:
            return f"step {k}: skipped, and all gradients are finite"
        wrong = theorems(example, before, ws, ls) if settings["metric"] == "optimizer" else mixture(example, report, w, l)
        if not wrong and twin is not None:
            wrong = unfused(example, twin)
        if not wrong and not all(p.isfinite().all() for p in example.ps):
            wrong = overflown(example, report)
        if wrong:
            return f"step {k}: {wrong}"
    return ""


def unfused(example: Example, twin: Example) -> str:
    """The fused change against what the unfused steps make of the same gradients, element by element."""
    before = torch.cat(flat([p.detach().clone() for p in twin.ps], twin.ps))
    twin.step(*twin.gradients())
    after, got = (torch.cat(flat([p.detach() for p in some.ps], some.ps)) for some in (twin, example))
    example.moved = torch.maximum(example.moved, (after - before).abs())
    eps = torch.finfo(example.settings["dtype"]).eps
    off = (got - after).abs() - 1e-2 * example.moved - 8 * eps * (after.abs() + before.abs())
    looked = example.steady & after.isfinite()
    if (off[looked] > 0).any():
        return f"a fused step is off by {off[looked].max().item():.3g} over the bound"
    return "" if bool((got.isfinite() | ~after.isfinite()).all()) else "a fused step is not finite where the unfused one is"


def overflown(example: Example, report: Any) -> str:
    """A parameter that is not finite: the base's own doing where it was given finite gradients in the range of its squares."""
    limit = math.sqrt(torch.finfo(example.settings["dtype"]).max) / 1e3
    return "" if report.grad_norm * report.scale.item() > limit else "a parameter is not finite"


def mixture(example: Example, report: Any, ws: list[Tensor], ls: list[Tensor]) -> str:
    """What the base was given, against Definition 4.1 block by block, and the clip."""
    settings = example.settings
    n = len(ws)
    blocks = {"global": [n], "group": example.groups, "tensor": [1] * n}[settings["scope"]]
    coarse = settings["dtype"] == torch.bfloat16 or settings["set_aside"] in (torch.bfloat16, "int8")
    pairs = report.coefficients if isinstance(report.coefficients, list) else [report.coefficients]
    us: list[Tensor] = []
    slack: list[Tensor] = []
    eps = torch.finfo(settings["dtype"]).eps
    share = 3e-7 if settings["fused"] else 1e-11  # of float32 sums, and of float64 ones
    # The product is rounded before it is added, or what is read back from int8 is, into the gradient's type.
    plainly = settings["fused"] or settings["set_aside"] in ("recompute", "int8")
    start = 0
    for size, (a, b) in zip(blocks, pairs):
        w, l = torch.cat(ws[start : start + size]), torch.cat(ls[start : start + size])
        top, low = w.abs().amax().item() if len(w) else 0.0, l.abs().amax().item() if len(l) else 0.0
        w_, l_ = w / (top or 1.0), l / (low or 1.0)  # so that no square leaves the range
        ww, wl, ll = (w_ @ w_).item(), (w_ @ l_).item(), (l_ @ l_).item()
        c = max(0.0, wl) / ll if ll > 0 else 0.0
        apart = 1 - wl * wl / (ww * ll) if ww * ll > 0 else 1.0
        dropped = wl > 0 and apart <= (COARSE if coarse else 1e-10)
        if dropped and (a, b) == (0.0, 0.0):
            c, keep = 0.0, 0.0
        elif wl > 0 and apart < 1e-14:
            return f"parallel gradients were not dropped, coefficients {(a, b)}"
        elif (a, b) == (0.0, 0.0):
            return f"gradients {apart:.1e} from parallel were dropped"
        else:
            keep = 1.0
        us.append(keep * w - c * top * l_)
        slack.append(4 * eps * (us[-1].abs() + (1.0 if plainly else 2.0**-5) * c * top * l_.abs()))
        slack[-1] += share * math.sqrt(ww / ll if ll > 0 else 0.0) * top * l_.abs()
        start += size
    u, bound = torch.cat(us), torch.cat(slack)
    top = u.abs().amax().item() if len(u) else 0.0
    norm = top * (u / (top or 1.0)).norm().item()
    limit = settings["max_norm"]
    scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    if not abs(report.grad_norm - norm) <= 1e-5 * norm + bound.sum().item() * 2 + 1e-300:
        return f"the norm is {norm:.6g}, and {report.grad_norm:.6g} is reported"
    if settings["fused"]:
        example.steady &= u.abs() >= 1e3 * bound
        return ""  # the change is looked at instead
    if not example.seen:
        return "the base did not step"
    got = torch.cat(flat(example.seen, example.ps))
    tiny = torch.finfo(settings["dtype"]).smallest_normal * eps
    off = (got - scale * u).abs() - scale * (bound + 1e-5 * u.abs() * (limit is not None)) - 2 * tiny
    return f"an element is off by {off.max().item():.3g} over the bound, of {top * scale:.3g}" if (off > 0).any() else ""


def theorems(example: Example, before: list[Tensor], ws: list[Tensor | None], ls: list[Tensor | None]) -> str:
    """The change raises no winner's loss and lowers no loser's, but for rounding; parallel ones may not move."""
    state = [x for s in example.opt.base.state.values() for x in s.values() if isinstance(x, Tensor)]
    if not all(bool(x.isfinite().all()) for x in state):
        return ""  # the base's own second moment has left its type's range, and it makes nothing of this gradient
    eps = torch.finfo(example.settings["dtype"]).eps
    coarse = example.settings["set_aside"] in (torch.bfloat16, "int8") or example.settings["dtype"] == torch.bfloat16
    after = [p.detach().double().flatten() for p in example.ps]
    for side, gs, sign in (("winner", ws, 1), ("loser", ls, -1)):
        g = torch.cat(flat(gs, example.ps))
        top = g.abs().amax().item() if len(g) else 0.0
        g = g / (top or 1.0)
        old, new = torch.cat(before), torch.cat(after)
        change = new - old
        rounding = 4 * eps * ((old.abs() + 2 * torch.cat(example.halfway).abs() + change.abs()) @ g.abs()).item()
        loose = (2e-2 if coarse else 2e-5) * change.norm().item() * g.norm().item()
        if sign * (change @ g).item() > rounding + loose:
            angle = (change @ g).item() / (change.norm() * g.norm()).item()
            return f"the {side}'s theorem is broken: cosine of change and gradient {angle:.3g}"
    return ""


def search(examples: int, seed: int = 0, shown: int = 20) -> Counter[str]:
    """Try so many; how they ended, with each finding on the terminal."""
    rng, ends = random.Random(seed), Counter[str]()
    torch.set_num_threads(1)
    for _ in range(examples):
        settings = draw(rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrong = check(Example(settings))
        except Exception as error:  # a finding too, whatever it is
            wrong = f"{type(error).__name__}: {error}"
        ends["wrong" if wrong else "right"] += 1
        if wrong and ends["wrong"] <= shown:
            print(f"{wrong}\n    {settings}", flush=True)
    return ends


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ends = search(arguments.examples, arguments.seed)
    print(f"{arguments.examples} examples: {ends['right']} right, {ends['wrong']} wrong, not finite or silent")
    return int(ends["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
