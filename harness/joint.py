"""Two streams, one model: what a run needs that trains on preference pairs and on supervised rows.

    stream        rows                      loss of a batch
    preference    preference.data.train     mean DPO loss, beta = preference.joint_beta
    sft           sft.data.train            mean negative log-likelihood, as preference.loss_reduction says

A schedule of `ogdopt.objectives` says at each step whose turn it is. Each stream goes through its own rows, epoch after
epoch, by the steps that it has had itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.data import Example
from ogdopt.objectives import AlternatingObjective, MaxGapObjective, MixedObjective, Objective, SequentialObjective


@dataclass(frozen=True)
class Joint:
    """What joins the preference pairs in a joint run."""

    supervised: Sequence[Example]
    """Rows of the supervised stream."""
    weight: float
    """Lambda, the weight of the preference loss; the supervised loss has 1 - lambda."""
    batch_size: int
    """Supervised examples in one optimizer step."""
    optima: dict[str, float] | None = None
    """Least loss of each stream, for maxright; None: 0."""
    evaluate_every: int = 10
    """Steps from one evaluation of both losses to the next, for maxright; -1: the first step alone."""

    def objective(self, schedule: type[Objective], steps: int, seed: int) -> Objective:
        """The schedule of a run of so many steps."""
        weights = {"preference": self.weight, "sft": 1 - self.weight}
        if schedule is AlternatingObjective:
            return AlternatingObjective(weights, seed=seed)
        if schedule is MaxGapObjective:
            return MaxGapObjective(weights, optima=self.optima, evaluate_every=self.evaluate_every)
        if schedule is SequentialObjective:
            first = round(self.weight * steps)
            return SequentialObjective({"preference": first, "sft": steps - first})
        return MixedObjective(weights)
