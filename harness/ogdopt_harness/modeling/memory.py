"""What a training process holds on its device, part by part, before any weight is loaded.

With P parameters in w bytes each (4 in float32, 2 in bfloat16), computed on in c bytes, N processes that share them
(`fully_shard`), and a micro-batch of S tokens in all, padding included:

    weights                    P w / N
    gradient                   trained parameters w / N; once more where the first side's gradient waits for the second's (in 2
                               bytes a number with `set_aside: bfloat16`, in 1 and 1/64 with int8, in none with cpu)
    optimizer state            copies of a parameter that the optimizer keeps, times trained parameters w / N
    gathered layers            two layers and what lies outside of them in c bytes, the larger one's gradient in 4
    activations                c S h L + one live layer with checkpointing, L live layers without;
                               a live layer: c S (outputs of its linear maps + 3 h + the MLP's inner widths once more)
    logits                     scored tokens, a chunk of them at most, x vocabulary x (c + 12): as computed, in float32,
                               log-softmax, gradient
    optimizer's temporary      of the largest parameter, with `foreach` of every parameter: two (RMSprop) or three (Adam); and
                               where `ogd/update_cosine_*` is measured, a copy of the trained parameters

for hidden size h and L layers; of a Mistral layer that is c S (6 h + 2 kv + 4 ff). The accounting of states is that of ZeRO
(arXiv:1910.02054), that of activations Korthikanti et al.'s (arXiv:2205.05198) with attention that keeps no score matrix (sdpa,
flash). Not counted: the allocator's fragments, the CUDA context, communication buffers; a gigabyte or two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from ogdopt_harness.config.schema import ModelConfig, StageConfig
from ogdopt_harness.modeling.adapters import trained_parts
from ogdopt_harness.modeling.build import blocks, meta_model
from ogdopt_harness.modeling.score import HEAD_CHUNK

SIZES = {"float32": 4, "bfloat16": 2}
WAITING = {"bfloat16": 2.0, "int8": 1 + 4 / 256, "cpu": 0.0}
"""Bytes of a number in a gradient that is set aside."""
STATES = {"RMSprop": 1, "Adam": 2, "AdamW": 2, "SGD": 0}
"""Copies of every trained parameter that an optimizer of torch keeps, in the parameter's own type."""
TEMPORARIES = {"RMSprop": 2, "Adam": 3, "AdamW": 3, "SGD": 0}
"""Tensors of a parameter's size that are alive together in the optimizer's step (tests/test_step_memory.py)."""


