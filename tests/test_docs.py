"""What the README and the docstrings show runs; the diff of the README is the program it claims to be."""

import contextlib
import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
MODULES = sorted(
    ".".join(path.relative_to(root).with_suffix("").parts)
    for root, package in ((ROOT, "ogdopt"), (ROOT / "harness", "ogdopt_harness"))
    for path in (root / package).rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)


class TinyLM(torch.nn.Module):
    """Stands for a Hugging Face causal language model: called with input_ids and labels, it returns a loss."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11)

    def forward(self, input_ids, labels):
        logits = self.head(self.embed(input_ids[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return type("Output", (), {"loss": loss})


def given():
    """The names that the README's loops take as given."""
    torch.manual_seed(0)
    tokens = torch.randint(11, (3, 2, 4, 7))
    batch = lambda x: {"input_ids": x, "labels": x}  # noqa: E731
    return {"torch": torch, "model": TinyLM(), "loader": [(batch(w), batch(x)) for w, x in tokens]}


def test_the_diff_is_a_program_before_and_after():
    (diff,) = (code for language, code in BLOCKS if language == "diff")
    before = "\n".join(line[2:] for line in diff.splitlines() if line[:1] != "+")
    after = "\n".join(line[2:] for line in diff.splitlines() if line[:1] != "-")
    for program in (before, after):
        names = given()
        start = names["model"].head.weight.detach().clone()
        exec(compile(program, "README.md", "exec"), names)
        assert not torch.equal(names["model"].head.weight, start)
    assert sum(line[:1] == "+" for line in diff.splitlines()) <= 5


@pytest.mark.parametrize("k", range(sum(language == "python" for language, _ in BLOCKS)))
def test_python_blocks_run(k):
    code = [code for language, code in BLOCKS if language == "python"][k]
    exec(compile(code, f"README.md, block {k + 1}", "exec"), given())


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_paths_named_in_the_readme_exist():
    for path in re.findall(r"`((?:harness|ogdopt|tests|benchmarks)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


HARNESS = re.compile(r"harness/run\.py(.*?)(?:  #.*)?$", re.M)


@pytest.mark.parametrize("words", [line.split() for code in BLOCKS if code[0] == "sh" for line in HARNESS.findall(code[1])])
def test_commands_of_the_readme_have_the_options_they_are_shown_with(words, capsys):
    from ogdopt_harness.cli import COMMANDS
    from ogdopt_harness.config.schema import command

    name = words[0] if words and not words[0].startswith("-") else None
    # The options of `tax` are those of a study.
    start = command if name in (None, "run", "tax") else importlib.import_module(COMMANDS[name]).main
    with contextlib.suppress(SystemExit):
        start(["--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in words if word.startswith("--")), words


def test_the_architecture_has_every_package_and_no_file_that_is_gone():
    said = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.name for path in (ROOT / "harness" / "ogdopt_harness").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"`(\w+)`", said)) and len(packages) >= 11
    files = re.findall(r"^(\w+\.py) ", said, re.M)
    assert files and all((ROOT / "ogdopt" / name).is_file() for name in files), files
