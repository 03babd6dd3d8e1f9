"""The words of a command line as a configuration: what they are, what is wrong with them, and what --help says.

A command's options are the fields of a dataclass (`options.py`). Values are read and checked by jsonargparse; names are checked
here, so that a mistake is answered in a line or two, with the nearest name.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse

from ogdopt_harness.config import strict
from ogdopt_harness.config.options import Option, Section, alternatives, find, meant, nearest, section
from ogdopt_harness.config.recipes import recipe_file

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
HELP = ("-h", "--help")
CONFIG = Option("config", str, None, "A recipe: its name, as `ogdopt recipes` lists them, or a YAML file. Options override it.")
PRINT = Option("print_config", bool, False, "Print the configuration as a recipe, and end.")


@dataclass(frozen=True)
class Place:
    """What stands before the options: a word, or with `many` one or more."""

    name: str
    help: str
    many: bool = False
    needed: bool = True


@dataclass(frozen=True)
class Usage:
    """How a command is called."""

    name: str
    summary: str
    options: type
    """A dataclass, whose fields are options."""
    places: tuple[Place, ...] = ()
    apart: type | None = None
    """A dataclass of further options, which no recipe holds."""
    recipes: bool = False
    """Whether --config RECIPE gives options."""
    sections: tuple[str, ...] | None = None
    """The sections whose options may be given on the command line; None: all. A recipe may hold the others too."""
    examples: tuple[str, ...] = ()

    @property
    def everything(self) -> Section:
        """Every option that may be given on the command line."""
        whole = section(self.options)
        if self.sections is not None:
            kept = [part for part in whole.sections if part.name in self.sections]
            whole = dataclasses.replace(whole, sections=kept, options=[o for o in whole.options if o.name in self.sections])
        more = [*(section(self.apart).options if self.apart else ()), *((CONFIG, PRINT) if self.recipes else ())]
        return dataclasses.replace(whole, options=[*whole.options, *more])

    @property
    def line(self) -> str:
        """The command with its places, e.g. `ogdopt generate MODEL PROMPTS`."""
        words = [p.name.upper() + "..." * p.many for p in self.places]
        words = [word if place.needed else f"[{word}]" for word, place in zip(words, self.places, strict=True)]
        needed = [f"--{o.name} {o.metavar}" for o in self.everything.options if o.default is dataclasses.MISSING]
        return " ".join(["ogdopt", self.name, *words, *needed])


@dataclass(frozen=True)
class Given:
    """The words of a command line: `places` by name, `options` as (name, value) in order."""

    places: dict[str, Any]
    options: list[tuple[str, str]] = field(default_factory=list)

    def among(self, names: Sequence[str]) -> bool:
        """Whether an option, or one of a section, of these names was given."""
        return any(option == name or option.startswith(name + ".") for option, _ in self.options for name in names)


def split(usage: Usage, words: Sequence[str]) -> Given:
    """Places and options of a command line. Raises ValueError for unknown options, missing values and words of no place."""
    options, rest, everything = [], [], usage.everything
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            if word.startswith("-") and len(word) > 1:
                raise ValueError(f"{word}: there is no such option; {see(usage)}")
            rest.append((word, options[-1][0] if options else None))
            continue
        name, sign, value = word[2:].partition("=")
        plus, name = name.endswith("+"), name.rstrip("+").replace("-", "_")
        found = find(name, everything)
        if found is None:
            raise ValueError(unknown(usage, name))
        if not sign:
            flag = isinstance(found, Option) and found.type is bool
            if left and not left[0].startswith("--") and not (flag and left[0] not in ("true", "false")):
                value = left.pop(0)
            elif flag:
                value = "true"
            else:
                takes = found.expected if isinstance(found, Option) else "a YAML file with its options"
                raise ValueError(f"--{name} is given without a value; expected {takes}")
        strict.check_value(value)
        options.append((name + "+" * plus, _listed(value) if isinstance(found, Option) and _is_list(found) else value))
    return Given(_placed(usage, rest), options)


def _placed(usage: Usage, rest: list[tuple[str, str | None]]) -> dict[str, Any]:
    """The words in front of and between the options, by the names of their places."""
    places: dict[str, Any] = {}
    for place in usage.places:
        mine, rest = (rest, []) if place.many else (rest[:1], rest[1:])
        if not mine and place.needed:
            raise ValueError(f"{place.name.upper()} is missing: {place.help}\nusage: {usage.line}")
        found = [word for word, _ in mine]
        places[place.name] = found if place.many else found[0] if found else None
    if rest:
        word, after = rest[0]
        why = f"--{after} takes one value" if after else f"{usage.name} takes options alone"
        raise ValueError(f"{word!r} stands where no word is expected: {why}\nusage: {usage.line} [--OPTION VALUE ...]")
    return places


def see(usage: Usage) -> str:
    """Where the options are listed."""
    return f"`ogdopt {usage.name} --help` lists them"


def unknown(usage: Usage, name: str) -> str:
    """What to say of an option that a command does not have."""
    if usage.sections is not None and find(name, section(usage.options)):
        return f"--{name}: {usage.name} has no use for it; take it out ({see(usage)})"
    everything = usage.everything
    names = [option.name for option in everything.every()]
    likely = nearest(name, names)
    head = name.partition(".")[0]
    listed = f" {head}" if "." in name and find(head, everything) else ""
    return f"--{name}: there is no such option{meant(likely)}\n(`ogdopt {usage.name} --help{listed}` lists them)"


def _is_list(option: Option) -> bool:
    """Whether an option is a list of plain values, which may also be given with commas: --methods ogd,dpo."""
    return len(alternatives(option.type)) == 1 and alternatives(option.type)[0] in (list[str], list[int], list[float])


def _listed(value: str) -> str:
    return value if value.startswith("[") or value == "null" else f"[{value}]"


def read(usage: Usage, given: Given, recipe: Path | None = None) -> Any:
    """An instance of the command's options: dataclass defaults, then the recipe, then what was given.

    Raises ValueError with one message for what cannot be used. --print_config prints and ends the process.
    """
    parser = jsonargparse.ArgumentParser(prog=f"ogdopt {usage.name}", exit_on_error=False)
    if usage.recipes:
        parser.add_argument("--config", action="config")
    parser.add_class_arguments(usage.options)
    apart = {option.name for option in section(usage.apart).options} if usage.apart else set()
    files = [
        *([recipe] if recipe else []),
        *(recipe_file(value, usage.options) for name, value in given.options if name == "config"),
    ]
    words = [f"--config={file}" for file in files]  # first, so that options override recipes wherever they stand
    for name, value in given.options:
        if name == "print_config":
            words += ["--print_config"] * (value == "true")
        elif name != "config" and name not in apart:
            words.append(f"--{name}={value}")
    names = {name for name, _ in given.options}
    for option in section(usage.options).options:
        if option.default is dataclasses.MISSING and option.name not in names and not usage.recipes:
            raise ValueError(f"--{option.name} is missing: {option.help}\nusage: {usage.line}")
    try:
        found = parser.instantiate(parser.parse_args(words))
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise ValueError(explained(str(error), usage, names, str(next(reversed(files), "")))) from error
    return usage.options(**{f.name: found[f.name] for f in dataclasses.fields(usage.options)})


def read_apart(usage: Usage, given: Given) -> Any:
    """An instance of the options that no recipe holds."""
    assert usage.apart is not None
    names = {option.name for option in section(usage.apart).options}
    mine = Given({}, [(name, value) for name, value in given.options if name in names])
    return read(Usage(usage.name, "", usage.apart), mine)


def explained(said: str, usage: Usage, given: set[str], recipe: str) -> str:
    """A mistake that jsonargparse found, in the words of this command line.

    >>> explained("Group 'sft' does not accept option 'sed'", Usage("run", "", Place), set(), "mine.yaml")
    'mine.yaml: sft.sed: there is no such option'
    """
    everything = section(usage.options)
    key = (re.findall(r'Parser key "(.+?)"', said) or [""])[0]
    if not re.search("Parser key|Does not validate|not accept|Problems parsing", said):
        return said
    if ours := [line.strip("- ") for line in said.splitlines() if "; expected" in line]:
        return "\n".join(ours)
    if wrong := re.search(r"(?:Group '(\S+)' does not accept option|Option) '(\S+)'", said):
        name = ".".join(filter(None, [key or wrong[1], wrong[2]]))
        place = "" if given & {name, key} - {""} else f"{recipe}: "
        return f"{place}{name}: there is no such option{meant(nearest(name, _names(everything, key)), '')}"
    if not key:
        return " ".join(said.replace("Problems parsing config", f"{recipe} cannot be read").split())
    found, option = re.findall(r"(?:Got value|Given value): (.*)", said), find(key, everything)
    place = "--" if key in given else f"{recipe}: "
    if "Unable to load config" in said:
        return f"{place}{key}: there is no YAML file {re.findall('Unable to load config .(.*?).(?:$|:)', said, re.M)[-1]}"
    takes = option.expected if isinstance(option, Option) else "a mapping of its options, or a YAML file"
    return f"{place}{key} is {found[-1] if found else 'unusable'}; expected {takes}"


def _names(everything: Section, key: str) -> list[str]:
    """The names that could be meant under a key: of all options, and of a mapping in its list."""
    names = [option.name for option in everything.every()]
    option = find(key, everything) if key else None
    inner = typing.get_args(option.type) if isinstance(option, Option) else ()
    mappings = [cls for cls in inner if dataclasses.is_dataclass(cls)]
    return names + [f"{key}.{f.name}" for cls in mappings for f in dataclasses.fields(cls)]
