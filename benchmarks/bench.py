"""All that this machine can measure in ten minutes, in one table: this library, its peers, plain loops, and the bound.

    make bench            (or: python -m benchmarks.bench --seconds 600)

The other benchmarks of this folder at small settings, each in a process of its own; their own commands measure longer, and on
larger models. A peer that is not installed is named, and so is what found no time left. Columns:

    projection    both gradients given: time over that of one inner product and one addition of the same bytes; cosine left
    with RMSprop  projection, clipping and step: time over that of as many passes as all this cannot do without
    whole step    time over that of one backward pass of the summed loss, 20M parameters, 512 tokens a side
    memory        peak of a step over that of the summed loss in one graph, in gradients (20M parameters, 256 tokens a side)
    beside TRL    CPU time and peak memory over DPOTrainer's with its reference on the fly, same pairs, 5M parameters

A second table has many small tensors: a step over clipping and the base's own step.
Results go to benchmarks/results/bench.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common, many_tensors

RUNS: dict[str, tuple[str, ...]] = {
    "projection.py": ("--rounds", "5", "--bases", "RMSprop"),
    "many_tensors.py": ("--rounds", "3", "--bases", "AdamW"),
    "step.py": ("--rounds", "2"),
    "set_aside.py": (
        "--rounds",
        "1",
        "--modes",
        *"sum none bfloat16 int8 recompute inside fused torchjd pytorch_optimizer".split(),
    ),
    "trainers.py": ("--pairs", "16", "--rounds", "1"),
}
SIZES = {"projection.py": "20M", "step.py": "20M", "set_aside.py": "20M", "trainers.py": "5M"}
TINY = {
    "projection.py": ("--rounds", "1"),
    "many_tensors.py": ("--rounds", "1", "--tiny"),
    "step.py": ("--rounds", "1", "--sequences", "1", "--tokens", "16"),
    "set_aside.py": ("--rounds", "1", "--modes", "none"),
    "trainers.py": ("--pairs", "4", "--micro", "2", "--scale", "0.1", "--rounds", "1"),
}
"""What is added, or takes the place of the above, where only whether it works is asked."""
MISSING = "missing"
ROWS: dict[str, tuple[str, str, str, str, str]] = {
    "the bound": ("bound", "bound", "both losses in one graph", "graph", ""),
    "ogdopt": ("ogdopt, clipped", "ogdopt, step tensor by tensor", "ogdopt", "none", "ogdopt, OGD"),
    "ogdopt, fused=True": (
        "ogdopt, fused=True, clipped",
        "ogdopt, fused=True",
        "ogdopt, fused=True",
        "fused",
        "ogdopt, OGD, fused=True",
    ),
    "ogdopt, bfloat16 set aside": ("", "", "ogdopt, set_aside=torch.bfloat16", "bfloat16", ""),
    "ogdopt, int8 set aside": ("", "", 'ogdopt, set_aside="int8"', "int8", ""),
    "ogdopt, recompute": ("", "", 'ogdopt, set_aside="recompute"', "recompute", ""),
    "ogdopt, recompute by tensor": ("", "", 'ogdopt, scope="tensor", set_aside="recompute"', "inside", ""),
    "ogdopt's harness, DPO": ("", "", "", "", "ogdopt, DPO"),
    "plain loop, (a * b).sum()": ("loop, (a * b).sum() and a - c b", "", "", "", ""),
    "plain loop, dot and add_": ("loop, torch.dot and add_", "", "", "", ""),
    "torch's foreach functions": (
        "foreach, then clip_grad_norm_",
        "foreach projection, clip_grad_norm_, foreach step",
        "both losses in turn",
        "sum",
        "",
    ),
    "one loop under torch.compile": ("", "one loop under torch.compile", "", "", ""),
    "TorchJD UPGrad((1, 0))": ("TorchJD UPGrad((1, 0))", "", "TorchJD UPGrad((1, 0))", "", ""),
    "  optimize_gramian_computation": (
        "TorchJD UPGrad((1, 0)), optimize_gramian_computation",
        "",
        "TorchJD UPGrad((1, 0)), one loss after the other",
        "torchjd",
        "",
    ),
    "pytorch_optimizer PCGrad": ("pytorch_optimizer PCGrad", "", "pytorch_optimizer PCGrad", "pytorch_optimizer", ""),
    "TRL DPOTrainer": ("", "", "", "", "TRL, reference on the fly"),
    "  reference precomputed": ("", "", "", "", "TRL, reference precomputed"),
}
"""Row -> what it is called in each benchmark; "" where it has no part in it."""


def run(seconds: float, size: str | None) -> dict[str, Any]:
    """The results of every benchmark, or why there are none."""
    found: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for script, words in RUNS.items():
            left = seconds - (time.monotonic() - began)
            path = Path(folder) / script.replace(".py", ".json")
            sized = ("--size", size or SIZES[script]) if script in SIZES else ()
            more = (*sized, *(TINY[script] if size else ()), "--output", str(path))
            print(f"{script}, {left:.0f} s left", file=sys.stderr, flush=True)
            try:
                common.child(script, *words, *more, limit=max(left, 1.0))
            except RuntimeError as error:
                if "took more than" not in str(error):
                    raise
                found[script] = f"no time left of {seconds:.0f} s"
                continue
            found[script] = json.loads(path.read_text())["results"]
    return found


def tables(found: dict[str, Any]) -> list[Any]:
    """What `ROWS` is looked up in, column by column: entries by name, or why there are none."""
    projection, memory, trainers = (found[f"{name}.py"] for name in ("projection", "set_aside", "trainers"))
    if isinstance(memory, dict):
        unit = memory["graph"]["peak_many"]
        memory = {name: x if isinstance(x, str) else x | {"above": x["peak_many"] - unit} for name, x in memory.items()}
    if isinstance(trainers, dict) and isinstance(unit := trainers["TRL, reference on the fly"], dict):
        trainers = {name: x | beside(x, unit) for name, x in trainers.items() if name != "batch"}
    parts = [projection if isinstance(projection, str) else projection[kind] for kind in ("alone", "RMSprop")]
    return [*parts, found["step.py"], memory, trainers]


def beside(entry: dict[str, Any], unit: dict[str, Any]) -> dict[str, float]:
    """Time and memory of a step over those of DPOTrainer; of this harness's the median of paired ratios."""
    paired = entry["on the fly"]["ratio"] if "on the fly" in entry else entry["seconds"] / unit["seconds"]
    return {"time": paired, "space": entry["over start"] / unit["over start"]}


