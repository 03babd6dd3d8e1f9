"""The dry run: nothing loaded, nothing written, everything checked; its figures are those of real runs."""

import dataclasses
import json

import pytest
import torch
import yaml

from ogdopt_harness import cli
from ogdopt_harness.commands import dry_run
from ogdopt_harness.commands.usage import asked, parse
from ogdopt_harness.config.schema import LoraConfig, ModelConfig, StageConfig
from ogdopt_harness.data.examples import Example
from ogdopt_harness.data.preview import CLOSE, OPEN, histogram, marked
from ogdopt_harness.modeling.build import architecture, build_model, load_model
from ogdopt_harness.modeling.memory import (
    Load,
    copies,
    largest_moment,
    parts,
    precision_warning,
    shape_of,
    trained_parameters,
    unmoved,
)
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.modeling.tokenizer import train_tokenizer
from ogdopt_harness.pipeline.stages import SeedStudy
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.trainer import Trainer
from tests import small

GIB = 2**30
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
PAIRS = [{"prompt": f"what is {k} plus {k}", "chosen": f"it is {2 * k}", "rejected": "who knows"} for k in range(20)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def mistral():
    return shape_of(architecture(ModelConfig(None, MISTRAL)))


def of_mistral(shape, two=True, sequences=1, world_size=1, optimizer="RMSprop", **options):
    model = ModelConfig(None, MISTRAL, gradient_checkpointing=True, **options)
    load = Load(two, sequences, 4096, sequences * 4096, world_size)
    return parts(shape, shape.parameters, model, StageConfig(optimizer=optimizer), load, accelerator=True)


# ---- memory ---------------------------------------------------------------------------------------------------------------


def test_mistral_7b(mistral):
    """Sizes by hand: 32 layers of 4096 x (2 x 4096 + 2 x 1024 + 3 x 14336) + 2 norms, two embeddings, a norm."""
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096
    assert (mistral.layer, mistral.layers, mistral.hidden) == (layer, 32, 4096)
    assert mistral.parameters == 32 * layer + 2 * 32768 * 4096 + 4096 == 7_248_023_552
    assert mistral.live == 6 * 4096 + 2 * 1024 + 4 * 14336
    found = of_mistral(mistral)
    states = sum(found[name] for name in ("weights", "gradient", "gradient that waits", "optimizer state"))
    assert states / GIB == pytest.approx(108, abs=0.1)
    assert found["activations"] / GIB == pytest.approx(1.64, abs=0.01)
    assert found["logits"] / GIB == pytest.approx(0.44, abs=0.01)  # a chunk of 1,024 tokens


@pytest.mark.parametrize(
    ("kind", "parameters", "layer"), [("gpt2", 124_439_808, 7_087_872), ("llama", 6_738_415_616, 202_383_360)]
)
def test_other_architectures(kind, parameters, layer):
    found = shape_of(architecture(ModelConfig(None, {"model_type": kind})))
    assert (found.parameters, found.layer) == (parameters, layer)


def test_processes_share_states_and_not_activations(mistral):
    one, eight = of_mistral(mistral), of_mistral(mistral, world_size=8)
    for name, size in one.items():
        shared = name not in ("gathered layers", "activations", "logits")
        assert eight[name] == pytest.approx(size / 8 if shared else size, rel=1e-6), name
    assert "gradient that waits" not in of_mistral(mistral, two=False)
    assert of_mistral(mistral, dtype="bfloat16")["weights"] == one["weights"] / 2


def test_a_gradient_that_waits_rounded_is_counted_so(mistral):
    found = {
        form: parts(mistral, 10**6, ModelConfig(None, MISTRAL), StageConfig(set_aside=form), Load(True, 1, 512, 512, 1), True)
        for form in (None, "bfloat16", "int8", "cpu")
    }
    assert [x["gradient that waits"] for x in found.values()] == [4e6, 2e6, 1.015625e6, 0]


def test_a_pass_and_a_step_are_not_held_together():
    found = {"weights": 5, "activations": 30, "logits": 4, "optimizer's temporary": 20}
    assert largest_moment(found) == 5 + 34
    assert largest_moment(found | {"optimizer's temporary": 50}) == 5 + 50


def test_only_trained_parameters_have_gradients_and_states(mistral):
    model, load = ModelConfig(None, MISTRAL), Load(True, 1, 512, 512, 1)
    found = parts(mistral, 10**6, model, StageConfig(optimizer="Adam"), load, accelerator=True)
    expected = (4e6, 4e6, 8e6)
    assert tuple(found[name] for name in ("gradient", "gradient that waits", "optimizer state")) == expected


def test_adapters_are_counted_as_peft_makes_them():
    """Rank 8 on q and v of Mistral: 32 layers of 8 x (4096 + 4096) and 8 x (4096 + 1024)."""
    model = ModelConfig("x", MISTRAL, lora=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    assert trained_parameters(architecture(model), model.at_stage("preference")) == 32 * 8 * (2 * 4096 + 4096 + 1024)
    fresh = dataclasses.replace(model, model_name_or_path=None)
    assert fresh.at_stage("sft").lora is None and fresh.at_stage("preference").lora == model.at_stage("sft").lora == model.lora


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RMSprop", {}),
        ("RMSprop", {"momentum": 0.9, "centered": True}),
        ("Adam", {}),
        ("AdamW", {"amsgrad": True}),
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
    ],
)
def test_copies_are_what_the_optimizer_keeps(name, options):
    weight = torch.nn.Parameter(torch.ones(5))
    weight.grad = torch.ones(5)
    optimizer = getattr(torch.optim, name)([weight], lr=1e-3, **options)
    optimizer.step()
    kept = sum(v.numel() == 5 for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor))
    assert copies(StageConfig(optimizer=name, optimizer_args=options)) == kept


