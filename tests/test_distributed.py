"""One process and two agree: FSDP2 shards (one of them empty), DDP with and without bucket views, and a NaN on one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
WORKER = str(ROOT / "tests" / "workers" / "two_gradients.py")


def launch(layout, ranks, folder):
    """Run the worker under torch's launcher with a time limit; what each rank wrote."""
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *starter, WORKER, layout, str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch("one", 1, tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("layout", ["fsdp2", "ddp", "ddp_views"])
def test_two_ranks_take_the_steps_of_one(one, layout, tmp_path):
    ranks = launch(layout, 2, tmp_path)
    for result in ranks:
        for got, want in zip(result["numbers"], one["numbers"]):
            assert got[0] == want[0] and got[3] == want[3]  # the same decisions, also about the NaN of one rank alone
            if not want[0]:
                assert got[1:3] == pytest.approx(want[1:3], rel=1e-5)
        torch.testing.assert_close(torch.tensor(result["parameters"]), torch.tensor(one["parameters"]), rtol=1e-4, atol=2e-6)
    assert ranks[0]["parameters"] == ranks[1]["parameters"]
    assert [n[0] for n in one["numbers"]] == [False, False, True, False] and one["numbers"][0][3]
