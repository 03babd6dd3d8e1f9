"""What keeps a study's folder from being spoilt: one run at a time, and the data that it was begun with.

`lock` holds who runs there. The system lets go of it when a process dies, however it dies; what is left of one that died on
this machine, or in this job of SLURM, is taken over.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ogdopt_harness.common.files import digest, read_json, sealed, sweep, write_json
from ogdopt_harness.common.run_folder import SeedFolder
from ogdopt_harness.common.sources import files_of

JOB = "SLURM_JOB_ID"


@contextmanager
def locked(home: SeedFolder) -> Iterator[None]:
    """Hold a seed's folder for this process. Raises ValueError, naming the other one, where another process has it."""
    home.path.mkdir(parents=True, exist_ok=True)
    with home.lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = False
        except BlockingIOError:
            taken = True
        file.seek(0)
        holder = _holder(file.read())
        ours = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        ours["job"] = os.environ.get(JOB, "")
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
        if taken:
            raise ValueError(
                f"{home.path} is in use by another run ({who}); wait for it or stop it, or choose another --study.output_dir"
            )
        same_job = ours["job"] and ours["job"] == holder.get("job")
        if holder and holder.get("host") != ours["host"] and not same_job:  # locks may not reach from machine to machine
            raise ValueError(
                f"{home.path} is or was in use by {who}, which cannot be asked from here; if that run is dead, delete "
                f"{home.lock} and start again"
            )
        file.truncate(0)
        file.write(json.dumps(ours))
        file.flush()
        sweep(home.path)
        yield
        file.truncate(0)


def _holder(text: str) -> dict[str, Any]:
    """Who wrote the lock, as far as it can be read."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def local_files(sources: Iterable[str], split: str = "train", option: str = "data") -> list[Path]:
    """The files that are read of the sources of a data set, those of folders one by one; nothing for data sets of the hub."""
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found += files_of(path, split, option)
        elif path.is_file():
            found.append(path)
    return found


def same_files(record: Path, files: Iterable[Path], option: str) -> None:
    """Raises ValueError, naming each, for files that are not what they were when `record` was written; adds new ones to it."""
    before: dict[str, Any] = _read(record)
    known = before.setdefault("files", {})
    changed = []
    for file in files:
        size = file.stat().st_size
        now = {"bytes": size, "sha256": digest(file)}
        then = known.setdefault(str(file), now)
        if size != then["bytes"]:
            verb = "shrank" if size < then["bytes"] else "grew"
            changed.append(f"{file} {verb} from {then['bytes']:,} to {size:,} bytes")
        elif now != then:
            changed.append(f"{file} has other content")
    if changed:
        raise ValueError(f"{option}: data has changed since this study was begun: {'; '.join(changed)}. {_remedy(record)}")
    write_json(record, sealed(before))


def same_rows(record: Path, name: str, option: str, found: Mapping[str, Any]) -> None:
    """Raises ValueError if the rows called `name` have become other tokens than when `record` was written; adds new ones."""
    before = _read(record)
    then = before.setdefault("rows", {}).setdefault(name, dict(found))
    if then != found:
        raise ValueError(
            f"{option}: the rows are not those that this study was begun with ({then['rows']:,} of {then['tokens']:,} tokens "
            f"then, {found['rows']:,} of {found['tokens']:,} now), and the files are the same: the tokenizer, its template or "
            f"a data set of the hub has changed. {_remedy(record)}"
        )
    write_json(record, sealed(before))


def digest_of(sequences: Iterable[Iterable[int]]) -> str:
    """A hash of token ids."""
    found = hashlib.sha256()
    for ids in sequences:
        found.update(json.dumps(list(ids)).encode())
    return found.hexdigest()


def _remedy(record: Path) -> str:
    return f"Bring the old data back, choose another --study.output_dir, or delete {record.parent} to begin again"


def _read(record: Path) -> dict[str, Any]:
    return read_json(record) if record.exists() else {}
