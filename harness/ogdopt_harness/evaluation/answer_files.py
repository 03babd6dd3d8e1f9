"""Files of prompts and of models' answers: those that AlpacaEval, Arena-Hard and WildBench read and write.

    format            prompts                                           answers
    arena_hard        {uid, prompt}                                     <name>.jsonl, layout of 2025 (messages, metadata)
    arena_hard_2024   {question_id, turns: [{content}]}                 <name>.jsonl, layout of 2024 (choices, conv_metadata)
    wildbench         {session_id, conversation_input, primary_tag}     <name>.json, in the benchmark's order (v2)
    alpaca_eval       {instruction[, dataset]}                          <name>.json
    prompts           {prompt[, id]}, a text or messages                none: answers.jsonl holds them

Arena-Hard's style control counts the tokens and the markdown of an answer; official answers carry these counts, so ours do.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ogdopt_harness.common.sources import RowError, kind_of, read

Messages = list[dict[str, str]]
Row = dict[str, Any]
ROLES = ("system", "user", "assistant")
CODE = re.compile("```([^`]*)```")
MARKS = {
    "header_count": {f"h{level}": rf"^#{{{level}}}\s" for level in range(1, 7)},
    "list_count": {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"},
    "bold_count": {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"},
}
"""What Arena-Hard counts in an answer, outside of code blocks (its utils/add_markdown_info.py)."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: its id in the benchmark, the conversation to be continued, the row that it came from."""

    id: str
    messages: Messages
    row: Row = field(repr=False)


@dataclass(frozen=True)
class Format:
    """How a benchmark writes prompts and answers; `count_as` names the model whose tokens tiktoken counts, if any are."""

    id: str
    messages: Callable[[Row], Any]
    answers: Callable[[Sequence[Prompt], Mapping[str, Row], Sequence[int], str, Row], list[Row]] | None = None
    suffix: str = ".jsonl"
    count_as: str | None = None


def marks(answer: str, tokens: int) -> Row:
    """Token and markdown counts of an answer, the tokens first (style control goes by the order)."""
    for block in CODE.findall(answer):
        answer = answer.replace(block, "")
    counts = {kind: {k: len(re.findall(p, answer, re.M)) for k, p in found.items()} for kind, found in MARKS.items()}
    return {"token_len": tokens, **counts}


def _arena(prompts: Sequence[Prompt], answers: Mapping[str, Row], tokens: Sequence[int], name: str, configs: Row) -> list[Row]:
    rows = []
    for prompt, count in zip(prompts, tokens, strict=True):
        output = answers[prompt.id]["output"]
        said = [*prompt.messages, {"role": "assistant", "content": {"answer": output}}]
        rows.append(
            {
                "uid": prompt.id,
                "ans_id": _unique(name, prompt.id),
                "model": name,
                "messages": said,
                "tstamp": time.time(),
                "metadata": marks(output, count),
            }
        )
    return rows


def _arena_2024(
    prompts: Sequence[Prompt], answers: Mapping[str, Row], tokens: Sequence[int], name: str, configs: Row
) -> list[Row]:
    rows = []
    for prompt, count in zip(prompts, tokens, strict=True):
        output = answers[prompt.id]["output"]
        rows.append(
            {
                "question_id": prompt.id,
                "answer_id": _unique(name, prompt.id),
                "model_id": name,
                "choices": [{"index": 0, "turns": [{"content": output, "token_len": count}]}],
                "tstamp": time.time(),
                "conv_metadata": marks(output, count),
            }
        )
    return rows


def _wildbench(
    prompts: Sequence[Prompt], answers: Mapping[str, Row], tokens: Sequence[int], name: str, configs: Row
) -> list[Row]:
    return [
        {
            "session_id": prompt.id,
            "chat_history": [turn["content"] for turn in prompt.messages],
            "model_input": answers[prompt.id]["model_input"],
            "output": [answers[prompt.id]["output"]],
            "generator": name,
            "configs": configs,
            "dataset": "wild_bench",
            "primary_tag": prompt.row.get("primary_tag"),
        }
        for prompt in prompts
    ]


def _alpaca_eval(
    prompts: Sequence[Prompt], answers: Mapping[str, Row], tokens: Sequence[int], name: str, configs: Row
) -> list[Row]:
    return [
        {
            "instruction": prompt.row["instruction"],
            "output": answers[prompt.id]["output"],
            "generator": name,
            **({"dataset": prompt.row["dataset"]} if "dataset" in prompt.row else {}),
        }
        for prompt in prompts
    ]


FORMATS = {
    "arena_hard": Format("uid", lambda row: row["prompt"], _arena, count_as="gpt-4o"),
    "arena_hard_2024": Format("question_id", lambda row: row["turns"][0]["content"], _arena_2024, count_as="gpt-3.5-turbo"),
    "wildbench": Format("session_id", lambda row: row["conversation_input"], _wildbench, ".json"),
    "alpaca_eval": Format("", lambda row: row["instruction"], _alpaca_eval, ".json"),
    "prompts": Format("id", lambda row: row["prompt"]),
}


