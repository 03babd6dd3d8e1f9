"""Joint runs in the report, on made-up runs whose gaps are known: who is nearest, what is forgotten, what it costs."""

import json
import math
import shutil

import pytest
import yaml

from ogdopt_harness.analysis.study_reader import read_study
from ogdopt_harness.reporting.joint import TITLE, drawn, joint_runs, numbers
from ogdopt_harness.reporting.page import write_report
from tests.test_report import QUICK, RUNS, cells, value, write_study

OPTIMA = {0: {"preference": 0.10, "sft": 1.00}, 1: {"preference": 0.20, "sft": 1.50}}
START, SECONDS, PEAK = (0.69, 2.5), 40.0, 1000
METHODS = {  # method -> label, evaluate_every, gaps (preference, sft), least preference gap, seconds over Sequential's
    "sequential": ("Sequential", None, (0.50, 0.10), 0.02, 1.0),
    "mix": ("Mix", None, (0.20, 0.20), 0.20, 2.0),
    "alright": ("ALRIGHT", None, (0.30, 0.10), 0.30, 1.0),
    "alright_ogd": ("ALRIGHT + OGD", None, (0.20, 0.05), 0.20, 1.1),
    "maxright": ("MAXRIGHT", 1, (0.06, 0.08), 0.05, 1.5),
}


