"""A whole training step against one backward pass of the summed loss on the same tokens, for every way to use two gradients.

    python -m benchmarks.step --size 20M --sequences 4 --tokens 128 --rounds 5

A small Mistral, winners and losers of so many sequences each, RMSprop, clipping. The unit is a plain step on both losses in one
graph: two forward passes, one backward pass of the sum, clip_grad_norm_, RMSprop. Each way runs right behind such a step. What
is more than 1 is made of passes over the parameters, which cost the same whatever the tokens, or of more work in the graph.
TorchJD and PCGrad get L_w and -L_l; TorchJD differentiates both losses at once where its backward function does by default.
Results go to benchmarks/results/step_SIZE_TOKENS.json, TOKENS being those of a side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Timed, absent
from ogdopt import ProjectedGradient

MAX_NORM, LR = 1.0, 1e-6
Loss = Callable[[], Any]


def plain(model: Any, winner: Loss, loser: Loss, graph: bool) -> Callable[[], None]:
    """A step on the sum of both losses."""
    base = torch.optim.RMSprop(model.parameters(), lr=LR, foreach=False)

    def run() -> None:
        if graph:
            (winner() + loser()).backward()
        else:
            loser().backward()
            winner().backward()
        finish(model, base)

    return run


def finish(model: Any, base: torch.optim.Optimizer) -> None:
    """Clip, step, clear."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=False)
    base.step()
    base.zero_grad()


def ours(model: Any, winner: Loss, loser: Loss, **options: Any) -> Callable[[], Any]:
    """A step of ProjectedGradient."""
    base = torch.optim.RMSprop(model.parameters(), lr=LR, foreach=False)
    opt = ProjectedGradient(base, max_norm=MAX_NORM, **options)
    return lambda: opt.step(winner, loser)


def torchjd(model: Any, winner: Loss, loser: Loss, thrifty: bool, chunk: int | None = None) -> Callable[[], None]:
    """A step with TorchJD's UPGrad of preference (1, 0), which is OGD up to its regularization."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import backward, jac_to_grad

    base = torch.optim.RMSprop(model.parameters(), lr=LR, foreach=False)
    params = list(model.parameters())
    aggregator = UPGrad(torch.tensor([1.0, 0.0], device=params[0].device))
    options = {"optimize_gramian_computation": True} if thrifty else {}

    def run() -> None:
        backward([winner(), -loser()], parallel_chunk_size=chunk)
        jac_to_grad(params, aggregator, **options)
        finish(model, base)

    return run


def pytorch_optimizer(model: Any, winner: Loss, loser: Loss) -> Callable[[], None]:
    """A step with pytorch_optimizer's PCGrad."""
    from pytorch_optimizer import PCGrad

    base = torch.optim.RMSprop(model.parameters(), lr=LR, foreach=False)
    opt = PCGrad(base, reduction="sum")

    def run() -> None:
        objectives: Any = [winner(), -loser()]
        opt.pc_backward(objectives)
        finish(model, base)

    return run


def ways(model: Any, winner: Loss, loser: Loss) -> dict[str, Callable[[], Any] | str]:
    """All of them by name, or why one is not here."""
    both = (model, winner, loser)
    found: dict[str, Callable[[], Any] | str] = {
        "both losses in turn": plain(*both, graph=False),
        "ogdopt": ours(*both),
        "ogdopt, fused=True": common.unfused(model.device.type) or ours(*both, fused=True),
        "ogdopt, set_aside=torch.bfloat16": ours(*both, set_aside=torch.bfloat16),
        'ogdopt, set_aside="int8"': ours(*both, set_aside="int8"),
        'ogdopt, set_aside="recompute"': ours(*both, set_aside="recompute"),
        'ogdopt, scope="tensor", set_aside="recompute"': ours(*both, scope="tensor", set_aside="recompute"),
    }
    names: dict[str, tuple[bool, int | None]] = {
        "TorchJD UPGrad((1, 0))": (False, None),
        "TorchJD UPGrad((1, 0)), optimize_gramian_computation": (True, None),
        "TorchJD UPGrad((1, 0)), one loss after the other": (True, 1),
    }
    found |= {name: absent("torchjd") or torchjd(*both, *options) for name, options in names.items()}
    found["pytorch_optimizer PCGrad"] = absent("pytorch_optimizer") or pytorch_optimizer(*both)
    return found


def measure(size: str, sequences: int, tokens: int, rounds: int, device: str, only: list[str]) -> dict[str, Any]:
    """Times of every way; of those alone whose names hold one of `only`, if there are any."""
    model = common.mistral(size, max_position_embeddings=max(tokens, 512)).to(device)
    winner, loser = common.sides(model, sequences, tokens)
    base = Timed(plain(model, winner, loser, graph=True))
    found = ways(model, winner, loser)
    found = {name: way for name, way in found.items() if not only or any(word in name for word in only)}
    there = {name: Timed(way) for name, way in found.items() if not isinstance(way, str)}
    measured = common.interleaved(base, {"both losses in one graph": base} | there, rounds, common.clock_of(device))
    unit = {"both losses in one graph": measured["both losses in one graph"]}
    return unit | {name: measured.get(name, way) for name, way in found.items()}


def main(words: list[str]) -> None:
    """Measure and print the table."""
    parser = common.parser(__doc__, "step_SIZE_TOKENS")
    parser.add_argument("--size", choices=common.SIZES, default="20M")
    parser.add_argument("--sequences", type=int, default=4, help="of each side")
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only ways whose names hold one of these")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    results = measure(asked.size, asked.sequences, asked.tokens, asked.rounds, asked.device, asked.only)
    tokens = asked.sequences * asked.tokens
    rows = [
        [name, found, "–"] if isinstance(found, str) else [name, common.times(found), f"{found['seconds']:.2f} s"]
        for name, found in results.items()
    ]
    common.show(f"{asked.size}, {tokens:,} tokens a side: a whole step", ["", "to one backward of the sum", "time"], rows)
    path = asked.output.name.replace("SIZE", asked.size).replace("TOKENS", str(tokens))
    common.record(asked.output.with_name(path), results)


if __name__ == "__main__":
    common.start(main)