def cells(name: str, looked_up: list[Any]) -> list[str]:
    """What the table says of one row."""

    def text(column: int, what: str, form: str) -> str:
        table, key = looked_up[column], ROWS[name][column]
        entry = table if isinstance(table, str) else table.get(key)
        if not key or entry is None:
            return "–"
        return MISSING if isinstance(entry, str) else format(entry[what], form) if what in entry else "–"

    shown = [(0, "ratio", ".2f"), (0, "left", ".0e"), (1, "ratio", ".2f"), (2, "ratio", ".2f"), (3, "above", "+.2f")]
    return [text(*asked) for asked in [*shown, (4, "time", ".2f"), (4, "space", ".2f")]]


def gaps(looked_up: list[Any]) -> list[str]:
    """What is missing in the table, and why."""
    found: dict[str, list[str]] = {}
    for name, keys in ROWS.items():
        for table, key in zip(looked_up, keys, strict=True):
            entry = table if isinstance(table, str) else table.get(key)
            if key and isinstance(entry, str) and name.strip() not in found.setdefault(entry, []):
                found[entry].append(name.strip())
    return [f"{MISSING}: {', '.join(names)}: {why}" for why, names in found.items()]


def main(words: list[str]) -> None:
    """Run all, print the table."""
    parser = common.parser(__doc__, "bench")
    parser.add_argument("--seconds", type=float, default=600, help="that all of it may take")
    parser.add_argument("--size", choices=common.SIZES, help="of all models, with the shortest settings: does it work?")
    asked = parser.parse_args(words)
    found = run(asked.seconds, asked.size)
    columns = ["", "projection", "cosine left", "with RMSprop", "whole step", "memory", "time beside TRL", "memory beside TRL"]
    looked_up = tables(found)
    common.show("", columns, [[name, *cells(name, looked_up)] for name in ROWS])
    if isinstance(many := found["many_tensors.py"], dict):
        many_tensors.report(many)
    else:
        print(f"{MISSING}: many small tensors: {many}")
    print("\n".join(gaps(looked_up)))
    common.record(asked.output, found)


if __name__ == "__main__":
    main(sys.argv[1:])
