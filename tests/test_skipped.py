"""A run that learned nothing says so: skipped steps in a row end it, and any skipped step is told."""

import pytest
import torch

from ogdopt_harness.common.run_folder import RunFolder
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.skipped import Skipped
from ogdopt_harness.training.trainer import Trainer, train

from . import small

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


def job(tmp_path, tok, **changes):
    return Job(tmp_path / "run", "DPO", "dpo", small.stage(**changes), small.preferences(tok), None, beta=0.1)


def broken(monkeypatch, steps):
    """Let the losses of these steps be NaN: their beta is."""
    step = Trainer.step

    def spoilt(self, number):
        self.job.beta = float("nan") if number in steps else 0.1
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", spoilt)


@pytest.mark.parametrize(("limit", "message"), [(3, "the last 3 steps, up to step 3,"), (20, "all 6 steps of DPO")])
def test_a_run_that_learns_nothing_ends_with_the_reason(limit, message, tmp_path, tok, monkeypatch):
    broken(monkeypatch, range(100))
    with pytest.raises(ValueError, match=rf"{message} were skipped, since their gradients were not finite: nothing is learned"):
        train(job(tmp_path, tok, max_skipped_steps=limit), small.model(tok), tok, CPU)
    assert not RunFolder(tmp_path / "run").finished


def test_a_few_skipped_steps_are_told_and_counted(tmp_path, tok, monkeypatch, capsys):
    broken(monkeypatch, {1, 3})
    train(job(tmp_path, tok, max_skipped_steps=2), small.model(tok), tok, CPU)
    assert "warning: DPO: 2 of 6 steps were skipped, their gradients were not finite" in "".join(capsys.readouterr())
    assert RunFolder(tmp_path / "run").ending()["skipped_steps"] == 2


def test_only_steps_in_a_row_count():
    watch = Skipped(limit=3, total=0)
    for step, total in ((1, 1), (2, 2), (3, 2), (4, 3), (5, 4)):
        watch.look(step, total)
    with pytest.raises(ValueError, match="the last 3 steps, up to step 6,"):
        watch.look(6, 5)
    assert Skipped(3, 0, 4).end("x") == ""
