"""Where rows come from: JSONL files read line by line, other tables and hub data sets through the library `datasets`.

JSONL has a reader of its own. A data set library stops at the first broken line and turns a missing field into None.
`str.splitlines` cuts records at U+2028, and `json` accepts NaN and duplicate keys. Each row comes with its place, file:line or
dataset[i]; one that cannot be decoded comes as a `RowError` that says why.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
MOST_BYTES = 16_000_000
"""Bytes of one row of a file: more is no text that a model reads, and would fill the memory as tokens."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")  # "../pairs" is a path


class Problem(NamedTuple):
    """Why a row cannot be used: `where` is file:line or dataset[i], `reason` the short name under which it is counted."""

    where: str
    reason: str
    column: str
    found: str
    remedy: str

    def __str__(self) -> str:
        column = f"column {self.column!r}: " if self.column else ""
        return f"{self.where}: {self.reason}: {column}found {self.found}; {self.remedy}"


class RowError(Exception):
    """What is wrong with the row in hand; it becomes a `Problem` once its place is known."""

    def __init__(self, reason: str, column: str, found: str, remedy: str) -> None:
        super().__init__(reason)
        self.parts = (reason, column, found, remedy)

    def at(self, where: str) -> Problem:
        """The problem, with its place."""
        return Problem(where, *self.parts)


def read(source: str, split: str, option: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of one source: a file, a folder of files, or a hub id `owner/name[:configuration]`.

    A row that cannot be decoded comes as a RowError. Raises ValueError if the source does not exist or breaks while it is read.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{option}: {source} begins with the home of a user who does not exist; correct the path") from error
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(FILE_ENDINGS))
        if not files:
            raise ValueError(f"{option}: folder {source} holds no file that ends with {', '.join(FILE_ENDINGS)}")
        for file in files:
            yield from read_file(file, option)
    elif path.is_file():
        yield from read_file(path, option)
    elif source.endswith(FILE_ENDINGS) or not HUB_ID.fullmatch(source):
        raise ValueError(f"{option}: no file or folder {source} (looked in {Path.cwd()}); correct the path")
    else:
        name, _, configuration = source.partition(":")
        yield from read_dataset(source, option, split, name, configuration or None)


def read_file(path: Path, option: str) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of a JSONL file, plain or gzipped; `.json` and `.parquet` are read through the library datasets."""
    if path.suffix in (".json", ".parquet"):
        yield from read_dataset(str(path), option, "train", path.suffix[1:], data_files=str(path))
        return
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark that some editors write
                if len(line) > MOST_BYTES:
                    found, remedy = f"more than {MOST_BYTES:,} bytes", "expected one JSON object a line: cut or split the row"
                    yield f"{path}:{number}", RowError("row too large", "", found, remedy)
                elif line.strip():
                    yield f"{path}:{number}", decode(line.rstrip(b"\r\n"))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{option}: {path} cannot be read after line {number}: {error}; fetch or write the file again"
        ) from error


def _lines(file: Any) -> Iterator[bytes]:
    """The lines of a file; of one that is too long only so much as shows that, so that no line fills the memory."""
    while line := file.readline(MOST_BYTES + 1):
        rest = line
        while not rest.endswith(b"\n") and len(line) > MOST_BYTES and (rest := file.readline(MOST_BYTES)):
            continue
        yield line


def decode(line: bytes) -> Any:
    """The JSON value of a line, or the RowError that says why there is none."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            raise RowError("duplicate key", key, "it more than once in one object", "expected each key once: keep one of them")
        return found

    def constant(name: str) -> Any:
        raise RowError("not a JSON number", "", name, "expected JSON, which has no NaN or Infinity: write null or leave it out")

    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RowError as problem:
        return problem
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at position {error.start}"
        return RowError("broken UTF-8", "", found, "expected UTF-8: write the file again in UTF-8")
    except RecursionError:
        return RowError("nested too deeply", "", "thousands of nested brackets", "expected an object of texts and messages")
    except ValueError as error:  # json.JSONDecodeError, and integers of more than 4300 digits
        return RowError("invalid JSON", "", f"{error} in {short(line.decode('utf-8'))}", "expected one JSON object a line")


def read_dataset(
    source: str, option: str, split: str, name: str, configuration: str | None = None, data_files: str | None = None
) -> Iterator[tuple[str, Any]]:
    """(source[i], row) of a data set loaded with the library datasets. Raises ValueError, with the cause, if it cannot."""
    try:
        import datasets  # imported here: JSONL files need none of it
    except ImportError as error:
        raise ValueError(f"{option}: {source} needs the library datasets: pip install datasets") from error
    try:
        loaded = datasets.load_dataset(name, configuration, split=split, data_files=data_files)
    except Exception as error:  # datasets, huggingface_hub and pyarrow each raise their own kinds
        reason = (str(error).strip().splitlines() or [""])[0]
        hint = "expected a table, or a list of objects with the same columns; JSONL files are checked row by row"
        if not data_files:
            hint = (
                f"there is no file or folder of this name; if it is a data set of the hub, check its id, its split {split!r} "
                f"(option {option}_split), its configuration (`{name}:<configuration>`) and the network"
            )
        raise ValueError(f"{option}: cannot load {source!r}: {type(error).__name__}: {reason}; {hint}") from error
    for i, row in enumerate(loaded):
        yield f"{source}[{i}]", row


def kind_of(value: Any) -> str:
    """Type and beginning of a value, for messages."""
    return "null" if value is None else f"{type(value).__name__} {short(value)}"


def short(value: Any, limit: int = 60) -> str:
    """The beginning of a value's repr."""
    shown = repr(value[: limit + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= limit else shown[: limit - 4] + " ..."
