"""The processes of a run: which one this is, and what they do together.

A launcher (torchrun, accelerate launch) starts the same program several times and tells each its place. What one process does
for all, such as reading data and evaluating, the others wait for without a time limit: a process that dies meanwhile closes its
connections, and the launcher ends the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

T = TypeVar("T")
PATIENCE = timedelta(days=30)
PLACE = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


class FailedElsewhere(Exception):  # noqa: N818 - the error is another process's, which tells it
    """The first process has failed, and says why itself."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others; alone by default."""

    rank: int = 0
    size: int = 1
    patient: dist.ProcessGroup | None = None
    """The same processes, for messages on the host that may take hours."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes, prints and evaluates."""
        return self.rank == 0

    def tell(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process; the others wait for it, and fail where it fails."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None]
        if not self.first:
            dist.broadcast_object_list(outcome, 0, group=self.patient)
            if isinstance(outcome[0], FailedElsewhere):
                raise outcome[0]
            return outcome[0]
        try:
            outcome = [work()]
        except Exception as error:
            dist.broadcast_object_list([FailedElsewhere(str(error))], 0, group=self.patient)
            raise
        dist.broadcast_object_list(outcome, 0, group=self.patient)
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.patient)
        return found

    def wait(self) -> None:
        """Go on together."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, added up over all processes in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


ALONE = Ranks()
"""No other process."""


def join(device: str) -> tuple[Ranks, torch.device]:
    """This process's place and device, as the launcher's variables say.

    On a GPU there is a process group even for one process: FSDP2 keeps float32 weights and computes in bfloat16 layer by layer.
    Raises ValueError where there are more processes on a machine than GPUs.
    """
    rank, size, local = (int(os.environ.get(name, default)) for name, default in PLACE)
    kind = device.partition(":")[0]
    if kind == "cuda" and size > 1:
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; start at most as many "
                "processes a machine (--nproc-per-node), or choose --device cpu"
            )
        device = f"cuda:{local}"
    if kind == "cuda":
        torch.cuda.set_device(device)
    if size == 1 and kind != "cuda":
        return Ranks(), torch.device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        alone = {"store": HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
        dist.init_process_group(backend, **alone)
    patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    return Ranks(rank, size, patient), torch.device(device)


def leave(ranks: Ranks) -> None:
    """Close the connections once everyone is here, so that none that is early takes them from the others."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # another process has already gone, with a message of its own
            ranks.wait()
        dist.destroy_process_group()
