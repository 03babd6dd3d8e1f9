"""Trackers by name: which are chosen, what they hear, a run that goes on, and what is refused."""

import json
import math

import pytest
import torch
from accelerate import tracking
from accelerate.utils import is_tensorboard_available

from ogdopt_harness.config.schema import Config
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.pipeline.stages import SeedStudy
from ogdopt_harness.training import trackers
from ogdopt_harness.training.progress import Stopped
from ogdopt_harness.training.trackers import Trackers, chosen
from ogdopt_harness.training.trainer import Trainer
from tests import small
from tests.test_train import job, lines


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


class Heard(tracking.GeneralTracker):
    """Stands in for a tracker with a project, as wandb is one."""

    name, requires_logging_directory, tracker = "wandb", False, None
    all: list = []  # noqa: RUF012 - what every instance heard, for the test

    def __init__(self, project, **options):
        super().__init__()
        self.started = {"project": project, **options}

    def start(self):
        self.lines, self.settings, self.finished = [], {}, False
        Heard.all.append(self)

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **options):
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def heard(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Heard)
    monkeypatch.setattr(tracking, "_available_trackers", ["wandb"])
    Heard.all = []
    return Heard.all


def trained(folder, tok, **changes):
    task = job(folder, tok, "ogd", **changes)
    task.report_to, task.project, task.recipe = ["wandb"], "study", {"learning_rate": 1e-3, "data": {"train": ["a"]}}
    model = prepare(small.model(tok), small.MODEL, torch.device("cpu"))
    return Trainer(task, model, tok, torch.device("cpu"), False)


def test_they_hear_every_line(tok, tmp_path, heard):
    trained(tmp_path / "seed-0" / "ogd", tok).run()
    (tracker,) = heard
    assert tracker.started == {"project": "study", "name": "seed-0/ogd"} and tracker.finished
    assert tracker.settings == {"method": "ogd", "learning_rate": 1e-3, "data.train": "['a']"}
    written = lines(tmp_path / "seed-0" / "ogd")
    assert [step for step, _ in tracker.lines] == [line["step"] for line in written]
    for (_, values), line in zip(tracker.lines, written, strict=True):
        assert values == {k: float(v) for k, v in line.items() if k != "step" and math.isfinite(v)}


def test_a_run_that_goes_on_begins_at_its_step(tok, tmp_path, heard, monkeypatch):
    step = Trainer.step

    def stopping(self, at):
        if at == 4:
            raise Stopped("killed", 9)
        return step(self, at)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(Stopped):
        trained(tmp_path, tok, save_steps=2).run()
    monkeypatch.setattr(Trainer, "step", step)
    trained(tmp_path, tok, save_steps=2).run()
    first, second = heard
    assert first.finished and [s for s, _ in first.lines] == [0, 1, 2, 3, 4]
    assert second.finished and [s for s, _ in second.lines] == [5, 6]


def test_tensorboard_forgets_steps_that_are_taken_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for values in ({1: 1.0, 2: 2.0, 3: 3.0}, {2: 20.0, 3: 30.0}):
        told = Trackers(["tensorboard"], "study", "run", tmp_path, {})
        for step, loss in values.items():
            told.log({"step": step, "loss": loss, "broken": math.nan})
        told.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 1.0), (2, 20.0), (3, 30.0)]
    assert found.Tags()["scalars"] == ["loss"]


def test_which_are_chosen(monkeypatch):
    assert chosen(["auto"]) == (["tensorboard"] if is_tensorboard_available() else []) and chosen(["none"]) == chosen([]) == []
    monkeypatch.setattr(trackers, "is_tensorboard_available", lambda: False)
    assert chosen(["auto"]) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], r"report_to names 'tensorbord'; expected auto, none or trackers out of .*tensorboard.*wandb"),
        (["comet_ml"], r"report_to names 'comet_ml', which is not installed; pip install comet_ml, or leave it out"),
        (["none", "wandb"], r"report_to is \['none', 'wandb'\]; expected none alone"),
    ],
)
def test_what_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        chosen(names)
    with pytest.raises(ValueError, match="report_to"):
        SeedStudy(Config(report_to=names, device="cpu"), 0)


def test_without_a_tracker_nothing_is_begun(tok, tmp_path):
    task = job(tmp_path, tok, "ogd")
    model = prepare(small.model(tok), small.MODEL, torch.device("cpu"))
    trainer = Trainer(task, model, tok, torch.device("cpu"), False)
    trainer.run()
    assert trainer.trackers.begun == [] and json.loads((tmp_path / "complete.json").read_text())["steps"] == 6
