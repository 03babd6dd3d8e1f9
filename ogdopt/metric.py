"""Projection in the base optimizer's own metric, so that the parameter change itself keeps theorems 5.3 and 5.4.

RMSprop and its relatives change a parameter by -P x, with x the gradient they get and P = lr/(sqrt(v) + eps) element by
element. P is positive, but <P u, g_l> is not <u, g_l>. So an update that is orthogonal to g_l before it need not be after
it. Two repairs, both for the optimizer as it is:

- `coefficients` finds the c >= 0 with <P(u) u, g_l> = 0 for u = g_w - c g_l, where P(u) holds the second moment of this very
  step. Since P(u) u has the signs of u, any root keeps both theorems: <P u, g_w> = <P u, u> + c <P u, g_l> >= 0.
- `correct` acts on what old momentum and weight decay add to that. After the step it replaces the applied change r by the
  nearest one, in the metric P, with <r, g_l> <= 0 and <r, g_w> >= delta. That is r + p P g_w - q P g_l with p, q >= 0. The
  moments that the base keeps are left as they are. delta is the descent of this step's own gradient: old momentum may not
  cost the winners anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from ogdopt.distributed import Ranks, local
from ogdopt.gram import Gram, blocks_of, ratio
from ogdopt.passes import chunks

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-7}
"""Cosine of the angle left between the change and g_l, on the side that does not help the loser; 16-bit types: 1e-4."""
PASSES = 16
"""Most evaluations of the root; six is what it takes, and where there is a jump instead more would not find it."""


class Entry(NamedTuple):
    """One parameter of a step: its group, its gradients, and (in `correct`) what the base was given."""

    group: dict[str, Any]
    p: Tensor
    w: Tensor | None
    l: Any
    others: tuple[Any, ...] = ()
    """Gradients of what is preserved."""


class Form(NamedTuple):
    """How one optimizer class turns a gradient into a change; `s` is its state for one parameter, old or new."""

    keys: tuple[str, ...]
    second: Callable[[dict[str, Any], dict[str, Tensor], Tensor], Tensor | float]
    """(group, old state, gradient) -> second moment after the step."""
    kept: Callable[[dict[str, Any], dict[str, Tensor]], Tensor | float]
    """(group, new state) -> the same, after the step."""
    gain: Callable[[dict[str, Any], float, Tensor | float], Tensor | float]
    """(group, number of the step, second moment) -> P."""
    change: Callable[[dict[str, Any], dict[str, Tensor], Tensor, Tensor | float], Tensor]
    """(group, new state, gradient, P) -> the change that was subtracted, decoupled decay apart."""
    own: Callable[[dict[str, Any]], float]
    """Share of this step's gradient in the numerator."""


def _decayed(average: Tensor | None, beta: float, x: Tensor) -> Tensor:
    """beta average + (1 - beta) x^2"""
    return (1 - beta) * x * x if average is None else torch.addcmul(beta * average, x, x, value=1 - beta)


def _rmsprop_second(group: dict[str, Any], s: dict[str, Tensor], x: Tensor) -> Tensor:
    alpha = group["alpha"]
    v = _decayed(s.get("square_avg"), alpha, x)
    if not group["centered"]:
        return v
    m = (1 - alpha) * x
    return (v - (m + alpha * s["grad_avg"] if "grad_avg" in s else m) ** 2).clamp(min=0)


def _rmsprop_kept(group: dict[str, Any], s: dict[str, Tensor]) -> Tensor:
    return (s["square_avg"] - s["grad_avg"] ** 2).clamp(min=0) if group["centered"] else s["square_avg"]


def _adam_second(group: dict[str, Any], s: dict[str, Tensor], x: Tensor) -> Tensor:
    v = _decayed(s.get("exp_avg_sq"), float(group["betas"][1]), x)
    return torch.maximum(v, s["max_exp_avg_sq"]) if "max_exp_avg_sq" in s else v


def _root_of(v: Tensor | float) -> Any:
    """Square root, on the device where v is."""
    return v.sqrt() if isinstance(v, Tensor) else v**0.5


def _adam_gain(group: dict[str, Any], step: float, v: Tensor | float) -> Tensor:
    beta1, beta2 = (float(b) for b in group["betas"])
    denominator = _root_of(v) / (1 - beta2**step) ** 0.5 + group["eps"]
    return float(group["lr"]) / (1 - beta1**step) / denominator


def _sgd_change(group: dict[str, Any], s: dict[str, Tensor], x: Tensor, P: Tensor | float) -> Tensor:
    if "momentum_buffer" not in s:
        return P * x
    return P * (x + group["momentum"] * s["momentum_buffer"] if group["nesterov"] else s["momentum_buffer"])