def test_activations_are_about_what_autograd_keeps(tok):
    """Bytes that wait for the backward pass of a small model, without its parameters and the head's, against the formula."""
    options = dict(small.ARCHITECTURE, hidden_size=64, intermediate_size=256, num_attention_heads=4, head_dim=16)
    config = ModelConfig(None, options | {"num_key_value_heads": 2, "num_hidden_layers": 6}, None)
    model = prepare(build_model(config, tok, 0), config, torch.device("cpu"))
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in own and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(3, len(tok), (4, 64))
    mask = torch.zeros(4, 64, dtype=torch.bool)
    mask[:, -1] = True
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        completion = completion_logps(model, ids, torch.ones_like(ids), mask)
    assert completion.logp.shape == (4,)
    load = Load(False, 4, 64, 4, 1)
    found = parts(shape_of(model.config), 0, config, small.stage(), load, accelerator=False)
    assert 0.75 < sum(kept.values()) / found["activations"] < 1.5


@pytest.mark.parametrize("lr", [1e-6, 5e-6])
def test_the_warning_about_bfloat16_is_true(lr):
    """Weights over the limit stay where they are after a step of the learning rate; under a quarter of it all move."""
    weights = 0.02 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    rounded = weights.bfloat16()
    moved = rounded != rounded - lr
    assert not moved[rounded.abs() > unmoved(lr)].any() and moved[rounded.abs() < unmoved(lr) / 4].all()
    text = precision_warning(ModelConfig(dtype="bfloat16"), StageConfig(learning_rate=lr))
    assert f"{(rounded.abs() > unmoved(lr)).float().mean():.0%}" in text and f"{unmoved(lr):.1e}" in text
    assert precision_warning(ModelConfig(), StageConfig(learning_rate=lr)) is None
    assert precision_warning(ModelConfig(dtype="bfloat16"), StageConfig(learning_rate=1e-3)) is None


def test_a_run_warns_of_bfloat16_weights_under_small_steps(tmp_path):
    settings = ["--config", recipe(tmp_path), "--model.dtype", "bfloat16"]
    with pytest.warns(UserWarning, match=r"preference: model.dtype is bfloat16 and the learning rate 1e-06.*98% of weights"):
        SeedStudy(parse(settings), 0)


# ---- what is shown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_prompt", [False, True])
def test_brackets_stand_around_what_the_loss_looks_at(tok, on_prompt):
    prompt, answer = (tok(t, add_special_tokens=False).input_ids for t in ("<s> where is mila ?", "in oslo </s>"))
    text = marked(tok, Example(prompt, answer), on_prompt)
    inside = text[text.index(OPEN) + 1 : text.index(CLOSE)]
    assert inside == tok.decode(prompt[1:] + answer if on_prompt else answer)  # nothing predicts the first token
    assert text.count(OPEN) == text.count(CLOSE) == 1


def test_a_histogram_counts_everything_once():
    sizes = [1, 5, 5, 17, 100]
    lines = histogram(sizes, "tokens").splitlines()
    assert sum(int(line.split()[-1]) for line in lines[:-1]) == len(sizes) and "median 5, " in lines[-1]


def test_learning_rates_are_those_of_the_run(tok, tmp_path):
    stage = small.stage(lr_scheduler_type="cosine", warmup_ratio=0.4)
    job = Job(tmp_path, "sft", "sft", stage, small.preferences(tok), None)
    trainer = Trainer(job, small.model(tok), tok, torch.device("cpu"), False)
    taken = {k + 1: trainer.step(k).learning_rate for k in range(job.plan.steps)}
    shown = dict(dry_run.rates(stage, job.plan.steps))
    assert {1, stage.warmup(job.plan.steps) + 1, job.plan.steps} <= shown.keys()
    assert shown == {step: taken[step] for step in shown}


# ---- a whole dry run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a dry run loads no weights")

    monkeypatch.setattr("ogdopt_harness.pipeline.stages.load_model", loaded)
    monkeypatch.setattr("ogdopt_harness.pipeline.stages.build_model", loaded)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)


