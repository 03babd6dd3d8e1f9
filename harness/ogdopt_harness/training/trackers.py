"""Experiment trackers by name, through accelerate's: every line of metrics.jsonl is logged to them.

`metrics.jsonl` is what everything else reads; a tracker gets a copy. A resumed run logs the steps after its checkpoint once
more, and TensorBoard drops the first time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState, tracking
from accelerate.utils import is_tensorboard_available

from ogdopt_harness.common.keys import STEP

AUTO, NONE = "auto", "none"
NAMED = ("wandb", "trackio")
"""Trackers that have a project and a name for the run in it."""


def chosen(report_to: Sequence[str]) -> list[str]:
    """The trackers that `report_to` asks for: auto is TensorBoard where it is installed, none is nothing.

    Raises ValueError for an unknown one, for one that is not installed, and for none among others.
    """
    if NONE in report_to and len(report_to) > 1:
        raise ValueError(f"report_to is {list(report_to)}; expected none alone, or names of trackers")
    found = []
    for name in report_to:
        if name == AUTO:
            found += ["tensorboard"] if is_tensorboard_available() else []
        elif name != NONE:
            if name not in tracking.LOGGER_TYPE_TO_CLASS:
                known = ", ".join(map(str, tracking.LOGGER_TYPE_TO_CLASS))
                raise ValueError(f"report_to names {name!r}; expected {AUTO}, {NONE} or trackers out of {known}")
            if name not in tracking.get_available_trackers():
                raise ValueError(f"report_to names {name!r}, which is not installed; pip install {name}, or leave it out")
            found.append(name)
    return list(dict.fromkeys(found))


class Trackers:
    """The trackers of one run, begun at its first line. `project` is the study's name, `run` the run's place in it."""

    def __init__(self, names: Sequence[str], project: str, run: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self.names, self.project, self.run, self.folder = names, project, run, folder
        self.settings = dict(flat(settings))
        self.begun: list[Any] | None = None

    def log(self, line: Mapping[str, float]) -> None:
        """Log a line to all of them, under its step; what is no finite number is left out."""
        step = int(line[STEP])
        if self.begun is None:
            self.begun = [self._begin(name, step) for name in self.names]
        values = {name: float(x) for name, x in line.items() if name != STEP and math.isfinite(x)}
        for tracker in self.begun:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Close all of them."""
        for tracker in self.begun or []:
            tracker.finish()

    def _begin(self, name: str, step: int) -> Any:
        PartialState()  # whose absence the trackers' own log messages take for a mistake
        kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        options: dict[str, Any] = {"name": self.run} if name in NAMED else {}
        if name == "tensorboard":
            tracker = kind(name, self.folder, purge_step=step)  # its files lie in <run>/tensorboard
        elif kind.requires_logging_directory:
            tracker = kind(self.project, self.folder, **options)
        else:
            tracker = kind(self.project, **options)
        tracker.main_process_only = False  # whoever calls this is the first process
        tracker.start()
        if name != "tensorboard":  # which would open a folder more for them
            tracker.store_init_configuration(self.settings)
        return tracker


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str | int | float | bool]]:
    """Nested settings as (dotted name, plain value).

    >>> flat({"a": {"b": 1}, "c": [1, 2], "d": None})
    [('a.b', 1), ('c', '[1, 2]'), ('d', 'None')]
    """
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value if isinstance(value, (str, int, float, bool)) else str(value)))
    return found
