"""What is exported is what was trained: a few rows are scored from the folder, and have to come out as they do in training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule

from ogdopt_harness.data.examples import Example
from ogdopt_harness.modeling.adapters import bare
from ogdopt_harness.modeling.pretrained import load_pretrained
from ogdopt_harness.training.job import Job

if TYPE_CHECKING:
    from ogdopt_harness.training.scoring import Scorer

ROWS = 4
EXACT, ROUNDED = 1e-3, 0.1  # nats a token, by which sums of log-probabilities may differ in float32, and in bfloat16
FAILED = ".failed"


def sampled(job: Job) -> list[Example]:
    """The shortest held-out rows of a job, or training rows where none are held out; a few of either side."""
    data = job.held_out or job.data
    sides = [side for side in (data.winners, data.losers) if side]
    size = lambda row: len(row.prompt_ids) + len(row.completion_ids)  # noqa: E731
    return [row for side in sides for row in sorted(side, key=size)[: ROWS // len(sides)]]


def check_export(scorer: Scorer, folder: Path) -> None:
    """Score rows with the model in training and from its folder. Every process calls it.

    Raises ValueError, with the folder set aside under another name, where they differ by more than rounding.
    """
    rows = sampled(scorer.job)
    expected, lengths = scorer.logps(rows)
    scorer.ranks.on_first(lambda: _compare(scorer, folder, rows, expected, lengths))


def _compare(scorer: Scorer, folder: Path, rows: Sequence[Example], expected: torch.Tensor, lengths: torch.Tensor) -> None:
    found = _scored(scorer, folder, rows)
    exact = not isinstance(bare(scorer.model), FSDPModule) and scorer.device.type == "cpu"
    exact = exact and next(scorer.model.parameters()).dtype == torch.float32
    allowed = (EXACT if exact else ROUNDED) * lengths + 1e-4 * expected.abs()
    wrong = (expected - found).abs() > allowed
    wrong |= expected.isfinite() != found.isfinite()  # what diverged in training has diverged in its folder too
    if not bool(wrong.any()):
        return
    i = int(torch.where(wrong, (expected - found).abs().nan_to_num(torch.inf), -1.0).argmax())
    aside = folder.with_name(folder.name + FAILED)
    os.replace(folder, aside)
    raise ValueError(
        f"{folder} is not the model that was trained: a row of {int(lengths[i])} scored tokens has the log-probability "
        f"{found[i]:.4f} from the folder and {expected[i]:.4f} in training. The checkpoint is kept, and the folder is now "
        f"{aside.name}; this architecture cannot be saved as it is trained, so change model.lora, or give another model"
    )


def _scored(scorer: Scorer, folder: Path, rows: Sequence[Example]) -> torch.Tensor:
    """Log-probabilities of the rows from the folder, (N,), on the CPU; one row at a time in the first process alone."""
    loaded: Any = load_pretrained(scorer.kind, folder, f"{folder}, just exported", dtype="auto")
    device = scorer.device if scorer.ranks.size == 1 else torch.device("cpu")
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.5 * loaded.get_memory_footprint():
        device = torch.device("cpu")
    trained = scorer.model, scorer.device
    try:
        scorer.model, scorer.device = loaded.to(device).eval(), device
        with torch.no_grad():
            return torch.stack([scorer.score([row], False).logp.float().sum() for row in rows]).cpu()
    finally:
        scorer.model, scorer.device = trained
