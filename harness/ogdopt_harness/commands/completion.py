"""What makes a shell complete the command line: `ogdopt completion SHELL` prints a script."""

from __future__ import annotations

import argparse

from ogdopt_harness.commands.usage import USAGES, toy_usage, toys
from ogdopt_harness.config.command_line import Usage
from ogdopt_harness.config.commands import NoOptions
from ogdopt_harness.config.recipes import launch_files, recipes

SHELLS = ("bash", "zsh", "fish", "tcsh")
FILES = ("_dir", "_data", "path", "cache", "style", "style_prompts", "train", "eval")
"""Ends of the names of options that take files or folders."""


def main(config: NoOptions, shell: str) -> None:
    """Print the script of a shell. Raises ValueError for another shell, and where shtab is not installed."""
    if shell not in SHELLS:
        raise ValueError(f"completion: there is no script for {shell!r}; expected one of {', '.join(SHELLS)}")
    try:
        import shtab
    except ImportError as error:
        raise ValueError("completion needs the package shtab, which is not installed; pip install shtab") from error
    print(shtab.complete(parser(), shell))


def parser() -> argparse.ArgumentParser:
    """All commands and options as argparse has them, for completion alone."""
    found = argparse.ArgumentParser(prog="ogdopt")
    found.add_argument("--version", action="store_true")
    commands = found.add_subparsers(dest="command")
    for name, usage in USAGES.items():
        own = commands.add_parser(name, help=usage.summary.partition(". ")[0])
        if name == "study":
            each = own.add_subparsers(dest="study")
            for toy in toys():
                filled(each.add_parser(toy, help=toys()[toy][0]), toy_usage(toy))
        else:
            filled(own, usage)
    return found


def filled(found: argparse.ArgumentParser, usage: Usage) -> None:
    """Give a parser a command's options and places."""
    for option in usage.everything.every():
        choices = option.metavar[1:-1].split(",") if option.metavar.startswith("{") and ":" not in option.metavar else None
        known = list(recipes()) if option.name == "config" else choices
        place = found.add_argument(f"--{option.name}", choices=known, help=option.help.partition(". ")[0].replace("%", "%%"))
        if option.name.endswith(FILES) and not known:
            completes_files(place)
    for place in usage.places:
        names = {"recipes": [*recipes(), *launch_files()], "completion": SHELLS}.get(usage.name)
        word = found.add_argument(place.name, nargs="*" if place.many else "?", choices=names)
        if not names:
            completes_files(word)


def completes_files(action: argparse.Action) -> None:
    """Have the names of files offered for what an option or place takes."""
    import shtab

    action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
