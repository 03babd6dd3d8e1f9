"""What may happen to a run's folder: a second run, what a dead one left there, data that changed since it was begun."""

import json
import multiprocessing
import os
import signal

import pytest

from harness.guard import locked, same_files, same_rows


def rows(folder):
    """Two files of rows."""
    pairs = [{"prompt": f"where is {k}", "chosen": f"sure , {k} is here", "rejected": f"um {k}"} for k in range(24)]
    files = {"pairs": pairs, "texts": [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]}
    for name, found in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


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
        else:
            done.set()  # would wait for the one that waits, which must live
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
