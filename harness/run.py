"""Everything from one command.

    python harness/run.py                                    the miniature study, on a laptop
    python harness/run.py --config RECIPE --section.option value ...
    torchrun --nproc-per-node 8 harness/run.py --config RECIPE ...       on eight processes
    python harness/run.py study NAME                         a toy study of a paper; without NAME it lists them
    python harness/run.py --config RECIPE --dry_run [--world_size 8]     checks and reckons, loads and writes nothing
    python harness/run.py tax REFERENCE MODEL...             what any models or runs forgot against the first of them
    python harness/run.py generate MODEL PROMPTS --format F  a model's answers, for AlpacaEval, Arena-Hard, WildBench and judge
    python harness/run.py judge BASELINE ANSWERS...          whose answers a judge prefers
    python harness/run.py separation MODEL... --data_dir F   how far apart models put behaviours, before and after
    python harness/run.py pairs ROWS --chosen A --rejected B pairs out of models' own samples, scored by a rule
    python harness/run.py sentiment --data_dir FOLDER        tweets as preference pairs in one style, for recipe gpt2_sentiment

World or data -> tokenizer -> supervised stage -> every method from the same start -> evaluation of every epoch -> report.
Stages meet in the study's directory alone; a finished one is skipped, an interrupted one continues.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads cost several times on shared cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names would hide libraries

from harness.config import Config, command

FIRST = os.environ.get("RANK", "0") == "0"
COMMANDS = {
    "study": "harness.study",
    "tax": "harness.compare",
    "generate": "harness.generate",
    "judge": "harness.judge",
    "pairs": "harness.on_policy",
    "separation": "harness.separate",
    "sentiment": "harness.sentiment",
}
"""First word of the command line -> the module whose `main` takes the words behind it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM outside of a training loop, which has its own way to stop."""

    signal = signal.SIGTERM


def terminated(*_: object) -> None:
    """A handler of SIGTERM."""
    raise Terminated


def main() -> int:
    """Run a command. 0: finished, or stopped by SIGTERM; 1: a mistake that a message explains; 130: Ctrl-C."""
    words = sys.argv[1:]
    try:
        if not words or words[0].startswith("-"):
            asked = command(words)
            if asked.dry_run:
                from harness.dry_run import dry_run

                if FIRST:
                    dry_run(asked.config, asked.world_size)
            else:
                run(asked.config)
        elif words[0] in COMMANDS:
            importlib.import_module(COMMANDS[words[0]]).main(words[1:])
        else:
            raise ValueError(f"there is no command {words[0]!r}; expected one of {', '.join(COMMANDS)}, or options, see --help")
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


def run(config: Config) -> None:
    """All seeds of a study, then its report. Every process of a launcher runs this."""
    import transformers  # seconds, which other commands need not wait for

    from harness.guard import locked
    from harness.ranks import join, leave
    from harness.stages import SeedStudy, device_name, record

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ranks, device = join(device_name(config.device))
    ranks.tell(lambda: record(config.study.directory, config))
    for seed in config.study.seeds:
        with ExitStack() as stack:  # the first process holds the folder for all
            ranks.tell(lambda folder=config.study.directory / f"seed-{seed}": stack.enter_context(locked(folder)))
            study = SeedStudy(config, seed, ranks, device)
            study.prepare()
            study.supervised()
            for spec in study.specs:
                study.method(spec)
    ranks.tell(lambda: report(config))
    leave(ranks)


def report(config: Config) -> None:
    """Tables and figures of what has been evaluated."""
    from harness.gaps import write_gaps
    from harness.methods import METHODS
    from harness.report import print_gaps, print_table, write_report

    if all(METHODS[name].reward for name in config.methods):
        print(f"no report, since reward models answer no questions; see metrics.jsonl in {config.study.directory}")
    elif config.evals.tasks or config.evals.lm_eval_tasks:
        print_table(write_report(config.study.directory, config.report))
    else:
        print(f"no report, since no benchmark was asked for (evals.tasks, evals.lm_eval_tasks); see {config.study.directory}")
        if (joint := write_gaps(config.study.directory)) is not None:
            print_gaps(joint, config.study.directory / "gaps.md")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    status = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the others may be dead, and taking down connections would wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
