"""Models as their owners keep them: every weight comes from the checkpoint, or one message says which does not and why."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from ogdopt_harness.config.schema import ModelConfig
from ogdopt_harness.evaluation.lm import generating, greedy
from ogdopt_harness.modeling.build import load_model, outline
from ogdopt_harness.modeling.fingerprint import BLOCK, BLOCKS, fingerprint
from ogdopt_harness.modeling.tokenizer import check_vocabulary, load_tokenizer
from tests import hf

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 205520\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    hf.model(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "m")
    return tmp_path / "m"


def stored(folder, change):
    """The folder with other names of weights: `change` gives the new name of each, or None."""
    file = folder / "model.safetensors"
    weights = {change(name): value for name, value in load_file(file).items() if change(name)}
    save_file(weights, file, metadata={"format": "pt"})


def settings(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- every weight ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [lambda f: load_model(ModelConfig(str(f)), f), lambda f: outline(ModelConfig(str(f)))])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: name if "lm_head" not in name else None, r"1 missing \(lm_head.weight\)"),
        (lambda name: name if "layers.1." not in name else None, r"9 missing \(model.layers.1.input_layernorm.weight, "),
        (lambda name: f"module.{name}", r"21 missing .*21 left over \(module.lm_head.weight, "),
    ],
    ids=["no head", "no layer", "prefixed"],
)
def test_a_checkpoint_without_all_weights_is_refused_with_and_without_reading_it(read, change, message, folder):
    assert read(folder).num_parameters() > 0
    stored(folder, change)
    with pytest.raises(ValueError, match=f"model.model_name_or_path: .* does not hold the weights of LlamaFor.*{message}"):
        read(folder)


def test_more_layers_than_the_configuration_and_other_shapes_are_refused(folder):
    settings(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match="9 left over"):
        load_model(ModelConfig(str(folder)), folder)
    settings(folder, num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(ValueError, match=r"6 of another shape .model.layers.0.mlp.down_proj.weight"):
        load_model(ModelConfig(str(folder)), folder)


def test_tied_weights_are_stored_once_and_complete(tmp_path):
    hf.model(tmp_path / "m", tie_word_embeddings=True)
    assert load_model(ModelConfig(), tmp_path / "m").config.tie_word_embeddings


# ---- what cannot be read --------------------------------------------------------------------------------------------------


def spoil(name, folder):
    weights = folder / "model.safetensors"
    half = weights.read_bytes()[: weights.stat().st_size // 2]
    quantized = lambda **more: settings(folder, quantization_config=more)  # noqa: E731
    return {
        "lfs": lambda: weights.write_text(LFS),
        "cut": lambda: weights.write_bytes(half),
        "empty": lambda: weights.write_bytes(b""),
        "shard": lambda: (
            weights.unlink(),
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}})
            ),
        ),
        "bitsandbytes": lambda: quantized(quant_method="bitsandbytes", load_in_4bit=True),
        "gptq": lambda: quantized(quant_method="gptq", bits=4),
        "code": lambda: settings(folder, model_type="mine", auto_map={"AutoConfig": "mine.Mine"}),
        "unknown": lambda: settings(folder, model_type="llama9"),
        "none": lambda: settings(folder, model_type=None),
        "t5": lambda: (folder / "config.json").write_text('{"model_type": "t5", "d_model": 32}'),
        "llava": lambda: (folder / "config.json").write_text('{"model_type": "llava"}'),
        "json": lambda: (folder / "config.json").write_text("{"),
        "no weights": weights.unlink,
        "no config": (folder / "config.json").unlink,
    }[name]()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lfs", "model.safetensors is a pointer of Git LFS, not the file itself; fetch it with"),
        ("cut", "model.safetensors broke off: it has .* bytes, and its header says"),
        ("empty", "model.safetensors is empty"),
        ("shard", "names 1 files, of which model-00002-of-00002.safetensors is missing"),
        ("bitsandbytes", r"holds quantized weights .quantization_config: bitsandbytes., which cannot be trained"),
        ("gptq", "quantization_config: gptq"),
        ("code", "brings code of its own .auto_map., which is not run"),
        ("unknown", "has the model_type 'llama9', which this transformers does not know"),
        ("none", "has the model_type None"),
        ("t5", "Unrecognized configuration class"),
        ("llava", "Unrecognized configuration class"),
        ("json", "config.json is no JSON"),
        ("no weights", "no file named"),
        ("no config", "no config.json; it holds .*model.safetensors"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_message(name, message, folder):
    spoil(name, folder)
    with pytest.raises(ValueError, match=f"^model.model_name_or_path: .*{message}"):
        load_model(ModelConfig(str(folder)), folder)


def test_a_tokenizer_that_was_not_fetched_is_named(folder):
    (folder / "tokenizer.json").write_text(LFS)
    with pytest.raises(ValueError, match=r"model.tokenizer_name_or_path: .*tokenizer.json is a pointer of Git LFS"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"model\.tokenizer_name_or_path: no tokenizer at"):
        load_tokenizer(folder)


def test_the_home_folder_is_understood(made, monkeypatch):
    monkeypatch.setenv("HOME", str(made.parent))
    assert load_tokenizer("~/m").chat_template == hf.CHATML
    assert load_model(ModelConfig(), "~/m").num_parameters() > 0
    with pytest.raises(ValueError, match=f"there is no folder or file {made.parent}/none"):
        load_model(ModelConfig(), "~/none")


# ---- adapters -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(made, tmp_path_factory):
    """(an adapter's folder, log-probabilities of the model with it)."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter") / "a"
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_model(ModelConfig(), made), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(made)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, scores(model)


def scores(model):
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.log_softmax(-1)


def test_an_adapter_is_its_base_with_the_adapter_and_has_its_tokenizer(adapter, made):
    folder, expected = adapter
    model = load_model(ModelConfig(), folder)
    torch.testing.assert_close(scores(model), expected, rtol=1e-4, atol=1e-4)
    assert (scores(load_model(ModelConfig(), made)) - expected).abs().max() > 0.1  # the adapter does something
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert load_tokenizer(folder).chat_template == hf.CHATML


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_an_adapter_is_trained_and_exported_as_a_whole_model(lora, adapter, tmp_path, monkeypatch):
    folder, expected = adapter
    train = hf.write(tmp_path / "t.jsonl", hf.pairs(8))
    file = hf.recipe(tmp_path, folder, train, lora=lora, max_steps=1, learning_rate=1e-6)
    assert hf.start(monkeypatch, "--config", file) == 0
    exported = tmp_path / "out/seed-0/ogd/model/epoch-1"
    torch.testing.assert_close(scores(load_model(ModelConfig(), exported)), expected, rtol=1e-2, atol=1e-2)


def test_adapters_that_cannot_be_used_are_named(adapter, made, tmp_path):
    folder, _ = adapter
    shutil.copytree(folder, tmp_path / "a")
    about = json.loads((folder / "adapter_config.json").read_text())

    def refused(message, **changes):
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(about | changes))
        with pytest.raises(ValueError, match=message):
            load_model(ModelConfig(), tmp_path / "a")

    refused("does not say on what the adapter was trained", base_model_name_or_path=None)
    refused("base_model_name_or_path.: there is no folder or file /none", base_model_name_or_path="/none")
    refused("an adapter of the kind 'PROMPT_TUNING', which cannot be merged", peft_type="PROMPT_TUNING")
    hf.model(tmp_path / "gpt2", "gpt2")
    refused("no adapter for its base at", base_model_name_or_path=str(tmp_path / "gpt2"))
    refused("4 missing .*", target_modules=["q_proj", "v_proj", "k_proj"])
    shutil.copy(made / "model.safetensors", tmp_path / "a")
    refused("holds an adapter .adapter_config.json. and whole weights")


