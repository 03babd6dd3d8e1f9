"""The two passes over gradients and the base's update as compiled loops that read and write each number once.

The formulas are plain torch and run as they stand, which is what tests compare their compiled forms with. For float32 on a CPU
these are C++ (`ogdopt.native`). Elsewhere torch.compile makes them, of Triton on a GPU, for a few tensors a call and with sizes
left open, so that nothing is compiled twice.

On a CPU products are summed in float32 over blocks of 1,024 and in float64 beyond: as fast as memory, and right to 1e-9. Where
float32 squares leave their range the sums are taken again by `gram.products`. A GPU sums in float64 throughout.

The mixture is formed as a (w + r l) with r = b / a in two parts, since the rounding of one float32 number would be left, times
g_l, in the direction of g_l. Both r and a come as a power of two and a rest, one factor after the other: r lies between 1e-60
and 1e60 for gradients between 1e-30 and 1e30, where a single float32 number ends.

Where the base's update follows, the mixture is never written: two reads for the inner products, then one read of g_w, g_l, the
parameter and its state, and one write of the last two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from ogdopt import native, passes
from ogdopt.distributed import local
from ogdopt.metric import Entry
from ogdopt.native import Unavailable
from ogdopt.passes import ROUNDS_ONCE, products
from ogdopt.routes import DTYPES, WIDTH, divided, with_winner

BLOCK = 1024
TOGETHER = 4
"""Tensors a call: enough that calling costs little beside the work, few enough that compiling does."""
LEAST, MOST = 1e-34, 1e30
"""Mean squares in between are safe in float32; below, digits are lost to underflow."""
FAR = 240
"""Beyond this power of two between the coefficients of both gradients, one of the products is nothing beside the other."""
CLOSE = 1e-6
"""1 - cos^2 under which float32 products are too coarse to tell parallel gradients from others."""
CONTRACT = "cpp.enable_floating_point_contract_flag"  # lets a CPU multiply and add in one instruction
REFUSED = ("amsgrad", "centered", "maximize", "capturable", "differentiable")
"""Options of the bases that have no fused form."""


# ---- formulas: elementwise, of any shape; inner products over blocks of the last dimension -----------------------------------


def inner(w: Tensor, l: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ww, wl, ll, float64."""
    if w.device.type == "cpu" and ROUNDS_ONCE:  # without vectors a block would be one chain of roundings, to no gain
        x, y = w.float(), l.float()
        return (x * x).sum(-1).double().sum(), (x * y).sum(-1).double().sum(), (y * y).sum(-1).double().sum()
    x, y = w.double(), l.double()
    return (x * x).sum(), (x * y).sum(), (y * y).sum()


def mixed(w: Tensor, l: Tensor | None, c: Tensor) -> Tensor:
    """c[4] c[5] (c[0] w + (c[2] + c[3]) c[1] l), float32, with c[0] 0 or 1.

    Where both cancel, w + c[2] c[1] l is small and rounded accordingly, if the compiler multiplies and adds in one instruction.
    A CPU that has none such sums in float64.
    """
    wide = torch.float64 if w.device.type == "cpu" and not ROUNDS_ONCE else torch.float32
    x = torch.where(c[0] != 0, w.to(wide), 0.0)  # no product, which that instruction could take instead
    if l is not None:
        y = l.to(wide) * c[1]
        x = x + y * c[2] + y * c[3]
    return (x * c[4] * c[5]).float()


def rmsprop(p: Tensor, g: Tensor, states: Sequence[Tensor], h: Tensor) -> None:
    """torch.optim.RMSprop; h = (lr, weight_decay, alpha, 1 - alpha, eps, momentum)."""
    g = g + p.float() * h[1]
    v = states[0].float() * h[2] + h[3] * g * g  # in torch's order, which keeps the range
    states[0].copy_(v)
    u = g / (v.sqrt() + h[4])
    if len(states) > 1:
        u = states[1].float() * h[5] + u
        states[1].copy_(u)
    p.copy_(p.float() - u * h[0])


