"""Which device a run is on."""

from __future__ import annotations

import torch


def device_name(name: str) -> str:
    """The device of a setting: "auto" is a GPU if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
