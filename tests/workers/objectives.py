"""One rank of objectives under torch.distributed: `objectives.py FOLDER` under torchrun writes FOLDER/RANK.json.

Every rank has losses of its own; what they choose must be the same, and what one process chooses that sees the means.
"""

import faulthandler
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from ogdopt import AlternatingObjective, MaxGapObjective
from tests import limits

STEPS = 60
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
OPTIMA = {"a": 0.1, "b": 0.0, "c": -0.2}


def losses(rank, step):
    """Losses of a rank at a step: they differ so much that the ranks would disagree on the largest gap."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return dict(zip(WEIGHTS, torch.rand(3, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 0.5, 1.0])))


def means(step, ranks=2):
    table = [losses(rank, step) for rank in range(ranks)]
    return {name: sum(x[name] for x in table) / ranks for name in WEIGHTS}


def run(objective, at, steps=STEPS):
    """The choices over `steps` steps, the gaps at the end."""
    chosen = []
    for step in range(steps):
        objective({name: lambda x=x: x for name, x in at(step).items()})
        chosen.append(objective.chosen)
    return {"chosen": chosen, "gaps": objective.gaps}


def counted():
    """How many numbers each message of five steps has."""
    sizes, reduce = Counter(), dist.all_reduce

    def count(tensor, *arguments, **options):
        sizes[tensor.numel()] += 1
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = count
    try:
        run(MaxGapObjective(WEIGHTS, evaluate_every=3), lambda step: losses(dist.get_rank(), step), 5)
    finally:
        dist.all_reduce = reduce
    return dict(sizes)


def spoiled(step, first):
    """One rank alone has a loss that is not finite."""
    mine = losses(dist.get_rank(), step)
    if dist.get_rank() == 1 and (step == 0) == first and step % 3 == 0:
        mine["b"] = torch.tensor(float("nan"))
    return mine


def refused():
    try:
        run(MaxGapObjective(WEIGHTS), lambda step: spoiled(step, True))
    except ValueError as error:
        return str(error)
    return None


def main(folder):
    faulthandler.dump_traceback_later(limits.RANK, exit=True)
    dist.init_process_group("gloo", timeout=limits.COLLECTIVE)
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone = dist.new_subgroups(group_size=1)[0]
    mine = lambda step: losses(rank, step)  # noqa: E731
    laid_out = lambda step: {n: DTensor.from_local(x, mesh, [Replicate()]) for n, x in means(step).items()}  # noqa: E731
    results = {
        "alternating": run(AlternatingObjective(WEIGHTS, seed=3), mine),
        **{f"max_gap_{k}": run(MaxGapObjective(WEIGHTS, optima=OPTIMA, evaluate_every=k), mine) for k in (1, 4, None)},
        "alone": run(MaxGapObjective(WEIGHTS, optima=OPTIMA, evaluate_every=4, process_group=alone), mine),
        "tensor_parallel": run(MaxGapObjective(WEIGHTS, optima=OPTIMA, evaluate_every=4), laid_out),
        "spoiled": run(MaxGapObjective(WEIGHTS, evaluate_every=3), lambda step: spoiled(step, False)),
        "spoiled_first": refused(),
        "messages": counted(),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
