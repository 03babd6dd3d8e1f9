"""Which parameters train: low-rank adapters (`model.lora`, through peft), or those that `model.train_only` names, or all.

The model that a stage starts from is the adapted one with its adapters off, bit for bit. A fresh adapter adds exactly zero. So
log-probabilities before the first step are those of the reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ogdopt_harness.config.schema import LoraConfig, ModelConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def trained_parts(model: PreTrainedModel, settings: ModelConfig, seed: int) -> Any:
    """The model with what `settings` says is trained; adapters are drawn from `seed`. Raises ValueError for unknown names."""
    if settings.lora is not None:
        return adapted(model, settings.lora, seed)
    if settings.train_only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(f".{part}." in f".{name}." for part in settings.train_only))
        for part in settings.train_only:
            if not any(f".{part}." in f".{name}." for name, _ in model.named_parameters()):
                names = ", ".join(sorted({name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()}))
                raise ValueError(
                    f"model.train_only: no parameter has {part!r} in its name; expected one or more of {names} (an unembedding "
                    "that is tied to the embedding has the embedding's name)"
                )
    return model


def adapted(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """The model under fresh adapters, drawn from `seed`, everything else frozen.

    Raises ValueError where peft is missing, where no module has a target's name, and for embeddings that are tied.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "model.lora needs the package peft, which is not installed; install it (pip install peft) or set model.lora to null"
        ) from error
    names = config.target_modules
    ends = [names] if isinstance(names, str) else names
    tied = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    if model.config.tie_word_embeddings and any(
        name.endswith(end) for name, module in model.named_modules() if module in tied for end in ends
    ):
        raise ValueError(
            f"model.lora.target_modules is {names}, and this model ties its input and output embeddings; an adapter on one of "
            "them would not be in the exported weights of the other. Leave embeddings out"
        )
    options: Any = dict(r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=names)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # of GPT-2, whose layers peft recognizes itself
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft asks by the old name
            return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))  # type: ignore[return-value]
    except ValueError as error:
        found = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"model.lora.target_modules is {names}: {error}; expected 'all-linear' or names of modules, such as "
            f"{', '.join(found) or 'c_attn'}"
        ) from error


def bare(model: Any) -> PreTrainedModel:
    """The Hugging Face model itself. An adapted one stays so: its layers hold the adapters.

    To `PeftModel`, `base_model` is something else than to a `PreTrainedModel`, so ask this one.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged(model: PeftModel, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights of the adapted model as a plain one has them, under its names; `weights` are its own, whole, if it is sharded.

    peft's own merging writes into the frozen weights, and taking it back leaves its rounding there.
    """
    layers: dict[str, Any] = {name: m for name, m in bare(model).named_modules() if hasattr(m, "get_delta_weight")}
    changes: dict[str, list[str]] = {}
    for name, layer in layers.items():  # a weight, or a parameter such as the experts' own: several wrap one module
        changes.setdefault(f"{_plain(name)}.{getattr(layer, 'parameter_name', 'weight')}", []).append(name)
    weights = model.state_dict() if weights is None else weights
    found: dict[str, Tensor] = {}
    for full_name, value in weights.items():
        name = full_name.removeprefix("base_model.model.")
        if any(name.startswith(f"{layer}.") and not name.startswith(f"{layer}.base_layer.") for layer in layers):
            continue  # an adapter's own
        for layer in changes.get(_plain(name), ()):
            value = (value.float() + _change(layers[layer], f"base_model.model.{layer}", weights)).to(value.dtype)
        found[_plain(name)] = value
    return found


def _plain(name: str) -> str:
    """The name of a weight or module in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _change(layer: Any, name: str, weights: Mapping[str, Tensor]) -> Tensor:
    """What a layer's adapter adds to its weight, in float32: scaling B A, turned round where the layer keeps it so."""
    embeds = f"{name}.lora_embedding_A.default" in weights
    names = [f"{name}.lora_{'embedding_' * embeds}{part}.default{'' if embeds else '.weight'}" for part in "BA"]
    B, A = (weights[n].detach().float() for n in names)
    experts = getattr(layer, "num_experts", 1)
    if experts > 1:  # A is (experts r, in) and B (out, r experts); the parameter has a matrix an expert
        A, B = A.reshape(experts, -1, A.shape[-1]), B.reshape(B.shape[0], -1, experts)
        order = "eoi" if layer._did_swap_in_out_features else "eio"
        return torch.einsum(f"ore,eri->{order}", B, A) * layer.scaling["default"]
    change = (B @ A) * layer.scaling["default"]
    return change.T if embeds or getattr(layer, "fan_in_fan_out", False) else change


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Passes that can be compared, in training mode, which activation checkpointing needs."""
    rates = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    try:
        for module in rates:
            module.p = 0.0
        yield
    finally:
        for module, rate in rates.items():
            module.p = rate


def save(model: Any, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Weights and configuration as a Hugging Face folder; of an adapted model merged, with the adapter in `adapter/`.

    `weights` are the model's own, whole, where it holds only shards of them.
    """
    if bare(model) is model:
        model.save_pretrained(folder, state_dict=weights)
        return
    bare(model).save_pretrained(folder, state_dict=merged(model, weights))
    # True would ask the hub about the vocabulary.
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False, state_dict=weights)
