"""Every option of a study with values of every kind, through the command line and the dry run."""

import dataclasses
import random
import typing

from ogdopt_harness.commands.dry_run import dry_run
from ogdopt_harness.commands.usage import parse
from ogdopt_harness.config.schema import Config

from . import Found, attempt

VALUES = [
    "-1",
    "0",
    "1",
    "-7",
    "1000000",
    "99999999999999999999",
    "1e308",
    ".nan",
    ".inf",
    "",
    "null",
    "[]",
    "{a: 1}",
    "nonsense",
]
BASE = {
    "methods": "sft,dpo,ogd,alright",
    "world.people": "6",
    "world.sft_conversations": "1000",
    "world.preference_pairs": "40",
    "world.held_out_pairs": "8",
    "world.items": "8",
    "sft.max_steps": "2",
    "preference.max_steps": "2",
    "report_to": "none",
}
"""A study that is checked in a second."""


def options(kind=Config, prefix=""):
    """(dotted name, type) of every option, sections left out."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        section = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if section is not None and typing.get_origin(hint) is not list:
            yield from options(section, f"{name}.")
        else:
            yield name, hint


def numeric(hint):
    """Whether a type holds numbers."""
    return hint in (int, float) or any(numeric(t) for t in typing.get_args(hint))


def cases():
    """All (option, value)."""
    return [(name, value) for name, _ in options() for value in VALUES]


def words(changes):
    """The command line of the small study with these options."""
    return ["--config", "miniature", *(word for name, value in {**BASE, **changes}.items() for word in (f"--{name}", value))]


def tried(name, value, folder, seconds=60.0):
    """How one option with one value ends in the dry run."""
    changes = {name: value} | ({} if name == "study.output_dir" else {"study.output_dir": str(folder)})

    def work():
        dry_run(parse(words(changes)), 1)

    section, _, last = name.rpartition(".")
    return attempt(work, (name, last, *([section] if "." in section else [])), seconds)


def search(folder, sample=None, seed=0, say=None):
    """Try all, or a sample drawn with `seed`."""
    found = Found("options")
    every = cases()
    for name, value in every if sample is None else random.Random(seed).sample(every, sample):
        ended, text = tried(name, value, folder)
        found.add(f"--{name} {value!r}", ended, text)
        if say is not None:
            say(f"{name} {value!r}: {ended}")
    return found


def without_range():
    """Numeric options that the table of ranges does not hold, and entries of no option."""
    from ogdopt_harness.config import ranges

    missing = []

    def walk(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint = hints[field.name]
            for inner in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(inner):
                    walk(inner)
            if numeric(hint) and field.name not in ranges.ranges_of(kind):
                missing.append(f"{kind.__name__}.{field.name}")
        names = {field.name for field in dataclasses.fields(kind)}
        missing.extend(f"{kind.__name__}.{name} is no option" for name in ranges.ranges_of(kind) if name not in names)

    from ogdopt_harness.commands.usage import USAGES

    for kind in {usage.options for usage in USAGES.values()} | {usage.apart for usage in USAGES.values() if usage.apart}:
        walk(kind)
    return missing
