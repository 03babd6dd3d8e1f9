"""The launch files start what they say: two machines under SLURM (stood in for by this one, twice), then one by itself."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks import soak
from tests import limits

FOLDER = soak.ROOT / "harness" / "ogdopt_harness" / "recipes" / "launch"
STUBS = {
    "scontrol": 'test "$*" = "show hostnames node-[1-2]" && printf "localhost\\nnode-2\\n"',
    "srun": 'test "$1" = --kill-on-bad-exit=1; shift; "$@" & one=$!; "$@" & wait $one; wait $!',
}


def started(name, options, environment):
    """Run a launch file to its end; what it said."""
    command = ["bash", str(FOLDER / name), *options]
    settings = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=soak.ROOT, start_new_session=True)
    with subprocess.Popen(command, env=environment, **settings) as process:
        try:
            said, _ = process.communicate(timeout=limits.PROCESS)
        finally:
            for pid in soak.marked(environment[soak.MARK]):
                os.kill(pid, 9)
    assert process.returncode == 0, said
    return said


def test_two_machines_under_slurm_and_one_by_itself(tmp_path):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -e\n{body}\n")
        (tmp_path / name).chmod(0o755)
    changes = {"methods": "sft", "sft.max_steps": "2", "preference.num_train_epochs": "1", "preference.max_steps": "2"}
    words = [word for option, value in {**soak.OPTIONS, **changes}.items() for word in (f"--{option}", value)]
    options = ["--device", "cpu", "--study.output_dir", str(tmp_path / "study"), *words]
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {soak.MARK: tmp_path.name, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]", "PROCESSES": "1"}
    said = started("slurm.sh", options, environment | slurm | {"PORT": str(20000 + os.getpid() % 10000)})
    assert said.count("SFT: step 2 of 2") == said.count("SFT on chosen: step 2 of 2") == 1  # the second process is quiet
    saved = tmp_path / "study" / "seed-0" / "sft" / "checkpoint" / "step-00000002"
    assert {"__0_0.distcp", "__1_0.distcp"} <= {file.name for file in saved.iterdir()}  # two shared the model
    assert "step" not in started("node.sh", options, environment | {"PROCESSES": "2"})  # all is done already