PARTS = (
    "weights",
    "gradient",
    "gradient that waits",
    "optimizer state",
    "gathered layers",
    "activations",
    "logits",
    "optimizer's temporary",
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory depends on; counts of numbers, not bytes."""

    parameters: int
    largest: int
    """Numbers in the largest parameter."""
    layer: int
    """Parameters of a layer."""
    layers: int
    hidden: int
    vocabulary: int
    live: int
    """Activations of a layer that wait for its backward pass, a token."""

    @property
    def root(self) -> int:
        """Parameters outside of the layers: embeddings, head, last norm."""
        return self.parameters - self.layers * self.layer


def shape_of(architecture: PreTrainedConfig) -> Shape:
    """The sizes of an architecture, from a model whose tensors have no storage."""
    model = meta_model(architecture)
    layers = blocks(model)
    hidden = int(model.config.hidden_size)
    # GPT-2 writes its linear maps as transformers' Conv1D, whose output width is called nf.
    widths = {
        name: int(getattr(module, "out_features", getattr(module, "nf", 0)))
        for name, module in layers[0].named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    inner = sum(width for name, width in widths.items() if "att" not in name and width != hidden)
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        largest=max(p.numel() for p in model.parameters()),
        layer=sum(p.numel() for p in layers[0].parameters()),
        layers=len(layers),
        hidden=hidden,
        vocabulary=model.get_input_embeddings().weight.shape[0],  # type: ignore[union-attr]
        live=sum(widths.values()) + 3 * hidden + inner,
    )


def trained_parameters(architecture: PreTrainedConfig, settings: ModelConfig) -> int:
    """How many parameters get gradients and optimizer state: all, or those that `lora` or `train_only` leave."""
    model = meta_model(architecture)
    with torch.device("meta"):
        model = trained_parts(model, settings, 0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Load:
    """What one pass puts on a process."""

    two_gradients: bool
    """Whether a first gradient waits while a second is computed."""
    sequences: int
    """In a micro-batch; a pair scored together counts two."""
    tokens: int
    """Of a sequence, padding included."""
    scored: int
    """Tokens of the micro-batch that the head is run at."""
    world_size: int


def parts(
    shape: Shape, trainable: int, model: ModelConfig, stage: StageConfig, load: Load, accelerator: bool
) -> dict[str, int]:
    """Bytes of each part on one process, largest moment of a step. `trainable` parameters get gradients and optimizer state."""
    w = SIZES[model.dtype]
    c = 2 if model.dtype == "bfloat16" or (model.bf16 and accelerator) else 4
    sharded = load.world_size > 1 or c < w
    share = math.ceil(trainable / load.world_size)
    found = {"weights": w * math.ceil(shape.parameters / load.world_size), "gradient": w * share}
    if load.two_gradients:
        found["gradient that waits"] = math.ceil(share * (w if stage.set_aside is None else WAITING[stage.set_aside]))
    found["optimizer state"] = w * share * copies(stage)
    if sharded:
        found["gathered layers"] = c * (2 * shape.layer + shape.root) + 4 * max(shape.layer, shape.root)
    slots = load.sequences * load.tokens
    live = c * slots * shape.live
    checkpointed = model.gradient_checkpointing
    found["activations"] = c * slots * shape.hidden * shape.layers + live if checkpointed else live * shape.layers
    found["logits"] = min(load.scored, HEAD_CHUNK) * shape.vocabulary * (c + 12)
    largest = share if stage.optimizer_args.get("foreach") else math.ceil(shape.largest / load.world_size)
    found["optimizer's temporary"] = TEMPORARIES[stage.optimizer] * w * min(largest, share)
    found["optimizer's temporary"] += w * share if load.two_gradients else 0
    return found


def largest_moment(found: dict[str, int]) -> int:
    """Bytes of all parts that are held at a time: the backward pass's or the optimizer's step's, whichever is more."""
    passing = sum(found.get(name, 0) for name in ("gathered layers", "activations", "logits"))
    stepping = found["optimizer's temporary"]
    return sum(found.values()) - min(passing, stepping)


def copies(stage: StageConfig) -> int:
    """Copies of a trained parameter in the optimizer's state.

    >>> copies(StageConfig(optimizer="RMSprop", optimizer_args={"momentum": 0.9}))
    2
    """
    extra = (
        ("momentum", "centered")
        if stage.optimizer == "RMSprop"
        else ("momentum",)
        if stage.optimizer == "SGD"
        else ("amsgrad",)
    )
    return STATES[stage.optimizer] + sum(bool(stage.optimizer_args.get(name)) for name in extra)


def unmoved(learning_rate: float) -> float:
    """bfloat16 weights larger than this stay where they are: half of the distance to their neighbours is more than the step.

    A bfloat16 number has 8 significant bits, so that the neighbours of x are at least 2^-8 |x| away.

    >>> f"{unmoved(1e-6):.1e}"
    '5.1e-04'
    """
    return learning_rate * 2.0**9


def precision_warning(model: ModelConfig, stage: StageConfig) -> str | None:
    """What pure bfloat16 weights do to small steps, in numbers; None where steps are not small or weights not bfloat16."""
    lr = stage.learning_rate
    if model.dtype != "bfloat16" or lr >= 1e-5:
        return None
    # RMSprop and Adam move a weight by about the learning rate; fresh transformers draw weights with this deviation.
    moved = torch.erf(torch.tensor(unmoved(lr) / 0.02 / math.sqrt(2))).item()
    return (
        f"model.dtype is bfloat16 and the learning rate {lr:g}: a step of that size is rounded away in every weight over "
        f"{unmoved(lr):.1e}, which is {1 - moved:.0%} of weights drawn with deviation 0.02; keep float32 weights (model.dtype: "
        "float32), which are computed on in bfloat16 all the same"
    )
