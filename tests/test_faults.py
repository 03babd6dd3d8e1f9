"""What may happen to a run: killed processes, signals, torn checkpoints, changed data, a second run in the same folder.

Real runs of `run.py` on two processes under torch's launcher, each bounded in time and ended with its children; a longer series
of random kills is `benchmarks/soak.py`.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from harness.guard import locked, same_files, same_rows
from tests import small

ROOT = Path(__file__).parent.parent
ROWS = 24


def recipe(folder):
    """A fresh tiny model, 24 pairs, one epoch of six steps of the supervised stage and two of OGD, a checkpoint every step."""
    pairs = [{"prompt": f"where is {k}", "chosen": f"sure , {k} is here", "rejected": f"um {k}"} for k in range(ROWS)]
    files = {"pairs": pairs, "texts": [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"learning_rate": 1e-3, "warmup_steps": 0, "warmup_ratio": None, "train_batch_size": 4, "save_steps": 1}
    stage |= {"per_device_train_batch_size": 4, "train_on_prompt": False}
    settings = {
        "study": {"output_dir": str(folder / "out")},
        "methods": ["ogd"],
        "model": {"model_name_or_path": None, "architecture": small.ARCHITECTURE, "tokenizer_name_or_path": None}
        | {"tokenizer_type": "word", "vocab_size": 64},
        "sft": stage | {"num_train_epochs": 1, "data": {"train": [str(folder / "texts.jsonl")]}},
        "preference": stage | {"num_train_epochs": 4, "data": {"train": [str(folder / "pairs.jsonl")]}},
        "device": "cpu",
        "threads": 1,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def words(file, processes, *extra, restarts=0):
    starter = [sys.executable]
    if processes > 1:
        starter += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
        starter += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--monitor-interval=0.2"]
    return [*starter, str(ROOT / "harness" / "run.py"), "--config", str(file), *extra]


class Run:
    """A run whose output goes to a file, since its children may outlive it and would hold a pipe open."""

    def __init__(self, command, folder):
        self.log = folder / f"said-{time.monotonic_ns()}.txt"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)

    @property
    def said(self):
        return self.log.read_text()

    def ranks(self):
        """The processes that a launcher has started."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]
        except FileNotFoundError:
            return []

    def kill(self):
        """Everything, at once."""
        for pid in [self.process.pid, *self.ranks()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self, seconds=100):
        return self.process.wait(seconds)

    def wait_for(self, ready, seconds=60):
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"it never came to that: {self.said[-6000:]}")
            time.sleep(0.002)


@contextmanager
def running(command, folder):
    """A run, all of whose processes are gone at the end."""
    run = Run(command, folder)
    try:
        yield run
    finally:
        run.kill()


