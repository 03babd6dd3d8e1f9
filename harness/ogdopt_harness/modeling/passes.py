"""Passes that can be compared: no noise while a gradient is taken, and two checks of a model on one short batch.

Log-probabilities of a step, of its reference and of an evaluation are subtracted from each other. So a pass in training has to
give what a pass in evaluation gives. Modules therefore stay in evaluation mode while they are trained. Excepted are those that
recompute activations, which look at that flag, and dropout that was asked for (`lora_dropout`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ogdopt_harness.modeling.adapters import bare, without_dropout

NOISE = ("drop", "jitter")  # in names of rates: dropout, attn_pdrop, layerdrop, router_jitter_noise
ROUNDING = 256  # roundings of the largest number, by which two passes may differ
LOUD = 50.0  # logits of this size show a cap or a scale, whatever the weights are


def quiet(model: nn.Module) -> None:
    """Put a model in the mode that it is trained in; see the module."""
    model.eval()
    for name, module in model.named_modules():
        if ".lora_dropout." in f".{name}.":
            module.training = True
        elif getattr(module, "gradient_checkpointing", False):
            module.training = True
            for rate, value in vars(module).items():
                if isinstance(value, float) and any(word in rate for word in NOISE):
                    setattr(module, rate, 0.0)


@torch.no_grad()
def check_passes(model: Any) -> None:
    """Raises ValueError unless two passes in training are equal, and equal to one in evaluation (`lora_dropout` aside)."""
    with without_dropout(model):
        quiet(model)
        first, second = (bare(model)(**_batch(model), use_cache=False).logits for _ in range(2))
        model.eval()
        third = bare(model)(**_batch(model), use_cache=False).logits
        quiet(model)
    for other, what in ((second, "two passes in training"), (third, "a pass in training and one in evaluation")):
        if not _equal(first, other):
            raise ValueError(
                f"{type(bare(model)).__name__}: {what} differ by {(first - other).abs().max():.3g} in the logits of one text; "
                "turn its noise off in config.json, or give another model, since log-probabilities could not be compared"
            )


@torch.no_grad()
def head_alone(model: PreTrainedModel) -> bool:
    """Whether the model's logits are those of its head on its last hidden states, and nothing is done to either.

    Its forward pass is run with loud numbers in the place of the head's output: what comes out has to be these. Then caps and
    scales are seen under any name, and before training makes logits large enough to feel them.
    """
    head: Any = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    heard: list[Tensor] = []
    spoken: list[Tensor] = []

    def speak(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        heard.append(inputs[0])
        spoken.append(LOUD * noise)
        return spoken[-1]

    hook = head.register_forward_hook(speak)
    try:
        logits = model(**_batch(model), use_cache=False).logits
    finally:
        hook.remove()
    hidden = getattr(model.base_model(**_batch(model), use_cache=False), "last_hidden_state", None)
    if len(heard) != 1 or hidden is None or hidden.shape != heard[0].shape:
        return False
    return logits.shape == spoken[0].shape and _equal(logits, spoken[0]) and _equal(hidden, heard[0])


def _batch(model: Any) -> dict[str, Tensor]:
    """Two short texts of the first tokens, one of them padded."""
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    ids = torch.arange(2, 18, device=device).view(2, 8) % embedding.weight.shape[0]
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    size = max(float(a.abs().max()), float(b.abs().max()))
    return bool((a.float() - b.float()).abs().max() <= ROUNDING * torch.finfo(b.dtype).eps * size)
