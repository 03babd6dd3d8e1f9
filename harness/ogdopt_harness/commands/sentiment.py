"""Rows of the sentiment experiment, for training in one style: `ogdopt sentiment --data_dir FOLDER --style STYLE`."""

from __future__ import annotations

from collections.abc import Sequence

import jsonargparse

from ogdopt_harness.studies.sentiment_lab import write_pairs


def main(argv: Sequence[str]) -> None:
    """Write the rows of the sentiment experiment."""
    jsonargparse.auto_cli(write_pairs, args=list(argv), as_positional=False)
