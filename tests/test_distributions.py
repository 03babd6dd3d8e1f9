"""The wheel and the source distribution: what they hold, and a study from the wheel alone, outside of the clone."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import limits

ROOT = Path(__file__).parent.parent
pytest.importorskip("build")
SMALL = """--world.people 16 --world.sft_conversations 1000 --world.preference_pairs 32 --world.held_out_pairs 8 --world.items 8
--sft.max_steps 4 --methods ogd --preference.num_train_epochs 1 --preference.train_batch_size 16
--preference.per_device_train_batch_size 16 --report.samples 100 --report_to none""".split()


def run(*words, **more):
    done = subprocess.run(words, capture_output=True, text=True, timeout=limits.PROCESS, **more)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(wheel, source distribution), built without a network from what git or the archive holds."""
    folder = tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(
        ".venv", "runs", "build", "dist", "*.egg-info", ".git", ".hypothesis", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, folder / "source", ignore=left_out, symlinks=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "out"), cwd=folder / "source")
    return next((folder / "out").glob("*.whl")), next((folder / "out").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """A folder with the wheel's packages alone, and the environment in which they are found; dependencies are this suite's."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(distributions[0]) as wheel:
        wheel.extractall(folder / "site")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(folder / "site")}
    return folder, environment


def test_the_wheel_holds_both_packages_recipes_and_launch_files(distributions):
    names = zipfile.ZipFile(distributions[0]).namelist()
    for path in (ROOT / "harness" / "ogdopt_harness").rglob("*"):
        if path.suffix in (".py", ".yaml", ".sh", ".j2"):
            assert str(path.relative_to(ROOT / "harness")) in names
    assert {"ogdopt/native.cpp", "ogdopt/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"ogdopt", "ogdopt_harness"}


def test_the_source_distribution_holds_what_its_suite_needs(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".json"):
                assert str(path.relative_to(ROOT)) in names
    assert {"Makefile", "constraints.txt", "harness/run.py", "README.md", "LOG.md", "CITATION.cff", ".ci/run"} <= names


def test_a_study_from_the_wheel_outside_of_the_clone(installed):
    folder, environment = installed
    where = "import ogdopt, ogdopt_harness; print(ogdopt.__file__, ogdopt_harness.__file__)"
    said = run(sys.executable, "-c", where, cwd=folder, env=environment)
    assert said.count(str(folder / "site")) == 2
    ogdopt = (sys.executable, "-m", "ogdopt_harness")
    run(*ogdopt, "run", "--config", "miniature", *SMALL, cwd=folder, env=environment)
    page = (folder / "runs" / "miniature" / "report.html").read_text(encoding="utf-8")
    assert "<html" in page and "OGD" in page
    assert "git: unknown" in (folder / "runs" / "miniature" / "config.yaml").read_text()  # no commit of the folder around it
    assert "Report: " in run(*ogdopt, "report", "runs/miniature", cwd=folder, env=environment)
    launch = Path(run(*ogdopt, "recipes", "node.sh", cwd=folder, env=environment).strip())
    assert launch.is_file() and launch.is_relative_to(folder / "site")
