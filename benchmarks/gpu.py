"""On a GPU: the other tables there, and steps of a model of Mistral-7B's true shape with random weights.

    python -m benchmarks.gpu                 # tables of projection.py and step.py, then the 7B steps (about 125 GiB)
    python -m benchmarks.gpu --pairs 1 --ways sft ogd_bfloat16
    python -m benchmarks.gpu --tiny          # a shrunken shape, on a CPU too: does it work?

A step takes winners and losers of `--pairs` pairs, each sequence `--tokens` long, a quarter of it prompt, one sequence (for DPO
one pair) at a time: SFT on both sides' sequences, DPO (reference precomputed), and OGD with the losers' gradient kept by
reference, in bfloat16, or not at all ("recompute" tensor by tensor; one pair a step, since it needs one backward pass a side).
Float32 weights, bfloat16 compute, FSDP2's casts, gradient checkpointing, chunked head, RMSprop: the harness's own parts.

MFU counts forward and backward passes and no recomputation, against the GPU's dense bfloat16 peak (`--peak_tflops` where it is
not known here). *Projection* is the time from the last backward pass to the base's step. The prediction is that of `--dry_run`
(harness/ogdopt_harness/modeling/memory.py). Every way runs in a process of its own. Results go to benchmarks/results/gpu.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import common
from ogdopt import ProjectedGradient
from ogdopt.losses import Completion, Pairs, dpo, nll
from ogdopt_harness.common import ranks
from ogdopt_harness.config.recipes import RECIPES
from ogdopt_harness.config.schema import ModelConfig, StageConfig
from ogdopt_harness.modeling.build import architecture
from ogdopt_harness.modeling.memory import Load, Shape, parts, shape_of
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.modeling.shard import prepare

WAYS = {
    "sft": "SFT",
    "dpo": "DPO",
    "ogd": "OGD, by reference",
    "ogd_bfloat16": "OGD, bfloat16 set aside",
    "ogd_blocks": "OGD, recompute tensor by tensor",
    "ogd_fused": "OGD, fused=True",
}
PEAKS = {"H100": 989, "H200": 989, "H800": 989, "B200": 2250, "A100": 312, "A800": 312, "L40S": 362, "RTX 4090": 165}
"""Dense bfloat16 TFLOP/s by a part of the GPU's name, as their makers give them."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"vocab_size": 500, "max_position_embeddings": 256}


def settings(tiny: bool) -> ModelConfig:
    """The paper's model, as its recipe has it, or a shrunken one."""
    recipe = yaml.safe_load((RECIPES / "mistral_7b_magpie_pro.yaml").read_text(encoding="utf-8"))["model"]
    return ModelConfig(None, recipe["architecture"] | (TINY if tiny else {}), gradient_checkpointing=True)


