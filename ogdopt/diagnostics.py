"""What two gradients do to each other, as named floats, from the same Gram numbers that a rule reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ogdopt.gram import Gram
from ogdopt.losses import Completion, Pairs


def entanglement(gram: Gram, weight_ratio: float = 1.0) -> dict[str, float]:
    """Gradient entanglement of a margin loss (Condition 1 and 2, Table 1 of "gradient entanglement").

    A margin loss moves by `d_w G_w - d_l G_l`; `weight_ratio` is d_w/d_l, 1 for DPO, and `weights` has it for any loss. To
    first order the chosen log-probability rises iff `<G_w, G_l> <= (d_w/d_l) |G_w|^2`, and the rejected one falls iff
    `<G_w, G_l> <= (d_l/d_w) |G_l|^2`. Blocks of `gram` are added up.

    Returns `entanglement/inner_product`, `/cosine`, `/norm_chosen`, `/norm_rejected` (both the L2 norms),
    `/condition_chosen`, `/condition_rejected` (1.0 holds, 0.0 does not) and `/case`: 1 chosen up and rejected down,
    2 both down, 3 both up. Reading the numbers waits for the device. Raises ValueError unless weight_ratio > 0.

    >>> import torch
    >>> x = lambda v: torch.tensor([v], dtype=torch.float64)
    >>> entanglement(Gram(ww=x(1.0), wl=x(2.0), ll=x(9.0)))["entanglement/case"]  # both log-likelihoods fall
    2.0
    """
    if not weight_ratio > 0:
        raise ValueError(f"weight_ratio is {weight_ratio}; expected d_w/d_l > 0 (the conditions presume positive weights)")
    ww, wl, ll = (_total(x) for x in gram[:3])
    chosen_up = wl <= weight_ratio * ww
    rejected_down = wl <= ll / weight_ratio
    norms = math.sqrt(ww) * math.sqrt(ll)
    return {
        "entanglement/inner_product": wl,
        "entanglement/cosine": max(-1.0, min(1.0, wl / norms)) if norms > 0 else 0.0,
        "entanglement/norm_chosen": math.sqrt(ww),
        "entanglement/norm_rejected": math.sqrt(ll),
        "entanglement/condition_chosen": float(chosen_up),
        "entanglement/condition_rejected": float(rejected_down),
        # Chosen down with rejected up is impossible: the margin never shrinks (Cauchy-Schwarz).
        "entanglement/case": 1.0 if chosen_up and rejected_down else 2.0 if rejected_down else 3.0,
    }


def weights(loss: Callable[..., Tensor], pairs: Pairs, **hyperparameters: Any) -> tuple[Tensor, Tensor]:
    """(d_w, d_l) = (-dL/da, dL/db) of a loss of pairs, each (B,), per nat: eq. 7 and 8 of "gradient entanglement".

    Descent on a pair's loss moves along `d_w G_w - d_l G_l`, so `entanglement(gram, d_w / d_l)` speaks about it where both
    are positive; some losses turn a weight negative (IPO beyond its margin) or to 0 (a hinge that is met). `loss` is an entry
    of `LOSSES` or any function like them, and gets `hyperparameters`. No gradient is left behind; a completion without tokens
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
