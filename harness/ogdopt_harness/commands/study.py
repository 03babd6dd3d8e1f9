"""One toy study of a paper from the command line: `ogdopt study NAME [--output_dir DIR] [--seeds 0,1,2,3,4]`.

A study is one file in `studies/` with a function `study(seeds, ...) -> Findings`. One that reads data has the parameter
`data_dir` too.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.text import Text

from ogdopt_harness.analysis import claims
from ogdopt_harness.commands.usage import toy_list, toys
from ogdopt_harness.common.tables import Table
from ogdopt_harness.config.commands import ToyConfig, ToyDataConfig
from ogdopt_harness.reporting.figures import PAPER

PACKAGES = ("torch", "numpy")


def main(config: ToyConfig, name: str | None) -> None:
    """Run a study, print its tables and verdicts, and write them to its folder; without a name list the studies."""
    if name is None:
        print(f"usage: ogdopt study NAME [--OPTION VALUE ...]\n\n{toy_list()}")
        return
    run(name, toys()[name][0], config)


def run(name: str, title: str, config: ToyConfig) -> None:
    """Run one study."""
    module = importlib.import_module(f"ogdopt_harness.studies.{name}")
    folder = Path(config.output_dir or f"runs/studies/{name}")
    options = {"data_dir": config.data_dir} if isinstance(config, ToyDataConfig) else {}
    began = time.perf_counter()
    with matplotlib.rc_context(PAPER):
        found = module.study(config.seeds, **options)
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
        facts = {
            "command": shlex.join(sys.argv),
            "seconds": round(time.perf_counter() - began, 1),
            "versions": f"Python {platform.python_version()}, {versions}",
            "machine": platform.machine(),
        }
        verdicts = claims.write(folder, name, title.rstrip("."), found, facts)
    show([*found.tables, verdicts], found.notes, Console())
    print(f"{folder / 'study.md'} ({facts['seconds']} s)")


def show(tables: Sequence[Table], notes: Sequence[str], console: Console) -> None:
    """Print tables and notes on the terminal."""
    for note in notes:
        console.print(Text(note), "")
    for table in tables:
        table.show(console)
        console.print(Text(table.note), "", sep="\n")
