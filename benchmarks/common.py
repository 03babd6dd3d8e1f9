"""What the benchmarks share: models, clocks, interleaved rounds, memory of a process, and the record of what ran on what.

Ratios come from one process: every method runs right behind the base that it is compared with, round after round, and what
counts is the median of these paired ratios. pytest-benchmark measures one function after the other, minutes apart, where a
shared machine has changed its speed meanwhile. Times are CPU times of one thread, or wall-clock behind a synchronized GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 200},
    "miniature": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "vocab_size": 1000},
    "5M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5, "vocab_size": 4000},
    "20M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 4000},
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "vocab_size": 8000},
    "400M": {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 20, "vocab_size": 16000},
}
"""Mistral shapes; from 5M on the largest tensor is a fifth of the model or less."""
ALONE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
ALONE |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
"""One thread, no network, no progress bars of libraries."""
TIMING = ALONE | {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}
"""malloc keeps what is freed, as a GPU's caching allocator does, so that page faults of fresh memory are not what is timed."""
MEMORY = ALONE | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""malloc gives back what is freed, so that the peak is what is in use."""


CHILD = "OGDOPT_BENCHMARK_CHILD"
"""Set for processes that are started under the variables they need."""


def start(main: Callable[[list[str]], Any], environment: Mapping[str, str] = TIMING) -> None:
    """Run a script's `main` under these variables, which must be there before the process begins."""
    wanted = variables(environment)
    if wanted != os.environ and CHILD not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
    main(sys.argv[1:])


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The present environment with these, and no other settings of malloc."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != CHILD}
    return kept | dict(environment)


def module(script: str) -> str:
    """The name that `python -m` starts a script of this folder by."""
    return f"benchmarks.{Path(script).stem}"


