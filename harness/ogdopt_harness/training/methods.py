"""Methods: a table of losses, rules and what they need. No method has a loop of its own; `train.py` runs them all."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ogdopt.losses import LOSSES, kto_unpaired, sparse
from ogdopt.objectives import AlternatingObjective, MaxGapObjective, MixedObjective, Objective, SequentialObjective
from ogdopt.optimizer import Metric
from ogdopt.projection import Rule, normalized, orthogonal, watch


@dataclass(frozen=True)
class Method:
    """How a batch becomes one gradient.

    With `loss="nll"` each of `sides` gets a gradient of its own negative log-likelihood, and `rule` mixes them; any other
    `loss` is an entry of `ogdopt.losses.LOSSES` and has one gradient, of pairs. With a `schedule` the pairs are one of two
    objectives; the other is the negative log-likelihood of the supervised rows (`training/joint.py`), added to the chosen's.
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
    schedule: type[Objective] | None = None
    """Says whose step it is, the pairs' or the supervised rows'; one run for each value of `joint.lambdas`."""
    first: str = "preference"
    """The stream that `SequentialObjective` begins with."""
    weight: str | None = None
    """The loss of pairs whose weight (`ogdopt.diagnostics.weights`), averaged over the batch, the rule's mixture is multiplied
    by."""
    per_pair: bool = False
    """Whether each pair has its own two gradients, mixture and weight, and the batch takes the mean of these."""
    reward: bool = False
    """Whether what is trained is a reward model (`training/reward.py`), which is measured on held-out pairs alone."""

    @property
    def two_gradients(self) -> bool:
        """Whether the chosen and the rejected of a batch have a gradient each."""
        return self.loss == "nll" and set(self.sides) == {"winner", "loser"} and not self.per_pair

    @property
    def swept(self) -> Literal["beta", "lambda"] | None:
        """The hyper-parameter of which each value is a run of its own."""
        return "lambda" if self.schedule else "beta" if self.beta else None

    @property
    def evaluates(self) -> bool:
        """Whether `joint.evaluate_every` is a hyper-parameter too."""
        return self.schedule is MaxGapObjective

    @property
    def pairwise(self) -> bool:
        """Whether it needs chosen and rejected completions of the same prompt: with a schedule the DPO loss is measured."""
        return self.loss not in ("nll", "kto") or self.schedule is not None or self.weight is not None

    @property
    def reference(self) -> bool:
        """Whether it needs log-probabilities of the training rows under the model that it starts from."""
        loss = "dpo" if self.schedule else self.weight or self.loss
        return loss == "sparse" or (loss in LOSSES and LOSSES[loss].reference)

    @property
    def options(self) -> Mapping[str, Any]:
        """The loss's hyper-parameters besides beta, and their defaults."""
        functions: dict[str, Any] = {"sparse": sparse, "kto": kto_unpaired, "nll": lambda: None}
        entry = functions.get(self.loss) or LOSSES[self.loss].function
        known = inspect.signature(entry).parameters.values()
        return {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY and p.name not in ("beta", "z_ref")}


PAIR, APART = ("winner", "loser"), ("loser", "winner")

METHODS: dict[str, Method] = {
    "sft": Method("nll", ("winner",), label="SFT on chosen"),
    "dpo": Method("dpo", PAIR, beta=True, label="DPO"),
    "ogd": Method("nll", APART, orthogonal, label="OGD"),
    "ogd_metric": Method("nll", APART, orthogonal, label="OGD (own metric)", metric="optimizer"),
    "mix": Method("dpo", PAIR, label="Mix", schedule=MixedObjective),
    "alright": Method("dpo", PAIR, label="ALRIGHT", schedule=AlternatingObjective),
    "maxright": Method("dpo", PAIR, label="MAXRIGHT", schedule=MaxGapObjective),
    "sequential": Method("dpo", PAIR, label="Sequential", schedule=SequentialObjective),
    "sequential_sft_first": Method("dpo", PAIR, label="Sequential (SFT first)", schedule=SequentialObjective, first="sft"),
    "mix_ogd": Method("nll", APART, orthogonal, label="Mix + OGD", schedule=MixedObjective),
    "alright_ogd": Method("nll", APART, orthogonal, label="ALRIGHT + OGD", schedule=AlternatingObjective),
    "maxright_ogd": Method("nll", APART, orthogonal, label="MAXRIGHT + OGD", schedule=MaxGapObjective),
    "r_dpo": Method("r_dpo", PAIR, beta=True, label="R-DPO"),
    "dpop": Method("dpop", PAIR, beta=True, label="DPOP"),
    "ipo": Method("ipo", PAIR, beta=True, label="IPO"),
    "sppo": Method("sppo", PAIR, beta=True, label="SPPO"),
    "simpo": Method("simpo", PAIR, beta=True, label="SimPO"),
    "cpo": Method("cpo", PAIR, beta=True, label="CPO"),
    "slic_hf": Method("slic_hf", PAIR, label="SLiC-HF"),
    "cdpo": Method("cdpo", PAIR, beta=True, label="cDPO"),
    "robust_dpo": Method("robust_dpo", PAIR, beta=True, label="Robust DPO"),
    "flex_dpo": Method("flex_dpo", PAIR, label="Flex-DPO"),
    "sft_dpo": Method("sft_dpo", PAIR, beta=True, label="SFT-DPO"),
    "kto": Method("kto", PAIR, beta=True, label="KTO"),
    "rrhf": Method("rrhf", PAIR, label="RRHF"),
    "orpo": Method("orpo", PAIR, beta=True, label="ORPO"),
    "sparse": Method("sparse", PAIR, beta=True, label="Sparse DPO"),
    "npo": Method("nll", APART, normalized, beta=True, label="NPO", weight="dpo"),
    "npo_pair": Method("nll", APART, normalized, beta=True, label="NPO (each pair)", weight="dpo", per_pair=True),
    "reward_model": Method("bradley_terry", PAIR, label="Reward model", reward=True),
}


