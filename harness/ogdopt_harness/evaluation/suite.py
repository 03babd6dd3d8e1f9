"""Evaluation of an exported model through lm-evaluation-harness: right or wrong, item by item, and the style of its replies.

Every item of a local benchmark can be asked in three ways, because a model that only changed its style of reply loses the
first without having forgotten anything:

    direct     the choices continue the chat-templated question, highest log-probability wins   (the paper's TAX)
    cloze      the choices continue a plain text, e.g. "rador lives in"; no chat template
    generate   the greedy reply to the question names the right choice, and names it first

Official tasks of lm-eval are asked in their own way, zero-shot, under the same chat template.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from ogdopt_harness.common.files import sealed, write_text
from ogdopt_harness.common.journal import Journal
from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.common.run_folder import partial
from ogdopt_harness.config import ranges
from ogdopt_harness.config.schema import EvalConfig, TaskConfig
from ogdopt_harness.evaluation.items import Row, judge_style, names_answer, read_items, read_style
from ogdopt_harness.evaluation.kept import fingerprint_of
from ogdopt_harness.evaluation.lm import EvalLM, Messages, fold_system, load
from ogdopt_harness.evaluation.official import OFFICIAL, official_tasks
from ogdopt_harness.modeling.fingerprint import fingerprint


def evaluate(
    model_dir: Path,
    config: EvalConfig,
    output: Path,
    *,
    run: str,
    epoch: int,
    seed_dir: Path | None,
    device: str,
    progress: bool = True,
    tokenizer: Path | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Evaluate the Hugging Face folder `model_dir` and write `output` (JSON, whole or not at all); returns what it holds.

    `run` and `epoch` are recorded; so is the model's folder, relative to `seed_dir` where it lies in it. The state of all
    random generators is left as it was. `tokenizer` is another folder that has it. Answers stream into a journal next to
    `output`, from which an interrupted evaluation of the same model with the same settings goes on. Each of several `ranks`
    answers a share, and the first writes the file. Raises ValueError for a model, a benchmark file or a task that cannot be
    used; warns where prompts lost their beginning because the model cannot read that many tokens.
    """
    start, wanted = time.perf_counter(), fingerprint_of(config, model_dir, tokenizer)
    ranges.check(config, "evals")
    shown = model_dir.relative_to(seed_dir) if seed_dir and model_dir.is_relative_to(seed_dir) else model_dir
    terminal = sys.stderr
    with quiet(), isolated_randomness(device):
        local = local_tasks(config)
        official = official_tasks(tuple(config.lm_eval_tasks), config.lm_eval_data)
        model, words = load(
            model_dir,
            device,
            tokenizer=tokenizer,
            apply_chat_template=config.apply_chat_template,
            device_map=config.device_map,
            ranks=ranks,
        )
        shows = progress and ranks.first
        with tqdm(desc=f"evaluating {run} epoch {epoch}", disable=not shows, file=terminal, leave=False) as bar:
            lm = EvalLM(model, words, batch_size=config.batch_size, bar=bar, ranks=ranks)
            check_choices(local, lm, config.limit)
            about = {**settings(config, lm), **versions(), "words": str(tokenizer)}
            about["model"] = fingerprint(model_dir, config=model.config)
            digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
            lm.journal = journal = Journal(partial(output, digest), rank=ranks.rank)
            samples = ask(lm, config, [*local.values(), *(task for tasks in official.values() for task in tasks)])
    if lm.truncated:
        warnings.warn(
            f"{shown}: {lm.truncated} requests are longer than the {lm.max_length} tokens that the model reads and lost their "
            "beginning",
            stacklevel=2,
        )
    tasks = {task.name: local_answers(task, samples) for task in config.tasks}
    result = {
        "model": str(shown),
        "run": run,
        "epoch": epoch,
        "fingerprint": wanted,
        "seconds": round(time.perf_counter() - start, 2),
        "versions": versions(),
        "settings": settings(config, lm),
        "tasks": {**tasks, **{name: official_answers(name, leaves, samples) for name, leaves in official.items()}},
        "style": style_answers(samples["style"]) if "style" in local else None,
    }

    def write() -> None:
        write_text(output, json.dumps(sealed(result), ensure_ascii=False, allow_nan=False) + "\n")
        journal.remove()

    ranks.on_first(write)
    return result


def versions() -> dict[str, str]:
    """Versions of the libraries that answers depend on."""
    return {name: version(name) for name in ("lm_eval", "transformers", "torch", "datasets")}


# ------------------------------------------------------------------------------------------------------------ local benchmarks


class Rows(list):
    """Rows in memory, with the one thing that lm-eval asks of a data set beyond a list: the names of its columns."""

    @property
    def features(self) -> Row:
        return self[0]


