"""What a type checker knows: every public symbol of ogdopt, and the README's programs in its strictest mode."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYRIGHT = Path(sys.executable).with_name("pyright")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GIVEN = """
from collections.abc import Iterable
import torch
from torch import Tensor, nn

class Output:
    loss: Tensor

class LanguageModel(nn.Module):
    def __call__(self, input_ids: Tensor, labels: Tensor) -> Output: ...

model: LanguageModel = LanguageModel()
loader: Iterable[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
"""
"""What the pages' loops take as given."""

pytestmark = pytest.mark.skipif(not PYRIGHT.exists(), reason="pyright is not installed beside this python")


def pyright(*arguments, cwd=ROOT):
    path = f"{PYRIGHT.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [PYRIGHT, "--outputjson", *arguments], cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def test_every_public_symbol_has_a_known_type():
    found = pyright("--verifytypes", "ogdopt", "--ignoreexternal")["typeCompleteness"]
    unknown = [s["name"] for s in found["symbols"] if s["isExported"] and not s["isTypeKnown"]]
    assert found["symbols"] and unknown == [] and found["completenessScore"] == 1.0


def test_the_pages_programs_pass_the_strictest_check(tmp_path):
    blocks = [
        code
        for page in PAGES
        for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
        if "ogdopt" in code and "ogdopt_harness" not in code
    ]
    assert len(blocks) >= 4
    for k, code in enumerate(blocks):
        (tmp_path / f"block_{k}.py").write_text(GIVEN + code, encoding="utf-8")
    settings = {"typeCheckingMode": "strict", "reportUnusedVariable": False, "extraPaths": [str(ROOT)]}
    # torch itself is typed in part: what it leaves unknown is no fault of the pages.
    settings |= {"reportUnknownMemberType": False, "reportMissingTypeStubs": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    found = pyright("-p", str(tmp_path), "--pythonpath", sys.executable, cwd=tmp_path)
    assert found["summary"]["filesAnalyzed"] == len(blocks)
    faults = [f"{Path(d['file']).name}:{d['range']['start']['line'] + 1}: {d['message']}" for d in found["generalDiagnostics"]]
    assert faults == [], "\n".join(faults)
