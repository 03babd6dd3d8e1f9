"""LoRA: adapters alone are trained, measured without dropout, resumed bit for bit, and exported merged."""

import dataclasses
import json
import os
import signal
import sys

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ogdopt_harness.commands.usage import parse
from ogdopt_harness.config.schema import Config, DataConfig, LoraConfig, ModelConfig
from ogdopt_harness.data.examples import collate
from ogdopt_harness.modeling.adapters import adapted, bare, merged
from ogdopt_harness.modeling.export import export
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.pipeline.stages import SeedStudy
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.joint import Joint
from ogdopt_harness.training.methods import METHODS
from ogdopt_harness.training.progress import Stopped
from ogdopt_harness.training.trainer import Trainer, train
from tests import small

peft = pytest.importorskip("peft")
LORA = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.2)
SETTINGS = dataclasses.replace(small.MODEL, lora=LORA)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


def run(folder, tok, method, settings=SETTINGS, start=0, **changes):
    data, held_out = small.preferences(tok), small.preferences(tok, seed=5)
    joint = Joint(small.preferences(tok, n=7, seed=3).losers, 0.5, 4) if METHODS[method].schedule else None
    beta = 0.5 if METHODS[method].swept else None
    job = Job(folder, method, method, small.stage(**changes), data, held_out, beta=beta, joint=joint)
    model = prepare(small.model(tok, start), settings, CPU, seed=1)
    train(job, model, tok, CPU)
    return model


def batch(tok, seed=5):
    rows = small.preferences(tok, seed=seed)
    return collate(rows.winners + rows.losers, tok.pad_token_id)


def scores(model, tok):
    model.eval()
    with torch.no_grad():
        return completion_logps(model, *batch(tok)).logp


def stirred(model):
    """The model with adapters that do something."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p) if "lora_B" in name else 0.0)
    return model


@pytest.mark.parametrize("method", ["sft", "dpo", "ogd", "ogd_metric", "alright", "maxright"])
def test_adapters_are_trained_and_the_weights_are_not(method, tok, tmp_path):
    """Off, the adapters leave the model that the run started from, bit for bit; the export is the model with them on."""
    model = run(tmp_path, tok, method)
    start = small.model(tok)
    assert not torch.allclose(scores(model, tok), scores(start, tok))
    with model.disable_adapter():
        assert torch.equal(scores(model, tok), scores(start, tok))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "epoch-2")
    assert type(plain) is type(start) and plain.state_dict().keys() == start.state_dict().keys()
    torch.testing.assert_close(scores(plain, tok), scores(model, tok), rtol=1e-5, atol=1e-5)
    beside = peft.PeftModel.from_pretrained(start, tmp_path / "model" / "epoch-2" / "adapter")
    assert torch.equal(scores(beside, tok), scores(model, tok))
    saved = FileSystemReader(sorted((tmp_path / "checkpoint").iterdir())[-1]).read_metadata().state_dict_metadata
    assert saved and all("lora_" in name for name in saved)


@pytest.mark.parametrize("method", ["ogd", "dpo", "alright"])
def test_a_stopped_run_goes_on_bit_for_bit(method, tok, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", tok, method)
    step = Trainer.step

    def interrupted(self, k):
        if k == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, k)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", tok, method)
    monkeypatch.setattr(Trainer, "step", step)
    cut = run(tmp_path / "cut", tok, method)
    assert torch.equal(small.vector(cut), small.vector(whole))
    drop = lambda folder: [  # noqa: E731
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert drop(tmp_path / "cut") == drop(tmp_path / "whole")


def test_a_checkpoint_of_other_adapters_is_refused(tok, tmp_path):
    run(tmp_path, tok, "sft", max_steps=1)
    (tmp_path / "complete.json").unlink()
    with pytest.raises(ValueError, match=r"28 trained tensors and the model trains 28; 28 differ in name or shape \(base_"):
        run(tmp_path, tok, "sft", dataclasses.replace(SETTINGS, lora=LoraConfig(r=3)), max_steps=1)


@pytest.mark.parametrize("kind", ["mistral", "gpt2"])
def test_the_head_alone_path_sees_the_adapters(kind, tok):
    """Scored through hidden states, as through the whole model's logits; `base_model` of an adapted model is another thing."""
    shape = GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    plain = small.model(tok) if kind == "mistral" else GPT2LMHeadModel(shape)
    model = stirred(prepare(plain, SETTINGS, CPU))
    rows = batch(tok)
    model.eval()
    logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None])[..., 0]
    expected = (logps * rows.loss_mask[:, 1:]).sum(-1)
    torch.testing.assert_close(completion_logps(model, *rows).logp, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], ["c_attn", "wte"]])
