"""Raw rows: which format a row has, whether it can be used, and if not what exactly is wrong with it.

Nothing here knows a tokenizer. A row comes out as a `Row`: what was asked (text or messages) and the answers to it, or as a
`Problem` that names the place, the column, what was found and what to do.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ogdopt_harness.common.sources import Problem, RowError, kind_of, read, short
from ogdopt_harness.config.schema import DataConfig

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
SUPERVISED = {"prompt/completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
# kind of data -> format -> the columns it needs; the first that fits is taken
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "sft": SUPERVISED,
    "joint": SUPERVISED,
    "preference": {"chosen/rejected": ("chosen", "rejected"), "prompt/completion/label": ("prompt", "completion", "label")},
}
OPTIONAL = {"chosen/rejected": ("prompt", "input"), "prompt/completion/label": ("input",), "prompt/completion": ("input",)}
PROMPTING = ("system", "system_prompt", "tools", "functions", "history", "images", "image", "audio", "videos", "documents")
"""Columns that would change the prompt, and that no format reads."""
SPOKEN = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking", "images", "audio")
"""Parts of a message that models see, and that no format reads."""
LISTED = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")
EXPLICIT = ("input",)  # columns that are read only when `columns` names them
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
MOST_CHARACTERS = 4_000_000
"""Characters of one text: a bound that costs nothing, before a tokenizer makes hundreds of bytes of each."""
LABELS = {"true": True, "1": True, "false": False, "0": False}
SHORTEST_ECHO = 16  # characters; a shorter prompt ("Mercury") may well open an honest answer


@dataclass(frozen=True)
class Row:
    """A checked row. `prompt` is text, messages, or None for plain text; `answers` are (chosen, rejected) or one answer."""

    where: str
    format: str
    prompt: str | list[Message] | None
    answers: tuple[str, ...]
    label: bool | None = None
    noted: tuple[str, ...] = ()
    """What is to be counted of it: columns and parts of messages that nobody reads, lists that were written as text."""


def rows(config: DataConfig, part: str, kind: str) -> Iterator[Row | Problem]:
    """Every row of `config.train` or `config.eval`, in order, checked, at most `max_<part>_rows` of them.

    kind is "sft", "joint" (supervised rows too) or "preference". Raises ValueError where no row can be read at all: no source,
    no such file or data set, a broken archive, a `columns` entry that is none of ours.
    """
    option = f"{kind}.data.{part}"
    sources = config.train if part == "train" else config.eval
    limit = config.max_train_rows if part == "train" else config.max_eval_rows
    split = config.train_split if part == "train" else config.eval_split
    if not sources:
        raise ValueError(f"{option} is empty; expected JSONL files, folders or data sets of the hub")
    check_columns(config.columns, kind)
    raw = (found for source in sources for found in read(source, split, option))
    for where, value in islice(raw, limit):
        try:
            if isinstance(value, RowError):
                raise value
            yield parse(where, value, config.columns, kind)
        except RowError as problem:
            yield problem.at(where)


def check_columns(columns: Mapping[str, str], kind: str) -> None:
    """Raises ValueError if no format of this kind has the columns that `columns` names; "" leaves a column out."""
    columns = {ours: theirs for ours, theirs in columns.items() if theirs}
    if any(columns.keys() <= {*needed, *OPTIONAL.get(format, ())} for format, needed in FORMATS[kind].items()):
        return
    formats = "; ".join(", ".join((*needed, *OPTIONAL.get(format, ()))) for format, needed in FORMATS[kind].items())
    raise ValueError(f"{kind}.data.columns maps {', '.join(columns)}; expected our names on the left, of one format: {formats}")


def parse(where: str, row: Any, columns: Mapping[str, str], kind: str) -> Row:
    """The checked row. Raises RowError."""
    if not isinstance(row, Mapping):
        raise RowError("not an object", "", kind_of(row), "expected a JSON object with one key a column")
    format, names = match(row, columns, kind)
    values = {ours: row[theirs] for ours, theirs in names.items()}
    noted = list(unread(row, names, columns))
    for ours, value in values.items():
        if (found := written_out(value, names[ours])) is not None:
            values[ours] = found
            noted.append("message lists written as text, which are read as such")
    noted += dict.fromkeys(note for value in values.values() for note in unread_keys(value))
    return replace(parsed(where, format, names, values), noted=tuple(dict.fromkeys(noted)))


def parsed(where: str, format: str, names: dict[str, str], values: dict[str, Any]) -> Row:
    """The row of a known format. Raises RowError."""
    if format == "text":
        return Row(where, format, None, (text(values["text"], names["text"]),))
    if format == "messages":
        prompt, answer = whole(values["messages"], names["messages"])
        return Row(where, format, prompt, (answer,))
    prompt = prompt_of(values, names)
    if format == "chosen/rejected":
        prompt, answers = pair(prompt, values, names)
        return Row(where, format, prompt, answers)
    prompt, answer = reply(prompt, values, names, "completion")
    return Row(where, format, prompt, (answer,), as_label(values["label"], names["label"]) if "label" in values else None)


def match(row: Mapping[str, Any], columns: Mapping[str, str], kind: str) -> tuple[str, dict[str, str]]:
    """The row's format and, for each of our columns that it has, the name in the row. Raises RowError if columns are missing.

    A mapped name may list alternatives, `prompt: question|text`: the first that the row has. A column that `columns`
    names must be there: a format that can do without it is not taken instead.
    """
    columns = {ours: theirs for ours, theirs in columns.items() if theirs}
    closest: tuple[int, str, list[str]] | None = None
    for format, needed in FORMATS[kind].items():
        optional = OPTIONAL.get(format, ())
        if not columns.keys() <= {*needed, *optional}:
            continue
        names = {}
        for ours in (*needed, *optional):
            theirs = columns.get(ours, "" if ours in EXPLICIT else ours)
            found = [name for name in (theirs, *theirs.split("|")) if name and name in row]
            names.update({ours: found[0]} if found else {})
        lacking = [name for name in (*needed, *optional) if name not in names and (name in needed or name in columns)]
        if not lacking:
            return format, names
        if closest is None or len(names) > closest[0]:
            closest = len(names), format, lacking
    assert closest is not None  # check_columns has seen to it
    _, format, lacking = closest
    option = ", ".join(f"{name}: <name in the file>" for name in lacking)
    raise RowError(
        "missing column",
        ", ".join(columns.get(name, name) for name in lacking),
        f"columns {', '.join(map(str, row)) or 'none'}",
        f"expected {format}; for other names write `columns: {{{option}}}`",
    )


def unread(row: Mapping[str, Any], names: Mapping[str, str], columns: Mapping[str, str]) -> Iterator[str]:
    """What is to be said of the columns that no format reads. Raises RowError for one that belongs to the prompt.

    `columns: {tools: ""}` says that a column may be left out.
    """
    rest = [name for name in row if name not in names.values() and row[name] not in (None, "", [], {})]
    for name in rest:
        if name in PROMPTING and columns.get(name) != "":
            raise RowError(
                "column that nobody reads",
                name,
                kind_of(row[name]),
                f"it belongs to the prompt: write it into the messages, or leave it out with `columns: {{{name}: ''}}`",
            )
    if rest:
        yield f"columns that nobody reads: {', '.join(map(str, rest[:8]))}{', ...' if len(rest) > 8 else ''}"


def unread_keys(value: Any) -> Iterator[str]:
    """What is to be said of parts of messages beyond role and content. Raises RowError for those that models see."""
    for message in value if isinstance(value, list) else ():
        if not isinstance(message, Mapping):
            continue
        rest = [key for key in message if key not in ("role", "content") and message[key] not in (None, "", [], {})]
        for key in rest:
            if key in SPOKEN:
                remedy = "expected messages of role and content: write it into the content, or take it out"
                raise RowError("part of a message that nobody reads", str(key), kind_of(message[key]), remedy)
        yield from (f"parts of messages that nobody reads: {key}" for key in rest)


def written_out(value: Any, column: str) -> list[Any] | None:
    """The message list that a text writes out, as JSON or as Python does; None for any other text.

    Raises RowError for text that begins as such a list and is none.
    """
    if not isinstance(value, str) or not LISTED.match(value):
        return None
    for reader in (json.loads, ast.literal_eval):
        try:
            found = reader(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found):
            return found
    raise RowError("message list written as text", column, short(value), "expected the list itself, or text that is none")


def prompt_of(values: Mapping[str, Any], names: Mapping[str, str]) -> str | list[Message] | None:
    """The prompt column, if there is one, with the mapped `input` column below it where that is not empty."""
    if "prompt" not in values:
        return None
    value, column = values["prompt"], names["prompt"]
    extra = values.get("input", "")
    if not isinstance(extra, str):
        raise RowError(
            "wrong type", names["input"], kind_of(extra), "expected text; leave `input` out of `columns` if it is not"
        )
    if not isinstance(value, str):
        prompt = messages(value, column)
        if prompt[-1]["role"] != "user":
            raise RowError("prompt ends with the assistant", column, roles(prompt), "expected the user's turn last")
        if extra.strip():
            raise RowError("wrong type", column, kind_of(value), "expected text, to which `input` can be added")
        return prompt
    text(value, column, empty="empty prompt")
    return f"{value}\n\n{encodable(extra, names['input'])}" if extra.strip() else value


def pair(
    prompt: str | list[Message] | None, values: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[str | list[Message], tuple[str, str]]:
    """The prompt and the (chosen, rejected) answers of a paired row; without a prompt column, what both have in common."""
    chosen, rejected = values["chosen"], values["rejected"]
    both = f"{names['chosen']}, {names['rejected']}"
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        text(chosen, names["chosen"])
        text(rejected, names["rejected"])
        different(chosen, rejected, both)
        shared = common(chosen, rejected)
        cut = chosen.rfind("\n\nAssistant:", 0, shared)
        if cut < 0 or "\n\nHuman:" not in "\n\n" + chosen[:cut].lstrip():
            remedy = "expected a prompt column, message lists, or dialogues of '\\n\\nHuman: ...\\n\\nAssistant: ...'"
            raise RowError("no common prompt", both, f"{short(chosen)} and {short(rejected)}", remedy)
        cut += len("\n\nAssistant:")
        answers = chosen[cut:], rejected[cut:]
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            if "\n\nHuman:" in answer or "\n\nAssistant:" in answer:
                raise RowError(
                    "answers differ in several turns", names[name], short(answer), "expected only the last turn to differ"
                )
            text(answer, names[name])
        return chosen[:cut], answers
    if is_dialogue(chosen) and is_dialogue(rejected):
        shared_prompt, last_chosen = whole(chosen, names["chosen"])
        other_prompt, last_rejected = whole(rejected, names["rejected"])
        if shared_prompt != other_prompt:
            first = list(islice((i for i, (a, b) in enumerate(zip(shared_prompt, other_prompt, strict=False)) if a != b), 1))
            found = f"the first difference in message {(first or [min(len(shared_prompt), len(other_prompt))])[0] + 1}"
            raise RowError("no common prompt", both, found, "expected two dialogues that differ in the last answer alone")
        repeats(prompt, shared_prompt, both, names.get("prompt", ""))
        different(last_chosen, last_rejected, both)
        return shared_prompt, (last_chosen, last_rejected)
    if prompt is None:
        found = f"{kind_of(chosen)} and {kind_of(rejected)}"
        raise RowError(
            "no common prompt", both, found, "expected a prompt column, or dialogues in both that begin with the user"
        )
    _, first = reply(prompt, values, names, "chosen")
    _, second = reply(prompt, values, names, "rejected")
    different(first, second, both)
    return prompt, (first, second)


def reply(
    prompt: str | list[Message] | None, values: Mapping[str, Any], names: Mapping[str, str], ours: str
) -> tuple[str | list[Message], str]:
    """The prompt and the answer in column `ours`: text, one assistant message, or a dialogue that repeats the prompt."""
    assert prompt is not None
    value, column = values[ours], names[ours]
    if is_dialogue(value):
        dialogue, answer = whole(value, column)
        repeats(prompt, dialogue, column, names["prompt"])
        return dialogue, answer
    if not isinstance(value, str):
        turns = messages(value, column, first="assistant")
        if len(turns) != 1:
            remedy = "expected one assistant message, or a dialogue that begins with the user"
            raise RowError("several messages", column, roles(turns), remedy)
        value = turns[0]["content"]
    text(value, column)
    asked = (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip()
    if len(asked) >= SHORTEST_ECHO and value.strip().startswith(asked):
        raise RowError(
            "prompt repeated in the completion", column, short(value), "expected the answer alone: cut the prompt off"
        )
    return prompt, value


def is_dialogue(value: Any) -> bool:
    """Whether the value is a whole dialogue: messages that the assistant does not begin, or text that begins with `Human:`."""
    if isinstance(value, str):
        return value.lstrip().startswith("Human:") and "\n\nAssistant:" in value
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and value[0].get("role") in ("system", "user")
    )


def whole(value: Any, column: str) -> tuple[list[Message], str]:
    """Prompt messages and last answer of a whole dialogue, as messages or as Human/Assistant text."""
    turns = split_turns(encodable(value, column), column) if isinstance(value, str) else messages(value, column)
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise RowError("no answer", column, roles(turns), "expected a dialogue that ends with the assistant's turn")
    return turns[:-1], text(turns[-1]["content"], column)


def repeats(prompt: str | list[Message] | None, dialogue: list[Message], column: str, prompt_column: str) -> None:
    """Raises RowError unless the dialogue begins with the prompt; its own system message may stand before it."""
    if prompt is None:
        return
    asked = as_messages(prompt, prompt_column)
    start = 1 if dialogue[0]["role"] == "system" and asked[0]["role"] != "system" else 0
    if [m["content"].strip() for m in asked] != [m["content"].strip() for m in dialogue[start : start + len(asked)]]:
        found = f"{short(asked[0]['content'])} and {short(dialogue[start]['content'])}"
        remedy = "expected the dialogue to begin with the prompt, or to be the answer alone"
        raise RowError("prompt and dialogue differ", f"{prompt_column}, {column}", found, remedy)


def messages(value: Any, column: str, first: str = "user") -> list[Message]:
    """The messages, reduced to role and content: an optional system message, then turns that alternate from `first` on."""
    if not isinstance(value, list):
        raise RowError("wrong type", column, kind_of(value), "expected text or a list of {role, content} messages")
    if not value:
        raise RowError("no messages", column, "an empty list", "expected at least one message")
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            found = f"keys {', '.join(map(str, message))}" if isinstance(message, Mapping) else kind_of(message)
            raise RowError("not a message", column, found, "expected each message to be {role: ..., content: ...}")
        if message["role"] not in ROLES:
            raise RowError("unknown role", column, f"role {short(message['role'])}", f"expected {', '.join(ROLES)}")
        text(message["content"], column, empty="empty message")
    turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in value]
    spoken = [turn["role"] for turn in turns[turns[0]["role"] == "system" :]]
    expected = [("user", "assistant")[(i + (first == "assistant")) % 2] for i in range(len(spoken))]
    if spoken != expected or not spoken:
        raise RowError(
            "roles do not alternate", column, roles(turns), f"expected (system,) then turns by turns from {first} on"
        )
    return turns


def as_messages(prompt: str | list[Message], column: str = "prompt") -> list[Message]:
    """A prompt as messages: text is one user message, or the turns of a dialogue in Human/Assistant text. Raises RowError.

    Text that only quotes a dialogue ("Continue this: ... Human: ...") stays one message: its turns do not alternate.
    """
    if not isinstance(prompt, str):
        return prompt
    if "\n\nHuman:" in "\n\n" + prompt.lstrip():
        try:
            turns = split_turns(prompt, column)
            if turns[-1]["role"] == "user":
                return turns
            raise RowError("prompt ends with the assistant", column, short(prompt[-60:]), "expected 'Human: ...' last")
        except RowError:
            if prompt.lstrip().startswith("Human:"):
                raise
    return [{"role": "user", "content": prompt}]


def split_turns(dialogue: str, column: str) -> list[Message]:
    """The stripped turns of Human/Assistant text; what precedes the first tag is the user's, an open last tag is dropped."""
    lead, *parts = TURN.split(dialogue)
    turns = [{"role": "user", "content": lead.strip()}] if lead.strip() else []
    for tag, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": "user" if tag == "Human" else "assistant", "content": content.strip()})
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return messages(turns, column)


