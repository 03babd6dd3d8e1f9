"""Two streams, one model: what a run needs that trains on preference pairs and on supervised rows.

    stream        rows                                   objective
    preference    preference.data.train                  f_DPO: mean DPO loss, beta = joint.beta      paper "joint SFT and DPO",
    sft           joint.data.train or sft.data.train     f_SFT: mean negative log-likelihood          equations (1) and (4)

A schedule of `ogdopt.objectives` says at each step whose turn it is. Each stream goes through its own rows, epoch after
epoch, by the steps that it has had itself. Both objectives are measured on the same few training rows of each stream all along,
and for every method, whatever loss its steps minimize; a gap is what such a measurement is above the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ogdopt.objectives import AlternatingObjective, MaxGapObjective, MixedObjective, Objective, SequentialObjective
from ogdopt_harness.common.keys import PREFERENCE, STREAMS
from ogdopt_harness.data.examples import Example
from ogdopt_harness.training.methods import Method


@dataclass(frozen=True)
class Joint:
    """What joins the preference pairs in a joint run."""

    supervised: Sequence[Example]
    """Rows of the supervised stream."""
    weight: float
    """Lambda, the weight of the preference loss; the supervised loss has 1 - lambda."""
    batch_size: int
    """Supervised examples in one optimizer step."""
    optima: Mapping[str, float] | None = None
    """Least value of each objective; None: 0."""
    evaluate_every: int = 10
    """Steps from one evaluation of both losses to the next, for maxright; -1: the first step alone."""
    objective_rows: int = 256
    """Rows of each stream on which the objectives are measured."""
    stop_gap: float | None = None
    """How close to an optimum is close enough to stop; None: nothing is."""
    stop_pareto: Sequence[Sequence[float]] = ()
    """Points [preference, sft] that are good enough."""

    def objective(self, method: Method, steps: int, seed: int) -> Objective:
        """The schedule of a run of so many steps."""
        weights = dict(zip(STREAMS, (self.weight, 1 - self.weight)))
        if method.schedule is AlternatingObjective:
            return AlternatingObjective(weights, seed=seed)
        if method.schedule is MaxGapObjective:
            return MaxGapObjective(weights, optima=self.optima, evaluate_every=self.evaluate_every)
        if method.schedule is SequentialObjective:
            share = round(self.weight * steps)
            phases = dict(zip(STREAMS, (share, steps - share)))
            return SequentialObjective(phases if method.first == PREFERENCE else dict(reversed(phases.items())))
        return MixedObjective(weights)

    def enough(self, values: Mapping[str, float]) -> str:
        """Why a run whose objectives have these values may stop, in words; "" where it may not.

        The criterion of the paper's public code: one gap is at most `stop_gap`, or both objectives are at most that much above
        those of one point of `stop_pareto`.
        """
        if self.stop_gap is None:
            return ""
        optima = self.optima or dict.fromkeys(STREAMS, 0.0)
        for name in STREAMS:
            if values[name] - optima[name] <= self.stop_gap:
                return f"{name} is {values[name]:.6g}, its optimum {optima[name]:.6g}"
        for point in self.stop_pareto:
            if all(values[name] - at <= self.stop_gap for name, at in zip(STREAMS, point)):
                where = ", ".join(f"{name} {at:.6g}" for name, at in zip(STREAMS, point))
                return f"both objectives have reached {where}"
        return ""
