"""The index of a checkpoint, read without running what it says: `.metadata` is a pickle, and a pickle is a program.

torch.distributed.checkpoint loads it with `pickle.load`, which calls whatever the file names. Here a pickle may name the
classes that an index of tensors is made of, and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

INDEX = ".metadata"
METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    (METADATA, name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
    )
} | {
    (METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
}
TYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
"""torch's types are pickled as `torch.<name>`."""


class Unpickler(pickle.Unpickler):
    """Refuses every name that no index of tensors needs."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of an allowed name. Raises UnpicklingError for others."""
        if (module, name) in ALLOWED or (module == "torch" and name in TYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")


class IndexReader(FileSystemReader):
    """torch's reader of checkpoints, with the index read by `read_index`."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """The index. Raises ValueError where it is none."""
        found = read_index(Path(self.path))
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return found


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint's tensors. Raises ValueError, with the file's name, for anything else in its place."""
    file = folder / INDEX
    try:
        with file.open("rb") as opened:
            found = Unpickler(opened).load()
    except Exception as error:  # a broken pickle fails in as many ways as there are opcodes
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is no index of tensors ({said}); delete the checkpoint's folder") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{file} holds {type(found).__name__}; expected an index of tensors: delete the checkpoint's folder")
    names = {str(info.relative_path) for info in (found.storage_data or {}).values()}
    if outside := sorted(name for name in names if Path(name).name != name):
        raise ValueError(f"{file} names {outside[0]!r}, which lies outside of the checkpoint; delete the checkpoint's folder")
    return found
