"""One rank of many training runs: `training.py FOLDER CASE...` under torchrun; each writes FOLDER/CASE.RANK.json.

A case is `what:method`. The runs are those of `run` in one process, which the ranks must agree with.
"""

import dataclasses
import faulthandler
import functools
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

from ogdopt_harness.common.ranks import ALONE, FailedElsewhere, join
from ogdopt_harness.config.schema import LoraConfig, SparseConfig
from ogdopt_harness.modeling.adapters import bare
from ogdopt_harness.modeling.broadcast import outlined
from ogdopt_harness.modeling.build import build_model, load_model
from ogdopt_harness.modeling.export import export
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.methods import METHODS
from ogdopt_harness.training.progress import Signals, Stopped
from ogdopt_harness.training.reward import RewardTrainer, load_reward_model
from ogdopt_harness.training.step_record import StepRecord
from ogdopt_harness.training.trainer import Trainer
from tests import limits, small
from tests.test_train import job
from tests.workers.two_gradients import Watch

LIMIT = timedelta(seconds=40)  # of a collective; a case waits longer than that, and a busy rank may come so late
CPU = torch.device("cpu")
OPTIONS = {
    "plain": {},
    "uneven": {"train_batch_size": 5, "per_device_train_batch_size": 1},  # 13 rows: batches of 5, 5, 3 on two and four ranks
    "budget": {"per_device_train_tokens": 40, "per_device_train_batch_size": 4},
    "recomputed": {},
    "lora": {},
    "probed": {},
    "free": {},
    "damped": {"optimizer_args": {"eps": 1e-3}},  # the gradients of a fresh head are so small that RMSprop steps on rounding
}


def settings(what):
    lora = LoraConfig(r=2, lora_alpha=8) if what == "lora" else None
    return dataclasses.replace(small.MODEL, lora=lora, gradient_checkpointing=what == "recomputed")


def vector(model):
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad)
    return torch.cat([p.detach().flatten() for p in whole])


def trainer(folder, tok, what, method, ranks=ALONE, model_seed=0, **changes):
    options = dict(num_train_epochs=3, save_steps=1, eval_steps=3) | OPTIONS[what] | changes
    folder.mkdir(parents=True, exist_ok=True)
    options |= {"probe_steps": 2 if what == "probed" else None}
    options |= {"sparse": SparseConfig("free" if what == "free" else "hidden")}
    made: Job = job(folder, tok, method, small.preferences(tok, n=13), **options)
    kind = RewardTrainer if METHODS[method].reward else Trainer
    model = prepare(outlined(lambda: start(folder, tok, kind, model_seed), ranks), settings(what), CPU, 0, ranks)
    return kind(made, model, tok, CPU, False, None, ranks)


def start(folder, tok, kind, seed):
    """The model that a run starts from; that of a reward model has to lie in a folder."""
    model = small.model(tok, seed)
    if kind is Trainer:
        return model
    model.save_pretrained(folder / "start")
    return load_reward_model(small.MODEL, folder / "start", tok.pad_token_id, 0)


def run(folder, tok, what, method, ranks=ALONE, stop=None, **options):
    """Train to the end, or until SIGTERM comes to the last rank in step `stop`; the parameters and the lines."""
    found = trainer(folder, tok, what, method, ranks, **options)
    step = found.step

    def interrupted(k):
        if k == stop and ranks.rank == ranks.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(k)

    found.step = interrupted
    try:
        found.run()
    except Stopped as stopped:
        assert stop is not None and stopped.signal == signal.SIGTERM, stopped
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"parameters": vector(found.scorer.model).tolist(), "lines": lines}


def counted(folder, tok, method, ranks):
    """Messages and reads of a step, and of logging one."""
    made = trainer(folder, tok, "plain", method, ranks)
    made.scorer.load_reference()
    made.step(0)
    with Watch() as scoring:
        made.scorer.logps(small.preferences(tok, n=4).winners)  # what the model's own forward asks
    with Watch() as step:
        taken = made.step(1)
    with Watch() as logging:
        small.line(made, taken)
    with Watch() as measured:
        made.step(2)
    signals = Signals(ranks, [])
    signals.look()
    with Watch() as between:
        for _ in range(20):
            signals.look()
    seen = {"scoring": scoring, "step": step, "measured": measured, "logging": logging, "between": between}
    return {name: [x.collectives, x.reads] for name, x in seen.items()}