def test_merged_weights_are_peft_s_and_leave_the_model_alone(targets, tok, tmp_path):
    shape = dict(vocab_size=len(tok), n_embd=16, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings="wte" not in targets)
    settings = dataclasses.replace(SETTINGS, lora=LoraConfig(r=2, target_modules=targets))
    model = stirred(prepare(GPT2LMHeadModel(GPT2Config(**shape)), settings, CPU))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ours = merged(model)
    export(model, tok, tmp_path / "out", "card")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected, theirs = scores(model, tok), model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7) for name in ours)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(scores(found, tok), expected, rtol=1e-5, atol=1e-5)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "out" / "adapter").iterdir()}


def test_gradient_checkpointing_behind_frozen_embeddings(tok):
    def gradients(checkpointing):
        settings = dataclasses.replace(small.MODEL, lora=LoraConfig(r=2), gradient_checkpointing=checkpointing)
        model = stirred(prepare(small.model(tok), settings, CPU, seed=3))
        (-completion_logps(model, *batch(tok)).logp.mean()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert all(g is not None and g.abs().sum() > 0 for name, g in plain.items() if "lora_A" in name)
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


def test_dropout_is_for_gradients_alone(tok, tmp_path):
    model = stirred(prepare(small.model(tok), SETTINGS, CPU))
    job = Job(tmp_path, "dpo", "dpo", small.stage(), small.preferences(tok), small.preferences(tok, seed=5), beta=0.1)
    trainer = Trainer(job, model, tok, CPU, False)
    rows = small.preferences(tok, seed=5)
    found = trainer.scorer.logps(rows.winners + rows.losers)[0]
    assert torch.equal(found, scores(model, tok)) and torch.equal(found, trainer.scorer.logps(rows.winners + rows.losers)[0])
    trainer.scorer.logps(rows.winners)
    assert not torch.equal(completion_logps(model, *batch(tok)).logp, found)


def test_same_seed_same_adapters(tok):
    one, two, other = (small.vector(prepare(small.model(tok), SETTINGS, CPU, seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_mistakes_are_named(tok, monkeypatch):
    model = small.model(tok)
    with pytest.raises(ValueError, match=r"target_modules is \['q'\]: .*; expected 'all-linear' or names .* down_proj, gate"):
        adapted(model, LoraConfig(target_modules=["q"]), 0)
    with pytest.raises(ValueError, match=r"\['lm_head'\], and this model ties its input and output embeddings"):
        adapted(model, LoraConfig(target_modules=["lm_head"]), 0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"model\.lora needs the package peft, which is not installed; install it"):
        adapted(model, LORA, 0)
    for wrong in ({"r": 0}, {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"target_modules": []}):
        with pytest.raises(ValueError, match=rf"model\.lora\.{next(iter(wrong))} is .*; expected"):
            Config(model=ModelConfig("somewhere", lora=LoraConfig(**wrong)))


def test_options_on_the_command_line():
    assert parse([]).model.lora is None
    assert parse(["--model.lora", "{r: 64, lora_alpha: 128, target_modules: [q_proj, v_proj]}"]).model.lora == LoraConfig(
        64, 128, 0.0, ["q_proj", "v_proj"]
    )
    assert parse(["--model.lora.r", "4"]).model.lora == LoraConfig(r=4)


def test_a_model_that_knows_nothing_has_its_supervised_stage_whole(tok, tmp_path, monkeypatch):
    """What is built from an architecture is trained whole first; a given model has adapters in both stages."""
    seen = []
    monkeypatch.setattr("ogdopt_harness.pipeline.stages.train", lambda job, model, *rest, **named: seen.append(model))
    monkeypatch.setattr(SeedStudy, "_evaluate", lambda *args: None)
    monkeypatch.setattr(SeedStudy, "_supervised_rows", {"train": small.preferences(tok).winners})
    monkeypatch.setattr(SeedStudy, "tokenizer", tok)
    small.model(tok).save_pretrained(tmp_path / "given")
    words = ["--model.lora.r", "2", "--study.output_dir", str(tmp_path / "out")]
    for given in ("null", str(tmp_path / "given")):
        config = parse([*words, "--model.model_name_or_path", given])
        model = dataclasses.replace(config.model, architecture=small.ARCHITECTURE)
        config = dataclasses.replace(config, model=model, sft=dataclasses.replace(config.sft, data=DataConfig(train=["x"])))
        monkeypatch.setattr("ogdopt_harness.pipeline.stages.record", lambda *args: None)
        SeedStudy(config, 0).supervised()
    assert [bare(model) is model for model in seen] == [True, False]
