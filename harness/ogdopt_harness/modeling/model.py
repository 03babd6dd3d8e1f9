"""The model and its tokenizer: load or build them, score completions, export a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import utils as transformers_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ogdopt.losses import Completion
from ogdopt_harness.common.files import replaced
from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.config.schema import ModelConfig
from ogdopt_harness.modeling.adapters import bare, save, trained_parts
from ogdopt_harness.modeling.broadcast import emptied, filled

SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TURNS = ["[INST]", "[/INST]"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
HEAD_CHUNK = 1024  # scored tokens
PLAIN_ATTENTION = ("sdpa", "eager", "flex_attention")  # which need nothing but torch
# Architectures that change the logits behind the head are scored through their own forward pass.
LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def train_tokenizer(texts: Iterable[str], config: ModelConfig, folder: Path) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `config.tokenizer_type` on `texts` and save it, with its chat template, as `folder`.

    "word": one token for each word between spaces; "bpe": byte-level pairs, which can write any text.
    """
    special = [*SPECIALS.values(), *TURNS]
    size: dict[str, Any] = dict(vocab_size=config.vocab_size, special_tokens=special, show_progress=False)
    if config.tokenizer_type == "word":
        raw = Tokenizer(models.WordLevel(unk_token=SPECIALS["unk_token"]))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        trainer: Any = trainers.WordLevelTrainer(**size)
    else:
        raw = Tokenizer(models.BPE(byte_fallback=False))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(**size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        additional_special_tokens=TURNS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **SPECIALS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    with replaced(folder) as temporary:
        tokenizer.save_pretrained(temporary)
    return tokenizer


def load_tokenizer(name_or_path: str | Path, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or the hub, with `chat_template` instead of its own if there is one.

    Raises ValueError if it cannot be had or lacks an end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), mistral_format=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.tokenizer_name_or_path: no tokenizer at {str(name_or_path)!r} ({_first_line(error)}); expected "
            "a Hugging Face folder or a hub id (offline only ids in the local cache can be had)"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {str(name_or_path)!r} has no eos_token; expected one, since answers must be able to end"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token serves
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


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


def load_model(config: ModelConfig, name_or_path: str | Path) -> PreTrainedModel:
    """Load a causal language model from a folder or the hub, its weights as `config.dtype`.

    Raises ValueError if there is none, or if it is not what `config.architecture` says.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(name_or_path), dtype=getattr(torch, config.dtype), **attention_of(config)
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.model_name_or_path: no causal language model at {str(name_or_path)!r} ({_first_line(error)}); "
            "expected a Hugging Face folder or a hub id (offline only ids in the local cache can be had)"
        ) from error
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


def prepare(
    model: PreTrainedModel, config: ModelConfig, device: torch.device, seed: int = 0, ranks: Ranks = ALONE
) -> PreTrainedModel:
    """Put the model on the device in training mode, without dropout, which would make two passes of one text differ.

    With `config.lora` it gets fresh adapters, drawn from `seed`, which are all that is trained, and with `config.train_only`
    all other parameters are frozen. Several processes share it, and so does a GPU with itself where it computes in bfloat16 on
    float32 weights: `shard`. Raises ValueError where no parameter has a name of `train_only`.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it, and 6 drops the old name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable()
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            model.enable_input_require_grads()  # else the segments behind frozen embeddings see nothing to be recomputed for
    trained: Any = trained_parts(model, config, seed)
    bf16 = config.bf16 and device.type != "cpu"
    if ranks.size > 1 or (bf16 and device.type == "cuda"):
        shard(trained, device, ranks, bf16)
    return trained.to(device).train()


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
    plain.scored_logps = MethodType(_scored_logps, plain)  # type: ignore[assignment]
    register_fsdp_forward_method(plain, "scored_logps")  # gathers what lies outside of the layers, as forward() would


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
    score: Any = plain.scored_logps if isinstance(plain, FSDPModule) else partial(_scored_logps, plain)
    values = score(input_ids, attention_mask, places, states)
    logps = torch.zeros(scored.numel(), dtype=values.dtype, device=values.device).index_copy(0, places, values)
    return Completion(logps.view(scored.shape), scored.to(input_ids.device, non_blocking=True))


def _scored_logps(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, places: Tensor, states: list[Tensor] | None
) -> Tensor:
    """`completion_logps` at the places, (N,), of a flattened (B, T - 1); (N,)."""
    targets = input_ids[:, 1:].flatten()[places]
    head = model.get_output_embeddings()
    if head is None or any(getattr(model.config, name, None) not in (None, 1, 1.0) for name in LOGIT_SCALES):
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


def _token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities, (N,) in float32, of targets, (N,), under logits, (N, V)."""
    return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str, ranks: Ranks = ALONE) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer with chat template, model card), whole or not at all.

    Adapters are merged into its weights, and stand by themselves in `adapter/`. Of a sharded model each tensor is gathered in
    turn, and the first process alone keeps them, in the host's memory.
    """
    weights: Any = None
    if isinstance(bare(model), FSDPModule):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)
        twice = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
        weights = {name: value for name, value in weights.items() if name not in twice}  # tied ones are saved once

    def write() -> None:
        with replaced(folder) as temporary:
            save(model, temporary, weights)
            tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")

    ranks.tell(write)


def model_card(title: str, base: str, recipe: dict[str, Any], figures: dict[str, float]) -> str:
    """A model card in markdown: what this model is, how it was trained, and what was measured on the way."""
    rows = "\n".join(f"| {k} | {v:.5g} |" for k, v in figures.items())
    return f"""---
library_name: transformers
tags: [ogdopt, preference-tuning]
---
# {title}

Trained from `{base}` with ogdopt. Recipe:

```json
{json.dumps(recipe, indent=2, sort_keys=True, default=str)}
```

| measured | value |
|---|---|
{rows}
"""


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
