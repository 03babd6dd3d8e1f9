"""Shared settings: one thread, no network, and this checkout's code in every process that a test starts."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [*(str(Path(__file__).parents[1] / folder) for folder in ("", "harness")), os.environ.get("PYTHONPATH")])
)

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
settings.register_profile("house", deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("house")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
