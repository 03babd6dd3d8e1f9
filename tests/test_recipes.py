"""Recipes of papers: their values, a dry run where nothing can be fetched, and the same recipe made small, to its end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.config import RECIPES, parse
from harness.methods import runs
from harness.model import architecture, meta_model

ROOT = Path(__file__).parent.parent
HUB = ROOT.parent / "shared" / "data" / "hub_format"
JOINT = {  # paper "joint SFT and DPO", appendix D.2 and D.3, and its published scripts
    "joint_pythia_1b": dict(
        parameters=1_011_781_632, r=32, targets=["query_key_value"], checkpointing=False, epochs=6, pairs=8000, batches=(8, 24),
        lambdas=[0.01, 0.25, 0.5, 0.75, 0.99], steps=1000, micro=4,
    ),
    "joint_llama3_8b": dict(
        parameters=8_030_261_248, r=16, targets=["q_proj", "v_proj"], checkpointing=True, epochs=4, pairs=6000, batches=(4, 16),
        lambdas=[0.25, 0.5, 0.75], steps=1500, micro=1,
    ),
}  # fmt: skip


def start(*words, **options):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "harness" / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, **options)


@pytest.mark.parametrize("name", JOINT)
def test_values_of_joint_training(name):
    config, paper = parse(["--config", str(RECIPES / f"{name}.yaml")]), JOINT[name]
    stage, lora = config.preference, config.model.lora
    assert lora is not None and (lora.r, lora.lora_alpha, lora.lora_dropout) == (paper["r"], paper["r"], 0)
    assert lora.target_modules == paper["targets"] and config.model.gradient_checkpointing == paper["checkpointing"]
    assert sum(p.numel() for p in meta_model(architecture(config.model)).parameters()) == paper["parameters"]
    for found in (config.sft, stage):
        assert (found.optimizer, found.optimizer_args, found.learning_rate) == ("Adam", {"betas": [0.9, 0.95]}, 5e-5)
        assert (found.max_grad_norm, found.seed, found.num_train_epochs) == (1.0, 42, paper["epochs"])
        assert found.data.max_length == 2048 and not found.train_on_prompt
    assert (stage.lr_scheduler_type, stage.warmup(6000)) == ("constant_with_warmup", 0)
    sft = config.sft
    assert (sft.lr_scheduler_type, sft.lr_scheduler_kwargs, sft.warmup_ratio) == (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.1},
        0.03,
    )
    assert sft.data.columns["completion"] == "chosen" and sft.data.max_train_rows == 24_000
    joint = config.joint
    assert joint.data is not None and joint.data.max_train_rows == 24_000 and stage.data.max_train_rows == paper["pairs"]
    assert (stage.train_batch_size, joint.train_batch_size) == paper["batches"]
    assert stage.per_device_train_batch_size == paper["micro"]
    assert 24_000 / paper["batches"][1] == paper["pairs"] / paper["batches"][0] == paper["steps"]
    assert (joint.beta, joint.start, joint.stop_gap, joint.evaluate_every) == (0.1, "base", 1e-4, [10])
    assert joint.lambdas == paper["lambdas"]
    assert len(runs(config.methods, stage.beta, joint.lambdas, joint.evaluate_every)) == 5 * len(paper["lambdas"])


@pytest.mark.parametrize("name", JOINT)
def test_a_dry_run_where_nothing_can_be_fetched(name, tmp_path):
    """It reckons with the recipe's architecture, and says what it could not look at."""
    done = start("--config", str(RECIPES / f"{name}.yaml"), "--dry_run", "--world_size", "4", "--device", "cuda", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert f"{JOINT[name]['parameters']:,} parameters in float32" in text and "Not checked" in text
    for what in ("Dahoas/rm-hh-rlhf", "vicgalle/alpaca-gpt4", "no tokenizer at", "cais/mmlu"):
        assert what in text
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The pythia recipe to its end: real rows in the hub's columns, a tiny model of the same architecture, all stages."""
    rows = {name: HUB / f"{name}.jsonl" for name in ("Dahoas__rm-hh-rlhf", "vicgalle__alpaca-gpt4")}
    if not all(path.is_file() for path in rows.values()):
        pytest.skip(f"the real rows are not at {HUB}")
    folder = tmp_path_factory.mktemp("study")
    pairs, instructions = map(str, rows.values())
    tiny = {"model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 2048}  # fmt: skip
    words = ["--config", str(RECIPES / "joint_pythia_1b.yaml"), "--study.output_dir", str(folder), "--device", "cpu"]
    words += ["--model.architecture", json.dumps(tiny), "--model.model_name_or_path", "null", "--threads", "1"]
    words += ["--model.tokenizer_name_or_path", "null", "--model.vocab_size", "600", "--evals.lm_eval_tasks", "[]"]
    words += ["--sft.data.train", pairs, "--preference.data.train", pairs, "--joint.data.train", instructions]
    words += ["--preference.data.eval", pairs, "--preference.data.max_train_rows", "32", "--joint.data.max_train_rows", "96"]
    words += ["--preference.data.max_eval_rows", "8", "--sft.data.max_train_rows", "36", "--joint.objective_rows", "8"]
    for stage in ("sft", "preference"):
        words += [f"--{stage}.num_train_epochs", "1", f"--{stage}.data.max_length", "192", f"--{stage}.learning_rate", "5e-3"]
    words += ["--joint.data.max_length", "192", "--joint.lambdas", "0.5", "--preference.eval_steps", "4"]
    done = start(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_the_small_recipe_finds_optima_and_compares_schedules(small):
    folder, out = small
    optima = json.loads((folder / "seed-0/optima/optima.json").read_text())
    assert set(optima) == {"preference", "sft"}
    gaps = json.loads((folder / "gaps.json").read_text())
    names = [f"{method}_lambda0.5" for method in ("sequential", "sequential_sft_first", "mix", "alright")]
    assert set(gaps) == {*names, "maxright_lambda0.5_every10"}
    for name, found in gaps.items():
        first = json.loads((folder / "seed-0" / name / "metrics.jsonl").read_text().splitlines()[0])
        assert first["eval_rewards/margins"] != 0  # the reference is not the start
        assert found["sft"][0] < first["eval_objective/sft"]
        assert found["gap_sft"][0] == pytest.approx(found["sft"][0] - optima["sft"])
    assert "nearest to the ideal point" in " ".join(out.split()) and (folder / "gaps.md").is_file()
    assert (folder / "figures/joint_pareto.svg").is_file()


def test_the_small_recipe_trains_adapters_and_keeps_one_model_a_run(small):
    folder, _ = small
    for run in (folder / "seed-0").glob("*_lambda*"):
        (model,) = (run / "model").iterdir()
        assert (model / "adapter" / "adapter_model.safetensors").is_file() and (model / "model.safetensors").is_file()
        assert "User: " in (model / "chat_template.jinja").read_text()