def add(folder, seed, method, weight, every=None, scale=1.0, gaps=None, slower=None):
    """A joint run: the gaps of the table times `scale`, towards them in three measurements."""
    label, k, ends, least, seconds = METHODS[method]
    every, ends, seconds = every or k, gaps or ends, slower or seconds
    name = f"{method}_lambda{weight:g}" + (f"_every{every}" if every else "")
    run = folder / f"seed-{seed}" / name
    shutil.copytree(folder / f"seed-{seed}" / "sft", run)
    shown = f"{label} λ={weight:g}" + (f" k={every}" if every else "")
    what = {"name": name, "kind": "method", "method": method, "beta": 0.1, "label": shown, "lambda": weight}
    (run / "config.yaml").write_text(yaml.safe_dump({"run": what | {"evaluate_every": every}}, allow_unicode=True))
    best = OPTIMA[seed]
    end = {key: best[key] + scale * gap for key, gap in zip(best, ends)}
    middle = {"preference": best["preference"] + scale * least, "sft": START[1]}
    lines = []
    for step, point in ((0, dict(zip(best, START))), (50, middle), (100, end)):
        lines.append({"step": step, "epoch": step / 20} | {f"eval_objective/{key}": x for key, x in point.items()})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = json.loads((run / "complete.json").read_text())
    costs = {"step_seconds": SECONDS * seconds, "step_cpu_seconds": 2 * SECONDS * seconds, "peak_memory": PEAK * (1 + weight)}
    (run / "complete.json").write_text(json.dumps(done | costs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds, five methods, two weights (at 0.8 all gaps are twice as large), MAXRIGHT with k = 1 and 100 at 0.5."""
    study = write_study(tmp_path_factory.mktemp("runs") / "study", runs={name: RUNS[name] for name in ("sft", "ogd")})
    for seed, optima in OPTIMA.items():
        (study / f"seed-{seed}" / "optima").mkdir()
        (study / f"seed-{seed}" / "optima" / "optima.json").write_text(json.dumps(optima))
        for method in METHODS:
            for weight, scale in ((0.5, 1.0), (0.8, 2.0)):
                add(study, seed, method, weight, scale=scale)
        add(study, seed, "maxright", 0.5, every=100, gaps=(0.3, 0.4), slower=1.2)
    return study


@pytest.fixture(scope="module")
def report(folder):
    return write_report(folder, QUICK)


def test_gaps_are_what_an_objective_ended_above_its_seeds_optimum(folder):
    joint = joint_runs(read_study(folder))
    assert joint.lambdas == [0.5, 0.8] and joint.seeds == [0, 1] and len(joint.runs) == 11
    for one in joint.runs:
        label, k, gaps, *_ = METHODS[one.run.method]
        gaps = (0.3, 0.4) if one.run.evaluate_every == 100 else gaps
        scale = {0.5: 1.0, 0.8: 2.0}[one.run.weight]
        for seed, end in one.ends.items():
            assert end.gaps == pytest.approx({"preference": scale * gaps[0], "sft": scale * gaps[1]})
            assert end.distance == pytest.approx(scale * math.hypot(*gaps))
            assert end.path[0][0] == pytest.approx(START[0] - OPTIMA[seed]["preference"])
        assert one.family == label + (f" k={one.run.evaluate_every}" if k else "")


def test_cost_is_what_it_is_above_sequential_of_the_same_weight(folder, report):
    rows = {row["method"]: row for row in cells((folder / "report.md").read_text(), TITLE)}
    for method, (label, k, gaps, _, seconds) in METHODS.items():
        row = rows[f"{label} λ=0.8" + (f" k={k}" if k else "")]
        assert value(row["time"]) == value(row["CPU time"]) == pytest.approx(100 * (seconds - 1), abs=0.6)
        assert value(row["memory"]) == 0  # of Sequential with the same weight, which has as much
        assert value(row["gap of f_DPO"]) == pytest.approx(2 * gaps[0], abs=1e-3)
        assert value(row["ideal distance"]) == pytest.approx(2 * math.hypot(*gaps), abs=1e-3), method
    assert "GPU use" not in rows["Mix λ=0.5"]
    assert report.tables[0].title == TITLE


def test_what_is_said(report):
    text = " ".join(report.headline)
    assert "nearest to the ideal point came MAXRIGHT k=1 at λ=0.5 (0.100) and MAXRIGHT k=1 at λ=0.8 (0.200)" in text
    assert "Sequential lost preference in its supervised phase in 4 of 4 runs: f_DPO from 0.180 at its least to 0.900" in text
    assert (
        "With OGD instead of DPO on the pairs ALRIGHT is nearer in 4 of 4 runs (mean gaps: f_DPO 0.450 → 0.300, f_SFT" in text
    )
    assert "MAXRIGHT λ=0.5, ideal distance by steps between evaluations: k=1 0.100 and k=100 0.500 for 0.80x of its CPU" in text


def test_equal_distances_are_called_equal(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "study")
    for seed in OPTIMA:
        shutil.rmtree(tmp_path / "study" / f"seed-{seed}" / "mix_lambda0.5")
        add(tmp_path / "study", seed, "mix", 0.5, gaps=(0.101, 0.0))
    said = " ".join(write_report(tmp_path / "study", QUICK).headline)
    assert "MAXRIGHT k=1 at λ=0.5 (0.100, as near as Mix)" in said


def test_figures_and_numbers(folder, report):
    names = [drawing.file.stem for drawing in report.drawings]
    assert names[:4] == ["joint_pareto", "joint_paths", "joint_by_lambda", "joint_by_evaluation"]
    assert all("ook for" in drawing.caption for drawing in report.drawings)
    panels, look = drawn(report.joint)
    for panel in panels:
        assert all(set(curves) <= set(look) for curves in panel.curves)
    pareto, paths, by_lambda, by_k = panels
    assert [tuple(x) for x, _ in pareto.curves[0]["Mix"]] == [pytest.approx((0.2, 0.4))] * 2
    assert set(paths.curves[0]) == {"Sequential", "Mix", "ALRIGHT", "ALRIGHT + OGD", "MAXRIGHT k=1", "MAXRIGHT k=100"}
    assert [tuple(x) for x, _ in by_lambda.curves[2]["ALRIGHT"]] == [(0.5, 0.8)] * 2
    x, y = by_k.curves[1]["MAXRIGHT λ=0.5"][0]
    assert tuple(x) == (1, 100) and tuple(y) == pytest.approx((1.0, 0.8))
    kept = json.loads((folder / "results.json").read_text())["joint"]
    assert kept == numbers(report.joint) and kept["mix_lambda0.5"]["distance"] == pytest.approx([0.2 * 2**0.5] * 2)


def test_without_optima_or_measurements_there_is_nothing_to_say(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "study")
    for seed in OPTIMA:
        (tmp_path / "study" / f"seed-{seed}" / "optima" / "optima.json").unlink()
    assert joint_runs(read_study(tmp_path / "study")) is None
    assert TITLE not in [table.title for table in write_report(tmp_path / "study", QUICK).tables]


def test_the_last_epoch_alone_may_be_evaluated(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "study")
    for path in (tmp_path / "study").glob("seed-*/*/evals/epoch-[1-4].json"):
        if path.parents[1].name != "supervised":
            path.unlink()
    assert len(read_study(folder).incomplete) == 0
    with pytest.raises(ValueError, match=r"epoch 1, 2, 3, 4 is not evaluated"):
        read_study(tmp_path / "study")
    file = tmp_path / "study" / "config.yaml"
    about = yaml.safe_load(file.read_text())
    about["config"]["evals"] = {"epochs": "last"}
    file.write_text(yaml.safe_dump(about))
    assert read_study(tmp_path / "study").incomplete == []
