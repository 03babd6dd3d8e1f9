"""A model made ready to be trained: on its device, adapted, and shared among processes (FSDP2)."""

from __future__ import annotations

import warnings
from types import MethodType
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.config.schema import ModelConfig
from ogdopt_harness.modeling.adapters import bare, trained_parts
from ogdopt_harness.modeling.broadcast import emptied, filled
from ogdopt_harness.modeling.build import blocks
from ogdopt_harness.modeling.passes import check_passes, head_alone, quiet
from ogdopt_harness.modeling.pretrained import first_line
from ogdopt_harness.modeling.score import scored_logps


def prepare(
    model: PreTrainedModel, config: ModelConfig, device: torch.device, seed: int = 0, ranks: Ranks = ALONE
) -> PreTrainedModel:
    """Put the model on the device in the mode that it is trained in, in which two passes of one text are equal (`passes`).

    With `config.lora` it gets fresh adapters, drawn from `seed`, which are all that is trained, and with `config.train_only`
    all other parameters are frozen. Several processes share it, and so does a GPU with itself where it computes in bfloat16 on
    float32 weights: `shard`. Raises ValueError where no parameter has a name of `train_only`, and for passes that differ.
    """
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it, and 6 drops the old name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable()
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            model.enable_input_require_grads()  # else the segments after frozen embeddings see nothing to be recomputed for
    trained: Any = trained_parts(model, config, seed)
    bf16 = config.bf16 and device.type != "cpu"
    shared = ranks.size > 1 or (bf16 and device.type == "cuda")
    if not shared:
        trained = trained.to(device)
    bare(trained).__dict__["_scored_by_head"] = ranks.on_first(lambda: _looked_at(trained))  # the others have outlines alone
    if shared:
        shard(trained, device, ranks, bf16)
    trained = trained.to(device)
    quiet(trained)
    return trained


def _looked_at(model: Any) -> bool:
    """Whether the head alone gives the model's scores; said where not. Raises ValueError for passes that differ."""
    name = type(bare(model)).__name__
    try:
        check_passes(model)
        alone = head_alone(bare(model))
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} cannot be run on a short text as it is set up here ({type(error).__name__}: {first_line(error)}); correct "
            "its config.json or model.lora, or give another model"
        ) from error
    if alone:
        return True
    if bare(model).get_output_embeddings() is not None:
        warnings.warn(
            f"{name} changes what its head says (a cap, a scale or the like), so it is scored through its whole forward pass, "
            "with logits of all positions in memory",
            stacklevel=2,
        )
    return False


def shard(model: PreTrainedModel, device: torch.device, ranks: Ranks, bf16: bool) -> None:
    """Share the parameters, their gradients and with them the optimizer's state out among all processes (FSDP2).

    A layer at a time is gathered to compute with; in bfloat16 with `bf16`, while weights and the sums of gradients stay as
    they are. Gradients are the mean of the processes' own. All values are the first process's: it sends them tensor by tensor,
    and no other ever holds the whole model.
    """
    plain = bare(model)
    mesh = init_device_mesh(device.type, (ranks.size,))
    values = emptied(model) if ranks.size > 1 else None
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in blocks(plain):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(plain, mesh=mesh, mp_policy=policy)
    if values is not None:
        filled(model, values if ranks.first else ({}, {}), device)
    plain.scored_logps = MethodType(scored_logps, plain)  # type: ignore[assignment]
    register_fsdp_forward_method(plain, "scored_logps")  # gathers what lies outside of the layers, as forward() would
