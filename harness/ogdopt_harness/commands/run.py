"""A study from the command line: `ogdopt run [--config RECIPE] [--section.option value ...]`.

World or data -> tokenizer -> supervised stage -> every method from the same start -> evaluation of every epoch -> report.
Stages meet in the study's directory alone; a finished one is skipped, an interrupted one continues.
"""

from __future__ import annotations

from contextlib import ExitStack

from ogdopt_harness.commands.usage import Asked
from ogdopt_harness.common.process import FIRST
from ogdopt_harness.common.run_folder import StudyFolder
from ogdopt_harness.config.schema import Config


def main(asked: Asked) -> None:
    """Run what is asked for, or, with --dry_run, say what it would take."""
    if asked.note and FIRST:
        print(asked.note, flush=True)
    if not asked.dry_run:
        run(asked.config)
        return
    from ogdopt_harness.commands.dry_run import dry_run

    if FIRST:
        dry_run(asked.config, asked.world_size)


def run(config: Config) -> None:
    """All seeds of a study, then its report. Every process of a launcher runs this."""
    import transformers  # seconds, which other commands need not wait for

    from ogdopt_harness.common.device import device_name
    from ogdopt_harness.common.ranks import join, leave
    from ogdopt_harness.pipeline.guard import locked
    from ogdopt_harness.pipeline.manifest import record
    from ogdopt_harness.pipeline.preflight import preflight
    from ogdopt_harness.pipeline.stages import SeedStudy

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ranks, device = join(device_name(config.device))
    folder = StudyFolder(config.study.directory)
    ranks.on_first(lambda: preflight(config, device))
    ranks.on_first(lambda: record(folder.path, config))
    for seed in config.study.seeds:
        with ExitStack() as stack:  # the first process holds the folder for all
            ranks.on_first(lambda seed=seed: stack.enter_context(locked(folder.seed(seed))))
            study = SeedStudy(config, seed, ranks, device)
            study.prepare()
            study.supervised()
            for spec in study.specs:
                study.method(spec)
    ranks.on_first(lambda: report(config))
    leave(ranks)


def report(config: Config) -> None:
    """Tables and figures of what has been evaluated."""
    from ogdopt_harness.reporting.joint import write_gaps
    from ogdopt_harness.reporting.page import print_gaps, print_table, write_report
    from ogdopt_harness.training.methods import METHODS

    if all(METHODS[name].reward for name in config.methods):
        print(f"no report, since reward models answer no questions; see metrics.jsonl in {config.study.directory}")
    elif config.evals.tasks or config.evals.lm_eval_tasks:
        print_table(write_report(config.study.directory, config.report))
    else:
        print(f"no report, since no benchmark was asked for (evals.tasks, evals.lm_eval_tasks); see {config.study.directory}")
        if (joint := write_gaps(config.study.directory)) is not None:
            print_gaps(joint, StudyFolder(config.study.directory).gaps)
