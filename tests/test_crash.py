"""Errors of the system are messages; what nobody expected is one line, and its traceback is saved."""

import os
import re
import stat

import pytest

from ogdopt_harness import cli
from ogdopt_harness.common.files import sweep
from ogdopt_harness.common.run_folder import SeedFolder
from ogdopt_harness.common.sources import read
from ogdopt_harness.pipeline.guard import locked


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (OSError(28, "No space left on device", "x/lock"), "error: x/lock: No space left on device; make room", 2),
        (PermissionError(13, "Permission denied", "a"), "error: a: Permission denied; change the rights", 2),
        (IsADirectoryError(21, "Is a directory", "a", None, "b"), "error: a -> b: Is a directory; correct the path", 2),
        (OSError("strange"), "error: strange; correct the path", 2),
        (MemoryError(), "error: the memory of this machine does not suffice", 2),
        (ValueError("named"), "error: named", 2),
        (RuntimeError("shapes\ndiffer"), r"error: unexpected RuntimeError: shapes. This is a mistake of ogdopt. The tr", 1),
        (RecursionError(), "error: unexpected RecursionError", 1),
    ],
)
def test_every_error_is_one_message(error, message, status, monkeypatch, capsys):
    def fail(words):
        raise error

    monkeypatch.setattr(cli, "command", fail)
    monkeypatch.delenv("OGDOPT_TRACEBACK", raising=False)
    assert cli.answer(["run"]) == status
    said = capsys.readouterr().err
    assert re.match(message, said) and said.count("\n") == 1
    if status == 1:
        path = re.search(r"The traceback is in (\S+):", said).group(1)
        with open(path, encoding="utf-8") as file:
            assert "in fail" in file.read()
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        os.unlink(path)


def test_a_traceback_can_be_had(monkeypatch):
    def fail(words):
        raise KeyError("x")

    monkeypatch.setattr(cli, "command", fail)
    monkeypatch.setenv("OGDOPT_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.answer(["run"])


def test_a_user_who_does_not_exist():
    with pytest.raises(ValueError, match=r"sft.data.train: ~nosuchuser/r.* begins with the home of a user"):
        list(read("~nosuchuser/rows.jsonl", "train", "sft.data.train"))


def test_leftovers_of_killed_writers_are_swept(tmp_path):
    run = tmp_path / "seed-0" / "ogd"
    (run / "model" / "epoch-1.tmp").mkdir(parents=True)
    (run / ".complete.json.123.tmp").write_text("{")
    (run / "metrics.jsonl").write_text("kept")
    (run / "mine.tmp").write_text("a user's own")
    with locked(SeedFolder(tmp_path / "seed-0")):
        assert sorted(path.name for path in run.rglob("*")) == ["metrics.jsonl", "mine.tmp", "model"]
    sweep(tmp_path)
