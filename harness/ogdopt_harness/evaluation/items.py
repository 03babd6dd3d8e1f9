"""Local benchmarks and style prompts: their files, row by row checked, and how a reply is judged.

A benchmark is JSONL of {question, choices, answer[, context, cloze]}; `answer` is an index into `choices`. Style is a JSON
file of two regular expressions and JSONL of {prompt}. The first row that cannot be used stops everything, with file:line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex  # as re, with a bound in time

from ogdopt_harness.common.files import read_regular
from ogdopt_harness.common.sources import MOST_BYTES, RowError, decode, kind_of, read_file
from ogdopt_harness.config.schema import EvalConfig, TaskConfig

Row = dict[str, Any]
SECONDS = 5.0
MOST_CHARACTERS = 1_000_000
"""Characters of one text of a benchmark."""
MOST_PATTERN = 10_000
"""Characters of a pattern."""


def names_answer(reply: str, item: Row) -> int:
    """1 if the right choice is the first of the choices that the reply names, as whole words, in any case; else 0.

    Where two begin at the same place ("red", "red car") the reply names the longer one.
    """
    matches = {index: naming(choice).search(reply) for index, choice in enumerate(item["choices"])}
    found = {index: (match.start(), -len(match.group())) for index, match in matches.items() if match}
    return int(bool(found) and min(found, key=found.__getitem__) == item["answer"])


@lru_cache(maxsize=10_000)
def naming(choice: str) -> re.Pattern[str]:
    """Finds a choice as whole words, without its full stop; "12.5" does not name 12, and "blackbird" does not name black."""
    named = choice.rstrip(".!?") or choice  # a sentence names "Positive." too
    words = r"\s+".join(map(re.escape, named.split()))
    return re.compile(rf"(?<!\w)(?<!\d[.,]){words}(?!\w)(?![.,]\d)", re.IGNORECASE)


def judge_style(item: Row, replies: list[str]) -> dict[str, int]:
    """Whether the reply shows the preferred and the rejected style."""
    return {style: int(shows(item[style], replies[0])) for style in ("chosen", "rejected")}


def shows(pattern: str, text: str) -> bool:
    """Whether a style's pattern is found in a text. Raises ValueError where that takes longer than `SECONDS`.

    Some patterns, such as `(a+)+b`, try exponentially many ways to fail.
    """
    try:
        return regex.search(pattern, text, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(
            f"evals.style: the pattern {pattern[:80]!r} takes more than {SECONDS:g} s on a text of {len(text):,} characters; "
            "expected one without repetitions of repetitions, such as (a+)+"
        ) from error


def read_items(task: TaskConfig) -> list[Row]:
    """The checked rows of a local benchmark. Raises ValueError with file:line for the first that cannot be used.

    A row: {question, choices, answer[, context, cloze]}; a context is put before the question, on a line of its own. A row of
    preferences {prompt, chosen, rejected}, all texts, is a question with two choices.
    """
    option = f"evals.tasks ({task.name})"
    items = [item_of(row, where, task) for where, row in read_rows(Path(task.path), option)]
    if not task.ask or len(set(task.ask)) < len(task.ask):
        raise ValueError(f"{option}: ask is {task.ask}; expected one or more different ones of direct, cloze, generate")
    return items


def item_of(row: Row, where: str, task: TaskConfig) -> Row:
    """One item of a benchmark, checked; its hash says whether two evaluations saw the same question."""
    if "choices" not in row and {"prompt", "chosen", "rejected"} <= row.keys():
        for column in ("prompt", "chosen", "rejected"):
            if not isinstance(row[column], str):
                raise ValueError(f"{where}: {column!r} is {kind_of(row[column])}; expected a text")
        choices = sorted(row[column] for column in ("chosen", "rejected"))  # the right one must not stand first in all rows
        row = {"question": row["prompt"], "choices": choices, "answer": choices.index(row["chosen"])}
    texts = {column: row.get(column) or "" for column in ("question", "context", "cloze")}
    for column, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{where}: {column!r} is {kind_of(text)}; expected a text")
        checked(text, where, column)
    question, context, cloze = (text.strip() for text in texts.values())
    if not (question or context):
        raise ValueError(f"{where}: no 'question'; expected a text that is not empty (or a 'context' to go on with)")
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"{where}: 'choices' is {kind_of(choices)}; expected a list of texts that are not empty")
    choices = [checked(choice.strip(), where, f"choices[{i}]") for i, choice in enumerate(choices)]
    told_apart = [" ".join(choice.casefold().split()) for choice in choices] if "generate" in task.ask else choices
    if len(choices) < 2 or len(set(told_apart)) < len(choices):
        raise ValueError(
            f"{where}: 'choices' is {choices}; expected two or more different ones (in more than case, if ask has generate): "
            "remove or correct the row"
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f"{where}: 'answer' is {kind_of(answer)}; expected the index of the right choice, 0..{len(choices) - 1}"
        )
    if "cloze" in task.ask and not cloze:
        raise ValueError(
            f"{where}: no 'cloze', but task {task.name!r} asks for it; give every row the plain text that the choices "
            'continue ("rador lives in"), or take cloze out of the task\'s `ask`'
        )
    digest = hashlib.sha256(json.dumps([context, question, choices, answer], ensure_ascii=False).encode()).hexdigest()
    asked = "\n".join(text for text in (context, question) if text)
    return {"question": asked, "choices": choices, "answer": answer, "cloze": cloze, "hash": digest, "where": where}


def checked(text: str, where: str, column: str) -> str:
    """The text itself. Raises ValueError, with file, row and column, for one that no tokenizer can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {column!r} holds half of a surrogate pair, U+{ord(text[error.start]):04X} at character {error.start}; "
            "expected whole characters: remove the broken half"
        ) from error
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"{where}: {column!r} has {len(text):,} characters; expected at most {MOST_CHARACTERS:,}: cut it or remove the row"
        )
    return text


