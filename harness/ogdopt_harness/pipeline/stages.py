"""The stages of one seed's study, each skipped when its files are there: data, supervised training, methods, evaluation."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ogdopt_harness.common.device import device_name
from ogdopt_harness.common.files import read_json, replaced, sealed, write_json
from ogdopt_harness.common.keys import EPOCHS, SECONDS, STEPS, STREAMS, measured, objective
from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.common.run_folder import RunFolder, StudyFolder
from ogdopt_harness.config.located import located
from ogdopt_harness.config.schema import Config, DataConfig, ModelConfig, PreferenceConfig, StageConfig, as_dict
from ogdopt_harness.data.examples import Example, Preferences, load_preferences, load_sft, texts
from ogdopt_harness.data.world import make_world
from ogdopt_harness.evaluation.kept import fingerprint_of, settled
from ogdopt_harness.evaluation.suite import evaluate
from ogdopt_harness.modeling.broadcast import outlined
from ogdopt_harness.modeling.build import build_model, check_positions, fitted, load_model
from ogdopt_harness.modeling.memory import precision_warning
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.modeling.tokenizer import load_tokenizer, train_tokenizer
from ogdopt_harness.pipeline.guard import digest_of, local_files, same_files, same_rows
from ogdopt_harness.pipeline.manifest import record
from ogdopt_harness.pipeline.preflight import preflight
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.joint import Joint
from ogdopt_harness.training.methods import METHODS, RunSpec
from ogdopt_harness.training.reward import RewardTrainer, load_reward_model
from ogdopt_harness.training.trackers import chosen
from ogdopt_harness.training.trainer import train


class SeedStudy:
    """One repetition of a study, in `<study>/seed-<k>`."""

    def __init__(self, config: Config, seed: int, ranks: Ranks = ALONE, device: torch.device | None = None) -> None:
        self.seed, self.ranks = seed, ranks
        self.home = StudyFolder(config.study.directory).seed(seed)
        self.config = located(config, str(self.home.data), seed)
        self.device = device or torch.device(device_name(config.device))
        if config.threads:
            torch.set_num_threads(config.threads)
        self.specs = preflight(config, self.device)
        self.report_to = chosen(config.report_to)
        for name, stage in (("sft", config.sft), ("preference", config.preference)):
            if stage.data.train and ranks.first and (text := precision_warning(config.model, stage)):
                warnings.warn(f"{name}: {text}", stacklevel=2)

    def prepare(self) -> None:
        """Make the world and the tokenizer, where the study has its own; read and check all rows once."""
        self.ranks.on_first(self._prepare)

    def _prepare(self) -> None:
        if self.config.world is not None:
            make_world(self.config.world, self.home.data)
        model, folder = self.config.model, self.home.tokenizer
        if folder.is_dir():
            return
        if model.words is None:
            train_tokenizer(self._texts(), model, folder)
        elif model.chat_template is not None:  # kept with it, for models that are evaluated as they came
            with replaced(folder) as temporary:
                load_tokenizer(model.words, model.chat_template).save_pretrained(temporary)

    def supervised(self) -> None:
        """Train the start of all methods, if there is supervised data, and evaluate it."""
        config, folder = self.config, self.home.supervised
        facts = {"name": folder.name, "kind": "stage", "method": "sft", "beta": None, "label": "SFT"}
        sections = {"world": config.world, "model": config.model, "sft": config.sft}
        self.ranks.on_first(lambda: record(folder.path, sections, facts | {"seed": config.sft.seed}))
        if not self._done(folder):
            if self._epochs(config.sft):
                job = Job(
                    folder.path,
                    f"[seed {self.seed}] SFT",
                    "sft",
                    config.sft,
                    Preferences(self._supervised_rows["train"], [], paired=False),
                    held_out=None,
                    base=self._base_words,
                    recipe=as_dict(config.sft),
                    validation=self._supervised_rows.get("eval", []),
                    report_to=self.report_to,
                    project=config.study.name,
                )
                model = self._prepared(self._fresh_model, config.model.at_stage("sft"), config.sft.seed)
                train(job, model, self.tokenizer, self.device, config.model.bf16, ranks=self.ranks)
            else:
                nothing = {STEPS: 0, EPOCHS: 0, SECONDS: 0.0}
                self.ranks.on_first(lambda: folder.finish(nothing))
        self._evaluate(folder, self.start, self._epochs(config.sft))

    def method(self, spec: RunSpec) -> None:
        """Train one method from the supervised model (or the base, see `joint.start`), and evaluate its epochs."""
        folder = self.home.run(spec.name)
        reward = METHODS[spec.method].reward
        kind = "reward" if reward else "method"
        facts: dict[str, Any] = {"name": spec.name, "kind": kind, "method": spec.method, "label": spec.label}
        stage = self._stage_settings(spec.method)
        if spec.weight is None:
            facts["beta"], joint = spec.beta, None
        else:
            facts |= {"beta": self.config.joint.beta, "lambda": spec.weight, "evaluate_every": spec.evaluate_every}
            joint = self._joint_settings()
        self._record(folder, facts, stage, joint)
        if not self._done(folder):
            self._train(folder, spec, facts, stage | ({"joint": joint} if joint else {}))
        if reward:
            return  # it answers no questions
        epochs = self.ranks.on_first(folder.ending)[EPOCHS]
        for epoch in range(1 if self.config.evals.epochs == "all" else epochs, epochs + 1):
            self._evaluate(folder, folder.model(epoch), epoch)

    def _done(self, folder: RunFolder) -> bool:
        self.ranks.on_first(folder.check)
        return self.ranks.on_first(folder.complete.is_file)

    def _stage_settings(self, method: str) -> dict[str, Any]:
        """The preference stage's settings without those that a run of `method` does not read, or that are in its name."""
        unread = {"beta"} if METHODS[method].loss == "sparse" else {"beta", "sparse"}
        settings = {k: v for k, v in as_dict(self.config.preference).items() if k not in unread}
        return settings | {"loss_args": settings["loss_args"].get(method, {})}

    def _joint_settings(self) -> dict[str, Any]:
        settings = as_dict(self.config.joint)
        return {k: v for k, v in settings.items() if k not in ("lambdas", "evaluate_every")}

    def _record(self, folder: RunFolder, facts: dict[str, Any], stage: dict[str, Any], joint: dict[str, Any] | None) -> None:
        config = self.config
        sections = {"world": config.world, "model": config.model, "sft": config.sft, "preference": stage}
        sections |= {"joint": joint} if joint else {}
        self.ranks.on_first(lambda: record(folder.path, sections, facts | {"seed": config.preference.seed}))

    def _train(
        self,
        folder: RunFolder,
        spec: RunSpec,
        facts: dict[str, Any],
        recipe: dict[str, Any],
        optimum: PreferenceConfig | None = None,
    ) -> None:
        """Train one run. With the settings of `optimum` it minimizes one objective, to find its optimum."""
        config, rows = self.config, self._preference_rows
        joint = None if spec.weight is None else self._joint(spec, {} if optimum else self.optima)
        fresh = joint is not None and config.joint.start == "base"
        job = Job(
            folder.path,
            f"[seed {self.seed}] {spec.label}",
            spec.method,
            optimum or config.preference,
            rows["train"],
            rows.get("eval"),
            beta=facts["beta"],
            base=self._base_words if fresh else str(self.start),
            recipe={k: v for k, v in facts.items() if k in ("method", "beta", "lambda", "evaluate_every")} | recipe,
            validation=self._joint_rows.get("eval", []) if joint else (),
            joint=joint,
            report_to=self.report_to,
            project=config.study.name,
        )
        if METHODS[spec.method].reward:
            seed, padding = config.preference.seed, self.tokenizer.pad_token_id
            model = self._prepared(lambda: load_reward_model(config.model, self.start, padding, seed))
            RewardTrainer(job, model, self.tokenizer, self.device, config.model.bf16, ranks=self.ranks).run()
            return
        start = lambda: load_model(config.model, self.start)  # noqa: E731
        reference = (lambda: self._prepared(start)) if fresh else None
        model = self._prepared(self._fresh_model if fresh else start)
        train(job, model, self.tokenizer, self.device, config.model.bf16, reference, self.ranks)

    def _prepared(self, load: Callable[[], Any], settings: ModelConfig | None = None, seed: int | None = None) -> Any:
        """The model that `load` returns, which one process loads for all, ready to be trained (by default as methods are)."""
        config = self.config
        seed = config.preference.seed if seed is None else seed
        return prepare(outlined(load, self.ranks), settings or config.model, self.device, seed, self.ranks)

    def _joint(self, spec: RunSpec, optima: dict[str, float]) -> Joint:
        """The supervised stream of a joint run, and what it goes by. The runs that find optima have none, and do not stop."""
        joint = self.config.joint
        assert spec.weight is not None
        return Joint(
            self._joint_rows["train"],
            spec.weight,
            joint.train_batch_size or self.config.preference.train_batch_size,
            optima or None,
            spec.evaluate_every or 1,
            joint.objective_rows,
            joint.stop_gap if optima else None,
            self._good_enough(spec),
        )

    @cached_property
    def optima(self) -> dict[str, float]:
        """The least value of each objective: as configured, or found by optimizing each one alone, and kept in `optima/`."""
        given = self.config.joint.optima
        if given is not None:
            return given
        stage = self._stage_settings("alright")
        joint = {k: v for k, v in self._joint_settings().items() if k not in ("optima", "stop_gap", "stop_pareto")}
        found = {}
        for name, weight in zip(STREAMS, (1.0, 0.0)):
            folder = self.home.optimum(name)
            spec = RunSpec("alright", None, name, f"optimum of {name}", weight)
            facts = {"name": name, "kind": "optimum", "method": "alright", "label": spec.label, "beta": self.config.joint.beta}
            self._record(folder, facts | {"lambda": weight}, stage, joint)
            if not self._done(folder):
                epochs = self.config.joint.optima_epochs or self.config.preference.num_train_epochs
                alone = dataclasses.replace(self.config.preference, num_train_epochs=epochs, export="last")
                self._train(folder, spec, facts, stage | {"joint": joint}, optimum=alone)
            found[name] = self.ranks.on_first(lambda folder=folder, name=name: least(folder, measured(objective(name))))
        self.ranks.on_first(lambda: write_json(self.home.optima, sealed(found)))
        return found

    def _good_enough(self, spec: RunSpec) -> list[list[float]]:
        """Points [preference, sft] at which a run may stop: as configured, or where this seed's ALRIGHT runs have ended."""
        given = self.config.joint.stop_pareto
        if given is not None or spec.method == "alright":
            return given or []
        return self.ranks.on_first(self._ends_of_alright)

    def _ends_of_alright(self) -> list[list[float]]:
        points = []
        for run in self.home.runs():
            if run.name.startswith("alright_lambda") and run.finished:
                points.append([run.lines()[-1][measured(objective(name))] for name in STREAMS])
        return points

    @property
    def _base_words(self) -> str:
        """What the supervised stage starts from, in words."""
        config = self.config.model
        return config.model_name_or_path or f"a fresh {config.architecture.get('model_type')}"

    @property
    def start(self) -> Path | str:
        """Where the methods start: the supervised stage's last model, or the given model itself."""
        epochs = self._epochs(self.config.sft)
        if epochs:
            return self.home.supervised.model(epochs)
        return str(self.config.model.model_name_or_path)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of all models of this study."""
        return load_tokenizer(self._words, self.config.model.chat_template)

    @cached_property
    def _outline(self) -> Any:
        """The model of this study without its weights, once the tokenizer is known to belong to it."""
        return fitted(self.config.model, self.tokenizer)

    @property
    def _words(self) -> str | Path:
        """Where the study's tokenizer is."""
        model = self.config.model
        return self.home.tokenizer if model.words is None or model.chat_template is not None else model.words

    @cached_property
    def _supervised_rows(self) -> dict[str, Any]:
        return self._loaded("sft", self.config.sft.data, load_sft)

    @cached_property
    def _preference_rows(self) -> dict[str, Any]:
        return self._loaded("preference", self.config.preference.data, load_preferences)

    @cached_property
    def _joint_rows(self) -> dict[str, Any]:
        if self.config.joint.data is None:
            return self._supervised_rows
        return self._loaded("joint", self.config.joint.data, partial(load_sft, kind="joint"))

    def _loaded(self, kind: str, data: DataConfig, load: Any) -> dict[str, Any]:
        """Rows of both parts, checked; what was left out is printed and kept in data_report.json. One process reads for all.

        Raises ValueError if they are not those that this study was begun with.
        """
        return self.ranks.on_first(lambda: self._read(kind, data, load))

    def _read(self, kind: str, data: DataConfig, load: Any) -> dict[str, Any]:
        found, reports = {}, {}
        known = self.home.data_files
        for part in ("train", "eval"):
            if getattr(data, part):
                option = f"{kind}.data.{part}"
                split = data.train_split if part == "train" else data.eval_split
                same_files(known, local_files(getattr(data, part), split, option), option)
                model = self._outline
                found[part], report = load(data, self.tokenizer, part)
                check_positions(model, report.longest, option)
                same_rows(known, f"{option} {json.dumps(as_dict(data), sort_keys=True)}", option, rows_of(found[part]))
                reports[f"{kind}.data.{part}"] = report.as_dict()
                print(report.summary())
        if "train" not in found:
            raise ValueError(
                f"{kind}.data.train is empty; expected JSONL files or hub data sets, e.g. --{kind}.data.train rows.jsonl"
            )
        file = self.home.data_report
        before = read_json(file) if file.exists() else {}
        write_json(file, sealed(before | reports))
        return found

    def _texts(self) -> Any:
        config = self.config
        for kind, data in (("sft", config.sft.data), ("preference", config.preference.data), ("joint", config.joint.data)):
            if data is not None and data.train:
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
        return self.home.supervised.ending().get(EPOCHS, stage.num_train_epochs)

    def _evaluate(self, folder: RunFolder, model: Path | str, epoch: int) -> None:
        evals = self.config.evals
        output = folder.evaluation(epoch)
        if not (evals.tasks or evals.lm_eval_tasks):
            return
        words = None if Path(model).is_relative_to(self.home.path) else self._words  # a base model may have no template
        tokenizer = Path(words) if words else None
        if self.ranks.on_first(lambda: settled(output, fingerprint_of(evals, Path(model), tokenizer))):
            return
        if self.ranks.first:
            print(f"[seed {self.seed}] evaluating {folder.name}, epoch {epoch}", flush=True)
        where = {"run": folder.name, "epoch": epoch, "seed_dir": self.home.path, "device": str(self.device)}
        evaluate(Path(model), evals, output, **where, progress=sys.stderr.isatty(), tokenizer=tokenizer, ranks=self.ranks)


def least(run: RunFolder, key: str) -> float:
    """The smallest value that a run has logged of a figure."""
    return min(line[key] for line in run.lines() if key in line)


def rows_of(found: Preferences | Sequence[Example]) -> dict[str, Any]:
    """How many rows and tokens there are, and a hash of all of them."""
    examples = [*found.winners, *found.losers] if isinstance(found, Preferences) else found
    sequences = [ids for example in examples for ids in (example.prompt_ids, example.completion_ids)]
    return {"rows": len(examples), "tokens": sum(map(len, sequences)), "sha256": digest_of(sequences)}
