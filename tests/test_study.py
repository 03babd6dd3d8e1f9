"""What all studies share: the command, verdicts, study.json and how reports find it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from ogdopt_harness.analysis import claims
from ogdopt_harness.analysis.claims import Claim, Findings, Picture
from ogdopt_harness.commands.usage import toys
from ogdopt_harness.common.tables import Table
from tests import limits
from tests.test_report import QUICK, write_report, write_study

ROOT = Path(__file__).parents[1]
FACTS = {"command": "ogdopt study made_up", "seconds": 1.5}


def findings(holds=(True,) * 5):
    values = [0.5 + k for k in range(len(holds))]
    claim = Claim("a | b grows", "grows (figure 2)", values, list(holds))
    table = Table("Numbers", ["what", "value"], [["x", "1"]], "A note.")
    picture = Picture("curve", "Look at it.", Figure(figsize=(2, 2)))
    return Findings(range(len(holds)), [claim], [table], [picture], ["Constructed."], {"x": [1, 2]})


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_a_claim_holds_in_every_one_of_five_seeds_or_not_at_all(holds):
    claim = Claim("", "", [1.0] * len(holds), holds)
    assert (claim.verdict == "holds") == (len(holds) >= 5 and sum(holds) == len(holds))
    assert claim.count.startswith(f"{sum(holds)} of {len(holds)}")
    assert ("too few" in claim.count) == (len(holds) < 5)


def test_found_is_the_median_and_the_range():
    assert Claim("", "", [3.0, 1.0, 2.0], [True] * 3).found == "2 [1…3]"
    assert Claim("", "", [0.12345] * 3, [True] * 3).found == "0.123"


def test_a_written_study_is_read_again(tmp_path):
    claims.write(tmp_path / "made_up", "made_up", "A title", findings(), FACTS)
    page = (tmp_path / "made_up" / "study.md").read_text(encoding="utf-8")
    for part in (
        "# A title",
        "Constructed.",
        "a \\| b grows",
        "grows (figure 2)",
        "| holds |",
        "A note.",
        "(curve.svg)",
        "1.5",
    ):
        assert part in page
    (read,) = claims.finished(tmp_path)
    assert (read.name, read.title, read.page) == ("made_up", "A title", tmp_path / "made_up" / "study.md")
    (claim,) = read.claims
    assert (list(claim.values), claim.verdict, claim.found) == ([0.5, 1.5, 2.5, 3.5, 4.5], "holds", "2.5 [0.5…4.5]")
    assert json.loads((tmp_path / "made_up" / "study.json").read_text())["numbers"] == {"x": [1, 2]}


def test_the_same_findings_make_the_same_files(tmp_path):
    for name in ("one", "two"):
        claims.write(tmp_path / name, "made_up", "A title", findings(), FACTS)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("place", ["made_up", "studies/made_up", "../studies/made_up"])
def test_reports_show_finished_studies_in_and_beside_their_run(place, tmp_path):
    run = tmp_path / "runs" / "mine"
    write_study(run, seeds=(0,), epochs=1)
    assert write_report(run, QUICK).studies == []
    claims.write(run / place, "made_up", "A <b>title</b>", findings((True, False, True, True, True)), FACTS)
    report = write_report(run, QUICK)
    assert [s.name for s in report.studies] == ["made_up"]
    html, markdown = report.path.read_text(encoding="utf-8"), (run / "report.md").read_text(encoding="utf-8")
    assert f'href="{place}/study.md"' in html and f"]({place}/study.md)" in markdown
    assert "A &lt;b&gt;title" in html and "does not hold" in html and "does not hold" in markdown


def test_an_unreadable_study_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    for text in ("{", "[]", '{"study": "x", "title": "t", "claims": [{}]}'):
        (tmp_path / "x" / "study.json").write_text(text)
        with pytest.raises(ValueError, match=r"study\.json is not a readable study .* delete its folder"):
            claims.finished(tmp_path)


@pytest.mark.parametrize("name", toys())
def test_every_study_has_a_title_a_function_and_five_seeds(name):
    assert len(toys()[name][0]) > 20
    done = run("study", name, "--help")
    said = " ".join(done.stdout.split())  # however wide the terminal is
    assert done.returncode == 0 and "--seeds" in said and "0, 1, 2, 3, 4" in said


def run(*words):
    return subprocess.run(
        [sys.executable, str(ROOT / "harness/run.py"), *words], capture_output=True, text=True, timeout=limits.PROCESS
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study", "tradeof"], "there is no study 'tradeof'; did you mean tradeoff?"),
        (["study", "tradeoff", "--seeds", "1,1"], "seeds is [1, 1]; expected different non-negative integers"),
        (["study", "tradeoff", "--sed", "1"], "--sed"),
        (["studdy"], "there is no command 'studdy'; did you mean study?"),
    ],
)
def test_mistakes_get_one_message(words, message):
    done = run(*words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_without_a_name_the_studies_are_listed():
    done = run("study")
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in toys())
