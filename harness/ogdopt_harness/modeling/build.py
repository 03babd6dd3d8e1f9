"""Models: build a fresh one from an architecture, or load one from a folder or the hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers import utils as transformers_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ogdopt_harness.config.schema import ModelConfig
from ogdopt_harness.modeling.pretrained import load_pretrained
from ogdopt_harness.modeling.tokenizer import check_vocabulary, load_tokenizer

PLAIN_ATTENTION = ("sdpa", "eager", "flex_attention")  # which need nothing but torch


def architecture(config: ModelConfig, vocab_size: int | None = None, **ids: Any) -> PreTrainedConfig:
    """The transformers configuration that `config.architecture` describes, with `vocab_size` where it names none.

    Raises ValueError for an unknown architecture, and for a keyword that its class refuses.
    """
    kind = str(config.architecture.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model.architecture.model_type is {kind!r}; expected an architecture of transformers such as 'mistral', "
            "'llama' or 'gpt2' (or set model.model_name_or_path)"
        )
    options = {} if vocab_size is None else {"vocab_size": vocab_size}
    options |= {k: v for k, v in config.architecture.items() if k != "model_type"}
    try:
        return AutoConfig.for_model(kind, **ids, **options)
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model.architecture: {kind} refuses it ({reason}); correct that entry") from error


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose tensors have shapes and no storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers, in order. Raises ValueError for a model that keeps none in a list."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise ValueError(f"{type(model).__name__} keeps no list of its num_hidden_layers layers; expected a transformer that does")


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A fresh model of `config.architecture`, initialized from `seed`. Raises ValueError for an unknown architecture."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    built = architecture(config, len(tokenizer), **ids)
    if built.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.architecture.vocab_size is {built.vocab_size}; expected the tokenizer's {len(tokenizer)} tokens or more"
        )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(built, **attention_of(config))
    model.generation_config.update(**ids)
    return model.to(getattr(torch, config.dtype))


def load_model(config: ModelConfig, name_or_path: str | Path, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder or the hub, its weights as `config.dtype`, every one from the checkpoint.

    With `device_map="meta"` no weight is read. Raises ValueError if it cannot be loaded whole, or if it is not what
    `config.architecture` says.
    """
    options |= {"dtype": getattr(torch, config.dtype), **attention_of(config)}
    model = load_pretrained(AutoModelForCausalLM, name_or_path, "model.model_name_or_path", **options)
    if config.architecture:
        described, unknown = architecture(config), object()
        for key in config.architecture:
            expected, found = getattr(described, key, unknown), getattr(model.config, key, unknown)
            if found != expected:
                raise ValueError(
                    f"model.architecture.{key} is {expected!r}, but the model at {str(name_or_path)!r} has "
                    f"{'no such setting' if found is unknown else repr(found)}; correct the recipe"
                )
    return model


def outline(config: ModelConfig, tokens: int | None = None) -> PreTrainedModel:
    """The model that `config` describes, whole, without storage: a checkpoint's headers are read, and no weight.

    `tokens` is the size of the vocabulary of a fresh model. Raises ValueError as loading or building it does.
    """
    if config.model_name_or_path is None:
        if not config.architecture:
            raise ValueError("model.architecture is empty and model.model_name_or_path null; give one of them")
        return meta_model(architecture(config, tokens))
    return load_model(config, config.model_name_or_path, device_map="meta")


def fitted(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The outline of the model that `config` describes, once the tokenizer is known to belong to it.

    Raises ValueError for a model that cannot be loaded whole, and for a vocabulary that is not its own.
    """
    found = outline(config, len(tokenizer))
    name = config.model_name_or_path
    if name is not None:
        own = None
        if config.tokenizer_name_or_path not in (None, name):
            try:
                own = load_tokenizer(name, option="model.model_name_or_path")
            except ValueError:  # a model without a tokenizer of its own: only the sizes can be compared
                own = None
        embedding: Any = found.get_input_embeddings()
        check_vocabulary(tokenizer, embedding.weight.shape[0], name, own)
    return found


def check_positions(model: PreTrainedModel, longest: int, option: str) -> None:
    """Raises ValueError where rows of `longest` tokens run out of the model's table of positions; warns beyond its range."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or longest <= most:
        return
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    if any(most <= table.num_embeddings <= most + 2 for table in tables):
        raise ValueError(
            f"{option}: the longest row has {longest:,} tokens, and the model has a table of {most:,} positions; set "
            f"{option.rpartition('.')[0]}.max_length to {most} or less"
        )
    warnings.warn(
        f"{option}: the longest row has {longest:,} tokens, and the model was made for {most:,} positions; what "
        "it says beyond these it was not trained to say",
        stacklevel=2,
    )


def check_attention(config: ModelConfig, device: torch.device) -> None:
    """Raises ValueError where attention cannot be computed as `config.attn_implementation` says."""
    name = config.attn_implementation
    if name is None or name in PLAIN_ATTENTION:
        return
    missing = ""
    if not name.startswith("flash_attention"):
        missing = f"there is no such attention; expected flash_attention_2 or one of {', '.join(PLAIN_ATTENTION)}"
    elif device.type != "cuda":
        missing = f"it needs a GPU, and this is {device.type}"
    elif not getattr(transformers_utils, f"is_flash_attn_{name[-1]}_available", lambda: False)():
        missing = "its package is not installed here (pip install flash-attn, for this torch and GPU)"
    elif not config.bf16 and config.dtype == "float32":
        missing = "it computes in 16 bits alone; set model.bf16 to true"
    if missing:
        raise ValueError(f"model.attn_implementation is {name!r}: {missing}. Without that option it is sdpa")


def attention_of(config: ModelConfig) -> dict[str, Any]:
    """The keyword of `from_pretrained` that chooses the attention's implementation, where one is chosen."""
    return {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
