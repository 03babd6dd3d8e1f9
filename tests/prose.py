"""How long the sentences of a text are: `python tests/prose.py README.md docs/*.md` prints words a sentence, and of --help.

Prose is paragraphs and list items. Code, tables, headings and formulas are left out; a piece of code in a sentence is one word.
"""

import ast
import inspect
import re
import statistics
import sys
from pathlib import Path

HARNESS = Path(__file__).parents[1] / "harness" / "ogdopt_harness"
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.M | re.S)
NO_PROSE = re.compile(r"^(#|\||:::|<!--|\[[^\]]+\]: | {4,}\S)")
"""Lines that are headings, table rows, directives, comments, targets of links, or indented formulas."""
ITEM = re.compile(r"^\s*([-*+]|\d+[.)])\s+")
END = re.compile(r"(?<=[.!?])[)\"'*”]*\s+(?=[\[(\"'*“]*[A-Z0-9`λβ])")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|et al|vs|cf|etc)\.")


def paragraphs(markdown: str) -> list[str]:
    """The paragraphs and list items of a page, each as one line."""
    found: list[str] = []
    fresh = True
    for line in FENCE.sub("", markdown).splitlines():
        item = ITEM.match(line)
        if not line.strip() or (not item and NO_PROSE.match(line) and (fresh or line[0] != " ")):
            fresh = True
        elif item or fresh:
            found.append(line[item.end() if item else 0 :].strip())
            fresh = False
        else:
            found[-1] += " " + line.strip()
    return found


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, with links as their words and code as one word."""
    plain = re.sub(r"`+([^`]+)`+", r"`\1`", paragraph)
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    plain = ABBREVIATION.sub(r"\1", plain)
    return [part for part in END.split(plain) if re.search(r"\w", part)]


def lengths(markdown: str) -> list[tuple[int, str]]:
    """(words, sentence) of all prose of a page."""
    return [
        (sum(bool(re.search(r"\w", word)) for word in sentence.split()), sentence)
        for paragraph in paragraphs(markdown)
        for sentence in sentences(paragraph)
    ]


def percentile(counts: list[int], share: float) -> int:
    """The smallest count that at least this share of the sentences does not exceed."""
    return sorted(counts)[max(0, -int(-share * len(counts) // 1) - 1)]


def long(markdown: str, words: int) -> list[str]:
    """The sentences of more than so many words."""
    return [f"{count}: {sentence}" for count, sentence in lengths(markdown) if count > words]


def help_texts() -> dict[str, str]:
    """What --help says of every option and section: the docstrings of the dataclasses that hold the options, by name."""
    found: dict[str, str] = {}
    for path in sorted(path for package in ("config", "commands") for path in (HARNESS / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                found[node.name] = ast.get_docstring(node) or ""
                for before, after in zip(node.body, node.body[1:]):
                    if (
                        isinstance(before, ast.AnnAssign)
                        and isinstance(after, ast.Expr)
                        and isinstance(after.value, ast.Constant)
                    ):
                        found[f"{node.name}.{ast.unparse(before.target)}"] = inspect.cleandoc(str(after.value.value))
    return found


def main(paths: list[str]) -> None:
    """Print one line a page and one for all, then the longest sentences."""
    everything: list[tuple[int, str, str]] = []
    for path in paths:
        found = lengths(Path(path).read_text(encoding="utf-8"))
        everything += [(count, path, sentence) for count, sentence in found]
        show(path, [count for count, _ in found])
    show("all pages", [count for count, _, _ in everything])
    show("--help", [count for text in help_texts().values() for count, _ in lengths(text)])
    for count, path, sentence in sorted(everything, reverse=True)[:40]:
        if count > 25:
            print(f"{count:4} {path}: {sentence}")


def show(name: str, counts: list[int]) -> None:
    """One line of the table: sentences, median, 90th percentile, longest."""
    if counts:
        median = statistics.median(counts)
        print(f"{name:28} {len(counts):5} sentences, median {median:g}, 90% {percentile(counts, 0.9)}, longest {max(counts)}")


if __name__ == "__main__":
    main(sys.argv[1:])
