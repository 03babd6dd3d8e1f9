"""What two gradients do to each other, as named floats, from the same Gram numbers that a rule reads.

G_w and G_l are the gradients of the chosen and of the rejected completion's log-probability, a and b. Descent on a loss moves
by `d_w G_w - d_l G_l`, and to first order, with step size eta ("gradient entanglement", section 3),

    a changes by eta (d_w |G_w|^2 - d_l <G_w, G_l>),    b by eta (d_w <G_w, G_l> - d_l |G_l|^2)

so a loss that means to raise a and lower b may do neither where the two gradients point the same way. `entanglement` says what
is to be expected, `weights` has d_w and d_l of any loss, `probe` what a step then did, `token_products` which tokens it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ogdopt.distributed import local, shared
from ogdopt.gram import Gram, Value, gradients, gram, parts
from ogdopt.losses import Completion, Pairs
from ogdopt.passes import moved
from ogdopt.report import StepReport


def entanglement(gram: Gram, d_w: float = 1.0, d_l: float = 1.0) -> dict[str, float]:
    """Gradient entanglement of a loss with the weights d_w and d_l (Condition 1 and 2, Table 1 of "gradient entanglement").

    With d_w = d_l, as in DPO, it is Condition 1: the chosen log-probability rises iff `<G_w, G_l> <= |G_w|^2`, and the rejected
    one falls iff `<G_w, G_l> <= |G_l|^2`. Other weights are Condition 2; those of SimPO, 1/n_w and 1/n_l, are its length-biased
    form (eq. 11). Blocks of `gram` are added up.

    Returns these numbers, which wait for the device, under `entanglement/`:

    - `inner_product`, `cosine`, and the L2 norms `norm_chosen` and `norm_rejected`;
    - `condition_chosen`, `condition_rejected`: 1.0 holds, 0.0 does not;
    - `case`: 1 chosen up and rejected down, 2 both down, 3 both up, 4 chosen down and rejected up. The last one needs a
      negative weight;
    - `band_low` and `band_high`: the ratios d_l / d_w between which both go the right way, [wl/ll, ww/wl] (RC's band,
      arXiv:2604.18239). `band_high` is there where `<G_w, G_l>` is positive; else any ratio above `band_low` does.

    >>> import torch
    >>> x = lambda v: torch.tensor([v], dtype=torch.float64)
    >>> entanglement(Gram(ww=x(1.0), wl=x(2.0), ll=x(9.0)))["entanglement/case"]  # both log-likelihoods fall
    2.0
    """
    ww, wl, ll = (_total(x) for x in gram[:3])
    chosen_up = d_w * ww >= d_l * wl
    rejected_down = d_w * wl <= d_l * ll
    norms = math.sqrt(ww) * math.sqrt(ll)
    band = {"entanglement/band_low": max(0.0, wl) / ll} if ll > 0 else {}
    band |= {"entanglement/band_high": ww / wl} if wl > 0 else {}
    return band | {
        "entanglement/inner_product": wl,
        "entanglement/cosine": max(-1.0, min(1.0, wl / norms)) if norms > 0 else 0.0,
        "entanglement/norm_chosen": math.sqrt(ww),
        "entanglement/norm_rejected": math.sqrt(ll),
        "entanglement/condition_chosen": float(chosen_up),
        "entanglement/condition_rejected": float(rejected_down),
        "entanglement/case": {(True, True): 1.0, (False, True): 2.0, (True, False): 3.0}.get((chosen_up, rejected_down), 4.0),
    }


def predicted(gram: Gram, d_w: float = 1.0, d_l: float = 1.0) -> tuple[float, float]:
    """First-order changes of (a, b), nats for a step of size 1 along `d_w G_w - d_l G_l`: eq. 4 and 5 for any weights.

    >>> import torch
    >>> x = lambda v: torch.tensor([v], dtype=torch.float64)
    >>> predicted(Gram(ww=x(1.0), wl=x(2.0), ll=x(9.0)))
    (-1.0, -7.0)
    """
    ww, wl, ll = (_total(x) for x in gram[:3])
    return d_w * ww - d_l * wl, d_w * wl - d_l * ll


@dataclass
class Probe:
    """What a step did to the log-probabilities a and b of a batch, nats; the changes are there when the `with` block ends."""

    gram: Gram
    """Gram numbers of G_w and G_l, one entry a trainable parameter; `gram.pooled` adds them up."""
    predicted: tuple[float, float] = (math.nan, math.nan)
    """First-order changes, <G_w, delta> and <G_l, delta>, of the change delta of the parameters that really came."""
    realised: tuple[float, float] = (math.nan, math.nan)
    """The changes themselves."""

    @property
    def metrics(self) -> dict[str, float]:
        """`entanglement/predicted_chosen`, `/predicted_rejected`, `/realised_chosen` and `/realised_rejected`."""
        found = zip(("predicted", "realised"), (self.predicted, self.realised))
        return {f"entanglement/{kind}_{side}": x for kind, xs in found for side, x in zip(("chosen", "rejected"), xs)}


@contextmanager
def probe(
    parameters: Iterable[Tensor], chosen: Value, rejected: Value, process_group: dist.ProcessGroup | None = None
) -> Iterator[Probe]:
    """Watch the step inside the `with` block, whatever optimizer takes it, by two backward passes before it.

    `chosen` and `rejected` return a and b of a batch as scalars with a graph, or parts of them that are added up, one a
    micro-batch. They run again, without gradients, after the block. Gradients that parameters hold already are put back. It
    keeps both gradients and a copy of the parameters until then. With `process_group`, and under torch.distributed, it is a
    collective, like a step; the values are those of the rank's own batch.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> with probe([theta], lambda: 2 * theta[0] + theta[1], lambda: theta[0]) as seen:
    ...     theta.data += torch.tensor([0.5, -1.0])  # the step, of any optimizer
    >>> seen.realised, seen.gram.wl.item()
    ((0.0, 0.5), 2.0)
    """
    watched = [p for p in parameters if p.requires_grad]
    kept = [p.grad for p in watched]
    (a, ws), (b, ls) = (gradients(closure, watched) for closure in (chosen, rejected))
    for p, g in zip(watched, kept):
        p.grad = g
    seen = Probe(gram(ws, ls, process_group, device=watched[0].device)._replace(parameters=tuple(watched)))
    before = [local(p.detach()).clone() for p in watched]
    yield seen
    with torch.no_grad():
        numbers = [moved(p, x, w, l) for p, x, w, l in zip(watched, before, ws, ls)]
        ((da, db, _),) = shared(watched, process_group).pooled(numbers, [len(watched)]).tolist()
        seen.predicted, seen.realised = (da, db), (_sum(chosen()) - a, _sum(rejected()) - b)


def _sum(value: Tensor | Iterable[Tensor]) -> float:
    return math.fsum(part.double().item() for part in parts(value))


def token_products(logps: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Inner products of the gradients of tokens' log-probabilities, (T, T), float64, symmetric to the bit.

    `logps`, (T,), has a graph, for example the tokens of the chosen answer and after them those of the rejected one. Sums of
    blocks are then the products of the whole answers' gradients. It is one batch of vector-Jacobian products, which keeps T
    gradients, so give the parameters of a few layers or adapters for a large model.

    >>> import torch
    >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> token_products(torch.stack([theta[0], theta.sum()]), [theta]).tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """
    parameters = [p for p in parameters if p.requires_grad]
    each = torch.eye(len(logps), dtype=logps.dtype, device=logps.device)
    rows = torch.autograd.grad(logps, parameters, each, is_grads_batched=True, allow_unused=True, retain_graph=True)
    total = torch.zeros(len(logps), len(logps), dtype=torch.float64, device=logps.device)
    for row in rows:
        if row is not None:
            flat = row.flatten(1).double()
            total += flat @ flat.T
    return (total + total.T) / 2  # a product of matrices sums (i, j) and (j, i) in different orders on some processors


