"""The house's floors, as the README's "How it is built" has them: a file imports only from lower ones, ogdopt torch alone."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PICTURE = README.partition("## How it is built")[2].partition("```text\n")[2].partition("```")[0]


def floors():
    """Module -> floor, from the picture in the README: `name.py  floor  what it is`; the files of a folder share one."""
    package, found = "", {}
    for line in PICTURE.splitlines():
        if head := re.match(r"(\w+)/", line):
            package = head[1]
        elif entry := re.match(r"  (\w+)(\.py|/)\s+(\d+) ", line):
            folder = sorted((ROOT / package / entry[1]).glob("*.py")) if entry[2] == "/" else []
            for name in [f"{entry[1]}.{path.stem}" for path in folder if path.stem != "__init__"] or [entry[1]]:
                assert f"{package}.{name}" not in found, f"{package}.{name} stands twice in the README"
                found[f"{package}.{name}"] = int(entry[3])
    return found


FLOOR = floors()
PACKAGES = {"ogdopt", "harness"}  # importing a package runs its __init__, which may use anything of its own


def modules():
    for package in sorted(PACKAGES):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def imports(path):
    """Dotted names of this project's modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((f"{node.module}.{a.name}" if node.module in PACKAGES else str(node.module)) for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def test_every_file_has_a_floor():
    assert {name for name, _ in modules()} == set(FLOOR)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_file_imports_from_lower_floors_alone(name, path):
    for found in imports(path):
        if found.split(".")[0] not in PACKAGES:
            continue
        if name.startswith("ogdopt."):
            assert found.startswith("ogdopt."), f"{name} imports {found}"
        if found in FLOOR:
            assert FLOOR[found] < FLOOR[name], f"{name} (floor {FLOOR[name]}) imports {found} (floor {FLOOR[found]})"
        else:
            assert found.startswith("ogdopt."), f"{name} imports {found}, which has no floor"  # a public name of the library


def test_the_library_imports_torch_and_the_standard_library_alone():
    for name, path in modules():
        if name.startswith("ogdopt."):
            outside = {found.split(".")[0] for found in imports(path)} - {"ogdopt", "torch"}
            assert outside <= sys.stdlib_module_names | {"__future__"}, f"{name} imports {outside}"


def test_no_file_of_the_harness_hides_a_library():
    """A file that is started puts its own folder first on sys.path."""
    names = {path.stem for folder in ("harness", "harness/studies") for path in (ROOT / folder).iterdir()}
    assert not names & {"evaluate", "datasets", "trl", "torch", "transformers", "numpy", "tokenizers", "yaml"}


@pytest.mark.parametrize("module", ["harness.report", "harness.tax", "harness.config"])
def test_reading_results_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_the_library_is_small():
    """Lines of code, without docstrings, comments and blank lines."""
    total = 0
    for _, path in modules():
        if path.parent.name != "ogdopt":
            continue
        text = path.read_text(encoding="utf-8")
        lines = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING):
                lines.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        total += len(lines)
    assert 1000 < total <= 2400