def read_prompts(source: str, format: str, split: str = "test") -> list[Prompt]:
    """The prompts of a file, a folder or a hub data set, in order.

    Raises ValueError with file:line for the first row that is no prompt, and for an id that appears twice.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    prompts: dict[str, Prompt] = {}
    for where, row in read(source, split, "prompts"):
        if isinstance(row, RowError):
            raise ValueError(f"prompts: {row.at(where)}")
        prompt = _prompt(row, where, format)
        if prompt.id in prompts:
            raise ValueError(f"{where}: the id {prompt.id!r} appears a second time; expected one row a prompt: remove one")
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"prompts: {source} holds no rows; expected at least one")
    return list(prompts.values())


def _prompt(row: Any, where: str, format: str) -> Prompt:
    chosen = FORMATS[format]
    try:
        found = chosen.messages(row)
    except (KeyError, IndexError, TypeError) as error:
        shown = f"columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else kind_of(row)
        raise ValueError(f"{where}: found {shown}; expected a prompt of format {format!r} ({error!r} is missing)") from error
    turns = [{"role": "user", "content": found}] if isinstance(found, str) else found
    if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns) or turns[-1]["role"] != "user":
        raise ValueError(f"{where}: the prompt is {kind_of(found)}; expected a text, or messages of which the user's is last")
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    given = row.get(chosen.id, row.get("id") if chosen.id == "uid" else None) if chosen.id else None
    if given is None and chosen.id not in ("", "id"):
        raise ValueError(f"{where}: no {chosen.id!r}, by which format {format!r} knows its prompts; add it")
    return Prompt(str(given) if given is not None else key_of(messages), messages, dict(row))


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, Mapping)
        and turn.get("role") in ROLES
        and isinstance(turn.get("content"), str)
        and bool(turn["content"].strip())
    )


def key_of(messages: Messages) -> str:
    """What two models' answers to one prompt have in common, whatever ids their files give it."""
    said = [[turn["role"], turn["content"].strip()] for turn in messages]
    return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:22]


def _unique(name: str, prompt: str) -> str:
    return hashlib.sha256(f"{name} {prompt}".encode()).hexdigest()[:22]


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt; `finish_reason` is "length" where it was cut off, "" where that is not known."""

    messages: Messages
    output: str
    finish_reason: str = ""


def read_answers(path: Path) -> dict[str, Answer]:
    """A model's answers by `key_of` their prompts: answers.jsonl, or a file of AlpacaEval, WildBench or Arena-Hard of 2025.

    Raises ValueError with the place of the first row that is none of these, and for a prompt that is answered twice.
    """
    if not path.is_file():
        raise ValueError(f"answers: no file {path} (looked in {Path.cwd()}); correct the path")
    found: dict[str, Answer] = {}
    for where, row in _rows(path):
        answer = _answer(row, where)
        key = key_of(answer.messages)
        if key in found:
            raise ValueError(f"{where}: the same prompt is answered a second time; expected one answer a prompt: remove one")
        found[key] = answer
    if not found:
        raise ValueError(f"answers: {path} holds no rows; expected at least one")
    return found


def _rows(path: Path) -> Iterable[tuple[str, Any]]:
    if path.suffix == ".json":  # one array; the columns of its rows may differ
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; expected a JSON array of answers") from error
        return ((f"{path}[{i}]", row) for i, row in enumerate(rows if isinstance(rows, list) else [rows]))
    return read(str(path), "train", "answers")


def _answer(row: Any, where: str) -> Answer:
    if isinstance(row, RowError):
        raise ValueError(f"answers: {row.at(where)}")
    try:
        if "instruction" in row:
            return Answer([{"role": "user", "content": row["instruction"]}], row["output"])
        if "chat_history" in row:
            roles = ("user", "assistant") * len(row["chat_history"])
            return Answer([{"role": r, "content": text} for r, text in zip(roles, row["chat_history"])], row["output"][0])
        if isinstance(row["messages"][-1]["content"], Mapping):  # of Arena-Hard; official ones may lack the metadata
            *asked, said = row["messages"]
            return Answer(asked, said["content"]["answer"])
        return Answer(row["messages"], row["output"], row.get("finish_reason", ""))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        shown = f"columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else kind_of(row)
        raise ValueError(
            f"{where}: found {shown}; expected an answer of answers.jsonl, AlpacaEval, WildBench or Arena-Hard (the layout of "
            "2025, which holds the prompt)"
        ) from error


def token_counter(format: str, counter: str, tokenizer: Any) -> Callable[[str], int]:
    """Counts the tokens of an answer as the format's own scripts do (tiktoken), or by the model's tokenizer ("model").

    Raises ValueError where tiktoken or its table is not at hand.
    """
    name = FORMATS[format].count_as
    if name is None:
        return lambda text: 0
    if counter == "model":
        return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
    try:
        tiktoken: Any = importlib.import_module("tiktoken")  # here: only Arena-Hard's files need it
        encoding = tiktoken.encoding_for_model(name)
    except Exception as error:  # besides ImportError, whatever its download raises
        raise ValueError(
            f"format {format!r} counts tokens with tiktoken's table of {name}, which cannot be had ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); pip install tiktoken and let it fetch the table once into "
            "TIKTOKEN_CACHE_DIR, or count with --token_counter model (then do not mix with answers that were counted otherwise)"
        ) from error
    return lambda text: len(encoding.encode(text, disallowed_special=()))