class LocalTask(ConfigurableTask):
    """A local benchmark asked in one way; a row's `prompt` is a text or messages."""

    def fewshot_context(
        self,
        doc: Row,
        *args: Any,
        chat_template: Callable[..., str] | None = None,
        system_instruction: str | None = None,
        **options: Any,
    ) -> str:
        """The rendered prompt; plain text for a cloze, which has no user's turn that a system prompt could open."""
        prompt = doc["prompt"]
        if self.config.metadata["plain"]:
            return prompt
        turns: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system_instruction and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system_instruction}, *turns]
        return chat_template(turns) if chat_template else fold_system(turns)[-1]["content"]

    def construct_requests(self, doc: Row, ctx: Any, *, apply_chat_template: bool = False, **options: Any) -> Any:
        """lm-eval's requests: after plain text a choice is set off by a space, after a template by what the template needs."""
        templated = apply_chat_template and not self.config.metadata["plain"]
        return super().construct_requests(doc, ctx, apply_chat_template=templated, **options)


LOCAL_METRIC = {"direct": "acc", "cloze": "acc", "generate": "contains_answer"}


def local_tasks(config: EvalConfig) -> dict[str, LocalTask]:
    """One task of lm-eval for each way of each local benchmark, "name:way", and "style" if it is asked for."""
    names = [task.name for task in config.tasks]
    if twice := {name for name in names if names.count(name) > 1} | (set(names) & set(config.lm_eval_tasks)):
        raise ValueError(f"evals: more than one task is called {', '.join(sorted(twice))}; give each its own name")
    tasks = {}
    for task in config.tasks:
        items = read_items(task)
        for way in task.ask:
            tasks[f"{task.name}:{way}"] = local_task(f"{task.name}:{way}", way, items, config)
    if (prompts := read_style(config)) is not None:
        tasks["style"] = local_task("style", "generate", prompts, config)
    return tasks


