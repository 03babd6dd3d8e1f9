"""Where rows come from: files read row by row, folders of them, and hub data sets through the library `datasets`.

Files have readers of their own. A data set library stops at the first broken line, turns a missing field into None, and text
into dates. `str.splitlines` cuts records at U+2028, and `json` accepts NaN and duplicate keys. Each row comes with its place,
file:line or dataset[i]; one that cannot be decoded comes as a `RowError` that says why.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet", ".arrow")
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # which hold no rows
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.")
SPLIT = re.compile(rf"(?:^|[^a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?:[^a-z]|$)")
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
    """(place, row) of one source: a file, a folder, or a hub id `owner/name[:configuration]`.

    A folder is a clone of a hub data set, what `save_to_disk` wrote, or files of rows, of which those of other splits are left
    out. A row that cannot be decoded comes as a RowError. Raises ValueError if the source does not exist or breaks while it is
    read.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{option}: {source} begins with the home of a user who does not exist; correct the path") from error
    if path.is_dir():
        for file in files_of(path, split, option):
            yield from read_file(file, option, split)
    elif path.is_file():
        yield from read_file(path, option, split)
    elif source.endswith(FILE_ENDINGS) or not HUB_ID.fullmatch(source):
        raise ValueError(f"{option}: no file or folder {source} (looked in {Path.cwd()}); correct the path")
    else:
        name, _, configuration = source.partition(":")
        yield from read_dataset(source, option, split, name, configuration or None)


def files_of(folder: Path, split: str, option: str) -> list[Path]:
    """The files of rows of a split, in a folder or in its `data/`: by their names, or all where no name says a split.

    Raises ValueError where there is none, and where shards of several splits have the same right to be it.
    """
    if (saved := saved_to_disk(folder)) is not None:
        return saved_files(folder, saved, split, option)
    found = [file for where in (folder, folder / "data") if where.is_dir() for file in sorted(where.iterdir())]
    found = [file for file in found if file.is_file() and file.name.endswith(FILE_ENDINGS) and file.name not in ABOUT]
    if not found:
        raise ValueError(f"{option}: folder {folder} holds no file that ends with {', '.join(FILE_ENDINGS)}")
    splits = {file: split_of(file.name) for file in found}
    if not any(splits.values()):
        return found
    if exact := [file for file in found if re.match(rf"{re.escape(split)}(-\d|\.)", file.name)]:
        return exact
    kept = [file for file, its in splits.items() if its is not None and its == split_of(split)]
    shards = {match.group(1) for file in kept if (match := SHARD.match(file.name))}
    if kept and len(shards) < 2:
        return kept
    names = ", ".join(sorted(shards or {str(its) for its in splits.values() if its}))
    raise ValueError(
        f"{option}: folder {folder} holds files of the splits {names}, and none of {split!r} alone (option {option}_split); "
        "name the files themselves, or another split"
    )


def split_of(name: str) -> str | None:
    """The split that a file's name says, as hub data sets are laid out.

    >>> split_of("test-00000-of-00001.parquet"), split_of("my_valid.jsonl"), split_of("latest.jsonl")
    ('test', 'validation', None)
    """
    found = SPLIT.search(name.lower())
    return None if found is None else SPLITS[found.group(1)]


