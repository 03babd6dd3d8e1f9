"""Steps that were left out because a gradient was not finite: counted over restarts; a run that has only such is ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Skipped:
    """How many steps a run has skipped, and how many of these are its last ones in a row.

    `limit` of them in a row end the run.
    """

    limit: int
    total: int
    """Steps skipped so far, those before a restart included."""
    step: int = 0
    """The step up to which they were counted."""
    row: int = 0

    def look(self, step: int, total: int) -> None:
        """Count up to a step. Raises ValueError where the last `limit` steps have all been skipped."""
        new, passed = total - self.total, step - self.step
        self.row = self.row + new if new == passed else 0
        self.total, self.step = total, step
        if self.row >= self.limit:
            raise ValueError(self.text(f"the last {self.row} steps, up to step {step},"))

    def end(self, name: str) -> str:
        """What to say at the end, "" for nothing. Raises ValueError where a run has skipped all of its steps."""
        if self.step and self.total >= self.step:
            raise ValueError(self.text(f"all {self.step} steps of {name}"))
        return f"{name}: {self.total} of {self.step} steps were skipped, their gradients were not finite" if self.total else ""

    @staticmethod
    def text(which: str) -> str:
        """The message of a run that learns nothing."""
        return (
            f"{which} were skipped, since their gradients were not finite: nothing is learned. Lower the learning rate or "
            "beta, or look for extreme rows; max_skipped_steps says how many in a row end a run. The last checkpoint is kept"
        )
