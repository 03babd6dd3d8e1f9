"""A study from one command.

    python harness/run.py                                    the miniature study, on a laptop
    python harness/run.py --config RECIPE --section.option value ...
    torchrun --nproc-per-node 8 harness/run.py --config RECIPE ...       on eight processes
    python harness/run.py --config RECIPE --dry_run [--world_size 8]     checks and reckons, loads and writes nothing

World or data -> tokenizer -> supervised stage -> every method from the same start -> evaluation of every epoch -> report.
Stages meet in the study's directory alone; a finished one is skipped, an interrupted one continues.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads cost several times on shared cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names would hide libraries

import transformers

from harness.config import Config, command
from harness.dry_run import dry_run
from harness.guard import locked
from harness.progress import Stopped
from harness.ranks import FailedElsewhere, Ranks, join, leave
from harness.report import print_table, write_report
from harness.stages import SeedStudy, device_name, record


def main() -> int:
    """Run a study. 0: finished, or saved and stopped by SIGTERM; 1: a mistake that a message explains; 130: Ctrl-C."""
    asked = command()
    try:
        if asked.dry_run:
            if int(os.environ.get("RANK", "0")) == 0:
                dry_run(asked.config, asked.world_size)
        else:
            run(asked.config)
    except FailedElsewhere:
        return 1
    except ValueError as error:
        if os.environ.get("OGDOPT_TRACEBACK"):
            raise
        print(f"\nerror: {error}\n(OGDOPT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Stopped) as stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            text = stopped or "What was finished is kept"
            print(f"\nstopped. {text}; the same command goes on from here.", file=sys.stderr)
        return 0 if isinstance(stopped, Stopped) and stopped.signal == signal.SIGTERM else 130
    return 0


def run(config: Config) -> None:
    """All seeds of a study, then its report. Every process of a launcher runs this."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ranks, device = join(device_name(config.device))
    ranks.tell(lambda: record(config.study.directory, config))
    for seed in config.study.seeds:
        with held(config.study.directory / f"seed-{seed}", ranks):
            study = SeedStudy(config, seed, ranks, device)
            study.prepare()
            study.supervised()
            for spec in study.specs:
                study.method(spec)
    ranks.tell(lambda: report(config))
    leave(ranks)


@contextmanager
def held(folder: Path, ranks: Ranks) -> Iterator[None]:
    """A folder that no other run may use meanwhile; the first process holds it for all."""
    with ExitStack() as stack:
        ranks.tell(lambda: stack.enter_context(locked(folder)))
        yield


def report(config: Config) -> None:
    """Tables and figures of what has been evaluated."""
    if config.evals.tasks or config.evals.lm_eval_tasks:
        print_table(write_report(config.study.directory, config.report))
    else:
        print(f"no report, since no benchmark was asked for (evals.tasks, evals.lm_eval_tasks); see {config.study.directory}")


def leave_at_once(code: int) -> None:
    """End a process of several without waiting: the others may have died, and their connections with them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    status = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave_at_once(status)
    sys.exit(status)
