"""Names of files and of metrics have one owner each; what it calls a file is what a run writes, a metric what a run logs."""

import ast
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogdopt_harness.common import keys
from ogdopt_harness.common.run_folder import RunFolder, SeedFolder, StudyFolder, short_name
from tests import small
from tests.test_train import run

HARNESS = Path(__file__).parents[1] / "harness" / "ogdopt_harness"
FILE = re.compile(
    r"(complete|optima|data_files|data_report|judge|results|gaps)\.json|(metrics|answers)\.jsonl|config\.yaml|reference\."
    r"safetensors|report\.(html|md)|gaps\.md|epoch-(<n>|\*|)(\.json)?|checkpoint|evals/.*"
)
METRIC = re.compile(
    r"(eval_)?(logps(_mean)?|rewards|objective|epoch|ogd|entanglement|npo|sparse|3d)/.*|eval_(loss|dpo_loss|unseen_mass|)|"
    r"tokens_per_second|gpu_utilization|peak_memory|step_(cpu_)?seconds|skipped_steps"
)
WRITERS = {"common/run_folder.py", "common/keys.py"}


def literals(path):
    """Every string of a file but docstrings and pieces of messages, which have spaces."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    notes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in notes:
            yield node.value


@pytest.mark.parametrize("names", [FILE, METRIC], ids=["files", "metrics"])
def test_names_are_spelled_by_their_owner_alone(names):
    others = [path for path in HARNESS.rglob("*.py") if str(path.relative_to(HARNESS)) not in WRITERS]
    spelled = {str(path.relative_to(HARNESS)): [x for x in literals(path) if names.fullmatch(x)] for path in others}
    assert not {name: found for name, found in spelled.items() if found}
    owners = [x for name in WRITERS for x in literals(HARNESS / name) if names.fullmatch(x)]
    assert len(owners) > 5  # the pattern finds what it looks for


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Every name that runs of these kinds log, and one of their folders."""
    folder = tmp_path_factory.mktemp("logged")
    tok, found = small.tokenizer(folder), set()
    for method in ("ogd_metric", "dpo", "maxright", "npo_pair", "sparse", "kto"):
        run(folder / method, tok, method)
        for line in (folder / method / "metrics.jsonl").read_text().splitlines():
            found |= json.loads(line).keys()
    return found, folder / "dpo"


def test_runs_log_what_readers_look_for(logged):
    sides = [f(side) for f in (keys.logps, keys.reward, keys.update_cosine, keys.tokens_on) for side in keys.SIDES]
    sides += [keys.measured(f(side)) for f in (keys.logps, keys.logps_mean, keys.reward) for side in keys.SIDES]
    streams = [f(stream) for f in (keys.objective, keys.gap, keys.epochs_of) for stream in keys.STREAMS]
    streams += [keys.measured(keys.objective(stream)) for stream in keys.STREAMS]
    single = [keys.STEP, keys.EPOCH, keys.LOSS, keys.LEARNING_RATE, keys.GRAD_NORM, keys.SPEED, keys.PADDING, keys.MARGINS]
    single += [keys.ACCURACIES, keys.KL, keys.WEIGHT, keys.EVAL_DPO_LOSS, keys.UNSEEN, keys.PREFERENCE_STEP, keys.COSINE]
    single += [keys.PROJECTED, keys.PASSES, keys.CASE, keys.GRADIENT_RATIO, keys.CHOSEN_SHARE, keys.CHOSEN_DROP]
    single += [keys.UNSEEN_MASS, keys.UNSEEN_CHANGE, keys.significance(keys.CHOSEN)]
    found, _ = logged
    assert not {*sides, *streams, *single} - found
    assert any(name.startswith(keys.LAYER) for name in found) and any(name.startswith(keys.CONDITION) for name in found)


def test_a_run_writes_what_readers_open(logged):
    folder = RunFolder(logged[1])
    assert folder.finished and folder.ending()[keys.EPOCHS] == 2 and folder.models() == [1, 2]
    assert folder.lines()[-1][keys.STEP] == folder.ending()[keys.STEPS]
    assert {keys.SECONDS, keys.SKIPPED_STEPS, keys.WARNINGS, keys.STEP_SECONDS} <= folder.ending().keys()
    for file in (folder.metrics, folder.reference, folder.checkpoints, folder.model(2)):
        assert file.exists()
    assert folder.evaluations() == {} and folder.judged() == {} and folder.settings() == {}


@given(st.lists(st.integers(0, 10_000), unique=True, max_size=5))
def test_folders_are_found_by_number(tmp_path_factory, numbers):
    home = StudyFolder(tmp_path_factory.mktemp("study"))
    for number in numbers:
        run = home.seed(number).run("ogd")
        for epoch in (0, number):
            run.evaluation(epoch).parent.mkdir(parents=True, exist_ok=True)
            run.evaluation(epoch).write_text("{}")
        (run.path / "evals" / "epoch-1.partial-abc.jsonl").write_text("")
    (home.path / "seed-x").mkdir()
    assert [seed.number for seed in home.seeds()] == sorted(numbers)
    for seed in home.seeds():
        assert [run.name for run in seed.runs()] == ["ogd"]
        assert list(seed.run("ogd").evaluations()) == sorted({0, seed.number})


def test_what_is_no_run_is_not_taken_for_one(tmp_path):
    home = SeedFolder(tmp_path / "seed-3")
    for folder in (home.data, home.tokenizer, home.supervised.path, home.optimum("sft").path, home.run("dpo").path):
        folder.mkdir(parents=True)
    assert [run.name for run in home.runs()] == ["dpo"] and home.number == 3


def test_broken_files_are_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n{"epoch": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object with 'step'"):
        folder.lines()
    folder.complete.write_text("{")
    with pytest.raises(ValueError, match=r"complete\.json is not valid JSON"):
        folder.ending()
    folder.config.write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml is not valid YAML"):
        folder.settings()


def test_a_later_line_of_a_step_counts(tmp_path):
    RunFolder(tmp_path).metrics.write_text('{"step": 2, "loss": 1}\n{"step": 1}\n{"step": 2, "loss": 3}\n')
    assert RunFolder(tmp_path).lines() == [{"step": 1}, {"step": 2, "loss": 3}]
    assert short_name(Path("ogd/model/epoch-3")) == "ogd/epoch-3"