def cosines(products: Tensor) -> Tensor:
    """Cosines of the angles between vectors, (T, T), from their inner products; 0 where one of two is 0."""
    norms = products.diagonal().clamp(min=0).sqrt()
    return (products / torch.outer(norms, norms)).nan_to_num(0.0).clamp(-1, 1)


def by_layer(
    numbers: Gram | StepReport | Probe, model: nn.Module | Iterable[tuple[str, Tensor]] | Sequence[str]
) -> dict[str, float]:
    """Cosine of the two gradients in each layer, from what a step's report or a probe has of each tensor.

    `model`, or its `named_parameters()`, says what the tensors are called: each number knows its parameter, whatever the order
    of the optimizer's groups and whichever are frozen. A list of names alone is for Gram numbers that were made by hand, one
    name an entry. A layer is the first number in a name, and what has none goes by the name of its module.

    Raises ValueError where a parameter is not the model's or the numbers of names and entries differ, TypeError for a list of
    names where the parameters are known.

    >>> import torch
    >>> x = torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)
    >>> by_layer(Gram(x, torch.tensor([0.5, 1.0, -4.0]), x), ["model.embed.weight", "h.0.up.weight", "h.0.down.weight"])
    {'embed': 0.5, '0': -0.6}
    """
    tensors = numbers.tensors if isinstance(numbers, StepReport) else numbers.gram if isinstance(numbers, Probe) else numbers
    sums: dict[str, list[float]] = {}
    for name, *entry in zip(_names(tensors, model), *(x.tolist() for x in tensors[:3])):
        found = re.search(r"(?:^|\.)(\d+)\.", name)
        layer = found[1] if found else name.split(".")[-2] if "." in name else name
        sums[layer] = [x + y for x, y in zip(sums.get(layer, [0.0] * 3), entry)]
    return {layer: wl / math.sqrt(ww) / math.sqrt(ll) if ww > 0 and ll > 0 else 0.0 for layer, (ww, wl, ll) in sums.items()}


