"""Checkpoints: everything a step needs, whole or not at all, restored bit for bit, at any number of processes.

    checkpoint/step-00000016/
        .metadata, __R_0.distcp   weights that are trained and the optimizer's tensors, each process R its own shards
                                  (torch.distributed.checkpoint); frozen weights are those of the model that the run starts from
        rng-R.safetensors         torch's generators in process R
        state.json                step, learning rates, scheduler, schedule of objectives, counters, size of metrics.jsonl, and
                                  the manifest of all other files

A checkpoint is written next to its place and renamed when all its bytes are on the disk; `state.json` holds the size and
sha256 of every file and of itself, so that a torn or mixed copy is recognized. The last two are kept. `.metadata` is a pickle,
of which nothing is run: see `unpickling`.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.optim import Optimizer

from ogdopt_harness.common.files import digest, read_json, sealed, sync
from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.training.unpickling import IndexReader, read_index

KEPT = 2
NEEDED = {"files": dict, "step": int, "metrics_bytes": int, "learning_rates": list, "scheduler": dict}
"""What `state.json` has to hold."""


@dataclass
class Progress:
    """Where a run stands: optimizer steps done, the bytes of metrics.jsonl that belong to them, the time they took."""

    step: int = 0
    metrics_bytes: int = 0
    metrics_sha256: str = ""
    skipped: int = 0
    """Steps whose gradients were not finite."""
    seconds: float = 0.0
    schedule: dict[str, Any] = field(default_factory=dict)
    """Where a schedule of objectives stands, in what JSON keeps; empty for methods without one."""
    enough: str = ""
    """Why the run ended before its last step; "" where it did not."""
    costs: dict[str, float] = field(default_factory=dict)
    """What the steps have cost so far (`ogdopt_harness.training.meter`)."""


def save(
    folder: Path, progress: Progress, model: nn.Module, optimizer: Optimizer, scheduler: Any, ranks: Ranks = ALONE
) -> Path:
    """Write the checkpoint of `progress.step` into `folder`, then drop all but the last two. Every process calls it.

    Raises ValueError on all of them, with the earlier checkpoints intact, where one cannot write (disk full, say).
    """
    final = folder / f"step-{progress.step:08d}"
    temporary = final.with_name(f"{final.name}.tmp")
    ranks.on_first(lambda: _start(folder, temporary))
    problem, manifest = "", {}
    try:
        with _quiet():
            writer, tensors = FileSystemWriter(temporary, sync_files=True), _tensors(model, optimizer)
            state_dict_saver.save(tensors, storage_writer=writer, process_group=ranks.patient, no_dist=ranks.size == 1)
        own = temporary / f"rng-{ranks.rank}.safetensors"
        save_file(_rng(), own)
        sync(own)
        mine = [own, *temporary.glob(f"__{ranks.rank}_*.distcp"), *([temporary / ".metadata"] if ranks.first else [])]
        manifest = {file.name: [file.stat().st_size, digest(file)] for file in mine}
    except (OSError, RuntimeError, CheckpointException) as error:
        problem = _reason(error)
    outcomes = ranks.gather((problem, manifest))
    ranks.on_first(lambda: _finish(final, temporary, outcomes, _state(progress, optimizer, scheduler)))
    return final


def restore(folder: Path, model: nn.Module, optimizer: Optimizer, scheduler: Any, ranks: Ranks = ALONE) -> Progress | None:
    """Load the newest whole checkpoint of `folder`; None if there is none. A broken one is named in a warning, not used."""
    for path in reversed(ranks.on_first(lambda: found(folder))):
        problem = broken(path, ranks)
        if problem:
            if ranks.first:
                warnings.warn(f"checkpoint {path} is not used: {problem}", stacklevel=2)
            continue
        state = ranks.on_first(lambda path=path: read_json(path / "state.json"))
        _load(path, model, optimizer, state, ranks)
        scheduler.load_state_dict(state["scheduler"])
        own = path / f"rng-{ranks.rank}.safetensors"
        if own.is_file():  # a process more than before keeps the generators it was started with
            _restore_rng(load_file(own))
        return Progress(**{f.name: state[f.name] for f in fields(Progress) if f.name in state})
    return None


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training moves, by name, each once; of a sharded model this process's shards."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".tmp")


def broken(path: Path, ranks: Ranks = ALONE) -> str | None:
    """What is wrong with a checkpoint, or None; each process looks at its share of the files."""
    try:
        files = read_json(path / "state.json", NEEDED)["files"]
        problem = _first_problem(path, sorted(files.items())[ranks.rank :: ranks.size])
        if problem is None:
            read_index(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = str(error)
    return next(filter(None, ranks.gather(problem)), None)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed writer left."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


# ---- writing --------------------------------------------------------------------------------------------------------------


def _start(folder: Path, temporary: Path) -> None:
    clear_leftovers(folder)
    temporary.mkdir(parents=True)


def _finish(final: Path, temporary: Path, outcomes: Iterable[tuple[str, dict[str, Any]]], state: dict[str, Any]) -> None:
    """Give the checkpoint its name if every process has written its part; else remove it. Raises ValueError then."""
    try:
        if problems := sorted({problem for problem, _ in outcomes if problem}):
            raise OSError("; ".join(problems))
        files = {name: entry for _, manifest in outcomes for name, entry in manifest.items()}
        file = temporary / "state.json"
        file.write_text(json.dumps(sealed(state | {"files": files})), encoding="utf-8")
        sync(file)
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = [path.name for path in found(final.parent)]
        last = f"the last good one, {kept[-1]}, is kept" if kept else "there is no earlier one"
        raise ValueError(
            f"checkpoint {final} could not be written: {error.strerror or error}; {last}. Make room, and the same command goes "
            "on from there"
        ) from error
    for old in found(final.parent)[:-KEPT]:
        shutil.rmtree(old)


def _state(progress: Progress, optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    state = dict(vars(progress), scheduler=scheduler.state_dict())
    state["learning_rates"] = [group["lr"] for group in optimizer.param_groups]
    counters = getattr(optimizer, "counters", None)
    return state | ({} if counters is None else {"counters": counters.state_dict()})


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights as `model.<name>` and the optimizer's state as `optimizer.<name>.<key>`, tensors alone."""
    weights = trained(model)
    strangers = optimizer.state.keys() - set(model.parameters())
    assert not strangers, (
        f"the optimizer keeps state of {len(strangers)} tensors that are not the model's: is it still gathered?"
    )
    tensors = {f"model.{name}": p for name, p in weights.items()}
    for name, p in model.named_parameters():
        if name in weights:
            kept = {key: value for key, value in optimizer.state.get(p, {}).items() if value is not None}
            assert all(isinstance(value, Tensor) for value in kept.values()), f"{name}: the optimizer keeps {kept.keys()}"
            tensors |= {f"optimizer.{name}.{key}": value for key, value in kept.items()}
    return tensors


