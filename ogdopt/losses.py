"""Preference losses: pure functions of the token log-probabilities of (chosen, rejected) completions.

Notation: `a = log pi(y_w|x)`, `b = log pi(y_l|x)`, `A`, `B` the same under the reference policy; sums over the completion's
tokens. Every loss in `LOSSES` maps a `Pairs` of B pairs to a float tensor of shape (B,), one number a pair. `n_w`, `n_l` are
the numbers of tokens and `d = (a - A) - (b - B)` the margin; `A`, `B`, `n_w`, `n_l` are constants to autograd.

"GE" is "gradient entanglement" (Yuan et al. 2024), whose Table 2 brings the losses to one form, and "3D" is "3D-properties"
(Yan et al. 2024). Hyper-parameters have TRL's names where TRL has the loss. A loss that needs the reference raises ValueError
without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

Reduction = Literal["sum", "mean"]


class Completion(NamedTuple):
    """Log-probabilities of completions' tokens and which of them count, both (B, T)."""

    logps: Tensor
    """log pi(y_t | x, y_<t), nats; anything finite where the mask is False."""
    mask: Tensor
    """True (or 1) at the completion's tokens."""

    @property
    def length(self) -> Tensor:
        """Tokens of each completion, (B,)."""
        return self.mask.sum(-1)

    @property
    def logp(self) -> Tensor:
        """Sum over the completion's tokens, (B,), nats, in float32 at least."""
        logps = self.logps if self.logps.dtype == torch.float64 else self.logps.float()
        return torch.where(self.mask.bool(), logps, 0.0).sum(-1)

    @property
    def mean_logp(self) -> Tensor:
        """Mean over the completion's tokens, (B,), nats a token; 0 for a completion without tokens."""
        return self.logp / self.length.clamp(min=1)


class Pairs(NamedTuple):
    """A batch of preference pairs, and what the reference policy makes of them where a loss needs it."""

    chosen: Completion
    rejected: Completion
    ref_chosen: Tensor | None = None
    """A: log-probability of the chosen completion under the reference, (B,), nats."""
    ref_rejected: Tensor | None = None
    """B: the same of the rejected completion, (B,)."""

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """(a - A, b - B), each (B,). Raises ValueError without reference log-probabilities."""
        if self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError(
                "this loss compares with a reference policy, but ref_chosen or ref_rejected is None; "
                "compute the reference model's log-probabilities of both completions and pass them in Pairs"
            )
        return self.chosen.logp - self.ref_chosen, self.rejected.logp - self.ref_rejected


@dataclass(frozen=True)
class Entry:
    """A loss in the table: the function and what it needs."""

    function: Callable[..., Tensor]
    reference: bool
    """Whether it needs `ref_chosen` and `ref_rejected`."""

    def __call__(self, pairs: Pairs, **hyperparameters: Any) -> Tensor:
        """One number a pair, (B,)."""
        return self.function(pairs, **hyperparameters)


def nll(completion: Completion, reduction: Reduction = "sum") -> Tensor:
    """Negative log-likelihood of each completion, (B,): the sum, or the mean, over its tokens.

    With "sum" the batch mean is the paper's L(y) = -mean log pi(y|x), for which corollary 5.5 is exact. "mean" weighs
    sequences regardless of length. A completion without tokens costs 0.

    >>> import torch
    >>> c = Completion(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[1, 1, 0]]))
    >>> nll(c).item(), nll(c, "mean").item()
    (3.0, 1.5)
    """
    if reduction == "sum":
        return -completion.logp
    if reduction == "mean":
        return -completion.mean_logp
    raise ValueError(f"reduction is {reduction!r}; expected 'sum' or 'mean'")