def _names(tensors: Gram, model: nn.Module | Iterable[tuple[str, Tensor]] | Sequence[str]) -> list[str]:
    """What the model calls the parameters of the entries."""
    pairs = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    bare = [pair for pair in pairs if isinstance(pair, str)]
    if bare and tensors.parameters is not None:
        raise TypeError(
            f"by_layer() got {len(bare)} names, and the order of these {len(tensors.ww)} numbers may be another (frozen "
            "parameters, groups of an optimizer); pass the model, or model.named_parameters()"
        )
    if tensors.parameters is None:
        if len(pairs) != len(tensors.ww):
            raise ValueError(
                f"by_layer() got {len(pairs)} names for {len(tensors.ww)} Gram numbers; expected one name an entry"
            )
        return [pair if isinstance(pair, str) else pair[0] for pair in pairs]
    names = {p: name for name, p in reversed(pairs)}  # type: ignore[misc]  # no strings are left
    strange = [tuple(p.shape) for p in tensors.parameters if p not in names]
    if strange:
        raise ValueError(
            f"by_layer() found {len(strange)} of {len(tensors.parameters)} parameters that the model does not have (shapes "
            f"{', '.join(map(str, strange[:5]))}); pass the model that the optimizer or the probe was given the parameters of"
        )
    return [names[p] for p in tensors.parameters]


def weights(loss: Callable[..., Tensor], pairs: Pairs, **hyperparameters: Any) -> tuple[Tensor, Tensor]:
    """(d_w, d_l) = (-dL/da, dL/db) of a loss of pairs, each (B,), per nat: eq. 7 and 8 of "gradient entanglement".

    Descent on a pair's loss moves along `d_w G_w - d_l G_l`, so `entanglement(gram, d_w, d_l)` speaks about it. Some losses
    turn a weight negative (IPO beyond its margin) or to 0 (a hinge that is met). `loss` is an entry
    of `LOSSES` or any function like them, and gets `hyperparameters`. No gradient is left; a completion without tokens
    has the weight 0. Raises ValueError if the loss is not one number a pair.

    >>> from ogdopt.losses import LOSSES
    >>> zero = torch.zeros(1)
    >>> c = Completion(torch.tensor([[-1.0, -2.0]]), torch.tensor([[1, 1]]))
    >>> [d.item() for d in weights(LOSSES["dpo"], Pairs(c, c, zero, zero), beta=0.5)]
    [0.25, 0.25]
    """
    with torch.enable_grad():
        moved, shifts = zip(*(_movable(completion) for completion in (pairs.chosen, pairs.rejected)))
        value = loss(pairs._replace(chosen=moved[0], rejected=moved[1]), **hyperparameters)
        if value.shape != shifts[0].shape:
            raise ValueError(f"the loss has shape {tuple(value.shape)}; expected one number a pair, {tuple(shifts[0].shape)}")
        a, b = torch.autograd.grad(value.sum(), shifts, allow_unused=True, materialize_grads=True)
    return -a, b


def _movable(completion: Completion) -> tuple[Completion, Tensor]:
    """The completion, cut off from its graph, and a zero (B,) that its log-probability rises with."""
    shift = torch.zeros_like(completion.logp, requires_grad=True)
    share = completion.mask.to(shift.dtype) / completion.length.clamp(min=1)[:, None]
    return completion._replace(logps=completion.logps.detach() + shift[:, None] * share), shift


def _total(x: Tensor | float) -> float:
    return float(x.sum()) if isinstance(x, Tensor) else float(x)
