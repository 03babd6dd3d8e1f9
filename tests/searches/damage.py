"""Every saved file of a finished study, damaged in every way: the same command refuses it by name, or recovers and is equal."""

import json
import os
import random
import shutil

from ogdopt_harness.commands.run import run
from ogdopt_harness.commands.usage import parse
from ogdopt_harness.common.files import digest

from . import MEANINGFUL, Found, attempt
from .options import words

TIMES = ("seconds", "tokens_per_second", "step_seconds", "step_cpu_seconds", "peak_memory", "metrics", "sha256")
CHANGES = {
    "methods": "sft,ogd",
    "evals.tasks": "[{name: sums, path: '{data}/benchmarks/sums.jsonl', ask: [direct]}]",
    "evals.style": "null",
    "evals.style_prompts": "null",
    "preference.num_train_epochs": "1",
    "report.samples": "20",
}
UNEQUAL = "unequal"


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    os.truncate(path, 0)


def flipped(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(bytes(raw))


def removed(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def other(path):
    path.write_text('{"other": [1, 2, 3]}')


HARMS = (truncated, emptied, flipped, removed, folder, other)


def study(home):
    """The command of the small study in `home`."""
    return parse(words(CHANGES | {"study.output_dir": str(home)}))


def outcome(home):
    """What has to be equal: weights, logged lines and answers, without times."""
    found = {
        str(path.relative_to(home)): digest(path) for path in sorted(home.glob("seed-*/*/model/epoch-*/model.safetensors"))
    }
    for path in sorted(home.glob("seed-*/*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(home))] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    for path in sorted(home.glob("seed-*/*/evals/epoch-*.json")):
        found[str(path.relative_to(home))] = json.loads(path.read_text())["tasks"]
    return found


def search(place, sample=None, seed=0, seconds=300.0, say=None):
    """Damage all files of a study in all ways, or a sample drawn with `seed`; each time from the same whole study."""
    home, whole = place / "study", place / "whole"
    run(study(home))
    shutil.copytree(home, whole)
    expected = outcome(home)
    files = sorted(path.relative_to(home) for path in home.rglob("*") if path.is_file())
    every = [(name, harm) for name in files for harm in HARMS]
    found = Found("damage")
    for name, harm in every if sample is None else random.Random(seed).sample(every, sample):
        shutil.rmtree(home)
        shutil.copytree(whole, home)
        harm(home / name)
        ended, text = attempt(lambda: run(study(home)), (name.name, str(name.parent)), seconds)
        if ended == MEANINGFUL and outcome(home) != expected:
            ended = UNEQUAL
        found.add(f"{name} {harm.__name__}", ended, text)
        if say is not None:
            say(f"{name} {harm.__name__}: {ended}")
    return found
