"""Passes in training are those of evaluation; scores are those of the forward pass; exports are what was trained."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ogdopt_harness.config.schema import LoraConfig, ModelConfig
from ogdopt_harness.modeling import shard
from ogdopt_harness.modeling.build import blocks, load_model
from ogdopt_harness.modeling.passes import check_passes, head_alone, quiet
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.training import exports
from tests import hf

CPU = torch.device("cpu")
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def built(kind, **changes):
    torch.manual_seed(0)
    return hf.sharper(AutoModelForCausalLM.from_config(hf.config(kind, **changes)))


def batch():
    ids = torch.arange(3, 43).view(2, 20)
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, :10] = False
    return ids, torch.ones_like(ids), scored


def forward(model):
    """Log-probabilities of the scored tokens by the model's own forward pass."""
    ids, mask, scored = batch()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    return (logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * scored[:, 1:]).sum(1)


# ---- training passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "noise"),
    [
        ("llama", {"attention_dropout": 0.3}),
        ("gpt2", {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}),
        ("opt", {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5}),
        ("mixtral", {"router_jitter_noise": 0.5, "attention_dropout": 0.2} | EXPERTS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pass_in_training_is_one_in_evaluation_whatever_makes_the_noise(kind, noise, checkpointing):
    config = ModelConfig(gradient_checkpointing=checkpointing)
    noisy = built(kind, **noise).train()
    assert not torch.equal(forward(noisy), forward(noisy))
    model = prepare(built(kind, **noise), config, CPU)
    passes = [completion_logps(model, *batch()).logp for _ in range(2)]
    assert torch.equal(*passes)
    torch.testing.assert_close(passes[0], forward(model.eval()))
    calls = []
    inner = next(m for m in blocks(model)[0].modules() if type(m).__name__.endswith("Norm"))
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    quiet(model)
    completion_logps(model, *batch()).logp.sum().backward()
    assert len(calls) == 1 + checkpointing  # activations are still recomputed


def test_noise_that_cannot_be_turned_off_is_refused():
    model = built("llama").eval()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, out: out + torch.rand(out.shape))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: two passes in training differ by .*; turn its noise off"):
        check_passes(model)


def test_a_model_that_cannot_run_is_refused_by_name():
    broken = built("llama")
    broken.model.layers[0].forward = lambda *_, **__: 1 / 0
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM cannot be run on a short text .*ZeroDivisionError: division by zero"
    ):
        prepare(broken, ModelConfig(), CPU)


# ---- scores ---------------------------------------------------------------------------------------------------------------


def multimodal(**text):
    text = hf.config("gemma3_text", query_pre_attn_scalar=8, **text).to_dict()
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    options = dict(vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4, image_token_index=500)
    config = AutoConfig.for_model("gemma3", text_config=text, **options)
    torch.manual_seed(0)
    return hf.sharper(AutoModelForImageTextToText.from_config(config))


SCALED = {
    "a scale": lambda: built("cohere", logit_scale=0.25),
    "a division": lambda: built("granite", logits_scaling=4.0),
    "a cap": lambda: built("gemma2", final_logit_softcapping=30.0),
    "a cap under another name": lambda: built("recurrent_gemma", block_types=["recurrent", "attention"], logits_soft_cap=2.0),
    "something else": lambda: odd(),
}
KINDS = ("llama", "phi", "gemma3_text", "mamba")
PLAIN = {kind: lambda kind=kind: built(kind) for kind in KINDS} | {"images": multimodal}


def odd():
    """A model whose forward pass halves its hidden states."""
    model = built("llama")
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: (0.5 * inputs[0],))
    return model


@pytest.mark.parametrize("name", [*SCALED, *PLAIN])
def test_a_score_is_the_forward_pass_whatever_stands_behind_the_head(name):
    model = (SCALED | PLAIN)[name]().eval()
    if name != "something else":
        assert head_alone(model) == (name in PLAIN)
    torch.testing.assert_close(completion_logps(model, *batch()).logp, forward(model))


def test_a_cap_is_seen_where_it_does_nothing_yet():
    model = built("gemma2", final_logit_softcapping=30.0).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    assert not head_alone(model)