# ---- reading --------------------------------------------------------------------------------------------------------------


def _load(path: Path, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], ranks: Ranks) -> None:
    """Weights into the model's own tensors and state into the optimizer; raises ValueError for those of other parameters."""
    reader = IndexReader(path)
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    weights = trained(model)
    check_same(weights, {k.removeprefix("model."): v.size for k, v in saved.items() if k.startswith("model.")}, path)
    kept = {name: {} for name in weights}
    for key, entry in saved.items():
        if key.startswith("optimizer."):
            name, _, what = key.removeprefix("optimizer.").rpartition(".")
            like, dtype = weights[name], entry.properties.dtype
            same = entry.size == like.shape
            kept[name][what] = torch.zeros_like(like, dtype=dtype) if same else torch.zeros(entry.size, dtype=dtype)
    tensors = {f"model.{name}": p for name, p in weights.items()}
    tensors |= {f"optimizer.{name}.{key}": value for name, values in kept.items() for key, value in values.items()}
    with _quiet():
        state_dict_loader.load(tensors, storage_reader=reader, process_group=ranks.patient, no_dist=ranks.size == 1)
    names = {id(p): name for name, p in model.named_parameters()}
    ours = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, state["learning_rates"], strict=True):
        group["lr"] = rate
    optimizer.load_state_dict({"state": {i: kept[name] for i, name in enumerate(ours) if kept[name]}, "param_groups": groups})
    if "counters" in state:
        optimizer.counters.load_state_dict(state["counters"])  # type: ignore[attr-defined]


def check_same(weights: dict[str, Tensor], saved: dict[str, torch.Size], path: Path) -> None:
    """Raises ValueError if a checkpoint's weights are not those of the parameters that the model trains."""
    other = sorted(weights.keys() ^ saved.keys())
    other += [name for name in weights.keys() & saved.keys() if weights[name].shape != saved[name]]
    if other:
        raise ValueError(
            f"checkpoint {path} holds {len(saved)} trained tensors and the model trains {len(weights)}; {len(other)} differ in "
            f"name or shape ({other[0]} first). Go on with the model that the run was started with, or delete the run's folder"
        )


def _first_problem(path: Path, files: Iterable[tuple[str, list[Any]]]) -> str | None:
    for name, (size, expected) in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or digest(file) != expected:
            return f"{name} is not what was written ({file.stat().st_size} bytes, expected {size})"
    return None


# ---- pieces ---------------------------------------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    """Why a write failed: torch.distributed.checkpoint wraps the system's error once or twice."""
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({f"process {rank}: {_reason(inner)}" for rank, (inner, _) in error.failures.items()}))
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process alone is one process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _rng() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
