"""Configuration files: what YAML lets pass in silence is refused, with file and line."""

import os

import pytest

from ogdopt_harness.config.recipes import RECIPES, recipe_file
from ogdopt_harness.config.schema import Config
from ogdopt_harness.config.strict import check_file, check_value

BILLION = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
CASES = {
    "sft:\n  learning_rate: 1e-3\n  learning_rate: 0.0\n": r":3: sft.learning_rate stands here a second time, after line 2",
    "preference: {seed: 3}\nsft: {}\npreference: {beta: [1]}\n": r":3: preference stands here a second time, after line 1",
    "sft: {optimizer_args: {eps: 1, eps: 2}}\n": r":1: sft.optimizer_args.eps stands here a second time",
    "evals: {tasks: [{name: a, name: b, path: c}]}\n": r":1: evals.tasks.name stands here a second time",
    "study: {}\nreport: null\n": r":2: report is null; expected a section with options out of samples, confidence, paper",
    "report:\n": r":1: report is null",
    "sft: 3\n": r":1: sft is '3'; expected a section",
    "sft: [a]\n": r":1: sft is a list; expected a section",
    "sft: {data: text}\n": r":1: sft.data is 'text'; expected a section",
    "sft: {\n  learning_rat: 3}\n": r":2: there is no option sft.learning_rat; expected learning_rate",
    "- a\n": r":1: found a list; expected options",
    "hello\n": r":1: found 'hello'; expected options",
    "": r":1: found empty; expected options",
    "a: [\n": r":2: not YAML",
    "a: b: c\n": r":1: not YAML",
    "study: {}\n---\nstudy: {}\n": r":2: not YAML",
    "study: !!python/object/apply:os.system ['true']\n": r":1: study is a list; expected a section",
    "a: " + "[" * 200 + "]" * 200: r":1: nested more than 50 deep",
    "a: " + "[" * 5000 + "]" * 5000: r"nested",
    BILLION: r"more than 100,000 values, aliases expanded",
    "study: &a\n  name: *a\n": r":1: a value that holds itself",
    "3: 4\n": r":1: there is no option 3",
    "? [a]\n: 4\n": r":1: there is no option",
}


@pytest.mark.parametrize("text", CASES, ids=range(len(CASES)))
def test_what_is_refused(text, tmp_path):
    (file := tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.yaml.*{CASES[text]}|{CASES[text]}") as said:
        recipe_file(str(file), Config)
    assert "mine.yaml" in str(said.value)


def test_what_is_no_file_or_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"study:\n  name: \xff\n")
    (tmp_path / "long.yaml").write_bytes(b"#" * 1_000_001)
    for name, message in {
        "pipe.yaml": "is a pipe, device or socket; expected a file",
        "latin.yaml": r"latin.yaml:2: byte 0xff is no UTF-8",
        "long.yaml": "has 1,000,001 bytes; expected at most 1,000,000",
        "/dev/zero": "is a pipe, device or socket",
        ".": "is a folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            recipe_file(str(tmp_path / name) if name != "/dev/zero" else name, Config)


def test_our_recipes_are_as_strict():
    assert [check_file(path, Config) for path in RECIPES.glob("*.yaml")] == [None] * len(list(RECIPES.glob("*.yaml")))


def test_values_on_the_command_line():
    check_value("--preference.beta=[0.1, 0.1]")
    check_value("{a: 1, b: {a: 2}}")
    for word in ("--sft.optimizer_args={eps: 1, eps: 2}", "{eps: 1, eps: 2}"):
        with pytest.raises(ValueError, match="eps stands here a second time"):
            check_value(word)
