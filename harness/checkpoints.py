"""Checkpoints: everything a step needs, whole or not at all, restored bit for bit.

    checkpoint/step-00000016/
        model.safetensors     weights that are trained; frozen ones are those of the model that the run starts from
        optimizer.pt          the base optimizer's state dict (tensors and numbers only; loaded with weights_only)
        state.json            step, scheduler, schedule of objectives, size of metrics.jsonl, the manifest of the other files
        rng.safetensors       torch's generators

A checkpoint is written beside its place and renamed when all its bytes are on the disk; `state.json` holds the size and
sha256 of every file, so that a torn copy is recognized. The last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.files import replaced

KEPT = 2


@dataclass
class Progress:
    """Where a run stands: optimizer steps done, the bytes of metrics.jsonl that belong to them, the time they took."""

    step: int = 0
    metrics_bytes: int = 0
    seconds: float = 0.0
    schedule: dict[str, Any] = field(default_factory=dict)
    """Where a schedule of objectives stands, in what JSON keeps; empty for methods without one."""
    enough: str = ""
    """Why the run ended before its last step; "" where it did not."""
    costs: dict[str, float] = field(default_factory=dict)
    """What the steps have cost so far (`harness.meter`)."""


def save(folder: Path, progress: Progress, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> Path:
    """Write the checkpoint of `progress.step` into `folder`, then drop all but the last two.

    Raises OSError (disk full, say) with the earlier checkpoints intact.
    """
    final = folder / f"step-{progress.step:08d}"
    clear_leftovers(folder)
    with replaced(final) as temporary:
        save_file({name: p.contiguous() for name, p in trained(model).items()}, temporary / "model.safetensors")
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        save_file(_rng(), temporary / "rng.safetensors")
        manifest = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(temporary.iterdir())}
        state = dict(vars(progress), scheduler=scheduler.state_dict(), files=manifest)
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
    _sync(folder)
    for old in found(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def restore(folder: Path, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> Progress | None:
    """Load the newest whole checkpoint of `folder`; None if there is none. A broken one is named in a warning, not used."""
    for path in reversed(found(folder)):
        problem = broken(path)
        if problem:
            warnings.warn(f"checkpoint {path} is not used: {problem}", stacklevel=2)
            continue
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        load_weights(trained(model), load_file(path / "model.safetensors"), path)
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))
        scheduler.load_state_dict(state["scheduler"])
        _restore_rng(load_file(path / "rng.safetensors"))
        return Progress(**{f.name: state[f.name] for f in fields(Progress) if f.name in state})
    return None


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training moves, by name, each once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".tmp")


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((path / "state.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"state.json cannot be read ({type(error).__name__})"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _sha256(file) != digest:
            return f"{name} is not what was written ({file.stat().st_size} bytes, expected {size})"
    return None


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed writer left behind."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def load_weights(weights: dict[str, Tensor], saved: dict[str, Tensor], path: Path) -> None:
    """Write saved weights into the model's own; raises ValueError if they are not those of the same parameters."""
    other = sorted(weights.keys() ^ saved.keys())
    other += [name for name in weights.keys() & saved.keys() if weights[name].shape != saved[name].shape]
    if other:
        raise ValueError(
            f"checkpoint {path} holds {len(saved)} trained tensors and the model trains {len(weights)}; {len(other)} differ in "
            f"name or shape ({other[0]} first). Go on with the model that the run was started with, or delete the run's folder"
        )
    for name, value in saved.items():
        weights[name].copy_(value)


def _rng() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name != "cpu" and int(name.split(":")[1]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
