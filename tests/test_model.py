"""Scoring at completion positions alone, tokenizers trained here, folders written whole, and the errors."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ogdopt_harness.config.schema import ModelConfig
from ogdopt_harness.data.examples import collate
from ogdopt_harness.modeling.build import build_model, check_attention, load_model
from ogdopt_harness.modeling.export import export
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.modeling.tokenizer import load_tokenizer, train_tokenizer
from tests import small


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


def reference_logps(model, batch):
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return torch.where(batch.loss_mask[:, 1:], logps, 0.0)


def test_completion_logps_equal_the_full_softmax_and_its_gradient(tok):
    model = small.model(tok)
    batch = collate(small.preferences(tok).winners, tok.pad_token_id)
    completion = completion_logps(model, *batch)
    expected = reference_logps(model, batch)
    torch.testing.assert_close(completion.logps, expected)
    assert torch.equal(completion.mask, batch.loss_mask[:, 1:])
    ours = torch.autograd.grad(completion.logp.sum(), list(model.parameters()))
    theirs = torch.autograd.grad(expected.sum(), list(model.parameters()))
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_a_sequence(tok):
    model = small.model(tok)
    rows = small.preferences(tok).winners
    alone = torch.cat([completion_logps(model, *collate([row], tok.pad_token_id)).logp for row in rows])
    together = completion_logps(model, *collate(rows, tok.pad_token_id)).logp
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_models_that_rescale_their_logits_are_scored_through_their_own_forward(tok):
    size = dict(vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model("cohere", logit_scale=0.25, **size)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    batch = collate(small.preferences(tok).winners, tok.pad_token_id)
    torch.testing.assert_close(completion_logps(model, *batch).logps, reference_logps(model, batch))


def test_an_exported_folder_gives_the_same_scores(tok, tmp_path):
    model = small.model(tok)
    batch = collate(small.preferences(tok).winners, tok.pad_token_id)
    export(model, tok, tmp_path / "m", "# card\n")
    again, its_tokenizer = load_model(small.MODEL, tmp_path / "m"), load_tokenizer(tmp_path / "m")
    assert torch.equal(completion_logps(again, *batch).logps, completion_logps(model, *batch).logps)
    assert its_tokenizer.chat_template == tok.chat_template and len(its_tokenizer) == len(tok)
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names


def test_a_failed_export_leaves_the_old_folder(tok, tmp_path):
    model = small.model(tok)
    export(model, tok, tmp_path / "m", "old")
    with pytest.raises(TypeError):
        export(model, tok, tmp_path / "m", None)  # type: ignore[arg-type]
    assert (tmp_path / "m" / "README.md").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "m"]


def test_same_seed_same_weights(tok):
    assert torch.equal(small.vector(small.model(tok, 3)), small.vector(small.model(tok, 3)))
    assert not torch.equal(small.vector(small.model(tok, 3)), small.vector(small.model(tok, 4)))


def test_the_chat_template_tokenizes_as_it_reads(tok):
    chat = [{"role": "user", "content": "what is rome ?"}, {"role": "assistant", "content": "a . "}]
    text = tok.apply_chat_template(chat, tokenize=False)
    assert text == "<s>[INST] what is rome ? [/INST] a . </s>"
    ids = tok(text, add_special_tokens=False).input_ids
    assert tok.convert_ids_to_tokens(ids) == ["<s>", "[INST]", "what", "is", "rome", "?", "[/INST]", "a", ".", "</s>"]


def test_a_byte_level_tokenizer_writes_any_text(tmp_path):
    config = ModelConfig(None, small.ARCHITECTURE, None, "bpe", 300)
    bpe = train_tokenizer(["the quick brown fox"], config, tmp_path / "bpe")
    for text in ("the quick", "Grüße, 世界 🎉", "a\n\tb"):
        assert bpe.decode(bpe(text, add_special_tokens=False).input_ids) == text
    assert load_tokenizer(tmp_path / "bpe")("the fox").input_ids == bpe("the fox").input_ids


def test_dropout_is_off_in_training(tok):
    config = ModelConfig(None, {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}, None)
    model = prepare(build_model(config, tok, 0), config, torch.device("cpu"))
    batch = collate(small.preferences(tok).winners, tok.pad_token_id)
    assert torch.equal(completion_logps(model, *batch).logps, completion_logps(model, *batch).logps)


def test_gradient_checkpointing_changes_no_gradient(tok):
    batch = collate(small.preferences(tok).winners, tok.pad_token_id)
    gradients = []
    for checkpointing in (False, True):
        config = ModelConfig(None, small.ARCHITECTURE, None, gradient_checkpointing=checkpointing)
        model = prepare(build_model(config, tok, 0), config, torch.device("cpu"))
        gradients.append(torch.autograd.grad(completion_logps(model, *batch).logp.sum(), list(model.parameters())))
    assert all(torch.equal(x, y) for x, y in zip(*gradients))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda tok, path: load_tokenizer(path / "nothing"), "model.tokenizer_name_or_path: there is no folder or file"),
        (lambda tok, path: load_model(small.MODEL, path / "nothing"), "model.model_name_or_path: there is no folder or file"),
        (lambda tok, path: build_model(ModelConfig(None, {}, None), tok, 0), "model.architecture.model_type is 'None'"),
        (lambda tok, path: build_model(ModelConfig(None, {"model_type": "mistrall"}, None), tok, 0), "'mistrall'; expected"),
    ],
)
def test_what_cannot_be_had_is_named(act, message, tok, tmp_path):
    with pytest.raises(ValueError, match=message):
        act(tok, tmp_path)


# ---- attention ------------------------------------------------------------------------------------------------------------


def test_attention_is_sdpa_unless_something_else_is_chosen(tok):
    chosen = {name: replace(small.MODEL, attn_implementation=name) for name in (None, "sdpa", "eager")}
    models = {name: build_model(config, tok, 0) for name, config in chosen.items()}
    assert [model.config._attn_implementation for model in models.values()] == ["sdpa", "sdpa", "eager"]
    for config in chosen.values():
        check_attention(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "device", "bf16", "installed", "message"),
    [
        ("flash_attention_2", "cpu", True, True, "'flash_attention_2': it needs a GPU, and this is cpu. Without that option"),
        ("flash_attention_2", "cuda", True, False, "its package is not installed here .pip install flash-attn"),
        ("flash_attention_2", "cuda", False, True, "it computes in 16 bits alone; set model.bf16 to true"),
        ("flash_atention", "cuda", True, True, "there is no such attention; expected flash_attention_2 or one of sdpa, eager"),
    ],
)
def test_attention_that_cannot_be_computed_is_refused(name, device, bf16, installed, message, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: installed)
    with pytest.raises(ValueError, match=message):
        check_attention(replace(small.MODEL, attn_implementation=name, bf16=bf16), torch.device(device))
    if name == "flash_attention_2":
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
        check_attention(replace(small.MODEL, attn_implementation=name), torch.device("cuda"))
