"""Training across checkpoints of other layouts; `checkpoints.py FOLDER` under torchrun is a rank of the FSDP2 side."""

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from ogdopt import ProjectedGradient
from tests import limits

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def build(shard=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1))  # 1: rank 1's shard is empty
    if shard:
        for layer in (model[0], model[2], model[3], model):
            fully_shard(layer)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    return model, ProjectedGradient(base, max_norm=0.05)


def steps(model, opt, which, rank=0, ranks=1):
    """Steps on the data of these numbers; number 1 is NaN on the last rank, so that there is something to count."""
    data = torch.randn(4, 2, 6, 5, generator=torch.Generator().manual_seed(1))
    for k in which:
        chosen, rejected = data[k, :, rank::ranks]
        bad = float("nan") if k == 1 and rank == ranks - 1 else 1.0
        opt.step(lambda x=chosen, bad=bad: (model(x) * bad).square().mean(), lambda x=rejected: (model(x) - 1).square().mean())


def save(model, opt, folder):
    weights, states = get_state_dict(model, opt, options=FLAT)
    dcp.save({"model": weights, "optim": states, "ogdopt": opt.counters}, checkpoint_id=folder)


def load(model, opt, folder, counters):
    weights, states = get_state_dict(model, opt, options=FLAT)
    dcp.load({"model": weights, "optim": states, "ogdopt": counters}, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=states, options=FLAT)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def vector(model):
    return torch.cat([full(p).flatten() for p in model.parameters()])


def main(folder):
    faulthandler.dump_traceback_later(limits.RANK, exit=True)  # a rank that hangs says where
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    own, opt = build(shard=True)
    steps(own, opt, [0, 1], rank, ranks)
    save(own, opt, folder / "by_two")

    loaded, resumed = build(shard=True)
    load(loaded, resumed, folder / "by_one", resumed.counters)
    plain, unwrapped = build(shard=True)
    load(plain, unwrapped.base, folder / "by_one", unwrapped.counters)
    ours, theirs = (get_state_dict(m, o, options=FLAT)[1] for m, o in ((loaded, resumed), (plain, unwrapped.base)))
    same = ours.keys() == theirs.keys() and all(
        torch.equal(full(v), full(theirs[k])) if isinstance(v, torch.Tensor) else v == theirs[k] for k, v in ours.items()
    )
    steps(loaded, resumed, [2, 3], rank, ranks)
    skipped = [o.skipped_steps for o in (opt, resumed, unwrapped)]
    result = {"weights": vector(loaded).tolist(), "bare_equals_wrapped": same, "skipped": skipped}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()  # a rank that leaves early takes the connections of the other with it
    os._exit(0)  # tearing down while the interpreter exits hangs now and then


if __name__ == "__main__":
    main(Path(sys.argv[1]))