class Step:
    """One way to train, ready to take steps."""

    def __init__(self, way: str, model: Any, pairs: int, tokens: int, device: torch.device) -> None:
        self.way, self.model, self.pairs, self.backward_done = way, model, pairs, 0.0
        self.base = torch.optim.RMSprop(model.parameters(), lr=1e-6, foreach=False)
        options: dict[str, Any] = {"ogd_bfloat16": {"set_aside": torch.bfloat16}, "ogd_fused": {"fused": True}}
        options["ogd_blocks"] = {"scope": "tensor", "set_aside": "recompute"}
        self.opt = ProjectedGradient(self.base, max_norm=10.0, **options.get(way, {}))
        generator = torch.Generator().manual_seed(0)
        size = model.config.vocab_size
        prompt = torch.randint(size, (pairs, tokens // 4), generator=generator)
        answers = [torch.randint(size, (pairs, tokens - tokens // 4), generator=generator) for _ in range(2)]
        self.winners, self.losers = (torch.cat([prompt, answer], 1).to(device) for answer in answers)
        self.scored = torch.zeros(1, tokens)  # in the host's memory, which spares a question to the device
        self.scored[:, tokens // 4 :] = 1

    def score(self, ids: Tensor) -> Completion:
        """Log-probabilities of the answers, a row a sequence."""
        return completion_logps(self.model, ids, torch.ones_like(ids), self.scored.expand(len(ids), -1))

    def losses(self, rows: Tensor) -> Any:
        """The mean over sequences, one at a time."""
        return (nll(self.score(row[None])).sum() / len(rows) for row in rows)

    def dpo(self) -> Any:
        """The mean over pairs, one at a time; the reference is a constant."""
        for pair in torch.stack([self.winners, self.losers], 1):
            both, zero = self.score(pair), torch.zeros(1, device=pair.device)
            chosen, rejected = (Completion(both.logps[k : k + 1], both.mask[k : k + 1]) for k in (0, 1))
            yield dpo(Pairs(chosen, rejected, zero, zero), beta=0.1).sum() / self.pairs

    def run(self) -> None:
        """One step."""
        if self.way == "ogd_blocks":
            self.opt.step(lambda: next(self.losses(self.winners)), lambda: next(self.losses(self.losers)))
            return
        if self.way.startswith("ogd"):
            with self.opt.loser():
                for loss in self.losses(self.losers):
                    loss.backward()
        with self.opt.winner():
            for loss in self.dpo() if self.way == "dpo" else self.losses(self.winners):
                loss.backward()
            if self.way == "sft":
                for loss in self.losses(self.losers):
                    loss.backward()
        self.backward_done = self.clock()
        self.opt.step()

    def measured(self, steps: int, clock: Callable[[], float]) -> dict[str, float]:
        """Mean seconds of a step and of its projection."""
        self.clock, mixed, spent = clock, [], []
        told = self.way in ("ogd", "ogd_bfloat16")  # elsewhere the base is not called, or a backward pass comes in between
        if told:  # a fused step would not be taken with a hook
            self.base.register_step_pre_hook(lambda *_: mixed.append(clock() - self.backward_done))
        for _ in range(common.WARM + steps):
            since = clock()
            self.run()
            spent.append(clock() - since)
        found = {"seconds": sum(spent[common.WARM :]) / steps}
        return found | ({"projection": sum(mixed[common.WARM :]) / steps} if told else {})


def measure(way: str, pairs: int, tokens: int, steps: int, tiny: bool, device: str) -> dict[str, float]:
    """Seconds, floating-point operations and bytes of one way, in this process."""
    here, place = ranks.join(device)
    config = settings(tiny)
    built = architecture(config)
    torch.manual_seed(0)
    with place:
        model = AutoModelForCausalLM.from_config(built)
    model = prepare(model, config, place, ranks=here)
    shape = shape_of(built)
    step = Step(way, model, pairs, tokens, place)
    clock = common.clock_of("cuda") if place.type == "cuda" else time.perf_counter
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = step.measured(steps, clock)
    if place.type == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated()
    found |= {"flops": flops(shape, built, 2 * pairs, tokens, int(step.scored.sum())), "tokens": 2 * pairs * tokens}
    found["predicted"] = predicted(way, shape, config, tokens, place.type == "cuda")
    ranks.leave(here)
    return found


def flops(shape: Shape, built: Any, sequences: int, tokens: int, scored: int) -> float:
    """Of forward and backward: 6 a parameter of the layers and token, 6 of the head a scored one, causal attention."""
    layers = shape.layers * shape.layer * tokens
    head = shape.vocabulary * shape.hidden * scored
    width = built.num_attention_heads * (getattr(built, "head_dim", None) or shape.hidden // built.num_attention_heads)
    return sequences * (6.0 * (layers + head) + 6.0 * shape.layers * width * tokens**2)


def predicted(way: str, shape: Shape, config: ModelConfig, tokens: int, accelerator: bool) -> int:
    """Bytes that --dry_run would foretell for this step."""
    two = way in ("ogd", "ogd_bfloat16", "ogd_fused")
    sequences = 2 if way == "dpo" else 1
    load = Load(two, sequences, tokens, sequences * (tokens - tokens // 4), 1)
    stage = StageConfig(set_aside="bfloat16" if way == "ogd_bfloat16" else None, fused=way == "ogd_fused")
    return sum(parts(shape, shape.parameters, config, stage, load, accelerator).values())


# ---- the command -------------------------------------------------------------------------------------------------------


def main(words: list[str]) -> None:
    """Measure every way and print the tables."""
    parser = common.parser(__doc__, "gpu")
    parser.add_argument("--pairs", nargs="+", type=int, default=[1, 8], help="of a step; a table for each")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--peak_tflops", type=float, help="dense bfloat16 peak of the GPU")
    parser.add_argument("--tiny", action="store_true", help="a shrunken shape, 32 tokens, without the other tables")
    parser.add_argument("--way", choices=WAYS, help="one way, in this process; prints JSON")
    asked = parser.parse_args(words)
    there = torch.cuda.is_available()
    if not there and not asked.tiny:
        raise SystemExit(
            "benchmarks/gpu.py found no CUDA device, and a model of 7 billion parameters is nothing for a CPU; run it on a "
            "machine with a GPU of 140 GB, or try a shrunken shape with --tiny"
        )
    device, tokens = "cuda" if there else "cpu", 32 if asked.tiny else asked.tokens
    if asked.way:
        print(json.dumps(measure(asked.way, asked.pairs[0], tokens, asked.steps, asked.tiny, device)))
        return
    results: dict[str, Any] = {}
    if not asked.tiny:
        folder = asked.output.resolve().parent
        for script in ("projection.py", "step.py"):
            for size in ("20M", "100M"):
                name = script.replace(".py", "_SIZE.json" if script == "projection.py" else "_cuda_SIZE_TOKENS.json")
                print(common.child(script, "--device", "cuda", "--size", size, "--output", str(folder / name)), flush=True)
    peak = asked.peak_tflops or next((x for name, x in PEAKS.items() if there and name in torch.cuda.get_device_name()), None)
    for pairs in asked.pairs:
        results[f"{pairs} pairs"] = found = {}
        for way in asked.ways:
            if way == "ogd_fused" and (why := common.unfused(device)):
                found[way] = why
            elif way == "ogd_blocks" and pairs > 1:
                found[way] = "one pair alone"
            else:
                one = ["--way", way, "--pairs", str(pairs), "--tokens", str(tokens), "--steps", str(asked.steps)]
                said = common.child("gpu.py", *one, *(["--tiny"] if asked.tiny else []), environment=common.ALONE)
                found[way] = json.loads(said.splitlines()[-1])
        report(found, f"{pairs} pairs of {tokens:,} tokens", peak)
    common.record(asked.output, results, peak_tflops=peak)


def report(found: dict[str, Any], title: str, peak: float | None) -> None:
    """Print one table."""
    rows = []
    unit = found.get("sft")
    for way, x in found.items():
        if isinstance(x, str):
            rows.append([WAYS[way], x, *["–"] * 6])
            continue
        use = f"{x['flops'] / x['seconds'] / peak / 1e12:.1%}" if peak else "–"
        rows.append(
            [
                WAYS[way],
                f"{x['seconds']:.3f} s",
                f"{x['seconds'] / unit['seconds']:.3f}x" if unit else "–",
                f"{x['tokens'] / x['seconds']:,.0f}",
                use,
                f"{x['projection'] / x['seconds']:.2%}" if "projection" in x else "–",
                f"{x['peak'] / 2**30:.1f} GiB" if "peak" in x else "–",
                f"{x['predicted'] / 2**30:.1f} GiB",
            ]
        )
    columns = ["", "step", "to SFT", "tokens/s", "MFU", "projection", "peak memory", "predicted"]
    common.show(title, columns, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
