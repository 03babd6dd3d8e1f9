"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

MANIFEST = "manifest.json"
MOST_SAVED = 2_000_000_000
"""Bytes of a saved text, evaluations of many tasks among them."""
YAML_SEAL = "# sha256 "


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A temporary sibling of `folder` to fill; it takes the folder's place when all went well, and is removed otherwise."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def read_regular(path: Path, option: str, most: int) -> bytes:
    """The bytes of a regular file. Raises ValueError for anything else (a pipe, a device), and beyond `most` bytes."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, device or socket"
            raise ValueError(f"{option}: {path} is {kind}; expected a file")
        if found.st_size > most:
            raise ValueError(f"{option}: {path} has {found.st_size:,} bytes; expected at most {most:,}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be read ({error.strerror or error}); correct the path") from error


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder that no other process has: temporary siblings of files and folders."""
    for path in list(folder.rglob("*.tmp")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith("."):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) through a temporary sibling, its bytes on the disk before it takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class DamagedError(ValueError):
    """A saved file is not what was written."""


REMEDY = "bring back the file that was written, or delete the folder that it lies in and give the same command again"
SEAL = "sha256"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a hash of all else in it, by which `read_json` knows it again."""
    plain = json.loads(json.dumps(value))  # as it will be read: keys are texts, tuples are lists
    return {**plain, SEAL: _hash_of(plain)}


def _hash_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, needed: Mapping[str, type | tuple[type, ...]] = {}, remedy: str = REMEDY) -> dict[str, Any]:
    """The JSON object that a file holds, without its seal.

    Raises DamagedError, with the file's name, where it cannot be read, is no object, lacks one of `needed` (name -> type), or
    is not what it was sealed as.
    """
    text = read_saved(path, remedy)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DamagedError(f"{path} is not valid JSON ({said}); {remedy}") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path} holds {type(found).__name__} {str(found)[:40]!r}; expected an object: {remedy}")
    seal = found.pop(SEAL, None)
    if seal is not None and seal != _hash_of(found):
        raise DamagedError(f"{path} is not what was written (its sha256 differs); {remedy}")
    for name, kind in needed.items():
        if not isinstance(found.get(name), kind) or isinstance(found.get(name), bool):
            raise DamagedError(f"{path}: {name!r} is {found.get(name)!r}; expected what a run writes there: {remedy}")
    return found


def read_saved(path: Path, remedy: str = REMEDY) -> str:
    """The text of a saved file. Raises DamagedError, with its name, where it cannot be read."""
    try:
        return read_regular(path, "saved file", MOST_SAVED).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is no text (byte 0x{error.object[error.start]:02x} at {error.start}); {remedy}") from error
    except ValueError as error:
        raise DamagedError(f"{error}; {remedy}") from error


def read_yaml(path: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """The mapping that a YAML file holds; empty where there is no file. Raises DamagedError as `read_json` does."""
    if not path.exists():
        return {}
    text = read_saved(path, remedy)
    body, mark, seal = text.rpartition(YAML_SEAL)
    if mark and seal.strip() != hashlib.sha256(body.encode()).hexdigest():
        raise DamagedError(f"{path} is not what was written (its sha256 differs); {remedy}")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DamagedError(f"{path} is not valid YAML ({' '.join(str(error).split())[:200]}); {remedy}") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path} holds {type(found).__name__} {str(found)[:40]!r}; expected settings: {remedy}")
    return found


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Write a YAML file as `write_text` does, its hash in a comment at the end."""
    text = yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)
    write_text(path, f"{text}{YAML_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n")


def seal(folder: Path) -> None:
    """Write `manifest.json` into a folder: size and sha256 of every other file in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    found = {str(path.relative_to(folder)): [path.stat().st_size, digest(path)] for path in files}
    write_json(folder / MANIFEST, sealed({"files": found}))


def check_sealed(folder: Path) -> None:
    """Raises DamagedError, naming the file, where a folder with a manifest does not hold what was written. Others pass."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    remedy = f"bring it back, or delete {folder} and what was made of it, and give the same command again"
    listed = read_json(manifest, {"files": dict}, remedy)["files"]
    known = tuple((name, *_times(folder / name)) for name in sorted(listed))
    problem = _unsealed(folder, tuple((name, *entry) for name, entry in sorted(listed.items())), known)
    if problem:
        raise DamagedError(f"{folder / problem}; {remedy}")


@lru_cache(maxsize=64)
def _unsealed(folder: Path, listed: tuple[tuple[str, int, str], ...], times: tuple[Any, ...]) -> str:
    """What is wrong with the files of a manifest, or ""; read once for each state of the files (`times`)."""
    for name, size, expected in listed:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or digest(file) != expected:
            return f"{name} is not what was written ({file.stat().st_size:,} bytes, expected {size:,}, or another sha256)"
    return ""


def _times(path: Path) -> tuple[int, int]:
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else (0, 0)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path, size: int | None = None) -> str:
    """The sha256 of a file, or of its first `size` bytes, in hexadecimal."""
    found, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:  # hashlib.file_digest came with Python 3.11
        while left > 0 and (block := file.read(min(1 << 20, left))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()
