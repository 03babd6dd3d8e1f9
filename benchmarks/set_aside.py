"""What each way of setting the loser's gradient aside costs: peak bytes, CPU time and the angle that is left.

    python benchmarks/set_aside.py --size 20M --rounds 7

Every mode runs in a process of its own on one thread, so that its peak is its own. The unit of memory is the size of one
gradient (the model's parameters, float32); the peak is what a step adds to the resident memory before it, parameters and
optimizer state apart. Time is CPU time, as the median over rounds of the ratio to a plain step on both losses, which runs
right before it in the same process. The angle is the cosine of what the base gets (with metric="optimizer": of the change that
it makes) with the loser's true gradient, in float64.
Results go to benchmarks/results/set_aside_SIZE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZES = {
    "20M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 4000},
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "vocab_size": 8000},
}
"""Mistral shapes whose largest tensor is a tenth of the model or less."""
FEW, MANY = (1, 32), (2, 128)
"""Sequences and tokens a side: few for memory, so that activations do not hide it; many for time."""
MODES = {
    "plain": "winner alone, plain RMSprop",
    "sum": "both losses added, plain RMSprop",
    "none": "set_aside=None (by reference)",
    "bfloat16": "set_aside=torch.bfloat16",
    "int8": 'set_aside="int8"',
    "cpu": 'set_aside="cpu"',
    "recompute": 'set_aside="recompute"',
    "metric": 'metric="optimizer"',
    "inside": 'scope="tensor", set_aside="recompute"',
}
RESULTS = Path(__file__).parent / "results"


def child(mode: str, size: str, rounds: int) -> dict[str, float]:
    """Measure one mode in this process."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from ogdopt import ProjectedGradient

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = MistralConfig(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True, **SIZES[size])
    model = MistralForCausalLM(config)

    def losses(sequences: int, tokens: int) -> list:
        # Pairs that share tokens have gradients that point the same way, as in preference data.
        shared = torch.randint(config.vocab_size, (sequences, 3 * tokens // 4))
        ids = [torch.cat([shared, torch.randint(config.vocab_size, (sequences, tokens // 4))], 1) for _ in range(2)]
        return [lambda x=x: model(input_ids=x, labels=x).loss for x in ids]

    winner, loser = losses(*FEW)
    base = torch.optim.RMSprop(model.parameters(), lr=1e-6, foreach=False)
    aside = {"bfloat16": torch.bfloat16, "plain": None, "sum": None, "none": None, "metric": None, "inside": "recompute"}
    options = {"metric": "optimizer"} if mode == "metric" else {"scope": "tensor"} if mode == "inside" else {}
    opt = ProjectedGradient(base, max_norm=1.0, set_aside=aside.get(mode, mode), **options)
    B = sum(p.nbytes for p in model.parameters())

    def plain(both: bool) -> None:
        base.zero_grad()
        for loss in (loser, winner) if both else (winner,):
            loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        base.step()
        base.zero_grad()

    def step() -> None:
        plain(mode == "sum") if mode in ("plain", "sum") else opt.step(winner, loser)

    plain(True)  # makes the base's state
    step()
    before, peak = resident(reset=True), 0.0
    for _ in range(2):
        step()
    peak = (resident(peak=True) - before) / B
    ratios, passes = [], []
    winner, loser = losses(*MANY)
    plain(True)
    step()
    for _ in range(rounds):
        plain(True)
        start = time.process_time()
        plain(True)
        middle = time.process_time()
        step()
        ratios.append((time.process_time() - middle) / (middle - start))
        passes.append(opt.report.passes if opt.report else 0)
    result = {"parameters": B // 4, "peak": peak, "ratio": statistics.median(ratios), "spread": max(ratios) - min(ratios)}
    if mode not in ("plain", "sum"):
        result |= {"passes": statistics.mean(passes)} | angle(model, opt, winner, loser, changes=mode == "metric")
    return result


def angle(model, opt, winner, loser, changes: bool) -> dict[str, float]:
    """Cosine of what the base gets (or of the change that it makes) with the true g_l, and of the two gradients, in float64."""
    import torch

    params = list(model.parameters())
    grads = [torch.autograd.grad(loss(), params) for loss in (winner, loser)]
    seen = []
    hook = opt.base.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in params))
    before = [p.detach().clone() for p in params]
    opt.step(winner, loser)
    hook.remove()
    if changes:
        seen = [q - p.detach() for p, q in zip(params, before)]

    def dot(a, b) -> float:
        return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b)))

    w, l = grads
    cos = dot(w, l) / (dot(w, w) * dot(l, l)) ** 0.5
    return {"cosine": cos, "left": dot(seen, l) / (dot(seen, seen) * dot(l, l)) ** 0.5}


def resident(reset: bool = False, peak: bool = False) -> int:
    """Bytes of resident memory of this process, now or at its peak since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def main() -> None:
    """Run every mode and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="20M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mode", choices=MODES, help="one mode, in this process; prints JSON")
    arguments = parser.parse_args()
    if arguments.mode:
        print(json.dumps(child(arguments.mode, arguments.size, arguments.rounds)))
        return
    # One arena that gives memory back, so that the peak is what is in use and not what malloc keeps.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    results = {}
    print("| mode | peak, in gradients | CPU time | passes | cos(u, g_l) left |\n| :-- | --: | --: | --: | --: |")
    for mode, label in MODES.items():
        words = [sys.executable, __file__, "--mode", mode, "--size", arguments.size, "--rounds", str(arguments.rounds)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{mode} failed:\n{done.stderr[-2000:]}")
        results[mode] = found = json.loads(done.stdout.splitlines()[-1])
        left = f"{found['left']:.1e}" if "left" in found else "–"
        print(f"| {label} | {found['peak']:.2f} | {found['ratio']:.2f}x | {found.get('passes') or '–'} | {left} |", flush=True)
    import torch
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread used"
    record = {"command": " ".join(["python", *sys.argv]), "machine": machine, "versions": versions, "results": results}
    path = RESULTS / f"set_aside_{arguments.size}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