def adam(p: Tensor, g: Tensor, states: Sequence[Tensor], h: Tensor) -> None:
    """torch.optim.Adam and AdamW; h = (step size, weight_decay, 1 - beta1, beta2, 1 - beta2, eps, correction, shrink).

    The step size is lr / (1 - beta1^t), the correction sqrt(1 - beta2^t), and shrink what a decoupled weight decay leaves.
    """
    g = g + p.float() * h[1]
    m = states[0].float() + (g - states[0].float()) * h[2]
    v = states[1].float() * h[3] + h[4] * g * g
    states[0].copy_(m)
    states[1].copy_(v)
    p.copy_(p.float() * h[7] - m / (v.sqrt() / h[6] + h[5]) * h[0])


def sgd(p: Tensor, g: Tensor, states: Sequence[Tensor], h: Tensor) -> None:
    """torch.optim.SGD; h = (lr, weight_decay, momentum, 1 - dampening, share of g, share of the buffer)."""
    g = g + p.float() * h[1]
    if len(states) > 0:
        b = states[0].float() * h[2] + g * h[3]
        states[0].copy_(b)
        g = g * h[4] + b * h[5]
    p.copy_(p.float() - g * h[0])


def _rmsprop_all(bundles: Sequence[Sequence[Any]], c: Tensor, h: Tensor) -> None:
    for i, (p, w, l, *states) in enumerate(bundles):
        rmsprop(p, mixed(w, l, c[i]), states, h[i])


def _adam_all(bundles: Sequence[Sequence[Any]], c: Tensor, h: Tensor) -> None:
    for i, (p, w, l, *states) in enumerate(bundles):
        adam(p, mixed(w, l, c[i]), states, h[i])


def _sgd_all(bundles: Sequence[Sequence[Any]], c: Tensor, h: Tensor) -> None:
    for i, (p, w, l, *states) in enumerate(bundles):
        sgd(p, mixed(w, l, c[i]), states, h[i])


class Base(NamedTuple):
    """What the fused form of a torch optimizer needs to know of it."""

    update: Callable[..., None]
    """Steps bundles (parameter, g_w, g_l, *states), each by its row of two tables: `mixed`'s c and the formula's h."""
    loop: str
    """The name of the same in C++, for `native.step`."""
    states: Callable[[dict[str, Any]], tuple[str, ...]]
    """The keys of its state that the update reads and writes, for a group's settings."""
    numbers: Callable[[dict[str, Any], Tensor], Sequence[Any]]
    """The update's `h`, for a group's settings and the numbers of steps with this one, (n,): floats, or tensors (n,)."""


def _adam_numbers(group: dict[str, Any], t: Tensor, decoupled: bool = False) -> Sequence[Any]:
    (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), float(group["weight_decay"])
    decoupled = decoupled or group.get("decoupled_weight_decay", False)
    shrink, added = (1 - lr * decay, 0.0) if decoupled else (1.0, decay)
    return lr / (1 - beta1**t), added, 1 - beta1, beta2, 1 - beta2, group["eps"], (1 - beta2**t).sqrt(), shrink


def _sgd_numbers(group: dict[str, Any], _: Tensor) -> Sequence[Any]:
    momentum, ahead = group["momentum"], group["nesterov"]
    shares = (1.0, momentum) if ahead else (0.0, 1.0)
    return float(group["lr"]), group["weight_decay"], momentum, 1 - group["dampening"], *shares


def _rmsprop_numbers(group: dict[str, Any], _: Tensor) -> Sequence[Any]:
    alpha = group["alpha"]
    return float(group["lr"]), group["weight_decay"], alpha, 1 - alpha, group["eps"], group["momentum"]


BASES: dict[type[Optimizer], Base] = {
    RMSprop: Base(
        _rmsprop_all, "rmsprop", lambda g: ("square_avg", "momentum_buffer")[: 1 + (g["momentum"] > 0)], _rmsprop_numbers
    ),
    Adam: Base(_adam_all, "adam", lambda _: ("exp_avg", "exp_avg_sq"), _adam_numbers),
    AdamW: Base(_adam_all, "adam", lambda _: ("exp_avg", "exp_avg_sq"), lambda g, t: _adam_numbers(g, t, decoupled=True)),
    SGD: Base(_sgd_all, "sgd", lambda g: ("momentum_buffer",) if g["momentum"] else (), _sgd_numbers),
}


