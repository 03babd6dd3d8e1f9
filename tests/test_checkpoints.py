"""Checkpoints: whole or not at all, bit for bit, the broken ones passed over by name."""

import os

import pytest
import torch
from torch import nn
from torch.optim import RMSprop
from torch.optim.lr_scheduler import LambdaLR

from ogdopt import ProjectedGradient
from ogdopt_harness.training import checkpoints
from ogdopt_harness.training.checkpoints import Progress, broken, found, restore, save


def parts(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    optimizer = ProjectedGradient(RMSprop(model.parameters(), lr=0.1))
    return model, optimizer, LambdaLR(optimizer, lambda k: 1 / (1 + k))


def steps(model, optimizer, scheduler, n):
    for _ in range(n):
        x = torch.randn(5, 3)
        optimizer.step(lambda x=x: model(x).sum(), lambda x=x: model(-x).square().sum())
        scheduler.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_restores_bit_for_bit(tmp_path):
    ours = parts()
    steps(*ours, 3)
    save(tmp_path, Progress(3, 77, 1.5), *ours)
    end = steps(*ours, 3)
    theirs = parts(seed=9)
    assert restore(tmp_path, *theirs) == Progress(3, 77, 1.5)
    assert torch.equal(steps(*theirs, 3), end)


@pytest.mark.parametrize("part", ["model", "optimizer", "rng", "scheduler"])
def test_leaving_any_part_out_would_be_noticed(part, tmp_path, monkeypatch):
    """The test above fails if one part of the state is not restored."""
    ours = parts()
    steps(*ours, 3)
    save(tmp_path, Progress(3), *ours)
    end = steps(*ours, 3)
    theirs = parts(seed=9)
    if part == "rng":
        monkeypatch.setattr(checkpoints, "_restore_rng", lambda *args: None)
    if part == "model":
        fresh = {name: p.clone() for name, p in checkpoints.trained(theirs[0]).items()}
        monkeypatch.setattr(checkpoints, "trained", lambda model: fresh)
    target = {"optimizer": theirs[1], "scheduler": theirs[2]}.get(part)
    if target is not None:
        monkeypatch.setattr(target, "load_state_dict", lambda state: None)
    restore(tmp_path, *theirs)
    assert not torch.equal(steps(*theirs, 3), end)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: os.truncate(d / "__0_0.distcp", 10), "__0_0.distcp is not what was written"),
        (lambda d: (d / "__0_0.distcp").write_bytes(bytes((d / "__0_0.distcp").stat().st_size)), "__0_0.distcp is not what"),
        (lambda d: (d / ".metadata").unlink(), ".metadata is missing"),
        (lambda d: (d / "state.json").write_text("{"), "state.json is not valid JSON"),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(harm, message, tmp_path):
    ours = parts()
    save(tmp_path, Progress(1), *ours)
    newest = save(tmp_path, Progress(2), *ours)
    harm(newest)
    assert message in broken(newest)
    with pytest.warns(UserWarning, match=message):
        assert restore(tmp_path, *ours).step == 1


def test_only_the_last_two_are_kept_and_leftovers_go(tmp_path):
    ours = parts()
    (tmp_path / "step-00000009.tmp").mkdir(parents=True)
    for k in (1, 2, 3):
        save(tmp_path, Progress(k), *ours)
    assert [p.name for p in found(tmp_path)] == ["step-00000002", "step-00000003"] == sorted(os.listdir(tmp_path))


@pytest.mark.parametrize("point", ["tensors", "rng", "state"])
def test_a_full_disk_leaves_the_old_checkpoint(point, tmp_path, monkeypatch):
    ours = parts()
    save(tmp_path, Progress(1), *ours)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    target = {"tensors": (torch, "save"), "rng": (checkpoints, "save_file"), "state": (checkpoints.json, "dumps")}[point]
    monkeypatch.setattr(*target, full)
    with pytest.raises(ValueError, match=r"step-00000002 could not .*: No space left on device; the last good one, step-0"):
        save(tmp_path, Progress(2), *ours)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step-00000001"] and restore(tmp_path, *ours).step == 1


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "none", *parts()) is None
