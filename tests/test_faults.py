"""What may happen to a run and its folder: kill -9, SIGTERM, a second run, what a dead one left there, data that changed."""

import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from benchmarks import soak
from ogdopt_harness.common import ranks
from ogdopt_harness.common.run_folder import SeedFolder
from ogdopt_harness.pipeline.guard import locked, same_files, same_rows
from ogdopt_harness.training.checkpoints import found
from tests import limits

KILLED = soak.ROOT / "tests" / "workers" / "faults.py"


def rows(folder):
    """Two files of rows."""
    pairs = [{"prompt": f"where is {k}", "chosen": f"sure , {k} is here", "rejected": f"um {k}"} for k in range(24)]
    files = {"pairs": pairs, "texts": [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]}
    for name, some in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


# ---- one run a folder -----------------------------------------------------------------------------------------------------


def hold(folder, held, done):
    with locked(SeedFolder(folder)):
        held.set()
        done.wait(limits.EVENT)


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(killed, tmp_path):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    first = context.Process(target=hold, args=(tmp_path, held, done))
    first.start()
    try:
        assert held.wait(limits.EVENT)
        taken = rf"in use by another run \(process {first.pid} on .*choose another --study.output_dir"
        with pytest.raises(ValueError, match=taken), locked(SeedFolder(tmp_path)):
            pass
        if killed:
            os.kill(first.pid, signal.SIGKILL)
        else:
            done.set()  # would wait for the one that waits, which must live
        first.join(limits.EVENT)
        with locked(SeedFolder(tmp_path)):  # let go of, or taken over from the dead
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        assert (tmp_path / "lock").read_text() == ""
    finally:
        first.kill()


def test_what_a_run_on_another_machine_left_is_not_taken_over_but_in_the_same_job(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "then", "job": "42"}))
    elsewhere = r"process 1 on elsewhere, since then.*if that run is dead, delete .*lock"
    with pytest.raises(ValueError, match=elsewhere), locked(SeedFolder(tmp_path)):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with locked(SeedFolder(tmp_path)):
        pass


# ---- the data that a study was begun with ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: os.truncate(f, 40), r"pairs.jsonl shrank from [\d,]+ to 40 bytes"),
        (lambda f: f.write_text(f.read_text() + "{}\n"), r"pairs.jsonl grew from"),
        (lambda f: f.write_text(f.read_text().replace("sure", "sore")), "pairs.jsonl has other content"),
    ],
)
def test_data_that_changed_is_refused_by_name(change, message, tmp_path):
    rows(tmp_path)
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


# ---- processes that are started again ----------------------------------------------------------------------------------------


def test_a_start_never_meets_one_before_it_in_the_launchers_store(monkeypatch):
    """Rank 1 comes first to each of three starts, and finds what the last one left; in the second, rank 0 dies on the way."""
    store, here = HashStore(), threading.local()
    monkeypatch.setattr(ranks, "rendezvous", lambda url: iter([(store, here.rank, 2)]))

    def come(rank):
        here.rank = rank
        return ranks._fresh_store()

    names = []
    with ThreadPoolExecutor(2) as pool:
        for k in range(3):
            if k == 1:
                store.set("ogdopt/start", "that of a rank 0 which died before it read an answer")
            second = pool.submit(come, 1)
            time.sleep(0.1)
            assert not second.done()
            first = pool.submit(come, 0).result(limits.EVENT)
            first.set("who", f"start {k}")
            assert second.result(limits.EVENT).get("who").decode() == f"start {k}"
            names.append(store.get("ogdopt/start"))
    assert len(set(names)) == 3


# ---- everything at once, end to end ---------------------------------------------------------------------------------------


def until(holds, process, log):
    """Wait until something holds; fail with the output of a process that has ended before."""
    deadline = time.monotonic() + limits.EVENT
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.01)


def refused(folder, processes, options, message):
    """Start the run: it says why not, once, without a traceback of its own (the launcher's names no file of the harness)."""
    log = folder.with_suffix(".log")
    before = log.stat().st_size
    process = soak.start(folder, processes, "refused", options)
    assert process.wait(timeout=limits.PROCESS) == (2 if processes == 1 else 1)  # torchrun has a status of its own
    said = log.read_bytes()[before:].decode()
    assert re.search(message, said) and said.count("error: ") == 1, said
    assert not re.search(r'File ".*harness/', said), said


def test_a_run_to_which_everything_happens_ends_like_an_undisturbed_one(tmp_path):
    """Two processes, of which the launcher starts new ones by itself when they die: kill -9 of both within a checkpoint, kill
    -9 of one; a second run in the folder meanwhile, data that shrank; SIGTERM, and the same command again. Bit for bit."""
    rows(tmp_path)
    pairs, whole, folder, mark = tmp_path / "pairs.jsonl", tmp_path / "whole", tmp_path / "disturbed", uuid.uuid4().hex
    options = {"preference.data.train": f"[{pairs}]", "preference.data.eval": "[]", "preference.num_train_epochs": "6"}
    options |= {"preference.train_batch_size": "8", "preference.per_device_train_batch_size": "4"}
    options |= {"sft.max_steps": "4"}
    soak.finished(whole, 2, options)
    log, ogd = folder.with_suffix(".log"), folder / "seed-0" / "ogd"
    reached = lambda step: lambda: any(int(path.name[5:]) >= step for path in found(ogd / "checkpoint"))  # noqa: E731
    process = soak.start(folder, 2, mark, options, restarts=2, program=KILLED)
    try:
        until(lambda: log.read_text().count("killed within") == 2, process, log)
        until(reached(4), process, log)
        workers = [pid for pid in soak.marked(mark) if pid != process.pid]
        for pid in workers:  # so that they are still there
            os.kill(pid, signal.SIGSTOP)
        refused(folder, 1, options, r"seed-0 is in use by another run \(process \d+ on .*choose another --study.output_dir")
        os.kill(random.choice(workers), signal.SIGKILL)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        until(lambda: not {*workers} & {*soak.marked(mark)}, process, log)
        until(reached(8), process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=limits.PROCESS) == 1  # the launcher's own, which was asked to stop itself
    finally:
        for pid in soak.marked(mark):
            os.kill(pid, signal.SIGKILL)
    said = log.read_text()
    assert len(re.findall(r"is saved at step \d+ of 18; the same command goes on from here", said)) == 1, said
    assert said.count("this process ends with 0") == 2 and not (ogd / "complete.json").exists(), said
    text = pairs.read_text()
    pairs.write_text(text[: text.rindex("{")])
    for processes in (1, 2):
        refused(folder, processes, options, r"preference.data.train: data has changed.*pairs.jsonl shrank from [\d,]+ to")
    pairs.write_text(text)
    soak.finished(folder, 2, options)
    (a, lines), (b, others) = soak.results(whole), soak.results(folder)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert len(lines) == 5 + 19 and lines == others
