"""A finished evaluation is taken for what it is: one of other settings, files or versions is kept, and made again."""

import dataclasses
import json

import pytest

from ogdopt_harness.common.files import DamagedError, sealed, write_json
from ogdopt_harness.config.schema import EvalConfig, TaskConfig
from ogdopt_harness.evaluation import kept
from ogdopt_harness.evaluation.kept import fingerprint_of, settled


@pytest.fixture
def made(tmp_path):
    """(settings, model folder) of an evaluation."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (model / name).write_text("{}")
    for name in ("toy.jsonl", "style.json", "prompts.jsonl"):
        (tmp_path / name).write_text("{}\n")
    tasks = [TaskConfig("toy", str(tmp_path / "toy.jsonl"))]
    return EvalConfig(tasks, style=str(tmp_path / "style.json"), style_prompts=str(tmp_path / "prompts.jsonl")), model


CHANGES = {
    "limit": 4,
    "max_new_tokens": 7,
    "apply_chat_template": False,
    "system_instruction": "be brief",
    "lm_eval_tasks": ["piqa"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_decide_answers_count(name, made):
    config, model = made
    assert fingerprint_of(config, model, None) == fingerprint_of(config, model, None)
    assert fingerprint_of(dataclasses.replace(config, **{name: CHANGES[name]}), model, None) != fingerprint_of(
        config, model, None
    )


def test_how_the_work_is_cut_does_not_count(made):
    config, model = made
    assert fingerprint_of(dataclasses.replace(config, batch_size=3, epochs="last"), model, None) == fingerprint_of(
        config, model, None
    )


@pytest.mark.parametrize(
    "file",
    [
        "toy.jsonl",
        "style.json",
        "prompts.jsonl",
        "model/tokenizer.json",
        "model/chat_template.jinja",
        "model/model.safetensors",
    ],
)
def test_files_count_by_what_they_hold(file, made, tmp_path):
    config, model = made
    before = fingerprint_of(config, model, None)
    path = tmp_path / file
    path.write_bytes(path.read_bytes())
    assert fingerprint_of(config, model, None) == before
    path.write_text(path.read_text() + " ")
    assert fingerprint_of(config, model, None) != before


def test_versions_count(made, monkeypatch):
    config, model = made
    before = fingerprint_of(config, model, None)
    monkeypatch.setattr(kept, "version", lambda name: "0")
    assert fingerprint_of(config, model, None) != before


def test_evaluations_are_kept_by_fingerprint(tmp_path, capsys):
    output = tmp_path / "epoch-1.json"
    assert not settled(output, "a" * 64)
    write_json(output, sealed({"fingerprint": "a" * 64, "n": 1}))
    assert settled(output, "a" * 64) and capsys.readouterr().out == ""
    assert not settled(output, "b" * 64) and not output.exists()
    assert "have changed; kept as epoch-1.aaaaaaaaaaaa.json, evaluated again" in capsys.readouterr().out
    write_json(output, sealed({"fingerprint": "b" * 64, "n": 2}))
    assert settled(output, "a" * 64) and json.loads(output.read_text())["n"] == 1
    assert settled(output, "b" * 64) and json.loads(output.read_text())["n"] == 2
    output.write_text("{}x")
    with pytest.raises(DamagedError, match=r"epoch-1.json is not valid JSON"):
        settled(output, "b" * 64)
