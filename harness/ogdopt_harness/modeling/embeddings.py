"""Where a model puts prompts: last hidden states, how far apart two classes of them lie, and a picture of both."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ogdopt_harness.modeling.adapters import bare


def embed(model: PreTrainedModel, prompts: Sequence[Tensor | Sequence[int]], batch_size: int = 64) -> Tensor:
    """The last hidden state at the last token of each prompt (token ids), (n, d), float32, on the CPU, without gradients.

    It is what the unembedding reads: after the final norm, which is not applied again.
    """
    with torch.no_grad():
        found = [last_hidden(model, prompts[i : i + batch_size]).float().cpu() for i in range(0, len(prompts), batch_size)]
    return torch.cat(found)


def last_hidden(model: PreTrainedModel, prompts: Sequence[Tensor | Sequence[int]]) -> Tensor:
    """The same of one batch, (B, d), on the model's device, with gradients."""
    device = next(model.parameters()).device
    ends = torch.tensor([len(ids) - 1 for ids in prompts], device=device)
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(ids) for ids in prompts], batch_first=True).to(device)
    mask = torch.arange(input_ids.shape[1], device=device) <= ends[:, None]
    body = bare(model).base_model
    hidden = body(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return hidden[torch.arange(len(ends), device=device), ends]


def flat(points: Tensor, seed: int = 1234) -> tuple[np.ndarray, str]:
    """Points (n, d) in two dimensions, (n, 2), and the method: UMAP where umap-learn is installed, else their two main axes.

    The seed of UMAP is the one of "learning dynamics of alignment".
    """
    if importlib.util.find_spec("umap") is not None:
        umap: Any = importlib.import_module("umap")
        return np.asarray(umap.UMAP(random_state=seed).fit_transform(points.numpy())), "UMAP"
    centred = points.double() - points.double().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()  # the signs of an SVD are arbitrary
    return (centred @ axes.T).numpy(), "PCA"
