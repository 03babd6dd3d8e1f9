"""The processes of a run: which one this is, and what they do together.

A launcher (torchrun, accelerate launch) starts the same program several times and tells each its place. What one process does
for all, such as reading data and evaluating, the others wait for without a time limit: a process that dies meanwhile closes its
connections, and the launcher ends the rest.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

K = TypeVar("K")
T = TypeVar("T")
PATIENCE = timedelta(days=30)
PLACE = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


class FailedElsewhere(ValueError):  # noqa: N818 - the error is another process's, which tells it
    """The first process has failed, and says why itself: this one has nothing to say."""


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

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process alone; what it returns, in all. The others wait for it, and fail where it fails."""
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
        except Exception:
            dist.broadcast_object_list([FailedElsewhere()], 0, group=self.patient)
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

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This process's share of independent work."""
        return work[self.rank :: self.size]

    def merge(self, found: Mapping[K, T]) -> dict[K, T]:
        """The entries of all processes together, in each of them."""
        return {key: value for part in self.gather(dict(found)) for key, value in part.items()}

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
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, and torch finds no GPU here; choose --device cpu, or auto")
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
        store = HashStore() if size == 1 else _fresh_store()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    return Ranks(rank, size, patient), torch.device(device)


def _fresh_store() -> PrefixStore:
    """A part of the launcher's store that nothing was written to before.

    A launcher that starts the processes again (--max-restarts) keeps the store, and in it the addresses of those that died,
    which the new ones would call. So the first process names this start, the others answer it with a word of their own, and
    who finds its word repeated knows that the name is not one of a start before.
    """
    store, rank, size = next(rendezvous("env://"))
    word, deadline = uuid.uuid4().hex, time.monotonic() + PATIENCE.total_seconds()
    if rank == 0:
        store.set("ogdopt/start", word)
        answers = [store.get(f"ogdopt/{word}/{other}").decode() for other in range(1, size)]
        store.set(f"ogdopt/{word}/answers", " ".join(answers))
        return PrefixStore(word, store)
    while time.monotonic() < deadline:
        name = store.get("ogdopt/start").decode()
        store.set(f"ogdopt/{name}/{rank}", word)
        if store.check([answers := f"ogdopt/{name}/answers"]) and word in store.get(answers).decode().split():
            return PrefixStore(name, store)
        time.sleep(0.02)
    raise TimeoutError("the first process has not come")


def leave(ranks: Ranks) -> None:
    """Close the connections once everyone is here, so that none that is early takes them from the others."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # another process has already gone, with a message of its own
            ranks.wait()
        dist.destroy_process_group()


@contextmanager
def sharing() -> Iterator[Ranks]:
    """The processes of torchrun, if it started this one, for independent work that they share; left again at the end.

    gloo, since all that goes between them are results, objects on the host.
    """
    rank, size, local = (int(os.environ.get(name, default)) for name, default in PLACE)
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    dist.init_process_group("gloo", timeout=PATIENCE, store=_fresh_store(), rank=rank, world_size=size)
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()
