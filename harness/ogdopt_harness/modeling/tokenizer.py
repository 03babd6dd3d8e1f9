"""Tokenizers: load one from a folder or the hub, or train one on a study's own text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ogdopt_harness.common.files import replaced, seal
from ogdopt_harness.config.schema import ModelConfig
from ogdopt_harness.modeling.pretrained import check_fetched, source_of, unreadable

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
    # A special token that a text writes out would count as a word too, and leave ids beyond the vocabulary.
    written = re.compile("|".join(map(re.escape, special)))
    raw.train_from_iterator((written.sub(" ", text) for text in texts), trainer)
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
        seal(temporary)
    return tokenizer


def load_tokenizer(
    name_or_path: str | Path, chat_template: str | None = None, option: str = "model.tokenizer_name_or_path"
) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder, the hub, an adapter (its own or its base's) or a GGUF file.

    `chat_template`, Jinja text or a file of it, takes the place of its own. Raises ValueError, naming `option`, if it cannot be
    had or lacks an end token.
    """
    source = source_of(name_or_path, option)
    folder = Path(source.name)
    if source.base is not None and not _files(folder):
        return load_tokenizer(source.base, chat_template, option)
    if folder.is_dir() and source.gguf is None:
        if not _files(folder):
            raise source.refused(f"no tokenizer at {source.name!r}", "name one that has it (model.tokenizer_name_or_path)")
        for file in _files(folder):
            check_fetched(source, file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, mistral_format=False, **source.options)
    except Exception as error:  # transformers, tokenizers, sentencepiece and json each raise their own kinds
        raise unreadable(source, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {source.name!r} has no eos_token; expected one, since answers must be able to end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token serves
    if chat_template is not None:
        tokenizer.chat_template = template_of(chat_template)
    return tokenizer


def template_of(text: str) -> str:
    """The Jinja text of a chat template: `text` itself, or what the file holds that it names. Raises ValueError for neither."""
    if "{{" in text or "{%" in text:
        return text
    path = Path(text).expanduser()
    if len(text) > 4096 or "\n" in text or not path.is_file():
        raise ValueError(
            f"model.chat_template is {text[:80]!r}, which holds no Jinja expression and is no file (looked in {Path.cwd()}); "
            "expected the text of a template, or the path of a file with it"
        )
    found = path.read_text(encoding="utf-8")
    if "{{" not in found and "{%" not in found:
        raise ValueError(f"model.chat_template: the file {path} holds no Jinja expression; expected the text of a template")
    return found


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int, model: str, own: Any = None) -> None:
    """Raises ValueError unless every token has one of the model's `rows` embeddings, and the one that it has in training.

    `own` is the model's own tokenizer where another one is used; its added tokens may have got other names.
    """
    known = tokenizer.get_vocab()
    largest = max(known.values(), default=-1)
    if largest >= rows:
        examples = ", ".join(repr(token) for token, i in sorted(known.items(), key=lambda x: -x[1])[:3])
        raise ValueError(
            f"model.tokenizer_name_or_path: the tokenizer {tokenizer.name_or_path!r} has {largest + 1:,} tokens, and the model "
            f"{model!r} has embeddings for {rows:,} ({examples} have none); give the model's own tokenizer, or a model whose "
            "embedding was resized for this one"
        )
    if own is None:
        return
    added = own.added_tokens_decoder
    meant = {i: token for token, i in own.get_vocab().items() if i not in added}
    found = {i: token for token, i in known.items()}
    foreign = [i for i, token in meant.items() if found.get(i) != token]
    if foreign:
        i = foreign[0]
        raise ValueError(
            f"model.tokenizer_name_or_path: {len(foreign):,} of {len(meant):,} tokens of {tokenizer.name_or_path!r} are others "
            f"than the model {model!r} was trained with (token {i} is {found.get(i)!r}, and was {meant[i]!r}); give the "
            "model's own tokenizer (null), or one of the same vocabulary"
        )


def _files(folder: Path) -> list[Path]:
    """The files of a folder that hold a tokenizer's vocabulary."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
    return [folder / name for name in names if (folder / name).is_file()]
