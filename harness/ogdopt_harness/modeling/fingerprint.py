"""Whether a model is still the one it was: a hash of its weights, and of nothing that may change without them.

Reading all of a large model at every start costs minutes. Training moves nearly every weight, so blocks spread over each file
tell it from any other model; headers and small files are read whole.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ogdopt_harness.modeling.pretrained import ADAPTER, source_of

BLOCK, BLOCKS = 4096, 256  # bytes, and how many of these of a file
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def fingerprint(name_or_path: str | Path, option: str = "model", config: Any = None) -> str:
    """A hash of a folder's configuration and weights, of an adapter with its base, or the commit of a hub id (of its `config`).

    Neither times nor the folder's name count, so that a copy has the same. Raises ValueError where there is no such model.
    """
    source = source_of(name_or_path, option)
    folder = Path(source.name)
    if not folder.is_dir():
        return f"{source.name}@{getattr(config, '_commit_hash', None)}"
    found = hashlib.sha256()
    patterns = (source.gguf,) if source.gguf else WEIGHTS
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    for file in files:
        found.update(file.name.encode())
        found.update(sampled(file))
    for name in ("config.json", ADAPTER):
        if (folder / name).is_file() and not source.gguf:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            kept = {key: value for key, value in settings.items() if key not in ("_name_or_path", "transformers_version")}
            found.update(json.dumps(kept, sort_keys=True).encode())
    if source.base is not None:
        found.update(fingerprint(source.base, option).encode())
    return found.hexdigest()


def sampled(file: Path) -> bytes:
    """A hash of a file's size and of blocks spread over it, its ends among them; of a small file, of all of it."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        if size <= BLOCK * BLOCKS:
            found.update(opened.read())
        else:
            for i in range(BLOCKS):
                opened.seek((size - BLOCK) * i // (BLOCKS - 1))
                found.update(opened.read(BLOCK))
    return found.digest()
