"""One rank of a two-gradient run; `two_gradients.py LAYOUT FOLDER` under torchrun writes what one process must agree with."""

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ogdopt import ProjectedGradient


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1))  # 1: rank 1's shard is empty


def main(layout, folder):
    faulthandler.dump_traceback_later(100, exit=True)  # a rank that hangs says where
    torch.set_num_threads(1)
    distributed = layout != "one"
    rank, ranks = 0, 1
    if distributed:
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build()
    params = list(model.parameters())
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model:
            if not isinstance(layer, nn.Tanh):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        params = list(model.parameters())
    elif layout.startswith("ddp"):
        model = DistributedDataParallel(model, gradient_as_bucket_view=layout == "ddp_views")
    opt = ProjectedGradient(torch.optim.RMSprop(params, lr=1e-2, foreach=False), max_norm=0.05)
    data = torch.randn(4, 2, 6, 5, generator=torch.Generator().manual_seed(1))
    numbers = []
    for k, (chosen, rejected) in enumerate(data):
        mine = slice(rank, None, ranks)
        bad = float("nan") if k == 2 and rank == ranks - 1 else 1.0

        def winner(x=chosen[mine], bad=bad):
            return (model(x) * bad).square().mean()

        def loser(x=rejected[mine]):
            return (model(x) - 1).square().mean()

        report = opt.step(winner, loser)
        numbers.append([report.skipped, report.gram.ll, report.grad_norm if not report.skipped else 0.0, report.clipped])
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in params]
    result = {"numbers": numbers, "parameters": torch.cat([p.flatten() for p in full]).tolist()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    if distributed:
        dist.barrier()  # a rank that leaves early takes the connections of the other with it
        os._exit(0)  # tearing DDP down while the interpreter exits hangs now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
