"""Everything from one command: `ogdopt COMMAND`, or `torchrun harness/run.py` on several processes; `ogdopt --help` lists all.

ogdopt run                                    the miniature study, on a laptop
ogdopt run --config RECIPE --section.option value ...        a study; `run` may be left out before options
torchrun --nproc-per-node 8 harness/run.py --config RECIPE ...       on eight processes, in a clone
torchrun --nproc-per-node 8 -m ogdopt_harness --config RECIPE ...    the same of an installation
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Sequence

from ogdopt_harness.common.crash import of_memory, of_system, unexpected
from ogdopt_harness.common.process import FIRST, SEVERAL

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads cost several times on shared cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
UNEXPECTED = 1
MISTAKE = 2
"""Exit status for what a message explains: argparse's, of which launchers and shells know it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM outside of a training loop, which has its own way to stop."""

    signal = signal.SIGTERM


def terminated(*_: object) -> None:
    """A handler of SIGTERM."""
    raise Terminated


def command(words: Sequence[str]) -> None:
    """Do what the words ask for. Raises ValueError for a mistake of them or of what they name."""
    from ogdopt_harness.commands.usage import USAGES, asked
    from ogdopt_harness.config.options import meant, nearest

    name, *rest = words or ["--help"]
    if name in ("-h", "--help", "help", "--version"):
        print(version() if name == "--version" else front())
        return
    if name.startswith("-"):
        name, rest = "run", list(words)
    if name not in USAGES:
        raise ValueError(f"there is no command {name!r}{meant(nearest(name, USAGES), '')} (`ogdopt --help` lists them)")
    if any(word in ("-h", "--help") for word in rest):
        print(help_of(name, rest))
        return
    options, places = asked(name, rest)
    importlib.import_module(f"ogdopt_harness.commands.{name}").main(options, **places)


def version() -> str:
    """The version, as it was installed."""
    try:
        return f"ogdopt {importlib.metadata.version('ogdopt')}"
    except importlib.metadata.PackageNotFoundError:
        return "ogdopt, not installed"


def front() -> str:
    """The page of `ogdopt --help`."""
    from ogdopt_harness.commands.usage import USAGES
    from ogdopt_harness.config.help import front

    return front({name: usage.summary for name, usage in USAGES.items()}, version().partition(" ")[2])


def help_of(name: str, words: Sequence[str]) -> str:
    """The page of a command, or of the section that is named after --help."""
    from ogdopt_harness.commands.usage import USAGES, toy_list, toy_usage
    from ogdopt_harness.config.help import page

    at = next(k for k, word in enumerate(words) if word in ("-h", "--help"))
    if name == "study":
        return page(toy_usage(words[0])) if at else f"{page(USAGES[name])}\n\nstudies:\n{toy_list()}"
    return page(USAGES[name], next(iter(words[at + 1 : at + 2]), None))


def answer(words: Sequence[str]) -> int:
    """Run a command and return its exit status.

    0: finished, or stopped by SIGTERM; 2: a mistake that a message explains; 1: a mistake of ours, its traceback saved;
    130: Ctrl-C.
    """
    try:
        command(words)
    except ValueError as error:
        if os.environ.get("OGDOPT_TRACEBACK"):
            raise
        if str(error):  # else another process says it
            print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except BrokenPipeError:  # whoever read the output, as `head` does, has had enough of it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it is open until the process ends
        return 0
    except (OSError, MemoryError) as error:
        if os.environ.get("OGDOPT_TRACEBACK"):
            raise
        print(f"error: {of_system(error) if isinstance(error, OSError) else of_memory(error)}", file=sys.stderr)
        return MISTAKE
    except Exception as error:
        if os.environ.get("OGDOPT_TRACEBACK"):
            raise
        print(f"error: {unexpected(error)}", file=sys.stderr)
        return UNEXPECTED
    except KeyboardInterrupt as stopped:
        if FIRST:
            text = str(stopped) or "What was finished is kept"
            print(f"\nstopped. {text}; the same command goes on from here.", file=sys.stderr)
        return 0 if getattr(stopped, "signal", signal.SIGINT) == signal.SIGTERM else 130
    return 0


def main(default: str | None = None) -> None:
    """Be the process of a command: stop in order on SIGTERM, end with the command's status.

    `default` is the command of a command line without words.
    """
    signal.signal(signal.SIGTERM, terminated)
    status = answer(sys.argv[1:] or ([default] if default else []))
    if SEVERAL:  # the others may be dead, and taking down connections would wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
