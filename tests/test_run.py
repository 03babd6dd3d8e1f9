"""The whole study from the command line: it finishes, is skipped when finished, survives every way of being stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import limits

ROOT = Path(__file__).parent.parent
TINY = """--world.people 16 --world.sft_conversations 1000 --world.preference_pairs 64 --world.held_out_pairs 16 --world.items 8
--sft.max_steps 12 --sft.eval_steps 6 --methods sft,dpo,ogd --preference.beta 0.1 --preference.num_train_epochs 2
--preference.train_batch_size 16 --preference.per_device_train_batch_size 8 --preference.save_steps 3 --report.samples 200
""".split()
RUNS = ["sft", "dpo_beta0.1", "ogd"]


def command(folder, *extra):
    recipe = ["--config", "miniature"]
    return [sys.executable, str(ROOT / "harness" / "run.py"), *recipe, "--study.output_dir", str(folder), *TINY, *extra]


def start(folder, *extra):
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONWARNINGS": "default"}
    return subprocess.Popen(
        command(folder, *extra), cwd=folder.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=limits.PROCESS)
    finally:
        process.kill()
    return process.returncode, out, err


def weights(folder, run="ogd"):
    return load_file(folder / "seed-0" / run / "model" / "epoch-2" / "model.safetensors")


def wait_for(process, file, lines):
    """Wait until a file has so many lines; fail with the process's own words if it ends before."""
    deadline = time.monotonic() + limits.EVENT
    while not file.is_file() or len(file.read_text().splitlines()) < lines:
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"{file} never got {lines} lines: {finish(process)}")
        time.sleep(0.01)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "out"
    code, out, err = finish(start(folder))
    assert code == 0, err
    return folder, out


def test_a_study_ends_with_a_table_and_a_report(study):
    folder, out = study
    assert "OGD" in out and "SFT on chosen" in out and "DPO β=0.1" in out and str(folder / "report.html") in out
    assert "rows used (1,000 messages, 1,269 text)" in out
    for name in ("report.html", "report.md", "results.json", "config.yaml"):
        assert (folder / name).stat().st_size > 500
    assert [p.name for p in (folder / "seed-0" / "supervised" / "evals").iterdir()] == ["epoch-1.json"]
    for run in RUNS:
        here = folder / "seed-0" / run
        assert json.loads((here / "complete.json").read_text())["epochs"] == 2
        assert sorted(p.name for p in (here / "evals").iterdir()) == ["epoch-1.json", "epoch-2.json"]
        assert {"config.yaml", "metrics.jsonl", "model"} <= {p.name for p in here.iterdir()}
    assert not list(folder.rglob("*.tmp"))
    assert "## Does the step keep its promise?" in (folder / "report.md").read_text()


def test_what_is_finished_is_skipped(study):
    folder, _ = study
    before = {p: p.stat().st_mtime_ns for p in (folder / "seed-0").rglob("*") if p.is_file() and p.name != "lock"}
    code, out, err = finish(start(folder))
    assert code == 0 and "evaluating" not in out, err
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_other_settings_are_refused_by_name(study):
    folder, _ = study
    code, _, err = finish(start(folder, "--preference.learning_rate", "3e-4"))
    assert code == 2 and "Traceback" not in err
    assert "preference.learning_rate was 0.0001 and is 0.0003" in err.replace("\n", " ") and "--study.output_dir" in err


def test_more_methods_join_a_finished_study(study):
    folder, _ = study
    more = ["--preference.beta", "0.1,0.5", "--joint.lambdas", "0.3", "--methods", "sft,dpo,ogd,ogd_metric,maxright"]
    code, out, err = finish(start(folder, *more, "--joint.evaluate_every", "2", "--joint.train_batch_size", "32"))
    assert code == 0 and "evaluating dpo_beta0.5" in out and "evaluating ogd," not in out, err
    report = (folder / "report.md").read_text()
    assert "evaluating ogd_metric, epoch 2" in out and "OGD (own metric)" in report
    assert "evaluating maxright_lambda0.3_every2, epoch 2" in out and "MAXRIGHT λ=0.3 k=2" in report
    metrics = folder / "seed-0" / "maxright_lambda0.3_every2" / "metrics.jsonl"
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(found) == 9 and found[0]["eval_loss"] > 0 and "eval_dpo_loss" in found[-1]
    both = [line["step"] for line in found[1:] if {"objective/preference", "objective/sft"} <= line.keys()]
    assert both == [1, 3, 5, 7]  # evaluated before every second step


def test_a_killed_study_ends_like_an_undisturbed_one(study, tmp_path):
    """kill -9 in the supervised stage and in a method, then the same command again: the same weights, bit for bit."""
    folder = tmp_path / "out"
    for run, lines in (("supervised", 7), ("dpo_beta0.1", 5)):
        process = start(folder)
        wait_for(process, folder / "seed-0" / run / "metrics.jsonl", lines)
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
    code, _, err = finish(start(folder))
    assert code == 0, err
    for run in RUNS:
        ours, theirs = weights(folder, run), weights(study[0], run)
        assert all(ours[k].equal(theirs[k]) for k in theirs)


def test_ctrl_c_saves_and_says_so(study, tmp_path):
    folder = tmp_path / "out"
    process = start(folder)
    wait_for(process, folder / "seed-0" / "supervised" / "metrics.jsonl", 3)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and "the same command goes on from here" in err and "Traceback" not in err
    assert finish(start(folder, "--methods", "ogd"))[0] == 0
    ours, theirs = weights(folder), weights(study[0])
    assert all(ours[k].equal(theirs[k]) for k in theirs)


def test_sigterm_ends_a_study_with_0_wherever_it_is(tmp_path):
    """Here in its preparations; in a training loop it saves (test_ranks.py, test_faults.py)."""
    folder = tmp_path / "out"
    process = start(folder)
    wait_for(process, folder / "seed-0" / "lock", 1)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 0 and "the same command goes on from here" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "odg"], "['odg']; expected different names out of sft, dpo, ogd, ogd_metric"),
        (["--preference.data.train", "nothing.jsonl"], "nothing.jsonl"),
        (["--preference.lr", "1"], "preference.lr"),
        (["--study.name", "a/b"], "study.name is 'a/b'"),
        (["--preference.per_device_train_batch_size", "5"], "train_batch_size is 16"),
    ],
)
def test_mistakes_get_one_message(extra, message, tmp_path):
    code, _, err = finish(start(tmp_path / "out", *extra))
    assert code == 2 and message in err and "Traceback" not in err


def test_print_config_is_a_recipe(tmp_path):
    shown = subprocess.run(
        [sys.executable, str(ROOT / "harness" / "run.py"), "--methods=ogd", "--print_config"],
        capture_output=True, text=True, timeout=limits.PROCESS, cwd=tmp_path,
    )  # fmt: skip
    assert shown.returncode == 0 and "learning_rate: 0.0001" in shown.stdout and "- ogd" in shown.stdout
