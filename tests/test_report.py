"""report.py on made-up studies: a simulator writes run directories whose outcomes are plausible and whose truth is known."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from ogdopt_harness.analysis.comparison import measure
from ogdopt_harness.analysis.headline import headline
from ogdopt_harness.analysis.study_reader import read_study
from ogdopt_harness.common.tables import Table, markdown_text, number, spread
from ogdopt_harness.config.schema import ReportConfig
from ogdopt_harness.reporting.figures import looks, spearman
from ogdopt_harness.reporting.page import BEST, MATCHED, PROMISE, _figures, print_table, write_report

ROOT = Path(__file__).parents[1]
TASKS = {
    "facts": ("knowledge", 0.94, 0.25),
    "sums": ("math", 0.90, 0.25),
    "reading": ("reading", 0.99, 0.25),
    "goals": ("", 0.5, 0.25),
}
RUNS = {  # name -> (method, beta, label, share forgotten each epoch, style rate by epoch)
    "dpo_beta0.2": ("dpo", 0.2, "DPO β=0.2", 0.02, [0.30, 0.60, 0.80, 0.85, 0.85]),
    "dpo_beta0.05": ("dpo", 0.05, "DPO β=0.05", 0.05, [0.60, 0.90, 0.95, 0.95, 0.95]),
    "ogd": ("ogd", None, "OGD", 0.002, [0.40, 0.70, 0.90, 0.90, 0.90]),
    "sft": ("sft", None, "chosen only", 0.002, [0.50, 0.80, 0.95, 0.90, 0.90]),
}
EPOCHS, STEPS, N, QUICK = 5, 20, 128, ReportConfig(samples=400)


def _evaluation(
    rng: np.random.Generator, seed: int, solved: dict, forgot: float, style: float | None, ways=("direct", "cloze", "generate")
):
    tasks = {}
    for task, (family, _, chance) in TASKS.items():
        asked = {}
        for way in ways:
            lost = rng.random(N) < forgot * (1 if way == "direct" else 0.5)
            flipped = rng.random(N) < 0.02
            outcomes = (solved[task] & ~lost) ^ flipped
            asked[way] = {
                "metric": "acc",
                "accuracy": float(outcomes.mean()),
                "n": N,
                "chance": 0.0 if way == "generate" else chance,
                "outcomes": outcomes.astype(int).tolist(),
                "doc_hashes": [f"{seed}-{task}-{i}" for i in range(N)],
            }
            asked[way] |= {"replies": ["<b>no</b>"] * N} if way == "generate" else {"margins": rng.normal(3, 1, N).tolist()}
        tasks[task] = {"family": family, "ways": asked}
    styled = (
        None
        if style is None
        else {"n": N, "chosen_rate": round(style * N) / N, "rejected_rate": 0.0, "outcomes": [], "replies": []}
    )
    return {"model": "m", "tasks": tasks, "style": styled, "settings": {"limit": None}, "versions": {}, "seconds": 4.0}


def _metrics(forgot: float, method: str, rng: np.random.Generator) -> list[dict]:
    rows = []
    for step in range(EPOCHS * STEPS + 1):
        epoch, row = step / STEPS, {"step": step, "epoch": step / STEPS}
        if step:
            row |= {"loss": 1 / step, "tokens_per_second": 1000.0}
        if step and method == "ogd":
            row |= {"ogd/cosine": 0.5 + 0.1 * rng.normal(), "ogd/projected_fraction": 0.4}
        if step % 10 == 0:
            noise = 0.05 * rng.normal(size=2) * (step > 0)
            drift = (-10 * forgot * epoch if method == "dpo" else 0.2 * epoch) + noise[0]
            fall = {"dpo": 1 + 10 * forgot, "ogd": 0.1, "ogd_metric": 0.1, "sft": -0.1}[method] * epoch + noise[1]
            row |= {"eval_logps/chosen": -20 + 8 * drift, "eval_logps/rejected": -22 - 8 * fall}
            row |= {"eval_logps_mean/chosen": -2 + drift, "eval_logps_mean/rejected": -2.2 - fall}
            row |= {
                "eval_rewards/accuracies": min(0.95, 0.5 + 0.2 * epoch),
                "eval_rewards/margins": 0.1 * epoch,
                "eval_dpo_loss": math.log(2) * math.exp(-epoch / 3),
            }
        rows.append(row)
    return rows


def _write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_study(
    directory: Path, seeds=(0, 1), runs=RUNS, epochs=EPOCHS, style=True, ways=("direct", "cloze", "generate"), metrics=True
):
    """Write a finished study as the stages would."""
    directory.mkdir(parents=True)
    config = {"study": {"name": directory.name, "seeds": list(seeds)}, "report": {"samples": 300, "confidence": 0.9}}
    about = {
        "config": config,
        "versions": {"torch": "2.13", "numpy": "2.4"},
        "git": "abc123",
        "command": "ogdopt run <x>",
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(about))
    for seed in seeds:
        rng, folder = np.random.default_rng(100 + seed), directory / f"seed-{seed}"
        (folder / "data").mkdir(parents=True)
        solved = {task: rng.random(N) < p for task, (_, p, _) in TASKS.items()}
        _write_json(
            folder / "supervised/evals/epoch-1.json", _evaluation(rng, seed, solved, 0.0, 0.05 if style else None, ways)
        )
        _write_json(folder / "supervised/complete.json", {"steps": 200, "epochs": 1, "seconds": 60.0})
        for name, (method, beta, label, forgot, rates) in runs.items():
            run = folder / name
            for epoch in range(1, epochs + 1):
                rate = min(1.0, rates[epoch - 1] + 0.03 * seed) if style else None
                _write_json(run / f"evals/epoch-{epoch}.json", _evaluation(rng, seed, solved, forgot * epoch, rate, ways))
                (run / f"model/epoch-{epoch}").mkdir(parents=True)
            what = {"name": name, "kind": "method", "method": method, "beta": beta, "seed": 1 + seed, "label": label}
            (run / "config.yaml").write_text(yaml.safe_dump({"run": what}, allow_unicode=True))
            _write_json(run / "complete.json", {"steps": epochs * STEPS, "epochs": epochs, "seconds": 30.0})
            if metrics:
                (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _metrics(forgot, method, rng)))
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete study of two seeds and its report."""
    directory = write_study(tmp_path_factory.mktemp("runs") / "study")
    return write_report(directory, QUICK)


