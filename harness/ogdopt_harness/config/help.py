"""What --help says: a page for a command, and one for each section of a study's options."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ogdopt_harness.config.command_line import Usage
from ogdopt_harness.config.options import Option, Section, meant, nearest

COLUMN = 18
"""Where the second column begins."""


def width() -> int:
    """Columns of a page: the terminal's, from 60 to 100."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, 60), 100)


def rows(pairs: Iterable[tuple[str, str]], column: int = COLUMN) -> Iterator[str]:
    """Two columns; a first cell that is too long has a line of its own."""
    for name, text in pairs:
        lines = textwrap.wrap(text, width() - column - 2) or [""]
        first = f"  {name:<{column - 2}}  "
        if len(name) > column - 2:
            yield f"  {name}"
            first = " " * (column + 2)
        yield (first + lines[0]).rstrip()
        yield from (" " * (column + 2) + line for line in lines[1:])


def paragraph(text: str) -> str:
    """Text in lines that fit."""
    return textwrap.fill(" ".join(text.split()), width())


def shown(value: Any) -> str:
    """A default value as it would be written."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)):
        return str(value).replace("'", "")
    return "null" if value is None else str(value)


def listed(options: Iterable[Option]) -> Iterator[str]:
    """Every option: its name, what it takes, its default, and below them what it is for."""
    for option in options:
        value = "" if option.default is dataclasses.MISSING else f"[{shown(option.default)}]"
        words = [f"  --{option.name}", option.metavar, value]
        kept = next(n for n in (3, 2, 1) if n == 1 or len(" ".join(words[:n])) < width())
        yield " ".join(words[:kept]).rstrip()
        text = " ".join([*words[kept:], option.help]).strip()
        yield from textwrap.wrap(text, width(), initial_indent=" " * 6, subsequent_indent=" " * 6)


def counted(part: Section) -> str:
    """A section in a line: its caption, cut to a line, and how many options it has."""
    number = sum(1 for _ in part.every())
    room = width() - COLUMN - 2
    end = f" ({number})"
    first = part.caption.partition(". ")[0].partition(": ")[0].partition("; ")[0]
    return textwrap.shorten(first, room - len(end), placeholder=" ...") + end


def page(usage: Usage, word: str | None = None) -> str:
    """The help of a command, or of one of its sections, or of all options whose names hold a word ("all": all).

    Raises ValueError for a word that is in none.
    """
    everything = usage.everything
    if word is not None:
        return "\n".join(_part(usage, everything, word.removeprefix("--")))
    called = textwrap.wrap(f"usage: {usage.line} [--OPTION VALUE ...]", width(), subsequent_indent=" " * 7)
    lines = [*called, "", paragraph(usage.summary), ""]
    lines += [*rows((p.name.upper(), p.help) for p in usage.places), ""] if usage.places else []
    if everything.sections:
        lines += ["options:", *rows((f"--{o.name}", _short(o.help)) for o in everything.options), ""]
        lines += [f"sections of options (`ogdopt {usage.name} --help SECTION` lists them):"]
        lines += [*rows((part.name, counted(part)) for part in everything.sections), ""]
    else:
        lines += ["options [default]:", *listed(everything.options), ""]
    if usage.examples:
        lines += ["examples:", *(f"  {line}" for line in usage.examples)]
    return "\n".join(lines).rstrip()


def _short(text: str) -> str:
    """The first sentence or clause of a help text, for a page that has the whole text elsewhere."""
    first = text.partition(". ")[0].partition("; ")[0].rstrip(".")
    return textwrap.shorten(first, 2 * (width() - COLUMN - 4), placeholder=" ...")


def _part(usage: Usage, everything: Section, word: str) -> Iterator[str]:
    """The sections under a name, or the options whose names hold the word."""
    parts = [part for part in everything.walk() if part.name == word or part.name.startswith(word + ".")]
    if word == "all":
        parts = list(everything.walk())
    if parts:
        for part in parts:
            yield from (paragraph(f"{part.name or 'options'}: {part.caption}"), *listed(part.options), "")
        return
    found = [option for option in everything.every() if word in option.name]
    if not found:
        names = [*(part.name for part in everything.walk() if part.name), *(option.name for option in everything.every())]
        raise ValueError(
            f"--help {word}: no section or option is called so{meant(nearest(word, names), '')}\n"
            f"(`ogdopt {usage.name} --help` lists the sections)"
        )
    yield from listed(found)


def front(summaries: Mapping[str, str], version: str) -> str:
    """The help of `ogdopt` itself."""
    lines = [
        "usage: ogdopt COMMAND [WORD ...] [--OPTION VALUE ...]",
        "",
        paragraph(f"Preference tuning that does not forget, and what it costs: ogdopt {version}."),
        "",
        "commands (`ogdopt COMMAND --help` says more):",
        *rows(((name, text.partition(". ")[0].rstrip(".")) for name, text in summaries.items()), 14),
        "",
        "Without a command, options are those of `run`. Several processes:",
        "  torchrun --nproc-per-node 8 -m ogdopt_harness run --config RECIPE ...",
        "",
        "options:",
        *rows([("--help, -h", "this page"), ("--version", "the version")], 14),
        "",
        "Exit status: 0 finished, or stopped by SIGTERM; 2 a mistake that the message",
        "explains; 130 Ctrl-C. OGDOPT_TRACEBACK=1 shows where a mistake was found.",
    ]
    return "\n".join(lines)