def _sgd_own(group: dict[str, Any]) -> float:
    if not group["momentum"]:
        return 1.0
    own = 1.0 - group["dampening"]
    return 1.0 + group["momentum"] * own if group["nesterov"] else own


_ADAM = Form(
    keys=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    second=_adam_second,
    kept=lambda group, s: s["max_exp_avg_sq"] if group["amsgrad"] else s["exp_avg_sq"],
    gain=_adam_gain,
    change=lambda group, s, x, P: P * s["exp_avg"],
    own=lambda group: 1.0 - float(group["betas"][0]),
)
FORMS: dict[type[Optimizer], Form] = {
    RMSprop: Form(
        keys=("square_avg", "grad_avg", "momentum_buffer"),
        second=_rmsprop_second,
        kept=_rmsprop_kept,
        gain=lambda group, step, v: float(group["lr"]) / (_root_of(v) + group["eps"]),
        change=lambda group, s, x, P: float(group["lr"]) * s["momentum_buffer"] if group["momentum"] > 0 else P * x,
        own=lambda group: 1.0,
    ),
    Adam: _ADAM,
    AdamW: _ADAM,
    Adagrad: Form(
        keys=("sum",),
        second=lambda group, s, x: s["sum"] + x * x,
        kept=lambda group, s: s["sum"],
        gain=lambda group, step, v: float(group["lr"]) / (1 + (step - 1) * group["lr_decay"]) / (_root_of(v) + group["eps"]),
        change=lambda group, s, x, P: P * x,
        own=lambda group: 1.0,
    ),
    SGD: Form(
        keys=("momentum_buffer",),
        second=lambda group, s, x: 1.0,
        kept=lambda group, s: 1.0,
        gain=lambda group, step, v: float(group["lr"]),
        change=_sgd_change,
        own=_sgd_own,
    ),
}
"""Supported bases, by exact class: a subclass may have another formula."""


def check(base: Optimizer) -> None:
    """Raise TypeError for a base whose metric is not known, and ValueError for one that maximizes."""
    if type(base) not in FORMS:
        names = ", ".join(kind.__name__ for kind in FORMS)
        raise TypeError(
            f"metric='optimizer' needs to know how the base turns a gradient into a step, and does for {names}; found "
            f"{type(base).__name__}. Choose one of these, or metric='euclidean'"
        )
    for group in base.param_groups:
        if group.get("maximize"):
            raise ValueError("metric='optimizer' found maximize=True; expected losses to be minimized")


class Root(NamedTuple):
    """The coefficients that `coefficients` found."""

    c: Tensor
    """One a block, float64, on the CPU; NaN where something is not finite."""
    exact: bool
    """Whether every block's change is within the tolerance; else `correct` has work."""
    passes: int
    """Evaluations, each one pass over both gradients and the base's state."""


