"""Options out of dataclasses: their dotted names, what they take, what they are for, and the nearest to a wrong name."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import docstring_parser

SHORT = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "train_batch_size", "model": "model_name_or_path"}
SHORT |= {"tokenizer": "tokenizer_name_or_path", "output": "output_dir", "seed": "seeds", "scheduler": "lr_scheduler_type"}
"""What the options of other trainers are called -> the last word of ours."""
PLAIN = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "a mapping {name: value}"}
METAVAR = {int: "N", float: "X", str: "TEXT", dict: "{NAME: VALUE}", list: "LIST"}


@dataclass(frozen=True)
class Option:
    """One option of a command: `name` is dotted, `type` a type hint, `default` dataclasses.MISSING where it must be given."""

    name: str
    type: Any
    default: Any
    help: str

    @property
    def open(self) -> bool:
        """Whether names may follow its own, as in --model.architecture.hidden_size."""
        return any(typing.get_origin(hint) is dict for hint in alternatives(self.type))

    @property
    def metavar(self) -> str:
        """What stands for its value in --help."""
        hint = alternatives(self.type)[0]
        origin = typing.get_origin(hint) or hint
        return (
            "{" + ",".join(map(str, typing.get_args(hint))) + "}" if origin is Literal else METAVAR.get(origin, "{true,false}")
        )

    @property
    def expected(self) -> str:
        """What it takes, in words."""
        return " or ".join(map(_in_words, alternatives(self.type))) + " or null" * optional(self.type)


@dataclass(frozen=True)
class Section:
    """A group of options under one name: a dataclass, and its caption."""

    name: str
    caption: str
    options: list[Option]
    sections: list[Section]

    def walk(self) -> Iterator[Section]:
        """This section and all below it."""
        yield self
        for section in self.sections:
            yield from section.walk()

    def every(self) -> Iterator[Option]:
        """The options of this section and of all below it."""
        for section in self.walk():
            yield from section.options


def alternatives(hint: Any) -> list[Any]:
    """The types of a union without None, or the type itself.

    >>> alternatives(int | None)
    [<class 'int'>]
    """
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else [hint]
    return [part for part in parts if part is not type(None)]


def optional(hint: Any) -> bool:
    """Whether null is a value of the type."""
    return type(None) in typing.get_args(hint)


def _in_words(hint: Any) -> str:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return "a list, each " + _in_words(args[0])
    return PLAIN.get(origin, "a mapping of its options")


@cache
def section(cls: type, name: str = "") -> Section:
    """All options of a dataclass, under a dotted name; fields that are dataclasses are sections of their own."""
    texts = [docstring_parser.parse_from_object(base) for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    said = {p.arg_name: " ".join((p.description or "").split()) for text in reversed(texts) for p in text.params}
    hints, options, sections = typing.get_type_hints(cls), [], []
    for field in dataclasses.fields(cls):
        full = f"{name}.{field.name}".lstrip(".")
        inner = [hint for hint in alternatives(hints[field.name]) if dataclasses.is_dataclass(hint)]
        if inner:
            part = _filled(section(inner[0], full), default(field))
            sections.append(dataclasses.replace(part, caption=said.get(field.name, "").rstrip(".") or part.caption))
        else:
            options.append(Option(full, hints[field.name], default(field), said.get(field.name, "")))
    return Section(name, (texts[0].short_description or "").rstrip("."), options, sections)


def default(field: Any) -> Any:
    """A field's default value, or dataclasses.MISSING."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _filled(section: Section, value: Any) -> Section:
    """The section with the defaults that an instance of its class has."""
    if not dataclasses.is_dataclass(value):
        return section
    last = lambda name: getattr(value, name.rpartition(".")[2])  # noqa: E731
    options = [dataclasses.replace(option, default=last(option.name)) for option in section.options]
    return dataclasses.replace(section, options=options, sections=[_filled(s, last(s.name)) for s in section.sections])


def find(name: str, everything: Section) -> Option | Section | None:
    """The option or section of a dotted name, or the one of which it is a key; None if there is none."""
    for part in everything.walk():
        if part.name == name and name:
            return part
        for option in part.options:
            if name == option.name or (option.open and name.startswith(option.name + ".")):
                return option
    return None


def nearest(word: str, known: Iterable[str], most: int = 2) -> list[str]:
    """Names that may be meant by a wrong one, the likeliest first.

    >>> nearest("preference.lr", ["preference.learning_rate", "preference.seed", "sft.learning_rate"])
    ['preference.learning_rate']
    >>> nearest("jugde", ["judge", "tax"])
    ['judge']
    """
    names = list(dict.fromkeys(known))
    head, _, tail = word.rpartition(".")
    meant = SHORT.get(tail, tail)
    ends = [name for name in names if name.rpartition(".")[2] == meant]
    near = [name for name in names if name.rpartition(".")[0] == head and head]
    if same := [name for name in near if name in ends]:
        return same[:1]
    if len(tail) > 3 and (parts := [name for name in near if meant in name.rpartition(".")[2]]):
        return parts[:most]
    close = difflib.get_close_matches(f"{head}.{meant}".lstrip("."), names, most, 0.72)
    elsewhere = ends if not head or any(name.startswith(head + ".") for name in names) else []
    return list(dict.fromkeys([*elsewhere, *close]))[:most]


def meant(names: Sequence[str], sign: str = "--") -> str:
    """`; did you mean --a or --b?`, or nothing."""
    return "; did you mean " + " or ".join(sign + name for name in names) + "?" if names else ""
