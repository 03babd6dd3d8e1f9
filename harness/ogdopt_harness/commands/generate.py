"""Greedy answers of a model to a benchmark's prompts: `ogdopt generate MODEL PROMPTS --format FORMAT --output_dir DIR`.

Answers are kept in `DIR/answers.jsonl` as they come, longest prompts first; the same command goes on from there, and at the end
writes the file that the benchmark's own judge reads (`evaluation/answer_files.py`). vLLM is used where it is installed and
there is a GPU, otherwise transformers; under torchrun each process then answers a share of the batches.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ogdopt_harness.common.device import device_name
from ogdopt_harness.common.files import digest, write_text
from ogdopt_harness.common.journal import Journal
from ogdopt_harness.common.ranks import ALONE, Ranks, sharing
from ogdopt_harness.common.run_folder import AnswersFolder, short_name
from ogdopt_harness.config.commands import GenerateConfig
from ogdopt_harness.evaluation.answer_files import FORMATS, Prompt, read_prompts, token_counter
from ogdopt_harness.evaluation.lm import decoded, ends_of, greedy, load, load_words
from ogdopt_harness.modeling.fingerprint import fingerprint
from ogdopt_harness.modeling.pretrained import read_config
from ogdopt_harness.pipeline.manifest import record

TOO_LONG = 0.05  # share of answers that were cut off, above which a warning is due
BLOCK = 256  # prompts that vLLM is given at once


@dataclass(frozen=True)
class Asked:
    """A prompt as the model sees it: its token ids, and how many tokens its answer may have."""

    prompt: Prompt
    text: str
    ids: list[int]
    new_tokens: int


NOT_ANSWERS = ("output_dir", "limit", "batch_size", "token_counter", "name")
"""Options that answers do not depend on."""


def main(config: GenerateConfig, model: str, prompts: str) -> None:
    """Answer all prompts and write the benchmark's file."""
    with sharing() as ranks:
        generate(model, prompts, config, ranks)


def generate(model: str, prompts: str, config: GenerateConfig, ranks: Ranks = ALONE) -> Path:
    """Answer all prompts; the path of the benchmark's file, or of answers.jsonl.

    Raises ValueError for prompts, models and options that cannot be used, for a prompt longer than the model reads, and for a
    folder whose answers were made otherwise.
    """
    asked = read_prompts(prompts, config.format, config.split)[: config.limit]
    home, name = AnswersFolder(Path(config.output_dir)), config.name or short_name(Path(model)).replace("/", "-")
    backend = _backend(config, ranks)
    words = load_words(model, config.tokenizer, apply_chat_template=True)
    about = read_config(model, "model")
    count = token_counter(config.format, config.token_counter, words)

    def note() -> None:
        kept = {k: v for k, v in asdict(config).items() if k not in NOT_ANSWERS}
        sources = {"prompts": prompts, "prompts_sha256": digest(Path(prompts)) if Path(prompts).is_file() else None}
        settings = {"model": model, "weights": fingerprint(model, config=about), **sources, **kept, "backend": backend}
        record(home.path, settings, {"name": name, "kind": "answers", "method": "greedy"})

    ranks.on_first(note)
    longest = int(getattr(about.get_text_config(), "max_position_embeddings", 0) or sys.maxsize)
    work = [_templated(prompt, words, longest, config.max_new_tokens) for prompt in asked]
    journal = Journal(home.answers, rank=ranks.rank)
    for prompt in asked:
        if prompt.id in journal and journal[prompt.id]["messages"] != prompt.messages:
            raise ValueError(
                f"{home.answers} answers another prompt of the id {prompt.id!r} than {prompts} has now; choose "
                "another --output_dir, or take that line out"
            )
    if backend == "vllm":
        _answer(work, journal, BLOCK, _vllm(model, config), words, ranks)
    else:
        loaded, _ = load(model, device_name(config.device), tokenizer=config.tokenizer, apply_chat_template=True)
        _answer(work, journal, config.batch_size, _transformers(loaded, words), words, ranks)
    answers = ranks.merge(journal)

    def write() -> Path:
        file = _write(home.path, name, asked, answers, config, count) or home.answers
        _say(asked, answers, file, config)
        return file

    return ranks.on_first(write)


def _backend(config: GenerateConfig, ranks: Ranks) -> str:
    if config.backend != "auto":
        if config.backend == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ValueError("backend is 'vllm', which is not installed; pip install vllm, or take transformers")
        if config.backend == "vllm" and ranks.size > 1:
            raise ValueError("vLLM spreads its work over GPUs itself; start it with python instead of torchrun")
        return config.backend
    usable = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available() and ranks.size == 1
    return "vllm" if usable else "transformers"