def lines(folder, run="ogd"):
    file = folder / "out" / "seed-0" / run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def weights(folder):
    found = load_file(folder / "out" / "seed-0" / "ogd" / "model" / "epoch-4" / "model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with running(words(recipe(folder), 2), folder) as run:
        assert run.end() == 0, run.said
    return folder


@pytest.fixture
def begun(undisturbed, tmp_path):
    """A copy of it that has its supervised stage, and OGD still to do."""
    file = recipe(tmp_path)
    shutil.copytree(undisturbed / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "seed-0" / "ogd")
    for name in ("config.yaml", "data_files.json"):
        for path in (tmp_path / "out").rglob(name):
            path.write_text(path.read_text().replace(str(undisturbed), str(tmp_path)))
    return tmp_path, file


def test_a_killed_process_and_a_save_that_was_cut_off(begun, undisturbed):
    """kill -9 of one process: the launcher starts all again. Then of all in a save, and the newest checkpoint is torn."""
    folder, file = begun
    checkpoints = folder / "out" / "seed-0" / "ogd" / "checkpoint"
    with running(words(file, 2, restarts=3), folder) as run:
        run.wait_for(lambda: lines(folder) >= 4)
        before = run.ranks()
        os.kill(before[-1], signal.SIGKILL)
        run.wait_for(lambda: set(run.ranks()).isdisjoint(before) and lines(folder) >= 12 and list(checkpoints.glob("*.tmp")))
        run.kill()
    newest = max(path for path in checkpoints.glob("step-*") if path.suffix != ".tmp")
    os.truncate(newest / "__0_0.distcp", (newest / "__0_0.distcp").stat().st_size // 2)
    with running(words(file, 2), folder) as run:
        assert run.end() == 0, run.said
        assert f"{newest} is not used: __0_0.distcp is not what was written" in run.said
    assert torch.equal(weights(folder), weights(undisturbed)) and not list(folder.rglob("*.tmp"))


def test_sigterm_saves_and_ends_with_zero_and_one_process_goes_on(begun, undisturbed):
    folder, file = begun
    with running(words(file, 2), folder) as run:
        run.wait_for(lambda: lines(folder) >= 4)
        for pid in run.ranks():
            os.kill(pid, signal.SIGTERM)
        assert run.end() == 0, run.said
        assert run.said.count("the same command goes on from here") == 1 and "is saved at step" in run.said
    with running(words(file, 1), folder) as run:
        assert run.end() == 0, run.said
    torch.testing.assert_close(weights(folder), weights(undisturbed), rtol=0, atol=1e-6)


# ---- one run a folder -----------------------------------------------------------------------------------------------------


def hold(folder, held, done):
    with locked(folder):
        held.set()
        done.wait(60)


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(killed, tmp_path):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    first = context.Process(target=hold, args=(tmp_path, held, done))
    first.start()
    try:
        assert held.wait(60)
        taken = rf"in use by another run \(process {first.pid} on .*choose another --study.output_dir"
        with pytest.raises(ValueError, match=taken), locked(tmp_path):
            pass
        if killed:
            os.kill(first.pid, signal.SIGKILL)
        done.set()
        first.join(60)
        with locked(tmp_path):  # let go of, or taken over from the dead
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        assert (tmp_path / "lock").read_text() == ""
    finally:
        first.kill()


def test_what_a_run_on_another_machine_left_is_not_taken_over_but_in_the_same_job(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "then", "job": "42"}))
    elsewhere = r"process 1 on elsewhere, since then.*if that run is dead, delete .*lock"
    with pytest.raises(ValueError, match=elsewhere), locked(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with locked(tmp_path):
        pass


# ---- the data that a study was begun with ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: os.truncate(f, 40), r"pairs.jsonl shrank from \d+ to 40 bytes"),
        (lambda f: f.write_text(f.read_text() + "{}\n"), r"pairs.jsonl grew from"),
        (lambda f: f.write_text(f.read_text().replace("sure", "sore")), "pairs.jsonl has other content"),
    ],
)
def test_data_that_changed_is_refused_by_name(change, message, tmp_path):
    recipe(tmp_path)
    file, record = tmp_path / "pairs.jsonl", tmp_path / "out" / "data_files.json"
    same_files(record, [file], "preference.data.train")
    same_files(record, [file, tmp_path / "texts.jsonl"], "preference.data.train")
    change(file)
    with pytest.raises(ValueError, match=f"preference.data.train: data has changed since this study was begun: .*{message}"):
        same_files(record, [file], "preference.data.train")


def test_rows_that_changed_without_their_files_are_refused(tmp_path):
    record = tmp_path / "data_files.json"
    same_rows(record, "a", "sft.data.train", {"rows": 10, "tokens": 100, "sha256": "x"})
    same_rows(record, "a", "sft.data.train", {"rows": 10, "tokens": 100, "sha256": "x"})
    with pytest.raises(ValueError, match=r"10 of 100 tokens then, 10 of 100 now.*tokenizer"):
        same_rows(record, "a", "sft.data.train", {"rows": 10, "tokens": 100, "sha256": "y"})


def test_a_run_whose_data_shrank_says_so(begun):
    folder, file = begun
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:-1]))
    with running(words(file, 1), folder) as run:
        assert run.end() == 1 and f"{pairs} shrank from" in run.said and "Traceback" not in run.said
