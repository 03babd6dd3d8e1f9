"""What can be said against a study's settings before anything is read, loaded or written; the dry run asks the same.

`config/ranges.py` has checked every number by then. Here stands what needs the libraries that would use a setting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from ogdopt.three_d import Thresholds
from ogdopt_harness.config.located import located
from ogdopt_harness.config.ranges import numbers
from ogdopt_harness.config.schema import Config, ModelConfig, StageConfig
from ogdopt_harness.modeling.build import architecture, check_attention, meta_model
from ogdopt_harness.training.methods import RunSpec, check_loss_args, runs
from ogdopt_harness.training.trackers import chosen
from ogdopt_harness.training.trainer import schedule

MOST_LAYERS = 10_000


def preflight(config: Config, device: torch.device | None = None) -> list[RunSpec]:
    """The runs of a study whose settings can be used. Raises ValueError, one line a mistake, where they cannot."""
    specs = runs(config.methods, config.preference.beta, config.joint.lambdas, config.joint.evaluate_every)
    checks: list[Callable[[], object]] = [
        lambda: located(config, "data", config.study.seeds[0]),
        lambda: check_thresholds(config.preference.warn_at),
        lambda: check_loss_args(config.preference.loss_args),
        lambda: chosen(config.report_to),
        lambda: check_start(config),
        lambda: check_joint(config, specs),
        lambda: check_stage("sft", config.sft),
        lambda: check_stage("preference", config.preference),
    ]
    if config.model.architecture:
        checks.append(lambda: check_architecture(config.model))
    if device is not None:
        checks += [lambda: check_present(device), lambda: check_attention(config.model, device)]
    if mistakes := list(dict.fromkeys(_mistakes(checks))):
        raise ValueError("\n".join(mistakes))
    return specs


def _mistakes(checks: list[Callable[[], object]]) -> Iterator[str]:
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def check_thresholds(given: dict[str, float]) -> None:
    """Raises ValueError unless `preference.warn_at` names thresholds of the 3D-properties."""
    try:
        Thresholds(**given)
    except (TypeError, ValueError) as error:
        names = ", ".join(f.name for f in dataclasses.fields(Thresholds))
        raise ValueError(f"preference.warn_at is {given}; expected positive numbers for any of {names} ({error})") from error


def check_joint(config: Config, specs: list[RunSpec]) -> None:
    """Raises ValueError where a method needs supervised rows and there are none."""
    joint = [spec.method for spec in specs if spec.weight is not None]
    if joint and not (config.joint.data or config.sft.data).train:
        raise ValueError(
            f"{joint[0]} trains on supervised rows together with the pairs, but joint.data.train and sft.data.train are empty; "
            "expected JSONL files or hub data sets, e.g. --joint.data.train rows.jsonl"
        )


def check_start(config: Config) -> None:
    """Raises ValueError where there is no model to start from."""
    model = config.model
    if model.model_name_or_path is None and not model.architecture:
        raise ValueError("model.architecture is empty and model.model_name_or_path null; give one of them")
    if model.model_name_or_path is None and not config.sft.data.train:
        raise ValueError("sft.data.train is empty and model.model_name_or_path is null; give one, or nothing is trained")
    for name in ("model_name_or_path", "tokenizer_name_or_path"):
        value = getattr(model, name)
        if value is not None and not value.strip():
            raise ValueError(f"model.{name} is {value!r}; expected a Hugging Face folder, a hub id, or null")


def check_stage(name: str, stage: StageConfig) -> None:
    """Raises ValueError for arguments that a stage's optimizer or schedule refuses."""
    dummy = [torch.zeros(1, requires_grad=True)]
    try:
        options = {"foreach": False} | stage.optimizer_args
        optimizer = getattr(torch.optim, stage.optimizer)(dummy, lr=stage.learning_rate, **options)
        dummy[0].grad = torch.ones(1)
        optimizer.step()
    except Exception as error:  # torch refuses what it is not made for in many ways: TypeError, ValueError, RuntimeError
        raise ValueError(
            f"{name}.optimizer_args is {stage.optimizer_args}, which {stage.optimizer} refuses ({_line(error)}); correct it"
        ) from error
    if not bool(torch.isfinite(dummy[0]).all()):
        raise ValueError(f"{name}.optimizer_args is {stage.optimizer_args}: a step with a gradient of 1 is not finite")
    try:
        schedule(stage, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=stage.learning_rate), 100)
    except Exception as error:  # transformers' schedules check their arguments as they use them
        raise ValueError(f"{name}.{_line(error)}") from error


def check_architecture(model: ModelConfig) -> None:
    """Raises ValueError for an architecture of which no model can be built. Nothing of it takes memory."""
    layers = model.architecture.get("num_hidden_layers", 1)
    if not all(isinstance(x, int) and 1 <= x <= MOST_LAYERS for x in numbers(layers)):
        raise ValueError(f"model.architecture.num_hidden_layers is {layers}; expected 1 to {MOST_LAYERS:,}")
    try:
        meta_model(architecture(model, model.vocab_size))
    except ValueError:
        raise
    except Exception as error:  # a constructor fails on what it cannot compute with: ZeroDivisionError, RuntimeError, ...
        raise ValueError(
            f"model.architecture: no {model.architecture.get('model_type')} can be built of {model.architecture} "
            f"({type(error).__name__}: {_line(error)}); correct that entry"
        ) from error


def check_present(device: torch.device) -> None:
    """Raises ValueError for a device that this machine does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device is {str(device)!r}, which cannot be used here ({_line(error)}); choose another, or auto"
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
