"""Saved files are read through one door: what is not what was written is refused with the file's name, or made again."""

import os
import pickle
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ogdopt_harness.common import files
from ogdopt_harness.common.files import (
    DamagedError,
    check_sealed,
    read_json,
    read_yaml,
    seal,
    sealed,
    write_json,
    write_text,
    write_yaml,
)
from ogdopt_harness.common.run_folder import RunFolder
from ogdopt_harness.training import scoring, unpickling
from ogdopt_harness.training.checkpoints import Progress, broken, save

from .searches import damage
from .test_checkpoints import parts


def flipped(path, at=None):
    """One bit of a file the other way."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= 1
    path.write_bytes(bytes(raw))


def folder_instead(path):
    path.unlink()
    path.mkdir()


HARM = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "flipped": lambda path: flipped(path, 12),
    "a folder": folder_instead,
    "a list": lambda path: path.write_text("[1, 2]"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "nested": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_the_door_names_the_file(kind, harm, tmp_path):
    path, value = tmp_path / f"saved.{kind}", {"steps": 3, "epochs": 1, "words": ["a", "b"]}
    if kind == "json":
        write_json(path, sealed(value))
    else:
        write_yaml(path, value)
    read = {"json": read_json, "yaml": read_yaml}[kind]
    assert read(path) == value
    HARM[harm](path)
    with pytest.raises(DamagedError, match=rf"{path}.*bring back the file that was written"):
        read(path)


def test_every_flipped_bit_is_seen_or_means_nothing(tmp_path):
    value = {"learning_rates": [0.001], "step": 12}
    write_json(path := tmp_path / "state.json", sealed(value))
    whole, refused = path.read_bytes(), 0
    for at in range(len(whole)):
        path.write_bytes(whole)
        flipped(path, at)
        try:
            assert read_json(path) == value or "sha256" not in path.read_text()
        except DamagedError:
            refused += 1
    assert refused > 0.9 * len(whole)


def test_what_is_needed_is_there(tmp_path):
    write_json(path := tmp_path / "complete.json", {"epochs": "many"})
    with pytest.raises(DamagedError, match=r"complete.json: 'epochs' is 'many'; expected what a run writes there"):
        read_json(path, {"epochs": int})


@pytest.mark.parametrize("harm", [*HARM, "removed"])
def test_an_exported_folder_is_what_was_written(harm, tmp_path):
    folder = tmp_path / "epoch-1"
    (folder / "adapter").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "adapter/model.safetensors"):
        (folder / name).write_text('{"a": [1, 2, 3], "text": "some more words"}')
    check_sealed(folder)  # without a manifest it is a stranger's
    seal(folder)
    check_sealed(folder)
    check_sealed(Path(shutil.copytree(folder, tmp_path / "copy")))
    for name in ("model.safetensors", "adapter/model.safetensors", files.MANIFEST):
        broken_one = Path(shutil.copytree(folder, tmp_path / f"{name.replace('/', '-')}"))
        if harm == "removed":
            (broken_one / name).unlink()
            if name == files.MANIFEST:
                continue  # then it is as good as a stranger's
        else:
            HARM[harm](broken_one / name)
        with pytest.raises(DamagedError, match=name):
            check_sealed(broken_one)


@pytest.mark.parametrize("harm", [*HARM, "removed", "longer"])
def test_metrics_of_a_finished_run(harm, tmp_path):
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"step": 0, "loss": 1.5}\n{"step": 1, "loss": 0.5}\n')
    run.finish({"steps": 1, "epochs": 1})
    assert [line["loss"] for line in run.lines()] == [1.5, 0.5]
    if harm == "removed":
        run.metrics.unlink()
    elif harm == "longer":
        run.metrics.write_text(run.metrics.read_text() + '{"step": 2}\n')
    else:
        HARM[harm](run.metrics)
    for read in (run.check, run.lines):
        with pytest.raises(DamagedError, match=r"metrics.jsonl (is missing|has been changed)"):
            read()


class Command:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_crafted_index_runs_nothing(tmp_path):
    newest = save(tmp_path / "checkpoint", Progress(1), *parts())
    assert broken(newest) is None
    index, state = newest / ".metadata", read_json(newest / "state.json")
    index.write_bytes(pickle.dumps(Command(tmp_path / "ran")))
    state["files"][".metadata"] = [index.stat().st_size, files.digest(index)]  # a stranger makes the manifest fit
    write_json(newest / "state.json", sealed(state))
    assert "names posix.system, which no index of tensors needs" in str(broken(newest))
    assert not (tmp_path / "ran").exists()


def test_an_index_that_leads_elsewhere(tmp_path):
    newest = save(tmp_path / "checkpoint", Progress(1), *parts())
    found = unpickling.read_index(newest)
    for info in found.storage_data.values():
        info.relative_path = "../../secret"
    (newest / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(ValueError, match=r"'\.\./\.\./secret', which lies outside of the checkpoint"):
        unpickling.read_index(newest)


@pytest.mark.parametrize("harm", ["truncated", "emptied", "flipped", "a list"])
def test_a_reference_is_computed_again(harm, tmp_path):
    path, found = tmp_path / "reference.safetensors", {"eval_chosen": torch.arange(50.0)}
    save_file(found, path, metadata={files.SEAL: scoring._seal(found)})
    assert torch.equal(scoring._kept(path)["eval_chosen"], found["eval_chosen"])
    if harm == "flipped":
        flipped(path, path.stat().st_size - 3)
    else:
        HARM[harm](path)
    with pytest.warns(UserWarning, match="reference.safetensors is not what was written .*; its log-prob.* computed again"):
        assert scoring._kept(path) is None


def test_files_are_as_open_as_the_umask_says(tmp_path):
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "a" / "b.txt", "x")
        write_json(tmp_path / "c.json", {})
    finally:
        os.umask(before)
    assert (
        stat.S_IMODE((tmp_path / "a" / "b.txt").stat().st_mode) == stat.S_IMODE((tmp_path / "c.json").stat().st_mode) == 0o600
    )


def test_a_sample_of_damaged_studies(tmp_path):
    """The whole is `python -m benchmarks.soak damage`."""
    found = damage.search(tmp_path, sample=4, seed=3)
    assert found.tried == 4 and not found.findings, str(found)
