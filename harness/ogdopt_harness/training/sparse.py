"""Sparse preference optimization in training: a significance for every token, learned together with the policy.

`hidden` predicts it from the hidden state that also predicts the token, by one linear layer that both answers share, so that a
prefix has the same significance in both; `free` gives every token of the training rows a number of its own. Hidden states are
detached: the policy is trained through the tokens' log-probabilities alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ogdopt.losses import Completion, Pairs, sparse
from ogdopt_harness.common import keys
from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.config.schema import SparseConfig
from ogdopt_harness.data.examples import Preferences, collate


class Significance(nn.Module):
    """w of tokens: predicted from hidden states of a size, or, without one, free for so many tokens."""

    def __init__(self, size: int | None, tokens: int, initial: float) -> None:
        super().__init__()
        self.head = None if size is None else nn.Linear(size, 1)
        if self.head is None:
            self.free = nn.Parameter(torch.full((tokens,), initial))
        else:
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, initial)

    def forward(self, states: Tensor, places: Tensor) -> Tensor:
        """(n,) of tokens with hidden states (n, size), which stand at `places` (n,) among all tokens."""
        return self.free[places] if self.head is None else self.head(states.detach().float()).sum(-1)  # FSDP2 refuses a view


class SparseTerm:
    """The sparse loss of training pairs: where their tokens are, what the reference says of them, and their significance."""

    def __init__(
        self, config: SparseConfig, data: Preferences, size: int, on_prompt: bool, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        masks = (collate([example], 0, on_prompt).loss_mask for example in [*data.winners, *data.losers])
        self.ends = [0, *accumulate(int(mask.sum()) for mask in masks)]
        """Where the tokens of each chosen, and after them of each rejected, begin and end among all."""
        self.losers = len(data.winners)
        self.significance = Significance(size if config.significance == "hidden" else None, self.ends[-1], config.initial)
        self.significance.to(device)
        if ranks.size > 1:  # as the model is, so that its gradients are the mean of the processes' own too
            fully_shard(self.significance, mesh=init_device_mesh(device.type, (ranks.size,)))
        self.reference = torch.zeros(0)
        """Log-probabilities of all tokens under the reference, (tokens,), nats."""

    def losses(
        self, chosen: Completion, rejected: Completion, states: Tensor, rows: Sequence[int], **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss of each pair (n,), means over answers of |w| and of the share of tokens that is on) of the pairs `rows`.

        `states` are the hidden states in front of all scored tokens of the chosen, then of the rejected completions.
        """
        spans = [range(self.ends[k], self.ends[k + 1]) for k in (*rows, *(self.losers + i for i in rows))]
        places = torch.tensor([place for span in spans for place in span], device=states.device)
        w = self.significance(states, places)
        known = self.reference[places.cpu()].to(w)
        mask, n = torch.cat([chosen.mask, rejected.mask]).bool(), len(rows)
        zeros = torch.zeros(mask.shape, dtype=w.dtype, device=w.device)
        ws, refs = zeros.masked_scatter(mask, w), zeros.masked_scatter(mask, known)
        reference = Pairs(Completion(refs[:n], chosen.mask), Completion(refs[n:], rejected.mask))
        found = sparse(Pairs(chosen, rejected), reference, (ws[:n], ws[n:]), **options)
        seen = {}
        for side, values, completion in ((keys.CHOSEN, ws[:n], chosen), (keys.REJECTED, ws[n:], rejected)):
            tokens = completion.length  # by answer, so that it does not matter which ones share a micro-batch
            on, size = ((x.sum(1) / tokens).mean() for x in (values > 0, values.abs()))
            seen |= {keys.tokens_on(side): on, keys.significance(side): size}
        return found, seen
