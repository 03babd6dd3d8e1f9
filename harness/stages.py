"""The stages of one seed's study, each skipped when its files are there: data, supervised training, methods, evaluation."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from harness.config import JOINT_OPTIONS, Config, DataConfig, EvalConfig, StageConfig, as_dict
from harness.data import Preferences, load_preferences, load_sft, texts
from harness.files import write_json, write_text
from harness.joint import Joint
from harness.lm_evals import evaluate
from harness.methods import RunSpec, runs
from harness.model import build_model, load_model, load_tokenizer, prepare, train_tokenizer
from harness.train import Job, train
from harness.world import make_world

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval", "numpy", "safetensors")


class SeedStudy:
    """One repetition of a study, in `<study>/seed-<k>`."""

    def __init__(self, config: Config, seed: int) -> None:
        self.seed = seed
        self.home = config.study.directory / f"seed-{seed}"
        self.config = located(config, str(self.home / "data"), seed)
        self.device = torch.device(_device(config.device))
        if config.threads:
            torch.set_num_threads(config.threads)
        self.specs = runs(config.methods, config.preference.beta, config.preference.lambdas)
        joint = [spec.method for spec in self.specs if spec.weight is not None]
        if joint and not config.sft.data.train:
            raise ValueError(
                f"{joint[0]} trains on the supervised rows beside the pairs, but sft.data.train is empty; expected JSONL files "
                "or hub data sets, e.g. --sft.data.train rows.jsonl"
            )

    def prepare(self) -> None:
        """Make the world and the tokenizer, where the study has its own; read and check all rows once."""
        if self.config.world is not None:
            make_world(self.config.world, self.home / "data")
        folder = self.home / "tokenizer"
        if self.config.model.tokenizer_name_or_path is None and not folder.is_dir():
            train_tokenizer(self._texts(), self.config.model, folder)

    def supervised(self) -> None:
        """Train the start of all methods, if there is supervised data, and evaluate it."""
        config, directory = self.config, self.home / "supervised"
        facts = {"name": "supervised", "kind": "stage", "method": "sft", "beta": None, "label": "SFT"}
        sections = {"world": config.world, "model": config.model, "sft": config.sft}
        record(directory, sections, facts | {"seed": config.sft.seed})
        if not (directory / "complete.json").is_file():
            if self._epochs(config.sft):
                model = self._fresh_model()
                recipe = as_dict(config.sft)
                base = config.model.model_name_or_path or f"a fresh {config.model.architecture.get('model_type')}"
                data = Preferences(self._supervised_rows["train"], [], paired=False)
                held_out = self._supervised_rows.get("eval", [])
                job = Job(directory, "supervised", f"[seed {self.seed}] SFT", "sft", config.sft, data, None)
                job = dataclasses.replace(job, seed=config.sft.seed, base=base, recipe=recipe, validation=held_out)
                fresh = config.model.model_name_or_path is None
                settings = dataclasses.replace(config.model, lora=None) if fresh else config.model
                model = prepare(model, settings, self.device, config.sft.seed)
                train(job, model, self.tokenizer, self.device, config.model.bf16)
            else:
                write_json(directory / "complete.json", {"steps": 0, "epochs": 0, "seconds": 0.0})
        self._evaluate(directory, "supervised", self.start, self._epochs(config.sft))

    def method(self, spec: RunSpec) -> None:
        """Train one method from the supervised model, and evaluate each of its epochs."""
        config, directory = self.config, self.home / spec.name
        if spec.weight is None:
            beta, words, unused = spec.beta, {}, ("beta", *JOINT_OPTIONS)
        else:
            beta, words, unused = config.preference.joint_beta, {"lambda": spec.weight}, ("beta", "lambdas")
        # What a run does not read, and what names it, may differ from what an earlier run of the study was made with.
        stage = {k: v for k, v in as_dict(config.preference).items() if k not in unused}
        facts = {"name": spec.name, "kind": "method", "method": spec.method, "beta": beta, "label": spec.label} | words
        sections = {"world": config.world, "model": config.model, "sft": config.sft, "preference": stage}
        record(directory, sections, facts | {"seed": config.preference.seed})
        if not (directory / "complete.json").is_file():
            rows = self._preference_rows
            joint = None if spec.weight is None else self._joint(spec.weight)
            job = Job(
                directory,
                spec.name,
                f"[seed {self.seed}] {spec.label}",
                spec.method,
                config.preference,
                rows["train"],
                rows.get("eval"),
                beta=beta,
                seed=config.preference.seed,
                base=str(self.start),
                recipe={"method": spec.method, "beta": beta} | words | stage,
                validation=self._supervised_rows.get("eval", []) if joint else (),
                joint=joint,
            )
            model = prepare(load_model(config.model, self.start), config.model, self.device, config.preference.seed)
            train(job, model, self.tokenizer, self.device, config.model.bf16)
        for epoch in range(1, json.loads((directory / "complete.json").read_text())["epochs"] + 1):
            self._evaluate(directory, spec.name, directory / "model" / f"epoch-{epoch}", epoch)

    def _joint(self, weight: float) -> Joint:
        """The supervised stream of a joint run."""
        preference = self.config.preference
        size = preference.sft_batch_size or preference.train_batch_size
        rows = self._supervised_rows["train"]
        return Joint(rows, weight, size, preference.optima, preference.evaluate_every)

    @property
    def start(self) -> Path | str:
        """Where the methods start: the supervised stage's last model, or the given model itself."""
        epochs = self._epochs(self.config.sft)
        if epochs:
            return self.home / "supervised" / "model" / f"epoch-{epochs}"
        return str(self.config.model.model_name_or_path)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of all models of this study."""
        return load_tokenizer(self.config.model.tokenizer_name_or_path or self.home / "tokenizer")

    @cached_property
    def _supervised_rows(self) -> dict[str, Any]:
        return self._loaded("sft", self.config.sft.data, load_sft)

    @cached_property
    def _preference_rows(self) -> dict[str, Any]:
        return self._loaded("preference", self.config.preference.data, load_preferences)

    def _loaded(self, kind: str, data: DataConfig, load: Any) -> dict[str, Any]:
        """Rows of both parts, checked; what was left out is printed and kept in data_report.json."""
        found, reports = {}, {}
        for part in ("train", "eval"):
            if getattr(data, part):
                found[part], report = load(data, self.tokenizer, part)
                reports[f"{kind}.data.{part}"] = report.as_dict()
                print(report.summary())
        if "train" not in found:
            raise ValueError(
                f"{kind}.data.train is empty; expected JSONL files or hub data sets, e.g. --{kind}.data.train rows.jsonl"
            )
        file = self.home / "data_report.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        write_json(file, before | reports)
        return found

    def _texts(self) -> Any:
        for kind, data in (("sft", self.config.sft.data), ("preference", self.config.preference.data)):
            if data.train:
                yield from texts(data, "train", kind)  # type: ignore[arg-type]

    def _fresh_model(self) -> Any:
        config = self.config.model
        if config.model_name_or_path is None:
            return build_model(config, self.tokenizer, self.config.sft.seed)
        return load_model(config, config.model_name_or_path)

    def _epochs(self, stage: StageConfig) -> int:
        """Epochs of the supervised stage; 0 where there is no supervised data."""
        if not stage.data.train:
            if self.config.model.model_name_or_path is None:
                raise ValueError(
                    "sft.data.train is empty and model.model_name_or_path is null; give one, or nothing is trained"
                )
            return 0
        file = self.home / "supervised" / "complete.json"
        return json.loads(file.read_text())["epochs"] if file.is_file() else stage.num_train_epochs

    def _evaluate(self, directory: Path, run: str, model: Path | str, epoch: int) -> None:
        evals = self.config.evals
        output = directory / "evals" / f"epoch-{epoch}.json"
        if not (evals.tasks or evals.lm_eval_tasks) or output.is_file():
            return
        print(f"[seed {self.seed}] evaluating {run}, epoch {epoch}", flush=True)
        words = None if Path(model).is_dir() else self.config.model.tokenizer_name_or_path  # a base model has no template
        where = {"run": run, "epoch": epoch, "seed_dir": self.home, "device": str(self.device)}
        evaluate(Path(model), evals, output, **where, progress=sys.stderr.isatty(), tokenizer=Path(words) if words else None)


def located(config: Config, data: str, seed: int) -> Config:
    """The configuration of one seed: `{data}` is its folder, and its seeds are shifted by `seed`.

    >>> located(Config(), "d", 3).preference.seed
    4
    """

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            if "{data_dir}" in value and config.data_dir is None:
                raise ValueError(f"a path of this recipe is {value!r}; say which folder {{data_dir}} is with --data_dir FOLDER")
            return value.replace("{data}", data).replace("{data_dir}", config.data_dir or "")
        return [filled(v) for v in value] if isinstance(value, list) else value

    def data_of(stage: Any) -> Any:
        rows = dataclasses.replace(stage.data, train=filled(stage.data.train), eval=filled(stage.data.eval))
        return dataclasses.replace(stage, data=rows, seed=stage.seed + seed)

    evals: EvalConfig = config.evals
    tasks = [dataclasses.replace(task, path=filled(task.path)) for task in evals.tasks]
    files = {name: filled(getattr(evals, name)) for name in ("style", "style_prompts", "lm_eval_data")}
    evals = dataclasses.replace(evals, tasks=tasks, **files)
    world = config.world and dataclasses.replace(config.world, seed=config.world.seed + seed)
    return dataclasses.replace(config, world=world, evals=evals, sft=data_of(config.sft), preference=data_of(config.preference))


def record(directory: Path, config: Any, facts: dict[str, Any] | None = None) -> None:
    """Write `config.yaml` before anything else happens in a directory.

    Raises ValueError if a run there was made with other settings, naming them: results of two recipes are not mixed.
    """
    plain = (
        as_dict(config)
        if dataclasses.is_dataclass(config)
        else {k: as_dict(v) if dataclasses.is_dataclass(v) else v for k, v in config.items()}
    )
    file = directory / "config.yaml"
    if facts and file.is_file():
        before = yaml.safe_load(file.read_text(encoding="utf-8"))["config"]
        changed = [f"{key} was {old!r} and is {new!r}" for key, old, new in differences(before, plain)]
        if changed:
            raise ValueError(
                f"{directory} was made with other settings: {'; '.join(changed)}. Choose another --study.output_dir, or delete "
                "that folder to make it again"
            )
        return
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    machine = f"{platform.machine()}, {torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    value = {"run": facts} if facts else {}
    value |= {"config": plain, "versions": versions, "machine": machine, "git": _git(), "command": shlex.join(sys.argv)}
    write_text(file, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def differences(before: Any, after: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every setting that differs.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    [('a.c', 2, 3)]
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(k for k in after if k not in before)]
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{path}.{k}".lstrip("."))]
    return [] if before == after else [(path, before, after)]


def _git() -> str:
    """The commit of this code, with a + if files differ from it; "unknown" outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        found = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + ("+" if found[1] else "")


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
