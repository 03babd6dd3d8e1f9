"""Methods: a table of losses, rules and what they need. No method has a loop of its own; `train.py` runs them all."""

from __future__ import annotations

from dataclasses import dataclass

from ogdopt.optimizer import Metric
from ogdopt.projection import Rule, orthogonal, watch


@dataclass(frozen=True)
class Method:
    """How a batch becomes one gradient.

    With `loss="nll"` each of `sides` gets a gradient of its own negative log-likelihood, and `rule` mixes them; any other
    `loss` is an entry of `ogdopt.losses.LOSSES` and has one gradient, of pairs.
    """

    loss: str
    sides: tuple[str, ...]
    """Sides whose completions are scored; the order is the order of their backward passes."""
    rule: Rule = watch
    beta: bool = False
    """Whether `preference.beta` is a hyper-parameter; one run for each value."""
    label: str = ""
    metric: Metric = "euclidean"
    """Which change keeps the rule's promise: the gradient that the optimizer gets, or the parameter change that it makes."""

    @property
    def two_gradients(self) -> bool:
        """Whether winners and losers have a gradient each."""
        return self.loss == "nll" and set(self.sides) == {"winner", "loser"}

    @property
    def pairwise(self) -> bool:
        """Whether it needs chosen and rejected completions of the same prompt."""
        return self.loss != "nll"


METHODS: dict[str, Method] = {
    "sft": Method("nll", ("winner",), label="SFT on winners"),
    "dpo": Method("dpo", ("winner", "loser"), beta=True, label="DPO"),
    "ogd": Method("nll", ("loser", "winner"), orthogonal, label="OGD"),
    "ogd_metric": Method("nll", ("loser", "winner"), orthogonal, label="OGD (own metric)", metric="optimizer"),
    "r_dpo": Method("r_dpo", ("winner", "loser"), beta=True, label="R-DPO"),
    "dpop": Method("dpop", ("winner", "loser"), beta=True, label="DPOP"),
    "ipo": Method("ipo", ("winner", "loser"), beta=True, label="IPO"),
    "sppo": Method("sppo", ("winner", "loser"), beta=True, label="SPPO"),
    "simpo": Method("simpo", ("winner", "loser"), beta=True, label="SimPO"),
    "cpo": Method("cpo", ("winner", "loser"), beta=True, label="CPO"),
    "slic_hf": Method("slic_hf", ("winner", "loser"), label="SLiC-HF"),
}


@dataclass(frozen=True)
class RunSpec:
    """One preference run: a method, its beta where it has one, the run's directory name and its label in tables."""

    method: str
    beta: float | None
    name: str
    label: str


def runs(methods: list[str], betas: list[float]) -> list[RunSpec]:
    """All runs of a study, in the order of `methods`; a method with a beta gives one run for each of `betas`.

    Raises ValueError for an unknown or repeated method, and for a beta that is not positive.

    >>> [run.name for run in runs(["sft", "dpo", "ogd"], [0.2, 0.1])]
    ['sft', 'dpo_beta0.2', 'dpo_beta0.1', 'ogd']
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or len(set(methods)) != len(methods):
        raise ValueError(f"methods is {methods}; expected different names out of {', '.join(METHODS)}")
    if any(METHODS[name].beta for name in methods) and (not betas or min(betas) <= 0 or len(set(betas)) != len(betas)):
        raise ValueError(f"preference.beta is {betas}; expected one or more different positive numbers")
    specs = []
    for name in methods:
        method = METHODS[name]
        for beta in betas if method.beta else [None]:
            suffix = "" if beta is None else f"_beta{beta:g}"
            label = method.label if beta is None else f"{method.label} β={beta:g}"
            specs.append(RunSpec(name, beta, name + suffix, label))
    return specs
