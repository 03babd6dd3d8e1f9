"""A study from one command.

    python harness/run.py                                    the miniature study, on a laptop
    python harness/run.py --config RECIPE --section.option value ...
    python harness/run.py --config RECIPE --dry_run [--world_size 8]     checks and reckons, loads and writes nothing

World or data -> tokenizer -> supervised stage -> every method from the same start -> evaluation of every epoch -> report.
Stages meet in the study's directory alone; a finished one is skipped, an interrupted one continues.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads cost several times on shared cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names would hide libraries

import transformers

from harness.config import Config, command
from harness.dry_run import dry_run
from harness.report import print_table, write_report
from harness.stages import SeedStudy, record
from harness.train import Stopped


def main() -> int:
    """Run a study; 0 when it is finished, 1 for a mistake that a message explains, 130 when it was stopped."""
    try:
        asked = command()
        if asked.dry_run:
            dry_run(asked.config, asked.world_size)
        else:
            run(asked.config)
    except ValueError as error:
        if os.environ.get("OGDOPT_TRACEBACK"):
            raise
        print(f"\nerror: {error}\n(OGDOPT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Stopped) as stopped:
        print(f"\nstopped. {stopped or 'What was finished is kept'}; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def run(config: Config) -> None:
    """All seeds of a study, then its report."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this version trains in one process; start it with python instead of torchrun")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    record(config.study.directory, config)
    for seed in config.study.seeds:
        study = SeedStudy(config, seed)
        study.prepare()
        study.supervised()
        for spec in study.specs:
            study.method(spec)
    if config.evals.tasks or config.evals.lm_eval_tasks:
        print_table(write_report(config.study.directory, config.report))
    else:
        print(f"no report, since no benchmark was asked for (evals.tasks, evals.lm_eval_tasks); see {config.study.directory}")


if __name__ == "__main__":
    sys.exit(main())