class Loads(HTMLParser):
    """Collects what a browser would load, all text, and every tag."""

    def __init__(self):
        super().__init__()
        self.loads, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster", "action")]

    def handle_data(self, data):
        self.text.append(data)


def parsed(path: Path) -> Loads:
    parser = Loads()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def cells(markdown: str, title: str) -> list[dict[str, str]]:
    """The rows of the table under a heading of report.md."""
    lines = [line for line in markdown.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip().strip("*").replace("\\", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def value(cell: str) -> float:
    return float(cell.replace("−", "-").split("%")[0].split(" ")[0])


def test_everything_is_written(finished):
    folder = finished.path.parent
    assert {p.name for p in folder.iterdir()} >= {"report.html", "report.md", "results.json", "figures"}
    names = {d.file.name for d in finished.drawings}
    assert names == {p.name for p in (folder / "figures").iterdir()}
    for start in ("figure2", "figure3", "figure4", "figure5", "figure6", "tradeoff", "projection"):
        assert any(name.startswith(start) for name in names)
    assert all(d.caption and "ook for" in d.caption for d in finished.drawings)
    assert [t.title for t in finished.tables][:2] == [BEST, MATCHED]


def test_html_loads_nothing_and_is_well_formed(finished):
    page = parsed(finished.path)
    assert page.loads
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    text = finished.path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", text)
    for tag in ("table", "figure", "details", "tr", "div"):
        assert text.count(f"<{tag}") == text.count(f"</{tag}>")
    assert '<meta name="viewport"' in text
    assert page.tags.count("img") == len(finished.drawings)


def test_figures_are_drawn_without_a_date_and_say_the_same_again(finished, tmp_path):
    again = _figures(finished.found, tmp_path)
    for first, second in zip(finished.drawings, again):
        assert first.file.read_bytes() == second.file.read_bytes()
        assert first.file.read_text().startswith("<?xml")


def test_results_agree_with_the_markdown_table(finished):
    folder = finished.path.parent
    results = json.loads((folder / "results.json").read_text())
    markdown = (folder / "report.md").read_text()
    for title, key in ((BEST, "best"), (MATCHED, "matched")):
        rows = {row["method"]: row for row in cells(markdown, title)}
        for run in results["runs"].values():
            row, found = rows[run["label"]], run[key]
            assert value(row["TAX"]) == pytest.approx(found["tax"]["direct"]["value"], abs=0.006)
            assert value(row["TAX cloze"]) == pytest.approx(found["tax"]["cloze"]["value"], abs=0.006)
            assert value(row["TAX generate"]) == pytest.approx(found["tax"]["generate"]["value"], abs=0.006)
            assert value(row["style rate"]) == pytest.approx(100 * np.mean(found["style"]), abs=0.06)
            assert row.get("best epoch", row.get("epoch")) == ", ".join(map(str, found["epoch"]))
            assert f"[{number(found['tax']['direct']['low'])}" in row["TAX"]
    assert results["headline"] == finished.headline
    assert results["samples"] == QUICK.samples
    assert set(results["supervised"]) == {"0", "1"}
    assert len(results["runs"]["ogd"]["epochs"]["1"]) == EPOCHS
    assert "draws" not in json.dumps(results)


def test_best_epoch_is_by_style_then_accuracy_then_earlier(finished):
    """ogd: style .90 at epochs 3, 4, 5, with accuracies .95, .95, .95: the third; dpo 0.2: .85 at 4 and 5: the fourth."""
    assert finished.found.best["ogd"] == {0: 3, 1: 3}
    assert finished.found.best["dpo_beta0.2"] == {0: 4, 1: 4}
    assert finished.found.best["sft"] == {0: 3, 1: 3}


def test_level_is_the_highest_that_every_run_reaches(finished):
    """The slowest run, DPO 0.2, reaches .85 (.88 in seed 1): the first epochs of the others to get there are 2 or 3."""
    assert finished.found.levels == {0: round(0.85 * N) / N, 1: round(0.88 * N) / N}
    assert {name: epochs[0] for name, epochs in finished.found.matched.items()} == {
        "dpo_beta0.2": 4,
        "dpo_beta0.05": 2,
        "ogd": 3,
        "sft": 3,
    }


@pytest.fixture(scope="module")
def promised(tmp_path_factory):
    """A study with ogd and ogd_metric whose logged steps keep and break the promise as written here."""
    runs = {name: RUNS[name] for name in ("dpo_beta0.2", "ogd", "sft")}
    runs["ogd_metric"] = ("ogd_metric", None, "OGD (own metric)", 0.002, RUNS["ogd"][4])
    folder = write_study(tmp_path_factory.mktemp("runs") / "study", runs=runs)
    logged = {  # (seed, run) -> cosines with the chosen's gradient, with the rejected's, passes
        (0, "ogd"): ([-0.2] * 9 + [0.0], [-0.1, -2e-5, -1e-5, -3e-6] + [0.3] * 6, None),
        (1, "ogd"): ([-0.3] * 10, [0.0] * 10, None),
        (0, "ogd_metric"): ([-0.2] * 10, [-2.13e-7] + [0.0] * 9, 8.0),
        (1, "ogd_metric"): ([-0.2] * 10, [1e-7] * 10, 10.0),
    }
    for (seed, run), (chosen, rejected, passes) in logged.items():
        with (folder / f"seed-{seed}" / run / "metrics.jsonl").open("a") as file:
            for step, (w, x) in enumerate(zip(chosen, rejected), start=1):
                row = {"step": step, "ogd/update_cosine_chosen": w, "ogd/update_cosine_rejected": x}
                file.write(json.dumps(row | ({} if passes is None else {"ogd/passes": passes})) + "\n")
            if passes is not None:  # a step that moved nothing has passes and no cosines
                file.write(json.dumps({"step": 50, "ogd/passes": passes}) + "\n")
    return write_report(folder, QUICK)


def test_broken_promises_are_counted(promised):
    """ogd: 2 of 10 and 0 of 10 steps helped rejected, 1 of 10 and 0 of 10 did not help chosen; −1e-5 itself is rounding."""
    folder = promised.path.parent
    markdown = (folder / "report.md").read_text()
    ogd, metric = cells(markdown, PROMISE)
    assert (ogd["method"], metric["method"]) == ("OGD", "OGD (own metric)")
    assert (ogd["steps"], ogd["helped rejected"]) == ("10", "10.0% (0.0…20.0)")
    assert ogd["did not help chosen"] == "5.0% (0.0…10.0)"
    assert (ogd["worst cosine, chosen"], ogd["worst cosine, rejected"], ogd["further passes"]) == ("0", "−0.1", "–")
    assert (metric["steps"], metric["helped rejected"], metric["did not help chosen"]) == ("10", "0.0%", "0.0%")
    assert (metric["worst cosine, chosen"], metric["worst cosine, rejected"]) == ("−0.2", "−2.1e−07")
    assert metric["further passes"] == "9.0 (8.0…10.0)"
    best = {row["method"]: row for row in cells(markdown, BEST)}
    for row in (ogd, metric):
        assert (row["TAX"], row["style rate"]) == (best[row["method"]]["TAX"], best[row["method"]]["style rate"])
        assert row["reward margin"] == "+0.30"  # best epoch: 3
    results = json.loads((folder / "results.json").read_text())["runs"]
    assert [p["rejected_helped"] for p in results["ogd"]["promise"]] == [0.2, 0.0]
    assert [p["passes"] for p in results["ogd_metric"]["promise"]] == [8.0, 10.0]
    assert results["sft"]["promise"] == []


def test_promise_section_comes_with_words_and_a_figure(promised, finished):
    (drawing,) = (d for d in promised.drawings if d.file.name == "update_against_rejected.svg")
    for file in ("report.html", "report.md"):
        text = (promised.path.parent / file).read_text()
        assert (
            PROMISE in text
            and drawing.title in text
            and "below −1e−05, it helped rejected" in text
            and "Look for shares of 0%" in text
        )
        assert text.index(MATCHED) < text.index(PROMISE) < text.index("What it cost")
        # and where nothing was logged there is neither
        assert PROMISE not in (finished.path.parent / file).read_text()
    assert "update_against_rejected.svg" not in {d.file.name for d in finished.drawings}


def test_ogd_in_the_optimizers_metric_is_a_run_like_any_other(promised):
    """OGD stays what the others are compared with; the other metric stands behind it, in a colour of its own."""
    assert list(promised.found.points) == ["dpo_beta0.2", "sft", "ogd", "ogd_metric"]
    best, matched = promised.table(BEST), promised.table(MATCHED)
    assert [best.rows[i][0] for i in best.strong] == [matched.rows[i][0] for i in matched.strong] == ["OGD"]
    against = {row[0]: row[-1] for row in matched.rows}
    assert against["OGD"] == "–" and "(noise)" in against["OGD (own metric)"]
    assert len({look.color for look in looks(promised.found.study.runs).values()}) == 4


def test_headline_finds_the_truth_that_was_built_in(finished):
    """DPO forgets 10 and more times what OGD and training on chosen alone forget, and these two are alike."""
    text = " ".join(finished.headline)
    assert "OGD forgot less than every DPO run" in text
    assert "chosen only does as well as OGD, within noise" in text
    assert "asked by cloze" in text
    assert "One seed" not in text


def test_headline_says_when_ogd_does_not_win(tmp_path):
    runs = {
        "ogd": (*RUNS["ogd"][:3], 0.06, RUNS["ogd"][4]),
        "dpo": ("dpo", 0.2, "DPO", 0.0, RUNS["ogd"][4]),
        "sft": RUNS["sft"],
    }
    study = read_study(write_study(tmp_path / "s", seeds=[0], runs=runs))
    text = " ".join(headline(measure(study, 300)))
    assert "OGD does not win: DPO forgot less" in text
    assert "OGD does not win: chosen only forgot less" in text
    assert "OGD lost more than" in text
    assert "One seed" in text


def test_low_level_is_pointed_out(tmp_path):
    runs = {"ogd": RUNS["ogd"], "slow": ("dpo", 0.5, "slow DPO", 0.0, [0.05, 0.05, 0.06, 0.06, 0.07])}
    text = " ".join(headline(measure(read_study(write_study(tmp_path / "s", seeds=[0], runs=runs)), 200)))
    assert "low because slow DPO hardly learned" in text


def test_supervised_table_flags_benchmarks_that_hide_or_cannot_show(finished):
    rows = {row[0]: row for row in finished.table("The supervised model").rows}
    assert "above 97%" in rows["reading"][-1]
    assert "below 85%" in rows["goals"][-1]
    assert "above" not in rows["facts"][-1]


def test_terminal_table_fits_80_columns(finished):
    console = Console(width=80, record=True, file=io.StringIO())
    print_table(finished, console)
    text = console.export_text()
    assert "OGD" in text
    assert str(finished.path) in text.replace("\n", "")
    table = text.split("•")[0]
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= 80


def test_incomplete_runs_are_named_and_left_out(tmp_path):
    folder = write_study(tmp_path / "study", seeds=[0, 1])
    (folder / "seed-1/ogd/complete.json").unlink()
    (folder / "seed-0/sft/evals/epoch-4.json").unlink()
    shutil.rmtree(folder / "seed-1/dpo_beta0.2")
    shutil.copytree(folder / "seed-0", folder / "seed-2")
    (folder / "seed-2/supervised/complete.json").unlink()
    (folder / "seed-2/supervised/metrics.jsonl").write_text("")
    for name in RUNS:
        (folder / "seed-2" / name / "complete.json").unlink()
    report = write_report(folder, QUICK)
    assert sorted(line.split(":")[0] for line in report.found.study.incomplete) == [
        "seed-0/sft",
        "seed-1/dpo_beta0.2",
        "seed-1/ogd",
        *(f"seed-2/{name}" for name in sorted([*RUNS, "supervised"])),
    ]
    assert list(report.found.points["ogd"]) == [0]
    assert list(report.found.points["sft"]) == [1]
    for file in ("report.html", "report.md"):
        text = (folder / file).read_text()
        assert "seed-1/ogd" in text
        assert "epoch 4 is not evaluated" in text
    assert any("No seed has every run finished" in s for s in report.headline)
    assert "share no finished seed" in " ".join(report.headline)


def test_mixed_up_questions_are_refused(tmp_path):
    folder = write_study(tmp_path / "study", seeds=[0])
    path = folder / "seed-0/ogd/evals/epoch-2.json"
    raw = json.loads(path.read_text())
    raw["tasks"]["facts"]["ways"]["direct"]["doc_hashes"][3] = "another"
    _write_json(path, raw)
    with pytest.raises(ValueError, match=r"'facts'.*supervised/evals/epoch-1\.json.*ogd/evals/epoch-2\.json"):
        write_report(folder, QUICK)


@pytest.mark.parametrize(
    "options",
    [
        {"style": False},
        {"ways": ("direct",)},
        {"metrics": False},
        {"style": False, "metrics": False},
        {"epochs": 1},
        {"runs": {"ogd": RUNS["ogd"]}},
        {"runs": {"sft": RUNS["sft"]}, "seeds": (3,), "ways": ("direct",), "metrics": False},
        {"ways": ("cloze", "generate")},
    ],
    ids=str,
)
def test_partial_information(tmp_path, options):
    report = write_report(write_study(tmp_path / "study", **{"seeds": (0,), **options}), ReportConfig(samples=100))
    text = report.path.read_text()
    assert "nan" not in text.replace("nance", "")
    assert "None" not in text
    assert report.headline
    print_table(report, Console(file=io.StringIO()))
    has_style, has_metrics = options.get("style", True), options.get("metrics", True)
    assert report.found.criterion == ("style rate" if has_style else "held-out preference accuracy" if has_metrics else None)
    assert (report.table(MATCHED) is not None) == (has_style or has_metrics)


def test_settings_of_the_study_are_used_by_default(tmp_path):
    report = write_report(write_study(tmp_path / "study", seeds=[0], runs={"ogd": RUNS["ogd"]}, epochs=1))
    assert report.settings == ReportConfig(samples=300, confidence=0.9)
    assert "90% intervals" in report.path.read_text()


def test_unsolvable_benchmark_is_left_out_and_named(tmp_path):
    folder = write_study(tmp_path / "study", seeds=[0], runs={"ogd": RUNS["ogd"]}, epochs=1)
    for path in folder.glob("seed-0/*/evals/*.json"):
        raw = json.loads(path.read_text())
        raw["tasks"]["goals"]["ways"]["generate"]["outcomes"] = [0] * N
        for task in raw["tasks"].values():
            task["ways"]["cloze"]["outcomes"] = [0] * N
        _write_json(path, raw)
    report = write_report(folder, QUICK)
    assert report.found.ways == ["direct", "generate"]
    assert list(report.found.points["ogd"][0][1].tax["generate"].tasks) == ["facts", "sums", "reading"]
    assert any("'goals' (generate)" in w for w in report.found.warnings)
    assert any("no TAX asked by cloze" in w for w in report.found.warnings)


def test_text_from_files_is_escaped(tmp_path):
    evil = "<script>alert(1)</script> & | $x^2$ `b` [a](http://x)"
    runs = {"ogd": ("ogd", None, evil, 0.0, RUNS["ogd"][4]), "sft": RUNS["sft"]}
    folder = write_study(tmp_path / "study", seeds=[0], runs=runs, epochs=2)
    text = write_report(folder, QUICK).path.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    page = parsed(folder / "report.html")
    assert "script" not in page.tags
    assert all(load.startswith("data:") for load in page.loads)
    markdown = (folder / "report.md").read_text()
    assert "<script" not in markdown
    assert not re.search(r"(?<!\\)\]\(http", markdown)
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in markdown.split(f"## {BEST}")[1].splitlines()[2:7]}) == 1


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no seed-<k> folder"):
        write_report(tmp_path)
    folder = write_study(tmp_path / "study", seeds=[0], epochs=1)
    metrics = folder / "seed-0/ogd/metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 1, "lo')
    with pytest.raises(ValueError, match=r"ogd/metrics\.jsonl, line 102: .*'step'"):
        write_report(folder)
    metrics.write_text(whole)
    evaluation = folder / "seed-0/ogd/evals/epoch-1.json"
    raw = json.loads(evaluation.read_text())
    evaluation.write_text("{}")
    with pytest.raises(ValueError, match=r"epoch-1\.json is not a readable evaluation"):
        write_report(folder)
    raw["tasks"]["facts"]["ways"]["direct"]["outcomes"][0] = 0.5
    _write_json(evaluation, raw)
    with pytest.raises(ValueError, match=r"'facts' \(direct\): expected a list of outcomes 0 or 1"):
        write_report(folder)
    shutil.rmtree(folder / "seed-0/supervised/evals")
    with pytest.raises(ValueError, match=r"supervised has no epoch-1\.json .*TAX compares"):
        write_report(folder)
    for name in RUNS:
        (folder / "seed-0" / name / "complete.json").unlink()
    with pytest.raises(ValueError, match=r"no finished run .*seed-0/ogd: no complete\.json"):
        write_report(folder)