# ---- tokenizers -----------------------------------------------------------------------------------------------------------


def test_the_models_own_tokenizer_is_taken(made, tmp_path, monkeypatch):
    train = hf.write(tmp_path / "t.jsonl", hf.pairs(8))
    assert hf.start(monkeypatch, "--config", hf.recipe(tmp_path, made, train, max_steps=1)) == 0
    exported = load_tokenizer(tmp_path / "out/seed-0/ogd/model/epoch-1")
    assert exported.get_vocab() == load_tokenizer(made).get_vocab() and exported.chat_template == hf.CHATML


def test_a_vocabulary_that_is_not_the_models_is_refused(made, tmp_path):
    own = load_tokenizer(made)
    n = len(own)
    check_vocabulary(own, n, "m", own)
    with pytest.raises(ValueError, match=f"has {n} tokens, and the model 'm' has embeddings for {n - 1}"):
        check_vocabulary(own, n - 1, "m")
    renamed = load_tokenizer(made)
    renamed.add_special_tokens({"pad_token": "[PAD]"})
    check_vocabulary(renamed, n + 1, "m", own)
    with pytest.raises(ValueError, match=rf"has embeddings for {n} \('\[PAD\]'"):
        check_vocabulary(renamed, n, "m", own)
    other = hf.tokenizer(tmp_path / "t", vocab=390, bos="<s>")
    with pytest.raises(ValueError, match=r"of .* tokens of .* are others than the model 'm' was trained with .token"):
        check_vocabulary(other, 512, "m", own)


