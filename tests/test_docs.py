"""What the README, docs/ and the docstrings show runs, and its prose is plain; the diff of the README is a program."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from ogdopt_harness import cli
from ogdopt_harness.commands.usage import USAGES, toy_usage
from ogdopt_harness.config.command_line import split
from tests import prose

ROOT = Path(__file__).parent.parent
WRITTEN = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGES = {
    str(path.relative_to(ROOT)): text
    for path, text in ((path, path.read_text(encoding="utf-8")) for path in WRITTEN)
    if "```{" not in text  # pages of the site that include another, or docstrings
}
README = PAGES["README.md"]
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S)]
PYTHON = [(name, code) for name, page in PAGES.items() for code in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)]
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


@pytest.mark.parametrize("k", range(len(PYTHON)), ids=lambda k: f"{PYTHON[k][0]}-{k}")
def test_python_blocks_run(k):
    name, code = PYTHON[k]
    exec(compile(code, f"{name}, block {k + 1}", "exec"), given())


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", PAGES)
def test_paths_and_links_of_a_page_exist(name):
    page = PAGES[name]
    for path in re.findall(r"`(?:python )?((?:harness|ogdopt|tests|benchmarks)/[\w./]+)[^`\n]*`", page):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page):
        assert ((ROOT / name).parent / target).exists(), target


def test_the_readme_is_short_and_every_guide_is_linked_from_it():
    assert len(README.splitlines()) <= 150
    guides = {name for name in PAGES if name.startswith("docs/")}
    assert guides and all(f"({name})" in README for name in guides)


@pytest.mark.parametrize("name", PAGES)
def test_sentences_are_short(name):
    """One fact a sentence: nine in ten have at most 25 words, and none is a paragraph of its own."""
    counts = [count for count, _ in prose.lengths(PAGES[name])]
    assert len(counts) >= 5 and prose.percentile(counts, 0.9) <= 25 and max(counts) <= 30, prose.long(PAGES[name], 25)


DIALECT = re.compile(r"\b(behind|beside|whence|reckon\w*|hears?|losers|winners|as without|such a one)\b", re.I)
"""Words with a plainer one: after, next to, where from, estimate, is logged to, rejected, chosen, falls back."""


def test_pages_and_help_have_plain_words():
    for name, text in {**PAGES, **prose.help_texts()}.items():
        assert not (found := DIALECT.findall(text)), (name, found)


def test_sentences_of_help_are_short():
    texts = prose.help_texts()
    counts = [count for text in texts.values() for count, _ in prose.lengths(text)]
    assert texts["StageConfig.max_grad_norm"].startswith("Largest L2 norm") and len(counts) >= 100
    assert prose.percentile(counts, 0.9) <= 22, [found for text in texts.values() for found in prose.long(text, 22)]


def test_the_measure_of_prose_sees_sentences_and_not_code():
    page = (
        "# A title of many words\n\nOne `a b` word. And\nthree more! (See e.g. this.)\n\n- An item.\n\n```sh\nno prose\n```\n"
    )
    page += "```sh\nno prose\n```\n| a | table |\n\n    indented formula here\n"
    assert [count for count, _ in prose.lengths(page)] == [4, 3, 3, 2]
    assert prose.percentile([*range(1, 11)], 0.9) == 9


COMMAND = re.compile(r"^(?:.*[\s/])?(?:ogdopt|-m ogdopt_harness|harness/run\.py)( .*)?$")
LAUNCHED = re.compile(r'"\$\((?:\S+/)?ogdopt recipes \S+\.sh\)"')


def commands():
    """The words after `ogdopt`, or what stands for it, in every line of the pages' shell blocks."""
    for line in "\n".join(code for language, code in BLOCKS if language == "sh").replace("\\\n", " ").splitlines():
        found = COMMAND.match(LAUNCHED.sub("ogdopt run", line.partition("  #")[0].partition(" # ")[0].rstrip()))
        if found:
            yield found[1] or ""


@pytest.mark.parametrize("line", list(commands()))
def test_commands_of_the_pages_have_the_options_they_are_shown_with(line):
    """They are taken apart as the command itself does it, which refuses unknown options and words of no place."""
    name, *words = shlex.split(line) or ["run"]
    if name.startswith("-"):
        name, words = "run", [name, *words]
    if name == "study" and words and words[0] != "NAME":
        split(toy_usage(words[0]), words[1:])
    elif not {"--version", "--help"} & {name, *words}:
        split(USAGES[name], [word for word in words if word != "..."])


CHEAP = [line for line in commands() if "--help" in line or line.split() in (["study"], ["recipes"], ["--version"])]


@pytest.mark.parametrize("line", CHEAP)
def test_cheap_commands_of_the_pages_run(line, capsys):
    assert cli.answer(shlex.split(line)) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_there_are_cheap_commands():
    assert len(CHEAP) >= 4


def test_the_architecture_has_every_package_and_no_file_that_is_gone():
    said = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.name for path in (ROOT / "harness" / "ogdopt_harness").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"`(\w+)`", said)) and len(packages) >= 11
    files = re.findall(r"^(\w+\.py) ", said, re.M)
    assert files and all((ROOT / "ogdopt" / name).is_file() for name in files), files