def refused(base: Optimizer) -> str:
    """Why a base's step cannot be fused; "" where it can."""
    if hasattr(base, "bases"):
        return "several optimizers have no fused form"
    if type(base) not in BASES:
        return f"{type(base).__name__} has no fused form (RMSprop, Adam, AdamW and SGD have)"
    for group in base.param_groups:
        for name in REFUSED:
            if group.get(name):
                return f"{type(base).__name__} with {name} has no fused form"
        for p in group["params"]:
            if p.dtype not in DTYPES:
                return f"a parameter is {p.dtype}, and fused forms compute in float32"
    return ""


# ---- the three passes, over lists of gradients ------------------------------------------------------------------------------


@torch.no_grad()
def rows(ws: Sequence[Any], ls: Sequence[Any]) -> Tensor:
    """`gram.products` of every pair, (P, 3), for `gram.gram(rows=...)`.

    Raises Unavailable, like `mix` and `step` before anything is changed.
    """
    both = [i for i, (w, l) in enumerate(zip(ws, ls)) if w is not None and l is not None]
    split = divided(BLOCK, (), [[ws[i] for i in both], [ls[i] for i in both]])
    places, values = [], []
    for batch, run in _plan(_inner_of_all, split.bundles, ()):
        values += run([split.bundles[i] for i in batch])
        places += [both[i] for i in batch]
    found = [torch.stack(values).view(-1, 3)] if values else []
    if split.direct:
        found.append(native.products(*split.columns))
        places += [both[i] for i in split.direct]
    rest = [both[i] for i in split.rest] + [i for i, (w, l) in enumerate(zip(ws, ls)) if w is None or l is None]
    if rest:
        some = next((x for i in rest for x in (ws[i], ls[i]) if x is not None), None)
        home = found[0].device if found else torch.device("cpu") if some is None else local(some).device
        found.append(passes.rows([ws[i] for i in rest], [ls[i] for i in rest], home))
        places += rest
    numbers = torch.cat([part.to(found[0].device) for part in found])
    order = torch.tensor(places, device="cpu").to(numbers.device)
    numbers = torch.empty_like(numbers).index_copy_(0, order, numbers)
    for i in _coarse(numbers, ws):
        numbers[i] = products(ws[i], ls[i])
    return numbers


@torch.no_grad()
def mix(ws: Sequence[Tensor], ls: Sequence[Any], a: Tensor, b: Tensor) -> bool:
    """`gram.mix_` of every pair in place: `w <- a w + b l` with the entries of `a` and `b`, (P,)."""
    if a.device.type == "cpu" and ((a == 1) & (b == 0)).all():  # asking a GPU would cost more than mixing
        return True
    table = _coefficients(a, b)
    split = divided(WIDTH, (0,), [ws, ls])
    _run(_mixed_all, split.bundles, (table,))
    if split.direct:
        own, other = split.columns
        native.step("mix", [own, own, other], table[split.direct])
    rest = split.rest
    if rest:
        passes.mix_all([ws[i] for i in rest], [ls[i] for i in rest], a[rest], b[rest])
    return True