def _margin(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.log_ratios()
    return chosen - rejected


def dpo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Direct preference optimization, -log sigmoid(beta d), (B,). Rafailov et al. 2023, eq. 7.

    >>> import torch
    >>> c = Completion(torch.tensor([[-1.0]]), torch.tensor([[1]]))
    >>> round(dpo(Pairs(c, c, torch.tensor([-1.0]), torch.tensor([-1.0]))).item(), 4)
    0.6931
    """
    return -logsigmoid(beta * _margin(pairs))


def cdpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Conservative DPO, the DPO loss expected when labels are flipped at the rate `label_smoothing`, (B,).

    It is smallest where sigmoid(beta d) = 1 - label_smoothing; beyond, it shrinks the margin. Mitchell 2023, eq. 3.
    Raises ValueError unless 0 <= label_smoothing < 0.5.
    """
    kept, flipped = _both_labels(pairs, beta, label_smoothing)
    return (1 - label_smoothing) * kept + label_smoothing * flipped


def robust_dpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO, whose mean over labels flipped at the rate `label_smoothing` is the DPO loss of the true ones, (B,).

    Unlike `cdpo` it never shrinks the margin; it is not bounded below. Chowdhury et al. 2024 (TRL's loss_type "robust").
    Raises ValueError unless 0 <= label_smoothing < 0.5.
    """
    kept, flipped = _both_labels(pairs, beta, label_smoothing)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def _both_labels(pairs: Pairs, beta: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The DPO loss with the label as it is and with the other one."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected the rate of flipped labels, 0 <= rate < 0.5")
    x = beta * _margin(pairs)
    return -logsigmoid(x), -logsigmoid(-x)


def r_dpo(pairs: Pairs, *, beta: float = 0.1, alpha: float = 0.2) -> Tensor:
    """Length-regularized DPO, -log sigmoid(beta d + alpha (n_w - n_l)), (B,): long winners are pushed less.

    alpha is per token; 0.2 is the value of GE's runs and one of Park et al.'s for summaries. Park et al. 2024; GE Table 2.
    """
    return -logsigmoid(beta * _margin(pairs) + alpha * (pairs.chosen.length - pairs.rejected.length))


def flex_dpo(pairs: Pairs, *, beta_chosen: float = 0.1, beta_rejected: float = 0.01) -> Tensor:
    """Flex-DPO, -log sigmoid(beta_chosen (a - A) - beta_rejected (b - B)), (B,). 3D, section "Flex-DPO"; its math setting."""
    chosen, rejected = pairs.log_ratios()
    return -logsigmoid(beta_chosen * chosen - beta_rejected * rejected)


def sft_dpo(pairs: Pairs, *, beta: float = 0.1, gamma: float = 0.1, nll_reduction: Reduction = "sum") -> Tensor:
    """DPO plus gamma times the winner's negative log-likelihood, (B,). 3D, eq. 7, with the sign that its gradient has.

    `nll_reduction` "sum" is the paper's term, "mean" for one pair that of TRL's loss_type ["sigmoid", "sft"].
    """
    return dpo(pairs, beta=beta) + gamma * nll(pairs.chosen, nll_reduction)


def dpop(pairs: Pairs, *, beta: float = 0.3, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-positive, -log sigmoid(beta (d - dpop_lambda max(0, A - a))), (B,): a winner below its reference is pushed harder.

    The defaults are the paper's; GE's runs take beta 0.1. Pal et al. 2024 ("Smaug"); GE Table 2.
    """
    chosen, rejected = pairs.log_ratios()
    return -logsigmoid(beta * (chosen - rejected - dpop_lambda * relu(-chosen)))


def ipo(pairs: Pairs, *, beta: float = 0.1, average_log_prob: bool = False) -> Tensor:
    """Identity preference optimization, (d - 1/(2 beta))^2, (B,); beta is the paper's tau. Azar et al. 2023, eq. 17.

    `average_log_prob` divides all four log-probabilities by their numbers of tokens, as TRL does. Beyond the margin 1/(2 beta)
    it pulls the winner down and the loser up.
    """
    chosen, rejected = pairs.log_ratios()
    if average_log_prob:
        chosen, rejected = chosen / pairs.chosen.length.clamp(min=1), rejected / pairs.rejected.length.clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def sppo(pairs: Pairs, *, beta: float = 0.001) -> Tensor:
    """Self-play preference optimization, hard labels, (a - A - 1/(2 beta))^2 + (b - B + 1/(2 beta))^2, (B,).

    1/beta is the paper's eta. The sum is not halved, as in TRL's "sppo_hard". Wu et al. 2024; GE Table 2.
    """
    chosen, rejected = pairs.log_ratios()
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def simpo(pairs: Pairs, *, beta: float = 2.0, simpo_gamma: float = 0.5) -> Tensor:
    """Simple preference optimization, -log sigmoid(beta a/n_w - beta b/n_l - simpo_gamma), (B,). Meng et al. 2024, eq. 6.

    The defaults are those of the paper's code (its gamma_beta_ratio 0.25); TRL's are beta 0.1 and simpo_gamma 0.5.
    """
    return -logsigmoid(beta * (pairs.chosen.mean_logp - pairs.rejected.mean_logp) - simpo_gamma)


def cpo(pairs: Pairs, *, beta: float = 0.1, cpo_alpha: float = 1.0, nll_reduction: Reduction = "sum") -> Tensor:
    """Contrastive preference optimization, -log sigmoid(beta (a - b)) + cpo_alpha NLL(chosen), (B,). Xu et al. 2024.

    `nll_reduction` "sum" is the paper's term; TRL takes the mean over the tokens. GE Table 2.
    """
    return -logsigmoid(beta * (pairs.chosen.logp - pairs.rejected.logp)) + cpo_alpha * nll(pairs.chosen, nll_reduction)


def bradley_terry(pairs: Pairs) -> Tensor:
    """-log sigmoid(r_w - r_l), (B,): the loss of a reward model, whose rewards stand where log-probabilities do elsewhere.

    Its gradients with respect to the two rewards are opposite and equal, whatever the rewards are: no 3D-properties (3D,
    section 4). Bradley and Terry 1952; Ouyang et al. 2022, eq. 1.
    """
    return -logsigmoid(pairs.chosen.logp - pairs.rejected.logp)


def rrhf(pairs: Pairs, *, nll_weight: float = 1.0, nll_reduction: Reduction = "sum") -> Tensor:
    """RRHF of two answers, max(0, b/n_l - a/n_w) + nll_weight NLL(chosen), (B,). Yuan et al. 2023; GE Table 2.

    The paper adds both terms as they are; its published code weighs the first by 100 and averages the second over tokens.
    """
    return relu(pairs.rejected.mean_logp - pairs.chosen.mean_logp) + nll_weight * nll(pairs.chosen, nll_reduction)


def slic_hf(pairs: Pairs, *, delta: float = 1.0, nll_weight: float = 0.1, nll_reduction: Reduction = "sum") -> Tensor:
    """SLiC-HF, max(0, delta - a + b) + nll_weight NLL(chosen), (B,). Zhao et al. 2023; GE Table 2.

    `delta` is in nats. The winner stands for the reference answer of the paper's regularizer; delta = 1 is the margin of GE's
    runs and nll_weight = 0.1 that of 3D's.
    """
    return relu(delta - pairs.chosen.logp + pairs.rejected.logp) + nll_weight * nll(pairs.chosen, nll_reduction)


def orpo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Odds-ratio preference optimization, NLL(chosen)/n_w - beta log sigmoid(o_w - o_l), (B,). Hong et al. 2024, eq. 6.

    `o = log(p / (1 - p))` of the geometric mean p of the tokens' probabilities; beta is the paper's lambda (TRL's name).
    """
    log_odds = _log_odds(pairs.chosen.mean_logp) - _log_odds(pairs.rejected.mean_logp)
    return nll(pairs.chosen, "mean") - beta * logsigmoid(log_odds)


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0, with value and slope of the last number below 0 where log p is rounded to 0."""
    nearest = logp.detach().clamp(max=-torch.finfo(logp.dtype).eps)
    logp = nearest + (logp - logp.detach())  # not clamp alone: a rejected answer that is certain must still be pushed
    return logp - torch.log(-torch.expm1(logp))


def kto_unpaired(
    completion: Completion,
    ref: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    z_ref: Tensor | float | None = None,
) -> Tensor:
    """Kahneman-Tversky optimization of completions without partners, (B,). Ethayarajh et al. 2024, section 4; GE Table 2.

    weight (1 - sigmoid(beta (r - z_ref))) where `desirable` (B,) is True, weight (1 - sigmoid(beta (z_ref - r))) elsewhere,
    with r the log-ratio to `ref` (B,), nats. `z_ref` (a number or a tensor that broadcasts to (B,)) is the KL divergence from
    the reference in nats, without gradient. The paper estimates it from mismatched answers, max(0, mean log-ratio). None uses
    that mean over this batch's own completions. It costs no passes but is biased, and makes the loss of a completion depend on
    the (micro-)batch that it is in.
    """
    log_ratio = completion.logp - ref
    z = _divergence(log_ratio) if z_ref is None else z_ref
    sign = torch.where(desirable.bool(), 1.0, -1.0)
    return torch.where(desirable.bool(), desirable_weight, undesirable_weight) * _regret(log_ratio, z, beta * sign)


def _divergence(log_ratios: Tensor) -> Tensor:
    return log_ratios.mean().clamp(min=0)


def _regret(log_ratio: Tensor, z: Tensor | float, beta: Tensor | float) -> Tensor:
    """1 - sigmoid(beta (r - z)), (B,), without a gradient of z; for a completion that is not wanted beta is negative."""
    return torch.sigmoid(beta * ((z.detach() if isinstance(z, Tensor) else z) - log_ratio))


def kto(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    z_ref: Tensor | float | None = None,
) -> Tensor:
    """Kahneman-Tversky optimization of pairs, (B,): `kto_unpaired` of the chosen plus that of the rejected completion.

    `z_ref` None takes max(0, mean log-ratio of all 2B completions), see there.
    """
    chosen, rejected = pairs.log_ratios()
    z = _divergence(torch.cat([chosen, rejected])) if z_ref is None else z_ref
    return desirable_weight * _regret(chosen, z, beta) + undesirable_weight * _regret(rejected, z, -beta)


def sparse(
    pairs: Pairs,
    reference: Pairs,
    significance: tuple[Tensor, Tensor],
    *,
    beta: float = 0.1,
    steepness: float = 10.0,
    l1: float = 0.01,
) -> Tensor:
    """Sparse preference optimization, DPO on the tokens whose significance w is positive, plus l1 times the sum of |w|, (B,).

    -log sigmoid(beta (sum_i on(w_i) (a_i - A_i) of the chosen - the same of the rejected)), where on(w) = 1[w > 0] is softened
    to sigmoid(steepness w). `significance` is learned together with the policy: one number a token of the chosen and of
    the rejected completion, each (B, T). `reference` holds the same completions' tokens under the reference policy. GE, section
    5.2; the threshold and what w is a function of are our reading of the text.
    """
    terms, cost = [], pairs.chosen.logps.new_zeros(())
    for ours, theirs, w in zip(pairs[:2], reference[:2], significance):
        mask = ours.mask.bool()
        log_ratios = ours.logps.to(w) - theirs.logps.to(w)
        terms.append(torch.where(mask, torch.sigmoid(steepness * w) * log_ratios, 0.0).sum(-1))
        cost = cost + torch.where(mask, w.abs(), 0.0).sum(-1)
    return -logsigmoid(beta * (terms[0] - terms[1])) + l1 * cost


LOSSES: dict[str, Entry] = {
    "dpo": Entry(dpo, reference=True),
    "cdpo": Entry(cdpo, reference=True),
    "robust_dpo": Entry(robust_dpo, reference=True),
    "r_dpo": Entry(r_dpo, reference=True),
    "flex_dpo": Entry(flex_dpo, reference=True),
    "sft_dpo": Entry(sft_dpo, reference=True),
    "dpop": Entry(dpop, reference=True),
    "ipo": Entry(ipo, reference=True),
    "sppo": Entry(sppo, reference=True),
    "kto": Entry(kto, reference=True),
    "simpo": Entry(simpo, reference=False),
    "cpo": Entry(cpo, reference=False),
    "bradley_terry": Entry(bradley_terry, reference=False),
    "rrhf": Entry(rrhf, reference=False),
    "slic_hf": Entry(slic_hf, reference=False),
    "orpo": Entry(orpo, reference=False),
}
"""All losses of pairs, by name."""