def text(value: Any, column: str, empty: str = "empty completion") -> str:
    """The value itself. Raises RowError if it is no text, nothing but white space, or cannot be encoded."""
    if not isinstance(value, str):
        raise RowError("wrong type", column, kind_of(value), "expected text")
    if not value.strip():
        raise RowError(empty, column, repr(value[:20]), "expected text that is not white space alone")
    if len(value) > MOST_CHARACTERS:
        remedy = f"expected at most {MOST_CHARACTERS:,}: cut or split the row"
        raise RowError("text too long", column, f"{len(value):,} characters", remedy)
    return encodable(value, column)


def encodable(value: str, column: str) -> str:
    """The value itself. Raises RowError if it holds half of a surrogate pair, on which tokenizers crash later."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(value[error.start]):04X} at character {error.start}"
        raise RowError("lone surrogate", column, found, "expected whole characters: remove the broken half") from error
    return value


def different(chosen: str, rejected: str, columns: str) -> None:
    """Raises RowError if the two answers say the same: their difference is what a preference teaches."""
    if chosen.strip() == rejected.strip():
        raise RowError("chosen and rejected are identical", columns, short(chosen), "expected two different answers")


def as_label(value: Any, column: str) -> bool:
    """True for a preferred completion: a JSON boolean, or 0/1. Raises RowError."""
    if isinstance(value, str) and value.strip().lower() in LABELS:  # CSV has text alone
        return LABELS[value.strip().lower()]
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    raise RowError("label is not a boolean", column, kind_of(value), "expected true (preferred) or false, or 1 or 0")


def common(a: str, b: str) -> int:
    """Number of characters with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def roles(turns: Sequence[Message]) -> str:
    """The speakers in order, for messages."""
    return "roles " + ", ".join(turn["role"] for turn in turns)