@torch.no_grad()
def step(base: Optimizer, entries: Sequence[Entry], a: Tensor, b: Tensor) -> bool:
    """One step of the base on `a w + b l`, without writing that; where both gradients are None a parameter stays.

    False, and nothing is done, where the base has no state yet and has to begin by itself, and for gradients that wait in int8
    or in the host's memory.
    """
    form = BASES[type(base)]
    places = [i for i, (_, _, w, l, _) in enumerate(entries) if w is not None or l is not None]
    if not places:  # a rank whose shards are empty
        return True
    groups, ps, ws, ls, _ = zip(*(entries if len(places) == len(entries) else [entries[i] for i in places]))
    kept = [base.state.get(p, {}) for p in ps]
    states = _states(form, groups, kept)
    if states is None:
        return False
    split = divided(WIDTH, (0, *range(3, 3 + len(states))), [ps, ws, ls, *states])
    whole = {i: x for i, x in split.wholes.items() if x is not None}
    if len(whole) < len(split.wholes):
        return False
    counters = [some["step"] for some in kept if "step" in some]
    # Only Adam's numbers depend on it; others' counts may lie on a device that cannot be read.
    steps = _counted(counters, bool(split.direct)) if counters and form.loop == "adam" else a.new_zeros(len(places))
    settings = _settings(form, groups, steps).to(a.device, non_blocking=True)
    table = _coefficients(a[places], b[places])
    _run(form.update, [None if bundle is None else with_winner(bundle) for bundle in split.bundles], (table, settings))
    if split.direct:
        native.step(form.loop, split.columns, table[split.direct], settings[split.direct])
    for k in split.rest:
        form.update([with_winner(whole[k])], table[k : k + 1], settings[k : k + 1])
    if counters and (not split.direct or native.count(counters, 1) is None):
        # A tensor, which foreach would otherwise make of the number once for every counter.
        torch._foreach_add_(counters, torch.ones((), device="cpu"))  # pyright: ignore[reportPrivateImportUsage]
    return True


