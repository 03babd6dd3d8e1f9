"""Is a run hard to kill? Start it, kill -9 it at a random moment, again and again; in the end it must equal an undisturbed one.

    python -m benchmarks.soak --processes 2 --kills 20
    python -m benchmarks.soak options        every option with 14 values: refused by name or meaningful
    python -m benchmarks.soak damage         every saved file damaged in six ways: refused by name or recovered, equal

A small study (supervised stage and OGD in a small world, a checkpoint every second step) runs once undisturbed, then is started
and killed `--kills` times, each time after a random number of further steps: all of its processes at once, or one of them, for
which the launcher has to end the others. The last start runs to its end. Compared are all exported weights, bit for bit, and
every line of metrics.jsonl but for times. Linux: processes are found by a mark in their environment. Results go to
benchmarks/results/soak.json.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks import common
from benchmarks.common import ROOT

RUN = ROOT / "harness" / "run.py"
MARK = "OGDOPT_SOAK"
LIMIT = 1200
"""Seconds that a start may take in all, and that a launcher may take to end what is left of a run."""
SEARCHES = ("options", "damage")
TIMES = {"tokens_per_second"}
OPTIONS = {
    "methods": "ogd",
    "world.sft_conversations": "1000",
    "world.people": "8",
    "world.preference_pairs": "192",
    "world.held_out_pairs": "8",
    "sft.num_train_epochs": "1",
    "sft.max_steps": "16",
    "sft.save_steps": "2",
    "preference.num_train_epochs": "14",
    "preference.train_batch_size": "32",
    "preference.per_device_train_batch_size": "16",
    "preference.save_steps": "2",
    "evals.tasks": "[]",
    "evals.style": "null",
    "evals.style_prompts": "null",
    "report_to": "none",
}


def start(
    folder: Path, processes: int, mark: str, changes: Mapping[str, str] = {}, restarts: int = 0, program: Path = RUN
) -> subprocess.Popen:
    """The study in `folder`, on so many processes, with its output in a file beside it.

    `changes` are options beside `OPTIONS`, `restarts` how often the launcher may start all processes again by itself, and
    `program` what stands for harness/run.py.
    """
    alone = processes == 1
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    words = [word for name, value in {**OPTIONS, **changes}.items() for word in (f"--{name}", value)]
    command = [sys.executable, *([] if alone else starter), str(program), "--config", "miniature"]
    command += ["--study.output_dir", str(folder), *words]
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)


def marked(mark: str) -> list[int]:
    """Processes that were started with this mark and live, oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:  # gone, or another user's
            continue
    return sorted(found)


def steps(folder: Path) -> int:
    """Lines that the study has logged."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("seed-0/*/metrics.jsonl"))


def kill(process: subprocess.Popen, mark: str, rng: random.Random) -> str:
    """kill -9 all of them, or one and let the launcher end the rest; nothing lives behind it."""
    found = marked(mark)
    workers = [pid for pid in found if pid != process.pid]
    kind = rng.choice(["all", "one"]) if workers else "all"
    for pid in [rng.choice(workers)] if kind == "one" else found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended by itself meanwhile
            continue
    try:
        process.wait(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        kind += ", the launcher had to be killed too"
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)
    process.wait(timeout=LIMIT)
    return kind


def finished(folder: Path, processes: int, changes: Mapping[str, str] = {}) -> None:
    """Run the study to its end. Raises RuntimeError with the end of its output where it does not get there."""
    code = start(folder, processes, "whole", changes).wait(timeout=LIMIT)
    if code:
        raise RuntimeError(f"the study in {folder} ended with {code}:\n{folder.with_suffix('.log').read_text()[-3000:]}")


def results(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """All exported weights, and the logged lines without times."""
    weights = {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.glob("seed-0/*/model/epoch-*/model.safetensors"))
        for name, tensor in load_file(path).items()
    }
    lines = [
        {k: v for k, v in json.loads(line).items() if k not in TIMES}
        for path in sorted(folder.glob("seed-0/*/metrics.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return weights, lines


def soak(folder: Path, processes: int, kills: int, seed: int) -> dict[str, int | float]:
    """Disturb a run; the largest difference of a weight, and how many lines differ from the undisturbed one."""
    rng = random.Random(seed)
    whole, disturbed = folder / "whole", folder / "disturbed"
    finished(whole, processes)
    done, kinds = 0, []
    while done < kills and not (disturbed / "seed-0/ogd/complete.json").is_file():
        mark, before = uuid.uuid4().hex, steps(disturbed) if disturbed.is_dir() else 0
        process, began = start(disturbed, processes, mark), time.monotonic()
        wanted = before + rng.randint(0, 4)
        while process.poll() is None and steps(disturbed) <= wanted and time.monotonic() - began < LIMIT:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # not always right behind a logged line
        if process.poll() is None:
            kinds.append(kill(process, mark, rng))
            done += 1
            print(f"kill {done}: {kinds[-1]}, at {steps(disturbed)} lines", flush=True)
    finished(disturbed, processes)
    (a, lines), (b, others) = results(whole), results(disturbed)
    assert a.keys() == b.keys() and len(lines) == len(others), (
        f"{len(a)} and {len(b)} tensors, {len(lines)}, {len(others)} lines"
    )
    return {
        "kills": done,
        "of one process": sum(kind.startswith("one") for kind in kinds),
        "launcher stuck": sum("too" in kind for kind in kinds),
        "tensors": len(a),
        "largest difference": max((a[name] - b[name]).abs().max().item() for name in a),
        "lines": len(lines),
        "lines that differ": sum(x != y for x, y in zip(lines, others, strict=True)),
    }


def searched(name: str, sample: int | None, seed: int) -> None:
    """Walk over a search of `tests/searches`, print its counts and findings; the exit status says whether there are any."""
    search = importlib.import_module(f"tests.searches.{name}").search
    with tempfile.TemporaryDirectory() as folder:
        found = search(Path(folder), sample=sample, seed=seed, say=lambda text: print(text, flush=True))
    print(found)
    sys.exit(bool(found.findings))


def main(words: list[str]) -> None:
    """Soak and write what came out."""
    parser = common.parser(__doc__, "soak")
    parser.add_argument("what", nargs="?", choices=["kills", *SEARCHES], default="kills")
    parser.add_argument("--sample", type=int, help="of a search: so many of its cases, drawn with --seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(words)
    if asked.what in SEARCHES:
        searched(asked.what, asked.sample, asked.seed)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), asked.processes, asked.kills, asked.seed)
    print(json.dumps(found, indent=1))
    common.record(asked.output, found)
    sys.exit(bool(found["largest difference"] or found["lines that differ"]))


if __name__ == "__main__":
    main(sys.argv[1:])
