"""The site of docs/ builds without a warning, has all public modules, and does not build with a broken link."""

import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ogdopt

for needed in ("sphinx", "furo", "myst_parser"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install '.[docs]'")

ROOT = Path(__file__).parent.parent


def build(docs, out):
    words = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", docs, out]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_the_site_builds_and_its_reference_has_every_public_module(tmp_path):
    done = build(ROOT / "docs", tmp_path)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ["ogdopt.PairedGradient.step", "ogdopt.PairedGradient.winner", "ogdopt.losses.dpo"]:
        assert name in reference, name
    modules = {f"ogdopt.{m.name}" for m in pkgutil.iter_modules(ogdopt.__path__) if m.name[0] != "_"}
    assert modules <= set(re.findall(r'id="module-(ogdopt\.\w+)"', reference)) and len(modules) >= 10
    assert 'href="library.html"' in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_broken_link_fails_the_build_and_is_named(tmp_path):
    for page in ROOT.glob("*.md"):
        shutil.copy(page, tmp_path / page.name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for page, link in (("README.md", "docs/no_such_page.md"), ("docs/library.md", "training.md#no-such-heading")):
        with open(tmp_path / page, "a", encoding="utf-8") as file:
            file.write(f"\n[gone]({link})\n")
    done = build(tmp_path / "docs", tmp_path / "out")
    assert done.returncode != 0
    assert "no_such_page" in done.stderr and "no-such-heading" in done.stderr