def child(script: str, *words: str, environment: Mapping[str, str] = TIMING, limit: float | None = None) -> str:
    """What a script of this folder printed, run with these words in a process of its own.

    Raises RuntimeError with the end of its output if it fails, or takes more than `limit` seconds.
    """
    command = [sys.executable, "-m", module(script), *words]
    try:
        ready = variables(environment) | {CHILD: "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=ready, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{script} {' '.join(words)} took more than {limit} s") from error
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def launched(script: str, ranks: int, *words: str, limit: float, environment: Mapping[str, str] = TIMING) -> str:
    """What the processes of a script of this folder printed, so many of them under torch's launcher.

    Raises RuntimeError like `child`, and leaves no process behind.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, "-m", module(script), *words]
    ready, pipes = variables(environment) | {CHILD: "1"}, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=ready, start_new_session=True, text=True, **pipes) as launcher:
        try:
            said, complaints = launcher.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise RuntimeError(f"{script} on {ranks} ranks took more than {limit} s") from error
    if launcher.returncode:
        raise RuntimeError(f"{script} on {ranks} ranks failed:\n{complaints[-2000:]}")
    return said


def parser(description: str | None, result: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: `--output`, by default `results/RESULT.json`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=RESULTS / f"{result}.json", help="where the figures go (JSON)")
    return made


# ---- models ------------------------------------------------------------------------------------------------------------


def architecture(size: str, **changes: Any) -> Any:
    """The transformers configuration of one of `SIZES`."""
    from transformers import MistralConfig

    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    return MistralConfig(**(heads | SIZES[size] | changes))


def mistral(size: str, **changes: Any) -> Any:
    """A Mistral of one of `SIZES`, with random weights from seed 0."""
    import torch
    from transformers import MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(architecture(size, **changes))


def sides(model: Any, sequences: int, tokens: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Closures with the mean loss of winners and of losers, which share three quarters of their tokens.

    Their gradients then point the same way, as those of preference pairs do.
    """
    import torch

    size, device = model.config.vocab_size, next(model.parameters()).device
    shared = torch.randint(size, (sequences, 3 * tokens // 4))
    own = [torch.randint(size, (sequences, tokens - shared.shape[1])) for _ in range(2)]
    winner, loser = (torch.cat([shared, ids], 1).to(device) for ids in own)
    return lambda: model(input_ids=winner, labels=winner).loss, lambda: model(input_ids=loser, labels=loser).loss


def cosine(xs: Iterable[Any], ys: Iterable[Any]) -> float:
    """Cosine of the angle between two lists of tensors, in float64."""
    xy = xx = yy = 0.0
    for x, y in zip(xs, ys, strict=True):
        x, y = x.detach().double().flatten(), y.detach().double().flatten()
        xy, xx, yy = xy + float(x @ y), xx + float(x @ x), yy + float(y @ y)
    return xy / math.sqrt(xx * yy)


# ---- time --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """What is timed, and what is made ready before it and dropped behind it, untimed."""

    run: Callable[[], Any]
    before: Callable[[], Any] = lambda: None
    after: Callable[[], Any] = lambda: None

    def seconds(self, clock: Callable[[], float]) -> float:
        """One run."""
        self.before()
        since = clock()
        self.run()
        spent = clock() - since
        self.after()
        return spent


def clock_of(device: str) -> Callable[[], float]:
    """CPU seconds of this process, or on a GPU wall-clock seconds once it has done all that it was given."""
    if device == "cpu":
        return time.process_time
    import torch

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


WARM = 2
"""Runs before anything is timed: the first step makes the base's state, and a fused one is compiled in the second."""


def interleaved(
    base: Timed, methods: Mapping[str, Timed], rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """For each method the median, least and most of its ratios to the base, which runs right before it, and median seconds."""
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    spent: dict[str, list[float]] = {name: [] for name in methods}
    for timed in (base, *methods.values()):
        for _ in range(WARM):
            timed.seconds(clock)
    for _ in range(rounds):
        for name, method in methods.items():
            whole, own = base.seconds(clock), method.seconds(clock)
            ratios[name].append(own / whole)
            spent[name].append(own)
    return {name: spread(ratios[name]) | {"seconds": statistics.median(spent[name])} for name in methods}


def spread(ratios: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


# ---- memory ------------------------------------------------------------------------------------------------------------


def resident(reset: bool = False, peak: bool = False) -> int:
    """Bytes of resident memory of this process, now or at its peak since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def added(run: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that a run needs at its peak over what was held before it.

    Raises RuntimeError on a CPU without the settings of `MEMORY`, under which alone that is what is in use.
    """
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - held
    if any(os.environ.get(name) != value for name, value in MEMORY.items()):
        raise RuntimeError("memory is measured in a process that began under common.MEMORY; start it by common.start or child")
    held = resident(reset=True)
    run()
    return resident(peak=True) - held


# ---- peers, and the record ---------------------------------------------------------------------------------------------

PEERS = {"torchjd": ("qpsolvers", "quadprog"), "pytorch_optimizer": (), "trl": ()}
"""Packages that are compared with, and what each needs to be of use here."""
ABSENT = " is not installed"


def installed(package: str) -> str | None:
    """The version of a package, if it is here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def absent(peer: str) -> str | None:
    """Why a peer cannot be measured here; None where it can."""
    return next((f"{name}{ABSENT}" for name in (peer, *PEERS[peer]) if installed(name) is None), None)


def machine() -> str:
    """The machine in a few words."""
    cpu, about = platform.machine(), Path("/proc/cpuinfo")
    if about.is_file():
        names = [line.partition(":")[2].strip() for line in about.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    found, torch = f"{cpu}, {os.cpu_count()} cores", sys.modules.get("torch")
    if torch is None:
        return found
    found += f", {torch.get_num_threads()} thread(s) used"
    return f"{torch.cuda.get_device_name()}; {found}" if torch.cuda.is_available() else found


@functools.cache
def unfused(device: str = "cpu") -> str | None:
    """Why `fused=True` would be measured without its compiled passes here; None where it has them."""
    import torch

    from ogdopt import ProjectedGradient

    p = torch.nn.Parameter(torch.ones(4096, device=device))  # enough for all of its passes to be compiled
    opt = ProjectedGradient(torch.optim.SGD([p], lr=1.0), fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which says the same
        opt.step(p.sum, lambda: p[0])
    return opt.unfused or None


def record(path: Path, results: Any, **more: Any) -> None:
    """Write figures with the command, the machine and the versions of everything that took part, and say where."""
    packages = ["torch", "transformers", *PEERS]
    versions = {"python": platform.python_version()} | {name: found for name in packages if (found := installed(name))}
    about = {"command": " ".join(["python", *map(_short, sys.orig_argv[1:])]), "machine": machine(), "versions": versions}
    if hasattr(os, "getloadavg"):
        about["load before and after"] = [round(LOAD, 2), round(os.getloadavg()[0], 2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | more | {"results": results}, indent=1) + "\n")
    print(f"\n{_short(str(path.resolve()))}")


LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _short(word: str) -> str:
    """A path inside the project as from its root."""
    return str(Path(word).relative_to(ROOT)) if word.startswith(f"{ROOT}/") else word


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table: as wide as the terminal, or wide where it goes to a file."""
    from rich.console import Console

    from ogdopt_harness.common.tables import Table

    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(Table(title, columns, rows).terminal())
    if any(ABSENT in cell for row in rows for cell in row):
        print("What is not installed comes with pip install -c constraints.txt '.[bench]'")
    sys.stdout.flush()


def times(found: Mapping[str, float] | None) -> str:
    """A ratio with its range, as text."""
    return "–" if found is None else f"{found['ratio']:.2f}x ({found['least']:.2f}-{found['most']:.2f})"
