"""`ogdopt run` as a file, for launchers: `torchrun --nproc-per-node 8 harness/run.py --config RECIPE ...`."""

from ogdopt_harness.cli import main

if __name__ == "__main__":
    main(default="run")
