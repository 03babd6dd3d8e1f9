"""A training step of this harness against one of TRL's DPOTrainer, on the same pairs.

    python -m benchmarks.trainers --size 20M --pairs 64 --rounds 3
    python -m benchmarks.trainers --size 20M --pairs 64 --rounds 3 --as-installed

Both train a small Mistral in float32 on one thread with RMSprop and clipping, on the same batch of pairs with log-normal
lengths: the token ids that DPOTrainer has made of the text are what the harness gets, nothing is cut, and every step has all of
them. Timed is CPU time from the end of a step to the end of the next, collation, metrics, clipping and optimizer included;
loading, tokenization and what precomputes the reference are not. Right behind every step of DPOTrainer the harness takes its
own, OGD and DPO (with its reference precomputed), so that ratios are paired; the first round warms up, ours once more.

By default TRL has what serves it best here: activations kept, and pairs sorted by length so that micro-batches hold little
padding (the order of `group_by_length`). With `--as-installed` it is as its defaults are: activations are computed twice
(`gradient_checkpointing`), and pairs come in any order; the harness then takes a step that does so too. In both TRL
neither logs nor shows progress, and takes `--micro` pairs at a time. The harness is the loop of `training/trainer.py` as it is,
metrics line included: each half sorted by length, micro-batches of at most as many tokens as `--micro` of the longest sequences
have, log-probabilities at completion positions alone; what a step changed is measured seldom, as it is in a run.

Peak memory is that of a process that does nothing else: over what it held before the model was there, and the ratio of whole
processes. Results go to benchmarks/results/trainers_SIZE.json and trainers_SIZE_as_installed.json.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from ogdopt_harness.config.schema import DataConfig, ModelConfig, StageConfig
from ogdopt_harness.data.examples import Example, Preferences
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.modeling.tokenizer import train_tokenizer
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.methods import METHODS
from ogdopt_harness.training.progress import Signals, Speed
from ogdopt_harness.training.trainer import Trainer

BETA, LR, MAX_NORM = 0.1, 1e-6, 10.0
TRL = {
    "on the fly": {"precompute_ref_log_probs": False},
    "precomputed": {"precompute_ref_log_probs": True},
}
"""Where TRL's reference log-probabilities come from, and the setting that says so."""
OURS = {
    "ogd": "ogdopt, OGD",
    "ogd_fused": "ogdopt, OGD, fused=True",
    "ogd_recompute": "ogdopt, OGD, activations computed twice",
    "dpo": "ogdopt, DPO",
}


def vocabulary(size: str) -> int:
    """Words beside the tokenizer's special tokens."""
    return common.SIZES[size]["vocab_size"] - 16


def texts(pairs: int, scale: float, size: str, shuffled: bool) -> list[dict[str, str]]:
    """Pairs of random words, lengths log-normal: at `scale` 1 the median prompt has 40, the median answer 90.

    Sorted by the longer sequence, the longest first, unless they are to be shuffled.
    """
    rng = random.Random(0)

    def words(median: float, sigma: float) -> str:
        n = min(max(2, round(scale * median * rng.lognormvariate(0, sigma))), round(4 * scale * median))
        return " ".join(f"w{rng.randrange(vocabulary(size))}" for _ in range(n))

    rows = [{"prompt": words(40, 0.6), "chosen": " " + words(90, 0.6), "rejected": " " + words(90, 0.6)} for _ in range(pairs)]
    longest = lambda row: max(len((row["prompt"] + row[side]).split()) for side in ("chosen", "rejected"))  # noqa: E731
    return rows if shuffled else sorted(rows, key=longest, reverse=True)


def tokenizer(folder: Path, size: str) -> Any:
    """One token for each word."""
    every = " ".join(f"w{k}" for k in range(vocabulary(size)))
    return train_tokenizer([every], ModelConfig(None, {}, None, "word", common.SIZES[size]["vocab_size"]), folder / "tokenizer")


