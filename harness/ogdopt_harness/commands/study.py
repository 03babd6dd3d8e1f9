"""One toy study of a paper from the command line: `python harness/run.py study NAME [--output_dir DIR] [--seeds 0,1,2,3,4]`.

A study is one file in `studies/` with a function `study(seeds, ...) -> Findings`, whose further parameters, if it has
any, are options too.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jsonargparse
import matplotlib
from rich.console import Console
from rich.text import Text

from ogdopt_harness.analysis import claims
from ogdopt_harness.common.tables import Table
from ogdopt_harness.config.schema import listed
from ogdopt_harness.reporting.figures import PAPER

FOLDER = Path(__file__).parent.parent / "studies"
PACKAGES = ("torch", "numpy")


def names() -> dict[str, str]:
    """The studies there are, and the first sentence of each."""
    files = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__" and not path.stem.endswith("_lab"))
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0] for path in files}


def main(argv: Sequence[str]) -> None:
    """Run a study, print its tables and verdicts, and write them to its folder. Raises ValueError for an unknown study."""
    name, *words = argv or [""]
    known = names()
    if name in ("-h", "--help"):
        print("usage: run.py study NAME [options of the study]\n" + listing(known))
        return
    if name not in known:
        what = f"there is no study {name!r}" if name else "the study's name is missing"
        raise ValueError(f"{what}; expected one of\n{listing(known)}")
    run(name, known[name], words)


def listing(known: Mapping[str, str]) -> str:
    """The studies, one a line."""
    width = max(map(len, known))
    return "\n".join(f"  {name:{width}}  {title}" for name, title in known.items())


def run(name: str, title: str, words: Sequence[str]) -> None:
    """Run one study with the options `words`."""
    module = importlib.import_module(f"ogdopt_harness.studies.{name}")
    parser = jsonargparse.ArgumentParser(prog=f"run.py study {name}", description=title)
    parser.add_argument("--output_dir", default=f"runs/studies/{name}", help="folder of the study's files")
    parser.add_function_arguments(module.study)
    given = vars(parser.parse_args(listed(words, {"--seeds"})))
    folder, seeds = Path(given.pop("output_dir")), given["seeds"]
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds is {seeds}; expected different non-negative integers, {claims.ENOUGH} or more for a verdict")
    began = time.perf_counter()
    with matplotlib.rc_context(PAPER):
        found = module.study(**given)
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
        console.print(table.terminal(), Text(table.note), "", sep="\n")
