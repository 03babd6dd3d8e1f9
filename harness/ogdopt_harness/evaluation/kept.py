"""Evaluations that are there already: what decides their numbers, as a fingerprint, and which of them still hold.

An evaluation with another fingerprint is kept next to the new one, `epoch-1.<fingerprint>.json`, and is used again when the
settings, files and versions are again its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ogdopt_harness.common.files import digest, read_json
from ogdopt_harness.config.schema import EvalConfig
from ogdopt_harness.modeling.fingerprint import fingerprint

FREE = ("batch_size", "device_map", "epochs")
"""Settings that decide what is computed when and where, and no answer."""
SCORERS = ("lm_eval", "transformers", "tokenizers", "torch", "datasets")
WORDS = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges*", "*.model")
SHORT = 12


def fingerprint_of(config: EvalConfig, model: Path, tokenizer: Path | None) -> str:
    """A hash of all that decides an evaluation: settings, files, model, tokenizer with template, versions that score."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    files = [task.path for task in config.tasks] + [name for name in (config.style, config.style_prompts) if name]
    folder = Path(config.lm_eval_data) if config.lm_eval_data else None
    about = {
        "settings": settings,
        "files": [digest(Path(name)) if Path(name).is_file() else None for name in files],
        "data": None if folder is None else _listing(folder),
        "model": fingerprint(model),
        "words": _words(tokenizer or model),
        "versions": {name: version(name) for name in SCORERS},
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _words(folder: Path) -> Any:
    """Names and hashes of a tokenizer's files, or the hub id."""
    if not folder.is_dir():
        return str(folder)
    files = {file for pattern in WORDS for file in folder.glob(pattern) if file.is_file()}
    return sorted([file.name, digest(file)] for file in files)


def _listing(folder: Path) -> list[list[Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def settled(output: Path, wanted: str) -> bool:
    """Whether `output` holds the evaluation with this fingerprint; one with another moves next to it, with a message.

    Raises DamagedError where the file is not what was written.
    """
    if output.exists():
        found = str(read_json(output).get("fingerprint") or "unknown")
        if found == wanted:
            return True
        os.replace(output, other := _beside(output, found))
        print(f"{output}: settings, files, model or versions have changed; kept as {other.name}, evaluated again", flush=True)
    if (before := _beside(output, wanted)).exists():
        os.replace(before, output)
        return True
    return False


def _beside(output: Path, found: str) -> Path:
    return output.with_name(f"{output.stem}.{found[:SHORT]}.json")
