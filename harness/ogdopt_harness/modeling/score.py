"""Log-probabilities of completions: the head runs at the scored positions alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ogdopt.losses import Completion
from ogdopt_harness.modeling.adapters import bare
from ogdopt_harness.modeling.passes import head_alone

HEAD_CHUNK = 1024  # scored tokens


def completion_logps(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    states: list[Tensor] | None = None,
) -> Completion:
    """Log-probabilities of the scored tokens, (B, T - 1), nats in float32; column t belongs to token t + 1.

    The arguments are a batch's, each (B, T); a `loss_mask` in the host's memory spares a question to the device. The head runs
    at the scored positions alone, `HEAD_CHUNK` of them at a time, so the logits are (HEAD_CHUNK, V) and never (B, T, V). The
    hidden states there, (scored tokens, d), are added to `states`, without their graph.
    """
    plain = bare(model)
    scored = loss_mask[:, 1:]
    places = scored.flatten().nonzero().squeeze(1).to(input_ids.device, non_blocking=True)
    score: Any = plain.scored_logps if isinstance(plain, FSDPModule) else partial(scored_logps, plain)
    values = score(input_ids, attention_mask, places, states)
    logps = torch.zeros(scored.numel(), dtype=values.dtype, device=values.device).index_copy(0, places, values)
    return Completion(logps.view(scored.shape), scored.to(input_ids.device, non_blocking=True))


def scored_logps(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, places: Tensor, states: list[Tensor] | None
) -> Tensor:
    """`completion_logps` at the places, (N,), of a flattened (B, T - 1); (N,)."""
    targets = input_ids[:, 1:].flatten()[places]
    head: Any = model.get_output_embeddings()
    if not by_head(model):
        wanted = {"output_hidden_states": True} if states is not None else {}
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **wanted)
        if states is not None:
            states.append(output.hidden_states[-1][:, :-1].flatten(0, 1)[places].detach())
        return _token_logps(output.logits[:, :-1].flatten(0, 1)[places], targets)
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    hidden = hidden[:, :-1].flatten(0, 1)[places]
    if states is not None:
        states.append(hidden.detach())
    if len(targets) <= HEAD_CHUNK:
        return _token_logps(head(hidden), targets)
    # A chunk's logits are made again in its backward pass, so that one chunk's are alive at a time.
    run = partial(checkpoint, lambda h, t: _token_logps(head(h), t), use_reentrant=False)
    pairs = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    return torch.cat([run(h, t) for h, t in pairs])  # type: ignore[list-item]


def by_head(model: PreTrainedModel) -> bool:
    """Whether the head at the scored positions gives the model's log-probabilities. Looked at once, and kept with the model.

    Otherwise it is scored through its own forward pass, whose logits are (B, T, V).
    """
    kept = model.__dict__.get("_scored_by_head")
    if kept is None:
        kept = model.__dict__["_scored_by_head"] = head_alone(model)
    return kept


def _token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities, (N,) in float32, of targets, (N,), under logits, (N, V)."""
    return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")
