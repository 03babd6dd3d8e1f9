"""What surrounds the loop: placeholders, recorded settings, lists on the command line, and the recipes."""

import subprocess

import pytest
import yaml

from ogdopt_harness.commands.usage import parse
from ogdopt_harness.config.located import located
from ogdopt_harness.config.recipes import RECIPES
from ogdopt_harness.config.schema import Config, DataConfig, EvalConfig, StageConfig, TaskConfig, as_dict
from ogdopt_harness.pipeline import manifest
from ogdopt_harness.pipeline.manifest import differences, record
from ogdopt_harness.training.methods import runs


def test_placeholders_and_seeds_of_one_seed():
    config = Config(
        preference=Config().preference,
        sft=StageConfig(data=DataConfig(train=["{data}/a.jsonl", "{data_dir}/b.jsonl"]), seed=5),
        evals=EvalConfig(tasks=[TaskConfig("t", "{data}/t.jsonl")], style="{data}/s.json"),
        data_dir="/mine",
    )
    found = located(config, "runs/x/seed-2/data", 2)
    assert found.sft.data.train == ["runs/x/seed-2/data/a.jsonl", "/mine/b.jsonl"] and found.sft.seed == 7
    assert found.evals.tasks[0].path == "runs/x/seed-2/data/t.jsonl" and found.evals.style == "runs/x/seed-2/data/s.json"
    assert config.sft.seed == 5


def test_a_placeholder_without_a_folder_is_an_error():
    config = Config(sft=StageConfig(data=DataConfig(train=["{data_dir}/b.jsonl"])))
    with pytest.raises(ValueError, match=r"'\{data_dir\}/b.jsonl'; say which folder .* with --data_dir"):
        located(config, "d", 0)


def test_settings_are_recorded_once_and_compared(tmp_path):
    record(tmp_path, {"sft": StageConfig()}, {"name": "x"})
    before = (tmp_path / "config.yaml").read_text()
    found = yaml.safe_load(before)
    assert found["run"] == {"name": "x"} and found["config"]["sft"]["learning_rate"] == 1e-6
    assert {"versions", "machine", "git", "command"} <= found.keys() and found["versions"]["torch"]
    record(tmp_path, {"sft": StageConfig()}, {"name": "x"})
    assert (tmp_path / "config.yaml").read_text() == before
    with pytest.raises(ValueError, match=r"sft.learning_rate was 1e-06 and is 0.1; sft.seed was 1 and is 2\. Choose another"):
        record(tmp_path, {"sft": StageConfig(learning_rate=0.1, seed=2)}, {"name": "x"})


def test_differences_name_what_is_missing_on_either_side():
    assert differences({"a": 1}, {"b": 2}) == [("a", 1, None), ("b", None, 2)]


def test_git_outside_a_checkout(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(manifest.subprocess, "run", missing)
    assert manifest._git() == "unknown"


def test_an_installation_inside_another_repository_does_not_name_its_commit(tmp_path, monkeypatch):
    """Neither where the package lies deep in it (project/.venv/lib), nor where it lies as it does in its own checkout."""

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    for folder in (tmp_path / ".venv/lib/site-packages/ogdopt_harness", tmp_path / "harness/ogdopt_harness"):
        monkeypatch.setattr(manifest, "__file__", str(folder / "pipeline" / "manifest.py"))
        assert manifest._git() == "unknown"
    (folder / "cli.py").parent.mkdir(parents=True)
    (folder / "cli.py").write_text("")
    git("add", "harness")
    git("commit", "-q", "-m", "ours")
    assert manifest._git() == git("rev-parse", "HEAD").strip()
    (folder / "cli.py").write_text("changed")
    assert manifest._git() == git("rev-parse", "HEAD").strip() + "+"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read(recipe):
    config = parse(["--config", str(recipe)])
    assert config.study.name == recipe.stem
    if recipe.stem in ("miniature", "local_pairs"):
        assert config.methods == ["sft", "dpo", "ogd", *(["ogd_metric"] if recipe.stem == "miniature" else [])]
        assert config.preference.beta == [0.2, 0.1, 0.05, 0.02]
    assert runs(config.methods, config.preference.beta, config.joint.lambdas, config.joint.evaluate_every)
    located(parse(["--config", str(recipe), "--data_dir", "x"]), "d", 0)


def test_defaults_are_the_papers_recipe():
    """SPEC 1.4 (appendix A.2)."""
    config = Config()
    assert config.model.model_name_or_path == config.model.words == "mistralai/Mistral-7B-v0.3"
    sft, preference = config.sft, config.preference
    assert (sft.optimizer, sft.learning_rate, sft.warmup_ratio, sft.num_train_epochs) == ("Adam", 5e-6, 0.1, 1)
    assert (sft.train_batch_size, sft.train_on_prompt, sft.seed) == (256, True, 0)
    assert (preference.optimizer, preference.learning_rate, preference.warmup_steps) == ("RMSprop", 1e-6, 150)
    assert (preference.num_train_epochs, preference.train_batch_size, preference.train_on_prompt) == (5, 64, False)
    assert (preference.data.max_prompt_length, preference.data.max_length, preference.seed) == (2048, 4096, 1)
    assert preference.lr_scheduler_type == "constant_with_warmup" and preference.loss_reduction == "sum"
    assert preference.max_grad_norm == 10.0 and preference.beta == [0.2, 0.1, 0.05, 0.02]


@pytest.mark.parametrize(
    "words",
    [
        ["--methods", "ogd,dpo", "--study.seeds", "0,1,2", "--preference.beta", "0.1"],
        ["--methods=ogd,dpo", "--study.seeds=[0,1,2]", "--preference.beta=[0.1]"],
        ["--methods", "[ogd, dpo]", "--study.seeds", "[0,1,2]", "--preference.beta=0.1"],
    ],
)
def test_lists_with_and_without_brackets(words):
    config = parse(words)
    assert (config.methods, config.study.seeds, config.preference.beta) == (["ogd", "dpo"], [0, 1, 2], [0.1])
    assert config.preference.learning_rate == parse([]).preference.learning_rate


def test_learning_rates_are_numbers():
    """YAML reads 1e-6 as a text; a typed schema does not."""
    assert parse(["--preference.learning_rate", "1e-6"]).preference.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Config(sft=StageConfig(train_batch_size=10, per_device_train_batch_size=4)),
            r"^sft.train_batch_size is 10; expected a multiple of per_device_train_batch_size \(4\)$",
        ),
        (lambda: parse([]).study.__class__(seeds=[1, 1]), r"study.seeds is \[1, 1\]"),
        (lambda: parse([]).study.__class__(name="x\n"), "study.name is"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_accumulation_is_derived():
    assert StageConfig(train_batch_size=64, per_device_train_batch_size=16).gradient_accumulation_steps == 4


def test_a_configuration_survives_yaml():
    config = parse([])
    assert yaml.safe_load(yaml.safe_dump(as_dict(config))) == as_dict(config)


def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(["--config", "tradeoff"]) == parse([f"--config={RECIPES / 'tradeoff.yaml'}"]) == parse(["--config=tradeoff"])
    (tmp_path / "mine.yaml").write_text("study: {name: mine}")
    assert parse(["--config", "mine.yaml"]).study.name == "mine"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("harness/recipes/tradeoff.yaml", "no such file; expected the recipe's name alone: --config tradeoff"),
        ("trade", "there is no such recipe or YAML file; did you mean tradeoff"),
    ],
)
def test_a_recipe_that_is_not_there(word, message):
    with pytest.raises(ValueError) as caught:
        parse(["--config", word])
    assert f"--config {word}: {message}" in str(caught.value)