def test_start_without_supervised_training(tmp_path):
    folder = write_study(tmp_path / "study", seeds=[0], runs={"ogd": RUNS["ogd"]}, epochs=1)
    supervised = folder / "seed-0/supervised"
    (supervised / "complete.json").unlink()
    (supervised / "evals/epoch-1.json").rename(supervised / "evals/epoch-0.json")
    report = write_report(folder, QUICK)
    assert report.found.references[0].file.endswith("epoch-0.json")


def test_a_resumed_runs_metrics_are_merged_by_step(tmp_path):
    folder = write_study(tmp_path / "study", seeds=[0], runs={"ogd": RUNS["ogd"]}, epochs=1)
    with (folder / "seed-0/ogd/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 7.0}\n')
    run = read_study(folder).runs["ogd"]
    steps, losses = run.series("loss")
    assert steps == sorted(set(steps))
    assert losses[steps.index(5)] == 7.0
    assert run.at_epoch("eval_dpo_loss", 0) == pytest.approx(math.log(2))
    assert run.at_epoch("eval_dpo_loss", 7) is None


def test_importing_the_report_does_not_import_torch():
    code = "import sys, ogdopt_harness.reporting.page; sys.exit(bool({'torch', 'matplotlib.pyplot'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_as_text():
    assert [number(v) for v in (-1.234, 0.001, -0.001, None, float("nan"))] == ["−1.23", "0.00", "0.00", "–", "–"]
    assert number(0.5, 1, sign=True) == "+0.5"
    assert spread([1.0, 2.0]) == "1.50 (1.00…2.00)"
    assert spread([2.0, 2.0]) == "2.00"
    assert spread([None]) == "–"
    assert Table("t", ["a", "b"], [["x|y", "1"]]).markdown().splitlines()[-1] == "| x\\|y | 1 |"
    assert markdown_text("a\nb <i>") == "a b &lt;i&gt;"


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_tables_fit_the_terminal_and_lose_no_cell(width):
    columns = ["model", *(f"column {k}" for k in range(9))]
    rows = [[f"a model with a rather long name, {n}", *(f"{n}.{k} [−1.00, 2.00]" for k in range(9))] for n in range(3)]
    console = Console(width=width, record=True, file=io.StringIO())
    Table("Numbers", columns, rows).show(console)
    said = console.export_text()
    assert max(map(len, said.splitlines())) <= width and "…" not in said
    assert all(cell in said for row in rows for cell in row[1:]) and all(name in said for name in columns)
    assert len(Table("Numbers", columns[:2], [row[:2] for row in rows]).parts(80)) == 1
