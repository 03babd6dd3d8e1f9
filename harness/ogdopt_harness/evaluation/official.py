"""Official tasks of lm-eval: which ones, which of their metrics is the accuracy, and where they read their data from.

A task's definition (prompts, choices, metrics) stays lm-eval's own. Only the place of its data may be another: a folder of data
sets laid out as on the hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import lm_eval.tasks
from datasets import config as datasets_config
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml  # private; tests/test_lm_evals.py notices if it moves


class Official(NamedTuple):
    """An official task: its folder in lm_eval/tasks, what it measures, the metric that is its accuracy."""

    folder: str
    family: str
    metric: str = "acc"
    filter: str = "none"


OFFICIAL = {
    "piqa": Official("piqa", "commonsense", "acc_norm"),
    "social_iqa": Official("siqa", "commonsense"),
    "hellaswag": Official("hellaswag", "commonsense", "acc_norm"),
    "arc_easy": Official("arc", "commonsense"),
    "arc_challenge": Official("arc", "commonsense", "acc_norm"),
    "mmlu": Official("mmlu/default", "knowledge"),
    "gsm8k": Official("gsm8k", "math", "exact_match", "flexible-extract"),
    "boolq": Official("super_glue/boolq", "reading"),
}
"""The paper's tasks, each with its customary metric; GSM8k's strict match requires "#### 42", which nobody says unasked."""


@lru_cache(maxsize=1)
def official_tasks(names: tuple[str, ...], data: str | None) -> dict[str, list[Task]]:
    """Each official name's tasks, one a stratum: 57 for "mmlu", one for most. Kept for the next evaluation.

    With `data`, data sets are read from `data/<hub id>` instead of the hub. Raises ValueError for a name that lm-eval does
    not know and for data that cannot be had.
    """
    if not names:
        return {}
    manager = task_manager(names)
    if unknown := [name for name in names if name not in manager.task_index]:
        raise ValueError(
            f"evals.lm_eval_tasks: lm-eval {version('lm_eval')} knows no task {', '.join(unknown)}; correct the name "
            "(`lm_eval ls tasks` lists them all)"
        )
    if data is not None:
        read_from(Path(data), manager)
    try:
        found = {name: list(manager.load([name])["tasks"].values()) for name in names}
    except Exception as error:  # datasets, huggingface_hub and pyarrow each raise their own kinds
        raise ValueError(
            f"evals.lm_eval_tasks: cannot load {', '.join(names)}: {type(error).__name__}: {error}; evaluate once with "
            "a network to fill the hub's cache, or name a folder of data sets in evals.lm_eval_data"
        ) from error
    leaves = [task.task_name for tasks in found.values() for task in tasks]
    if twice := {leaf for leaf in leaves if leaves.count(leaf) > 1}:
        raise ValueError(f"evals.lm_eval_tasks: {', '.join(sorted(twice))} would count twice; take one of the names out")
    return found


def task_manager(names: Sequence[str]) -> TaskManager:
    """An index of the folders that hold these tasks, or else of everything (14,000 files, ten seconds)."""
    folders = {OFFICIAL[known].folder for name in names if (known := "mmlu" if name.startswith("mmlu") else name) in OFFICIAL}
    here = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(include_defaults=False, include_path=[here / folder for folder in sorted(folders)])
    return manager if set(names) <= set(manager.task_index) else TaskManager()


def read_from(data: Path, manager: TaskManager) -> None:
    """Let the tasks of an index read their data sets from folders where these exist below `data`."""
    if not data.is_dir():
        raise ValueError(f"evals.lm_eval_data: no folder {data} (looked in {Path.cwd()}); correct the path")
    caches: dict[Path, str] = {}  # MMLU's subjects share a folder
    for name in manager.all_subtasks:
        entry = manager.task_index[name]
        config = load_yaml(entry.yaml_path) if entry.yaml_path else entry.cfg
        if config and "dataset_path" in config and (folder := data / config["dataset_path"]).is_dir():
            caches[folder] = caches.get(folder) or cache_of(folder)
            options = {**(config.get("dataset_kwargs") or {}), "cache_dir": caches[folder]}
            entry.cfg, entry.yaml_path = {**config, "dataset_path": str(folder), "dataset_kwargs": options}, None


def cache_of(folder: Path) -> str:
    """Where the library datasets keeps what it makes of a folder: its own cache knows folders by their last name alone.

    Another folder of that name, or other files in this one, would get the first one's rows.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
    return str(Path(datasets_config.HF_DATASETS_CACHE) / f"local-{digest}")
