"""The configuration of one seed: its own paths and seeds in the place of a study's."""

from __future__ import annotations

import dataclasses
from typing import Any

from ogdopt_harness.config.schema import Config, EvalConfig


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

    joint = config.joint
    if joint.data is not None:
        rows = dataclasses.replace(joint.data, train=filled(joint.data.train), eval=filled(joint.data.eval))
        joint = dataclasses.replace(joint, data=rows)
    evals: EvalConfig = config.evals
    tasks = [dataclasses.replace(task, path=filled(task.path)) for task in evals.tasks]
    files = {name: filled(getattr(evals, name)) for name in ("style", "style_prompts", "lm_eval_data")}
    evals = dataclasses.replace(evals, tasks=tasks, **files)
    world = config.world and dataclasses.replace(config.world, seed=config.world.seed + seed)
    stages = {"sft": data_of(config.sft), "preference": data_of(config.preference), "joint": joint}
    return dataclasses.replace(config, world=world, evals=evals, **stages)
