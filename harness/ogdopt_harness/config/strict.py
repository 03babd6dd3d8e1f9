"""Configuration files, checked before anything reads a setting from them: what YAML lets pass in silence is refused.

YAML takes the last of two equal keys, expands aliases without a bound and reads any file. Here a key stands once, aliases stand
for so many values at most, a section is a section, and a mistake is named with file and line.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ogdopt_harness.common.files import read_regular

MOST_BYTES = 1_000_000
MOST_VALUES = 100_000
"""Values in one file, each counted as often as aliases repeat it."""
MOST_DEPTH = 50
NULLS = ("", "~", "null", "Null", "NULL")


def check_file(path: Path, schema: type) -> None:
    """Raises ValueError, naming file and line, unless `path` is YAML that says something about options of `schema` alone."""
    raw = read_regular(path, "--config", MOST_BYTES)
    try:
        text = raw.decode("utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is no UTF-8; write the file again in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ValueError(f"{path}:{line}: not YAML: {' '.join(str(error.problem or error.context).split())}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{path}: not YAML that can be read: {said}") from error
    if not isinstance(root, MappingNode):
        found = "empty" if root is None else _kind(root)
        raise ValueError(f"{path}:1: found {found}; expected options, e.g. `study: {{name: mine}}`")
    _bounded(root, path)
    if problems := [*_repeated(root, path), *_shaped(root, schema, path)]:
        raise ValueError("\n".join(problems))


def check_value(word: str) -> None:
    """Raises ValueError for a mapping on the command line in which a key stands twice, or aliases stand for too much."""
    text = word.partition("=")[2] if word.startswith("--") else word
    if not text.lstrip().startswith(("{", "[")):
        return
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return  # the parser of options says what is wrong with it, and of which option
    where = Path(f"value {text[:60]!r}, line")
    _bounded(root, where)
    if problems := list(_repeated(root, where)):
        raise ValueError("\n".join(problems))


def _bounded(root: Node, path: Path) -> None:
    """Raises ValueError where aliases make more of a file than it can mean, or a value holds itself."""
    sizes: dict[int, int] = {}

    def size(node: Node, depth: int, above: frozenset[int]) -> int:
        if id(node) in above:
            raise ValueError(f"{_at(node, path)}: a value that holds itself (an alias of what it stands in); write it out")
        if depth > MOST_DEPTH:
            raise ValueError(f"{_at(node, path)}: nested more than {MOST_DEPTH} deep; expected sections and options")
        if id(node) not in sizes:
            inner = [child for pair in node.value for child in pair] if isinstance(node, MappingNode) else node.value
            children = [] if isinstance(node, ScalarNode) else inner
            sizes[id(node)] = 1 + sum(size(child, depth + 1, above | {id(node)}) for child in children)
        if sizes[id(node)] > MOST_VALUES:
            raise ValueError(f"{_at(node, path)}: more than {MOST_VALUES:,} values, aliases expanded; write fewer")
        return sizes[id(node)]

    size(root, 0, frozenset())


def _repeated(node: Node, path: Path, dotted: str = "", seen: set[int] | None = None) -> Iterator[str]:
    """Each key that stands twice in one mapping; YAML itself would take the last."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, SequenceNode):
        for child in node.value:
            yield from _repeated(child, path, dotted, seen)
    elif isinstance(node, MappingNode):
        first: dict[str, Node] = {}
        for key, value in node.value:
            name = str(key.value) if isinstance(key, ScalarNode) else _kind(key)
            if name in first:
                yield (
                    f"{_at(key, path)}: {dotted}{name} stands here a second time, after line "
                    f"{first[name].start_mark.line + 1}; expected each option once: keep one of them"
                )
            first.setdefault(name, key)
            yield from _repeated(value, path, f"{dotted}{name}.", seen)


def _shaped(node: MappingNode, schema: type, path: Path, dotted: str = "") -> Iterator[str]:
    """What is no option of a section, and sections that are none."""
    hints = typing.get_type_hints(schema)
    names = [field.name for field in dataclasses.fields(schema)]
    for key, value in node.value:
        name = str(key.value)
        if not isinstance(key, ScalarNode) or name not in names:
            near = difflib.get_close_matches(name, names, 1) or names
            words = f"one of {', '.join(near)}" if len(near) > 1 else near[0]
            yield f"{_at(key, path)}: there is no option {dotted}{name}; expected {words}"
            continue
        hint: Any = hints[name]
        section: Any = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if section is None or typing.get_origin(hint) is list:
            continue
        null = isinstance(value, ScalarNode) and value.value in NULLS and value.style is None
        if isinstance(value, MappingNode):
            yield from _shaped(value, section, path, f"{dotted}{name}.")
        elif not (null and type(None) in typing.get_args(hint)):
            inner = ", ".join(field.name for field in dataclasses.fields(section))
            yield (
                f"{_at(value, path)}: {dotted}{name} is {'null' if null else _kind(value)}; expected a section with options "
                f"out of {inner}, or leave it out for the defaults"
            )


def _at(node: Node, path: Path) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _kind(node: Node) -> str:
    if isinstance(node, ScalarNode):
        return repr(node.value[:60])
    return "a list" if isinstance(node, SequenceNode) else "a mapping"