def check_loss_args(given: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError unless `preference.loss_args` names methods and hyper-parameters of theirs."""
    for name, options in given.items():
        if name not in METHODS:
            raise ValueError(f"preference.loss_args names {name!r}; expected methods out of {', '.join(METHODS)}")
        known = METHODS[name].options
        for option, value in options.items():
            if option not in known:
                raise ValueError(
                    f"preference.loss_args.{name} has {option!r}; expected {', '.join(known) or 'nothing'}"
                    + (" (beta is preference.beta)" if METHODS[name].beta else "")
                )
            kinds = (str, bool) if isinstance(known[option], (str, bool)) else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(known[option], bool):
                raise ValueError(
                    f"preference.loss_args.{name}.{option} is {value!r}; expected a value like its default, {known[option]!r}"
                )


@dataclass(frozen=True)
class RunSpec:
    """One preference run: a method, the run's directory name, its label in tables, and what it is one value of."""

    method: str
    beta: float | None
    name: str
    label: str
    weight: float | None = None
    """Lambda of a method with a schedule."""
    evaluate_every: int | None = None
    """Of a method that evaluates its objectives."""


def runs(
    methods: list[str], betas: list[float], lambdas: Sequence[float] = (0.5,), evaluate_every: Sequence[int] = (10,)
) -> list[RunSpec]:
    """All runs of a study, in the order of `methods`; one for each of `betas`, or of `lambdas` (and of `evaluate_every`),
    for methods that use it.

    Raises ValueError for an unknown or repeated method, a beta that is not positive, a lambda outside of [0, 1] and an
    `evaluate_every` that is neither 1 or more nor -1.

    >>> [run.name for run in runs(["sft", "dpo", "ogd", "maxright"], [0.2, 0.1], [0.5])]
    ['sft', 'dpo_beta0.2', 'dpo_beta0.1', 'ogd', 'maxright_lambda0.5_every10']
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or len(set(methods)) != len(methods):
        raise ValueError(f"methods is {methods}; expected different names out of {', '.join(METHODS)}")
    swept = {METHODS[name].swept for name in methods}
    if "beta" in swept and (not betas or min(betas) <= 0 or len(set(betas)) != len(betas)):
        raise ValueError(f"preference.beta is {betas}; expected one or more different positive numbers")
    if "lambda" in swept and (not lambdas or not all(0 <= x <= 1 for x in lambdas) or len(set(lambdas)) != len(lambdas)):
        raise ValueError(f"joint.lambdas is {lambdas}; expected one or more different numbers from 0 to 1")
    known = bool(evaluate_every) and all(k >= 1 or k == -1 for k in evaluate_every)
    if not known or len(set(evaluate_every)) != len(evaluate_every):
        raise ValueError(
            f"joint.evaluate_every is {evaluate_every}; expected one or more different numbers of steps, or -1 for step 0 alone"
        )
    specs = []
    for name in methods:
        method = METHODS[name]
        if method.swept is None:
            specs.append(RunSpec(name, None, name, method.label))
        elif method.swept == "beta":
            specs += [RunSpec(name, x, f"{name}_beta{x:g}", f"{method.label} β={x:g}") for x in betas]
        elif method.evaluates:
            specs += [
                RunSpec(name, None, f"{name}_lambda{x:g}_every{k}", f"{method.label} λ={x:g} k={k}", x, k)
                for x in lambdas
                for k in evaluate_every
            ]
        else:
            specs += [RunSpec(name, None, f"{name}_lambda{x:g}", f"{method.label} λ={x:g}", x) for x in lambdas]
    return specs