@torch.no_grad()
def coefficients(
    base: Optimizer,
    entries: Sequence[Entry],
    sizes: Sequence[int],
    blocks: Gram,
    scale: Callable[[Tensor], float],
    ranks: Ranks,
) -> Root:
    """For each block the c >= 0 with <P(u) u, g_l> = 0, where u = scale(c) (g_w - c g_l).

    `sizes` says how many consecutive entries form a block of `blocks`; `ranks` is who shares the entries. A block whose
    change does not help the loser as it is, or whose gradients are parallel, has c = 0.
    """
    form = FORMS[type(base)]
    per_tensor = blocks_of(sizes)
    ll = blocks.ll.cpu()
    if all(float(group["lr"]) == 0 for group in base.param_groups):
        # The first step of a warm-up moves nothing but fills the moments: solve for the step that they are about to make.
        entries = [entry._replace(group=entry.group | {"lr": 1.0}) for entry in entries]

    def measure(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, first = scale(c), not bool(c.any())
        rows = [_tangent(form, base, entry, s, s * c[k].item(), first) for entry, k in zip(entries, per_tensor)]
        h, rr, top, bottom = ranks.pooled(rows, sizes).cpu().unbind(1)
        return h, ratio(top, bottom), rr.sqrt() * ll.sqrt()

    return _root(measure, blocks.same_direction.cpu(), max(_tolerance(e.p) for e in entries))


def _root(measure: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], fixed: Tensor, tolerance: float) -> Root:
    """c >= 0 with -tolerance <= h(c)/size <= 0, entry by entry.

    `measure(c)` gives h, a fixed point's next guess and the size that h is compared with. h is positive at 0 (else c = 0)
    and negative for large c, so a bracketed secant finds a root also where h is not monotone (centered RMSprop). Where the
    second moment is still 0 the change is a sign, and h jumps at the root: then c is the end of the jump where h <= 0.
    """
    c = torch.zeros(len(fixed), dtype=torch.float64, device="cpu")
    low, high = c.clone(), torch.full_like(c, torch.inf)
    last: tuple[Tensor, Tensor] | None = None
    h, exact, passes = c, fixed, 0
    for passes in range(1, PASSES + 1):
        h, guess, size = measure(c)
        window = tolerance * size
        f = h + window / 2  # aims at the middle of the window
        low, high = torch.where(f > 0, c.maximum(low), low), torch.where(f > 0, high, c.minimum(high))
        exact = fixed | (h <= 0) & ((h >= -window) | (c == 0))
        jump = high.isfinite() & (high - low <= 0.1 * tolerance * high)
        done = exact | (jump & (c == high)) | ~h.isfinite()
        if bool(done.all()) or passes == PASSES:
            break
        following = guess if last is None else c - f * (c - last[0]) / (f - last[1])
        bound = torch.where(high.isfinite(), high, 4 * torch.maximum(c, guess))  # a secant may point far beyond
        bisect = ~((following > low) & (following < bound)) | (passes % 4 == 0)
        middle = torch.where(high.isfinite(), (low + high) / 2, bound / 2)
        following = torch.where(bisect, middle, following)
        last = c, f
        following = torch.where(jump | (high.isfinite() & (passes == PASSES - 1)), high, following)
        c = torch.where(done, c, following)
    return Root(torch.where(h.isfinite(), c, torch.nan), bool(exact.all()), passes)


def _tangent(form: Form, base: Optimizer, entry: Entry, a: float, b: float, first: bool) -> Tensor:
    """(<r, g_l>, <r, r>, a <P g_w, g_l>, a <P g_l, g_l>) for r = P x, x = a g_w - b g_l; the latter two only if `first`."""
    group, p, w, l, _ = entry
    total = torch.zeros(4, dtype=torch.float64, device=local(p).device)
    if l is None:
        return total  # what has no part in g_l has none in the root
    s = base.state.get(p, {})
    keys = [key for key in form.keys if isinstance(s.get(key), Tensor)]
    step = float(s.get("step", 0)) + 1
    decay = 0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"])
    winner = torch.zeros_like(local(p)) if w is None else local(w)
    for w_, l_, p_, *rest in chunks(winner, local(l), local(p), *(local(s[key]) for key in keys)):
        # Products in float64: of gradients of 1e-30, or 1e30, float32 has none, and b is then 1e60.
        w_, l_ = w_.double(), l_.double()
        x = (a * w_).sub_(l_, alpha=b).to(p_.dtype)
        P = form.gain(group, step, form.second(group, dict(zip(keys, rest)), x + decay * p_ if decay else x))
        r = (P * x).double()
        sums = [_dot(r, l_), _dot(r, r)]
        if first:
            weighted = l_ * P
            sums += [a * _dot(weighted, w_), a * _dot(weighted, l_)]
        total[: len(sums)] += torch.stack(sums)
    return total


def drifts(base: Optimizer) -> bool:
    """Whether a step is more than P times the gradient: momentum or weight decay take part, and `correct` has work."""
    own = FORMS[type(base)].own
    return any(own(g) != 1 or g.get("momentum", 0) > 0 or float(g["weight_decay"]) != 0 for g in base.param_groups)


@torch.no_grad()
def correct(
    base: Optimizer,
    entries: Sequence[Entry],
    sizes: Sequence[int],
    a: Tensor,
    b: Tensor,
    ranks: Ranks,
    driven: float | None = None,
) -> None:
    """Move the parameters, after the base stepped, to where theorems 5.3 and 5.4 hold for the change (see the module).

    Each entry's `w` is what the base was given, `a g_w + b g_l` with its block's coefficients (clip included), and stands
    for g_w here: where a = 0 the two gradients are parallel. `ranks` is who shares the entries.
    With `driven`, what a scaler multiplied the gradients by before the step, P is the metric that g_w would have made: where
    the second moment was 0, the one of u has no bound.
    """
    form = FORMS[type(base)]
    per_tensor = blocks_of(sizes)
    rows = []
    own = min(form.own(group) for group in base.param_groups)
    ab = [None if driven is None or a_ == 0 else (driven / a_, b_) for a_, b_ in zip(a.tolist(), b.tolist())]
    for entry, k in zip(entries, per_tensor):
        row = torch.zeros(5, dtype=torch.float64, device=local(entry.p).device)
        if entry.w is not None:
            for _, u, l, P, r in _changes(form, base, entry, ab[k]):
                Pu, Pl = u * P, l * P
                row += torch.stack([_dot(*pair) for pair in ((Pu, u), (Pu, l), (Pl, l), (r, u), (r, l))])
        rows.append(row)
    p, q = _multipliers(ranks.pooled(rows, sizes).cpu(), a.cpu(), b.cpu(), own)
    for entry, k in zip(entries, per_tensor):
        if entry.w is not None and (p[k] != 0 or q[k] != 0):
            for theta, u, l, P, _ in _changes(form, base, entry, ab[k]):
                theta -= (p[k].item() * u - q[k].item() * l).mul_(P).to(theta)


