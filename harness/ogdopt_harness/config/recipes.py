"""Recipes and launch files: what the package brings, found by name."""

from __future__ import annotations

from pathlib import Path

from ogdopt_harness.common.files import read_regular
from ogdopt_harness.config import strict
from ogdopt_harness.config.options import meant, nearest

RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT_RECIPE = RECIPES / "miniature.yaml"


def recipes() -> dict[str, Path]:
    """The recipes, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def launch_files() -> dict[str, Path]:
    """The files that start a run on several processes or machines, by name."""
    return {path.name: path for path in sorted((RECIPES / "launch").glob("*.sh"))}


def title(path: Path) -> str:
    """The first sentence of a recipe or launch file: of its comment, as far as a full stop or an indented line."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#!"):
            continue
        if not line.startswith("# ") or line.startswith("#  "):
            break
        words.append(line[2:])
    return " ".join(words).partition(". ")[0].rstrip(".:")


def recipe_file(word: str, schema: type) -> Path:
    """The file of a recipe: one of the package's by its name, or a path.

    Raises ValueError if there is neither, naming the nearest recipes, and for a file that does not say something about
    options of `schema` alone.
    """
    known = recipes()
    if word in known:
        return known[word]
    path = Path(word)
    if path.is_file():
        strict.check_file(path, schema)
        return path
    if path.stem in known and path.parent.name == "recipes":
        raise ValueError(f"--config {word}: no such file; expected the recipe's name alone: --config {path.stem}")
    if path.exists():
        read_regular(path, "--config", strict.MOST_BYTES)
    likely = meant(nearest(path.stem, known), "")
    raise ValueError(f"--config {word}: there is no such recipe or YAML file{likely} (`ogdopt recipes` lists them)")