def spoiled(folder, tok, method, ranks):
    """A step whose loss is not a number on the last rank alone."""
    made = trainer(folder, tok, "plain", method, ranks)
    made.scorer.load_reference()
    before, score = vector(made.scorer.model), made.scorer.score

    def bad(*args, **named):
        found = score(*args, **named)
        factor = float("nan") if ranks.rank == ranks.size - 1 else 1.0
        return found._replace(logps=found.logps * factor)

    made.scorer.score = bad
    line = small.line(made, made.step(0))
    return {
        "still": torch.equal(before, vector(made.scorer.model)),
        "skipped": line["skipped"],
        "count": made.optimizer.skipped_steps,
    }


def differing(folder, tok, method, ranks):
    """Methods that mix pair by pair, where every process comes with another pair."""
    made = trainer(folder, tok, "plain", method, ranks)
    made.scorer.load_reference()
    try:
        made.source._collect_each_pair([ranks.rank], StepRecord())
    except RuntimeError as error:
        return {"error": str(error)}


def loading(folder, tok, what, ranks):
    """A model that one process alone loads and writes: what came to this one and to the disk, and its peak over the whole."""
    came = []
    plain = prepare(small.model(tok), settings(what), CPU, 3)
    shared = prepare(outlined(lambda: came.append(1) or small.model(tok), ranks), settings(what), CPU, 3, ranks)
    named = lambda model: [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]  # noqa: E731
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in named(shared)}
    other = [name for name, x in named(plain) if not torch.equal(x, whole.pop(name))] + [*whole]
    export(shared, tok, folder / "exported", "# card", ranks)
    if ranks.first:
        export(plain, tok, folder / "own", "# card")
        theirs, ours = (dict(load_model(small.MODEL, folder / x).named_parameters()) for x in ("own", "exported"))
        other += [name for name, x in theirs.items() if not torch.equal(x, ours[name])]
    tied = bare(shared).lm_head.weight is bare(shared).model.embed_tokens.weight
    shape = small.ARCHITECTURE | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
    config = dataclasses.replace(settings("plain"), architecture=shape)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before, held = kib("VmRSS"), []
    for _ in range(2):  # the second as the reference, which waits beside it
        held.append(prepare(outlined(lambda: build_model(config, tok, 0), ranks), config, CPU, 0, ranks))
    export(held[0], tok, folder / "large", "# card", ranks)
    size = sum(p.numel() * p.element_size() for p in held[0].parameters()) / 1024
    peak = (kib("VmHWM") - before) / size
    return {"loads": len(came), "other": other, "tied": tied, "peak": peak}


def kib(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def patience(folder, tok, method, ranks):
    """What the first process does for all takes longer than a collective may; then it fails."""
    found = ranks.on_first(lambda: time.sleep(LIMIT.seconds + 2) or "done")
    try:
        ranks.on_first(lambda: int("x"))
    except FailedElsewhere as error:
        return {"found": found, "error": str(error)}
    except ValueError as error:
        return {"found": found, "error": str(error)}


def main(folder, cases):
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group = functools.partial(dist.init_process_group, timeout=LIMIT)  # for join
    ranks, _ = join("cpu")
    tok = small.tokenizer(folder / f"tok-{ranks.size}-{ranks.rank}")
    others = {"counted": counted, "spoiled": spoiled, "patience": patience, "loading": loading, "differing": differing}
    for case in cases:
        faulthandler.dump_traceback_later(limits.RANK, exit=True)  # a rank that hangs says where
        what, _, rest = case.partition(":")
        name, _, where = rest.partition("@")
        home = folder / (where or f"{case.replace(':', '-')}-{ranks.size}")
        if what in others:
            result = others[what](home, tok, name, ranks)
        elif what == "cut":
            result = run(home, tok, "plain", name, ranks, stop=2)  # saved right behind a measurement, with no export between
        elif what == "seldom":
            result = run(home, tok, "plain", name, ranks, stop=1, logging_steps=100)
        elif what == "goon":
            result = run(home, tok, "plain", name, ranks, model_seed=99)
        else:
            result = run(home, tok, what, name, ranks)
        (folder / f"{case.replace(':', '-')}.{ranks.size}.{ranks.rank}.json").write_text(json.dumps(result))
    ranks.wait()  # a rank that leaves early takes the connections of the other with it
    os._exit(0)  # tearing down while the interpreter exits hangs now and then


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
