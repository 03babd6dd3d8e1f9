"""What a long command has finished, line by line, so that the same command goes on from there after any interruption.

A journal is JSONL of objects that hold their own key. Every process of a distributed command appends to a file of its own and
reads those of all, so that a command may be continued with another number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any


class Journal(Mapping[str, dict[str, Any]]):
    """The finished pieces of work in `file` and in its siblings of other ranks, by the text under `key` in each line.

    A last line that was not written to its end (a killed process, a full disk) is taken off the file and counts as not done.
    Raises ValueError for a line in the middle that is not a JSON object with that key.
    """

    def __init__(self, file: Path, key: str = "id", rank: int = 0) -> None:
        self.key, self.lock = key, Lock()
        self.first = file
        self.file = file if rank == 0 else file.with_name(f"{file.name}.rank-{rank}")
        self.done: dict[str, dict[str, Any]] = {}
        for part in self.files():
            self.done |= self._read(part, mend=part == self.file)

    def files(self) -> list[Path]:
        """The files that exist, of every rank."""
        ranks = sorted(self.first.parent.glob(f"{self.first.name}.rank-*"))
        return [file for file in (self.first, *ranks) if file.is_file()]

    def _read(self, file: Path, mend: bool) -> dict[str, dict[str, Any]]:
        *lines, rest = file.read_bytes().split(b"\n")
        if rest and mend:
            with file.open("rb+") as torn:
                torn.truncate(sum(len(line) + 1 for line in lines))
        found = {}
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                found[row[self.key]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}:{number}: found {line[:60]!r}; expected a JSON object with {self.key!r}: remove that line, and "
                    "what it held is done again"
                ) from error
        return found

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keep finished pieces of work: they are in the file when this returns."""
        rows = list(rows)
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self.lock:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as file:
                file.write(text.encode("utf-8", "surrogatepass"))
            self.done |= {row[self.key]: row for row in rows}

    def remove(self) -> None:
        """Delete the files of every rank: the work is complete and kept elsewhere."""
        for file in self.files():
            file.unlink(missing_ok=True)

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.done[key]

    def __iter__(self) -> Any:
        return iter(self.done)

    def __len__(self) -> int:
        return len(self.done)
