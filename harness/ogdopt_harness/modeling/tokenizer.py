"""Tokenizers: load one from a folder or the hub, or train one on a study's own text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ogdopt_harness.common.files import replaced
from ogdopt_harness.config.schema import ModelConfig

SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TURNS = ["[INST]", "[/INST]"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)


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
            f"model.tokenizer_name_or_path: no tokenizer at {str(name_or_path)!r} ({first_line(error)}); expected "
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
