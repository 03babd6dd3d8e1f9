"""The processes of one command that torchrun started, each with a share of independent work. Alone, all of this is a no-op."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed


@contextmanager
def joined() -> Iterator[None]:
    """The process group of torchrun's processes, if it started this one; left again at the end.

    gloo, since all that goes between them are results, objects on the host.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def merged(share: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of all processes together, in each of them. Every process has to call it."""
    if size() == 1:
        return share
    shares: list[dict[Any, Any]] = [{} for _ in range(size())]
    distributed.all_gather_object(shares, share)
    return {key: value for part in shares for key, value in part.items()}


def barrier() -> None:
    """Wait for all processes."""
    if size() > 1:
        distributed.barrier()
