"""What imports may load: torch alone for the library, no torch for reading results. `make lint` checks their directions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import limits

LIBRARY = sorted((Path(__file__).parents[1] / "ogdopt").rglob("*.py"))


def imports(path):
    """The top-level packages that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module).split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_the_library_imports_torch_and_the_standard_library_alone(path):
    outside = set(imports(path)) - {"ogdopt", "torch", "__future__"} - set(sys.stdlib_module_names)
    assert not outside, f"{path.name} imports {outside}"


@pytest.mark.parametrize(
    "module",
    [
        "ogdopt_harness.reporting.page",
        "ogdopt_harness.reporting.joint",
        "ogdopt_harness.analysis.tax",
        "ogdopt_harness.config.schema",
        "ogdopt_harness.cli",
    ],
)
def test_reading_results_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=limits.PROCESS).returncode == 0
