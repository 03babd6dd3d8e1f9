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
from ogdopt.passes import ROUNDS_ONCE, order_of, products
from ogdopt.stored import Stored

BLOCK = 1024
WIDTH = 64
"""Elements that sizes are counted in where there is nothing to add up."""
TOGETHER = 4
"""Tensors a call: enough that calling costs little beside the work, few enough that compiling does."""
LEAST, MOST = 1e-34, 1e30
"""Mean squares in between are safe in float32; below, digits are lost to underflow."""
FAR = 240
"""Beyond this power of two between the coefficients of both gradients, one of the products is nothing beside the other."""
CLOSE = 1e-6
"""1 - cos^2 under which float32 products are too coarse to tell parallel gradients from others."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
    wholes = [None if w is None or l is None else _whole((), w, l) for w, l in zip(ws, ls)]
    direct, bundles, rest = _divided(BLOCK, wholes)
    places, values = [], []
    for batch, run in _plan(_inner_of_all, bundles, ()):
        values += run([bundles[i] for i in batch])
        places += batch
    found = [torch.stack(values).view(-1, 3)] if values else []
    if direct:
        found.append(native.products(list(direct.values())))
        places += direct
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
    direct, bundles, rest = _divided(WIDTH, [_whole((0,), w, l) for w, l in zip(ws, ls)])
    _run(_mixed_all, bundles, (table,))
    if direct:
        native.step("mix", [(w, w, l) for w, l in direct.values()], table[[*direct]])
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
    places = [i for i, entry in enumerate(entries) if entry.w is not None or entry.l is not None]
    moved = [entries[i] for i in places]
    if not moved:  # a rank whose shards are empty
        return True
    wholes: list[Any] = []
    counts = []
    for group, parameter, w, l, _ in moved:
        kept = base.state.get(parameter, {})
        states = [kept.get(key) for key in form.states(group)]
        if any(not isinstance(value, Tensor) for value in states):
            return False
        counts += [kept["step"]] if "step" in kept else []
        wholes.append(_whole((0, *range(3, 3 + len(states))), parameter.detach(), w, l, *states))
        if wholes[-1] is None:
            return False
    direct, others, rest = _divided(WIDTH, wholes)
    bundles = [None if bundle is None else _with_winner(bundle) for bundle in others]
    # Only Adam's numbers depend on it; others' counts may lie on a device that cannot be read.
    counted = torch.stack(counts).double() + 1 if counts and form.loop == "adam" else a.new_zeros(len(moved))
    settings = _settings(form, [entry.group for entry in moved], counted).to(a.device, non_blocking=True)
    table = _coefficients(a[places], b[places])
    _run(form.update, bundles, (table, settings))
    if direct:
        native.step(form.loop, list(direct.values()), table[[*direct]], settings[[*direct]])
    for k in rest:
        form.update([_with_winner(wholes[k])], table[k : k + 1], settings[k : k + 1])
    if counts:
        torch._foreach_add_(counts, 1)  # pyright: ignore[reportPrivateImportUsage]
    return True


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


def _whole(written: Sequence[int], *tensors: Any) -> list[Any] | None:
    """The local parts of tensors as plain ones that lie in memory in one order, None kept.

    What is only read and lies otherwise is copied. None where a tensor waits in int8 or in another memory, or where one that is
    `written`, by place, cannot be had in the order of the first.
    """
    found: list[Any] = []
    flat = True
    for x in tensors:
        if x is not None:
            if type(x) is not Tensor:
                x = x.whole if isinstance(x, Stored) else local(x)
                if x is None:
                    return None
            flat = flat and x.is_contiguous()
        found.append(x)
    if flat:
        return found
    there = [i for i, x in enumerate(found) if x is not None]
    order = order_of(found[there[0]])
    for i in there:
        turned = found[i].permute(order)
        if not turned.is_contiguous():
            if i in written:
                return None
            turned = turned.contiguous()
        found[i] = turned.view(-1)
    return found


def _divided(width: int, wholes: Sequence[Any]) -> tuple[dict[int, list[Any]], list[list[Any] | None], list[int]]:
    """What C++ takes as it is, by place; blocks for torch.compile, None where there are none; the places that neither takes.

    Raises Unavailable.
    """
    direct = {i: x for i, x in enumerate(wholes) if x is not None and native.fits(*x)}
    if direct:
        native.library()
    bundles = [None if x is None or i in direct else _blocks(width, x) for i, x in enumerate(wholes)]
    return direct, bundles, [i for i, bundle in enumerate(bundles) if bundle is None and i not in direct]


def _blocks(width: int, whole: Sequence[Any]) -> list[Any] | None:
    """Tensors of one size as (rows, width), None kept; None where one has no such view."""
    for x in whole:
        if x is None:
            continue
        if x.numel() % width or x.numel() < 2 * width or x.dtype not in DTYPES or not native.plain(x):
            return None
    return [None if x is None else x.view(-1, width) for x in whole]


def _with_winner(bundle: Sequence[Any]) -> list[Any]:
    """A bundle whose parameter has a gradient of the winner's, if of zeros."""
    p, w, *rest = bundle
    return [p, torch.zeros_like(p) if w is None else w, *rest]