def _templated(prompt: Prompt, tokenizer: Any, longest: int, most: int) -> Asked:
    text = tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has written them
    if len(ids) >= longest:
        raise ValueError(
            f"the prompt {prompt.id!r} has {len(ids)} tokens, but the model reads {longest}; take it out of the prompts, or "
            "another model"
        )
    return Asked(prompt, text, ids, min(most, longest - len(ids)))


def _answer(
    work: Sequence[Asked],
    journal: Journal,
    size: int,
    backend: Callable[[Sequence[Asked]], list[tuple[list[int], str]]],
    tokenizer: Any,
    ranks: Ranks,
) -> None:
    """Answer what the journal lacks, longest prompts first, so that what does not fit in memory fails at once."""
    order = sorted(work, key=lambda asked: (-len(asked.ids), asked.ids))
    pieces = ranks.share([order[start : start + size] for start in range(0, len(order), size)])
    bar = tqdm(total=sum(map(len, pieces)), desc="answering", disable=not ranks.first or not sys.stderr.isatty())
    with bar:
        for piece in pieces:
            # A batch is answered whole or not at all: an answer may depend on its neighbours in the last bits.
            if not all(asked.prompt.id in journal for asked in piece):
                found = backend(piece)
                texts = decoded(tokenizer, [ids for ids, _ in found])
                journal.add(
                    {
                        "id": asked.prompt.id,
                        "messages": asked.prompt.messages,
                        "output": text.strip(),
                        "finish_reason": reason,
                        "n_tokens": len(ids),
                        "model_input": asked.text,
                    }
                    for asked, (ids, reason), text in zip(piece, found, texts, strict=True)
                )
            bar.update(len(piece))


def _transformers(model: Any, tokenizer: Any) -> Callable[[Sequence[Asked]], list[tuple[list[int], str]]]:
    def run(piece: Sequence[Asked]) -> list[tuple[list[int], str]]:
        replies = greedy(model, tokenizer, [asked.ids for asked in piece], max(asked.new_tokens for asked in piece))
        cut = [reply[: asked.new_tokens] for reply, asked in zip(replies, piece, strict=True)]
        ends = ends_of(model, tokenizer)
        return [(reply, "stop" if reply and reply[-1] in ends else "length") for reply in cut]

    return run


def _vllm(model: str, config: GenerateConfig) -> Callable[[Sequence[Asked]], list[tuple[list[int], str]]]:
    vllm: Any = importlib.import_module("vllm")  # here: it takes its time, and most machines do not have it

    engine = vllm.LLM(model=model, tokenizer=config.tokenizer or model, tensor_parallel_size=max(1, torch.cuda.device_count()))

    def run(piece: Sequence[Asked]) -> list[tuple[list[int], str]]:
        limits = [vllm.SamplingParams(temperature=0.0, max_tokens=asked.new_tokens) for asked in piece]
        found = engine.generate([{"prompt_token_ids": asked.ids} for asked in piece], limits)
        return [(list(one.outputs[0].token_ids), one.outputs[0].finish_reason) for one in found]

    return run


def _write(
    directory: Path,
    name: str,
    prompts: Sequence[Prompt],
    answers: Mapping[str, dict[str, Any]],
    config: GenerateConfig,
    count: Callable[[str], int],
) -> Path | None:
    """The benchmark's file, in the order of its prompts; None where it has none."""
    format = FORMATS[config.format]
    if format.answers is None:
        return None
    configs = {"engine": name, "repetition_penalty": 1.0, "temperature": 0.0, "top_p": 1.0, "max_tokens": config.max_new_tokens}
    tokens = [count(answers[prompt.id]["output"]) for prompt in prompts]
    rows = format.answers(prompts, answers, tokens, name, configs)
    file = directory / config.format / f"{name}{format.suffix}"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(file, "".join(lines) if format.suffix == ".jsonl" else json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
    return file


def _say(prompts: Sequence[Prompt], answers: Mapping[str, dict[str, Any]], file: Path, config: GenerateConfig) -> None:
    for line in _summary(prompts, answers, config):
        print(line)
    print(f"Written: {file}")


def _summary(prompts: Sequence[Prompt], answers: Mapping[str, dict[str, Any]], config: GenerateConfig) -> Iterator[str]:
    rows = [answers[prompt.id] for prompt in prompts]
    cut = sum(row["finish_reason"] == "length" for row in rows)
    yield f"{len(rows)} answers, {sum(row['n_tokens'] for row in rows) / len(rows):.0f} tokens on average"
    if cut > TOO_LONG * len(rows):
        yield (
            f"warning: {cut} of {len(rows)} answers did not end within {config.max_new_tokens} tokens; a model that does not "
            "stop was trained without its end-of-sequence token, or has come apart: judges see it as verbose"
        )