def _states(form: Base, groups: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> list[list[Any]] | None:
    """The states that the update reads and writes, by key and parameter, None where a parameter has fewer than another.

    None where the base has not made one of them yet.
    """
    keys = {id(group): form.states(group) for group in groups}
    if len(keys) == 1:
        (names,) = keys.values()
        states = [[some.get(name) for some in kept] for name in names]
        return states if all(isinstance(x, Tensor) for xs in states for x in xs) else None
    rows = [[some.get(name) for name in keys[id(group)]] for group, some in zip(groups, kept)]
    if not all(isinstance(x, Tensor) for row in rows for x in row):
        return None
    width = max(len(row) for row in rows)
    return [[row[k] if k < len(row) else None for row in rows] for k in range(width)]


def _counted(counters: Sequence[Tensor], compiled: bool) -> Tensor:
    """The numbers of steps with this one, (P,) float64."""
    there = native.count(counters, 0) if compiled else None
    return (torch.stack([*counters]).double() if there is None else there) + 1


def _settings(form: Base, groups: Sequence[dict[str, Any]], t: Tensor) -> Tensor:
    """The numbers of every parameter's update, (P, H) float32."""
    places: dict[int, list[int]] = {}
    for k, group in enumerate(groups):
        places.setdefault(id(group), []).append(k)
    found = []
    for mine in places.values():
        numbers = form.numbers(groups[mine[0]], t[mine])
        columns = [torch.as_tensor(x, dtype=torch.float64, device=t.device).expand(len(mine)) for x in numbers]
        found.append(torch.stack(columns, 1))
    table = torch.cat(found)
    order = torch.tensor([k for mine in places.values() for k in mine], device="cpu").to(t.device)
    return torch.empty_like(table).index_copy_(0, order, table).float()


def _coefficients(a: Tensor, b: Tensor) -> Tensor:
    """`mixed`'s c for each of (P,) coefficients, (P, 6): of a and b / a, or of b alone where a is nothing beside it."""
    alone = (a == 0) | (b.abs() > 2.0**FAR * a.abs())
    outer = torch.where(alone, 1.0, a)
    ratio = b / outer
    power, rest = _factors(torch.where(ratio.abs() < 2.0**-FAR, 0.0, ratio))
    first = rest.bfloat16().to(rest)  # few digits, so that its product with an element is not rounded at the sum's last one
    keep = torch.where(alone, 0.0, torch.ones_like(a))
    return torch.stack([keep, power, first, rest - first, *_factors(outer)], 1).float()


def _factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two about as large as the root of |x|, and what is left of x."""
    half = (torch.frexp(x).exponent.long() // 2).clamp(-120, 120)
    power = ((half + 1023) << 52).view(torch.float64)  # by its bits, since no function promises to be exact
    return power, x / power


def _coarse(numbers: Tensor, ws: Sequence[Any]) -> list[int]:
    """Which rows float32 products were too coarse for; none on a GPU, which sums in float64."""
    if numbers.device.type != "cpu":
        return []
    ww, wl, ll = numbers.unbind(1)
    sizes = torch.tensor([1 if w is None else max(1, w.numel()) for w in ws], dtype=torch.float64, device="cpu")
    wrong = ~(torch.minimum(ww, ll) >= LEAST * sizes) | ~(torch.maximum(ww, ll) <= MOST * sizes)
    wrong |= ww * ll - wl * wl <= CLOSE * ww * ll
    return wrong.nonzero().flatten().tolist()


# ---- compiling --------------------------------------------------------------------------------------------------------------


def _inner_of_all(bundles: Sequence[Sequence[Any]]) -> list[Tensor]:
    return [number for w, l in bundles for number in inner(w, l)]


def _mixed_all(bundles: Sequence[Sequence[Any]], c: Tensor) -> None:
    for i, (w, l) in enumerate(bundles):
        w.copy_(mixed(w, l, c[i]))


_ready: dict[Any, Callable[..., Any]] = {}


def _plan(work: Callable[..., Any], bundles: Sequence[Any], tables: Sequence[Tensor]) -> list[tuple[list[int], Any]]:
    """Batches of bundles of one kind (None is left out), each with its compiled function; nothing has run yet."""
    kinds: dict[Any, list[int]] = {}
    for i, bundle in enumerate(bundles):
        if bundle is not None:
            kinds.setdefault(tuple([None if x is None else (x.dtype, x.device) for x in bundle]), []).append(i)
    found = []
    for kind, places in kinds.items():
        whole = len(places) // TOGETHER * TOGETHER
        batches = [places[i : i + TOGETHER] for i in range(0, whole, TOGETHER)] + [[i] for i in places[whole:]]
        found += [(batch, _compiled(work, kind, len(batch), tables)) for batch in batches]
    return found


def _run(work: Callable[..., Any], bundles: Sequence[Any], tables: Sequence[Tensor]) -> None:
    """`work` on all bundles, each with its row of the tables."""
    plan = _plan(work, bundles, tables)
    order = [j for batch, _ in plan for j in batch]
    ordered, start = [table[order] for table in tables], 0
    for batch, run in plan:
        stop = start + len(batch)
        run([bundles[j] for j in batch], *(table[start:stop] for table in ordered))
        start = stop


def _compiled(work: Callable[..., Any], kind: tuple[Any, ...], count: int, tables: Sequence[Tensor]) -> Callable[..., Any]:
    """`work` on so many bundles of tensors of a kind, whatever their number of rows, compiled and run once on zeros."""
    key = (work, kind, count)
    if key not in _ready:
        width = BLOCK if work is _inner_of_all else WIDTH
        # Sizes that were equal now would be taken to be equal always.
        bundles = [[_open(x, 2 + i, width) for x in kind] for i in range(count)]
        try:
            from torch._inductor import list_options  # seconds, which those who do not compile need not wait for

            options: dict[str, Any] = {CONTRACT: "fast"} if CONTRACT in list_options() else {}
            run = torch.compile(work, fullgraph=True, options=options)
            run(bundles, *(torch.zeros_like(table[:1]).expand(count, -1).contiguous() for table in tables))
        except Exception as error:  # whatever keeps it from working: no compiler, no Triton, no room on the disk
            reason = (str(error).strip().splitlines() or [""])[0]
            raise Unavailable(f"torch.compile fails here ({type(error).__name__}: {reason})") from error
        _ready[key] = run
    return _ready[key]


def _open(kind: Any, count: int, width: int) -> Tensor | None:
    """Zeros of so many rows, to compile for any number of them."""
    if kind is None:
        return None
    dtype, device = kind
    zeros = torch.zeros(count, width, dtype=dtype, device=device)
    torch._dynamo.mark_dynamic(zeros, 0)
    return zeros
