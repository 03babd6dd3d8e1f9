"""Everything from one command: `ogdopt`, or `torchrun harness/run.py` on several processes.

    ogdopt                                        the miniature study, on a laptop
    ogdopt run --config RECIPE --section.option value ...        a study; `run` may be left out
    torchrun --nproc-per-node 8 harness/run.py --config RECIPE ...       on eight processes
    ogdopt study NAME                             a toy study of a paper; without NAME it lists them
    ogdopt run --config RECIPE --dry_run [--world_size 8]        checks and reckons, loads and writes nothing
    ogdopt tax REFERENCE MODEL...                 what any models or runs forgot against the first of them
    ogdopt generate MODEL PROMPTS --format F      a model's answers, for AlpacaEval, Arena-Hard, WildBench and judge
    ogdopt judge BASELINE ANSWERS...              whose answers a judge prefers
    ogdopt separation MODEL... --data_dir F       how far apart models put behaviours, before and after
    ogdopt pairs ROWS --chosen A --rejected B     pairs out of models' own samples, scored by a rule
    ogdopt sentiment --data_dir FOLDER            tweets as preference pairs in one style, for recipe gpt2_sentiment

In a clone, `python harness/run.py` is the same command.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from ogdopt_harness.common.process import FIRST, SEVERAL

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads cost several times on shared cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

COMMANDS = {
    "run": "ogdopt_harness.commands.run",
    "study": "ogdopt_harness.commands.study",
    "tax": "ogdopt_harness.commands.tax",
    "generate": "ogdopt_harness.commands.generate",
    "judge": "ogdopt_harness.commands.judge",
    "pairs": "ogdopt_harness.commands.pairs",
    "separation": "ogdopt_harness.commands.separation",
    "sentiment": "ogdopt_harness.commands.sentiment",
}
"""First word of the command line -> the module whose `main` takes the words behind it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM outside of a training loop, which has its own way to stop."""

    signal = signal.SIGTERM


def terminated(*_: object) -> None:
    """A handler of SIGTERM."""
    raise Terminated


def answer() -> int:
    """Run the command of `sys.argv` and return its exit status.

    0: finished, or stopped by SIGTERM; 1: a mistake that a message explains; 130: Ctrl-C.
    """
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        words = ["run", *words]
    try:
        if words[0] not in COMMANDS:
            raise ValueError(f"there is no command {words[0]!r}; expected one of {', '.join(COMMANDS)}, or options, see --help")
        importlib.import_module(COMMANDS[words[0]]).main(words[1:])
    except ValueError as error:
        if os.environ.get("OGDOPT_TRACEBACK"):
            raise
        if str(error):  # else another process says it
            print(f"\nerror: {error}\n(OGDOPT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        if FIRST:
            text = str(stopped) or "What was finished is kept"
            print(f"\nstopped. {text}; the same command goes on from here.", file=sys.stderr)
        return 0 if getattr(stopped, "signal", signal.SIGINT) == signal.SIGTERM else 130
    return 0


def main() -> None:
    """Be the process of a command: stop in order on SIGTERM, end with the command's status."""
    signal.signal(signal.SIGTERM, terminated)
    status = answer()
    if SEVERAL:  # the others may be dead, and taking down connections would wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
