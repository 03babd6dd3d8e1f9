"""Pretrained models as their owners keep them: Hugging Face folders and hub ids, adapters on a base, GGUF files.

Every weight comes from the checkpoint. What is missing, left over or of another shape is refused by name, because training
would start from random numbers. What cannot be read is one message that names the option, the file and the cause.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ogdopt_harness.common.files import check_sealed

LFS = b"version https://git-lfs"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"
SHOWN = 4  # names of weights in a message


@dataclass(frozen=True)
class Source:
    """Where a model or a tokenizer is: `name` is a folder or a hub id; `gguf` the file in it that holds everything."""

    option: str
    name: str
    gguf: str | None = None
    base: str | None = None
    """Of an adapter: the model that it was trained on."""

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of transformers' `from_pretrained`, which reads no code of the checkpoint's own and asks nobody."""
        found: dict[str, Any] = {"trust_remote_code": False}
        if Path(self.name).is_dir():  # a folder is all there is: the hub is not asked for what it lacks
            found["local_files_only"] = True
        return found | ({"gguf_file": self.gguf} if self.gguf else {})

    def refused(self, found: str, remedy: str) -> ValueError:
        """The one error about this source."""
        return ValueError(f"{self.option}: {found}; {remedy}")


def source_of(name_or_path: str | Path, option: str) -> Source:
    """Where `name_or_path` leads. `~` is the home folder; a folder with an adapter names its base.

    Raises ValueError for a path that is not there, files that were not fetched or broke off, and adapters without a base.
    """
    path = Path(name_or_path).expanduser()
    source = Source(option, str(path) if path.exists() else str(name_or_path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise source.refused(f"{path} is a file", "expected a Hugging Face folder, a hub id or a .gguf file")
        source = Source(option, str(path.parent), path.name)
    elif not path.is_dir():
        if str(name_or_path).startswith(("~", "/", "./", "../")) or path.suffix == ".gguf":
            remedy = "expected a Hugging Face folder, a hub id or a .gguf file (offline only ids in the local cache can be had)"
            raise source.refused(f"there is no folder or file {path}", remedy)
        return source
    elif not (path / "config.json").exists() and not (path / ADAPTER).exists() and (files := sorted(path.glob("*.gguf"))):
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise source.refused(f"{path} holds {len(files)} GGUF files ({names})", "give the path of one of them")
        source = Source(option, str(path), files[0].name)
    check_sealed(Path(source.name))
    if source.gguf:
        check_fetched(source, Path(source.name) / source.gguf)
        return source
    return Source(option, source.name, base=_base(source, path)) if (path / ADAPTER).exists() else source


def read_config(name_or_path: str | Path, option: str) -> Any:
    """The transformers configuration of a model, of its base for an adapter. Raises ValueError where it cannot be used."""
    source = source_of(name_or_path, option)
    if source.base is not None:
        return read_config(source.base, f"{option} ({source.name}, {ADAPTER}: base_model_name_or_path)")
    if Path(source.name).is_dir() and not source.gguf:
        _check_folder(source, Path(source.name))
    try:
        config = AutoConfig.from_pretrained(source.name, **source.options)
    except Exception as error:  # transformers, huggingface_hub, gguf and json each raise their own kinds
        raise unreadable(source, "configuration", error) from error
    _check_config(source, config.to_dict())
    return config


def load_pretrained(kind: Any, name_or_path: str | Path, option: str, **options: Any) -> PreTrainedModel:
    """The model that one of transformers' Auto classes makes of a folder, a hub id, an adapter with its base, or a GGUF file.

    With `device_map="meta"` no weight is read, and all else is checked. An adapter is merged into its base. Raises ValueError,
    naming `option`, where it cannot be loaded whole.
    """
    source = source_of(name_or_path, option)
    if source.base is not None:
        base = load_pretrained(kind, source.base, f"{option} ({source.name}, {ADAPTER}: base_model_name_or_path)", **options)
        return base if options.get("device_map") == "meta" else _adapted(source, base)
    read_config(name_or_path, option)
    try:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are refused below, by name
        model, info = kind.from_pretrained(source.name, **source.options, **options)
    except Exception as error:  # transformers, safetensors, pickle and torch each raise their own kinds
        raise unreadable(source, "model", error) from error
    _check_weights(source, kind, model, info)
    if source.gguf:  # its weights are plain numbers now, and a folder that says otherwise could not be loaded
        model.config.__dict__.pop("quantization_config", None)
        model.__dict__.pop("hf_quantizer", None)
        if getattr(model, "is_quantized", False):
            model.is_quantized = False
    return model


def unreadable(source: Source, what: str, error: BaseException) -> ValueError:
    """The error for what another library could not read, with its first line."""
    return source.refused(
        f"no {what} at {source.name!r} ({type(error).__name__}: {first_line(error)})",
        "expected a Hugging Face folder, a hub id or a .gguf file (offline only ids in the local cache can be had)",
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]


def _base(source: Source, folder: Path) -> str:
    """The base of an adapter's folder. Raises ValueError for a folder of two models, and for kinds that cannot be merged."""
    check_fetched(source, folder / ADAPTER)
    about = _json(source, folder / ADAPTER)
    if whole := [name for name in WEIGHTS if (folder / name).exists()]:
        raise source.refused(
            f"{folder} holds an adapter ({ADAPTER}) and whole weights ({whole[0]})", "move one of them to a folder of its own"
        )
    if about.get("peft_type") not in ("LORA", "LOHA", "LOKR", "ADALORA", "IA3"):
        raise source.refused(
            f"{folder} holds an adapter of the kind {about.get('peft_type')!r}, which cannot be merged into its base",
            "expected LORA, or a whole model",
        )
    base = about.get("base_model_name_or_path")
    if not base:
        raise source.refused(f"{folder / ADAPTER} does not say on what the adapter was trained", "add base_model_name_or_path")
    return str(base)


def _adapted(source: Source, base: PreTrainedModel) -> PreTrainedModel:
    """The base with the adapter of the source merged into it."""
    try:
        import peft
        from peft.utils import load_peft_weights
    except ImportError as error:
        raise source.refused(f"{source.name} is an adapter, and peft is not installed", "pip install peft") from error
    for file in ("adapter_model.safetensors", "adapter_model.bin"):
        if (path := Path(source.name) / file).exists():
            check_fetched(source, path)
    try:
        model = peft.PeftModel.from_pretrained(base, source.name)  # type: ignore[arg-type]
        given = set(load_peft_weights(source.name))
    except Exception as error:  # peft, safetensors and torch each raise their own kinds
        raise unreadable(source, "adapter for its base", error) from error
    expected = set(peft.get_peft_model_state_dict(model))
    if given != expected:
        raise source.refused(
            f"the adapter {source.name} and its base do not fit: {_names(expected - given, 'missing')}"
            f"{_names(given - expected, 'left over')}",
            "give the base that it was trained on",
        )
    merged: Any = model.merge_and_unload()  # type: ignore[operator]
    return merged.requires_grad_(True)  # peft has frozen the base


def _check_folder(source: Source, folder: Path) -> None:
    """Raises ValueError for what is wrong with the files of a model's folder, as far as names, sizes and headers show."""
    file = folder / "config.json"
    if not file.exists():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise source.refused(
            f"no model at {str(folder)!r} (no config.json; it holds {there})", "expected a Hugging Face folder"
        )
    check_fetched(source, file)
    _check_config(source, _json(source, file))
    for index in folder.glob("*.index.json"):
        check_fetched(source, index)
        shards = sorted(set(_json(source, index).get("weight_map", {}).values()))
        if missing := [name for name in shards if not (folder / name).exists()]:
            remedy = "fetch the folder again, whole"
            raise source.refused(f"{index} names {len(shards)} files, of which {', '.join(missing[:SHOWN])} is missing", remedy)
    for weights in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        check_fetched(source, weights)


def check_fetched(source: Source, file: Path) -> None:
    """Raises ValueError for a pointer of Git LFS, an empty file, and a safetensors file that broke off."""
    with file.open("rb") as opened:
        start = opened.read(len(LFS))
    size = file.stat().st_size
    if start == LFS:
        raise source.refused(f"{file} is a pointer of Git LFS, not the file itself", "fetch it with `git lfs pull`")
    if not size:
        raise source.refused(f"{file} is empty", "fetch it again")
    if file.suffix == ".safetensors":
        (header,) = struct.unpack("<Q", start[:8]) if size >= 8 else (0,)
        try:
            with file.open("rb") as opened:
                opened.seek(8)
                entries = json.loads(opened.read(header)) if 0 < header <= size else {}
        except ValueError as error:
            raise source.refused(f"{file} is no safetensors file (its header is broken)", "fetch it again") from error
        end = max((v["data_offsets"][1] for k, v in entries.items() if k != "__metadata__"), default=-1)
        if size != 8 + header + end:
            expected = f"its header says {8 + header + end:,}" if end >= 0 else "it has no header"
            raise source.refused(f"{file} broke off: it has {size:,} bytes, and {expected}", "fetch it again")


def _check_config(source: Source, config: dict[str, Any]) -> None:
    """Raises ValueError for code of a model's own, unknown architectures, and quantized weights."""
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise source.refused(
                f"{source.name} brings code of its own (auto_map), which is not run", "expected an architecture of transformers"
            )
        raise source.refused(
            f"{source.name}/config.json has the model_type {kind!r}, which this transformers does not know",
            "correct it, or upgrade transformers",
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if config.get("quantization_config") and not source.gguf:
        raise source.refused(
            f"{source.name} holds quantized weights (quantization_config: {method}), which cannot be trained or exported",
            "give the model that was quantized",
        )


def _check_weights(source: Source, kind: Any, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raises ValueError unless each weight of the model is in the checkpoint, and each of the checkpoint in the model."""
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if kind is AutoModelForSequenceClassification:  # whose head is new, and stands where that of words was
        body = f"{model.base_model_prefix}."
        missing = {name for name in missing if name.startswith(body)}
        unexpected = {name for name in unexpected if name.startswith(body)}
    mismatched = {str(one[0]) if isinstance(one, (tuple, list)) else str(one) for one in info["mismatched_keys"]}
    if missing or unexpected or mismatched or info.get("error_msgs"):
        raise source.refused(
            f"{source.name} does not hold the weights of {type(model).__name__}: {_names(missing, 'missing')}"
            f"{_names(unexpected, 'left over')}{_names(mismatched, 'of another shape')}"
            f"{'; '.join(map(str, info.get('error_msgs') or []))}",
            "training would start from random numbers there. Give a whole causal language model",
        )


def _names(names: Iterable[str], what: str) -> str:
    found = sorted(names)
    more = ", ..." if len(found) > SHOWN else ""
    return f"{len(found)} {what} ({', '.join(found[:SHOWN])}{more}) " if found else ""


def _json(source: Source, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise source.refused(f"{file} is no JSON ({error})", "fetch it again") from error
    if not isinstance(found, dict):
        raise source.refused(f"{file} is no JSON object", "fetch it again")
    return found