def test_the_plain_forward_pass_is_said_and_the_check_is_made_once(monkeypatch):
    with pytest.warns(UserWarning, match="Gemma2ForCausalLM changes what its head says"):
        prepare(built("gemma2"), ModelConfig(), CPU)
    seen = []
    monkeypatch.setattr("ogdopt_harness.modeling.score.head_alone", lambda model: seen.append(model) or True)
    model = prepare(built("llama"), ModelConfig(), CPU)
    completion_logps(model, *batch())
    assert not seen and shard.head_alone(model)  # prepare looked
    raw = built("llama")
    completion_logps(raw, *batch())
    completion_logps(raw, *batch())
    assert seen == [raw]


# ---- exports --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt2"])
def test_adapters_of_experts_are_merged_into_what_they_change(kind, tmp_path):
    hf.model(tmp_path / "m", kind, words=False, **EXPERTS)
    model = prepare(load_model(ModelConfig(), tmp_path / "m"), ModelConfig(lora=LoraConfig(r=2)), CPU)
    before = completion_logps(model, *batch()).logp
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    trained = completion_logps(model, *batch()).logp
    assert (trained - before).abs().min() > 0.01
    from ogdopt_harness.modeling.adapters import save

    save(model, tmp_path / "x")
    again = load_model(ModelConfig(), tmp_path / "x").eval()
    torch.testing.assert_close(completion_logps(again, *batch()).logp, trained, rtol=1e-5, atol=1e-4)


@pytest.fixture
def study(tmp_path):
    hf.model(tmp_path / "m")
    rows = [hf.write(tmp_path / f"{name}.jsonl", hf.pairs(8, seed)) for seed, name in enumerate(("train", "eval"))]
    return tmp_path, lambda **changes: hf.recipe(tmp_path, tmp_path / "m", rows[0], held_out=rows[1], **changes)


@pytest.mark.parametrize("held_out", [True, False])
def test_an_export_that_is_not_the_trained_model_fails_the_run_and_a_next_start_goes_on(study, monkeypatch, capsys, held_out):
    folder, recipe = study
    data = {"train": [str(folder / "train.jsonl")], "max_length": 200, "max_prompt_length": 100}
    file = recipe(**({} if held_out else {"data": data}))
    real = exports.load_pretrained
    monkeypatch.setattr(exports, "load_pretrained", lambda *a, **b: hf.sharper(real(*a, **b), 1.1))
    assert hf.start(monkeypatch, "--config", file) == 2
    said = capsys.readouterr().err
    assert "epoch-1 is not the model that was trained: a row of " in said and "The checkpoint is kept" in said
    run = folder / "out/seed-0/ogd"
    assert [p.name for p in (run / "model").iterdir()] == ["epoch-1.failed"] and not (run / "complete.json").exists()
    assert list((run / "checkpoint").glob("step-*"))
    before = (run / "metrics.jsonl").read_text()
    monkeypatch.setattr(exports, "load_pretrained", real)
    assert hf.start(monkeypatch, "--config", file) == 0, capsys.readouterr().err
    assert (run / "model/epoch-1/model.safetensors").is_file() and (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_held_out_rows_score_from_the_folder_as_in_the_last_line(study, monkeypatch, lora):
    from ogdopt_harness.config.schema import DataConfig
    from ogdopt_harness.data.examples import load_preferences
    from ogdopt_harness.modeling.tokenizer import load_tokenizer

    folder, recipe = study
    assert hf.start(monkeypatch, "--config", recipe(methods=["dpo"], lora=lora)) == 0
    exported = folder / "out/seed-0/dpo_beta0.1/model/epoch-1"
    tok, model = load_tokenizer(exported), AutoModelForCausalLM.from_pretrained(exported).eval()
    found, _ = load_preferences(DataConfig(train=[str(folder / "eval.jsonl")]), tok, "train")
    logps = []
    for row in found.winners:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        logps.append(float(logs[len(row.prompt_ids) - 1 :].sum()))
    lines = hf.lines(folder, "dpo_beta0.1")
    assert lines[0]["eval_logps/chosen"] != lines[-1]["eval_logps/chosen"]
    assert sum(logps) / len(logps) == pytest.approx(lines[-1]["eval_logps/chosen"], rel=1e-5)
    assert next(line["loss"] for line in lines if "loss" in line) == pytest.approx(math.log(2), abs=1e-5)
