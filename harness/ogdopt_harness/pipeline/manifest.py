"""What a directory was made with: settings, versions, machine, commit and command, in its config.yaml."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ogdopt_harness.common.run_folder import Folder
from ogdopt_harness.config.schema import as_dict

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval", "numpy", "safetensors")


def record(directory: Path, config: Any, facts: dict[str, Any] | None = None) -> None:
    """Write `config.yaml` before anything else happens in a directory.

    Raises ValueError if a run there was made with other settings, naming them: results of two recipes are not mixed.
    """
    plain = (
        as_dict(config)
        if dataclasses.is_dataclass(config)
        else {k: as_dict(v) if dataclasses.is_dataclass(v) else v for k, v in config.items()}
    )
    home = Folder(directory)
    if facts and home.config.is_file():
        before = home.settings()["config"]
        changed = [f"{key} was {old!r} and is {new!r}" for key, old, new in differences(before, plain)]
        if changed:
            raise ValueError(
                f"{directory} was made with other settings: {'; '.join(changed)}. Choose another directory "
                "(--study.output_dir, or --output_dir of generate), or delete that folder to make it again"
            )
        return
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    machine = f"{platform.machine()}, {torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    value = {"run": facts} if facts else {}
    value |= {"config": plain, "versions": versions, "machine": machine, "git": _git(), "command": shlex.join(sys.argv)}
    home.write_settings(value)


def differences(before: Any, after: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every setting that differs.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    [('a.c', 2, 3)]
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(k for k in after if k not in before)]
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{path}.{k}".lstrip("."))]
    return [] if before == after else [(path, before, after)]


def _git() -> str:
    """The commit of this code, with a + if files differ from it; "unknown" where this package lies in no checkout of its own.

    An installation inside a user's repository (as in `project/.venv`) is not told by that repository's commit.
    """
    package = Path(__file__).resolve().parent.parent
    root = package.parent.parent
    own = package.relative_to(root) / "cli.py"

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root or not git("ls-files", "--", str(own)):
            return "unknown"
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
