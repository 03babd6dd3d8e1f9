"""What one step logs, collected while it is taken."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ogdopt import StepReport
from ogdopt.diagnostics import Probe
from ogdopt.gram import Gram
from ogdopt_harness.common.ranks import Ranks


@dataclass
class StepRecord:
    """Per-step metrics, kept on the device until logged: sums over this process's rows that add up to those of the batch."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    known: dict[str, float] = field(default_factory=dict)
    """Figures that every process has."""
    tokens: int = 0
    slots: int = 0
    """Tokens that went through the model, without padding and with it."""
    learning_rate: float = 0.0
    report: StepReport | None = None
    seen: Probe | None = None
    """What the step did to the mean log-probabilities of its batch, where that was watched."""
    each: list[Gram] = field(default_factory=list)
    """Gram numbers of each pair, for methods that mix pair by pair."""

    def add(self, **values: Tensor) -> None:
        """Add to the sums."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()

    def total(self, ranks: Ranks, device: torch.device, *more: float) -> tuple[dict[str, float], list[float]]:
        """The sums over all processes by name, `tokens` and `slots` among them; and those of `more`.

        One reduction and one read for all of it; the names are the same everywhere, since all steps are.
        """
        names = sorted(self.sums)
        numbers = torch.tensor([self.tokens, self.slots, *more], dtype=torch.float64).to(device, non_blocking=True)
        packed = torch.cat([numbers, *(self.sums[name].double().reshape(1) for name in names)])
        tokens, slots, *rest = ranks.sum(packed).tolist()
        return {"tokens": tokens, "slots": slots} | dict(zip(names, rest[len(more) :], strict=True)), rest[: len(more)]