def dpo_trainer(
    folder: Path, size: str, rows: list[dict[str, str]], how: str, micro: int, steps: int, tok: Any, installed: bool
) -> Any:
    """TRL's trainer on these rows in their order, one step an epoch."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(rows) // micro,
        num_train_epochs=steps,
        train_sampling_strategy="sequential",
        max_length=None,
        beta=BETA,
        learning_rate=LR,
        max_grad_norm=MAX_NORM,
        gradient_checkpointing=installed,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **TRL[how],
    )
    model = common.mistral(size)
    trainer = DPOTrainer(
        model,
        None if config.precompute_ref_log_probs else common.mistral(size),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tok,
        optimizers=(torch.optim.RMSprop(model.parameters(), lr=LR), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def preferences(dataset: Any) -> Preferences:
    """The sequences of DPOTrainer's data set."""
    sides = [[Example(row["prompt_ids"], row[f"{side}_ids"]) for row in dataset] for side in ("chosen", "rejected")]
    return Preferences(*sides, paired=True)


def harness(folder: Path, size: str, which: str, data: Preferences, micro: int, tok: Any) -> Callable[[], None]:
    """A step of this harness's loop, as one of `OURS`."""
    method = which.removesuffix("_fused").removesuffix("_recompute")
    lengths = [len(e.prompt_ids) + len(e.completion_ids) for side in (data.winners, data.losers) for e in side]
    config = StageConfig(
        data=DataConfig(max_length=max(lengths)),
        learning_rate=LR,
        warmup_steps=0,
        num_train_epochs=10_000,
        train_batch_size=len(data.winners),
        per_device_train_batch_size=len(data.winners),
        per_device_train_tokens=micro * max(lengths),
        max_grad_norm=MAX_NORM,
        update_cosine_steps=1000,
        fused=which.endswith("_fused"),
    )
    folder = folder / which
    folder.mkdir()
    beta = BETA if METHODS[method].beta else None
    job = Job(folder, method, method, config, data, None, beta=beta)
    settings = ModelConfig(None, {}, gradient_checkpointing=which.endswith("_recompute"))
    model = prepare(common.mistral(size), settings, torch.device("cpu"))
    trainer = Trainer(job, model, tok, torch.device("cpu"), False)
    trainer.scorer.load_reference()
    speed, signals, done = Speed(), Signals(trainer.ranks, []), iter(range(10_000))

    def run() -> None:
        taken = trainer.step(next(done))
        speed.lap()
        trainer.line(taken, signals, speed)

    return run


