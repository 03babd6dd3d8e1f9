"""What each way of setting the loser's gradient aside costs: peak bytes, CPU time and the angle that is left.

    python -m benchmarks.set_aside --size 20M --rounds 7

Every mode runs in a process of its own on one thread, so that its peak is its own. The unit of memory is the size of one
gradient (the model's parameters, float32); the peak is what a step adds to the resident memory before it, parameters and
optimizer state apart: with so few tokens that gradients are nearly all of it, and with more. *Above* compares it with a plain
step whose two losses share one graph and one backward pass, which holds the activations of both sides. Time is CPU time, as the
median over rounds of the ratio to a plain step on both losses in turn, which runs right before it in the same process. The
angle is the cosine of what the base gets (with metric="optimizer": of the change that it makes; with fused=True, where the base
gets nothing: of the change that SGD would make) with the loser's true gradient, in float64.
Results go to benchmarks/results/set_aside_SIZE.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import common

FEW, MANY = (1, 32), (2, 128)
"""Sequences and tokens a side."""
PLAIN = {
    "plain": "winner alone, plain RMSprop",
    "graph": "both losses in one graph, plain RMSprop",
    "sum": "both losses in turn, plain RMSprop",
}
OURS = {
    "none": "set_aside=None (by reference)",
    "bfloat16": "set_aside=torch.bfloat16",
    "int8": 'set_aside="int8"',
    "cpu": 'set_aside="cpu"',
    "recompute": 'set_aside="recompute"',
    "metric": 'metric="optimizer"',
    "inside": 'scope="tensor", set_aside="recompute"',
    "fused": "fused=True",
    "fused_bfloat16": "fused=True, set_aside=torch.bfloat16",
}
OTHERS = {
    "torchjd": "TorchJD UPGrad((1, 0)), optimize_gramian_computation",
    "pytorch_optimizer": "pytorch_optimizer PCGrad",
}
"""Peers, by their packages; their step is that of step.py."""
MODES = PLAIN | OURS | OTHERS


def options(mode: str) -> dict[str, Any]:
    """What a mode gives to ProjectedGradient beside `max_norm`."""
    import torch

    aside: dict[str, Any] = {"bfloat16": torch.bfloat16, "fused_bfloat16": torch.bfloat16, "inside": "recompute"}
    aside |= {name: name for name in ("int8", "cpu", "recompute")}
    more: dict[str, Any] = {"metric": {"metric": "optimizer"}, "inside": {"scope": "tensor"}}
    more |= {name: {"fused": True} for name in OURS if name.startswith("fused")}
    return {"set_aside": aside.get(mode)} | more.get(mode, {})


def measure(mode: str, size: str, rounds: int) -> dict[str, float]:
    """Measure one mode in this process."""
    import torch

    from benchmarks import step as steps
    from ogdopt import ProjectedGradient

    torch.set_num_threads(1)
    model = common.mistral(size)
    base = torch.optim.RMSprop(model.parameters(), lr=1e-6, foreach=False)
    opt = ProjectedGradient(base, max_norm=1.0, **options(mode))
    B = sum(p.nbytes for p in model.parameters())
    winner, loser = common.sides(model, *FEW)

    def plain(kind: str) -> None:
        base.zero_grad()
        if kind == "graph":
            (winner() + loser()).backward()
        else:
            for loss in (loser, winner) if kind == "sum" else (winner,):
                loss().backward()
        steps.finish(model, base)

    both = (model, lambda: winner(), lambda: loser())  # whatever these are by then
    if mode in PLAIN:
        step: Callable[[], Any] = lambda: plain(mode)  # noqa: E731
    elif mode == "torchjd":
        step = steps.torchjd(*both, thrifty=True, chunk=1)
    elif mode == "pytorch_optimizer":
        step = steps.pytorch_optimizer(*both)
    else:
        step = lambda: opt.step(winner, loser)  # noqa: E731

    plain("sum")
    for _ in range(common.WARM):
        step()
    peaks = {"peak": common.added(lambda: [step() for _ in range(2)]) / B}
    ratios, passes = [], []
    winner, loser = common.sides(model, *MANY)
    plain("sum")
    step()
    peaks["peak_many"] = common.added(lambda: [step() for _ in range(2)]) / B
    for _ in range(rounds):
        plain("sum")
        start = time.process_time()
        plain("sum")
        middle = time.process_time()
        step()
        ratios.append((time.process_time() - middle) / (middle - start))
        passes.append(opt.report.passes if opt.report else 0)
    result = {"parameters": B // 4} | peaks | common.spread(ratios)
    if mode in OURS:
        if mode.startswith("fused"):
            opt = ProjectedGradient(torch.optim.SGD(model.parameters(), lr=1.0), max_norm=1.0, **options(mode))
        changes = mode == "metric" or mode.startswith("fused")
        result |= {"passes": statistics.mean(passes)} | angle(model, opt, winner, loser, changes)
    return result


def angle(model: Any, opt: Any, winner: Callable[[], Any], loser: Callable[[], Any], changes: bool) -> dict[str, float]:
    """Cosine of what the base gets (or of the change that it makes) with the true g_l, and of the two gradients, in float64."""
    import torch

    params = list(model.parameters())
    w, l = (torch.autograd.grad(loss(), params) for loss in (winner, loser))
    seen: list[Any] = []
    if changes:  # without a hook, since a fused step does not call any and would not be taken
        before = [p.detach().clone() for p in params]
        opt.step(winner, loser)
        seen = [old - p.detach() for p, old in zip(params, before)]
    else:
        hook = opt.base.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in params))
        opt.step(winner, loser)
        hook.remove()
    return {"cosine": common.cosine(w, l), "left": common.cosine(seen, l)}


def main(words: list[str]) -> None:
    """Run every mode and print the table."""
    parser = common.parser(__doc__, "set_aside_SIZE")
    parser.add_argument("--size", choices=common.SIZES, default="20M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--mode", choices=MODES, help="one mode, in this process; prints JSON")
    asked = parser.parse_args(words)
    if asked.mode:
        print(json.dumps(measure(asked.mode, asked.size, asked.rounds)))
        return
    results: dict[str, Any] = {}
    for mode in dict.fromkeys(["graph", *asked.modes]):
        if mode.startswith("fused") and (why := common.unfused()):
            results[mode] = why
            continue
        if mode in OTHERS and (why := common.absent(mode)):
            results[mode] = why
            continue
        one = ("--mode", mode, "--size", asked.size, "--rounds", str(asked.rounds))
        results[mode] = json.loads(common.child("set_aside.py", *one, environment=common.MEMORY).splitlines()[-1])
        print(f"{MODES[mode]}: {results[mode]['peak']:.2f}", file=sys.stderr, flush=True)
    report(results, asked.size)
    common.record(asked.output.with_name(asked.output.name.replace("SIZE", asked.size)), results)


def report(results: dict[str, Any], size: str) -> None:
    """Print what was found as a table."""
    rows = []
    for mode in (mode for mode in MODES if mode in results):
        found = results[mode]
        if isinstance(found, str):
            rows.append([MODES[mode], found, *["–"] * 6])
            continue
        beside = [f"{found['peak'] - results['graph']['peak']:+.2f}", f"{found['peak_many']:.2f}"]
        beside.append(f"{found['peak_many'] - results['graph']['peak_many']:+.2f}")
        passes, left = found.get("passes"), found.get("left")
        more = [f"{passes:.0f}" if passes else "–", "–" if left is None else f"{left:.1e}"]
        rows.append([MODES[mode], f"{found['peak']:.2f}", *beside, common.times(found), *more])
    few, many = (sequences * tokens for sequences, tokens in (FEW, MANY))
    columns = ["mode", f"peak, {few} tokens", "above", f"{many} tokens", "above", "CPU time", "passes", "cos(u, g_l) left"]
    common.show(f"{size}: memory of a step", columns, rows)


if __name__ == "__main__":
    common.start(main, common.MEMORY)