def saved_to_disk(folder: Path) -> list[str] | None:
    """The splits in a folder that `save_to_disk` of the library datasets wrote, none for a single one; None for another."""
    if (folder / "dataset_dict.json").is_file():
        return list(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    return [] if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file() else None


def saved_files(folder: Path, splits: list[str], split: str, option: str) -> list[Path]:
    """The files of a split that `save_to_disk` wrote. Raises ValueError for a split that is not there."""
    if splits and split not in splits:
        raise ValueError(f"{option}: {folder} has the splits {', '.join(splits)}, not {split!r} (option {option}_split)")
    where = folder / split if splits else folder
    state = json.loads((where / "state.json").read_text(encoding="utf-8"))
    return [where / file["filename"] for file in state["_data_files"]]


def read_file(path: Path, option: str, split: str = "train") -> Iterator[tuple[str, Any]]:
    """(file:line or file[i], row) of a file: JSONL, plain or gzipped, JSON, CSV, TSV, Parquet or Arrow.

    Texts stay as they are written: no reader makes dates or numbers of them. In a table, null is a column that a row lacks.
    """
    if path.suffix in (".csv", ".tsv"):
        yield from read_csv(path, option)
        return
    if path.suffix == ".json":
        yield from read_json(path, option, split)
        return
    if path.suffix in (".parquet", ".arrow"):
        for i, row in enumerate(_batches(path, option)):
            yield f"{path}[{i}]", row
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


def read_csv(path: Path, option: str) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of a CSV or TSV file with a header; every value is text, and an empty one is missing."""
    csv.field_size_limit(MOST_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{option}: {path} names a column twice ({', '.join(header)}); rename one")
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    found = f"{len(cells)} cells"
                    yield where, RowError("wrong number of cells", "", found, f"expected {len(header)}, as in the header")
                else:
                    yield where, {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{option}: {path} cannot be read as CSV ({error}); expected UTF-8 with a header line") from error


def read_json(path: Path, option: str, split: str) -> Iterator[tuple[str, Any]]:
    """(file[i], row) of a JSON file: a list of objects, alone or under the split's name; or lines of JSON."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    found = decode(content)
    if isinstance(found, RowError):
        lines = [(n, line) for n, line in enumerate(content.splitlines(), start=1) if line.strip()]
        if len(lines) > 1 and isinstance(decode(lines[0][1]), Mapping):
            yield from ((f"{path}:{n}", decode(line)) for n, line in lines)
            return
        raise ValueError(f"{option}: {path}: {found.at(str(path))}; expected a list of objects") from found
    if isinstance(found, Mapping):
        lists = {name: value for name, value in found.items() if isinstance(value, list)}
        if split not in lists and len(lists) != 1:
            raise ValueError(
                f"{option}: {path} is an object of {', '.join(map(str, found)) or 'nothing'}; expected a list of objects, or "
                f"one under the name of the split {split!r}"
            )
        found = lists[split] if split in lists else next(iter(lists.values()))
    if not isinstance(found, list):
        raise ValueError(f"{option}: {path} holds {kind_of(found)}; expected a list of objects")
    yield from ((f"{path}[{i}]", row) for i, row in enumerate(found))


def _batches(path: Path, option: str) -> Iterator[Any]:
    """The rows of a Parquet or Arrow file, some at a time, without the nulls that a table writes for what a row lacks."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise ValueError(f"{option}: {path} needs the library pyarrow: pip install pyarrow") from error
    try:
        if path.suffix == ".parquet":
            yield from (row for batch in parquet.ParquetFile(path).iter_batches(1024) for row in present(batch.to_pylist()))
            return
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader: Any = ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                opened = ipc.open_file(file)
                reader = (opened.get_batch(i) for i in range(opened.num_record_batches))
            yield from (row for batch in reader for row in present(batch.to_pylist()))
    except (OSError, pyarrow.ArrowException) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{option}: {path} cannot be read ({type(error).__name__}: {reason}); write it again") from error


def present(value: Any) -> Any:
    """The value without the null entries of its objects."""
    if isinstance(value, dict):
        return {key: present(inner) for key, inner in value.items() if inner is not None}
    return [present(inner) for inner in value] if isinstance(value, list) else value


def read_dataset(
    source: str, option: str, split: str, name: str, configuration: str | None = None
) -> Iterator[tuple[str, Any]]:
    """(source[i], row) of a hub data set, loaded with the library datasets; `split` may be cut, as in train[:100].

    Raises ValueError, with the cause, if it cannot be loaded.
    """
    try:
        import datasets  # imported here: files need none of it
    except ImportError as error:
        raise ValueError(f"{option}: {source} needs the library datasets: pip install datasets") from error
    try:
        loaded = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # datasets, huggingface_hub and pyarrow each raise their own kinds
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{option}: cannot load {source!r}: {type(error).__name__}: {reason}; there is no file or folder of this name; "
            f"if it is a data set of the hub, check its id, its split {split!r} (option {option}_split), its configuration "
            f"(`{name}:<configuration>`) and the network"
        ) from error
    for i, row in enumerate(loaded):
        yield f"{source}[{i}]", present(row)


def kind_of(value: Any) -> str:
    """Type and beginning of a value, for messages."""
    return "null" if value is None else f"{type(value).__name__} {short(value)}"


def short(value: Any, limit: int = 60) -> str:
    """The beginning of a value's repr."""
    shown = repr(value[: limit + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= limit else shown[: limit - 4] + " ..."