def local_task(name: str, way: str, items: list[Row], config: EvalConfig) -> LocalTask:
    """Items (dictionaries with what that way needs) as a task of lm-eval; see `read_items` and `read_style`."""
    docs = Rows({**item, "prompt": item["cloze"] if way == "cloze" else item["question"]} for item in items)
    metrics = ["chosen", "rejected"] if name == "style" else [LOCAL_METRIC[way]]
    shared = {
        "task": name,
        "custom_dataset": lambda **_: {"test": docs},
        "test_split": "test",
        "doc_to_text": lambda doc: str(doc["prompt"]),
        "num_fewshot": 0,
        "metadata": {"plain": way == "cloze"},
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }
    if way != "generate":
        return LocalTask(
            config={**shared, "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
        )
    options = {"until": [], "max_gen_toks": config.max_new_tokens, "do_sample": False}
    score = judge_style if name == "style" else lambda doc, replies: {"contains_answer": names_answer(replies[0], doc)}
    return LocalTask(
        config={
            **shared,
            "output_type": "generate_until",
            "doc_to_target": lambda doc: "",
            "generation_kwargs": options,
            "process_results": score,
        }
    )


def check_choices(tasks: dict[str, LocalTask], lm: EvalLM, limit: int | None) -> None:
    """Raises ValueError, with file, row and column, for a choice that has more tokens than the model reads."""
    for name, task in tasks.items():
        docs = task.eval_docs if name != "style" and not name.endswith(":generate") else []
        for doc in docs[:limit]:
            for i, choice in enumerate(doc["choices"]):
                if len(choice.encode()) <= lm.max_length:  # no token is shorter than a byte
                    continue
                if (tokens := len(lm.tok_encode(choice, add_special_tokens=False))) > lm.max_length:
                    raise ValueError(
                        f"{doc['where']}: 'choices[{i}]' has {tokens:,} tokens, but the model reads {lm.max_length:,} at most: "
                        f"{choice[:60]!r}...; cut it, remove the row, or give the model a larger max_position_embeddings"
                    )


# -------------------------------------------------------------------------------------------------------- asking and answering


def ask(lm: EvalLM, config: EvalConfig, tasks: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples of every task, sorted by `doc_id`; all tasks share one pass over the model."""
    if not tasks:
        return {}
    # lm-eval describes the machine (a second of subprocesses) and the git checkout; config.yaml holds both already. Every
    # process has all answers, and lm-eval gives them to local rank 0 alone.
    with (
        patch.multiple("lm_eval.evaluator", add_env_info=lambda _: None, get_git_commit_hash=lambda: None),
        patch.dict(os.environ, LOCAL_RANK="0"),
    ):
        found: Any = simple_evaluate(
            model=lm,
            tasks=tasks,
            num_fewshot=0,
            limit=config.limit,
            apply_chat_template=config.apply_chat_template,
            # without a template lm-eval puts it before the question with nothing in between
            system_instruction=config.system_instruction and config.system_instruction.rstrip() + "\n\n",
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = found["samples"]
    for task in tasks:
        samples[task.task_name].sort(key=lambda sample: sample["doc_id"])
        if isinstance(task, LocalTask):
            for sample in samples[task.task_name]:
                sample["doc_hash"] = sample["doc"]["hash"]  # of the question alone: the same in each of the three ways
    return samples


def answers(samples: list[dict[str, Any]], metric: str, filter_name: str = "none") -> dict[str, Any]:
    """Accuracy and per-item outcomes of one task asked in one way, with margins (nats) of choices or the replies."""
    samples = [sample for sample in samples if sample["filter"] == filter_name]
    outcomes = [float(sample[metric]) for sample in samples]
    if not outcomes or not set(outcomes) <= {0.0, 1.0}:
        raise ValueError(f"metric {metric!r} is not right or wrong, item by item; TAX needs that: leave the task out")
    way = {
        "metric": metric if filter_name == "none" else f"{metric},{filter_name}",
        "accuracy": sum(outcomes) / len(outcomes),
        "n": len(outcomes),
        "chance": 0.0,
        "outcomes": [int(outcome) for outcome in outcomes],
        "doc_hashes": [sample["doc_hash"] for sample in samples],
    }
    if metric != "acc" and "acc" in samples[0]["metrics"]:  # customary is acc_norm; plain accuracy costs nothing more
        way["acc"] = [int(sample["acc"]) for sample in samples]
    if isinstance(samples[0]["resps"][0][0], str):
        return {**way, "replies": [sample["resps"][0][0] for sample in samples]}
    way["chance"] = sum(1 / len(sample["resps"]) for sample in samples) / len(samples)
    margins = [margin(sample) for sample in samples]
    return way if None in margins else {**way, "margins": margins}


def margin(sample: dict[str, Any]) -> float | None:
    """Log-probability of the right choice minus that of the best other, nats; None where the right one has no index."""
    scores = [score for score, _ in sample["filtered_resps"]]
    gold = sample["target"]
    if not isinstance(gold, int) or not 0 <= gold < len(scores):
        return None
    return round(scores[gold] - max(score for i, score in enumerate(scores) if i != gold), 6)


def local_answers(task: TaskConfig, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A local benchmark's answers, way by way."""
    ways = {way: answers(samples[f"{task.name}:{way}"], LOCAL_METRIC[way]) for way in task.ask}
    return {"family": task.family, "ways": ways}


def official_answers(name: str, tasks: list[Task], samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """An official task's answers; a group's members (MMLU's subjects) pooled, their numbers as strata."""
    leaves = [answers(samples[task.task_name], *official_metric(name, samples[task.task_name])) for task in tasks]
    pooled = dict(leaves[0])
    if len(leaves) > 1:
        for key in ("outcomes", "doc_hashes", "acc", "margins", "replies"):
            if key in pooled:
                pooled[key] = [value for leaf in leaves for value in leaf[key]]
        pooled["n"] = len(pooled["outcomes"])
        pooled["accuracy"] = sum(pooled["outcomes"]) / pooled["n"]
        pooled["chance"] = sum(leaf["chance"] * leaf["n"] for leaf in leaves) / pooled["n"]
        pooled["strata"] = [stratum for stratum, leaf in enumerate(leaves) for _ in range(leaf["n"])]
        pooled["strata_names"] = [task.task_name for task in tasks]
    known = OFFICIAL.get("mmlu" if name.startswith("mmlu") else name)
    return {"family": known.family if known else "", "ways": {"direct": pooled}}


def official_metric(name: str, samples: list[dict[str, Any]]) -> tuple[str, str]:
    """(metric, filter) that is a task's accuracy: the one in `OFFICIAL`, else acc or exact_match after its last filter."""
    if name in OFFICIAL:
        return OFFICIAL[name].metric, OFFICIAL[name].filter
    metrics = samples[0]["metrics"]
    return next((metric for metric in ("acc", "exact_match") if metric in metrics), metrics[0]), samples[-1]["filter"]


def style_answers(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """How many replies show the preferred and the rejected style; outcomes are about the preferred one."""
    n = len(samples)
    return {
        "n": n,
        "chosen_rate": sum(sample["chosen"] for sample in samples) / n,
        "rejected_rate": sum(sample["rejected"] for sample in samples) / n,
        "outcomes": [int(sample["chosen"]) for sample in samples],
        "doc_hashes": [sample["doc_hash"] for sample in samples],
        "replies": [sample["resps"][0][0] for sample in samples],
    }


def settings(config: EvalConfig, lm: EvalLM) -> dict[str, Any]:
    """What another evaluation has to share with this one to be compared with it, and what was noticed."""
    return {
        "apply_chat_template": config.apply_chat_template,
        "system_instruction": config.system_instruction,
        "system_prompt": "first sentence of the user's turn",
        "reply_delimiter": lm.delimiter if config.apply_chat_template else " ",
        "num_fewshot": 0,
        "limit": config.limit,
        "batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "softmax_dtype": "float32",
        "device": lm.device.type,
        "truncated_prompts": lm.truncated,
    }


# ------------------------------------------------------------------------------------------------------------------- housework


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no log lines of lm-eval and its libraries; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets", "huggingface_hub", "accelerate")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # lm-eval's bars have no switch
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def isolated_randomness(device: str) -> Iterator[None]:
    """Seed 0 inside (some official tasks shuffle), and no trace of it outside: lm-eval seeds every generator there is."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