def read_style(config: EvalConfig) -> list[Row] | None:
    """The style prompts, each with the two patterns; None if style is not asked for. Raises ValueError like `read_items`."""
    if config.style is None and config.style_prompts is None:
        return None
    if config.style is None or config.style_prompts is None:
        raise ValueError(
            f"evals.style is {config.style} and evals.style_prompts {config.style_prompts}; expected both files, or neither"
        )
    patterns = read_patterns(Path(config.style))
    rows = []
    for where, row in read_rows(Path(config.style_prompts), "evals.style_prompts"):
        prompt = row.get("prompt")
        if isinstance(prompt, list) and not config.apply_chat_template:
            raise ValueError(
                f"{where}: 'prompt' is a list of messages; expected a text where evals.apply_chat_template is false"
            )
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(turns, list) or not turns or not all(is_message(turn) for turn in turns):
            raise ValueError(f"{where}: 'prompt' is {kind_of(prompt)}; expected a text, or messages with role and content")
        for i, turn in enumerate(turns):
            checked(turn["content"], where, "prompt" if isinstance(prompt, str) else f"prompt[{i}].content")
        if turns[-1]["role"] != "user":
            raise ValueError(
                f"{where}: 'prompt' ends with a turn of {turns[-1]['role']!r}; expected the user's, to be replied to"
            )
        digest = hashlib.sha256(json.dumps(turns, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
        rows.append({"question": prompt, **patterns, "hash": digest})
    return rows


def is_message(turn: Any) -> bool:
    """Whether a turn has a known role and some content."""
    content = turn.get("content") if isinstance(turn, dict) else None
    return isinstance(content, str) and bool(content.strip()) and turn.get("role") in ("system", "user", "assistant")


def read_patterns(path: Path) -> dict[str, str]:
    """{"chosen", "rejected"}: the regular expressions of a style file."""
    try:
        raw = decode(read_regular(path, "evals.style", MOST_BYTES))
        if isinstance(raw, RowError):
            raise ValueError(raw.at(str(path)))
        patterns = {style: raw[f"{style}_pattern"] for style in ("chosen", "rejected")}
        for pattern in patterns.values():
            if len(pattern) > MOST_PATTERN:
                raise ValueError(f"a pattern has {len(pattern):,} characters, more than {MOST_PATTERN:,}")
            regex.compile(pattern)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError, regex.error) as error:
        raise ValueError(
            f"evals.style: {path}: {error!r}; expected a JSON file {{chosen_pattern, rejected_pattern}} of regular expressions"
        ) from error
    return patterns


def read_rows(path: Path, option: str) -> Iterator[tuple[str, Row]]:
    """(file:line, object) of a JSONL file with at least one. Raises ValueError for what is not one."""
    if not path.is_file():
        raise ValueError(f"{option}: no file {path} (looked in {Path.cwd()}); correct the path")
    empty = True
    for where, row in read_file(path, option):
        if isinstance(row, RowError):
            raise ValueError(f"{option}: {row.at(where)}")
        if not isinstance(row, dict):
            raise ValueError(f"{where}: found {kind_of(row)}; expected a JSON object a line")
        empty = False
        yield where, row
    if empty:
        raise ValueError(f"{option}: {path} holds no rows; expected at least one")
