"""What is read off the scores of held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ogdopt.losses import Completion
from ogdopt_harness.data.examples import Example, Preferences


def sums_of(scores: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """(sums over scored tokens, numbers of these), each (N,), of the micro-batches of N examples."""
    return torch.cat([c.logp for c in scores]), torch.cat([c.length for c in scores])


def unseen_mass(pairs: Preferences, winners: Sequence[Completion], losers: Sequence[Completion]) -> float | None:
    """The probability of answers unlike both of a pair: what neither has where the two first differ, mean over the pairs.

    Up to there they are one text, so `1 - pi(the one's next token | it) - pi(the other's | it)` needs no further pass. None if
    no two answers differ before one of them was cut.
    """
    rows = ([row for c in side for row in c.logps] for side in (winners, losers))
    found = []
    for chosen, rejected, w, l in zip(pairs.winners, pairs.losers, *rows):
        place = _fork(chosen, rejected)
        if place is not None:
            found.append(1 - w[place - 1].exp() - l[place - 1].exp())  # column t belongs to token t + 1
    return torch.stack(found).mean().clamp(min=0).item() if found else None


def _fork(chosen: Example, rejected: Example) -> int | None:
    """The first place at which two answers to one prompt have different tokens; None if there is none."""
    one, other = (x.prompt_ids + x.completion_ids for x in (chosen, rejected))
    place = next((k for k, (x, y) in enumerate(zip(one, other)) if x != y), None)
    # A token may reach from the prompt into one answer alone; then it counts as the prompt's, and has no score.
    return None if place is None or place < max(len(chosen.prompt_ids), len(rejected.prompt_ids)) else place
