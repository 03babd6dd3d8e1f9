"""Every option has a range or choices, and no value of one ends in anything but a message or a meaning."""

import re

import pytest

from ogdopt_harness.config import ranges
from ogdopt_harness.config.schema import Config, ModelConfig, PreferenceConfig, StageConfig
from ogdopt_harness.pipeline.preflight import preflight

from .searches import options


def test_every_number_has_a_range():
    assert options.without_range() == []


def test_a_sample_of_options_and_values(tmp_path):
    """The whole is `python -m benchmarks.soak options`."""
    found = options.search(tmp_path / "study", sample=12, seed=1)
    assert found.tried == 12 and not found.findings, str(found)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sft.per_device_train_batch_size", "-1", "sft.per_device_train_batch_size is -1; expected 1 or more"),
        ("threads", "1000000", "threads is 1000000; expected 1 or more and at most 1,024, or null"),
        ("preference.logging_steps", "0", "preference.logging_steps is 0; expected 1 or more"),
        ("report.samples", "0", "report.samples is 0; expected 1 or more"),
        ("report.confidence", "1.5", "report.confidence is 1.5; expected more than 0 and less than 1"),
        ("model.vocab_size", "0", "model.vocab_size is 0; expected 1 or more"),
        ("preference.max_steps", "0", "preference.max_steps is 0; expected 1 or more, or -1"),
        ("preference.warmup_steps", "-7", "preference.warmup_steps is -7; expected 0 or more"),
        ("sft.num_train_epochs", "0", r"sft.num_train_epochs is 0; expected 1 or more \(a supervised stage is left out by"),
        ("preference.beta", "[1e308]", "preference.beta is .*; expected more than 0 and at most 1,000,000"),
        ("preference.optimizer_args", "{eps: .inf}", "preference.optimizer_args is .*; expected finite numbers"),
        ("preference.optimizer_args", "{nonsense: 1}", "preference.optimizer_args is .*, which RMSprop refuses"),
        ("sft.train_batch_size", "100", r"sft.train_batch_size is 100; expected a multiple of .* \(64\)"),
        ("world.held_out_pairs", "null", "world.held_out_pairs"),
        ("model.train_only", "[nonsense]", "train_only"),
        ("device", "tpu", "device is 'tpu'; expected auto, cpu, cuda"),
    ],
)
def test_numbers_that_once_passed(name, value, message, tmp_path):
    ended, text = options.tried(name, value, tmp_path / "study")
    assert ended == "refused by name" and re.search(message, text), text


def test_all_mistakes_are_told_at_once():
    wrong = StageConfig(learning_rate=float("nan"), warmup_steps=-1)
    with pytest.raises(ValueError, match=r"sft.learning_rate is nan.*\nsft.warmup_steps is -1.*\npreference.max_steps is 0"):
        Config(sft=wrong, preference=PreferenceConfig(max_steps=0))


def test_settings_are_checked_before_a_folder_is_made():
    config = Config(model=ModelConfig(None, {"model_type": "mistral", "num_attention_heads": 0}), methods=["dpo", "nonsense"])
    with pytest.raises(ValueError, match="methods is"):
        preflight(config)


def test_an_architecture_that_cannot_be_built_is_named():
    sizes = {"model_type": "mistral", "hidden_size": 16, "num_attention_heads": 0, "num_key_value_heads": 0}
    config = Config(model=ModelConfig(None, sizes), sft=StageConfig())
    with pytest.raises(ValueError, match=r"sft.data.train is empty.*\nmodel.architecture: "):
        preflight(config)


@pytest.mark.parametrize(
    ("found", "values", "words"),
    [
        (ranges.COUNT, [0], "1 or more"),
        (ranges.COUNT, [2**40], "1 or more and at most 2,147,483,647"),
        (ranges.CONFIDENCE, [1.0], "more than 0 and less than 1"),
        (ranges.Range(1, 5, other=-1), [9], "1 or more and at most 5, or -1"),
    ],
)
def test_what_is_expected_in_words(found, values, words):
    assert found.words(values) == words and not any(map(found.holds, values))