def test_a_template_is_text_or_a_file_of_it(made, tmp_path):
    (tmp_path / "my.jinja").write_text(hf.CHATML)
    (tmp_path / "not.txt").write_text("my.jinja")
    assert load_tokenizer(made, str(tmp_path / "my.jinja")).chat_template == hf.CHATML
    assert load_tokenizer(made, "{{ 1 }}").chat_template == "{{ 1 }}"
    for wrong in ("chatml", str(tmp_path / "none.jinja"), str(tmp_path / "not.txt")):
        with pytest.raises(ValueError, match=r"model.chat_template.* holds no Jinja expression"):
            load_tokenizer(made, wrong)


# ---- greedy, and the same model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 1.1, "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"no_repeat_ngram_size": 3},
        {"suppress_tokens": list(range(20, 60))},
        {"num_beams": 4},
        {"min_new_tokens": 30},
        {"max_length": 20},
        {"sequence_bias": [[[30], 50.0]]},
    ],
    ids=lambda own: next(iter(own)),
)
def test_greedy_is_the_argmax_whatever_the_model_says_of_its_replies(own, folder):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 1} | own))
    tok, model = load_tokenizer(folder), load_model(ModelConfig(), folder).eval()
    prompt = tok("where does mila live in spring").input_ids
    expected, ids = [], list(prompt)
    with torch.no_grad():
        while len(expected) < 24 and expected[-1:] != [1]:
            expected.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            ids.append(expected[-1])
    assert greedy(model, tok, [prompt], 24) == [expected]
    before = model.generation_config.to_dict()
    with pytest.raises(ZeroDivisionError), generating(model, model.generation_config.__class__()):
        raise ZeroDivisionError
    assert model.generation_config.to_dict() == before  # kept, for the export


def test_a_fingerprint_is_of_the_weights_and_of_nothing_else(folder, tmp_path):
    before = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/README.md").write_text("another card")
    settings(tmp_path / "copy", transformers_version="0", _name_or_path="elsewhere")
    assert fingerprint(tmp_path / "copy") == before
    hf.model(tmp_path / "other", seed=1)
    assert fingerprint(tmp_path / "other") != before
    settings(folder, rms_norm_eps=1e-3)
    assert fingerprint(folder) != before


def test_a_fingerprint_of_a_large_file_reads_blocks_of_it(tmp_path):
    found = []
    for value in (0, 1):
        (tmp_path / "m.gguf").write_bytes(bytes([value]) * (2 * BLOCK * BLOCKS))
        found.append(fingerprint(tmp_path / "m.gguf"))
    assert found[0] != found[1]


def test_a_folder_of_images_and_text_is_loaded_whole_and_kept_whole(tmp_path):
    text = hf.config("gemma3_text", query_pre_attn_scalar=8).to_dict()
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=500
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "m")
    model = load_model(ModelConfig(), tmp_path / "m")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "again"))
    assert before.keys() == after.keys() and any("vision" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
