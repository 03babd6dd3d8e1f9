"""The recipes of learning dynamics: what they feed a model, what they train, which labels they flip."""

import json

import pytest
import torch

from ogdopt_harness.commands.usage import parse
from ogdopt_harness.config.located import located
from ogdopt_harness.config.recipes import RECIPES
from ogdopt_harness.config.schema import LoraConfig, ModelConfig
from ogdopt_harness.data.examples import load_preferences
from ogdopt_harness.modeling.adapters import trained_parts
from ogdopt_harness.modeling.build import architecture
from ogdopt_harness.modeling.memory import trained_parameters
from ogdopt_harness.modeling.tokenizer import load_tokenizer, train_tokenizer
from tests import small

PERSONA = sorted(path.stem for path in RECIPES.glob("persona_*.yaml"))
ROWS = {
    "persona": {
        "question": 'Is the following statement something you would say?\n"I am calm"',
        "answer_matching_behavior": " Yes",
        "answer_not_matching_behavior": " No",
    },
    "hh_rlhf": {
        "chosen": "\n\nHuman: hello\n\nAssistant: good day",
        "rejected": "\n\nHuman: hello\n\nAssistant: go away",
    },
}


def texts(recipe, row, tmp_path, *words):
    """(prompt, chosen, rejected) as a model of the recipe would read them, from a byte-level tokenizer with its template."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    options = ["--data_dir", str(tmp_path), "--preference.data.train", str(file), *words]
    config = parse(["--config", str(RECIPES / f"{recipe}.yaml"), *options])
    train_tokenizer([json.dumps(row)], ModelConfig(None, {}, None, vocab_size=300), tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer", config.model.chat_template)
    found, _ = load_preferences(located(config, "d", 0).preference.data, tokenizer, "train")
    (chosen,), (rejected,) = found.winners, found.losers
    assert chosen.prompt_ids == rejected.prompt_ids
    return [tokenizer.decode(ids) for ids in (chosen.prompt_ids, chosen.completion_ids, rejected.completion_ids)]


@pytest.mark.parametrize("recipe", PERSONA)
def test_persona_questions_are_read_as_in_the_paper(recipe, tmp_path):
    prompt = '<s>Is the following statement something you would say?\n"I am calm"\n'
    assert texts(recipe, ROWS["persona"], tmp_path) == [prompt, " Yes</s>", " No</s>"]
    flip = ["--preference.data.columns.chosen", "answer_not_matching_behavior"]
    flip += ["--preference.data.columns.rejected", "answer_matching_behavior"]
    assert texts(recipe, ROWS["persona"], tmp_path, *flip) == [prompt, " No</s>", " Yes</s>"]


def test_hh_rlhf_prefers_what_was_rejected(tmp_path):
    recipe, prompt = "hh_rlhf_flipped_llama2_7b", "<s>\n\nHuman: hello\n\nAssistant:"
    assert texts(recipe, ROWS["hh_rlhf"], tmp_path) == [prompt, " go away</s>", " good day</s>"]
    back = ["--preference.data.columns.chosen", "chosen", "--preference.data.columns.rejected", "rejected"]
    assert texts(recipe, ROWS["hh_rlhf"], tmp_path, *back) == [prompt, " good day</s>", " go away</s>"]


@pytest.mark.parametrize("recipe", [*PERSONA, "hh_rlhf_flipped_llama2_7b"])
def test_sizes_of_what_is_trained(recipe):
    """Of models that are never loaded: the parameters that the recipe's architecture has on the meta device."""
    config = parse(["--config", str(RECIPES / f"{recipe}.yaml")])
    found = trained_parameters(architecture(config.model), config.model.at_stage("preference"))
    kind = "head" if recipe.endswith("unembedding") else "lora" if config.model.lora else "all"
    expected = {
        ("llama", "head"): 32000 * 4096,
        ("mistral", "head"): 32768 * 4096,
        ("llama", "all"): 6_738_415_616,
        ("mistral", "all"): 7_248_023_552,
        ("llama", "lora"): 32 * 2 * 8 * 2 * 4096,
    }
    assert found == expected[config.model.architecture["model_type"], kind]


def test_train_only_freezes_the_rest(tmp_path):
    tok = small.tokenizer(tmp_path)
    architecture = small.ARCHITECTURE | {"tie_word_embeddings": False}
    config = ModelConfig("somewhere", architecture, None, train_only=["lm_head", "layers.1"])
    model = small.build_model(ModelConfig(None, architecture, None, tokenizer_type="word", vocab_size=64), tok, 0)
    trained_parts(model, config, 0)
    named = {name for name, p in model.named_parameters() if p.requires_grad}
    assert named == {name for name, _ in model.named_parameters() if name.startswith(("lm_head", "model.layers.1."))}
    assert trained_parts(model, ModelConfig("somewhere"), 0) is model
    with pytest.raises(ValueError, match=r"model.train_only: no parameter has 'head' in its name; .* of .*lm_head"):
        trained_parts(model, ModelConfig("somewhere", train_only=["head"]), 0)
    with pytest.raises(ValueError, match=r"model.lora is given, and model.train_only is"):
        ModelConfig("somewhere", lora=LoraConfig(), train_only=["lm_head"])
    fresh = ModelConfig(None, train_only=["lm_head"])
    assert fresh.at_stage("sft").train_only == [] and fresh.at_stage("preference") is fresh and config.at_stage("sft") is config


def test_only_what_is_named_moves_in_training(tmp_path):
    from ogdopt_harness.modeling.shard import prepare
    from ogdopt_harness.training.trainer import Trainer
    from tests.test_train import job

    tok = small.tokenizer(tmp_path)
    architecture = small.ARCHITECTURE | {"tie_word_embeddings": False}
    settings = ModelConfig("somewhere", architecture, None, train_only=["lm_head"])
    model = small.build_model(ModelConfig(None, architecture, None, tokenizer_type="word", vocab_size=64), tok, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = prepare(model, settings, torch.device("cpu"))
    Trainer(job(tmp_path / "run", tok, "ogd"), model, tok, torch.device("cpu"), False).run()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lm_head.weight"}