def _multipliers(products: Tensor, a: Tensor, b: Tensor, own: float) -> tuple[Tensor, Tensor]:
    """(p, q) of the nearest r + p P g_w - q P g_l that keeps both constraints, for use with u and g_l.

    `products`, (K, 5), are <u, u>, <u, g_l>, <g_l, g_l> in the metric P, <r, u> and <r, g_l>. Where g_l is 0, or opposed to
    g_w, only the winner's constraint is left, or the one that implies the other.
    """
    uu, ul, ll, ru, rl = products.unbind(1)
    zero, parallel = torch.zeros_like(uu), a == 0
    a = torch.where(parallel, 1.0, a)
    wl, ww = (ul - b * ll) / a, (uu - 2 * b * ul + b * b * ll) / (a * a)
    area = ww * ll - wl * wl
    parallel = parallel | ((wl > 0) & (area <= 1e-14 * ww * ll))
    rw = (ru - b * rl) / a
    delta = own * a * (ww - ratio(wl.clamp(min=0) ** 2, ll)).clamp(min=0)  # <u, g_w> for a times the projection of g_w
    excess = ratio(rl, ll)  # of the change along g_l
    lacking = ratio(delta - rw, ww)
    both = ratio((delta - rw) * ll + rl * wl, area)
    cases = [
        (parallel, zero, excess),  # g_w is along g_l: neither may move
        ((rl <= 0) & (rw >= delta), zero, zero),
        ((rl > 0) & (rw - excess * wl >= delta), zero, excess),
        ((rw < delta) & (rl + lacking * wl <= 0), lacking, zero),
    ]
    p, q = both, ratio(rl + both * wl, ll)
    for condition, p_, q_ in reversed(cases):
        p, q = torch.where(condition, p_, p), torch.where(condition, q_, q)
    return p / a, q + p * b / a  # p P g_w - q P g_l, written with u = a g_w + b g_l


def _changes(form: Form, base: Optimizer, entry: Entry, driven: tuple[float, float] | None = None) -> Iterator[tuple[Any, ...]]:
    """Chunks of (theta, u, g_l, P, r) of one parameter after the step; all but theta float64, g_l 0 where there is none.

    With `driven`, (1/a, b) of the block, P is the metric that g_w = (u - b g_l)/a would make.
    """
    group, p, u, l, _ = entry
    s = {key: value for key, value in base.state[p].items() if isinstance(value, Tensor)}
    keys = [key for key in form.keys if key in s]
    step = float(s.get("step", 0))
    decay, decoupled = float(group["weight_decay"]), bool(group.get("decoupled_weight_decay"))
    # A gradient that enters the change through a buffer brought its coupled decay along.
    buffered = "exp_avg" in s or ("momentum_buffer" in s and not group.get("nesterov"))
    assert u is not None
    losers = [] if l is None else [local(l)]
    for theta, u_, *rest in chunks(local(p.detach()), local(u), *(local(s[key]) for key in keys), *losers):
        u_ = u_.double()
        l_ = rest.pop().to(u_) if losers else torch.zeros_like(u_)
        state = dict(zip(keys, rest))
        P = form.gain(group, step, form.kept(group, state))
        r = form.change(group, state, u_.to(theta), P)
        if decay and (decoupled or not buffered):
            k = float(group["lr"]) * decay if decoupled else P * decay
            r = (r + k * theta) / (1 - k)  # of the parameter as it was before the step
        if driven is not None:
            P = form.gain(group, step, form.second(group, state, ((u_ - driven[1] * l_) * driven[0]).to(theta)))
        yield theta, u_, l_, P, r.double()


def _tolerance(p: Tensor) -> float:
    return TOLERANCE.get(p.dtype.to_real(), 1e-4)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.reshape(-1), y.reshape(-1))