def alternating(trainer: Any, ours: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """CPU seconds of every step of DPOTrainer, and of ours right behind each."""
    from transformers import TrainerCallback

    found: dict[str, list[float]] = {"TRL": [], **{name: [] for name in ours}}

    class Behind(TrainerCallback):
        """Takes the time of the step that ends, then of ours."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.since = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["TRL"].append(time.process_time() - self.since)
            for name, step in ours.items():
                since = time.process_time()
                step()
                found[name].append(time.process_time() - since)
            self.since = time.process_time()

    for step in ours.values():
        step()
    trainer.add_callback(Behind())
    trainer.train()
    return {name: times[1:] for name, times in found.items()}


def measure(size: str, pairs: int, scale: float, micro: int, installed: bool, rounds: int) -> dict[str, Any]:
    """Seconds and ratios beside either form of DPOTrainer."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tok = tokenizer(folder, size)
        rows = texts(pairs, scale, size, installed)
        for how in TRL:
            trainer = dpo_trainer(folder, size, rows, how, micro, rounds + 1, tok, installed)
            data = preferences(trainer.train_dataset)
            place = folder / how.replace(" ", "_")
            place.mkdir()
            there = [method for method in OURS if installed or not method.endswith("_recompute")]
            seconds = alternating(trainer, {method: harness(place, size, method, data, micro, tok) for method in there})
            results[f"TRL, reference {how}"] = {"seconds": statistics.median(seconds["TRL"])}
            for method in there:
                ratios = [own / theirs for own, theirs in zip(seconds[method], seconds["TRL"], strict=True)]
                results.setdefault(OURS[method], {"seconds": statistics.median(seconds[method])})[how] = common.spread(ratios)
            both = data.winners + data.losers
            lengths = sorted(len(e.prompt_ids) + len(e.completion_ids) for e in both)
            scored = sum(len(e.completion_ids) for e in both)
            results["batch"] = {
                "tokens": sum(lengths),
                "scored": scored,
                "median": lengths[len(both) // 2],
                "longest": lengths[-1],
            }
    return results


def memory(which: str, size: str, pairs: int, scale: float, micro: int, installed: bool) -> dict[str, int]:
    """Peak bytes of this process in two steps of one trainer: in all, and over what it held before the model was there."""
    from datasets import Dataset  # noqa: F401 - both sides have it in memory, as both have what reads rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tok = tokenizer(folder, size)
        rows = texts(pairs, scale, size, installed)
        ids = lambda text: tok(text, add_special_tokens=False).input_ids  # noqa: E731
        ends = [tok.eos_token_id]
        sides = [[Example(ids(row["prompt"]), ids(row[side]) + ends) for row in rows] for side in ("chosen", "rejected")]
        if which in TRL:
            import trl  # noqa: F401
        held = common.resident(reset=True)
        if which in TRL:
            trainer = dpo_trainer(folder, size, rows, which, micro, 2, tok, installed)
            common.resident(reset=True)  # what computed the reference beforehand is not counted
            trainer.train()
        else:
            step = harness(folder, size, which, Preferences(*sides, paired=True), micro, tok)
            common.resident(reset=True)
            step()
            step()
        peak = common.resident(peak=True)
    return {"process": peak, "over start": peak - held}


def main(words: list[str]) -> None:
    """Measure and print the table."""
    parser = common.parser(__doc__, "trainers_SIZE")
    parser.add_argument("--size", choices=common.SIZES, default="20M")
    parser.add_argument("--pairs", type=int, default=64, help="of a step; a multiple of --micro")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--micro", type=int, default=8, help="pairs in a micro-batch of TRL")
    parser.add_argument("--as-installed", action="store_true", help="TRL recomputes activations and takes pairs in any order")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", choices=[*TRL, *OURS], help="peak memory of one of them, in this process; prints JSON")
    asked = parser.parse_args(words)
    if asked.pairs % asked.micro:
        parser.error(f"--pairs {asked.pairs} is not a multiple of --micro {asked.micro}")
    torch.set_num_threads(1)
    shape = (asked.size, asked.pairs, asked.scale, asked.micro, asked.as_installed)
    if asked.memory:
        print(json.dumps(memory(asked.memory, *shape)))
        return
    path = asked.output.with_name(asked.output.name.replace("SIZE", asked.size + "_as_installed" * asked.as_installed))
    if why := common.absent("trl"):
        results: dict[str, Any] = {f"TRL, reference {how}": why for how in TRL}
        common.show("A step of the harness beside TRL's DPOTrainer", ["", ""], [[*row] for row in results.items()])
        common.record(path, results)
        return
    results = measure(*shape, asked.rounds)
    sizes: list[str] = ["--as-installed"] if asked.as_installed else []
    sizes += [w for name, value in zip(("size", "pairs", "scale", "micro"), shape) for w in (f"--{name}", str(value))]
    for which in (*TRL, *(method for method, label in OURS.items() if label in results)):
        said = common.child("trainers.py", *sizes, "--memory", which, environment=common.MEMORY)
        results[OURS.get(which, f"TRL, reference {which}")] |= json.loads(said.splitlines()[-1])
    report(results, asked.size)
    common.record(path, results)


def report(results: dict[str, Any], size: str) -> None:
    """Print what was found as a table."""
    of = {how: results[f"TRL, reference {how}"] for how in TRL}
    rows = []
    for name, found in results.items():
        if name == "batch":
            continue
        beside = [common.times(found.get(how)) for how in TRL]
        memory = [f"{found[kind] / 2**20:,.0f} MiB" for kind in ("process", "over start")]
        share = [f"{found[kind] / of['on the fly'][kind]:.2f}x" for kind in ("process", "over start")]
        rows.append([name, f"{found['seconds']:.1f} s", *beside, *memory, *share])
    columns = ["", "CPU time", "to on the fly", "to precomputed", "peak of process", "over start", "process", "over start"]
    batch = results["batch"]
    title = f"{size}: a step on {batch['tokens']:,} tokens, {batch['scored']:,} of them scored, median {batch['median']}"
    common.show(title, columns, rows)


if __name__ == "__main__":
    common.start(main, common.MEMORY if "--memory" in sys.argv else common.TIMING)
