"""The report of a study from its folder: `ogdopt report DIRECTORY`. It reads what the study has written, and loads no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ogdopt_harness.analysis.study_reader import read_study
from ogdopt_harness.common.run_folder import StudyFolder
from ogdopt_harness.config.commands import ReportOptions
from ogdopt_harness.reporting.joint import write_gaps
from ogdopt_harness.reporting.page import print_gaps, print_table, settings_of, write_report


def main(config: ReportOptions, directory: str) -> None:
    """Write report.html, report.md and the figures again, and print the comparison.

    Raises ValueError for a folder that is no study's, and for one without any evaluation.
    """
    folder = StudyFolder(Path(directory))
    if not folder.config.is_file():
        raise ValueError(f"report: {directory} is no study's folder (it has no config.yaml); e.g. ogdopt report runs/miniature")
    runs = (run for seed in folder.seeds() for run in (seed.supervised, *seed.runs()))
    if not any(run.evaluations() for run in runs):
        if (joint := write_gaps(folder.path)) is None:
            raise ValueError(f"report: {directory} has no evaluation yet (seed-<k>/<run>/evals/epoch-<n>.json)")
        print_gaps(joint, folder.gaps)
        return
    given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    print_table(write_report(folder.path, dataclasses.replace(settings_of(read_study(folder.path)), **given)))
