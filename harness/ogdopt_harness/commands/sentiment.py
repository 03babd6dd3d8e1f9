"""Rows of the sentiment experiment, for training in one style: `ogdopt sentiment --data_dir FOLDER --style STYLE`."""

from __future__ import annotations

from ogdopt_harness.config.commands import SentimentConfig
from ogdopt_harness.studies.sentiment_lab import write_pairs


def main(config: SentimentConfig) -> None:
    """Write the rows of the sentiment experiment."""
    write_pairs(config.data_dir, config.style, config.output_dir)