def recipe(folder, **changes):
    """A 7B recipe whose model, tokenizer, rows and benchmarks are on the hub."""
    settings = {
        "study": {"name": "seven", "output_dir": str(folder / "out")},
        "methods": ["sft", "dpo", "ogd"],
        "model": {"architecture": MISTRAL, "gradient_checkpointing": True},
        "preference": {"data": {"train": ["owner/pairs"]}, "per_device_train_batch_size": 1},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings | changes))
    return str(file)


def start(*words):
    """What `ogdopt run --dry_run` with these words returns."""
    return cli.answer(["run", "--dry_run", *words])


def test_a_7b_recipe_offline(tmp_path, capsys, nothing_is_loaded):
    """The hub is out of reach: what that leaves unchecked is named, the rest is reckoned with."""
    assert start("--config", recipe(tmp_path), "--world_size", "8") == 0
    out = capsys.readouterr().out
    assert "7,248,023,552 parameters" in out and "8 processes" in out and "3.4 GiB" in out
    assert "rows: out of reach from here" in out and "give local files with --preference.data.train FILE" in out
    assert "--model.tokenizer_name_or_path FOLDER" in out
    assert f"{tmp_path}/out/seed-K/ogd/" in out and "of 27.0 GiB" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


def test_local_files_stand_in_for_the_hub(tmp_path, capsys, nothing_is_loaded):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    words = ["--config", recipe(tmp_path), "--preference.data.train", str(rows), "--preference.train_batch_size", "8"]
    assert start(*words) == 0
    out = capsys.readouterr().out
    assert "20 rows in a known form" in out and "3 steps an epoch, 15 in all, at most" in out
    assert "warning, preference: the warm-up takes 150 steps and the run ends after 15" in out
    words_of = [text for row in PAIRS for text in row.values() if isinstance(text, str)]
    train_tokenizer(words_of, ModelConfig(None, vocab_size=400), tmp_path / "words")
    assert start(*words, "--model.tokenizer_name_or_path", str(tmp_path / "words")) == 0
    out = capsys.readouterr().out
    assert f"[/INST]{OPEN} it is 0</s>{CLOSE}" in out and "20 of 20 rows used" in out and "15 in all\n" in out


def test_all_mistakes_are_told_together(tmp_path, capsys):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps(PAIRS[0] | {"rejected": ""}) + "\n")
    words = ["--config", recipe(tmp_path), "--preference.data.train", str(rows), "--sft.data.train", "nothing.jsonl"]
    assert start(*words, "--world-size", "100") == 2
    said = capsys.readouterr().err
    assert said.count("no file or folder nothing.jsonl") == 1 and "preference.train_batch_size is 64 on 100 processes" in said
    assert f"{rows}:1: " in said and "column 'rejected'" in said


def test_the_miniature_study(tmp_path, capsys, nothing_is_loaded, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_world = "--world.people 16 --world.sft_conversations 1000 --world.preference_pairs 64 --world.items 8".split()
    assert start(*small_world) == 0
    out = capsys.readouterr().out
    assert "64 of 64 rows used" in out and "facts:direct (" in out
    assert not list(tmp_path.iterdir())


def test_the_options_of_a_dry_run_are_no_settings():
    found, _ = asked("run", ["--dry-run", "--world-size", "4", "--methods", "ogd"])
    assert (found.dry_run, found.world_size, found.config.methods) == (True, 4, ["ogd"])
    assert not asked("run", [])[0].dry_run and asked("run", [])[0].world_size == 1
    with pytest.raises(ValueError, match="world_size is 0; expected 1 or more"):
        asked("run", ["--dry_run", "--world_size", "0"])


# ---- the architecture in a recipe -----------------------------------------------------------------------------------------


def test_a_model_that_is_not_the_recipes_architecture_is_refused(tok, tmp_path):
    small.model(tok).save_pretrained(tmp_path)
    assert load_model(small.MODEL, tmp_path).config.hidden_size == 16
    other = dataclasses.replace(small.MODEL, architecture=small.ARCHITECTURE | {"hidden_size": 32})
    with pytest.raises(
        ValueError, match=r"model.architecture.hidden_size is 32, but the model at .* has 16; correct the recipe"
    ):
        load_model(other, tmp_path)


def test_a_vocabulary_may_be_larger_than_the_tokenizers_and_not_smaller(tok):
    sized = lambda n: dataclasses.replace(small.MODEL, architecture=small.ARCHITECTURE | {"vocab_size": n})  # noqa: E731
    assert build_model(sized(64 + len(tok)), tok, 0).get_input_embeddings().weight.shape[0] == 64 + len(tok)
    with pytest.raises(ValueError, match=f"vocab_size is 3; expected the tokenizer's {len(tok)} tokens or more"):
        build_model(sized(3), tok, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "nonesuch"}, "expected an architecture of transformers"),
        ({"model_type": "mistral", "hidden_size": "x"}, "refuses"),
    ],
)
def test_architectures_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        architecture(ModelConfig(None, options))
